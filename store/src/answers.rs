//! What comes back from a store: integers and texts. Rates are made by who asks, as only
//! integers can be added up and compared.

use crate::Step;

/// What became of an event that was appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// It is kept.
    New,
    /// It was there.
    Duplicate,
    /// It cannot be kept, and why: no later attempt changes that.
    Unstorable(String),
}

/// A number of different ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// How many.
    pub n: u64,
    /// It is estimated, with an error of 0.8 % one time in three: there were too many to
    /// remember each.
    pub estimated: bool,
}

impl Count {
    /// A number that was counted.
    pub fn exact(n: usize) -> Self {
        Self { n: n as u64, estimated: false }
    }
}

/// The figures of a range.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events of any kind.
    pub events: u64,
    /// Pages and screens that were seen.
    pub views: u64,
    /// Different visitors with an event in the range.
    pub visitors: Count,
    /// Sessions that start in the range.
    pub sessions: SessionSums,
    /// Blocks that could not be read, whose events are in no figure.
    pub damaged_blocks: u64,
}

/// Sums over sessions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionSums {
    /// How many.
    pub sessions: u64,
    /// Those with a view: what bounces are a part of.
    pub with_views: u64,
    /// Those with one view and nothing else that anybody did.
    pub bounces: u64,
    /// From first to last event, summed up over all.
    pub duration_ms: u64,
    /// Views of these sessions, whenever they were.
    pub views: u64,
}

impl SessionSums {
    /// Both together.
    pub fn add(&mut self, other: &Self) {
        self.sessions += other.sessions;
        self.with_views += other.with_views;
        self.bounces += other.bounces;
        self.duration_ms += other.duration_ms;
        self.views += other.views;
    }
}

/// How wide the buckets of a series are, in a time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bucket {
    /// All in one.
    All,
    /// Sixty seconds.
    Minute,
    /// From a local full hour to the next.
    Hour,
    /// From a local midnight to the next: 23 to 25 hours.
    Day,
    /// From Monday to Monday.
    Week,
    /// From a first to the next.
    Month,
}

/// One bucket of a series. Buckets without events are there too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Where the bucket starts, which may be before the range does: Unix milliseconds.
    pub start_ms: i64,
    /// Its figures.
    pub summary: Summary,
}

/// Events and visitors of one bucket. Buckets without events are there too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountPoint {
    /// Where the bucket starts, which may be before the range does: Unix milliseconds.
    pub start_ms: i64,
    /// Events of any kind.
    pub events: u64,
    /// Different visitors of them.
    pub visitors: Count,
}

/// Events of one name in one bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPoint {
    /// Where the bucket starts: Unix milliseconds.
    pub start_ms: i64,
    /// The event's name.
    pub name: String,
    /// How many.
    pub events: u64,
    /// Of how many different visitors.
    pub visitors: Count,
}

/// Values of a field, most frequent first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Breakdown<Row> {
    /// By descending visitors, then events, then value.
    pub rows: Vec<Row>,
    /// How many values there are, beyond those listed.
    pub total: u64,
    /// There were too many values: this is what those that are no row of their own have.
    pub others: Option<Row>,
    /// Blocks that could not be read.
    pub damaged_blocks: u64,
}

/// A value, and the events that have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ValueRow {
    /// The value; `None` is the lack of one.
    pub value: Option<String>,
    /// Events.
    pub events: u64,
    /// Of those, views.
    pub views: u64,
    /// Different visitors of them.
    pub visitors: Count,
    /// The time of the last one: Unix milliseconds.
    pub last_ms: i64,
}

/// The name of a property, and the events that have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PropertyRow {
    /// The name; none for all those that are no row of their own.
    pub name: Option<String>,
    /// Events in which it has a value, which `null` is not.
    pub events: u64,
    /// The time of the last one: Unix milliseconds.
    pub last_ms: i64,
}

/// Up to when a store knows what happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AsOf {
    /// Events that were acknowledged and are kept.
    pub events: u64,
    /// The time of the latest one: Unix milliseconds.
    pub last_ms: Option<i64>,
}

/// A value, and the sessions whose first event has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionRow {
    /// The value; `None` is the lack of one.
    pub value: Option<String>,
    /// The sessions.
    pub sums: SessionSums,
    /// Different visitors of them.
    pub visitors: Count,
}

/// A page.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageRow {
    /// Its path; `None` for views of none.
    pub page: Option<String>,
    /// Views in the range.
    pub views: u64,
    /// Different visitors of them.
    pub visitors: Count,
    /// The sessions that began with it.
    pub entered: SessionSums,
    /// How many sessions ended with it.
    pub exits: u64,
    /// Seconds that it was looked at, as milliseconds, summed up over where that is known.
    pub time_ms: u64,
    /// In how many sessions that is known.
    pub timed: u64,
}

/// What must lie between the steps of a funnel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Order {
    /// In their order, anything between.
    #[default]
    Ordered,
    /// In their order, nothing between.
    Strict,
    /// In any order.
    Unordered,
}

/// Who goes through a funnel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Anybody, under all their ids.
    #[default]
    Visitor,
    /// Known users.
    User,
    /// One of the client's sessions.
    Session,
}

