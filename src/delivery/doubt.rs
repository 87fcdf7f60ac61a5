//! Tells bad events from a provider in trouble. Pure values that take time as an
//! argument.
//!
//! A refusal *accuses* an event: named by the provider, or alone in its request. An
//! event is *condemned* when it was accused again and again while others of its kind
//! got through in between, and it ends when one more of those gets through: the
//! provider works, and the event is to blame. Where several events are accused and
//! none gets through, the provider is in *trouble*, or our account with it is; then
//! nothing is to blame, and what stood against events is void. Where accused events
//! get through after all, the provider refuses at random, as when some of its nodes
//! are broken, and much more has to stand against an event.
//!
//! Before and after are those of requests, which are numbered as they are sent: what a
//! request shows was so when it was sent, and not when its answer came.

use std::time::Duration;

use tokio::time::Instant;

use crate::reasons::DeadLetterReason;

/// Requests that are refused, and different events that are accused, with nothing
/// delivered meanwhile, before a provider counts as in trouble.
const REFUSALS_MAX: u32 = 3;
/// How often others have to get through between two accusations of an event before it
/// is condemned: of one that the provider has singled out, of one in memory, of one in
/// the log, which can wait for more, and of any, if the provider takes what it has
/// refused.
const PROOFS_SINGLED_OUT: u32 = 1;
const PROOFS: u32 = 2;
const PROOFS_IN_LOG: u32 = 5;
const PROOFS_AGAINST_CHANCE: u32 = 20;
/// How long a provider that took what it has refused counts as one that refuses by
/// chance.
const CHANCE_TIME: Duration = Duration::from_secs(600);
/// How long a refusal leaves it open what is to blame, at most.
const DOUBT_TIME: Duration = Duration::from_secs(60);
/// How long suspects wait for others to show whether the provider works.
const SUSPECTS_WAIT: Duration = Duration::from_secs(3);

/// The number of a request, in the order in which they are sent.
pub(crate) type RequestNumber = u64;

/// Whether a provider takes a flow of events at all. See the module.
#[derive(Debug, Default)]
pub(crate) struct Doubt {
    /// The newest request that delivered one.
    delivered_by: Option<RequestNumber>,
    /// Since it last worked: requests that were refused, events that were accused, each
    /// once, and when the last of the requests was answered.
    refusals: u32,
    accused: u32,
    refused_at: Option<Instant>,
    /// The first request that could be sent after the first and after the last of them.
    next_after_first: RequestNumber,
    next_after_refusal: RequestNumber,
    /// How often it worked again after a refusal.
    recoveries: u64,
    /// How often it was in trouble, and whether it is.
    troubles: u64,
    is_trouble: bool,
    /// When it took what it had refused.
    acquitted_at: Option<Instant>,
    /// Some may have been condemned that have not ended.
    has_condemned: bool,
}

/// What stands against one event.
#[derive(Debug, Clone, Default)]
pub(crate) struct Charges {
    /// The first request that could be sent after the provider refused it, alone or
    /// with others.
    next_after_refusal: Option<RequestNumber>,
    accusations: u32,
    accused_since: Option<Instant>,
    /// What its doubt had come to when it was last accused.
    troubles: u64,
    in_trouble: bool,
    is_singled_out: bool,
    /// How often the provider had worked again when this was counted as accused.
    counted_at: Option<u64>,
    /// Accusations before which others had got through since the one before.
    proofs: u32,
    /// What it becomes a dead letter of, once it is condemned.
    sentence: Option<(DeadLetterReason, String)>,
}

impl Charges {
    /// The provider refused it together with others.
    pub(crate) fn refused(&mut self, next_request: RequestNumber) {
        self.next_after_refusal = Some(next_request);
    }

    /// The provider named it, and not the others of its kind in the same request.
    pub(crate) fn single_out(&mut self) {
        self.is_singled_out = true;
    }

    /// True for one that was singled out, and of which nothing has shown yet that the
    /// provider works.
    pub(crate) fn are_unproven(&self) -> bool {
        self.is_singled_out && self.proofs == 0
    }

    /// True for one that was singled out, and refused again after others had got through.
    pub(crate) fn are_proven(&self) -> bool {
        self.is_singled_out && self.sentence.is_some()
    }

    /// The first request that could be sent after it was refused.
    pub(crate) fn next_after_refusal(&self) -> Option<RequestNumber> {
        self.next_after_refusal
    }

    /// How often it was named, or alone in a request, when the provider refused it:
    /// since the last trouble.
    pub(crate) fn accusations(&self) -> u32 {
        self.accusations
    }

