//! Schema versions: which one a call is written by, how an older one becomes the current
//! one before admission, and what a caller is told of it.
//!
//! A version is a whole number; what only adds to it is no new one. A call that names none
//! is written by the first. What is newer than this relay is refused where its caller
//! reads that, and else kept until a newer relay takes it.

use std::{borrow::Cow, collections::BTreeMap};

use hyper::{
    HeaderMap, StatusCode,
    header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, LINK},
};
use jiff::{Timestamp, fmt::rfc2822};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{
    json::scalar,
    reply::{Reply, json},
    route::query_value,
    scan::Raw,
};
use crate::{admission::denied::Violation, reasons::RefusalReason};

/// Where a call says it first.
pub(super) const VERSION: HeaderName = HeaderName::from_static("x-schema-version");
/// Where it says it last, and each item for itself.
pub(super) const FIELD: &str = "schemaVersion";
/// What is said where nothing is.
const FIRST: u32 = 1;

/// An item's names, and its values as they stand.
pub(super) type Fields = BTreeMap<String, Box<RawValue>>;

/// One version.
#[derive(Debug)]
pub(super) struct Schema {
    pub(super) version: u32,
    /// Its number in metrics.
    pub(super) label: &'static str,
    /// The day since when it is taken.
    pub(super) since: &'static str,
    /// From when on callers are told to leave it, in Unix seconds.
    pub(super) deprecated: Option<i64>,
    /// When it will be taken no more, not before that.
    pub(super) sunset: Option<i64>,
    /// What is different from the one before it.
    pub(super) guide: &'static str,
    /// Makes an item one of the next version; of the newest there is none. It keeps what
    /// it does not know.
    pub(super) upcast: Option<fn(Fields) -> Fields>,
}

/// Those of this relay, by their numbers: without a gap.
static KNOWN: [Schema; 1] = [Schema {
    version: FIRST,
    label: "1",
    since: "2026-11-26",
    deprecated: None,
    sunset: None,
    guide: "docs/integration.md",
    upcast: None,
}];

/// All versions that are taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schemas(&'static [Schema]);

/// The version of a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stated {
    pub(super) version: u32,
    /// What its caller is to be told.
    pub(super) warning: Option<String>,
}

impl Schemas {
    pub(super) const KNOWN: Self = Self(&KNOWN);

    pub(super) fn current(self) -> u32 {
        self.0.last().map_or(FIRST, |schema| schema.version)
    }

