//! Accepts connections up to a number, and lives on when the machine has no
//! file descriptor left.
//!
//! A connection over the number waits in the kernel's queue until one closes.
//! One that has not said who it is after ten seconds is closed.

use std::{
    future::Future,
    io,
    net::SocketAddr,
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
    time::{Instant, Sleep, sleep},
};
use tracing::warn;

use crate::settings::Reader;

/// An address to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// An address, or a name of this machine.
    pub host: String,
    /// 0 means any that is free.
    pub port: u16,
}

impl Listen {
    pub(crate) fn read(reader: &mut Reader, host: &str, port: &str) -> Self {
        Self { host: reader.text(host), port: reader.number(port, 0..=u16::MAX) }
    }
}

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
/// Bytes with which a caller shows that it speaks our protocol: the length of
/// HTTP/2's preface, after which the server's own limits hold.
const FIRST_BYTES: usize = 24;
/// Longest time until they are here.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);

/// The connections of a listener, at most a number at a time.
#[derive(Debug)]
pub(crate) struct Connections {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    open: Gauge,
    idle_timeout: Option<Duration>,
}

impl Connections {
    /// `open` counts the connections that live.
    pub(crate) fn new(listener: TcpListener, connections_max: usize, open: Gauge) -> Self {
        Self { listener, permits: Arc::new(Semaphore::new(connections_max)), open, idle_timeout: None }
    }

    /// Closes a connection that says nothing for so long, for a server that has
    /// no such limit of its own.
    pub(crate) fn with_idle_timeout(self, idle_timeout: Duration) -> Self {
        Self { idle_timeout: Some(idle_timeout), ..self }
    }

    /// Waits for the next connection.
    pub(crate) async fn next(&mut self) -> (Connection, SocketAddr) {
        let permit = self.permits.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, addr) = self.accept().await;
        // A small answer must not wait for an acknowledgement of the last one.
        let _ = stream.set_nodelay(true);
        let silence = Some(Silence::new());
        let idle_timeout = self.idle_timeout;
        (Connection { stream, silence, idle_timeout, _open: Open::count(self.open.clone(), permit) }, addr)
    }

    async fn accept(&self) -> (TcpStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok(accepted) => return accepted,
                // The caller was gone before we came; nothing is wrong here.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    warn!(%error, "connection could not be accepted");
                    sleep(FAILURE_PAUSE).await;
                }
            }
        }
    }
}

/// For the server of the metrics port.
impl axum::serve::Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        self.next().await
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
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
pub(crate) struct Connection<S = TcpStream> {
    stream: S,
    silence: Option<Silence>,
    idle_timeout: Option<Duration>,
    _open: Open,
}

impl<S> Connection<S> {
    /// The same connection with another stream on top, once both sides agree; from
    /// then on its caller has to say again who it is.
    pub(crate) async fn upgrade<T, F: Future<Output = io::Result<T>>>(
        self,
        agree: impl FnOnce(S) -> F,
    ) -> io::Result<Connection<T>> {
        let Self { stream, idle_timeout, _open, .. } = self;
        Ok(Connection { stream: agree(stream).await?, silence: Some(Silence::new()), idle_timeout, _open })
    }
}

/// How long a caller may still be silent.
#[derive(Debug)]
struct Silence {
    /// Of the first bytes, those that are not here; 0 once they are.
    left: usize,
    timeout: Pin<Box<Sleep>>,
}

impl Silence {
    fn new() -> Self {
        Self { left: FIRST_BYTES, timeout: Box::pin(sleep(FIRST_BYTES_TIMEOUT)) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let idle_timeout = self.idle_timeout;
        let Some(silence) = &mut self.silence else { return read };
        if read.is_ready() {
            silence.left = silence.left.saturating_sub(buf.filled().len() - filled);
            match idle_timeout {
                // The first bytes have to come within one timeout, however slowly.
                _ if silence.left > 0 => {}
                Some(idle_timeout) => silence.timeout.as_mut().reset(Instant::now() + idle_timeout),
                None => self.silence = None,
            }
            return read;
        }
        ready!(silence.timeout.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
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
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

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
        let mut connections = Connections::new(listener, 1, open.clone());
        let _callers = [TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap()];
        let first = connections.next().await.0;
        let second = timeout(Duration::from_millis(100), connections.next()).await;
        assert!(second.is_err());
        assert_eq!(open.get(), 1);
        drop(first);
        assert!(timeout(Duration::from_secs(5), connections.next()).await.is_ok());
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed_where_that_is_asked_for() {
        let (listener, addr) = listener().await;
        let idle = Duration::from_secs(60);
        let mut connections = Connections::new(listener, 1, Gauge::default()).with_idle_timeout(idle);
        let mut caller = TcpStream::connect(addr).await.unwrap();
        let mut connection = connections.next().await.0;
        let mut bytes = [0; FIRST_BYTES];
        caller.write_all(&bytes).await.unwrap();
        connection.read_exact(&mut bytes).await.unwrap();
        tokio::time::pause();
        let start = Instant::now();
        assert_eq!(connection.read(&mut bytes).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= idle - Duration::from_secs(1));
    }

    #[tokio::test]
    async fn a_silent_connection_is_closed_and_a_talking_one_is_not() {
        let (listener, addr) = listener().await;
        let mut connections = Connections::new(listener, 3, Gauge::default());
        let mut caller = TcpStream::connect(addr).await.unwrap();
        let mut talking = connections.next().await.0;
        let _silent_caller = TcpStream::connect(addr).await.unwrap();
        let mut silent = connections.next().await.0;
        let mut dripping_caller = TcpStream::connect(addr).await.unwrap();
        let mut dripping = connections.next().await.0;

        let mut bytes = [0; FIRST_BYTES];
        caller.write_all(&bytes).await.unwrap();
        talking.read_exact(&mut bytes).await.unwrap();
        dripping_caller.write_all(b"P").await.unwrap();
        dripping.read_exact(&mut bytes[..1]).await.unwrap();

        tokio::time::pause();
        for connection in [&mut silent, &mut dripping] {
            let error = connection.read(&mut bytes).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        }
        let still_open = timeout(FIRST_BYTES_TIMEOUT * 3, talking.read(&mut bytes)).await;
        assert!(still_open.is_err());
    }

    #[tokio::test]
    async fn after_an_upgrade_the_caller_has_to_say_again_who_it_is() {
        let (listener, addr) = listener().await;
        let open = Gauge::default();
        let mut connections = Connections::new(listener, 1, open.clone());
        let mut caller = TcpStream::connect(addr).await.unwrap();
        let mut connection = connections.next().await.0;
        let mut bytes = [0; FIRST_BYTES];
        caller.write_all(&bytes).await.unwrap();
        connection.read_exact(&mut bytes).await.unwrap();
        let mut upgraded = connection.upgrade(|stream| async { Ok(stream) }).await.unwrap();
        tokio::time::pause();
        assert_eq!(upgraded.read(&mut bytes).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(open.get(), 1);
        let failed = upgraded.upgrade(|_| async { Err::<TcpStream, _>(io::ErrorKind::Other.into()) }).await;
        assert!(failed.is_err() && open.get() == 0);
    }
}
