//! The whole relay as a process, against the sandbox, with an observer outside
//! of it that compares what was answered OK with what arrived.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;
mod http;
mod http_faults;

mod addresses;
mod agents;
mod api;
mod batch;
mod browser;
mod check_connect;
mod client;
mod client_packages;
mod command_line;
mod doors;
mod durable;
mod embedding;
mod enrichment;
mod erase;
mod faults;
mod flush;
mod foreign_clients;
mod input;
mod isolation;
mod logs;
mod official_sdks;
mod openapi;
mod postgres;
mod privacy;
mod query;
mod raw;
mod refused;
mod reload;
mod sealing;
mod secrets;
mod sigterm;
mod spool_commands;
mod store;
mod store_commands;
mod store_postgres;
mod test_mode;
mod tls;
mod trouble;
mod visits;
