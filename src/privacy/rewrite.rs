//! Takes out of JSON what rules forbid, at any depth, and leaves every other byte as it is.
//!
//! Names are looked for first: where no rule knows one, nothing is written and nothing is
//! allocated.

use std::net::IpAddr;

use super::{
    json::{Names, behind_blanks, key_at, text_end, text_of, value_end},
    keys::Keys,
    normalise::{Form, HashKey, What, hashed},
    seal::{SealForm, sealed},
};
use crate::{reasons::Redaction, sealing::Sealing};

/// Most levels that are looked through for what is allowed: no reader of JSON that let an
/// event in goes deeper.
const DEPTH_MAX: usize = 128;

/// What is done about a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing but to count it.
    Keep,
    /// It goes, and its name with it.
    Drop,
    /// Its texts and numbers become hashes.
    Hash(Form, What),
    /// Its texts and numbers become less exact.
    Cut(Cut),
    /// Nobody reads it without a key.
    Seal(SealForm),
}

/// What is left of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// An address's first bits, of IPv4 and of IPv6; of what is no address nothing.
    Ip { v4: u8, v6: u8 },
    /// The first characters.
    Chars(usize),
}

/// What is to be done where a name stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) action: Action,
    /// Its place among the names that are counted.
    pub(super) counted: Option<u8>,
}

/// Rules that belong together: of the log, or of a provider.
#[derive(Debug)]
pub(super) struct KeyRules {
    pub(super) keys: Keys<Rule>,
    /// With it nothing else is kept.
    pub(super) allow: Option<Keys<()>>,
    pub(super) hash_key: Option<HashKey>,
    /// The key that [`Action::Seal`] needs.
    pub(super) sealing: Sealing,
    /// They are about no other names than those that are marked while they are parsed: what
    /// has no mark need not be looked through.
    pub(super) only_red: bool,
}

/// What was found in one event, to be counted once it is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// A bit for each name that is counted.
    pub(super) counted: u32,
    /// Values, by what was done about them.
    pub(super) done: [u32; 4],
}

impl Found {
    /// True if there is nothing to be counted, as of most events.
    #[inline]
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }
}

/// What was found, and for whoever asks under which names.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) found: Found,
    pub(super) names: Option<Vec<(Redaction, String)>>,
}

impl Notes {
    /// With the names.
    pub(super) fn with_names() -> Self {
        Self { names: Some(Vec::new()), ..Self::default() }
    }

    pub(super) fn note(&mut self, name: &str, rule: Rule) {
        self.found.counted |= rule.counted.map_or(0, |place| 1 << place);
        match rule.action {
            Action::Keep => {}
            Action::Drop => self.done(name, Redaction::Dropped),
            Action::Hash(..) => self.done(name, Redaction::Hashed),
            Action::Cut(_) => self.done(name, Redaction::Cut),
            Action::Seal(_) => self.done(name, Redaction::Sealed),
        }
    }

    pub(super) fn done(&mut self, name: &str, done: Redaction) {
        self.found.done[done as usize] += 1;
        if let Some(names) = &mut self.names {
            names.push((done, name.to_owned()));
        }
    }
}

impl KeyRules {
    /// An object as the rules leave it; nothing if they leave it as it is. Of what is
    /// forbidden in a value that is hashed as a whole only what is to go has rules of its
    /// own.
    pub(super) fn rewritten(&self, json: &str, always: &[&str], notes: &mut Notes) -> Option<String> {
        let allowed = self.allow.as_ref().and_then(|allow| only_allowed(json, allow, always, notes));
        let json = allowed.as_deref().unwrap_or(json);
        let mut drops = false;
        let mut changes = false;
        for rule in Names::of(json).filter_map(|key| self.keys.get(&key.name())) {
            notes.found.counted |= rule.counted.map_or(0, |place| 1 << place);
            drops |= rule.action == Action::Drop;
            changes |= matches!(rule.action, Action::Hash(..) | Action::Cut(_) | Action::Seal(_));
        }
        let dropped = if drops { Some(self.dropped(json, notes)) } else { None };
        let json = dropped.as_deref().unwrap_or(json);
        let changed = if changes { Some(self.changed(json, notes)) } else { None };
        changed.or(dropped).or(allowed)
    }

