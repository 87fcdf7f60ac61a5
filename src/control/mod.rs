//! What the operator's commands ask of the process that has the store, in HTTP.
//!
//! The embedded store has one writer. Beside a relay that runs commands that write, or ask
//! what only that process knows, reach it through a Unix [`socket`] in the directory of its
//! files; a command that has the store itself asks the same [`router`] without one. So each
//! command is written once.
//!
//! | call | body | answer |
//! |---|---|---|
//! | `GET /store/stats` | | what is in the store |
//! | `POST /store/vacuum` | | lines, the last of which says what it gave back |
//! | `POST /store/tidy` | | lines, the last of which says how many blocks were merged |
//! | `POST /store/import` | an event a line, as many as there are | lines, the last of which says what became of them |
//! | `GET /identity?user=` or `?device=`, `&tenant=` | | what is known about somebody |
//! | `GET /identity/log?` the same, `&limit=` | | what was decided about all their ids, the latest first |
//! | `POST /identity/split`, `/identity/join` | `{"tenant","device","user","operator","reason"}` | `{}` |
//!
//! What takes long tells each second that it goes on, ends when nobody reads that, and is
//! given up when the relay drains: its lane wants to write too.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use analytics_relay_store::{Operator, Scope, StoreError, Subject, TenantScope, sqlite::SqliteStore};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    http::{StatusCode, Uri, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::stream;
use http_body_util::{BodyExt, Limited};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    select,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    privacy::suppression::Suppressed,
    store::{Backend, HOT_MS_MAX, OpenStore},
    time::Clock,
};

mod import;
pub(crate) mod socket;
pub(crate) mod wire;

use import::{Progress, progress_of};
use wire::{Decided, Failed, Imported, Known, Pair, SMALL_BYTES_MAX, StoreStats, Tidied, Told, Vacuumed};

/// Longest time for a call that is no stream of lines: less than commands wait.
const SHORT_TIME: Duration = Duration::from_secs(8);
/// How often what takes long says that it goes on.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Decisions that are shown unless it is said how many, and most.
const LOG_LIMIT: usize = 100;
const LOG_LIMIT_MAX: usize = 1_000;
/// Longest name of an operator, and reason.
const TEXT_BYTES_MAX: usize = 1_000;

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";

/// What is asked.
#[derive(Debug, Clone)]
pub(crate) struct Control {
    pub(crate) open: OpenStore,
    /// The store's file, if it is one.
    pub(crate) file: Option<PathBuf>,
    /// Whose events are not taken, wherever they come from.
    pub(crate) suppressed: Option<Arc<Suppressed>>,
    /// The relay drains: what takes long is given up.
    pub(crate) draining: CancellationToken,
    pub(crate) clock: Clock,
}

/// Answers every call of the table above.
pub(crate) fn router(control: Control) -> Router {
    Router::new()
        .route(wire::STATS, get(stats))
        .route(wire::VACUUM, post(vacuum))
        .route(wire::TIDY, post(tidy))
        .route(wire::IMPORT, post(import))
        .route(wire::IDENTITY, get(identity))
        .route(wire::LOG, get(log))
        .route(wire::SPLIT, post(split))
        .route(wire::JOIN, post(join))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is no such call"))
        .method_not_allowed_fallback(async || {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this call has another method")
        })
        .layer(from_fn_with_state(control.clone(), of_this_store))
        .with_state(control)
}

/// Refuses a command that means another file than is open here.
async fn of_this_store(State(control): State<Control>, request: Request, next: Next) -> Response {
    let meant = request.headers().get(wire::FILE_HEADER).map(|meant| meant.as_bytes());
    let own = control.file.as_ref().map(|file| file.as_os_str().as_encoded_bytes());
    if meant.is_some() && meant != own {
        let own = control.file.as_ref().map_or("no file".into(), |file| file.display().to_string());
        let why = format!("the running relay's store is {own}, and STORE_URL names another");
        return Failure::new(StatusCode::CONFLICT, why).into_response();
    }
    next.run(request).await
}

async fn stats(State(control): State<Control>) -> Result<Response, Failure> {
    let stats = match control.open.backend() {
        Some(Backend::Server(server)) => StoreStats::Server(within(SHORT_TIME, server.stats()).await?),
        _ => StoreStats::Embedded(within(SHORT_TIME, control.embedded()?.stats()).await?.into()),
    };
    json(&stats)
}

