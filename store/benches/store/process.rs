//! What this process takes.

use std::time::Duration;

/// Processor time of its threads.
pub(crate) fn processor() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let of_one = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default()
    };
    Duration::from_nanos(threads.map(|thread| of_one(thread.unwrap().path())).sum())
}

/// The most memory that it had so far.
pub(crate) fn peak_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}
