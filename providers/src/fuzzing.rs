//! What must hold for any bytes from outside: a vendor's answers, and
//! properties. Each function takes a fuzzer's bytes and panics when something
//! does not hold; `fuzz/` calls them.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

use std::{
    cell::OnceCell,
    convert::Infallible,
    io::{self, Read},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use flate2::{Compression, read::GzEncoder};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

use crate::{
    Event, EventId, EventKind, EventParts, Properties, Provider, Secret, SendError, Verdict,
    amplitude::Amplitude,
    http::{HttpClient, HttpProvider, HttpSettings, RETRY_AFTER_MAX, Reply, Wire},
    mixpanel::{IdentityMode, Mixpanel},
    properties::Limits,
    registry::Vendor,
    segment::Segment,
    view::{GroupType, View, ViewName},
};

/// Not a word that a fuzzer comes by on its own.
const KEY: &str = "canary-key";
const NOW_MS: i64 = 1_767_225_600_000;
/// The status, a space, 300 characters of the vendor's, and the space after.
const DETAIL_CHARS_MAX: usize = 5 + 1 + 300 + 1;
/// Amplitude's throttling waits at least this long.
const HOLD_MIN: Duration = Duration::from_secs(15);

/// Takes a fuzzer's bytes apart, from the front; beyond the last one there are
/// zeros.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or_default()
    }

    /// A number below `end`, which is at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn u64(&mut self) -> u64 {
        (0..8).fold(0, |number, place| number | u64::from(self.byte()) << (8 * place))
    }

    /// At most that many bytes.
    pub fn take(&mut self, bytes: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(bytes.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Text of a length that the next byte says, whatever the bytes are.
    pub fn text(&mut self) -> String {
        let bytes = self.below(256);
        String::from_utf8_lossy(self.take(bytes)).into_owned()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }
}

/// A vendor's answer, as it was read, to a request of 1 to 6 events.
///
/// Bytes: which request, how many events, which status, whether to wait, and
/// the body.
pub fn provider_answer(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let request = input.below(4);
    let (wire, identifies) = wire(request);
    let events: Vec<Event> = (0..=input.below(6)).map(|index| event(index, identifies)).collect();
    let sent: Vec<&Event> = events.iter().collect();
    let status = status(&mut input);
    let retry_after = match input.below(4) {
        0 => None,
        1 => Some(Duration::ZERO),
        2 => Some(Duration::from_secs(u64::from(input.byte()))),
        _ => Some(RETRY_AFTER_MAX),
    };
    let body = String::from_utf8_lossy(input.rest()).into_owned();
    let reply = Reply { status, body, retry_after, location: None };

    let answer = wire.interpret(&sent, &reply);
    check_answer(&answer, sent.len());
    assert_eq!(answer, wire.interpret(&sent, &reply), "the same answer means the same");
    if !reply.body.contains(KEY) && is_plain(&reply.body) {
        check_details(&answer, |detail| assert!(!detail.contains(KEY), "{detail}"));
    }
    check_delivered(&answer, request, status, &reply.body);
}

/// Nothing is delivered without the vendor's own success, counted.
fn check_delivered(answer: &Result<Vec<Verdict>, SendError>, request: usize, status: u16, body: &str) {
    let Ok(verdicts) = answer else { return };
    let delivered = verdicts.iter().filter(|verdict| **verdict == Verdict::Delivered).count();
    if delivered == 0 {
        return;
    }
    let said: Value = serde_json::from_str(body).expect("delivered by what is not JSON");
    let is_success = match request {
        0 => {
            let is_own = if status == 200 { said["code"] == 200 } else { status == 400 };
            is_own && said["num_records_imported"] == delivered
        }
        1 => status == 200 && (said == 1 || said["status"] == 1),
        2 => {
            let counts = [delivered, verdicts.len()];
            status == 200 && said["code"] == 200 && counts.iter().any(|it| said["events_ingested"] == *it)
        }
        _ => status == 200 && said == json!({"success": true}),
    };
    assert!(is_success, "delivered by {status} {body}");
}

/// The same over a connection, from the status line on: with any `Retry-After` and
/// `Location`, compressed or saying so, and with the key wherever the body has a 0x01.
pub fn provider_http(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let first = input.below(16);
    let (request, coding) = (first % 4, first / 4);
    let events: Vec<_> = (0..=input.below(6)).map(|index| event(index, is_identify(request))).collect();
    let status = status(&mut input).clamp(200, 599);
    let header_bytes = input.below(64);
    let header = header_value(input.take(header_bytes));
    let body = with_key(input.rest());

    let (coding, encoded) = match coding {
        0 => ("identity", body.clone()),
        1 => ("gzip", gzip(&body)),
        2 => ("gzip", body.clone()),
        _ => ("br", body.clone()),
    };
    let answer = over_http(request, &events, status, &header, coding, &encoded);
    check_answer(&answer, events.len());
    // The key can also come back in pieces or escaped: see `is_plain`.
    if is_plain(&String::from_utf8_lossy(&body)) {
        check_details(&answer, |detail| assert!(!detail.contains(KEY), "{detail}"));
    }
}

/// A `Retry-After` header alone, through the client, which reads it.
pub fn retry_after(bytes: &[u8]) {
    const SEGMENT: usize = 3;
    let header = header_value(bytes);
    let answer = over_http(SEGMENT, &[event(0, false)], 503, &header, "identity", b"");
    let Err(SendError::Unavailable { retry_after, .. }) = answer else { panic!("{answer:?} to a 503") };
    assert!(retry_after.is_none_or(|wait| wait <= RETRY_AFTER_MAX), "{retry_after:?}");
    let text = header.trim_ascii();
    if !text.is_empty() && text.len() < 9 && text.iter().all(u8::is_ascii_digit) {
        let seconds = text.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
        assert_eq!(retry_after, Some(Duration::from_secs(seconds).min(RETRY_AFTER_MAX)));
    }
    if text.starts_with(b"-") || text.is_empty() {
        // "-0" is zero.
        assert!(retry_after.is_none_or(|wait| wait.is_zero()), "{retry_after:?}");
    }
}

/// Properties as text, of a caller or of a file.
pub fn properties(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // As it stands in a file: nothing that was accepted once is damage.
    if let Ok(properties) = Properties::parse(text, &Limits::NONE) {
        check_properties(&properties, &Limits::NONE);
    }
    let properties = match Properties::parse(text, &Limits::DEFAULT) {
        Ok(properties) => properties,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    check_properties(&properties, &Limits::DEFAULT);
    let plain = event(0, false);
    let parts = EventParts { properties, ..plain.parts() };
    encode_everywhere(&Event::pack(&parts));
    encode_everywhere(&Event::pack(&EventParts { kind: EventKind::Identify, ..parts }));
}

/// What holds for all properties that were not refused.
pub fn check_properties(properties: &Properties<'_>, limits: &Limits) {
    let shape = properties.shape();
    assert!(properties.json().len() <= limits.json_bytes_max);
    assert!(shape.top_keys <= shape.keys && shape.keys <= limits.keys_max);
    assert!((1..=limits.depth_max).contains(&shape.depth));
    assert_eq!(properties.entries().len(), usize::from(shape.top_keys));
    assert_eq!(&Properties::parse(properties.json(), limits).expect("it was taken before"), properties);
    let json = serde_json::to_string(properties).expect("properties are JSON");
    assert_eq!(json, properties.json());
    assert_eq!(&serde_json::from_str::<Properties>(&json).expect("it was written by us"), properties);

    let value: Value = serde_json::from_str(properties.json()).expect("properties are JSON");
    let mut measured = Measured::default();
    measured.add(&value, 1);
    assert!(measured.keys <= usize::from(shape.keys) && measured.depth <= usize::from(shape.depth));
    // A name that is there twice is counted twice, and one value of it is kept.
    if measured.keys == usize::from(shape.keys) {
        let object = value.as_object().expect("properties are an object");
        let longest = [shape.keys, shape.depth.into(), shape.widest, shape.longest_key].map(usize::from);
        assert_eq!([measured.keys, measured.depth, measured.widest, measured.longest_key], longest);
        assert_eq!(object.len(), usize::from(shape.top_keys));
        assert_eq!(object.values().any(Value::is_null), shape.has_null());
    }
}

#[derive(Default)]
struct Measured {
    keys: usize,
    depth: usize,
    widest: usize,
    longest_key: usize,
}

impl Measured {
    fn add(&mut self, value: &Value, depth: usize) {
        let inside: Vec<&Value> = match value {
            Value::Array(items) => items.iter().collect(),
            Value::Object(fields) => {
                self.keys += fields.len();
                self.longest_key = fields.keys().map(String::len).fold(self.longest_key, usize::max);
                fields.values().collect()
            }
            _ => return,
        };
        self.depth = self.depth.max(depth);
        if depth > 1 {
            self.widest = self.widest.max(inside.len());
        }
        inside.into_iter().for_each(|value| self.add(value, depth + 1));
    }
}

/// An event that was admitted can be put into every vendor's words.
pub fn encode_everywhere(event: &Event) {
    let batch = [event.clone()];
    let group_type = GroupType::parse("company").ok();
    let [page_name, screen_name] = [ViewName::Vendor, ViewName::Vendor];
    let view = View { page_name, screen_name, group_type };
    let wires: [&dyn Wire; 5] = [
        &Mixpanel::new(Secret::new(KEY), IdentityMode::Simplified),
        &Mixpanel::new(Secret::new(KEY), IdentityMode::Original).with_view(view.clone()),
        &Amplitude::new(Secret::new(KEY), 5),
        &Amplitude::new(Secret::new(KEY), 1).with_view(view),
        &Segment::new(Secret::new(KEY)),
    ];
    for wire in wires {
        let encoded = wire.encode(&batch, NOW_MS);
        assert!(encoded.rejected.len() <= 1, "{}: one event, two rejections", wire.name());
        if encoded.rejected.is_empty() {
            let body = serde_json::from_slice::<IgnoredAny>(&encoded.body);
            assert!(
                encoded.form || body.is_ok(),
                "{}: {}",
                wire.name(),
                String::from_utf8_lossy(&encoded.body)
            );
            assert!(encoded.body.len() <= encoded.body_bytes_max, "{}: too large", wire.name());
        }
    }
}

/// The request that is answered: its vendor, and whether it identifies.
fn wire(request: usize) -> (Box<dyn Wire>, bool) {
    let key = Secret::new(KEY);
    let wire: Box<dyn Wire> = match request {
        0 | 1 => Box::new(Mixpanel::new(key, IdentityMode::Simplified)),
        2 => Box::new(Amplitude::new(key, 1)),
        _ => Box::new(Segment::new(key)),
    };
    (wire, is_identify(request))
}

fn is_identify(request: usize) -> bool {
    request == 1
}

/// The ids are such that an answer can easily name them.
fn event(index: usize, identifies: bool) -> Event {
    let (user_id, anonymous_id) = (format!("u{index}"), format!("d{index}"));
    Event::pack(&EventParts {
        id: EventId::new(format!("id-{index}")).expect("a legal id"),
        kind: if identifies { EventKind::Identify } else { EventKind::Track { name: "x" } },
        user_id: (identifies || index != 1).then_some(&user_id),
        anonymous_id: (index % 2 == 1).then_some(&anonymous_id),
        time_ms: NOW_MS,
        accepted_ms: NOW_MS,
        ip: None,
        user_agent: None,
        properties: Properties::empty(),
        more: None,
    })
}

fn status(input: &mut Input<'_>) -> u16 {
    const STATUSES: [u16; 15] = [200, 400, 429, 401, 403, 404, 405, 408, 410, 413, 422, 307, 500, 501, 503];
    STATUSES.get(input.below(16)).copied().unwrap_or_else(|| input.u16())
}

fn check_answer(answer: &Result<Vec<Verdict>, SendError>, events: usize) {
    match answer {
        Ok(verdicts) => {
            assert_eq!(verdicts.len(), events, "one verdict for each event");
            let resent = verdicts.iter().filter(|verdict| **verdict == Verdict::Resend).count();
            assert!(resent < events, "sending again would never end");
            for verdict in verdicts {
                if let Verdict::Hold { after, .. } = verdict {
                    assert!((HOLD_MIN..=RETRY_AFTER_MAX).contains(after), "{after:?}");
                }
            }
        }
        Err(SendError::Unavailable { retry_after, .. }) => {
            assert!(retry_after.is_none_or(|wait| wait <= RETRY_AFTER_MAX), "{retry_after:?}");
        }
        Err(_) => {}
    }
    check_details(answer, |detail| {
        assert!(detail.chars().count() <= DETAIL_CHARS_MAX, "{} characters", detail.chars().count());
        assert!(!detail.chars().any(char::is_control), "{detail:?}");
    });
}

fn check_details(answer: &Result<Vec<Verdict>, SendError>, check: impl Fn(&str)) {
    match answer {
        Ok(verdicts) => verdicts.iter().for_each(|verdict| match verdict {
            Verdict::Rejected { detail, .. } | Verdict::Hold { detail, .. } => check(detail),
            Verdict::Delivered | Verdict::Resend => {}
        }),
        Err(error) => check(error.detail()),
    }
}

/// True if words of this text stand in it as they will be shown. JSON's escapes
/// are resolved and control characters are left out after the key was looked
/// for.
fn is_plain(text: &str) -> bool {
    !text.chars().any(|c| c == '\\' || (c.is_control() && !c.is_whitespace()))
}

/// What HTTP allows in a header.
fn header_value(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().filter(|byte| *byte == b'\t' || (*byte >= b' ' && *byte != 0x7f)).collect()
}

fn with_key(bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            1 => body.extend_from_slice(KEY.as_bytes()),
            byte => body.push(*byte),
        }
    }
    body
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let read = GzEncoder::new(bytes, Compression::fast()).read_to_end(&mut out);
    read.expect("memory can be read");
    out
}