    /// For how long it has been accused.
    pub(crate) fn accused_for(&self, now: Instant) -> Duration {
        self.accused_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// What it becomes a dead letter of, if it is condemned.
    pub(crate) fn sentence(&self) -> Option<&(DeadLetterReason, String)> {
        self.sentence.as_ref()
    }
}

impl Doubt {
    /// That request has delivered one.
    pub(crate) fn delivered(&mut self, by: RequestNumber) {
        self.delivered_by = self.delivered_by.max(Some(by));
        if self.refusals > 0 && by >= self.next_after_refusal {
            self.recoveries += 1;
            (self.refusals, self.accused, self.is_trouble) = (0, 0, false);
        } else if self.refusals == 0 {
            // Accused by answers that others had overtaken.
            self.accused = 0;
        }
    }

    /// An event that was accused has been delivered.
    pub(crate) fn acquitted(&mut self, now: Instant) {
        self.acquitted_at = Some(now);
    }

    /// True for what is said to stand against an event since the provider was in trouble.
    pub(crate) fn are_void(&self, charges: &Charges) -> bool {
        charges.in_trouble || charges.troubles != self.troubles
    }

    /// That request was refused, before `next` is sent. One that was sent before
    /// another that delivered shows nothing any more.
    pub(crate) fn refused(&mut self, request: RequestNumber, next: RequestNumber, now: Instant) {
        if self.delivered_by.is_none_or(|by| by < request) {
            if self.refusals == 0 {
                self.next_after_first = next;
            }
            self.refusals = self.refusals.saturating_add(1);
            (self.refused_at, self.next_after_refusal) = (Some(now), next);
        }
    }

    /// An event was accused of that, before request `next` is sent. True if that may be
    /// the provider's fault: one that is named where others are spared says little of it,
    /// until none of those gets through.
    pub(crate) fn accuse(
        &mut self,
        charges: &mut Charges,
        of: (DeadLetterReason, String),
        is_logged: bool,
        next: RequestNumber,
        now: Instant,
    ) -> bool {
        let got_through = charges
            .next_after_refusal
            .filter(|_| charges.accusations > 0)
            .map(|refused| self.works_since(refused));
        let speaks = !charges.is_singled_out || got_through == Some(false);
        if self.are_void(charges) {
            (charges.accusations, charges.accused_since, charges.proofs) = (0, None, 0);
            charges.counted_at = None;
        } else if got_through == Some(true) {
            charges.proofs += 1;
        }
        if speaks && charges.proofs == 0 && charges.counted_at != Some(self.recoveries) {
            charges.counted_at = Some(self.recoveries);
            self.accused = self.accused.saturating_add(1);
        }
        charges.accusations = charges.accusations.saturating_add(1);
        charges.accused_since.get_or_insert(now);
        charges.next_after_refusal = Some(next);
        charges.troubles = self.troubles;
        charges.in_trouble = self.is_trouble;
        let wanted = match is_logged {
            _ if charges.is_singled_out => PROOFS_SINGLED_OUT,
            _ if self.is_by_chance(now) => PROOFS_AGAINST_CHANCE,
            true => PROOFS_IN_LOG,
            false => PROOFS,
        };
        charges.sentence = (charges.proofs >= wanted).then_some(of);
        self.has_condemned |= charges.sentence.is_some();
        speaks
    }

    /// True if some may have been condemned that have not ended.
    pub(crate) fn has_condemned(&self) -> bool {
        self.has_condemned
    }

    pub(crate) fn note_condemned(&mut self, has_condemned: bool) {
        self.has_condemned = has_condemned;
    }

    /// True once others got through after an event was condemned, and there was no
    /// trouble.
    pub(crate) fn confirms(&self, charges: &Charges) -> bool {
        charges.sentence.is_some()
            && !self.are_void(charges)
            && charges.next_after_refusal.is_some_and(|after| self.works_since(after))
    }

    /// True if the provider has taken one by that request or a later one.
    pub(crate) fn works_since(&self, request: RequestNumber) -> bool {
        self.delivered_by.is_some_and(|by| by >= request)
    }

    /// True if none was delivered since one was refused, and that request or a later one
    /// could be sent after that.
    pub(crate) fn refuses_before(&self, request: RequestNumber) -> bool {
        self.refusals > 0 && self.next_after_first <= request
    }

