//! Rules → what is left of an event. Its ids, its name, its times and whose it is stay.

use std::{collections::BTreeMap, net::IpAddr};

use analytics_relay_providers::{
    Event, EventKind, EventParts, MoreParts, Properties,
    event::{Audience, JsonObject},
    properties::Limits,
};
use serde_json::value::{RawValue, to_raw_value};

use super::rewrite::{Action, KeyRules, Notes};

/// What the relay found out about an event has its own version, which nobody has to allow.
const VERSION_OF_ENRICHED: &[&str] = &["v"];

/// What is different of an event.
#[derive(Debug, Default)]
struct Changed {
    properties: Option<String>,
    context: Option<String>,
    enriched: Option<String>,
    /// In place of the address,
    ip: Option<Option<IpAddr>>,
    /// and of the user agent.
    user_agent: Option<Option<String>>,
}

/// The event of some parts, as rules leave them, for this audience if it is another one.
/// Nothing if all of it stays as it is.
pub(super) fn changed(
    parts: &EventParts<'_>,
    rules: &KeyRules,
    audience: Option<Audience<'_>>,
    notes: &mut Notes,
) -> Option<Event> {
    let changed =
        if may_change(parts, rules) { Changed::by(rules, parts, notes) } else { Changed::default() };
    if audience.is_none() && changed.is_nothing() {
        return None;
    }
    Some(changed.pack(parts, audience))
}

/// False for nearly every event where there are no rules but for names that are marked.
#[inline]
pub(super) fn may_change(parts: &EventParts<'_>, rules: &KeyRules) -> bool {
    if rules.only_red {
        let context = parts.more.as_ref().and_then(|more| more.context.as_ref());
        let is_marked =
            parts.properties.shape().has_red_key() || context.is_some_and(JsonObject::may_have_red_key);
        return is_marked && !rules.keys.is_empty();
    }
    true
}

impl Changed {
    fn by(rules: &KeyRules, parts: &EventParts<'_>, notes: &mut Notes) -> Self {
        // Only a relay that knows its kind could send it, and that one looks at it.
        if matches!(parts.kind, EventKind::Unknown { .. }) {
            return Self::default();
        }
        let more = parts.more.as_deref().unwrap_or(&MoreParts::EMPTY);
        let [context, enriched] =
            [(&more.context, &[][..]), (&more.enriched, VERSION_OF_ENRICHED)].map(|(object, always)| {
                object.as_ref().and_then(|object| rules.rewritten(object.json(), always, notes))
            });
        Self {
            properties: rules.rewritten(parts.properties.json(), &[], notes),
            context,
            enriched,
            ip: parts.ip.and_then(|ip| ip_by(rules, ip, notes)),
            user_agent: parts.user_agent.and_then(|agent| user_agent_by(rules, agent, notes)),
        }
    }

    fn is_nothing(&self) -> bool {
        let Self { properties, context, enriched, ip, user_agent } = self;
        [properties, context, enriched].iter().all(|text| text.is_none())
            && ip.is_none()
            && user_agent.is_none()
    }

    fn pack(&self, parts: &EventParts<'_>, audience: Option<Audience<'_>>) -> Event {
        let more = parts.more.as_deref().unwrap_or(&MoreParts::EMPTY);
        let context = self.context.as_deref().map(object);
        let enriched = self.enriched.as_deref().map(object);
        let more = MoreParts {
            audience: audience.unwrap_or_else(|| more.audience.borrowed()),
            context: context.or_else(|| more.context.as_ref().map(JsonObject::borrowed)),
            enriched: enriched.or_else(|| more.enriched.as_ref().map(JsonObject::borrowed)),
            session_id: more.session_id,
            source: more.source,
            tenant: more.tenant,
        };
        let user_agent = match &self.user_agent {
            None => parts.user_agent,
            Some(changed) => changed.as_deref().filter(|agent| !agent.is_empty()),
        };
        Event::pack(&EventParts {
            id: parts.id.clone(),
            ip: self.ip.unwrap_or(parts.ip),
            user_agent,
            properties: self.properties.as_deref().map_or_else(|| parts.properties.borrowed(), properties),
            more: more.if_any(),
            ..*parts
        })
    }
}

