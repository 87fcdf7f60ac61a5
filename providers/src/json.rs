//! Writes JSON: texts of callers, and the vendors' envelopes, which are a few
//! fields of our own around text that is JSON already.

use std::io;

use serde::Serialize;
use serde_json::value::RawValue;

/// JSON that is being written.
///
/// Every event goes through here several times, so room is looked for once for a
/// text with its quotes, and not for each byte.
#[derive(Debug, Default)]
pub(crate) struct Json {
    /// Written as far as `len`; what is behind that is to be written over.
    bytes: Vec<u8>,
    len: usize,
}

/// Zeros that are made at once: more would leave the cache before they are used.
const ROOM_BYTES: usize = 512;

impl Json {
    /// Has room for so many bytes; more is made when it is needed.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), len: 0 }
    }

    /// What was written.
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        self.bytes.truncate(self.len);
        self.bytes
    }

    /// Writes a byte.
    #[inline]
    pub(crate) fn push(&mut self, byte: u8) {
        self.room(1)[0] = byte;
        self.len += 1;
    }

    /// Writes bytes that are JSON already.
    #[inline]
    pub(crate) fn raw(&mut self, json: &[u8]) {
        self.room(json.len())[..json.len()].copy_from_slice(json);
        self.len += json.len();
    }

    /// Writes a text quoted and escaped.
    pub(crate) fn text(&mut self, text: &[u8]) {
        let end = text.len() + 1;
        match self.bytes.get_mut(self.len..) {
            // Most texts are short. For them nothing is called, so no register is saved.
            Some(room) if text.len() <= SHORT_BYTES_MAX && room.len() > end => {
                if !copy_short(&mut room[1..end], text) {
                    return self.escaped(text);
                }
                (room[0], room[end]) = (b'"', b'"');
                self.len += end + 1;
            }
            _ => self.long_text(text),
        }
    }

    #[inline(never)]
    fn long_text(&mut self, text: &[u8]) {
        if !is_plain(text) {
            return self.escaped(text);
        }
        let (room, end) = (self.room(text.len() + 2), text.len() + 1);
        (room[0], room[end]) = (b'"', b'"');
        room[1..end].copy_from_slice(text);
        self.len += end + 1;
    }

    /// Writes a number, which must be finite.
    pub(crate) fn number(&mut self, value: impl Serialize) {
        serde_json::to_writer(self, &value).expect("it takes any bytes");
    }

    /// At least so many bytes behind what was written.
    #[inline]
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.bytes.len() - self.len < bytes {
            self.grow(bytes);
        }
        &mut self.bytes[self.len..]
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self, bytes: usize) {
        // What is reserved is used up first.
        let reserved = (self.bytes.capacity() - self.len).min(ROOM_BYTES);
        self.bytes.resize(self.len + bytes.max(reserved), 0);
    }

    #[cold]
    fn escaped(&mut self, text: &[u8]) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        self.push(b'"');
        for part in text.chunk_by(|byte, next| !must_be_escaped(*byte) && !must_be_escaped(*next)) {
            match *part {
                [b'\n'] => self.raw(b"\\n"),
                [b'\r'] => self.raw(b"\\r"),
                [b'\t'] => self.raw(b"\\t"),
                [0x08] => self.raw(b"\\b"),
                [0x0C] => self.raw(b"\\f"),
                [byte @ ..b' '] => {
                    let [high, low] = [byte >> 4, byte & 15].map(|digit| HEX[usize::from(digit)]);
                    self.raw(&[b'\\', b'u', b'0', b'0', high, low]);
                }
                [byte @ (b'"' | b'\\')] => self.raw(&[b'\\', byte]),
                _ => self.raw(part),
            }
        }
        self.push(b'"');
    }
}

