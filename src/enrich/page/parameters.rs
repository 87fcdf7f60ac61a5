//! The parameters of a page's address: which of them are kept, what they say of a campaign,
//! and the click ids among them.

use std::borrow::Cow;

use percent_encoding::percent_decode_str;

use super::address::{cut, is_printable, push_printable};

/// What an advertiser's network marks a click with, in the order in which they are told.
pub(super) const CLICK_IDS: [&str; 8] =
    ["gclid", "gbraid", "wbraid", "msclkid", "fbclid", "ttclid", "twclid", "li_fat_id"];
/// A campaign's fields, as links name them behind `utm_`.
pub(super) const FIELDS: [&str; 6] = ["source", "medium", "campaign", "term", "content", "id"];
/// Most characters of a value; of that many a store's column is.
const VALUE_CHARS_MAX: usize = 255;
/// Most bytes of a click id.
const CLICK_ID_BYTES_MAX: usize = 512;

/// A parameter that says where somebody came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Begins with `utm_`, and is one of [`FIELDS`] or not.
    Utm(Option<usize>),
    /// One of [`CLICK_IDS`].
    ClickId(usize),
    Source,
    Ref,
}

impl Known {
    /// By its name, whatever its case.
    fn named(name: &str) -> Option<Self> {
        // Most are none.
        if !matches!(name.as_bytes().first()? | 0x20, b'f' | b'g' | b'l' | b'm' | b'r'..=b'u' | b'w') {
            return None;
        }
        if let (Some(utm), Some(field)) = (name.get(..4), name.get(4..))
            && utm.eq_ignore_ascii_case("utm_")
        {
            return Some(Self::Utm(place_of(field, &FIELDS)));
        }
        match place_of(name, &["source", "ref"]) {
            Some(0) => Some(Self::Source),
            Some(_) => Some(Self::Ref),
            None => place_of(name, &CLICK_IDS).map(Self::ClickId),
        }
    }
}

/// Where a name stands among some, whatever its case.
pub(super) fn place_of(name: &str, names: &[&str]) -> Option<usize> {
    names.iter().position(|it| it.eq_ignore_ascii_case(name))
}

/// A parameter as it stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parameter<'a> {
    /// With its name.
    pub(super) text: &'a str,
    name: &'a str,
    value: &'a str,
}

/// Those of a query that have something in them.
pub(super) fn parameters(query: &str) -> impl Iterator<Item = Parameter<'_>> {
    query.split('&').filter(|text| !text.is_empty()).map(|text| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        Parameter { text, name, value }
    })
}

impl<'a> Parameter<'a> {
    /// Which of those it is that say where somebody came from. No escape hides one, and nothing
    /// that is left out of what is kept.
    pub(super) fn known(&self) -> Option<Known> {
        if !self.name.contains('%') && is_printable(self.name) {
            return Known::named(self.name);
        }
        let mut name = String::new();
        push_printable(&mut name, &percent_decode_str(self.name).decode_utf8().ok()?);
        Known::named(&name)
    }

    /// Adds it without its value.
    pub(super) fn push_name(&self, to: &mut String) {
        push_printable(to, self.name);
        to.push('=');
    }

    /// What it says; nothing if that is empty or was never filled in.
    pub(super) fn value(&self) -> Option<Cow<'a, str>> {
        if has_macro(self.value) {
            return None;
        }
        clean(decoded(self.value))
    }

    /// The click id that it is.
    pub(super) fn click_id(&self) -> Option<Cow<'a, str>> {
        let id = decoded(self.value);
        if id.len() <= CLICK_ID_BYTES_MAX && !id.chars().any(char::is_control) {
            return (!id.is_empty()).then_some(id);
        }
        let mut printable = String::new();
        push_printable(&mut printable, &id);
        printable.truncate(cut(&printable, CLICK_ID_BYTES_MAX).len());
        (!printable.is_empty()).then_some(printable.into())
    }
}

/// A value as it was before it became part of an address: once, and what is no escape, or
/// none of a text, is what it is.
fn decoded(value: &str) -> Cow<'_, str> {
    if !value.bytes().any(|byte| matches!(byte, b'+' | b'%')) {
        return value.into();
    }
    let spaced = value.replace('+', " ");
    let bytes: Vec<u8> = percent_decode_str(&spaced).collect();
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(percent_encoding::percent_encode_byte(*byte));
        }
    }
    text.into()
}

