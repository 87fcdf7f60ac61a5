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

use super::{draft::Edge, lenient::context_with_ip_cut};
use crate::{
    address::{IpPolicy, stored_ip},
    enrich::enricher::{Enriched, Enricher},
    privacy::{Found, Privacy},
};

/// See the module. The default keeps events as they came, but for addresses that were read
/// off a connection.
#[derive(Debug, Default)]
pub(crate) struct Shaping {
    /// None where nothing is found out.
    pub(crate) enricher: Option<Arc<Enricher>>,
    pub(crate) ip_policy: IpPolicy,
    /// None where there are no rules.
    pub(crate) privacy: Option<Arc<Privacy>>,
}

impl Shaping {
    /// The event of parts that break no rule, and what the privacy rules found in it.
    #[inline]
    pub(super) fn pack(&self, parts: EventParts<'_>, edge: &Edge<'_>) -> (Event, Found) {
        let enriched = self.enricher.as_ref().and_then(|enricher| enricher.enrich(&parts, edge));
        let keeps_all = parts.ip.is_none() && parts.more.is_none();
        if enriched.is_none() && (keeps_all || self.ip_policy.keeps_all(edge.ip_is_connections)) {
            return self.pack_by_rules(&parts);
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
        self.pack_by_rules(&EventParts {
            ip: parts.ip.and_then(|ip| stored_ip(ip, is_connections, self.ip_policy)),
            anonymous_id: parts.anonymous_id.or(enriched.anonymous_id.as_deref()),
            more: kept.if_any(),
            ..parts
        })
    }

    #[inline]
    fn pack_by_rules(&self, parts: &EventParts<'_>) -> (Event, Found) {
        match &self.privacy {
            None => (Event::pack(parts), Found::default()),
            Some(privacy) => privacy.pack(parts),
        }
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::{Properties, event::Audience};

    use super::{
        super::{draft::More, tests::draft, validate::check},
        *,
    };

    /// The caller's context is kept as it was sent, and may hold the address once more.
    #[test]
    fn no_more_is_left_of_an_address_than_its_policy_lets_and_not_in_the_context_either() {
        let kept = |is_connections, ip_policy| {
            let json = r#"{"ip":"81.2.69.142","locale":"de"}"#;
            let context = Some(
                Properties::parse(json, &Limits::DEFAULT).map(JsonObject::from).map_err(|_| unreachable!()),
            );
            let edge = Edge { ip_is_connections: is_connections, ..Edge::default() };
            let more = More { session_id: "".into(), audience: Audience::All, context, edge };
            let draft = super::super::draft::Draft {
                ip: "81.2.69.142".into(),
                more: Some(Box::new(more)),
                ..draft()
            };
            let shaping = Shaping { ip_policy, ..Shaping::default() };
            let packed = check(&draft, None, 0, || true, |parts| shaping.pack(parts, &edge));
            let ((event, _), _) = packed.unwrap();
            (event.ip().map(str::to_owned), event.context().unwrap().json().to_owned())
        };
        let some = |ip: &str| (Some(ip.to_owned()), format!(r#"{{"ip":"{ip}","locale":"de"}}"#));
        let (full, cut) = (some("81.2.69.142"), some("81.2.69.0"));
        let none = (None, r#"{"locale":"de"}"#.to_owned());
        for (is_connections, policy, want) in [
            (true, IpPolicy::ByOrigin, &cut),
            (false, IpPolicy::ByOrigin, &full),
            (false, IpPolicy::Truncate, &cut),
            (true, IpPolicy::Full, &full),
            (false, IpPolicy::None, &none),
        ] {
            assert_eq!(&kept(is_connections, policy), want, "{is_connections} {policy:?}");
        }
    }
}
