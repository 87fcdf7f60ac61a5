//! The closed lists: why an event is refused, and how one that was taken can end.
//! Replies, files, logs, metrics and the command line all name what is here.

use std::{borrow::Cow, fmt};

use analytics_relay_providers::{NotFor, Rejection, pii::RED_KEYS};
use serde::{Deserialize, Serialize};

/// The provider that keeps what vendors do not get.
pub(crate) const STORE: &str = "store";

/// Why an event is refused: the closed list of replies, logs and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum RefusalReason {
    EventNameEmpty,
    EventNameTooLong,
    UserIdMissing,
    UserIdForbidden,
    UserSuppressed,
    GroupIdMissing,
    PreviousIdMissing,
    AliasOfItself,
    IdTooLong,
    EventIdInvalid,
    TimeOutOfRange,
    PropertiesTooLarge,
    PropertiesTooManyKeys,
    PropertiesTooDeep,
    PropertyKeyEmpty,
    PropertyNumberNotFinite,
    PropertiesMalformed,
    PropertiesTwice,
    CategoryTooLong,
    ContextInvalid,
    InputRefused,
    ItemMissing,
    KindUnknown,
    NoUser,
    FieldNotText,
    TimeMalformed,
    IntegrationsMalformed,
    WebsiteIdMissing,
    PageInvalid,
    SchemaNewer,
    SchemaInvalid,
    EventTooLarge,
    BatchTooLarge,
    MessageMalformed,
    DurabilityUnavailable,
    MetadataTooLarge,
    ReceivingTooMuch,
    NoConnectionLeft,
    QueueFull,
    SpoolFull,
    SpoolFailed,
    Draining,
}

impl RefusalReason {
    pub(crate) const ALL: [Self; 42] = [
        Self::EventNameEmpty,
        Self::EventNameTooLong,
        Self::UserIdMissing,
        Self::UserIdForbidden,
        Self::UserSuppressed,
        Self::GroupIdMissing,
        Self::PreviousIdMissing,
        Self::AliasOfItself,
        Self::IdTooLong,
        Self::EventIdInvalid,
        Self::TimeOutOfRange,
        Self::PropertiesTooLarge,
        Self::PropertiesTooManyKeys,
        Self::PropertiesTooDeep,
        Self::PropertyKeyEmpty,
        Self::PropertyNumberNotFinite,
        Self::PropertiesMalformed,
        Self::PropertiesTwice,
        Self::CategoryTooLong,
        Self::ContextInvalid,
        Self::InputRefused,
        Self::ItemMissing,
        Self::KindUnknown,
        Self::NoUser,
        Self::FieldNotText,
        Self::TimeMalformed,
        Self::IntegrationsMalformed,
        Self::WebsiteIdMissing,
        Self::PageInvalid,
        Self::SchemaNewer,
        Self::SchemaInvalid,
        Self::EventTooLarge,
        Self::BatchTooLarge,
        Self::MessageMalformed,
        Self::DurabilityUnavailable,
        Self::MetadataTooLarge,
        Self::ReceivingTooMuch,
        Self::NoConnectionLeft,
        Self::QueueFull,
        Self::SpoolFull,
        Self::SpoolFailed,
        Self::Draining,
    ];

