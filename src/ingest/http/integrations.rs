//! `integrations`: which of its destinations an event is for.

use std::collections::BTreeMap;

use analytics_relay_providers::event::Audience;

use super::json::object;
use crate::{
    admission::denied::{Violation, shown_value},
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

/// What one or several such objects say; the later wins over the earlier. A destination
/// that this relay does not have changes nothing.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    /// Those that are not named.
    all: bool,
    named: BTreeMap<&'static str, bool>,
}

impl Default for Wanted {
    fn default() -> Self {
        Self { all: true, named: BTreeMap::new() }
    }
}

impl Wanted {
    /// The same, with what one more object says.
    pub(super) fn and(mut self, json: &str, destinations: &Destinations) -> Result<Self, Violation> {
        for (destination, value) in object(json).ok_or_else(|| not_object(json))? {
            // An object holds options, and so it is meant for it.
            let is_for = !matches!(value.get(), "false" | "null");
            if destination.eq_ignore_ascii_case("all") {
                self.all = is_for;
            } else if let Some(provider) = destinations.named(&destination) {
                self.named.insert(provider, is_for);
            }
        }
        Ok(self)
    }

    /// Who gets the event.
    pub(super) fn audience(&self) -> Audience<'static> {
        let those = |is_for: bool| {
            let names = self.named.iter().filter(|(_, it)| **it == is_for).map(|(name, _)| *name);
            names.collect::<Vec<_>>().join(",")
        };
        match (self.all, those(false)) {
            (false, _) => Audience::Only(those(true).into()),
            (true, names) if names.is_empty() => Audience::All,
            (true, names) => Audience::AllBut(names.into()),
        }
    }
}

fn not_object(json: &str) -> Violation {
    Violation {
        reason: RefusalReason::IntegrationsMalformed,
        field: "integrations".into(),
        got: shown_value(json),
        want: "an object of destinations, as in {\"All\":true,\"Mixpanel\":false}".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audience<const N: usize>(
        objects: [&str; N],
        destinations: &Destinations,
    ) -> Result<Audience<'static>, Violation> {
        let read = |wanted: Wanted, json| wanted.and(json, destinations);
        objects.into_iter().try_fold(Wanted::default(), read).map(|wanted| wanted.audience())
    }

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
