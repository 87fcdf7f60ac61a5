//! The seam between delivery and a vendor.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{Event, Step};

/// One vendor. Translates and sends once; never retries, counts or spawns.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    /// Lower-case name, unique in a relay: the label of its metrics and the
    /// name of its directory of dead letters.
    fn name(&self) -> &'static str;

    /// How much one request may hold.
    fn limits(&self) -> BatchLimits;

    /// Which of the vendor's endpoints takes this event, or why none does. Events of
    /// different endpoints are never put into one batch, so that one `send` is one
    /// request and has one outcome.
    fn endpoint(&self, _event: &Event) -> Result<Endpoint, NotFor> {
        Ok(Endpoint::DEFAULT)
    }

    /// Sends one batch, once, all of one [`Endpoint`] and within [`BatchLimits`].
    ///
    /// `Ok` holds one verdict per event, in order. Dropping the future abandons
    /// the request; whether it arrived is then unknown, and the caller sends
    /// the same events again with the same ids and times.
    async fn send(&self, batch: &[Event]) -> Result<Vec<Verdict>, SendError>;

    /// Tries whether the vendor can be reached and takes our key, with no event where
    /// that can be. For a person who asks: takes half a minute at most.
    async fn probe(&self) -> Vec<Step> {
        vec![Step::unknown("connection", "this provider has no way to try it without an event")]
    }
}

/// How much a vendor takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most events in one request.
    pub events_max: usize,
    /// Most bytes of one request's body, before compression.
    pub body_bytes_max: usize,
    /// Most requests under way at a time.
    pub requests_max: usize,
}

/// One of a vendor's endpoints, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(pub u8);

impl Endpoint {
    /// The only endpoint of a vendor that takes everything in one place.
    pub const DEFAULT: Self = Self(0);
}

/// Why an event is not for a provider. It is not sent there, and that is no loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NotFor {
    /// Its caller wants other providers to have it: see [`Audience`](crate::event::Audience).
    Audience,
    /// Its user does not consent to it.
    Consent,
    /// A machine sent it, and such events are not wanted.
    Bot,
    /// Its user's browser says that its user declines.
    Declined,
    /// The vendor has no such thing.
    UnsupportedKind,
    /// The vendor knows groups by their types, and none is set.
    NoGroupType,
    /// The vendor has no use for one that says nothing.
    NothingToSet,
}

impl NotFor {
    /// All reasons.
    pub const ALL: [Self; 7] = [
        Self::Audience,
        Self::Consent,
        Self::Bot,
        Self::Declined,
        Self::UnsupportedKind,
        Self::NoGroupType,
        Self::NothingToSet,
    ];

    /// The reason's name in files, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Audience => "audience",
            Self::Consent => "filtered_consent",
            Self::Bot => "bot",
            Self::Declined => "declined",
            Self::UnsupportedKind => "unsupported_kind",
            Self::NoGroupType => "no_group_type",
            Self::NothingToSet => "nothing_to_set",
        }
    }
}

/// What became of one event of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The vendor took it.
    Delivered,
    /// The vendor will never take it.
    Rejected {
        /// Why, from a closed list.
        reason: Rejection,
        /// The vendor's own words, or ours if it never left.
        detail: String,
    },
    /// Nothing is wrong with it, but another event of the batch kept it from
    /// being taken: send it again at once. An answer that holds this verdict
    /// holds at least one other verdict too, so that sending again ends.
    Resend,
    /// The vendor holds this event's user back: send it again after `after`.
    Hold {
        /// How long to wait at least.
        after: Duration,
        /// The vendor's own words.
        detail: String,
    },
}

/// Why an event can never be delivered to one vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejection {
    /// The vendor names the event or one of its fields as invalid.
    Invalid,
    /// The vendor refuses the event's ids, and without them it cannot be placed.
    UnusableId,
    /// The user's or the device's daily quota at the vendor is used up.
    QuotaExceeded,
    /// Even alone it is larger than the vendor takes.
    TooLarge,
    /// This relay has no form for such an event at the vendor: it is kept for one that has.
    UnknownKind,
}

/// Why a whole request failed, named for the caller's next move.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Not taken, or not known to be: send all of it again, later.
    #[error("unavailable: {detail}")]
    Unavailable {
        /// How long the vendor asks to wait.
        retry_after: Option<Duration>,
        /// The status, the vendor's words, or the transport's error.
        detail: String,
    },
    /// Too much at once: send it in halves. A lone event is too large for ever.
    #[error("too large: {detail}")]
    TooLarge {
        /// The status and the vendor's words.
        detail: String,
    },
    /// Nothing was taken, and the vendor does not say which event is to blame:
    /// send it in halves to find out. A lone event is the culprit.
    #[error("refused: {detail}")]
    Refused {
        /// The status and the vendor's words.
        detail: String,
    },
    /// Our account is refused, by the vendor or by something before it: the key, the
    /// plan, the network's own login. Stop sending, to all endpoints, and call a
    /// person. The events are not to blame.
    #[error("unauthorized: {detail}")]
    Unauthorized {
        /// The status and the vendor's words.
        detail: String,
    },
    /// What is at this endpoint's address takes no event at all: it is not the vendor,
    /// or it sends us elsewhere. Stop sending to this endpoint and call a person. The
    /// events are not to blame.
    #[error("misdirected: {detail}")]
    Misdirected {
        /// The status, the vendor's words, and where a redirect points to.
        detail: String,
    },
}

impl SendError {
    /// The vendor's own words, or the transport's.
    pub fn detail(&self) -> &str {
        match self {
            Self::Unavailable { detail, .. }
            | Self::TooLarge { detail }
            | Self::Refused { detail }
            | Self::Unauthorized { detail }
            | Self::Misdirected { detail } => detail,
        }
    }

    /// The same, to take something out of it.
    pub(crate) fn detail_mut(&mut self) -> &mut String {
        match self {
            Self::Unavailable { detail, .. }
            | Self::TooLarge { detail }
            | Self::Refused { detail }
            | Self::Unauthorized { detail }
            | Self::Misdirected { detail } => detail,
        }
    }
}
