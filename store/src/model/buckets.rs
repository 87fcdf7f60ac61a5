//! Time divided into minutes, hours, days, weeks or months of a place.

use std::ops::Range;

use jiff::{Timestamp, ToSpan, Zoned, civil::Weekday, tz::TimeZone};

use crate::{Bucket, StoreError};

/// Most buckets of one question: the hours of 90 days, and some.
pub const BUCKETS_MAX: usize = 2_200;

/// Where the buckets of a range start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buckets {
    /// Ascending; the first may lie before the range. Unix milliseconds.
    pub starts_ms: Vec<i64>,
    range_ms: Range<i64>,
}

impl Buckets {
    /// The buckets that cover a range; `zone` is an IANA name.
    pub fn new(range_ms: &Range<i64>, bucket: Bucket, zone: &str) -> Result<Self, StoreError> {
        let zone = TimeZone::get(zone)
            .map_err(|_| StoreError::invalid("timezone", zone, "an IANA name as in \"Europe/Berlin\""))?;
        let mut starts_ms = Vec::new();
        let mut next = Some(match bucket {
            Bucket::All => range_ms.start,
            _ => floor(range_ms.start, bucket, &zone)?,
        });
        while let Some(start) = next.filter(|start| *start < range_ms.end) {
            if starts_ms.len() == BUCKETS_MAX {
                return Err(StoreError::invalid(
                    "interval",
                    format!("{bucket:?} over this range"),
                    format!("at most {BUCKETS_MAX} of them"),
                ));
            }
            starts_ms.push(start);
            next = (bucket != Bucket::All).then(|| after(start, bucket, &zone)).transpose()?;
        }
        Ok(Self { starts_ms, range_ms: range_ms.clone() })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.starts_ms.len()
    }

    /// True if the range is empty.
    pub fn is_empty(&self) -> bool {
        self.starts_ms.is_empty()
    }

    /// The bucket of a time.
    pub fn index(&self, time_ms: i64) -> Option<usize> {
        let in_range = self.range_ms.contains(&time_ms);
        in_range.then(|| self.starts_ms.partition_point(|start| *start <= time_ms).saturating_sub(1))
    }
}

fn instant(ms: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_millisecond(ms)
        .map_err(|_| StoreError::invalid("range", ms, "Unix milliseconds of the years -9999 to 9999"))
}

/// The start of the bucket that a time is in.
fn floor(ms: i64, bucket: Bucket, zone: &TimeZone) -> Result<i64, StoreError> {
    let at = instant(ms)?.to_zoned(zone.clone());
    let date = at.date();
    let day = match bucket {
        Bucket::All => return Ok(ms),
        Bucket::Minute => return Ok(ms.div_euclid(60_000) * 60_000),
        Bucket::Hour => return floor_hour(ms, zone),
        Bucket::Day => date,
        Bucket::Week => {
            let back = date.weekday().since(Weekday::Monday);
            date.checked_sub(back.days()).map_err(too_far)?
        }
        Bucket::Month => date.first_of_month(),
    };
    start_of(day, zone)
}

/// The start of the bucket behind one that starts there.
fn after(start_ms: i64, bucket: Bucket, zone: &TimeZone) -> Result<i64, StoreError> {
    let at = instant(start_ms)?.to_zoned(zone.clone());
    let day = match bucket {
        Bucket::All | Bucket::Minute => return Ok(start_ms + 60_000),
        Bucket::Hour => return next_hour(&at),
        Bucket::Day => at.date().tomorrow(),
        Bucket::Week => at.date().checked_add(7.days()),
        Bucket::Month => at.date().first_of_month().checked_add(1.month()),
    };
    start_of(day.map_err(too_far)?, zone)
}

fn too_far(error: jiff::Error) -> StoreError {
    StoreError::invalid("range", error, "the years -9999 to 9999")
}

/// The first instant of a day, also where midnight is skipped.
fn start_of(day: jiff::civil::Date, zone: &TimeZone) -> Result<i64, StoreError> {
    let start = day.to_zoned(zone.clone()).and_then(|noon| noon.start_of_day()).map_err(too_far)?;
    Ok(start.timestamp().as_millisecond())
}

/// The latest local full hour up to a time. A clock that is set by half an hour makes one
/// that is longer.
fn floor_hour(ms: i64, zone: &TimeZone) -> Result<i64, StoreError> {
    const HOUR_MS: i64 = 3_600_000;
    let mut hour = Timestamp::from_millisecond(ms - 3 * HOUR_MS)
        .map_err(too_far)
        .and_then(|before| next_hour(&before.to_zoned(zone.clone())))?;
    loop {
        let next = next_hour(&instant(hour)?.to_zoned(zone.clone()))?;
        if next > ms {
            return Ok(hour);
        }
        hour = next;
    }
}

