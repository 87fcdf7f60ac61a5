//! What was not delivered when the relay had to stop, kept for its next start.
//!
//! `DATA_DIR/spill/<provider>/<time>-<turn>.ndjson`, mode 0600: one event a
//! line, in the order of arrival. A file is written under another name, synced,
//! renamed, and its directory synced, so it is whole or not there. It is read
//! before the relay accepts anything, so that what is older goes first, and
//! stays on disk until all its events have ended: a kill in between costs
//! duplicates, which providers recognise by their ids, and no loss.
//!
//! One whose events are [sealed](crate::sealing::lines) ends in `.sealed`.

use std::{
    fs,
    io::{self, BufRead, BufWriter, Write},
    path::{Path, PathBuf},
};

use analytics_relay_providers::{Event, EventId};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::{error, warn};

use super::dead_letter::id_as_text;
use crate::{
    files,
    letter_files::Letter,
    reasons::DropReason,
    sealing::{
        FileKind, Locked, Sealing,
        lines::{Sealed, SealedLines, seal_line},
    },
};

/// Ending of lines that could not be read.
const DAMAGED: &str = "damaged";
/// Ending of a file that was set aside because nobody had its key.
const UNREADABLE: &str = "unreadable";

/// One provider's spill directory.
#[derive(Debug, Clone)]
pub(crate) struct SpillDir {
    dir: PathBuf,
    sealing: Sealing,
}

/// What of a sealed line can be read.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Head {
    #[serde(with = "id_as_text")]
    event_id: EventId<'static>,
    accepted_ms: i64,
}

/// Why what was spilled cannot be taken up.
#[derive(Debug, Error)]
pub(crate) enum LoadError {
    #[error(transparent)]
    File(#[from] io::Error),
    /// Its key is not there.
    #[error("{}: {locked}", path.display())]
    Locked { path: PathBuf, locked: Locked },
}

/// An event in a file, as a letter is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct SpilledEvent(pub(crate) Event);

impl Letter for SpilledEvent {
    const KIND: FileKind = FileKind::Spill;
    type Head = Head;

    fn head(&self) -> Head {
        Head { event_id: self.0.id().into_owned(), accepted_ms: self.0.accepted_ms() }
    }

    fn secret(&self) -> Vec<u8> {
        self.0.to_json()
    }

    fn join(head: Head, secret: &[u8]) -> Option<Self> {
        let event = Event::from_json(secret).ok()?;
        (event.id() == head.event_id).then_some(Self(event))
    }
}

/// Events of an earlier run.
#[derive(Debug, Default)]
pub(crate) struct Spilled {
    pub(crate) events: Vec<Event>,
    /// The files that hold them.
    pub(crate) files: Vec<PathBuf>,
    /// Events that nobody can read, or that somebody has changed.
    pub(crate) broken_seals: u64,
    pub(crate) undecryptable: u64,
}

impl Spilled {
    /// Events that end here, by their reasons.
    pub(crate) fn lost(&self) -> [(DropReason, u64); 2] {
        [(DropReason::SealBroken, self.broken_seals), (DropReason::Undecryptable, self.undecryptable)]
    }
}

impl SpillDir {
    /// Creates the directory if need be.
    pub(crate) fn open(data_dir: &Path, provider: &str) -> io::Result<Self> {
        let dir = data_dir.join("spill").join(provider);
        files::create_dir(&dir)?;
        Ok(Self { dir, sealing: Sealing::default() })
    }

    /// Seals what it writes, if that is to be, and opens what is sealed.
    pub(crate) fn sealing(self, sealing: &Sealing) -> Self {
        Self { sealing: sealing.clone(), ..self }
    }

    /// Reads all files. A line that cannot be read is counted and kept aside. So is a file
    /// whose key is not there, if such are
    /// to be passed.
    pub(crate) fn load(&self, passes_unreadable: bool) -> Result<Spilled, LoadError> {
        let mut spilled = Spilled::default();
        let mut set_aside = Vec::new();
        for path in files::list_lines(&self.dir)? {
            let read = read_events(&path, &self.sealing, &mut spilled)?;
            if let Some(locked) = read.locked {
                if !passes_unreadable && locked != Locked::Damaged {
                    return Err(LoadError::Locked { path, locked });
                }
                error!(file = %path.display(), %locked, "spilled events cannot be read: they are lost");
                set_aside.push(path);
                continue;
            }
            if read.damaged > 0 {
                let kept = path.with_extension(DAMAGED);
                error!(file = %kept.display(), lines = read.damaged, "spilled events cannot be read; their lines are kept");
                files::replace(&kept, &read.damaged_lines)?;
            }
            spilled.files.push(path);
        }
        // Only now that all others can be read.
        for path in set_aside {
            fs::rename(&path, path.with_extension(UNREADABLE))?;
            files::sync_dir(&self.dir)?;
        }
        Ok(spilled)
    }

