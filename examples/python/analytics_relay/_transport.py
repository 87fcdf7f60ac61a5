"""One gRPC call at a time over HTTP/2, in Python alone.

grpcio has threads and locks of its own below Python. A process that forks while
they work has children that crash or never send, and no care above it prevents
that. This connection has none: a child closes its copy of the socket and makes
one of its own. It does what a unary call needs, and no more.
"""

import os
import re
import selectors
import socket
import ssl
import struct
import time
import urllib.parse

import hpack

CONNECT_TIMEOUT = 3.0  # for each address of the name
# A peer that says nothing for so long during a call is asked whether it lives,
QUIET_MAX = 3.0
# and given up if it does not say so.
PING_TIMEOUT = 3.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
UNWRITTEN_BYTES_MAX = 8 * 1024 * 1024  # of a peer that asks and does not read
READS_MAX = 64  # in a row: a peer that never stops does not outlast the call
HEADER_BYTES_MAX = 64 * 1024

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 0, 1, 2, 3, 4
PERMISSION_DENIED, RESOURCE_EXHAUSTED, OUT_OF_RANGE, UNIMPLEMENTED = 7, 8, 11, 12
INTERNAL, UNAVAILABLE, UNAUTHENTICATED = 13, 14, 16
CODES = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}
# What gRPC makes of an answer that is HTTP's own; 413 is a proxy's limit of size.
HTTP_CODES = {
    400: INTERNAL,
    401: UNAUTHENTICATED,
    403: PERMISSION_DENIED,
    404: UNIMPLEMENTED,
    413: RESOURCE_EXHAUSTED,
    429: UNAVAILABLE,
    502: UNAVAILABLE,
    503: UNAVAILABLE,
    504: UNAVAILABLE,
}

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME = struct.Struct(">IBI")  # length and type, flags, stream
DATA, HEADERS, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
END_STREAM = ACK = 1
END_HEADERS, PADDED, PRIORITY = 4, 8, 32
FRAME_BYTES_MAX = 16_384  # ours: the least that is allowed
REFUSED_STREAM, CANCEL = 7, 8
WINDOW_BYTES = ANSWER_BYTES_MAX


class CallError(Exception):
    """The call failed. `untouched`: the peer says that it did nothing with it."""

    def __init__(self, code, message, *, untouched=False, too_large=False):
        super().__init__(f"{CODES.get(code, code)}: {message}")
        self.code, self.untouched = code, untouched
        self.too_large = too_large or _TOO_LARGE.search(message) is not None


# How peers word it that a message is over their limit; a quota has the same code.
_TOO_LARGE = re.compile(r"larger than|too large|exceeds (the )?max", re.IGNORECASE)


class Waker:
    """Waits for a socket, a time, or another thread's `wake`."""

    def __init__(self):
        self._receive, self._send = socket.socketpair()
        self._receive.setblocking(False)
        self._send.setblocking(False)

    def wake(self):
        try:
            self._send.send(b"\0")
        except OSError:  # full: it wakes anyway. Closed: nobody sleeps
            pass

    def wait(self, timeout, sock=None, write=False):
        # Not `select`, which cannot take a descriptor above 1,023, and not
        # epoll, which a fork would share.
        with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
            selector.register(self._receive, selectors.EVENT_READ)
            if sock is not None:
                selector.register(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0))
            selector.select(None if timeout is None else max(0.0, timeout))
        try:
            self._receive.recv(4096)
        except OSError:
            pass

    def close(self):
        self._receive.close()
        self._send.close()


class Target:
    """Where the relay is: `host:port`, `[::1]:50054`, `http://…`, `https://…`."""

    def __init__(self, target, tls):
        want = "want host:port, such as localhost:50054, with http:// or https:// before it or not"
        if not isinstance(target, str):
            raise TypeError(f"target: got {type(target).__name__}, {want}")
        scheme, _, rest = target.rpartition("://")
        rest = rest.lstrip("/") if scheme == "dns" else rest  # gRPC's own way to write it
        parts = urllib.parse.urlsplit("//" + rest)
        try:
            self.host, self.port = parts.hostname, parts.port
            (self.host or "").encode("idna")
        except ValueError:  # UnicodeError is one
            self.port = None
        if (
            scheme not in ("", "http", "https", "dns")
            or not self.port
            or not self.host
            or parts.path.strip("/")
            or "@" in rest
        ):
            raise ValueError(f"target: got {target!r}, {want}")
        self.authority = parts.netloc
        if scheme == "https" and tls is None:
            tls = ssl.create_default_context()
        if scheme == "http" and tls is not None:
            raise ValueError(f"target: got {target!r} together with TLS, want https://")
        self.tls = tls
        if tls is not None:
            tls.set_alpn_protocols(["h2"])