async fn vacuum(State(control): State<Control>) -> Result<Response, Failure> {
    let embedded = control.embedded()?;
    let before_bytes = within(SHORT_TIME, embedded.stats()).await?.file_bytes;
    let so_far = Vacuumed { before_bytes, after_bytes: before_bytes };
    let work = async move {
        embedded.vacuum().await?;
        let after_bytes = embedded.stats().await?.file_bytes;
        info!(before_bytes, after_bytes, "the store gave its free pages back");
        Ok(Vacuumed { before_bytes, after_bytes })
    };
    Ok(in_lines(control.unless_draining(work), move || so_far))
}

async fn tidy(State(control): State<Control>) -> Result<Response, Failure> {
    let embedded = control.embedded()?;
    let before_ms = control.clock.now_ms() - HOT_MS_MAX;
    let work = async move {
        let merged = embedded.tidy(before_ms).await?;
        info!(merged, "the store is tidied");
        Ok(Tidied { merged })
    };
    Ok(in_lines(control.unless_draining(work), Tidied::default))
}

async fn import(State(control): State<Control>, request: Request) -> Response {
    let progress = Progress::new(Mutex::default());
    let (importing, body) = (progress.clone(), request.into_body());
    let importer = control.clone();
    let work = async move {
        let imported = import::import(importer, body, importing).await;
        if let Ok(Imported { new, duplicates, suppressed, unstorable, damaged, .. }) = &imported {
            info!(new, duplicates, suppressed, unstorable, damaged, "events were imported");
        }
        imported
    };
    in_lines(control.unless_draining(work), move || progress_of(&progress))
}

async fn identity(State(control): State<Control>, uri: Uri) -> Result<Response, Failure> {
    let Asked { of, who, .. } = asked(&uri)?;
    let store = &control.open.store;
    let answer = async {
        let Some(identity) = store.identity(&of, &who).await? else { return Ok(None) };
        let all = Scope { include_bots: true, ..Scope::new(of, i64::MIN..i64::MAX) };
        let last = store.recent(&all, Some(&who), 1).await?;
        Ok(Some((identity, last.first().map(|event| event.time_ms()))))
    };
    let Some((identity, last_seen_ms)) = within(SHORT_TIME, answer).await? else {
        return Err(Failure::new(StatusCode::NOT_FOUND, "nothing is known under this id"));
    };
    let known = Known::new(identity, last_seen_ms)
        .map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, format!("traits: {error}")))?;
    json(&known)
}

async fn log(State(control): State<Control>, uri: Uri) -> Result<Response, Failure> {
    let Asked { of, who, limit } = asked(&uri)?;
    let log = within(SHORT_TIME, control.open.store.identity_log(&of, &who, limit)).await?;
    json(&log.into_iter().map(Decided::from).collect::<Vec<_>>())
}

async fn split(State(control): State<Control>, request: Request) -> Result<Response, Failure> {
    link(&control, request, false).await
}

async fn join(State(control): State<Control>, request: Request) -> Result<Response, Failure> {
    link(&control, request, true).await
}

/// Joins or splits; ids are nobody's business in the log.
async fn link(control: &Control, request: Request, joined: bool) -> Result<Response, Failure> {
    let Pair { tenant, device, user, operator, reason } = small(request).await?;
    if device.is_empty() || user.is_empty() {
        return Err(Failure::new(StatusCode::BAD_REQUEST, "got an empty id, want a device and a user"));
    }
    let texts = [("operator", &operator), ("reason", &reason)];
    if let Some((name, _)) = texts.iter().find(|(_, text)| text.len() > TEXT_BYTES_MAX) {
        let why = format!("{name}: want at most {TEXT_BYTES_MAX} bytes");
        return Err(Failure::new(StatusCode::BAD_REQUEST, why));
    }
    let of = TenantScope::tenant(tenant);
    let by = Operator { name: operator, reason, at_ms: control.clock.now_ms() };
    within(SHORT_TIME, control.open.store.link(&of, &device, &user, joined, &by)).await?;
    info!(joined, "an operator decided whose a device is");
    json(&serde_json::Map::new())
}

