//! What a lane knows of its provider, and what may be sent to it therefore. Pure
//! values that take time as an argument.
//!
//! A [`Gate`] stands before each route: it lets requests through to a provider
//! that works, one probe at a time to one that does not. While it is closed,
//! events wait without using up attempts.
//!
//! A [`Doubt`] tells bad events from a provider in trouble. A refusal accuses an
//! event: named by the provider, or alone in its request. It is convicted only
//! when it is accused again after another event of its kind was delivered by a
//! request that was sent after the first accusation: then the provider works and
//! the event is to blame. Where several are accused and none is delivered, the
//! provider is in trouble, or our account with it is, and nothing is to blame.

use std::time::Duration;

use tokio::time::Instant;

/// Requests that fail in a row before a provider counts as failing.
const FAILURES_MAX: u32 = 3;
/// Requests that are refused, and different events that are accused, with nothing
/// delivered meanwhile, before a provider counts as refusing.
const REFUSALS_MAX: u32 = 3;

/// How long a refusal leaves it open what is to blame, at most.
const DOUBT_TIME: Duration = Duration::from_secs(60);

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
    failures: u32,
    /// When the first of these failures was.
    failing_since: Option<Instant>,
    /// What is refused now, since when, and in how many requests.
    refusal: Option<(Refusal, Instant)>,
    refusals: u32,
    closed_until: Option<Instant>,
    /// Most events under way to a provider that has just come back.
    window: Option<usize>,
}

impl Gate {
    /// The window at which a provider counts as recovered.
    const WINDOW_MAX: usize = 50_000;

    pub(crate) fn new(probe_events: usize) -> Self {
        Self {
            probe_events,
            deliveries: 0,
            failures: 0,
            failing_since: None,
            refusal: None,
            refusals: 0,
            closed_until: None,
            window: None,
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
        self.refusal.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since))
    }

    /// What it refuses now.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal.map(|(refusal, _)| refusal)
    }

    /// Most events in a probe: half as many with each that fails. Where one
    /// event is what the provider fails on, or what something before it refuses, a
    /// probe without it gets through in the end, and tells that from an outage.
    pub(crate) fn probe_events(&self) -> usize {
        if self.refusal() == Some(Refusal::Content) {
            return 1;
        }
        let failed = self.failures.saturating_sub(FAILURES_MAX);
        let halvings = failed.max(self.refusals).min(usize::BITS - 1);
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

    /// The provider took events.
    pub(crate) fn delivered(&mut self) {
        self.window = match self.window {
            _ if self.state() != ProviderState::Sending => Some(self.probe_events),
            Some(window) => Some(2 * window).filter(|window| *window < Self::WINDOW_MAX),
            None => None,
        };
        self.deliveries += 1;
        (self.failures, self.failing_since) = (0, None);
        (self.refusal, self.refusals, self.closed_until) = (None, 0, None);
    }

    /// It answered and took nothing: it is there, and that is all that is known.
    pub(crate) fn answered(&mut self) {
        if self.state() == ProviderState::Failing {
            self.window = Some(self.probe_events);
        }
        (self.failures, self.failing_since) = (0, None);
        if self.refusal.is_none() {
            self.closed_until = None;
        }
    }

    /// A request was not answered; it will be sent again after `delay`. A provider
    /// that `asks` for that delay is sent nothing else meanwhile.
    pub(crate) fn failed(&mut self, now: Instant, delay: Duration, asks: bool) {
        self.failures = self.failures.saturating_add(1);
        self.failing_since.get_or_insert(now);
        self.window = self.window.map(|_| self.probe_events);
        if asks || self.state() != ProviderState::Sending {
            self.close_until(now + delay);
        }
    }

    /// It refuses; the next probe may go after `delay`.
    pub(crate) fn refused(&mut self, refusal: Refusal, now: Instant, delay: Duration) {
        let (before, since) = self.refusal.unwrap_or((refusal, now));
        self.refusal = Some((before.max(refusal), since));
        self.refusals = self.refusals.saturating_add(1);
        (self.failures, self.failing_since) = (0, None);
        self.close_until(now + delay);
    }

    /// What was kept apart comes back: not all of it at once.
    pub(crate) fn ease_in(&mut self) {
        self.window = Some(self.probe_events);
    }

    fn close_until(&mut self, until: Instant) {
        self.closed_until = Some(self.closed_until.map_or(until, |closed| closed.max(until)));
    }

    /// When the next request may go; nothing if one may go now.
    pub(crate) fn opens_at(&self, now: Instant) -> Option<Instant> {
        self.closed_until.filter(|until| *until > now)
    }
}

