//! The form of website analytics: events of pages, with names of their own. One becomes a
//! message of Segment's form, so that every rule there is holds here too.

use std::borrow::Cow;

use hyper::StatusCode;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::{
    json::{fields, is_null, scalar, text},
    reply::{INVALID_EVENT, Reply, described, json, name_in_website},
    scan::Raw,
    schema::{self, Fields},
};
use crate::{
    admission::{
        Accepted,
        denied::{Denied, Violation, shown},
    },
    reasons::RefusalReason,
};

/// The only event that is a page, and what one is that does not say.
const PAGEVIEW: &str = "pageview";
/// Longest page, without what is cut off it.
const PAGE_BYTES_MAX: usize = 500;
const WEBSITE_ID_BYTES_MAX: usize = 100;
/// Of a campaign: the field here, and its name in a context.
const CAMPAIGN: [(&str, &str); 5] = [
    ("utm_source", "source"),
    ("utm_medium", "medium"),
    ("utm_campaign", "name"),
    ("utm_term", "term"),
    ("utm_content", "content"),
];

/// An event of this form as one of Segment's. What is no object is left for the rules
/// there. Whose address and browser it was only the connection says.
pub(super) fn as_segment(event: &str) -> Result<Option<String>, Violation> {
    let names = [
        "website_id",
        "event_type",
        "page",
        "title",
        "referrer",
        "visitor_id",
        "user_id",
        "session_id",
        "event_id",
        "timestamp",
        "properties",
        schema::FIELD,
    ];
    let Ok(values) = fields(event, &names) else { return Ok(None) };
    let [website, kind, page, title, referrer, visitor, user, session, id, time, properties, version] =
        values;
    let website = text_of("website_id", website)?;
    if website.is_empty() || website.len() > WEBSITE_ID_BYTES_MAX {
        let want = format!("1 to {WEBSITE_ID_BYTES_MAX} bytes");
        return Err(violation(RefusalReason::WebsiteIdMissing, "website_id", &website, want));
    }
    let kind = text_of("event_type", kind)?;
    let is_page = kind.is_empty() || kind == PAGEVIEW;
    let page = page_of(&text_of("page", page)?, is_page)?;
    let [title, referrer] = [text_of("title", title)?, text_of("referrer", referrer)?];

    let mut about = match properties.filter(|value| !is_null(*value)) {
        None => Fields::new(),
        Some(value) => serde_json::from_str(value.get()).map_err(|_| {
            violation(RefusalReason::PropertiesMalformed, "properties", value.get(), "an object".into())
        })?,
    };
    let mut of_page = Fields::new();
    for (name, value) in [("path", &page), ("title", &title), ("referrer", &referrer)] {
        if !value.is_empty() {
            of_page.insert(name.into(), raw(value));
            about.insert(name.into(), raw(value));
        }
    }
    about.insert("website_id".into(), raw(&website));

    let mut made = Fields::from([
        ("type".into(), raw(if is_page { "page" } else { "track" })),
        ("context".into(), raw(&context_of(event, of_page))),
        ("properties".into(), raw(&about)),
    ]);
    if !is_page {
        made.insert("event".into(), raw(&kind));
    }
    // These are checked as what they become.
    for (name, value) in [
        ("anonymousId", visitor),
        ("userId", user),
        ("sessionId", session),
        ("messageId", id),
        ("timestamp", time),
        (schema::FIELD, version),
    ] {
        made.extend(value.map(|value| (name.to_owned(), value.boxed())));
    }
    Ok(Some(serde_json::to_string(&made).expect("it was JSON")))
}

fn raw(value: &(impl Serialize + ?Sized)) -> Box<RawValue> {
    to_raw_value(value).expect("its names are texts")
}

/// What a page is called: its path, without what is behind a `?` or `#` and without a
/// slash at its end.
fn page_of(page: &str, is_wanted: bool) -> Result<String, Violation> {
    let path = page.split(['?', '#']).next().unwrap_or_default();
    let path = match path.strip_suffix('/') {
        Some("") => "/",
        Some(path) => path,
        None => path,
    };
    if path.len() > PAGE_BYTES_MAX || path.is_empty() && is_wanted {
        let want = format!("1 to {PAGE_BYTES_MAX} bytes, as in \"/pricing\"");
        return Err(violation(RefusalReason::PageInvalid, "page", page, want));
    }
    Ok(path.to_owned())
}