    /// What is done about the field of an event that has such a name.
    pub(super) fn of_field(&self, name: &str) -> Option<Rule> {
        let forbidden = self.allow.as_ref().is_some_and(|allow| allow.get(name).is_none());
        let rule = self.keys.get(name).copied();
        if forbidden { Some(Rule { action: Action::Drop, counted: None }) } else { rule }
    }

    /// A text as an action leaves it; nothing of one that goes.
    pub(super) fn text(&self, text: &str, action: Action) -> Option<String> {
        match action {
            Action::Keep => Some(text.to_owned()),
            // What is sealed is an object, and no text.
            Action::Drop | Action::Seal(_) => None,
            Action::Hash(form, what) => Some(hashed(form, what, text, self.hash_key.as_ref())),
            Action::Cut(cut) => Some(cut.text(text)),
        }
    }

    /// Without names that are to go, their values, and one comma for each.
    fn dropped(&self, json: &str, notes: &mut Notes) -> String {
        let mut out = String::with_capacity(json.len());
        let mut copied = 0;
        let mut names = Names::of(json);
        while let Some(key) = names.next() {
            let name = key.name();
            let Some(rule) = self.keys.get(&name).filter(|rule| rule.action == Action::Drop) else {
                continue;
            };
            notes.note(&name, *rule);
            out.push_str(&json[copied..key.start]);
            let end = value_end(json, key.value);
            let next = behind_blanks(json, end);
            copied = if json.as_bytes().get(next) == Some(&b',') {
                behind_blanks(json, next + 1)
            } else {
                // It was the last: the comma before it is one too many.
                let kept = out.trim_end().trim_end_matches(',').len();
                if kept < out.trim_end().len() {
                    out.truncate(kept);
                }
                end
            };
            names.at = copied;
        }
        out.push_str(&json[copied..]);
        out
    }

    /// With hashes, what is left of values, and what they are sealed as, in the place of values.
    fn changed(&self, json: &str, notes: &mut Notes) -> String {
        // A hash and its quotes are longer than most of what they stand for.
        let mut out = String::with_capacity(json.len() + 66);
        let mut copied = 0;
        let mut names = Names::of(json);
        while let Some(key) = names.next() {
            let name = key.name();
            let Some(rule) = self.keys.get(&name) else { continue };
            if matches!(rule.action, Action::Keep | Action::Drop) {
                continue;
            }
            notes.note(&name, *rule);
            out.push_str(&json[copied..key.value]);
            copied = value_end(json, key.value);
            let value = &json[key.value..copied];
            match rule.action {
                Action::Seal(form) => out.push_str(&self.sealed(&name, value, form)),
                _ => self.change_value(value, rule.action, notes, &mut out),
            }
            names.at = copied;
        }
        out.push_str(&json[copied..]);
        out
    }

    /// A value with hashes, or what is left, in the place of its texts and numbers; what is to be
    /// sealed in it is sealed.
    fn change_value(&self, value: &str, action: Action, notes: &mut Notes, out: &mut String) {
        let change = |text: &str| self.text(text, action).unwrap_or_default();
        let (mut names, mut copied) = (Names::of(value), 0);
        while let Some(key) = names.next() {
            let name = key.name();
            let Some(rule) = self.keys.get(&name) else { continue };
            let Action::Seal(form) = rule.action else { continue };
            notes.note(&name, *rule);
            change_leaves(&value[copied..key.value], change, out);
            copied = value_end(value, key.value);
            out.push_str(&self.sealed(&name, &value[key.value..copied], form));
            names.at = copied;
        }
        change_leaves(&value[copied..], change, out);
    }