class Channel:
    """Connects when there is a call, and again after one failed."""

    def __init__(self, target, waker):
        self._target, self._waker = target, waker
        self._opening, self._connection = None, None

    def call(self, path, message, ends_at):
        """The answer's bytes. `ends_at()` is asked for as long as it takes:
        the end of the client may come nearer. Raises `CallError`."""
        try:
            if self._connection is None or not self._connection.is_usable():
                self.close()
                self._connection = self._connect(ends_at)
            return self._connection.call(self._target, path, message, ends_at)
        except CallError as error:
            if error.code in (UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED, UNKNOWN, INTERNAL):
                self.close()
            raise
        except (OSError, EOFError) as error:
            self.close()
            raise CallError(UNAVAILABLE, str(error) or type(error).__name__) from None
        except (hpack.HPACKError, struct.error, ValueError, IndexError) as error:
            self.close()
            raise CallError(INTERNAL, f"the answer is no HTTP/2: {type(error).__name__}") from None

    def idle(self, timeout):
        """Waits for `timeout` or a wake. A peer that leaves meanwhile is let go,
        and one that asks is answered: a relay that stops waits for nobody."""
        connection = self._connection
        if connection is None:
            self._waker.wait(timeout)
            return
        self._waker.wait(timeout, connection.sock, connection.wants_to_write())
        try:
            connection.exchange()
        except (OSError, EOFError, CallError, hpack.HPACKError, struct.error, ValueError, IndexError):
            self.close()
            return
        if not connection.is_usable():
            self.close()

    def close(self):
        """In a child of a fork too: nothing is sent, the parent's lives on."""
        opening, self._opening = self._opening, None
        connection, self._connection = self._connection, None
        for sock in (opening, connection and connection.sock):
            if sock is not None:
                sock.close()

    def _connect(self, ends_at):
        target, last = self._target, None
        for family, kind, proto, _, addr in socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM):
            deadline = time.monotonic() + CONNECT_TIMEOUT

            def wait(write, addr=addr, deadline=deadline):
                left = min(deadline, ends_at()) - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"no connection to {addr[0]} in time")
                self._waker.wait(left, self._opening, write)

            try:
                self._opening = socket.socket(family, kind, proto)
                _open(self._opening, addr, wait)
                if target.tls is not None:
                    self._opening = target.tls.wrap_socket(
                        self._opening, server_hostname=target.host, do_handshake_on_connect=False
                    )
                    _shake_hands(self._opening, wait)
                sock, self._opening = self._opening, None
                return Connection(sock, self._waker)
            except OSError as error:
                self.close()
                last = error
        raise last or OSError(f"{target.host} has no address")


def _open(sock, addr, wait):
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # The system notices a peer that vanished while nothing is sent.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        sock.connect(addr)
    except BlockingIOError:
        while True:
            wait(True)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"no connection to {addr[0]}: {os.strerror(error)}") from None
            try:
                sock.getpeername()
                return
            except OSError:
                continue  # woken by another thread: not yet


def _shake_hands(sock, wait):
    while True:
        try:
            sock.do_handshake()
            break
        except ssl.SSLWantReadError:
            wait(False)
        except ssl.SSLWantWriteError:
            wait(True)
    if sock.selected_alpn_protocol() != "h2":
        raise ConnectionError("the peer's TLS does not offer HTTP/2 (ALPN h2), which gRPC needs")


class _Reply:
    """What has come of the answer."""

    def __init__(self, stream, window):
        self.stream, self.window = stream, window
        self.headers, self.trailers, self.body = None, None, bytearray()
        self.is_ended, self.reset = False, None


