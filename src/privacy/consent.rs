//! Who gets an event, as far as its user has a say: categories of consent → providers.
//!
//! Two objects of a context are read, and if both are there, both have to agree.
//!
//! | object | a category is consented to |
//! |---|---|
//! | Segment's `consent.categoryPreferences` | if it is `true` there; what is not named is refused |
//! | RudderStack's `consentManagement` | if it is in `allowedConsentIds`, where that is a list, and not in `deniedConsentIds` |
//!
//! A provider gets an event if all of its categories are consented to (of RudderStack's, if
//! its `resolutionStrategy` is `or`, one of them). One that no category names is not asked
//! for. This comes before `integrations`, which can only take more away. Segment's rules are
//! those of its page "Consent in Segment Connections", RudderStack's those of "Add the
//! consent object to event payloads", both read 2026-11-26.

use std::collections::BTreeMap;

use analytics_relay_providers::event::Audience;
use serde::Deserialize;
use serde_json::Value;

/// The categories of each provider that has some.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Consent {
    /// An event without consent goes to no provider that has a category.
    pub(super) missing_is_refused: bool,
    pub(super) categories: BTreeMap<String, Vec<String>>,
}

/// What an event says about it.
#[derive(Debug, PartialEq)]
enum Stated {
    Nothing,
    /// It names an object, and says nothing in it.
    Empty,
    /// Each must agree that is there.
    Some {
        segment: Option<BTreeMap<String, Value>>,
        rudder: Option<Rudder>,
    },
}

#[derive(Debug, PartialEq)]
struct Rudder {
    allowed: Option<Vec<String>>,
    denied: Vec<String>,
    one_is_enough: bool,
}

impl Consent {
    /// The providers by their categories.
    pub(super) fn new(missing_is_refused: bool, providers: &BTreeMap<String, Vec<String>>) -> Self {
        let mut categories: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (category, names) in providers {
            for name in names {
                categories.entry(name.clone()).or_default().push(category.clone());
            }
        }
        Self { missing_is_refused, categories }
    }

    /// The providers to which the user of an event does not consent, by its context. The
    /// audience is that of its `integrations`.
    pub(super) fn refused(&self, context: Option<&str>, audience: &Audience<'_>) -> Vec<&str> {
        let stated = context.map_or(Stated::Nothing, Stated::read);
        let has_categories = |is_consented: &dyn Fn(&[String]) -> bool| {
            let refused = self.categories.iter().filter(|(_, categories)| !is_consented(categories));
            refused.map(|(provider, _)| provider.as_str()).collect()
        };
        match stated {
            Stated::Nothing => has_categories(&|_| !self.missing_is_refused),
            // Segment tells an empty object from none only beside `integrations`.
            Stated::Empty => has_categories(&|_| !self.missing_is_refused && *audience == Audience::All),
            Stated::Some { segment, rudder } => has_categories(&|categories| {
                let by_segment = |preferences: &BTreeMap<String, Value>| {
                    categories.iter().all(|category| preferences.get(category) == Some(&Value::Bool(true)))
                };
                segment.as_ref().is_none_or(by_segment)
                    && rudder.as_ref().is_none_or(|rudder| rudder.consents(categories))
            }),
        }
    }
}

impl Rudder {
    fn consents(&self, categories: &[String]) -> bool {
        let is_consented = |category: &String| {
            let is_allowed = self.allowed.as_ref().is_none_or(|allowed| allowed.contains(category));
            is_allowed && !self.denied.contains(category)
        };
        match self.one_is_enough {
            true => categories.iter().any(is_consented),
            false => categories.iter().all(is_consented),
        }
    }

    /// Nothing of an object that holds no list.
    fn read(object: &Value) -> Option<Self> {
        // An earlier form has an object for what is allowed: it says nothing here.
        let allowed = object.get("allowedConsentIds").and_then(texts);
        let denied = object.get("deniedConsentIds").and_then(texts);
        if allowed.is_none() && denied.is_none() {
            return None;
        }
        let strategy = object.get("resolutionStrategy").and_then(Value::as_str).unwrap_or_default();
        let one_is_enough = ["or", "any"].iter().any(|or| strategy.eq_ignore_ascii_case(or));
        Some(Self { allowed, denied: denied.unwrap_or_default(), one_is_enough })
    }
}

