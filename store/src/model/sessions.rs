//! Sessions: what one visitor did at one go.
//!
//! The client's session id groups as it is. What has none is divided where half an hour
//! passes without an event of the device. Both are cut after 24 hours. It is all a function
//! of the *set* of events, so no order of arrival, late event or duplicate changes it: of
//! events of one millisecond the smaller value is the first and the larger the last.
//!
//! A question about a range looks at the events from 24 hours before its start to 24 hours
//! after its end, and counts the sessions that start in it. So each session that is not cut
//! is seen as a whole. One that goes on for days is cut where the look begins.

use std::ops::Range;

use super::{Class, SessionKey};
use crate::SessionSums;

/// Without an event for longer than this a session is over.
pub const GAP_MS: i64 = 30 * 60_000;
/// No session is this long; so far a question looks beyond its range.
pub const DAY_MS: i64 = 86_400_000;

/// A part of a session, or all of it. `V` is what is known of an event's page or value,
/// ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionPart<V> {
    /// By what its events are found.
    pub key: SessionKey,
    /// The time of its first event: Unix milliseconds.
    pub start_ms: i64,
    /// The time of its last event.
    pub end_ms: i64,
    /// Pages and screens that were seen.
    pub views: u32,
    /// What somebody did beside.
    pub actions: u32,
    /// The first event's value, and whose it was.
    pub first: (V, u64),
    /// The first and the last view: when, and of which page.
    pub entry: Option<(i64, V)>,
    /// See `entry`.
    pub exit: Option<(i64, V)>,
    /// One of its events passes the question's filters.
    pub matched: bool,
}

/// An event of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionEvent<V> {
    /// By what its session is found.
    pub key: SessionKey,
    /// When it was: Unix milliseconds.
    pub time_ms: i64,
    /// The value that a question asks for.
    pub value: V,
    /// Whose it was.
    pub visitor: u64,
    /// Its page.
    pub page: V,
    /// What it is.
    pub class: Class,
    /// It passes the question's filters.
    pub matched: bool,
}

impl<V: Ord + Clone> SessionPart<V> {
    /// One event alone.
    pub fn of(event: &SessionEvent<V>) -> Self {
        let view = (event.class == Class::View).then(|| (event.time_ms, event.page.clone()));
        Self {
            key: event.key,
            start_ms: event.time_ms,
            end_ms: event.time_ms,
            views: u32::from(event.class == Class::View),
            actions: u32::from(event.class == Class::Action),
            first: (event.value.clone(), event.visitor),
            entry: view.clone(),
            exit: view,
            matched: event.matched,
        }
    }

