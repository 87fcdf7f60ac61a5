//! Takes lines into the store, in batches, however many they are.

use std::{
    io::{self, BufRead, Read},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use analytics_relay_providers::Event;
use analytics_relay_store::{
    Appended, StoreError, Subject,
    lines::{Line, next_line},
    model::{Known, KnownFact},
};
use axum::body::{Body, Bytes};
use http_body_util::BodyExt;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout},
};

use super::{
    Control, Failure,
    wire::{BAD_SHOWN_MAX, BadLine, Imported},
};
use crate::privacy::suppression::{Ids, Suppressed};

/// Lines of one batch: where an event costs the store least.
const BATCH_LINES: usize = 1_000;
/// And bytes of them.
const BATCH_BYTES: usize = 4 << 20;
/// Pieces of the lines that wait to be read.
const PIECES_MAX: usize = 4;
/// Longest silence of who sends the lines; another program may have to make them.
const SILENCE_MAX: Duration = Duration::from_secs(300);
/// How long a store that is behind has to come round, and the pauses until it does.
const STORE_TIME: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Most characters of what is wrong with a line.
const WHY_CHARS_MAX: usize = 200;

/// How far an import is, for who tells it.
pub(super) type Progress = Arc<Mutex<Imported>>;

pub(super) fn progress_of(progress: &Progress) -> Imported {
    progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Reads to the end. What was appended before a failure is in the store, and is known again
/// when the same lines come once more.
pub(super) async fn import(control: Control, body: Body, progress: Progress) -> Result<Imported, Failure> {
    let (pieces, taken) = mpsc::channel(PIECES_MAX);
    // Whoever drops this reads no more, and what reads the pieces ends.
    let mut feeding = JoinSet::new();
    feeding.spawn(feed(body, pieces));
    let importing = Importing { control, progress };
    let mut reading = read(Numbered { from: Pieces { taken, piece: Bytes::new() }, count: 0 });
    loop {
        let (batch, lines) =
            reading.await.map_err(|error| Failure::cut(format!("a defect: reading the lines: {error}")))?;
        let batch = batch.map_err(|error| Failure::cut(error.to_string()))?;
        // While the store takes one batch, the next is read.
        let next = (!batch.is_last).then(|| read(lines));
        importing.take(batch).await?;
        match next {
            Some(next) => reading = next,
            None => return Ok(progress_of(&importing.progress)),
        }
    }
}

/// Hands on what comes, or why nothing does.
async fn feed(mut body: Body, pieces: mpsc::Sender<Result<Bytes, String>>) {
    loop {
        let piece = match timeout(SILENCE_MAX, body.frame()).await {
            Ok(None) => return,
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(bytes) => Ok(bytes),
                Err(_) => continue,
            },
            Ok(Some(Err(error))) => Err(format!("the lines cannot be read: {error}")),
            Err(_) => Err(format!("nothing came for {} s", SILENCE_MAX.as_secs())),
        };
        let is_last = piece.is_err();
        if pieces.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

/// Pieces as a text without gaps, for who may block.
struct Pieces {
    taken: mpsc::Receiver<Result<Bytes, String>>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?.read(to)?;
        self.consume(bytes);
        Ok(bytes)
    }
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.piece.is_empty() {
            match self.taken.blocking_recv() {
                Some(piece) => self.piece = piece.map_err(io::Error::other)?,
                None => break,
            }
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, bytes: usize) {
        drop(self.piece.split_to(bytes));
    }
}

/// Lines, and how many were read.
struct Numbered<R> {
    from: R,
    count: u64,
}

/// What is taken in at once.
#[derive(Default)]
struct Batch {
    /// With the numbers of their lines, from 1.
    events: Vec<(u64, Event)>,
    facts: Vec<KnownFact>,
    bad: Vec<BadLine>,
    /// Lines that were read so far.
    lines: u64,
    is_last: bool,
}

type Reading<R> = JoinHandle<(io::Result<Batch>, Numbered<R>)>;

/// Reading waits for who sends, and what is read is parsed.
fn read<R: BufRead + Send + 'static>(mut lines: Numbered<R>) -> Reading<R> {
    spawn_blocking(move || (next_batch(&mut lines), lines))
}

