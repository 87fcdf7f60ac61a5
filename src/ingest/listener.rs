//! Accepts connections up to a number, and lives on when the machine has no
//! file descriptor left.
//!
//! A connection over the number waits in the kernel's queue until one closes.
//! One that has not said anything after ten seconds is closed.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tracing::warn;

/// File descriptors that are kept for everything but callers: providers, disk,
/// scrapes, the runtime.
const DESCRIPTORS_KEPT: u64 = 128;

/// Raises the limit of open files as far as it goes, and returns how many
/// connections it leaves room for: at most `wanted`. Without room for its own
/// connections and files the relay could neither deliver nor put anything away.
pub(crate) fn connections_within_limits(wanted: usize) -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum || limit.maximum.is_none() {
        let raised = Rlimit { current: limit.maximum, ..limit };
        if setrlimit(Resource::Nofile, raised).is_ok() {
            limit = raised;
        }
    }
    let Some(descriptors) = limit.current else { return wanted };
    let room = descriptors.saturating_sub(DESCRIPTORS_KEPT).max(descriptors / 4).max(1);
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if room < wanted {
        warn!(
            open_files_max = descriptors,
            connections_max = room,
            wanted,
            "the limit of open files leaves room for fewer connections"
        );
    }
    room.min(wanted)
}

/// Pause after a failure to accept, which would otherwise fail again at once.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);
/// Longest silence of a new connection.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(10);

/// The connections of a listener, at most `connections_max` at a time.
pub(crate) fn connections(
    listener: TcpListener,
    connections_max: usize,
    open: Gauge,
) -> impl Stream<Item = io::Result<Connection>> {
    let permits = Arc::new(Semaphore::new(connections_max));
    futures_util::stream::unfold((listener, permits, open), |(listener, permits, open)| async move {
        let permit = permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = accept(&listener).await;
        // A small answer must not wait for an acknowledgement of the last one.
        let _ = stream.set_nodelay(true);
        let connection = Connection {
            stream,
            silence: Some(Box::pin(sleep(FIRST_BYTE_TIMEOUT))),
            _open: Open::count(open.clone(), permit),
        };
        Some((Ok(connection), (listener, permits, open)))
    })
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            // The caller was gone before we came; nothing is wrong here.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                warn!(%error, "connection could not be accepted");
                sleep(FAILURE_PAUSE).await;
            }
        }
    }
}

/// Counts a connection as long as it lives.
#[derive(Debug)]
struct Open {
    gauge: Gauge,
    _permit: OwnedSemaphorePermit,
}

impl Open {
    fn count(gauge: Gauge, permit: OwnedSemaphorePermit) -> Self {
        gauge.inc();
        Self { gauge, _permit: permit }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// One caller's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    /// Until the first byte.
    silence: Option<Pin<Box<Sleep>>>,
    _open: Open,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(result) = Pin::new(&mut self.stream).poll_read(cx, buf) {
            self.silence = None;
            return Poll::Ready(result);
        }
        if let Some(silence) = &mut self.silence {
            ready!(silence.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::StreamExt;
    use tokio::{io::AsyncReadExt, time::timeout};

    use super::*;

    async fn listener() -> (TcpListener, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[tokio::test]
    async fn connections_over_the_number_wait_until_one_closes() {
        let (listener, addr) = listener().await;
        let open = Gauge::default();
        let mut connections = pin!(connections(listener, 1, open.clone()));
        let _callers = [TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap()];
        let first = connections.next().await.unwrap();
        let second = timeout(Duration::from_millis(100), connections.next()).await;
        assert!(second.is_err());
        assert_eq!(open.get(), 1);
        drop(first);
        assert!(timeout(Duration::from_secs(5), connections.next()).await.is_ok());
    }

    #[tokio::test]
    async fn a_silent_connection_is_closed_and_a_talking_one_is_not() {
        let (listener, addr) = listener().await;
        let mut connections = pin!(connections(listener, 2, Gauge::default()));
        let mut caller = TcpStream::connect(addr).await.unwrap();
        let mut talking = connections.next().await.unwrap().unwrap();
        let _silent_caller = TcpStream::connect(addr).await.unwrap();
        let mut silent = connections.next().await.unwrap().unwrap();

        tokio::io::AsyncWriteExt::write_all(&mut caller, b"x").await.unwrap();
        let mut byte = [0];
        talking.read_exact(&mut byte).await.unwrap();

        tokio::time::pause();
        let error = silent.read(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let still_open = timeout(FIRST_BYTE_TIMEOUT * 3, talking.read(&mut byte)).await;
        assert!(still_open.is_err());
    }
}
