//! One call, from its head to its answer: which route it is, whether its key is taken,
//! what its panic costs, what is counted.

use std::{
    net::IpAddr,
    panic::AssertUnwindSafe,
    pin::{Pin, pin},
    sync::{Arc, Once},
};

use futures_util::FutureExt;
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri,
    header::{DNT, HeaderName, ORIGIN, USER_AGENT},
};
use percent_encoding::percent_decode_str;
use prometheus_client::metrics::counter::Counter;
use tracing::{debug, error, warn};

use super::{
    batch::{Batch, not_json, reply_of_ingestion, reply_of_segment, reply_of_website, reply_with_answers},
    body, cors,
    credential::{WriteKeys, key_in},
    integrations::Destinations,
    item::{Beside, Call, Caller, Came, Item, NAMES},
    json::{fields, text},
    keeping::{Keeping, take_newer},
    pixel,
    reading::Readers,
    reply::{Problem, Reply, bytes, queued, success},
    reports,
    resend::ids_of,
    route::{Form, Kind, LABELS, Route, query_value, write_key_of_settings},
    scan::Raw,
    schema::{Schemas, Stated},
    snippet,
};
use crate::{
    address::told_ip,
    admission::{
        Accepted, Admission,
        context::{CallContext, Credential, Door},
        denied::{Denied, Violation},
        draft::Draft,
    },
    enrich::agent::Hints,
    health::Health,
    ingest::{
        budget::Receiving,
        call_body::CallBody,
        client_address::{ClientAddressSettings, client_of},
        limits::{BATCH_BYTES_MAX, HTTP_CALL_BYTES_MAX, HTTP_HEADERS_BYTES_MAX, metadata_bytes},
        settings::HttpSettings,
    },
    privacy::suppression::Ids,
    query::{Query, Question, ReportName, Unanswered},
    refused::{RefusedItem, RefusedKeeper},
    telemetry::{CountedCall, IngestMetrics, MethodMetrics},
};

/// Largest body of what SDKs count of themselves, which nobody looks at.
const SDK_METRICS_BYTES_MAX: usize = 64 * 1024;
/// What the door takes and answers, for programs.
const OPENAPI: &str = include_str!("openapi.json");
/// What browsers say whose users decline to be followed.
pub(super) const SEC_GPC: HeaderName = HeaderName::from_static("sec-gpc");
/// The label of a call whose caller did not wait for its answer.
const LEFT: &str = "CANCELLED";

/// Answers the calls of the HTTP door.
#[derive(Debug)]
pub(super) struct HttpDoor {
    admission: Arc<Admission>,
    health: Arc<Health>,
    keys: WriteKeys,
    clients: ClientAddressSettings,
    /// Says that the users behind a proxy are not told apart.
    unnamed_proxy: Once,
    destinations: Destinations,
    schemas: Schemas,
    /// By the places of their versions; behind them that of those which are not known.
    calls_by_schema: Vec<Counter>,
    /// Keeps what is refused and nobody is told of.
    refused: Arc<RefusedKeeper>,
    query: Arc<Query>,
    readers: Readers,
    metrics: IngestMetrics,
    /// By the places of their routes.
    routes: [MethodMetrics; LABELS.len()],
}

/// What is known of a call beside its body.
struct Head {
    uri: Uri,
    headers: HeaderMap,
    /// Where the connection comes from.
    address: IpAddr,
    is_tls: bool,
    /// Of its route.
    label: &'static str,
}

impl Head {
    fn query(&self) -> &str {
        self.uri.query().unwrap_or_default()
    }

    /// A browser says where the page is from that sends.
    fn is_browser(&self) -> bool {
        self.headers.contains_key(ORIGIN)
    }

    /// What a browser says of itself beside its user agent.
    fn hints(&self) -> Hints<'_> {
        Hints::read(|name| self.headers.get(name)?.to_str().ok())
    }

    /// A browser says that its user declines: Global Privacy Control, or what was before it.
    fn is_declined(&self) -> bool {
        [&SEC_GPC, &DNT].into_iter().any(|name| self.text(name).is_some_and(|value| value.trim() == "1"))
    }

    fn text(&self, name: &HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The write key, as the head or the query says it.
    fn key(&self) -> Option<String> {
        key_in(&self.headers).or_else(|| query_value(self.query(), "writeKey").filter(|key| !key.is_empty()))
    }
}

