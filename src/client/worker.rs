//! The task that sends what waits.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use tracing::warn;

use super::{ClientSettings, Entry, FOREVER, Seldom, Tally, id_and_name};
use crate::proto::v1::{
    TrackBatchRequest, TrackBatchResponse, analytics_service_client::AnalyticsServiceClient,
    track_batch_answer::Answer,
};

/// Most bytes of a batch: half of what the relay takes.
const BATCH_BYTES_MAX: usize = 512 * 1024;
/// A smaller event is too large for nothing that lets gRPC through: whoever says so
/// means something else. A larger one must not hold up the others for ever.
const TOO_LARGE_MIN: usize = 4 * 1024;
/// Longest wait after the first failure; doubles with each further one.
const RETRY_DELAY_FIRST: Duration = Duration::from_millis(100);
/// Longest wait that a relay is granted.
const RETRY_DELAY_ASKED_MAX: Duration = Duration::from_secs(5 * 60);
/// Batches that are taken in a row before larger ones are tried again, where the
/// usual size was too large for something on the way.
const TAKEN_BEFORE_LARGER: u32 = 16;

/// Sends one batch at a time, so that order is kept. What it has when it ends,
/// however it ends, is abandoned.
pub(super) struct Worker {
    client: AnalyticsServiceClient<Channel>,
    /// How to connect anew.
    endpoint: Option<Endpoint>,
    settings: ClientSettings,
    /// Fewer than the settings say while batches are too large for the relay or for
    /// something on the way.
    events_max: usize,
    /// Batches that were taken since that was changed.
    taken: u32,
    outlet: mpsc::Receiver<Entry>,
    /// The next batch, and what did not fit into it.
    pending: VecDeque<Entry>,
    /// Calls in a row that brought nothing forward.
    failures: u32,
    tally: Arc<Tally>,
    refused_told: Seldom,
    failure_told: Seldom,
    unknown_told: Seldom,
}

/// What a call that was not answered by events means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The batch breaks a limit, of the relay or of something on the way.
    TooLarge,
    /// The relay takes none of it as it is.
    Invalid,
    /// Perhaps it does.
    MayBeTooLarge,
    /// Nothing is said about the batch.
    Other,
}

impl Failure {
    fn of(status: &Status) -> Self {
        // What gRPC's libraries say of a message's size, tonic of an HTTP status, and
        // proxies by the names that HTTP has given 413.
        const WORDS: [&str; 7] = [
            "request entity too large",
            "payload too large",
            "content too large",
            "received message larger than max (",
            "message exceeds maximum size ",
            "message length too large",
            "mapped from http status code 413",
        ];
        let said = || status.message().to_ascii_lowercase();
        match status.code() {
            Code::InvalidArgument => Self::Invalid,
            Code::OutOfRange => Self::TooLarge,
            // The relay's own: it is full, and says when to come again.
            Code::ResourceExhausted if status.get_details_retry_info().is_some() => Self::Other,
            Code::ResourceExhausted | Code::Unknown if WORDS.iter().any(|word| said().contains(word)) => {
                Self::TooLarge
            }
            Code::ResourceExhausted => Self::MayBeTooLarge,
            _ => Self::Other,
        }
    }
}

impl Worker {
    pub(super) fn new(
        channel: Channel,
        endpoint: Option<Endpoint>,
        settings: ClientSettings,
        outlet: mpsc::Receiver<Entry>,
        tally: Arc<Tally>,
    ) -> Self {
        Self {
            client: AnalyticsServiceClient::new(channel),
            endpoint,
            events_max: settings.batch_events_max,
            taken: 0,
            settings,
            outlet,
            pending: VecDeque::new(),
            failures: 0,
            tally,
            refused_told: Seldom::default(),
            failure_told: Seldom::default(),
            unknown_told: Seldom::default(),
        }
    }

    /// Ends when the client is closed and all is sent, or its time is over.
    pub(super) async fn run(mut self) {
        let tally = self.tally.clone();
        let closing = async {
            sleep_until(tally.closing().await).await;
        };
        tokio::select! {
            () = self.send_all() => {}
            () = closing => {}
        }
    }

    /// Returns when the client is closed and all is sent.
    async fn send_all(&mut self) {
        while self.gather().await {
            let entries = self.batch_len();
            let items = self.pending.iter().take(entries).map(|entry| entry.item.clone()).collect();
            let call = self.client.track_batch(TrackBatchRequest { items });
            let answer = match timeout(self.settings.call_timeout, call).await {
                Ok(answer) => answer.map(tonic::Response::into_inner),
                Err(_) => {
                    self.connect_anew();
                    Err(Status::deadline_exceeded("no answer in time"))
                }
            };
            let delay = match answer {
                Ok(response) if response.answers.len() == entries => self.settle(response),
                Ok(response) => {
                    let answers = response.answers.len();
                    self.failed(entries, &Status::internal(format!("{answers} answers to {entries} items")))
                }
                Err(status) => self.failed(entries, &status),
            };
            self.tally.progress.send_replace(true);
            if !delay.is_zero() {
                self.tally.retries.fetch_add(1, Ordering::Relaxed);
                let is_open = self.tally.closes_at.borrow().is_none();
                tokio::select! {
                    () = sleep(delay) => {}
                    () = self.tally.hurry.notified() => {}
                    // One attempt more, at once.
                    _ = self.tally.closing(), if is_open => {}
                }
            }
        }
    }

