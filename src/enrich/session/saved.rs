//! The table of sessions in a file, from one run to the next.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::PoisonError,
};

use tracing::{info, warn};

use super::{Sessions, VisitorKey, table::Visits};
use crate::files;

const NAME: &str = "sessions";
const MAGIC: [u8; 8] = *b"ARSESS\0\x01";
/// A visitor's key, and the times of two sessions.
const ROW_BYTES: usize = 48;
/// Of a file that is read: as much as the most visitors that can be set.
const FILE_BYTES_MAX: u64 = 10_000_000 * ROW_BYTES as u64 + 64;

/// Where the sessions of a stopped relay are.
#[derive(Debug, Clone)]
pub(crate) struct SavedSessions(PathBuf);

/// What came of writing them.
pub(crate) type Saving = io::Result<usize>;

impl SavedSessions {
    pub(crate) fn in_dir(data_dir: &Path) -> Self {
        Self(data_dir.join(NAME))
    }

    /// Takes what the relay knew when it stopped, and removes the file: after a kill it
    /// would be of long ago. A file that is damaged costs its sessions.
    pub(crate) fn take(&self, sessions: &Sessions, now_ms: i64) {
        let bytes = match self.read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => {
                warn!(file = %self.0.display(), %error, "saved sessions cannot be read, visits begin anew");
                return;
            }
        };
        match rows(&bytes) {
            Some(rows) => {
                rows.for_each(|(key, visits)| sessions.shard(key).restore(key.0, visits, now_ms));
                info!(visitors = sessions.visitors(), "sessions of the last run go on");
            }
            None => warn!(file = %self.0.display(), "saved sessions are damaged, visits begin anew"),
        }
        self.remove();
    }

    /// Removes what a relay knew that made sessions.
    pub(crate) fn remove(&self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(file = %self.0.display(), %error, "saved sessions cannot be removed");
            }
            _ => {}
        }
    }

    /// Writes what is known: how many visitors that are.
    pub(crate) fn save(&self, sessions: &Sessions) -> Saving {
        let mut bytes = MAGIC.to_vec();
        for shard in &sessions.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, Visits { start_ms, last_ms, before }) in shard.all() {
                bytes.extend(key.to_le_bytes());
                for time in [start_ms, last_ms, before.0, before.1] {
                    bytes.extend(time.to_le_bytes());
                }
            }
        }
        let visitors = (bytes.len() - MAGIC.len()) / ROW_BYTES;
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        files::replace(&self.0, &bytes)?;
        Ok(visitors)
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        fs::File::open(&self.0)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// What stands in a file; nothing if it is not whole.
fn rows(bytes: &[u8]) -> Option<impl Iterator<Item = (VisitorKey, Visits)>> {
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    let rows = body.strip_prefix(&MAGIC)?;
    let is_whole = crc32fast::hash(body) == u32::from_le_bytes(*crc) && rows.len() % ROW_BYTES == 0;
    let row = |row: &[u8]| {
        let (key, times) = row.split_first_chunk::<16>().expect("rows are of one length");
        let time = |place: usize| {
            i64::from_le_bytes(times[8 * place..8 * place + 8].try_into().expect("eight bytes are eight"))
        };
        let visits = Visits { start_ms: time(0), last_ms: time(1), before: (time(2), time(3)) };
        (VisitorKey(u128::from_le_bytes(*key)), visits)
    };
    is_whole.then(|| rows.chunks_exact(ROW_BYTES).map(row))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Session, SessionLimits, SessionSecret},
        *,
    };

    const T0: i64 = 1_767_225_600_000;

    fn sessions() -> Sessions {
        let limits = SessionLimits { timeout_ms: 1_800_000, sessions_max: 1000 };
        Sessions::new(SessionSecret::of(b"secret"), limits)
    }

    #[test]
    fn visits_go_on_after_a_restart_and_begin_anew_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let saved = SavedSessions::in_dir(dir.path());
        let first = sessions();
        let ids: Vec<_> = (0..100).map(|n| first.of(first.visitor("", &n.to_string(), ""), T0, T0)).collect();
        assert_eq!(saved.save(&first).unwrap(), 100);

        let second = sessions();
        saved.take(&second, T0 + 60_000);
        let later = T0 + 120_000;
        for (n, id) in ids.iter().enumerate() {
            assert_eq!(second.of(second.visitor("", &n.to_string(), ""), later, later), *id);
        }
        let after_a_kill = sessions();
        saved.take(&after_a_kill, later);
        assert_eq!(after_a_kill.visitors(), 0);
        let anew = after_a_kill.of(after_a_kill.visitor("", "0", ""), later, later);
        assert!(matches!(anew, Session::Of(id) if Session::Of(id) != ids[0]));
    }

    #[test]
    fn a_file_with_any_bit_flipped_or_any_end_cut_off_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let saved = SavedSessions::in_dir(dir.path());
        let known = sessions();
        known.of(known.visitor("", "a", ""), T0, T0);
        saved.save(&known).unwrap();
        let whole = saved.read().unwrap();
        assert_eq!(rows(&whole).unwrap().count(), 1);
        for place in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[place / 8] ^= 1 << (place % 8);
            assert!(rows(&flipped).is_none(), "bit {place}");
        }
        assert!((0..whole.len()).all(|length| rows(&whole[..length]).is_none()));
    }
}
