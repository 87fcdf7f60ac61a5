//! The body of a call: in time, within the budget and the limits, inflated, as text.

use std::{pin::Pin, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use hyper::{
    HeaderMap,
    header::{CONTENT_ENCODING, CONTENT_TYPE, EXPECT},
};
use tokio::time::timeout;

use super::{json::without_lone_surrogates, reply::Problem};
use crate::{
    admission::denied::Denied,
    ingest::{
        budget::{Held, Receiving},
        call_body::{CallBody, next_frame},
        gzip::{self, NotInflated},
    },
};

/// Longest time for a body, from the call's head on: enough for what a phone sends.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// What is read and thrown away of a body that is refused, and how long.
const REST_BYTES_MAX: usize = 8 * 1024 * 1024;
const REST_TIMEOUT: Duration = Duration::from_secs(5);
/// Least room that is held for what has no length of its own.
const STEP_BYTES: usize = 64 * 1024;
const BYTE_ORDER_MARK: char = '\u{feff}';

/// A body as text, and what it holds of the budget.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) held: Option<Held>,
}

/// Reads a body of at most so many bytes, as they come and as they inflate.
pub(super) async fn read<B: CallBody>(
    headers: &HeaderMap,
    body: Pin<&mut B>,
    bytes_max: usize,
    receiving: &Arc<Receiving>,
) -> Result<Text, Problem> {
    check_type(headers)?;
    let received = timeout(BODY_TIMEOUT, receive(body, bytes_max, receiving)).await;
    let (bytes, mut held) = received.map_err(|_| Problem::Late)??;
    let bytes = match encoding(headers, &bytes)? {
        Encoding::Identity => bytes,
        Encoding::Gzip => {
            let (inflated, held_inflated) = inflate(&bytes, bytes_max, receiving)?;
            held = held_inflated;
            inflated
        }
    };
    Ok(Text { text: as_text(bytes)?, held })
}

/// A body's bytes as text, with what is mended in it.
pub(super) fn as_text(bytes: Vec<u8>) -> Result<String, Problem> {
    let mut text = String::from_utf8(bytes)
        .map_err(|error| Problem::malformed("", format!("the body is not UTF-8: {}", error.utf8_error())))?;
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    Ok(without_lone_surrogates(&text).unwrap_or(text))
}

/// Reads and throws away what is left of the body of a call that is refused, for a
/// while, so that its caller reads the answer and not a broken connection. Who asks
/// before it sends is told before anything comes.
pub(super) async fn throw_away<B: CallBody>(headers: &HeaderMap, mut body: Pin<&mut B>) {
    if body.is_end_stream() || headers.contains_key(EXPECT) {
        return;
    }
    let read = async {
        let mut rest = 0;
        while let Some(Ok(frame)) = body.frame().await {
            rest += frame.data_ref().map_or(0, bytes::Bytes::len);
            if rest > REST_BYTES_MAX {
                return;
            }
        }
    };
    let _ = timeout(REST_TIMEOUT, read).await;
}

async fn receive<B: CallBody>(
    mut body: Pin<&mut B>,
    bytes_max: usize,
    receiving: &Arc<Receiving>,
) -> Result<(Vec<u8>, Option<Held>), Problem> {
    let length = body.size_hint().exact().map(|length| usize::try_from(length).unwrap_or(usize::MAX));
    if length.is_some_and(|length| length > bytes_max) {
        return Err(Problem::TooLarge(bytes_max));
    }
    let (mut bytes, mut held, mut held_call) = (Vec::new(), None, None);
    loop {
        let frame = next_frame(body.as_mut(), receiving, &mut held_call).await;
        let Some(frame) = frame.map_err(Problem::Denied)? else { break };
        let frame = frame.map_err(|_| Problem::malformed("", "the body ends before its end"))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > bytes_max {
            return Err(Problem::TooLarge(bytes_max));
        }
        let came = bytes.len() + data.len();
        // What is here whole with its call is held by nobody: its events are next.
        if came > bytes.capacity() && length != Some(came) {
            // Of no length known, twice as much each time: it is copied that often.
            let room = length.unwrap_or_else(|| came.max(2 * bytes.capacity()));
            let room = room.min(bytes_max);
            hold(receiving, &mut held, room).map_err(Problem::Denied)?;
            bytes.reserve_exact(room - bytes.len());
        }
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, held))
}

/// Holds at least so many bytes.
fn hold(receiving: &Arc<Receiving>, held: &mut Option<Held>, bytes: usize) -> Result<(), Denied> {
    match held {
        None => *held = Some(receiving.hold(bytes)?),
        Some(held) if held.bytes() < bytes => held.grow(STEP_BYTES.max(bytes - held.bytes()))?,
        Some(_) => {}
    }
    Ok(())
}

/// Browsers send what needs no preflight, and any of it is JSON.
fn check_type(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(()) };
    let value = String::from_utf8_lossy(value.as_bytes());
    let media = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let is_json = matches!(
        media.as_str(),
        "" | "application/json"
            | "text/json"
            | "text/plain"
            | "application/x-www-form-urlencoded"
            | "application/octet-stream"
    ) || media.starts_with("application/") && media.ends_with("+json");
    if is_json { Ok(()) } else { Err(Problem::UnsupportedType(media.chars().take(60).collect())) }
}

enum Encoding {
    Identity,
    Gzip,
}

