//! Times as a server has them: microseconds since 2000. What it cannot hold is at an end.

use std::error::Error;

use bytes::BytesMut;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};

/// 2000-01-01: Unix milliseconds.
const EPOCH_MS: i64 = 946_684_800_000;
/// The first millisecond that a server knows, since its epoch; and the last of the year 294245:
/// a server knows 31 years more, TimescaleDB does not. Nor has it infinite times.
const FIRST_MS: i64 = -211_813_488_000_000;
const LAST_MS: i64 = 9_222_393_023_999_999;

/// A `timestamptz`. Of two times that are one behind the other so are these, or both are at the
/// same end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Ts(i64);

impl Ts {
    /// Of Unix milliseconds.
    pub(super) fn of(time_ms: i64) -> Self {
        Self(time_ms.saturating_sub(EPOCH_MS).clamp(FIRST_MS, LAST_MS) * 1_000)
    }

    /// The latest time that may have become this one: Unix milliseconds.
    pub(super) fn last_ms(self) -> i64 {
        match self.0.div_euclid(1_000) {
            ms if ms >= LAST_MS => i64::MAX,
            ms => ms + EPOCH_MS,
        }
    }

    /// As SQL has it, of years that have four digits; those that have more are infinite.
    pub(super) fn text(self) -> String {
        let second = jiff::Timestamp::from_second((self.0.div_euclid(1_000) + EPOCH_MS) / 1_000);
        second.map_or_else(|_| "infinity".into(), |time| time.to_string())
    }
}

impl ToSql for Ts {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
        out.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Ts {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(i64::from_be_bytes(raw.try_into()?)))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_their_order_and_those_of_no_calendar_are_at_its_ends() {
        let times = [i64::MIN, -300_000_000_000_000_000, -1, 0, 1, 1_790_280_000_000, i64::MAX - 1, i64::MAX];
        let stored: Vec<Ts> = times.iter().map(|time| Ts::of(*time)).collect();
        assert!(stored.is_sorted());
        assert_eq!((stored[0], stored[1]), (Ts(FIRST_MS * 1_000), Ts(FIRST_MS * 1_000)));
        assert_eq!((stored[6], stored[7]), (Ts(LAST_MS * 1_000), Ts(LAST_MS * 1_000)));
        for (time, stored) in times.iter().zip(&stored) {
            assert!(stored.last_ms() >= *time, "{time}");
        }
        assert_eq!(Ts::of(1_790_280_000_001).last_ms(), 1_790_280_000_001);
        assert_eq!(Ts::of(86_400_000).text(), "1970-01-02T00:00:00Z");
        assert_eq!(Ts::of(i64::MAX).text(), "infinity");
    }
}
