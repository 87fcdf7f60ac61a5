//! Accepts connections up to a number, in all and of one peer, and lives on when the
//! machine has no file descriptor left. Listens where it is told to.
//!
//! A connection over a number is refused and does not wait, but that a probe gets
//! through. One that has not said who it is after ten seconds is closed.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus_client::metrics::{counter::Counter, gauge::Gauge};
use rustix::{
    io::Errno,
    net,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
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
        let at = Self { host: reader.text(host), port: reader.number(port, 0..=u16::MAX) };
        if !is_host(&at.host) {
            reader.wrong(
                host,
                &at.host,
                "an address or a name of this machine, or [::] or * for every address",
            );
        }
        at
    }

    /// True if only this machine can reach it.
    pub(crate) fn is_loopback(&self) -> bool {
        let (name, _) = addresses(&self.host);
        name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
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

/// A host as it is set, and where to listen for it. `*`, `::` and `[::]` stand for
/// every address of both families; where the system has no IPv6, for every one of
/// IPv4. Brackets around an address are left out.
fn addresses(host: &str) -> (&str, bool) {
    match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host) {
        "*" | "" | "::" => ("::", true),
        host => (host, false),
    }
}

/// True if a host can be listened at, as far as its form tells.
pub(crate) fn is_host(host: &str) -> bool {
    let (name, _) = addresses(host);
    name.parse::<IpAddr>().is_ok()
        || !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// Listens at a host, which may be the name of an address of this machine, and a
/// port. For every address both families are served by one socket.
pub(crate) async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let (name, everywhere) = addresses(host);
    if !everywhere {
        return TcpListener::bind((name, port)).await;
    }
    match listen_to_both(port) {
        // IPv6 is turned off.
        Err(error)
            if matches!(Errno::from_io_error(&error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL)) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        bound => bound,
    }
}

fn listen_to_both(port: u16) -> io::Result<TcpListener> {
    /// As the standard library has it.
    const BACKLOG: i32 = 1024;
    let socket = net::socket_with(
        net::AddressFamily::INET6,
        net::SocketType::STREAM,
        net::SocketFlags::CLOEXEC | net::SocketFlags::NONBLOCK,
        None,
    )?;
    // Whatever the system's default is.
    net::sockopt::set_ipv6_v6only(&socket, false)?;
    net::sockopt::set_socket_reuseaddr(&socket, true)?;
    net::bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    net::listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Pause after a failure to accept, which would otherwise fail again at once.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);
/// Bytes with which a caller shows that it speaks our protocol: the length of
/// HTTP/2's preface, after which the server's own limits hold.
const FIRST_BYTES: usize = 24;
/// Longest time until they are here.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections beyond the number, for probes; fewer where the number is small.
const SPARE_MAX: usize = 16;
/// How often it is said that connections are refused.
const REFUSED_INTERVAL: Duration = Duration::from_secs(60);

/// Where a connection has its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Within the number.
    Regular,
    /// Beyond it: for a probe, which is soon over. The oldest gives way to the next.
    Spare,
}

/// Who connects, as far as limits tell peers apart: an IPv4 address, or the network
/// of an IPv6 address, of which one machine can have as many as it likes.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// Its connections that live.
    connections: AtomicUsize,
}

impl Peer {
    /// See [`Peer`].
    pub(crate) fn key(ip: IpAddr) -> IpAddr {
        const NETWORK: u128 = !0 << 64;
        match ip.to_canonical() {
            IpAddr::V6(ip) if !ip.is_loopback() => Ipv6Addr::from_bits(ip.to_bits() & NETWORK).into(),
            ip => ip,
        }
    }
}

/// Most connections.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionLimits {
    pub(crate) all: usize,
    /// Of one peer; nothing if each may have a quarter of all, and one on this
    /// machine, which may stand for many, as many as there are.
    pub(crate) of_peer: Option<usize>,
}

impl ConnectionLimits {
    fn of(self, peer: IpAddr) -> usize {
        self.of_peer.unwrap_or(if peer.is_loopback() { usize::MAX } else { self.all.div_ceil(4) })
    }
}

/// The connections of a listener, at most a number at a time.
///
/// One over its peer's number is closed at once. One over the number of all is taken
/// all the same, as a [spare](Slot::Spare), and pushes the oldest spare out: so a
/// probe gets through whoever holds the rest, and nobody waits for a place.
#[derive(Debug)]
pub(crate) struct Connections {
    listener: TcpListener,
    limits: ConnectionLimits,
    permits: Arc<Semaphore>,
    peers: HashMap<IpAddr, Weak<Peer>>,
    /// The spares, the oldest first. Some may be closed already.
    spares: VecDeque<CancellationToken>,
    spares_max: usize,
    open: Gauge,
    refused: Counter,
    refused_said: Option<Instant>,
    idle_timeout: Option<Duration>,
}

