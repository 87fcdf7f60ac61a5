//! What is known about somebody; of a device that is nobody's it is asked of its events.

use super::{
    chunk::Chunk,
    seam::{Fold, Scan, Seen, Wants, Whose},
};
use crate::{Identity, StoreError, Subject, model::Keys};

/// When a device was seen that is nobody's.
struct Device {
    key: u64,
    times: Option<(i64, i64)>,
}

/// What is known about somebody, if that is nobody's device with its times.
pub(crate) fn with_times(
    snapshot: &mut impl Scan,
    known: Option<Identity>,
    who: &Subject,
    keys: Keys,
) -> Result<Option<Identity>, StoreError> {
    let is_nobodys =
        |device| known.as_ref().is_none_or(|known| known.users.is_empty() && known.root == device);
    let device = match who {
        Subject::Anonymous(device) if is_nobodys(device.as_str()) => device,
        _ => return Ok(known),
    };
    let new = || Device { key: keys.anonymous(device), times: None };
    let times = snapshot.scan(&(i64::MIN..i64::MAX), new)?.times;
    if known.is_none() && times.is_none() {
        return Ok(None);
    }
    let (first_seen_ms, last_seen_ms) = times.unzip();
    Ok(Some(Identity { first_seen_ms, last_seen_ms, ..known.unwrap_or_else(|| Identity::of_device(device)) }))
}

impl Device {
    fn note(&mut self, first_ms: i64, last_ms: i64) {
        let (first, last) = self.times.unwrap_or((first_ms, last_ms));
        self.times = Some((first.min(first_ms), last.max(last_ms)));
    }
}

impl Fold for Device {
    fn wants(&self) -> Wants {
        Wants { who: true, bots: true, whose: Whose::Key(self.key), ..Wants::default() }
    }

    fn take(&mut self, chunk: &mut dyn Chunk, _: &Seen<'_>) -> Result<(), StoreError> {
        if !chunk.who(false)?.keys.contains(&self.key) {
            return Ok(());
        }
        let (who, times) = (chunk.who(true)?, chunk.times()?);
        let its = |(code, _): &(&u32, &i64)| who.keys[**code as usize] == self.key;
        // By time: the first is the earliest.
        let mut its = who.codes.iter().zip(times.iter()).filter(its).map(|(_, time_ms)| *time_ms);
        let first = its.next();
        let bounds = first.map(|first_ms| (first_ms, its.next_back().unwrap_or(first_ms)));
        if let Some((first_ms, last_ms)) = bounds {
            self.note(first_ms, last_ms);
        }
        Ok(())
    }

    fn merge(&mut self, other: Self) -> Result<(), StoreError> {
        if let Some((first_ms, last_ms)) = other.times {
            self.note(first_ms, last_ms);
        }
        Ok(())
    }
}
