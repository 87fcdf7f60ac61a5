//! `analytics-relay store check|backup|export|import|vacuum|tidy|stats`.

use std::{
    fs::{self, File},
    io::{self, BufWriter, IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::RecvTimeoutError,
    },
    thread,
    time::{Duration, Instant},
};

use analytics_relay_store::{
    StoreError,
    lines::{ExportReport, Wanted},
    sqlite::{self, CheckReport},
};
use anyhow::{Context, bail};
use axum::{
    body::{Body, Bytes},
    http::Method,
};
use futures_util::stream;
use serde::Serialize;
use tokio::{sync::mpsc, task::spawn_blocking};

use super::{
    BackupStoreArgs, CheckStoreArgs, ExportStoreArgs, ImportStoreArgs, StatsStoreArgs, StoreAt, StoreCommand,
    control::{Target, Way},
    in_runtime, terminal,
};
use crate::{
    config::Config,
    control::wire::{EmbeddedStats, IMPORT, Imported, STATS, StoreStats, TIDY, Tidied, VACUUM, Vacuumed},
    files,
    store::status::ServerStats,
    time::rfc_3339,
};

/// After this time what takes long shows how far it is, and then this often.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Bytes that are written, and read, at once.
const BUFFER_BYTES: usize = 64 * 1024;
/// Pieces of a file that wait to be imported.
const PIECES_MAX: usize = 4;
/// What to do with a server in place of what is for files.
const USE_PG_DUMP: &str = "a copy of it is pg_dump's: \
     pg_dump --format=custom --file=<new file> --dbname=\"$STORE_URL\"; pg_restore takes it back";
const AUTOVACUUM_DOES: &str = "its autovacuum gives free room to what comes next, and days that are over their \
     retention go as whole tables: there is nothing to do";
const HAS_NO_BLOCKS: &str = "it has no blocks, so there is nothing to tidy";

pub(super) fn run(config: &Config, command: StoreCommand) -> anyhow::Result<ExitCode> {
    match command {
        StoreCommand::Check(args) => check(config, args),
        StoreCommand::Backup(args) => backup(config, args),
        StoreCommand::Export(args) => Ok(in_runtime(export(config, args))),
        StoreCommand::Import(args) => Ok(in_runtime(import(config, args))),
        StoreCommand::Vacuum(at) => Ok(in_runtime(vacuum(config, at))),
        StoreCommand::Tidy(at) => Ok(in_runtime(tidy(config, at))),
        StoreCommand::Stats(args) => Ok(in_runtime(stats(config, args))),
    }
}

/// What a check found, for programs.
#[derive(Serialize)]
struct Checked<'a> {
    file: &'a Path,
    is_whole: bool,
    blocks: u64,
    events: u64,
    pages: &'a [String],
    damaged_blocks: &'a [i64],
    damaged_batches: &'a [i64],
}

