//! What a browser says of itself beside its user agent: client hints in the headers of
//! HTTP, and the same by its JavaScript in the event's `context.userAgentData`.
//!
//! All of it is the caller's. What is malformed or too long is as good as not sent.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// Longest header that is read.
const HEADER_BYTES_MAX: usize = 1_024;
/// Longest `userAgentData` that is read.
const DATA_BYTES_MAX: usize = 4_096;
/// Most brands of a list.
const BRANDS_MAX: usize = 16;

/// The hints in a request's headers, as they came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hints<'a>([Option<&'a str>; 6]);

impl<'a> Hints<'a> {
    /// The headers, in lower case. The first three come unasked with each request of a
    /// browser of Chromium's over HTTPS.
    pub const HEADERS: [&'static str; 6] = [
        "sec-ch-ua",
        "sec-ch-ua-mobile",
        "sec-ch-ua-platform",
        "sec-ch-ua-platform-version",
        "sec-ch-ua-model",
        "sec-ch-ua-full-version-list",
    ];

    /// None.
    pub const NONE: Hints<'static> = Hints([None; 6]);

    /// Reads the headers by their names.
    pub fn read(header: impl FnMut(&'static str) -> Option<&'a str>) -> Self {
        let is_short = |value: &&str| value.len() <= HEADER_BYTES_MAX;
        Self(Self::HEADERS.map(header).map(|value| value.filter(is_short)))
    }

    /// The values, in the order of [`Self::HEADERS`].
    pub(crate) fn values(&self) -> [Option<&'a str>; 6] {
        self.0
    }
}

/// What a browser says, body before headers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Told<'a> {
    /// The brand and its major version.
    pub(super) browser: Option<(Cow<'a, str>, Cow<'a, str>)>,
    pub(super) is_mobile: Option<bool>,
    /// Never empty, as the other texts.
    pub(super) platform: Option<Cow<'a, str>>,
    pub(super) platform_version: Option<Cow<'a, str>>,
    pub(super) model: Option<Cow<'a, str>>,
}

impl<'a> Told<'a> {
    pub(super) fn read(data: Option<&'a str>, hints: &Hints<'a>) -> Self {
        let body = data.filter(|data| data.len() <= DATA_BYTES_MAX).map(Self::of_data).unwrap_or_default();
        let headers = Self::of_headers(hints);
        Self {
            browser: body.browser.or(headers.browser),
            is_mobile: body.is_mobile.or(headers.is_mobile),
            platform: body.platform.or(headers.platform),
            platform_version: body.platform_version.or(headers.platform_version),
            model: body.model.or(headers.model),
        }
    }

    fn of_headers(hints: &Hints<'a>) -> Self {
        let [brands, mobile, platform, platform_version, model, full_versions] = hints.0;
        let text = |value: Option<&'a str>| value.and_then(item).filter(|text| is_said(text));
        Self {
            browser: brands
                .and_then(list)
                .and_then(choose)
                .or_else(|| full_versions.and_then(list).and_then(choose)),
            is_mobile: match mobile.map(str::trim) {
                Some("?1") => Some(true),
                Some("?0") => Some(false),
                _ => None,
            },
            platform: text(platform),
            platform_version: text(platform_version),
            model: text(model),
        }
    }

    /// Each member for itself: a bad one costs no other.
    fn of_data(data: &'a str) -> Self {
        let Ok(data) = serde_json::from_str::<Data<'a>>(data) else { return Self::default() };
        let text = |value| read::<Text<'a>>(value).map(|text| text.0).filter(|text| is_said(text));
        let brands = |value| read::<Vec<Brand<'a>>>(value).and_then(choose);
        Self {
            browser: brands(data.brands).or_else(|| brands(data.full_version_list)),
            is_mobile: read(data.mobile),
            platform: text(data.platform),
            platform_version: text(data.platform_version),
            model: text(data.model),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// `navigator.userAgentData`, as SDKs send it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data<'a> {
    #[serde(borrow)]
    brands: Option<&'a RawValue>,
    full_version_list: Option<&'a RawValue>,
    mobile: Option<&'a RawValue>,
    platform: Option<&'a RawValue>,
    platform_version: Option<&'a RawValue>,
    model: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Debug, Deserialize)]
struct Brand<'a> {
    #[serde(borrow)]
    brand: Cow<'a, str>,
    #[serde(borrow)]
    version: Cow<'a, str>,
}

