//! The address of a page, taken apart as it stands. A parser that puts it right would change
//! the path, which is kept as it was sent.

use std::borrow::Cow;

use super::host;

/// Most bytes that are looked at, whatever was sent.
const READ_BYTES_MAX: usize = 8 * 1024;

/// An address of the web in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address<'a> {
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    pub(super) host: Cow<'a, str>,
    /// From its first slash on; a slash if it has none.
    pub(super) path: &'a str,
    /// Without the `?`; empty if there is none.
    pub(super) query: &'a str,
    /// Without the `#`; empty if there is none.
    pub(super) fragment: &'a str,
}

impl<'a> Address<'a> {
    /// Of a text that is the address of a page; nothing if it is anything else. Who may log
    /// in and the port are left out.
    pub(super) fn of(text: &'a str) -> Option<Self> {
        let text = trimmed(text);
        let (scheme, rest) = text.split_once("://")?;
        let scheme = ["https", "http"].into_iter().find(|known| scheme.eq_ignore_ascii_case(known))?;
        Self::of_rest(scheme, rest)
    }

    /// Of what is behind the two slashes.
    pub(super) fn of_rest(scheme: &'static str, rest: &'a str) -> Option<Self> {
        let (authority, rest) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let host = host::normal(without_port(authority)?)?;
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = if path.is_empty() { "/" } else { path };
        Some(Self { scheme, host, path, query, fragment })
    }
}

/// A text of a bounded length without what is around it and says nothing.
pub(super) fn trimmed(text: &str) -> &str {
    let is_around = |c: char| c.is_whitespace() || c.is_control();
    cut(text.trim_start_matches(is_around), READ_BYTES_MAX).trim_end_matches(is_around)
}

/// The first bytes of a text, up to the end of a character.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let end = (0..=bytes_max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Adds a text to another without its control characters.
pub(super) fn push_printable(to: &mut String, text: &str) {
    // Those of one byte in UTF-8 and, behind 0xC2, those of two.
    if text.bytes().any(|byte| byte < b' ' || byte == 0x7F || byte == 0xC2) {
        to.extend(text.chars().filter(|c| !c.is_control()));
    } else {
        to.push_str(text);
    }
}

fn without_port(authority: &str) -> Option<&str> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let end = rest.find(']')? + "[]".len();
            (
                &authority[..end],
                authority[end..].strip_prefix(':').or((end == authority.len()).then_some(""))?,
            )
        }
        None => authority.split_once(':').unwrap_or((authority, "")),
    };
    port.bytes().all(|byte| byte.is_ascii_digit()).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart_as_it_stands() {
        let of = |text| {
            let Address { scheme, host, path, query, fragment } = Address::of(text)?;
            Some(format!("{scheme} {host} {path} {query} {fragment}"))
        };
        for (text, want) in [
            ("https://x.example/a/../b//?q=1?2#f#g", "https x.example /a/../b// q=1?2 f#g"),
            (" HTTP://X.Example ", "http x.example /  "),
            ("https://me:pass@x.example:8443?q", "https x.example / q "),
            ("https://a@b@x.example#/p", "https x.example /  /p"),
            ("https://[::1]:3000/", "https [::1] /  "),
            ("https://x.example:/é%zz", "https x.example /é%zz  "),
        ] {
            assert_eq!(of(text).as_deref(), Some(want), "{text}");
        }
        for text in [
            "",
            "x.example",
            "/path",
            "//x.example/",
            "ftp://x.example/",
            "javascript://x.example/%0aalert(1)",
            "https:x.example",
            "https:/x.example",
            "https://",
            "https:///p",
            "https://?q",
            "https://x.example:80a/",
            "https://[::1/",
            "https://[::1]x/",
            "https://evil\\@x.example\\/",
            "https://a b/",
            "data:text/html,x",
            "about:blank",
            "file:///etc/passwd",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }

    #[test]
    fn only_so_much_is_looked_at_and_no_character_is_cut() {
        let long = format!("https://x.example/{}", "é".repeat(READ_BYTES_MAX));
        let path = Address::of(&long).unwrap().path;
        assert!(path.len() < READ_BYTES_MAX && path.ends_with('é'));
        assert_eq!(cut("aé", 2), "a");
        let mut clean = String::new();
        push_printable(&mut clean, "a\u{0}\u{85}\u{7f}é\n©");
        assert_eq!(clean, "aé©");
    }
}