fn next_batch(lines: &mut Numbered<impl BufRead>) -> io::Result<Batch> {
    let (mut batch, mut bytes) = (Batch::default(), 0);
    while batch.events.len() + batch.facts.len() < BATCH_LINES && bytes < BATCH_BYTES {
        let Some((line, its_bytes)) = next_line(&mut lines.from)? else {
            batch.is_last = true;
            break;
        };
        lines.count += 1;
        bytes += its_bytes;
        match line {
            Line::Event(event) => batch.events.push((lines.count, *event)),
            Line::Fact(fact) => batch.facts.push(*fact),
            Line::Damaged(why) => batch.bad.push(BadLine { line: lines.count, why }),
            Line::Empty => {}
        }
    }
    batch.lines = lines.count;
    Ok(batch)
}

struct Importing {
    control: Control,
    progress: Progress,
}

impl Importing {
    async fn take(&self, batch: Batch) -> Result<(), Failure> {
        let Batch { events, facts, bad, lines, .. } = batch;
        self.note(lines, bad);
        if !events.is_empty() {
            self.append(events).await?;
        }
        if !facts.is_empty() {
            self.know(facts).await?;
        }
        Ok(())
    }

    /// Notes how far it is, and lines that are neither event nor fact.
    fn note(&self, lines: u64, bad: Vec<BadLine>) {
        let mut told = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        told.lines = lines;
        told.damaged += bad.len() as u64;
        for line in bad {
            tell(&mut told, line);
        }
    }

    async fn append(&self, batch: Vec<(u64, Event)>) -> Result<(), Failure> {
        let is_out = |event: &Event| {
            self.control.suppressed.as_ref().is_some_and(|suppressed| suppressed.covers_event(event))
        };
        let (out, kept): (Vec<_>, Vec<_>) = batch.into_iter().partition(|(_, event)| is_out(event));
        let (numbers, events): (Vec<u64>, Vec<Event>) = kept.into_iter().unzip();
        let (store, mut patience) = (&self.control.open.store, Patience::new());
        let appended = loop {
            match store.append(&events).await {
                Ok(appended) => break appended,
                Err(error) => patience.wait(error).await?,
            }
        };
        let mut told = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        told.suppressed += out.len() as u64;
        for (line, appended) in numbers.into_iter().zip(appended) {
            match appended {
                Appended::New => told.new += 1,
                Appended::Duplicate => told.duplicates += 1,
                Appended::Unstorable(why) => {
                    told.unstorable += 1;
                    tell(&mut told, BadLine { line, why });
                }
            }
        }
        Ok(())
    }

    async fn know(&self, mut facts: Vec<KnownFact>) -> Result<(), Failure> {
        let all = facts.len();
        if let Some(suppressed) = &self.control.suppressed {
            facts.retain(|fact| !is_of_suppressed(fact, suppressed));
        }
        let (store, mut patience) = (&self.control.open.store, Patience::new());
        let unstorable = loop {
            match store.know(&facts).await {
                Ok(unstorable) => break unstorable,
                Err(error) => patience.wait(error).await?,
            }
        };
        let mut told = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        told.facts += facts.len() as u64 - unstorable;
        told.unstorable += unstorable;
        told.suppressed += (all - facts.len()) as u64;
        Ok(())
    }
}

/// With a store that is behind.
struct Patience {
    until: Instant,
    pause: Duration,
}

impl Patience {
    fn new() -> Self {
        Self { until: Instant::now() + STORE_TIME, pause: PAUSE }
    }

    /// Waits before the next attempt, unless none would help.
    async fn wait(&mut self, error: StoreError) -> Result<(), Failure> {
        if !matches!(error, StoreError::Unavailable(_)) || Instant::now() >= self.until {
            return Err(error.into());
        }
        sleep(self.pause).await;
        self.pause = (2 * self.pause).min(PAUSE_MAX);
        Ok(())
    }
}

