//! Work that takes long and that no caller waits for.

use std::cell::Cell;

use tokio::task::{JoinHandle, spawn_blocking};

/// How far such work stands back when there are too few cores for everything. A
/// tenth of the weight of a thread that serves callers.
const NICENESS: i32 = 10;

thread_local! {
    static HAS_STEPPED_BACK: Cell<bool> = const { Cell::new(false) };
}

/// Does some work on a thread of the blocking pool, behind the threads that serve
/// callers: else each such thread would take as large a share of a core as they
/// have, and callers would wait for it after all.
pub fn spawn_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    spawn_blocking(move || {
        step_back();
        work()
    })
}

/// Lets other threads go first, if this one has stepped back; to be called after each
/// item of a long work. The scheduler alone would give a thread that has begun its
/// share of some milliseconds.
pub fn give_way() {
    /// Items between two times: some tenths of a millisecond.
    const ITEMS: u32 = 100;
    thread_local! {
        static LEFT: Cell<u32> = const { Cell::new(ITEMS) };
    }
    if !HAS_STEPPED_BACK.get() {
        return;
    }
    match LEFT.get() {
        0 => {
            LEFT.set(ITEMS);
            std::thread::yield_now();
        }
        left => LEFT.set(left - 1),
    }
}

/// Lowers the priority of this thread, once, as [`spawn_background`] does.
pub fn step_back() {
    // Elsewhere it would be the whole process that steps back.
    if cfg!(target_os = "linux") && !HAS_STEPPED_BACK.replace(true) {
        // A system that forbids it only makes callers wait longer.
        let _ = rustix::process::nice(NICENESS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn work_steps_back_once_and_nobody_else_does() {
        let mine = || rustix::process::getpriority_process(None).unwrap();
        let before = mine();
        for _ in 0..2 {
            assert_eq!(spawn_background(mine).await.unwrap(), (before + NICENESS).min(19));
        }
        assert_eq!(mine(), before);
    }
}