impl Connections {
    /// `open` counts the connections that live, `refused` those that were closed for
    /// a limit.
    pub(crate) fn new(
        listener: TcpListener,
        limits: ConnectionLimits,
        open: Gauge,
        refused: Counter,
    ) -> Self {
        Self {
            listener,
            limits,
            permits: Arc::new(Semaphore::new(limits.all)),
            peers: HashMap::new(),
            spares: VecDeque::new(),
            spares_max: (limits.all / 4).clamp(1, SPARE_MAX),
            open,
            refused,
            refused_said: None,
            idle_timeout: None,
        }
    }

    /// Closes a connection that says nothing for so long, for a server that has
    /// no such limit of its own.
    pub(crate) fn with_idle_timeout(self, idle_timeout: Duration) -> Self {
        Self { idle_timeout: Some(idle_timeout), ..self }
    }

    /// Waits for the next connection.
    pub(crate) async fn next(&mut self) -> (Connection, SocketAddr) {
        loop {
            let (stream, addr) = self.accept().await;
            let Some(peer) = self.peer(addr.ip()) else {
                self.refuse(addr, "its peer has as many as it may");
                continue;
            };
            let (permit, closing) = match self.permits.clone().try_acquire_owned() {
                Ok(permit) => (Some(permit), None),
                Err(_) => (None, Some(self.spare(addr))),
            };
            // A small answer must not wait for an acknowledgement of the last one.
            let _ = stream.set_nodelay(true);
            let open = Open::new(self.open.clone(), peer, permit);
            let silence = Some(Silence::new(self.idle_timeout));
            let idle_timeout = self.idle_timeout;
            let closing = closing.map(|closing| Box::pin(closing.cancelled_owned()));
            return (Connection { stream, silence, idle_timeout, closing, open }, addr);
        }
    }

    /// The peer of a new connection, if it may have one more.
    fn peer(&mut self, ip: IpAddr) -> Option<Arc<Peer>> {
        let ip = Peer::key(ip);
        if self.peers.len() > 2 * self.limits.all {
            self.peers.retain(|_, peer| peer.strong_count() > 0);
        }
        let known = self.peers.get(&ip);
        if let Some(peer) = known.and_then(Weak::upgrade) {
            // Its connections are counted, and not who holds it.
            let has_room = peer.connections.load(Ordering::Relaxed) < self.limits.of(ip);
            return has_room.then_some(peer);
        }
        let peer = Arc::new(Peer::default());
        self.peers.insert(ip, Arc::downgrade(&peer));
        Some(peer)
    }

    /// A place beyond the number: whoever holds the oldest loses it.
    fn spare(&mut self, addr: SocketAddr) -> CancellationToken {
        if self.spares.len() == self.spares_max
            && let Some(oldest) = self.spares.pop_front()
        {
            oldest.cancel();
        }
        let closing = CancellationToken::new();
        self.spares.push_back(closing.clone());
        self.refuse(addr, "all connections are taken");
        closing
    }