    /// Writes events to a new file, durably.
    pub(crate) fn write<'a>(
        &self,
        events: impl IntoIterator<Item = &'a Event>,
        now_ms: i64,
    ) -> io::Result<()> {
        let path = files::new_lines(&self.dir, now_ms, self.sealing.seals());
        let unfinished = path.with_extension("unfinished");
        self.write_events(&unfinished, events).inspect_err(|_| {
            let _ = fs::remove_file(&unfinished);
        })?;
        fs::rename(&unfinished, &path)?;
        files::sync_dir(&self.dir).inspect_err(|_| {
            // The caller counts its events as not spilled, so they must not be.
            let _ = fs::remove_file(&path);
        })
    }

    /// A provider's files, oldest first.
    pub(crate) fn files_of(data_dir: &Path, provider: &str) -> io::Result<Vec<PathBuf>> {
        files::list_lines(&data_dir.join("spill").join(provider))
    }

    fn write_events<'a>(&self, path: &Path, events: impl IntoIterator<Item = &'a Event>) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, files::create_file(path)?);
        let begun = self.sealing.begin(FileKind::Spill)?;
        let mut sealer = None;
        if let Some((new, block)) = begun {
            out.write_all(&block.encode_lines())?;
            sealer = Some(new);
        }
        let mut line = Vec::new();
        for event in events {
            line.clear();
            match &mut sealer {
                None => line.extend_from_slice(&event.to_json()),
                Some(sealer) => {
                    let (event_id, accepted_ms) = (event.id().into_owned(), event.accepted_ms());
                    let head = serde_json::to_vec(&Head { event_id, accepted_ms }).expect("a head is JSON");
                    seal_line(sealer, &head, &event.to_json(), &mut line);
                }
            }
            if sealer.is_none() {
                line.push(b'\n');
            }
            out.write_all(&line)?;
        }
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }

    /// Files of lines, and whole ones, that could not be read and were set aside.
    pub(crate) fn set_aside(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for name in files::list_dirs(&data_dir.join("spill"))? {
            for entry in fs::read_dir(data_dir.join("spill").join(name))? {
                let path = entry?.path();
                if path.extension().is_some_and(|ending| ending == DAMAGED || ending == UNREADABLE) {
                    paths.push(path);
                }
            }
        }
        paths.sort();
        Ok(paths)
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

/// What was found in a file.
#[derive(Debug, Default)]
struct Read {
    /// Lines that are no event, or that somebody has changed.
    damaged: usize,
    /// Those lines, behind the key of their file.
    damaged_lines: Vec<u8>,
    /// Why sealed lines cannot be opened.
    locked: Option<Locked>,
}

/// Appends the events of a file.
fn read_events(path: &Path, sealing: &Sealing, spilled: &mut Spilled) -> io::Result<Read> {
    let mut file = SealedLines::open(path, FileKind::Spill, sealing)?;
    let mut read = Read::default();
    let mut line = Vec::new();
    while file.lines.read_until(b'\n', &mut line)? > 0 {
        let event = match file.unseal(&line) {
            None => serde_json::from_slice(&line).ok(),
            Some(Sealed::Open(json)) => Event::from_json(&json).ok(),
            Some(Sealed::Locked) => {
                spilled.undecryptable += 1;
                read.locked = file.locked().cloned();
                line.clear();
                continue;
            }
            Some(Sealed::Broken) => {
                spilled.broken_seals += 1;
                None
            }
        };
        if event.is_none() {
            if read.damaged == 0 {
                read.damaged_lines.clone_from(&file.key_lines);
            }
            read.damaged += 1;
            read.damaged_lines.extend_from_slice(&line);
        }
        spilled.events.extend(event);
        line.clear();
    }
    Ok(read)
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
        let spilled = spill.load(false).unwrap();
        assert_eq!(spilled.events, events);
        assert_eq!(spilled.files.len(), 2);
        let mode = fs::metadata(&spilled.files[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        SpillDir::remove(&spilled.files);
        assert!(spill.load(false).unwrap().events.is_empty());
    }

    #[test]
    fn a_damaged_line_costs_itself_and_its_file_is_kept() {
        let data = tempfile::tempdir().unwrap();
        let spill = SpillDir::open(data.path(), "mixpanel").unwrap();
        spill.write([&track("a"), &track("b")], 1).unwrap();
        let path = spill.load(false).unwrap().files.remove(0);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{}\n{{\"torn", text.lines().next().unwrap())).unwrap();
        assert_eq!(spill.load(false).unwrap().events.len(), 1);
        assert!(path.with_extension("damaged").exists());
    }

    #[test]
    fn an_unfinished_file_is_not_loaded() {
        let data = tempfile::tempdir().unwrap();
        let spill = SpillDir::open(data.path(), "mixpanel").unwrap();
        fs::write(data.path().join("spill/mixpanel/000000000000001-0000.unfinished"), "{").unwrap();
        assert!(spill.load(false).unwrap().events.is_empty());
    }

    fn sealed(data: &Path, kids: &str) -> SpillDir {
        SpillDir::open(data, "mixpanel").unwrap().sealing(&crate::sealing::test_keys(kids))
    }

    #[test]
    fn what_is_sealed_comes_back_with_its_key_and_beside_what_is_not() {
        let data = tempfile::tempdir().unwrap();
        let events = [track("canary"), identify("u"), track("c")];
        SpillDir::open(data.path(), "mixpanel").unwrap().write([&events[0]], 1).unwrap();
        sealed(data.path(), "a").write([&events[1]], 2).unwrap();
        sealed(data.path(), "b,a").write([&events[2]], 3).unwrap();
        let spilled = sealed(data.path(), "none,b,a").load(false).unwrap();
        assert_eq!((spilled.events, spilled.files.len()), (events.to_vec(), 3));
        let text = fs::read(&spilled.files[2]).unwrap();
        assert!(memchr::memmem::find(&text, b"\"c\"").is_none());
        assert_eq!(SpillDir::providers(data.path()).unwrap(), ["mixpanel"]);
    }

    #[test]
    fn without_the_key_nothing_is_taken_up_unless_it_is_to_be_set_aside() {
        let data = tempfile::tempdir().unwrap();
        sealed(data.path(), "a").write([&track("a"), &track("b")], 1).unwrap();
        sealed(data.path(), "b").write([&track("c")], 2).unwrap();
        let error = sealed(data.path(), "b").load(false).unwrap_err();
        assert!(error.to_string().contains("-0000.sealed: it is sealed with the key \"a\""), "{error}");
        let spilled = sealed(data.path(), "b").load(true).unwrap();
        assert_eq!((spilled.events.len(), spilled.files.len()), (1, 1));
        assert_eq!(spilled.lost(), [(DropReason::SealBroken, 0), (DropReason::Undecryptable, 2)]);
        assert_eq!(sealed(data.path(), "b").load(false).unwrap().lost()[1].1, 0, "counted once");
        let aside = data.path().join("spill/mixpanel/000000000000001-0000.unreadable");
        fs::rename(&aside, aside.with_extension("sealed")).unwrap();
        assert_eq!(sealed(data.path(), "b,a").load(false).unwrap().events.len(), 3, "it was kept");
    }

    #[test]
    fn an_event_that_somebody_changed_is_counted_and_its_file_is_kept() {
        let data = tempfile::tempdir().unwrap();
        sealed(data.path(), "a").write([&track("a"), &track("b"), &track("c")], 1).unwrap();
        let path = sealed(data.path(), "a").load(false).unwrap().files.remove(0);
        let text = String::from_utf8(fs::read(&path).unwrap()).unwrap();
        let mut lines: Vec<&str> = text.lines().collect();
        lines.swap(2, 3);
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        let spilled = sealed(data.path(), "a").load(false).unwrap();
        assert_eq!((spilled.events.len(), spilled.broken_seals), (2, 1));
        assert!(path.with_extension("damaged").exists());
    }
}