    /// A label for each version, and one for all that are not known.
    pub(super) fn labels(self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|schema| schema.label).chain(std::iter::once("other"))
    }

    /// The place of a version among the labels.
    pub(super) fn place_of(self, version: u32) -> usize {
        self.0.iter().position(|schema| schema.version == version).unwrap_or(self.0.len())
    }

    fn of(self, version: u32) -> Option<&'static Schema> {
        self.0.iter().find(|schema| schema.version == version)
    }

    /// The version of a call: by its header, its content type, its query or its body, in
    /// this order. Of two that say different things the first holds, with a warning.
    pub(super) fn of_call(
        self,
        headers: &HeaderMap,
        query: &str,
        body: Option<Raw<'_>>,
    ) -> Result<Stated, Violation> {
        let text = |name| headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()));
        let places = [
            ("the header x-schema-version", text(VERSION).map(Cow::into_owned)),
            ("content-type", text(CONTENT_TYPE).as_deref().and_then(parameter_of_type)),
            ("the query schema_version", query_value(query, "schema_version")),
            ("the body's schemaVersion", body.map(stated_in).transpose()?.flatten()),
        ];
        let mut stated: Option<(&str, u32)> = None;
        let mut warning = None;
        for (place, text) in places {
            let Some(text) = text.filter(|text| !text.trim().is_empty()) else { continue };
            let version = number(&text)?;
            match stated {
                None => stated = Some((place, version)),
                Some((first, held)) if held != version => {
                    warning = Some(format!(
                        "schema version {held} by {first} and {version} by {place}: {held} holds"
                    ));
                }
                Some(_) => {}
            }
        }
        let version = stated.map_or(FIRST, |(_, version)| version);
        let deprecated = self.of(version).and_then(|schema| schema.deprecated);
        let warning = warning.or_else(|| {
            let guide = self.of(version)?.guide;
            deprecated.map(|_| {
                format!("schema version {version} is deprecated, {} is current: {guide}", self.current())
            })
        });
        Ok(Stated { version, warning })
    }

    /// The version of one item of a call: its own, or else the call's.
    pub(super) fn of_item(own: Option<Raw<'_>>, of_call: u32) -> Result<u32, Violation> {
        Ok(match own.map(stated_in).transpose()?.flatten() {
            Some(own) => number(&own)?,
            None => of_call,
        })
    }

    /// An item of an older version as one of the current one; nothing if it is that
    /// already, or no object.
    pub(super) fn upcast(self, json: &str, version: u32) -> Result<Option<String>, Violation> {
        if version == self.current() {
            return Ok(None);
        }
        let Some(oldest) = self.0.iter().position(|schema| schema.version == version) else {
            return Err(self.unsupported(version));
        };
        let Ok(item) = serde_json::from_str::<Fields>(json) else { return Ok(None) };
        let newer = self.0[oldest..].iter().filter_map(|schema| schema.upcast);
        let mut item = newer.fold(item, |item, upcast| upcast(item));
        item.remove(FIELD);
        Ok(Some(serde_json::to_string(&item).expect("it was JSON")))
    }

    /// Why a version is not taken.
    pub(super) fn unsupported(self, version: u32) -> Violation {
        let supported: Vec<_> = self.0.iter().map(|schema| schema.version.to_string()).collect();
        Violation {
            reason: RefusalReason::SchemaNewer,
            field: FIELD.to_owned(),
            got: version.to_string(),
            want: supported.join(", "),
        }
    }

    /// Tells the version that was used, and of one that is going when it is gone.
    pub(super) fn tell(self, version: u32, reply: &mut Reply) {
        let headers = reply.headers_mut();
        headers.insert(VERSION, version.into());
        let Some(schema) = self.of(version) else { return };
        let mut links = Vec::new();
        if let Some(deprecated) = schema.deprecated {
            // RFC 9745.
            headers.insert("deprecation", header(&format!("@{deprecated}")));
            links.push(format!("<{}>; rel=\"deprecation\"", schema.guide));
            links.push("</v1/schemas>; rel=\"successor-version\"".to_owned());
        }
        if let Some(sunset) = schema.sunset.and_then(http_date) {
            // RFC 8594.
            headers.insert("sunset", header(&sunset));
            links.push(format!("<{}>; rel=\"sunset\"", schema.guide));
        }
        if !links.is_empty() {
            headers.insert(LINK, header(&links.join(", ")));
        }
    }

    /// The answer of `GET /v1/schemas`.
    pub(super) fn listing(self) -> Reply {
        #[derive(Serialize)]
        struct Listing {
            current: u32,
            versions: Vec<Version>,
        }
        #[derive(Serialize)]
        struct Version {
            version: u32,
            status: &'static str,
            since: &'static str,
            deprecated: Option<String>,
            sunset: Option<String>,
            guide: &'static str,
        }
        let day = |seconds: i64| Timestamp::from_second(seconds).ok().map(|at| at.to_string());
        let version = |schema: &Schema| Version {
            version: schema.version,
            status: match schema {
                _ if schema.version == self.current() => "current",
                Schema { deprecated: Some(_), .. } => "deprecated",
                _ => "supported",
            },
            since: schema.since,
            deprecated: schema.deprecated.and_then(day),
            sunset: schema.sunset.and_then(day),
            guide: schema.guide,
        };
        let versions = self.0.iter().map(version).collect();
        let mut reply = json(StatusCode::OK, &Listing { current: self.current(), versions });
        reply.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
        reply
    }
}

/// What a field says: a number, or a text; nothing for null.
fn stated_in(value: Raw<'_>) -> Result<Option<String>, Violation> {
    let text = scalar(value).ok_or_else(|| invalid(value.get()))?;
    Ok(Some(text.into_owned()).filter(|text| !text.is_empty()))
}

fn number(text: &str) -> Result<u32, Violation> {
    text.trim().parse().ok().filter(|version| *version >= FIRST).ok_or_else(|| invalid(text))
}

fn invalid(got: &str) -> Violation {
    Violation {
        reason: RefusalReason::SchemaInvalid,
        field: FIELD.to_owned(),
        got: crate::admission::denied::shown_value(got),
        want: "a whole number from 1 on".into(),
    }
}

/// The value of `version` behind a media type.
fn parameter_of_type(content_type: &str) -> Option<String> {
    content_type.split(';').skip(1).find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        let is_version = name.trim().eq_ignore_ascii_case("version");
        is_version.then(|| value.trim().trim_matches('"').to_owned())
    })
}

fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("it is plain ASCII")
}

