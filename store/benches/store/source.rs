//! Events that are made up, the same each time.

use analytics_relay_providers::Event;

/// A day.
pub(crate) const DAY_MS: i64 = 86_400_000;
const START_MS: i64 = 1_780_000_000_000;
const DAYS: i64 = 90;
/// When the last of them are.
pub(crate) const END_MS: i64 = START_MS + DAYS * DAY_MS;
/// Events of a visit, on average.
const OF_A_VISIT: f64 = 5.2;

/// Makes up events in the order of their times.
pub(crate) struct Source {
    random: fastrand::Rng,
    pages: Vec<f64>,
    countries: Vec<f64>,
    /// Sessions that go on: when, and what of them is left.
    open: std::collections::BinaryHeap<std::cmp::Reverse<(i64, u64, Visit)>>,
    next_visit_ms: f64,
    visit_gap_ms: f64,
    visits: u64,
    visitors: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
struct Visit {
    site: u8,
    left: u8,
    visitor: u64,
    session: u64,
    agent: u8,
    country: u8,
    source: u8,
}

fn zipf(n: usize) -> Vec<f64> {
    let mut sum = 0.0;
    let mut all: Vec<f64> = (1..=n)
        .map(|k| {
            sum += 1.0 / k as f64;
            sum
        })
        .collect();
    all.iter_mut().for_each(|one| *one /= sum);
    all
}

impl Source {
    /// So many in 90 days.
    pub(crate) fn new(events: u64) -> Self {
        let gap_ms = (DAYS * DAY_MS) as f64 / (events as f64 / OF_A_VISIT);
        Self::of(events, 14, START_MS as f64, gap_ms)
    }

    /// More of the visitors of [`Source::new`], behind its end: so many a second.
    pub(crate) fn going_on(events: u64, a_second: u64) -> Self {
        Self::of(events, 15, END_MS as f64, 1e3 * OF_A_VISIT / a_second as f64)
    }

    fn of(events: u64, seed: u64, next_visit_ms: f64, visit_gap_ms: f64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            pages: zipf(2_000),
            countries: zipf(40),
            open: Default::default(),
            next_visit_ms,
            visit_gap_ms,
            visits: 0,
            visitors: (events / 12).max(1),
        }
    }

    /// So many, in batches.
    pub(crate) fn batches(&mut self, batches: usize, batch: usize) -> Vec<Vec<Event>> {
        (0..batches).map(|_| (0..batch).map(|_| self.event()).collect()).collect()
    }

    /// The next one.
    pub(crate) fn event(&mut self) -> Event {
        loop {
            let next = self.open.peek().map(|next| next.0.0);
            if next.is_some_and(|next| (next as f64) < self.next_visit_ms) {
                let std::cmp::Reverse((time_ms, order, mut visit)) = self.open.pop().unwrap();
                let event = self.make(time_ms, visit);
                visit.left -= 1;
                if visit.left > 0 {
                    let later = time_ms + self.random.i64(2_000..240_000);
                    self.open.push(std::cmp::Reverse((later, order, visit)));
                }
                return event;
            }
            self.visits += 1;
            let visitor = self.random.u64(0..self.visitors);
            let visit = Visit {
                site: if self.random.bool() { 0 } else { self.random.u8(1..10) },
                left: if self.random.f64() < 0.4 { 1 } else { self.random.u8(2..15) },
                visitor,
                session: self.random.u64(..),
                agent: (visitor % 17) as u8,
                country: self.rank(false) as u8,
                source: self.random.u8(0..12),
            };
            let at = self.next_visit_ms as i64;
            self.open.push(std::cmp::Reverse((at, self.visits, visit)));
            self.next_visit_ms += self.visit_gap_ms * 2.0 * self.random.f64();
        }
    }

    fn rank(&mut self, page: bool) -> usize {
        let at = self.random.f64();
        (if page { &self.pages } else { &self.countries }).partition_point(|one| *one < at)
    }

    fn make(&mut self, time_ms: i64, visit: Visit) -> Event {
        let is_custom = self.random.f64() < 0.05;
        let page = self.rank(true);
        let kind = if is_custom {
            let names = ["signup", "add_to_cart", "checkout", "download", "share"];
            format!(r#""track","name":"{}""#, names[self.random.usize(..5)])
        } else {
            r#""page""#.to_owned()
        };
        let accepted_ms = time_ms + self.random.i64(5..900);
        let (high, low) = (self.random.u64(..), self.random.u64(..));
        let id = format!(
            "{:08x}-{:04x}-7{:03x}-8{:03x}-{:012x}",
            time_ms >> 16,
            time_ms & 0xFFFF,
            high & 0xFFF,
            low & 0xFFF,
            low >> 16
        );
        let mix = |n: u64| (n ^ 0x5bd1_e995).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let uuid = |n: u64| {
            format!(
                "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
                mix(n) >> 32,
                mix(n) & 0xFFFF,
                mix(n + 1) & 0xFFF,
                mix(n + 2) & 0xFFF,
                mix(n + 3) >> 16
            )
        };
        let (visitor, session) = (uuid(visit.visitor), uuid(visit.session));
        let user = if visit.visitor.is_multiple_of(10) {
            format!(r#","user_id":"user-{}""#, visit.visitor)
        } else {
            String::new()
        };
        let browser = ["Chrome", "Safari", "Firefox", "Edge"][usize::from(visit.agent % 4)];
        let (os, device) =
            [("Windows", "desktop"), ("iOS", "mobile"), ("Android", "mobile"), ("Mac OS X", "desktop")]
                [usize::from(visit.agent / 4 % 4)];
        let country = usize::from(visit.country);
        let code =
            format!("{}{}", char::from(b'A' + (country / 26) as u8), char::from(b'A' + (country % 26) as u8));
        let source = match visit.source {
            0..5 => String::new(),
            n => format!(r#","source":"source-{n}","channel":"Referral""#),
        };
        let properties = format!(
            r#"{{"plan":"{}","price":{},"currency":"EUR","items":{},"logged_in":{},"variant":"{}","query":"term {}","scroll":{}}}"#,
            ["free", "pro", "team"][self.random.usize(..3)],
            self.random.u32(100..9_999),
            self.random.u8(1..9),
            visit.visitor.is_multiple_of(10),
            ["a", "b"][self.random.usize(..2)],
            self.random.u16(..500),
            self.random.u8(..100),
        );
        let json = format!(
            r#"{{"id":"{id}","kind":{kind}{user},"anonymous_id":"{visitor}","time_ms":{time_ms},"accepted_ms":{accepted_ms},"session_id":"{session}","source":"site-{}","enriched":{{"v":1,"data":{{"uap":"2026-03","geo":"1788000000"}},"agent":{{"browser":"{browser}","browser_version":"{}","os":"{os}","device":"{device}"}},"geo":{{"continent":"EU","country":"{code}","region":"{code}-1","city":"City {country}"}},"page":{{"host":"www.example.com","path":"/page/{page}"}}{source}}},"properties":{properties}}}"#,
            visit.site,
            120 + visit.agent % 12
        );
        Event::from_json(json.as_bytes()).unwrap()
    }
}
