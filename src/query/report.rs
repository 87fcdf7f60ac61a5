//! What can be asked. A report is a file: what it asks, of which parameters, how it is answered
//! by the store, and how the answer is written. It has a line in each list here.

use std::fmt::Write;

use analytics_relay_store::{Scope, Sources, Store, TenantScope};
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::{
    event_count::{EventCount, NamedCount},
    parameters::Parameters,
    period::Period,
    unanswered::Unanswered,
    user_count::{UserCount, Users},
    written::{Format, Meta, Written},
};

/// A report, with what is asked of it beside the period.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// Events by name and time.
    EventCount(EventCount),
    /// Users of a period.
    UserCount(UserCount),
}

/// The reports, for paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReportName {
    EventCount,
    UserCount,
}

/// What the store says, as it is kept for who asks the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// By time, then name.
    EventCount(Vec<NamedCount>),
    UserCount(Users),
}

/// A report of a tenant over a period.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    /// Whose events; made where the caller was authenticated, and nowhere else.
    pub(crate) of: TenantScope,
    pub(crate) period: Period,
    /// Machines too.
    pub(crate) include_bots: bool,
    pub(crate) report: Report,
}

impl ReportName {
    /// Its label in metrics, and its name in keys.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::EventCount => "event_count",
            Self::UserCount => "user_count",
        }
    }

    /// The names that a query of it may have.
    fn parameters(self) -> &'static str {
        match self {
            Self::EventCount => "event_name, group_by, from, to, days, timezone, include_bots, format",
            Self::UserCount => "from, to, days, timezone, include_bots, format",
        }
    }
}

impl Question {
    /// What a query asks, and how the answer is to be written.
    pub(crate) fn of_query(
        of: TenantScope,
        name: ReportName,
        query: &str,
        now_ms: i64,
    ) -> Result<(Self, Format), Unanswered> {
        let mut parameters = Parameters::of(query)?;
        let report = match name {
            ReportName::EventCount => Report::EventCount(EventCount::of_parameters(&mut parameters)?),
            ReportName::UserCount => Report::UserCount(UserCount),
        };
        let period = Period::of_parameters(&mut parameters, now_ms)?;
        let include_bots = parameters.flag("include_bots")?;
        let format = parameters.one_of("format", &[("json", Format::Json), ("csv", Format::Csv)])?;
        parameters.end(name.parameters())?;
        Ok((Self { of, period, include_bots, report }, format))
    }

    pub(crate) fn name(&self) -> ReportName {
        match self.report {
            Report::EventCount(_) => ReportName::EventCount,
            Report::UserCount(_) => ReportName::UserCount,
        }
    }

    /// Asks the store.
    pub(super) async fn ask(&self, store: &dyn Store) -> Result<Answer, Unanswered> {
        let scope = Scope::new(self.of.clone(), self.period.range_ms.clone());
        let scope = Scope { include_bots: self.include_bots, ..scope };
        match &self.report {
            Report::EventCount(report) => {
                report.ask(store, &scope, self.period.zone()).await.map(Answer::EventCount)
            }
            Report::UserCount(report) => report.ask(store, &scope).await.map(Answer::UserCount),
        }
    }

    /// True if that is an answer to this: what comes from elsewhere may be anything.
    #[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "only Redis has use for it"))]
    pub(super) fn fits(&self, answer: &Answer) -> bool {
        matches!(
            (&self.report, answer),
            (Report::EventCount(_), Answer::EventCount(_)) | (Report::UserCount(_), Answer::UserCount(_))
        )
    }

    /// The key under which its answer is kept. Two questions have the same only if they are
    /// the same: the tenant stands in it, and what callers write is hashed, as it may hold
    /// what is between the parts.
    pub(crate) fn key(&self) -> String {
        let tenant = if self.of.tenant.is_empty() { "default".into() } else { hashed([&*self.of.tenant]) };
        let mut key = format!("analytics:{tenant}:{}:", self.name().label());
        match &self.of.sources {
            Sources::All => key.push_str("all"),
            Sources::Only(sources) => key.push_str(&hashed(sources.iter().map(String::as_str))),
        }
        if let Report::EventCount(report) = &self.report {
            let name = if report.name.is_empty() { "all".into() } else { hashed([&*report.name]) };
            let _ = write!(key, ":{name}:{}", report.group_by.name());
        }
        let (range_ms, zone) = (&self.period.range_ms, self.period.zone());
        let bots = if self.include_bots { "bots" } else { "people" };
        let _ = write!(key, ":{}:{}:{zone}:{bots}", range_ms.start, range_ms.end);
        key
    }

