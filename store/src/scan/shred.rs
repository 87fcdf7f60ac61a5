//! Takes an event's JSON apart into values, each with the path that it stands at, and a
//! skeleton, which is what is left; and puts it together again, byte for byte.
//!
//! Events of one shape share their skeleton, and values of one path are alike: both are
//! what makes columns small, and a question reads the columns that it is about and nothing
//! else. No JSON text has a raw control character, so that one marks where a value was.

use std::borrow::Cow;

use crate::scope::SEPARATOR;

/// Stands in a skeleton for a value that was taken out.
const MARK: char = '\u{1}';

/// Calls `visit` for each value, with its path and its place, in their order. Objects are
/// entered where what is in them is asked for, and are one value elsewhere, as lists are.
/// None if it is no JSON object.
pub(crate) fn walk(json: &str, visit: &mut impl FnMut(&str, std::ops::Range<usize>)) -> Option<()> {
    let mut walker = Walker { json: json.as_bytes(), text: json, at: 0, path: String::with_capacity(64) };
    walker.object(1, visit)
}

struct Walker<'a> {
    json: &'a [u8],
    text: &'a str,
    at: usize,
    path: String,
}

impl Walker<'_> {
    /// An object at a level, the whole event being the first.
    fn object(&mut self, level: usize, visit: &mut impl FnMut(&str, std::ops::Range<usize>)) -> Option<()> {
        let path_bytes = self.path.len();
        self.expect(b'{')?;
        if self.next_is(b'}') {
            return Some(());
        }
        loop {
            if level > 1 {
                self.path.push(SEPARATOR);
            }
            self.key()?;
            self.expect(b':')?;
            self.space();
            if self.is_entered(level) {
                self.object(level + 1, visit)?;
            } else {
                let value = self.value()?;
                visit(&self.path, value);
            }
            self.path.truncate(path_bytes);
            if self.next_is(b'}') {
                return Some(());
            }
            self.expect(b',')?;
        }
    }

    /// True if at the place stands an object whose values are values of their own.
    fn is_entered(&self, level: usize) -> bool {
        let is_object = self.json.get(self.at) == Some(&b'{') && self.json.get(self.at + 1) != Some(&b'}');
        is_object
            && match level {
                1 => matches!(&*self.path, "properties" | "context" | "enriched" | "sent_context"),
                2 => self.path.starts_with("enriched") || self.path.starts_with("sent_context"),
                _ => false,
            }
    }

    /// Adds a key to the path.
    fn key(&mut self) -> Option<()> {
        self.space();
        let key = self.string()?;
        let quoted = &self.text[key];
        let plain = &quoted[1..quoted.len() - 1];
        let key: Cow<'_, str> = match plain.contains('\\') {
            false => plain.into(),
            true => serde_json::from_str::<String>(quoted).map_or_else(|_| plain.into(), Into::into),
        };
        self.path.push_str(&key);
        Some(())
    }

    /// The place of a value, behind which this then stands.
    fn value(&mut self) -> Option<std::ops::Range<usize>> {
        let start = self.at;
        match *self.json.get(start)? {
            b'"' => return self.string(),
            b'{' | b'[' => self.nested()?,
            _ => {
                let ends = |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
                self.at += self.json[start..].iter().position(ends)?;
            }
        }
        (self.at > start).then_some(start..self.at)
    }

    fn nested(&mut self) -> Option<()> {
        let mut depth = 0_usize;
        loop {
            match *self.json.get(self.at)? {
                b'"' => {
                    self.string()?;
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.checked_sub(1)?,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Some(());
            }
        }
    }

    /// The place of a string with its quotes.
    fn string(&mut self) -> Option<std::ops::Range<usize>> {
        let start = self.at;
        (*self.json.get(start)? == b'"').then_some(())?;
        let mut at = start + 1;
        loop {
            match *self.json.get(at)? {
                b'"' => break,
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
        self.at = at + 1;
        Some(start..self.at)
    }

    fn space(&mut self) {
        while matches!(self.json.get(self.at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8) -> Option<()> {
        self.next_is(byte).then_some(())
    }

    fn next_is(&mut self, byte: u8) -> bool {
        self.space();
        let is = self.json.get(self.at) == Some(&byte);
        self.at += usize::from(is);
        is
    }
}

/// Writes what is left of an event's JSON to `skeleton`, without the values that `take`
/// takes.
pub(crate) fn take_apart(json: &str, skeleton: &mut String, mut take: impl FnMut(&str, &str) -> bool) {
    skeleton.clear();
    let mut copied = 0;
    walk(json, &mut |path, place| {
        if take(path, &json[place.clone()]) {
            skeleton.push_str(&json[copied..place.start]);
            skeleton.push(MARK);
            copied = place.end;
        }
    });
    skeleton.push_str(&json[copied..]);
}

/// An event's JSON again. None if a value is not found, or it is no skeleton.
pub(crate) fn put_together(
    skeleton: &str,
    mut find: impl FnMut(&str, &mut String) -> Option<()>,
) -> Option<String> {
    let mut json = String::with_capacity(skeleton.len() * 2);
    let (mut copied, mut all) = (0, true);
    walk(skeleton, &mut |path, place| {
        if skeleton[place.clone()].starts_with(MARK) {
            json.push_str(&skeleton[copied..place.start]);
            all &= find(path, &mut json).is_some();
            copied = place.end;
        }
    })?;
    json.push_str(&skeleton[copied..]);
    all.then_some(json)
}

/// Calls `each` with the path of each value that was not taken out, and the value.
pub(crate) fn each_left(skeleton: &str, each: &mut impl FnMut(&str, &str)) {
    walk(skeleton, &mut |path, place| {
        let value = &skeleton[place];
        if !value.starts_with(MARK) {
            each(path, value);
        }
    });
}

/// The value at a path that was not taken out.
pub(crate) fn left_at<'a>(skeleton: &'a str, wanted: &str) -> Option<&'a str> {
    let mut left = None;
    walk(skeleton, &mut |path, place| {
        let value = &skeleton[place];
        if path == wanted && left.is_none() && !value.starts_with(MARK) {
            left = Some(value);
        }
    });
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: &str = r#"{"id":"a\"b","time_ms":5,"context":{"ip":"::1"},"sent_context":{"page":{"path":"/é"},"n":[1,"}"]},"enriched":{},"properties":{"a":{"b":1},"c\n":null,"c\n":2, "d" : true }}"#;

    fn apart(json: &str) -> (String, Vec<(String, String)>) {
        let (mut skeleton, mut taken) = (String::new(), Vec::new());
        take_apart(json, &mut skeleton, |path, value| {
            let is_new = taken.iter().all(|(one, _)| one != path);
            if is_new {
                taken.push((path.to_owned(), value.to_owned()));
            }
            is_new
        });
        (skeleton, taken)
    }

    #[test]
    fn an_event_is_taken_apart_and_put_together_byte_for_byte() {
        let (skeleton, taken) = apart(EVENT);
        let paths: Vec<_> =
            taken.iter().map(|(path, value)| (path.replace(SEPARATOR, " "), &**value)).collect();
        let want = [
            ("id", r#""a\"b""#),
            ("time_ms", "5"),
            ("context ip", r#""::1""#),
            ("sent_context page path", r#""/é""#),
            ("sent_context n", r#"[1,"}"]"#),
            ("enriched", "{}"),
            ("properties a", r#"{"b":1}"#),
            ("properties c\n", "null"),
            ("properties d", "true"),
        ];
        assert_eq!(paths, want.map(|(path, value)| (path.to_owned(), value)));
        assert!(skeleton.ends_with("\"c\\n\":\u{1},\"c\\n\":2, \"d\" : \u{1} }}"), "{skeleton}");
        let again = put_together(&skeleton, |path, json| {
            json.push_str(&taken.iter().find(|(one, _)| one == path)?.1);
            Some(())
        });
        assert_eq!(again.as_deref(), Some(EVENT));
        assert_eq!(left_at(&skeleton, &format!("properties{SEPARATOR}c\n")), Some("2"));
        assert_eq!(left_at(&skeleton, "id"), None);
    }

    #[test]
    fn what_is_no_json_is_left_as_it_is() {
        for end in 0..EVENT.len() {
            let Some(json) = EVENT.get(..end) else { continue };
            let (skeleton, taken) = apart(json);
            assert!(skeleton.len() <= json.len() && taken.len() < 10);
            assert_eq!(put_together(&skeleton, |_, _| Some(())), None, "{json}");
        }
    }
}