/// The page, and the campaign that led to it.
fn context_of(event: &str, page: Fields) -> Fields {
    let mut context = Fields::new();
    if !page.is_empty() {
        context.insert("page".into(), raw(&page));
    }
    let values = fields(event, &CAMPAIGN.map(|(name, _)| name)).unwrap_or_default();
    let campaign: Fields = CAMPAIGN
        .iter()
        .zip(values)
        .filter_map(|((_, name), value)| Some(((*name).to_owned(), raw(&*text(value?)?))))
        .collect();
    if !campaign.is_empty() {
        context.insert("campaign".into(), raw(&campaign));
    }
    context
}

fn text_of(field: &'static str, value: Option<Raw<'_>>) -> Result<String, Violation> {
    let Some(value) = value else { return Ok(String::new()) };
    let text = scalar(value).map(Cow::into_owned);
    text.ok_or_else(|| violation(RefusalReason::FieldNotText, field, value.get(), "a text".into()))
}

fn violation(reason: RefusalReason, field: &'static str, got: &str, want: String) -> Violation {
    Violation { reason, field: field.to_owned(), got: shown(got), want }
}

/// The answer to one event that was taken.
pub(super) fn reply_to_one(accepted: &Accepted) -> Reply {
    #[derive(Serialize)]
    struct Answer<'a> {
        success: bool,
        event_id: &'a str,
        status: String,
    }
    let status = accepted.durability.name().to_ascii_uppercase();
    json(StatusCode::ACCEPTED, &Answer { success: true, event_id: accepted.event_id.as_str(), status })
}

/// The answer to many, none of which is to be sent again.
pub(super) fn reply_to_many(answers: &[Result<Accepted, Denied>]) -> Reply {
    #[derive(Serialize)]
    struct Answer<'a> {
        success: bool,
        accepted: usize,
        rejected: usize,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        errors: Vec<Error<'a>>,
    }
    #[derive(Serialize)]
    struct Error<'a> {
        index: usize,
        field: &'a str,
        code: &'static str,
        message: String,
    }
    let errors = answers.iter().enumerate().filter_map(|(index, answer)| match answer {
        Err(Denied::Invalid(violations)) => Some(Error {
            index,
            field: name_in_website(&violations[0].field),
            code: INVALID_EVENT,
            message: described(&violations[0]),
        }),
        _ => None,
    });
    let errors: Vec<_> = errors.collect();
    let (accepted, rejected) = (answers.len() - errors.len(), errors.len());
    json(StatusCode::ACCEPTED, &Answer { success: true, accepted, rejected, errors })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(event: &Value) -> Value {
        serde_json::from_str(&as_segment(&event.to_string()).unwrap().unwrap()).unwrap()
    }

    #[test]
    fn a_view_is_a_page_and_anything_else_a_track() {
        let view = of(&json!({
            "website_id": "site-1", "page": "/pricing/?plan=pro#top", "title": "Pricing", "visitor_id": "v-1",
            "referrer": "https://news.example/", "utm_source": "news", "utm_campaign": "may", "ip_address": "1.2.3.4",
            "session_id": 7, "event_id": "view-1-0123456789", "timestamp": "2026-01-01T00:00:00Z",
        }));
        let page = json!({"path":"/pricing","title":"Pricing","referrer":"https://news.example/"});
        let want = json!({
            "type": "page", "anonymousId": "v-1", "sessionId": 7, "messageId": "view-1-0123456789",
            "timestamp": "2026-01-01T00:00:00Z",
            "context": {"page": page, "campaign": {"source":"news","name":"may"}},
            "properties": {"path":"/pricing","title":"Pricing","referrer":"https://news.example/","website_id":"site-1"},
        });
        assert_eq!(view, want, "and whose address it is only the connection says");
        let signup = of(&json!({"website_id":"s","event_type":"signup","properties":{"plan":"pro","n":1e3}}));
        let want = json!({"type":"track","event":"signup","context":{},"properties":{"plan":"pro","n":1e3,"website_id":"s"}});
        assert_eq!(signup, want);
        assert_eq!(of(&json!({"website_id":"s","page":"/"}))["properties"]["path"], "/");
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        for (event, field) in [
            (json!({"page":"/"}), "website_id"),
            (json!({"website_id":"s"}), "page"),
            (json!({"website_id":"s","page":"?x"}), "page"),
            (json!({"website_id":"s","page":"x".repeat(501)}), "page"),
            (json!({"website_id":"s","page":["/"]}), "page"),
            (json!({"website_id":"s","page":"/","properties":[1]}), "properties"),
        ] {
            assert_eq!(as_segment(&event.to_string()).unwrap_err().field, field, "{event}");
        }
        assert_eq!(as_segment("[1]"), Ok(None), "it is refused as what it is");
    }
}
