//! A call with one message and one answer, framed as gRPC frames them.
//!
//! tonic serves such a call as a stream of one, which costs about as much as all
//! that a relay does with an event.

use std::{
    pin::{Pin, pin},
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use prost::Message;
use tonic::{
    Status,
    codegen::http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE},
};

use super::{refusal::malformed, service::CallBody};

/// Before a message: whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const OK: HeaderValue = HeaderValue::from_static("0");

/// Reads a call's one message, to the end of the call.
pub(super) async fn read_message(body: impl CallBody, bytes_max: usize) -> Result<Bytes, Status> {
    let mut body = pin!(body);
    let mut framed = Bytes::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::from_error(error.into()))?;
        let Ok(data) = frame.into_data() else { continue };
        framed = joined(framed, data);
        let length = message_length(&framed, bytes_max)?;
        if length.is_some_and(|length| framed.len() > HEAD_BYTES + length) {
            return Err(malformed("more than one message"));
        }
    }
    match message_length(&framed, bytes_max)? {
        Some(length) if framed.len() == HEAD_BYTES + length => Ok(framed.slice(HEAD_BYTES..)),
        _ => Err(malformed(format!("the call ends in its message, after {} bytes", framed.len()))),
    }
}

/// Most messages come in one piece.
fn joined(first: Bytes, more: Bytes) -> Bytes {
    if first.is_empty() {
        return more;
    }
    let mut joined = first.try_into_mut().unwrap_or_else(|first| BytesMut::from(&first[..]));
    joined.extend_from_slice(&more);
    joined.freeze()
}

/// The length that a message's head tells, once it is here.
fn message_length(framed: &[u8], bytes_max: usize) -> Result<Option<usize>, Status> {
    let Some((&[compressed, length @ ..], _)) = framed.split_first_chunk::<HEAD_BYTES>() else {
        return Ok(None);
    };
    if compressed != 0 {
        return Err(Status::unimplemented("got a compressed message, want it as it is: no grpc-encoding"));
    }
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > bytes_max {
        return Err(Status::out_of_range(format!(
            "got a message of {length} bytes, want at most {bytes_max}"
        )));
    }
    Ok(Some(length))
}

/// The answer that a message is.
pub(super) fn answer_with(message: &impl Message) -> Response<AnswerBody> {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(HEAD_BYTES + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).expect("an answer is small"));
    message.encode(&mut framed).expect("the buffer grows");
    let mut response = Response::new(AnswerBody::Message(framed.freeze()));
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

/// What follows the head of an answer.
#[derive(Debug, Default)]
pub(crate) enum AnswerBody {
    /// One message, then OK.
    Message(Bytes),
    /// OK, behind the message.
    Trailers,
    /// Nothing: the status stands in the head, or all was sent.
    #[default]
    Nothing,
    /// A stream of messages, or an answer of tonic's own services.
    Stream(tonic::body::Body),
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Self::Stream(body) = &mut *self {
            return Pin::new(body).poll_frame(cx);
        }
        Poll::Ready(match std::mem::take(&mut *self) {
            Self::Message(message) => {
                *self = Self::Trailers;
                Some(Ok(Frame::data(message)))
            }
            Self::Trailers => {
                let mut trailers = HeaderMap::with_capacity(1);
                trailers.insert(GRPC_STATUS, OK);
                Some(Ok(Frame::trailers(trailers)))
            }
            Self::Nothing | Self::Stream(_) => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(_) | Self::Trailers => false,
            Self::Nothing => true,
            Self::Stream(body) => body.is_end_stream(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, stream};
    use http_body_util::StreamBody;
    use tonic::Code;

    use super::*;

    /// What a call is read as whose body comes in those pieces.
    fn read(pieces: &[&[u8]]) -> Result<Bytes, Code> {
        let frames: Vec<_> =
            pieces.iter().map(|piece| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        let read = read_message(StreamBody::new(stream::iter(frames)), 6);
        read.now_or_never().expect("nothing is waited for").map_err(|status| status.code())
    }

    #[test]
    fn a_message_is_read_however_it_is_cut() {
        let framed = [&[0, 0, 0, 0, 6][..], b"abcdef"].concat();
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
            (&[&[0, 0, 0, 0, 7]], Code::OutOfRange),
            (&[&[0, 0xFF, 0xFF, 0xFF, 0xFF]], Code::OutOfRange),
            (&[&[1, 0, 0, 0, 1, b'a']], Code::Unimplemented),
        ] {
            assert_eq!(read(pieces), Err(code), "{pieces:?}");
        }
    }
}
