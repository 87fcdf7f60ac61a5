//! What others wrote, so that it is read and not obeyed.

use std::{borrow::Cow, fmt::Write};

use crate::characters::speaks_to_terminals;

/// Words of a caller's or of a provider's.
pub(super) fn words(text: &str) -> Cow<'_, str> {
    escaped(text, |to, c| to.extend(c.escape_unicode()))
}

/// JSON on one line, which stays the same JSON: what must be escaped can only stand in texts.
pub(super) fn json(line: &str) -> Cow<'_, str> {
    escaped(line, |to, c| {
        // None of them is beyond what four digits say.
        let _ = write!(to, "\\u{:04x}", u32::from(c));
    })
}

fn escaped(text: &str, escape: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.chars().any(speaks_to_terminals) {
        return text.into();
    }
    let mut printed = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match speaks_to_terminals(c) {
            true => escape(&mut printed, c),
            false => printed.push(c),
        }
    }
    printed.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEAKING: &str = "\u{1b}[2J\u{9b}31m\u{7f}\u{202e}\u{2066}\u{200f}\u{61c}";

    #[test]
    fn words_are_shown_and_not_obeyed() {
        let shown = words(SPEAKING).into_owned();
        assert_eq!(shown, r"\u{1b}[2J\u{9b}31m\u{7f}\u{202e}\u{2066}\u{200f}\u{61c}");
        assert!(matches!(words("é 日本 عربي 👩‍👩‍👧"), Cow::Borrowed(_)));
        assert_eq!(words("two\nlines"), r"two\u{a}lines");
    }

    #[test]
    fn json_stays_the_same_json() {
        let line = serde_json::to_string(&[SPEAKING, "back\\slash", "\u{9b}"]).unwrap();
        let printed = json(&line);
        assert!(!printed.chars().any(speaks_to_terminals), "{printed}");
        let value = |json: &str| serde_json::from_str::<serde_json::Value>(json).unwrap();
        assert_eq!(value(&printed), value(&line));
    }
}
