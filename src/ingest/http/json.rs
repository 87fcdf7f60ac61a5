//! A caller's JSON, as far as the doors look into it: the fields of one object, values
//! as they stand in the text.

use std::{borrow::Cow, collections::BTreeMap};

use serde::de::IgnoredAny;

use super::scan::{Malformed, Raw, Scanner};

/// The values of some names of an object, each as it stands; of a name that occurs twice
/// the last one. What the object has beside them is skipped, whatever it is.
pub(super) fn fields<'a, const N: usize>(
    json: &'a str,
    names: &[&str; N],
) -> Result<[Option<Raw<'a>>; N], serde_json::Error> {
    let mut scanner = Scanner::new(json);
    let read = named_members(&mut scanner, names).and_then(|values| scanner.end().map(|()| values));
    read.map_err(|Malformed| why_no_object(json))
}

/// The values of some names of the object that is next.
fn named_members<'a, const N: usize>(
    scanner: &mut Scanner<'a>,
    names: &[&str; N],
) -> Result<[Option<Raw<'a>>; N], Malformed> {
    let mut values = [None; N];
    scanner.members(|name, scanner| {
        let value = scanner.value()?;
        if let Some(place) = place_of(name, names) {
            values[place] = Some(value);
        }
        Ok(())
    })?;
    Ok(values)
}

/// An item of a list: all of it, and of an object the values of some names.
#[derive(Debug)]
pub(super) struct Item<'a, const N: usize> {
    pub(super) raw: Raw<'a>,
    pub(super) fields: Option<[Option<Raw<'a>>; N]>,
}

impl<'a, const N: usize> Item<'a, N> {
    /// Of a text that is nothing else.
    pub(super) fn of(json: &'a str, names: &[&str; N]) -> Result<Self, serde_json::Error> {
        let mut scanner = Scanner::new(json);
        let item = Self::read(&mut scanner, names).and_then(|item| scanner.end().map(|()| item));
        item.map_err(|Malformed| why_no_object(json))
    }

    fn read(scanner: &mut Scanner<'a>, names: &[&str; N]) -> Result<Self, Malformed> {
        if !scanner.is_next(b'{') {
            return scanner.value().map(|raw| Self { raw, fields: None });
        }
        let (raw, fields) = scanner.as_it_stands(|scanner| named_members(scanner, names))?;
        Ok(Self { raw, fields: Some(fields) })
    }

    /// Why an item that has no fields is no object.
    pub(super) fn why_no_object(&self) -> serde_json::Error {
        why_no_object(self.raw.get())
    }
}

/// What a list has.
#[derive(Debug)]
pub(super) enum Items<'a, const N: usize> {
    /// The first items, and how many there are.
    List(Vec<Item<'a, N>>, usize),
    /// It is another value.
    NoList,
}

impl<'a, const N: usize> Items<'a, N> {
    fn read(scanner: &mut Scanner<'a>, items_max: usize, names: &[&str; N]) -> Result<Self, Malformed> {
        if !scanner.is_next(b'[') {
            return scanner.value().map(|_| Self::NoList);
        }
        let (mut items, mut count) = (Vec::new(), 0);
        scanner.items(|scanner| {
            count += 1;
            if count <= items_max {
                items.push(Item::read(scanner, names)?);
                return Ok(());
            }
            scanner.value().map(|_| ())
        })?;
        Ok(Self::List(items, count))
    }
}

/// A list that is looked for in an object.
#[derive(Debug, Clone, Copy)]
pub(super) struct List<'n, const N: usize> {
    pub(super) name: &'n str,
    /// Most items that are kept.
    pub(super) items_max: usize,
    /// What is read of each of them.
    pub(super) names: &'n [&'n str; N],
}

