//! `analytics-relay sandbox`.

use std::process::ExitCode;

use analytics_relay_providers::sandbox::{Options, Sandbox};
use anyhow::Context;

use super::SandboxArgs;
use crate::shutdown;

/// Serves until a signal.
pub(super) async fn sandbox(args: SandboxArgs) -> anyhow::Result<ExitCode> {
    let options = Options { addr: args.listen, key: args.key.clone(), ..Options::default() };
    let sandbox =
        Sandbox::start(options).await.with_context(|| format!("cannot listen at {}", args.listen))?;
    for (vendor, fault) in args.faults {
        println!("# {} misbehaves: {fault}", vendor.name());
        sandbox.always(vendor, Some(fault));
    }
    let (url, key) = (sandbox.url(), args.key);
    println!("# sandbox for Mixpanel, Amplitude and Segment; start the relay with");
    for (vendor, key_name) in [("MIXPANEL", "API_KEY"), ("AMPLITUDE", "API_KEY"), ("SEGMENT", "WRITE_KEY")] {
        println!("{vendor}_BASE_URL={url} {vendor}_{key_name}={key} \\");
    }
    println!("  analytics-relay");
    println!("# what it took: curl '{url}/_sandbox/stats', curl '{url}/_sandbox/taken?vendor=mixpanel'");
    println!("# a fault:      curl -d 503 '{url}/_sandbox/always?vendor=mixpanel'  (none ends it)");

    let mut signals = shutdown::signals()?;
    tokio::select! {
        () = sandbox.run_until_stopped() => {}
        _ = signals.recv() => {}
    }
    Ok(ExitCode::SUCCESS)
}