    /// The key of what tells that answers of this tenant are not true any more.
    #[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "only Redis has use for it"))]
    pub(super) fn generation_key(&self) -> String {
        generation_key(&self.of.tenant)
    }

    /// What an answer says of itself, for which the store was asked at a time.
    pub(crate) fn meta(&self, as_of_ms: i64, cached: bool) -> Meta {
        Meta::of(&self.period, self.include_bots, as_of_ms, cached)
    }

    /// The answer in bytes.
    pub(crate) fn write(&self, answer: &Answer, meta: &Meta, format: Format) -> Written {
        match (&self.report, answer) {
            (Report::EventCount(report), Answer::EventCount(counts)) => {
                report.write(counts, &self.period, meta, format)
            }
            (Report::UserCount(report), Answer::UserCount(users)) => {
                report.write(users, &self.period, meta, format)
            }
            _ => unreachable!("an answer fits its question"),
        }
    }
}

impl Answer {
    /// About how much memory it takes.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::EventCount(counts) => {
                counts.iter().map(|count| count.name.len() + size_of::<NamedCount>()).sum()
            }
            Self::UserCount(_) => size_of::<Users>(),
        }
    }
}

/// See [`Question::generation_key`].
#[cfg_attr(not(feature = "redis"), allow(dead_code, reason = "only Redis has use for it"))]
pub(super) fn generation_key(tenant: &str) -> String {
    let tenant = if tenant.is_empty() { "default".into() } else { hashed([tenant]) };
    format!("analytics:{tenant}:generation")
}

/// Texts of callers as a part of a key: 128 bits, in hexadecimal digits.
fn hashed<'t>(texts: impl IntoIterator<Item = &'t str>) -> String {
    let mut bytes = Vec::new();
    for text in texts {
        bytes.extend_from_slice(&(text.len() as u64).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    let hash = digest(&SHA256, &bytes);
    hash.as_ref()[..16].iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::HashSet;

    use super::*;

    pub(crate) fn question(query: &str) -> Question {
        let of = TenantScope::tenant("");
        Question::of_query(of, ReportName::EventCount, query, 1_795_688_100_000).unwrap().0
    }

    #[test]
    fn no_two_questions_share_a_key() {
        let queries = [
            "",
            "event_name=a",
            "event_name=all",
            "event_name=a:b",
            "event_name=a&include_bots=true",
            "event_name=a&timezone=Europe/Berlin",
            "event_name=a&group_by=hour",
            "event_name=a&group_by=week",
            "event_name=a&days=2",
            "event_name=a&from=2026-11-20",
        ];
        let mut keys: HashSet<String> = queries.iter().map(|query| question(query).key()).collect();
        let users = Question::of_query(TenantScope::tenant(""), ReportName::UserCount, "", 1_795_688_100_000);
        keys.insert(users.unwrap().0.key());
        let of = [
            TenantScope::tenant("default"),
            TenantScope::tenant("a:b"),
            TenantScope::source("", "all"),
            TenantScope::source("", ""),
            TenantScope { tenant: String::new(), sources: Sources::Only(vec!["a".into(), "b".into()]) },
            TenantScope { tenant: String::new(), sources: Sources::Only(vec!["ab".into(), String::new()]) },
        ];
        let count = keys.len() + of.len();
        keys.extend(of.into_iter().map(|of| Question { of, ..question("") }.key()));
        assert_eq!((keys.len(), count), (queries.len() + 7, queries.len() + 7));
    }

    #[test]
    fn a_key_tells_no_name_that_a_caller_chose() {
        let key = Question { of: TenantScope::tenant("acme"), ..question("event_name=canary") }.key();
        assert!(!key.contains("canary") && !key.contains("acme"), "{key}");
        let key = question("event_name=canary&from=2026-11-01&to=2026-11-01").key();
        let want = format!(
            "analytics:default:event_count:all:{}:day:1793491200000:1793577600000:UTC:people",
            hashed(["canary"])
        );
        assert_eq!(key, want);
    }
}
