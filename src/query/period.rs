//! Of when something is asked.

use std::ops::Range;

use jiff::{Timestamp, ToSpan, Zoned, civil::Date, tz::TimeZone};

use super::{
    parameters::Parameters,
    unanswered::{Fault, Unanswered, quoted},
};

/// Longest period, in days of its time zone.
pub(crate) const DAYS_MAX: i64 = 90;
/// What is asked for when a caller does not say.
const DAYS_DEFAULT: i64 = 30;
/// The last second of the year 9999: beyond, a time is one in milliseconds.
const SECONDS_MAX: i64 = 253_402_300_799;
/// An IANA name is shorter.
const ZONE_BYTES_MAX: usize = 64;

/// A range of time, and where its days begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Period {
    /// Unix milliseconds, half open.
    pub(crate) range_ms: Range<i64>,
    /// One that has a name.
    zone: TimeZone,
}

/// The names that a door has for the two ends.
#[derive(Debug, Clone, Copy)]
struct Ends {
    from: &'static str,
    to: &'static str,
}

impl Period {
    /// As gRPC says it: Unix seconds, days of UTC.
    pub(crate) fn of_seconds(start: i64, end: i64) -> Result<Self, Unanswered> {
        const ENDS: Ends = Ends { from: "start_time", to: "end_time" };
        let both = [(ENDS.from, start), (ENDS.to, end)];
        let faults: Vec<_> = both
            .iter()
            .filter(|(_, seconds)| !(0..=SECONDS_MAX).contains(seconds))
            .map(|(field, seconds)| {
                Fault::of_period(*field, seconds.to_string(), "Unix seconds of the years 1970 to 9999")
            })
            .collect();
        if !faults.is_empty() {
            return Err(Unanswered::Invalid(faults));
        }
        Self::between(start * 1000, end * 1000, &TimeZone::UTC, ENDS)
    }

    /// As a query says it: `from` and `to`, or `days`, in `timezone`. What runs is asked for
    /// up to the end of its day, so that who asks again asks the same.
    pub(crate) fn of_parameters(parameters: &mut Parameters, now_ms: i64) -> Result<Self, Unanswered> {
        const ENDS: Ends = Ends { from: "from", to: "to" };
        let zone = zone(parameters.take("timezone").as_deref())?;
        let (from, to) = (parameters.take(ENDS.from), parameters.take(ENDS.to));
        let days = parameters.number("days", 1..=DAYS_MAX)?;
        let today = local(now_ms, &zone)?.date();
        let Some(from) = from else {
            if to.is_some() {
                return Err(Fault::of_parameter(ENDS.from, "nothing", "where the period starts").into());
            }
            let first = today.checked_sub((days.unwrap_or(DAYS_DEFAULT) - 1).days());
            let first = first.map_err(|_| too_far(ENDS.from, &today.to_string()))?;
            return Self::between(start_of(first, &zone)?, end_of(today, &zone)?, &zone, ENDS);
        };
        if days.is_some() {
            return Err(Fault::of_parameter("days", "days beside from", "one of the two").into());
        }
        let start = instant(ENDS.from, &from, |date| start_of(date, &zone))?;
        let end = match to {
            None => end_of(today, &zone)?,
            Some(to) => instant(ENDS.to, &to, |date| end_of(date, &zone))?,
        };
        Self::between(start, end, &zone, ENDS)
    }

    fn between(start_ms: i64, end_ms: i64, zone: &TimeZone, ends: Ends) -> Result<Self, Unanswered> {
        if start_ms >= end_ms {
            let want = format!("a time after {}", ends.from);
            return Err(Fault::of_period(ends.to, shown(end_ms, zone), want).into());
        }
        let last = local(start_ms, zone)?.checked_add(DAYS_MAX.days());
        let last = last.map_err(|_| too_far(ends.from, &shown(start_ms, zone)))?;
        if end_ms > last.timestamp().as_millisecond() {
            let want = format!("at most {DAYS_MAX} days after {}", ends.from);
            return Err(Fault::of_period(ends.to, shown(end_ms, zone), want).into());
        }
        Ok(Self { range_ms: start_ms..end_ms, zone: zone.clone() })
    }

    /// Where its days begin: a name of the IANA's.
    pub(crate) fn zone(&self) -> &str {
        self.zone.iana_name().unwrap_or("UTC")
    }

    /// A time in the period's zone, as RFC 3339.
    pub(crate) fn shown(&self, ms: i64) -> String {
        shown(ms, &self.zone)
    }