fn read<'a, T: Deserialize<'a>>(value: Option<&'a RawValue>) -> Option<T> {
    serde_json::from_str(value?.get()).ok()
}

fn is_said(text: &str) -> bool {
    !text.trim().is_empty()
}

/// The brand that says most: the product before what it is built of.
fn choose(brands: Vec<Brand<'_>>) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    // One that is no browser, so that nobody relies on the list ("Not;A=Brand").
    let is_grease = |brand: &Brand<'_>| brand.brand.contains("Not") && brand.brand.contains("Brand");
    let rank = |brand: &Brand<'_>| match &*brand.brand {
        "Chromium" => 2,
        "Google Chrome" => 1,
        _ => 0,
    };
    let said = brands.into_iter().take(BRANDS_MAX).filter(|brand| is_said(&brand.brand) && !is_grease(brand));
    let Brand { brand, version } = said.min_by_key(rank)?;
    Some((brand, version))
}

/// A list of structured fields (RFC 8941): `"Chromium";v="128", "Google Chrome";v="128"`.
fn list(text: &str) -> Option<Vec<Brand<'_>>> {
    let mut brands = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() && brands.len() < BRANDS_MAX {
        let (brand, after) = quoted(rest)?;
        let (version, after) = version(after)?;
        brands.push(Brand { brand, version });
        rest = after.trim_start();
        if !rest.is_empty() {
            rest = rest.strip_prefix(',')?.trim_start();
        }
    }
    Some(brands)
}

/// The parameters of an item: the version, which is empty if there is none, and what is
/// behind them.
fn version(mut rest: &str) -> Option<(Cow<'_, str>, &str)> {
    let mut version = Cow::Borrowed("");
    while let Some(parameter) = rest.strip_prefix(';') {
        let (name, value) = parameter.trim_start().split_once('=')?;
        let (value, after) = quoted(value)?;
        if name == "v" {
            version = value;
        }
        rest = after;
    }
    Some((version, rest))
}

/// An item that is a text.
fn item(text: &str) -> Option<Cow<'_, str>> {
    quoted(text.trim()).map(|(value, _)| value)
}

