"""One gRPC call at a time over HTTP/2, in Python alone.

grpcio has threads and locks of its own below Python. A process that forks while
they work has children that crash or never send, and no care above it prevents
that. Here is none: h2 speaks HTTP/2 and touches no socket, the sockets are
ours, and a child closes its copy of one and makes one of its own.
"""

import os
import re
import selectors
import socket
import ssl
import struct
import time
import urllib.parse

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import hyperframe.frame
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings

CONNECT_TIMEOUT = 3.0  # for each address of the name
# A peer that says nothing for so long during a call is asked whether it lives,
QUIET_MAX = 3.0
# and given up if it does not say so.
PING_TIMEOUT = 3.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
UNWRITTEN_BYTES_MAX = 8 * 1024 * 1024  # of a peer that asks and does not read
READS_MAX = 4  # in a row, a tenth of a second of pings: a peer that never stops does not outlast the call

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

FRAME_HEAD_BYTES = 9
FRAME_BYTES_MAX = 16_384  # ours: the least that is allowed
WINDOW_BYTES = ANSWER_BYTES_MAX
SETTINGS = {
    SettingCodes.ENABLE_PUSH: 0,
    SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
    SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES_MAX,
    SettingCodes.MAX_HEADER_LIST_SIZE: h2.connection.H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
}


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
        except Exception as error:  # of h2, whatever the peer has made it stumble over
            self.close()
            raise CallError(INTERNAL, f"the answer is no HTTP/2: {type(error).__name__}") from None

    def idle(self, timeout):
        """Waits for `timeout` or a wake. A peer that leaves meanwhile is let go,
        and one that asks is answered: a relay that stops waits for nobody."""
        connection = self._connection
        if connection is not None and not connection.is_usable():
            # It said so when it was read last, be it with an answer, and says no more.
            self.close()
            connection = None
        if connection is None:
            self._waker.wait(timeout)
            return
        self._waker.wait(timeout, connection.sock, connection.wants_to_write())
        try:
            connection.exchange()
        except Exception:  # the next call connects again, and says what is wrong if it still is
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

    def __init__(self, stream):
        self.stream = stream
        self.headers, self.trailers, self.body = None, None, bytearray()
        self.is_ended, self.reset = False, None


class _Http2(h2.connection.H2Connection):
    # Of how many calls that are over it keeps the ids, for frames that come late.
    # Its own choice is 65,536, which is 7 MB of a process that lives for long.
    MAX_CLOSED_STREAMS = 64


