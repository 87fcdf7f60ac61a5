//! What the edge alone knows of an event, found out once, before the log: what browser
//! and device it was, whether a machine, where, on which page, and who led there.
//!
//! Each step is pure and bounded and may fail: then its field is absent, and the event is
//! not.

use serde::Serialize;

pub mod agent;
pub mod bot;
mod cache;
pub(crate) mod edge;
pub(crate) mod enricher;
pub mod geo;
#[doc(hidden)]
pub mod measured;
pub mod page;
pub mod senders;
pub(crate) mod session;
pub mod settings;
pub(crate) mod tally;
mod text;
mod told;
pub(crate) mod visitor;

/// What a step found, and its JSON, encoded once for all events that share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded<T> {
    /// What was found.
    pub value: T,
    /// An object.
    pub json: Box<str>,
}

impl<T: Serialize> Encoded<T> {
    pub(crate) fn new(value: T) -> Self {
        let json = serde_json::to_string(&value).expect("names are texts").into();
        Self { value, json }
    }
}