/// The properties of a text that was taken out of others. Should it be none, which only a
/// defect could make it, nothing is kept of it.
fn properties(json: &str) -> Properties<'_> {
    Properties::parse(json, &Limits::NONE).unwrap_or_else(|_| Properties::empty())
}

fn object(json: &str) -> JsonObject<'_> {
    properties(json).into()
}

/// What becomes of an event's own address: a hash of one, or a sealed one, is none, and so it
/// goes.
fn ip_by(rules: &KeyRules, ip: IpAddr, notes: &mut Notes) -> Option<Option<IpAddr>> {
    const NAME: &str = "ip";
    let rule = rules.of_field(NAME)?;
    let left = match rule.action {
        Action::Keep => return None,
        Action::Cut(cut) => cut.ip(ip),
        Action::Drop | Action::Hash(..) | Action::Seal(_) => None,
    };
    notes.note(NAME, rule);
    Some(left)
}

fn user_agent_by(rules: &KeyRules, agent: &str, notes: &mut Notes) -> Option<Option<String>> {
    const NAME: &str = "userAgent";
    let rule = rules.of_field(NAME).filter(|rule| rule.action != Action::Keep)?;
    notes.note(NAME, rule);
    Some(rules.text(agent, rule.action))
}

/// An address and a user agent as rules leave them.
pub(super) fn fields_by(
    rules: &KeyRules,
    ip: Option<IpAddr>,
    user_agent: Option<&str>,
) -> (Option<IpAddr>, Option<String>) {
    let mut notes = Notes::default();
    let ip = ip.and_then(|ip| ip_by(rules, ip, &mut notes).unwrap_or(Some(ip)));
    let as_it_is = |agent: &str| Some(agent.to_owned());
    let left = |agent| user_agent_by(rules, agent, &mut notes).unwrap_or_else(|| as_it_is(agent));
    (ip, user_agent.and_then(left))
}

/// Names and values of an object, each as it stands.
type Fields = BTreeMap<String, Box<RawValue>>;

/// An item that a front door refused and keeps, as rules leave it; nothing if they leave it
/// as it is. What its own fields say stays, so that it can be mended and sent. One that holds
/// others in place of a text or a number may be why it was refused, and is as good as
/// properties, as is whatever else the item holds.
pub(super) fn changed_item(item: &RawValue, rules: &KeyRules, own: &[&str]) -> Option<Box<RawValue>> {
    const INTEGRATIONS: &str = "integrations";
    let stays = |name: &str, value: &RawValue| {
        own.contains(&name) && (name == INTEGRATIONS || !value.get().starts_with(['{', '[']))
    };
    let changed = changed_but(item, rules, stays);
    let fields = serde_json::from_str::<Fields>(changed.as_deref().unwrap_or(item).get());
    let with_integrations = fields.ok().and_then(|mut fields| {
        let left = changed_integrations(fields.get(INTEGRATIONS)?, rules)?;
        fields.insert(INTEGRATIONS.to_owned(), left);
        Some(object_of(&fields))
    });
    with_integrations.or(changed)
}

/// The same of `integrations`: who gets it stays, and the rules are for the options of each.
pub(super) fn changed_integrations(json: &RawValue, rules: &KeyRules) -> Option<Box<RawValue>> {
    changed_but(json, rules, |_, value| matches!(value.get(), "true" | "false" | "null"))
}

/// The same of any JSON, of which some fields stay.
pub(super) fn changed_but(
    json: &RawValue,
    rules: &KeyRules,
    stays: impl Fn(&str, &RawValue) -> bool,
) -> Option<Box<RawValue>> {
    let mut notes = Notes::default();
    let Ok(fields) = serde_json::from_str::<Fields>(json.get()) else {
        let left = rules.rewritten(json.get(), &[], &mut notes)?;
        return Some(RawValue::from_string(left).unwrap_or_default());
    };
    let (mut kept, others): (Fields, Fields) =
        fields.into_iter().partition(|(name, value)| stays(name, value));
    let left = rules.rewritten(object_of(&others).get(), &[], &mut notes)?;
    kept.extend(serde_json::from_str::<Fields>(&left).unwrap_or_default());
    Some(object_of(&kept))
}

fn object_of(fields: &Fields) -> Box<RawValue> {
    to_raw_value(fields).expect("its names are texts")
}
