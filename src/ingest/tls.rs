//! TLS for the doors' ports, from files that may be renewed while they run.

use std::{
    convert::Infallible,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
};
use thiserror::Error;
use tokio::{
    net::TcpStream,
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::{info, warn};

use crate::settings::Reader;

/// Longest time for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the files are looked at. What renews certificates replaces the
/// files and cannot tell us.
pub(crate) const RENEWAL_INTERVAL: Duration = Duration::from_secs(10);

/// A door, as far as its TLS differs from another's.
#[derive(Debug, PartialEq, Eq)]
pub struct TlsDoor {
    /// Its settings: the relay's certificate,
    cert: &'static str,
    /// the certificate's key,
    key: &'static str,
    /// and the authorities of callers.
    client_ca: &'static str,
    /// The protocols that it speaks, the best first.
    protocols: &'static [&'static [u8]],
}

impl TlsDoor {
    /// gRPC speaks HTTP/2 and nothing else.
    pub(crate) const GRPC: &'static Self = &Self {
        cert: "GRPC_TLS_CERT_FILE",
        key: "GRPC_TLS_KEY_FILE",
        client_ca: "GRPC_TLS_CLIENT_CA_FILE",
        protocols: &[b"h2"],
    };
    /// Browsers and SDKs.
    pub(crate) const HTTP: &'static Self = &Self {
        cert: "HTTP_TLS_CERT_FILE",
        key: "HTTP_TLS_KEY_FILE",
        client_ca: "HTTP_TLS_CLIENT_CA_FILE",
        protocols: &[b"h2", b"http/1.1"],
    };
}

/// PEM files, read at the start and again whenever they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Which door they are for.
    pub(crate) door: &'static TlsDoor,
    /// The relay's certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities of callers; without it, anyone may call.
    pub client_ca: Option<PathBuf>,
}

impl TlsFiles {
    pub(crate) fn read(reader: &mut Reader, door: &'static TlsDoor) -> Option<Self> {
        let mut file =
            |name| Some(PathBuf::from(reader.text(name))).filter(|path| !path.as_os_str().is_empty());
        let [cert, key, client_ca] = [door.cert, door.key, door.client_ca].map(&mut file);
        match (cert, key) {
            (Some(cert), Some(key)) => return Some(Self { door, cert, key, client_ca }),
            // What was meant to be closed must not be open.
            (None, None) if client_ca.is_none() => {}
            (None, None) => reader.wrong(door.cert, "", &format!("a file, as {} is set", door.client_ca)),
            (None, Some(_)) => reader.wrong(door.cert, "", &format!("a file, as {} is set", door.key)),
            (Some(_), None) => reader.wrong(door.key, "", &format!("a file, as {} is set", door.cert)),
        }
        None
    }
}

/// Why TLS cannot be served with the files that are named.
#[derive(Debug, Error)]
pub enum TlsError {
    /// One cannot be read.
    #[error("{setting} {}: cannot be read", path.display())]
    Read {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// One does not hold what it should. Its content is never told.
    #[error("{setting} {}: want {want} in PEM", path.display())]
    Pem {
        /// The setting that names it.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// What should be in it.
        want: &'static str,
    },
    /// The certificate and the key cannot be used together.
    #[error("{}, {}: cannot be used together", door.cert, door.key)]
    Pair {
        /// Whose they are.
        door: &'static TlsDoor,
        /// Why not.
        source: rustls::Error,
    },
    /// The callers' authorities cannot be used.
    #[error("{setting}: cannot be used")]
    ClientCa {
        /// The setting that names them.
        setting: &'static str,
        /// Why not.
        source: VerifierBuilderError,
    },
}

/// What TLS is served with now.
pub(crate) struct Tls {
    files: TlsFiles,
    served: RwLock<Served>,
}

struct Served {
    content: Content,
    acceptor: TlsAcceptor,
}

/// What the files hold.
#[derive(PartialEq, Eq)]
struct Content {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files. Blocks for as long as that takes.
    pub(crate) fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let served = Served::new(files, Content::read(files)?)?;
        Ok(Self { files: files.clone(), served: RwLock::new(served) })
    }

