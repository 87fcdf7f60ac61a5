//! `analytics-relay dead-letters list|show|replay|export|delete`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
};

use analytics_relay_providers::{EventId, Provider, registry};
use analytics_relay_store::sqlite;
use anyhow::{Context, bail};
use jiff::Timestamp;

use super::{DeleteArgs, Filter, ReplayArgs, keys, print_each, privacy::open as open_privacy};
use crate::{
    app::lane_settings,
    config::{Config, DeliveryConfig, TEST_MODE_DIR},
    delivery::{
        dead_letter::{DeadLetter, DeadLetterDir, DeadLetterHead, ReplayedLog, Seen, Stored},
        replay::{ReplayReport, Sent, replay as replay_letters},
    },
    files,
    letter_files::Letter,
    privacy::{Privacy, secret::DataSecret, suppression::Suppressed},
    reasons::{DeadLetterReason, STORE},
    refused::RefusedDir,
    sealing::Sealing,
    shutdown::{self, Stop},
    store::OpenStore,
    telemetry::{self, Telemetry},
    time::{Clock, rfc_3339},
};

impl Filter {
    fn is_empty(&self) -> bool {
        let Self { provider, reason, since, until, data_dir: _ } = self;
        provider.is_none() && reason.is_none() && since.is_none() && until.is_none()
    }

