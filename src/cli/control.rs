//! The way of a command to the process that has the store: a relay that runs, through its
//! socket; or this one, if there is none.

use std::{
    fs, io,
    path::{Path, PathBuf},
    pin::pin,
    time::Duration,
};

use analytics_relay_store::sqlite;
use anyhow::{Context, bail, ensure};
use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderValue, Method, Request, Response, StatusCode},
};
use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use memchr::memchr;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::StoreAt;
use crate::{
    config::{Config, StorePlace},
    control::{
        self, Control,
        socket::{fits, path_in},
        wire::{FILE_HEADER, Failed, SMALL_BYTES_MAX, Told},
    },
    files::DataDirLock,
    privacy::{secret::DataSecret, suppression::Suppressed},
    store::{Backend, OpenStore, Server},
    telemetry::StoreMetrics,
    time::Clock,
};

/// How long a relay that starts or stops, or another command, may keep us waiting.
const REACH_TIME: Duration = Duration::from_secs(5);
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// Longest silence of a relay: it answers small calls in less, and tells each second that a
/// long one goes on.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Where the store of the settings is.
#[derive(Debug)]
pub(super) enum Target {
    /// In a file.
    File(PathBuf),
    /// In a server, whose place this is.
    Server(String),
}

impl Target {
    pub(super) fn of(config: &Config, at: &StoreAt) -> anyhow::Result<Self> {
        let file = config.store.file(data_dir(config, at));
        match (&config.store.place, file) {
            (_, Some(file)) => Ok(Self::File(file)),
            (StorePlace::Nowhere, None) => {
                bail!("STORE_URL: got no store, want sqlite: or postgres://")
            }
            _ => Ok(Self::Server(config.store.shown())),
        }
    }

    /// The file, for what only a file has; what to do instead where there is none.
    pub(super) fn file(self, instead: &str) -> anyhow::Result<PathBuf> {
        match self {
            Self::File(file) => Ok(file),
            Self::Server(shown) => bail!("STORE_URL names {shown}: {instead}"),
        }
    }
}

pub(super) fn data_dir<'a>(config: &'a Config, at: &'a StoreAt) -> &'a Path {
    at.data_dir.as_deref().unwrap_or(&config.data_dir)
}

/// Who answers.
pub(super) struct Way {
    door: Door,
    /// The file that is meant, as the relay's directory names it.
    file: Option<PathBuf>,
    /// What drives the connections.
    driving: JoinSet<()>,
}

enum Door {
    /// A relay that runs.
    Relay(PathBuf),
    /// This process, which keeps relays away until it is done.
    Own { router: Router, open: OpenStore, _lock: Option<DataDirLock> },
}

impl Way {
    /// Finds who has the store, or opens it. With `makes` one that is not there is made.
    pub(super) async fn open(config: &Config, at: &StoreAt, makes: bool) -> anyhow::Result<Self> {
        let data_dir = data_dir(config, at);
        let file = match Target::of(config, at)? {
            Target::File(file) => Some(file),
            Target::Server(_) => None,
        };
        let door = match &file {
            // A server has many who write.
            None => own(config, data_dir, None, None).await?,
            Some(file) => reach(config, data_dir, file, makes).await?,
        };
        Ok(Self { door, file, driving: JoinSet::new() })
    }

    /// A small call, and its answer.
    pub(super) async fn call<T: DeserializeOwned>(
        &mut self,
        method: Method,
        at: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<Option<T>> {
        let body = Body::from(serde_json::to_vec(body)?);
        let answer = self.send(method, at, body).await?;
        if answer.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        let answer = read_small(answer).await?;
        Ok(Some(serde_json::from_slice(&answer).context("the answer cannot be read")?))
    }

    /// A call that takes long, and what it ends with; `each` gets how far it is.
    pub(super) async fn work<T: DeserializeOwned>(
        &mut self,
        at: &str,
        body: Body,
        mut each: impl FnMut(&T),
    ) -> anyhow::Result<T> {
        let answer = self.send(Method::POST, at, body).await?;
        if !answer.status().is_success() {
            read_small(answer).await?;
            bail!("the answer cannot be read");
        }
        let (mut told, mut body) = (Vec::new(), pin!(answer.into_body()));
        while let Some(frame) = timeout(SILENCE_MAX, body.frame()).await.map_err(|_| silent())? {
            let frame = frame.context("the answer was cut: the relay has ended? Run this again")?;
            told.extend_from_slice(&frame.into_data().unwrap_or_default());
            ensure!(told.len() <= SMALL_BYTES_MAX, "the answer is too long");
            while let Some(end) = memchr(b'\n', &told) {
                let line: Vec<u8> = told.drain(..=end).collect();
                match serde_json::from_slice(&line).context("the answer cannot be read")? {
                    Told::Progress(so_far) => each(&so_far),
                    Told::Done(done) => return Ok(done),
                    Told::Failed(why) => bail!("{why}"),
                }
            }
        }
        bail!("the answer was cut: the relay has ended? Run this again")
    }

    /// The server, which is asked beside any relay.
    pub(super) fn server(&self) -> anyhow::Result<Server> {
        match &self.door {
            Door::Own { open, .. } => match open.backend() {
                Some(Backend::Server(server)) => Ok(server),
                _ => bail!("a defect: the store is in no server"),
            },
            Door::Relay(_) => bail!("a defect: no relay is asked for a server"),
        }
    }

    /// Ends what was opened for this command.
    pub(super) async fn close(self) {
        if let Door::Own { open, .. } = &self.door {
            open.close().await;
        }
    }

    async fn send(&mut self, method: Method, at: &str, body: Body) -> anyhow::Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(at).header("host", "relay");
        let meant = self.file.as_ref().map(|file| file.as_os_str().as_encoded_bytes());
        if let Some(meant) = meant.and_then(|file| HeaderValue::from_bytes(file).ok()) {
            request = request.header(FILE_HEADER, meant);
        }
        let request = request.body(body)?;
        match &self.door {
            Door::Own { router, .. } => {
                let Ok(answer) = router.clone().oneshot(request).await;
                Ok(answer)
            }
            Door::Relay(socket) => {
                let answer = timeout(SILENCE_MAX, ask(socket, request, &mut self.driving)).await;
                answer.map_err(|_| silent())?.context("the relay that runs cannot be asked")
            }
        }
    }
}

