//! The thread that writes log lines, and what waits for it.
//!
//! Who logs copies a line into a bounded buffer and goes on; the thread takes all
//! that has come and writes it. A reader that hangs blocks the thread and nobody
//! else. What finds no room, or cannot be written, is lost and counted, and once
//! lines flow again a line says how many there were.
//!
//! `tracing-appender` does a part of this: it bounds lines and not bytes, does
//! not count what cannot be written, and prints to standard error at its end.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use tracing::warn;

/// Bytes that may wait; as many again may be under way.
const BYTES_MAX: usize = 2 * 1024 * 1024;
/// Lines that may wait.
const LINES_MAX: usize = 16 * 1024;
/// Memory that an empty buffer keeps.
const BYTES_KEPT: usize = 64 * 1024;
/// Bytes that are written at once. A pipe takes so much whole or not at all
/// (`PIPE_BUF`), so lines of two processes do not mix.
const CHUNK_BYTES: usize = 4096;
/// Pause when a stream that does not block has no room.
const NO_ROOM_PAUSE: Duration = Duration::from_millis(10);
/// How often it is told at most that lines were lost.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// Lines that this process has lost. One for the process, as are the streams.
pub(super) fn lines_lost() -> Counter {
    static LINES_LOST: OnceLock<Counter> = OnceLock::new();
    LINES_LOST.get_or_init(Counter::default).clone()
}

/// Where lines go.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub(super) fn is_terminal(self) -> bool {
        match self {
            Self::Stdout => io::stdout().is_terminal(),
            Self::Stderr => io::stderr().is_terminal(),
        }
    }
}

/// Past the standard library's own buffer and lock: who hangs in a write must
/// hold no lock that the end of the process takes.
impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self {
            Self::Stdout => rustix::io::write(io::stdout(), bytes),
            Self::Stderr => rustix::io::write(io::stderr(), bytes),
        };
        Ok(written?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct LogBuffer {
    waiting: Mutex<Waiting>,
    /// The thread sleeps here.
    come: Condvar,
    /// Who waits for the last line sleeps here.
    flushed: Condvar,
    lost: Counter,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Lines,
    writer: Option<ThreadId>,
    /// The thread sleeps and has to be woken.
    idle: bool,
    /// Somebody waits until everything is written.
    flushing: bool,
}

impl Default for LogBuffer {
    fn default() -> Self {
        Self::counting(lines_lost())
    }
}

/// Each line of the logs comes as one write.
impl Write for &LogBuffer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogBuffer {
    fn counting(lost: Counter) -> Self {
        Self { waiting: Mutex::default(), come: Condvar::new(), flushed: Condvar::new(), lost }
    }

    /// Leaves a line to the thread, or loses it if there is no room.
    pub(super) fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        // What the thread says of lost lines, once a second, is not one of them.
        let has_room = waiting.lines.has_room(line) || waiting.writer == Some(thread::current().id());
        if !has_room {
            drop(waiting);
            self.lost.inc();
            return;
        }
        waiting.lines.push(line);
        let must_wake = std::mem::take(&mut waiting.idle);
        drop(waiting);
        if must_wake {
            self.come.notify_one();
        }
    }

    /// Waits until every line is written or lost, but no longer than `patience`.
    pub(super) fn flush(&self, patience: Duration) {
        let mut waiting = self.lock();
        waiting.flushing = true;
        waiting.idle = false;
        self.come.notify_one();
        let flushed = self.flushed.wait_timeout_while(waiting, patience, |waiting| waiting.flushing);
        drop(flushed);
    }

    /// Without a thread, which a machine may refuse, all lines are lost, counted.
    pub(super) fn write_in_a_thread(self: Arc<Self>, stream: Stream) {
        let _ = thread::Builder::new().name("logs".to_owned()).spawn(move || self.write_to(stream));
    }

    /// The thread.
    fn write_to(&self, mut sink: impl Write) {
        self.lock().writer = Some(thread::current().id());
        let mut lines = Lines::default();
        let mut output = Output::default();
        loop {
            let has_untold = output.flows && self.lost.get() > output.told;
            self.take(&mut lines, has_untold.then(|| output.tells_at()));
            let untold = self.lost.get() - output.told;
            if output.flows && untold > 0 && (self.is_flushing() || output.tells_at() <= Instant::now()) {
                output.told += untold;
                output.told_at = Some(Instant::now());
                warn!(lines = untold, "log lines were lost");
            }
            self.lost.inc_by(output.write(&mut sink, &lines));
            lines.clear();
        }
    }

    /// Waits for lines, or until it is time to tell of lost ones, if there are
    /// any to be told of.
    fn take(&self, lines: &mut Lines, tells_at: Option<Instant>) {
        let mut waiting = self.lock();
        if waiting.lines.is_empty() && waiting.flushing {
            if tells_at.is_some() {
                return;
            }
            waiting.flushing = false;
            self.flushed.notify_all();
        }
        waiting.idle = true;
        let nothing = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.flushing;
        let mut waiting = match tells_at.map(|at| at.saturating_duration_since(Instant::now())) {
            Some(time) => {
                let woken = self.come.wait_timeout_while(waiting, time, nothing);
                woken.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.come.wait_while(waiting, nothing).unwrap_or_else(PoisonError::into_inner),
        };
        waiting.idle = false;
        std::mem::swap(lines, &mut waiting.lines);
    }

    fn is_flushing(&self) -> bool {
        self.lock().flushing
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lines one after another.
#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Lines {
    fn has_room(&self, line: &[u8]) -> bool {
        self.bytes.len() + line.len() <= BYTES_MAX && self.ends.len() < LINES_MAX
    }

    fn push(&mut self, line: &[u8]) {
        self.bytes.extend_from_slice(line);
        self.ends.push(self.bytes.len());
    }

    fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Whole lines, as many as are written at once; a longer one alone.
    fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = if next == 0 { 0 } else { self.ends[next - 1] };
            let ends = &self.ends[next..];
            let fit = ends.partition_point(|end| end - start <= CHUNK_BYTES).max(1).min(ends.len());
            let end = *ends.get(fit.checked_sub(1)?)?;
            next += fit;
            Some(Chunk { bytes: &self.bytes[start..end], start, ends: &ends[..fit] })
        })
    }

    fn clear(&mut self) {
        if self.bytes.capacity() > BYTES_KEPT {
            *self = Self::default();
        } else {
            self.bytes.clear();
            self.ends.clear();
        }
    }
}

