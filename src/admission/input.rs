//! The strict rules of what callers write, and counts of what looks like an attack. Off
//! unless the operator wants them, and then they cost nothing.
//!
//! Nothing is ever rewritten: an event is taken as it is, or refused. What is dangerous in
//! some place is bound or escaped in that place.

use std::fmt::Write;

use aho_corasick::AhoCorasick;
use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};

use super::{
    context::Door,
    denied::{Violation, shown},
    draft::{Draft, DraftKind},
};
use crate::{
    characters::{is_control, is_turning, is_unseen},
    reasons::{RefusalReason, Suspicion},
    settings::Reader,
};

/// Longest way to a value that a refusal names.
const FIELD_CHARS_MAX: usize = 200;

/// What is asked of callers' texts, beyond what every event has to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InputSettings {
    /// What cannot be seen is refused, and names have plain characters.
    pub is_strict: bool,
    /// What looks like an attack is counted.
    pub counts_suspicious: bool,
}

impl InputSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        Self {
            is_strict: reader.one_of("INPUT_RULES", &[("lenient", false), ("strict", true)]),
            counts_suspicious: reader.one_of("INPUT_SUSPICIOUS", &[("off", false), ("count", true)]),
        }
    }
}

/// The rules, ready to be held against events.
#[derive(Debug, Default)]
pub(super) struct InputRules {
    is_strict: bool,
    /// What each kind of attack is known by, if they are counted.
    attacks: Option<Box<Attacks>>,
}

impl InputRules {
    pub(super) fn new(settings: InputSettings) -> Self {
        let attacks = settings.counts_suspicious.then(|| Box::new(Attacks::new()));
        Self { is_strict: settings.is_strict, attacks }
    }

    /// The rules that a draft breaks; none unless they are strict.
    #[inline]
    pub(super) fn violations(&self, draft: &Draft<'_>, door: Door) -> Vec<Violation> {
        if self.is_strict { strict_violations(draft, door) } else { Vec::new() }
    }

    /// What of a draft looks like an attack; nothing unless that is counted.
    #[inline]
    pub(super) fn suspicions(&self, draft: &Draft<'_>) -> Suspicions {
        self.attacks.as_ref().map_or_else(Suspicions::default, |attacks| attacks.of(draft))
    }
}

/// Each text of a draft is looked at until it breaks a rule.
fn strict_violations(draft: &Draft<'_>, door: Door) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut note = |violation: Option<Violation>| violations.extend(violation);
    match &draft.kind {
        DraftKind::Track { event_name } => note(bad_name("event_name", event_name)),
        DraftKind::Page(view) | DraftKind::Screen(view) => {
            note(bad_name("name", &view.name));
            note(bad_name("category", &view.category));
        }
        DraftKind::Group { group_id } => note(bad_id("group_id", group_id)),
        DraftKind::Alias { previous_id } => note(bad_id("previous_id", previous_id)),
        DraftKind::Identify => {}
    }
    for (field, id) in
        [("event_id", &draft.event_id), ("user_id", &draft.user_id), ("anonymous_id", &draft.anonymous_id)]
    {
        note(bad_id(field, id));
    }
    note(bad_value("context.user_agent", &draft.user_agent));
    let (about_somebody, context) = match door {
        Door::Http => ("traits", "context"),
        Door::Grpc => ("properties", "context.json"),
    };
    let is_about_somebody = matches!(draft.kind, DraftKind::Identify | DraftKind::Group { .. });
    let properties = if is_about_somebody { about_somebody } else { "properties" };
    note(draft.properties.as_ref().ok().and_then(|it| bad_json(properties, it.json())));
    if let Some(more) = &draft.more {
        note(bad_id("session_id", &more.session_id));
        let of_context = more.context.as_ref().and_then(|it| it.as_ref().ok());
        note(of_context.and_then(|it| bad_json(context, it.json())));
    }
    violations
}

/// A name is what people type: letters that have no twins that look alike.
fn bad_name(field: &str, name: &str) -> Option<Violation> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, ' ' | '_' | '.' | ':' | '$' | '-');
    refused(field, name, |c| !is_plain(c), "letters and digits of ASCII, blanks and any of _ . : $ -")
}

fn bad_id(field: &str, id: &str) -> Option<Violation> {
    refused(field, id, is_unseen, "no control characters, none without width or that say a direction")
}

fn bad_value(field: &str, value: &str) -> Option<Violation> {
    let is_bad = |c| is_control(c) && !matches!(c, '\t' | '\n' | '\r') || is_turning(c);
    refused(
        field,
        value,
        is_bad,
        "no control characters but tabs and newlines, none that turn the direction of writing",
    )
}