    /// The reason's name in replies, logs and metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::EventNameEmpty => "EVENT_NAME_EMPTY",
            Self::EventNameTooLong => "EVENT_NAME_TOO_LONG",
            Self::UserIdMissing => "USER_ID_MISSING",
            Self::UserIdForbidden => "USER_ID_FORBIDDEN",
            Self::UserSuppressed => "USER_SUPPRESSED",
            Self::GroupIdMissing => "GROUP_ID_MISSING",
            Self::PreviousIdMissing => "PREVIOUS_ID_MISSING",
            Self::AliasOfItself => "ALIAS_OF_ITSELF",
            Self::IdTooLong => "ID_TOO_LONG",
            Self::EventIdInvalid => "EVENT_ID_INVALID",
            Self::TimeOutOfRange => "TIME_OUT_OF_RANGE",
            Self::PropertiesTooLarge => "PROPERTIES_TOO_LARGE",
            Self::PropertiesTooManyKeys => "PROPERTIES_TOO_MANY_KEYS",
            Self::PropertiesTooDeep => "PROPERTIES_TOO_DEEP",
            Self::PropertyKeyEmpty => "PROPERTY_KEY_EMPTY",
            Self::PropertyNumberNotFinite => "PROPERTY_NUMBER_NOT_FINITE",
            Self::PropertiesMalformed => "PROPERTIES_MALFORMED",
            Self::PropertiesTwice => "PROPERTIES_TWICE",
            Self::CategoryTooLong => "CATEGORY_TOO_LONG",
            Self::ContextInvalid => "CONTEXT_INVALID",
            Self::InputRefused => "INPUT_REFUSED",
            Self::ItemMissing => "ITEM_MISSING",
            Self::KindUnknown => "TYPE_UNKNOWN",
            Self::NoUser => "NO_USER_OR_ANONYMOUS_ID",
            Self::FieldNotText => "FIELD_NOT_TEXT",
            Self::TimeMalformed => "TIME_MALFORMED",
            Self::IntegrationsMalformed => "INTEGRATIONS_MALFORMED",
            Self::WebsiteIdMissing => "WEBSITE_ID_MISSING",
            Self::PageInvalid => "PAGE_INVALID",
            Self::SchemaNewer => "SCHEMA_VERSION_UNSUPPORTED",
            Self::SchemaInvalid => "SCHEMA_VERSION_INVALID",
            Self::EventTooLarge => "EVENT_TOO_LARGE",
            Self::BatchTooLarge => "BATCH_TOO_LARGE",
            Self::MessageMalformed => "MESSAGE_MALFORMED",
            Self::DurabilityUnavailable => "DURABILITY_UNAVAILABLE",
            Self::MetadataTooLarge => "METADATA_TOO_LARGE",
            Self::ReceivingTooMuch => "RECEIVING_TOO_MUCH",
            Self::NoConnectionLeft => "NO_CONNECTION_LEFT",
            Self::QueueFull => "QUEUE_FULL",
            Self::SpoolFull => "SPOOL_FULL",
            Self::SpoolFailed => "SPOOL_FAILED",
            Self::Draining => "DRAINING",
        }
    }
}

/// What was left out of an event, or mended, because it must not cost the event: the
/// closed list of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mended {
    /// The address was found in what came with it: a list, a port, brackets.
    IpFound,
    /// No address was found in it.
    IpLeftOut,
    /// The user agent was too long.
    UserAgentCut,
    /// The user id means nobody.
    UserIdLeftOut,
    /// The anonymous id means nobody.
    AnonymousIdLeftOut,
    /// A name occurred twice in the properties.
    PropertyTwice,
}

impl Mended {
    pub(crate) const ALL: [Self; 6] = [
        Self::IpFound,
        Self::IpLeftOut,
        Self::UserAgentCut,
        Self::UserIdLeftOut,
        Self::AnonymousIdLeftOut,
        Self::PropertyTwice,
    ];

    /// The name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::IpFound => "ip_found",
            Self::IpLeftOut => "ip_left_out",
            Self::UserAgentCut => "user_agent_cut",
            Self::UserIdLeftOut => "user_id_left_out",
            Self::AnonymousIdLeftOut => "anonymous_id_left_out",
            Self::PropertyTwice => "property_twice",
        }
    }
}

/// What is found out about events, in the order in which an event meets it: the closed list
/// of a setting, a metric and a field of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Browser, system, device.
    Agent,
    /// Whether a machine sends.
    Bot,
    /// Where its address is.
    Geo,
    /// On which page, of which campaign.
    Page,
    /// Who led there.
    Source,
    /// An id for who names none.
    Visitor,
    /// Which visit.
    Session,
}