/// Sends a request and gets the answer that is given here.
fn over_http(
    request: usize,
    events: &[Event],
    status: u16,
    header: &[u8],
    coding: &str,
    body: &[u8],
) -> Result<Vec<Verdict>, SendError> {
    thread_local! {
        static LOOPBACK: OnceCell<Loopback> = const { OnceCell::new() };
    }
    let has_body = !matches!(status, 204 | 304);
    let mut answer = format!("HTTP/1.1 {status} X\r\nRetry-After: ").into_bytes();
    answer.extend_from_slice(header);
    answer.extend_from_slice(b"\r\nLocation: ");
    answer.extend_from_slice(header);
    answer.extend_from_slice(format!("\r\nContent-Encoding: {coding}").as_bytes());
    if has_body {
        answer.extend_from_slice(format!("\r\nContent-Length: {}", body.len()).as_bytes());
    }
    answer.extend_from_slice(b"\r\n\r\n");
    answer.extend_from_slice(if has_body { body } else { b"" });
    LOOPBACK.with(|loopback| loopback.get_or_init(Loopback::start).send(request, events, answer))
}

/// A server that says what it is told to, and clients of it.
struct Loopback {
    runtime: Runtime,
    answer: Arc<Mutex<Vec<u8>>>,
    providers: [Arc<dyn Provider>; 3],
}

