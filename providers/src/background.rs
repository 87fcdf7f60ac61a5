//! Work that takes long and that no caller waits for.

use std::{cell::Cell, thread};

use tokio::task::{JoinHandle, spawn_blocking};

thread_local! {
    /// Items that are left before this thread gives way; nothing while it does no
    /// such work.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Items between two times of giving way: some tenths of a millisecond.
const ITEMS: u32 = 100;

/// Does some work on a thread of the blocking pool. See [`give_way`].
pub fn spawn_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    spawn_blocking(move || {
        let _working = Working::begin();
        work()
    })
}

/// Lets the threads that serve callers go first, if this is such work; to be called
/// for each item of it. Where there are too few cores for everything the scheduler
/// would let a thread that has begun go on for milliseconds, and callers would wait
/// for it after all. Its share of the core it keeps.
pub fn give_way() {
    match LEFT.get() {
        None => {}
        Some(0) => {
            LEFT.set(Some(ITEMS));
            thread::yield_now();
        }
        Some(left) => LEFT.set(Some(left - 1)),
    }
}

/// Marks a thread as long as it works, also if the work panics.
struct Working;

impl Working {
    fn begin() -> Self {
        LEFT.set(Some(ITEMS));
        Self
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        LEFT.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_background_work_gives_way_and_only_while_it_lasts() {
        give_way();
        assert_eq!(LEFT.get(), None);
        let work = || {
            (0..=ITEMS).for_each(|_| give_way());
            LEFT.get()
        };
        assert_eq!(spawn_background(work).await.unwrap(), Some(ITEMS), "it has given way once");
        assert!(spawn_background(|| panic!("as a provider's code may")).await.is_err());
        assert_eq!(spawn_blocking(|| LEFT.get()).await.unwrap(), None);
    }
}