impl io::Write for Json {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.raw(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that a text must not hold as they are. (RFC 8259, section 7)
fn must_be_escaped(byte: u8) -> bool {
    matches!(byte, ..b' ' | b'"' | b'\\')
}

/// Most bytes of a text that is copied without a loop.
const SHORT_BYTES_MAX: usize = 16;

/// Copies a short text to where there is as much room, and returns true if none of its
/// bytes must be escaped.
#[inline(always)]
fn copy_short(to: &mut [u8], text: &[u8]) -> bool {
    match text.len() {
        0 => true,
        1 => {
            to[0] = text[0];
            !must_be_escaped(text[0])
        }
        2..4 => {
            let [first, last] = copy_ends(to, text).map(|end| u64::from(u16::from_le_bytes(end)));
            let word = first | last << 16;
            escapes_in(word | word << 32) == 0
        }
        4..8 => {
            let [first, last] = copy_ends(to, text).map(|end| u64::from(u32::from_le_bytes(end)));
            escapes_in(first | last << 32) == 0
        }
        _ => {
            let [first, last] = copy_ends(to, text).map(|end| escapes_in(u64::from_le_bytes(end)));
            first | last == 0
        }
    }
}

/// True if none of a text's bytes must be escaped.
fn is_plain(text: &[u8]) -> bool {
    let Some(last) = text.last_chunk() else { return !text.iter().any(|byte| must_be_escaped(*byte)) };
    // The last word may overlap the one before.
    let (words, _) = text.as_chunks();
    let words = words.iter().chain([last]);
    words.fold(0, |escapes, word| escapes | escapes_in(u64::from_le_bytes(*word))) == 0
}

/// Copies a text of N to 2 N bytes, and returns its first and its last N, which may
/// overlap.
#[inline(always)]
fn copy_ends<const N: usize>(to: &mut [u8], text: &[u8]) -> [[u8; N]; 2] {
    [0, text.len() - N].map(|at| {
        let mut end = [0; N];
        end.copy_from_slice(&text[at..at + N]);
        to[at..at + N].copy_from_slice(&end);
        end
    })
}

/// Not zero if one of eight bytes must be escaped. In `word - n` for each byte, a
/// byte's highest bit comes on if it was below `n`. A borrow may turn on that of
/// the next byte too, above one that was found.
#[inline]
fn escapes_in(word: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    let below = |word: u64, byte: u8| word.wrapping_sub(ONES * u64::from(byte)) & !word;
    let holds = |byte: u8| below(word ^ (ONES * u64::from(byte)), 1);
    (below(word, b' ') | holds(b'"') | holds(b'\\')) & HIGHS
}

/// An object that is being written to the end of a body. Keys are the vendors'
/// own, and need no escapes.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    out: &'a mut Json,
    empty: bool,
}

impl<'a> Object<'a> {
    /// Opens an object.
    pub(crate) fn begin(out: &'a mut Json) -> Self {
        out.push(b'{');
        Self { out, empty: true }
    }

    /// A text field.
    #[inline(always)]
    pub(crate) fn string(&mut self, key: &'static str, value: &str) {
        self.key(key).text(value.as_bytes());
    }

    /// A text field that is left out when there is no text.
    #[inline(always)]
    pub(crate) fn optional(&mut self, key: &'static str, value: Option<&str>) {
        if let Some(value) = value {
            self.string(key, value);
        }
    }

    /// A whole number.
    #[inline(always)]
    pub(crate) fn integer(&mut self, key: &'static str, value: i64) {
        self.key(key).number(value);
    }

    /// A field whose value is JSON already.
    #[inline(always)]
    pub(crate) fn raw(&mut self, key: &'static str, json: &str) {
        self.key(key).raw(json.as_bytes());
    }

    /// All fields of an object that is JSON already, beside our own.
    #[inline(always)]
    pub(crate) fn splice(&mut self, object: &str) {
        let fields = &object[1..object.len() - 1];
        if !fields.trim_ascii().is_empty() {
            self.comma();
            self.out.raw(fields.as_bytes());
        }
    }

