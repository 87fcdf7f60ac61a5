//! Databases that are made here: none of anybody's is in this repository.

use std::fs;

use maxminddb_writer::{Database as Writer, metadata::IpVersion, paths::IpAddrWithMask};
use proptest::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::*;

/// 2025-06-01T00:00:00Z.
const BUILT: u64 = 1_748_736_000;

/// A database of both kinds of addresses, those of IPv4 where such databases have them.
fn database<T: Serialize>(name: &str, built: u64, networks: &[(&str, T)]) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.metadata.ip_version = IpVersion::V6;
    writer.metadata.binary_format_major_version = 2;
    writer.metadata.database_type = name.into();
    writer.metadata.build_epoch = built;
    for (network, record) in networks {
        let record = writer.insert_value(record).unwrap();
        let network: IpAddrWithMask = match network.contains(':') {
            true => network.parse().unwrap(),
            false => {
                let (ip, bits) = network.split_once('/').unwrap();
                format!("::{ip}/{}", 96 + bits.parse::<u8>().unwrap()).parse().unwrap()
            }
        };
        writer.insert_node(network, record);
    }
    writer.write_to(Vec::new()).unwrap()
}

/// In MaxMind's layout.
pub(crate) fn nested() -> Vec<u8> {
    let names = |name: &str| json!({"de": "anders", "en": name, "ja": "別"});
    database(
        "Test-City",
        BUILT,
        &[
            (
                "2.125.160.216/29",
                json!({
                    "continent": {"code": "EU", "names": names("Europe")},
                    "country": {"iso_code": "GB", "geoname_id": 2_635_167, "names": names("United Kingdom")},
                    "registered_country": {"iso_code": "FR"},
                    "subdivisions": [
                        {"iso_code": "ENG", "names": names("England")},
                        {"iso_code": "WBK", "names": names("West Berkshire")},
                    ],
                    "city": {"geoname_id": 2_655_045, "names": names("Boxford")},
                    "location": {"latitude": 51.75, "longitude": -1.25, "time_zone": "Europe/London"},
                    "postal": {"code": "OX1"},
                }),
            ),
            (
                "81.2.69.0/24",
                json!({
                    "continent": {"code": "EU"},
                    "country": {"iso_code": "DE"},
                    "subdivisions": [{"iso_code": "BE"}],
                    "city": {"names": names("Berlin"), "geoname_id": 2_950_159},
                    "location": {"time_zone": "Europe/Berlin"},
                }),
            ),
            // As DB-IP Lite has it: names, and no codes or numbers.
            (
                "8.8.8.0/24",
                json!({
                    "country": {"iso_code": "US"},
                    "subdivisions": [{"names": names("California")}],
                    "city": {"names": names("Mountain View")},
                }),
            ),
            ("2001:218::/32", json!({"continent": {"code": "AS"}, "country": {"iso_code": "JP"}})),
            ("9.0.0.0/8", json!({"registered_country": {"iso_code": "US"}})),
            ("10.0.0.0/8", json!({"country": {"iso_code": "US"}})),
        ],
    )
}

/// In ip-location-db's layout.
pub(crate) fn flat() -> Vec<u8> {
    database(
        "geo-test",
        BUILT,
        &[
            (
                "81.2.69.0/24",
                json!({
                    "city": "London", "country_code": "GB", "latitude": 51.5, "longitude": -0.1, "postcode": "N1",
                    "state1": "England", "state2": "", "timezone": "Europe/London",
                }),
            ),
            ("8.8.8.0/24", json!({"country_code": "us", "state1": "CA", "state2": "06085"})),
            ("2001:218::/32", json!({"country_code": "JP"})),
        ],
    )
}

fn open(content: Vec<u8>) -> Result<Geo, Unusable> {
    let current = ArcSwapOption::from_pointee(Database::open(content)?);
    Ok(Geo { file: None, current, metrics: GeoMetrics::default() })
}

fn found(geo: &Geo, ip: &str) -> Option<String> {
    geo.find(ip.parse().unwrap()).map(|place| String::from(&*place.json))
}

