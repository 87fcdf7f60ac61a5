//! From an address to a way to connect: what can never work is found here, and not
//! by trying for ever.

use std::{fmt, time::Duration};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tonic::{
    codegen::http::Uri,
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};

use super::ClientSettings;

/// A connection is asked so often whether it is alive, whether there is a call or
/// not: a path that is dead must not be found by the first event after a pause,
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
/// and given up if it does not answer.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// How a client and a relay that serves TLS know each other.
#[derive(Debug, Clone, Default)]
pub struct ClientTls {
    /// Who may vouch for the relay: certificates in PEM; the system's if not set.
    pub ca_pem: Option<Vec<u8>>,
    /// Who we are, for a relay that asks.
    pub identity: Option<ClientIdentity>,
    /// The name in the relay's certificate, if it is not the host of the address.
    pub domain: Option<String>,
}

/// A caller's certificate and its key.
#[derive(Clone)]
pub struct ClientIdentity {
    /// The certificate, and those between it and its authority, in PEM.
    pub cert_pem: Vec<u8>,
    /// Its private key, in PEM.
    pub key_pem: Vec<u8>,
}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientIdentity(***)")
    }
}

/// Why there will never be a connection.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is none of a relay's.
    #[error("the relay's address: got {got:?}, want {want}")]
    Address {
        /// The address; nothing of it if there may be a password in it.
        got: String,
        /// What it should be.
        want: &'static str,
    },
    /// What is to be used for TLS is not what it should be. Its content is never told.
    #[error("tls.{field}: want {want}")]
    Tls {
        /// The field of [`ClientTls`].
        field: &'static str,
        /// What should be in it.
        want: &'static str,
    },
    /// What is to be used for TLS cannot be used, or the system has no authorities.
    #[error("TLS cannot be used")]
    Unusable(#[from] tonic::transport::Error),
}

/// How to connect to `addr`.
pub(super) fn endpoint(addr: &str, settings: &ClientSettings) -> Result<Endpoint, ClientError> {
    const WANT: &str = "http://host:port, or https://host:port where the relay serves TLS";
    let wrong = |got: &str, want| ClientError::Address { got: got.to_owned(), want };
    if addr.contains('@') {
        return Err(wrong("***", "no user and no password"));
    }
    let uri: Uri = addr.parse().map_err(|_| wrong(addr, WANT))?;
    let is_tls = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(wrong(addr, WANT)),
    };
    // What would be left out without a word.
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(wrong(addr, "no path: gRPC has its own"));
    }
    let tls = &settings.tls;
    if !is_tls && (tls.ca_pem.is_some() || tls.identity.is_some() || tls.domain.is_some()) {
        return Err(wrong(addr, "https, as there are settings for TLS"));
    }
    let endpoint = Endpoint::from(uri)
        .connect_timeout(settings.call_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    if !is_tls {
        return Ok(endpoint);
    }
    Ok(endpoint.tls_config(tls_config(tls)?.timeout(settings.call_timeout))?)
}

fn tls_config(tls: &ClientTls) -> Result<ClientTlsConfig, ClientError> {
    const CERTIFICATES: &str = "certificates in PEM";
    let wrong = |field, want| ClientError::Tls { field, want };
    let mut config = match &tls.ca_pem {
        // An authority that cannot be read would believe nobody, for ever.
        Some(pem) if !has_certificates(pem) => return Err(wrong("ca_pem", CERTIFICATES)),
        Some(pem) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some(ClientIdentity { cert_pem, key_pem }) = &tls.identity {
        if !has_certificates(cert_pem) {
            return Err(wrong("identity.cert_pem", CERTIFICATES));
        }
        if PrivateKeyDer::from_pem_slice(key_pem).is_err() {
            return Err(wrong("identity.key_pem", "a private key in PEM"));
        }
        config = config.identity(Identity::from_pem(cert_pem, key_pem));
    }
    if let Some(domain) = &tls.domain {
        config = config.domain_name(domain);
    }
    Ok(config)
}

fn has_certificates(pem: &[u8]) -> bool {
    let mut certificates = CertificateDer::pem_slice_iter(pem).peekable();
    certificates.peek().is_some() && certificates.all(|certificate| certificate.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(addr: &str, tls: ClientTls) -> String {
        let settings = ClientSettings { tls, ..ClientSettings::default() };
        let error = endpoint(addr, &settings).expect_err(addr);
        format!("{:#}", anyhow::Error::new(error))
    }

    #[test]
    fn what_can_never_work_is_an_error_that_says_what_is_wanted() {
        for addr in
            ["", "relay", "relay:50054", "ftp://relay", "grpc://relay:1", "unix:/run/relay", "http://", "/x"]
        {
            assert!(error(addr, ClientTls::default()).contains("want http://host:port"), "{addr}");
        }
        assert!(error("http://relay:1/api", ClientTls::default()).contains("want no path"));
        assert!(error("https://relay:1/?x=y", ClientTls::default()).contains("want no path"));
        let password = error("http://user:canary@relay:1", ClientTls::default());
        assert!(password.contains("no password") && !password.contains("canary"), "{password}");
        let ca = ClientTls { ca_pem: Some(b"canary".to_vec()), ..ClientTls::default() };
        assert!(error("http://relay:1", ca.clone()).contains("want https"));
        let bad = error("https://relay:1", ca);
        assert!(bad.contains("tls.ca_pem: want certificates in PEM") && !bad.contains("canary"), "{bad}");
        assert!(endpoint("http://relay:50054", &ClientSettings::default()).is_ok());
        assert!(endpoint("http://[::1]:50054/", &ClientSettings::default()).is_ok());
    }

    #[test]
    fn a_caller_that_cannot_prove_who_it_is_is_told_which_part_is_wrong() {
        let issued = rcgen::generate_simple_self_signed(["caller".to_owned()]).unwrap();
        let other = rcgen::KeyPair::generate().unwrap();
        let (cert, key) = (issued.cert.pem().into_bytes(), issued.signing_key.serialize_pem().into_bytes());
        let tls = |cert: &[u8], key: &[u8]| ClientTls {
            ca_pem: Some(issued.cert.pem().into_bytes()),
            identity: Some(ClientIdentity { cert_pem: cert.to_vec(), key_pem: key.to_vec() }),
            domain: None,
        };
        assert!(error("https://relay:1", tls(&key, &key)).contains("tls.identity.cert_pem"));
        assert!(error("https://relay:1", tls(&cert, &cert)).contains("tls.identity.key_pem"));
        let strange = error("https://relay:1", tls(&cert, other.serialize_pem().as_bytes()));
        assert!(strange.contains("TLS cannot be used"), "{strange}");
        let settings = ClientSettings { tls: tls(&cert, &key), ..ClientSettings::default() };
        assert!(endpoint("https://relay:1", &settings).is_ok());
        assert!(!format!("{settings:?}").contains("KEY"), "{settings:?}");
    }
}
