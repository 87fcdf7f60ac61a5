//! Keys, kept out of logs by their type.

use std::fmt;

/// A key or token. `Debug` and `Display` print `***`; only [`Secret::expose`]
/// gives the text, so each use can be found by its name.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Box<str>);

/// Why a text is no vendor's key. Not each vendor refuses what is none: Segment takes
/// everything under a key that is nobody's, and drops it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// As `docker --env-file` keeps them.
    #[error("a key in quotes, which are no part of it")]
    Quoted,
    /// As in `${SEGMENT_WRITE_KEY}`.
    #[error("the name of a variable that was not replaced by its value")]
    Variable,
    /// As in `<your-write-key>`.
    #[error("a placeholder in place of a key")]
    Placeholder,
    /// As in `Bearer 0123`.
    #[error("a key with a blank in it")]
    Blank,
    /// What no key of a vendor's has in it, and what would not arrive as it is.
    #[error("a key with a special character in it")]
    Special,
}

impl Secret {
    /// Checks that a text can be a vendor's key: letters, digits and any of
    /// `-._~+/=`, which is what credentials are made of. (RFC 6750, section 2.1)
    pub fn parse(key: &str) -> Result<Self, InvalidKey> {
        let is_key = |c: char| c.is_ascii_alphanumeric() || "-._~+/=".contains(c);
        if key.contains(['"', '\'', '`', '\u{201c}', '\u{201d}']) {
            Err(InvalidKey::Quoted)
        } else if key.contains(['$', '{', '}', '%']) {
            Err(InvalidKey::Variable)
        } else if key.contains(['<', '>', '[', ']']) || is_placeholder(key) {
            Err(InvalidKey::Placeholder)
        } else if key.contains(char::is_whitespace) {
            Err(InvalidKey::Blank)
        } else if !key.chars().all(is_key) {
            Err(InvalidKey::Special)
        } else {
            Ok(Self::new(key))
        }
    }

    /// Wraps a key.
    pub fn new(key: impl Into<Box<str>>) -> Self {
        Self(key.into())
    }

    /// The key itself, for the one place that puts it on the wire.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// What examples have where the key belongs.
fn is_placeholder(key: &str) -> bool {
    const WORDS: [&str; 9] =
        ["changeme", "replaceme", "todo", "none", "null", "undefined", "apikey", "writekey", "projecttoken"];
    let word = key.replace(['-', '_', '.'], "").to_ascii_lowercase();
    WORDS.contains(&&*word)
        || (word.starts_with("your")
            && (word.len() < key.len() || word.contains("key") || word.contains("token")))
        || word.bytes().all(|byte| byte == b'x')
        || key.bytes().all(|byte| byte == b'*')
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_never_prints_itself() {
        let key = Secret::new("canary-key");
        assert_eq!(format!("{key} {key:?}"), "*** ***");
        assert_eq!(key.expose(), "canary-key");
    }

    #[test]
    fn what_cannot_be_a_key_is_told_by_what_it_looks_like() {
        for (text, want) in [
            ("\"0123abcd\"", InvalidKey::Quoted),
            ("'0123abcd'", InvalidKey::Quoted),
            ("0123abcd'", InvalidKey::Quoted),
            ("\u{201c}0123abcd\u{201d}", InvalidKey::Quoted),
            ("$SEGMENT_WRITE_KEY", InvalidKey::Variable),
            ("${SEGMENT_WRITE_KEY}", InvalidKey::Variable),
            ("{{ .Values.key }}", InvalidKey::Variable),
            ("%SEGMENT_WRITE_KEY%", InvalidKey::Variable),
            ("<your-write-key>", InvalidKey::Placeholder),
            ("[write key]", InvalidKey::Placeholder),
            ("YOUR_WRITE_KEY", InvalidKey::Placeholder),
            ("xxxxxxxx", InvalidKey::Placeholder),
            ("change-me", InvalidKey::Placeholder),
            ("null", InvalidKey::Placeholder),
            ("***", InvalidKey::Placeholder),
            ("0123 abcd", InvalidKey::Blank),
            ("0123\u{a0}abcd", InvalidKey::Blank),
            // It would end the user name in a request's head.
            ("0123:abcd", InvalidKey::Special),
            ("0123\u{e9}", InvalidKey::Special),
            ("0123\u{0}", InvalidKey::Special),
        ] {
            assert_eq!(Secret::parse(text), Err(want), "{text}");
            assert!(!want.to_string().contains(text));
        }
        for key in [
            "0123456789abcdef0123456789abcdef",
            "sandbox-key",
            "aB3_x.y~z+/==",
            "nullify",
            "n",
            "xXx7Kq2",
            "yourS3q9",
        ] {
            assert_eq!(Secret::parse(key), Ok(Secret::new(key)));
        }
    }
}