fn texts(value: &Value) -> Option<Vec<String>> {
    let items = value.as_array()?.iter();
    Some(items.filter_map(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned).collect())
}

impl Stated {
    /// By a context's JSON.
    fn read(context: &str) -> Self {
        #[derive(Default, Deserialize)]
        struct Objects {
            #[serde(default)]
            consent: Option<Value>,
            #[serde(default, rename = "consentManagement")]
            rudder: Option<Value>,
        }
        let Objects { consent, rudder } = serde_json::from_str(context).unwrap_or_default();
        let is_there = consent.is_some() || rudder.is_some();
        let segment = consent.and_then(|consent| match consent {
            Value::Object(mut consent) => consent.remove("categoryPreferences").map(preferences),
            // What says nothing that is understood consents to nothing.
            _ => Some(BTreeMap::new()),
        });
        let rudder = rudder.as_ref().and_then(Rudder::read);
        match (segment, rudder) {
            (None, None) if is_there => Self::Empty,
            (None, None) => Self::Nothing,
            (segment, rudder) => Self::Some { segment, rudder },
        }
    }
}

fn preferences(value: Value) -> BTreeMap<String, Value> {
    match value {
        Value::Object(preferences) => preferences.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ALL: [&str; 4] = ["facebook", "google-ads", "amplitude", "store"];

    fn consent(categories: &Value) -> Consent {
        let categories = serde_json::from_value(categories.clone()).unwrap();
        Consent::new(false, &categories)
    }

    /// Who gets an event, of all four.
    fn gets(consent: &Consent, context: &Value, integrations: &Audience<'_>) -> Vec<&'static str> {
        let context = context.to_string();
        let refused = consent.refused(Some(&context), integrations);
        let audience = integrations.without_consent_to(&refused);
        ALL.into_iter().filter(|provider| audience.includes(provider)).collect()
    }

    fn segment(preferences: &Value) -> Value {
        json!({ "consent": { "categoryPreferences": preferences } })
    }

    /// Segment's own table of consent beside `integrations`, row by row.
    #[test]
    fn segments_table_row_by_row() {
        let ad = json!({ "ad": ["facebook", "google-ads"] });
        let both = json!({ "ad": ["facebook", "google-ads"], "analytics": ["amplitude"] });
        let shared = json!({ "ad": ["facebook", "google-ads"], "analytics": ["facebook", "amplitude"] });
        let no_amplitude = || Audience::AllBut("amplitude".into());
        let neither = || Audience::AllBut("facebook,amplitude".into());
        let (yes_no, yes_yes, no_yes) = (
            segment(&json!({ "ad": true, "analytics": false })),
            segment(&json!({ "ad": true, "analytics": true })),
            segment(&json!({ "ad": false, "analytics": true })),
        );
        let rows: [(&str, &Value, Value, Audience<'_>, &[&str]); 13] = [
            ("not provided", &both, json!({}), Audience::All, &ALL),
            ("an empty object", &both, json!({ "consent": {} }), Audience::All, &ALL),
            ("empty preferences", &both, segment(&json!({})), Audience::All, &["store"]),
            (
                "not provided, integrations",
                &both,
                json!({}),
                no_amplitude(),
                &["facebook", "google-ads", "store"],
            ),
            ("an empty object, integrations", &both, json!({ "consent": {} }), no_amplitude(), &["store"]),
            ("empty preferences, integrations", &both, segment(&json!({})), no_amplitude(), &["store"]),
            ("nothing is mapped", &json!({}), yes_no.clone(), Audience::All, &ALL),
            ("ad is mapped", &ad, yes_no.clone(), Audience::All, &ALL),
            ("both are mapped", &both, yes_no.clone(), no_amplitude(), &["facebook", "google-ads", "store"]),
            ("and facebook is not wanted", &both, yes_no.clone(), neither(), &["google-ads", "store"]),
            ("facebook is in both", &shared, yes_no, no_amplitude(), &["google-ads", "store"]),
            ("both are true", &shared, yes_yes, no_amplitude(), &["facebook", "google-ads", "store"]),
            ("only analytics is true", &shared, no_yes, no_amplitude(), &["store"]),
        ];
        for (row, categories, context, integrations, want) in rows {
            assert_eq!(gets(&consent(categories), &context, &integrations), want, "{row}");
        }
    }

    #[test]
    fn only_true_is_consent_and_names_are_as_they_are() {
        let ad = consent(&json!({ "ad": ["facebook"] }));
        for preferences in [
            json!({ "ad": "true" }),
            json!({ "ad": 1 }),
            json!({ "ad": null }),
            json!({ "AD": true }),
            json!({ "analytics": true }),
            json!([]),
            json!(true),
        ] {
            assert_eq!(
                ad.refused(Some(&segment(&preferences).to_string()), &Audience::All),
                ["facebook"],
                "{preferences}"
            );
        }
        for context in [json!({ "consent": true }), json!({ "consent": [] })] {
            assert_eq!(ad.refused(Some(&context.to_string()), &Audience::All), ["facebook"], "{context}");
        }
        assert!(ad.refused(Some(r#"{"consent":null}"#), &Audience::All).is_empty());
    }

    #[test]
    fn rudders_object_denies_and_allows() {
        let shared =
            consent(&json!({ "ad": ["facebook", "google-ads"], "analytics": ["facebook", "amplitude"] }));
        let rows: [(Value, &[&str]); 11] = [
            (json!({}), &ALL),
            (json!({ "provider": "custom" }), &ALL),
            (json!({ "deniedConsentIds": [] }), &ALL),
            (json!({ "deniedConsentIds": ["analytics"] }), &["google-ads", "store"]),
            (
                json!({ "deniedConsentIds": ["analytics"], "resolutionStrategy": "and" }),
                &["google-ads", "store"],
            ),
            (
                json!({ "deniedConsentIds": ["analytics"], "resolutionStrategy": "or", "provider": "ketch" }),
                &["facebook", "google-ads", "store"],
            ),
            (json!({ "deniedConsentIds": ["ad", "analytics"], "resolutionStrategy": "any" }), &["store"]),
            (json!({ "allowedConsentIds": ["ad"], "deniedConsentIds": [] }), &["google-ads", "store"]),
            (json!({ "allowedConsentIds": [], "deniedConsentIds": [] }), &["store"]),
            (
                json!({ "allowedConsentIds": ["ad", "analytics"], "deniedConsentIds": ["ad"] }),
                &["amplitude", "store"],
            ),
            // As its SDKs had it before: categories by names, which is no list.
            (
                json!({ "allowedConsentIds": { "ad": "x" }, "deniedConsentIds": ["ad"] }),
                &["amplitude", "store"],
            ),
        ];
        for (object, want) in rows {
            let context = json!({ "consentManagement": object });
            assert_eq!(gets(&shared, &context, &Audience::All), want, "{context}");
        }
    }

    #[test]
    fn of_two_objects_both_have_to_agree() {
        let both = consent(&json!({ "ad": ["facebook"], "analytics": ["amplitude"] }));
        let context = json!({
            "consent": { "categoryPreferences": { "ad": true, "analytics": false } },
            "consentManagement": { "deniedConsentIds": ["ad"] }
        });
        assert_eq!(gets(&both, &context, &Audience::All), ["google-ads", "store"]);
    }

    #[test]
    fn what_is_missing_is_refused_where_it_has_to_be_there() {
        let strict = Consent { missing_is_refused: true, ..consent(&json!({ "ad": ["facebook"] })) };
        for context in [None, Some("{}"), Some(r#"{"consent":{}}"#), Some("no JSON")] {
            assert_eq!(strict.refused(context, &Audience::All), ["facebook"], "{context:?}");
        }
        let given = segment(&json!({ "ad": true })).to_string();
        assert!(strict.refused(Some(&given), &Audience::All).is_empty());
    }
}