    fn sealed(&self, name: &str, value: &str, form: SealForm) -> String {
        sealed(&self.sealing, self.hash_key.as_ref(), name, value, form)
    }
}

impl Cut {
    fn text(self, text: &str) -> String {
        match self {
            Self::Ip { .. } => {
                let ip = text.trim().parse().ok().and_then(|ip| self.ip(ip));
                ip.map(|ip| ip.to_string()).unwrap_or_default()
            }
            Self::Chars(chars) => text.chars().take(chars).collect(),
        }
    }

    /// The first bits of an address; nothing if this is for texts.
    pub(super) fn ip(self, ip: IpAddr) -> Option<IpAddr> {
        let Self::Ip { v4, v6 } = self else { return None };
        let first_v4 = |bits: u32| bits & u32::MAX.checked_shl(32 - u32::from(v4)).unwrap_or(0);
        let first_v6 = |bits: u128| bits & u128::MAX.checked_shl(128 - u32::from(v6)).unwrap_or(0);
        Some(match ip.to_canonical() {
            IpAddr::V4(ip) => IpAddr::V4(first_v4(ip.to_bits()).into()),
            IpAddr::V6(ip) => IpAddr::V6(first_v6(ip.to_bits()).into()),
        })
    }
}

/// Copies a value, with other texts in the place of its texts and numbers: of one that is
/// many, of each. Names, nulls, true and false stay.
fn change_leaves(value: &str, change: impl Fn(&str) -> String, out: &mut String) {
    let mut at = 0;
    while let Some(byte) = value.as_bytes().get(at) {
        let end = match byte {
            b'"' => text_end(value, at),
            b'-' | b'0'..=b'9' => value_end(value, at),
            _ => at + 1,
        };
        let token = value.get(at..end).unwrap_or_default();
        let is_name = || value.as_bytes().get(behind_blanks(value, end)) == Some(&b':');
        match byte {
            b'"' if !is_name() => push_text(&change(&text_of(token)), out),
            b'-' | b'0'..=b'9' => push_text(&change(token), out),
            _ => out.push_str(token),
        }
        at = end;
    }
}

fn push_text(text: &str, out: &mut String) {
    out.push_str(&serde_json::to_string(text).expect("a text becomes JSON"));
}

/// What of an object may be kept: what has an allowed name, with all that is in it, and
/// what that stands in. Nothing if that is all of it.
fn only_allowed(json: &str, allow: &Keys<()>, always: &[&str], notes: &mut Notes) -> Option<String> {
    let mut out = String::with_capacity(json.len());
    let mut copy = AllowedCopy { json, allow, always, notes, out: &mut out, left_out: false };
    let start = behind_blanks(json, 0);
    copy.object(start, 1);
    let left_out = copy.left_out;
    left_out.then_some(out)
}

struct AllowedCopy<'a> {
    json: &'a str,
    allow: &'a Keys<()>,
    /// Names at the first level that are kept, too.
    always: &'a [&'a str],
    notes: &'a mut Notes,
    out: &'a mut String,
    left_out: bool,
}

