//! `analytics-relay dead-letters list|show|replay`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use analytics_relay_providers::registry;
use anyhow::{Context, bail};

use super::{Filter, ReplayArgs, is_broken_pipe};
use crate::{
    app::lane_settings,
    config::{Config, ProviderConfig},
    delivery::{
        dead_letter::{DeadLetter, DeadLetterDir},
        replay::{ReplayReport, replay as replay_letters},
    },
    reasons::DeadLetterReason,
    shutdown::{self, Stop},
    telemetry::{self, Telemetry},
    time::rfc_3339,
};

impl Filter {
    fn takes(&self, letter: &DeadLetter) -> bool {
        let since = self.since.is_none_or(|since| letter.dead_since_ms >= since.as_millisecond());
        let until = self.until.is_none_or(|until| letter.dead_since_ms < until.as_millisecond());
        self.reason.is_none_or(|reason| letter.reason == reason) && since && until
    }

    fn providers(&self, data_dir: &Path) -> io::Result<Vec<String>> {
        let mut providers = DeadLetterDir::providers(data_dir)?;
        providers.retain(|name| self.provider.as_ref().is_none_or(|wanted| wanted == name));
        Ok(providers)
    }
}

impl ReplayArgs {
    /// Nothing says whether a newer identify was delivered since, and for a
    /// superseded one it is known.
    fn sends(&self, letter: &DeadLetter) -> bool {
        let superseded = letter.reason == DeadLetterReason::Superseded;
        let asked_for = self.filter.reason == Some(DeadLetterReason::Superseded);
        !letter.event.is_identify() || self.identifies && (!superseded || asked_for)
    }
}

/// What `list` says of one provider and reason.
#[derive(Debug)]
struct Row {
    letters: u64,
    oldest_ms: i64,
    newest_ms: i64,
}

