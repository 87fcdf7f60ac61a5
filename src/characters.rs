//! Characters that show nothing by themselves and change how a text is shown: what a
//! terminal obeys, what turns the direction of writing, what cannot be seen.

/// C0, DEL and C1: what terminals and line printers obey.
pub(crate) fn is_control(c: char) -> bool {
    c.is_control()
}

/// Turns the direction of all that follows, also beyond the text: embeddings, overrides,
/// isolates.
pub(crate) fn is_turning(c: char) -> bool {
    matches!(c, '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

/// Says which way its neighbours go: part of many languages' texts, of no name.
fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{61C}' | '\u{200E}' | '\u{200F}')
}

/// Has no width: part of many languages' texts and of emoji, and makes of one name two that
/// look alike.
fn is_zero_width(c: char) -> bool {
    matches!(c, '\u{AD}' | '\u{180E}' | '\u{200B}'..='\u{200D}' | '\u{2060}'..='\u{2064}' | '\u{FEFF}')
}

/// Must not stand in a name or an id under the strict rules.
pub(crate) fn is_unseen(c: char) -> bool {
    is_control(c) || is_turning(c) || is_direction_mark(c) || is_zero_width(c)
}

/// Must not reach a terminal: lines stay lines, and are shown as they are.
pub(crate) fn speaks_to_terminals(c: char) -> bool {
    is_control(c) || is_turning(c) || is_direction_mark(c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_of_every_language_are_seen() {
        for c in "aZ0 _-é🙂日ع\u{301}\u{A0}\u{2028}".chars() {
            assert!(!is_unseen(c) && !speaks_to_terminals(c), "{c:?}");
        }
        for c in "\u{0}\t\n\u{1B}\u{7F}\u{9B}\u{202A}\u{202E}\u{2066}\u{2069}\u{200F}".chars() {
            assert!(is_unseen(c) && speaks_to_terminals(c), "{c:?}");
        }
        for c in "\u{200B}\u{200D}\u{FEFF}\u{AD}\u{2060}".chars() {
            assert!(is_unseen(c) && !speaks_to_terminals(c), "{c:?}");
        }
    }
}
