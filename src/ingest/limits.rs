//! How large what a caller sends may be.

use analytics_relay_providers::properties::Limits;
use hyper::HeaderMap;

/// The properties of one event.
pub(super) const PROPERTIES: Limits = Limits::DEFAULT;
/// Largest message with one event, in bytes.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest message with a batch, in bytes.
pub(super) const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// The properties, or the context, of one event over HTTP.
pub(super) const HTTP_PROPERTIES: Limits = Limits { json_bytes_max: 32 * 1024, ..Limits::DEFAULT };
/// One event over HTTP, in bytes of JSON: as much as Segment takes.
pub(super) const HTTP_EVENT_BYTES_MAX: usize = 32 * 1024;
/// Largest body with one event over HTTP: white space and a write key stand beside it.
pub(super) const HTTP_CALL_BYTES_MAX: usize = 64 * 1024;
/// Most events of a batch in Segment's form,
pub(super) const HTTP_BATCH_ITEMS_MAX: usize = 2500;
/// and in the ingestion API's.
pub(super) const HTTP_INGESTION_ITEMS_MAX: usize = 1000;
/// Largest metadata of a call, as HTTP/2 counts: 32 bytes for each entry beside its
/// name and value.
pub(super) const METADATA_BYTES_MAX: usize = 8 * 1024;
/// Largest headers of a call over HTTP, counted alike: browsers send more, and proxies.
pub(super) const HTTP_HEADERS_BYTES_MAX: usize = 16 * 1024;

/// What HTTP/2 counts of metadata, or headers.
pub(super) fn metadata_bytes(metadata: &HeaderMap) -> usize {
    const ENTRY_BYTES: usize = 32;
    metadata.iter().map(|(name, value)| name.as_str().len() + value.len() + ENTRY_BYTES).sum()
}
