//! Whether requests are let through to a provider: freely to one that works, one probe
//! at a time to one that does not. There is one gate before each route. While it is
//! closed, events wait without using up attempts. A pure value that takes time as an
//! argument.

use std::time::Duration;

use tokio::time::Instant;

use super::doubt::RequestNumber;

/// Requests that fail in a row before a provider counts as failing.
const FAILURES_MAX: u32 = 3;
/// Most characters of a trouble that are told.
const TROUBLE_CHARS_MAX: usize = 200;

/// What a lane knows of its provider, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ProviderState {
    /// Requests get through.
    Sending,
    /// Several in a row did not.
    Failing,
    /// It answers, and refuses every event, or every event of a kind: a person is
    /// needed.
    Refusing,
    /// It refuses our key or our address: a person is needed.
    Paused,
    /// A person has stopped it.
    Suspended,
}

impl ProviderState {
    const ALL: [Self; 5] = [Self::Sending, Self::Failing, Self::Refusing, Self::Paused, Self::Suspended];
    /// Names of all states, by discriminant.
    pub(crate) const NAMES: [&'static str; 5] = ["sending", "failing", "refusing", "paused", "suspended"];

    pub(crate) fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    pub(crate) fn from_index(index: u8) -> Self {
        Self::ALL.get(usize::from(index)).copied().unwrap_or(Self::Suspended)
    }
}

/// What a provider refuses, and so what has to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Refusal {
    /// Events: those of one kind.
    Content,
    /// Our address of one endpoint: all that goes there.
    Address,
    /// Our key, or our account: everything.
    Account,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Most events in the first probe, and in the first request after it.
    probe_events: usize,
    /// Requests that delivered something so far.
    deliveries: u64,
    delivered_at: Option<Instant>,
    failures: u32,
    /// When the first of these failures was.
    failing_since: Option<Instant>,
    refused: Option<Refused>,
    closed_until: Option<Instant>,
    /// Until when the provider asks to be left alone, whatever it answers meanwhile to
    /// what was under way.
    asked_until: Option<Instant>,
    /// Most events under way to a provider that has just come back.
    window: Option<usize>,
    /// The last request that was let through.
    last_request: Option<RequestNumber>,
    /// What is the matter, in our words and the provider's.
    trouble: String,
}

/// What is refused now.
#[derive(Debug, Clone, Copy)]
struct Refused {
    what: Refusal,
    since: Instant,
    /// Requests that were.
    requests: u32,
    /// The first request that could be sent after the last of them was answered.
    next_request: RequestNumber,
}

impl Gate {
    /// The window at which a provider counts as recovered.
    const WINDOW_MAX: usize = 50_000;

    pub(crate) fn new(probe_events: usize) -> Self {
        Self {
            probe_events,
            deliveries: 0,
            delivered_at: None,
            failures: 0,
            failing_since: None,
            refused: None,
            closed_until: None,
            asked_until: None,
            window: None,
            last_request: None,
            trouble: String::new(),
        }
    }

    /// Requests that delivered something so far.
    pub(crate) fn deliveries(&self) -> u64 {
        self.deliveries
    }

    /// For how long the provider has been down, if one more failure means that it
    /// is.
    pub(crate) fn down_for(&self, now: Instant) -> Option<Duration> {
        let since = self.failing_since.filter(|_| self.failures + 1 >= FAILURES_MAX)?;
        Some(now.saturating_duration_since(since))
    }

    /// For how long it has refused what it refuses.
    pub(crate) fn refused_for(&self, now: Instant) -> Duration {
        self.refused.map_or(Duration::ZERO, |refused| now.saturating_duration_since(refused.since))
    }