/// Whether a provider takes a kind of event at an endpoint at all. See the module.
#[derive(Debug, Default)]
pub(crate) struct Doubt {
    /// When the newest request that delivered one was sent.
    worked_at: Option<Instant>,
    /// Requests that were refused since.
    refusals: u32,
    /// Events that were accused since, each once.
    accused: u32,
    /// When the last of those was refused.
    refused_at: Option<Instant>,
}

impl Doubt {
    /// A request that was sent at that time has delivered one.
    pub(crate) fn delivered(&mut self, sent_at: Instant) {
        self.worked_at = self.worked_at.max(Some(sent_at));
        (self.refusals, self.accused) = (0, 0);
    }

    /// A request that was sent at that time was refused, and accuses so many events
    /// that were not accused before.
    pub(crate) fn refused(&mut self, sent_at: Instant, now: Instant, accused: u32) {
        if self.worked_at.is_none_or(|worked_at| worked_at < sent_at) {
            self.refused_at = Some(now);
            self.refusals = self.refusals.saturating_add(1);
            self.accused = self.accused.saturating_add(accused);
        }
    }

    /// True if the provider has taken one that was sent after that time.
    pub(crate) fn works_since(&self, at: Instant) -> bool {
        self.worked_at.is_some_and(|worked_at| worked_at > at)
    }

    /// True while it is not known whether events or the provider are to blame: one
    /// request at a time. Not for ever, as there may be none of the kind that could
    /// show it.
    pub(crate) fn is_open(&self, now: Instant) -> bool {
        self.refusals > 0 && self.refused_at.is_some_and(|at| now < at + DOUBT_TIME)
    }

    /// True if too few were accused to tell.
    pub(crate) fn are_few(&self) -> bool {
        self.accused < REFUSALS_MAX
    }

    /// True if the provider is to blame.
    pub(crate) fn is_trouble(&self) -> bool {
        self.refusals >= REFUSALS_MAX && !self.are_few()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        gate.delivered();
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

    /// An answer that takes nothing shows that the provider is there, and not that
    /// our key is good.
    #[tokio::test(start_paused = true)]
    async fn a_refused_key_pauses_until_something_is_delivered_and_its_probes_shrink() {
        let (now, delay) = (Instant::now(), Duration::from_secs(1));
        let mut gate = Gate::new(50);
        gate.refused(Refusal::Account, now, delay);
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Paused, Some(now + delay)));
        let probes = (0..7).map(|_| (gate.probe_events(), gate.refused(Refusal::Account, now, delay)).0);
        assert_eq!(probes.collect::<Vec<_>>(), [25, 12, 6, 3, 1, 1, 1]);
        gate.answered();
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Paused, Some(now + delay)));
        gate.delivered();
        assert_eq!((gate.state(), gate.opens_at(now)), (ProviderState::Sending, None));
        assert_eq!(gate.window(), Some(50), "it is not flooded at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_comes_back_gets_twice_as_much_with_each_answer() {
        let now = Instant::now();
        let mut gate = Gate::new(50);
        gate.delivered();
        assert_eq!(gate.window(), None, "one that works is not held back");
        for _ in 0..FAILURES_MAX {
            gate.failed(now, Duration::from_secs(1), false);
        }
        gate.delivered();
        assert_eq!(gate.window(), Some(50));
        gate.delivered();
        gate.delivered();
        assert_eq!(gate.window(), Some(200));
        gate.failed(now, Duration::from_secs(1), false);
        assert_eq!(gate.window(), Some(50), "a failure on the way begins again");
        (0..10).for_each(|_| gate.delivered());
        assert_eq!(gate.window(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_request_that_was_sent_after_an_accusation_clears_the_provider() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut doubt = Doubt::default();
        doubt.refused(at(1), at(1), 1);
        assert!(doubt.is_open(at(1)) && !doubt.is_trouble());
        assert!(!doubt.is_open(at(70)), "not for ever");
        // It was on its way before the trouble began.
        doubt.delivered(at(0));
        assert!(!doubt.works_since(at(1)));
        for second in 2..5 {
            doubt.refused(at(second), at(second), 1);
        }
        assert!(doubt.is_trouble());
        doubt.delivered(at(6));
        assert!(doubt.works_since(at(4)) && !doubt.is_open(at(6)) && !doubt.is_trouble());
        // So was this refusal.
        doubt.refused(at(5), at(7), 1);
        assert!(!doubt.is_open(at(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_event_that_is_refused_again_and_again_is_no_trouble_of_the_provider() {
        let (mut doubt, now) = (Doubt::default(), Instant::now());
        for _ in 0..10 {
            doubt.refused(now, now, 0);
        }
        doubt.refused(now, now, 2);
        assert!(doubt.are_few() && !doubt.is_trouble());
        doubt.refused(now, now, 1);
        assert!(doubt.is_trouble());
    }
}
