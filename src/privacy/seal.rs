//! Values of the store that nobody reads without a key, in JSON: `{"$enc":"…"}`, with `"$eq"`
//! where equal ones are to be found.

use serde::Deserialize;
use tracing::error;

use super::{
    json::{Key, Names, text_of},
    keys::plain,
    normalise::{HashKey, equal},
};
use crate::sealing::{
    Keyring, Sealing,
    values::{self, Unopened},
};

/// How a value is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SealForm {
    /// Nothing is said about it.
    Opaque,
    /// A hash tells which are equal, where case and blanks around them do not count.
    Index,
}

impl SealForm {
    pub(super) const ALL: [Self; 2] = [Self::Opaque, Self::Index];

    /// The name in the file.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Opaque => "opaque",
            Self::Index => "index",
        }
    }
}

/// What stands in the place of a value. A `null` stays, as it says that there is none.
pub(super) fn sealed(
    sealing: &Sealing,
    hash_key: Option<&HashKey>,
    name: &str,
    value: &str,
    form: SealForm,
) -> String {
    const NOTHING: &str = "null";
    if value == NOTHING {
        return NOTHING.to_owned();
    }
    let name = plain(name);
    let kek = sealing.keyring().and_then(Keyring::writer);
    let Some(Ok(text)) = kek.map(|kek| values::seal(kek, &name, value)) else {
        // Rules to seal are not taken without a key, and the system has random bytes.
        error!("a defect: a value of the store cannot be sealed; nothing is kept of it");
        return r#"{"$enc":null}"#.to_owned();
    };
    let plain_text = match value.as_bytes().first() {
        Some(b'"') => Some(text_of(value)),
        Some(b'-' | b'0'..=b'9') => Some(value.into()),
        _ => None,
    };
    let plain_text = plain_text.filter(|_| form == SealForm::Index);
    match plain_text.and_then(|text| equal(hash_key?, &name, &text)) {
        Some(equal) => format!(r#"{{"$enc":"{text}","$eq":"{equal}"}}"#),
        None => format!(r#"{{"$enc":"{text}"}}"#),
    }
}

/// A value as it is sealed, whoever has written it again: a database may change their order.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    #[serde(rename = "$enc")]
    text: String,
    #[serde(rename = "$eq")]
    _equal: Option<String>,
}

/// A JSON text with the values of those that are sealed in their places, and why some are not.
/// What only looks like one is somebody's own.
pub(crate) fn unsealed(json: &str, sealing: &Sealing) -> (String, Vec<Unopened>) {
    let (mut out, mut copied, mut unopened) = (String::with_capacity(json.len()), 0, Vec::new());
    let (mut names, mut last) = (Names::of(json), None);
    while let Some(key) = names.next() {
        let Some((start, end, sealed)) = sealed_at(json, &key) else {
            last = Some(key);
            continue;
        };
        let Some(name) = last.filter(|name| is_value_of(json, name.value, start)) else { continue };
        match values::open(sealing.keyring(), &plain(&name.name()), &sealed.text) {
            Ok(value) => {
                out.push_str(&json[copied..start]);
                out.push_str(&value);
                copied = end;
            }
            Err(Unopened::Malformed) => {}
            Err(why) => unopened.push(why),
        }
        // What is in it is a caller's own.
        names.at = end;
    }
    out.push_str(&json[copied..]);
    (out, unopened)
}

/// The sealed value whose first name this is, and where it begins and ends.
fn sealed_at(json: &str, first: &Key<'_>) -> Option<(usize, usize, Sealed)> {
    if !first.name().starts_with('$') {
        return None;
    }
    let before = &json.as_bytes()[..first.start];
    let start = before.iter().rposition(|byte| !byte.is_ascii_whitespace())?;
    if before[start] != b'{' {
        return None;
    }
    let mut values = serde_json::Deserializer::from_str(&json[start..]).into_iter::<Sealed>();
    let sealed = values.next()?.ok()?;
    Some((start, start + values.byte_offset(), sealed))
}

/// True for the value of a name, and for what the store knows of a trait: a list of a time, an
/// id and the value.
fn is_value_of(json: &str, value: usize, start: usize) -> bool {
    let before = json.as_bytes().get(value..start).unwrap_or(b"}");
    match before.split_first() {
        None => true,
        Some((b'[', rest)) => !rest.iter().any(|byte| matches!(byte, b'[' | b']' | b'{' | b'}')),
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use analytics_relay_providers::Secret;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{
        super::normalise::{Form, What, hashed},
        *,
    };
    use crate::sealing::test_keys;

    fn seal(value: &str, form: SealForm) -> Value {
        let key = HashKey::new(&Secret::new("0123456789abcdef"));
        serde_json::from_str(&sealed(&test_keys("a"), key.as_ref(), "E_mail", value, form)).unwrap()
    }

    #[test]
    fn equal_values_have_equal_hashes_where_that_is_wanted() {
        let [one, other, third] =
            ["\"Ann@x.org\"", "\" ann@X.org\"", "\"bob@x.org\""].map(|value| seal(value, SealForm::Index));
        assert_eq!(one["$eq"].as_str().unwrap().len(), 64);
        assert_eq!(one["$eq"], other["$eq"]);
        assert_ne!(one["$eq"], third["$eq"]);
        assert_ne!(one["$enc"], other["$enc"]);
        assert_eq!(seal("\"Ann@x.org\"", SealForm::Opaque).get("$eq"), None);
        for value in ["true", "{\"a\":1}", "[\"a\"]"] {
            assert_eq!(seal(value, SealForm::Index).get("$eq"), None, "{value}");
        }
        assert_eq!(seal("null", SealForm::Index), Value::Null);
        assert_eq!(seal("\" \"", SealForm::Index).get("$eq"), None, "nothing is equal to nothing");
        let key = HashKey::new(&Secret::new("0123456789abcdef")).unwrap();
        let hmac = hashed(Form::Hmac, What::Other, "ann@x.org", Some(&key));
        assert_ne!(one["$eq"], hmac, "a vendor may have that");
        assert_ne!(equal(&key, "email", "1"), equal(&key, "login", "1"));
    }

    #[test]
    fn without_a_key_nothing_is_kept() {
        for keys in [Sealing::default(), test_keys("none,a")] {
            assert_eq!(sealed(&keys, None, "email", "\"ann\"", SealForm::Opaque), "{\"$enc\":null}");
        }
    }

    #[test]
    fn what_does_not_open_stays_as_it_is_and_is_told() {
        let text = sealed(&test_keys("a"), None, "email", "\"ann\"", SealForm::Opaque);
        let json = format!(r#"{{"email" : {text}, "e":[{{"phone":{text}}}]}}"#);
        let (opened, unopened) = unsealed(&json, &test_keys("a"));
        assert_eq!(opened, json.replacen(&text, "\"ann\"", 1));
        let [moved] = &unopened[..] else { panic!("{unopened:?}") };
        assert!(matches!(moved, Unopened::Wrong { .. }), "under another name: {moved:?}");
        let (closed, unopened) = unsealed(&json, &Sealing::default());
        assert_eq!((closed, unopened.len()), (json, 2));
        let of_traits = format!("{{\"traits\":{{\"e_mail\":[5,\"id\",{text}],\"é\":1}}}}");
        assert_eq!(unsealed(&of_traits, &test_keys("a")).0, of_traits.replace(&text, "\"ann\""));
        for begin in ["{\"a\":", "{\"$enc\":", "{\"$enc\":\"a:b:c\",\"a\":"] {
            let deep = format!("{}1", begin.repeat(100_000));
            assert_eq!(unsealed(&deep, &test_keys("a")), (deep, vec![]));
        }
    }

    #[test]
    fn what_a_caller_makes_look_like_a_sealed_value_is_the_callers() {
        let text = sealed(&test_keys("a"), None, "email", "\"ann\"", SealForm::Opaque);
        for json in [
            format!(r#"{{"x":[{{"email":null}},{text}]}}"#),
            format!(r#"{{"email":[[{text}]]}}"#),
            format!(r#"[{text},{text}]"#),
            format!(r#"{{"email":{}}}"#, text.replace('}', ",\"more\":1}")),
            r#"{"email":{"$enc":7},"b":{"$enc":"z"},"c":{"$eq":"z"},"d":{"x":1,"$enc":"a:b:c"}}"#.to_owned(),
        ] {
            let (left, unopened) = unsealed(&json, &test_keys("a"));
            assert_eq!((left, unopened), (json, vec![]));
        }
    }

    #[test]
    fn what_was_written_again_opens_too() {
        let key = HashKey::new(&Secret::new("0123456789abcdef"));
        let text = sealed(&test_keys("a"), key.as_ref(), "email", "\"ann\"", SealForm::Index);
        let sealed: Value = serde_json::from_str(&text).unwrap();
        let other = format!(r#"{{ "$eq": {}, "$enc": {} }}"#, sealed["$eq"], sealed["$enc"]);
        for text in [&text, &other] {
            let json = format!(r#"{{"Email": {text}, "n": 1}}"#);
            assert_eq!(unsealed(&json, &test_keys("a")), (r#"{"Email": "ann", "n": 1}"#.to_owned(), vec![]));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "\\PC{0,40}", parts in prop::collection::vec(prop::sample::select(vec!["{", "}", "[", "]", ",", ":", " ", "\"", "\\", "é", "1", "null", "\"email\":", "\"$enc\":", "{\"$enc\":\"", "\"$eq\":", "a:", "SEALED"]), 0..14)) {
            let sealed = sealed(&test_keys("a"), None, "email", "\"ann\"", SealForm::Opaque);
            for text in [text, parts.concat().replace("SEALED", &sealed)] {
                let (opened, unopened) = unsealed(&text, &test_keys("a"));
                let parts = opened.len() <= text.len() && unopened.len() <= text.matches("$enc").count();
                prop_assert!(parts, "{} {}", text, opened);
                prop_assert!(opened == text || text.contains(&sealed), "{} {}", text, opened);
            }
        }

        #[test]
        fn what_was_sealed_is_put_back_byte_for_byte(value in prop_oneof![any::<String>().prop_map(|text| json!(text)), any::<i64>().prop_map(|n| json!(n)), any::<String>().prop_map(|text| json!({ "email": [text, null, { "a": 1.5 }] }))]) {
            let value = value.to_string();
            let text = sealed(&test_keys("a"), None, "e-mail", &value, SealForm::Opaque);
            let (opened, unopened) = unsealed(&format!("{{\"Email\":{text},\"n\":1}}"), &test_keys("b,a"));
            prop_assert_eq!(opened, format!("{{\"Email\":{value},\"n\":1}}"));
            prop_assert_eq!(unopened, []);
        }
    }
}
