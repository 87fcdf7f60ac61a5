//! When to try again. Pure values that take time and randomness as arguments.

use std::time::Duration;

use analytics_relay_providers::registry::Vendor;
use tokio::time::Instant;

use crate::settings::{Reader, name_for};

/// One delivery cycle: how often an event is sent, and how long it waits
/// between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryRule {
    /// Most attempts, the first included.
    pub attempts_max: u32,
    /// Longest wait after the first failure; doubles with each further one.
    pub initial_delay: Duration,
    /// Longest wait after any failure.
    pub max_delay: Duration,
}

impl RetryRule {
    pub(crate) fn read(reader: &mut Reader, vendor: Option<Vendor>) -> Self {
        let [attempts, initial, max] = ["MAX_RETRY_ATTEMPTS", "INITIAL_RETRY_DELAY_MS", "MAX_RETRY_DELAY_MS"]
            .map(|name| name_for(vendor, name));
        let rule = Self {
            attempts_max: reader.number(&attempts, 1..=100),
            initial_delay: reader.millis(&initial, 1..=600_000),
            max_delay: reader.millis(&max, 1..=3_600_000),
        };
        // Told once if both only repeat what holds for all.
        if rule.initial_delay > rule.max_delay && !(reader.is_repeated(&initial) && reader.is_repeated(&max))
        {
            let got = rule.max_delay.as_millis();
            reader.error(format!("{max}: got \"{got}\", want at least {initial}"));
        }
        rule
    }

    /// True if an event that failed so often is not sent again.
    pub(crate) fn is_exhausted(&self, attempts: u32) -> bool {
        attempts >= self.attempts_max
    }

    /// How long to wait after failure number `attempts` (counted from 1): a
    /// random time up to the exponential limit, so that relays which failed
    /// together do not come back together. A provider that asks for longer gets
    /// it.
    pub(crate) fn delay(
        &self,
        attempts: u32,
        retry_after: Option<Duration>,
        rng: &mut fastrand::Rng,
    ) -> Duration {
        self.limit(attempts).mul_f64(rng.f64()).max(retry_after.unwrap_or(Duration::ZERO))
    }

    /// How long to wait between two cycles: the longest wait or a little less.
    pub(crate) fn park_delay(&self, rng: &mut fastrand::Rng) -> Duration {
        at_most(self.max_delay, rng)
    }

    /// How long to wait before a provider that has been down for so long is
    /// probed again: a thirtieth of that or a little less, so that a short outage
    /// ends with it and a long one costs few requests.
    pub(crate) fn probe_delay(&self, down_for: Duration, rng: &mut fastrand::Rng) -> Duration {
        at_most((down_for / 30).max(self.initial_delay).min(self.max_delay), rng)
    }

    /// How long to wait before an event that was accused so often, for so long, is sent
    /// again: for others to show whether the provider works.
    pub(crate) fn suspect_delay(
        &self,
        accusations: u32,
        accused_for: Duration,
        rng: &mut fastrand::Rng,
    ) -> Duration {
        at_most(self.limit(accusations).max((accused_for / 30).min(self.max_delay)), rng)
    }

    /// The exponential limit of a wait, after so many failures.
    fn limit(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.initial_delay.saturating_mul(1 << doublings).min(self.max_delay)
    }
}

/// Up to a quarter less, so that relays do not go together.
fn at_most(limit: Duration, rng: &mut fastrand::Rng) -> Duration {
    limit.mul_f64(0.75 + rng.f64() / 4.0)
}

/// Keeps retries to a share of what succeeds, so that a provider which is half
/// down is not pushed over by being sent everything several times.
#[derive(Debug)]
pub(crate) struct RetryBudget {
    tokens: f64,
    refilled_at: Instant,
}

impl RetryBudget {
    /// Retries that a request which succeeds allows.
    const PER_SUCCESS: f64 = 0.2;
    /// Retries a second that are always allowed.
    const PER_SECOND: f64 = 1.0;
    /// Most retries that can be saved up.
    const SAVED_MAX: f64 = 10.0;
    /// Longest wait for the budget.
    const WAIT_MAX: f64 = 30.0;

