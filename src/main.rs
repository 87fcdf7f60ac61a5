//! The `analytics-relay` command.

use std::process::ExitCode;

use analytics_relay::cli;

fn main() -> ExitCode {
    cli::run()
}
