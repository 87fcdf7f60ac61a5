//! The HTTP front door: Segment's form for its SDKs and RudderStack's, and the ingestion
//! API's. Each form is read into the same drafts, so that a rule stands once.
//!
//! ```text
//!  server ─► door ─┬─► route: which form, which method
//!                  ├─► credential: the write key
//!                  ├─► body: bytes in time and within the budget, inflated, UTF-8
//!                  ├─► json, item: one message ─► Draft
//!                  ├─► batch: many of them
//!                  ├─► reading, reports: who may ask the store, and what it says
//!                  └─► reply, cors: the answer in the caller's form
//! ```

mod batch;
mod body;
mod cors;
mod credential;
mod door;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod integrations;
mod item;
mod json;
mod keeping;
mod pixel;
mod reading;
mod reply;
mod reports;
pub(crate) mod resend;
mod route;
pub(crate) mod sample;
mod scan;
mod schema;
pub(crate) mod server;
mod snippet;
mod website;