fn refused(field: &str, text: &str, is_bad: impl Fn(char) -> bool, want: &str) -> Option<Violation> {
    let (place, c) = text.chars().enumerate().find(|(_, c)| is_bad(*c))?;
    Some(violation(
        field,
        format!("{}, with U+{:04X} as character {}", shown(text), u32::from(c), place + 1),
        want,
    ))
}

fn violation(field: &str, got: String, want: &str) -> Violation {
    let mut shown: String = field.chars().take(FIELD_CHARS_MAX).collect();
    if shown.len() < field.len() {
        shown.push('…');
    }
    Violation { reason: RefusalReason::InputRefused, field: shown, got, want: want.to_owned() }
}

/// The first name or text in some JSON that breaks a rule.
fn bad_json(field: &str, json: &str) -> Option<Violation> {
    // What cannot be bad by its bytes is most of what comes. Any other may be: behind an
    // escape, or by what bad characters begin with in UTF-8.
    let may_be_bad = |byte: &u8| matches!(byte, b'\\' | 0x7F | 0xC2 | 0xD8 | 0xE1 | 0xE2 | 0xEF);
    if !json.as_bytes().iter().any(may_be_bad) {
        return None;
    }
    let mut walk = Walk { path: field.to_owned(), found: None };
    let read = walk.deserialize(&mut serde_json::Deserializer::from_str(json));
    let unread = |error| violation(field, format!("{error}"), "what can be looked at");
    walk.found.or_else(|| read.err().map(unread))
}

/// Where one is in some JSON, and what was found; then the rest is not read.
struct Walk {
    path: String,
    found: Option<Violation>,
}

impl Walk {
    fn note<E: Error>(&mut self, violation: Option<Violation>) -> Result<(), E> {
        self.found = violation;
        if self.found.is_some() { Err(E::custom("a rule is broken")) } else { Ok(()) }
    }
}

impl<'de> DeserializeSeed<'de> for &mut Walk {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Walk {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.note(bad_value(&self.path, text))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let here = self.path.len();
        while let Some(name) = map.next_key::<String>()? {
            self.note(bad_id(&self.path, &name))?;
            self.path.push('.');
            self.path.push_str(&name);
            map.next_value_seed(&mut *self)?;
            self.path.truncate(here);
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let here = self.path.len();
        for place in 0usize.. {
            write!(self.path, "[{place}]").map_err(A::Error::custom)?;
            if list.next_element_seed(&mut *self)?.is_none() {
                break;
            }
            self.path.truncate(here);
        }
        self.path.truncate(here);
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// The kinds of attack that one event looks like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Suspicions(u8);

impl Suspicions {
    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) fn each(self) -> impl Iterator<Item = Suspicion> {
        Suspicion::ALL.into_iter().filter(move |kind| self.0 >> *kind as u8 & 1 == 1)
    }
}

/// What each kind is known by, in JSON as it stands and whatever its case.
const SIGNS: [(Suspicion, &[&str]); 3] = [
    (
        Suspicion::Sql,
        &[
            "' or '",
            "' or 1=1",
            "'; drop ",
            "; drop table",
            "union select",
            "union all select",
            "'--",
            "' --",
            "information_schema",
            "xp_cmdshell",
            "pg_sleep(",
            "waitfor delay",
        ],
    ),
    (
        Suspicion::Html,
        &[
            "<script",
            "</script",
            "\\u003cscript",
            "<iframe",
            "<svg",
            "javascript:",
            "onerror=",
            "onload=",
            "<img ",
        ],
    ),
    (Suspicion::Path, &["../", "..\\", "..%2f", "%2e%2e%2f", "/etc/passwd", "\\windows\\\\system32"]),
];

/// All signs, looked for at once.
#[derive(Debug)]
struct Attacks {
    signs: AhoCorasick,
    /// Of each sign.
    kinds: Vec<Suspicion>,
}

impl Attacks {
    fn new() -> Self {
        let each = || SIGNS.iter().flat_map(|(kind, signs)| signs.iter().map(|sign| (*kind, *sign)));
        let signs = AhoCorasick::builder().ascii_case_insensitive(true).build(each().map(|(_, sign)| sign));
        Self { signs: signs.expect("they are few and short"), kinds: each().map(|(kind, _)| kind).collect() }
    }

