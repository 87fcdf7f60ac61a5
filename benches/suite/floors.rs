//! What the machine and the libraries allow, each a server of its own process on
//! the servers' core: TCP, HTTP/2 by the h2 crate alone, a bare tonic echo.

use std::process::{ExitCode, Stdio};

use anyhow::Context;
use bytes::Bytes;
use hyper::{HeaderMap, Response};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
};

use crate::{echo, handlers, support};

/// Bytes of a message and of an answer over TCP: those of the reference event
/// with its frame, and of a small answer.
pub(crate) const TCP_BYTES: (usize, usize) = (245, 7);

/// A floor that runs until it is dropped.
pub(crate) struct Floor {
    child: Child,
    pub(crate) addr: String,
}

impl Floor {
    /// Starts one: `tcp`, `h2`, `echo`, or one of [`handlers::FLOORS`].
    pub(crate) async fn start(kind: &str) -> anyhow::Result<Self> {
        let command = support::on_servers_core(std::env::current_exe()?.as_os_str());
        Self::start_by(command, kind).await
    }

    /// The same by a command that runs this program.
    pub(crate) async fn start_by(mut command: Command, kind: &str) -> anyhow::Result<Self> {
        command.args(["--serve", kind]).env("TOKIO_WORKER_THREADS", "1");
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("it was asked for")?).lines();
        let addr = lines.next_line().await?.context("a floor says where it listens")?;
        Ok(Self { child, addr })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Ends it as a relay is ended.
    pub(crate) async fn terminate(mut self) -> anyhow::Result<()> {
        support::send_signal(self.pid(), "TERM")?;
        self.child.wait().await?;
        Ok(())
    }
}

/// Runs in the child.
pub(crate) fn serve(kind: &str) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Runtime::new()?;
    match kind {
        "echo" => runtime.block_on(echo::serve())?,
        kind if handlers::FLOORS.contains(&kind) => {
            runtime.block_on(async { handlers::serve(kind, listen().await?).await })?;
        }
        "h2" => runtime.block_on(serve_h2())?,
        _ => runtime.block_on(serve_tcp())?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn listen() -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    Ok(listener)
}

async fn serve_tcp() -> anyhow::Result<()> {
    let listener = listen().await?;
    loop {
        let (mut stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let (mut buffer, mut left) = (vec![0; 1 << 16], 0);
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                let answers = (left + read) / TCP_BYTES.0;
                left = (left + read) % TCP_BYTES.0;
                if stream.write_all(&vec![1; answers * TCP_BYTES.1]).await.is_err() {
                    return;
                }
            }
        });
    }
}

async fn serve_h2() -> anyhow::Result<()> {
    let listener = listen().await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(call) = connection.accept().await {
                let (request, mut respond) = call?;
                tokio::spawn(async move {
                    let mut body = request.into_body();
                    while let Some(data) = body.data().await {
                        body.flow_control().release_capacity(data?.len())?;
                    }
                    let head = Response::builder().header("content-type", "application/grpc").body(())?;
                    let mut answer = respond.send_response(head, false)?;
                    answer.send_data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]), false)?;
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse()?);
                    answer.send_trailers(trailers)?;
                    anyhow::Ok(())
                });
            }
            anyhow::Ok(())
        });
    }
}
