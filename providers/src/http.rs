//! What all vendors over HTTP share: the client with its limits, and the seam
//! behind which a vendor's file states only its mapping and its answers.

use std::{
    error::Error,
    io::Read,
    panic::resume_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compress, Compression, FlushCompress, Status, read::MultiGzDecoder};
use reqwest::{
    Client, ClientBuilder, RequestBuilder, Response, StatusCode, Url,
    header::{self, HeaderName},
};
use serde::{Deserialize, Deserializer, de::IgnoredAny};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    BatchLimits, Endpoint, Event, NotFor, Provider, Rejection, Secret, SendError, Step, Verdict, json::Json,
};

mod probe;

pub use probe::{Probe, WrongKey};

/// Most bytes of an answer that are read, unless a vendor's answers can be
/// longer. One that is longer still says nothing that we understand.
pub const REPLY_BYTES_MAX: usize = 64 * 1024;
/// Longest wait that a `Retry-After` is believed.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);
/// Longest wait for a connection.
const CONNECT_TIMEOUT_MAX: Duration = Duration::from_secs(5);
/// After this time connections are made anew, so that a vendor that moved is
/// found: a busy connection would keep the old address for ever.
const CLIENT_AGE_MAX: Duration = Duration::from_secs(3600);
/// Bodies above this are encoded and compressed off the asynchronous threads:
/// callers should wait for nothing of half a millisecond.
const INLINE_BYTES_MAX: usize = 64 * 1024;
/// How long it is believed that a key is taken, where most answers do not tell.
const KEY_AGE_MAX: Duration = Duration::from_secs(3600);
/// Most characters of a vendor's own words that are kept.
const DETAIL_CHARS_MAX: usize = 300;

/// What a vendor's file states: pure translation, both ways.
pub trait Wire: Send + Sync + 'static {
    /// See [`Provider::name`].
    fn name(&self) -> &'static str;

    /// See [`Provider::limits`].
    fn limits(&self) -> BatchLimits;

    /// See [`Provider::endpoint`].
    fn endpoint(&self, _event: &Event) -> Result<Endpoint, NotFor> {
        Ok(Endpoint::DEFAULT)
    }

    /// Most bytes of an answer that are read: as many as a batch in which each
    /// event is named can need.
    fn reply_bytes_max(&self) -> usize {
        REPLY_BYTES_MAX
    }

    /// Translates a batch of one endpoint, at `now_ms` Unix milliseconds.
    fn encode(&self, batch: &[Event], now_ms: i64) -> Encoded;

    /// Reads the answer to the events of a batch that were encoded: one verdict
    /// each, in order.
    fn interpret(&self, sent: &[&Event], reply: &Reply) -> Result<Vec<Verdict>, SendError>;

    /// For a batch of an endpoint that takes wrong keys without a word: a request to one
    /// that refuses them, without an event. Asked once before it, and again after a
    /// refusal.
    fn key_question(&self, _batch: &[Event]) -> Option<Encoded> {
        None
    }

    /// A request of each endpoint's that holds no event, with this key.
    fn probes(&self, key: &Secret) -> Vec<Probe>;

    /// Reads the answer to one of these.
    fn interpret_probe(&self, _path: &str, reply: &Reply) -> Result<Vec<Verdict>, SendError> {
        self.interpret(&[], reply)
    }
}

/// Room for the body of a batch.
pub(crate) fn body_for(batch: &[Event]) -> Json {
    Json::with_capacity(body_bytes(batch))
}

/// The rejection of an event for which a vendor's file has no form.
pub(crate) fn no_form(index: usize, event: &Event) -> (usize, Rejection, String) {
    (index, Rejection::UnknownKind, format!("this relay has no form for a {}", event.kind().name()))
}

fn body_bytes(batch: &[Event]) -> usize {
    batch.iter().map(|event| event.wire_bytes_estimate()).sum()
}

