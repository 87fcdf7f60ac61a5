//! How large what a caller sends may be.

use analytics_relay_providers::properties::Limits;

/// The properties of one event.
pub(super) const PROPERTIES: Limits = Limits::DEFAULT;
/// Largest message with one event, in bytes.
pub(super) const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Largest message with a batch, in bytes.
pub(super) const BATCH_BYTES_MAX: usize = 1024 * 1024;
/// Largest metadata of a call, as HTTP/2 counts: 32 bytes for each entry beside its
/// name and value.
pub(super) const METADATA_BYTES_MAX: usize = 8 * 1024;
