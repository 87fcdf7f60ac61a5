//! TLS on the gRPC port: who may call, what a bad start says, and certificates
//! that are renewed while the relay runs.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use analytics_relay::{
    proto::v1::analytics_service_client::AnalyticsServiceClient, providers::sandbox::Vendor,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::harness::{Client, Observer, Relay, Setup, track};

/// Who signs certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, in PEM.
pub(crate) struct Pair {
    pub(crate) cert: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn issue(&self, name: &str) -> Pair {
        self.issue_until(name, 2100)
    }

    fn issue_until(&self, name: &str, year: i32) -> Pair {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.0).unwrap();
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }
}

impl Pair {
    fn identity(&self) -> Identity {
        Identity::from_pem(&self.cert, &self.key)
    }

    /// Puts both where the relay looks for them.
    fn write(&self, dir: &Path) {
        std::fs::write(dir.join("cert.pem"), &self.cert).unwrap();
        std::fs::write(dir.join("key.pem"), &self.key).unwrap();
    }
}

/// A setup whose relay serves TLS with a certificate of this authority.
pub(crate) async fn setup_with(authority: &Authority) -> Setup {
    let mut setup = Setup::new().await;
    let dir = setup.data.path().to_owned();
    authority.issue("localhost").write(&dir);
    setup.set("GRPC_TLS_CERT_FILE", dir.join("cert.pem").to_str().unwrap());
    setup.set("GRPC_TLS_KEY_FILE", dir.join("key.pem").to_str().unwrap());
    setup
}

/// A caller that believes an authority, over a connection of its own.
async fn call(
    relay: &Relay,
    authority: &Authority,
    identity: Option<Identity>,
) -> Result<Client, Box<dyn std::error::Error>> {
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(authority.pem()))
        .domain_name("localhost");
    if let Some(identity) = identity {
        tls = tls.identity(identity);
    }
    let endpoint = Channel::from_shared(format!("https://{}", relay.grpc_addr))?.tls_config(tls)?;
    let mut client = AnalyticsServiceClient::new(endpoint.connect().await?);
    // In TLS 1.3 a caller learns with its first call that it was turned away.
    client.track_batch(analytics_relay::proto::v1::TrackBatchRequest::default()).await?;
    Ok(client)
}

