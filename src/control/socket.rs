//! The socket of a relay that runs, and its server with every limit set.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::{
        fs::PermissionsExt,
        net::{SocketAddr, UnixListener as StdListener},
    },
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use axum::{Router, body::Body};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::geteuid;
use tokio::{
    net::{UnixListener, UnixStream},
    select,
    sync::Semaphore,
    task::JoinSet,
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use super::wire::SOCKET;

/// Most commands at a time; more wait.
const CONNECTIONS_MAX: usize = 16;
/// Longest time for the head of a call.
const HEAD_TIME: Duration = Duration::from_secs(5);
const HEAD_BYTES_MAX: usize = 32 * 1024;
const HEADERS_MAX: usize = 32;
/// Pause after a failure to accept, which would otherwise fail again at once.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// Where a relay's socket is.
pub(crate) fn path_in(data_dir: &Path) -> PathBuf {
    data_dir.join(SOCKET)
}

/// True if the system can name a socket so: it takes a hundred bytes or so.
pub(crate) fn fits(path: &Path) -> bool {
    SocketAddr::from_pathname(path).is_ok()
}

/// A socket that listens. It goes with the relay; one that was left behind by a relay that was
/// killed is replaced, as only one process holds the lock of the directory.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Opens it, for this user alone. Without it the relay runs all the same: why it is not
    /// there is said, here and by the commands.
    pub(crate) fn open(data_dir: &Path) -> Option<Self> {
        let path = path_in(data_dir);
        if !fits(&path) {
            warn!(
                path = %path.display(),
                bytes = path.as_os_str().len(),
                "no control socket: its path is too long for one; store and identity commands need a shorter \
                 DATA_DIR to work beside this relay"
            );
            return None;
        }
        match Self::bind(data_dir, &path) {
            Ok(listener) => Some(Self { listener, path }),
            Err(error) => {
                warn!(
                    path = %path.display(),
                    %error,
                    "no control socket: store and identity commands do not work beside this relay"
                );
                None
            }
        }
    }

    /// It has its mode before it has its name.
    fn bind(data_dir: &Path, path: &Path) -> io::Result<UnixListener> {
        let new = data_dir.join("control.new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = StdListener::bind(&new)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
        fs::rename(&new, path)?;
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener)
    }

    /// Serves until `stop`, then lets calls under way finish; unbounded, so the caller sets a
    /// limit, and what it drops ends.
    pub(crate) async fn serve(self, router: Router, stop: impl Future<Output = ()>) {
        let (mut stop, closing) = (pin!(stop), CancellationToken::new());
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut serving = JoinSet::new();
        loop {
            let next = async {
                let place = places.clone().acquire_owned().await.expect("nobody closes it");
                (self.accept().await, place)
            };
            let (stream, place) = select! {
                () = &mut stop => break,
                Some(_) = serving.join_next() => continue,
                next = next => next,
            };
            let served = serve_one(stream, router.clone(), closing.clone());
            serving.spawn(async move {
                served.await;
                drop(place);
            });
        }
        closing.cancel();
        while serving.join_next().await.is_some() {}
    }

    async fn accept(&self) -> UnixStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred().map(|peer| peer.uid()) {
                    Ok(uid) if may_ask(uid, geteuid().as_raw()) => return stream,
                    Ok(uid) => warn!(uid, "another user may not use the control socket"),
                    Err(error) => debug!(%error, "who is at the control socket is gone"),
                },
                Err(error) => {
                    warn!(%error, "the control socket cannot accept");
                    sleep(FAILURE_PAUSE).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // The next relay replaces what stays.
        let _ = fs::remove_file(&self.path);
    }
}

/// The user of the relay and root; file systems that leave a socket's mode aside let
/// everybody through.
fn may_ask(uid: u32, own: u32) -> bool {
    uid == own || uid == 0
}

/// One call a connection: a command has no second one.
async fn serve_one(stream: UnixStream, router: Router, closing: CancellationToken) {
    let answer = service_fn(move |call: hyper::Request<hyper::body::Incoming>| {
        let router = router.clone();
        async move {
            let Ok(answer) = router.oneshot(call.map(Body::new)).await;
            Ok::<_, Infallible>(answer)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false);
    let mut served = pin!(http.serve_connection(TokioIo::new(stream), answer));
    let ended = select! {
        ended = served.as_mut() => ended,
        () = closing.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a command has gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_relays_user_and_root_may_ask() {
        assert!(may_ask(1000, 1000) && may_ask(0, 1000));
        assert!(!may_ask(1001, 1000) && !may_ask(1001, 0));
    }

    #[tokio::test]
    async fn a_socket_is_for_its_user_replaces_a_stale_one_and_goes_with_the_relay() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("control.new"), "of one that was killed").unwrap();
        // Nobody listens at it any more.
        drop(StdListener::bind(path_in(dir.path())).unwrap());
        let socket = ControlSocket::open(dir.path()).unwrap();
        let mode = fs::metadata(path_in(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(path_in(dir.path())).await.unwrap();
        drop(socket);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_for_a_socket_is_no_reason_not_to_start() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        fs::create_dir(&long).unwrap();
        assert!(ControlSocket::open(&long).is_none() && !fits(&path_in(&long)));
        assert!(ControlSocket::open(&dir.path().join("nowhere")).is_none());
    }
}
