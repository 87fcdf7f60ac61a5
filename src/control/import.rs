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
    let mut importing = Importing { control, lines: Lines::default(), waiting: Waiting::default(), progress };
    loop {
        let piece = timeout(SILENCE_MAX, body.frame())
            .await
            .map_err(|_| Failure::cut(format!("nothing came for {} s", SILENCE_MAX.as_secs())))?;
        let Some(piece) = piece else { break };
        let piece = piece.map_err(|error| Failure::cut(format!("the lines cannot be read: {error}")))?;
        if let Ok(bytes) = piece.into_data() {
            importing.take(&bytes);
        }
        while importing.waiting.has_events() {
            importing.append().await?;
        }
        while importing.waiting.has_facts() {
            importing.know().await?;
        }
    }
    importing.finish();
    while !importing.waiting.events.is_empty() {
        importing.append().await?;
    }
    while !importing.waiting.facts.is_empty() {
        importing.know().await?;
    }
    Ok(progress_of(&importing.progress))
}

struct Importing {
    control: Control,
    lines: Lines,
    waiting: Waiting,
    progress: Progress,
}

impl Importing {
    fn take(&mut self, bytes: &[u8]) {
        let mut bad = Vec::new();
        self.lines.push(bytes, |number, line| self.waiting.sort(number, &line, &mut bad));
        self.note(bad);
    }

    fn finish(&mut self) {
        let mut bad = Vec::new();
        self.lines.finish(|number, line| self.waiting.sort(number, &line, &mut bad));
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
        let batch = self.waiting.take_events();
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
        let mut facts = self.waiting.take_facts();
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

/// What waits to be taken in: a batch of each, and what one more piece brought.
#[derive(Default)]
struct Waiting {
    /// With the numbers of their lines.
    events: Vec<(u64, Event)>,
    event_bytes: usize,
    /// What is known about who is who.
    facts: Vec<KnownFact>,
    /// Of their lines.
    fact_bytes: usize,
}

impl Waiting {
    /// True if there is a batch of events.
    fn has_events(&self) -> bool {
        self.events.len() >= BATCH_EVENTS || self.event_bytes >= BATCH_BYTES
    }

    /// True if there is a batch of facts.
    fn has_facts(&self) -> bool {
        self.facts.len() >= BATCH_EVENTS || self.fact_bytes >= BATCH_BYTES
    }

    /// Takes in a line, whatever it is.
    fn sort(&mut self, number: u64, line: &Line<'_>, bad: &mut Vec<BadLine>) {
        let why = match line {
            Line::TooLong => format!("got more than {LINE_BYTES_MAX} bytes, want an event"),
            Line::Whole(line) if line.trim_ascii().is_empty() => return,
            Line::Whole(line) => match Event::from_json(line) {
                Ok(event) => {
                    self.event_bytes += event.memory_bytes();
                    return self.events.push((number, event));
                }
                Err(error) => match KnownFact::from_line(line) {
                    Some(fact) => {
                        self.fact_bytes += line.len();
                        return self.facts.push(fact);
                    }
                    None => format!("neither event nor fact: {error}"),
                },
            },
        };
        bad.push(BadLine { line: number, why });
    }

    /// At most one batch, at least one event if there is one.
    fn take_events(&mut self) -> Vec<(u64, Event)> {
        let mut bytes = 0;
        let fits = |(_, event): &&(u64, Event)| {
            bytes += event.memory_bytes();
            bytes <= BATCH_BYTES
        };
        let count = self.events.iter().take(BATCH_EVENTS).take_while(fits).count().max(1);
        let rest = self.events.split_off(count.min(self.events.len()));
        self.event_bytes = rest.iter().map(|(_, event)| event.memory_bytes()).sum();
        std::mem::replace(&mut self.events, rest)
    }

    /// At most one batch.
    fn take_facts(&mut self) -> Vec<KnownFact> {
        let rest = self.facts.split_off(self.facts.len().min(BATCH_EVENTS));
        if rest.is_empty() {
            self.fact_bytes = 0;
        }
        std::mem::replace(&mut self.facts, rest)
    }
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

    fn waiting(lines: impl IntoIterator<Item = String>) -> (Waiting, Vec<BadLine>) {
        let (mut waiting, mut bad) = (Waiting::default(), Vec::new());
        for (number, line) in (1..).zip(lines) {
            waiting.sort(number, &Line::Whole(line.as_bytes()), &mut bad);
        }
        (waiting, bad)
    }

    #[test]
    fn a_batch_is_bounded_in_events_and_in_bytes_and_an_event_that_is_too_big_goes_alone() {
        let (mut small, _) = waiting((0..2_500).map(|id| event(id, 1)));
        let batches: Vec<usize> = std::iter::from_fn(|| Some(small.take_events().len())).take(4).collect();
        assert_eq!((batches, small.event_bytes), (vec![1_000, 1_000, 500, 0], 0));
        let (mut large, _) = waiting((0..5).map(|id| event(id, 1 << 20)));
        assert!(large.has_events());
        assert_eq!(large.take_events().len(), 3);
        let (mut huge, _) = waiting((0..2).map(|id| event(id, 5 << 20)));
        assert_eq!((huge.take_events().len(), huge.take_events().len()), (1, 1));
    }

    #[test]
    fn facts_of_any_size_wait_in_memory_that_is_bounded() {
        let fact = |reason: &str| {
            format!(
                r#"{{"v":1,"fact":"apart","anonymous":"d","user":"u","operator":"o","reason":"{reason}","at_ms":1}}"#
            )
        };
        let (mut facts, bad) = waiting((0..1_500).map(|_| fact("")));
        assert!(facts.has_facts() && bad.is_empty());
        assert_eq!((facts.take_facts().len(), facts.take_facts().len()), (1_000, 500));
        let (mut large, _) = waiting([fact(&"x".repeat(BATCH_BYTES))]);
        assert!(large.has_facts());
        assert_eq!(large.take_facts().len(), 1);
        assert!(!large.has_facts());
    }

    #[test]
    fn what_is_wrong_with_a_line_is_told_by_its_number() {
        let (waiting, bad) =
            waiting([" ", "no", &event(1, 1), r#"{"v":9,"fact":"user","user":"u"}"#].map(str::to_owned));
        assert_eq!(waiting.events[0].0, 3);
        assert_eq!(bad.iter().map(|bad| bad.line).collect::<Vec<_>>(), [2, 4]);
    }
}