    /// Its first and last day, for names of files.
    pub(crate) fn days(&self) -> [String; 2] {
        [self.range_ms.start, self.range_ms.end - 1].map(|ms| match local(ms, &self.zone) {
            Ok(at) => at.date().to_string(),
            Err(_) => ms.to_string(),
        })
    }
}

fn zone(name: Option<&str>) -> Result<TimeZone, Unanswered> {
    let Some(name) = name else { return Ok(TimeZone::UTC) };
    // A zone without a name (an offset, a rule) would be looked up in vain.
    let found = (name.len() <= ZONE_BYTES_MAX).then(|| TimeZone::get(name).ok()).flatten();
    found.filter(|zone| zone.iana_name().is_some()).ok_or_else(|| {
        Fault::of_parameter("timezone", quoted(name), "an IANA name as in \"Europe/Berlin\"").into()
    })
}

/// A time that is written as RFC 3339, Unix seconds or a date.
fn instant(
    field: &'static str,
    text: &str,
    of_date: impl FnOnce(Date) -> Result<i64, Unanswered>,
) -> Result<i64, Unanswered> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let seconds = text.parse::<i64>().ok().filter(|seconds| *seconds <= SECONDS_MAX);
        let want = "Unix seconds (not milliseconds), RFC 3339, or a date";
        return seconds
            .map(|seconds| seconds * 1000)
            .ok_or_else(|| Fault::of_parameter(field, quoted(text), want).into());
    }
    if let Some(date) = date(text) {
        return of_date(date);
    }
    // A plus that was not escaped is a blank.
    let text = text.replace(' ', "+");
    let time = text.contains('T').then(|| text.parse::<Timestamp>().ok()).flatten();
    let ms = time.map(Timestamp::as_millisecond).filter(|ms| (0..=SECONDS_MAX * 1000).contains(ms));
    ms.ok_or_else(|| {
        let want = "a time as 2026-01-31T00:00:00Z, a date as 2026-01-31, or Unix seconds";
        Fault::of_parameter(field, quoted(&text), want).into()
    })
}

/// A date alone: `2026-01-31` and nothing that is near to it.
fn date(text: &str) -> Option<Date> {
    let is_date = text.len() == 10
        && text.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b'-',
            _ => byte.is_ascii_digit(),
        });
    let date = is_date.then(|| text.parse::<Date>().ok()).flatten()?;
    (date.year() >= 1970).then_some(date)
}

fn start_of(day: Date, zone: &TimeZone) -> Result<i64, Unanswered> {
    let start = day.to_zoned(zone.clone()).and_then(|at| at.start_of_day());
    start.map(|at| at.timestamp().as_millisecond()).map_err(|_| too_far("from", &day.to_string()))
}

/// Where the next day starts.
fn end_of(day: Date, zone: &TimeZone) -> Result<i64, Unanswered> {
    let next = day.tomorrow().map_err(|_| too_far("to", &day.to_string()))?;
    start_of(next, zone)
}

fn local(ms: i64, zone: &TimeZone) -> Result<Zoned, Unanswered> {
    let at = Timestamp::from_millisecond(ms).map_err(|_| too_far("from", &ms.to_string()))?;
    Ok(at.to_zoned(zone.clone()))
}

fn too_far(field: &'static str, got: &str) -> Unanswered {
    Fault::of_period(field, got, "a time of the years 1970 to 9999").into()
}

