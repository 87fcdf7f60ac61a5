//! Notices when a stage ends, by a panic too.

use tokio::sync::mpsc;

/// Wraps stages; the receiver gets the name of each that ends.
#[derive(Debug, Clone)]
pub(super) struct StageWatch(mpsc::UnboundedSender<&'static str>);

impl StageWatch {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<&'static str>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    pub(super) fn over<F: Future>(
        &self,
        stage: &'static str,
        running: F,
    ) -> impl Future<Output = F::Output> + use<F> {
        let ended = self.guard(stage);
        async move {
            let _ended = ended;
            running.await
        }
    }

    /// For a stage that is a thread: it ends when this is dropped.
    pub(super) fn guard(&self, stage: &'static str) -> Ended {
        Ended(stage, self.0.clone())
    }
}

/// Says when it is dropped.
pub(super) struct Ended(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Nobody listens any more once the relay drains.
        let _ = self.1.send(self.0);
    }
}
