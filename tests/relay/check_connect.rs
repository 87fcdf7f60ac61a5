//! `check --connect`: the way to each provider, tried without an event.

use std::sync::Arc;

use analytics_relay::providers::sandbox::Vendor;
use tokio::net::{TcpListener, TcpSocket};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{ServerConfig, pki_types::PrivateKeyDer},
};

use crate::harness::{KEY, Setup};

/// Runs it: exit code, and the output as how a step went, by provider and step.
struct Tried {
    code: i32,
    out: String,
    err: String,
}

impl Tried {
    async fn of(setup: &Setup) -> Self {
        let (code, out, err) = setup.run(&["check", "--connect"]).await;
        for vendor in Vendor::ALL {
            assert!(setup.sandbox.taken(vendor).is_empty(), "{vendor} got an event");
            assert_eq!(setup.sandbox.stats(vendor).rejected, 0, "{vendor} got what is no event");
        }
        assert!(!out.contains(KEY) && !err.contains(KEY), "{out}{err}");
        Self { code, out, err }
    }

    /// How a step went, and why.
    fn step(&self, vendor: &str, what: &str) -> &str {
        let line = self.out.lines().find(|line| line.starts_with(&format!("{vendor:<10} {what:<14} ")));
        line.unwrap_or_else(|| panic!("no {vendor} {what} in {}", self.out))[26..].trim()
    }

    #[track_caller]
    fn says(&self, vendor: &str, what: &str, how: &str) {
        let step = self.step(vendor, what);
        assert!(step.starts_with(how), "{vendor} {what}: {step}, want {how}");
    }
}

const UNKNOWN: &str = "could not find out";

#[tokio::test]
async fn where_all_is_well_each_step_says_so_and_no_event_is_sent() {
    let tried = Tried::of(&Setup::new().await).await;
    assert_eq!(tried.code, 0, "{}{}", tried.out, tried.err);
    for (vendor, paths) in [
        ("mixpanel", &["path /import", "path /engage"][..]),
        ("amplitude", &["path /batch"]),
        ("segment", &["path /v1/batch"]),
    ] {
        for step in [&["dns", "tcp", "tls"], paths].concat() {
            tried.says(vendor, step, "ok");
        }
    }
    tried.says("mixpanel", "key", "ok");
    tried.says("amplitude", "key", "ok");
    tried.says("segment", "key", UNKNOWN);
    assert!(tried.step("segment", "key").contains("debugger"), "it says where to look instead");
    assert!(tried.step("mixpanel", "tls").contains("plaintext"), "http is told");
}

#[tokio::test]
async fn a_wrong_key_fails_where_the_vendor_tells() {
    let mut setup = Setup::new().await;
    for key in ["MIXPANEL_API_KEY", "AMPLITUDE_API_KEY", "SEGMENT_WRITE_KEY"] {
        setup.set(key, "canary-key");
    }
    let tried = Tried::of(&setup).await;
    assert_eq!(tried.code, 1, "{}", tried.out);
    for (vendor, how) in [("mixpanel", "failed"), ("amplitude", "failed"), ("segment", UNKNOWN)] {
        tried.says(vendor, "key", how);
        tried.says(vendor, "tcp", "ok");
    }
    assert!(!tried.out.contains("canary-key"), "{}", tried.out);
    assert!(tried.err.contains("2 step(s) failed"), "{}", tried.err);
}