/// A value as it is kept: blanks only between words and one each, no control characters, of
/// a bounded length; nothing if nothing is left, or if it was never filled in.
pub(super) fn clean(value: Cow<'_, str>) -> Option<Cow<'_, str>> {
    if has_macro(&value) {
        return None;
    }
    let value = if is_clean(&value) { value } else { cleaned(&value).into() };
    (!value.is_empty()).then_some(value)
}

/// True if nothing has to be done; of other letters than ASCII's that is not looked at.
fn is_clean(value: &str) -> bool {
    let bytes = value.as_bytes();
    value.len() <= VALUE_CHARS_MAX
        && bytes.iter().all(|byte| (b' '..0x7F).contains(byte))
        && !(bytes.starts_with(b" ") || bytes.ends_with(b" ") || bytes.windows(2).any(|two| two == b"  "))
}

fn cleaned(value: &str) -> String {
    let (mut clean, mut chars, mut is_blank_due) = (String::new(), 0, false);
    for c in value.chars() {
        if c.is_whitespace() {
            is_blank_due = chars > 0;
        } else if !c.is_control() {
            let more = 1 + usize::from(is_blank_due);
            if chars + more > VALUE_CHARS_MAX {
                break;
            }
            if is_blank_due {
                clean.push(' ');
            }
            clean.push(c);
            (chars, is_blank_due) = (chars + more, false);
        }
    }
    clean
}

/// True if something in a value stands for what should have been there: `{{campaign.name}}`,
/// `{keyword}`, `%%SITE%%`.
fn has_macro(value: &str) -> bool {
    if !value.bytes().any(|byte| matches!(byte, b'{' | b'%')) {
        return false;
    }
    let is_name = |name: &str| {
        let is_of_it =
            |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b':' | b' ');
        !name.trim().is_empty() && name.bytes().all(is_of_it)
    };
    let is_in_braces = |rest: &str| rest.split_once('}').is_some_and(|(name, _)| is_name(name));
    // What is between two of them, each with what is before it.
    value.split('{').skip(1).any(is_in_braces)
        || value.split("{{").skip(1).any(|rest| rest.contains("}}"))
        || {
            let mut parts = value.split("%%").skip(1).peekable();
            std::iter::from_fn(|| parts.next().filter(|_| parts.peek().is_some())).any(is_name)
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(value: &str) -> Option<String> {
        let text = format!("utm_source={value}");
        parameters(&text).next().unwrap().value().map(Cow::into_owned)
    }

    #[test]
    fn names_are_known_in_any_case_and_behind_escapes() {
        let known = |text| parameters(text).next().unwrap().known();
        for (text, want) in [
            ("utm_source=x", Some(Known::Utm(Some(0)))),
            ("UTM_Campaign", Some(Known::Utm(Some(2)))),
            ("utm_whatever=", Some(Known::Utm(None))),
            ("utm%5Fid=1", Some(Known::Utm(Some(5)))),
            ("GCLID=x", Some(Known::ClickId(0))),
            ("%67clid=x", Some(Known::ClickId(0))),
            // Without what is left out of an address it is one.
            ("g\u{0}clid\u{85}=x", Some(Known::ClickId(0))),
            ("gclid%00=x", Some(Known::ClickId(0))),
            ("li_fat_id=x", Some(Known::ClickId(7))),
            ("source=x", Some(Known::Source)),
            ("Ref=x", Some(Known::Ref)),
            ("token=x", None),
            ("utmsource=x", None),
            ("referrer=x", None),
            ("utmé=x", None),
            ("%ff=x", None),
            ("=x", None),
        ] {
            assert_eq!(known(text), want, "{text}");
        }
        assert_eq!(parameters("&&a=1&&b&").map(|it| it.text).collect::<Vec<_>>(), ["a=1", "b"]);
    }

    #[test]
    fn a_value_is_decoded_once_and_made_tidy() {
        let long = "é".repeat(300);
        for (raw, want) in [
            ("news", Some("news")),
            ("spring+sale", Some("spring sale")),
            ("spring%20sale%21", Some("spring sale!")),
            ("50%2525", Some("50%25")),
            ("100%", Some("100%")),
            ("%zz%4", Some("%zz%4")),
            ("caf%C3%A9", Some("café")),
            // Latin-1, which is no text here: as it came.
            ("caf%E9", Some("caf%E9")),
            ("++a++%09b%0A", Some("a b")),
            ("a%00b%C2%85c", Some("ab c")),
            ("a%E2%80%83b", Some("a b")),
            ("", None),
            ("+%20+", None),
            ("%00", None),
            (&long, Some(&long[..510])),
        ] {
            assert_eq!(value(raw).as_deref(), want, "{raw}");
        }
        assert_eq!(value(&"x".repeat(300)).unwrap().len(), 255);
        assert_eq!(value(&"x+".repeat(300)).unwrap(), "x ".repeat(128).trim_end(), "no blank at its end");
    }

    #[test]
    fn what_was_never_filled_in_is_absent() {
        for raw in [
            "{{campaign.name}}",
            "%7B%7Bcampaign.name%7D%7D",
            "fb_{{ad.id}}",
            "{{ad name|x}}",
            "{keyword}",
            "{lpurl}",
            "x-{matchtype}",
            "${source}",
            "{keyword:default}",
            "%%CAMPAIGN%%",
            "%%SITE%%-x",
            "%25%25PLACEMENT%25%25",
            "{campaignid}_{adgroupid}",
        ] {
            assert_eq!(value(raw), None, "{raw}");
        }
        for raw in ["{}", "a{b", "b}", "{a", "100%25%25", "a%25%25b", "{ }", "50%25 of 100%25"] {
            assert!(value(raw).is_some(), "{raw}");
        }
    }

    #[test]
    fn a_click_id_is_of_a_bounded_length() {
        let id = |value: &str| {
            let text = format!("gclid={value}");
            parameters(&text).next().unwrap().click_id().map(Cow::into_owned)
        };
        assert_eq!(id("Cj0K_-x").as_deref(), Some("Cj0K_-x"));
        assert_eq!(id("a%0Ab").as_deref(), Some("ab"));
        assert_eq!((id(""), id("%00")), (None, None));
        assert_eq!(id(&"é".repeat(400)).unwrap().len(), 512);
        assert_eq!(id(&format!("x{}", "é".repeat(400))).unwrap().len(), 511);
    }
}