/// A batch in a vendor's words.
#[derive(Debug, Default)]
pub struct Encoded {
    /// Path and query below the base URL.
    pub path: &'static str,
    /// The body; meaningless if every event was rejected.
    pub body: Vec<u8>,
    /// Whether the body is a form; else it is JSON.
    pub form: bool,
    /// Whether the vendor takes this body compressed.
    pub gzip: bool,
    /// User name of Basic authentication; the password is empty.
    pub basic_user: Option<Secret>,
    /// Most bytes that this body may have; over it the batch goes in halves.
    pub body_bytes_max: usize,
    /// Events that are not in the body because the vendor would refuse them,
    /// by their index in the batch, ascending.
    pub rejected: Vec<(usize, Rejection, String)>,
}

/// A vendor's answer, read in full.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body, at most [`Wire::reply_bytes_max`], keys removed.
    pub body: String,
    /// The `Retry-After` header, at most [`RETRY_AFTER_MAX`].
    pub retry_after: Option<Duration>,
    /// Where a redirect points to, without what could be a secret.
    pub location: Option<String>,
}

impl Reply {
    /// Status and the vendor's own words, short and on one line. The page of a
    /// redirect is nobody's words, and may hold our own request.
    pub fn detail(&self) -> String {
        let is_redirect = (300..400).contains(&self.status);
        self.saying(if is_redirect { "" } else { &self.body })
    }

    /// Status and some of the vendor's words, short and on one line.
    pub fn saying(&self, words: &str) -> String {
        let mut said = self.status.to_string();
        let mut room = DETAIL_CHARS_MAX;
        for word in words.split_whitespace() {
            let word: String = word.chars().filter(|c| !c.is_control()).take(room).collect();
            room = room.saturating_sub(word.chars().count() + 1);
            said.push(' ');
            said.push_str(&word);
            if room == 0 {
                break;
            }
        }
        said
    }

    /// The request may or may not have been taken: send it again.
    pub fn unavailable(&self) -> SendError {
        SendError::Unavailable { retry_after: self.retry_after, detail: self.detail() }
    }

    /// What a status means where the vendor's own rules say nothing else. Events are
    /// to blame only where it says that their body is.
    pub fn failure(&self) -> SendError {
        let detail = self.detail();
        match self.status {
            // Refused is whoever sends, whatever it is: by key or plan, by a proxy (407),
            // a country's law (451), a network that wants a login first (511).
            401 | 402 | 403 | 407 | 451 | 511 => SendError::Unauthorized { detail },
            // What is here takes no event at all: gone or never there; another method
            // (405, 501), protocol (426, 505) or size of the head (431), in which we say
            // the same each time; or it is somewhere else.
            404 | 405 | 410 | 426 | 431 | 501 | 505 => SendError::Misdirected { detail },
            301 | 302 | 303 | 307 | 308 => SendError::Misdirected { detail: self.redirected() },
            413 => SendError::TooLarge { detail },
            // Of the moment or of the connection: a slow body (408), one that something on
            // the way sent elsewhere (421) or gave up (460, 499), early data (425).
            408 | 421 | 425 | 429 | 460 | 499 | 500.. => self.unavailable(),
            400..=499 => SendError::Refused { detail },
            // A success that we cannot read: it may come from something between us and
            // the vendor, so nothing is known.
            _ => self.unavailable(),
        }
    }

    fn redirected(&self) -> String {
        let location = self.location.as_deref().unwrap_or("an address that it does not say");
        self.saying(&format!("to {location}, which is not followed"))
    }
}

/// A vendor over HTTP.
pub struct HttpProvider<W> {
    wire: Arc<W>,
    http: HttpClient,
    /// When it was heard that our key is taken, unless it was refused since.
    key_taken_at: Mutex<Option<Instant>>,
}

impl<W: Wire> HttpProvider<W> {
    /// Joins a vendor's translation and the client that sends it.
    pub fn new(wire: W, http: HttpClient) -> Self {
        Self { wire: Arc::new(wire), http, key_taken_at: Mutex::new(None) }
    }

