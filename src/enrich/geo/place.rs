//! Where something is.

use std::sync::Arc;

use serde::Serialize;

use super::continents::{continent, continent_of};

/// Longest name that is kept, in bytes: a place is in memory for each that was found lately.
const NAME_BYTES_MAX: usize = 128;
const SUBDIVISION_CHARS_MAX: usize = 3;

/// As much of a place as its source knows. Coordinates and postcodes are not kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    /// AF, AN, AS, EU, NA, OC or SA.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub continent: Option<&'static str>,
    /// ISO 3166-1 alpha-2, in capitals.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub country: Option<Box<str>>,
    /// The largest part of the country that it is in: ISO 3166-2, as `DE-BE`, or the part's
    /// name where that is all that the database has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<Box<str>>,
    /// The smallest, if that is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region2: Option<Box<str>>,
    /// Its name in English.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub city: Option<Box<str>>,
    /// The city's number at GeoNames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub city_id: Option<u32>,
    /// Of the IANA's database, as `Europe/Berlin`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tz: Option<Box<str>>,
    /// The stamp of the database that says so.
    #[serde(skip)]
    pub stamp: Option<Arc<str>>,
}

/// What a database says of a place, whatever it calls it.
#[derive(Debug, Default)]
pub(super) struct Said<'a> {
    pub(super) continent: Option<&'a str>,
    pub(super) country: Option<&'a str>,
    /// Code and name of the largest part, and of the smallest.
    pub(super) largest: Part<'a>,
    pub(super) smallest: Part<'a>,
    pub(super) city: Option<&'a str>,
    pub(super) city_id: Option<u32>,
    pub(super) tz: Option<&'a str>,
}

/// A part of a country.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Part<'a> {
    pub(super) code: Option<&'a str>,
    pub(super) name: Option<&'a str>,
}

impl Place {
    /// What is plausible of what was said; nothing if that is nothing.
    pub(super) fn of(said: &Said<'_>, stamp: &Arc<str>) -> Option<Self> {
        let country = said.country.map(str::to_ascii_uppercase);
        let known = country.as_deref().and_then(continent_of);
        let country = country.filter(|_| known.is_some());
        let region = |part| region(country.as_deref(), part);
        let (largest, smallest) = (region(said.largest), region(said.smallest));
        let place = Self {
            continent: said.continent.and_then(continent).or(known),
            region2: smallest.filter(|smallest| largest.as_ref().is_some_and(|largest| largest != smallest)),
            region: largest,
            country: country.map(Into::into),
            city: said.city.and_then(name),
            city_id: said.city_id.filter(|id| *id != 0),
            tz: said.tz.filter(|tz| is_time_zone(tz)).map(Into::into),
            stamp: None,
        };
        (place != Self::default()).then(|| Self { stamp: Some(stamp.clone()), ..place })
    }

    /// A country, if two letters are one's.
    pub(super) fn of_country(code: [u8; 2]) -> Option<Self> {
        let country = str::from_utf8(&code).ok()?.to_ascii_uppercase();
        let continent = continent_of(&country)?;
        Some(Self { continent: Some(continent), country: Some(country.into()), ..Self::default() })
    }
}

/// What a part of a country is called; of no country there are none.
fn region(country: Option<&str>, part: Part<'_>) -> Option<Box<str>> {
    let is_code = |code: &&str| {
        (1..=SUBDIVISION_CHARS_MAX).contains(&code.len())
            && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    let country = country?;
    let code =
        part.code.filter(is_code).map(|code| format!("{country}-{}", code.to_ascii_uppercase()).into());
    code.or_else(|| name(part.name?))
}

/// A name, cut between two characters; nothing if it is blank.
fn name(text: &str) -> Option<Box<str>> {
    let text = text.trim();
    let end = (0..=text.len().min(NAME_BYTES_MAX)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    (end > 0).then(|| text[..end].into())
}

fn is_time_zone(text: &str) -> bool {
    let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'_' | b'-' | b'+');
    (1..=64).contains(&text.len()) && text.bytes().all(is_usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(said: &Said<'_>) -> Option<Place> {
        Place::of(said, &"test/1".into()).map(|place| Place { stamp: None, ..place })
    }

    #[test]
    fn what_is_not_plausible_is_left_out_and_nothing_is_no_place() {
        assert_eq!(place(&Said::default()), None);
        let nonsense = Said {
            continent: Some("XX"),
            country: Some("ZZ"),
            largest: Part { code: Some("BE"), name: Some("Berlin") },
            smallest: Part::default(),
            city: Some("\t"),
            city_id: Some(0),
            tz: Some("<b>"),
        };
        assert_eq!(place(&nonsense), None, "of no country there are no parts");
        let only = place(&Said { country: Some("de"), continent: Some("Europe"), ..nonsense }).unwrap();
        let want = Place { continent: Some("EU"), country: Some("DE".into()), ..Place::default() };
        assert_eq!(only, Place { region: Some("DE-BE".into()), ..want });
    }

    #[test]
    fn a_part_without_a_code_is_called_by_its_name() {
        let of = |largest, smallest| {
            let place = place(&Said { country: Some("DE"), largest, smallest, ..Said::default() }).unwrap();
            (place.region.map(String::from), place.region2.map(String::from))
        };
        let coded = |code| Part { code: Some(code), name: Some("Name") };
        let named = |name| Part { code: None, name: Some(name) };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(of(coded("be"), coded("BE")), (some("DE-BE"), None), "one part is not said twice");
        assert_eq!(of(coded("BE"), coded("X1")), (some("DE-BE"), some("DE-X1")));
        assert_eq!(of(named("Land Berlin"), Part::default()), (some("Land Berlin"), None));
        assert_eq!(of(coded("Land Berlin"), Part::default()), (some("Name"), None), "what is no code");
        let long = "é".repeat(100);
        assert_eq!(of(named(&long), Part::default()).0, Some("é".repeat(64)), "between two characters");
    }

    #[test]
    fn a_country_is_known_by_its_two_letters() {
        assert_eq!(Place::of_country(*b"de").unwrap().continent, Some("EU"));
        for none in [*b"XX", *b"T1", [0xFF, 0xFE], *b"  "] {
            assert_eq!(Place::of_country(none), None);
        }
    }
}
