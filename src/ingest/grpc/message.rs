//! The messages of a call, framed as gRPC frames them: whether one is compressed,
//! its length, its bytes.
//!
//! A message is counted against the budget from its head on, and has a time limit.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};
use tonic::{
    Status,
    codegen::http::{HeaderMap, HeaderName, HeaderValue},
    metadata::MetadataValue,
};

use super::refusal::malformed;
use crate::ingest::{
    budget::{Held, Receiving},
    call_body::{CallBody, next_frame},
    gzip::{self, NotInflated},
};

/// Before a message: whether it is compressed, and its length.
pub(super) const HEAD_BYTES: usize = 5;
/// Longest time for a message, from its first byte on; for a call's one message from
/// the call's head on.
pub(super) const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// What callers may compress with. Told where it costs one event nothing: with each
/// stream, and with a refusal of what they did compress with.
pub(super) const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
pub(super) const ENCODINGS: HeaderValue = HeaderValue::from_static("identity,gzip");

/// What a call's messages may be.
pub(super) struct Rules {
    /// Most bytes of one, compressed or not.
    pub(super) bytes_max: usize,
    /// The call's metadata, which says how they are compressed.
    pub(super) metadata: HeaderMap,
    pub(super) receiving: Arc<Receiving>,
}

/// Reads a call's one message, to the end of the call.
pub(super) async fn read_message(body: impl CallBody, rules: &Rules) -> Result<Bytes, Status> {
    let mut body = pin!(body);
    let (mut framed, mut held, mut held_call) = (Framed::default(), None, None);
    while let Some(frame) = next_frame(body.as_mut(), &rules.receiving, &mut held_call).await? {
        let frame = frame.map_err(|error| Status::from_error(error.into()))?;
        let Ok(data) = frame.into_data() else { continue };
        framed.push(data);
        let Some(head) = Head::of(framed.bytes(), rules.bytes_max)? else { continue };
        let (here, whole) = (framed.bytes().len(), HEAD_BYTES + head.length);
        if here > whole {
            return Err(malformed("more than one message"));
        }
        if held.is_none() && here < whole {
            held = Some(rules.receiving.hold(head.length)?);
            framed.reserve(whole);
        }
    }
    let framed = framed.into_bytes();
    match Head::of(&framed, rules.bytes_max)? {
        Some(head) if framed.len() == HEAD_BYTES + head.length => {
            let message = framed.slice(HEAD_BYTES..);
            if head.compressed { rules.inflate(&message) } else { Ok(message) }
        }
        _ => Err(ends_early(framed.len())),
    }
}

/// What is here of a call: the piece that came, or several, put together.
enum Framed {
    Piece(Bytes),
    Pieces(BytesMut),
}

impl Default for Framed {
    fn default() -> Self {
        Self::Piece(Bytes::new())
    }
}

impl Framed {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Piece(bytes) => bytes,
            Self::Pieces(bytes) => bytes,
        }
    }

    fn push(&mut self, data: Bytes) {
        match self {
            Self::Piece(first) if first.is_empty() => *first = data,
            Self::Piece(_) => {
                self.reserve(0);
                self.push(data);
            }
            Self::Pieces(bytes) => bytes.extend_from_slice(&data),
        }
    }

    /// Makes room for a call of so many bytes, and for no more.
    fn reserve(&mut self, whole: usize) {
        let here = self.bytes();
        let mut bytes = BytesMut::with_capacity(whole.max(here.len()));
        bytes.extend_from_slice(here);
        *self = Self::Pieces(bytes);
    }

    fn into_bytes(self) -> Bytes {
        match self {
            Self::Piece(bytes) => bytes,
            Self::Pieces(bytes) => bytes.freeze(),
        }
    }
}

/// A message of a stream, which is held until its events are in the queue.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) bytes: Bytes,
    pub(super) held: Option<Held>,
}

/// The messages of a stream, one after the other.
pub(super) fn messages(
    body: impl CallBody,
    rules: Rules,
) -> impl Stream<Item = Result<Message, Status>> + Send {
    let reader = Reader { body: Box::pin(body), rules, framed: BytesMut::new(), held: None };
    stream::unfold(Some(reader), async |reader| {
        let mut reader = reader?;
        match reader.next().await {
            Ok(message) => Some((Ok(message?), Some(reader))),
            Err(status) => Some((Err(status), None)),
        }
    })
}

struct Reader<B> {
    body: Pin<Box<B>>,
    rules: Rules,
    /// What is here of the next message, and what came behind it in one piece.
    framed: BytesMut,
    /// Room for the next message, once its head is here.
    held: Option<Held>,
}