/// A text in quotes, and what is behind it.
fn quoted(text: &str) -> Option<(Cow<'_, str>, &str)> {
    let text = text.strip_prefix('"')?;
    let end = text.find(['"', '\\'])?;
    if text[end..].starts_with('"') {
        return Some((Cow::Borrowed(&text[..end]), &text[end + 1..]));
    }
    let mut value = text[..end].to_owned();
    let mut characters = text[end..].char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((Cow::Owned(value), &text[end + at + 1..])),
            '\\' => value.push(characters.next()?.1),
            _ => value.push(character),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(headers: &[(&str, &'static str)], data: Option<&'static str>) -> Told<'static> {
        let hints = Hints::read(|name| headers.iter().find(|header| header.0 == name).map(|header| header.1));
        Told::read(data, &hints)
    }

    fn browser(list: &'static str) -> Option<(String, String)> {
        let told = told(&[("sec-ch-ua", list)], None).browser;
        told.map(|(brand, version)| (brand.into_owned(), version.into_owned()))
    }

    fn some(brand: &str, version: &str) -> Option<(String, String)> {
        Some((brand.to_owned(), version.to_owned()))
    }

    #[test]
    fn the_product_is_preferred_to_what_it_is_built_of_and_grease_is_none() {
        for (list, wanted) in [
            (
                r#""Not;A=Brand";v="8", "Chromium";v="150", "Google Chrome";v="150""#,
                some("Google Chrome", "150"),
            ),
            (
                r#""Chromium";v="128", "Not;A=Brand";v="24", "Microsoft Edge";v="128""#,
                some("Microsoft Edge", "128"),
            ),
            (r#""Google Chrome";v="1", "Chromium";v="1", "Opera";v="99""#, some("Opera", "99")),
            (r#""Chromium";v="99", " Not A;Brand";v="99""#, some("Chromium", "99")),
            (r#"" Not A;Brand";v="99""#, None),
            (r#""Not)A;Brand";v="8", "Brave";v="140","Chromium";v="140""#, some("Brave", "140")),
            (r#""A \"quoted\" \\ one";v="1""#, some(r#"A "quoted" \ one"#, "1")),
            (r#""Whale""#, some("Whale", "")),
            (r#""Whale"; q="x";v="3""#, some("Whale", "3")),
            (r#""Größe";v="3""#, some("Größe", "3")),
        ] {
            assert_eq!(browser(list), wanted, "{list}");
        }
    }

    #[test]
    fn what_is_malformed_is_as_good_as_not_sent() {
        for list in [
            "",
            " ",
            "\"",
            "\"\\",
            "\"\\\"",
            "Chromium",
            "\"a\"x",
            "\"a\" \"b\"",
            "\"a\";v",
            "\"a\";v=1",
            "\"a\";v=\"",
            "\"\"",
            "\" \"",
            ",",
            "\"\\é",
        ] {
            assert_eq!(browser(list), None, "{list}");
        }
        let long = format!("\"{}\"", "a".repeat(HEADER_BYTES_MAX));
        assert_eq!(Hints::read(|_| Some(&long)), Hints::default(), "and so is what is too long");
        for value in ["", "\"\"", "\" \"", "Windows"] {
            assert!(told(&[("sec-ch-ua-platform", value), ("sec-ch-ua-mobile", value)], None).is_empty());
        }
    }

    #[test]
    fn a_list_without_end_is_read_to_its_sixteenth_brand() {
        let mut list = "\"Chromium\";v=\"1\",".repeat(20);
        list.push_str("\"Opera\";v=\"2\"");
        let hints = Hints::read(|name| (name == "sec-ch-ua").then_some(&*list));
        assert_eq!(Told::read(None, &hints).browser.unwrap().0, "Chromium");
    }

    #[test]
    fn the_headers_are_read() {
        let told = told(
            &[
                ("sec-ch-ua-mobile", "?1"),
                ("sec-ch-ua-platform", "\"Android\""),
                ("sec-ch-ua-platform-version", "\"15.0.0\""),
                ("sec-ch-ua-model", "\"Pixel 9\""),
                ("sec-ch-ua-full-version-list", r#""Chromium";v="140.0.1.2", "Google Chrome";v="140.0.1.2""#),
            ],
            None,
        );
        let text = |text| Some(Cow::Borrowed(text));
        assert_eq!(told.browser, Some(("Google Chrome".into(), "140.0.1.2".into())));
        assert_eq!(told.is_mobile, Some(true));
        assert_eq!((told.platform, told.platform_version), (text("Android"), text("15.0.0")));
        assert_eq!(told.model, text("Pixel 9"));
    }

    #[test]
    fn the_body_comes_before_the_headers_member_by_member() {
        let told = told(
            &[
                ("sec-ch-ua", r#""Google Chrome";v="1""#),
                ("sec-ch-ua-mobile", "?0"),
                ("sec-ch-ua-platform", "\"Linux\""),
                ("sec-ch-ua-model", "\"from the header\""),
            ],
            Some(
                r#"{"brands":[{"brand":"Not:A-Brand","version":"99"},{"brand":"Opera \u00df","version":"120"}],
                "mobile":true,"platform":7,"platformVersion":"14.5.0","model":"","bitness":"64"}"#,
            ),
        );
        assert_eq!(told.browser, Some(("Opera ß".into(), "120".into())));
        assert_eq!(told.is_mobile, Some(true));
        assert_eq!(told.platform.as_deref(), Some("Linux"), "a member of the wrong kind costs no other");
        assert_eq!(told.platform_version.as_deref(), Some("14.5.0"));
        assert_eq!(told.model.as_deref(), Some("from the header"), "an empty one says nothing");
    }

    #[test]
    fn a_body_that_is_none_leaves_the_headers() {
        let deep = "[".repeat(2_000);
        let long = format!("{{\"platform\":\"{}\"}}", "x".repeat(DATA_BYTES_MAX));
        for data in
            ["", "{", "null", "7", "[]", "{\"brands\":{}}", "{\"platform\":\"\\ud800\"}", &deep, &long]
        {
            let hints = Hints::read(|name| (name == "sec-ch-ua-platform").then_some("\"Linux\""));
            let told = Told::read(Some(data), &hints);
            assert_eq!(told.platform.as_deref(), Some("Linux"), "{data}");
            assert_eq!(told.browser, None);
        }
    }
}
