//! Words on standard error that nobody waits for.

use std::{sync::mpsc, thread, time::Duration};

use super::log_writer::{Stream, write_some};

/// Says something on standard error, and waits for it no longer than `patience`:
/// who reads there may hang, be gone, or have a full disk.
pub(crate) fn say_on_stderr(text: String, patience: Duration) {
    let (said, saying) = mpsc::sync_channel(1);
    let thread = thread::Builder::new().name("stderr".to_owned()).spawn(move || {
        write_some(&mut Stream::Stderr, text.as_bytes());
        let _ = said.send(());
    });
    if thread.is_ok() {
        let _ = saying.recv_timeout(patience);
    }
}
