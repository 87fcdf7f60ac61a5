//! A thread that syncs cursors, so that callers do not wait for the disk longer
//! than their own group takes.

use std::{
    io,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
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
    /// None if the system gives no thread: then they are synced here.
    jobs: Option<Sender<Files>>,
    done_here: Sender<Synced>,
    done: Receiver<Synced>,
    is_busy: bool,
}

impl CursorSyncer {
    pub(super) fn start() -> Self {
        let (jobs, files) = mpsc::channel::<Files>();
        let (done_here, done) = mpsc::channel();
        let results = done_here.clone();
        let work = move || {
            for files in files {
                // Nobody listens any more once the log is closed.
                let _ = results.send(sync(files));
            }
        };
        let running = thread::Builder::new().name("spool-cursors".to_owned()).spawn(work);
        Self { jobs: running.is_ok().then_some(jobs), done_here, done, is_busy: false }
    }

    /// True while files are being synced.
    pub(super) fn is_busy(&self) -> bool {
        self.is_busy
    }

    /// Begins to sync files; only if it is not busy.
    pub(super) fn begin(&mut self, files: Files) {
        self.is_busy = true;
        let files = match &self.jobs {
            Some(jobs) => jobs.send(files).err().map(|mpsc::SendError(files)| files),
            None => Some(files),
        };
        if let Some(files) = files {
            self.done_here.send(sync(files)).expect("we hold the receiver");
        }
    }

    /// What came of it, if it is over, or will be soon enough.
    pub(super) fn ended(&mut self, patience: Duration) -> Option<Synced> {
        if !self.is_busy {
            return None;
        }
        let ended = self.done.recv_timeout(patience).ok();
        self.is_busy = ended.is_none();
        ended
    }
}

fn sync(files: Files) -> Synced {
    files.into_iter().map(|(place, file)| (place, file.sync_data())).collect()
}
