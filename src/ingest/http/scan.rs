//! JSON that is looked at once: its values are checked and passed over as they stand in the
//! text. A reader that makes something of each of them costs several times as much, and
//! most of what comes is only passed on. What is wrong with a text the general reader says.

use serde_json::value::RawValue;
use smallvec::SmallVec;

/// A value of some JSON, as it stands in its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Raw<'a>(&'a str);

impl<'a> Raw<'a> {
    pub(super) fn get(self) -> &'a str {
        self.0
    }

    /// The same for longer than its text.
    pub(super) fn boxed(self) -> Box<RawValue> {
        RawValue::from_string(self.0.to_owned()).expect("it was checked")
    }
}

impl<'a> From<&'a RawValue> for Raw<'a> {
    fn from(value: &'a RawValue) -> Self {
        Self(value.get())
    }
}

/// It is no JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// What is open around a place in a text. Objects and lists end in what is kept here.
type Open = SmallVec<[u8; 32]>;

/// Where a reader is in a text.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    /// There is no byte below a blank: nothing in a text has to be escaped and is not, and
    /// between tokens there are blanks at most.
    is_plain: bool,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        // Not one by one: this is a loop over words.
        let is_plain = !text
            .as_bytes()
            .chunks(64)
            .any(|bytes| bytes.iter().fold(false, |any, byte| any | (*byte < b' ')));
        Self { text, at: 0, is_plain }
    }

    /// The text is at its end.
    pub(super) fn end(&mut self) -> Result<(), Malformed> {
        self.space();
        if self.at == self.text.len() { Ok(()) } else { Err(Malformed) }
    }

    /// True if the next value is of the kind that begins with this byte.
    pub(super) fn is_next(&mut self, byte: u8) -> bool {
        self.space();
        self.peek() == Some(byte)
    }

    /// The next value as it stands, and what is read of it.
    pub(super) fn as_it_stands<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<(Raw<'a>, T), Malformed> {
        self.space();
        let start = self.at;
        let read = read(self)?;
        Ok((Raw(&self.text[start..self.at]), read))
    }

    /// Hands each member of the object on that is next: its name as it stands between its
    /// quotes, and this scanner before its value, which has to be read.
    pub(super) fn members(
        &mut self,
        mut each: impl FnMut(&'a str, &mut Self) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        self.begin(b'{')?;
        if self.is_end(b'}') {
            return Ok(());
        }
        loop {
            let name = self.name()?;
            each(name, self)?;
            if !self.goes_on(b'}')? {
                return Ok(());
            }
        }
    }

    /// Calls this before each item of the list that is next; it has to be read.
    pub(super) fn items(
        &mut self,
        mut each: impl FnMut(&mut Self) -> Result<(), Malformed>,
    ) -> Result<(), Malformed> {
        self.begin(b'[')?;
        if self.is_end(b']') {
            return Ok(());
        }
        loop {
            each(self)?;
            if !self.goes_on(b']')? {
                return Ok(());
            }
        }
    }

    /// The next value, whatever it is.
    pub(super) fn value(&mut self) -> Result<Raw<'a>, Malformed> {
        self.space();
        let start = self.at;
        let mut open = Open::new();
        loop {
            if self.opens(&mut open)? {
                continue;
            }
            // Behind a value: the next one, or the ends of what is open.
            loop {
                let Some(close) = open.last().copied() else { return Ok(Raw(&self.text[start..self.at])) };
                if self.goes_on(close)? {
                    if close == b'}' {
                        self.name()?;
                    }
                    break;
                }
                open.pop();
            }
        }
    }

    /// Passes over what is next: true if it is an object or a list that has something in
    /// it, which is next then.
    fn opens(&mut self, open: &mut Open) -> Result<bool, Malformed> {
        self.space();
        match self.peek().ok_or(Malformed)? {
            b'"' => self.string().map(|_| false),
            b'{' => {
                self.at += 1;
                if self.is_end(b'}') {
                    return Ok(false);
                }
                open.push(b'}');
                self.name()?;
                Ok(true)
            }
            b'[' => {
                self.at += 1;
                if self.is_end(b']') {
                    return Ok(false);
                }
                open.push(b']');
                Ok(true)
            }
            b't' => self.word("true"),
            b'f' => self.word("false"),
            b'n' => self.word("null"),
            _ => self.number(),
        }
    }

    fn begin(&mut self, byte: u8) -> Result<(), Malformed> {
        if !self.is_next(byte) {
            return Err(Malformed);
        }
        self.at += 1;
        Ok(())
    }

    /// True if this closes what has nothing in it; it is behind then.
    fn is_end(&mut self, close: u8) -> bool {
        let is_end = self.is_next(close);
        self.at += usize::from(is_end);
        is_end
    }

    /// True if something follows in what is open, and false at its end.
    fn goes_on(&mut self, close: u8) -> Result<bool, Malformed> {
        self.space();
        let next = self.peek();
        self.at += 1;
        match next {
            Some(b',') => Ok(true),
            Some(byte) if byte == close => Ok(false),
            _ => Err(Malformed),
        }
    }

    /// A member's name and the colon behind it.
    fn name(&mut self) -> Result<&'a str, Malformed> {
        if !self.is_next(b'"') {
            return Err(Malformed);
        }
        let name = self.string()?;
        self.begin(b':')?;
        Ok(name)
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    #[inline]
    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// What stands between the quotes that are next.
    #[inline]
    fn string(&mut self) -> Result<&'a str, Malformed> {
        let bytes = self.text.as_bytes();
        let start = self.at + 1;
        let mut end = start;
        loop {
            end = quote_or_backslash(bytes, end).ok_or(Malformed)?;
            if bytes[end] == b'"' {
                break;
            }
            end += escape(&bytes[end..])?;
        }
        let inner = &self.text[start..end];
        if !self.is_plain && inner.bytes().any(|byte| byte < b' ') {
            return Err(Malformed);
        }
        self.at = end + 1;
        Ok(inner)
    }

    fn word(&mut self, word: &str) -> Result<bool, Malformed> {
        if !self.text.as_bytes()[self.at..].starts_with(word.as_bytes()) {
            return Err(Malformed);
        }
        self.at += word.len();
        Ok(false)
    }

    fn number(&mut self) -> Result<bool, Malformed> {
        self.at += usize::from(self.peek() == Some(b'-'));
        match self.peek() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        Ok(false)
    }

    /// One digit at least.
    fn digits(&mut self) -> Result<(), Malformed> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at > start { Ok(()) } else { Err(Malformed) }
    }
}

