//! What goes over the control socket, for both sides.

use analytics_relay_store::{By, Decision, Identity, LogEntry, Tie, sqlite::Stats};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::store::status::ServerStats;

/// The socket's name in the directory of the relay's files.
pub(crate) const SOCKET: &str = "control.sock";
/// Which file a command means: a relay whose store is another one refuses.
pub(crate) const FILE_HEADER: &str = "relay-store";
/// Most bytes of a call or an answer that are not a stream of lines.
pub(crate) const SMALL_BYTES_MAX: usize = 4 << 20;
/// Most bad lines that are told one by one.
pub(crate) const BAD_SHOWN_MAX: usize = 20;

/// The calls.
pub(crate) const STATS: &str = "/store/stats";
pub(crate) const VACUUM: &str = "/store/vacuum";
pub(crate) const TIDY: &str = "/store/tidy";
pub(crate) const IMPORT: &str = "/store/import";
pub(crate) const IDENTITY: &str = "/identity";
pub(crate) const LOG: &str = "/identity/log";
pub(crate) const SPLIT: &str = "/identity/split";
pub(crate) const JOIN: &str = "/identity/join";

/// Why something was not done.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failed {
    pub(crate) error: String,
}

/// A line of the answer to what takes long. One that ends without `Done` or `Failed` was cut.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Told<T> {
    /// It goes on; every second.
    Progress(T),
    /// It is done.
    Done(T),
    /// It is given up.
    Failed(String),
}

/// What became of the lines of an import.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Imported {
    /// Lines that were read, empty ones too.
    pub(crate) lines: u64,
    /// Events that were not there.
    pub(crate) new: u64,
    /// Events that were.
    pub(crate) duplicates: u64,
    /// Facts about who is who, whether they were there or not.
    pub(crate) facts: u64,
    /// Events and facts of users who are erased: they are left out.
    pub(crate) suppressed: u64,
    /// Events that the store cannot keep.
    pub(crate) unstorable: u64,
    /// Lines that are neither event nor fact.
    pub(crate) damaged: u64,
    /// The first of both.
    pub(crate) first_bad: Vec<BadLine>,
}

impl Imported {
    /// True if a person has to look.
    pub(crate) fn is_whole(&self) -> bool {
        self.unstorable == 0 && self.damaged == 0
    }
}

/// A line that is not in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BadLine {
    /// Its number, from 1.
    pub(crate) line: u64,
    /// Why.
    pub(crate) why: String,
}

/// What a vacuum did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vacuumed {
    /// Bytes of the file before.
    pub(crate) before_bytes: u64,
    /// And after.
    pub(crate) after_bytes: u64,
}

/// What was done as in a night.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tidied {
    /// Blocks that went into others.
    pub(crate) merged: u64,
}

/// What is in the store, and what happened since it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum StoreStats {
    /// In a file.
    Embedded(EmbeddedStats),
    /// In a PostgreSQL.
    Server(ServerStats),
}

/// The same of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EmbeddedStats {
    pub(crate) events: u64,
    pub(crate) hot_events: u64,
    pub(crate) hot_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) sites: u64,
    pub(crate) file_bytes: u64,
    pub(crate) free_bytes: u64,
    pub(crate) first_ms: Option<i64>,
    pub(crate) last_ms: Option<i64>,
    pub(crate) appended: u64,
    pub(crate) sealed: u64,
    pub(crate) seals_failed: u64,
    pub(crate) merged: u64,
    pub(crate) damaged_reads: u64,
    pub(crate) damaged_batches: u64,
    pub(crate) links_refused: u64,
    pub(crate) aliases_refused: u64,
    pub(crate) traits_refused: u64,
    #[serde(default)]
    pub(crate) sources_refused: u64,
}

