//! What must hold for any bytes on the disk and from callers. Each target takes a
//! fuzzer's bytes and panics when something does not hold; `fuzz/` calls them.
//!
//! Formats with a checksum are fuzzed behind it too: the bytes then say what a
//! file holds, and the checksum is put right.

#![allow(missing_docs, clippy::missing_panics_doc, reason = "called by fuzz/ and nobody else")]

mod agents;
mod cursor;
mod dead_letter;
mod forwarded;
mod frame;
mod grpc;
mod inside;
mod memory;
mod page;
mod recovery;

pub use self::{
    agents::{hints, user_agent},
    cursor::cursor,
    dead_letter::dead_letter,
    forwarded::forwarded,
    frame::frame,
    grpc::{grpc_admission, grpc_batch},
    page::page_url,
    recovery::recovery,
};
pub use crate::enrich::geo::fuzzing::mmdb;
pub use crate::ingest::http::fuzzing::{http_ingestion, http_json, http_segment, http_website};

pub(crate) use self::{grpc::check_event, inside::Inside};

pub(crate) const NOW_MS: i64 = 1_767_225_600_000;
