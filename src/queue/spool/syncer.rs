//! A thread that syncs cursors, so that callers do not wait for the disk longer
//! than their own group takes.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use super::fs::SpoolFile;

/// Files to sync, by the places of their cursors.
type Files = Vec<(usize, Arc<dyn SpoolFile>)>;
/// What came of that.
pub(super) type Synced = Vec<(usize, io::Result<()>)>;

/// See the module. The thread ends when this is dropped.
#[derive(Debug)]
pub(super) struct CursorSyncer {
    /// None if the system gives no thread, or it has died: then they are synced here.
    jobs: Option<Sender<Files>>,
    done: Receiver<Synced>,
    /// What was synced here.
    done_here: Option<Synced>,
    /// The places of those that are being synced.
    busy_with: Vec<usize>,
}

impl CursorSyncer {
    pub(super) fn start() -> Self {
        let (jobs, files) = mpsc::channel::<Files>();
        let (results, done) = mpsc::channel();
        let work = move || {
            for files in files {
                // Nobody listens any more once the log is closed.
                let _ = results.send(sync(files));
            }
        };
        let running = thread::Builder::new().name("spool-cursors".to_owned()).spawn(work);
        Self { jobs: running.is_ok().then_some(jobs), done, done_here: None, busy_with: Vec::new() }
    }

    /// True while files are being synced.
    pub(super) fn is_busy(&self) -> bool {
        !self.busy_with.is_empty()
    }

    /// Begins to sync files; only if it is not busy.
    pub(super) fn begin(&mut self, files: Files) {
        self.busy_with = files.iter().map(|(place, _)| *place).collect();
        let files = match &self.jobs {
            Some(jobs) => jobs.send(files).err().map(|mpsc::SendError(files)| files),
            None => Some(files),
        };
        if let Some(files) = files {
            self.jobs = None;
            self.done_here = Some(sync(files));
        }
    }

    /// What came of it, if it is over; waits so long for that.
    pub(super) fn ended(&mut self, patience: Duration) -> Option<Synced> {
        if !self.is_busy() {
            return None;
        }
        let synced = match self.done_here.take().map_or_else(|| self.done.recv_timeout(patience), Ok) {
            Ok(synced) => synced,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                self.jobs = None;
                let failed = || Err(io::Error::other("the thread that syncs cursors has died"));
                self.busy_with.iter().map(|place| (*place, failed())).collect()
            }
        };
        self.busy_with.clear();
        Some(synced)
    }
}

fn sync(files: Files) -> Synced {
    files.into_iter().map(|(place, file)| (place, file.sync_data())).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{
        super::{fs::SpoolFs, sim::SimFs},
        *,
    };

    /// Longer than anything takes here.
    const LONG: Duration = Duration::from_secs(20);

    #[derive(Debug)]
    struct Panics;

    impl SpoolFile for Panics {
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Ok(0)
        }

        fn write_at(&self, bytes: &[u8], _: u64) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn allocate(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn set_len(&self, _: u64) -> io::Result<()> {
            Ok(())
        }

        fn len(&self) -> io::Result<u64> {
            Ok(0)
        }

        fn sync_data(&self) -> io::Result<()> {
            panic!("the test's")
        }
    }

    #[test]
    fn a_thread_that_dies_is_a_sync_that_failed_and_the_next_one_is_made_without_it() {
        let mut syncer = CursorSyncer::start();
        assert!(syncer.ended(LONG).is_none(), "nothing was begun");
        syncer.begin(vec![(0, Arc::new(Panics)), (3, Arc::new(Panics))]);
        assert!(syncer.is_busy());
        let synced = syncer.ended(LONG).expect("it does not go on for ever");
        assert_eq!(synced.iter().map(|(place, _)| *place).collect::<Vec<_>>(), [0, 3]);
        assert!(synced.iter().all(|(_, synced)| synced.is_err()));
        assert!(!syncer.is_busy());

        let fs = SimFs::new(0);
        fs.create_dir(Path::new("/cursors")).unwrap();
        let file: Arc<dyn SpoolFile> = fs.create(Path::new("/cursors/a")).unwrap().into();
        syncer.begin(vec![(1, file)]);
        let synced = syncer.ended(Duration::ZERO).expect("it was made here");
        assert!(matches!(synced[..], [(1, Ok(()))]), "{synced:?}");
    }
}
