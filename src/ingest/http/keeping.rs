//! What is kept of a batch that its caller believes to be taken, or that only a newer
//! relay understands: one letter for each such item.

use analytics_relay_providers::EventId;

use super::{
    item::{Beside, Caller, Came, time_of},
    json::{fields, scalar},
    reply::{described, name_here},
    scan::Raw,
};
use crate::{
    admission::{
        Accepted,
        denied::{Denied, Violation},
    },
    queue::Durability,
    reasons::RefusalReason,
    refused::{RefusedItem, Seen},
};

/// Letters of one batch.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    pub(super) letters: Vec<RefusedItem>,
    /// Those of a newer schema, by their places, with the ids that their callers get.
    pub(super) newer: Vec<(usize, EventId<'static>)>,
}

impl Keeping {
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
            context: beside.context.map(Raw::boxed),
            integrations: beside.integrations.map(Raw::boxed),
            sent_at_ms: beside.sent_at.and_then(|sent_at| time_of(sent_at).ok()),
            seen: seen_of(came.caller, item, beside.context),
            item: item.boxed(),
        });
    }
}

/// What is of a newer schema was taken, now that it is kept.
pub(super) fn take_newer(newer: Vec<(usize, EventId<'static>)>, answers: &mut [Result<Accepted, Denied>]) {
    for (place, event_id) in newer {
        answers[place] = Ok(Accepted { event_id, durability: Durability::Synced });
    }
}

/// What the call shows of the user, if it comes from the user's own device.
fn seen_of(caller: Caller<'_>, item: Raw<'_>, beside: Option<Raw<'_>>) -> Option<Seen> {
    let is_direct = |context: Raw<'_>| {
        let direct = fields(context.get(), &["direct"]).ok().and_then(|[direct]| direct);
        direct.is_some_and(|direct| direct.get() == "true")
    };
    let own = fields(item.get(), &["context"]).ok().and_then(|[own]| own);
    let is_direct = caller.is_direct || [own, beside].into_iter().flatten().any(is_direct);
    is_direct.then(|| Seen { ip: caller.ip, user_agent: caller.user_agent.to_owned() })
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
