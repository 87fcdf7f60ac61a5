//! What becomes of an event between its rules and the queue: it is found out what only the
//! edge can, addresses are cut, and what must not be kept goes.
//!
//! In this order. What is found out goes by the whole address and stands in the event, so
//! that the privacy rules see it, too.

use std::sync::Arc;

use analytics_relay_providers::{
    Event, EventParts, MoreParts,
    event::{Audience, JsonObject},
    properties::Limits,
};

use super::lenient::context_with_ip_cut;
use crate::{
    address::{IpPolicy, stored_ip},
    enrich::{
        edge::Edge,
        enricher::{Enriched, Enricher},
        tally::Tally,
    },
    privacy::{self, Privacy},
};

/// What is counted of an event, once it is taken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    enriching: Tally,
    privacy: privacy::Found,
}

/// About what an event of a device holds more of memory when it is found out about.
pub(super) const ENRICHED_BYTES: usize = 1024;

/// See the module. The default keeps events as they came, but for addresses that were read
/// off a connection.
#[derive(Debug, Default)]
pub(crate) struct Shaping {
    /// None where nothing is found out.
    pub(crate) enricher: Option<Arc<Enricher>>,
    pub(crate) ip_policy: IpPolicy,
    /// Events of users who decline go to nobody.
    pub(crate) drops_declined: bool,
    /// None where there are no rules.
    pub(crate) privacy: Option<Arc<Privacy>>,
}

impl Shaping {
    /// The event of parts that break no rule, and what is counted of it.
    #[inline]
    pub(super) fn pack(&self, parts: EventParts<'_>, edge: &Edge<'_>) -> (Event, Found) {
        let enriched = self.enricher.as_ref().and_then(|enricher| enricher.enrich(&parts, edge));
        let keeps_all = parts.ip.is_none() && parts.more.is_none();
        if enriched.is_none() && (keeps_all || self.ip_policy.keeps_all(edge.ip_is_connections)) {
            return self.pack_by_rules(&parts, Tally::default());
        }
        self.pack_shaped(parts, edge, &enriched.unwrap_or_default())
    }

    #[cold]
    fn pack_shaped(&self, parts: EventParts<'_>, edge: &Edge<'_>, enriched: &Enriched) -> (Event, Found) {
        let is_connections = edge.ip_is_connections;
        let more = parts.more.as_deref().unwrap_or(&MoreParts::EMPTY);
        let context = more.context.as_ref();
        let cut = context.and_then(|json| context_with_ip_cut(json.json(), is_connections, self.ip_policy));
        let context = match &cut {
            None => context.map(JsonObject::borrowed),
            Some(json) => Some(JsonObject::parse(json, &Limits::NONE).expect("it was checked")),
        };
        let json = enriched.json.as_deref().map(JsonObject::of_relay);
        let kept = MoreParts {
            session_id: more.session_id.or(enriched.session_id.as_deref()),
            source: more.source,
            tenant: more.tenant,
            audience: enriched.audience.as_ref().map_or_else(|| more.audience.borrowed(), Audience::borrowed),
            context,
            enriched: json,
        };
        let parts = EventParts {
            ip: parts.ip.and_then(|ip| stored_ip(ip, is_connections, self.ip_policy)),
            anonymous_id: parts.anonymous_id.or(enriched.anonymous_id.as_deref()),
            more: kept.if_any(),
            ..parts
        };
        self.pack_by_rules(&parts, enriched.tally)
    }

    #[inline]
    fn pack_by_rules(&self, parts: &EventParts<'_>, enriching: Tally) -> (Event, Found) {
        let (event, privacy) = match &self.privacy {
            None => (Event::pack(parts), privacy::Found::default()),
            Some(privacy) => privacy.pack(parts),
        };
        (event, Found { enriching, privacy })
    }

    /// Counts what was found in an event that was taken.
    pub(super) fn count(&self, found: Found) {
        let Found { enriching, privacy } = found;
        if let Some(enricher) = self.enricher.as_ref().filter(|_| !enriching.is_nothing()) {
            enricher.count(enriching);
        }
        if let Some(rules) = self.privacy.as_ref().filter(|_| !privacy.is_nothing()) {
            rules.count(privacy);
        }
    }
}

#[cfg(test)]
mod tests;
