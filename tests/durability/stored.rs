//! What the callers of a relay with a store know, and what the store has: every event that
//! was answered OK once, as it was sent, and the figures that follow from it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    iter::repeat_with,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use analytics_relay::{
    proto::v1::{
        AliasRequest, Durability, IdentifyUserRequest, TrackBatchItem, TrackBatchRequest, TrackEventRequest,
        ViewRequest, track_batch_answer::Answer, track_batch_item::Item,
    },
    providers::Event,
};
use analytics_relay_store::{
    Bucket, Scope, Store, Subject, TenantScope,
    oracle::Oracle,
    sqlite::{self, Settings, SqliteStore},
};
use fastrand::Rng;
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Client, Relay, Setup, reqwest_client};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;
/// People who are linked with each other and with nobody else, and of how many ids each.
const GROUPS: u8 = 12;
const USERS: u8 = 5;
const DEVICES: u8 = 3;
/// Websites: what comes of the last is days old, so that it is tidied.
const SITES: [&str; 3] = ["", "shop", "archive"];
const ARCHIVE: &str = SITES[2];

#[derive(Debug, Clone)]
enum Act {
    Track(&'static str),
    Page,
    Identify,
    Alias { previous: String },
}

/// What is to be sent. Sent again it is the same event, as it has its own time.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    id: String,
    act: Act,
    user: String,
    device: String,
    site: &'static str,
    time_ms: i64,
    /// Makes the event larger; no two have the same.
    filler: String,
    level: Durability,
}

pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as i64
}

impl Draft {
    pub(crate) fn new(random: &mut Rng, level: Durability) -> Self {
        let group = random.u8(..GROUPS);
        let (mut user, mut device) = (
            format!("user-{group}-{}", random.u8(..USERS)),
            format!("device-{group}-{}", random.u8(..DEVICES)),
        );
        let act = match random.u8(..20) {
            0..11 => Act::Track(["Order Placed", "Product Viewed"][random.usize(..2)]),
            11..15 => Act::Page,
            15..18 => Act::Identify,
            _ => Act::Alias { previous: previous(random, group, &user) },
        };
        match (&act, random.u8(..3)) {
            (Act::Alias { .. }, _) => device.clear(),
            (Act::Track(_) | Act::Page, 0) => user.clear(),
            (_, 1) => device.clear(),
            _ => {}
        }
        let site = if matches!(act, Act::Alias { .. }) { "" } else { SITES[random.usize(..SITES.len())] };
        let ago_ms = match random.u8(..40) {
            _ if site == ARCHIVE => random.i64(2 * DAY_MS..6 * DAY_MS),
            // A clock that is ahead.
            0 => -3_600_000,
            _ => 0,
        };
        let length = random.usize(16..2_000);
        Self {
            id: uuid::Uuid::now_v7().to_string(),
            act,
            user,
            device,
            site,
            time_ms: now_ms() - ago_ms,
            filler: repeat_with(|| random.alphanumeric()).take(length).collect(),
            level,
        }
    }

    fn properties(&self) -> Value {
        let mut properties = json!({"filler": self.filler});
        if !self.site.is_empty() {
            properties["website_id"] = self.site.into();
        }
        properties
    }

    fn item(&self) -> TrackBatchItem {
        let Self { id, act, user, device, time_ms, level, .. } = self.clone();
        let properties_json = self.properties().to_string().into_bytes();
        let (event_id, user_id, anonymous_id, timestamp_ms, durability) =
            (id, user, device, time_ms, level.into());
        let item = match act {
            Act::Track(name) => Item::Track(TrackEventRequest {
                event_name: name.to_owned(),
                event_id,
                user_id,
                anonymous_id,
                timestamp_ms,
                durability,
                properties_json,
                ..Default::default()
            }),
            Act::Page => Item::Page(ViewRequest {
                event_id,
                user_id,
                anonymous_id,
                timestamp_ms,
                durability,
                properties_json,
                ..Default::default()
            }),
            Act::Identify => Item::Identify(IdentifyUserRequest {
                event_id,
                user_id,
                anonymous_id,
                timestamp_ms,
                durability,
                properties_json,
                ..Default::default()
            }),
            Act::Alias { previous } => Item::Alias(AliasRequest {
                previous_id: previous,
                event_id,
                user_id,
                timestamp_ms,
                durability,
                ..Default::default()
            }),
        };
        TrackBatchItem { item: Some(item) }
    }

    /// Fails unless an event is the one that was sent.
    fn check(&self, event: &Value) {
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        let (kind, name) = match &self.act {
            Act::Track(name) => ("track", *name),
            Act::Page => ("page", ""),
            Act::Identify => ("identify", ""),
            Act::Alias { previous } => {
                assert_eq!(text("previous_id"), previous, "{event}");
                ("alias", "")
            }
        };
        assert_eq!((text("kind"), text("name")), (kind, name), "{event}");
        assert_eq!((text("user_id"), text("anonymous_id")), (&*self.user, &*self.device), "{event}");
        assert_eq!(event["time_ms"], self.time_ms, "{event}");
        if kind != "alias" {
            assert_eq!(event["properties"], self.properties(), "{event}");
        }
    }
}