    /// Agrees with a caller on a connection.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = self.served.read().unwrap_or_else(PoisonError::into_inner).acceptor.clone();
        timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await?
    }

    /// Uses renewed files for the connections that come after; while those
    /// cannot be used, what was there before.
    pub(crate) async fn follow_renewals(&self, every: Duration) -> Infallible {
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // So that what stays wrong is told once.
        let mut told = String::new();
        loop {
            ticks.tick().await;
            let files = self.files.clone();
            let content = spawn_blocking(move || Content::read(&files));
            match self.renew(content.await.expect("reading does not panic")) {
                Ok(true) => info!("TLS certificate renewed"),
                Ok(false) => {}
                Err(error) => {
                    let error = format!("{:#}", anyhow::Error::new(error));
                    if error != told {
                        warn!(error, "the TLS files cannot be used, what they held before is served on");
                        told = error;
                    }
                    continue;
                }
            }
            told.clear();
        }
    }

    /// True if there is something new, and it can be used.
    fn renew(&self, content: Result<Content, TlsError>) -> Result<bool, TlsError> {
        let content = content?;
        if self.served.read().unwrap_or_else(PoisonError::into_inner).content == content {
            return Ok(false);
        }
        let renewed = Served::new(&self.files, content)?;
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = renewed;
        Ok(true)
    }
}

impl Served {
    fn new(files: &TlsFiles, content: Content) -> Result<Self, TlsError> {
        Ok(Self { acceptor: acceptor(files, &content)?, content })
    }
}

impl Content {
    fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let read = |setting, path: &Path| {
            fs::read(path).map_err(|source| TlsError::Read { setting, path: path.to_owned(), source })
        };
        Ok(Self {
            cert: read(files.door.cert, &files.cert)?,
            key: read(files.door.key, &files.key)?,
            client_ca: files.client_ca.as_deref().map(|path| read(files.door.client_ca, path)).transpose()?,
        })
    }
}

fn acceptor(files: &TlsFiles, content: &Content) -> Result<TlsAcceptor, TlsError> {
    let door = files.door;
    let unusable = |source| TlsError::Pair { door, source };
    let certs = certificates(door.cert, &files.cert, &content.cert)?;
    let key = PrivateKeyDer::from_pem_slice(&content.key).map_err(|_| TlsError::Pem {
        setting: door.key,
        path: files.key.clone(),
        want: "a private key",
    })?;
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(unusable)?;
    let builder = match (&files.client_ca, &content.client_ca) {
        (Some(path), Some(client_ca)) => {
            let mut authorities = RootCertStore::empty();
            for authority in certificates(door.client_ca, path, client_ca)? {
                authorities.add(authority).map_err(|_| not_certificates(door.client_ca, path))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(authorities.into(), provider);
            builder.with_client_cert_verifier(
                verifier.build().map_err(|source| TlsError::ClientCa { setting: door.client_ca, source })?,
            )
        }
        _ => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(certs, key).map_err(unusable)?;
    config.alpn_protocols = door.protocols.iter().map(|protocol| protocol.to_vec()).collect();
    if content.client_ca.is_some() {
        // A session that is resumed does not show its certificate again, which may
        // have ended since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn certificates(
    setting: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    certificates.ok().filter(|found| !found.is_empty()).ok_or_else(|| not_certificates(setting, path))
}

fn not_certificates(setting: &'static str, path: &Path) -> TlsError {
    TlsError::Pem { setting, path: path.to_owned(), want: "certificates" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_who_needs_a_certificate_has_to_show_it_each_time() {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let files = |client_ca: Option<&str>| TlsFiles {
            door: TlsDoor::GRPC,
            cert: "cert.pem".into(),
            key: "key.pem".into(),
            client_ca: client_ca.map(Into::into),
        };
        let (cert, key) = (made.cert.pem().into_bytes(), made.signing_key.serialize_pem().into_bytes());
        for client_ca in [None, Some("ca.pem")] {
            let of_callers = client_ca.map(|_| cert.clone());
            let content = Content { cert: cert.clone(), key: key.clone(), client_ca: of_callers };
            let acceptor = acceptor(&files(client_ca), &content).unwrap();
            let resumes =
                acceptor.config().session_storage.can_cache() || acceptor.config().send_tls13_tickets > 0;
            assert_eq!(resumes, client_ca.is_none());
        }
    }
}
