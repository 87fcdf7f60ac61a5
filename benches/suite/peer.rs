//! syslog-ng with its HTTP destination, on the same core: lines over TCP to
//! requests of 50. It neither parses a line nor answers its sender, so it is less
//! work than a relay's, and tells what such work costs a mature program in C.

use std::{path::Path, process::Stdio, time::Duration};

use analytics_relay::providers::sandbox::Vendor;
use anyhow::{Context, ensure};
use serde_json::json;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    process::Command,
    time::{Instant, sleep},
};

use crate::{
    rate::{Rate, Usage, window},
    sink::Sink,
    support,
};

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);
/// Lines of one write.
const LINES: usize = 200;

/// True if it is on this machine.
pub(crate) async fn is_here() -> bool {
    let version = Command::new("syslog-ng").arg("--version").output().await;
    version.is_ok_and(|output| {
        let said = String::from_utf8_lossy(&output.stdout);
        said.split([',', '\n', ' ']).any(|module| module == "http")
    })
}

/// What goes through at its own pace.
pub(crate) async fn relayed() -> anyhow::Result<Rate> {
    let dir = tempfile::tempdir()?;
    let sink = Sink::start().await?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let config = dir.path().join("syslog-ng.conf");
    std::fs::write(&config, configuration(port, &sink.url))?;
    let mut child = command(dir.path(), &config).spawn().context("syslog-ng")?;
    let pid = child.id().context("it has just been started")?;
    let mut stream = connect(port).await?;
    let lines = line().repeat(LINES);
    let sending = async {
        loop {
            if let Err(error) = stream.write_all(&lines).await {
                return error;
            }
        }
    };
    let rate = tokio::select! {
        error = sending => return Err(error).context("syslog-ng"),
        rate = window(|| Ok(Usage { events: sink.taken(Vendor::Segment), cpu: support::cpu_time(pid)? })) => rate?,
    };
    ensure!(rate.events > 0.0, "nothing came through syslog-ng");
    child.kill().await?;
    Ok(rate)
}

fn command(dir: &Path, config: &Path) -> Command {
    let mut command = support::on_servers_core("syslog-ng".as_ref());
    command.args(["--foreground", "--no-caps", "--cfgfile"]).arg(config);
    for (option, file) in [("--persist-file", "persist"), ("--pidfile", "pid"), ("--control", "control")] {
        command.arg(option).arg(dir.join(file));
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}

fn configuration(port: u16, url: &str) -> String {
    format!(
        r#"@version: 3.38
options {{ stats-freq(0); }};
source events {{
  network(ip("127.0.0.1") port({port}) transport("tcp") flags(no-parse) log-iw-size(10000));
}};
destination provider {{
  http(url("{url}/v1/batch") method("POST") headers("content-type: application/json")
    body-prefix("{{\"batch\":[") delimiter(",") body("$MSG") body-suffix("]}}")
    batch-lines(50) batch-timeout(100));
}};
log {{ source(events); destination(provider); flags(flow-control); }};
"#
    )
}

/// The reference event, as Segment takes it.
fn line() -> Vec<u8> {
    let event = json!({
        "type": "track", "event": "Order Placed", "userId": "user-0000000001",
        "messageId": "01890a5d-ac96-774b-bcce-000000000001", "timestamp": "2026-01-01T00:00:00.000Z",
        "properties": {"sku": "SKU-0001", "currency": "EUR", "coupon": "SPRING-SALE", "total": 19.5,
            "quantity": 3, "gift": false, "page": 7.0},
    });
    format!("{event}\n").into_bytes()
}

async fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let start = Instant::now();
    loop {
        match TcpStream::connect(("127.0.0.1", port)).await {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > PATIENCE => return Err(error).context("syslog-ng"),
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
}
