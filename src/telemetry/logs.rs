//! What log lines look like, which are written, and where they go.

use std::{
    io::{self, IsTerminal},
    panic,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::error;
use tracing_subscriber::EnvFilter;

use super::{
    log_budget::LogBudget,
    log_writer::{LogBuffer, Stream},
};
use crate::settings::Reader;

/// How long what waits to be written may take at the end.
const LAST_LINES_TIME: Duration = Duration::from_millis(500);

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For a person at a terminal.
    Pretty,
}

impl LogFormat {
    /// Pretty on a terminal, else JSON.
    pub fn for_stdout() -> Self {
        if io::stdout().is_terminal() { Self::Pretty } else { Self::Json }
    }
}

/// What the logs are told.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Level or directives.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

impl LogSettings {
    pub(crate) fn read(reader: &mut Reader) -> Self {
        let level = reader.text("LOG_LEVEL");
        if let Err(want) = parse_level(&level) {
            reader.wrong("LOG_LEVEL", &level, &want);
        }
        let formats =
            [("", LogFormat::for_stdout()), ("json", LogFormat::Json), ("pretty", LogFormat::Pretty)];
        Self { level, format: reader.one_of("LOG_FORMAT", &formats) }
    }
}

/// The log lines that wait to be written. When this is dropped they get half a
/// second; so it is kept until the program ends.
#[must_use = "dropped at once, the last lines of the program may be missing"]
#[derive(Debug)]
pub struct Logs(Option<Arc<LogBuffer>>);

impl Logs {
    /// Writes text after the lines that wait, in their way: it holds up nobody.
    pub(crate) fn print(&self, text: &str) {
        if let Some(buffer) = self.0.as_ref().filter(|_| !text.is_empty()) {
            buffer.push(text.as_bytes());
        }
    }
}

impl Drop for Logs {
    fn drop(&mut self) {
        if let Some(buffer) = &self.0 {
            buffer.flush(LAST_LINES_TIME);
        }
    }
}

/// Sends logs to standard output, and panics to the logs. Once in a process: a
/// second call is a test's or an example's, and the first one's logs stand.
///
/// `level` is a level, which is then ours alone (what our dependencies have to
/// say starts at `warn`), or directives as `tracing-subscriber` reads them.
///
/// A line is handed to a thread and never waited for. What comes faster than it
/// is read, or cannot be written, is lost and counted in
/// `relay_log_lines_lost_total`.
pub fn init_logs(level: &str, format: LogFormat) -> Logs {
    init_logs_to(Stream::Stdout, level, format)
}

/// As [`init_logs`], for a command whose standard output is its result.
pub(crate) fn init_logs_to_stderr(level: &str, format: LogFormat) -> Logs {
    init_logs_to(Stream::Stderr, level, format)
}

fn init_logs_to(stream: Stream, level: &str, format: LogFormat) -> Logs {
    let filter = parse_level(level).unwrap_or_else(|_| EnvFilter::new("info"));
    let buffer = Arc::new(LogBuffer::default());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(buffer.clone())
        .with_ansi(stream.is_terminal())
        // It would say on standard error what it could not write, and wait there.
        .log_internal_errors(false);
    let begun = match format {
        LogFormat::Json => {
            logs.json().flatten_event(true).with_current_span(false).with_span_list(false).try_init()
        }
        LogFormat::Pretty => logs.with_target(false).try_init(),
    };
    if begun.is_err() {
        return Logs(None);
    }
    buffer.clone().write_in_a_thread(stream);
    panics_to_the_logs();
    Logs(Some(buffer))
}

/// The hook itself neither waits nor panics: that would end the process.
fn panics_to_the_logs() {
    let budget = Mutex::new(LogBudget::default());
    panic::set_hook(Box::new(move |panic| {
        // What each call may bring about. The next panic tells of those before.
        let mut budget = budget.lock().unwrap_or_else(PoisonError::into_inner);
        let (held, is_written) = (budget.due(Instant::now()), budget.takes(0, Instant::now()));
        drop(budget);
        if let Some(held) = held {
            error!(lines = held.lines, "a defect: code panicked");
        }
        if !is_written {
            return;
        }
        let payload = panic.payload();
        let message = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
            (Some(message), _) => message,
            (None, Some(message)) => message.as_str(),
            (None, None) => "no message",
        };
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        error!(message_of_panic = message, location, "a defect: code panicked");
    }));
}

/// Reads a level or directives.
pub fn parse_level(level: &str) -> Result<EnvFilter, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    let level = level.trim().to_ascii_lowercase();
    let directives = if LEVELS.contains(&level.as_str()) {
        // A connection of the store's that is gone is told by who finds out.
        let theirs =
            if matches!(level.as_str(), "off" | "error") { level.as_str() } else { "warn,deadpool=error" };
        format!("{theirs},analytics_relay={level},analytics_relay_providers={level}")
    } else if level.contains(['=', ',']) {
        level
    } else {
        return Err(format!(
            "one of {} or directives such as \"info,analytics_relay=debug\"",
            LEVELS.join(", ")
        ));
    };
    EnvFilter::try_new(directives).map_err(|error| format!("directives that can be read ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_ours_and_leaves_dependencies_at_warn() {
        let filter = parse_level("debug").unwrap().to_string();
        assert!(filter.contains("analytics_relay=debug") && filter.contains("warn"), "{filter}");
        assert!(parse_level("info,h2=trace").is_ok());
        assert!(parse_level("verbose").is_err());
    }
}