#[tokio::test]
async fn a_wrong_address_fails_at_the_step_that_it_is_wrong_in() {
    let mut setup = Setup::new().await;
    // A port that is taken and not listened at.
    let silent = TcpSocket::new_v4().unwrap();
    silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (port, url) = (silent.local_addr().unwrap().port(), setup.sandbox.url());
    setup
        .set("MIXPANEL_BASE_URL", "http://no-such-host.invalid")
        .set("AMPLITUDE_BASE_URL", &format!("https://127.0.0.1:{port}"))
        .set("SEGMENT_BASE_URL", &format!("{url}/elsewhere"));
    let tried = Tried::of(&setup).await;
    assert_eq!(tried.code, 1, "{}", tried.out);
    for (vendor, steps) in [
        ("mixpanel", [("dns", "failed"), ("tcp", UNKNOWN), ("path /import", UNKNOWN), ("key", UNKNOWN)]),
        ("amplitude", [("dns", "ok"), ("tcp", "failed"), ("tls", UNKNOWN), ("key", UNKNOWN)]),
        ("segment", [("dns", "ok"), ("tcp", "ok"), ("path /v1/batch", "failed"), ("key", UNKNOWN)]),
    ] {
        steps.iter().for_each(|(step, how)| tried.says(vendor, step, how));
    }
    assert!(tried.step("segment", "path /v1/batch").contains("404"), "{}", tried.out);
}

#[tokio::test]
async fn tls_fails_at_what_does_not_speak_it_and_at_a_certificate_of_nobody_known() {
    let mut setup = Setup::new().await;
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(certified.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config =
        config.with_no_client_auth().with_single_cert(vec![certified.cert.der().clone()], key).unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handshake = acceptor.accept(stream);
            tokio::spawn(async move { handshake.await.map(drop) });
        }
    });
    let plain = setup.sandbox.url().replace("http:", "https:");
    setup.set("MIXPANEL_BASE_URL", &format!("https://localhost:{port}")).set("AMPLITUDE_BASE_URL", &plain);
    let tried = Tried::of(&setup).await;
    assert_eq!(tried.code, 1, "{}", tried.out);
    for vendor in ["mixpanel", "amplitude"] {
        tried.says(vendor, "tcp", "ok");
        tried.says(vendor, "tls", "failed");
        tried.says(vendor, "key", UNKNOWN);
    }
    assert!(tried.step("mixpanel", "tls").contains("certificate"), "{}", tried.out);
    tried.says("segment", "path /v1/batch", "ok");
}

#[tokio::test]
async fn something_on_the_way_is_told_from_the_vendor() {
    let setup = Setup::new().await;
    for (fault, path, key) in [
        ("503", "failed", UNKNOWN),
        ("redirect=https://login.example/", "failed", UNKNOWN),
        ("junk", "failed", UNKNOWN),
        ("stall", "failed", UNKNOWN),
        ("403+body=<html>blocked</html>", UNKNOWN, "failed"),
        ("400+body=<html>plain HTTP to a TLS port</html>", UNKNOWN, UNKNOWN),
        // Answers to a key that is made up as to ours.
        (r#"400+body={"code":400,"error":"no events"}"#, "ok", UNKNOWN),
    ] {
        setup.sandbox.always(Vendor::Amplitude, Some(fault.parse().unwrap()));
        let tried = Tried::of(&setup).await;
        assert_eq!(tried.code, i32::from([path, key].contains(&"failed")), "{fault}: {}", tried.out);
        tried.says("amplitude", "tcp", "ok");
        tried.says("amplitude", "path /batch", path);
        tried.says("amplitude", "key", key);
        tried.says("mixpanel", "key", "ok");
    }
}

#[tokio::test]
async fn where_nothing_can_be_sent_it_says_so() {
    let mut setup = Setup::new().await;
    setup.set("ANALYTICS_PROVIDER", "none");
    let tried = Tried::of(&setup).await;
    assert_eq!((tried.code, tried.out.contains("nothing to connect to")), (0, true), "{}", tried.out);
    setup.set("ANALYTICS_PROVIDER", "segment").set("TEST_MODE", "true");
    let tried = Tried::of(&setup).await;
    assert_eq!((tried.code, tried.err.contains("TEST_MODE")), (1, true), "{}", tried.err);
    setup.set("TEST_MODE", "false").set("BATCH_SIZE", "0");
    let (code, out, err) = setup.run(&["check", "--connect"]).await;
    assert_eq!((code, err.contains("BATCH_SIZE"), out.as_str()), (1, true, ""), "{err}");
}
