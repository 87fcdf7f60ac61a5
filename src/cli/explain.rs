//! `analytics-relay explain`: what became of one event.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use analytics_relay_providers::EventId;
use memchr::memmem;
use serde::Serialize;

use super::{is_broken_pipe, terminal};
use crate::{
    delivery::dead_letter::{DeadLetterDir, DeadLetterHead},
    letter_files::Letter as _,
    queue::spool::{
        cursor::Cursor,
        inspect::{Accepted, CursorSlots, SpoolDir},
        reader::level_name,
    },
    sealing::Sealing,
    time::rfc_3339,
};

/// All that is known of an event.
#[derive(Debug, Serialize)]
struct Explanation<'a> {
    event_id: &'a str,
    /// More than once if its caller asked again.
    accepted: Vec<Acceptance>,
    dead_letters: Vec<Letter>,
}

#[derive(Debug, Serialize)]
struct Acceptance {
    seq: u64,
    at: String,
    durability: &'static str,
    segment: String,
    providers: Vec<AtProvider>,
}

#[derive(Debug, Serialize)]
struct AtProvider {
    provider: String,
    state: State,
    /// How it ended, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended_as: Option<String>,
    attempts: Vec<Try>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Pending,
    Ended,
    /// It was accepted before the provider was named.
    NotForIt,
    /// The provider's cursor is not there or cannot be read.
    Unknown,
}

#[derive(Debug, Serialize)]
struct Try {
    at: String,
    attempt: u32,
    verdict: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
}

impl Try {
    /// True if the event ended with it.
    fn is_end(&self) -> bool {
        self.verdict == "delivered" || self.verdict.contains('/')
    }
}

#[derive(Debug, Serialize)]
struct Letter {
    provider: String,
    dead_since: String,
    reason: &'static str,
    attempts: u32,
    detail: String,
    /// A replay has delivered it.
    replayed: bool,
}