impl AllowedCopy<'_> {
    /// Copies what may be kept of the object that begins at `at`: where it ends, and
    /// whether anything was kept of it.
    fn object(&mut self, at: usize, depth: usize) -> (usize, bool) {
        self.each(at, ['{', '}'], |copy, start| {
            let key = key_at(copy.json, start);
            let name = key.name();
            copy.out.push_str(&copy.json[start..key.value.min(copy.json.len())]);
            let is_always = depth == 1 && copy.always.contains(&&*name);
            if is_always || copy.allow.get(&name).is_some() {
                let end = value_end(copy.json, key.value);
                copy.out.push_str(&copy.json[key.value..end]);
                return (end, true);
            }
            let (end, is_kept) = copy.inner(key.value, depth);
            if !is_kept {
                copy.notes.done(&name, Redaction::Dropped);
            }
            (end, is_kept)
        })
    }

    fn list(&mut self, at: usize, depth: usize) -> (usize, bool) {
        self.each(at, ['[', ']'], |copy, start| copy.inner(start, depth))
    }

    /// A value without an allowed name: it may hold one.
    fn inner(&mut self, at: usize, depth: usize) -> (usize, bool) {
        match self.json.as_bytes().get(at) {
            Some(b'{') if depth < DEPTH_MAX => self.object(at, depth + 1),
            Some(b'[') if depth < DEPTH_MAX => self.list(at, depth + 1),
            _ => (value_end(self.json, at), false),
        }
    }

    fn each(
        &mut self,
        at: usize,
        [open, close]: [char; 2],
        mut copy_one: impl FnMut(&mut Self, usize) -> (usize, bool),
    ) -> (usize, bool) {
        self.out.push(open);
        let mut is_any = false;
        let mut at = behind_blanks(self.json, at + 1);
        while self.json.as_bytes().get(at).is_some_and(|byte| !matches!(byte, b'}' | b']')) {
            let kept_bytes = self.out.len();
            if is_any {
                self.out.push(',');
            }
            let (end, is_kept) = copy_one(self, at);
            if is_kept {
                is_any = true;
            } else {
                self.out.truncate(kept_bytes);
                self.left_out = true;
            }
            let next = behind_blanks(self.json, end.max(at + 1));
            let is_comma = self.json.as_bytes().get(next) == Some(&b',');
            at = if is_comma { behind_blanks(self.json, next + 1) } else { next };
        }
        self.out.push(close);
        (at + 1, is_any)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use analytics_relay_providers::Secret;
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::{super::keys::plain, *};
    use crate::sealing::test_keys;

    const DROP: Action = Action::Drop;
    const HMAC: Action = Action::Hash(Form::Hmac, What::Other);
    const CUT_IP: Action = Action::Cut(Cut::Ip { v4: 24, v6: 48 });

    fn rules(named: &[(&str, Action)], allow: Option<&[&str]>) -> KeyRules {
        let rule = |action| Rule { action, counted: None };
        KeyRules {
            keys: Keys::new(named.iter().map(|(name, action)| (plain(name), rule(*action)))),
            allow: allow.map(|names| Keys::new(names.iter().map(|name| (plain(name), ())))),
            hash_key: HashKey::new(&Secret::new("0123456789abcdef")),
            sealing: Sealing::default(),
            only_red: false,
        }
    }

    fn rewritten(rules: &KeyRules, json: &str) -> Option<String> {
        rules.rewritten(json, &[], &mut Notes::default())
    }

    #[test]
    fn what_no_rule_knows_is_not_written_again() {
        let rules = rules(&[("password", DROP), ("email", HMAC), ("ip", CUT_IP)], None);
        for json in ["{}", r#"{"author":"password","passwordless":true,"a":{"b":["email",{"x":"ip"}]}}"#] {
            assert_eq!(rewritten(&rules, json), None, "{json}");
        }
    }

    #[test]
    fn a_name_goes_with_its_value_and_one_comma_and_every_other_byte_stays() {
        let rules = rules(&[("password", DROP), ("ssn", DROP)], None);
        for (json, want) in [
            (r#"{"password":1}"#, "{}"),
            (r#"{ "password" : "x" }"#, "{  }"),
            (r#"{"a":1e2,"password":{"b":[1,"}"]},"c":"\u00e9"}"#, r#"{"a":1e2,"c":"\u00e9"}"#),
            (r#"{"password":null,"a":1}"#, r#"{"a":1}"#),
            (r#"{"a":1 , "Pass_Word":"," }"#, r#"{"a":1  }"#),
            (r#"{"a":1,"password":1,"ssn":2}"#, r#"{"a":1}"#),
            (
                r#"{"password":1,"a":1,"ssn":2,"b":[ 9007199254740993 ]}"#,
                r#"{"a":1,"b":[ 9007199254740993 ]}"#,
            ),
            (
                r#"{"l":[{"password":1},{"a":{"PASSWORD":1,"ssn":"\"","b":2}}]}"#,
                r#"{"l":[{},{"a":{"b":2}}]}"#,
            ),
            // Its name in escapes is no other name.
            (r#"{"p\u0061ssword":1,"a":2}"#, r#"{"a":2}"#),
            // What holds it, as text, is somebody's text.
            (r#"{"a":"\"password\":1","password":2}"#, r#"{"a":"\"password\":1"}"#),
            // Two spellings are two names.
            (r#"{"password":1,"PASSWORD":2,"pass-word":3}"#, "{}"),
        ] {
            assert_eq!(rewritten(&rules, json).as_deref(), Some(want), "{json}");
        }
    }

    #[test]
    fn each_text_and_number_of_a_value_becomes_a_hash() {
        let rules = rules(&[("email", HMAC), ("ssn", DROP)], None);
        let hash = |text: &str| rules.text(text, HMAC).unwrap();
        let json = r#"{"email":["a@b","\u0061@b",1.50,true,null,{"Home":{"x":"y"},"ssn":"1"}],"b":"a@b"}"#;
        let want = format!(
            r#"{{"email":["{a}","{a}","{n}",true,null,{{"Home":{{"x":"{y}"}}}}],"b":"a@b"}}"#,
            a = hash("a@b"),
            n = hash("1.50"),
            y = hash("y")
        );
        assert_eq!(rewritten(&rules, json).unwrap(), want);
        assert_eq!(rewritten(&rules, r#"{"email":""}"#).unwrap(), r#"{"email":""}"#);
    }

    #[test]
    fn an_address_keeps_its_first_bits_and_what_is_none_keeps_nothing() {
        let rules = rules(&[("ip", CUT_IP), ("zip", Action::Cut(Cut::Chars(3)))], None);
        for (ip, want) in [
            ("203.0.113.77", "203.0.113.0"),
            (" 203.0.113.77 ", "203.0.113.0"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1::"),
            ("::ffff:203.0.113.77", "203.0.113.0"),
            ("203.0.113.77, 10.0.0.1", ""),
            ("jane@example.com", ""),
        ] {
            let json = json!({ "context": { "IP": ip } }).to_string();
            let want = json!({ "context": { "IP": want } }).to_string();
            assert_eq!(rewritten(&rules, &json).unwrap(), want);
        }
        let cut = rewritten(&rules, r#"{"zip":"94035","Zip":94035,"z":{"zip":["é€ß1",7]}}"#).unwrap();
        assert_eq!(cut, r#"{"zip":"940","Zip":"940","z":{"zip":["é€ß","7"]}}"#);
        for (v4, v6, ip, want) in [
            (0, 0, "203.0.113.77", "0.0.0.0"),
            (32, 128, "203.0.113.77", "203.0.113.77"),
            (0, 0, "2001:db8::1", "::"),
            (32, 128, "2001:db8::1", "2001:db8::1"),
        ] {
            assert_eq!(Cut::Ip { v4, v6 }.ip(ip.parse().unwrap()), Some(want.parse().unwrap()));
        }
    }

    #[test]
    fn of_a_list_of_what_is_allowed_nothing_else_is_kept() {
        let rules = rules(&[("email", DROP)], Some(&["price", "user"]));
        for (json, want) in [
            (r#"{"a":1,"b":{"c":[1,"x"]}}"#, "{}"),
            (r#"{ "price" : 1 , "a":2}"#, r#"{"price" : 1}"#),
            (
                r#"{"items":[{"Price":1,"sku":2},7,{"sku":3},[{"price":[4,{"x":5}]}]],"b":{}}"#,
                r#"{"items":[{"Price":1},[{"price":[4,{"x":5}]}]]}"#,
            ),
            // What is denied is denied inside, too.
            (r#"{"user":{"email":"a@b","id":1},"c":3}"#, r#"{"user":{"id":1}}"#),
            (r#"{"a":[],"price":null}"#, r#"{"price":null}"#),
        ] {
            assert_eq!(rewritten(&rules, json).as_deref(), Some(want), "{json}");
        }
        assert_eq!(
            rewritten(&rules, r#"{ "price":1 , "items":[ {"price":2} ]}"#),
            None,
            "all of it is allowed"
        );
        let kept = rules.rewritten(r#"{"v":1,"a":{"v":2},"price":3}"#, &["v"], &mut Notes::default());
        assert_eq!(kept.as_deref(), Some(r#"{"v":1,"price":3}"#));
    }

    #[test]
    fn what_is_sealed_goes_as_a_whole_without_what_is_dropped() {
        let named = [("email", Action::Seal(SealForm::Opaque)), ("password", DROP)];
        let rules = KeyRules { sealing: test_keys("a"), ..rules(&named, None) };
        let json = r#"{"a": [ {"E-mail" : {"at":"x@y.org", "password":1} , "b":2} ],"email":null}"#;
        let left = rewritten(&rules, json).unwrap();
        assert!(left.starts_with(r#"{"a": [ {"E-mail" : {"$enc":"a:"#), "{left}");
        assert!(left.ends_with(r#""} , "b":2} ],"email":null}"#) && !left.contains("x@y.org"), "{left}");
        let (back, unopened) = super::super::unsealed(&left, &test_keys("a"));
        let want = r#"{"a": [ {"E-mail" : {"at":"x@y.org"} , "b":2} ],"email":null}"#;
        assert_eq!((&*back, unopened.len()), (want, 0));
        assert_eq!(rules.text("x", Action::Seal(SealForm::Opaque)), None, "of a field of its own nothing");
        let named = [
            ("street", Action::Seal(SealForm::Opaque)),
            ("address", Action::Cut(Cut::Chars(2))),
            ("buyer", HMAC),
        ];
        let rules = KeyRules { sealing: test_keys("a"), ..self::rules(&named, None) };
        for outer in ["address", "buyer"] {
            let json = format!(r#"{{"{outer}":[{{"city":"Berlin","street":"Hauptstr. 7"}},"Home"]}}"#);
            let left = rewritten(&rules, &json).unwrap();
            let (back, unopened) = super::super::unsealed(&left, &test_keys("a"));
            assert!(left.contains("$enc") && back.contains("Hauptstr. 7") && unopened.is_empty(), "{left}");
            assert!(!left.contains("Haupt") && !back.contains("Berlin") && !back.contains("Home"), "{left}");
        }
    }

    #[test]
    fn hostile_depths_end() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(50_000), "}".repeat(50_000));
        assert_eq!(rewritten(&rules(&[("b", DROP)], None), &deep), None);
        assert_eq!(rewritten(&rules(&[("a", DROP)], None), &deep).unwrap(), "{}");
        assert_eq!(rewritten(&rules(&[], Some(&["b"])), &deep).unwrap(), "{}");
    }

    #[test]
    fn what_was_done_is_counted_and_named() {
        let rules =
            rules(&[("password", DROP), ("email", HMAC), ("ip", CUT_IP)], Some(&["email", "ip", "password"]));
        let mut notes = Notes::with_names();
        let json = r#"{"password":1,"l":[{"E-mail":"a"},{"email":"b"}],"ip":"::1","x":{"y":1}}"#;
        rules.rewritten(json, &[], &mut notes).unwrap();
        assert_eq!(notes.found.done, [3, 2, 1, 0]);
        let mut names = notes.names.unwrap();
        names.sort();
        let want = [
            (Redaction::Dropped, "password"),
            (Redaction::Dropped, "x"),
            (Redaction::Dropped, "y"),
            (Redaction::Hashed, "E-mail"),
            (Redaction::Hashed, "email"),
            (Redaction::Cut, "ip"),
        ];
        assert_eq!(names, want.map(|(done, name)| (done, name.to_owned())));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "(email|pass\"word|[a-z\\\\,{}:\"é]{0,6})".prop_map(Value::from),
        ];
        let key = "(email|e_Mail|secret|SECRET|ok|Allowed|[a-c\"\\\\:,{}é]{1,3})";
        leaf.prop_recursive(5, 48, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map(key, inner, 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    /// The same by the general reader, which builds all of it.
    fn by_hand(value: &Value, rules: &KeyRules) -> Value {
        match value {
            Value::Array(items) => items.iter().map(|item| by_hand(item, rules)).collect(),
            Value::Object(fields) => {
                let mut kept = Map::new();
                for (name, value) in fields {
                    match rules.keys.get(name).map(|rule| rule.action) {
                        Some(Action::Drop) => {}
                        Some(action) => {
                            kept.insert(
                                name.clone(),
                                leaves_by_hand(&by_hand(value, &drops_of(rules)), rules, action),
                            );
                        }
                        None => {
                            kept.insert(name.clone(), by_hand(value, rules));
                        }
                    }
                }
                Value::Object(kept)
            }
            leaf => leaf.clone(),
        }
    }

    fn drops_of(_: &KeyRules) -> KeyRules {
        rules(&[("secret", DROP)], None)
    }

    fn leaves_by_hand(value: &Value, rules: &KeyRules, action: Action) -> Value {
        match value {
            Value::Array(items) => items.iter().map(|item| leaves_by_hand(item, rules, action)).collect(),
            Value::Object(fields) => fields
                .iter()
                .map(|(name, value)| (name.clone(), leaves_by_hand(value, rules, action)))
                .collect(),
            Value::String(text) => rules.text(text, action).into(),
            Value::Number(number) => rules.text(&number.to_string(), action).into(),
            other => other.clone(),
        }
    }

    proptest! {
        /// Nothing that is forbidden is left at any depth, and all else equals.
        #[test]
        fn the_rules_do_what_a_general_reader_would_do(
            fields in prop::collection::btree_map("(email|secret|[a-c]{1,2})", any_json(), 0..6),
            pretty in any::<bool>(),
        ) {
            let object: BTreeMap<String, Value> = fields;
            let json = if pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) };
            let json = json.unwrap();
            let rules = rules(&[("secret", DROP), ("email", HMAC)], None);
            let written = rewritten(&rules, &json);
            let value: Value = serde_json::from_str(&json).unwrap();
            let text = written.as_deref().unwrap_or(&json);
            let got: Value = serde_json::from_str(text).unwrap();
            prop_assert_eq!(&got, &by_hand(&value, &rules), "{} became {}", json, text);
            prop_assert!(!Names::of(text).any(|key| plain(&key.name()) == "secret"));
            prop_assert_eq!(written.is_none(), !Names::of(&json).any(|key| rules.keys.get(&key.name()).is_some()));
        }

        /// Of a list of what is allowed every name that is left is allowed, or holds or is
        /// in what is; and it goes no further if it is done again.
        #[test]
        fn only_what_is_allowed_is_left(
            fields in prop::collection::btree_map("(allowed|[a-c]{1,2})", any_json(), 0..6),
        ) {
            let json = serde_json::to_string(&fields).unwrap();
            let rules = rules(&[], Some(&["allowed"]));
            let text = rewritten(&rules, &json).unwrap_or(json);
            let left: Value = serde_json::from_str(&text).unwrap();
            fn holds(value: &Value) -> bool {
                match value {
                    Value::Array(items) => !items.is_empty() && items.iter().all(holds),
                    Value::Object(fields) => {
                        !fields.is_empty() && fields.iter().all(|(name, value)| plain(name) == "allowed" || holds(value))
                    }
                    _ => false,
                }
            }
            prop_assert!(left == json!({}) || holds(&left), "{}", text);
            prop_assert_eq!(rewritten(&rules, &text), None);
        }
    }
}