impl Step {
    pub(crate) const ALL: [Self; 7] =
        [Self::Agent, Self::Bot, Self::Geo, Self::Page, Self::Source, Self::Visitor, Self::Session];

    /// The name in settings, metrics and events.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Bot => "bot",
            Self::Geo => "geo",
            Self::Page => "page",
            Self::Source => "source",
            Self::Visitor => "visitor",
            Self::Session => "session",
        }
    }
}

/// What the privacy rules did about a value before the log: the closed list of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Redaction {
    /// It went, with its name.
    Dropped,
    /// Of it a hash is left.
    Hashed,
    /// It is less exact.
    Cut,
    /// Nobody reads it without a key: in the store alone, never before the log.
    Sealed,
}

impl Redaction {
    /// Those before the log.
    pub(crate) const ALL: [Self; 3] = [Self::Dropped, Self::Hashed, Self::Cut];

    /// The name in metrics and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Hashed => "hashed",
            Self::Cut => "cut",
            Self::Sealed => "sealed",
        }
    }
}

/// What an event looks like that was taken all the same: the closed list of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Suspicion {
    /// Like what breaks out of a query that is put together from texts.
    Sql,
    /// Like what a page would run that shows it without escaping it.
    Html,
    /// Like a file that is none of a caller's.
    Path,
}

impl Suspicion {
    pub(crate) const ALL: [Self; 3] = [Self::Sql, Self::Html, Self::Path];

    /// The name in metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sql => "sql",
            Self::Html => "html",
            Self::Path => "path",
        }
    }
}

/// The names under which it is counted that an event holds what nobody should send: the
/// last is of those that an operator adds.
pub(crate) const PII_FIELDS: [&str; RED_KEYS.len() + 1] = {
    let mut names = ["added"; RED_KEYS.len() + 1];
    let mut place = 0;
    while place < RED_KEYS.len() {
        names[place] = RED_KEYS[place];
        place += 1;
    }
    names
};

/// How one event ended at one provider. Every accepted event ends once at each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The provider's success, read in full, naming no failure for the event.
    Delivered,
    /// On disk with its reason, to be looked at and replayed.
    DeadLettered(DeadLetterReason),
    /// On disk, in a spill file or in the spool, to be sent at the next start.
    Spilled,
    /// Lost, and counted.
    Dropped(DropReason),
    /// Not sent there, because it is not for that provider. No loss.
    NotFor(NotFor),
}

/// Why an event became a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadLetterReason {
    /// The provider names it as invalid, or refused it alone without a word.
    Invalid,
    /// The provider takes none of its ids.
    UnusableId,
    /// The daily quota of its user or device at the provider is used up.
    QuotaExceeded,
    /// Even alone it is larger than the provider takes.
    TooLarge,
    /// This relay has no form for such an event at the provider; a newer one may.
    UnknownKind,
    /// Every attempt failed.
    RetriesExhausted,
    /// The provider's lane had no room left for it.
    LaneFull,
    /// A newer identify of the same user arrived first.
    Superseded,
    /// The provider did not take it before the retention of the spool ended.
    Expired,
    /// The spool had used up its bytes, and it was the provider's oldest.
    SpoolFull,
}

/// Why an event was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// It should have become a dead letter, but they had used up their bytes.
    DeadLettersFull,
    /// It should have become a dead letter, but writing failed.
    DeadLetterFailed,
    /// It should have become a dead letter, but so many wait for the disk already
    /// that there is no room for it.
    DeadLettersStalled,
    /// It should have been spilled, but writing failed.
    SpillFailed,
    /// It was answered QUEUED, and neither the spool nor the queue took it.
    SpoolFailed,
    /// Its bytes in the spool are damaged; a copy is in quarantine.
    SpoolDamaged,
    /// Somebody has changed what was sealed: its bytes on disk are whole, and not those
    /// that were written. A copy is kept aside.
    SealBroken,
    /// The key that it is sealed with was not given, and the operator wants to go on
    /// without; or both of its file's key blocks are damaged. The file is set aside.
    Undecryptable,
    /// Its provider is not named, and the spool had no room left for events of
    /// those that are.
    SpoolFull,
    /// Its provider is not named, and the operator had it forgotten.
    Forgotten,
    /// Its user is erased.
    Erased,
}

