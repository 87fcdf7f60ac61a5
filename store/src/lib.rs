//! Keeps events and answers questions about them.
//!
//! What a question means is defined once, in [`model`], and judged by [`oracle`]: a
//! backend only has to find the rows fast. No SQL crosses the seam, which is the trait
//! [`Store`] of typed questions.
//!
//! | module | what it holds |
//! |---|---|
//! | [`scope`] | whose events a question is about, of when, and which |
//! | [`answers`] | what comes back: integers; rates are made by who asks |
//! | [`store`] | the trait |
//! | [`model`] | classes of events, time buckets, sessions, funnels, identity, traits, unique counts; facts as lines of a file |
//! | [`oracle`] | every question over a list of events in memory, written to be read |
//! | [`lines`] | events and facts as lines of a file, which move between stores |
//! | [`sqlite`] | the embedded store: column blocks in one SQLite file |
//! | `postgres` | the store on a PostgreSQL server, with TimescaleDB or without |
//!
//! Nothing is summed up when it is written. Sessions, visitors and funnels are computed
//! from the events when they are asked for, so that arrival order, duplicates, replays,
//! late events and deletions cannot make two figures disagree.

pub mod answers;
#[cfg(test)]
mod conformance;
pub mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod limits;
pub mod lines;
pub mod model;
pub mod oracle;
#[cfg(feature = "postgres")]
pub mod postgres;
mod scan;
pub mod scope;
pub mod sqlite;
pub mod store;

pub use answers::*;
pub use error::StoreError;
pub use limits::Limits;
pub use scope::{Field, Filter, Is, Scope, Sources, Step, Subject, TenantScope};
pub use store::Store;
