//! Users who are to be deleted from the store, handed over by the command `erase` to
//! whoever has the store open.
//!
//! `DATA_DIR/erasures/<name>.json`, mode 0600: the ids of one command, in the clear, until
//! it is done; then `<name>.done`, which only counts. Files, so that what was asked is done
//! after a crash too, and asks for no port. The command asks once every lane keeps to the
//! list of erased users, so that nothing of them comes in behind.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use analytics_relay_store::{Deleted, Store, StoreError, Subject, TenantScope};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{files, time::Clock};

const ASKED: &str = "json";
const DONE: &str = "done";

/// Why what was asked is not done: it stays asked.
#[derive(Debug, Error)]
pub(crate) enum ErasureError {
    /// The file of the request.
    #[error("{path}: {source}")]
    File { path: String, source: io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The ids of one command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Erasure {
    pub(crate) user_ids: Vec<String>,
    pub(crate) anonymous_ids: Vec<String>,
}

impl Erasure {
    fn subjects(self) -> impl Iterator<Item = Subject> {
        let users = self.user_ids.into_iter().map(Subject::User);
        users.chain(self.anonymous_ids.into_iter().map(Subject::Anonymous))
    }
}

/// What was deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Erased {
    pub(crate) events: u64,
    pub(crate) facts: u64,
}

/// The directory of the files.
#[derive(Debug, Clone)]
pub(crate) struct Erasures(PathBuf);

impl Erasures {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("erasures"))
    }

    /// Asks, durably. Returns the file by which the outcome is found.
    pub(crate) fn ask(&self, erasure: &Erasure) -> io::Result<PathBuf> {
        files::create_dir(&self.0)?;
        let name = format!("{:013}-{:08x}", Clock::system().now_ms(), fastrand::u32(..));
        let path = self.0.join(name).with_extension(ASKED);
        files::replace(&path, &serde_json::to_vec(erasure)?)?;
        Ok(path)
    }

    /// What came of what was asked, if it is done; it is told once.
    pub(crate) fn outcome(&self, asked: &Path) -> io::Result<Option<Erased>> {
        let done = asked.with_extension(DONE);
        match fs::read(&done) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            bytes => {
                let erased = serde_json::from_slice(&bytes?)?;
                fs::remove_file(done)?;
                Ok(Some(erased))
            }
        }
    }

    /// What is asked, the oldest first.
    pub(crate) fn asked(&self) -> io::Result<Vec<PathBuf>> {
        self.with_ending(ASKED)
    }

    /// True if what was asked is done and its outcome not told yet.
    pub(crate) fn is_done(&self, asked: &Path) -> bool {
        asked.with_extension(DONE).exists()
    }

    /// Removes outcomes that nobody has waited for.
    pub(crate) fn forget_outcomes(&self) -> io::Result<()> {
        self.with_ending(DONE)?.into_iter().try_for_each(fs::remove_file)
    }

    /// Does what is asked. What fails stays asked, and holds up nothing behind it; of what
    /// failed the first is told.
    pub(crate) async fn work_off(&self, store: &dyn Store) -> Result<Erased, ErasureError> {
        let (mut all, mut failed, mut unavailable) = (Erased::default(), None, 0);
        for path in self.asked().map_err(at(&self.0))? {
            match work_off_one(&path, store).await {
                Ok(erased) => {
                    (all.events, all.facts) = (all.events + erased.events, all.facts + erased.facts);
                }
                Err(error) => {
                    unavailable += usize::from(matches!(error, ErasureError::Store(_)));
                    failed.get_or_insert(error);
                    // It is the store, and not who is to be erased.
                    if unavailable == 2 {
                        break;
                    }
                }
            }
        }
        failed.map_or(Ok(all), Err)
    }

    fn with_ending(&self, ending: &str) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|found| found == ending) {
                paths.push(path);
            }
        }
        // Names start with a time of fixed width.
        paths.sort();
        Ok(paths)
    }
}

/// Does what one file asks.
async fn work_off_one(path: &Path, store: &dyn Store) -> Result<Erased, ErasureError> {
    let bytes = fs::read(path).map_err(at(path))?;
    let erasure: Erasure = serde_json::from_slice(&bytes).map_err(|error| at(path)(error.into()))?;
    let mut erased = Erased::default();
    for who in erasure.subjects() {
        let Deleted { events, facts, .. } = store.erase(&TenantScope::tenant(""), &who).await?;
        (erased.events, erased.facts) = (erased.events + events, erased.facts + facts);
    }
    let told = serde_json::to_vec(&erased).map_err(|error| at(path)(error.into()))?;
    // In this order: to do it twice does no harm.
    files::replace(&path.with_extension(DONE), &told).map_err(at(path))?;
    fs::remove_file(path).map_err(at(path))?;
    Ok(erased)
}

fn at(path: &Path) -> impl Fn(io::Error) -> ErasureError {
    let path = path.display().to_string();
    move |source| ErasureError::File { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::store::front::tests::{event_at, events_in, front};

    const TIME_MS: i64 = 1_767_225_600_000;

    #[tokio::test]
    async fn who_is_asked_to_be_erased_is_and_their_ids_are_kept_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[]);
        let erasures = Erasures::new(dir.path());
        let erasure = Erasure { user_ids: vec!["canary".into()], ..Erasure::default() };
        let asked = erasures.ask(&erasure).unwrap();
        assert_eq!(fs::metadata(&asked).unwrap().permissions().mode() & 0o777, 0o600);
        // Until the store is open it stays asked.
        assert!(erasures.work_off(&front).await.is_err());
        assert_eq!(erasures.asked().unwrap(), std::slice::from_ref(&asked));
        assert_eq!(erasures.outcome(&asked).unwrap(), None);

        front.open().await.unwrap();
        let batch =
            [event_at("canary", TIME_MS), event_at("canary", TIME_MS + 1), event_at("other", TIME_MS)];
        front.append(&batch).await.unwrap();
        assert_eq!(erasures.work_off(&front).await.unwrap().events, 2);
        assert_eq!(events_in(&front, 0..i64::MAX).await, 1);
        let done = fs::read_to_string(asked.with_extension(DONE)).unwrap();
        assert!(!done.contains("canary"), "{done}");
        assert_eq!(erasures.outcome(&asked).unwrap().unwrap().events, 2);
        assert_eq!(erasures.outcome(&asked).unwrap(), None, "it is told once");
        assert_eq!(fs::read_dir(dir.path().join("erasures")).unwrap().count(), 0);
        front.close().await;
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_told_and_stays_and_holds_up_nothing_behind_it() {
        let dir = tempfile::tempdir().unwrap();
        let (front, _) = front(dir.path(), &[]);
        front.open().await.unwrap();
        let erasures = Erasures::new(dir.path());
        front.append(&[event_at("canary", TIME_MS)]).await.unwrap();
        let asked = dir.path().join("erasures").join("0").with_extension(ASKED);
        fs::create_dir_all(asked.parent().unwrap()).unwrap();
        fs::write(&asked, "{").unwrap();
        erasures.ask(&Erasure { user_ids: vec!["canary".into()], ..Erasure::default() }).unwrap();
        let error = erasures.work_off(&front).await.unwrap_err().to_string();
        assert!(error.contains(asked.to_str().unwrap()), "{error}");
        assert_eq!(erasures.asked().unwrap(), [asked]);
        assert_eq!(events_in(&front, 0..i64::MAX).await, 0);
        front.close().await;
    }
}