    /// Where an answer says nothing about our key, finds out before it, once in a
    /// while. Only the vendor's own answer shows that it is taken; without one the
    /// batch waits, as it would be believed whatever becomes of it.
    async fn ask_about_key(&self, question: Option<Encoded>) -> Result<(), SendError> {
        let taken_at = *self.key_taken_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = taken_at.is_some_and(|at| at.elapsed() < KEY_AGE_MAX);
        let Some(question) = question.filter(|_| !is_known) else { return Ok(()) };
        let path = question.path;
        let reply = self.http.post(question, self.wire.reply_bytes_max()).await?;
        match self.read(&reply, |reply| self.wire.interpret_probe(path, reply)) {
            Err(error @ (SendError::Unauthorized { .. } | SendError::Unavailable { .. })) => Err(error),
            // The path of the question is closed, that of the batch need not be: it is
            // asked again with the next one.
            Err(SendError::Misdirected { .. }) => Ok(()),
            _ if serde_json::from_str::<IgnoredAny>(&reply.body).is_err() => Err(reply.unavailable()),
            _ => {
                self.heard_of_key(true);
                Ok(())
            }
        }
    }

    fn heard_of_key(&self, is_taken: bool) {
        let taken_at = is_taken.then(Instant::now);
        *self.key_taken_at.lock().unwrap_or_else(PoisonError::into_inner) = taken_at;
    }

    /// Reads an answer, and notes a refusal of our key.
    fn read(
        &self,
        reply: &Reply,
        interpret: impl FnOnce(&Reply) -> Result<Vec<Verdict>, SendError>,
    ) -> Result<Vec<Verdict>, SendError> {
        let mut answer = interpret(reply);
        // Once more: a key may have been hidden in escapes until now.
        details(&mut answer).for_each(|detail| *detail = self.http.redact(detail));
        if matches!(answer, Err(SendError::Unauthorized { .. })) {
            self.heard_of_key(false);
        }
        answer
    }

    async fn encode(&self, batch: &[Event]) -> Result<Encoded, SendError> {
        if body_bytes(batch) <= INLINE_BYTES_MAX {
            return Ok(self.wire.encode(batch, now_ms()));
        }
        let (wire, batch) = (self.wire.clone(), batch.to_vec());
        self.http.off_thread(move || wire.encode(&batch, now_ms())).await
    }
}

#[async_trait]
impl<W: Wire> Provider for HttpProvider<W> {
    fn name(&self) -> &'static str {
        self.wire.name()
    }

    fn limits(&self) -> BatchLimits {
        self.wire.limits()
    }

    fn endpoint(&self, event: &Event) -> Result<Endpoint, NotFor> {
        self.wire.endpoint(event)
    }

    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError> {
        let mut encoded = self.encode(batch).await?;
        let rejected = std::mem::take(&mut encoded.rejected);
        let sent = without(batch, &rejected);
        let verdicts = if sent.is_empty() {
            Vec::new()
        } else {
            if encoded.body.len() > encoded.body_bytes_max {
                let detail = format!("{} bytes, want at most {}", encoded.body.len(), encoded.body_bytes_max);
                return Err(SendError::TooLarge { detail });
            }
            let question = self.wire.key_question(batch);
            let tells = question.is_none();
            self.ask_about_key(question).await?;
            let reply = self.http.post(encoded, self.wire.reply_bytes_max()).await?;
            let verdicts = self.read(&reply, |reply| self.wire.interpret(&sent, reply))?;
            if tells {
                self.heard_of_key(true);
            }
            verdicts
        };
        Ok(merge(batch.len(), verdicts, rejected))
    }

    async fn probe(&self) -> Vec<Step> {
        probe::try_the_way(self).await
    }
}

/// The events of a batch that were not rejected while it was encoded.
pub(crate) fn without<'a>(batch: &'a [Event], rejected: &[(usize, Rejection, String)]) -> Vec<&'a Event> {
    let mut rejected = rejected.iter().map(|(index, ..)| *index).peekable();
    let kept = batch.iter().enumerate().filter(|(index, _)| rejected.next_if_eq(index).is_none());
    kept.map(|(_, event)| event).collect()
}

