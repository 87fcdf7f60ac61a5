//! Writes the vendors' envelopes: a few fields of our own around text that is
//! JSON already.

use serde_json::value::RawValue;

/// An object that is being written to the end of a body. Keys are the vendors'
/// own, and need no escapes.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    out: &'a mut Vec<u8>,
    empty: bool,
}

impl<'a> Object<'a> {
    /// Opens an object.
    pub(crate) fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, empty: true }
    }

    /// A text field.
    #[inline]
    pub(crate) fn string(&mut self, key: &'static str, value: &str) {
        text(self.key(key), value.as_bytes());
    }

    /// A text field that is left out when there is no text.
    #[inline]
    pub(crate) fn optional(&mut self, key: &'static str, value: Option<&str>) {
        if let Some(value) = value {
            self.string(key, value);
        }
    }

    /// A whole number.
    #[inline]
    pub(crate) fn integer(&mut self, key: &'static str, value: i64) {
        integer(self.key(key), value);
    }

    /// A field whose value is JSON already.
    #[inline]
    pub(crate) fn raw(&mut self, key: &'static str, json: &str) {
        self.key(key).extend_from_slice(json.as_bytes());
    }

    /// All fields of an object that is JSON already, beside our own.
    pub(crate) fn splice(&mut self, object: &str) {
        let fields = &object[1..object.len() - 1];
        if !fields.trim_ascii().is_empty() {
            self.comma();
            self.out.extend_from_slice(fields.as_bytes());
        }
    }

    /// Opens an object in a field.
    #[inline]
    pub(crate) fn object(&mut self, key: &'static str) -> Object<'_> {
        Object::begin(self.key(key))
    }

    /// Opens a list in a field.
    pub(crate) fn list(&mut self, key: &'static str) -> List<'_> {
        List::begin(self.key(key))
    }

    /// A text under a caller's name.
    pub(crate) fn named_string(&mut self, name: &str, value: &str) {
        text(self.name(name), value.as_bytes());
    }

    /// A value that is JSON already under a caller's name.
    pub(crate) fn named_raw(&mut self, name: &str, json: &str) {
        self.name(name).extend_from_slice(json.as_bytes());
    }

    /// Entries of properties, values as they are.
    pub(crate) fn entries<'e>(&mut self, entries: impl IntoIterator<Item = (&'e str, &'e RawValue)>) {
        for (name, value) in entries {
            self.named_raw(name, value.get());
        }
    }

    /// Closes the object.
    pub(crate) fn end(self) {
        self.out.push(b'}');
    }

    #[inline]
    fn key(&mut self, key: &'static str) -> &mut Vec<u8> {
        self.comma();
        self.out.push(b'"');
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
        self.out
    }

    fn name(&mut self, name: &str) -> &mut Vec<u8> {
        self.comma();
        text(self.out, name.as_bytes());
        self.out.push(b':');
        self.out
    }

    #[inline]
    fn comma(&mut self) {
        if !self.empty {
            self.out.push(b',');
        }
        self.empty = false;
    }
}

/// A list that is being written to the end of a body.
#[derive(Debug)]
pub(crate) struct List<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
    /// Where the comma before the last item stands, or the item itself.
    last: usize,
}

impl<'a> List<'a> {
    /// Opens a list.
    pub(crate) fn begin(out: &'a mut Vec<u8>) -> Self {
        out.push(b'[');
        let start = out.len();
        Self { out, start, last: start }
    }

    /// Opens an object as the next item.
    pub(crate) fn object(&mut self) -> Object<'_> {
        Object::begin(self.item())
    }

    /// Adds a text.
    pub(crate) fn string(&mut self, value: &str) {
        text(self.item(), value.as_bytes());
    }

    /// Bytes of the last item.
    pub(crate) fn last_bytes(&self) -> usize {
        self.out.len() - self.last - usize::from(self.last > self.start)
    }

    /// Takes the last item out again.
    pub(crate) fn remove_last(&mut self) {
        self.out.truncate(self.last);
    }

    /// Closes the list.
    pub(crate) fn end(self) {
        self.out.push(b']');
    }

    fn item(&mut self) -> &mut Vec<u8> {
        self.last = self.out.len();
        if self.last > self.start {
            self.out.push(b',');
        }
        self.out
    }
}