class Connection:
    def __init__(self, sock, waker):
        self.sock, self._waker = sock, waker
        self._inbox, self._decoder = bytearray(), hpack.Decoder()
        self._block = None  # a header block that goes on: stream, ends the stream, bytes
        self._stream_next, self._reply = 1, None
        self._window, self._window_first, self._frame_bytes_max = 65_535, 65_535, FRAME_BYTES_MAX
        self._goes_away, self._last_stream = False, 0
        self._heard_at, self._pinged_at, self._has_settings = time.monotonic(), None, False
        settings = struct.pack(">HIHI", 2, 0, 4, WINDOW_BYTES)  # no push; the window of a stream
        self._outbox = bytearray(PREFACE)
        self._queue(SETTINGS, 0, 0, settings)
        self._queue(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW_BYTES))

    def is_usable(self):
        return not self._goes_away and self._stream_next < 2**31

    def wants_to_write(self):
        return bool(self._outbox)

    def call(self, target, path, message, ends_at):
        stream, self._stream_next = self._stream_next, self._stream_next + 2
        reply = self._reply = _Reply(stream, self._window_first)
        try:
            self._queue(HEADERS, END_HEADERS, stream, _header_block(target, path, ends_at() - time.monotonic()))
            unsent = memoryview(struct.pack(">BI", 0, len(message)) + message)
            self._heard_at, self._pinged_at = time.monotonic(), None
            while not reply.is_ended:
                if len(unsent):
                    unsent = self._queue_data(reply, unsent)
                if time.monotonic() >= ends_at():
                    raise CallError(DEADLINE_EXCEEDED, "no answer in time")
                if not self.exchange():
                    self._wait(ends_at)
                if self._goes_away and self._last_stream < stream and not reply.is_ended:
                    raise CallError(UNAVAILABLE, "the relay has closed the connection", untouched=True)
            if len(unsent):  # answered before it was read: nobody wants the rest
                self._queue(RST_STREAM, 0, stream, struct.pack(">I", CANCEL))
            return _answer(reply)
        finally:
            self._reply = None

    def _wait(self, ends_at):
        now = time.monotonic()
        if self._pinged_at is None and now - self._heard_at >= QUIET_MAX:
            self._queue(PING, 0, 0, b"a sign? ")
            self._pinged_at = now
        elif self._pinged_at is not None and now - self._pinged_at >= PING_TIMEOUT:
            raise CallError(UNAVAILABLE, f"the peer gave no sign of life for {now - self._heard_at:.0f} s")
        left = min(ends_at() - now, QUIET_MAX if self._pinged_at is None else PING_TIMEOUT, 1.0)
        self._waker.wait(left, self.sock, self.wants_to_write())

    def _queue(self, kind, flags, stream, payload):
        self._outbox += FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload

    def _queue_data(self, reply, unsent):
        """As much as the peer's windows allow; returns the rest."""
        while len(unsent):
            size = min(len(unsent), self._window, reply.window, self._frame_bytes_max)
            if size <= 0:
                break
            self._window -= size
            reply.window -= size
            self._queue(DATA, END_STREAM if size == len(unsent) else 0, reply.stream, bytes(unsent[:size]))
            unsent = unsent[size:]
        return unsent

    def exchange(self):
        """Writes and reads what goes without waiting. False if nothing did."""
        moved = False
        while self._outbox:
            try:
                sent = self.sock.send(self._outbox)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            del self._outbox[:sent]
            moved = True
        for _ in range(READS_MAX):
            try:
                received = self.sock.recv(65_536)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return moved
            if not received:
                if self._reply is not None and self._reply.is_ended:  # all that was waited for has come
                    self._goes_away = True
                    return True
                raise EOFError("the relay has closed the connection")
            moved = True
            self._heard_at, self._pinged_at = time.monotonic(), None
            self._inbox += received
            self._take_frames()
            if len(self._outbox) > UNWRITTEN_BYTES_MAX:
                raise CallError(UNAVAILABLE, "the peer asks, and does not read the answers")
        return True

    def _take_frames(self):
        while len(self._inbox) >= FRAME.size:
            head, flags, stream = FRAME.unpack_from(self._inbox)
            size, kind = head >> 8, head & 0xFF
            if not self._has_settings and kind != SETTINGS:
                is_http1 = self._inbox.startswith(b"HTTP/")
                raise CallError(UNAVAILABLE, f"the peer speaks {'HTTP/1' if is_http1 else 'something else'}, not gRPC")
            if size > FRAME_BYTES_MAX:
                raise CallError(INTERNAL, f"a frame of {size} bytes")
            if len(self._inbox) < FRAME.size + size:
                return
            payload = bytes(self._inbox[FRAME.size : FRAME.size + size])
            del self._inbox[: FRAME.size + size]
            self._take(kind, flags, stream & 0x7FFF_FFFF, payload)

    def _take(self, kind, flags, stream, payload):
        if kind == DATA:
            self._take_data(flags, stream, payload)
        elif kind == HEADERS:
            self._block = (stream, flags & END_STREAM, bytearray(_unpadded(flags, payload)))
            self._end_block(flags)
        elif kind == CONTINUATION and self._block is not None:
            self._block[2].extend(payload)
            self._end_block(flags)
        elif kind == RST_STREAM:
            if self._reply is not None and stream == self._reply.stream:
                self._reply.reset, self._reply.is_ended = struct.unpack(">I", payload)[0], True
        elif kind == SETTINGS:
            self._take_settings(flags, payload)
        elif kind == PING and not flags & ACK:
            self._queue(PING, ACK, 0, payload)
        elif kind == GOAWAY:
            self._goes_away, self._last_stream = True, struct.unpack_from(">I", payload)[0] & 0x7FFF_FFFF
        elif kind == WINDOW_UPDATE:
            size = struct.unpack(">I", payload)[0] & 0x7FFF_FFFF
            if stream == 0:
                self._window += size
            elif self._reply is not None and stream == self._reply.stream:
                self._reply.window += size

    def _take_settings(self, flags, payload):
        self._has_settings = True
        if flags & ACK:
            return
        for name, value in struct.iter_unpack(">HI", payload):
            if name == 4:
                if self._reply is not None:
                    self._reply.window += value - self._window_first
                self._window_first = value
            elif name == 5:
                self._frame_bytes_max = value
        self._queue(SETTINGS, ACK, 0, b"")

    def _take_data(self, flags, stream, payload):
        if payload:
            self._queue(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload)))
        reply = self._reply
        if reply is None or stream != reply.stream:
            return
        reply.body += _unpadded(flags & PADDED, payload)
        if len(reply.body) > ANSWER_BYTES_MAX:
            raise CallError(INTERNAL, f"an answer of over {ANSWER_BYTES_MAX} bytes")
        reply.is_ended = bool(flags & END_STREAM)

    def _end_block(self, flags):
        stream, ends_stream, block = self._block
        if len(block) > HEADER_BYTES_MAX:
            raise CallError(INTERNAL, f"headers of over {HEADER_BYTES_MAX} bytes")
        if not flags & END_HEADERS:
            return
        self._block = None
        # Decoded whoever it is for: the decoder keeps a table.
        headers = {_latin(name): _latin(value) for name, value in self._decoder.decode(bytes(block), raw=True)}
        reply = self._reply
        if reply is None or stream != reply.stream:
            return
        if reply.headers is None:
            if not headers.get(":status", "").startswith("1"):  # informational
                reply.headers = headers
        else:
            reply.trailers = headers
        reply.is_ended = reply.is_ended or bool(ends_stream)