/// Puts the verdicts of the vendor and our own rejections back in the order of
/// the batch.
pub(crate) fn merge(
    len: usize,
    verdicts: Vec<Verdict>,
    rejected: Vec<(usize, Rejection, String)>,
) -> Vec<Verdict> {
    let mut verdicts = verdicts.into_iter();
    let mut rejected = rejected.into_iter().peekable();
    let verdict = |index| match rejected.next_if(|(at, ..)| *at == index) {
        Some((_, reason, detail)) => Some(Verdict::Rejected { reason, detail }),
        None => verdicts.next(),
    };
    (0..len).map_while(verdict).collect()
}

/// One vendor's connection pool, with every limit set.
pub struct HttpClient {
    settings: HttpSettings,
    key: Secret,
    client: Mutex<(Client, Instant)>,
    gzip: Arc<Gzip>,
    /// Held by whoever makes a large body.
    turn: Arc<Semaphore>,
    /// Texts that must not be seen in what an answer says.
    secrets: Vec<String>,
}

/// Where and how to reach a vendor.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Scheme, host and port; paths are appended.
    pub base_url: Url,
    /// Longest time for one request, from connecting to the end of the answer.
    pub request_timeout: Duration,
    /// Most connections that are kept open while idle.
    pub idle_connections_max: usize,
}

impl HttpClient {
    /// Prepares the client; connects to nothing. Fails when the machine has no
    /// certificate authorities.
    pub fn new(settings: HttpSettings, key: &Secret) -> Result<Self, reqwest::Error> {
        let client = Mutex::new((build_client(&settings)?, Instant::now()));
        let encoded = BASE64_STANDARD.encode(format!("{}:", key.expose()));
        Ok(Self {
            settings,
            key: key.clone(),
            client,
            gzip: Arc::default(),
            turn: Arc::new(Semaphore::new(1)),
            secrets: vec![key.expose().to_owned(), encoded],
        })
    }

    /// Sends one request, once, and reads the whole answer.
    async fn post(&self, encoded: Encoded, reply_bytes_max: usize) -> Result<Reply, SendError> {
        let request = self.request(&self.client()?, encoded).await?;
        let response = request.send().await.map_err(|error| self.transport(error))?;
        if response.status() == StatusCode::MISDIRECTED_REQUEST {
            // It is the connection that ends in the wrong place. (RFC 9110, 15.5.20)
            self.renew()?;
        }
        self.reply(response, reply_bytes_max).await
    }

    async fn request(&self, client: &Client, encoded: Encoded) -> Result<RequestBuilder, SendError> {
        let content_type =
            if encoded.form { "application/x-www-form-urlencoded" } else { "application/json" };
        let url = format!("{}{}", self.settings.base_url.as_str().trim_end_matches('/'), encoded.path);
        let mut request = client
            .post(url)
            .header(header::CONTENT_TYPE, content_type)
            // Answers are short, and what reads them should meet as little as can be.
            .header(header::ACCEPT_ENCODING, "identity");
        if let Some(user) = &encoded.basic_user {
            request = request.basic_auth(user.expose(), Some(""));
        }
        Ok(if encoded.gzip {
            request.header(header::CONTENT_ENCODING, "gzip").body(self.compressed(encoded.body).await?)
        } else {
            request.body(encoded.body)
        })
    }

    /// Reads the whole answer.
    async fn reply(&self, response: Response, bytes_max: usize) -> Result<Reply, SendError> {
        let status = response.status().as_u16();
        let retry_after = header_text(&response, &header::RETRY_AFTER)
            .and_then(|value| parse_retry_after(value, SystemTime::now()));
        let location = header_text(&response, &header::LOCATION)
            .and_then(|value| response.url().join(value).ok())
            .map(|url| self.redact(&without_secrets(url)));
        let coding = Coding::of(&response);
        let body = match self.read(response, bytes_max).await?.and_then(|body| coding.decode(body, bytes_max))
        {
            Ok(body) => self.redact(&String::from_utf8_lossy(&body)),
            Err(fault) if matches!(status, 200 | 400 | 429) => {
                let detail = format!("{status} with an answer {fault}");
                return Err(SendError::Unavailable { retry_after, detail });
            }
            // The status says it all; the rest is somebody's error page.
            Err(fault) => format!("with an answer {fault}"),
        };
        Ok(Reply { status, body, retry_after, location })
    }