    /// Opens an object in a field.
    #[inline(always)]
    pub(crate) fn object(&mut self, key: &'static str) -> Object<'_> {
        Object::begin(self.key(key))
    }

    /// Opens a list in a field.
    pub(crate) fn list(&mut self, key: &'static str) -> List<'_> {
        List::begin(self.key(key))
    }

    /// A text under a caller's name.
    pub(crate) fn named_string(&mut self, name: &str, value: &str) {
        self.name(name).text(value.as_bytes());
    }

    /// A value that is JSON already under a caller's name.
    pub(crate) fn named_raw(&mut self, name: &str, json: &str) {
        self.name(name).raw(json.as_bytes());
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

    #[inline(always)]
    fn key(&mut self, key: &'static str) -> &mut Json {
        self.comma();
        let (room, end) = (self.out.room(key.len() + 3), key.len() + 1);
        room[0] = b'"';
        room[1..end].copy_from_slice(key.as_bytes());
        room[end..end + 2].copy_from_slice(b"\":");
        self.out.len += key.len() + 3;
        self.out
    }

    fn name(&mut self, name: &str) -> &mut Json {
        self.comma();
        self.out.text(name.as_bytes());
        self.out.push(b':');
        self.out
    }

    #[inline(always)]
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
    out: &'a mut Json,
    start: usize,
    /// Where the comma before the last item stands, or the item itself.
    last: usize,
}

impl<'a> List<'a> {
    /// Opens a list.
    pub(crate) fn begin(out: &'a mut Json) -> Self {
        out.push(b'[');
        let start = out.len;
        Self { out, start, last: start }
    }

    /// Opens an object as the next item.
    pub(crate) fn object(&mut self) -> Object<'_> {
        Object::begin(self.item())
    }

    /// Adds a text.
    pub(crate) fn string(&mut self, value: &str) {
        self.item().text(value.as_bytes());
    }

    /// Bytes of the last item.
    pub(crate) fn last_bytes(&self) -> usize {
        self.out.len - self.last - usize::from(self.last > self.start)
    }

    /// Takes the last item out again.
    pub(crate) fn remove_last(&mut self) {
        self.out.len = self.last;
    }

    /// Closes the list.
    pub(crate) fn end(self) {
        self.out.push(b']');
    }

    fn item(&mut self) -> &mut Json {
        self.last = self.out.len;
        if self.last > self.start {
            self.out.push(b',');
        }
        self.out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_object_is_valid_json_whatever_its_fields_are() {
        let mut out = Json::default();
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
            String::from_utf8(out.into_bytes()).unwrap(),
            r#"{"a\"b":"c\n","x":1,"y":[2],"inner":{"n":-3},"list":["p","r"]}"#
        );
    }

    #[test]
    fn every_byte_is_seen_at_every_place() {
        for (byte, len) in (0..=u8::MAX).flat_map(|byte| (0..40).map(move |len| (byte, len))) {
            for place in 0..len {
                let (mut text, mut out) = (vec![b'x'; len], Json::default());
                text[place] = byte;
                // With room and without.
                for _ in 0..2 {
                    out.text(&text);
                    let written = out.bytes[..out.len].to_vec();
                    let is_as_it_was = written == [b"\"", &*text, b"\""].concat();
                    assert_eq!(is_as_it_was, !must_be_escaped(byte), "{byte} at {place} of {len}");
                    out.len = 0;
                }
            }
        }
    }

    proptest! {
        #[test]
        fn a_text_is_written_as_serde_writes_it(value in prop::collection::vec(any::<char>(), 0..40)) {
            let value: String = value.into_iter().collect();
            let mut out = Json::default();
            out.text(value.as_bytes());
            let out = String::from_utf8(out.into_bytes()).unwrap();
            prop_assert_eq!(out, serde_json::to_string(&value).unwrap());
        }
    }
}