#[test]
fn a_place_is_read_out_of_the_nested_layout() {
    let geo = open(nested()).unwrap();
    for (ip, want) in [
        (
            "2.125.160.216",
            r#"{"continent":"EU","country":"GB","region":"GB-ENG","region2":"GB-WBK","city":"Boxford","city_id":2655045,"tz":"Europe/London"}"#,
        ),
        (
            "81.2.69.142",
            r#"{"continent":"EU","country":"DE","region":"DE-BE","city":"Berlin","city_id":2950159,"tz":"Europe/Berlin"}"#,
        ),
        ("8.8.8.8", r#"{"continent":"NA","country":"US","region":"California","city":"Mountain View"}"#),
        ("2001:218::1", r#"{"continent":"AS","country":"JP"}"#),
    ] {
        assert_eq!(found(&geo, ip).as_deref(), Some(want), "{ip}");
        assert_eq!(found(&geo, ip).as_deref(), Some(want), "{ip} once more, as it is known");
    }
    assert_eq!(found(&geo, "::ffff:81.2.69.1"), found(&geo, "81.2.69.142"), "the same address");
    assert_eq!(found(&geo, "9.9.9.9"), None, "where it is registered is not where it is");
    assert_eq!(found(&geo, "1.1.1.1"), None);
    assert_eq!(found(&geo, "10.1.2.3"), None, "it is not looked up at all");
    let place = geo.find("8.8.8.8".parse().unwrap()).unwrap();
    assert_eq!(geo.stamp().as_deref(), Some("Test-City/1748736000"));
    assert_eq!(place.value.stamp.as_deref(), Some("Test-City/1748736000"));
}

#[test]
fn a_place_is_read_out_of_the_flat_layout() {
    let geo = open(flat()).unwrap();
    for (ip, want) in [
        (
            "81.2.69.142",
            r#"{"continent":"EU","country":"GB","region":"England","city":"London","tz":"Europe/London"}"#,
        ),
        ("8.8.8.8", r#"{"continent":"NA","country":"US","region":"US-CA","region2":"06085"}"#),
        ("2001:218::1", r#"{"continent":"AS","country":"JP"}"#),
    ] {
        assert_eq!(found(&geo, ip).as_deref(), Some(want), "{ip}");
    }
    let ip_info = json!({"as_domain": "x", "continent": "Europe", "continent_code": "EU", "country": "Germany", "country_code": "DE"});
    let geo = open(database("ipinfo-test", BUILT, &[("5.0.0.0/8", ip_info)])).unwrap();
    assert_eq!(found(&geo, "5.5.5.5").as_deref(), Some(r#"{"continent":"EU","country":"DE"}"#));
}

#[test]
fn a_database_of_ipv4_alone_knows_no_address_of_ipv6() {
    let mut writer = Writer::default();
    writer.metadata.binary_format_major_version = 2;
    let record = writer.insert_value(json!({"country_code": "DE"})).unwrap();
    writer.insert_node("81.2.69.0/24".parse::<IpAddrWithMask>().unwrap(), record);
    let geo = open(writer.write_to(Vec::new()).unwrap()).unwrap();
    assert_eq!(found(&geo, "81.2.69.142"), found(&geo, "::ffff:81.2.69.142"));
    assert!(found(&geo, "81.2.69.142").is_some());
    assert_eq!((found(&geo, "2001:218::1"), geo.metrics.bad_records.get()), (None, 0));
}

#[test]
fn a_record_that_cannot_be_read_is_no_place_and_is_counted() {
    let mut networks: Vec<_> = (1..=20)
        .map(|first| (format!("{first}.0.0.0/8"), json!({"country": {"iso_code": "DE"}, "n": first})))
        .collect();
    networks.push(("100.128.0.0/9".into(), json!({"country": "Germany"})));
    let networks: Vec<_> = networks.iter().map(|(network, record)| (network.as_str(), record)).collect();
    let geo = open(database("Test", BUILT, &networks)).unwrap();
    assert!(found(&geo, "5.5.5.5").is_some());
    assert_eq!((found(&geo, "100.128.0.1"), found(&geo, "100.128.0.2")), (None, None));
    assert_eq!(geo.try_find("100.128.0.1".parse().unwrap()), Err(BadRecord));
    assert_eq!(geo.metrics.bad_records.get(), 3, "each time, though it is looked at once");
}

#[test]
fn what_is_no_database_of_countries_is_refused_with_what_it_is() {
    let of_owners = json!({"autonomous_system_number": 15169, "autonomous_system_organization": "Google"});
    let of_owners = database("Test-ASN", BUILT, &[("8.8.8.0/24", of_owners)]);
    let error = open(of_owners).unwrap_err();
    assert!(matches!(&error, Unusable::NoCountries(name) if name == "Test-ASN"), "{error:?}");
    let text = database("Test", BUILT, &[("8.8.8.0/24", "DE")]);
    assert!(matches!(open(text), Err(Unusable::Damaged(_))));
    for (content, what) in [
        (Vec::new(), "empty"),
        (b"<html>429 Too Many Requests</html>".into(), "an answer in place of the file"),
        (nested()[..200].into(), "a part of it"),
    ] {
        assert!(matches!(open(content), Err(Unusable::NoDatabase(_))), "{what}");
    }
    let nowhere = database("Test", BUILT, &[("8.8.8.0/24", json!({"country": {"iso_code": "ZZ"}}))]);
    assert!(matches!(open(nowhere), Err(Unusable::NoCountries(_))));
}

/// Where its records are written over, some of them cannot be read, and it is not used.
#[test]
fn a_database_that_was_written_over_in_the_middle_is_refused() {
    let whole = nested();
    let marker = memchr::memmem::rfind(&whole, b"\xAB\xCD\xEFMaxMind.com").unwrap();
    let records = memchr::memmem::find(&whole, &[0; 16]).unwrap() + 16;
    let mut damaged = whole.clone();
    damaged[records..marker].fill(0xFF);
    assert!(open(whole).is_ok());
    assert!(matches!(open(damaged), Err(Unusable::Damaged(_))));
}

/// Each node leads to the next one on both sides, for a hundred levels: more networks than
/// anybody can count, and none has a record.
#[test]
fn a_tree_that_never_ends_is_not_followed() {
    for (ends_in, what) in [(100, "without a record"), (0, "in a circle")] {
        let nodes: u32 = 100;
        let mut content = Vec::new();
        for node in 0..nodes {
            let next = if node + 1 == nodes { ends_in } else { node + 1 };
            let pointer = &next.to_be_bytes()[1..];
            content.extend([pointer, pointer].concat());
        }
        content.extend([0; 16]);
        let made = database("Test", BUILT, &[("8.8.8.0/24", "x")]);
        let marker = memchr::memmem::rfind(&made, b"\xAB\xCD\xEFMaxMind.com").unwrap();
        let metadata = &made[marker..];
        // Its count of nodes, in as many bytes.
        let count = memchr::memmem::find(metadata, b"node_count").unwrap() + "node_count".len();
        assert_eq!(metadata[count] >> 5, 6, "a number of 32 bits");
        let length = usize::from(metadata[count] & 31);
        content.extend(&metadata[..count]);
        content.push(6 << 5 | 4);
        content.extend(nodes.to_be_bytes());
        content.extend(&metadata[count + 1 + length..]);
        assert!(open(content).is_err(), "{what}");
    }
}

#[test]
fn a_country_is_told_where_no_database_knows_more() {
    let off = Geo::new(&GeoSettings::default()).unwrap();
    let hint = off.country_hint(*b"de").unwrap();
    assert_eq!((&*hint.json, &hint.value.stamp), (r#"{"continent":"EU","country":"DE"}"#, &None));
    assert_eq!(off.country_hint(*b"T1"), None);
    assert_eq!(
        (found(&off, "8.8.8.8"), off.stamp(), off.age_seconds(0), off.is_on()),
        (None, None, 0, false)
    );
    off.reload();
}

fn put(path: &Path, content: &[u8]) {
    let new = path.with_extension("new");
    fs::write(&new, content).unwrap();
    fs::rename(&new, path).unwrap();
}

#[test]
fn a_newer_database_is_used_and_one_that_cannot_be_used_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("geo.mmdb");
    put(&path, &nested());
    let settings = GeoSettings { database: Some(path.clone()) };
    let geo = Geo::new(&settings).unwrap();
    let (berlin, london) = (found(&geo, "81.2.69.142").unwrap(), Some("London"));
    let city = |geo: &Geo| {
        let place = geo.find("81.2.69.142".parse().unwrap()).unwrap();
        place.value.city.as_deref().map(str::to_owned)
    };
    let built_ms = i64::try_from(BUILT).unwrap() * 1000;
    assert_eq!((geo.age_seconds(built_ms + 5000), geo.age_seconds(0)), (5, 0));
    geo.reload();
    assert_eq!(found(&geo, "81.2.69.142"), Some(berlin));
    put(&path, &flat());
    geo.reload();
    assert_eq!((city(&geo).as_deref(), geo.stamp().as_deref()), (london, Some("geo-test/1748736000")));
    for (content, failed) in [(&b"<html>"[..], 1), (&nested()[..300], 2), (b"", 3)] {
        put(&path, content);
        geo.reload();
        geo.reload();
        assert_eq!((city(&geo).as_deref(), geo.metrics.reload_failed.get()), (london, failed), "once each");
    }
    fs::remove_file(&path).unwrap();
    geo.reload();
    geo.reload();
    assert_eq!((city(&geo).as_deref(), geo.metrics.reload_failed.get()), (london, 4));
    put(&path, &nested());
    geo.reload();
    assert_eq!((city(&geo).as_deref(), geo.metrics.reload_failed.get()), (Some("Berlin"), 4));
}

/// A place stays what it was found to be, and says by what.
#[test]
fn a_place_that_was_found_before_a_newer_database_came_names_the_one_it_is_of() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("geo.mmdb");
    let version = |built, country: &str| {
        database("Test", built, &[("81.2.69.0/24", json!({"country": {"iso_code": country}}))])
    };
    put(&path, &version(1, "DE"));
    let geo = Geo::new(&GeoSettings { database: Some(path.clone()) }).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let finder = scope.spawn(|| {
            let mut finds = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let place = geo.find("81.2.69.142".parse().unwrap()).unwrap();
                let is_of = match place.value.country.as_deref() {
                    Some("DE") => "Test/1",
                    _ => "Test/2",
                };
                assert_eq!(place.value.stamp.as_deref(), Some(is_of));
                finds += 1;
            }
            finds
        });
        for turn in 0..50 {
            put(&path, &if turn % 2 == 0 { version(2, "FR") } else { version(1, "DE") });
            geo.reload();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(finder.join().unwrap() > 0);
    });
    assert_eq!(geo.metrics.reload_failed.get(), 0);
}

#[test]
fn a_start_with_a_file_that_cannot_be_used_says_which_and_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("geo.mmdb");
    let said = || {
        let settings = GeoSettings { database: Some(path.clone()) };
        format!("{:#}", anyhow::Error::new(Geo::new(&settings).unwrap_err()))
    };
    let named = format!("GEO_DATABASE {}: cannot be", path.display());
    assert!(said().starts_with(&format!("{named} read: No such file")), "{}", said());
    fs::write(&path, "<html>").unwrap();
    assert!(said().starts_with(&format!("{named} used: want a database in MaxMind's format")), "{}", said());
}

proptest! {
    /// Damage anywhere is refused or lived with.
    #[test]
    fn no_damage_makes_a_lookup_panic(at in 0_usize..4096, with in any::<[u8; 3]>(), is_flat in any::<bool>()) {
        let mut content = if is_flat { flat() } else { nested() };
        let at = at % (content.len() - with.len());
        content[at..at + with.len()].copy_from_slice(&with);
        if let Ok(geo) = open(content) {
            for ip in ["2.125.160.216", "81.2.69.142", "8.8.8.8", "2001:218::1", "1.1.1.1", "9.9.9.9"] {
                let ip = ip.parse().unwrap();
                prop_assert_eq!(geo.try_find(ip), geo.try_find(ip));
            }
        }
    }
}