impl<B: CallBody> Reader<B> {
    async fn next(&mut self) -> Result<Option<Message>, Status> {
        let mut ends_at = None;
        loop {
            if let Some(message) = self.cut()? {
                return Ok(Some(message));
            }
            if ends_at.is_none() && !self.framed.is_empty() {
                ends_at = Some(Instant::now() + MESSAGE_TIMEOUT);
            }
            let frame = match ends_at {
                Some(at) => timeout_at(at, self.body.frame()).await.map_err(|_| late())?,
                None => self.body.frame().await,
            };
            match frame.transpose().map_err(|error| Status::from_error(error.into()))? {
                None if self.framed.is_empty() => return Ok(None),
                None => return Err(ends_early(self.framed.len())),
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        self.framed.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    /// The next message, if it is here.
    fn cut(&mut self) -> Result<Option<Message>, Status> {
        let Some(head) = Head::of(&self.framed, self.rules.bytes_max)? else { return Ok(None) };
        if self.held.is_none() {
            self.held = Some(self.rules.receiving.hold(head.length)?);
            self.framed.reserve((HEAD_BYTES + head.length).saturating_sub(self.framed.len()));
        }
        if self.framed.len() < HEAD_BYTES + head.length {
            return Ok(None);
        }
        let bytes = self.framed.split_to(HEAD_BYTES + head.length).freeze().slice(HEAD_BYTES..);
        let held = self.held.take();
        if !head.compressed {
            return Ok(Some(Message { bytes, held }));
        }
        let bytes = self.rules.inflate(&bytes)?;
        drop(held);
        let held = Some(self.rules.receiving.hold(bytes.len())?);
        Ok(Some(Message { bytes, held }))
    }
}

/// What stands before a message.
struct Head {
    compressed: bool,
    length: usize,
}

impl Head {
    /// The first message's, once it is here.
    fn of(framed: &[u8], bytes_max: usize) -> Result<Option<Self>, Status> {
        let Some((&[compressed, length @ ..], _)) = framed.split_first_chunk::<HEAD_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > bytes_max {
            return Err(too_large(&format!("{length} bytes"), bytes_max));
        }
        if compressed > 1 {
            return Err(malformed(format!("a frame that begins with {compressed}")));
        }
        Ok(Some(Self { compressed: compressed == 1, length }))
    }
}

impl Rules {
    /// What a compressed message stands for; never more than a message may have.
    #[cold]
    fn inflate(&self, compressed: &[u8]) -> Result<Bytes, Status> {
        match self.metadata.get("grpc-encoding").map(HeaderValue::as_bytes) {
            Some(b"gzip") => {}
            None | Some(b"identity") => return Err(malformed("compressed, without a grpc-encoding")),
            Some(other) => {
                let other = String::from_utf8_lossy(&other[..other.len().min(40)]).into_owned();
                let message = format!("got grpc-encoding {other:?}, want gzip or none");
                let mut status = Status::unimplemented(message);
                let encodings = MetadataValue::from_static("identity,gzip");
                status.metadata_mut().insert("grpc-accept-encoding", encodings);
                return Err(status);
            }
        }
        match gzip::inflate(compressed, self.bytes_max, |_| Ok(())) {
            Ok(message) => Ok(message.into()),
            Err(NotInflated::TooLarge) => Err(too_large("more when it is decompressed", self.bytes_max)),
            Err(NotInflated::Malformed(error)) => Err(malformed(error)),
            Err(NotInflated::NoRoom(denied)) => Err(denied.into()),
        }
    }
}

fn too_large(got: &str, bytes_max: usize) -> Status {
    Status::out_of_range(format!("got a message of {got}, want at most {bytes_max} bytes"))
}

fn ends_early(bytes: usize) -> Status {
    malformed(format!("the call ends in its message, after {bytes} bytes"))
}

/// A message that took too long.
pub(super) fn late() -> Status {
    Status::deadline_exceeded(format!("no whole message within {MESSAGE_TIMEOUT:?}"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use futures_util::{FutureExt, StreamExt};
    use http_body::Frame;
    use http_body_util::StreamBody;
    use prometheus_client::metrics::counter::Counter;
    use tonic::Code;

    use super::*;
    use crate::{ingest::budget::ReceiveBudget, listener::Slot};

    /// Rules for a call with this encoding.
    pub(in crate::ingest::grpc) fn rules(bytes_max: usize, encoding: &'static str) -> Rules {
        let mut metadata = HeaderMap::new();
        if !encoding.is_empty() {
            metadata.insert("grpc-encoding", HeaderValue::from_static(encoding));
        }
        let budget = ReceiveBudget::new(4 << 20, Counter::default());
        let receiving = budget.connection("127.0.0.1".parse().unwrap(), Slot::Regular);
        Rules { bytes_max, metadata, receiving }
    }

    fn body(pieces: &[&[u8]]) -> impl CallBody + use<> {
        let frames: Vec<_> =
            pieces.iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        StreamBody::new(stream::iter(frames))
    }

    fn read_by(rules: &Rules, pieces: &[&[u8]]) -> Result<Bytes, Code> {
        let read = read_message(body(pieces), rules);
        read.now_or_never().expect("nothing is waited for").map_err(|status| status.code())
    }

    /// What a call is read as whose body comes in those pieces.
    fn read(pieces: &[&[u8]]) -> Result<Bytes, Code> {
        read_by(&rules(6, ""), pieces)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn framed(compressed: u8, message: &[u8]) -> Vec<u8> {
        let length = u32::try_from(message.len()).unwrap();
        [&[compressed][..], &length.to_be_bytes(), message].concat()
    }

    #[test]
    fn a_message_is_read_however_it_is_cut() {
        let framed = framed(0, b"abcdef");
        assert_eq!(read(&[&framed]).unwrap(), "abcdef");
        for cut in 0..framed.len() {
            assert_eq!(read(&[&framed[..cut], &[], &framed[cut..]]).unwrap(), "abcdef", "{cut}");
        }
        let bytes: Vec<_> = framed.chunks(1).collect();
        assert_eq!(read(&bytes).unwrap(), "abcdef");
        assert_eq!(read(&[&[0; 5]]).unwrap(), "");
    }

    #[test]
    fn a_call_without_exactly_one_message_is_refused() {
        for (pieces, code) in [
            (&[][..], Code::InvalidArgument),
            (&[&[0, 0][..]], Code::InvalidArgument),
            (&[&[0, 0, 0, 0, 2, b'a']], Code::InvalidArgument),
            (&[&[0, 0, 0, 0, 1, b'a', 0]], Code::InvalidArgument),
            (&[&[2, 0, 0, 0, 1, b'a']], Code::InvalidArgument),
            (&[&[0, 0, 0, 0, 7]], Code::OutOfRange),
            (&[&[0, 0xFF, 0xFF, 0xFF, 0xFF]], Code::OutOfRange),
        ] {
            assert_eq!(read(pieces), Err(code), "{pieces:?}");
        }
    }

    #[test]
    fn gzip_is_taken_at_every_size_and_bounded_by_what_comes_out() {
        for length in [0, 1, 100, 64 * 1024] {
            let message = vec![b'x'; length];
            let framed = framed(1, &gzip(&message));
            assert_eq!(read_by(&rules(64 * 1024, "gzip"), &[&framed]).unwrap(), message, "{length}");
        }
        let (small, bomb) = (framed(1, &gzip(b"x")), framed(1, &gzip(&vec![0; 64 * 1024 + 1])));
        let torn = framed(1, &gzip(b"x")[..15]);
        let more = framed(1, &[gzip(b"x"), gzip(b"y")].concat());
        for (encoding, framed, code) in [
            ("gzip", &bomb, Code::OutOfRange),
            ("gzip", &torn, Code::InvalidArgument),
            ("gzip", &more, Code::InvalidArgument),
            ("", &small, Code::InvalidArgument),
            ("deflate", &small, Code::Unimplemented),
        ] {
            assert_eq!(read_by(&rules(64 * 1024, encoding), &[framed]), Err(code), "{encoding}");
        }
    }

    #[tokio::test]
    async fn the_messages_of_a_stream_come_one_by_one_however_they_are_cut() {
        let whole = [framed(0, b"a"), framed(1, &gzip(b"bb")), framed(0, b""), framed(0, b"ccc")].concat();
        for size in 1..whole.len() {
            let pieces: Vec<_> = whole.chunks(size).collect();
            let read = messages(body(&pieces), rules(64, "gzip")).collect::<Vec<_>>();
            let read = read.now_or_never().expect("nothing is waited for");
            let read: Vec<_> = read.into_iter().map(|message| message.unwrap().bytes).collect();
            assert_eq!(read, ["a", "bb", "", "ccc"], "{size}");
        }
    }

    /// A message is refused as soon as its length is known, and what was held of it
    /// comes back.
    #[test]
    fn over_the_budget_a_message_is_refused_before_it_is_here() {
        let rules = rules(1 << 20, "");
        let head = [&[0][..], &(1_u32 << 20).to_be_bytes()].concat();
        let waiting = || {
            StreamBody::new(
                body(&[&head]).into_data_stream().map(|data| data.map(Frame::data)).chain(stream::pending()),
            )
        };
        let mut first = Box::pin(read_message(waiting(), &rules));
        assert!(first.as_mut().now_or_never().is_none());
        let second = read_message(waiting(), &rules).now_or_never().unwrap().unwrap_err();
        assert_eq!(second.code(), Code::ResourceExhausted);
        drop(first);
        assert!(read_message(waiting(), &rules).now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_of_a_stream_has_a_time_limit_and_the_pause_before_it_has_none() {
        let pause = Duration::from_secs(200);
        let slow = stream::iter([framed(0, b"a"), vec![0, 0]]).then(move |piece| async move {
            tokio::time::sleep(pause).await;
            Ok::<_, Status>(Frame::data(Bytes::from(piece)))
        });
        let mut read = pin!(messages(StreamBody::new(slow.chain(stream::pending())), rules(6, "")));
        assert_eq!(read.next().await.unwrap().unwrap().bytes, "a");
        let start = Instant::now();
        assert_eq!(read.next().await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
        assert_eq!(start.elapsed(), pause + MESSAGE_TIMEOUT);
        assert!(read.next().await.is_none());
    }
}