/// Bytes that a text must not hold as they are. (RFC 8259, section 7)
const MUST_BE_ESCAPED: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < b' ' {
        table[byte as usize] = true;
        byte += 1;
    }
    table[b'"' as usize] = true;
    table[b'\\' as usize] = true;
    table
};

/// Writes a text quoted and escaped.
pub(crate) fn text(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    let mut rest = text;
    if is_plain(text) {
        out.extend_from_slice(text);
        out.push(b'"');
        return;
    }
    while let Some(at) = rest.iter().position(|byte| MUST_BE_ESCAPED[usize::from(*byte)]) {
        out.extend_from_slice(&rest[..at]);
        escape(out, rest[at]);
        rest = &rest[at + 1..];
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

/// True if a text holds none of them; looks at eight bytes at a time. In
/// `word - n` for each byte, a byte's highest bit comes on if it was below `n`. A
/// borrow may turn on that of the next byte too, above one that was found.
fn is_plain(text: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    let below = |word: u64, byte: u8| word.wrapping_sub(ONES * u64::from(byte)) & !word;
    let holds = |word: u64, byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    let (words, rest) = text.as_chunks::<8>();
    words.iter().all(|word| {
        let word = u64::from_ne_bytes(*word);
        (below(word, b' ') | holds(word, b'"') | holds(word, b'\\')) & HIGHS == 0
    }) && rest.iter().all(|byte| !MUST_BE_ESCAPED[usize::from(*byte)])
}

/// Writes one of them.
#[cold]
fn escape(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'\\');
    match byte {
        b'\n' => out.push(b'n'),
        b'\r' => out.push(b'r'),
        b'\t' => out.push(b't'),
        0x08 => out.push(b'b'),
        0x0C => out.push(b'f'),
        ..b' ' => {
            out.extend_from_slice(b"u00");
            out.extend([HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]]);
        }
        _ => out.push(byte),
    }
}

/// Writes a whole number.
pub(crate) fn integer(out: &mut Vec<u8>, value: i64) {
    serde_json::to_writer(out, &value).expect("a vector takes any bytes");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_object_is_valid_json_whatever_its_fields_are() {
        let mut out = Vec::new();
        let mut object = Object::begin(&mut out);
        object.splice("{ }");
        object.named_string("a\"b", "c\n");
        object.optional("no", None);
        object.splice(r#"{"x":1,"y":[2]}"#);
        let mut inner = object.object("inner");
        inner.integer("n", -3);
        inner.end();
        let mut list = object.list("list");
        for item in ["no", "p", "no", "r"] {
            list.string(item);
            if item == "no" {
                assert_eq!(list.last_bytes(), r#""no""#.len());
                list.remove_last();
            }
        }
        list.end();
        object.end();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            r#"{"a\"b":"c\n","x":1,"y":[2],"inner":{"n":-3},"list":["p","r"]}"#
        );
    }

    #[test]
    fn every_byte_is_seen_at_every_place() {
        for (byte, place) in (0..=u8::MAX).flat_map(|byte| (0..20).map(move |place| (byte, place))) {
            let mut text = [b'x'; 20];
            text[place] = byte;
            assert_eq!(is_plain(&text), !MUST_BE_ESCAPED[usize::from(byte)], "{byte} at {place}");
        }
    }

    proptest! {
        #[test]
        fn a_text_is_written_as_serde_writes_it(value in prop::collection::vec(any::<char>(), 0..40)) {
            let value: String = value.into_iter().collect();
            let mut out = Vec::new();
            text(&mut out, value.as_bytes());
            prop_assert_eq!(String::from_utf8(out).unwrap(), serde_json::to_string(&value).unwrap());
        }
    }
}