    /// Leaves a connection on which nothing came: it may hang for longer than we
    /// have patience, in its handshake above all.
    fn connect_anew(&mut self) {
        if let Some(endpoint) = &self.endpoint {
            self.client = AnalyticsServiceClient::new(endpoint.connect_lazy());
        }
    }

    /// Waits until a batch is full or has waited long enough. False if nothing
    /// will come any more.
    async fn gather(&mut self) -> bool {
        if self.pending.is_empty() {
            tokio::select! {
                biased;
                entry = self.outlet.recv() => match entry {
                    Some(entry) => self.pending.push_back(entry),
                    None => return false,
                },
                _ = self.tally.closing() => {
                    // What is in the queue now is the last.
                    self.outlet.close();
                    match self.outlet.recv().await {
                        Some(entry) => self.pending.push_back(entry),
                        None => return false,
                    }
                }
            }
        }
        let flushes = self.tally.ended() < self.tally.flush_to.load(Ordering::SeqCst);
        let interval = if flushes { Duration::ZERO } else { self.settings.flush_interval.min(FOREVER) };
        let mut due = Instant::now() + interval;
        let mut bytes: usize = self.pending.iter().map(|entry| entry.bytes).sum();
        while self.pending.len() < self.events_max && bytes < BATCH_BYTES_MAX {
            tokio::select! {
                biased;
                entry = self.outlet.recv() => match entry {
                    Some(entry) => {
                        bytes += entry.bytes;
                        self.pending.push_back(entry);
                    }
                    None => break,
                },
                () = self.tally.hurry.notified() => due = Instant::now(),
                () = sleep_until(due) => break,
                _ = self.tally.closing() => break,
            }
        }
        true
    }

