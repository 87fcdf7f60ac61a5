//! What it costs to find out where an address is, by databases of the size of those that
//! are in use, which are made here.

use std::{
    fs,
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
    path::Path,
    time::Instant,
};

use analytics_relay::enrich::geo::{Geo, GeoSettings};
use maxminddb_writer::{Database, metadata::IpVersion, paths::IpAddrWithMask};
use serde_json::{Value, json};

use crate::{
    enrichment::memory_mb,
    report::{Report, median},
};

/// Networks of a database of countries: about as many as there are in one of 9 MB.
const NETWORKS: u32 = 450_000;
/// Records of a database of cities, far more than are kept encoded.
pub(crate) const CITIES: u32 = 60_000;
const LOOKUPS: usize = 200_000;
const ROUNDS: usize = 7;
const COUNTRIES: [&str; 8] = ["DE", "FR", "US", "BR", "JP", "IN", "ZA", "AU"];

#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
pub(crate) fn run(report: &mut Report) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let countries = dir.path().join("countries.mmdb");
    write_countries(&countries)?;
    report.add("geo.countries.file", fs::metadata(&countries)?.len() as f64 / f64::from(1 << 20), "MB");
    let (before, started) = (memory_mb()?, Instant::now());
    let geo = Geo::new(&GeoSettings { database: Some(countries) })?;
    report.add("geo.countries.open", started.elapsed().as_secs_f64() * 1e3, "ms");
    report.add("geo.countries.memory", memory_mb()? - before, "MB");
    let many: Vec<IpAddr> = (0..LOOKUPS as u32).map(|number| address(number % NETWORKS)).collect();
    report.add("geo_hit", nanos_of(&geo, &many), "ns");
    let private: Vec<IpAddr> = (0..LOOKUPS as u32).map(|number| (0x0A00_0000 + number).into_ip()).collect();
    report.add("geo_private", nanos_of(&geo, &private), "ns");

    let cities = dir.path().join("cities.mmdb");
    write_cities(&cities)?;
    report.add("geo.cities.file", fs::metadata(&cities)?.len() as f64 / f64::from(1 << 20), "MB");
    let before = memory_mb()?;
    let geo = Geo::new(&GeoSettings { database: Some(cities) })?;
    report.add("geo.cities.memory", memory_mb()? - before, "MB");
    // In an order in which none is asked for twice while it is known.
    let each: Vec<IpAddr> = (0..LOOKUPS as u32).map(|number| address(number % CITIES)).collect();
    report.add("geo_miss", nanos_of(&geo, &each), "ns");
    let one = vec![address(7); LOOKUPS];
    report.add("geo_hit_city", nanos_of(&geo, &one), "ns");
    Ok(())
}

trait IntoIp {
    fn into_ip(self) -> IpAddr;
}

impl IntoIp for u32 {
    fn into_ip(self) -> IpAddr {
        Ipv4Addr::from_bits(self).into()
    }
}

/// The first address of a network of 24 bits; each twelfth of those from 11.0.0.0 on, so
/// that their tree is as deep as a real one, and all are public.
pub(crate) fn address(number: u32) -> IpAddr {
    ((11 << 24) + ((12 * number) << 8) + 1).into_ip()
}

fn write_countries(path: &Path) -> anyhow::Result<()> {
    write(
        path,
        NETWORKS,
        COUNTRIES.len() as u32,
        |number| json!({"country": {"iso_code": COUNTRIES[number as usize], "geoname_id": number, "names": {"en": "Country", "de": "Land"}}}),
    )
}

pub(crate) fn write_cities(path: &Path) -> anyhow::Result<()> {
    let names =
        |name: String| json!({"en": name, "de": name, "ja": name, "ru": name, "pt-BR": name, "fr": name});
    write(path, CITIES, CITIES, |number| {
        json!({
            "continent": {"code": "EU", "geoname_id": 1, "names": names("Continent".into())},
            "country": {"iso_code": "DE", "geoname_id": 2, "names": names("Country".into())},
            "subdivisions": [{"iso_code": "BE", "geoname_id": 3, "names": names("Region".into())}],
            "city": {"geoname_id": number, "names": names(format!("City {number}"))},
            "location": {"accuracy_radius": 10, "latitude": 52.5, "longitude": 13.4, "time_zone": "Europe/Berlin"},
            "postal": {"code": "10115"},
        })
    })
}

/// Networks side by side that have the records in turn.
fn write(path: &Path, networks: u32, records: u32, record: impl Fn(u32) -> Value) -> anyhow::Result<()> {
    let mut database = Database::default();
    database.metadata.ip_version = IpVersion::V6;
    database.metadata.binary_format_major_version = 2;
    database.metadata.database_type = "Bench".into();
    let records = (0..records).map(|number| database.insert_value(record(number)));
    let records: Vec<_> = records.collect::<Result<_, _>>()?;
    for number in 0..networks {
        let IpAddr::V4(ip) = address(number) else { continue };
        let path = IpAddrWithMask::new(ip.to_ipv6_compatible().into(), 96 + 24);
        database.insert_node(path, records[number as usize % records.len()]);
    }
    database.write_to(fs::File::create(path)?)?;
    Ok(())
}

/// Of one lookup, the median of some rounds.
#[expect(clippy::cast_precision_loss, reason = "figures for a person")]
fn nanos_of(geo: &Geo, addresses: &[IpAddr]) -> f64 {
    let rounds = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        for ip in addresses {
            black_box(geo.find(black_box(*ip)));
        }
        started.elapsed().as_secs_f64() * 1e9 / addresses.len() as f64
    });
    median(rounds.collect())
}
