//! An answer of one message, framed as gRPC frames it.
//!
//! tonic serves such a call as a stream of one, which costs about as much as all
//! that a relay does with an event.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use tonic::{
    Status,
    codegen::http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE},
};

use super::message::{ACCEPT_ENCODING, ENCODINGS, HEAD_BYTES};
use crate::ingest::budget::Held;

const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const OK: HeaderValue = HeaderValue::from_static("0");

/// The answer that a message is.
pub(super) fn answer_with(message: &impl Message) -> Response<AnswerBody> {
    let length = message.encoded_len();
    let mut framed = BytesMut::with_capacity(HEAD_BYTES + length);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(length).expect("an answer is small"));
    message.encode(&mut framed).expect("the buffer grows");
    answer_of(AnswerBody::Message(framed.freeze()))
}

/// The answer that a stream is.
pub(super) fn answer_of_stream(body: tonic::body::Body, held: Held) -> Response<AnswerBody> {
    let mut response = answer_of(AnswerBody::Stream { body, _held: held });
    response.headers_mut().insert(ACCEPT_ENCODING, ENCODINGS);
    response
}

fn answer_of(body: AnswerBody) -> Response<AnswerBody> {
    let mut response = Response::new(body);
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
    /// A stream of messages, or an answer of tonic's own services, and what such a
    /// call holds.
    Stream { body: tonic::body::Body, _held: Held },
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Self::Stream { body, .. } = &mut *self {
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
            Self::Nothing | Self::Stream { .. } => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(_) | Self::Trailers => false,
            Self::Nothing => true,
            Self::Stream { body, .. } => body.is_end_stream(),
        }
    }
}