/// An id that somebody had before: another user's, a device's, or one that nobody else has.
fn previous(random: &mut Rng, group: u8, user: &str) -> String {
    let of_user = format!("user-{group}-{}", random.u8(..USERS));
    match random.u8(..3) {
        0 if of_user != user => of_user,
        1 => format!("device-{group}-{}", random.u8(..DEVICES)),
        _ => format!("before-{group}-{}", random.u8(..DEVICES)),
    }
}

#[derive(Debug, Clone)]
struct Sent {
    draft: Draft,
    /// What the best answer promises, if one was OK.
    ok: Option<Durability>,
    /// An answer was OK, or nobody can know.
    may_be_there: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Callers {
    sent: BTreeMap<String, Sent>,
    /// What the store had when it was last looked at.
    stored: HashSet<String>,
    /// Answers that were OK to what had been sent before.
    pub(crate) oks_again: u64,
}

/// How a call went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Went {
    Answered,
    /// Some of it was not taken.
    Refused,
    /// The relay is gone.
    Unknown,
}

impl Callers {
    /// Sends a batch, parts of which may have been sent before, and notes the answers.
    pub(crate) async fn send(&mut self, client: &mut Client, batch: &[Draft]) -> Went {
        let items = batch.iter().map(Draft::item).collect();
        let response = client.track_batch(TrackBatchRequest { items }).await;
        let response = response.map(tonic::Response::into_inner);
        let mut went = Went::Answered;
        for (place, draft) in batch.iter().enumerate() {
            let sent_before = self.sent.contains_key(&draft.id);
            let new = Sent { draft: draft.clone(), ok: None, may_be_there: false };
            let sent = self.sent.entry(draft.id.clone()).or_insert(new);
            match &response {
                Ok(response) => match response.answers[place].answer.as_ref().unwrap() {
                    Answer::Accepted(accepted) => {
                        assert_eq!(accepted.event_id, draft.id);
                        assert!(accepted.durability() >= draft.level, "{accepted:?}");
                        sent.ok = sent.ok.max(Some(accepted.durability()));
                        sent.may_be_there = true;
                        self.oks_again += u64::from(sent_before);
                    }
                    Answer::Refused(refused) => panic!("{draft:?} is refused: {refused:?}"),
                    Answer::Deferred(deferred) => {
                        sent.may_be_there |= deferred.reason == "SPOOL_FAILED";
                        went = Went::Refused;
                    }
                },
                Err(status) if status.code() == Code::ResourceExhausted => went = Went::Refused,
                Err(_) => {
                    sent.may_be_there = true;
                    went = Went::Unknown;
                }
            }
        }
        went
    }

    /// Some of what was sent, whatever the answers: to be sent again.
    pub(crate) fn some(&self, random: &mut Rng, count: usize) -> Vec<Draft> {
        let one = |_| self.sent.values().nth(random.usize(..self.sent.len())).unwrap().draft.clone();
        if self.sent.is_empty() { Vec::new() } else { (0..count).map(one).collect() }
    }

    /// Takes in what other callers know.
    pub(crate) fn add(&mut self, other: Self) {
        for (id, theirs) in other.sent {
            let ours = self.sent.entry(id).or_insert_with(|| theirs.clone());
            ours.ok = ours.ok.max(theirs.ok);
            ours.may_be_there |= theirs.may_be_there;
        }
        self.oks_again += other.oks_again;
    }

    /// Distinct events that were answered OK.
    pub(crate) fn oks(&self) -> u64 {
        self.sent.values().filter(|sent| sent.ok.is_some()).count() as u64
    }

    /// Distinct events of which nobody can know.
    pub(crate) fn unknown(&self) -> u64 {
        self.sent.values().filter(|sent| sent.ok.is_none() && sent.may_be_there).count() as u64
    }

    /// Compares: what was answered OK is there once and as it was sent, what was there once
    /// stays there, and nothing is there that was not sent. Where it may be, what was only
    /// written is lost; returns how many events are.
    pub(crate) fn compare(&mut self, events: &[Value], may_lose_written: bool) -> u64 {
        let mut there = HashSet::new();
        for event in events {
            let id = event["id"].as_str().unwrap();
            let sent = self.sent.get(id).filter(|sent| sent.may_be_there);
            sent.unwrap_or_else(|| panic!("never accepted: {event}")).draft.check(event);
            assert!(there.insert(id.to_owned()), "{id} is in the store twice");
        }
        let gone: Vec<_> = self.stored.difference(&there).collect();
        assert!(gone.is_empty(), "the store had {gone:?} and has lost them");
        let missing = self.sent.iter_mut().filter(|(id, sent)| sent.ok.is_some() && !there.contains(*id));
        let (mut lost, mut written_lost) = (Vec::new(), 0);
        for (id, sent) in missing {
            if may_lose_written && sent.ok == Some(Durability::Written) {
                // Its caller may send it again.
                (sent.ok, written_lost) = (None, written_lost + 1);
            } else {
                lost.push((id, sent.ok));
            }
        }
        assert!(lost.is_empty(), "{} events are lost: {lost:?}", lost.len());
        self.stored = there;
        written_lost
    }
}

