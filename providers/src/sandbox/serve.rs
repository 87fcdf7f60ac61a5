//! The listener and its connections.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{debug, warn};

use super::line::Line;
use super::service::answer;
use super::state::State;

/// A listener being served. Dropping it stops the server, without waiting.
pub(super) struct Running {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Running {
    /// Closes the listener and all connections, and returns when they are closed.
    pub(super) async fn stop(mut self) {
        drop(self.stop.take());
        // An error would be a panic in `accept`, and the connections are closed then too.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves the listener on the current runtime.
pub(super) fn serve(listener: TcpListener, state: Arc<State>) -> Running {
    let (stop, stopped) = oneshot::channel();
    Running { stop: Some(stop), task: tokio::spawn(accept(listener, state, stopped)) }
}

async fn accept(listener: TcpListener, state: Arc<State>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, Arc::clone(&state)));
                }
                Err(error) => {
                    warn!(%error, "sandbox cannot accept a connection");
                    // Out of descriptors, most likely: trying at once would spin.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            // Only to forget it.
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn connection(stream: TcpStream, state: Arc<State>) {
    // Without it a drip would be collected into one packet.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%error, "sandbox cannot set TCP_NODELAY");
    }
    let line = Arc::new(Line::default());
    let socket = Socket { stream, line: Arc::clone(&line) };
    let service = service_fn(|request| answer(Arc::clone(&state), Arc::clone(&line), request));
    if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(socket), service).await {
        debug!(%error, "sandbox connection ended");
    }
}

/// A stream that can be made to end in a reset.
struct Socket {
    stream: TcpStream,
    line: Arc<Line>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.line.is_reset()
            // Closing with unsent data discarded is what sends a RST.
            && let Err(error) = self.stream.set_zero_linger()
        {
            warn!(%error, "sandbox cannot reset a connection");
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A FIN first would look like an orderly end.
        if self.line.is_reset() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
