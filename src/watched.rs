//! Files of the operator's that are replaced while the relay runs: read again when they are
//! others.

use std::{
    convert::Infallible,
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tracing::error;

/// How often it is looked whether there is another file, as with certificates.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// Reads its file again.
pub(crate) trait Reload: Send + Sync {
    /// Uses what the file holds now, if that is new and can be used; else what was there
    /// before, and says so once for each version of the file. Blocks.
    fn reload(&self);
}

/// Lets each look at its file once in a while, one after the other and beside the tasks that
/// serve callers.
pub(crate) async fn follow(files: Vec<Arc<dyn Reload>>, every: Duration) -> Infallible {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is at once, and they have just been read.
    ticks.tick().await;
    loop {
        ticks.tick().await;
        for file in &files {
            let file = Arc::clone(file);
            if let Err(error) = spawn_blocking(move || file.reload()).await {
                error!(%error, "a defect: reading a file again panicked; what it held before is used on");
            }
        }
    }
}

/// What tells one version of a file from another. One that is replaced by renaming has
/// another inode, and one that is written in place another time or length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// What was found when it was last looked.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Read(Version),
    Failed(io::ErrorKind),
}

/// A file, and which version of it was read last.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    path: PathBuf,
    bytes_max: u64,
    seen: Seen,
}

impl WatchedFile {
    /// A file of at most so many bytes, that was not looked at yet.
    pub(crate) fn new(path: PathBuf, bytes_max: u64) -> Self {
        Self { path, bytes_max, seen: Seen::Nothing }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What the file holds now.
    pub(crate) fn read_first(&mut self) -> io::Result<Vec<u8>> {
        self.seen = Seen::Nothing;
        let being_written = || io::Error::new(io::ErrorKind::ResourceBusy, "it is being written");
        self.read_if_changed().unwrap_or_else(|| Err(being_written()))
    }

    /// What the file holds, if it is another one than was read last; nothing too while
    /// somebody writes it, for then it is another one the next time. What keeps it from
    /// being read is told once, and tried again each time.
    pub(crate) fn read_if_changed(&mut self) -> Option<io::Result<Vec<u8>>> {
        match self.read() {
            Ok(None) => None,
            Ok(Some((version, content))) => {
                self.seen = Seen::Read(version);
                Some(Ok(content))
            }
            Err(error) if self.seen == Seen::Failed(error.kind()) => None,
            Err(error) => {
                self.seen = Seen::Failed(error.kind());
                Some(Err(error))
            }
        }
    }

    fn read(&self) -> io::Result<Option<(Version, Vec<u8>)>> {
        // Not of the open file: one that is no file may be waited for while it is opened.
        let metadata = fs::metadata(&self.path)?;
        let invalid = |got: &str, want: &str| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("got {got}, want {want}"))
        };
        if !metadata.is_file() {
            return Err(invalid("what is no file", "a file"));
        }
        if self.seen == Seen::Read(Version::of(&metadata)) {
            return Ok(None);
        }
        let file = File::open(&self.path)?;
        let version = Version::of(&file.metadata()?);
        if version.bytes > self.bytes_max {
            let want = format!("at most {}", self.bytes_max);
            return Err(invalid(&format!("{} bytes", version.bytes), &want));
        }
        let mut content = Vec::with_capacity(usize::try_from(version.bytes).unwrap_or_default());
        (&file).take(self.bytes_max).read_to_end(&mut content)?;
        let is_whole = Version::of(&file.metadata()?) == version && content.len() as u64 == version.bytes;
        Ok(is_whole.then_some((version, content)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn read(file: &mut WatchedFile) -> Option<Result<Vec<u8>, io::ErrorKind>> {
        file.read_if_changed().map(|read| read.map_err(|error| error.kind()))
    }

    fn replace(path: &Path, content: &[u8]) {
        let new = path.with_extension("new");
        fs::write(&new, content).unwrap();
        fs::rename(&new, path).unwrap();
    }

    #[test]
    fn a_file_is_read_once_for_each_version_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let mut file = WatchedFile::new(path.clone(), 5);
        assert_eq!(read(&mut file), Some(Err(io::ErrorKind::NotFound)), "told once");
        assert_eq!(read(&mut file), None);
        fs::write(&path, "one").unwrap();
        assert_eq!(read(&mut file), Some(Ok(b"one".into())));
        assert_eq!(read(&mut file), None);
        // As long, and as old.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        replace(&path, b"two");
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert_eq!(read(&mut file), Some(Ok(b"two".into())), "another inode");
        fs::write(&path, "three").unwrap();
        assert_eq!(read(&mut file), Some(Ok(b"three".into())), "written in place");
        replace(&path, b"longer");
        assert_eq!(read(&mut file), Some(Err(io::ErrorKind::InvalidInput)));
        assert_eq!(read(&mut file), None);
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&mut file), Some(Err(io::ErrorKind::NotFound)));
        fs::write(&path, "back").unwrap();
        assert_eq!(read(&mut file), Some(Ok(b"back".into())));
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            read(&mut WatchedFile::new(dir.path().into(), 5)),
            Some(Err(io::ErrorKind::InvalidInput)),
            "a directory"
        );
        let fifo = dir.path().join("fifo");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        assert_eq!(read(&mut WatchedFile::new(fifo, 5)), Some(Err(io::ErrorKind::InvalidInput)));
    }

    #[derive(Default)]
    struct Counted {
        looks: AtomicUsize,
        panics: bool,
    }

    impl Reload for Counted {
        fn reload(&self) {
            self.looks.fetch_add(1, Ordering::Relaxed);
            assert!(!self.panics, "as it should");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_file_is_looked_at_once_in_an_interval_and_one_that_panics_keeps_no_other_from_it() {
        let (bad, good) =
            (Arc::new(Counted { panics: true, ..Counted::default() }), Arc::new(Counted::default()));
        let following = tokio::spawn(follow(vec![bad.clone(), good.clone()], LOOK_INTERVAL));
        let looks = || [&bad, &good].map(|file| file.looks.load(Ordering::Relaxed));
        tokio::time::sleep(LOOK_INTERVAL / 2).await;
        assert_eq!(looks(), [0, 0], "both were just read");
        tokio::time::sleep(3 * LOOK_INTERVAL).await;
        assert_eq!(looks(), [3, 3]);
        following.abort();
    }
}