impl HttpDoor {
    pub(super) fn new(
        admission: Arc<Admission>,
        health: Arc<Health>,
        settings: &HttpSettings,
        providers: Vec<&'static str>,
        refused: Arc<RefusedKeeper>,
        query: Arc<Query>,
        metrics: IngestMetrics,
    ) -> Self {
        let routes = LABELS.map(|label| metrics.method(label));
        let (keys, destinations) = (WriteKeys::new(&settings.write_keys), Destinations::new(providers));
        let (clients, unnamed_proxy) = (settings.clients.clone(), Once::new());
        let readers = Readers::new(&settings.read_keys, settings.is_read_without_key);
        let schemas = Schemas::KNOWN;
        let calls_by_schema = schemas.labels().map(|version| metrics.of_schema(version)).collect();
        Self {
            admission,
            health,
            keys,
            clients,
            unnamed_proxy,
            destinations,
            schemas,
            calls_by_schema,
            refused,
            query,
            readers,
            metrics,
            routes,
        }
    }

    /// Answers a call, whatever it is, and counts it.
    pub(super) async fn answer<B: CallBody>(
        &self,
        call: Request<B>,
        receiving: Arc<Receiving>,
        is_tls: bool,
    ) -> Reply {
        let (parts, body) = call.into_parts();
        let mut body = pin!(body);
        let route = Route::of_path(parts.uri.path());
        let place = route.map_or(LABELS.len() - 1, Route::place);
        let mut counted = CountedCall::begin(&self.routes[place], LEFT);
        let form = route.map_or(Form::Segment, Route::form);
        let head = Head {
            uri: parts.uri,
            headers: parts.headers,
            address: receiving.address(),
            is_tls,
            label: LABELS[place],
        };
        let served = self.dispatch(route, &parts.method, &head, body.as_mut(), &receiving);
        let problem = match AssertUnwindSafe(served).catch_unwind().await {
            Ok(Ok(mut reply)) => {
                counted.code = code_label(reply.status());
                finish(route, &head, &mut reply);
                return reply;
            }
            Ok(Err(problem)) => problem,
            Err(panic) => {
                drop(panic);
                self.metrics.panics.inc();
                error!("a defect: a call's handler panicked; its caller got 500");
                Problem::Defect
            }
        };
        counted.code = code_label(problem.status(form));
        let mut reply = match (route, &problem) {
            // A page shows an image, and nobody reads why it is not counted.
            (Some(Route::Pixel(_)), problem) if !matches!(problem, Problem::MethodNotAllowed(_)) => {
                debug!(?problem, "event of a pixel refused");
                pixel::image()
            }
            _ => problem.reply(form),
        };
        finish(route, &head, &mut reply);
        if !matches!(problem, Problem::Late) {
            body::throw_away(&head.headers, body).await;
        }
        reply
    }