    fn refuse(&mut self, addr: SocketAddr, why: &'static str) {
        self.refused.inc();
        let now = Instant::now();
        if self.refused_said.is_none_or(|said| now - said >= REFUSED_INTERVAL) {
            self.refused_said = Some(now);
            let ConnectionLimits { all, .. } = self.limits;
            warn!(peer = %addr, connections_max = all, of_peer_max = self.limits.of(addr.ip()), why, "connection refused");
        }
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
    peer: Arc<Peer>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Open {
    fn new(gauge: Gauge, peer: Arc<Peer>, permit: Option<OwnedSemaphorePermit>) -> Self {
        gauge.inc();
        peer.connections.fetch_add(1, Ordering::Relaxed);
        Self { gauge, peer, permit }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gauge.dec();
        self.peer.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One caller's connection.
#[derive(Debug)]
pub(crate) struct Connection<S = TcpStream> {
    stream: S,
    silence: Option<Silence>,
    idle_timeout: Option<Duration>,
    /// For a spare: it has to give way.
    closing: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    open: Open,
}

impl<S> Connection<S> {
    /// The same connection with another stream on top, once both sides agree; from
    /// then on its caller has to say again who it is.
    pub(crate) async fn upgrade<T, F: Future<Output = io::Result<T>>>(
        self,
        agree: impl FnOnce(S) -> F,
    ) -> io::Result<Connection<T>> {
        let Self { stream, idle_timeout, closing, open, .. } = self;
        let stream = agree(stream).await?;
        Ok(Connection { stream, silence: Some(Silence::new(idle_timeout)), idle_timeout, closing, open })
    }

    /// Where it has its place.
    pub(crate) fn slot(&self) -> Slot {
        if self.open.permit.is_some() { Slot::Regular } else { Slot::Spare }
    }

    fn must_close(&mut self, cx: &mut Context<'_>) -> bool {
        self.closing.as_mut().is_some_and(|closing| closing.as_mut().poll(cx).is_ready())
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
    fn new(idle_timeout: Option<Duration>) -> Self {
        let timeout = idle_timeout.unwrap_or(FIRST_BYTES_TIMEOUT);
        Self { left: FIRST_BYTES, timeout: Box::pin(sleep(timeout)) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.must_close(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
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
        if self.must_close(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
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
        if self.must_close(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
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

    fn limits(all: usize) -> ConnectionLimits {
        ConnectionLimits { all, of_peer: None }
    }

    fn connections(listener: TcpListener, limits: ConnectionLimits) -> Connections {
        Connections::new(listener, limits, Gauge::default(), Counter::default())
    }

    /// Nobody waits: one over the number pushes the oldest spare out.
    #[tokio::test]
    async fn over_the_number_a_connection_gets_a_spare_place_and_the_oldest_spare_goes() {
        let (listener, addr) = listener().await;
        let mut connections = connections(listener, limits(2));
        let mut callers = Vec::new();
        let mut taken = Vec::new();
        for _ in 0..4 {
            callers.push(TcpStream::connect(addr).await.unwrap());
            taken.push(connections.next().await.0);
        }
        let slots: Vec<_> = taken.iter().map(Connection::slot).collect();
        assert_eq!(slots, [Slot::Regular, Slot::Regular, Slot::Spare, Slot::Spare]);
        assert_eq!((connections.open.get(), connections.refused.get()), (4, 2));
        let error = taken[2].read(&mut [0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(timeout(Duration::from_millis(50), taken[3].read(&mut [0])).await.is_err());
        taken.remove(0);
        let _caller = TcpStream::connect(addr).await.unwrap();
        assert_eq!(connections.next().await.0.slot(), Slot::Regular);
    }

    #[tokio::test]
    async fn a_peer_has_its_own_number_and_one_over_it_is_closed_at_once() {
        let (listener, addr) = listener().await;
        let mut connections = connections(listener, ConnectionLimits { all: 10, of_peer: Some(2) });
        let _callers = [TcpStream::connect(addr).await.unwrap(), TcpStream::connect(addr).await.unwrap()];
        let first = connections.next().await.0;
        // Who only knows the peer is none of its connections.
        let _known = first.open.peer.clone();
        let _second = timeout(Duration::from_secs(5), connections.next()).await.expect("it may have two").0;
        let mut refused = TcpStream::connect(addr).await.unwrap();
        let none = timeout(Duration::from_millis(50), connections.next()).await;
        assert!(none.is_err());
        assert_eq!(refused.read(&mut [0]).await.unwrap_or(0), 0, "closed");
        drop(first);
        let _caller = TcpStream::connect(addr).await.unwrap();
        assert_eq!(connections.next().await.0.slot(), Slot::Regular);
    }

    #[test]
    fn a_quarter_is_for_one_peer_and_all_for_this_machine() {
        let limits = limits(10);
        let of = |ip: &str| limits.of(Peer::key(ip.parse().unwrap()));
        assert_eq!(
            (of("203.0.113.9"), of("127.0.0.1"), of("::1"), of("::ffff:127.0.0.1")),
            (3, usize::MAX, usize::MAX, usize::MAX)
        );
        let peer = |ip: &str| Peer::key(ip.parse().unwrap());
        assert_eq!(peer("2001:db8::1"), peer("2001:db8::2:1"), "one network");
        assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
        assert_eq!(peer("::ffff:203.0.113.9"), peer("203.0.113.9"));
    }

    #[tokio::test]
    async fn every_form_of_everywhere_is_listened_to_by_both_families() {
        for host in ["[::]", "::", "*"] {
            assert!(is_host(host), "{host}");
            let port = listen(host, 0).await.unwrap().local_addr().unwrap();
            if port.is_ipv4() {
                println!("not run: listening to both families: the system has no IPv6");
                return;
            }
            let listener = listen(host, 0).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.unwrap();
        }
        for host in ["127.0.0.1", "[::1]", "localhost", "0.0.0.0"] {
            assert!(is_host(host) && listen(host, 0).await.is_ok(), "{host}");
        }
        for host in ["http://x", "1.2.3.4:80", "[::1", "a b"] {
            assert!(!is_host(host), "{host}");
        }
    }

    #[tokio::test]
    async fn an_idle_connection_is_closed_where_that_is_asked_for() {
        let (listener, addr) = listener().await;
        let idle = Duration::from_secs(60);
        let mut connections = connections(listener, limits(1)).with_idle_timeout(idle);
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
        let mut connections = connections(listener, limits(3));
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
        let mut connections = Connections::new(listener, limits(1), open.clone(), Counter::default());
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
