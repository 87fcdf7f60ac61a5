//! Analytics providers, and nothing else: this crate knows no gRPC, no queue
//! and no metric.
//!
//! A [`Provider`] translates a batch of [`Event`]s into one request of its
//! vendor's, sends it once, and reads one [`Verdict`] per event from the
//! answer. When to send, how often, and what becomes of an event that cannot be
//! delivered is decided by the caller (`delivery` in the relay).
//!
//! | module | what it holds |
//! |---|---|
//! | [`event`] | [`Event`], [`EventId`]: what travels |
//! | [`properties`] | properties as one validated JSON object |
//! | [`registry`] | provider name → settings → built provider |
//! | [`http`] | the shared client, and [`Wire`](http::Wire): what a vendor's file states |
//! | [`mixpanel`], [`amplitude`], [`segment`] | a vendor's limits, mapping and answers |
//! | [`pii`] | names of properties that nobody should send |
//! | [`view`] | what pages, screens and groups are to a vendor that has none |
//! | [`test_mode`] | shows what would be sent, opens no socket |
//! | [`sandbox`] | a local server that speaks the vendors' contracts, with faults on demand |
//!
//! To add a vendor over HTTP: implement [`Wire`](http::Wire) in a new file, name
//! it in [`registry`], and add its row to `tests/conformance.rs`. For anything
//! else implement [`Provider`] itself, as `examples/custom_provider.rs` does.

mod context;
pub mod event;
mod probe;
pub mod properties;
mod provider;

pub mod amplitude;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod http;
mod json;
mod key_hints;
pub mod mixpanel;
mod nobody;
pub mod pii;
pub mod registry;
pub mod sandbox;
pub mod secret;
pub mod segment;
pub mod test_mode;
pub mod view;

pub use event::{Event, EventId, EventKind, EventParts, MoreParts};
pub use nobody::means_nobody;
pub use probe::{Finding, Step};
pub use properties::Properties;
pub use provider::{BatchLimits, Endpoint, NotFor, Provider, Rejection, SendError, Verdict};
pub use secret::{InvalidKey, Secret};
