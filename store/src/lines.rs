//! What moves from one store to another: events and what is known about who is who, each a
//! line of JSON, whatever store wrote them and whatever store takes them in.

use std::{
    io::{self, BufRead, Read, Write},
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use analytics_relay_providers::Event;

use crate::{Appended, Store, StoreError, model::KnownFact};

/// Events of one call to [`Store::append`] when a file is imported.
const IMPORT_BATCH: usize = 1_000;
/// So many bytes of lines are enough for one, however few they are.
const IMPORT_BYTES: usize = 8 << 20;
/// So long is waited for a store that takes no more for now.
const STORE_WAIT_MAX: Duration = Duration::from_secs(60);
/// Longest line of a file that is imported.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// Which events are exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Of one tenant; the empty one is that of a relay that has one.
    pub tenant: Option<String>,
    /// Of when: Unix milliseconds, from the first to the last.
    pub range_ms: RangeInclusive<i64>,
}

impl Default for Wanted {
    /// All.
    fn default() -> Self {
        Self { tenant: None, range_ms: i64::MIN..=i64::MAX }
    }
}

/// What was exported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExportReport {
    /// Events.
    pub events: u64,
    /// What is known about who is who.
    pub facts: u64,
    /// Blocks and batches that could not be read.
    pub damaged: u64,
}

impl Wanted {
    /// True if what is known about who is who belongs to it: a part of a tenant's events has
    /// nothing of that.
    pub(crate) fn has_facts(&self) -> bool {
        *self == Self { tenant: self.tenant.clone(), ..Self::default() }
    }
}

/// Writes an event as a line.
pub(crate) fn write_event(out: &mut impl Write, event: &Event) -> Result<(), StoreError> {
    let mut line = event.to_json();
    // What a file of another relay had over several lines stands on one here.
    line.iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r')).for_each(|byte| *byte = b' ');
    line.push(b'\n');
    out.write_all(&line).map_err(not_written)
}

/// Writes what is known as a line.
pub(crate) fn write_fact(out: &mut impl Write, fact: &KnownFact) -> Result<(), StoreError> {
    out.write_all((fact.to_line() + "\n").as_bytes()).map_err(not_written)
}

/// Ends what was written.
pub(crate) fn finish(out: &mut impl Write) -> Result<(), StoreError> {
    out.flush().map_err(not_written)
}

fn not_written(error: io::Error) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

/// What became of the lines of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImportReport {
    /// Events that were not there.
    pub new: u64,
    /// Events that were.
    pub duplicates: u64,
    /// Facts about who is who, whether they were there or not.
    pub facts: u64,
    /// Lines that are neither, or of a newer relay, and what the store cannot keep.
    pub damaged: u64,
}

/// Takes in what an export wrote: an event or a fact a line, in any order. What is there is
/// not taken twice; lines that are neither are counted.
pub async fn import(
    store: &dyn Store,
    mut lines: impl BufRead + Send + 'static,
) -> Result<ImportReport, StoreError> {
    let mut report = ImportReport::default();
    loop {
        // Reading may wait for a disk, and what is read is parsed.
        let read = tokio::task::spawn_blocking(move || (next_part(&mut lines), lines));
        let (part, rest) = read.await.map_err(|_| StoreError::Unavailable("reading panicked".into()))?;
        lines = rest;
        let part = part
            .map_err(|error| StoreError::Unavailable(format!("what is imported cannot be read: {error}")))?;
        for appended in append_patiently(store, &part.events).await? {
            match appended {
                Appended::New => report.new += 1,
                Appended::Duplicate => report.duplicates += 1,
                Appended::Unstorable(_) => report.damaged += 1,
            }
        }
        if !part.facts.is_empty() {
            let unstorable = store.know(&part.facts).await?;
            report.facts += part.facts.len() as u64 - unstorable;
            report.damaged += unstorable;
        }
        report.damaged += part.damaged;
        if part.is_last {
            return Ok(report);
        }
    }
}

/// Appends once there is room: a file is read faster than a store writes.
async fn append_patiently(store: &dyn Store, events: &[Event]) -> Result<Vec<Appended>, StoreError> {
    let since = Instant::now();
    loop {
        match store.append(events).await {
            Err(StoreError::Unavailable(_)) if since.elapsed() < STORE_WAIT_MAX => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            done => return done,
        }
    }
}

/// What is taken in at once of a file that is imported.
#[derive(Default)]
struct Part {
    events: Vec<Event>,
    facts: Vec<KnownFact>,
    damaged: u64,
    is_last: bool,
}

fn next_part(lines: &mut impl BufRead) -> io::Result<Part> {
    let (mut part, mut bytes) = (Part::default(), 0);
    while part.events.len() + part.facts.len() < IMPORT_BATCH && bytes < IMPORT_BYTES {
        let Some((line, its_bytes)) = next_line(lines)? else {
            part.is_last = true;
            break;
        };
        bytes += its_bytes;
        match line {
            Line::Event(event) => part.events.push(*event),
            Line::Fact(fact) => part.facts.push(*fact),
            Line::Damaged(_) => part.damaged += 1,
            Line::Empty => {}
        }
    }
    Ok(part)
}

/// A line of a file that is imported.
#[derive(Debug)]
pub enum Line {
    /// An event.
    Event(Box<Event>),
    /// What is known about who is who.
    Fact(Box<KnownFact>),
    /// Neither, and why.
    Damaged(String),
    /// Nothing.
    Empty,
}

/// Reads a line, whatever it is, into memory that is bounded, and how long it is; `None` at
/// the end.
pub fn next_line(lines: &mut impl BufRead) -> io::Result<Option<(Line, usize)>> {
    let mut line = Vec::new();
    lines.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') && line.len() as u64 == LINE_BYTES_MAX {
        lines.skip_until(b'\n')?;
        let why = format!("got more than {LINE_BYTES_MAX} bytes, want an event");
        return Ok(Some((Line::Damaged(why), line.len())));
    }
    let bytes = line.len();
    if line.trim_ascii().is_empty() {
        return Ok(Some((Line::Empty, bytes)));
    }
    let line = match Event::from_json(&line) {
        Ok(event) => Line::Event(Box::new(event)),
        Err(error) => match KnownFact::from_line(&line) {
            Some(fact) => Line::Fact(Box::new(fact)),
            None => Line::Damaged(format!("neither event nor fact: {error}")),
        },
    };
    Ok(Some((line, bytes)))
}
