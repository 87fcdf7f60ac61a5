//! Events of users who are erased: none is sent, kept as a dead letter or spilled any more,
//! also of those that were in the lane before.

use std::sync::Arc;

use analytics_relay_providers::Event;
use tokio::sync::watch;
use tracing::info;

use super::{Lane, RequestNumber};
use crate::{
    privacy::suppression::Suppressed,
    reasons::{DropReason, Outcome},
};

/// What a lane knows of erased users.
#[derive(Debug)]
pub(super) struct Erasing {
    suppressed: Option<Arc<Suppressed>>,
    changed: watch::Receiver<u64>,
    /// The generation of the list that is being kept to, as far as the lane is.
    under_way: Option<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    generation: u64,
    /// Requests before this one may bring events back.
    before: RequestNumber,
    /// What may have brought some back since the lane was last looked through: those
    /// requests, and a write of dead letters.
    out: Option<(usize, bool)>,
}

impl Default for Erasing {
    fn default() -> Self {
        Self { suppressed: None, changed: watch::Sender::new(0).subscribe(), under_way: None }
    }
}

impl Erasing {
    /// Waits until the list has changed; for ever if there is none.
    pub(super) async fn changed(&mut self) {
        if self.changed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Lane {
    /// Leaves out the events of those who are suppressed.
    pub(crate) fn leave_out(&mut self, suppressed: Arc<Suppressed>) {
        let changed = suppressed.changes();
        self.status.set_keeps_to(suppressed.generation());
        self.erasing = Erasing { suppressed: Some(suppressed), changed, under_way: None };
    }

    /// True if the user of an event is erased.
    #[inline]
    pub(super) fn is_erased(&self, event: &Event) -> bool {
        let suppressed = self.erasing.suppressed.as_ref();
        suppressed.is_some_and(|list| list.covers_event(event))
    }

    /// The list has changed.
    pub(super) fn begin_to_erase(&mut self) {
        let generation = *self.erasing.changed.borrow_and_update();
        self.erasing.under_way = Some(UnderWay { generation, before: self.next_request, out: None });
    }

    /// Drops what the lane has of erased users, until nothing can bring any back; then says
    /// so.
    pub(super) fn erase_on(&mut self) {
        let Some(UnderWay { generation, before, out }) = self.erasing.under_way else { return };
        let requests = self.sent.values().filter(|sent| sent.number < before).count();
        let now_out = Some((requests, self.letters.is_writing()));
        if out != now_out {
            self.erasing.under_way = Some(UnderWay { generation, before, out: now_out });
            self.drop_erased();
        }
        if now_out == Some((0, false)) {
            self.erasing.under_way = None;
            self.status.set_keeps_to(generation);
        }
    }

    fn drop_erased(&mut self) {
        let Some(suppressed) = self.erasing.suppressed.clone() else { return };
        let is_erased = |event: &Event| suppressed.covers_event(event);
        let mut taken = self.backlog.take_where(|waiting| is_erased(&waiting.event));
        taken.extend(self.letters.take_where(|waiting| is_erased(&waiting.event)));
        taken.extend(self.parked.extract_if(.., |waiting| is_erased(&waiting.event)));
        if taken.is_empty() {
            return;
        }
        self.tell_erased(taken.len());
        self.end(&taken, Outcome::Dropped(DropReason::Erased));
    }

    /// Counts events of erased users. No loss, so no error.
    pub(super) fn tell_erased(&self, event_count: usize) {
        self.recorder.dropped(DropReason::Erased, event_count);
        info!(provider = self.provider.name(), event_count, "events of erased users are dropped");
    }
}
