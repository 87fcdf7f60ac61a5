//! What was not delivered when the relay had to stop, kept for its next start.
//!
//! `DATA_DIR/spill/<provider>/<time>-<turn>.ndjson`, mode 0600: one event a
//! line, in the order of arrival. A file is written under another name, synced,
//! renamed, and its directory synced, so it is whole or not there. It is read
//! before the relay accepts anything, so that what is older goes first, and
//! stays on disk until all its events have ended: a kill in between costs
//! duplicates, which providers recognise by their ids, and no loss.

use std::{
    fs,
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::{Path, PathBuf},
};

use analytics_relay_providers::Event;
use tracing::{error, warn};

use crate::files;

/// One provider's spill directory.
#[derive(Debug, Clone)]
pub(crate) struct SpillDir(PathBuf);

/// Events of an earlier run.
#[derive(Debug, Default)]
pub(crate) struct Spilled {
    pub(crate) events: Vec<Event>,
    /// The files that hold them.
    pub(crate) files: Vec<PathBuf>,
}

impl SpillDir {
    /// Creates the directory if need be.
    pub(crate) fn open(data_dir: &Path, provider: &str) -> io::Result<Self> {
        let dir = data_dir.join("spill").join(provider);
        files::create_dir(&dir)?;
        Ok(Self(dir))
    }

    /// Reads all files. A line that cannot be read is counted and kept aside:
    /// its file is renamed, never removed.
    pub(crate) fn load(&self) -> io::Result<Spilled> {
        let mut spilled = Spilled::default();
        for path in files::list_ndjson(&self.0)? {
            let damaged = read_events(&path, &mut spilled.events)?;
            if damaged > 0 {
                let kept = path.with_extension("damaged");
                error!(file = %kept.display(), lines = damaged, "spilled events cannot be read; their file is kept");
                fs::copy(&path, &kept)?;
            }
            spilled.files.push(path);
        }
        Ok(spilled)
    }

    /// Writes events to a new file, durably.
    pub(crate) fn write<'a>(
        &self,
        events: impl IntoIterator<Item = &'a Event>,
        now_ms: i64,
    ) -> io::Result<()> {
        let path = files::new_ndjson(&self.0, now_ms);
        let unfinished = path.with_extension("unfinished");
        write_events(&unfinished, events).inspect_err(|_| {
            let _ = fs::remove_file(&unfinished);
        })?;
        fs::rename(&unfinished, &path)?;
        files::sync_dir(&self.0).inspect_err(|_| {
            // The caller counts its events as not spilled, so they must not be.
            let _ = fs::remove_file(&path);
        })
    }

    /// A provider's files, oldest first.
    pub(crate) fn files_of(data_dir: &Path, provider: &str) -> io::Result<Vec<PathBuf>> {
        files::list_ndjson(&data_dir.join("spill").join(provider))
    }

    /// Providers that have spilled events under a data directory.
    pub(crate) fn providers(data_dir: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for name in files::list_dirs(&data_dir.join("spill"))? {
            if !Self::files_of(data_dir, &name)?.is_empty() {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Removes files whose events have all ended, or stand in a newer file.
    pub(crate) fn remove(files: &[PathBuf]) {
        for path in files {
            if let Err(error) = fs::remove_file(path) {
                warn!(file = %path.display(), %error, "spill file stays, and its events will be sent again");
            }
        }
    }
}

fn write_events<'a>(path: &Path, events: impl IntoIterator<Item = &'a Event>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, files::create_file(path)?);
    for event in events {
        out.write_all(&event.to_json())?;
        out.write_all(b"\n")?;
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// Appends the events of a file; returns the number of lines that are none.
fn read_events(path: &Path, events: &mut Vec<Event>) -> io::Result<usize> {
    let mut damaged = 0;
    for line in BufReader::new(fs::File::open(path)?).split(b'\n') {
        match serde_json::from_slice(&line?) {
            Ok(event) => events.push(event),
            Err(_) => damaged += 1,
        }
    }
    Ok(damaged)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::delivery::test_support::{identify, track};

    #[test]
    fn what_is_spilled_comes_back_in_order_and_from_all_files() {
        let data = tempfile::tempdir().unwrap();
        let spill = SpillDir::open(data.path(), "mixpanel").unwrap();
        let events = [track("a"), identify("u"), track("c")];
        spill.write(events[..2].iter(), 5).unwrap();
        spill.write(events[2..].iter(), 5).unwrap();
        let spilled = spill.load().unwrap();
        assert_eq!(spilled.events, events);
        assert_eq!(spilled.files.len(), 2);
        let mode = fs::metadata(&spilled.files[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        SpillDir::remove(&spilled.files);
        assert!(spill.load().unwrap().events.is_empty());
    }

    #[test]
    fn a_damaged_line_costs_itself_and_its_file_is_kept() {
        let data = tempfile::tempdir().unwrap();
        let spill = SpillDir::open(data.path(), "mixpanel").unwrap();
        spill.write([&track("a"), &track("b")], 1).unwrap();
        let path = spill.load().unwrap().files.remove(0);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{}\n{{\"torn", text.lines().next().unwrap())).unwrap();
        assert_eq!(spill.load().unwrap().events.len(), 1);
        assert!(path.with_extension("damaged").exists());
    }

    #[test]
    fn an_unfinished_file_is_not_loaded() {
        let data = tempfile::tempdir().unwrap();
        let spill = SpillDir::open(data.path(), "mixpanel").unwrap();
        fs::write(data.path().join("spill/mixpanel/000000000000001-0000.unfinished"), "{").unwrap();
        assert!(spill.load().unwrap().events.is_empty());
    }
}
