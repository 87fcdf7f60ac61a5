//! What a call's messages come in, whichever door it is for.

use std::{error::Error, future::poll_fn, pin::Pin, sync::Arc};

use bytes::Bytes;
use http_body::{Body, Frame};

use super::budget::{Held, Receiving};
use crate::admission::denied::Denied;

/// A body as hyper hands it over, or a test.
pub(crate) trait CallBody:
    Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>> + Send> + Send + 'static
{
}

impl<B: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>> + Send> + Send + 'static> CallBody
    for B
{
}

/// The next frame of a body; nothing at its end. What a call costs that waits is held
/// from the first time on that there is none yet: most bodies are here with their call,
/// and nothing is waited for.
#[inline]
pub(super) async fn next_frame<B: CallBody>(
    mut body: Pin<&mut B>,
    receiving: &Arc<Receiving>,
    held_call: &mut Option<Held>,
) -> Result<Option<Result<Frame<Bytes>, B::Error>>, Denied> {
    poll_fn(|cx| {
        let frame = body.as_mut().poll_frame(cx);
        if frame.is_pending() && held_call.is_none() {
            *held_call = Some(receiving.hold_call()?);
        }
        frame.map(Ok)
    })
    .await
}
