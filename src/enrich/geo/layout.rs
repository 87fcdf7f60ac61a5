//! How databases lay out what they know of an address: two ways are in use.

use std::{fmt, sync::Arc};

use maxminddb::{LookupResult, MaxMindDbError};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, Visitor},
};

use super::place::{Part, Place, Said};

/// A record of an address, in a database in memory.
pub(super) type Record<'a> = LookupResult<'a, Vec<u8>>;

/// How the records of a database are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// Objects for country, city and so on, with names in several languages: MaxMind's and
    /// DB-IP's.
    Nested,
    /// Texts side by side: ip-location-db's and IPinfo's.
    Flat,
}

impl Layout {
    /// The layout of a record, if it tells: the other one has an object there, or nothing.
    pub(super) fn of(record: &Record<'_>) -> Result<Self, MaxMindDbError> {
        #[derive(Deserialize)]
        struct Probe {
            country_code: Option<IgnoredAny>,
        }
        let probe = record.decode::<Probe>()?;
        let is_flat = probe.is_some_and(|probe| probe.country_code.is_some());
        Ok(if is_flat { Self::Flat } else { Self::Nested })
    }

    /// The place that a record tells; nothing if it tells none.
    pub(super) fn place(
        self,
        record: &Record<'_>,
        stamp: &Arc<str>,
    ) -> Result<Option<Place>, MaxMindDbError> {
        Ok(match self {
            Self::Nested => record.decode::<Nested<'_>>()?.and_then(|it| Place::of(&it.said(), stamp)),
            Self::Flat => record.decode::<Flat<'_>>()?.and_then(|it| Place::of(&it.said(), stamp)),
        })
    }
}

#[derive(Deserialize)]
struct Nested<'a> {
    #[serde(borrow)]
    continent: Option<Continent<'a>>,
    country: Option<Country<'a>>,
    #[serde(default)]
    subdivisions: Vec<Subdivision<'a>>,
    city: Option<City<'a>>,
    location: Option<Location<'a>>,
}

#[derive(Deserialize)]
struct Continent<'a> {
    code: Option<&'a str>,
}

#[derive(Deserialize)]
struct Country<'a> {
    iso_code: Option<&'a str>,
}

#[derive(Deserialize)]
struct Subdivision<'a> {
    iso_code: Option<&'a str>,
    #[serde(borrow)]
    names: Option<Names<'a>>,
}

#[derive(Deserialize)]
struct City<'a> {
    #[serde(default, deserialize_with = "number")]
    geoname_id: Option<u32>,
    #[serde(borrow)]
    names: Option<Names<'a>>,
}

#[derive(Deserialize)]
struct Names<'a> {
    en: Option<&'a str>,
}

#[derive(Deserialize)]
struct Location<'a> {
    time_zone: Option<&'a str>,
}

/// A number of whatever width a database's writer has chosen for it; nothing if it is none of
/// GeoNames'.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    struct AnyWidth;

    impl Visitor<'_> for AnyWidth {
        type Value = Option<u32>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number")
        }

        fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
            Ok(u32::try_from(number).ok())
        }

        fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
            Ok(u32::try_from(number).ok())
        }
    }

    deserializer.deserialize_any(AnyWidth)
}

impl<'a> Nested<'a> {
    fn said(&self) -> Said<'a> {
        let english = |names: &Option<Names<'a>>| names.as_ref().and_then(|names| names.en);
        let part = |it: &Subdivision<'a>| Part { code: it.iso_code, name: english(&it.names) };
        Said {
            continent: self.continent.as_ref().and_then(|it| it.code),
            country: self.country.as_ref().and_then(|it| it.iso_code),
            largest: self.subdivisions.first().map(part).unwrap_or_default(),
            smallest: self.subdivisions.last().map(part).unwrap_or_default(),
            city: self.city.as_ref().and_then(|it| english(&it.names)),
            city_id: self.city.as_ref().and_then(|it| it.geoname_id),
            tz: self.location.as_ref().and_then(|it| it.time_zone),
        }
    }
}

#[derive(Deserialize)]
struct Flat<'a> {
    continent_code: Option<&'a str>,
    country_code: Option<&'a str>,
    /// A name, or a code, by the database that it was made from.
    state1: Option<&'a str>,
    state2: Option<&'a str>,
    city: Option<&'a str>,
    timezone: Option<&'a str>,
}

impl<'a> Flat<'a> {
    fn said(&self) -> Said<'a> {
        let part = |text: Option<&'a str>| Part { code: text, name: text };
        Said {
            continent: self.continent_code,
            country: self.country_code,
            largest: part(self.state1),
            smallest: part(self.state2),
            city: self.city,
            city_id: None,
            tz: self.timezone,
        }
    }
}
