//! What TLS costs: a certificate for a relay, and callers who believe it.

use std::{path::Path, time::Duration};

use anyhow::ensure;
use tokio::time::Instant;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};

use crate::{report::Report, sink::Sink, support::Relay};

const HANDSHAKES: u32 = 300;

/// A certificate of its own authority, and where it is.
pub(crate) struct ServerCertificate {
    pem: String,
    files: [String; 2],
}

impl ServerCertificate {
    pub(crate) fn write(dir: &Path) -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let files = ["cert.pem", "key.pem"].map(|name| dir.join(name).display().to_string());
        std::fs::write(&files[0], made.cert.pem())?;
        std::fs::write(&files[1], made.signing_key.serialize_pem())?;
        Ok(Self { pem: made.cert.pem(), files })
    }

    /// The relay's settings.
    pub(crate) fn settings(&self) -> [(&str, &str); 2] {
        [("GRPC_TLS_CERT_FILE", &self.files[0]), ("GRPC_TLS_KEY_FILE", &self.files[1])]
    }

    pub(crate) async fn connect(&self, addr: &str) -> anyhow::Result<Channel> {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.pem));
        let endpoint = Channel::from_shared(format!("https://{addr}"))?;
        Ok(endpoint.tls_config(tls.domain_name("localhost"))?.connect().await?)
    }
}

/// The relay's CPU for a connection, with TLS and without.
pub(crate) async fn handshakes(report: &mut Report) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let certificate = ServerCertificate::write(dir.path())?;
    let sink = Sink::start().await?;
    for (name, settings) in [("plain", &[][..]), ("tls", &certificate.settings())] {
        let data = tempfile::tempdir()?;
        let relay = Relay::start_roomy(&sink.url, data.path(), "segment", settings).await?;
        let (before, start) = (relay.cpu_time()?, Instant::now());
        for _ in 0..HANDSHAKES {
            let addr = &relay.grpc_addr;
            let channel = match settings {
                [] => Channel::from_shared(format!("http://{addr}"))?.connect().await?,
                _ => certificate.connect(addr).await?,
            };
            drop(channel);
            ensure!(start.elapsed() < Duration::from_secs(60), "the machine is too slow for these figures");
        }
        let cpu = (relay.cpu_time()? - before) / HANDSHAKES;
        let floor = "connection.plain.cpu";
        report.add_beside(&format!("connection.{name}.cpu"), cpu.as_secs_f64() * 1e6, "us/connection", floor);
        relay.terminate().await?;
    }
    Ok(())
}