/// The values of some names of an object, and what it has in a list: all of it looked at
/// once.
pub(super) fn fields_and_items<'a, const N: usize, const M: usize>(
    json: &'a str,
    names: &[&str; N],
    list: List<'_, M>,
) -> Result<([Option<Raw<'a>>; N], Option<Items<'a, M>>), serde_json::Error> {
    let (mut values, mut items) = ([None; N], None);
    let mut scanner = Scanner::new(json);
    let read = scanner.members(|name, scanner| {
        if place_of(name, &[list.name]).is_some() {
            items = Some(Items::read(scanner, list.items_max, list.names)?);
            return Ok(());
        }
        let value = scanner.value()?;
        if let Some(place) = place_of(name, names) {
            values[place] = Some(value);
        }
        Ok(())
    });
    match read.and_then(|()| scanner.end()) {
        Ok(()) => Ok((values, items)),
        Err(Malformed) => Err(why_no_object(json)),
    }
}

/// Where a name stands among those that are looked for.
fn place_of(name: &str, names: &[&str]) -> Option<usize> {
    let place = names.iter().position(|it| *it == name);
    if place.is_some() || memchr::memchr(b'\\', name.as_bytes()).is_none() {
        return place;
    }
    let name = unescaped(name)?;
    names.iter().position(|it| *it == name)
}

/// What is written between quotes.
#[cold]
fn unescaped(inner: &str) -> Option<String> {
    serde_json::from_str(&format!("\"{inner}\"")).ok()
}

/// What the general reader says of a text that is no object.
#[cold]
fn why_no_object(json: &str) -> serde_json::Error {
    let read = serde_json::from_str::<BTreeMap<Cow<'_, str>, IgnoredAny>>(json);
    read.err().unwrap_or_else(|| serde::de::Error::custom("want an object"))
}

/// An object's names and values, each as it stands; nothing of any other value.
pub(super) fn object(json: &str) -> Option<BTreeMap<Cow<'_, str>, Raw<'_>>> {
    let (mut all, mut scanner) = (BTreeMap::new(), Scanner::new(json));
    let read = scanner.members(|name, scanner| {
        let name = match name.contains('\\') {
            false => name.into(),
            true => unescaped(name).ok_or(Malformed)?.into(),
        };
        all.insert(name, scanner.value()?);
        Ok(())
    });
    read.and_then(|()| scanner.end()).ok().map(|()| all)
}

/// A text, as it stands or unescaped; nothing of any other value.
pub(super) fn text(value: Raw<'_>) -> Option<Cow<'_, str>> {
    let json = value.get();
    if !json.starts_with('"') {
        return None;
    }
    let inner = &json[1..json.len() - 1];
    if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
        return Some(inner.into());
    }
    unescaped(inner).map(Cow::Owned)
}

/// A text or a number as it stands; empty for null.
pub(super) fn scalar(value: Raw<'_>) -> Option<Cow<'_, str>> {
    match value.get().as_bytes().first() {
        Some(b'"') => text(value),
        Some(b'-' | b'0'..=b'9') => Some(value.get().into()),
        Some(b'n') => Some("".into()),
        _ => None,
    }
}

/// True for `null`.
pub(super) fn is_null(value: Raw<'_>) -> bool {
    value.get() == "null"
}

/// Puts U+FFFD for halves of surrogate pairs that stand alone, which are no text in any
/// encoding but occur where one was cut. Nothing if there are none.
pub(super) fn without_lone_surrogates(json: &str) -> Option<String> {
    let mut mended: Option<String> = None;
    let (mut copied, mut from) = (0, 0);
    while let Some(at) = memchr::memchr(b'\\', &json.as_bytes()[from..]).map(|at| from + at) {
        let (length, is_lone) = escape_at(json, at);
        if is_lone {
            let mended = mended.get_or_insert_with(|| String::with_capacity(json.len()));
            mended.push_str(&json[copied..at]);
            mended.push_str("\\ufffd");
            copied = at + length;
        }
        // Behind a backslash may stand a character of several bytes, in what is no JSON.
        from = (at + length..=json.len()).find(|at| json.is_char_boundary(*at)).unwrap_or(json.len());
    }
    mended.map(|mut mended| {
        mended.push_str(&json[copied..]);
        mended
    })
}

/// How long the escape at a place is, and if it is half of a pair that stands alone.
fn escape_at(json: &str, at: usize) -> (usize, bool) {
    const UNIT: usize = "\\u0000".len();
    let unit = |at: usize| {
        let digits = json.get(at..at + UNIT)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    match unit(at) {
        Some(0xD800..=0xDBFF) => match unit(at + UNIT) {
            Some(0xDC00..=0xDFFF) => (2 * UNIT, false),
            _ => (UNIT, true),
        },
        Some(0xDC00..=0xDFFF) => (UNIT, true),
        Some(_) => (UNIT, false),
        None => (2, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_name_that_occurs_twice_the_last_one_holds() {
        let json = r#" {"a":1,"b":{"a":[2]},"a":"3","c":null,"A":9} "#;
        let [a, c, d] = fields(json, &["a", "c", "d"]).unwrap();
        assert_eq!((a.unwrap().get(), c.unwrap().get()), (r#""3""#, "null"));
        assert!(d.is_none() && is_null(c.unwrap()));
        // A name may be escaped.
        assert_eq!(fields(r#"{"\u0061":1}"#, &["a"]).unwrap()[0].unwrap().get(), "1");
        for bad in ["[]", "1", "", "{", r#"{"a":1}x"#, r#"{"a"}"#, r#"{"b":[1,}"#] {
            assert!(fields(bad, &["a"]).is_err(), "{bad}");
        }
    }

    #[test]
    fn deep_json_that_nobody_reads_is_skipped() {
        let deep = format!(r#"{{"x":{}{},"a":1}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(fields(&deep, &["a"]).unwrap()[0].unwrap().get(), "1");
    }

    #[test]
    fn halves_of_pairs_that_stand_alone_are_replaced_and_nothing_else() {
        for (json, mended) in [
            (r#""a\ud83d""#, Some(r#""a\ufffd""#)),
            (r#""\ude00b""#, Some(r#""\ufffdb""#)),
            (r#""\ud83d\ud83d\ude00""#, Some(r#""\ufffd\ud83d\ude00""#)),
            (r#""\uD83D\uDE00""#, None),
            (r#""\\ud83d""#, None),
            (r#""\u00e9\n""#, None),
            (r#""\ud83""#, None),
            ("\"\\é\"", None),
            ("\\", None),
        ] {
            assert_eq!(without_lone_surrogates(json).as_deref(), mended, "{json}");
        }
    }

    #[test]
    fn a_text_is_unescaped_and_no_other_value_is_one() {
        let read = |json: &str| {
            let value = Scanner::new(json).value().unwrap();
            text(value).map(Cow::into_owned)
        };
        assert_eq!(read(r#""plain é""#).as_deref(), Some("plain é"));
        assert_eq!(read(r#""a\n\"\u00e9""#).as_deref(), Some("a\n\"é"));
        assert_eq!([read("1"), read("null"), read("{}")], [None, None, None]);
    }
}
