//! How many events there were, by name and time.

use analytics_relay_store::{Bucket, Field, Filter, Scope, Store};
use serde::{Deserialize, Serialize};

use super::{
    parameters::{Parameters, choice},
    period::Period,
    unanswered::{Fault, Unanswered, quoted},
    written::{Csv, Format, Meta, Written, json},
};

/// Longest name of an event.
const NAME_BYTES_MAX: usize = 255;
/// Largest answer, as gRPC sends it, whose clients take 4 MiB; each caller gets a copy.
const ANSWER_BYTES_MAX: usize = 2_000_000;
/// What a row takes beside its name there.
const ROW_BYTES: usize = 28;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventCount {
    /// Of which events; empty for all, which are told apart.
    pub(crate) name: String,
    pub(crate) group_by: GroupBy,
}

/// How long the buckets are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupBy {
    Day,
    Hour,
    /// From Monday to Monday, as ISO 8601 has it.
    Week,
}

/// Events of one name in one bucket; one that has none is left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamedCount {
    pub(crate) name: String,
    /// Where the bucket starts, which may be before the period does: Unix milliseconds.
    pub(crate) start_ms: i64,
    pub(crate) events: u64,
}

impl GroupBy {
    const CHOICES: [(&str, Self); 3] = [("day", Self::Day), ("hour", Self::Hour), ("week", Self::Week)];

    pub(crate) fn named(name: &str) -> Result<Self, Unanswered> {
        choice("group_by", name, &Self::CHOICES)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Hour => "hour",
            Self::Week => "week",
        }
    }

    fn bucket(self) -> Bucket {
        match self {
            Self::Day => Bucket::Day,
            Self::Hour => Bucket::Hour,
            Self::Week => Bucket::Week,
        }
    }
}

impl EventCount {
    /// Of events of that name, or of all.
    pub(crate) fn new(name: String, group_by: GroupBy) -> Result<Self, Unanswered> {
        if name.len() > NAME_BYTES_MAX {
            let got = format!("{} of {} bytes", quoted(&name), name.len());
            return Err(Fault::of_parameter("event_name", got, format!("at most {NAME_BYTES_MAX}")).into());
        }
        Ok(Self { name, group_by })
    }

    pub(super) fn of_parameters(parameters: &mut Parameters) -> Result<Self, Unanswered> {
        let name = parameters.take("event_name").unwrap_or_default();
        Self::new(name, parameters.one_of("group_by", &GroupBy::CHOICES)?)
    }

    pub(super) async fn ask(
        &self,
        store: &dyn Store,
        scope: &Scope,
        zone: &str,
    ) -> Result<Vec<NamedCount>, Unanswered> {
        let bucket = self.group_by.bucket();
        let mut counts: Vec<NamedCount> = if self.name.is_empty() {
            let points = store.series_by_name(scope, bucket, zone).await?;
            let of = |point: analytics_relay_store::NamedPoint| NamedCount {
                name: point.name,
                start_ms: point.start_ms,
                events: point.events,
            };
            points.into_iter().map(of).collect()
        } else {
            let scope = scope.clone().with(Filter::is(Field::Name, &*self.name));
            let points = store.counts(&scope, bucket, zone).await?;
            let of = |point: analytics_relay_store::CountPoint| NamedCount {
                name: self.name.clone(),
                start_ms: point.start_ms,
                events: point.events,
            };
            points.into_iter().filter(|point| point.events > 0).map(of).collect()
        };
        let bytes: usize = counts.iter().map(|count| count.name.len() + ROW_BYTES).sum();
        if bytes > ANSWER_BYTES_MAX {
            let (rows, group_by) = (counts.len(), self.group_by.name());
            let why = format!(
                "got {rows} rows of {bytes} bytes by {group_by}, want at most {ANSWER_BYTES_MAX} bytes: \
                 name an event, or ask for a shorter period or longer buckets"
            );
            return Err(Unanswered::TooExpensive(why));
        }
        counts.sort_unstable_by(|a, b| (a.start_ms, &a.name).cmp(&(b.start_ms, &b.name)));
        Ok(counts)
    }

    pub(super) fn write(
        &self,
        counts: &[NamedCount],
        period: &Period,
        meta: &Meta,
        format: Format,
    ) -> Written {
        #[derive(Serialize)]
        struct Row<'a> {
            event_name: &'a str,
            timestamp: String,
            count: u64,
        }
        #[derive(Serialize)]
        struct Counts<'a> {
            #[serde(skip_serializing_if = "str::is_empty")]
            event_name: &'a str,
            group_by: &'static str,
            total: u64,
            counts: Vec<Row<'a>>,
        }
        if format == Format::Csv {
            let mut csv = Csv::new(&["event_name", "timestamp", "count"]);
            for count in counts {
                csv.row([&*count.name, &period.shown(count.start_ms), &count.events.to_string()]);
            }
            return csv.written("event-count", period);
        }
        let rows = counts.iter().map(|NamedCount { name, start_ms, events }| Row {
            event_name: name,
            timestamp: period.shown(*start_ms),
            count: *events,
        });
        // Elsewhere somebody may have written anything.
        let total = counts.iter().fold(0_u64, |total, count| total.saturating_add(count.events));
        let counts =
            Counts { event_name: &self.name, group_by: self.group_by.name(), total, counts: rows.collect() };
        json(&counts, meta)
    }
}