/// Every event of the store, read by the command.
pub(crate) async fn exported(setup: &Setup) -> Vec<Value> {
    let (code, out, error) = setup.run(&["store", "export"]).await;
    assert_eq!(code, 0, "{error}");
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    // Behind them stands what is known about who is who.
    lines.filter(|line| line["fact"].is_null()).collect()
}

/// The report of a question to the relay, over all times that events here have.
async fn asked(relay: &Relay, report: &str) -> Value {
    let (from, to) = ((now_ms() - 10 * DAY_MS) / 1000, (now_ms() + DAY_MS) / 1000);
    let addr = relay.http_addr.unwrap();
    let url = format!("http://{addr}/api/v1/{report}/count?from={from}&to={to}&include_bots=true");
    let answer = reqwest_client().get(url).send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// What the relay answers is what its store has: how many events, of each name, of how many
/// users, of whom aliases make one.
pub(crate) async fn check_answers(relay: &Relay, events: &[Value]) {
    let said = asked(relay, "events").await;
    assert_eq!(said["meta"]["cached"], false, "asked for the first time");
    assert_eq!(said["total"], events.len(), "events");
    let (mut want, mut got) = (BTreeMap::new(), BTreeMap::new());
    for event in events {
        let name = match event["kind"].as_str().unwrap() {
            "track" => event["name"].as_str().unwrap(),
            "page" => "pageview",
            kind => kind,
        };
        *want.entry(name).or_insert(0) += 1;
    }
    for count in said["counts"].as_array().unwrap() {
        *got.entry(count["event_name"].as_str().unwrap()).or_insert(0) += count["count"].as_u64().unwrap();
    }
    assert_eq!(got, want);
    assert_eq!(asked(relay, "users").await["unique_users"], users(events), "users");
}

/// How many users there are. An alias of an id that was a user's makes one of two.
fn users(events: &[Value]) -> usize {
    let mut root: BTreeMap<&str, &str> =
        events.iter().filter_map(|event| event["user_id"].as_str()).map(|user| (user, user)).collect();
    for event in events {
        let (Some(previous), Some(user)) = (event["previous_id"].as_str(), event["user_id"].as_str()) else {
            continue;
        };
        let Some(old) = root.get(previous).copied() else { continue };
        let new = root[user];
        root.values_mut().filter(|root| **root == old).for_each(|root| *root = new);
    }
    root.into_values().collect::<BTreeSet<_>>().len()
}

pub(crate) fn file(setup: &Setup) -> PathBuf {
    setup.data_dir().join("store.db")
}

/// Fails if something of a file is damaged. Returns its events and blocks.
pub(crate) fn check_file(file: &Path) -> (u64, u64) {
    let report = sqlite::check(file, |_| ()).unwrap();
    assert!(report.is_whole(), "{}: {report:?}", file.display());
    (report.events, report.blocks)
}

/// While no relay runs: the store says of everybody, and of all together, what the events
/// say that are in it.
pub(crate) async fn check_people(setup: &Setup, events: &[Value]) {
    let oracle = Oracle::new([14; 16]);
    let events: Vec<Event> =
        events.iter().map(|event| Event::from_json(event.to_string().as_bytes()).unwrap()).collect();
    oracle.append(&events).await.unwrap();
    let store = SqliteStore::open(Settings::new(file(setup))).unwrap();
    let of = TenantScope::tenant("");
    let ids = |name: &'static str, ids: u8| {
        (0..GROUPS).flat_map(move |group| (0..ids).map(move |id| format!("{name}-{group}-{id}")))
    };
    let users = ids("user", USERS).map(Subject::User);
    let devices = ids("device", DEVICES).chain(ids("before", DEVICES)).map(Subject::Anonymous);
    for who in users.chain(devices) {
        assert_eq!(store.identity(&of, &who).await, oracle.identity(&of, &who).await, "{who:?}");
    }
    let all = Scope { include_bots: true, ..Scope::new(of, i64::MIN..i64::MAX) };
    assert_eq!(store.summary(&all).await, oracle.summary(&all).await);
    assert_eq!(store.counts(&all, Bucket::All, "UTC").await, oracle.counts(&all, Bucket::All, "UTC").await);
    store.close().await;
}