class Connection:
    def __init__(self, sock, waker):
        self.sock, self._waker = sock, waker
        # What a proxy's answer has in excess is no reason not to read it.
        self._http = _Http2(h2.config.H2Configuration(header_encoding="latin-1", validate_inbound_headers=False))
        self._http.local_settings = Settings(client=True, initial_values=SETTINGS)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(WINDOW_BYTES)
        self._inbox, self._outbox, self._reply = bytearray(), bytearray(), None
        self._goes_away, self._last_stream = False, 0
        self._heard_at, self._pinged_at, self._is_http2 = time.monotonic(), None, False

    def is_usable(self):
        return not self._goes_away

    def wants_to_write(self):
        self._outbox += self._http.data_to_send()
        return bool(self._outbox)

    def call(self, target, path, message, ends_at):
        stream = self._open_stream(_headers(target, path, ends_at() - time.monotonic()))
        reply = self._reply = _Reply(stream)
        try:
            unsent = memoryview(struct.pack(">BI", 0, len(message)) + message)
            self._heard_at, self._pinged_at = time.monotonic(), None
            while not reply.is_ended:
                if len(unsent):
                    unsent = self._send_data(stream, unsent)
                if time.monotonic() >= ends_at():
                    raise CallError(DEADLINE_EXCEEDED, "no answer in time")
                if not self.exchange():
                    self._wait(ends_at)
                if self._goes_away and self._last_stream < stream and not reply.is_ended:
                    raise CallError(UNAVAILABLE, "the relay has closed the connection", untouched=True)
            if len(unsent) and reply.reset is None:  # answered before it was read: nobody wants the rest
                self._http.reset_stream(stream, ErrorCodes.CANCEL)
            return _answer(reply)
        finally:
            self._reply = None

    def _open_stream(self, headers):
        try:
            stream = self._http.get_next_available_stream_id()
            self._http.send_headers(stream, headers)
        except (h2.exceptions.NoAvailableStreamIDError, h2.exceptions.TooManyStreamsError):
            raise CallError(UNAVAILABLE, "the connection takes no more calls", untouched=True) from None
        return stream

    def _wait(self, ends_at):
        now = time.monotonic()
        if self._pinged_at is None and now - self._heard_at >= QUIET_MAX:
            self._http.ping(b"a sign? ")
            self._pinged_at = now
        elif self._pinged_at is not None and now - self._pinged_at >= PING_TIMEOUT:
            raise CallError(UNAVAILABLE, f"the peer gave no sign of life for {now - self._heard_at:.0f} s")
        left = min(ends_at() - now, QUIET_MAX if self._pinged_at is None else PING_TIMEOUT, 1.0)
        self._waker.wait(left, self.sock, self.wants_to_write())

    def _send_data(self, stream, unsent):
        """As much as the peer's windows allow; returns the rest."""
        while len(unsent):
            size = min(len(unsent), self._http.local_flow_control_window(stream), self._http.max_outbound_frame_size)
            if size <= 0:
                break
            self._http.send_data(stream, bytes(unsent[:size]), end_stream=size == len(unsent))
            unsent = unsent[size:]
        return unsent

    def exchange(self):
        """Writes and reads what goes without waiting. False if nothing did."""
        moved = False
        while self.wants_to_write():
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
            if self.wants_to_write() and len(self._outbox) > UNWRITTEN_BYTES_MAX:
                raise CallError(UNAVAILABLE, "the peer asks, and does not read the answers")
        return True

    def _take_frames(self):
        """Hands h2 the frames, and keeps a GOAWAY: h2 takes it for the end of the
        connection, but the peer goes on to answer the call that it has begun."""
        while len(self._inbox) >= FRAME_HEAD_BYTES:
            size, kind = int.from_bytes(self._inbox[:3], "big"), self._inbox[3]
            if not self._is_http2 and kind != hyperframe.frame.SettingsFrame.type:
                is_http1 = self._inbox.startswith(b"HTTP/")
                raise CallError(UNAVAILABLE, f"the peer speaks {'HTTP/1' if is_http1 else 'something else'}, not gRPC")
            self._is_http2 = True
            if size > FRAME_BYTES_MAX:  # h2 would read it first
                raise CallError(INTERNAL, f"a frame of {size} bytes")
            if len(self._inbox) < FRAME_HEAD_BYTES + size:
                return
            frame = bytes(self._inbox[: FRAME_HEAD_BYTES + size])
            del self._inbox[: FRAME_HEAD_BYTES + size]
            if kind == hyperframe.frame.GoAwayFrame.type:
                self._take_goaway(memoryview(frame))
                continue
            for event in self._http.receive_data(frame):
                self._take(event)

    def _take_goaway(self, frame):
        goaway, _ = hyperframe.frame.Frame.parse_frame_header(frame[:FRAME_HEAD_BYTES])
        goaway.parse_body(frame[FRAME_HEAD_BYTES:])
        self._goes_away, self._last_stream = True, goaway.last_stream_id

    def _take(self, event):
        if isinstance(event, h2.events.DataReceived):
            self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        reply = self._reply
        if reply is None or getattr(event, "stream_id", None) != reply.stream:
            return
        if isinstance(event, h2.events.ResponseReceived):
            reply.headers = dict(event.headers)
        elif isinstance(event, h2.events.DataReceived):
            reply.body += event.data
            if len(reply.body) > ANSWER_BYTES_MAX:
                raise CallError(INTERNAL, f"an answer of over {ANSWER_BYTES_MAX} bytes")
        elif isinstance(event, h2.events.TrailersReceived):
            reply.trailers = dict(event.headers)
        elif isinstance(event, h2.events.StreamEnded):
            reply.is_ended = True
        elif isinstance(event, h2.events.StreamReset):
            reply.reset, reply.is_ended = int(event.error_code), True


def _headers(target, path, seconds):
    return (
        (":method", "POST"),
        (":scheme", "http" if target.tls is None else "https"),
        (":path", path),
        (":authority", target.authority),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "analytics-relay-python"),
        ("grpc-timeout", f"{max(1, int(seconds * 1000))}m"),
    )


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
            UNAVAILABLE, f"the call was reset (HTTP/2 error {reply.reset})", untouched=reply.reset == ErrorCodes.REFUSED_STREAM
        )
    elif status != "200":
        code = HTTP_CODES.get(int(status or 0), UNKNOWN)
        raise CallError(code, f"HTTP status {status or 'missing'}", too_large=status == "413")
    else:
        raise CallError(UNKNOWN, "the answer has no gRPC status")
    if len(reply.body) < 5 or reply.body[0] != 0 or struct.unpack_from(">I", reply.body, 1)[0] != len(reply.body) - 5:
        raise CallError(INTERNAL, "the answer is no gRPC message")
    return bytes(reply.body[5:])
