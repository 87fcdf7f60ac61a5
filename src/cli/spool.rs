//! `analytics-relay spool list|verify|export|repair|forget`.

use std::{
    io::{self, IsTerminal, Write},
    ops::Range,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::value::RawValue;

use super::is_broken_pipe;
use crate::{
    config::Config,
    queue::spool::{
        cursor::{Cursor, Slot},
        frame::SegmentStart,
        inspect::{
            CursorInfo, CursorSlots, Forgotten, Overview, PassedOver, Repair, Seals, SegmentInfo,
            SegmentReport, SpoolDir,
        },
        log::LogLimits,
        reader::level_name,
    },
    sealing::Sealing,
    time::{Clock, rfc_3339},
};

/// After this time a check shows how far it is, and then this often.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Bytes that an export writes at once.
const EXPORT_BUFFER_BYTES: usize = 64 * 1024;

pub(super) fn list(dir: &Path) -> anyhow::Result<ExitCode> {
    let overview = open(dir)?.overview()?;
    let mut out = io::stdout().lock();
    unless_closed(print_overview(&mut out, dir, &overview, Clock::system().now_ms()))?;
    Ok(ExitCode::SUCCESS)
}

/// Reads every byte. The exit code says whether all of it is as it was written.
pub(super) fn verify(dir: &Path, sealing: &Sealing) -> anyhow::Result<ExitCode> {
    let spool = open(dir)?.with_keys(sealing.clone());
    let in_use = spool.is_in_use()?;
    // Before the segments: what a cursor knows is in the log by then.
    let cursors = spool.cursors()?;
    let segments = spool.segments()?;
    let mut progress = Progress::new(segments.iter().map(|segment| segment.used).sum());
    let mut out = io::stdout().lock();
    let (mut events, mut unclean, mut newest_end) = (0, 0, None);
    for segment in segments {
        let report = spool.verify(segment, |bytes| progress.show(bytes))?;
        progress.pass(segment.used);
        // Of the newest one in the end; one that was removed tells nothing.
        newest_end = report.as_ref().map(|report| report.end_seq);
        let Some(report) = report else { continue };
        unless_closed(print_report(&mut out, &report))?;
        events += report.events;
        unclean += u64::from(!report.is_clean());
    }
    for file in &cursors {
        unless_closed(print_slots(&mut out, file))?;
        unclean += u64::from(file.is_damaged());
    }
    let known = cursors.iter().filter_map(|file| Some(file.cursor()?.end_seq())).max();
    if let (Some(known), Some(end)) = (known, newest_end)
        && known > end
    {
        let lost = span(&(end..known));
        unless_closed(writeln!(out, "the end of the spool is lost: cursors know events {lost}"))?;
        unclean += 1;
    }
    let verdict = if unclean == 0 { "clean" } else { "NOT clean: see above" };
    let moving = if in_use { "; a relay is writing: the end of the newest segment was left out" } else { "" };
    unless_closed(writeln!(out, "{events} event(s); {verdict}{moving}"))?;
    Ok(if unclean == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One line of an export.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    durability: &'static str,
    event: &'a RawValue,
}

pub(super) fn export(
    dir: &Path,
    sealing: &Sealing,
    provider: Option<&str>,
    since: u64,
    limit: Option<usize>,
) -> anyhow::Result<ExitCode> {
    let spool = open(dir)?.with_keys(sealing.clone());
    let cursor = provider.map(|name| cursor_of(&spool, name)).transpose()?;
    let mut left = limit.unwrap_or(usize::MAX);
    let mut unreadable = 0_u64;
    let mut out = io::BufWriter::with_capacity(EXPORT_BUFFER_BYTES, io::stdout().lock());
    let since = cursor.as_ref().map_or(0, Cursor::lowest).max(since);
    let exported = spool.events(since, |frame| {
        if left == 0 {
            return Ok(false);
        }
        if cursor.as_ref().is_some_and(|cursor| cursor.has_ended(frame.seq)) {
            return Ok(true);
        }
        let Ok(event) = serde_json::from_slice(frame.payload) else {
            unreadable += 1;
            return Ok(true);
        };
        left -= 1;
        let line = Line { seq: frame.seq, durability: level_name(frame.durability), event };
        serde_json::to_writer(&mut out, &line)?;
        out.write_all(b"\n")?;
        anyhow::Ok(left > 0)
    });
    let exported = exported.and_then(|passed_over| out.flush().map(|()| passed_over).map_err(Into::into));
    match exported {
        // `export | head` is no failure.
        Err(error) if is_broken_pipe(&error) => {}
        exported => {
            let PassedOver { damaged_ranges, broken_seals } = exported?;
            report_damage(damaged_ranges + unreadable + broken_seals);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The cursor of a provider that somebody named.
fn cursor_of(spool: &SpoolDir, provider: &str) -> anyhow::Result<Cursor> {
    let cursors = spool.cursors()?;
    let known: Vec<&str> = cursors.iter().map(|file| file.provider.as_str()).collect();
    let Some(file) = cursors.iter().find(|file| file.provider == provider) else {
        bail!("{provider}: the spool has no such provider, only {}", known.join(", "));
    };
    file.cursor().cloned().with_context(|| format!("{provider}: its cursor cannot be read"))
}

#[expect(clippy::print_stderr, reason = "standard output is for the events")]
fn report_damage(ranges: u64) {
    if ranges > 0 {
        eprintln!("warning: {ranges} damaged range(s) were passed over; spool verify shows them");
    }
}

pub(super) fn repair(dir: &Path, limits: LogLimits) -> anyhow::Result<ExitCode> {
    let spool = open(dir)?;
    let repair = spool.repair(limits)?;
    unless_closed(print_repair(&mut io::stdout().lock(), &repair))?;
    let whole = repair.cursors.iter().all(|(_, whole)| *whole);
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Gives up what a provider that is not named any more has not got.
pub(super) fn forget(dir: &Path, provider: &str, yes: bool) -> anyhow::Result<ExitCode> {
    let spool = open(dir)?;
    let overview = spool.overview()?;
    let Some(info) = overview.cursors.iter().find(|info| info.provider == provider) else {
        let known: Vec<&str> = overview.cursors.iter().map(|info| info.provider.as_str()).collect();
        bail!("{provider}: the spool has no such provider, only {}", known.join(", "));
    };
    if Config::named_vendors().iter().any(|vendor| vendor.name() == provider) {
        bail!(
            "{provider}: it is among the vendors in ANALYTICS_PROVIDER; take it out and restart the relay first, \
             else it would get all that is in the spool"
        );
    }
    let pending = info.cursor.as_ref().map_or(0, |cursor| cursor.pending(overview.next_seq));
    if pending > 0 && !yes {
        bail!(
            "{provider}: {pending} event(s) that it has not got would be given up; \
             spool export --provider {provider} prints them, --yes gives them up"
        );
    }
    match spool.forget(provider)? {
        Forgotten::Done => {}
        Forgotten::Refused => {
            bail!(
                "{provider}: the running relay delivers to it; take it out of ANALYTICS_PROVIDER and restart the relay first"
            )
        }
        Forgotten::NoAnswer => {
            bail!(
                "{provider}: the running relay does not answer; nothing was changed. Try again, or stop it first"
            )
        }
    }
    let what = format!("{provider}: forgotten, with {pending} event(s) that it had not got");
    unless_closed(writeln!(io::stdout(), "{what}"))?;
    Ok(ExitCode::SUCCESS)
}

fn open(dir: &Path) -> anyhow::Result<SpoolDir> {
    SpoolDir::open(dir).with_context(|| format!("there is no spool in {}", dir.display()))
}

/// Nobody reads on: that is no failure, and the work goes on for its exit code.
fn unless_closed(printed: io::Result<()>) -> io::Result<()> {
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

fn print_overview(out: &mut impl Write, dir: &Path, overview: &Overview, now_ms: i64) -> io::Result<()> {
    let who = if overview.in_use { "a relay is using it" } else { "no relay is using it" };
    writeln!(out, "spool {}: {who}\n", dir.display())?;
    writeln!(out, "{:<25} {:>23} {:>12}  created", "file", "events", "bytes")?;
    for info in &overview.segments {
        print_segment(out, info)?;
    }
    if !overview.cursors.is_empty() {
        let (lowest, pending, bytes) = ("lowest open", "pending", "bytes");
        writeln!(out, "\n{:<12} {lowest:>12} {pending:>9} {bytes:>12}  {:<24}  age", "provider", "oldest")?;
        for info in &overview.cursors {
            print_cursor(out, info, overview.next_seq, now_ms)?;
        }
        writeln!(out)?;
        for info in &overview.cursors {
            print_balance(out, info, overview.next_seq)?;
        }
    }
    let (ranges, bytes) = (overview.quarantine_ranges, overview.quarantine_bytes);
    writeln!(out, "\nquarantine: {ranges} damaged range(s), {bytes} bytes")
}

fn print_segment(out: &mut impl Write, info: &SegmentInfo) -> io::Result<()> {
    let segment = info.segment;
    let events = match segment.end_seq.saturating_sub(segment.first_seq) {
        0 => "none".to_owned(),
        _ => format!("{}..{}", segment.first_seq, segment.end_seq - 1),
    };
    let created = match info.start {
        SegmentStart::Header(header) => rfc_3339(header.created_ms),
        SegmentStart::Newer(version) => format!("written by a newer relay: format {version}"),
        SegmentStart::Damaged => "its header is damaged".to_owned(),
    };
    let reserved = match segment.allocated.saturating_sub(segment.used) {
        0 => String::new(),
        _ => format!("  ({} reserved)", segment.allocated),
    };
    let sealed = match &info.kids[..] {
        [] => String::new(),
        kids => format!("  sealed with {}", kids.join(", ")),
    };
    writeln!(out, "{:<25} {events:>23} {:>12}  {created}{reserved}{sealed}", segment.name(), segment.used)
}

fn print_cursor(out: &mut impl Write, info: &CursorInfo, next_seq: u64, now_ms: i64) -> io::Result<()> {
    let provider = &info.provider;
    let Some(cursor) = &info.cursor else {
        return writeln!(out, "{provider:<12} cannot be read: at its next start it gets all that is here");
    };
    let (pending, bytes) = (cursor.pending(next_seq), info.pending_bytes);
    let lowest = if pending > 0 { cursor.lowest().to_string() } else { "-".to_owned() };
    let (oldest, age) = info
        .oldest_accepted_ms
        .map_or(("-".to_owned(), "-".to_owned()), |at_ms| (rfc_3339(at_ms), age(now_ms - at_ms)));
    writeln!(out, "{provider:<12} {lowest:>12} {pending:>9} {bytes:>12}  {oldest:<24}  {age}")
}

/// Everything that the provider was given since its cursor was made, and what
/// became of it.
fn print_balance(out: &mut impl Write, info: &CursorInfo, next_seq: u64) -> io::Result<()> {
    let Some(cursor) = &info.cursor else { return Ok(()) };
    let Balance { accepted, delivered, dead_lettered, dropped, not_for, other, spooled } =
        balance(cursor, next_seq);
    let exact = accepted == delivered + dead_lettered + dropped + not_for + other + spooled;
    let equals = if exact { "=" } else { "but" };
    write!(
        out,
        "{:<12} accepted {accepted} {equals} delivered {delivered} + dead_lettered {dead_lettered} \
         + dropped {dropped} + spooled {spooled}",
        info.provider
    )?;
    for (name, events) in [("not_for", not_for), ("other", other)] {
        if events > 0 {
            write!(out, " + {name} {events}")?;
        }
    }
    if cursor.since() > 1 {
        write!(out, "  (since event {})", cursor.since())?;
    }
    writeln!(out)?;
    let reasons: Vec<String> = cursor
        .totals()
        .iter()
        .filter(|(ended_as, events)| *ended_as != "delivered" && **events > 0)
        .map(|(ended_as, events)| format!("{ended_as} {events}"))
        .collect();
    if reasons.is_empty() { Ok(()) } else { writeln!(out, "{:<12} {}", "", reasons.join(", ")) }
}

#[derive(Debug, PartialEq, Eq)]
struct Balance {
    accepted: u64,
    delivered: u64,
    dead_lettered: u64,
    dropped: u64,
    not_for: u64,
    /// Ways to end that a newer relay knows.
    other: u64,
    spooled: u64,
}

fn balance(cursor: &Cursor, next_seq: u64) -> Balance {
    let totals = cursor.totals();
    let sum = |is_it: &dyn Fn(&str) -> bool| -> u64 {
        totals.iter().filter(|(ended_as, _)| is_it(name(ended_as))).map(|(_, events)| events).sum()
    };
    let known = ["delivered", "dead_lettered", "dropped", "not_for"];
    Balance {
        accepted: next_seq.saturating_sub(cursor.since()),
        delivered: sum(&|name| name == known[0]),
        dead_lettered: sum(&|name| name == known[1]),
        dropped: sum(&|name| name == known[2]),
        not_for: sum(&|name| name == known[3]),
        other: sum(&|name| !known.contains(&name)),
        spooled: cursor.pending(next_seq),
    }
}

/// The outcome without its reason.
fn name(ended_as: &str) -> &str {
    ended_as.split('/').next().unwrap_or_default()
}

fn print_report(out: &mut impl Write, report: &SegmentReport) -> io::Result<()> {
    let (events, attempts) = (report.events, report.attempts);
    let verdict = if report.is_clean() { "ok" } else { "NOT ok" };
    writeln!(out, "{:<25} events {events:<8} attempts {attempts:<8} {verdict}", report.segment.name())?;
    if let SegmentStart::Newer(version) = report.start {
        writeln!(out, "  written by a newer relay (format {version}): not checked")?;
    }
    match &report.seals {
        Seals::None | Seals::Checked { broken: 0 } => {}
        Seals::Checked { broken } => writeln!(out, "  {broken} frame(s) are not what was sealed")?,
        Seals::Unchecked(locked) => writeln!(out, "  its seals are not checked: {locked}")?,
    }
    for range in &report.damaged {
        writeln!(out, "  damaged: {} bytes at {}", range.end - range.start, range.start)?;
    }
    if !report.missing.is_empty() {
        let events: u64 = report.missing.iter().map(|range| range.end - range.start).sum();
        writeln!(out, "  missing: {events} event(s): {}", numbers(&report.missing))?;
    }
    if let Some(range) = &report.torn {
        let (at, bytes) = (range.start, range.end - range.start);
        writeln!(
            out,
            "  torn end: {bytes} bytes at {at}; a start, or spool repair, keeps it aside and cuts it off"
        )?;
    }
    if report.void > 0 {
        writeln!(out, "  {} frame(s) of a group that failed; they do not count", report.void)?;
    }
    Ok(())
}

/// Ranges of numbers as people write them.
fn numbers(ranges: &[Range<u64>]) -> String {
    const SHOWN_MAX: usize = 20;
    let mut shown: Vec<String> = ranges.iter().take(SHOWN_MAX).map(span).collect();
    if ranges.len() > SHOWN_MAX {
        shown.push(format!("and {} more ranges", ranges.len() - SHOWN_MAX));
    }
    shown.join(", ")
}

fn span(range: &Range<u64>) -> String {
    match range.end - range.start {
        1 => range.start.to_string(),
        _ => format!("{}..{}", range.start, range.end - 1),
    }
}

fn print_slots(out: &mut impl Write, file: &CursorSlots) -> io::Result<()> {
    let slot = |slot: &Slot| match slot {
        Slot::Cursor { generation, cursor } => {
            format!("generation {generation}, lowest open {}", cursor.lowest())
        }
        Slot::Empty => "empty".to_owned(),
        Slot::Newer(version) => format!("written by a newer relay (format {version})"),
        Slot::Damaged => "DAMAGED".to_owned(),
    };
    let verdict = if file.is_damaged() { "NOT ok" } else { "ok" };
    let [first, second] = &file.slots;
    writeln!(
        out,
        "cursor {:<18} first slot: {}; second slot: {}; {verdict}",
        file.provider,
        slot(first),
        slot(second)
    )
}

fn print_repair(out: &mut impl Write, repair: &Repair) -> io::Result<()> {
    if let Some(recovery) = &repair.recovery {
        match recovery.torn_bytes {
            0 => writeln!(out, "newest segment: nothing torn at its end")?,
            bytes => writeln!(
                out,
                "newest segment: a torn end of {bytes} bytes was kept in quarantine and cut off"
            )?,
        }
        for (provider, whole) in &repair.cursors {
            let done = match (whole, recovery.new_cursors.contains(provider)) {
                (false, _) => "is damaged still: it could not be written",
                (true, true) => {
                    "neither slot could be read: kept in quarantine, and begun anew at the oldest event"
                }
                (true, false) => "a damaged slot was kept in quarantine and written anew",
            };
            writeln!(out, "cursor {provider}: {done}")?;
        }
    } else {
        writeln!(
            out,
            "a relay is using the spool: it looks after the newest segment and the cursors itself"
        )?;
    }
    for kept in &repair.kept {
        let done = if kept.new { "kept in quarantine" } else { "is in quarantine already" };
        writeln!(out, "{}: {} damaged bytes at {}: {done}", kept.segment, kept.bytes, kept.at)?;
    }
    let (segments, new) = (repair.segments, repair.kept.iter().filter(|kept| kept.new).count());
    writeln!(
        out,
        "{segments} segment(s) read, {} damaged range(s), {new} of them new in quarantine",
        repair.kept.len()
    )
}

/// A time span in its two largest units.
fn age(span_ms: i64) -> String {
    let seconds = span_ms.max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Shows on a terminal how far a long check is.
struct Progress {
    bytes: u64,
    passed: u64,
    show_at: Option<Instant>,
    shown: bool,
}

impl Progress {
    fn new(bytes: u64) -> Self {
        let show_at = io::stderr().is_terminal().then(|| Instant::now() + PROGRESS_AFTER);
        Self { bytes, passed: 0, show_at, shown: false }
    }

    #[expect(clippy::print_stderr, reason = "standard output is for the result")]
    fn show(&mut self, bytes: u64) {
        if self.show_at.is_none_or(|at| Instant::now() < at) {
            return;
        }
        let mib = |bytes: u64| bytes >> 20;
        eprint!("\r{} of {} MiB ", mib(self.passed + bytes), mib(self.bytes));
        (self.shown, self.show_at) = (true, Some(Instant::now() + PROGRESS_INTERVAL));
    }

    /// A segment is done; a line about it may follow.
    #[expect(clippy::print_stderr, reason = "standard output is for the result")]
    fn pass(&mut self, bytes: u64) {
        self.passed += bytes;
        if std::mem::take(&mut self.shown) {
            eprint!("\r{:40}\r", "");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_balance_is_exact_whatever_ended_how() {
        let mut cursor = Cursor::new(5);
        for (range, ended_as) in [
            (5..8, "delivered"),
            (8..9, "dead_lettered/invalid"),
            (12..14, "dropped/spool_damaged"),
            (20..21, "archived"),
        ] {
            cursor.end(range, &ended_as.into());
        }
        let balance = balance(&cursor, 25);
        let wanted = Balance {
            accepted: 20,
            delivered: 3,
            dead_lettered: 1,
            dropped: 2,
            not_for: 0,
            other: 1,
            spooled: 13,
        };
        assert_eq!(balance, wanted);
        let Balance { accepted, delivered, dead_lettered, dropped, not_for, other, spooled } = balance;
        assert_eq!(accepted, delivered + dead_lettered + dropped + not_for + other + spooled);
    }

    #[test]
    fn numbers_and_ages_are_short() {
        assert_eq!(numbers(&[3..4, 7..9]), "3, 7..8");
        let many: Vec<_> = (0..30_u64).map(|i| 2 * i..2 * i + 1).collect();
        assert!(numbers(&many).ends_with("and 10 more ranges"), "{}", numbers(&many));
        for (span_ms, shown) in
            [(-5, "0s"), (59_999, "59s"), (60_000, "1m 0s"), (3_661_000, "1h 1m"), (90_000_000, "1d 1h")]
        {
            assert_eq!(age(span_ms), shown);
        }
    }
}
