//! Refused items that were mended, as a batch for a relay's door, and what it answers.

use std::borrow::Cow;

use hyper::header::HeaderName;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::{
    door::SEC_GPC,
    item::time_of,
    json::{fields, is_null, scalar},
    schema,
};
use crate::refused::RefusedItem;

/// Items that can go in one call: what stood beside them was the same. The time is ours.
pub(crate) fn body(items: &[&RefusedItem], now_ms: i64) -> Vec<u8> {
    #[derive(Serialize)]
    struct Call<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        context: Option<&'a RawValue>,
        #[serde(skip_serializing_if = "Option::is_none")]
        integrations: Option<&'a RawValue>,
        answers: u8,
        batch: Vec<Box<RawValue>>,
    }
    let first = items.first();
    let call = Call {
        context: first.and_then(|first| first.context.as_deref()),
        integrations: first.and_then(|first| first.integrations.as_deref()),
        answers: 1,
        batch: items.iter().map(|item| again(item, now_ms)).collect(),
    };
    serde_json::to_vec(&call).expect("its names are texts")
}

/// What a call of such items says in its head: whether their users decline to be followed.
pub(crate) fn head(items: &[&RefusedItem]) -> Option<(HeaderName, &'static str)> {
    items.first().is_some_and(|first| first.is_declined()).then_some((SEC_GPC, "1"))
}

/// True if two can go in one call.
pub(crate) fn go_together(one: &RefusedItem, other: &RefusedItem) -> bool {
    let beside = |item: &RefusedItem| {
        [&item.context, &item.integrations].map(|json| json.as_ref().map(|json| json.get().to_owned()))
    };
    one.is_declined() == other.is_declined() && beside(one) == beside(other)
}

/// An item as if it came now for the first time: with an id, so that it is one event
/// however often it is sent, with the time at which it came, and by a clock that is as far
/// from ours as it was then; of the device that it came from.
fn again(refused: &RefusedItem, now_ms: i64) -> Box<RawValue> {
    let Ok(mut item) = serde_json::from_str::<schema::Fields>(refused.item.get()) else {
        return refused.item.clone();
    };
    let stated = |item: &schema::Fields, name: &str| {
        item.get(name).filter(|value| !is_null((&***value).into())).cloned()
    };
    let own = ["messageId", schema::FIELD, "timestamp", "originalTimestamp"];
    let [id, version, time, original] = own.map(|name| stated(&item, name));
    if id.is_none() {
        item.insert("messageId".into(), raw(&refused.letter_id));
    }
    if version.is_none() {
        item.insert(schema::FIELD.into(), raw(&refused.schema_version));
    }
    let sent_at = item.remove("sentAt").filter(|sent_at| !is_null((&**sent_at).into()));
    let sent_at_ms = sent_at.map_or(refused.sent_at_ms, |sent_at| time_of((&*sent_at).into()).ok());
    match (time.or(original), sent_at_ms) {
        // By our own clock.
        (None, _) => {
            item.insert("timestamp".into(), raw(&refused.refused_since_ms));
        }
        (Some(_), Some(sent_at_ms)) => {
            let since_ms = now_ms.saturating_sub(refused.refused_since_ms);
            item.insert("sentAt".into(), raw(&sent_at_ms.saturating_add(since_ms)));
        }
        (Some(_), None) => {}
    }
    let context = item.get("context").map_or("{}", |context| context.get());
    // What is no object is refused as what it is.
    if let Ok(context) = serde_json::from_str::<schema::Fields>(context) {
        item.insert("context".into(), raw(&of_device(context, refused)));
    }
    raw(&item)
}

/// A context that says itself what the call showed when it came: it is another one now.
fn of_device(mut context: schema::Fields, refused: &RefusedItem) -> schema::Fields {
    context.insert("direct".into(), raw(&false));
    if let Some(seen) = &refused.seen {
        if let Some(ip) = seen.ip {
            context.entry("ip".into()).or_insert_with(|| raw(&ip));
        }
        if !seen.user_agent.is_empty() {
            context.entry("userAgent".into()).or_insert_with(|| raw(&seen.user_agent));
        }
    }
    context
}

fn raw(value: &impl Serialize) -> Box<RawValue> {
    to_raw_value(value).expect("its names are texts")
}