    /// How many of the pending make the next batch: at least one.
    fn batch_len(&self) -> usize {
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.bytes;
            bytes <= BATCH_BYTES_MAX
        };
        self.pending.iter().take(self.events_max).take_while(fits).count().max(1)
    }

    /// Takes out what was answered for good. Returns how long to wait before the
    /// rest is sent again; zero if there is none.
    fn settle(&mut self, response: TrackBatchResponse) -> Duration {
        let later = self.pending.split_off(response.answers.len());
        let mut deferred = VecDeque::new();
        let mut unknown = 0;
        let answered = response.answers.len();
        for (entry, answer) in std::mem::take(&mut self.pending).into_iter().zip(response.answers) {
            match answer.answer {
                Some(Answer::Accepted(_)) => self.ended(&entry, &self.tally.accepted),
                Some(Answer::Refused(refused)) => {
                    let violation = refused.violations.first().cloned().unwrap_or_default();
                    self.tell_refused(&entry, &violation.reason, &violation.field, &violation.description);
                    self.ended(&entry, &self.tally.refused);
                }
                Some(Answer::Deferred(_)) => deferred.push_back(entry),
                // Of a newer relay, or of something that is none.
                None => {
                    unknown += 1;
                    deferred.push_back(entry);
                }
            }
        }
        let waits = deferred.len();
        deferred.extend(later);
        self.pending = deferred;
        self.failures = if waits < answered { 0 } else { self.failures.saturating_add(1) };
        self.note_taken();
        if let Some(more) = (unknown > 0).then(|| self.unknown_told.may_tell()).flatten() {
            let (event_id, event_name) =
                self.pending.front().map_or(("", ""), |entry| id_and_name(&entry.item));
            warn!(
                event_id,
                event_name,
                event_count = unknown,
                more,
                "got answers that this version does not know, these events are sent again"
            );
        }
        match u64::try_from(response.retry_delay_ms) {
            _ if waits == 0 => Duration::ZERO,
            // A relay that defers says for how long.
            Ok(delay_ms) if delay_ms > 0 && unknown == 0 => {
                Duration::from_millis(delay_ms).min(RETRY_DELAY_ASKED_MAX)
            }
            Ok(_) | Err(_) => self.backoff(),
        }
    }

    /// True if a lone event may be too large for something.
    fn first_is_large(&self) -> bool {
        self.pending.front().is_some_and(|entry| entry.bytes >= TOO_LARGE_MIN)
    }

    /// Nothing of the batch was answered. Returns how long to wait.
    fn failed(&mut self, entries: usize, status: &Status) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let failure = Failure::of(status);
        if failure != Failure::Other && entries > 1 {
            // Fewer at a time, until a lone event is to blame.
            (self.events_max, self.taken) = (entries.div_ceil(2), 0);
            if failure != Failure::MayBeTooLarge {
                return Duration::from_millis(1);
            }
        } else if failure == Failure::Invalid || failure == Failure::TooLarge && self.first_is_large() {
            if let Some(entry) = self.pending.pop_front() {
                self.tell_refused(&entry, "", "", status.message());
                self.ended(&entry, &self.tally.refused);
            }
            // It was this one, and not the number.
            (self.events_max, self.failures) = (self.settings.batch_events_max, 0);
            return Duration::ZERO;
        }
        if let Some(more) = self.failure_told.may_tell() {
            let (event_id, event_name) =
                self.pending.front().map_or(("", ""), |entry| id_and_name(&entry.item));
            let (code, failures) = (status.code(), self.failures);
            let error = cause(status);
            warn!(
                ?code,
                error, failures, more, event_id, event_name, "the relay does not take events: they wait"
            );
        }
        let asked = status.get_details_retry_info().and_then(|info| info.retry_delay);
        asked.unwrap_or_default().min(RETRY_DELAY_ASKED_MAX).max(self.backoff())
    }

    /// How long to wait after so many failures: random, so that callers which failed
    /// together do not come again together.
    fn backoff(&self) -> Duration {
        let limit = RETRY_DELAY_FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(self.settings.retry_delay_max)
            .max(Duration::from_millis(1));
        limit.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// After some batches of a smaller size a larger one is tried: what was in the way
    /// may be gone, or have been a single event.
    fn note_taken(&mut self) {
        self.taken += 1;
        if self.taken >= TAKEN_BEFORE_LARGER && self.events_max < self.settings.batch_events_max {
            self.events_max = (self.events_max * 2).min(self.settings.batch_events_max);
            self.taken = 0;
        }
    }

    fn tell_refused(&self, entry: &Entry, reason: &str, field: &str, detail: &str) {
        if let Some(more) = self.refused_told.may_tell() {
            let (event_id, event_name) = id_and_name(&entry.item);
            warn!(event_id, event_name, more, reason, field, detail, "the relay refuses an event");
        }
    }

    fn ended(&self, entry: &Entry, count: &AtomicU64) {
        self.tally.waiting_bytes.fetch_sub(entry.bytes, Ordering::Relaxed);
        count.fetch_add(1, Ordering::SeqCst);
    }
}

/// However it ends: closed, with its client, or with the runtime.
impl Drop for Worker {
    fn drop(&mut self) {
        self.outlet.close();
        while let Ok(entry) = self.outlet.try_recv() {
            self.pending.push_back(entry);
        }
        let left = std::mem::take(&mut self.pending);
        if let Some(first) = left.front() {
            let (event_id, event_name) = id_and_name(&first.item);
            warn!(
                event_count = left.len(),
                event_id,
                event_name,
                "ended before the relay had taken all events: from this one on they are lost"
            );
        }
        for entry in left {
            self.ended(&entry, &self.tally.abandoned);
        }
        self.tally.progress.send_replace(false);
    }
}

/// What a status says, with what is behind it: tonic's own words for a connection
/// that failed are "transport error".
fn cause(status: &Status) -> String {
    let mut said = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let words = error.to_string();
        if !said.contains(&words) {
            said = format!("{said}: {words}");
        }
        source = error.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_size_is_told_from_a_relay_that_is_full() {
        let full = ErrorDetails::with_retry_info(Some(Duration::from_millis(500)));
        let full = Status::with_error_details(Code::ResourceExhausted, "the queue is too large", full);
        assert_eq!(Failure::of(&full), Failure::Other);
        for (status, failure) in [
            (
                Status::resource_exhausted("grpc: received message larger than max (2 vs. 1)"),
                Failure::TooLarge,
            ),
            (Status::resource_exhausted("gRPC message exceeds maximum size 1: 2"), Failure::TooLarge),
            (
                Status::unknown("grpc-status header missing, mapped from HTTP status code 413"),
                Failure::TooLarge,
            ),
            (Status::out_of_range("decoded message length too large"), Failure::TooLarge),
            (Status::resource_exhausted("slow down"), Failure::MayBeTooLarge),
            (Status::unavailable("too large a crowd"), Failure::Other),
            (Status::invalid_argument("1,001 items"), Failure::Invalid),
            (Status::resource_exhausted("your quota of 413 calls exceeds the plan"), Failure::MayBeTooLarge),
            (Status::unknown("boom"), Failure::Other),
        ] {
            assert_eq!(Failure::of(&status), failure, "{status}");
        }
    }
}