    async fn dispatch<B: CallBody>(
        &self,
        route: Option<Route>,
        method: &Method,
        head: &Head,
        body: Pin<&mut B>,
        receiving: &Arc<Receiving>,
    ) -> Result<Reply, Problem> {
        if *method == Method::OPTIONS {
            return Ok(match route {
                Some(Route::Report(_)) => reports::options(),
                _ => cors::preflight(&head.headers),
            });
        }
        let route = route.ok_or(Problem::NotFound)?;
        let is_read = *method == Method::HEAD && route.method() == "GET";
        if method.as_str() != route.method() && !is_read {
            return Err(Problem::MethodNotAllowed(match route.method() {
                "POST" => "POST, OPTIONS",
                _ => "GET, HEAD, OPTIONS",
            }));
        }
        if receiving.is_spare() && !matches!(route, Route::Health | Route::Ready) {
            return Err(Problem::NoConnectionLeft);
        }
        match route {
            Route::One(kind, form) => self.one(kind, form, head, body, receiving).await,
            Route::Batch(form) => self.batch(form, head, body, receiving).await,
            Route::SdkMetrics => {
                body::read(&head.headers, body, SDK_METRICS_BYTES_MAX, receiving).await?;
                Ok(success())
            }
            Route::SdkSettings => {
                let path = head.uri.path().trim_end_matches('/').trim_start_matches("/v1/");
                let key = write_key_of_settings(path).ok_or(Problem::NotFound)?;
                let key = percent_decode_str(key).decode_utf8_lossy();
                self.check_key(Some(&key), head)?;
                let authority = head.uri.authority().map(hyper::http::uri::Authority::as_str);
                Ok(snippet::settings(&key, &head.headers, authority, head.is_tls))
            }
            // Who only asks about it has not looked at it.
            Route::Pixel(_) if is_read => Ok(pixel::image()),
            Route::Pixel(kind) => {
                self.pixel(kind, head).await?;
                Ok(pixel::image())
            }
            Route::Report(name) => self.report(name, head, receiving).await,
            Route::Schemas => Ok(self.schemas.listing()),
            Route::OpenApi => Ok(bytes(StatusCode::OK, "application/json", OPENAPI)),
            Route::Health => Ok(self.status(StatusCode::OK)),
            Route::Ready if self.health.is_ready() => Ok(self.status(StatusCode::OK)),
            Route::Ready => Ok(self.status(StatusCode::SERVICE_UNAVAILABLE)),
        }
    }

    /// Who may read is answered; what waits for the store holds its part of what is received.
    async fn report(
        &self,
        name: ReportName,
        head: &Head,
        receiving: &Arc<Receiving>,
    ) -> Result<Reply, Problem> {
        let of = self.readers.check(&head.headers, &head.uri, head.address)?;
        if self.health.is_draining() {
            return Err(Problem::Unanswered(Unanswered::Draining));
        }
        self.query.check().map_err(Problem::Unanswered)?;
        let asked = Question::of_query(of, name, head.query(), self.query.now_ms());
        let (question, format) = asked.map_err(Problem::Unanswered)?;
        let _held = receiving.hold_call().map_err(Problem::Denied)?;
        let (known, cached) = self.query.answer(&question).await.map_err(Problem::Unanswered)?;
        Ok(reports::reply(&question, &known, cached, format))
    }

    fn status(&self, code: StatusCode) -> Reply {
        bytes(code, "text/plain; charset=utf-8", self.health.status())
    }

    fn check_key(&self, key: Option<&str>, head: &Head) -> Result<(), Problem> {
        self.keys.check(key, || told_ip(head.address, self.admission.ip_policy()), head.label)
    }

    /// Before the body is read, who cannot be taken is told.
    fn check_head(&self, head: &Head) -> Result<Option<String>, Problem> {
        let key = head.key();
        if key.is_some() {
            self.check_key(key.as_deref(), head)?;
        }
        let bytes = metadata_bytes(&head.headers);
        if bytes > HTTP_HEADERS_BYTES_MAX {
            let message = format!("got {bytes} bytes of headers, want at most {HTTP_HEADERS_BYTES_MAX}");
            return Err(Problem::malformed("", message));
        }
        if self.admission.is_closed() {
            return Err(Problem::Denied(self.admission.denied(Denied::Draining)));
        }
        Ok(key)
    }