impl Control {
    /// For what only the embedded store has.
    fn embedded(&self) -> Result<SqliteStore, Failure> {
        match self.open.backend() {
            Some(Backend::Embedded(embedded)) => Ok(embedded),
            _ => Err(Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no store in a file here, or it is not open yet",
            )),
        }
    }

    /// Gives something up when the relay drains.
    fn unless_draining<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: F,
    ) -> impl Future<Output = Result<T, Failure>> + use<T, F> {
        let draining = self.draining.clone();
        async move {
            select! {
                biased;
                () = draining.cancelled() => {
                    Err(Failure::cut("the relay is stopping; run it again, what is done is done"))
                }
                done = work => done,
            }
        }
    }
}

/// The answer to what takes long. It works as long as somebody reads the answer.
fn in_lines<T: Serialize + Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    progress: impl Fn() -> T + Send + 'static,
) -> Response {
    let mut ticks = interval(TELL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let told = stream::unfold(Some((Box::pin(work), ticks, progress)), |state| async move {
        let (mut work, mut ticks, progress) = state?;
        let (told, next) = select! {
            biased;
            done = &mut work => (done.map_or_else(|failure| Told::Failed(failure.why), Told::Done), None),
            _ = ticks.tick() => (Told::Progress(progress()), Some((work, ticks, progress))),
        };
        let mut line = serde_json::to_vec(&told).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, std::convert::Infallible>(Bytes::from(line)), next))
    });
    ([(header::CONTENT_TYPE, LINES)], Body::from_stream(told)).into_response()
}

/// Whose identity is asked for.
struct Asked {
    of: TenantScope,
    who: Subject,
    limit: usize,
}

fn asked(uri: &Uri) -> Result<Asked, Failure> {
    let (mut tenant, mut who, mut limit) = (String::new(), Vec::new(), LOG_LIMIT);
    for (name, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
        match &*name {
            "tenant" => tenant = value.into_owned(),
            "user" => who.push(Subject::User(value.into_owned())),
            "device" => who.push(Subject::Anonymous(value.into_owned())),
            "limit" => {
                let wrong = |_| Failure::new(StatusCode::BAD_REQUEST, "limit: want a number");
                limit = value.parse().map_err(wrong)?;
            }
            _ => return Err(Failure::new(StatusCode::BAD_REQUEST, "want user, device, tenant, limit")),
        }
    }
    match <[Subject; 1]>::try_from(who) {
        Ok([who]) => Ok(Asked { of: TenantScope::tenant(tenant), who, limit: limit.min(LOG_LIMIT_MAX) }),
        Err(_) => Err(Failure::new(StatusCode::BAD_REQUEST, "want one user or one device")),
    }
}

/// The body of a call that is no stream of lines.
async fn small<T: DeserializeOwned>(request: Request) -> Result<T, Failure> {
    let body = Limited::new(request.into_body(), SMALL_BYTES_MAX);
    let wrong = |why: &dyn std::fmt::Display| Failure::new(StatusCode::BAD_REQUEST, why.to_string());
    let body = timeout(SHORT_TIME, body.collect()).await.map_err(|_| wrong(&"it does not come"))?;
    let body = body.map_err(|error| wrong(&error))?.to_bytes();
    serde_json::from_slice(&body).map_err(|error| wrong(&error))
}

fn json(answer: &impl Serialize) -> Result<Response, Failure> {
    let mut text = serde_json::to_vec(answer)
        .map_err(|error| Failure::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    text.push(b'\n');
    Ok(([(header::CONTENT_TYPE, JSON)], text).into_response())
}

/// What the store answers, if it does in time.
async fn within<T>(
    time: Duration,
    answer: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, Failure> {
    match timeout(time, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Failure::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the store has not answered within {} s: it is busy, with a vacuum perhaps. What was asked \
                 for may be done yet",
                time.as_secs()
            ),
        )),
    }
}

/// Why a call was not done.
#[derive(Debug)]
pub(crate) struct Failure {
    status: StatusCode,
    why: String,
}

impl Failure {
    fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self { status, why: why.into() }
    }

    /// In the middle of what takes long.
    fn cut(why: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, why)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let status = match &error {
            StoreError::Unavailable(_) | StoreError::Unauthorized(_) | StoreError::Closed => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            StoreError::Invalid { .. } | StoreError::Refused(_) => StatusCode::BAD_REQUEST,
            StoreError::TooExpensive(_) => StatusCode::UNPROCESSABLE_ENTITY,
            StoreError::Damaged(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let failed = Failed { error: self.why };
        let mut text = serde_json::to_vec(&failed).unwrap_or_default();
        text.push(b'\n');
        (self.status, [(header::CONTENT_TYPE, JSON)], text).into_response()
    }
}