impl DeadLetterReason {
    /// All reasons.
    pub const ALL: [Self; 10] = [
        Self::Invalid,
        Self::UnusableId,
        Self::QuotaExceeded,
        Self::TooLarge,
        Self::UnknownKind,
        Self::RetriesExhausted,
        Self::LaneFull,
        Self::Superseded,
        Self::Expired,
        Self::SpoolFull,
    ];

    /// The reason's name in files, logs, metrics and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::UnusableId => "unusable_id",
            Self::QuotaExceeded => "quota_exceeded",
            Self::TooLarge => "too_large",
            Self::UnknownKind => "unknown_kind",
            Self::RetriesExhausted => "retries_exhausted",
            Self::LaneFull => "lane_full",
            Self::Superseded => "superseded",
            Self::Expired => "expired",
            Self::SpoolFull => "spool_full",
        }
    }

    /// The reason of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

impl From<Rejection> for DeadLetterReason {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Invalid => Self::Invalid,
            Rejection::UnusableId => Self::UnusableId,
            Rejection::QuotaExceeded => Self::QuotaExceeded,
            Rejection::TooLarge => Self::TooLarge,
            Rejection::UnknownKind => Self::UnknownKind,
        }
    }
}

impl fmt::Display for DeadLetterReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl DropReason {
    const ALL: [Self; 11] = [
        Self::DeadLettersFull,
        Self::DeadLetterFailed,
        Self::DeadLettersStalled,
        Self::SpillFailed,
        Self::SpoolFailed,
        Self::SpoolDamaged,
        Self::SealBroken,
        Self::Undecryptable,
        Self::SpoolFull,
        Self::Forgotten,
        Self::Erased,
    ];

    /// The reason's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::DeadLettersFull => "dead_letters_full",
            Self::DeadLetterFailed => "dead_letter_failed",
            Self::DeadLettersStalled => "dead_letters_stalled",
            Self::SpillFailed => "spill_failed",
            Self::SpoolFailed => "spool_failed",
            Self::SpoolDamaged => "spool_damaged",
            Self::SealBroken => "seal_broken",
            Self::Undecryptable => "undecryptable",
            Self::SpoolFull => "spool_full",
            Self::Forgotten => "forgotten",
            Self::Erased => "erased",
        }
    }
}

impl Outcome {
    /// Every way to end.
    pub fn all() -> impl Iterator<Item = Self> {
        [Self::Delivered, Self::Spilled]
            .into_iter()
            .chain(DeadLetterReason::ALL.into_iter().map(Self::DeadLettered))
            .chain(DropReason::ALL.into_iter().map(Self::Dropped))
            .chain(NotFor::ALL.into_iter().map(Self::NotFor))
    }

    /// The outcome's name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::DeadLettered(_) => "dead_lettered",
            Self::Spilled => "spilled",
            Self::Dropped(_) => "dropped",
            Self::NotFor(_) => "not_for",
        }
    }

    /// Name and reason in one, for files.
    pub fn key(self) -> Cow<'static, str> {
        match self.reason() {
            "" => self.name().into(),
            reason => format!("{}/{reason}", self.name()).into(),
        }
    }

    /// The reason's name; empty for an outcome that needs none.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Delivered | Self::Spilled => "",
            Self::DeadLettered(reason) => reason.name(),
            Self::Dropped(reason) => reason.name(),
            Self::NotFor(reason) => reason.name(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_labels() {
        let labels: std::collections::HashSet<_> =
            Outcome::all().map(|outcome| (outcome.name(), outcome.reason())).collect();
        assert_eq!(labels.len(), Outcome::all().count());
        for reason in DeadLetterReason::ALL {
            assert_eq!(DeadLetterReason::from_name(reason.name()), Some(reason));
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.name());
        }
    }
}
