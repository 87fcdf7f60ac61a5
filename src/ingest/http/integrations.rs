//! `integrations`: which of its destinations an event is for.

use std::{borrow::Cow, collections::BTreeMap};

use analytics_relay_providers::event::Audience;
use serde_json::value::RawValue;

use crate::{
    admission::denied::{Violation, shown},
    reasons::RefusalReason,
};

/// The names of the providers that this relay has.
#[derive(Debug, Clone, Default)]
pub(super) struct Destinations(Vec<&'static str>);

impl Destinations {
    pub(super) fn new(providers: impl IntoIterator<Item = &'static str>) -> Self {
        Self(providers.into_iter().collect())
    }

    /// The provider that a destination of Segment's is, by any of its names there:
    /// `Mixpanel`, `Mixpanel (Actions)`, `Actions Mixpanel`, `Segment.io`.
    fn named(&self, destination: &str) -> Option<&'static str> {
        let name = destination.to_ascii_lowercase();
        let name = name.strip_prefix("actions ").unwrap_or(&name);
        let end = name.find([' ', '.', '(']).unwrap_or(name.len());
        self.0.iter().copied().find(|provider| *provider == &name[..end])
    }
}

/// The audience that one or several such objects name; the later wins over the earlier.
/// A destination that this relay does not have changes nothing.
pub(super) fn audience<const N: usize>(
    objects: [&str; N],
    destinations: &Destinations,
) -> Result<Audience<'static>, Violation> {
    let (mut all, mut named) = (true, BTreeMap::new());
    for json in objects {
        let object: BTreeMap<Cow<'_, str>, &RawValue> =
            serde_json::from_str(json).map_err(|_| not_object(json))?;
        for (destination, value) in object {
            // An object holds options, and so it is meant for it.
            let is_for = !matches!(value.get(), "false" | "null");
            if destination.eq_ignore_ascii_case("all") {
                all = is_for;
            } else if let Some(provider) = destinations.named(&destination) {
                named.insert(provider, is_for);
            }
        }
    }
    let those = |is_for: bool| {
        let names: Vec<_> = named.iter().filter(|(_, it)| **it == is_for).map(|(name, _)| *name).collect();
        names.join(",")
    };
    Ok(match (all, those(false)) {
        (false, _) => Audience::Only(those(true).into()),
        (true, names) if names.is_empty() => Audience::All,
        (true, names) => Audience::AllBut(names.into()),
    })
}

fn not_object(json: &str) -> Violation {
    Violation {
        reason: RefusalReason::IntegrationsMalformed,
        field: "integrations".into(),
        got: shown(json),
        want: "an object of destinations, as in {\"All\":true,\"Mixpanel\":false}".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integrations_name_who_gets_an_event() {
        let destinations = Destinations::new(["mixpanel", "amplitude", "segment"]);
        let all = || Audience::All;
        for (json, audience_is) in [
            ("{}", all()),
            (r#"{"All":true}"#, all()),
            (r#"{"Mixpanel":true,"Braze":false}"#, all()),
            (r#"{"All":true,"Mixpanel":false}"#, Audience::AllBut("mixpanel".into())),
            (
                r#"{"Amplitude (Actions)":false,"Segment.io":false}"#,
                Audience::AllBut("amplitude,segment".into()),
            ),
            (r#"{"All":false,"Amplitude":{"session_id":1}}"#, Audience::Only("amplitude".into())),
            (r#"{"all":false}"#, Audience::Only("".into())),
        ] {
            assert_eq!(audience([json], &destinations).unwrap(), audience_is, "{json}");
        }
        let both = [r#"{"All":false,"Mixpanel":true}"#, r#"{"Mixpanel":false,"Segment":true}"#];
        assert_eq!(audience(both, &destinations).unwrap(), Audience::Only("segment".into()));
        assert!(audience(["[]"], &destinations).is_err());
        assert!(!audience([r#"{"All":false}"#], &destinations).unwrap().includes("mixpanel"));
    }
}
