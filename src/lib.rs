//! analytics-relay stands between a company's services and its analytics
//! providers: it answers at once, queues, batches, fans out, retries, accounts
//! for every event, and drains cleanly.
//!
//! # The path of an event
//!
//! ```text
//!  ingest ──► admission ──► queue ──► batch worker ──┬─► lane ─► mixpanel
//!    │ reply      │ refuse    │ bounded              ├─► lane ─► amplitude
//!    ▼            ▼           │ (events and bytes)   ├─► lane ─► segment
//!  caller      outcome        │                      └─► lane ─► store
//!                             │                           │  ▲
//!                             │                           │  └ what it fell behind with
//!                             ▼                           └─► dead letters, spill
//!                       spool, if durable: a log that is written before the answer
//! ```
//!
//! The modules are declared in the order in which an event meets them.
//!
//! # What always holds
//!
//! 1. **Every accepted event ends, at every provider, in exactly one counted
//!    [outcome](reasons)**: delivered, dead-lettered, spilled for the next start, or
//!    dropped with a named reason. At any quiet moment, per provider: accepted +
//!    reloaded = delivered + dead-lettered + spilled + dropped + in flight.
//! 2. No front door waits for a provider or for room; for the disk only as far
//!    as an event is to be durable; and nobody for a log line.
//! 3. An event's id and time are fixed at admission; every attempt sends the
//!    same, so providers can tell a retry from a new event.
//! 4. One provider's trouble stays in its own lane, its disk's too; and trouble is
//!    told from bad events, so that it burns none.
//! 5. Every queue, body, batch, retry, lane and log has a limit.
//! 6. Dependencies point one way: `app` → stages → providers. A stage may name
//!    the input of the stage after it, never one before it. Each reads its own
//!    settings out of the leaf [`settings`]; only `app` and `cli` know the whole,
//!    [`config`].
//!
//! # Where a change goes
//!
//! | to | touch |
//! |---|---|
//! | add a provider | a file in `providers/src`, its registry, a conformance row, `config::vendors`, [`settings`], `.env.example` |
//! | add a front door | a folder in `ingest`, its settings, `app::doors`, [`config`] |
//! | add a report | a file in `query`, its lines in `query::report`, its route in `ingest::http::route`, its row in `openapi.json` |
//! | add a setting | its row in [`settings`], the stage that reads it, `.env.example` |
//! | find out something else about an event | a file in `enrich`, its step in [`reasons`] and `enrich::enricher` |
//! | change what is kept of it, or who gets it | `privacy`, and `admission::shaping` for the order |
//! | change the batching rule | `batch_worker` |
//! | let operators ask a running relay for something | a call in `control`, its command in `cli` |
//! | add a metric | [`telemetry`] and the line that records it |
//! | add a way for an event to end, or to be refused | [`reasons`] |
//! | change the bytes of the log | `queue::spool::{frame, cursor}`, with a new version |
//! | put the store elsewhere | a backend in the crate `store`, its arm in `store::front` |
//! | put the queue elsewhere | a variant of `queue::Queue`, [`app`] |

pub mod proto;

mod ingest;

mod admission;
pub mod enrich;
mod privacy;

mod queue;

mod batch_worker;

mod delivery;

mod query;
pub mod store;

pub mod ledger;
pub mod reasons;
pub mod settings;

mod address;
pub mod admin;
pub mod app;
mod characters;
pub mod cli;
pub mod client;
pub mod config;
mod control;
mod files;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hashing;
mod health;
mod letter_files;
mod listener;
mod refused;
mod sealing;
pub mod shutdown;
pub mod telemetry;
mod time;
mod watched;

pub use analytics_relay_providers as providers;
pub use queue::{
    Durability,
    spool::{SpoolError, WhenFull},
};
