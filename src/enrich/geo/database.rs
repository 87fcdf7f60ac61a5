//! A database in MaxMind's format, in memory.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use maxminddb::{MaxMindDbError, Reader, WithinOptions};
use thiserror::Error;

use super::{
    BadRecord,
    known::{Answer, Known},
    layout::{Layout, Record},
};
use crate::enrich::Encoded;

/// Different records that must be read before a database is used,
const PROBES: usize = 10;
/// and networks that are looked at for them: many have the same, and some none.
const PROBED_NETWORKS_MAX: usize = 10_000;
/// Longest name of a database in a stamp.
const TYPE_BYTES_MAX: usize = 64;

/// Why what a file holds is not used.
#[derive(Debug, Error)]
pub enum Unusable {
    /// It is in another format, or a part of a database.
    #[error("want a database in MaxMind's format (.mmdb)")]
    NoDatabase(#[source] MaxMindDbError),
    /// It is damaged.
    #[error("a record of it cannot be read")]
    Damaged(#[source] MaxMindDbError),
    /// It is a database of something else, as of networks' owners.
    #[error("got a database {0:?} that names no country, want one of countries or cities")]
    NoCountries(String),
}

/// A database that was looked into before it is used, and never changes.
pub(super) struct Database {
    reader: Reader<Vec<u8>>,
    layout: Layout,
    stamp: Arc<str>,
    known: Known,
}

impl Database {
    /// Reads some records of it, wherever they stand. The format has a check of its own,
    /// which refuses databases that can be used: those without a description.
    pub(super) fn open(content: Vec<u8>) -> Result<Self, Unusable> {
        let reader = Reader::from_source(content).map_err(Unusable::NoDatabase)?;
        let metadata = reader.metadata();
        let name: String = metadata.database_type.chars().take(TYPE_BYTES_MAX).collect();
        let stamp = format!("{name}/{}", metadata.build_epoch).into();
        let layout = probe(&reader, &stamp).map_err(Unusable::Damaged)?;
        let layout = layout.ok_or(Unusable::NoCountries(name))?;
        Ok(Self { reader, layout, stamp, known: Known::new() })
    }

    /// Where an address is, if the database knows.
    pub(super) fn find(&self, ip: IpAddr) -> Answer {
        if ip.is_ipv6() && self.reader.metadata().ip_version == 4 {
            return Ok(None);
        }
        let record = self.reader.lookup(ip).map_err(|_| BadRecord)?;
        let Some(offset) = record.offset() else { return Ok(None) };
        self.known.get_or(offset, || self.read(&record))
    }

    fn read(&self, record: &Record<'_>) -> Answer {
        let place = self.layout.place(record, &self.stamp).map_err(|_| BadRecord)?;
        Ok(place.map(|place| Arc::new(Encoded::new(place))))
    }

    /// What it is, and when it was made: `<database type>/<Unix time>`.
    pub(super) fn stamp(&self) -> &Arc<str> {
        &self.stamp
    }

    /// When it was made, in Unix seconds.
    pub(super) fn built(&self) -> u64 {
        self.reader.metadata().build_epoch
    }
}

/// The layout of the first records, all of which can be read, and one at least names a
/// country; nothing if none does.
fn probe(reader: &Reader<Vec<u8>>, stamp: &Arc<str>) -> Result<Option<Layout>, MaxMindDbError> {
    // Without leaving any out: a hostile tree may have more of those than anybody can count.
    let all = WithinOptions::default().include_aliased_networks().include_networks_without_data();
    let (mut seen, mut found) = (HashSet::new(), None);
    for record in reader.networks(all)?.take(PROBED_NETWORKS_MAX) {
        let record = record?;
        if record.offset().is_none_or(|offset| !seen.insert(offset)) {
            continue;
        }
        let layout = Layout::of(&record)?;
        let place = layout.place(&record, stamp)?;
        if place.is_some_and(|place| place.country.is_some()) {
            found = found.or(Some(layout));
        }
        if found.is_some() && seen.len() >= PROBES {
            break;
        }
    }
    // And some from all over, for what was cut off or written over in the middle.
    for first in (1..=223).step_by(8) {
        let record = reader.lookup(IpAddr::from([first, first, 1, 1]))?;
        if record.has_data() {
            found.unwrap_or(Layout::Nested).place(&record, stamp)?;
        }
    }
    Ok(found)
}