/// Reads all of the file. The exit code says whether all of it is as it was written.
fn check(config: &Config, args: CheckStoreArgs) -> anyhow::Result<ExitCode> {
    let file = match (args.file, Target::of(config, &args.at)) {
        (Some(file), _) | (None, Ok(Target::File(file))) => file,
        (None, Ok(Target::Server(place))) => {
            return Ok(in_runtime(check_server(config, args.at, place, args.json)));
        }
        (None, Err(error)) => return Err(error),
    };
    let mut progress = Progress::new();
    let report = sqlite::check(&file, |events| progress.show(|| format!("{events} events")))?;
    progress.clear();
    let mut out = io::stdout().lock();
    if args.json {
        let CheckReport { pages, blocks, events, damaged_blocks, damaged_batches } = &report;
        let (is_whole, blocks, events) = (report.is_whole(), *blocks, *events);
        let checked =
            Checked { file: &file, is_whole, blocks, events, pages, damaged_blocks, damaged_batches };
        writeln!(out, "{}", serde_json::to_string(&checked)?)?;
    } else {
        print_check(&mut out, &file, &report)?;
    }
    Ok(if report.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print_check(out: &mut impl Write, file: &Path, report: &CheckReport) -> io::Result<()> {
    for line in &report.pages {
        writeln!(out, "damaged: {}", terminal::words(line))?;
    }
    for id in &report.damaged_blocks {
        writeln!(out, "damaged: block {id}: its events are in no answer and no export")?;
    }
    for n in &report.damaged_batches {
        writeln!(out, "damaged: batch {n}: it is left out at the next start")?;
    }
    let verdict = if report.is_whole() { "whole" } else { "NOT whole: see above" };
    let CheckReport { blocks, events, .. } = report;
    writeln!(out, "{}: {events} event(s), {blocks} block(s); {verdict}", file.display())
}

/// What a check found in a server, for programs.
#[derive(Serialize)]
struct CheckedServer<'a> {
    store: &'a str,
    is_whole: bool,
    events: u64,
    wrong: &'a [String],
}

/// Reads all that is in a server.
async fn check_server(config: &Config, at: StoreAt, place: String, json: bool) -> anyhow::Result<ExitCode> {
    let way = Way::open(config, &at, false).await?;
    let checked = way.server()?.check().await;
    way.close().await;
    let (events, wrong) = checked?;
    let is_whole = wrong.is_empty();
    let mut out = io::stdout().lock();
    if json {
        let checked = CheckedServer { store: &place, is_whole, events, wrong: &wrong };
        writeln!(out, "{}", terminal::json(&serde_json::to_string(&checked)?))?;
    } else {
        for line in &wrong {
            writeln!(out, "wrong: {}", terminal::words(line))?;
        }
        let verdict = if is_whole { "whole" } else { "NOT whole: see above" };
        writeln!(out, "{place}: {events} event(s); {verdict}")?;
    }
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Copies the store.
fn backup(config: &Config, args: BackupStoreArgs) -> anyhow::Result<ExitCode> {
    let file = Target::of(config, &args.at)?.file(USE_PG_DUMP)?;
    let to = args.to.clone();
    let (done, is_done) = std::sync::mpsc::channel();
    let from = file.clone();
    let copying = thread::Builder::new().name("backup".into()).spawn(move || {
        // Whoever waits is there until the end.
        let _ = done.send(sqlite::backup(&from, &to));
    })?;
    let mut progress = Progress::new();
    let copied = loop {
        match is_done.recv_timeout(PROGRESS_INTERVAL) {
            Ok(copied) => break copied,
            Err(RecvTimeoutError::Timeout) => {
                let bytes = |path: &Path| fs::metadata(path).map_or(0, |file| file.len() >> 20);
                let (copied, all) = (bytes(&sqlite::unfinished(&args.to)), bytes(&file));
                progress.show(|| format!("{copied} of at most {all} MiB"));
            }
            Err(RecvTimeoutError::Disconnected) => bail!("a defect: the copy has panicked"),
        }
    };
    progress.clear();
    let _ = copying.join();
    copied?;
    let bytes = fs::metadata(&args.to)?.len();
    writeln!(io::stdout(), "{}: {bytes} bytes; not sealed", args.to.display())?;
    Ok(ExitCode::SUCCESS)
}

/// Writes events. The exit code says whether all could be read.
async fn export(config: &Config, args: ExportStoreArgs) -> anyhow::Result<ExitCode> {
    let ExportStoreArgs { file, tenant, from, to, output, at } = args;
    let source = Source::of(config, file, &at).await?;
    let first_ms = from.map_or(i64::MIN, |from| from.as_millisecond());
    let last_ms = to.map_or(i64::MAX, |to| to.as_millisecond().saturating_sub(1));
    let wanted = Wanted { tenant, range_ms: first_ms..=last_ms };
    let report = match output {
        None => export_to_stdout(&source, &wanted).await,
        Some(output) => export_to_file(&source, &wanted, &output).await,
    };
    source.close().await;
    let report = report?;
    tell_of_export(&report);
    Ok(if report.damaged == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[expect(clippy::print_stderr, reason = "standard output is for the events")]
fn tell_of_export(report: &ExportReport) {
    eprintln!("{} event(s) and {} fact(s) about who is who written", report.events, report.facts);
    if report.damaged > 0 {
        eprintln!(
            "warning: {} damaged block(s) or batch(es) were passed over; store check shows them",
            report.damaged
        );
    }
}

/// Where events are read.
enum Source {
    /// In a file, beside whoever writes to it.
    File(PathBuf),
    /// In a server.
    Server(Way),
}

impl Source {
    async fn of(config: &Config, file: Option<PathBuf>, at: &StoreAt) -> anyhow::Result<Self> {
        if let Some(file) = file {
            return Ok(Self::File(file));
        }
        match Target::of(config, at)? {
            Target::File(file) => Ok(Self::File(file)),
            Target::Server(_) => Ok(Self::Server(Way::open(config, at, false).await?)),
        }
    }

    async fn write<W: Write + Send + 'static>(
        &self,
        wanted: &Wanted,
        mut out: Out<W>,
    ) -> anyhow::Result<Result<ExportReport, StoreError>> {
        match self {
            Self::File(file) => Ok(sqlite::export(file, wanted, &mut out)),
            Self::Server(way) => Ok(way.server()?.export(wanted, out).await),
        }
    }

    async fn close(self) {
        if let Self::Server(way) = self {
            way.close().await;
        }
    }
}

async fn export_to_stdout(source: &Source, wanted: &Wanted) -> anyhow::Result<ExportReport> {
    let stdout = io::stdout();
    let (shows, so_far) = (stdout.is_terminal(), Arc::new(SoFar::default()));
    let out = Out {
        to: BufWriter::with_capacity(BUFFER_BYTES, stdout),
        shows,
        so_far: so_far.clone(),
        progress: if shows { Progress::silent() } else { Progress::new() },
    };
    match source.write(wanted, out).await? {
        // `export | head` is no failure.
        Err(_) if so_far.is_closed.load(Ordering::Relaxed) => {
            Ok(ExportReport { events: so_far.lines.load(Ordering::Relaxed), ..ExportReport::default() })
        }
        exported => Ok(exported?),
    }
}

/// The file has its name once it is whole.
async fn export_to_file(source: &Source, wanted: &Wanted, output: &Path) -> anyhow::Result<ExportReport> {
    if output.exists() {
        bail!("{}: got a file that is there already, want a new one", output.display());
    }
    let unfinished = sqlite::unfinished(output);
    let at = || format!("{} cannot be written", unfinished.display());
    let created = files::create_file(&unfinished).with_context(at)?;
    let exported = write_file(source, wanted, &created).await.and_then(|report| {
        fs::rename(&unfinished, output)?;
        let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty());
        files::sync_dir(dir.unwrap_or(Path::new(".")))?;
        Ok(report)
    });
    exported.inspect_err(|_| {
        let _ = fs::remove_file(&unfinished);
    })
}

async fn write_file(source: &Source, wanted: &Wanted, to: &File) -> anyhow::Result<ExportReport> {
    let to_file = BufWriter::with_capacity(BUFFER_BYTES, to.try_clone()?);
    let out = Out { to: to_file, shows: false, so_far: Arc::default(), progress: Progress::new() };
    let report = source.write(wanted, out).await??;
    to.sync_all()?;
    Ok(report)
}

/// Where an export goes, a line at a time.
struct Out<W: Write> {
    to: W,
    /// Somebody looks at it.
    shows: bool,
    so_far: Arc<SoFar>,
    progress: Progress,
}

/// How far it is, for who has handed it over.
#[derive(Default)]
struct SoFar {
    /// Nobody reads on.
    is_closed: AtomicBool,
    lines: AtomicU64,
}

impl<W: Write> Write for Out<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = if self.shows { std::str::from_utf8(line).ok() } else { None };
        let written = match text.and_then(|text| text.strip_suffix('\n')) {
            Some(text) => writeln!(self.to, "{}", terminal::json(text)),
            None => self.to.write_all(line),
        };
        self.note(written)?;
        let lines = self.so_far.lines.fetch_add(1, Ordering::Relaxed) + 1;
        self.progress.show(|| format!("{lines} lines"));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.to.flush();
        self.note(flushed)
    }
}

