//! Kills the relay, fails its file system and cuts its power, and compares what
//! was answered OK with what arrived, from outside of its process.
//!
//! Short here, as a part of `make test`; `make test-durability` runs the long
//! form: `RELAY_LONG` asks for every point of every storage call, and for a
//! failure instead of a note where the machine lacks what a test needs.
//! `RELAY_SEED` repeats a run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[allow(dead_code, reason = "shared with the other tests of the whole relay")]
#[path = "../relay/harness.rs"]
mod harness;

mod disk_full;
mod file_systems;
mod moments;
mod oracle;
mod outage;
mod power_cut;
mod relays;
mod sigkill;
mod stored;
mod stored_load;
mod stored_power_cut;
mod stored_sigkill;
mod syscalls;