    async fn one<B: CallBody>(
        &self,
        kind: Kind,
        form: Form,
        head: &Head,
        body: Pin<&mut B>,
        receiving: &Arc<Receiving>,
    ) -> Result<Reply, Problem> {
        let key = self.check_head(head)?;
        let read = body::read(&head.headers, body, HTTP_CALL_BYTES_MAX, receiving).await?;
        let item = Item::of(&read.text, &NAMES).map_err(|error| not_json(&read.text, &error))?;
        if item.fields.is_none() {
            return Err(not_json(&read.text, &item.why_no_object()));
        }
        if key.is_none() {
            self.check_key(item.write_key().and_then(text).as_deref(), head)?;
        }
        let stated = self.version_of(head, item.schema_version())?;
        let of_other_schema = self.schemas.upcast(&read.text, stated.version);
        let of_other_schema = of_other_schema.map_err(|violation| self.invalid(violation))?;
        let hints = head.hints();
        let caller = self.caller(head, &hints, false);
        let call = self.call(form, caller);
        let draft = match &of_other_schema {
            None => call.read(&item, Some(kind)),
            Some(text) => call.read_text(text, Some(kind)),
        };
        let context = self.context(head, caller, stated.version);
        let admitted = self.admit(draft, &context);
        // Who waits for the disk holds its event and no message.
        drop((read, of_other_schema));
        let accepted = match admitted.await {
            // A page learns nothing of who is erased, and an SDK has nothing to do about it.
            Err(Problem::Denied(denied)) if form != Form::Ingestion && denied.is_of_suppressed_user() => {
                return Ok(success());
            }
            admitted => admitted?,
        };
        let mut reply = match form {
            Form::Segment | Form::Website => success(),
            Form::Ingestion => queued(&accepted, stated.warning.as_deref()),
        };
        self.schemas.tell(stated.version, &mut reply);
        Ok(reply)
    }

    /// The version that a call is written by, counted.
    fn version_of(&self, head: &Head, in_body: Option<Raw<'_>>) -> Result<Stated, Problem> {
        let stated = self.schemas.of_call(&head.headers, head.query(), in_body);
        let stated = stated.map_err(|violation| self.invalid(violation))?;
        self.calls_by_schema[self.schemas.place_of(stated.version)].inc();
        Ok(stated)
    }

    fn invalid(&self, violation: Violation) -> Problem {
        Problem::Denied(self.admission.denied(Denied::Invalid(vec![violation])))
    }

    async fn batch<B: CallBody>(
        &self,
        form: Form,
        head: &Head,
        body: Pin<&mut B>,
        receiving: &Arc<Receiving>,
    ) -> Result<Reply, Problem> {
        let key = self.check_head(head)?;
        let body::Text { text: json, held } =
            body::read(&head.headers, body, BATCH_BYTES_MAX, receiving).await?;
        let batch = Batch::of(&json, form, self.schemas, |in_body| self.version_of(head, in_body))?;
        if key.is_none() {
            self.check_key(batch.write_key.and_then(text).as_deref(), head)?;
        }
        let hints = head.hints();
        let caller = self.caller(head, &hints, form == Form::Website);
        let came = Came { at_ms: self.admission.now_ms(), caller };
        let context = self.context(head, came.caller, batch.stated.version);
        let puts = batch.put(form, came, &self.destinations, (&self.admission, &context)).await;
        let Keeping { letters, newer, .. } = batch.keeping(form, &puts, came, &self.admission);
        let Batch { wants_answers, is_one, stated, .. } = batch;
        // Who waits for the disk holds its events and no message.
        drop((json, held));
        let mut answers = self.admission.answers(puts).await;
        // What comes again is kept then, and not each time.
        let is_sent_again = Batch::is_sent_again(form, wants_answers, &answers);
        let is_erased = |item: &RefusedItem| self.is_erased(item.item.get());
        if !is_sent_again && self.refused.keep(letters, came.at_ms, is_erased).await {
            take_newer(newer, &mut answers);
        }
        let warning = stated.warning.as_deref();
        let mut reply = match form {
            Form::Ingestion => reply_of_ingestion(&answers, warning),
            Form::Website => reply_of_website(&answers, is_one),
            Form::Segment if wants_answers => reply_with_answers(&answers, warning),
            Form::Segment => reply_of_segment(&answers),
        };
        self.schemas.tell(stated.version, &mut reply);
        Ok(reply)
    }

    fn is_erased(&self, item: &str) -> bool {
        let Some([user_id, anonymous_id, previous_id]) = ids_of(item) else { return false };
        self.admission.suppresses(Ids {
            user_id: user_id.as_deref(),
            anonymous_id: anonymous_id.as_deref(),
            previous_id: previous_id.as_deref(),
        })
    }