    /// Both together, whichever was first.
    pub fn join(&mut self, other: Self) {
        match other.start_ms.cmp(&self.start_ms) {
            std::cmp::Ordering::Less => self.first = other.first,
            std::cmp::Ordering::Equal if other.first < self.first => self.first = other.first,
            _ => {}
        }
        self.start_ms = self.start_ms.min(other.start_ms);
        self.end_ms = self.end_ms.max(other.end_ms);
        self.views += other.views;
        self.actions += other.actions;
        self.matched |= other.matched;
        self.entry = match (self.entry.take(), other.entry) {
            (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        self.exit = self.exit.take().max(other.exit);
    }

    /// True if it must be cut, for which its events are needed.
    pub fn is_long(&self) -> bool {
        self.end_ms.saturating_sub(self.start_ms) >= DAY_MS
    }

    /// What it adds to sums.
    pub fn sums(&self) -> SessionSums {
        SessionSums {
            sessions: 1,
            with_views: u64::from(self.views > 0),
            bounces: u64::from(self.views == 1 && self.actions == 0),
            duration_ms: self.end_ms.abs_diff(self.start_ms),
            views: self.views.into(),
        }
    }

    /// True if a question about a range counts it.
    pub fn counts_in(&self, range_ms: &Range<i64>) -> bool {
        self.matched && range_ms.contains(&self.start_ms)
    }
}

/// The events that a question about sessions of a range looks at.
pub fn look(range_ms: &Range<i64>) -> Range<i64> {
    range_ms.start.saturating_sub(DAY_MS)..range_ms.end.saturating_add(DAY_MS)
}

/// The sessions of events, in any order. Those of one event that has no key are none.
pub fn sessions<V: Ord + Clone>(mut events: Vec<SessionEvent<V>>) -> Vec<SessionPart<V>> {
    events.retain(|event| !event.key.is_none());
    events.sort_unstable();
    let mut sessions: Vec<SessionPart<V>> = Vec::new();
    for event in &events {
        match sessions.last_mut() {
            Some(last) if goes_on(last, event) => last.join(SessionPart::of(event)),
            _ => sessions.push(SessionPart::of(event)),
        }
    }
    sessions
}

/// True if no gap lies between a time and one that is not earlier.
pub fn is_near(before_ms: i64, time_ms: i64) -> bool {
    time_ms.saturating_sub(before_ms) <= GAP_MS
}

/// True if an event that is later than all of a session is of it.
pub fn goes_on<V>(session: &SessionPart<V>, event: &SessionEvent<V>) -> bool {
    session.key == event.key
        && event.time_ms.saturating_sub(session.start_ms) < DAY_MS
        && (!event.key.by_gap() || is_near(session.end_ms, event.time_ms))
}

/// Puts parts of sessions together where no gap divides them. What comes out and
/// [is long](SessionPart::is_long) is not cut yet.
pub fn join_parts<V: Ord + Clone>(mut parts: Vec<SessionPart<V>>) -> Vec<SessionPart<V>> {
    parts.sort_unstable_by_key(|part| (part.key, part.start_ms));
    parts.dedup_by(|part, last| {
        let goes_on = last.key == part.key && (!part.key.by_gap() || is_near(last.end_ms, part.start_ms));
        if goes_on {
            last.join(part.clone());
        }
        goes_on
    });
    parts
}

/// How long pages were looked at, of all events of one session in their order: of each
/// page what pings say, else how long it was until the next view, if that was not longer
/// than [`GAP_MS`]. A page of which neither is known is not in it.
pub fn times_on_pages<V: Ord + Clone>(
    events: &[(SessionEvent<V>, Option<u64>)],
) -> std::collections::BTreeMap<V, u64> {
    let (mut told, mut between) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
    let mut last: Option<(i64, &V)> = None;
    for (event, looked_ms) in events {
        if let Some(ms) = looked_ms {
            *told.entry(event.page.clone()).or_default() += ms;
        }
        if event.class == Class::View {
            if let Some((at, page)) = last.filter(|(at, _)| is_near(*at, event.time_ms)) {
                *between.entry(page.clone()).or_default() += event.time_ms.abs_diff(at);
            }
            last = Some((event.time_ms, &event.page));
        }
    }
    between.extend(told);
    between
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn permutations<T: Clone>(items: &[T]) -> Vec<Vec<T>> {
        if items.len() < 2 {
            return vec![items.to_vec()];
        }
        (0..items.len())
            .flat_map(|first| {
                let mut rest = items.to_vec();
                let first = rest.remove(first);
                permutations(&rest).into_iter().map(move |mut rest| {
                    rest.insert(0, first.clone());
                    rest
                })
            })
            .collect()
    }

    const MINUTE: i64 = 60_000;

    fn event(key: u64, minute: i64, class: Class, page: &'static str) -> SessionEvent<&'static str> {
        SessionEvent {
            key: SessionKey(key),
            time_ms: minute * MINUTE,
            value: page,
            visitor: 4,
            page,
            class,
            matched: true,
        }
    }

    #[test]
    fn half_an_hour_and_no_less_divides_what_has_no_session_id() {
        let at = |minute| event(3, minute, Class::View, "/");
        let starts = |minutes: &[i64]| {
            let events = minutes.iter().map(|minute| at(*minute)).collect();
            sessions(events).iter().map(|one| one.start_ms / MINUTE).collect::<Vec<_>>()
        };
        assert_eq!(starts(&[0, 30, 60]), [0]);
        assert_eq!(starts(&[0, 31, 61, 92]), [0, 31, 92]);
        let by_id = (0..3).map(|n| event(2, n * 600, Class::View, "/")).collect();
        assert_eq!(sessions(by_id).len(), 1, "a gap does not divide what an id joins");
    }

    #[test]
    fn a_session_is_cut_at_24_hours_whatever_joins_it() {
        for key in [2, 3] {
            let events = (0..=150).map(|n| event(key, n * 20, Class::Action, "/")).collect();
            let found = sessions(events);
            let spans: Vec<_> = found.iter().map(|one| (one.start_ms / MINUTE, one.actions)).collect();
            assert_eq!(spans, [(0, 72), (1440, 72), (2880, 7)]);
        }
    }

    #[test]
    fn the_ends_of_time_are_times() {
        let at = |time_ms| SessionEvent { time_ms, ..event(3, 0, Class::View, "/") };
        let events = [at(i64::MIN), at(0), at(i64::MAX)];
        assert_eq!(sessions(events.to_vec()).len(), 3);
        assert_eq!(join_parts(events.iter().map(SessionPart::of).collect()).len(), 3);
        let joined = SessionPart { end_ms: i64::MAX, ..SessionPart::of(&events[0]) };
        assert!(joined.is_long() && !goes_on(&joined, &events[1]));
        assert!(times_on_pages(&events.map(|event| (event, None))).is_empty());
    }

    #[test]
    fn a_bounce_is_one_view_and_nothing_that_anybody_did() {
        let sums = |classes: &[Class]| {
            let events = classes.iter().zip(0..).map(|(class, n)| event(2, n, *class, "/")).collect();
            sessions(events)[0].sums()
        };
        use Class::{Action, Ping, Silent, View};
        for (classes, bounces, with_views) in [
            (&[View][..], 1, 1),
            (&[View, Ping, Ping, Silent], 1, 1),
            (&[View, View], 0, 1),
            (&[View, Action], 0, 1),
            (&[Action], 0, 0),
        ] {
            let sums = sums(classes);
            assert_eq!((sums.bounces, sums.with_views), (bounces, with_views), "{classes:?}");
        }
        assert_eq!(sums(&[View, Ping]).duration_ms, 60_000, "pings prolong");
    }

    /// Late ones that bridge a gap, equal times, and a page that is both first and last.
    #[test]
    fn all_permutations_of_six_events_give_the_same_sessions() {
        let events = [
            event(3, 0, Class::View, "/b"),
            event(3, 0, Class::View, "/a"),
            event(3, 25, Class::Ping, "/a"),
            event(3, 50, Class::View, "/c"),
            event(3, 81, Class::View, "/a"),
            event(3, 100, Class::Action, "/a"),
        ];
        for events in permutations(&events) {
            let found = sessions(events.clone());
            let [one, two] = &found[..] else { panic!("{found:?}") };
            assert_eq!((one.entry, one.exit), (Some((0, "/a")), Some((50 * MINUTE, "/c"))));
            assert_eq!((one.first, one.views, one.sums().duration_ms), (("/a", 4), 3, 50 * 60_000));
            assert_eq!((two.start_ms, two.views, two.actions), (81 * MINUTE, 1, 1));
            // In parts, as blocks have them, joined.
            let parts = events.chunks(2).flat_map(|part| sessions(part.to_vec())).collect();
            assert_eq!(join_parts(parts), found);
        }
    }

    #[test]
    fn a_page_is_looked_at_as_pings_say_or_until_the_next_view() {
        let told = |event, seconds: u64| (event, Some(seconds * 1_000));
        let events = [
            (event(2, 0, Class::View, "/a"), None),
            told(event(2, 1, Class::Ping, "/a"), 20),
            told(event(2, 2, Class::Ping, "/a"), 5),
            (event(2, 3, Class::View, "/b"), None),
            (event(2, 5, Class::View, "/c"), None),
            (event(2, 65, Class::View, "/b"), None),
        ];
        let times = times_on_pages(&events);
        assert_eq!(times.into_iter().collect::<Vec<_>>(), [("/a", 25_000), ("/b", 120_000)]);
    }
}