/// By its first bytes too: some proxies and SDKs lose the header.
fn encoding(headers: &HeaderMap, bytes: &[u8]) -> Result<Encoding, Problem> {
    const GZIP: [u8; 2] = [0x1F, 0x8B];
    let named = headers.get(CONTENT_ENCODING).map(|value| String::from_utf8_lossy(value.as_bytes()));
    match named.map(|name| name.trim().to_ascii_lowercase()).as_deref() {
        _ if bytes.starts_with(&GZIP) => Ok(Encoding::Gzip),
        None | Some("" | "identity") => Ok(Encoding::Identity),
        Some("gzip" | "x-gzip") => {
            Err(Problem::malformed("", "content-encoding: got gzip and a body that is none"))
        }
        Some(other) => Err(Problem::UnsupportedEncoding(other.chars().take(40).collect())),
    }
}

/// What a body inflates to, and what that holds.
fn inflate(
    compressed: &[u8],
    bytes_max: usize,
    receiving: &Arc<Receiving>,
) -> Result<(Vec<u8>, Option<Held>), Problem> {
    let mut held = None;
    match gzip::inflate(compressed, bytes_max, |bytes| hold(receiving, &mut held, bytes)) {
        Ok(bytes) => Ok((bytes, held)),
        Err(NotInflated::TooLarge) => Err(Problem::TooLarge(bytes_max)),
        Err(NotInflated::Malformed(error)) => Err(Problem::malformed("", error)),
        Err(NotInflated::NoRoom(denied)) => Err(Problem::Denied(denied)),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, pin::pin};

    use bytes::Bytes;
    use flate2::{Compression, write::GzEncoder};
    use futures_util::{StreamExt, stream};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use prometheus_client::metrics::counter::Counter;
    use tonic::Status;

    use super::*;
    use crate::{ingest::budget::ReceiveBudget, listener::Slot};

    fn receiving(bytes_max: usize) -> Arc<Receiving> {
        ReceiveBudget::new(bytes_max, Counter::default())
            .connection("127.0.0.1".parse().unwrap(), Slot::Regular)
    }

    fn frames(pieces: &[&[u8]]) -> Vec<Result<Frame<Bytes>, Status>> {
        pieces.iter().map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect()
    }

    async fn read_of(pieces: &[&[u8]], bytes_max: usize) -> Result<String, Problem> {
        let (headers, receiving) = (HeaderMap::new(), receiving(64 << 20));
        let body = pin!(StreamBody::new(stream::iter(frames(pieces))));
        read(&headers, body, bytes_max, &receiving).await.map(|read| read.text)
    }

    #[tokio::test]
    async fn a_body_is_read_however_it_is_cut_and_up_to_its_limit() {
        assert_eq!(read_of(&[b"{\"a\"", b":", b"1}"], 7).await.unwrap(), "{\"a\":1}");
        assert_eq!(read_of(&[], 7).await.unwrap(), "");
        assert!(matches!(read_of(&[b"{\"a\"", b":", b"12}"], 7).await, Err(Problem::TooLarge(7))));
        assert!(matches!(read_of(&[b"\xff"], 7).await, Err(Problem::Malformed { .. })));
    }

    #[tokio::test]
    async fn gzip_is_bounded_by_what_comes_out_and_must_be_whole() {
        let gzip = |bytes: &[u8]| {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let (fits, bomb) = (gzip(&[b'x'; 100_000]), gzip(&[b'x'; 100_001]));
        assert_eq!(read_of(&[&fits], 100_000).await.unwrap().len(), 100_000);
        assert!(matches!(read_of(&[&bomb], 100_000).await, Err(Problem::TooLarge(100_000))));
        assert!(matches!(read_of(&[&fits[..fits.len() - 1]], 100_000).await, Err(Problem::Malformed { .. })));
        assert!(matches!(read_of(&[&fits, b"more"], 100_000).await, Err(Problem::Malformed { .. })));
    }

    /// A body of a known length that is not here yet.
    struct Announced(u64);

    impl http_body::Body for Announced {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<Frame<Bytes>, Status>>> {
            match std::mem::replace(&mut self.0, 0) {
                0 => std::task::Poll::Pending,
                _ => std::task::Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"{"))))),
            }
        }

        fn size_hint(&self) -> http_body::SizeHint {
            http_body::SizeHint::with_exact(self.0)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_body_announces_is_held_from_its_first_bytes_on() {
        const CALL_BYTES: usize = 8 * 1024;
        let (headers, receiving) = (HeaderMap::new(), receiving(2 << 20));
        let body = pin!(Announced(1 << 20));
        let mut reading = pin!(read(&headers, body, 1 << 20, &receiving));
        assert!(futures_util::poll!(reading.as_mut()).is_pending());
        let left = (1 << 20) - CALL_BYTES;
        assert!(receiving.hold(left + 1).is_err());
        assert!(receiving.hold(left).is_ok());
        assert!(matches!(reading.await, Err(Problem::Late)));
        let large = read(&headers, pin!(Announced(1 << 20)), 1000, &receiving).await;
        assert!(matches!(large, Err(Problem::TooLarge(1000))), "before any of it is here");
    }

    /// What is held while it comes is given back, and more than there is room for is
    /// refused before it is here.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_given_up_and_holds_nothing_after() {
        let (headers, receiving) = (HeaderMap::new(), receiving(2 << 20));
        let waiting = || Box::pin(StreamBody::new(stream::iter(frames(&[b"{"])).chain(stream::pending())));
        let first = read(&headers, waiting().as_mut(), 1 << 20, &receiving).await;
        assert!(matches!(first, Err(Problem::Late)), "{first:?}");
        let all = receiving.hold(2 << 20).expect("nothing is held any more");
        let refused = read(&headers, waiting().as_mut(), 1 << 20, &receiving).await;
        assert!(matches!(refused, Err(Problem::Denied(Denied::ReceivingTooMuch { .. }))), "{refused:?}");
        drop(all);
    }
}