/// The earliest local full hour after a time.
fn next_hour(at: &Zoned) -> Result<i64, StoreError> {
    let into_hour = |at: &Zoned| {
        i64::from(at.minute()) * 60_000 + i64::from(at.second()) * 1_000 + i64::from(at.millisecond())
    };
    let ms = at.timestamp().as_millisecond();
    let next = ms + 3_600_000 - into_hour(at);
    let set = at.time_zone().following(at.timestamp()).next();
    let Some(set) = set.map(|set| set.timestamp()).filter(|set| set.as_millisecond() <= next) else {
        return Ok(next);
    };
    let after = set.to_zoned(at.time_zone().clone());
    match into_hour(&after) {
        0 => Ok(set.as_millisecond()),
        into => Ok(set.as_millisecond() + 3_600_000 - into),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(from: &str, to: &str, bucket: Bucket, zone: &str) -> Vec<String> {
        let [from, to] = [from, to].map(|at| at.parse::<Timestamp>().unwrap().as_millisecond());
        let buckets = Buckets::new(&(from..to), bucket, zone).unwrap();
        let local = |ms: &i64| {
            let at = Timestamp::from_millisecond(*ms).unwrap().to_zoned(TimeZone::get(zone).unwrap());
            at.strftime("%m-%dT%H:%M%z").to_string()
        };
        buckets.starts_ms.iter().map(local).collect()
    }

    #[test]
    fn a_day_has_as_many_hours_as_it_has_there() {
        let spring = starts("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z", Bucket::Hour, "Europe/Berlin");
        assert_eq!(spring.len(), 23);
        assert_eq!(spring[1..3], ["03-29T01:00+0100", "03-29T03:00+0200"]);
        let autumn = starts("2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z", Bucket::Hour, "Europe/Berlin");
        assert_eq!(autumn.len(), 25);
        assert_eq!(autumn[2..4], ["10-25T02:00+0200", "10-25T02:00+0100"], "the hour that comes twice");
        let days = starts("2026-10-24T22:00:00Z", "2026-10-26T23:00:00Z", Bucket::Day, "Europe/Berlin");
        assert_eq!(days, ["10-25T00:00+0200", "10-26T00:00+0100"]);
    }

    #[test]
    fn hours_start_at_full_hours_of_zones_with_halves() {
        let india = starts("2026-01-01T00:00:00Z", "2026-01-01T02:00:00Z", Bucket::Hour, "Asia/Kolkata");
        assert_eq!(india, ["01-01T05:00+0530", "01-01T06:00+0530", "01-01T07:00+0530"]);
        // A clock that is set by half an hour, forth and back.
        let forth =
            starts("2026-10-03T14:30:00Z", "2026-10-03T17:00:00Z", Bucket::Hour, "Australia/Lord_Howe");
        assert_eq!(forth, ["10-04T01:00+1030", "10-04T03:00+1100"]);
        let back =
            starts("2026-04-04T14:00:00Z", "2026-04-04T17:00:00Z", Bucket::Hour, "Australia/Lord_Howe");
        assert_eq!(back, ["04-05T01:00+1100", "04-05T02:00+1030", "04-05T03:00+1030"]);
    }

    #[test]
    fn a_day_without_a_midnight_starts_at_its_first_instant() {
        let days = starts("2018-11-03T03:00:00Z", "2018-11-05T02:00:00Z", Bucket::Day, "America/Sao_Paulo");
        assert_eq!(days, ["11-03T00:00-0300", "11-04T01:00-0200"]);
    }

    #[test]
    fn weeks_start_on_monday_and_months_on_the_first() {
        let weeks = starts("2026-01-01T00:00:00Z", "2026-01-12T00:00:01Z", Bucket::Week, "UTC");
        assert_eq!(weeks, ["12-29T00:00+0000", "01-05T00:00+0000", "01-12T00:00+0000"]);
        let months = starts("2026-01-31T23:30:00Z", "2026-04-01T00:00:00Z", Bucket::Month, "Europe/Berlin");
        assert_eq!(months, ["02-01T00:00+0100", "03-01T00:00+0100", "04-01T00:00+0200"]);
    }

    #[test]
    fn every_time_of_a_range_has_one_bucket() {
        let range = 1_790_000_000_123..1_800_000_000_456;
        for bucket in [Bucket::All, Bucket::Hour, Bucket::Day, Bucket::Week, Bucket::Month] {
            let range =
                if bucket == Bucket::Hour { range.start..range.start + 6_000_000_000 } else { range.clone() };
            let buckets = Buckets::new(&range, bucket, "America/New_York").unwrap();
            assert!(buckets.starts_ms[0] <= range.start);
            assert!(buckets.starts_ms.is_sorted() && *buckets.starts_ms.last().unwrap() < range.end);
            assert_eq!(buckets.index(range.start), Some(0));
            assert_eq!(buckets.index(range.end - 1), Some(buckets.len() - 1));
            assert_eq!((buckets.index(range.start - 1), buckets.index(range.end)), (None, None));
        }
        assert!(
            Buckets::new(&range, Bucket::Minute, "UTC").unwrap_err().to_string().contains("at most 2200")
        );
        assert!(Buckets::new(&range, Bucket::Day, "Mars/Olympus").unwrap_err().to_string().contains("IANA"));
        assert!(Buckets::new(&(i64::MIN..i64::MAX), Bucket::Day, "UTC").is_err());
    }
}
