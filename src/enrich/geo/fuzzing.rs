//! What must hold for any bytes that are called a database.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

use std::net::IpAddr;

use serde_json::Value;

use super::database::Database;

/// It is opened and looked into, or refused, in time; and says the same each time.
pub fn mmdb(bytes: &[u8]) {
    let Ok(database) = Database::open(bytes.to_vec()) else { return };
    let spread = bytes.iter().rev().chain([&81, &2, &69, &142]).cycle();
    let octets: Vec<u8> = spread.take(16 * 10).copied().collect();
    for octets in octets.chunks_exact(16) {
        let v6 = <[u8; 16]>::try_from(octets).expect("it is a chunk");
        for ip in [IpAddr::from(v6), IpAddr::from([v6[0], v6[1], v6[2], v6[3]])] {
            let found = database.find(ip.to_canonical());
            assert_eq!(database.find(ip.to_canonical()), found);
            let Ok(Some(place)) = found else { continue };
            assert!(place.json.len() < 4096, "{}", place.json);
            let json: Value = serde_json::from_str(&place.json).expect("it is JSON");
            assert!(json.as_object().is_some_and(|fields| !fields.is_empty()), "{json}");
        }
    }
}