impl From<Stats> for EmbeddedStats {
    fn from(stats: Stats) -> Self {
        let Stats { events, hot_events, blocks, sites, file_bytes, free_bytes, hot_bytes, .. } = stats;
        Self {
            events,
            hot_events,
            hot_bytes,
            blocks,
            sites,
            file_bytes,
            free_bytes,
            first_ms: stats.first_ms,
            last_ms: stats.last_ms,
            appended: stats.appended,
            sealed: stats.sealed,
            seals_failed: stats.seals_failed,
            merged: stats.merged,
            damaged_reads: stats.damaged_reads,
            damaged_batches: stats.damaged_batches,
            links_refused: stats.links_refused,
            aliases_refused: stats.aliases_refused,
            traits_refused: stats.traits_refused,
            sources_refused: stats.sources_refused,
        }
    }
}

/// A device and a user who are put apart, or joined again.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Pair {
    /// Whose they are; empty in a relay that has one tenant.
    #[serde(default)]
    pub(crate) tenant: String,
    pub(crate) device: String,
    pub(crate) user: String,
    /// Who wants it, and why, for the log of identities.
    #[serde(default)]
    pub(crate) operator: String,
    #[serde(default)]
    pub(crate) reason: String,
}

/// What is known about somebody.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Known {
    /// The id under which they count.
    pub(crate) root: String,
    /// All their user ids.
    pub(crate) users: Vec<String>,
    /// Their devices and browsers.
    pub(crate) devices: Vec<String>,
    /// The time of their earliest event.
    pub(crate) first_seen_ms: Option<i64>,
    /// Of the latest that is kept; else of the latest, to the hour.
    pub(crate) last_seen_ms: Option<i64>,
    /// Of each key the latest value.
    pub(crate) traits: Box<RawValue>,
    /// What says so, and what does not count as an operator put them apart.
    pub(crate) ties: Vec<KnownTie>,
}

/// What says that a device, or an id of before, is a user's.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KnownTie {
    pub(crate) from: String,
    pub(crate) user: String,
    pub(crate) by_alias: bool,
    pub(crate) first_ms: i64,
    pub(crate) last_ms: i64,
    pub(crate) is_apart: bool,
}

impl From<Tie> for KnownTie {
    fn from(tie: Tie) -> Self {
        let Tie { from, user, by_alias, first_ms, last_ms, is_apart } = tie;
        Self { from, user, by_alias, first_ms, last_ms, is_apart }
    }
}

/// One decision about who is who.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Decided {
    pub(crate) at_ms: i64,
    /// What was decided: see [`name_of`].
    pub(crate) what: String,
    pub(crate) from: String,
    pub(crate) user: String,
    /// Under whom `from` counted before.
    pub(crate) before: Option<String>,
    /// The event that says so,
    pub(crate) event_id: Option<String>,
    /// or the operator who wants it, and why.
    pub(crate) operator: Option<String>,
    pub(crate) reason: Option<String>,
}

impl From<LogEntry> for Decided {
    fn from(entry: LogEntry) -> Self {
        let LogEntry { at_ms, by, what, from, user, before } = entry;
        let (event_id, operator, reason) = match by {
            By::Event(id) => (Some(id), None, None),
            By::Operator { name, reason } => (None, Some(name), Some(reason)),
        };
        Self { at_ms, what: name_of(what).to_owned(), from, user, before, event_id, operator, reason }
    }
}

fn name_of(what: Decision) -> &'static str {
    match what {
        Decision::Linked => "linked",
        Decision::DeviceHasTooManyUsers => "device_has_too_many_users",
        Decision::UserHasTooManyDevices => "user_has_too_many_devices",
        Decision::Aliased => "aliased",
        Decision::TooManyAliases => "too_many_aliases",
        Decision::PutApart => "put_apart",
        Decision::Rejoined => "rejoined",
    }
}

impl Known {
    /// `last_ms` is the time of their latest event that is kept.
    pub(crate) fn new(identity: Identity, last_ms: Option<i64>) -> Result<Self, serde_json::Error> {
        let Identity { root, users, anonymous: devices, traits, first_seen_ms, last_seen_ms, ties } =
            identity;
        let (traits, last_seen_ms) = (RawValue::from_string(traits)?, last_ms.or(last_seen_ms));
        let ties = ties.into_iter().map(KnownTie::from).collect();
        Ok(Self { root, users, devices, first_seen_ms, last_seen_ms, traits, ties })
    }
}
