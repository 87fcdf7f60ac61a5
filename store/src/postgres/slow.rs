//! What takes long of the server is told: by its name, and nothing else.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// What took long since the store was opened.
#[derive(Debug)]
pub(super) struct Slow {
    /// From here on it is told.
    after: Duration,
    count: AtomicU64,
}

impl Slow {
    pub(super) fn after(after: Duration) -> Self {
        Self { after, count: AtomicU64::default() }
    }

    /// How often.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Times what the server is asked from now on, until this is dropped. Whoever waits for a
    /// turn, a connection or others who write does that before: the server is not to blame.
    pub(super) fn watch(&self, what: &'static str) -> Watch<'_> {
        Watch { slow: self, what, since: Instant::now() }
    }
}

/// See [`Slow::watch`].
#[derive(Debug)]
pub(super) struct Watch<'s> {
    slow: &'s Slow,
    what: &'static str,
    since: Instant,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let (what, took) = (self.what, self.since.elapsed());
        if took >= self.slow.after {
            self.slow.count.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(what, ms = took.as_millis() as u64, "the store's server took long");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fmt::{Debug, Write},
        sync::{Arc, Mutex},
    };

    use tracing::{Metadata, Subscriber, field::Field, span};

    use super::*;

    /// Keeps what is told.
    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<String>>);

    impl Subscriber for Told {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }

        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            let mut told = self.0.lock().unwrap();
            write!(told, "{}", event.metadata().level()).unwrap();
            event.record(&mut |field: &Field, value: &dyn Debug| write!(told, " {field}={value:?}").unwrap());
        }

        fn enter(&self, _: &span::Id) {}

        fn exit(&self, _: &span::Id) {}
    }

    fn told(after: Duration) -> (u64, String) {
        let (slow, told) = (Slow::after(after), Told::default());
        tracing::subscriber::with_default(told.clone(), || drop(slow.watch("append")));
        (slow.count(), told.0.lock().unwrap().clone())
    }

    #[test]
    fn what_took_long_is_told_by_its_name_and_counted_and_nothing_else_is() {
        let (count, text) = told(Duration::ZERO);
        assert_eq!(count, 1);
        assert!(text.starts_with("WARN ") && text.contains("the store's server took long"), "{text}");
        assert!(text.contains(r#" what="append""#) && text.contains(" ms="), "{text}");
        assert_eq!(told(Duration::MAX), (0, String::new()));
    }
}
