//! Why a question has no answer, named for the caller's next move. One list for both doors:
//! each has its own words for a status, and none for a reason.

use std::time::Duration;

use analytics_relay_store::StoreError;

/// How long to wait before the question is asked again.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// It breaks rules, at least one, and always will.
    Invalid(Vec<Fault>),
    /// Nothing is kept that could be asked.
    NoStore,
    /// Its answer would be larger, or cost more, than one may: ask for less.
    TooExpensive(String),
    /// Its answer did not come in time: ask for less, or when there is less to do.
    Late,
    /// Too many others are asked.
    TooMany,
    /// The store does not answer now; why, for the log alone.
    Unavailable(String),
    /// What is stored cannot be read: a person is needed. Why, for the log alone.
    Damaged(String),
    /// The relay is stopping.
    Draining,
    /// A defect of the relay.
    Defect,
}

/// One rule that a question breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    /// The parameter, as the door names it.
    pub(crate) field: String,
    /// What came.
    pub(crate) got: String,
    /// What is allowed.
    pub(crate) want: String,
}

/// What is wrong with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// A parameter is none, or its value cannot be.
    Parameter,
    /// The period is none, or too long.
    Period,
}

impl FaultKind {
    /// Its name for programs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Parameter => "INVALID_PARAMETER",
            Self::Period => "TIME_RANGE_INVALID",
        }
    }
}

impl Fault {
    pub(crate) fn of_parameter(
        field: impl Into<String>,
        got: impl Into<String>,
        want: impl Into<String>,
    ) -> Self {
        Self { kind: FaultKind::Parameter, field: field.into(), got: got.into(), want: want.into() }
    }

    pub(crate) fn of_period(
        field: impl Into<String>,
        got: impl Into<String>,
        want: impl Into<String>,
    ) -> Self {
        Self { kind: FaultKind::Period, ..Self::of_parameter(field, got, want) }
    }

    /// In words, without the field.
    pub(crate) fn described(&self) -> String {
        format!("got {}, want {}", self.got, self.want)
    }
}

impl From<Fault> for Unanswered {
    fn from(fault: Fault) -> Self {
        Self::Invalid(vec![fault])
    }
}

impl Unanswered {
    /// Its name for programs; of several faults that of the first.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(faults) => faults.first().map_or(FaultKind::Parameter, |fault| fault.kind).name(),
            Self::NoStore => "NO_STORE",
            Self::TooExpensive(_) => "QUERY_TOO_EXPENSIVE",
            Self::Late => "QUERY_TIMED_OUT",
            Self::TooMany => "TOO_MANY_QUERIES",
            Self::Unavailable(_) => "STORE_UNAVAILABLE",
            Self::Damaged(_) => "STORE_DAMAGED",
            Self::Draining => "DRAINING",
            Self::Defect => "INTERNAL",
        }
    }

    /// What is wrong, for a person. What goes on inside of the store is no caller's.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Invalid(faults) => {
                let said = faults.iter().map(|fault| format!("{}: {}", fault.field, fault.described()));
                said.collect::<Vec<_>>().join("; ")
            }
            Self::NoStore => "the relay keeps no events: set STORE_URL, see docs/store.md".into(),
            Self::TooExpensive(why) => format!("the answer would cost too much: {why}"),
            Self::Late => "the answer did not come in time: ask for a shorter period".into(),
            Self::TooMany => "too many questions are asked at once".into(),
            Self::Unavailable(_) => "the store does not answer now".into(),
            Self::Damaged(_) => "what is stored cannot be read; the relay's log says more".into(),
            Self::Draining => "the relay is stopping".into(),
            Self::Defect => "a defect of the relay".into(),
        }
    }

    /// How long to wait before it is asked again; nothing if that would not help.
    pub(crate) fn retry_delay(&self) -> Option<Duration> {
        matches!(self, Self::TooMany | Self::Unavailable(_) | Self::Draining).then_some(RETRY_DELAY)
    }
}

impl From<StoreError> for Unanswered {
    fn from(store: StoreError) -> Self {
        match store {
            StoreError::Invalid { field, got, want } => Fault::of_parameter(field, got, want).into(),
            StoreError::TooExpensive(why) => Self::TooExpensive(why),
            StoreError::Unavailable(why) => Self::Unavailable(why),
            StoreError::Closed => Self::Unavailable("it is closed".into()),
            StoreError::Damaged(why) | StoreError::Refused(why) => Self::Damaged(why),
            StoreError::Unauthorized(why) => Self::Unavailable(why),
        }
    }
}

/// A text of a caller's, short enough to be told.
pub(crate) fn quoted(text: &str) -> String {
    const CHARS_MAX: usize = 40;
    let short: String = text.chars().take(CHARS_MAX).collect();
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{more}")
}