    fn of(&self, draft: &Draft<'_>) -> Suspicions {
        let mut found = Suspicions::default();
        let mut look_at = |text: &str| {
            for sign in self.signs.find_overlapping_iter(text) {
                found.0 |= 1 << self.kinds[sign.pattern().as_usize()] as u8;
            }
        };
        match &draft.kind {
            DraftKind::Track { event_name } => look_at(event_name),
            DraftKind::Page(view) | DraftKind::Screen(view) => {
                look_at(&view.name);
                look_at(&view.category);
            }
            DraftKind::Group { group_id: id } | DraftKind::Alias { previous_id: id } => look_at(id),
            DraftKind::Identify => {}
        }
        [&draft.user_id, &draft.anonymous_id, &draft.user_agent].into_iter().for_each(|text| look_at(text));
        if let Ok(properties) = &draft.properties {
            look_at(properties.json());
        }
        if let Some(Some(Ok(context))) = draft.more.as_ref().map(|more| &more.context) {
            look_at(context.json());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::{
        Properties,
        event::{Audience, JsonObject},
        properties::Limits,
    };

    use super::{
        super::{
            draft::{More, View},
            tests::draft,
        },
        *,
    };

    fn strict(door: Door, change: impl FnOnce(&mut Draft<'static>)) -> Vec<(String, String)> {
        let mut draft = draft();
        change(&mut draft);
        let rules = InputRules::new(InputSettings { is_strict: true, counts_suspicious: false });
        assert_eq!(
            InputRules::default().violations(&draft, door),
            [],
            "nothing is asked unless it is wanted"
        );
        let violations = rules.violations(&draft, door);
        assert!(
            violations
                .iter()
                .all(|it| it.reason == RefusalReason::InputRefused && !it.got.contains('\u{202e}'))
        );
        violations.into_iter().map(|it| (it.field, it.got)).collect()
    }

    fn fields(change: impl FnOnce(&mut Draft<'static>)) -> Vec<String> {
        strict(Door::Http, change).into_iter().map(|(field, _)| field).collect()
    }

    fn more() -> Box<More<'static>> {
        More { session_id: "".into(), audience: Audience::All, context: None, edge: Default::default() }
            .into()
    }

    fn properties(json: &'static str) -> Properties<'static> {
        Properties::parse(json, &Limits::DEFAULT).unwrap()
    }

    #[test]
    fn names_have_plain_characters() {
        for name in ["Order Placed", "$pageview", "app.v2:Sign-up_1", " "] {
            assert_eq!(
                fields(|draft| draft.kind = DraftKind::Track { event_name: name.into() }),
                [""; 0],
                "{name}"
            );
        }
        for name in [
            "Bestellung übermittelt",
            "a\tb",
            "<script>",
            "it's",
            "a/b",
            "\u{202e}x",
            "a\u{200b}b",
            "日本",
            "\0",
        ] {
            let found = fields(|draft| draft.kind = DraftKind::Track { event_name: name.into() });
            assert_eq!(found, ["event_name"], "{name:?}");
        }
        let found = fields(|draft| {
            draft.kind = DraftKind::Page(Box::new(View { name: "a\nb".into(), category: "c|d".into() }));
        });
        assert_eq!(found, ["name", "category"]);
    }

    #[test]
    fn ids_have_nothing_that_cannot_be_seen() {
        for id in ["user-1", "ünï|c/ode'", "a b", "日本@x.example"] {
            assert_eq!(fields(|draft| draft.user_id = id.into()), [""; 0], "{id}");
        }
        for bad in
            ["\t", "\n", "\0", "\u{7f}", "\u{85}", "\u{202e}", "\u{2066}", "\u{200e}", "\u{200b}", "\u{feff}"]
        {
            let id = format!("a{bad}b");
            let found = fields(|draft| {
                draft.user_id = id.clone().into();
                draft.anonymous_id = id.clone().into();
                draft.event_id = id.clone().into();
                draft.kind = DraftKind::Group { group_id: id.clone().into() };
                draft.more = Some(Box::new(More { session_id: id.clone().into(), ..*more() }));
            });
            assert_eq!(found, ["group_id", "event_id", "user_id", "anonymous_id", "session_id"], "{bad:?}");
            let alias = fields(|draft| draft.kind = DraftKind::Alias { previous_id: id.clone().into() });
            assert_eq!(alias, ["previous_id"]);
        }
    }

    #[test]
    fn names_and_texts_of_properties_are_looked_at_however_they_are_written() {
        for good in [
            r#"{"a":"tab\tand\nnewline\r\n","b":["عربي\u200f","👩‍👩‍👧","\u00e9\\u202e"],"ü":1e3}"#,
            r#"{"deep":{"a":[[{"b":"<script>' OR 1=1--"}]]},"n":null,"t":true,"i":-1,"u":18446744073709551615}"#,
        ] {
            assert_eq!(fields(|draft| draft.properties = Ok(properties(good))), [""; 0], "{good}");
        }
        for (bad, field) in [
            (r#"{"a":"x\u0000"}"#, "properties.a"),
            (r#"{"a":"x\b"}"#, "properties.a"),
            (r#"{"a":{"b":["ok",["\u202e"]]}}"#, "properties.a.b[1][0]"),
            ("{\"a\":[1,{\"b\":\"\u{9b}31m\"}]}", "properties.a[1].b"),
            ("{\"a\":\"\u{7f}\"}", "properties.a"),
            ("{\"a\":\"\u{2067}\"}", "properties.a"),
            (r#"{"cart":{"a\u200bb":1}}"#, "properties.cart"),
            (r#"{"a\tb":1}"#, "properties"),
            ("{\"\u{feff}a\":1}", "properties"),
            ("{\"a\u{ad}\":1}", "properties"),
            ("{\"\u{180e}\":1,\"b\":\"\u{202e}\"}", "properties"),
            ("{\"\u{61c}\":1}", "properties"),
        ] {
            assert_eq!(fields(|draft| draft.properties = Ok(properties(bad))), [field], "{bad}");
        }
    }

    #[test]
    fn a_refusal_names_the_field_of_its_door_and_the_character() {
        let bad = || JsonObject::from(properties(r#"{"page":{"title":"\u0007"}}"#));
        for (door, want) in [
            (Door::Http, ["context.user_agent", "traits.a", "context.page.title"]),
            (Door::Grpc, ["context.user_agent", "properties.a", "context.json.page.title"]),
        ] {
            let found = strict(door, |draft| {
                draft.kind = DraftKind::Identify;
                draft.user_agent = "x\u{1b}".into();
                draft.properties = Ok(properties(r#"{"a":"\u001b[2J"}"#));
                draft.more = Some(Box::new(More { context: Some(Ok(bad())), ..*more() }));
            });
            let fields: Vec<_> = found.iter().map(|(field, _)| &**field).collect();
            assert_eq!(fields, want);
            assert_eq!(found[1].1, r#""\u{1b}[2J", with U+001B as character 1"#);
        }
        let long = "k".repeat(300);
        let json = format!(r#"{{"{long}":"\u0000"}}"#);
        let found = fields(|draft| {
            draft.properties = Ok(Properties::parse(&json, &Limits::DEFAULT).unwrap().into_owned())
        });
        assert_eq!(found[0].chars().count(), FIELD_CHARS_MAX + 1);
    }

    #[test]
    fn what_looks_like_an_attack_is_counted_by_kind() {
        let rules = InputRules::new(InputSettings { is_strict: false, counts_suspicious: true });
        let kinds = |change: &dyn Fn(&mut Draft<'static>)| {
            let mut draft = draft();
            change(&mut draft);
            assert!(InputRules::default().suspicions(&draft).is_empty());
            assert_eq!(rules.violations(&draft, Door::Http), [], "it is only counted");
            rules.suspicions(&draft).each().map(Suspicion::name).collect::<Vec<_>>()
        };
        assert_eq!(kinds(&|_| {}), [""; 0]);
        assert_eq!(kinds(&|draft| draft.user_id = "x' OR '1'='1".into()), ["sql"]);
        assert_eq!(
            kinds(&|draft| draft.properties = Ok(properties(r#"{"q":"<SCRIPT>","f":"..\/../x"}"#))),
            ["html", "path"]
        );
        assert_eq!(
            kinds(&|draft| draft.properties = Ok(properties(r#"{"q":"1 UNION SELECT","h":"\u003Cscript"}"#))),
            ["sql", "html"]
        );
        assert_eq!(kinds(&|draft| draft.properties = Ok(properties(r#"{"p":"..\\..\\x"}"#))), ["path"]);
        let of_context = |draft: &mut Draft<'static>| {
            let context = JsonObject::from(properties(r#"{"page":{"url":"javascript:alert(1)"}}"#));
            draft.more = Some(Box::new(More { context: Some(Ok(context)), ..*more() }));
        };
        assert_eq!(kinds(&of_context), ["html"]);
        for name in ["O'Reilly", "union of two", "a -- b", "1 < 2", "wait...", "Imagine"] {
            assert_eq!(
                kinds(&|draft| draft.kind = DraftKind::Track { event_name: name.into() }),
                [""; 0],
                "{name}"
            );
        }
    }
}