    /// What it refuses now.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refused.map(|refused| refused.what)
    }

    /// The first request that could be sent after it refused, if it does.
    pub(crate) fn next_after_refusal(&self) -> Option<RequestNumber> {
        self.refused.map(|refused| refused.next_request)
    }

    /// Most events in a probe: half as many with each that fails. Where one
    /// event is what the provider fails on, or what something before it refuses, a
    /// probe without it gets through in the end, and tells that from an outage.
    pub(crate) fn probe_events(&self) -> usize {
        if self.refusal() == Some(Refusal::Content) {
            return 1;
        }
        let failed = self.failures.saturating_sub(FAILURES_MAX);
        let refused = self.refused.map_or(0, |refused| refused.requests);
        let halvings = failed.max(refused).min(usize::BITS - 1);
        (self.probe_events >> halvings).max(1)
    }

    /// Most events that may be under way; nothing if only the provider's own
    /// limits hold.
    pub(crate) fn window(&self) -> Option<usize> {
        self.window
    }

    pub(crate) fn state(&self) -> ProviderState {
        match self.refusal() {
            Some(Refusal::Account | Refusal::Address) => ProviderState::Paused,
            Some(Refusal::Content) => ProviderState::Refusing,
            None if self.failures >= FAILURES_MAX => ProviderState::Failing,
            None => ProviderState::Sending,
        }
    }

    /// Since when nothing gets through, if nothing does.
    pub(crate) fn barred_since(&self) -> Option<Instant> {
        let failing = self.failing_since.filter(|_| self.state() == ProviderState::Failing);
        self.refused.map(|refused| refused.since).or(failing)
    }

    /// True if something got through later than that.
    pub(crate) fn delivered_after(&self, at: Instant) -> bool {
        self.delivered_at.is_some_and(|delivered_at| delivered_at > at)
    }

    /// What is the matter with the provider, if something is.
    pub(crate) fn trouble(&self) -> &str {
        &self.trouble
    }

    pub(crate) fn tell_trouble(&mut self, trouble: &str) {
        self.trouble = trouble.chars().take(TROUBLE_CHARS_MAX).collect();
    }

    /// A request is let through.
    pub(crate) fn sent(&mut self, request: RequestNumber) {
        self.last_request = Some(request);
    }

    /// True if one was let through with that number or a later one.
    pub(crate) fn has_sent_since(&self, request: RequestNumber) -> bool {
        self.last_request.is_some_and(|last| last >= request)
    }

    /// The provider took events of that request. What was sent before it refused shows
    /// nothing of that.
    pub(crate) fn delivered(&mut self, by: RequestNumber, now: Instant) {
        self.deliveries += 1;
        self.delivered_at = Some(now);
        if self.refused.is_some_and(|refused| by < refused.next_request) {
            return;
        }
        self.window = match self.window {
            _ if self.state() != ProviderState::Sending => Some(self.probe_events),
            Some(window) => Some(2 * window).filter(|window| *window < Self::WINDOW_MAX),
            None => None,
        };
        (self.failures, self.failing_since) = (0, None);
        self.refuses_no_more();
    }

    /// It answered and took nothing: it is there, and that is all that is known.
    pub(crate) fn answered(&mut self) {
        if self.state() == ProviderState::Failing {
            self.window = Some(self.probe_events);
        }
        (self.failures, self.failing_since) = (0, None);
        if self.refused.is_none() {
            self.closed_until = None;
        }
    }

    /// A request was not answered; it will be sent again after `delay`. A provider
    /// that `asks` for that delay is sent nothing else meanwhile.
    pub(crate) fn failed(&mut self, now: Instant, delay: Duration, asks: bool) {
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert(now);
        self.window = self.window.map(|_| self.probe_events);
        let until = Some(now + delay);
        if asks {
            self.asked_until = self.asked_until.max(until);
        } else if self.state() != ProviderState::Sending {
            self.closed_until = self.closed_until.max(until);
        }
    }

    /// It refuses; the next probe may go after `delay`. `next_request` is the first
    /// that can be sent from now on.
    pub(crate) fn refused(
        &mut self,
        what: Refusal,
        next_request: RequestNumber,
        now: Instant,
        delay: Duration,
    ) {
        let before = self.refused;
        self.refused = Some(Refused {
            what: before.map_or(what, |before| before.what.max(what)),
            since: before.map_or(now, |before| before.since),
            requests: before.map_or(0, |before| before.requests).saturating_add(1),
            next_request,
        });
        (self.failures, self.failing_since) = (0, None);
        self.closed_until = self.closed_until.max(Some(now + delay));
    }

    /// What it refused is not refused any more, or is not there any more.
    pub(crate) fn refuses_no_more(&mut self) {
        (self.refused, self.closed_until) = (None, None);
    }

    /// What was kept apart comes back: not all of it at once.
    pub(crate) fn ease_in(&mut self) {
        self.window = Some(self.probe_events);
    }

    /// When the next request may go; nothing if one may go now.
    pub(crate) fn opens_at(&self, now: Instant) -> Option<Instant> {
        self.closed_until.max(self.asked_until).filter(|until| *until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: RequestNumber = 1;

    #[tokio::test(start_paused = true)]
    async fn the_gate_closes_when_failures_come_in_a_row_and_opens_with_a_success() {
        let now = Instant::now();
        let delay = Duration::from_secs(4);
        let mut gate = Gate::new(50);
        gate.failed(now, delay, false);
        gate.failed(now, delay, false);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Sending, None));
        gate.failed(now, delay, false);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Failing, Some(now + delay)));
        assert_eq!(gate.opens_at(now + delay), None);
        let probes = (0..8).map(|_| (gate.probe_events(), gate.failed(now, delay, false)).0);
        assert_eq!(probes.collect::<Vec<_>>(), [50, 25, 12, 6, 3, 1, 1, 1]);
        gate.delivered(REQUEST, now);
        assert_eq!(gate.probe_events(), 50);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Sending, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_asks_to_wait_closes_the_gate_at_once() {
        let now = Instant::now();
        let mut gate = Gate::new(50);
        gate.failed(now, Duration::from_secs(120), true);
        assert_eq!(gate.opens_at(now), Some(now + Duration::from_secs(120)));
        assert_eq!(gate.state(), ProviderState::Sending);
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_asks_to_wait_is_left_alone_whatever_it_answers_meanwhile() {
        let now = Instant::now();
        let mut gate = Gate::new(50);
        gate.failed(now, Duration::from_secs(120), true);
        gate.delivered(REQUEST, now);
        gate.answered();
        assert_eq!(gate.opens_at(now), Some(now + Duration::from_secs(120)));
        assert_eq!(gate.opens_at(now + Duration::from_secs(120)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_a_refusal_opens_nothing() {
        let (now, delay) = (Instant::now(), Duration::from_secs(1));
        let mut gate = Gate::new(50);
        gate.refused(Refusal::Account, REQUEST, now, delay);
        gate.delivered(REQUEST - 1, now);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Paused, Some(now + delay)));
        gate.delivered(REQUEST, now);
        assert_eq!(gate.opens_at(now), None);
    }

    /// An answer that takes nothing shows that the provider is there, and not that
    /// our key is good.
    #[tokio::test(start_paused = true)]
    async fn a_refused_key_pauses_until_something_is_delivered_and_its_probes_shrink() {
        let (now, delay) = (Instant::now(), Duration::from_secs(1));
        let mut gate = Gate::new(50);
        gate.refused(Refusal::Account, REQUEST, now, delay);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Paused, Some(now + delay)));
        let probes =
            (0..7).map(|_| (gate.probe_events(), gate.refused(Refusal::Account, REQUEST, now, delay)).0);
        assert_eq!(probes.collect::<Vec<_>>(), [25, 12, 6, 3, 1, 1, 1]);
        gate.answered();
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Paused, Some(now + delay)));
        gate.delivered(REQUEST, now);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Sending, None));
        assert_eq!(gate.window(), Some(50), "it is not flooded at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_comes_back_gets_twice_as_much_with_each_answer() {
        let now = Instant::now();
        let mut gate = Gate::new(50);
        gate.delivered(REQUEST, now);
        assert_eq!(gate.window(), None, "one that works is not held back");
        for _ in 0..FAILURES_MAX {
            gate.failed(now, Duration::from_secs(1), false);
        }
        gate.delivered(REQUEST, now);
        assert_eq!(gate.window(), Some(50));
        gate.delivered(REQUEST, now);
        gate.delivered(REQUEST, now);
        assert_eq!(gate.window(), Some(200));
        gate.failed(now, Duration::from_secs(1), false);
        assert_eq!(gate.window(), Some(50), "a failure on the way begins again");
        (0..10).for_each(|_| gate.delivered(REQUEST, now));
        assert_eq!(gate.window(), None);
    }
}