/// Lines that are written at once.
struct Chunk<'a> {
    bytes: &'a [u8],
    /// What `ends` count from.
    start: usize,
    ends: &'a [usize],
}

/// What the thread knows of its stream.
#[derive(Debug, Default)]
struct Output {
    /// The last line got through.
    flows: bool,
    /// It ends in the middle of a line.
    torn: bool,
    /// Lost lines that were told of,
    told: u64,
    /// and when.
    told_at: Option<Instant>,
}

impl Output {
    /// Writes lines; returns how many of them are lost. Waits as long as the
    /// stream does.
    fn write(&mut self, sink: &mut impl Write, lines: &Lines) -> u64 {
        let mut lost = 0;
        for chunk in lines.chunks() {
            // What was cut off must cost no other line.
            self.torn = self.torn && write_some(sink, b"\n") == 0;
            let written = if self.torn { 0 } else { write_some(sink, chunk.bytes) };
            let whole = chunk.ends.partition_point(|end| end - chunk.start <= written);
            let whole_bytes = whole.checked_sub(1).map_or(0, |last| chunk.ends[last] - chunk.start);
            self.torn |= written > whole_bytes;
            self.flows = whole == chunk.ends.len();
            lost += (chunk.ends.len() - whole) as u64;
        }
        lost
    }

    /// When lost lines are told of, if there are any.
    fn tells_at(&self) -> Instant {
        self.told_at.map_or_else(Instant::now, |told_at| told_at + TELL_INTERVAL)
    }
}

