//! Log lines of a lane: a busy one writes ten of a kind in a second, and then
//! one that stands for the others.

use std::time::Instant as StdInstant;

use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::telemetry::{HeldBack, LogBudget};

/// What a lane says often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    Flushed,
    InPart,
    Retrying,
    Splitting,
    Full,
    Letters,
    Lost,
}

impl Line {
    const ALL: [Self; 7] =
        [Self::Flushed, Self::InPart, Self::Retrying, Self::Splitting, Self::Full, Self::Letters, Self::Lost];
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Lines {
    budgets: [LogBudget; Line::ALL.len()],
}

impl Lines {
    /// True if a line about so many events is written now.
    pub(super) fn take(&mut self, line: Line, events: usize) -> bool {
        self.budgets[line as usize].takes(events, now())
    }

    /// When a line has to stand for others.
    pub(super) fn due_at(&self) -> Option<Instant> {
        self.budgets.iter().filter_map(LogBudget::due_at).min().map(Instant::from_std)
    }

    /// Writes the lines that stand for others and are due.
    pub(super) fn sum_up(&mut self, provider: &'static str) {
        let now = now();
        if self.due_at().is_some_and(|due_at| due_at.into_std() <= now) {
            self.write(provider, |budget| budget.due(now));
        }
    }

    /// Writes them all, at the end.
    pub(super) fn sum_up_rest(&mut self, provider: &'static str) {
        self.write(provider, LogBudget::rest);
    }

    fn write(&mut self, provider: &'static str, held: impl Fn(&mut LogBudget) -> Option<HeldBack>) {
        for line in Line::ALL {
            let Some(HeldBack { lines, events }) = held(&mut self.budgets[line as usize]) else { continue };
            match line {
                Line::Flushed => info!(provider, event_count = events, lines, "batch flushed successfully"),
                Line::InPart => warn!(provider, event_count = events, lines, "batch taken in part"),
                Line::Retrying => warn!(provider, event_count = events, lines, "batch send failed, retrying"),
                Line::Splitting => {
                    warn!(provider, event_count = events, lines, "batch send failed, splitting");
                }
                Line::Full => {
                    error!(provider, lines, "lane is full: new events become dead letters");
                }
                Line::Letters => error!(provider, event_count = events, lines, "events become dead letters"),
                Line::Lost => error!(provider, event_count = events, lines, "events lost"),
            }
        }
    }
}

/// By the clock of the lane, which tests stop.
fn now() -> StdInstant {
    Instant::now().into_std()
}