impl<W: Write> Out<W> {
    fn note(&mut self, written: io::Result<()>) -> io::Result<()> {
        if written.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe) {
            self.so_far.is_closed.store(true, Ordering::Relaxed);
        }
        written
    }
}

/// Takes events in. The exit code says whether each line was one that the store has now.
async fn import(config: &Config, args: ImportStoreArgs) -> anyhow::Result<ExitCode> {
    let from: Box<dyn Read + Send> = match args.file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(File::open(&args.file).with_context(|| args.file.display().to_string())?),
    };
    let mut way = Way::open(config, &args.at, true).await?;
    let (body, unread) = body_of(from);
    let mut progress = Progress::new();
    let imported = way.work(IMPORT, body, |so_far: &Imported| {
        let Imported { lines, new, .. } = so_far;
        progress.show(|| format!("{lines} lines, {new} new"));
    });
    let imported = imported.await;
    progress.clear();
    way.close().await;
    if let Some(error) = unread.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error).with_context(|| format!("{}: reading stopped", args.file.display()));
    }
    let imported = imported.context("the import stopped: run it again, what was taken is known")?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", terminal::json(&serde_json::to_string(&imported)?))?;
    } else {
        print_imported(&mut out, &imported)?;
    }
    Ok(if imported.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What reading met, for who asks why an import stopped.
type Unread = Arc<Mutex<Option<io::Error>>>;

/// A file, read beside as fast as it is taken.
fn body_of(mut from: impl Read + Send + 'static) -> (Body, Unread) {
    let (pieces, taken) = mpsc::channel::<Result<Bytes, io::ErrorKind>>(PIECES_MAX);
    let unread = Unread::default();
    let noted = unread.clone();
    spawn_blocking(move || {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let piece = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(bytes) => Ok(Bytes::copy_from_slice(&buffer[..bytes])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    let kind = error.kind();
                    *noted.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    Err(kind)
                }
            };
            let is_last = piece.is_err();
            if pieces.blocking_send(piece).is_err() || is_last {
                return;
            }
        }
    });
    let taken = stream::unfold(taken, |mut taken| async move {
        let piece = taken.recv().await?;
        Some((piece.map_err(io::Error::from), taken))
    });
    (Body::from_stream(taken), unread)
}

