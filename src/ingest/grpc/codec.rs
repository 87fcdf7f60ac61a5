//! The encoder of a stream's answers. tonic's own sets aside 16 KiB of buffers for
//! each call.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, EncodeBuf, Encoder},
};

/// First size of a call's buffers.
const BUFFER_BYTES: usize = 1024;
/// Bytes that are gathered before they are handed to the connection.
const YIELD_BYTES: usize = 32 * 1024;

/// Encodes `T`.
#[derive(Debug)]
pub(super) struct MessageEncoder<T>(PhantomData<T>);

impl<T> Default for MessageEncoder<T> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

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
