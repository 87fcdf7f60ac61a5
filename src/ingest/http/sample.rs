//! One message of Segment's form, for a person who asks what would become of it.

use super::{
    integrations::Destinations,
    item::{Beside, Call, Caller, Came},
    route::Form,
};
use crate::{
    admission::{denied::Violation, draft::Draft},
    enrich::agent::Hints,
};

/// Reads a message as the door does, from a server that has these providers, and hands its
/// draft on.
pub(crate) fn read_message<R>(
    json: &str,
    providers: &[&'static str],
    now_ms: i64,
    then: impl FnOnce(&Draft<'_>) -> R,
) -> Result<R, Violation> {
    let destinations = Destinations::new(providers.iter().copied());
    let hints = &Hints::NONE;
    let caller =
        Caller { ip: None, country_hint: None, user_agent: "", hints, is_declined: false, is_direct: false };
    let call = Call::new(Form::Segment, Came { at_ms: now_ms, caller }, Beside::default(), &destinations);
    let draft = call.read_text(json, None)?;
    Ok(then(&draft))
}
