//! The body of a call: in time, within the budget and the limits, inflated, as text.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

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
/// What is read and thrown away of a body that is refused, so that its caller reads the
/// answer and not a broken connection; and how long.
const REST_BYTES_MAX: usize = 8 * 1024 * 1024;
const REST_TIMEOUT: Duration = Duration::from_secs(2);
/// Steps in which room is held for what has no length of its own.
const STEP_BYTES: usize = 64 * 1024;
const BYTE_ORDER_MARK: char = '\u{feff}';

/// A body as text, and what it holds of the budget.
#[derive(Debug)]
pub(super) struct Text {
    pub(super) text: String,
    pub(super) held: Option<Held>,
}

/// Reads a body of at most so many bytes, as they come and as they inflate.
pub(super) async fn read(
    headers: &HeaderMap,
    body: impl CallBody,
    bytes_max: usize,
    receiving: &Arc<Receiving>,
) -> Result<Text, Problem> {
    check_type(headers)?;
    let mut body = pin!(body);
    let received = timeout(BODY_TIMEOUT, receive(body.as_mut(), bytes_max, receiving)).await;
    let (bytes, held) = match received {
        Ok(Ok(received)) => received,
        Ok(Err(problem)) => {
            // Who asks first is told before anything comes.
            if !headers.contains_key(EXPECT) {
                let _ = timeout(REST_TIMEOUT, throw_away(body)).await;
            }
            return Err(problem);
        }
        Err(_) => return Err(Problem::Late),
    };
    let (bytes, held) = match encoding(headers, &bytes)? {
        Encoding::Identity => (bytes, held),
        Encoding::Gzip => inflate(&bytes, bytes_max, receiving)?,
    };
    let text = String::from_utf8(bytes)
        .map_err(|error| Problem::malformed("", format!("the body is not UTF-8: {}", error.utf8_error())))?;
    let text = match text.strip_prefix(BYTE_ORDER_MARK) {
        Some(text) => text.to_owned(),
        None => text,
    };
    Ok(Text { text: without_lone_surrogates(&text).unwrap_or(text), held })
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
        let whole = length.unwrap_or(bytes.len() + data.len());
        if bytes.len() + data.len() < whole || length.is_none() {
            hold(receiving, &mut held, whole).map_err(Problem::Denied)?;
        }
        bytes.reserve_exact(whole.saturating_sub(bytes.len()));
        bytes.extend_from_slice(&data);
    }
    Ok((bytes, held))
}

/// Holds at least so many bytes, in steps.
fn hold(receiving: &Arc<Receiving>, held: &mut Option<Held>, bytes: usize) -> Result<(), Denied> {
    match held {
        None => *held = Some(receiving.hold(bytes)?),
        Some(held) if held.bytes() < bytes => held.grow(STEP_BYTES.max(bytes - held.bytes()))?,
        Some(_) => {}
    }
    Ok(())
}

async fn throw_away<B: CallBody>(mut body: Pin<&mut B>) {
    let mut rest = 0;
    while let Some(Ok(frame)) = body.frame().await {
        rest += frame.data_ref().map_or(0, bytes::Bytes::len);
        if rest > REST_BYTES_MAX {
            return;
        }
    }
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
    use std::io::Write;

    use bytes::Bytes;
    use flate2::{Compression, write::GzEncoder};
    use futures_util::{StreamExt, stream};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use prometheus_client::metrics::counter::Counter;
    use tonic::Status;

    use super::*;
    use crate::{
        ingest::budget::ReceiveBudget,
        listener::{Peer, Slot},
    };

    fn receiving(bytes_max: usize) -> Arc<Receiving> {
        ReceiveBudget::new(bytes_max, Counter::default())
            .connection(Peer::for_test("127.0.0.1"), Slot::Regular)
    }

    fn frames(pieces: &[&[u8]]) -> Vec<Result<Frame<Bytes>, Status>> {
        pieces.iter().map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect()
    }

    async fn read_of(pieces: &[&[u8]], bytes_max: usize) -> Result<String, Problem> {
        let (headers, receiving) = (HeaderMap::new(), receiving(64 << 20));
        let body = StreamBody::new(stream::iter(frames(pieces)));
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

    /// What is held while it comes is given back, and more than there is room for is
    /// refused before it is here.
    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_given_up_and_holds_nothing_after() {
        let (headers, receiving) = (HeaderMap::new(), receiving(2 << 20));
        let waiting = || StreamBody::new(stream::iter(frames(&[b"{"])).chain(stream::pending()));
        let first = read(&headers, waiting(), 1 << 20, &receiving).await;
        assert!(matches!(first, Err(Problem::Late)), "{first:?}");
        let all = receiving.hold(2 << 20).expect("nothing is held any more");
        let refused = read(&headers, waiting(), 1 << 20, &receiving).await;
        assert!(matches!(refused, Err(Problem::Denied(Denied::ReceivingTooMuch { .. }))), "{refused:?}");
        drop(all);
    }
}
