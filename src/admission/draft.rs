//! An event as a front door hands it over.

use std::borrow::Cow;

use analytics_relay_providers::{
    Properties,
    event::{Audience, JsonObject},
    properties::PropertyError,
};

use crate::{enrich::edge::Edge, queue::Durability};

/// An event as it came, checked by nobody yet. Empty texts mean "not given".
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    pub(crate) kind: DraftKind<'a>,
    pub(crate) event_id: Cow<'a, str>,
    pub(crate) user_id: Cow<'a, str>,
    pub(crate) anonymous_id: Cow<'a, str>,
    /// The front door's field and its time in Unix milliseconds, if given.
    pub(crate) time_ms: Option<(&'static str, i64)>,
    pub(crate) ip: Cow<'a, str>,
    pub(crate) user_agent: Cow<'a, str>,
    /// Encoded by the front door, which alone knows their form on the wire.
    pub(crate) properties: Result<Properties<'a>, BadProperties>,
    /// What most drafts do not have, and so in a place of its own.
    pub(crate) more: Option<Box<More<'a>>>,
    /// How durable it has to be before the answer, if it says; a number that
    /// means nothing.
    pub(crate) durability: Result<Option<Durability>, i32>,
}

/// What most drafts do not have.
#[derive(Debug)]
pub(crate) struct More<'a> {
    /// The session that it belongs to.
    pub(crate) session_id: Cow<'a, str>,
    /// The providers that get it.
    pub(crate) audience: Audience<'a>,
    /// What else the caller says about where it happened.
    pub(crate) context: Option<Result<JsonObject<'a>, BadProperties>>,
    pub(crate) edge: Edge<'a>,
}

impl<'a> More<'a> {
    /// Of a draft that says no more than where it happened.
    pub(crate) fn of_context(context: Result<JsonObject<'a>, BadProperties>) -> Box<Self> {
        Box::new(Self {
            session_id: "".into(),
            audience: Audience::All,
            context: Some(context),
            edge: Edge::default(),
        })
    }
}

/// Why a draft has no properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BadProperties {
    /// Those in the front door's `field` break a rule.
    Faulty { field: &'static str, error: PropertyError },
    /// Two of the front door's fields hold some.
    Twice { field: &'static str, other: &'static str },
}

/// What kind of event is to be admitted.
#[derive(Debug)]
pub(crate) enum DraftKind<'a> {
    Track { event_name: Cow<'a, str> },
    Identify,
    Page(Box<View<'a>>),
    Screen(Box<View<'a>>),
    Group { group_id: Cow<'a, str> },
    Alias { previous_id: Cow<'a, str> },
}

/// What a page or a screen has of its own.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub(crate) name: Cow<'a, str>,
    pub(crate) category: Cow<'a, str>,
}