    pub(crate) fn new(now: Instant) -> Self {
        Self { tokens: Self::SAVED_MAX, refilled_at: now }
    }

    /// Notes a request that succeeded.
    pub(crate) fn deposit(&mut self) {
        self.tokens = (self.tokens + Self::PER_SUCCESS).min(Self::SAVED_MAX);
    }

    /// Spends one retry, and says how long it has to wait for that.
    pub(crate) fn withdraw(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.refilled_at).as_secs_f64();
        self.refilled_at = now;
        self.tokens = (self.tokens + elapsed * Self::PER_SECOND).min(Self::SAVED_MAX) - 1.0;
        self.tokens = self.tokens.max(-Self::WAIT_MAX * Self::PER_SECOND);
        Duration::from_secs_f64((-self.tokens).max(0.0) / Self::PER_SECOND)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULE: RetryRule = RetryRule {
        attempts_max: 5,
        initial_delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(30),
    };

    proptest! {
        #[test]
        fn a_delay_is_within_the_exponential_limit(attempts in 1_u32..100, seed: u64) {
            let delay = RULE.delay(attempts, None, &mut fastrand::Rng::with_seed(seed));
            let limit = Duration::from_secs(1 << (attempts - 1).min(10)).min(Duration::from_secs(30));
            prop_assert!(delay <= limit);
        }

        #[test]
        fn a_provider_that_asks_for_longer_gets_it(attempts in 1_u32..10, asked in 0_u64..7200, seed: u64) {
            let asked = Duration::from_secs(asked);
            let delay = RULE.delay(attempts, Some(asked), &mut fastrand::Rng::with_seed(seed));
            prop_assert!(delay >= asked && delay <= asked.max(Duration::from_secs(30)));
        }
    }

    #[test]
    fn delays_use_the_whole_range() {
        let mut rng = fastrand::Rng::with_seed(7);
        let delays: Vec<_> = (0..1000).map(|_| RULE.delay(4, None, &mut rng).as_secs_f64()).collect();
        let mean = delays.iter().sum::<f64>() / 1000.0;
        assert!((mean - 4.0).abs() < 0.3, "{mean}");
        assert!(delays.iter().any(|delay| *delay < 0.5) && delays.iter().any(|delay| *delay > 7.5));
    }

    #[test]
    fn a_provider_is_probed_within_a_thirtieth_of_the_time_that_it_is_down() {
        let mut rng = fastrand::Rng::with_seed(7);
        for (seconds, longest) in [(0, 1), (30, 1), (300, 10), (3600, 30)] {
            let (down_for, longest) = (Duration::from_secs(seconds), Duration::from_secs(longest));
            for _ in 0..100 {
                let delay = RULE.probe_delay(down_for, &mut rng);
                assert!(delay <= longest && delay >= longest.mul_f64(0.75), "{seconds}: {delay:?}");
            }
        }
    }

    #[test]
    fn the_fifth_failure_is_the_last() {
        assert!(!RULE.is_exhausted(4));
        assert!(RULE.is_exhausted(5));
    }

    #[tokio::test(start_paused = true)]
    async fn the_budget_allows_a_share_of_what_succeeds_and_a_trickle_always() {
        let start = Instant::now();
        let mut budget = RetryBudget::new(start);
        for _ in 0..10 {
            assert_eq!(budget.withdraw(start), Duration::ZERO);
        }
        assert_eq!(budget.withdraw(start), Duration::from_secs(1));
        assert_eq!(budget.withdraw(start), Duration::from_secs(2));
        for _ in 0..15 {
            budget.deposit();
        }
        assert_eq!(budget.withdraw(start), Duration::ZERO);
        // However many are asked for, the debt and so the wait has an end.
        for _ in 0..1000 {
            assert!(budget.withdraw(start) <= Duration::from_secs(30));
        }
        assert_eq!(budget.withdraw(start + Duration::from_secs(3600)), Duration::ZERO);
    }
}