/// What a relay answers to [`body`].
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    /// Those that break a rule yet.
    pub(crate) refused: Vec<StillRefused>,
    /// Those for which there is no room now.
    pub(crate) deferred: Vec<Deferred>,
    #[serde(default, rename = "retryAfterMs")]
    pub(crate) retry_after_ms: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct StillRefused {
    /// Its place in the batch.
    pub(crate) index: usize,
    pub(crate) violations: Vec<StillBroken>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct StillBroken {
    pub(crate) reason: String,
    pub(crate) field: String,
    pub(crate) description: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Deferred {
    /// Its place in the batch.
    pub(crate) index: usize,
}

/// The user, the device and the former id that an item names, as far as they are texts or
/// numbers; nothing if it is no object.
pub(crate) fn ids_of(item: &str) -> Option<[Option<String>; 3]> {
    let ids = fields(item, &["userId", "anonymousId", "previousId"]).ok()?;
    Some(ids.map(|id| id.and_then(scalar).map(Cow::into_owned)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::refused::Seen;

    fn refused(item: &Value, sent_at_ms: Option<i64>) -> RefusedItem {
        RefusedItem {
            letter_id: "letter-1".into(),
            refused_since_ms: 1_767_225_600_000,
            reason: "EVENT_NAME_EMPTY".into(),
            discard_reason: None,
            field: "event".into(),
            detail: String::new(),
            schema_version: 1,
            context: Some(raw(&json!({"locale": "de", "direct": true}))),
            integrations: None,
            sent_at_ms,
            seen: Some(Seen {
                ip: Some("203.0.113.9".parse().unwrap()),
                user_agent: "Mail/1".into(),
                declined: false,
            }),
            item: raw(item),
        }
    }

    /// A day later it is what it was: its id, its time, its clock, its device.
    #[test]
    fn an_item_is_sent_as_what_it_was_when_it_came() {
        const DAY_MS: i64 = 86_400_000;
        let came = 1_767_225_600_000_i64;
        let again = |item: &Value, sent_at_ms: Option<i64>| {
            let refused = refused(item, sent_at_ms);
            let body: Value = serde_json::from_slice(&body(&[&refused], came + DAY_MS)).unwrap();
            assert_eq!((&body["answers"], &body["context"]["locale"]), (&1.into(), &"de".into()));
            body["batch"][0].clone()
        };
        let device = json!({"direct":false,"ip":"203.0.113.9","userAgent":"Mail/1"});
        let hour_behind = Some(came - 3_600_000);
        let bare =
            json!({"event":"x","messageId":"letter-1","schemaVersion":1,"timestamp":came,"context":device});
        for sent_at_ms in [None, hour_behind] {
            assert_eq!(
                again(&json!({"event":"x","sentAt":null}), sent_at_ms),
                bare,
                "its time is by our clock"
            );
        }
        let full = json!({"messageId":"own","timestamp":"2025-12-31T23:00:00Z","schemaVersion":2,"context":{"ip":"1.2.3.4"}});
        let sent = again(&full, hour_behind);
        assert_eq!((&sent["messageId"], &sent["schemaVersion"]), (&"own".into(), &2.into()));
        assert_eq!(sent["sentAt"], came + DAY_MS - 3_600_000);
        assert_eq!(sent["context"], json!({"direct":false,"ip":"1.2.3.4","userAgent":"Mail/1"}));
        let far = again(&json!({"timestamp":1,"sentAt":i64::MAX}), None);
        assert_eq!(far["sentAt"], i64::MAX);
        assert_eq!(again(&json!("no object"), None), json!("no object"));
    }

    #[test]
    fn who_declined_when_it_came_declines_when_it_is_sent_again() {
        let [agrees, mut declines, mut old] = [(); 3].map(|()| refused(&json!({"event":"x"}), None));
        declines.seen.as_mut().unwrap().declined = true;
        // As it was written before this was kept.
        old.seen = serde_json::from_str(r#"{"user_agent":"Mail/1"}"#).unwrap();
        assert_eq!(head(&[&declines]), Some((SEC_GPC, "1")));
        assert!(head(&[&agrees]).is_none() && head(&[&old]).is_none());
        assert!(go_together(&agrees, &old) && !go_together(&agrees, &declines));
        let kept: RefusedItem = serde_json::from_slice(&serde_json::to_vec(&declines).unwrap()).unwrap();
        assert!(kept.is_declined());
    }
}
