//! Takes lines into the store, in batches, however many they are.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use analytics_relay_providers::Event;
use analytics_relay_store::{
    Appended, StoreError, Subject,
    model::{Known, KnownFact},
};
use axum::body::Body;
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Control, Failure,
    lines::{LINE_BYTES_MAX, Line, Lines},
    wire::{BAD_SHOWN_MAX, BadLine, Imported},
};
use crate::privacy::suppression::{Ids, Suppressed};

/// Events of one batch: where an event costs the store least.
const BATCH_EVENTS: usize = 1_000;
/// And its bytes.
const BATCH_BYTES: usize = 4 << 20;
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
pub(super) async fn import(
    control: Control,
    mut body: Body,
    progress: Progress,
) -> Result<Imported, Failure> {
    let mut importing = Importing {
        control,
        lines: Lines::default(),
        batch: Vec::new(),
        facts: Vec::new(),
        bytes: 0,
        progress,
    };
    loop {
        let piece = timeout(SILENCE_MAX, body.frame())
            .await
            .map_err(|_| Failure::cut(format!("nothing came for {} s", SILENCE_MAX.as_secs())))?;
        let Some(piece) = piece else { break };
        let piece = piece.map_err(|error| Failure::cut(format!("the lines cannot be read: {error}")))?;
        if let Ok(bytes) = piece.into_data() {
            importing.take(&bytes);
        }
        while importing.batch.len() >= BATCH_EVENTS || importing.bytes >= BATCH_BYTES {
            importing.append().await?;
        }
        while importing.facts.len() >= BATCH_EVENTS {
            importing.know().await?;
        }
    }
    importing.finish();
    while !importing.batch.is_empty() {
        importing.append().await?;
    }
    while !importing.facts.is_empty() {
        importing.know().await?;
    }
    Ok(progress_of(&importing.progress))
}

struct Importing {
    control: Control,
    lines: Lines,
    /// Events that wait, with the numbers of their lines.
    batch: Vec<(u64, Event)>,
    /// And what is known about who is who.
    facts: Vec<KnownFact>,
    /// Of the events.
    bytes: usize,
    progress: Progress,
}

impl Importing {
    fn take(&mut self, bytes: &[u8]) {
        let (mut bad, before) = (Vec::new(), self.batch.len());
        let Self { lines, batch, facts, .. } = self;
        lines.push(bytes, |number, line| sort(number, read(&line), batch, facts, &mut bad));
        self.bytes += self.batch[before..].iter().map(|(_, event)| event.memory_bytes()).sum::<usize>();
        self.note(bad);
    }

    fn finish(&mut self) {
        let mut bad = Vec::new();
        let Self { lines, batch, facts, .. } = self;
        lines.finish(|number, line| sort(number, read(&line), batch, facts, &mut bad));
        self.note(bad);
    }

    /// Notes how far it is, and lines that are no events.
    fn note(&self, bad: Vec<BadLine>) {
        let mut told = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        told.lines = self.lines.count();
        told.damaged += bad.len() as u64;
        for line in bad {
            tell(&mut told, line);
        }
    }

    /// Appends what makes a batch of what waits.
    async fn append(&mut self) -> Result<(), Failure> {
        let mut bytes = 0;
        let fits = |(_, event): &&(u64, Event)| {
            bytes += event.memory_bytes();
            bytes <= BATCH_BYTES
        };
        let events = self.batch.iter().take(BATCH_EVENTS).take_while(fits).count().max(1);
        let rest = self.batch.split_off(events.min(self.batch.len()));
        let batch = std::mem::replace(&mut self.batch, rest);
        self.bytes = self.batch.iter().map(|(_, event)| event.memory_bytes()).sum();
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

    /// Takes in what makes a batch of the facts that wait.
    async fn know(&mut self) -> Result<(), Failure> {
        let rest = self.facts.split_off(self.facts.len().min(BATCH_EVENTS));
        let mut facts = std::mem::replace(&mut self.facts, rest);
        let all = facts.len();
        if let Some(suppressed) = &self.control.suppressed {
            facts.retain(|fact| !is_of_suppressed(fact, suppressed));
        }
        let (store, mut patience) = (&self.control.open.store, Patience::new());
        while let Err(error) = store.know(&facts).await {
            patience.wait(error).await?;
        }
        let mut told = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        told.facts += facts.len() as u64;
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

/// What a line is.
enum Item {
    Event(Event),
    Fact(KnownFact),
    Empty,
    Bad(String),
}

fn read(line: &Line<'_>) -> Item {
    let Line::Whole(line) = line else {
        return Item::Bad(format!("got more than {LINE_BYTES_MAX} bytes, want an event"));
    };
    if line.trim_ascii().is_empty() {
        return Item::Empty;
    }
    match Event::from_json(line) {
        Ok(event) => Item::Event(event),
        Err(error) => KnownFact::from_line(line)
            .map_or_else(|| Item::Bad(format!("neither event nor fact: {error}")), Item::Fact),
    }
}

fn sort(
    number: u64,
    item: Item,
    batch: &mut Vec<(u64, Event)>,
    facts: &mut Vec<KnownFact>,
    bad: &mut Vec<BadLine>,
) {
    match item {
        Item::Event(event) => batch.push((number, event)),
        Item::Fact(fact) => facts.push(fact),
        Item::Empty => {}
        Item::Bad(why) => bad.push(BadLine { line: number, why }),
    }
}

/// Tells of one of the first bad lines.
fn tell(told: &mut Imported, bad: BadLine) {
    if told.first_bad.len() < BAD_SHOWN_MAX {
        let why = bad.why.chars().take(WHY_CHARS_MAX).collect();
        told.first_bad.push(BadLine { why, ..bad });
    }
}