    fn takes(&self, letter: &DeadLetterHead) -> bool {
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
    /// Nothing says whether a newer identify (or group, or alias) was delivered since, and
    /// for a superseded one it is known.
    fn sends(&self, letter: &DeadLetter) -> bool {
        let superseded = letter.reason == DeadLetterReason::Superseded;
        let asked_for = self.filter.reason == Some(DeadLetterReason::Superseded);
        letter.event.order_key().is_none() || self.identifies && (!superseded || asked_for)
    }
}

/// Ids that a report shows.
const IDS_SHOWN_MAX: usize = 10;

/// What `list` says of one provider and reason.
#[derive(Debug)]
struct Row {
    letters: u64,
    oldest_ms: i64,
    newest_ms: i64,
}

pub(super) fn list(data_dir: &Path, filter: &Filter) -> anyhow::Result<ExitCode> {
    print_rows(data_dir, &rows(data_dir, filter)?.0);
    let refused = RefusedDir::new(data_dir).count()?;
    if refused > 0 && filter.is_empty() {
        println!("{refused} item(s) of batches that were refused: analytics-relay dead-letters refused list");
    }
    Ok(ExitCode::SUCCESS)
}

/// Rows by provider and reason.
type Rows = BTreeMap<(String, DeadLetterReason), Row>;

/// The rows, and what was looked at for them.
fn rows(data_dir: &Path, filter: &Filter) -> anyhow::Result<(Rows, Seen)> {
    let (mut rows, mut seen) = (Rows::new(), Seen::new());
    each_file(data_dir, filter, &Sealing::default(), |path, stored| {
        seen.insert(path, stored.bytes);
        for letter in stored.into_heads() {
            let at_ms = letter.dead_since_ms;
            let row = rows.entry((letter.provider, letter.reason)).or_insert(Row {
                letters: 0,
                oldest_ms: at_ms,
                newest_ms: at_ms,
            });
            row.letters += 1;
            row.oldest_ms = row.oldest_ms.min(at_ms);
            row.newest_ms = row.newest_ms.max(at_ms);
        }
        Ok(true)
    })?;
    Ok((rows, seen))
}

fn print_rows(data_dir: &Path, rows: &Rows) {
    if rows.is_empty() {
        println!("no dead letters in {}{}", data_dir.display(), elsewhere(data_dir));
        return;
    }
    println!("{:<12} {:<18} {:>8}  {:<24}  newest", "provider", "reason", "letters", "oldest");
    for ((provider, reason), row) in rows {
        let (oldest, newest) = (rfc_3339(row.oldest_ms), rfc_3339(row.newest_ms));
        println!("{provider:<12} {:<18} {:>8}  {oldest:<24}  {newest}", reason.name(), row.letters);
    }
}

/// Where else they may be: a relay in test mode keeps its own.
pub(super) fn elsewhere(data_dir: &Path) -> String {
    let of_test_mode = data_dir.join(TEST_MODE_DIR);
    if of_test_mode.exists() { format!("; of test mode: {}", of_test_mode.display()) } else { String::new() }
}

pub(super) fn show(
    data_dir: &Path,
    filter: &Filter,
    sealing: &Sealing,
    limit: Option<usize>,
) -> anyhow::Result<ExitCode> {
    print_each(limit, |print| each(data_dir, filter, sealing, print))
}

/// Writes letters as `show` prints them, in the clear, and durably if into a file: put back
/// into a provider's directory, they can be replayed.
pub(super) fn export(
    data_dir: &Path,
    filter: &Filter,
    sealing: &Sealing,
    out: Option<&Path>,
) -> anyhow::Result<ExitCode> {
    let Some(path) = out else { return show(data_dir, filter, sealing, None) };
    if path.exists() {
        bail!("{}: got a file that is there already, want a new one", path.display());
    }
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    let unfinished = PathBuf::from(unfinished);
    let at = || format!("{} cannot be written", unfinished.display());
    let file = files::create_file(&unfinished).with_context(at)?;
    let exported = export_to(&file, data_dir, filter, sealing).and_then(|letters| {
        fs::rename(&unfinished, path)?;
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        files::sync_dir(dir.unwrap_or(Path::new(".")))?;
        Ok(letters)
    });
    let letters = exported.with_context(at).inspect_err(|_| {
        let _ = fs::remove_file(&unfinished);
    })?;
    println!("{letters} dead letter(s) in {}", path.display());
    Ok(ExitCode::SUCCESS)
}

fn export_to(file: &File, data_dir: &Path, filter: &Filter, sealing: &Sealing) -> anyhow::Result<u64> {
    let mut out = BufWriter::new(file);
    let mut letters = 0;
    each(data_dir, filter, sealing, |letter| {
        letters += 1;
        serde_json::to_writer(&mut out, &letter)?;
        out.write_all(b"\n")?;
        Ok(true)
    })?;
    out.flush()?;
    drop(out);
    file.sync_all()?;
    Ok(letters)
}

/// Deletes letters, or, unless it is meant, shows which ones it would delete.
/// What becomes a dead letter later than those that were shown is not deleted.
pub(super) fn delete(data_dir: &Path, args: DeleteArgs) -> anyhow::Result<ExitCode> {
    let DeleteArgs { filter, all, yes, letters: wanted } = args;
    if filter.is_empty() && !all {
        bail!("got nothing that says which ones, want --provider, --reason, --since or --until, or --all");
    }
    // Before they are shown: a replay that comes in between would change them.
    let logs = if yes { replayed_logs(data_dir, &filter)? } else { Vec::new() };
    let (rows, seen) = rows(data_dir, &filter)?;
    print_rows(data_dir, &rows);
    let letters: u64 = rows.values().map(|row| row.letters).sum();
    if !yes {
        let Some(newest_ms) = rows.values().map(|row| row.newest_ms).max() else {
            return Ok(ExitCode::SUCCESS);
        };
        let behind_newest = Timestamp::from_millisecond(newest_ms + 1)?;
        println!(
            "nothing is deleted; to delete these, add: --yes --until {behind_newest:.3} --letters {letters}"
        );
        return Ok(ExitCode::FAILURE);
    }
    if let Some(wanted) = wanted.filter(|wanted| *wanted != letters) {
        bail!("nothing is deleted: got {letters} letter(s), want --letters {wanted}: look at them again");
    }
    let mut clean = true;
    for (name, log) in logs {
        let dir = DeadLetterDir::new(data_dir, &name);
        let deletion = dir
            .delete(log, &seen, |letter| filter.takes(letter))
            .with_context(|| format!("{name}: cannot delete"))?;
        for (reason, letters) in &deletion.deleted {
            println!("{name:<12} deleted {letters} ({reason})");
        }
        for (path, error) in &deletion.failed {
            println!("{name:<12} {} is left as it was: {error}", path.display());
        }
        clean &= deletion.failed.is_empty();
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Keeps replays and other deletions away from the letters that may be deleted.
fn replayed_logs(data_dir: &Path, filter: &Filter) -> anyhow::Result<Vec<(String, ReplayedLog)>> {
    let mut logs = Vec::new();
    for name in filter.providers(data_dir)? {
        let log = DeadLetterDir::new(data_dir, &name).open_replayed();
        let log = log.with_context(|| format!("{name}: cannot delete"))?;
        logs.push((name, log));
    }
    Ok(logs)
}

/// Passes each letter on that the filter takes, until `action` says false. Fails at the first
/// whose key is not there.
fn each(
    data_dir: &Path,
    filter: &Filter,
    sealing: &Sealing,
    mut action: impl FnMut(DeadLetter) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    each_file(data_dir, filter, sealing, |path, stored| {
        if let Some(locked) = stored.why_locked.filter(|_| !stored.locked.is_empty()) {
            bail!("{}: {locked}", path.display());
        }
        for letter in stored.letters {
            if !action(letter)? {
                return Ok(false);
            }
        }
        Ok(true)
    })
}

/// The same file by file, and what else is in each.
fn each_file(
    data_dir: &Path,
    filter: &Filter,
    sealing: &Sealing,
    mut action: impl FnMut(PathBuf, Stored) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    for provider in filter.providers(data_dir)? {
        let dir = DeadLetterDir::new(data_dir, &provider);
        let replayed = dir.replayed()?;
        for path in dir.files()? {
            let mut stored = DeadLetterDir::read(&path, &replayed, sealing)?;
            report_damage(&path, &stored);
            stored.letters.retain(|letter| filter.takes(&letter.head()));
            stored.locked.retain(|head| filter.takes(head));
            stored.broken.retain(|head| filter.takes(head));
            if !action(path, stored)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "standard output is for the letters")]
fn report_damage(path: &Path, stored: &Stored) {
    let path = path.display();
    if stored.damaged > 0 {
        eprintln!("warning: {path}: {} line(s) cannot be read", stored.damaged);
    }
    if !stored.broken.is_empty() {
        eprintln!("warning: {path}: {} letter(s) are not what was sealed", stored.broken.len());
    }
    if stored.foreign > 0 {
        eprintln!("warning: {path}: {} letter(s) of another provider are passed over", stored.foreign);
    }
}

/// Sends letters again, file by file, and prints what became of them. The exit
/// code says whether all that were tried are delivered.
pub(super) async fn replay(config: Config, args: ReplayArgs) -> anyhow::Result<ExitCode> {
    let _logs = telemetry::init_logs_to_stderr("warn", config.logs.format);
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

    let sealing = keys(&config)?;
    let mut clean = true;
    let names = args.filter.providers(&config.data_dir)?;
    if let Some(wanted) = args.filter.provider.as_ref().filter(|_| names.is_empty()) {
        bail!(
            "{wanted}: there are no dead letters of a provider of that name in {}",
            config.data_dir.display()
        );
    }
    // What is sent again obeys the rules of today.
    let privacy = open_privacy(&config)?;
    for name in names {
        let Some(to) = Recipient::open(&config, &name).await? else {
            let why = "it is not among the vendors in ANALYTICS_PROVIDER, nor the store of STORE_URL";
            if args.filter.provider.is_some() {
                bail!("{name}: {why}");
            }
            println!("{name:<12} skipped: {why}");
            continue;
        };
        let report = replay_provider(&config, &to, &args, (&sealing, privacy.as_ref()), &stop).await;
        to.close().await;
        let report = report?;
        clean &=
            report.failed.is_empty() && report.left == 0 && report.unnoted == 0 && report.others.is_empty();
        print(&name, &report);
    }
    on_signal.abort();
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Who gets letters again.
struct Recipient {
    provider: Arc<dyn Provider>,
    delivery: DeliveryConfig,
    /// If it is that.
    store: Option<OpenStore>,
}

impl Recipient {
    /// Nothing if the settings name none of that name. The store is opened, which it cannot be
    /// while a relay has it open.
    async fn open(config: &Config, name: &str) -> anyhow::Result<Option<Self>> {
        let vendor = config.providers.iter().find(|vendor| vendor.settings.vendor.name() == name);
        if let Some(vendor) = vendor {
            let (provider, delivery) = (registry::build(&vendor.settings)?, vendor.delivery);
            return Ok(Some(Self { provider, delivery, store: None }));
        }
        if name != STORE || !config.store.is_on() {
            return Ok(None);
        }
        if config.store.file(&config.data_dir).is_some_and(|file| sqlite::is_in_use(&file)) {
            bail!("{name}: a running relay has it open: stop that first; the letters stay as they are");
        }
        let (metrics, clock) = (Telemetry::new(0).store(), Clock::system());
        let store = OpenStore::open(&config.store, &config.data_dir, metrics, clock).await?;
        let (provider, delivery) = (store.provider(), config.store_delivery());
        Ok(Some(Self { provider, delivery, store: Some(store) }))
    }

    /// The store goes by when identifies were sent, not by when they come.
    fn takes_any_order(&self) -> bool {
        self.store.is_some()
    }

    async fn close(&self) {
        if let Some(store) = &self.store {
            store.close().await;
        }
    }
}

async fn replay_provider(
    config: &Config,
    to: &Recipient,
    args: &ReplayArgs,
    (sealing, privacy): (&Sealing, Option<&Arc<Privacy>>),
    stop: &Stop,
) -> anyhow::Result<ReplayReport> {
    let (name, provider) = (to.provider.name(), to.provider.clone());
    let provider = match privacy {
        None => provider,
        Some(privacy) => privacy.guard(provider),
    };
    let dir = DeadLetterDir::new(&config.data_dir, name);
    // Before any is sent.
    if let Some((path, locked)) = dir.locked(sealing)? {
        bail!("{}: {locked}", path.display());
    }
    let log = Arc::new(Mutex::new(dir.open_replayed().with_context(|| format!("{name}: cannot replay"))?));
    let metrics = Telemetry::new(0).lanes();
    // A file is a bounded part of all letters, and all of it has to fit.
    let mut settings = lane_settings(config, to.delivery);
    settings.capacity.events_max = usize::MAX;
    settings.capacity.bytes_max = usize::MAX;

    let mut total = ReplayReport::default();
    // What was replayed before this is no letter any more. What is sent now is told
    // from it: a second event under its id must not go in silence.
    let (replayed, mut sent) = (dir.replayed()?, Sent::default());
    // Whose list cannot be read, is not sent to.
    let suppressed = Arc::new(Suppressed::open(&config.data_dir, &DataSecret::open(&config.data_dir)?)?);
    for path in dir.files()? {
        let stored = DeadLetterDir::read(&path, &replayed, sealing)?;
        report_damage(&path, &stored);
        let mut asked: Vec<_> =
            stored.letters.into_iter().filter(|letter| args.filter.takes(&letter.head())).collect();
        total.erased += asked.extract_if(.., |letter| suppressed.covers_event(&letter.event)).count() as u64;
        let (letters, skipped): (Vec<_>, Vec<_>) =
            asked.into_iter().partition(|letter| to.takes_any_order() || args.sends(letter));
        total.skipped += skipped.len() as u64;
        if letters.is_empty() {
            continue;
        }
        if total.refused.is_some() || stop.is_forced() {
            total.left += letters.len() as u64;
            continue;
        }
        let provider = provider.clone();
        let metrics = metrics.of(name);
        let replayed =
            replay_letters(provider, settings, letters, &mut sent, &log, metrics, &suppressed, stop);
        total.add(replayed.await);
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
    if report.erased > 0 {
        println!("{provider:<12} not sent {}: their users are erased", report.erased);
    }
    if report.copies > 0 {
        println!("{provider:<12} not sent {}: copies of events that were sent", report.copies);
    }
    if !report.others.is_empty() {
        let (events, ids) = (report.others.len(), report.others.iter().take(IDS_SHOWN_MAX));
        let ids = ids.map(EventId::as_str).collect::<Vec<_>>().join(", ");
        let more = if events > IDS_SHOWN_MAX { ", …" } else { "" };
        println!(
            "{provider:<12} not sent {events}: other events under an id that was sent, which the provider would take \
             for copies: {ids}{more}"
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