/// A funnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Funnel {
    /// 1 to 10.
    pub steps: Vec<Step>,
    /// All steps are within so many milliseconds of the first.
    pub window_ms: i64,
    /// What may lie between them.
    pub order: Order,
    /// Who goes through it.
    pub unit: Unit,
}

/// How far they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FunnelAnswer {
    /// A row for each step.
    pub steps: Vec<FunnelStep>,
    /// Blocks that could not be read.
    pub damaged_blocks: u64,
}

/// One step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FunnelStep {
    /// How many reached it.
    pub reached: u64,
    /// From the step before, summed up over them; 0 for the first.
    pub sum_ms: u64,
    /// From the step before, the middle one; of two the lower.
    pub median_ms: u64,
}

/// What goes on now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Realtime {
    /// Different visitors of the last 5 minutes.
    pub current: u64,
    /// Different visitors of the last 30 minutes.
    pub active: u64,
    /// Views of the last 5 minutes.
    pub views_5m: u64,
    /// Views of the last hour.
    pub views_1h: u64,
    /// Views of each of the last 30 minutes, the oldest first.
    pub minutes: Vec<u64>,
    /// Pages of the last 5 minutes.
    pub pages: Vec<ValueRow>,
}

/// What is known about somebody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The id under which they count.
    pub root: String,
    /// All user ids, sorted.
    pub users: Vec<String>,
    /// The devices and browsers that are theirs, sorted.
    pub anonymous: Vec<String>,
    /// A JSON object; of each key the latest value.
    pub traits: String,
    /// The time of the earliest event under one of the user ids; of a device that is
    /// nobody's, of its events that are kept: Unix milliseconds.
    pub first_seen_ms: Option<i64>,
    /// The latest, to the hour; of a device that is nobody's exactly: Unix milliseconds.
    pub last_seen_ms: Option<i64>,
    /// What says so of these ids, also what does not count as an operator has put them
    /// apart, and of these devices also those with other users. Sorted.
    pub ties: Vec<Tie>,
}

impl Identity {
    /// Of a device that is nobody's.
    pub(crate) fn of_device(device: &str) -> Self {
        Self {
            root: device.to_owned(),
            anonymous: vec![device.to_owned()],
            traits: "{}".to_owned(),
            ..Self::default()
        }
    }
}

/// What says that a device or an id of before is a user's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tie {
    /// A device or browser; or, by an alias, another id.
    pub from: String,
    /// The user.
    pub user: String,
    /// An alias said so; else events with both ids.
    pub by_alias: bool,
    /// The time of the first event that says so: Unix milliseconds.
    pub first_ms: i64,
    /// Of the last, to the hour; of an alias of the first.
    pub last_ms: i64,
    /// An operator has put them apart.
    pub is_apart: bool,
}

/// One decision about who is who.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// When it was made, by the relay's clock: Unix milliseconds.
    pub at_ms: i64,
    /// Why.
    pub by: By,
    /// What.
    pub what: Decision,
    /// The device, or the id of before.
    pub from: String,
    /// The user.
    pub user: String,
    /// Under whom `from` counted before, if that was another id.
    pub before: Option<String>,
}

/// What was decided about two ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Decision {
    /// A device was used by a user for the first time.
    Linked,
    /// Not noted: the device has too many users who used it earlier.
    DeviceHasTooManyUsers,
    /// Not noted: the user has too many devices.
    UserHasTooManyDevices,
    /// An alias said for the first time that they are one.
    Aliased,
    /// Not noted: too many ids would be one.
    TooManyAliases,
    /// An operator put them apart.
    PutApart,
    /// An operator took that back.
    Rejoined,
}

impl Decision {
    /// All, in the order of their numbers, which stand in files.
    pub const ALL: [Self; 7] = [
        Self::Linked,
        Self::DeviceHasTooManyUsers,
        Self::UserHasTooManyDevices,
        Self::Aliased,
        Self::TooManyAliases,
        Self::PutApart,
        Self::Rejoined,
    ];
}

/// Why something was decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum By {
    /// An event says it; its id.
    Event(String),
    /// An operator wants it.
    Operator {
        /// Who.
        name: String,
        /// Why; may be empty.
        reason: String,
    },
}

/// An operator who decides something.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Operator {
    /// Who.
    pub name: String,
    /// Why; may be empty.
    pub reason: String,
    /// When: Unix milliseconds.
    pub at_ms: i64,
}

/// What a deletion did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deleted {
    /// Events that are gone.
    pub events: u64,
    /// Blocks that were written anew without them, or are gone.
    pub blocks: u64,
    /// Ids, links and traits of somebody that are gone.
    pub facts: u64,
    /// Blocks that are damaged: what was to go and is in them is still there.
    pub damaged_blocks: u64,
    /// Batches that are no blocks yet, likewise.
    pub damaged_batches: u64,
    /// What is gone is still in the log of the file, as somebody was reading: the log is cut
    /// behind a later write, or when the store is closed.
    pub is_in_log: bool,
}

/// Visitors who are new in a range, and those who were there before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NewVisitors {
    /// Whose earliest event that is kept is in the range.
    pub new: Count,
    /// The others.
    pub returning: Count,
}