/// Waits until so many handshakes have failed; a caller may learn it sooner.
async fn handshakes_failed(relay: &Relay, count: f64) {
    let start = Instant::now();
    while relay.metric("relay_tls_handshakes_failed_total", &[]).await < count {
        assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {count}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn calls_over_tls_are_delivered_and_no_other_call_gets_through() {
    let authority = Authority::new();
    let setup = setup_with(&authority).await;
    let relay = setup.start().await;
    let started = relay.log("gRPC is served over TLS").await;
    assert_eq!(started["client_certificates"], false);
    let mut observer = Observer::default();
    observer.tracks(&mut call(&relay, &authority, None).await.unwrap(), 120).await;
    assert_eq!(relay.metric("relay_tls_handshakes_failed_total", &[]).await, 0.0);

    // In plaintext, and with a relay that the caller does not believe.
    assert!(relay.client().track_event(track("x", "y")).await.is_err());
    assert!(call(&relay, &Authority::new(), None).await.is_err());
    handshakes_failed(&relay, 2.0).await;

    let ended = relay.terminate().await;
    assert_eq!(ended.code, 0);
    observer.check_balance(&setup, &ended);
    assert_eq!(ended.balance(Vendor::Segment).delivered, 120);
}

#[tokio::test]
async fn with_authorities_for_callers_only_their_callers_get_through() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let mut setup = setup_with(&ours).await;
    let client_ca = setup.data.path().join("callers.pem");
    std::fs::write(&client_ca, theirs.pem()).unwrap();
    setup.set("GRPC_TLS_CLIENT_CA_FILE", client_ca.to_str().unwrap());
    let relay = setup.start().await;
    assert_eq!(relay.log("gRPC is served over TLS").await["client_certificates"], true);
    for (who, identity) in [
        ("nobody", None),
        ("one of another authority", Some(ours.issue("caller").identity())),
        ("one whose time is over", Some(theirs.issue_until("caller", 2001).identity())),
    ] {
        assert!(call(&relay, &ours, identity).await.is_err(), "{who} got through");
    }
    handshakes_failed(&relay, 3.0).await;
    let mut observer = Observer::default();
    let mut client = call(&relay, &ours, Some(theirs.issue("caller").identity())).await.unwrap();
    observer.tracks(&mut client, 10).await;
    observer.check_balance(&setup, &relay.terminate().await);
}

#[tokio::test]
async fn a_caller_that_never_ends_its_handshake_is_closed_and_keeps_no_drain() {
    let authority = Authority::new();
    let setup = setup_with(&authority).await;
    let relay = setup.start().await;
    let mut silent = TcpStream::connect(relay.grpc_addr).await.unwrap();
    let start = Instant::now();
    let read = timeout(Duration::from_secs(20), silent.read(&mut [0; 1])).await;
    assert!(matches!(read, Ok(Ok(0) | Err(_))), "still open: {read:?}");
    let open = start.elapsed();
    assert!(open > Duration::from_secs(4) && open < Duration::from_secs(9), "closed after {open:?}");
    handshakes_failed(&relay, 1.0).await;

    let _silent = TcpStream::connect(relay.grpc_addr).await.unwrap();
    while relay.metric("relay_connections", &[]).await < 1.0 {
        assert!(start.elapsed() < Duration::from_secs(30), "the connection is not seen");
    }
    let ended = relay.terminate().await;
    assert!(ended.code == 0 && ended.took < Duration::from_secs(5), "{:?}", ended.took);
}

#[tokio::test]
async fn a_renewed_certificate_is_used_and_a_broken_one_changes_nothing() {
    let (old, new) = (Authority::new(), Authority::new());
    let setup = setup_with(&old).await;
    let relay = setup.start().await;
    let mut client = call(&relay, &old, None).await.unwrap();
    let mut observer = Observer::default();
    observer.tracks(&mut client, 5).await;

    let renewed = new.issue("localhost");
    std::fs::write(setup.data.path().join("cert.pem"), &renewed.cert).unwrap();
    let warned = relay.log("the TLS files cannot be used, what they held before is served on").await;
    assert!(warned["error"].as_str().unwrap().contains("GRPC_TLS_KEY_FILE"), "{warned}");
    call(&relay, &old, None).await.unwrap();

    renewed.write(setup.data.path());
    relay.log("TLS certificate renewed").await;
    observer.tracks(&mut call(&relay, &new, None).await.unwrap(), 5).await;
    assert!(call(&relay, &old, None).await.is_err());
    // Who was connected stays so.
    observer.tracks(&mut client, 5).await;
    let ended = relay.terminate().await;
    observer.check_balance(&setup, &ended);
    let logged = |message: &str| ended.count(message);
    assert_eq!(logged("TLS certificate renewed"), 1);
    assert_eq!(logged("the TLS files cannot be used, what they held before is served on"), 1);
}

#[tokio::test]
async fn files_that_cannot_be_used_are_told_by_check_and_at_the_start() {
    let authority = Authority::new();
    let mut setup = setup_with(&authority).await;
    let dir = setup.data.path().to_owned();
    let (code, shown, _) = setup.run(&["check"]).await;
    assert!(code == 0 && shown.contains("GRPC_TLS_CERT_FILE=") && shown.ends_with("ok\n"), "{shown}");
    let other = authority.issue("localhost");
    let text = dir.join("text.pem");
    std::fs::write(&text, "canary").unwrap();
    std::fs::write(dir.join("other.pem"), &other.key).unwrap();
    let missing = dir.join("missing.pem");
    for (setting, file, want) in [
        ("GRPC_TLS_CERT_FILE", &missing, "missing.pem: cannot be read: No such file"),
        ("GRPC_TLS_CERT_FILE", &text, "text.pem: want certificates in PEM"),
        ("GRPC_TLS_KEY_FILE", &text, "text.pem: want a private key in PEM"),
        ("GRPC_TLS_KEY_FILE", &dir.join("other.pem"), "cannot be used together"),
        ("GRPC_TLS_CLIENT_CA_FILE", &text, "text.pem: want certificates in PEM"),
    ] {
        let before = setup.vars.clone();
        setup.set(setting, file.to_str().unwrap());
        for args in [&["check"][..], &[]] {
            let (code, out, error) = setup.run(args).await;
            let said = format!("{out}{error}");
            assert!(code == 1 && said.contains(setting) && said.contains(want), "{args:?} {setting}: {said}");
            assert!(!said.contains("canary"), "{said}");
        }
        setup.vars = before;
    }
    setup.vars.remove("GRPC_TLS_KEY_FILE");
    let (code, _, error) = setup.run(&["check"]).await;
    assert!(code == 1 && error.contains("GRPC_TLS_KEY_FILE: got \"\", want a file"), "{error}");
}