    /// The body as it comes, unless it is too long.
    async fn read(
        &self,
        mut response: Response,
        bytes_max: usize,
    ) -> Result<Result<Vec<u8>, BodyFault>, SendError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.transport(error))? {
            if body.len() + chunk.len() > bytes_max {
                return Ok(Err(BodyFault::TooLong(bytes_max)));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Ok(body))
    }

    async fn compressed(&self, body: Vec<u8>) -> Result<Vec<u8>, SendError> {
        if body.len() <= INLINE_BYTES_MAX {
            return Ok(self.gzip.compress(&body));
        }
        let gzip = self.gzip.clone();
        self.off_thread(move || gzip.compress(&body)).await
    }

    /// Does what takes long where no caller waits for it. A panic goes on as it would
    /// here.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, SendError> {
        // One at a time: with a thread for each request, of which there are many
        // after an outage, callers would wait until each has had its turn.
        let turn = self.turn.clone().acquire_owned().await.expect("it is never closed");
        let working = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        working.await.map_err(|error| match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => {
                let detail = "the request could not be made: the relay stops".to_owned();
                SendError::Unavailable { retry_after: None, detail }
            }
        })
    }

    fn client(&self) -> Result<Client, SendError> {
        let (client, made_at) = self.kept_client().clone();
        if made_at.elapsed() > CLIENT_AGE_MAX { self.renew() } else { Ok(client) }
    }

    /// A client without connections, from now on.
    fn renew(&self) -> Result<Client, SendError> {
        let fresh = build_client(&self.settings).map_err(|error| self.transport(error))?;
        *self.kept_client() = (fresh.clone(), Instant::now());
        Ok(fresh)
    }

    fn kept_client(&self) -> MutexGuard<'_, (Client, Instant)> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A failure below HTTP. Whether the request arrived is unknown.
    fn transport(&self, error: reqwest::Error) -> SendError {
        SendError::Unavailable { retry_after: None, detail: self.words(error) }
    }

    /// What a failure below HTTP says, down to its cause.
    fn words(&self, error: reqwest::Error) -> String {
        let error = error.without_url();
        let mut words = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            words = format!("{words}: {cause}");
            source = cause.source();
        }
        self.redact(&words)
    }

    fn redact(&self, text: &str) -> String {
        let secrets = self.secrets.iter().filter(|secret| !secret.is_empty());
        secrets.fold(text.to_owned(), |text, secret| without_secret(&text, secret))
    }
}

/// A text without a secret, be it as it is or in percent-encoding.
fn without_secret(text: &str, secret: &str) -> String {
    if !text.contains('%') {
        return text.replace(secret, "***");
    }
    let (mut told, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(first) = rest.chars().next() {
        let hidden = secret_length(rest.as_bytes(), secret.as_bytes());
        told.push_str(if hidden.is_some() { "***" } else { &rest[..first.len_utf8()] });
        rest = &rest[hidden.unwrap_or(first.len_utf8())..];
    }
    told
}

/// How many of the first bytes of a text are a secret, each byte of it as it is or as
/// `%2B`, `%2b` or, encoded once more, `%252B`.
fn secret_length(text: &[u8], secret: &[u8]) -> Option<usize> {
    let mut at = 0;
    for wanted in secret {
        let mut found = *text.get(at)?;
        at += 1;
        while found == b'%' && found != *wanted {
            let digits = std::str::from_utf8(text.get(at..at + 2)?).ok()?;
            found = u8::from_str_radix(digits, 16).ok()?;
            at += 2;
        }
        if found != *wanted {
            return None;
        }
    }
    Some(at)
}

fn build_client(settings: &HttpSettings) -> Result<Client, reqwest::Error> {
    client_builder(settings).build()
}

fn client_builder(settings: &HttpSettings) -> ClientBuilder {
    // Fails only if one is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .user_agent(concat!("analytics-relay/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT_MAX.min(settings.request_timeout))
        .timeout(settings.request_timeout)
        .pool_max_idle_per_host(settings.idle_connections_max)
        .redirect(reqwest::redirect::Policy::none())
        // The client would send again by itself after some failures, and such
        // an attempt would be counted nowhere.
        .retry(reqwest::retry::never())
}

/// Why the body of an answer says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum BodyFault {
    #[error("of over {0} bytes")]
    TooLong(usize),
    #[error("in gzip that cannot be read")]
    Damaged,
    #[error("in the encoding {0}, want none or gzip")]
    Unknown(String),
}