    async fn pixel(&self, kind: Option<Kind>, head: &Head) -> Result<(), Problem> {
        let json = pixel::event_in(head.query())?;
        let [write_key] = fields(&json, &["writeKey"]).map_err(|error| not_json(&json, &error))?;
        let key = write_key.and_then(text).map(std::borrow::Cow::into_owned).or_else(|| head.key());
        self.check_key(key.as_deref(), head)?;
        let kind = kind.ok_or(Problem::NotFound)?;
        let hints = head.hints();
        let caller = self.caller(head, &hints, true);
        let call = self.call(Form::Segment, caller);
        self.admit(call.read_text(&json, Some(kind)), &self.context(head, caller, 1)).await?;
        Ok(())
    }

    /// Who calls. What only devices of users send comes from one, whatever the head says.
    fn caller<'h>(&self, head: &'h Head, hints: &'h Hints<'h>, is_of_devices: bool) -> Caller<'h> {
        let client = client_of(head.address, &head.headers, &self.clients);
        let is_direct = is_of_devices || head.is_browser();
        if is_direct && client.ip.is_none() {
            self.warn_of_unnamed_proxy(head.address);
        }
        Caller {
            ip: client.ip,
            country_hint: client.country_hint,
            user_agent: head.text(&USER_AGENT).unwrap_or_default(),
            hints,
            is_declined: head.is_declined(),
            is_direct,
        }
    }

    /// Once: whoever calls can make it look so, and then it is a user's address.
    #[cold]
    fn warn_of_unnamed_proxy(&self, peer: IpAddr) {
        self.unnamed_proxy.call_once(|| {
            let peer = told_ip(peer, self.admission.ip_policy()).map(tracing::field::display);
            warn!(peer, "calls come through a proxy that TRUSTED_PROXIES does not name: the addresses of its callers are not known");
        });
    }

    /// What admission is told of a call, whose key was looked at.
    fn context(&self, head: &Head, caller: Caller<'_>, schema_version: u32) -> CallContext<'static> {
        CallContext {
            door: Door::Http,
            peer: head.address,
            client: caller.ip.filter(|_| caller.is_direct),
            credential: if self.keys.are_checked() { Credential::WriteKey } else { Credential::None },
            tenant: None,
            schema_version,
        }
    }

    /// Admits one event as it was read, and counts it if it could not be.
    fn admit(
        &self,
        read: Result<Draft<'_>, Violation>,
        call: &CallContext<'_>,
    ) -> impl Future<Output = Result<Accepted, Problem>> + use<'_> {
        let admitted = match read {
            Ok(draft) => Ok(self.admission.admit(draft, call)),
            Err(violation) => Err(self.invalid(violation)),
        };
        async move {
            let admitted = admitted?;
            admitted.await.map_err(Problem::Denied)
        }
    }

    /// Of one event, beside which nothing stands.
    fn call<'a>(&'a self, form: Form, caller: Caller<'a>) -> Call<'a> {
        let came = Came { at_ms: self.admission.now_ms(), caller };
        Call::new(form, came, Beside::default(), &self.destinations)
    }
}

/// What stands in every answer: that the page which asks may read it, or, of what the store
/// says, that none may.
fn finish(route: Option<Route>, head: &Head, reply: &mut Reply) {
    match route {
        Some(Route::Report(_)) => reports::keep_from_pages(reply),
        _ => cors::allow(&head.headers, reply),
    }
}

/// The label of a status.
fn code_label(status: StatusCode) -> &'static str {
    match status.as_u16() {
        // As at the other door, so that one query finds what went well.
        200 | 202 | 204 => "OK",
        207 => "207",
        400 => "400",
        401 => "401",
        404 => "404",
        405 => "405",
        408 => "408",
        413 => "413",
        415 => "415",
        422 => "422",
        429 => "429",
        501 => "501",
        503 => "503",
        504 => "504",
        _ => "500",
    }
}