/// Writes until the stream fails; returns how many bytes it took.
pub(super) fn write_some(sink: &mut impl Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match sink.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(NO_ROOM_PAUSE),
            Err(_) => break,
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Takes so many bytes, then fails until there is room again.
    #[derive(Default)]
    struct Disk {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let taken = bytes.len().min(self.room);
            self.taken.extend_from_slice(&bytes[..taken]);
            self.room -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Each write waits until the test takes it.
    struct Reader(mpsc::SyncSender<Vec<u8>>);

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines(lines: &[&str]) -> Lines {
        let mut all = Lines::default();
        lines.iter().for_each(|line| all.push(line.as_bytes()));
        all
    }

    fn running(sink: impl Write + Send + 'static) -> (Arc<LogBuffer>, Counter) {
        let lost = Counter::default();
        let buffer = Arc::new(LogBuffer::counting(lost.clone()));
        let writing = buffer.clone();
        thread::spawn(move || writing.write_to(sink));
        (buffer, lost)
    }

    #[test]
    fn a_line_that_is_cut_off_by_a_full_disk_costs_no_other_line() {
        let mut output = Output::default();
        for room in 0..24 {
            let mut disk = Disk { room, ..Disk::default() };
            let lost = output.write(&mut disk, &lines(&["first\n", "second\n", "third\n"]));
            assert_eq!(output.flows, lost == 0);
            disk.room = 100;
            assert_eq!(output.write(&mut disk, &lines(&["fourth\n"])), 0);
            assert!(output.flows);
            let text = String::from_utf8(disk.taken).unwrap();
            let whole = |line: &&str| ["first", "second", "third", "fourth"].contains(line);
            // Of a line that has lost its end only, nothing is missing.
            let ends_cut = u64::from([5, 12, 18].contains(&room));
            assert_eq!(text.lines().filter(whole).count() as u64, 4 - lost + ends_cut, "{room} {text:?}");
        }
    }

    #[test]
    fn a_stream_that_would_have_to_wait_is_tried_again() {
        struct Terminal(Vec<u8>, usize);
        impl Write for Terminal {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.1 += 1;
                match self.1 % 3 {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    1 => Err(io::ErrorKind::Interrupted.into()),
                    _ => self.0.write(&bytes[..1]),
                }
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut terminal = Terminal(Vec::new(), 0);
        assert_eq!(Output::default().write(&mut terminal, &lines(&["one\n", "two\n"])), 0);
        assert_eq!(terminal.0, b"one\ntwo\n");
    }

    #[test]
    fn lines_are_written_whole_and_as_many_at_once_as_a_pipe_takes() {
        let line = "x".repeat(999) + "\n";
        let long = "y".repeat(9_999) + "\n";
        let all = lines(&[&line, &line, &long, &line, &line, &line, &line, &line]);
        let sizes: Vec<_> = all.chunks().map(|chunk| (chunk.bytes.len(), chunk.ends.len())).collect();
        assert_eq!(sizes, [(2_000, 2), (10_000, 1), (4_000, 4), (1_000, 1)]);
        assert_eq!(Lines::default().chunks().count(), 0);
    }

    #[test]
    fn lines_come_in_their_order_and_a_flush_waits_for_the_last() {
        let (sender, received) = mpsc::sync_channel(10_000);
        let (buffer, lost) = running(Reader(sender));
        let text: Vec<_> = (0..5_000).map(|turn| format!("line {turn}\n")).collect();
        text.iter().for_each(|line| buffer.push(line.as_bytes()));
        buffer.flush(Duration::from_secs(30));
        let written: Vec<u8> = received.try_iter().flatten().collect();
        assert_eq!((String::from_utf8(written).unwrap(), lost.get()), (text.concat(), 0));
    }

    #[test]
    fn a_reader_that_hangs_costs_lines_over_the_bounds_and_no_time() {
        let line = "x".repeat(99) + "\n";
        for (line, fit) in [(line.as_str(), LINES_MAX), (&line.repeat(10), BYTES_MAX / 1_000)] {
            let (sender, received) = mpsc::sync_channel(0);
            let (buffer, lost) = running(Reader(sender));
            buffer.push(b"under way\n");
            // Until the thread has taken it, and hangs.
            while !buffer.lock().lines.is_empty() {
                thread::yield_now();
            }
            for _ in 0..fit + 70 {
                buffer.push(line.as_bytes());
            }
            assert_eq!(lost.get(), 70);
            buffer.flush(Duration::from_millis(20));
            // The reader is gone: what is left is lost too.
            drop(received);
            buffer.flush(Duration::from_secs(30));
            assert_eq!(lost.get(), 70 + 1 + fit as u64);
        }
    }
}