/// True for what says something of a user who is erased.
fn is_of_suppressed(fact: &KnownFact, suppressed: &Suppressed) -> bool {
    let (user_id, anonymous_id, previous_id) = match &fact.what {
        Known::User { user, .. } => (Some(user), None, None),
        Known::Link { anonymous, user, .. } => (Some(user), Some(anonymous), None),
        Known::Alias { previous, user, .. } => (Some(user), None, Some(previous)),
        Known::Apart { from, user, .. } => (Some(user), None, Some(from)),
        Known::Traits { who: Subject::User(user), .. } => (Some(user), None, None),
        Known::Traits { who: Subject::Anonymous(device), .. } => (None, Some(device), None),
    };
    let [user_id, anonymous_id, previous_id] =
        [user_id, anonymous_id, previous_id].map(|id| id.map(|id| &**id));
    suppressed.covers(Ids { user_id, anonymous_id, previous_id })
}

/// Tells of one of the first bad lines.
fn tell(told: &mut Imported, bad: BadLine) {
    if told.first_bad.len() < BAD_SHOWN_MAX {
        let why = bad.why.chars().take(WHY_CHARS_MAX).collect();
        told.first_bad.push(BadLine { why, ..bad });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: usize, bytes: usize) -> String {
        let text = "x".repeat(bytes);
        format!(
            r#"{{"id":"{id}","kind":"track","name":"n","user_id":"u","time_ms":1,"accepted_ms":1,"properties":{{"a":"{text}"}}}}"#
        )
    }

    fn batches(lines: impl IntoIterator<Item = String>) -> Vec<Batch> {
        let text = lines.into_iter().map(|line| line + "\n").collect::<String>();
        let mut lines = Numbered { from: text.as_bytes(), count: 0 };
        let mut batches = Vec::new();
        while batches.last().is_none_or(|batch: &Batch| !batch.is_last) {
            batches.push(next_batch(&mut lines).unwrap());
        }
        batches
    }

    fn sizes(lines: impl IntoIterator<Item = String>) -> Vec<(usize, usize)> {
        batches(lines).iter().map(|batch| (batch.events.len(), batch.facts.len())).collect()
    }

    #[test]
    fn a_batch_is_bounded_in_lines_and_in_bytes() {
        assert_eq!(sizes((0..2_500).map(|id| event(id, 1))), [(1_000, 0), (1_000, 0), (500, 0)]);
        assert_eq!(sizes((0..5).map(|id| event(id, 1 << 20))), [(4, 0), (1, 0)]);
        let fact = |reason: &str| {
            format!(
                r#"{{"v":1,"fact":"apart","anonymous":"d","user":"u","operator":"o","reason":"{reason}","at_ms":1}}"#
            )
        };
        assert_eq!(sizes((0..1_500).map(|_| fact(""))), [(0, 1_000), (0, 500)]);
        assert_eq!(sizes([fact(&"x".repeat(BATCH_BYTES)), event(1, 1)]), [(0, 1), (1, 0)]);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_told_by_its_number() {
        let lines = [" ", "no", &event(1, 1), r#"{"v":9,"fact":"user","user":"u"}"#];
        let batches = batches(lines.map(str::to_owned));
        assert_eq!((batches.len(), batches[0].lines, batches[0].events[0].0), (1, 4, 3));
        assert_eq!(batches[0].bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [2, 4]);
        assert!(batches[0].bad.iter().all(|bad| bad.why.starts_with("neither event nor fact")));
    }

    #[tokio::test]
    async fn lines_are_the_same_wherever_the_pieces_end() {
        let text = "one\n\ntwo and more\n\nlast";
        for piece_bytes in 1..=text.len() {
            let (pieces, taken) = mpsc::channel(text.len());
            for piece in text.as_bytes().chunks(piece_bytes) {
                pieces.send(Ok(Bytes::copy_from_slice(piece))).await.unwrap();
            }
            drop(pieces);
            let read = spawn_blocking(move || {
                Pieces { taken, piece: Bytes::new() }.lines().collect::<io::Result<Vec<_>>>()
            });
            assert_eq!(read.await.unwrap().unwrap(), ["one", "", "two and more", "", "last"]);
        }
    }
}