impl Loopback {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be started");
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).expect("a port is free");
        let base_url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let answer = Arc::new(Mutex::new(Vec::new()));
        runtime.spawn(serve(listener, answer.clone()));
        let client = || {
            let settings = HttpSettings {
                base_url: base_url.parse().expect("an address"),
                request_timeout: Duration::from_secs(5),
                idle_connections_max: 1,
            };
            HttpClient::new(settings, &Secret::new(KEY)).expect("a client can be built")
        };
        let providers: [Arc<dyn Provider>; 3] = Vendor::ALL.map(|vendor| {
            let key = Secret::new(KEY);
            match vendor {
                Vendor::Mixpanel => {
                    let wire = Mixpanel::new(key, IdentityMode::Simplified);
                    Arc::new(HttpProvider::new(wire, client())) as Arc<dyn Provider>
                }
                Vendor::Amplitude => Arc::new(HttpProvider::new(Amplitude::new(key, 1), client())),
                Vendor::Segment => Arc::new(HttpProvider::new(Segment::new(key), client())),
            }
        });
        Self { runtime, answer, providers }
    }

    fn send(&self, request: usize, events: &[Event], answer: Vec<u8>) -> Result<Vec<Verdict>, SendError> {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = answer;
        let provider = &self.providers[request.saturating_sub(1)];
        self.runtime.block_on(provider.send(events))
    }
}

async fn serve(listener: TcpListener, answer: Arc<Mutex<Vec<u8>>>) -> Infallible {
    loop {
        if let Ok((connection, _)) = listener.accept().await {
            let answer = answer.clone();
            tokio::spawn(async move { answer_all(&connection, &answer).await });
        }
    }
}

/// Answers request after request, until the client goes.
async fn answer_all(connection: &TcpStream, answer: &Mutex<Vec<u8>>) -> io::Result<()> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        while !is_whole(&seen) {
            connection.readable().await?;
            match connection.try_read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(bytes) => seen.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        seen.clear();
        let answer = answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut written = 0;
        while written < answer.len() {
            connection.writable().await?;
            match connection.try_write(&answer[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// True if these bytes are a request with all of its body. Clients send one at a
/// time.
fn is_whole(seen: &[u8]) -> bool {
    let Some(head_bytes) = seen.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&seen[..head_bytes]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length = length.and_then(|length| length.trim().parse().ok()).unwrap_or(0);
    seen.len() >= head_bytes + 4 + length
}
