//! Tries the way to a vendor with requests that hold no event: through the client that
//! events take, proxies and certificate authorities included.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use reqwest::{
    Client, Url,
    dns::{Addrs, Name, Resolve, Resolving},
};
use serde::de::IgnoredAny;
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

use super::{
    CONNECT_TIMEOUT_MAX, Encoded, HttpClient, HttpProvider, HttpSettings, Wire, client_builder, details,
};
use crate::{Finding, Secret, SendError, Step, Verdict};

/// Longest time for one request of a try.
const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(10);

/// A key that is nobody's. An endpoint that refuses it and not ours knows ours.
const MADE_UP_KEY: &str = "00000000000000000000000000000000";

/// A request of one endpoint's that holds no event.
#[derive(Debug)]
pub struct Probe {
    /// The request, with the key in its place.
    pub request: Encoded,
    /// What the endpoint does about a wrong key.
    pub wrong_key: WrongKey,
}

/// What an endpoint does about a wrong key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrongKey {
    /// Refuses it, and so the request.
    Refused,
    /// Says nothing: where else a person can see it.
    Untold(&'static str),
}

/// Tries each endpoint once, and where it tells keys apart, once more with another key.
pub(super) async fn try_the_way<W: Wire>(provider: &HttpProvider<W>) -> Vec<Step> {
    let (wire, http) = (&*provider.wire, &provider.http);
    let way = match Way::new(&http.settings) {
        Ok(way) => way,
        Err(error) => return vec![Step::failed("client", http.words(error))],
    };
    let mut steps = Vec::new();
    let mut key = Step::unknown("key", "nobody could be asked");
    for (probe, other) in wire.probes(&http.key).into_iter().zip(wire.probes(&Secret::new(MADE_UP_KEY))) {
        let path = probe.request.path;
        let answer = match way.ask(wire, http, probe.request).await {
            Ok(answer) => answer,
            Err(lost) => {
                // The other endpoints are at the end of the same way.
                steps = way.lost(&lost).await;
                steps.push(if steps.iter().any(|step| step.finding == Finding::Failed) {
                    Step::unknown(path_name(path), "not reached")
                } else {
                    Step::failed(path_name(path), lost.words)
                });
                break;
            }
        };
        if steps.is_empty() {
            steps = way.walked();
        }
        steps.push(path_step(path, &answer));
        if key.finding != Finding::Unknown {
            continue;
        }
        key = match (&answer.meaning, probe.wrong_key) {
            (Err(SendError::Unauthorized { detail }), _) => Step::failed("key", detail),
            _ if !answer.is_the_vendors() => continue,
            (_, WrongKey::Untold(where_else)) => Step::unknown("key", where_else),
            (_, WrongKey::Refused) => compared(way.ask(wire, http, other.request).await),
        };
    }
    steps.push(key);
    steps
}

/// Whether ours, which was not refused, is known: by the answer to one that is not.
fn compared(other: Result<Answer, Lost>) -> Step {
    match other.map(|answer| answer.meaning) {
        Ok(Err(SendError::Unauthorized { .. })) => {
            Step::ok("key", "taken, and one that is made up is refused")
        }
        Ok(_) => Step::unknown("key", "not refused, and neither is one that is made up"),
        Err(_) => Step::unknown("key", "not refused; there was no answer to one that is made up"),
    }
}

fn path_step(path: &str, answer: &Answer) -> Step {
    let what = path_name(path);
    match &answer.meaning {
        Err(SendError::Misdirected { detail } | SendError::Unavailable { detail, .. }) => {
            Step::failed(what, detail)
        }
        Err(error) if !answer.is_json => {
            Step::unknown(what, format!("answers, and not as the vendor does: {}", error.detail()))
        }
        _ => Step::ok(what, "answers as the vendor does"),
    }
}

fn path_name(path: &str) -> String {
    format!("path {}", path.split('?').next().unwrap_or_default())
}

/// An answer to a request without an event.
struct Answer {
    meaning: Result<Vec<Verdict>, SendError>,
    is_json: bool,
}

impl Answer {
    /// True if it is the vendor that answers, and not something on the way.
    fn is_the_vendors(&self) -> bool {
        let is_of_the_way =
            matches!(&self.meaning, Err(SendError::Misdirected { .. } | SendError::Unavailable { .. }));
        self.is_json && !is_of_the_way
    }
}

/// There was no answer.
struct Lost {
    is_connect: bool,
    words: String,
}

/// The way to a vendor, watched.
struct Way {
    url: Url,
    client: Client,
    look_up: Arc<LookUp>,
}

impl Way {
    fn new(settings: &HttpSettings) -> Result<Self, reqwest::Error> {
        let request_timeout = settings.request_timeout.min(REQUEST_TIMEOUT_MAX);
        let settings = HttpSettings { request_timeout, ..settings.clone() };
        let look_up = Arc::new(LookUp::default());
        let client = client_builder(&settings).dns_resolver(look_up.clone()).build()?;
        Ok(Self { url: settings.base_url, client, look_up })
    }