/// What an answer's body was made of by something on the way: we ask for none of it.
enum Coding {
    Identity,
    Gzip,
    Unknown(String),
}

impl Coding {
    fn of(response: &Response) -> Self {
        let mut headers = response.headers().get_all(header::CONTENT_ENCODING).iter();
        let names = [headers.next(), headers.next()].map(|name| name.map(|it| it.to_str().unwrap_or("?")));
        match names {
            [None, _] => Self::Identity,
            [Some(name), None] if name.eq_ignore_ascii_case("identity") => Self::Identity,
            [Some(name), None] if ["gzip", "x-gzip"].iter().any(|gzip| name.eq_ignore_ascii_case(gzip)) => {
                Self::Gzip
            }
            [Some(name), _] => Self::Unknown(name.chars().take(32).collect()),
        }
    }

    /// The body as it was, at most so many bytes of it.
    fn decode(self, body: Vec<u8>, bytes_max: usize) -> Result<Vec<u8>, BodyFault> {
        match self {
            Self::Identity => Ok(body),
            Self::Gzip => {
                let mut plain = Vec::new();
                // One byte more than allowed tells "too long" from "just fits".
                let bytes_max_more = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
                let read = MultiGzDecoder::new(&*body).take(bytes_max_more).read_to_end(&mut plain);
                match read {
                    Ok(bytes) if bytes > bytes_max => Err(BodyFault::TooLong(bytes_max)),
                    Ok(_) => Ok(plain),
                    Err(_) => Err(BodyFault::Damaged),
                }
            }
            Self::Unknown(name) => Err(BodyFault::Unknown(name)),
        }
    }
}

fn header_text<'a>(response: &'a Response, name: &HeaderName) -> Option<&'a str> {
    response.headers().get(name).and_then(|value| value.to_str().ok())
}

/// An address without user, password, query and fragment.
fn without_secrets(mut url: Url) -> String {
    url.set_query(None);
    url.set_fragment(None);
    // Fails only where there can be neither.
    let _ = (url.set_username(""), url.set_password(None));
    url.into()
}

/// Makes bodies smaller, and keeps the compressor's tables: to set up 300 KB for
/// each batch costs as much as to compress it.
#[derive(Default)]
struct Gzip(Mutex<Option<Compress>>);

impl Gzip {
    fn compress(&self, body: &[u8]) -> Vec<u8> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Level 2: within a tenth of the best ratio for half of its time.
        let mut gzip = kept().take().unwrap_or_else(|| Compress::new_gzip(Compression::new(2), 15));
        let mut out = Vec::with_capacity(body.len() / 4 + 64);
        loop {
            let read = usize::try_from(gzip.total_in()).unwrap_or(usize::MAX);
            let done = gzip.compress_vec(&body[read..], &mut out, FlushCompress::Finish);
            if done.expect("a compressor takes any bytes") == Status::StreamEnd {
                break;
            }
            // All is read, and there is more to write than there was room for.
            out.reserve(body.len() / 4 + 64);
        }
        gzip.reset();
        *kept() = Some(gzip);
        out
    }
}