fn print_imported(out: &mut impl Write, imported: &Imported) -> io::Result<()> {
    let Imported { lines, new, duplicates, facts, suppressed, unstorable, damaged, first_bad } = imported;
    for bad in first_bad {
        writeln!(out, "line {}: {}", bad.line, terminal::words(&bad.why))?;
    }
    let bad = unstorable + damaged;
    if bad > first_bad.len() as u64 {
        writeln!(out, "and {} more", bad - first_bad.len() as u64)?;
    }
    writeln!(
        out,
        "{lines} line(s): {new} new, {duplicates} duplicate(s), {facts} fact(s) about who is who, {suppressed} of \
         erased users, {unstorable} unstorable, {damaged} unreadable"
    )
}

/// Gives free pages back.
async fn vacuum(config: &Config, at: StoreAt) -> anyhow::Result<ExitCode> {
    Target::of(config, &at)?.file(AUTOVACUUM_DOES)?;
    let mut way = Way::open(config, &at, false).await?;
    let (mut progress, started) = (Progress::new(), Instant::now());
    let done = way.work(VACUUM, Body::empty(), |_: &Vacuumed| {
        progress.show(|| format!("{} s", started.elapsed().as_secs()));
    });
    let done = done.await;
    progress.clear();
    way.close().await;
    let Vacuumed { before_bytes, after_bytes } = done?;
    writeln!(io::stdout(), "the file has {after_bytes} bytes, it had {before_bytes}")?;
    Ok(ExitCode::SUCCESS)
}

/// Does what is else done at night.
async fn tidy(config: &Config, at: StoreAt) -> anyhow::Result<ExitCode> {
    Target::of(config, &at)?.file(HAS_NO_BLOCKS)?;
    let mut way = Way::open(config, &at, false).await?;
    let (mut progress, started) = (Progress::new(), Instant::now());
    let done = way.work(TIDY, Body::empty(), |_: &Tidied| {
        progress.show(|| format!("{} s", started.elapsed().as_secs()));
    });
    let done = done.await;
    progress.clear();
    way.close().await;
    let Tidied { merged } = done?;
    writeln!(io::stdout(), "tidied: {merged} block(s) went into others")?;
    Ok(ExitCode::SUCCESS)
}