/// Asks the relay behind a socket.
async fn ask(
    socket: &Path,
    request: Request<Body>,
    driving: &mut JoinSet<()>,
) -> anyhow::Result<Response<Body>> {
    let stream = UnixStream::connect(socket).await?;
    let (mut to, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Its end is seen by who waits for the answer.
    driving.spawn(async { drop(connection.await) });
    Ok(to.send_request(request).await?.map(Body::new))
}

fn silent() -> anyhow::Error {
    anyhow::anyhow!(
        "the relay that runs has not answered for {} s: it hangs, or is stopped. What was asked for may be done \
         yet",
        SILENCE_MAX.as_secs()
    )
}

/// An answer whole, if it says that it was done.
async fn read_small(answer: Response<Body>) -> anyhow::Result<Bytes> {
    let (status, body) = (answer.status(), Limited::new(answer.into_body(), SMALL_BYTES_MAX));
    let body = timeout(SILENCE_MAX, body.collect()).await.map_err(|_| silent())?;
    let body = body.map_err(|error| anyhow::anyhow!("the answer cannot be read: {error}"))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    match serde_json::from_slice::<Failed>(&body) {
        Ok(Failed { error }) => bail!("{error}"),
        Err(_) => bail!("the relay that runs answers {status}"),
    }
}

/// True if a file is there, and was not only named.
fn is_there(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|found| found.len() > 0)
}

/// The relay, if one runs, or this process. Whoever starts or stops just now may take a
/// moment.
async fn reach(config: &Config, data_dir: &Path, file: &Path, makes: bool) -> anyhow::Result<Door> {
    ensure!(makes || is_there(file), "there is no store in {}", file.display());
    let (socket, until) = (path_in(data_dir), Instant::now() + REACH_TIME);
    loop {
        match DataDirLock::acquire(data_dir) {
            Ok(lock) => return own(config, data_dir, Some(file), Some(lock)).await,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).with_context(|| data_dir.display().to_string()),
        }
        ensure!(
            fits(&socket),
            "a relay runs on {}, and the path of its control socket is too long for one: want a shorter DATA_DIR, \
             or stop the relay first",
            data_dir.display()
        );
        let why = match timeout(REACH_TIME, UnixStream::connect(&socket)).await {
            Ok(Ok(_)) => return Ok(Door::Relay(socket)),
            Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(error).with_context(|| format!("{}: want the relay's user", socket.display()));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it takes no connection".to_owned(),
        };
        if Instant::now() > until {
            bail!(
                "another process has {}, and does not answer at {} ({why}): a relay without a store, one that \
                 starts or stops, or another command. Try again, or stop it first",
                data_dir.display(),
                socket.display()
            );
        }
        sleep(TRY_AGAIN).await;
    }
}

/// The store in this process.
async fn own(
    config: &Config,
    data_dir: &Path,
    file: Option<&Path>,
    lock: Option<DataDirLock>,
) -> anyhow::Result<Door> {
    if let Some(file) = file.filter(|file| is_there(file)) {
        // A relay sets aside what it cannot read; a command leaves it alone.
        sqlite::look(file)?;
    }
    // Where nobody was ever erased nothing is made for it.
    let suppressed = DataSecret::read(data_dir)?.map(|secret| Suppressed::open(data_dir, &secret));
    let open = OpenStore::open(&config.store, data_dir, StoreMetrics::default(), Clock::system()).await?;
    ensure!(open.status.is_open(), "{}", open.status.troubles().join("; "));
    let control = Control {
        open: open.clone(),
        file: file.map(Path::to_owned),
        suppressed: suppressed.transpose()?.map(Into::into),
        draining: CancellationToken::new(),
        clock: Clock::system(),
    };
    Ok(Door::Own { router: control::router(control), open, _lock: lock })
}
