//! The codec of streams: messages go out encoded and come in as they are, to be
//! decoded where they are used.
//!
//! tonic's own sets aside 16 KiB of buffers for each call and calls a message
//! that cannot be decoded INTERNAL, as if the relay were to blame.

use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// First size of a call's buffers.
const BUFFER_BYTES: usize = 1024;
/// Bytes that are gathered before they are handed to the connection.
const YIELD_BYTES: usize = 32 * 1024;

/// Encodes `T`.
#[derive(Debug)]
pub(crate) struct StreamCodec<T>(PhantomData<T>);

impl<T> Default for StreamCodec<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static> Codec for StreamCodec<T> {
    type Encode = T;
    type Decode = Bytes;
    type Encoder = MessageEncoder<T>;
    type Decoder = BytesDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        MessageEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        BytesDecoder
    }
}

/// See [`StreamCodec`].
#[derive(Debug)]
pub(crate) struct MessageEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for MessageEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.encode(out).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

/// See [`StreamCodec`].
#[derive(Debug)]
pub(crate) struct BytesDecoder;

impl Decoder for BytesDecoder {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(bytes.copy_to_bytes(bytes.remaining())))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}