/// Reads a `Retry-After` header: seconds, or a date. What is neither is as good
/// as absent. (RFC 9110, section 10.2.3)
fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<f64>() {
        Ok(seconds) if seconds.is_finite() && seconds >= 0.0 => {
            Duration::try_from_secs_f64(seconds).unwrap_or(RETRY_AFTER_MAX)
        }
        Ok(_) => return None,
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or(Duration::ZERO),
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// A vendor's words, which are an object: what else there is would be read as one, its
/// items for fields, if it was let.
pub(crate) fn object<'a, T: Deserialize<'a>>(body: &'a str) -> Option<T> {
    serde_json::from_str(body).ok().filter(|_| body.trim_start().starts_with('{'))
}

/// For a vendor's lists and texts: null is as good as absent.
pub(crate) fn null_as_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

pub(crate) fn now_ms() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// The vendor's words in an answer.
fn details(answer: &mut Result<Vec<Verdict>, SendError>) -> impl Iterator<Item = &mut String> {
    let (verdicts, error) = match answer {
        Ok(verdicts) => (Some(verdicts), None),
        Err(error) => (None, Some(error.detail_mut())),
    };
    let of_verdicts = verdicts.into_iter().flatten().filter_map(|verdict| match verdict {
        Verdict::Rejected { detail, .. } | Verdict::Hold { detail, .. } => Some(detail),
        Verdict::Delivered | Verdict::Resend => None,
    });
    of_verdicts.chain(error)
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        sync::atomic::{AtomicUsize, Ordering::SeqCst},
        thread::sleep,
    };

    use futures_util::future::{join_all, try_join};

    use super::*;

    fn client() -> HttpClient {
        let settings = HttpSettings {
            base_url: "http://127.0.0.1:1".parse().unwrap(),
            request_timeout: Duration::from_secs(1),
            idle_connections_max: 1,
        };
        HttpClient::new(settings, &Secret::new("key")).unwrap()
    }

    #[tokio::test]
    async fn large_bodies_are_made_one_at_a_time_and_each_provider_makes_its_own() {
        let (one, other) = (client(), client());
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let work = || {
            let (running, most) = (running.clone(), most.clone());
            move || {
                most.fetch_max(running.fetch_add(1, SeqCst) + 1, SeqCst);
                sleep(Duration::from_millis(20));
                running.fetch_sub(1, SeqCst);
            }
        };
        join_all((0..5).map(|_| one.off_thread(work()))).await.into_iter().for_each(Result::unwrap);
        assert_eq!(most.swap(0, SeqCst), 1);

        // Each waits for the other to run.
        let both = Arc::new(std::sync::Barrier::new(2));
        let meet = || {
            let both = both.clone();
            move || both.wait().is_leader()
        };
        let met = try_join(one.off_thread(meet()), other.off_thread(meet()));
        tokio::time::timeout(Duration::from_secs(10), met)
            .await
            .expect("they do not wait for turns")
            .unwrap();
    }

    fn reply(status: u16) -> Reply {
        Reply { status, body: "why".into(), ..Reply::default() }
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_as_a_date_and_is_capped() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, want) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("99999999999999999999999", Some(3600)),
            ("86400", Some(3600)),
            ("-5", None),
            ("NaN", None),
            ("inf", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(parse_retry_after(value, now), want.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn what_is_compressed_again_and_again_comes_back_each_time() {
        let gzip = Gzip::default();
        let mut rng = 1_u64;
        // What cannot be made smaller needs more room than was made first.
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            rng.to_be_bytes()[0]
        })
        .take(100_000)
        .collect();
        for body in [&b""[..], b"[]", &noise, &[b'x'; 300_000], &noise[..1000]] {
            let mut back = Vec::new();
            flate2::read::GzDecoder::new(&gzip.compress(body)[..]).read_to_end(&mut back).unwrap();
            assert_eq!(back, body);
        }
    }

    #[test]
    fn a_status_is_named_for_the_next_move() {
        let moves = |status| match reply(status).failure() {
            SendError::Unavailable { .. } => "unavailable",
            SendError::TooLarge { .. } => "too large",
            SendError::Refused { .. } => "refused",
            SendError::Unauthorized { .. } => "unauthorized",
            SendError::Misdirected { .. } => "misdirected",
        };
        for (statuses, want) in [
            (&[200, 202, 204, 304, 408, 421, 425, 429, 460, 499, 500, 502, 503, 504, 520][..], "unavailable"),
            (&[401, 402, 403, 407, 451, 511], "unauthorized"),
            (&[301, 302, 303, 307, 308, 404, 405, 410, 426, 431, 501, 505], "misdirected"),
            (&[400, 406, 409, 415, 422], "refused"),
            (&[413], "too large"),
        ] {
            for status in statuses {
                assert_eq!(moves(*status), want, "{status}");
            }
        }
    }

    #[test]
    fn a_compressed_answer_is_read_up_to_its_limit() {
        let body = vec![b'x'; 1000];
        let gzip = Gzip::default().compress(&body);
        assert_eq!(Coding::Gzip.decode(gzip.clone(), 1000), Ok(body.clone()));
        assert_eq!(Coding::Gzip.decode(gzip.clone(), 999), Err(BodyFault::TooLong(999)));
        assert_eq!(Coding::Gzip.decode(gzip[..gzip.len() - 1].to_vec(), 1000), Err(BodyFault::Damaged));
        assert_eq!(Coding::Gzip.decode(body.clone(), 1000), Err(BodyFault::Damaged));
        assert_eq!(Coding::Identity.decode(body.clone(), 1000), Ok(body));
    }

    #[test]
    fn where_a_redirect_points_to_is_told_without_what_could_be_a_secret() {
        let url = "https://user:canary@x.example/a?canary#canary".parse().unwrap();
        assert_eq!(without_secrets(url), "https://x.example/a");
        assert_eq!(without_secrets("mailto:a@b.c?x".parse().unwrap()), "mailto:a@b.c");
    }

    #[test]
    fn a_vendors_words_are_short_and_on_one_line() {
        let reply =
            Reply { status: 400, body: format!("a\r\n\u{1b}[31mb {}", "x".repeat(1000)), ..Reply::default() };
        let detail = reply.detail();
        assert!(detail.starts_with("400 a [31mb x"), "{detail}");
        assert!(detail.chars().count() <= DETAIL_CHARS_MAX + 4);
    }

    #[test]
    fn keys_are_removed_from_what_an_answer_says() {
        let client = HttpClient::new(client().settings, &Secret::new("canary-key")).unwrap();
        assert_eq!(client.redact("no canary-key, no Y2FuYXJ5LWtleTo= here"), "no ***, no *** here");
    }

    /// As a query or a form has them, in either case and twice over.
    #[test]
    fn keys_are_removed_in_percent_encoding_too() {
        let client = HttpClient::new(client().settings, &Secret::new("a+b/c=~k")).unwrap();
        for said in [
            "a%2Bb%2Fc%3D~k",
            "a%2bb%2fc%3d%7ek",
            "%61%2B%62%2F%63%3D%7E%6B",
            "a%252Bb%252Fc%253D~k",
            "a+b%2Fc=~k",
        ] {
            assert_eq!(client.redact(&format!("\u{e9}%?k={said}&x=%")), "\u{e9}%?k=***&x=%", "{said}");
        }
        let user = BASE64_STANDARD.encode("a+b/c=~k:").replace('=', "%3D");
        assert_eq!(client.redact(&user), "***");
        assert_eq!(client.redact("a%2Bb%2Fc%3Dk %2 %zz %e9"), "a%2Bb%2Fc%3Dk %2 %zz %e9", "not the key");
    }

    #[test]
    fn the_page_of_a_redirect_is_not_told() {
        for status in [300, 301, 302, 303, 304, 307, 308, 399] {
            let body = "<a href=\"https://x.example/?key=canary\">here</a>".to_owned();
            let error = Reply { status, body, ..Reply::default() }.failure();
            assert!(!format!("{error:?}").contains("canary"), "{error:?}");
        }
    }

    #[test]
    fn our_own_rejections_go_back_to_their_places() {
        let rejected = |index| (index, Rejection::Invalid, String::new());
        let merged = merge(4, vec![Verdict::Delivered, Verdict::Resend], vec![rejected(0), rejected(2)]);
        let gone = Verdict::Rejected { reason: Rejection::Invalid, detail: String::new() };
        assert_eq!(merged, [gone.clone(), Verdict::Delivered, gone, Verdict::Resend]);
    }
}