    async fn ask<W: Wire>(&self, wire: &W, http: &HttpClient, request: Encoded) -> Result<Answer, Lost> {
        let path = request.path;
        let not_made = |error: SendError| Lost { is_connect: false, words: error.detail().to_owned() };
        let request = http.request(&self.client, request).await.map_err(not_made)?;
        let response = request.send().await.map_err(|error| {
            let is_connect = error.is_connect();
            Lost { is_connect, words: http.words(error) }
        })?;
        let reply = match http.reply(response, wire.reply_bytes_max()).await {
            Ok(reply) => reply,
            Err(error) => return Ok(Answer { meaning: Err(error), is_json: false }),
        };
        let mut meaning = wire.interpret_probe(path, &reply);
        // Once more: a key may have been hidden in escapes until now.
        details(&mut meaning).for_each(|detail| *detail = http.redact(detail));
        Ok(Answer { meaning, is_json: serde_json::from_str::<IgnoredAny>(&reply.body).is_ok() })
    }

    /// There was an answer, so each step was made.
    fn walked(&self) -> Vec<Step> {
        let tcp = Step::ok("tcp", format!("connected, port {}", self.port()));
        vec![self.dns().0, tcp, self.tls("the certificate is valid for it, and its authority is known")]
    }

    /// There was none: how far it went.
    async fn lost(&self, lost: &Lost) -> Vec<Step> {
        let words = &lost.words;
        let (dns, addrs) = self.dns();
        if dns.finding == Finding::Failed {
            return vec![dns, Step::unknown("tcp", "not reached"), Step::unknown("tls", "not reached")];
        }
        if !lost.is_connect {
            return vec![dns, Step::ok("tcp", "connected"), self.tls("its certificate is taken")];
        }
        if dns.finding == Finding::Unknown {
            return vec![dns, Step::failed("tcp", format!("by a proxy: {words}")), self.not_tried()];
        }
        // The client does not say which of the two it was.
        let connected = timeout(CONNECT_TIMEOUT_MAX, connect_any(&addrs)).await.unwrap_or(false);
        match self.url.scheme() {
            "https" if connected => {
                vec![dns, Step::ok("tcp", "connected"), Step::failed("tls", words)]
            }
            _ => vec![dns, Step::failed("tcp", words), self.not_tried()],
        }
    }

    fn not_tried(&self) -> Step {
        if self.url.scheme() == "https" { Step::unknown("tls", "not reached") } else { self.tls("") }
    }

    fn tls(&self, why: &str) -> Step {
        match self.url.scheme() {
            "https" => Step::ok("tls", why),
            _ => Step::ok("tls", "none, as the address says http: the key goes in plaintext"),
        }
    }

    /// How the name was found, and where.
    fn dns(&self) -> (Step, Vec<SocketAddr>) {
        let host = self.url.host_str().unwrap_or_default();
        let sockets = |ips: &[IpAddr]| ips.iter().map(|ip| SocketAddr::new(*ip, self.port())).collect();
        if let Ok(ip) = host.trim_matches(['[', ']']).parse::<IpAddr>() {
            return (Step::ok("dns", format!("{ip} is an address")), sockets(&[ip]));
        }
        match &*self.look_up.last() {
            Some((name, _)) if name != host => {
                (Step::unknown("dns", format!("the proxy {name} looks up {host}")), Vec::new())
            }
            Some((_, Some(Ok(ips)))) => {
                let all: Vec<_> = ips.iter().take(4).map(ToString::to_string).collect();
                (Step::ok("dns", format!("{host} is {}", all.join(", "))), sockets(ips))
            }
            Some((_, Some(Err(words)))) => (Step::failed("dns", format!("{host}: {words}")), Vec::new()),
            Some((_, None)) => (Step::failed("dns", format!("{host}: no answer in time")), Vec::new()),
            None => (Step::unknown("dns", format!("the proxy looks up {host}")), Vec::new()),
        }
    }

    fn port(&self) -> u16 {
        self.url.port_or_known_default().unwrap_or_default()
    }
}

async fn connect_any(addrs: &[SocketAddr]) -> bool {
    TcpStream::connect(addrs).await.is_ok()
}

/// A name that was looked up, and what was found once that is known.
type LookedUp = Option<(String, Option<Result<Vec<IpAddr>, String>>)>;

/// Looks names up as the system does, and keeps what it found.
#[derive(Debug, Default)]
struct LookUp(Arc<Mutex<LookedUp>>);

impl LookUp {
    fn last(&self) -> MutexGuard<'_, LookedUp> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolve for LookUp {
    fn resolve(&self, name: Name) -> Resolving {
        let name = name.as_str().to_owned();
        *self.last() = Some((name.clone(), None));
        let last = Self(self.0.clone());
        Box::pin(async move {
            let found = lookup_host((name.as_str(), 0)).await.map(Iterator::collect::<Vec<_>>);
            let ips = match &found {
                Ok(addrs) => Ok(addrs.iter().map(SocketAddr::ip).collect()),
                Err(error) => Err(error.to_string()),
            };
            *last.last() = Some((name, Some(ips)));
            Ok(Box::new(found?.into_iter()) as Addrs)
        })
    }
}