def _latin(value):
    return value if isinstance(value, str) else bytes(value).decode("latin-1")


def _unpadded(flags, payload):
    start, end = 0, len(payload)
    if flags & PADDED:
        start, end = 1, end - payload[0]
    if flags & PRIORITY:
        start += 5
    return payload[start:end]


def _header_block(target, path, seconds):
    """Each a literal that enters no table, so that there is no state."""
    headers = (
        (":method", "POST"),
        (":scheme", "http" if target.tls is None else "https"),
        (":path", path),
        (":authority", target.authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "analytics-relay-python"),
        ("grpc-timeout", f"{max(1, int(seconds * 1000))}m"),
    )
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(value):
    value = value.encode()
    if len(value) < 127:
        return bytes([len(value)]) + value
    size, rest = bytearray([127]), len(value) - 127
    while rest >= 128:
        size.append(rest & 127 | 128)
        rest >>= 7
    size.append(rest)
    return bytes(size) + value


def _answer(reply):
    headers = reply.headers or {}
    trailers = reply.trailers if reply.trailers is not None else headers
    status = headers.get(":status", "")
    if "grpc-status" in trailers:
        code = int(trailers["grpc-status"])
        if code != OK:
            raise CallError(code, urllib.parse.unquote(trailers.get("grpc-message", "")) or "no message")
    elif reply.reset is not None:
        raise CallError(
            UNAVAILABLE, f"the call was reset (HTTP/2 error {reply.reset})", untouched=reply.reset == REFUSED_STREAM
        )
    elif status != "200":
        code = HTTP_CODES.get(int(status or 0), UNKNOWN)
        raise CallError(code, f"HTTP status {status or 'missing'}", too_large=status == "413")
    else:
        raise CallError(UNKNOWN, "the answer has no gRPC status")
    if len(reply.body) < 5 or reply.body[0] != 0 or struct.unpack_from(">I", reply.body, 1)[0] != len(reply.body) - 5:
        raise CallError(INTERNAL, "the answer is no gRPC message")
    return bytes(reply.body[5:])
