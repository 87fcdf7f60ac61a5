//! Finds names and values in JSON that was checked before, without building it: nothing is
//! allocated, and how deep it goes is all the same.
//!
//! For text that is no JSON it says something, and ends.

use std::borrow::Cow;

/// A name in an object.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key<'a> {
    /// Where its quote stands.
    pub(super) start: usize,
    /// Where its value begins.
    pub(super) value: usize,
    /// What stands between its quotes.
    raw: &'a str,
}

impl<'a> Key<'a> {
    /// The name itself: one that is written in escapes is no other.
    pub(super) fn name(&self) -> Cow<'a, str> {
        unescaped(self.raw)
    }
}

/// All names of a JSON text, at every level, in the order in which they stand there.
#[derive(Debug)]
pub(super) struct Names<'a> {
    json: &'a str,
    /// What is before this was looked at, or is not to be.
    pub(super) at: usize,
}

impl<'a> Names<'a> {
    pub(super) fn of(json: &'a str) -> Self {
        Self { json, at: 0 }
    }
}

impl<'a> Iterator for Names<'a> {
    type Item = Key<'a>;

    fn next(&mut self) -> Option<Key<'a>> {
        let bytes = self.json.as_bytes();
        loop {
            let start = self.at + memchr::memchr(b'"', bytes.get(self.at..)?)?;
            let end = text_end(self.json, start);
            self.at = behind_blanks(self.json, end);
            // Only names stand before colons.
            if bytes.get(self.at) == Some(&b':') {
                let value = behind_blanks(self.json, self.at + 1);
                self.at = value;
                return Some(Key { start, value, raw: inside(self.json, start, end) });
            }
        }
    }
}

/// The name that begins at `start`.
pub(super) fn key_at(json: &str, start: usize) -> Key<'_> {
    let end = text_end(json, start);
    let colon = behind_blanks(json, end);
    Key { start, value: behind_blanks(json, colon + 1), raw: inside(json, start, end) }
}

/// A text in quotes as a text.
pub(super) fn text_of(quoted: &str) -> Cow<'_, str> {
    unescaped(inside(quoted, 0, quoted.len()))
}

/// Where the text ends whose quote stands at `start`: behind its other one.
pub(super) fn text_end(json: &str, start: usize) -> usize {
    let bytes = json.as_bytes();
    let mut at = start + 1;
    while let Some(found) = bytes.get(at..).and_then(|rest| memchr::memchr2(b'"', b'\\', rest)) {
        at += found + 1;
        if bytes[at - 1] == b'"' {
            return at;
        }
        at += 1;
    }
    json.len()
}

/// Where the value ends that begins at `start`.
pub(super) fn value_end(json: &str, start: usize) -> usize {
    let bytes = json.as_bytes();
    match bytes.get(start) {
        Some(b'"') => text_end(json, start),
        Some(b'{' | b'[') => container_end(json, start),
        _ => {
            let is_end = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
            bytes[start.min(json.len())..].iter().position(is_end).map_or(json.len(), |bytes| start + bytes)
        }
    }
}

fn container_end(json: &str, start: usize) -> usize {
    let bytes = json.as_bytes();
    let (mut at, mut depth) = (start, 0usize);
    while let Some(byte) = bytes.get(at) {
        match byte {
            b'"' => {
                at = text_end(json, at);
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return at;
        }
    }
    json.len()
}

/// Where something stands again, at `at` or behind it.
pub(super) fn behind_blanks(json: &str, at: usize) -> usize {
    let is_blank = |byte: &&u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    at + json.as_bytes().get(at..).unwrap_or_default().iter().take_while(is_blank).count()
}

fn inside(json: &str, start: usize, end: usize) -> &str {
    json.get(start + 1..end.saturating_sub(1)).unwrap_or_default()
}

fn unescaped(raw: &str) -> Cow<'_, str> {
    if memchr::memchr(b'\\', raw.as_bytes()).is_none() {
        return Cow::Borrowed(raw);
    }
    serde_json::from_str::<String>(&format!("\"{raw}\"")).map_or(Cow::Borrowed(raw), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_found_at_every_level_and_values_are_none() {
        let json = r#" { "a" : "b" , "c\"d":[ {"e":{}} , "f", {"\u0067": -1.5e3 } ],"":null, "h":"x:y\\" } "#;
        let found: Vec<_> = Names::of(json)
            .map(|key| (key.name().into_owned(), &json[key.value..value_end(json, key.value)]))
            .collect();
        let list = r#"[ {"e":{}} , "f", {"\u0067": -1.5e3 } ]"#;
        let want = [
            ("a", r#""b""#),
            ("c\"d", list),
            ("e", "{}"),
            ("g", "-1.5e3"),
            ("", "null"),
            ("h", r#""x:y\\""#),
        ];
        assert_eq!(found, want.map(|(name, value)| (name.to_owned(), value)));
    }

    #[test]
    fn how_deep_it_goes_is_all_the_same() {
        let deep = format!("{}1{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
        assert_eq!(Names::of(&deep).count(), 100_000);
        assert_eq!(value_end(&deep, 0), deep.len());
    }

    proptest! {
        #[test]
        fn whatever_the_text_there_is_an_end(text in "[\"\\\\{}:, a\u{e9}\\[\\]]{0,40}") {
            for key in Names::of(&text) {
                prop_assert!(key.value <= text.len() + 1);
                prop_assert!(value_end(&text, key.value) <= text.len().max(key.value));
                let _ = key.name();
            }
        }
    }
}
