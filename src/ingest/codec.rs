//! The protobuf codec of the front door.
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

use super::refusal::malformed;

/// What comes off the wire.
pub(crate) trait FromWire: Sized {
    /// Reads one whole message.
    fn from_wire(bytes: &mut DecodeBuf<'_>) -> Result<Self, Status>;
}

impl<M: Message + Default> FromWire for M {
    fn from_wire(bytes: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        Self::decode(bytes).map_err(|error| malformed(&error))
    }
}

/// First size of a call's buffers: most messages fit.
const BUFFER_BYTES: usize = 1024;
/// Bytes that are gathered before they are handed to the connection.
const YIELD_BYTES: usize = 32 * 1024;

/// A message as it came, to be decoded where it is used.
#[derive(Debug)]
pub(crate) struct RawMessage(pub(crate) Bytes);

impl FromWire for RawMessage {
    fn from_wire(bytes: &mut DecodeBuf<'_>) -> Result<Self, Status> {
        Ok(Self(bytes.copy_to_bytes(bytes.remaining())))
    }
}

/// Encodes `T` and decodes `U`.
#[derive(Debug)]
pub(crate) struct MessageCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for MessageCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for MessageCodec<T, U>
where
    T: Message + Send + 'static,
    U: FromWire + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = MessageEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        MessageEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        MessageDecoder(PhantomData)
    }
}

/// Encodes `T`.
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

/// Decodes `U`.
#[derive(Debug)]
pub(crate) struct MessageDecoder<U>(PhantomData<U>);

impl<U: FromWire> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        U::from_wire(bytes).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}
