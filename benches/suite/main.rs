//! The benchmarks of the whole relay: what an event costs, how many there can be,
//! how long a caller waits, what is kept in memory, how a relay starts, drains and
//! comes back.
//!
//! Absolute times belong to one machine in one minute. So each run measures the
//! floors first (TCP, HTTP/2, a bare tonic echo, the disk), and a line says how
//! far a figure is from its floor and from the recorded baseline:
//!
//! ```text
//! name  value  unit  to floor  to baseline
//! ```
//!
//! `make bench` runs all of it. Names after `--` choose groups; `--check` fails
//! when a counted figure is over 3 % above `benches/baseline.json` or one provider
//! moves the others' share by over 10 %, and `--record` writes that file. Servers run on the first core, callers and providers on the
//! second, where `taskset` can tell them to.

use std::{env, process::ExitCode};

#[path = "../support/mod.rs"]
mod support;

mod callers;
mod durability;
mod echo;
mod enrichment;
mod enrichment_accept;
mod enrichment_geo;
mod enrichment_whole;
mod floors;
mod growth;
mod h2load;
mod handlers;
mod http;
mod instructions;
mod latency;
mod lifecycle;
mod memory;
mod open_loop;
mod pages;
mod peer;
mod rate;
mod report;
mod sink;
mod throughput;
mod tls;

use report::Report;

/// The relay's own, so that the floors are not dearer for another one.
#[cfg(feature = "mimalloc")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const GROUPS: [&str; 15] = [
    "instructions",
    "http_instructions",
    "throughput",
    "http",
    "latency",
    "memory",
    "lifecycle",
    "isolation",
    "outage",
    "growth",
    "durability",
    "enrichment",
    "enrichment_accept",
    "sealing",
    "callers",
];

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = env::args().skip(1).collect();
    let is_asked = |arg: &str| args.iter().any(|given| given == arg);
    if let Some(at) = args.iter().position(|arg| arg == "--serve") {
        return match args.get(at + 1).map(String::as_str) {
            Some("relay") => growth::serve_many(),
            kind => floors::serve(kind.unwrap_or_default()),
        };
    }
    // `cargo test --benches` runs this too; it is no test.
    if !is_asked("--bench") {
        return Ok(ExitCode::SUCCESS);
    }
    support::move_to_clients_core();
    let groups: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--")).collect();
    let unknown = groups.iter().find(|group| !GROUPS.contains(group));
    anyhow::ensure!(unknown.is_none(), "got {unknown:?}, want some of {}", GROUPS.join(", "));
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(run(&groups, is_asked("--check"), is_asked("--record")))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(groups: &[&str], check: bool, record: bool) -> anyhow::Result<()> {
    let mut report = Report::new(env!("CARGO_MANIFEST_DIR"))?;
    println!("{}", support::machine());
    report.head();
    for group in GROUPS.into_iter().filter(|group| groups.is_empty() || groups.contains(group)) {
        match group {
            "instructions" => instructions::run(&mut report).await?,
            "http_instructions" => instructions::run_http(&mut report).await?,
            "throughput" => throughput::run(&mut report).await?,
            "http" => http::run(&mut report).await?,
            "latency" => latency::run(&mut report).await?,
            "memory" => memory::run(&mut report).await?,
            "lifecycle" => lifecycle::run(&mut report).await?,
            "isolation" => lifecycle::isolation(&mut report).await?,
            "outage" => lifecycle::outage(&mut report).await?,
            "growth" => growth::run(&mut report).await?,
            "durability" => durability::run(&mut report).await?,
            "enrichment" => {
                enrichment::run(&mut report)?;
                pages::run(&mut report)?;
                enrichment_geo::run(&mut report)?;
                enrichment_whole::run(&mut report)?;
            }
            "enrichment_accept" => enrichment_accept::run(&mut report).await?,
            "sealing" => durability::sealing(&mut report).await?,
            _ => callers::run(&mut report).await?,
        }
    }
    report.write_summary(&support::machine())?;
    if record {
        report.record()?;
    }
    if check {
        report.check()?;
    }
    Ok(())
}