/// The place of the first quote or backslash from a place on. Eight bytes at a time: most
/// texts are short, and to look for vectors costs more than they have bytes.
#[inline]
fn quote_or_backslash(bytes: &[u8], mut at: usize) -> Option<usize> {
    const LOW: u64 = u64::from_le_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_le_bytes([0x80; 8]);
    // The lowest high bit that is set is that of the first byte that is zero.
    let zeros = |word: u64| word.wrapping_sub(LOW) & !word & HIGH;
    while let Some(eight) = bytes.get(at..at + 8) {
        let word = u64::from_le_bytes(eight.try_into().expect("they are eight"));
        let found = zeros(word ^ (LOW * u64::from(b'"'))) | zeros(word ^ (LOW * u64::from(b'\\')));
        if found != 0 {
            return Some(at + found.trailing_zeros() as usize / 8);
        }
        at += 8;
    }
    let rest = bytes.get(at..)?.iter().position(|byte| matches!(byte, b'"' | b'\\'));
    rest.map(|more| at + more)
}

/// How many bytes the escape has that begins here.
#[cold]
fn escape(bytes: &[u8]) -> Result<usize, Malformed> {
    match bytes.get(1) {
        Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(2),
        Some(b'u') if bytes.get(2..6).is_some_and(|unit| unit.iter().all(u8::is_ascii_hexdigit)) => Ok(6),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use serde::de::IgnoredAny;

    use super::*;

    fn is_value(text: &str) -> bool {
        let mut scanner = Scanner::new(text);
        scanner.value().is_ok() && scanner.end().is_ok()
    }

    /// What the general reader takes, and nothing else.
    #[test]
    fn a_value_is_one_where_the_general_reader_says_so() {
        let texts = [
            "1",
            "-0",
            "0.5",
            "-1.25e+10",
            "1E-3",
            "12345678901234567890123",
            "01",
            "1.",
            ".5",
            "-",
            "+1",
            "1e",
            "1e+",
            "0x1",
            "NaN",
            "true",
            "tru",
            "false",
            "null",
            "nul",
            "\"\"",
            "\"a\"",
            "\"a",
            "\"\\n\"",
            "\"\\x\"",
            "\"\\u00e9\"",
            "\"\\u00g9\"",
            "\"\\u12\"",
            "\"\n\"",
            "\"\t\"",
            "\"é\"",
            "[]",
            "[ ]",
            "[1]",
            "[1,2]",
            "[1,]",
            "[,1]",
            "[1 2]",
            "[",
            "]",
            "{}",
            "{ }",
            "{\"a\":1}",
            "{\"a\":1,\"b\":[{}]}",
            "{\"a\":1,}",
            "{\"a\"}",
            "{a:1}",
            "{\"a\":}",
            "{1:2}",
            "{\"a\":1]",
            "[1}",
            "",
            " ",
            " 1 ",
            "1 1",
            "[[[[[]]]]]",
            "[[[[[]]]]",
            "\n{\n\"a\"\n:\t1\r\n}\n",
            "\u{b}1",
            "[\"a\",\"b\\\"c\"]",
            "{\"a\":{\"b\":[]}}",
        ];
        for text in texts {
            assert_eq!(is_value(text), serde_json::from_str::<IgnoredAny>(text).is_ok(), "{text}");
        }
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        assert!(is_value(&deep) && !is_value(&deep[1..]) && !is_value(&deep[..deep.len() - 1]));
    }

    #[test]
    fn a_quote_is_found_wherever_it_stands() {
        for length in 0..40 {
            for at in 0..length {
                for (special, before) in [(b'"', b'!'), (b'\\', b'['), (b'"', 0xC3), (b'\\', 0xDC)] {
                    let mut bytes = vec![before; length];
                    bytes[at] = special;
                    for from in 0..length {
                        let want = (from <= at).then_some(at);
                        assert_eq!(quote_or_backslash(&bytes, from), want, "{length} {at} {from}");
                    }
                }
            }
        }
        assert_eq!(quote_or_backslash(b"abc", 3), None);
    }

    /// Each byte of a text changed, and each of its beginnings.
    #[test]
    fn what_is_nearly_json_is_none_where_the_general_reader_says_so() {
        let text = r#" {"a\u00e9":[1.5e-3,true,null,{"b":"c\"d"},[]],"e":-0} "#;
        assert!(is_value(text));
        for at in (0..text.len()).filter(|at| text.is_char_boundary(*at)) {
            assert_eq!(is_value(&text[..at]), serde_json::from_str::<IgnoredAny>(&text[..at]).is_ok());
            for byte in ["\"", "\\", "{", "}", "[", "]", ",", ":", "0", "-", "e", " ", "\n", "\u{1}", "x"] {
                let changed = format!("{}{byte}{}", &text[..at], &text[at + 1..]);
                assert_eq!(
                    is_value(&changed),
                    serde_json::from_str::<IgnoredAny>(&changed).is_ok(),
                    "{changed}"
                );
            }
        }
    }
}