/// Shows how much is in the store.
async fn stats(config: &Config, args: StatsStoreArgs) -> anyhow::Result<ExitCode> {
    let place = match Target::of(config, &args.at)? {
        Target::File(file) => file.display().to_string(),
        Target::Server(place) => place,
    };
    let mut way = Way::open(config, &args.at, false).await?;
    let stats = way.call::<StoreStats>(Method::GET, STATS, &()).await;
    way.close().await;
    let stats = stats?.context("the relay that runs knows no such command: it is older")?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&stats)?)?;
    } else {
        match &stats {
            StoreStats::Embedded(stats) => print_stats(&mut out, &place, stats)?,
            StoreStats::Server(stats) => print_server_stats(&mut out, &place, stats)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn times(first_ms: Option<i64>, last_ms: Option<i64>) -> String {
    match (first_ms, last_ms) {
        (Some(first_ms), Some(last_ms)) => format!("{} to {}", rfc_3339(first_ms), rfc_3339(last_ms)),
        _ => "none, as there are no events".to_owned(),
    }
}

fn print_server_stats(out: &mut impl Write, place: &str, stats: &ServerStats) -> io::Result<()> {
    writeln!(out, "store             {place}")?;
    writeln!(out, "server            {}", terminal::words(&stats.server_version))?;
    if let Some(version) = &stats.timescaledb {
        writeln!(out, "TimescaleDB       {}", terminal::words(version))?;
    }
    writeln!(out, "events            {}", stats.events)?;
    writeln!(out, "of times          {}", times(stats.first_ms, stats.last_ms))?;
    writeln!(out, "websites and apps {}", stats.sites)?;
    writeln!(out, "bytes             {}", stats.bytes)?;
    writeln!(
        out,
        "partitions        {}, {} event(s) of days without one",
        stats.partitions, stats.default_events
    )
}

fn print_stats(out: &mut impl Write, place: &str, stats: &EmbeddedStats) -> io::Result<()> {
    writeln!(out, "store             {place}")?;
    writeln!(out, "events            {}, {} of them in no block yet", stats.events, stats.hot_events)?;
    writeln!(out, "blocks            {}", stats.blocks)?;
    writeln!(out, "of times          {}", times(stats.first_ms, stats.last_ms))?;
    writeln!(out, "websites and apps {}", stats.sites)?;
    writeln!(out, "bytes             {}, {} of them free", stats.file_bytes, stats.free_bytes)?;
    writeln!(out, "bytes of memory   {}", stats.hot_bytes)?;
    writeln!(out, "since the start:")?;
    writeln!(out, "  new events      {}", stats.appended)?;
    writeln!(
        out,
        "  blocks written  {}, {} failed, {} merged",
        stats.sealed, stats.seals_failed, stats.merged
    )?;
    let (reads, batches) = (stats.damaged_reads, stats.damaged_batches);
    writeln!(out, "  damaged         {reads} read(s) of blocks, {batches} batch(es)")?;
    let EmbeddedStats { links_refused: links, aliases_refused: aliases, traits_refused: traits, .. } = stats;
    let sources = stats.sources_refused;
    writeln!(
        out,
        "  not noted       {links} link(s), {aliases} alias(es), {traits} trait(s), {sources} website(s) of \
         events: too many of one"
    )
}

/// Shows on a terminal how far something is that takes long.
struct Progress {
    show_at: Option<Instant>,
    shown: bool,
}

impl Progress {
    fn new() -> Self {
        let show_at = io::stderr().is_terminal().then(|| Instant::now() + PROGRESS_AFTER);
        Self { show_at, shown: false }
    }

    /// One that never does: the result itself is shown.
    fn silent() -> Self {
        Self { show_at: None, shown: false }
    }

    #[expect(clippy::print_stderr, reason = "standard output is for the result")]
    fn show(&mut self, text: impl FnOnce() -> String) {
        if self.show_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        eprint!("\r{:<40}", text());
        (self.shown, self.show_at) = (true, Some(Instant::now() + PROGRESS_INTERVAL));
    }

    #[expect(clippy::print_stderr, reason = "standard output is for the result")]
    fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            eprint!("\r{:40}\r", "");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
