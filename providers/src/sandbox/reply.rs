//! The bodies of answers, including those that arrive slowly or not at all.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use hyper::body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::line::Line;
use super::state::InFlight;

/// How long the first half of an answer may take to reach the client before the
/// reset, which would discard what is still to be sent.
const FLUSH: Duration = Duration::from_millis(30);
const FILLER: &[u8] = &[b'a'; 64 * 1024];

/// Why an answer is missing, wholly or in part: the sandbox meant to.
#[derive(Debug)]
pub(super) struct Cut;

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the sandbox cut the connection")
    }
}

impl std::error::Error for Cut {}

impl From<Infallible> for Cut {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

/// An answer's body. Holds the request in flight until it is sent.
pub(super) struct ReplyBody {
    pace: Pace,
    _in_flight: Option<InFlight>,
}

enum Pace {
    /// At once; None when done.
    Whole(Option<Bytes>),
    /// A byte after each pause.
    Drip { rest: Bytes, pause: Duration, timer: Pin<Box<Sleep>> },
    /// Announces `total` bytes, sends the first of them, then resets.
    Half { total: u64, first: Option<Bytes>, timer: Option<Pin<Box<Sleep>>>, line: Arc<Line> },
    /// This many bytes of nothing in particular.
    Filler { left: u64 },
}

impl ReplyBody {
    pub(super) fn whole(body: Bytes) -> Self {
        Self::new(Pace::Whole(Some(body).filter(|body| !body.is_empty())))
    }

    pub(super) fn drip(body: Bytes, pause: Duration) -> Self {
        Self::new(Pace::Drip { rest: body, pause, timer: Box::pin(sleep(pause)) })
    }

    pub(super) fn half(body: &Bytes, line: Arc<Line>) -> Self {
        let first = Some(body.slice(..body.len() / 2));
        Self::new(Pace::Half { total: body.len() as u64, first, timer: None, line })
    }

    pub(super) fn filler(bytes: u64) -> Self {
        Self::new(Pace::Filler { left: bytes })
    }

    /// Keeps the request in flight for as long as this body lives.
    pub(super) fn holding(self, in_flight: InFlight) -> Self {
        Self { _in_flight: Some(in_flight), ..self }
    }

    fn new(pace: Pace) -> Self {
        Self { pace, _in_flight: None }
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let next = match &mut self.pace {
            Pace::Whole(body) => body.take(),
            Pace::Drip { rest, .. } if rest.is_empty() => None,
            Pace::Drip { rest, pause, timer } => {
                ready!(timer.as_mut().poll(cx));
                *timer = Box::pin(sleep(*pause));
                Some(rest.split_to(1))
            }
            Pace::Half { first, timer, line, .. } => match first.take() {
                Some(half) => Some(half),
                None => {
                    // Pending makes the server flush what it has.
                    ready!(timer.get_or_insert_with(|| Box::pin(sleep(FLUSH))).as_mut().poll(cx));
                    line.reset();
                    return Poll::Ready(Some(Err(Cut)));
                }
            },
            Pace::Filler { left: 0 } => None,
            Pace::Filler { left } => {
                let chunk = Bytes::from_static(FILLER);
                let size = usize::try_from(*left).map_or(chunk.len(), |left| left.min(chunk.len()));
                *left -= size as u64;
                Some(chunk.slice(..size))
            }
        };
        Poll::Ready(next.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.pace {
            Pace::Whole(body) => body.is_none(),
            Pace::Drip { rest, .. } => rest.is_empty(),
            Pace::Half { .. } => false,
            Pace::Filler { left } => *left == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        let exactly = match &self.pace {
            Pace::Whole(body) => body.as_ref().map_or(0, |body| body.len() as u64),
            Pace::Drip { rest, .. } => rest.remaining() as u64,
            Pace::Half { total, .. } => *total,
            // Undeclared: a client must find out for itself that it has had enough.
            Pace::Filler { .. } => return SizeHint::default(),
        };
        SizeHint::with_exact(exactly)
    }
}