    /// Until when no event is sent that is a suspect: so that others come along that show
    /// more.
    pub(crate) fn suspects_wait_until(&self) -> Option<Instant> {
        self.refused_at.filter(|_| self.refusals > 0 && !self.is_trouble).map(|at| at + SUSPECTS_WAIT)
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

    /// True while what is refused now may be taken the next time.
    pub(crate) fn is_by_chance(&self, now: Instant) -> bool {
        self.acquitted_at.is_some_and(|at| now < at + CHANCE_TIME)
    }

    /// True if the provider is to blame. Voids what stands against events.
    pub(crate) fn comes_to_trouble(&mut self) -> bool {
        if self.refusals >= REFUSALS_MAX && !self.are_few() && !self.is_trouble {
            self.is_trouble = true;
            self.troubles += 1;
        }
        self.is_trouble
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of() -> (DeadLetterReason, String) {
        (DeadLetterReason::Invalid, "400 no".to_owned())
    }

    /// Requests in turn, each answered before the next one is sent.
    struct Requests {
        doubt: Doubt,
        next: RequestNumber,
        now: Instant,
    }

    impl Requests {
        fn new() -> Self {
            Self { doubt: Doubt::default(), next: 0, now: Instant::now() }
        }

        fn delivers(&mut self) {
            self.doubt.delivered(self.next);
            self.next += 1;
        }

        fn accuses(&mut self, charges: &mut Charges) {
            self.next += 1;
            self.doubt.refused(self.next - 1, self.next, self.now);
            self.doubt.accuse(charges, of(), false, self.next, self.now);
            self.doubt.comes_to_trouble();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_ends_when_others_got_through_after_each_of_three_accusations() {
        let (mut requests, mut bad) = (Requests::new(), Charges::default());
        for _ in 0..3 {
            assert!(!requests.doubt.confirms(&bad));
            requests.accuses(&mut bad);
            assert!(!requests.doubt.confirms(&bad));
            requests.delivers();
        }
        assert!(requests.doubt.confirms(&bad));
        assert_eq!(bad.sentence(), Some(&of()));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_an_accusation_proves_nothing() {
        let (mut requests, mut event) = (Requests::new(), Charges::default());
        for _ in 0..10 {
            let under_way = requests.next;
            requests.next += 1;
            requests.accuses(&mut event);
            requests.doubt.delivered(under_way);
            assert!(requests.doubt.is_open(requests.now));
        }
        assert!(event.sentence().is_none());
    }

    /// It takes one now and then, and refuses everything before and after.
    #[tokio::test(start_paused = true)]
    async fn trouble_voids_what_stands_against_events() {
        let mut requests = Requests::new();
        let mut events = vec![Charges::default(); 5];
        for _ in 0..20 {
            for charges in &mut events {
                requests.accuses(charges);
            }
            assert!(requests.doubt.comes_to_trouble());
            requests.delivers();
            assert!(!events.iter().any(|charges| requests.doubt.confirms(charges)));
            assert!(!requests.doubt.comes_to_trouble() && !requests.doubt.is_open(requests.now));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_takes_what_it_refused_needs_many_proofs() {
        let (mut requests, mut event) = (Requests::new(), Charges::default());
        requests.accuses(&mut Charges::default());
        requests.doubt.acquitted(requests.now);
        requests.delivers();
        for _ in 0..20 {
            requests.accuses(&mut event);
            requests.delivers();
            assert!(!requests.doubt.confirms(&event));
        }
        requests.accuses(&mut event);
        requests.delivers();
        assert!(requests.doubt.confirms(&event));
        assert!(!requests.doubt.is_by_chance(requests.now + CHANCE_TIME));
    }

    #[tokio::test(start_paused = true)]
    async fn one_event_that_is_refused_again_and_again_is_no_trouble_of_the_provider() {
        let mut requests = Requests::new();
        let mut events = vec![Charges::default(); 3];
        for _ in 0..10 {
            requests.accuses(&mut events[0]);
            requests.accuses(&mut events[1]);
        }
        assert!(requests.doubt.are_few() && !requests.doubt.comes_to_trouble());
        assert!(!requests.doubt.is_open(requests.now + 2 * DOUBT_TIME), "not for ever");
        requests.accuses(&mut events[2]);
        assert!(requests.doubt.comes_to_trouble());
    }

    #[tokio::test(start_paused = true)]
    async fn events_that_were_accused_by_overtaken_answers_count_no_more_once_it_works() {
        let mut requests = Requests::new();
        for _ in 0..3 {
            let under_way = requests.next;
            requests.next += 1;
            requests.delivers();
            requests.doubt.refused(under_way, requests.next, requests.now);
            requests.doubt.accuse(&mut Charges::default(), of(), false, requests.next, requests.now);
            requests.delivers();
        }
        let mut lone = Charges::default();
        for _ in 0..3 {
            requests.accuses(&mut lone);
        }
        assert!(requests.doubt.are_few() && !requests.doubt.comes_to_trouble(), "one is accused");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_of_a_request_that_others_have_overtaken_is_no_doubt() {
        let mut requests = Requests::new();
        let under_way = requests.next;
        requests.next += 1;
        requests.delivers();
        requests.doubt.refused(under_way, requests.next, requests.now);
        assert!(!requests.doubt.is_open(requests.now));
    }
}