/// The exit code says whether anything is known of the event.
pub(super) fn explain(
    dir: &Path,
    data_dir: &Path,
    sealing: &Sealing,
    id: &EventId,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let spool = SpoolDir::open(dir).map(|spool| spool.with_keys(sealing.clone()));
    let dead_letters = dead_letters(data_dir, sealing, id)?;
    let accepted = match &spool {
        Some(spool) => {
            // The other way round it could have ended since, without an attempt.
            let cursors = spool.cursors()?;
            let accepted = spool.trace(id.as_str())?;
            accepted.into_iter().map(|accepted| acceptance(accepted, &cursors, &dead_letters)).collect()
        }
        None => Vec::new(),
    };
    let explanation = Explanation { event_id: id.as_str(), accepted, dead_letters };
    let is_known = !explanation.accepted.is_empty() || !explanation.dead_letters.is_empty();
    let mut out = io::stdout().lock();
    let printed = if json {
        let line = serde_json::to_string(&explanation)?;
        writeln!(out, "{}", terminal::json(&line)).map_err(Into::into)
    } else if is_known {
        print(&mut out, &explanation).map_err(Into::into)
    } else {
        let place = if spool.is_some() { "not in the spool" } else { "there is no spool" };
        print_unknown(&mut out, id, place, dir, data_dir).map_err(Into::into)
    };
    match printed {
        Err(error) if !is_broken_pipe(&error) => Err(error),
        _ if is_known => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

fn acceptance(accepted: Accepted, cursors: &[CursorSlots], letters: &[Letter]) -> Acceptance {
    let seq = accepted.seq;
    let tried = accepted.attempts.iter().map(|noted| noted.attempt.provider.as_str());
    let providers: BTreeSet<&str> = cursors.iter().map(|file| file.provider.as_str()).chain(tried).collect();
    let at_provider = |provider: &str| {
        let attempts: Vec<Try> = accepted
            .attempts
            .iter()
            .filter(|noted| noted.attempt.provider == provider)
            .map(|noted| Try {
                at: rfc_3339(noted.at_ms),
                attempt: noted.attempt.attempt,
                verdict: noted.attempt.verdict.clone(),
                detail: noted.attempt.detail.clone(),
            })
            .collect();
        let cursor = cursors.iter().find(|file| file.provider == provider).and_then(CursorSlots::cursor);
        let state = match cursor {
            None => State::Unknown,
            Some(cursor) if seq < cursor.since() => State::NotForIt,
            Some(cursor) if cursor.has_ended(seq) => State::Ended,
            Some(_) => State::Pending,
        };
        let letter = letters.iter().rfind(|letter| letter.provider == provider);
        let ended_as = (state == State::Ended).then(|| ended_as(&attempts, letter, cursor)).flatten();
        AtProvider { provider: provider.to_owned(), state, ended_as, attempts }
    };
    Acceptance {
        seq,
        at: rfc_3339(accepted.accepted_ms),
        durability: level_name(accepted.durability),
        providers: providers.into_iter().map(at_provider).collect(),
        segment: accepted.segment.clone(),
    }
}

/// How an event ended: the cursor knows only that it has.
fn ended_as(attempts: &[Try], letter: Option<&Letter>, cursor: Option<&Cursor>) -> Option<String> {
    let last = attempts.last().filter(|last| last.is_end()).map(|last| last.verdict.clone());
    let by_letter = || letter.map(|letter| format!("dead_lettered/{}", letter.reason));
    // If all of them ended alike, so did this one.
    let by_all = || {
        let mut all = cursor?.totals().iter().filter(|(_, events)| **events > 0);
        let (only, _) = all.next()?;
        all.next().is_none().then(|| only.to_string())
    };
    last.or_else(by_letter).or_else(by_all)
}

/// Letters of an event, the replayed ones too.
fn dead_letters(data_dir: &Path, sealing: &Sealing, id: &EventId) -> anyhow::Result<Vec<Letter>> {
    // As it stands in a file: quotes are escaped there.
    let quoted = serde_json::to_string(id.as_str())?;
    let finder = memmem::Finder::new(&quoted);
    let mut letters = Vec::new();
    for provider in DeadLetterDir::providers(data_dir)? {
        let dir = DeadLetterDir::new(data_dir, &provider);
        let replayed = dir.replayed()?.contains(id);
        for path in dir.files()? {
            let bytes = match fs::read(&path) {
                // A replay has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                bytes => bytes?,
            };
            if finder.find(&bytes).is_none() {
                continue;
            }
            let stored = DeadLetterDir::read(&path, &Default::default(), sealing)?;
            let whole = stored.letters.into_iter().map(|letter| (letter.head(), letter.detail));
            let locked = stored.locked.into_iter().map(|head| (head, "sealed; the key is not there"));
            let broken = stored.broken.into_iter().map(|head| (head, "not what was sealed"));
            let others = locked.chain(broken).map(|(head, why)| (head, why.to_owned()));
            let all = whole.chain(others).filter(|(head, _)| head.event_id == *id);
            letters.extend(all.map(|(head, detail)| letter(head, detail, replayed)));
        }
    }
    Ok(letters)
}

fn letter(head: DeadLetterHead, detail: String, replayed: bool) -> Letter {
    Letter {
        provider: head.provider,
        dead_since: rfc_3339(head.dead_since_ms),
        reason: head.reason.name(),
        attempts: head.attempts,
        detail,
        replayed,
    }
}

fn print(out: &mut impl Write, explanation: &Explanation<'_>) -> io::Result<()> {
    writeln!(out, "event {}", explanation.event_id)?;
    for accepted in &explanation.accepted {
        let Acceptance { seq, at, durability, segment, providers } = accepted;
        writeln!(out, "\naccepted {at}, asked for {durability}: number {seq} in {segment}")?;
        for at_provider in providers {
            print_provider(out, at_provider)?;
        }
    }
    if explanation.accepted.is_empty() {
        writeln!(out, "\nnot in the spool, or not any more")?;
    }
    if !explanation.dead_letters.is_empty() {
        writeln!(out, "\ndead letters")?;
    }
    for letter in &explanation.dead_letters {
        let Letter { provider, dead_since, reason, attempts, detail, replayed } = letter;
        let replayed = if *replayed { "replayed: delivered since" } else { "not replayed" };
        writeln!(out, "  {provider:<12} {dead_since}  {reason}  after {attempts} attempt(s)  {replayed}")?;
        if !detail.is_empty() {
            writeln!(out, "  {:<12} {}", "", terminal::words(detail))?;
        }
    }
    Ok(())
}

fn print_provider(out: &mut impl Write, at_provider: &AtProvider) -> io::Result<()> {
    let AtProvider { provider, state, ended_as, attempts } = at_provider;
    let what = match (state, ended_as) {
        (State::Pending, _) => "pending",
        (State::NotForIt, _) => "not for it: accepted before it was named, or before its cursor was begun",
        (State::Unknown, _) => "not known: its cursor is not there or cannot be read",
        (State::Ended, Some(ended_as)) => ended_as,
        (State::Ended, None) => "ended",
    };
    let is_told = *state != State::Ended || attempts.last().is_some_and(Try::is_end);
    // A relay notes attempts up to a second late.
    let untold = if is_told { "" } else { "; the attempt is not in the spool, or not yet" };
    writeln!(out, "  {provider:<12} {what}{untold}")?;
    for Try { at, attempt, verdict, detail } in attempts {
        let (verdict, detail) = (terminal::words(verdict), terminal::words(detail));
        let line = format!("    {at}  attempt {attempt:<3} {verdict:<14} {detail}");
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

fn print_unknown(
    out: &mut impl Write,
    id: &EventId,
    place: &str,
    dir: &Path,
    data_dir: &Path,
) -> io::Result<()> {
    writeln!(out, "event {id}: nothing is known of it")?;
    writeln!(out, "  {place} ({}), and not among the dead letters ({})", dir.display(), data_dir.display())?;
    writeln!(
        out,
        "  either it was never accepted, or every provider is done with it and its segment was removed"
    )
}