fn shown(ms: i64, zone: &TimeZone) -> String {
    match local(ms, zone) {
        // Half a second is told only where there is one.
        Ok(at) if ms % 1000 == 0 => at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string(),
        Ok(at) => at.strftime("%Y-%m-%dT%H:%M:%S%.3f%:z").to_string(),
        Err(_) => ms.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-26T10:15:00Z.
    const NOW_MS: i64 = 1_795_688_100_000;

    fn asked(query: &str) -> Result<Period, Unanswered> {
        Period::of_parameters(&mut Parameters::of(query)?, NOW_MS)
    }

    fn ends(query: &str) -> [String; 2] {
        let period = asked(query).unwrap();
        [period.range_ms.start, period.range_ms.end].map(|ms| period.shown(ms))
    }

    fn wrong(query: &str) -> Fault {
        match asked(query).unwrap_err() {
            Unanswered::Invalid(mut faults) => faults.remove(0),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_period_is_told_by_what_came() {
        for (query, field, got) in [
            ("from=2026-11-02&to=2026-11-01", "to", "2026-11-02T00:00:00+00:00"),
            ("from=2026-08-28&to=2026-11-26", "to", "2026-11-27T00:00:00+00:00"),
            ("to=2026-11-02", "from", "nothing"),
            ("from=2026-11-01&days=3", "days", "days beside from"),
            ("days=0", "days", "\"0\""),
            ("days=91", "days", "\"91\""),
            ("days=-1", "days", "\"-1\""),
            ("from=yesterday", "from", "\"yesterday\""),
            ("from=", "from", "\"\""),
            ("from=2026-1-1", "from", "\"2026-1-1\""),
            ("from=2026-02-30", "from", "\"2026-02-30\""),
            ("from=1795688100000", "from", "\"1795688100000\""),
            ("from=99999999999999999999999", "from", "\"99999999999999999999999\""),
            ("from=1969-12-31T23:59:59Z", "from", "\"1969-12-31T23:59:59Z\""),
            ("from=-1", "from", "\"-1\""),
            ("timezone=Mars/Olympus", "timezone", "\"Mars/Olympus\""),
            ("timezone=", "timezone", "\"\""),
        ] {
            let fault = wrong(query);
            assert_eq!((fault.field.as_str(), fault.got.as_str()), (field, got), "{query}");
        }
        let fault = wrong(&format!("timezone={}", "é".repeat(1000)));
        assert!(fault.got.len() < 100, "{}", fault.got);
        // It ends where 9999 does, and nothing is behind that.
        assert!(asked("from=9999-12-30&to=9999-12-31").is_err());
    }

    #[test]
    fn seconds_are_half_open_and_at_most_ninety_days() {
        const DAY: i64 = 86_400;
        let period = Period::of_seconds(DAY, 91 * DAY).unwrap();
        assert_eq!((period.range_ms.clone(), period.zone()), (DAY * 1000..91 * DAY * 1000, "UTC"));
        for (start, end, fields) in [
            (DAY, 91 * DAY + 1, &["end_time"][..]),
            (5, 5, &["end_time"]),
            (6, 5, &["end_time"]),
            (-1, i64::MAX, &["start_time", "end_time"]),
            (i64::MIN, 0, &["start_time"]),
            (0, SECONDS_MAX + 1, &["end_time"]),
        ] {
            let Err(Unanswered::Invalid(faults)) = Period::of_seconds(start, end) else { panic!("{start}") };
            let found: Vec<_> = faults.iter().map(|fault| fault.field.as_str()).collect();
            assert_eq!(found, fields, "{start} {end}");
            assert!(faults.iter().all(|fault| fault.kind.name() == "TIME_RANGE_INVALID"));
        }
        assert!(Period::of_seconds(SECONDS_MAX - 1, SECONDS_MAX).is_err(), "no 90 days are behind it");
    }

    #[test]
    fn a_time_is_written_in_three_ways_and_days_are_whole_ones() {
        let whole = ["2026-11-01T00:00:00+00:00", "2026-11-03T00:00:00+00:00"];
        for query in [
            "from=2026-11-01&to=2026-11-02",
            "from=1793491200&to=1793664000",
            "from=2026-11-01T00:00:00Z&to=2026-11-03T01:00:00%2B01:00",
            "from=2026-11-01T00:00:00Z&to=2026-11-03T01:00:00+01:00",
        ] {
            assert_eq!(ends(query), whole, "{query}");
        }
        assert_eq!(ends("from=2026-11-01"), ["2026-11-01T00:00:00+00:00", "2026-11-27T00:00:00+00:00"]);
        assert_eq!(ends("days=1"), ["2026-11-26T00:00:00+00:00", "2026-11-27T00:00:00+00:00"]);
        assert_eq!(ends("")[0], "2026-10-28T00:00:00+00:00", "thirty days, today among them");
        let half = ends("from=2026-11-01T00:00:00.5Z&to=2026-11-02");
        assert_eq!(half[0], "2026-11-01T00:00:00.500+00:00");
    }

    #[test]
    fn a_day_is_one_of_the_place() {
        let berlin = ends("from=2026-10-25&to=2026-10-25&timezone=Europe/Berlin");
        assert_eq!(berlin, ["2026-10-25T00:00:00+02:00", "2026-10-26T00:00:00+01:00"]);
        // In Auckland it is the next day already.
        let auckland = ends("days=1&timezone=Pacific/Auckland");
        assert_eq!(auckland, ["2026-11-26T00:00:00+13:00", "2026-11-27T00:00:00+13:00"]);
        // Ninety days of which one has 25 hours are ninety days.
        assert!(asked("from=2026-08-28&to=2026-11-25&timezone=Europe/Berlin").is_ok());
        assert_eq!(asked("days=90&timezone=Europe/Berlin").unwrap().zone(), "Europe/Berlin");
    }
}