/// A time as HTTP writes it.
fn http_date(seconds: i64) -> Option<String> {
    let at = Timestamp::from_second(seconds).ok()?;
    rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&at).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renames what the first version calls `name_of_event`.
    fn renamed(mut item: Fields) -> Fields {
        if let Some(event) = item.remove("name_of_event") {
            item.insert("event".into(), event);
        }
        item
    }

    /// Wraps what the second version has beside the properties.
    fn wrapped(mut item: Fields) -> Fields {
        if let Some(total) = item.remove("total") {
            let properties = format!("{{\"total\":{}}}", total.get());
            item.insert("properties".into(), RawValue::from_string(properties).unwrap());
        }
        item
    }

    const SCHEMA: Schema = Schema {
        version: 3,
        label: "3",
        since: "2026-11-26",
        deprecated: None,
        sunset: None,
        guide: "https://relay.example/3",
        upcast: None,
    };
    static THREE: [Schema; 3] = [
        Schema {
            version: 1,
            deprecated: Some(1_767_225_600),
            sunset: Some(1_830_297_600),
            guide: "https://relay.example/1",
            upcast: Some(renamed),
            ..SCHEMA
        },
        Schema { version: 2, upcast: Some(wrapped), ..SCHEMA },
        SCHEMA,
    ];
    const SCHEMAS: Schemas = Schemas(&THREE);

    fn of_call(
        schemas: Schemas,
        headers: &[(HeaderName, &'static str)],
        query: &str,
        body: &str,
    ) -> Result<Stated, Violation> {
        let headers =
            headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        let body: Option<Box<RawValue>> = (!body.is_empty()).then(|| serde_json::from_str(body).unwrap());
        schemas.of_call(&headers, query, body.as_deref().map(Raw::from))
    }

    #[test]
    fn the_first_place_that_says_a_version_holds() {
        let known = |headers: &[_], query, body| of_call(SCHEMAS, headers, query, body).unwrap();
        let (by_header, by_type) = ((VERSION, "2"), (CONTENT_TYPE, "application/json; Version=\"3\""));
        assert_eq!(known(&[], "", "").version, 1);
        assert_eq!(known(&[], "", "null").version, 1);
        assert_eq!(known(&[], "", "3"), Stated { version: 3, warning: None });
        assert_eq!(known(&[], "a=b&schema_version=2", "").version, 2);
        assert_eq!(known(std::slice::from_ref(&by_type), "", r#""3""#), Stated { version: 3, warning: None });
        let both = known(&[by_header, by_type], "", "3");
        assert_eq!(both.version, 2);
        assert!(both.warning.unwrap().ends_with("2 holds"));
        assert!(known(&[], "", "1").warning.unwrap().contains("deprecated"), "3 is current");
        for bad in ["0", "-1", "1.5", r#""x""#, "[1]", "99999999999"] {
            let violation = of_call(SCHEMAS, &[], "", bad).unwrap_err();
            assert_eq!(violation.reason, RefusalReason::SchemaInvalid, "{bad}");
        }
        let newer = of_call(Schemas::KNOWN, &[], "", "7").unwrap();
        assert_eq!((newer.version, newer.warning), (7, None));
    }

    /// One version after the other; what none of them knows stays, to the digit.
    #[test]
    fn an_older_item_becomes_a_current_one() {
        let first =
            r#"{"name_of_event":"Order Placed","total":12345678901234567890.10,"later":{"a":[1e400]}}"#;
        let third = r#"{"event":"Order Placed","later":{"a":[1e400]},"properties":{"total":12345678901234567890.10}}"#;
        assert_eq!(SCHEMAS.upcast(first, 1).unwrap().as_deref(), Some(third));
        let second = first.replace("name_of_event", "event");
        let second = second.replace('{', "{\"schemaVersion\":2,");
        let second = second.replace("\"later\":{\"schemaVersion\":2,", "\"later\":{");
        assert_eq!(SCHEMAS.upcast(&second, 2).unwrap().as_deref(), Some(third));
        assert_eq!(SCHEMAS.upcast(third, 3), Ok(None));
        assert_eq!(SCHEMAS.upcast("[1]", 1), Ok(None), "it is refused as what it is");
        let newer = SCHEMAS.upcast(third, 4).unwrap_err();
        assert_eq!((newer.reason, newer.want.as_str()), (RefusalReason::SchemaNewer, "1, 2, 3"));
        let own: Box<RawValue> = serde_json::from_str("2").unwrap();
        assert_eq!(Schemas::of_item(Some((&*own).into()), 1), Ok(2));
        assert_eq!(Schemas::of_item(None, 3), Ok(3));
    }

    #[test]
    fn who_sends_a_version_that_goes_is_told_when() {
        let mut reply = SCHEMAS.listing();
        SCHEMAS.tell(1, &mut reply);
        for (name, value) in [
            ("x-schema-version", "1"),
            ("deprecation", "@1767225600"),
            ("sunset", "Sat, 01 Jan 2028 00:00:00 GMT"),
            (
                "link",
                "<https://relay.example/1>; rel=\"deprecation\", </v1/schemas>; rel=\"successor-version\", \
                 <https://relay.example/1>; rel=\"sunset\"",
            ),
        ] {
            assert_eq!(reply.headers()[name], value, "{name}");
        }
        let mut reply = Schemas::KNOWN.listing();
        Schemas::KNOWN.tell(1, &mut reply);
        assert!(!reply.headers().contains_key("deprecation"));
    }

    /// Numbers without a gap, one current, and a way from each to the next.
    #[test]
    fn the_versions_of_this_relay_lead_to_the_current_one() {
        for (place, schema) in KNOWN.iter().enumerate() {
            assert_eq!((schema.version as usize, schema.label), (place + 1, &*(place + 1).to_string()));
            assert_eq!(schema.upcast.is_some(), place + 1 < KNOWN.len());
            assert!(schema.sunset.is_none() || schema.sunset > schema.deprecated);
        }
    }
}
