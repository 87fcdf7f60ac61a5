//! Providers that a person has stopped.
//!
//! `DATA_DIR/suspended/<provider>.json`, mode 0600: while it is there nothing is sent
//! to the provider, and its events wait as if it were down. A file, so that it holds
//! across restarts, can be set before a start, and asks for no port.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use tracing::warn;

use crate::files;

/// Between two looks at the directory.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Ending of the files.
const ENDING: &str = "json";

/// Why a provider is stopped, in its file. One that is empty will do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Suspension {
    /// Since when, in Unix milliseconds.
    pub(crate) since_ms: i64,
    /// Whatever the person wants to tell others.
    pub(crate) note: String,
}

/// The directory of the files.
#[derive(Debug, Clone)]
pub(crate) struct Suspensions(PathBuf);

impl Suspensions {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self(data_dir.join("suspended"))
    }

    fn path(&self, provider: &str) -> PathBuf {
        self.0.join(provider).with_extension(ENDING)
    }

    /// Stops a provider. One that is stopped gets the new note.
    pub(crate) fn suspend(&self, provider: &str, suspension: &Suspension) -> io::Result<()> {
        files::create_dir(&self.0)?;
        files::replace(&self.path(provider), &serde_json::to_vec(suspension)?)
    }

    /// Lets a provider go on. False if it was not stopped.
    pub(crate) fn resume(&self, provider: &str) -> io::Result<bool> {
        match fs::remove_file(self.path(provider)) {
            Ok(()) => files::sync_dir(&self.0).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The providers that are stopped. A file that cannot be read stops its provider
    /// all the same.
    pub(crate) fn list(&self) -> io::Result<BTreeMap<String, Suspension>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            entries => entries?,
        };
        let mut suspended = BTreeMap::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == ENDING)
                && let Some(provider) = path.file_stem().and_then(|name| name.to_str())
            {
                let text = fs::read(&path).unwrap_or_default();
                suspended.insert(provider.to_owned(), serde_json::from_slice(&text).unwrap_or_default());
            }
        }
        Ok(suspended)
    }

    /// Looks again and again, and tells each lane of a change. While the directory
    /// cannot be read, everything stays as it was.
    pub(crate) async fn watch(self, lanes: Vec<(&'static str, watch::Sender<bool>)>) {
        let mut told = false;
        loop {
            sleep(LOOK_INTERVAL).await;
            let looking = self.clone();
            // A disk that hangs keeps this task, and nobody else.
            let listed = spawn_blocking(move || looking.list()).await.map_err(io::Error::other);
            match listed.flatten() {
                Ok(suspended) => {
                    for (provider, lane) in &lanes {
                        let now = suspended.contains_key(*provider);
                        lane.send_if_modified(|before| std::mem::replace(before, now) != now);
                    }
                    told = false;
                }
                Err(error) if !told => {
                    warn!(%error, "it cannot be seen which providers are suspended: they stay as they are");
                    told = true;
                }
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stops_a_provider_and_its_removal_lets_it_go_on() {
        let data = tempfile::tempdir().unwrap();
        let suspensions = Suspensions::new(data.path());
        assert!(suspensions.list().unwrap().is_empty());
        assert!(!suspensions.resume("mixpanel").unwrap());
        let why = Suspension { since_ms: 5, note: "a new project".into() };
        suspensions.suspend("mixpanel", &Suspension::default()).unwrap();
        suspensions.suspend("mixpanel", &why).unwrap();
        fs::write(data.path().join("suspended/segment.json"), "by hand").unwrap();
        let listed = suspensions.list().unwrap();
        assert_eq!(listed.keys().collect::<Vec<_>>(), ["mixpanel", "segment"]);
        assert_eq!(listed["mixpanel"], why);
        assert!(suspensions.resume("mixpanel").unwrap());
        assert_eq!(suspensions.list().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn lanes_are_told_of_changes_and_nothing_when_it_cannot_be_seen() {
        let data = tempfile::tempdir().unwrap();
        let suspensions = Suspensions::new(data.path());
        let (sender, mut lane) = watch::channel(false);
        tokio::spawn(suspensions.clone().watch(vec![("mixpanel", sender)]));
        suspensions.suspend("mixpanel", &Suspension::default()).unwrap();
        lane.wait_for(|suspended| *suspended).await.unwrap();
        fs::remove_dir_all(data.path().join("suspended")).unwrap();
        lane.wait_for(|suspended| !*suspended).await.unwrap();
        suspensions.suspend("mixpanel", &Suspension::default()).unwrap();
        lane.wait_for(|suspended| *suspended).await.unwrap();
        // Something that is no directory stands there.
        fs::remove_dir_all(data.path().join("suspended")).unwrap();
        fs::write(data.path().join("suspended"), "").unwrap();
        sleep(LOOK_INTERVAL * 10).await;
        assert!(*lane.borrow_and_update());
    }
}
