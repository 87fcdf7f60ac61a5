//! What is kept of a batch that its caller believes to be taken, or that only a newer
//! relay understands: one letter for each such item.

use analytics_relay_providers::EventId;
use serde_json::value::{RawValue, to_raw_value};

use super::{
    item::{Beside, Caller, Came, NAMES, time_of},
    json::{fields, scalar},
    reply::{described, name_here},
    scan::Raw,
    schema,
};
use crate::{
    address::{IpPolicy, stored_ip},
    admission::{
        Accepted,
        denied::{Denied, Violation},
        lenient::{context_with_ip_cut, may_name_ip},
    },
    queue::Durability,
    reasons::RefusalReason,
    refused::{RefusedItem, Seen},
};

/// Letters of one batch.
#[derive(Debug)]
pub(super) struct Keeping {
    /// How much of users' addresses.
    policy: IpPolicy,
    pub(super) letters: Vec<RefusedItem>,
    /// Those of a newer schema, by their places, with the ids that their callers get.
    pub(super) newer: Vec<(usize, EventId<'static>)>,
}

impl Keeping {
    /// No letter yet.
    pub(super) fn of(policy: IpPolicy) -> Self {
        Self { policy, letters: Vec::new(), newer: Vec::new() }
    }

    /// Adds a letter for an item that breaks a rule.
    pub(super) fn add(
        &mut self,
        (place, item): (usize, Raw<'_>),
        violation: &Violation,
        beside: Beside<'_>,
        schema_version: u32,
        came: Came<'_>,
    ) {
        let letter_id = RefusedItem::new_id();
        if violation.reason == RefusalReason::SchemaNewer {
            self.newer.push((place, id_of(item, &letter_id)));
        }
        self.letters.push(RefusedItem {
            letter_id,
            refused_since_ms: came.at_ms,
            reason: violation.reason.name().to_owned(),
            discard_reason: discard_reason(violation).map(str::to_owned),
            field: name_here(&violation.field).to_owned(),
            detail: described(violation),
            schema_version,
            context: beside.context.map(|context| self.cut(context, came.caller)),
            integrations: beside.integrations.map(Raw::boxed),
            sent_at_ms: beside.sent_at.and_then(|sent_at| time_of(sent_at).ok()),
            seen: self.seen_of(came.caller, item, beside.context),
            item: self.item(item, came.caller),
        });
    }

    /// An item in whose context no more is left of an address than in an event's.
    fn item(&self, item: Raw<'_>, caller: Caller<'_>) -> Box<RawValue> {
        let is_cut = !self.policy.keeps_all(caller.is_direct) && may_name_ip(item.get());
        // A context that another one hides is gone from these, too.
        let Some(mut fields) = readable(item).filter(|_| is_cut) else { return item.boxed() };
        if let Some(context) = fields.get("context") {
            fields.insert("context".into(), self.cut((&**context).into(), caller));
        }
        to_raw_value(&fields).expect("it was JSON")
    }

    fn cut(&self, context: Raw<'_>, caller: Caller<'_>) -> Box<RawValue> {
        let cut = context_with_ip_cut(context.get(), caller.is_direct, self.policy);
        cut.map_or_else(|| context.boxed(), |cut| RawValue::from_string(cut).expect("it is JSON"))
    }

    /// What the call shows of the user, if it comes from the user's own device or the user
    /// declines.
    fn seen_of(&self, caller: Caller<'_>, item: Raw<'_>, beside: Option<Raw<'_>>) -> Option<Seen> {
        let is_direct = |context: Raw<'_>| {
            let direct = fields(context.get(), &["direct"]).ok().and_then(|[direct]| direct);
            direct.is_some_and(|direct| direct.get() == "true")
        };
        let own = fields(item.get(), &["context"]).ok().and_then(|[own]| own);
        let is_direct = caller.is_direct || [own, beside].into_iter().flatten().any(is_direct);
        let declined = caller.is_declined;
        if !is_direct {
            return declined.then(|| Seen { ip: None, user_agent: String::new(), declined });
        }
        let ip = caller.ip.and_then(|ip| stored_ip(ip, true, self.policy));
        Some(Seen { ip, user_agent: caller.user_agent.to_owned(), declined })
    }
}

/// An item's fields, or as far as they can be read those that are known; nothing of what is
/// no object.
fn readable(item: Raw<'_>) -> Option<schema::Fields> {
    serde_json::from_str(item.get()).ok().or_else(|| {
        let values = fields(item.get(), &NAMES).ok()?;
        let known =
            NAMES.iter().zip(values).filter_map(|(name, value)| Some(((*name).into(), value?.boxed())));
        Some(known.collect())
    })
}

/// What is of a newer schema was taken, now that it is kept.
pub(super) fn take_newer(newer: Vec<(usize, EventId<'static>)>, answers: &mut [Result<Accepted, Denied>]) {
    for (place, event_id) in newer {
        answers[place] = Ok(Accepted { event_id, durability: Durability::Synced });
    }
}

/// An item's own id, or else that of its letter, which it will get.
fn id_of(item: Raw<'_>, letter_id: &str) -> EventId<'static> {
    let own = fields(item.get(), &["messageId"]).ok().and_then(|[id]| id.and_then(scalar));
    let own = own.and_then(|id| EventId::new(id.into_owned()).ok());
    own.unwrap_or_else(|| EventId::new(letter_id.to_owned()).expect("it was assigned"))
}

/// Segment's name for what is wrong, where it has one.
fn discard_reason(violation: &Violation) -> Option<&'static str> {
    use RefusalReason as Reason;
    Some(match (violation.reason, violation.field.as_str()) {
        (Reason::NoUser | Reason::UserIdMissing, _) => "no_user_anon_id",
        (Reason::EventNameEmpty, _) => "event_not_defined",
        (Reason::FieldNotText, "event") => "event_not_string",
        (Reason::FieldNotText, "name") => "name_not_string",
        (Reason::FieldNotText, "category") => "category_not_string",
        (Reason::PropertiesMalformed, "traits") => "traits_not_object",
        (Reason::PropertiesMalformed, _) => "properties_not_object",
        (Reason::GroupIdMissing | Reason::PreviousIdMissing, _) => "id_required",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::enrich::agent::Hints;

    const DEVICE: Caller<'static> = Caller {
        ip: None,
        country_hint: None,
        user_agent: "",
        hints: &Hints::NONE,
        is_declined: false,
        is_direct: true,
    };

    fn kept(json: &str, policy: IpPolicy) -> String {
        let item = RawValue::from_string(json.to_owned()).unwrap();
        Keeping::of(policy).item((&*item).into(), DEVICE).get().to_owned()
    }

    /// As it came, if it can be; and nothing of it that cannot be looked at.
    #[test]
    fn no_more_is_kept_of_an_address_in_an_item_than_of_an_events() {
        for (json, want) in [
            (
                r#"{"type":"x","context":{"ip":"81.2.69.142","n":1e2}}"#,
                r#"{"context":{"ip":"81.2.69.0","n":1e2},"type":"x"}"#,
            ),
            (r#"{"context":{"ip":"81.2.69.142"},"context":{}}"#, r#"{"context":{}}"#),
            (
                r#"{"\ud800":1,"userId":"u","context":{"ip":"81.2.69.142"}}"#,
                r#"{"context":{"ip":"81.2.69.0"},"userId":"u"}"#,
            ),
            (r#"{"userId":"u","context":{"\ud800":1,"ip":"81.2.69.142"}}"#, r#"{"context":{},"userId":"u"}"#),
        ] {
            assert_eq!(kept(json, IpPolicy::ByOrigin), want, "{json}");
            assert_eq!(kept(json, IpPolicy::Full), json);
        }
        for same in [r#"{"type":"x","context":{"locale":"de"}}"#, r#"{"type":"x"}"#, "7", r#"["ip"]"#] {
            assert_eq!(kept(same, IpPolicy::None), same);
        }
    }
}