pub(super) fn list(data_dir: &Path, filter: &Filter) -> anyhow::Result<ExitCode> {
    let mut rows: BTreeMap<(String, DeadLetterReason), Row> = BTreeMap::new();
    each(data_dir, filter, |letter| {
        let at_ms = letter.dead_since_ms;
        let row = rows.entry((letter.provider, letter.reason)).or_insert(Row {
            letters: 0,
            oldest_ms: at_ms,
            newest_ms: at_ms,
        });
        row.letters += 1;
        row.oldest_ms = row.oldest_ms.min(at_ms);
        row.newest_ms = row.newest_ms.max(at_ms);
        Ok(true)
    })?;
    if rows.is_empty() {
        println!("no dead letters in {}", data_dir.display());
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<12} {:<18} {:>8}  {:<24}  newest", "provider", "reason", "letters", "oldest");
    for ((provider, reason), row) in rows {
        let (oldest, newest) = (rfc_3339(row.oldest_ms), rfc_3339(row.newest_ms));
        println!("{provider:<12} {:<18} {:>8}  {oldest:<24}  {newest}", reason.name(), row.letters);
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn show(data_dir: &Path, filter: &Filter, limit: Option<usize>) -> anyhow::Result<ExitCode> {
    let mut left = limit.unwrap_or(usize::MAX);
    let mut out = io::stdout().lock();
    let shown = each(data_dir, filter, |letter| {
        if left == 0 {
            return Ok(false);
        }
        left -= 1;
        serde_json::to_writer(&mut out, &letter)?;
        out.write_all(b"\n")?;
        Ok(true)
    });
    match shown {
        // `show | head` is no failure.
        Err(error) if is_broken_pipe(&error) => Ok(ExitCode::SUCCESS),
        shown => shown.map(|()| ExitCode::SUCCESS),
    }
}

/// Passes each letter on that the filter takes, until `action` says false.
fn each(
    data_dir: &Path,
    filter: &Filter,
    mut action: impl FnMut(DeadLetter) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    for provider in filter.providers(data_dir)? {
        let dir = DeadLetterDir::new(data_dir, &provider);
        let replayed = dir.replayed()?;
        for path in dir.files()? {
            let stored = DeadLetterDir::read(&path, &replayed)?;
            report_damage(&path, stored.damaged);
            for letter in stored.letters.into_iter().filter(|letter| filter.takes(letter)) {
                if !action(letter)? {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "standard output is for the letters")]
fn report_damage(path: &Path, lines: usize) {
    if lines > 0 {
        eprintln!("warning: {}: {lines} line(s) cannot be read", path.display());
    }
}

/// Sends letters again, file by file, and prints what became of them. The exit
/// code says whether all that were tried are delivered.
pub(super) async fn replay(config: Config, args: ReplayArgs) -> anyhow::Result<ExitCode> {
    telemetry::init_logs_to_stderr("warn", config.logs.format);
    if config.test_mode {
        bail!("TEST_MODE is on: nothing would be sent, and the letters would count as delivered");
    }
    let stop = Stop::default();
    let mut signals = shutdown::signals()?;
    let stopping = stop.clone();
    let on_signal = tokio::spawn(async move {
        signals.recv().await;
        stopping.force();
        // Answers to what is under way are waited for, unless it is asked twice.
        signals.recv().await;
        std::process::exit(1);
    });

    let mut clean = true;
    let names = args.filter.providers(&config.data_dir)?;
    if let Some(wanted) = args.filter.provider.as_ref().filter(|_| names.is_empty()) {
        bail!(
            "{wanted}: there are no dead letters of a provider of that name in {}",
            config.data_dir.display()
        );
    }
    for name in names {
        let vendor = config.providers.iter().find(|vendor| vendor.settings.vendor.name() == name);
        let Some(vendor) = vendor else {
            let why = "it is not among the vendors in ANALYTICS_PROVIDER";
            if args.filter.provider.is_some() {
                bail!("{name}: {why}");
            }
            println!("{name:<12} skipped: {why}");
            continue;
        };
        let report = replay_provider(&config, vendor, &args, &stop).await?;
        clean &= report.failed.is_empty() && report.left == 0 && report.unnoted == 0;
        print(&name, &report);
    }
    on_signal.abort();
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn replay_provider(
    config: &Config,
    vendor: &ProviderConfig,
    args: &ReplayArgs,
    stop: &Stop,
) -> anyhow::Result<ReplayReport> {
    let name = vendor.settings.vendor.name();
    let provider = registry::build(&vendor.settings)?;
    let dir = DeadLetterDir::new(&config.data_dir, name);
    let log = Arc::new(Mutex::new(dir.open_replayed().with_context(|| format!("{name}: cannot replay"))?));
    let metrics = Telemetry::new(0).lanes();
    // A file is a bounded part of all letters, and all of it has to fit.
    let mut settings = lane_settings(config, vendor.delivery);
    settings.capacity.events_max = usize::MAX;
    settings.capacity.bytes_max = usize::MAX;

    let mut total = ReplayReport::default();
    for path in dir.files()? {
        // Read anew: the file before may have held the same event.
        let stored = DeadLetterDir::read(&path, &dir.replayed()?)?;
        report_damage(&path, stored.damaged);
        let asked: Vec<_> = stored.letters.into_iter().filter(|letter| args.filter.takes(letter)).collect();
        let (letters, skipped): (Vec<_>, Vec<_>) = asked.into_iter().partition(|letter| args.sends(letter));
        total.skipped += skipped.len() as u64;
        if letters.is_empty() {
            continue;
        }
        if total.unauthorized || stop.is_forced() {
            total.left += letters.len() as u64;
            continue;
        }
        let provider = provider.clone();
        total.add(replay_letters(provider, settings, letters, &log, metrics.of(name), stop).await);
    }
    let log = Arc::into_inner(log).context("a lane still writes to the list of replayed events")?;
    if let Err(error) = dir.prune(log.into_inner().unwrap_or_else(PoisonError::into_inner)) {
        tracing::warn!(%error, "replayed dead letters could not be removed; they are not sent again");
    }
    Ok(total)
}

fn print(provider: &str, report: &ReplayReport) {
    println!("{provider:<12} delivered {}", report.delivered);
    for (reason, letters) in &report.failed {
        println!("{provider:<12} not delivered {letters} ({reason}); they stay dead letters");
    }
    if report.skipped > 0 {
        println!(
            "{provider:<12} skipped {} identifies, which could overwrite newer ones; --identifies sends them",
            report.skipped
        );
    }
    if report.unnoted > 0 {
        println!("{provider:<12} not noted {}: another replay would send them again", report.unnoted);
    }
    if let Some(refused) = &report.refused {
        println!("{provider:<12} {refused}");
    }
    if report.left > 0 {
        println!("{provider:<12} left {}", report.left);
    }
}
