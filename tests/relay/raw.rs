//! A peer that writes HTTP/2's frames by hand, as no library would.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// Longest wait for a relay that does not read on.
const PATIENCE: Duration = Duration::from_secs(2);

/// One frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The head of a call of a method, compressed as little as HPACK allows.
fn head_of(method: &str) -> Vec<u8> {
    let path = format!("/analytics.v1.AnalyticsService/{method}");
    // POST, http, and by their places in the static table :path, :authority and
    // content-type with a text behind each.
    let mut head = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    head.extend_from_slice(path.as_bytes());
    head.extend_from_slice(&[0x01, 1, b'x', 0x0F, 0x10, 16]);
    head.extend_from_slice(b"application/grpc");
    head
}

pub(crate) fn headers(stream: u32, method: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &head_of(method))
}

/// The same for a call whose messages are compressed.
pub(crate) fn headers_of_gzip(stream: u32, method: &str) -> Vec<u8> {
    let encoding = [&[0x00, 13][..], b"grpc-encoding", &[4], b"gzip"].concat();
    frame(HEADERS, END_HEADERS, stream, &[head_of(method), encoding].concat())
}

/// A head that is never complete, and a piece of it.
pub(crate) fn endless_headers(stream: u32) -> Vec<u8> {
    frame(HEADERS, 0, stream, &head_of("TrackEvent"))
}
pub(crate) fn continuation(stream: u32) -> Vec<u8> {
    // A field that is not indexed: "x", and a text of 100 bytes.
    let field = [&[0x00, 1, b'x', 100][..], &[b'y'; 100]].concat();
    frame(CONTINUATION, 0, stream, &field)
}

pub(crate) fn reset(stream: u32) -> Vec<u8> {
    const CANCEL: u32 = 8;
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

pub(crate) fn ping() -> Vec<u8> {
    frame(PING, 0, 0, &[7; 8])
}

/// Settings, each a number and a value.
pub(crate) fn settings(settings: &[(u16, u32)]) -> Vec<u8> {
    let one = |(number, value): &(u16, u32)| [&number.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &settings.iter().flat_map(one).collect::<Vec<_>>())
}

pub(crate) fn data(stream: u32, bytes: &[u8]) -> Vec<u8> {
    frame(DATA, 0, stream, bytes)
}

/// The last bytes of a call.
pub(crate) fn last_data(stream: u32, bytes: &[u8]) -> Vec<u8> {
    const END_STREAM: u8 = 1;
    frame(DATA, END_STREAM, stream, bytes)
}

/// The five bytes before a message of gRPC.
pub(crate) fn message_head(length: usize) -> Vec<u8> {
    [&[0][..], &u32::try_from(length).unwrap().to_be_bytes()].concat()
}

pub(crate) struct RawPeer(TcpStream);

impl RawPeer {
    /// Connects, and says that it speaks HTTP/2, with these settings.
    pub(crate) async fn connect(addr: SocketAddr, own: &[(u16, u32)]) -> io::Result<Self> {
        let mut peer = Self(TcpStream::connect(addr).await?);
        peer.0.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        peer.0.write_all(&settings(own)).await?;
        Ok(peer)
    }

    /// Writes, and says whether the relay has taken it: not if it has closed the
    /// connection, or reads no further for a while.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> bool {
        matches!(timeout(PATIENCE, self.0.write_all(bytes)).await, Ok(Ok(())))
    }

    /// Takes what has come, so that the relay can go on writing. False at the end.
    pub(crate) fn drain(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        loop {
            match self.0.try_read(&mut bytes) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
    }
}
