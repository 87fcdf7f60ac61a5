"""The way to the relay: paths that die, peers that speak otherwise, TLS."""

import pathlib
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import unittest
from unittest import mock

import grpc

from analytics_relay import _transport
from support import Case, PATIENCE, _proto, needs, wait_until


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


SETTINGS = frame(4, 0, 0)
RESPONSE = _proto.TrackBatchResponse(answers=[{"accepted": {}}]).SerializeToString()


def answer_frames(stream, grpc_status=b"0"):
    def literal(name, value):
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    return (
        frame(1, 4, stream, literal(b":status", b"200") + literal(b"content-type", b"application/grpc"))
        + frame(0, 0, stream, struct.pack(">BI", 0, len(RESPONSE)) + RESPONSE)
        + frame(1, 5, stream, literal(b"grpc-status", grpc_status))
    )


class Peer:
    """Listens, and does with each connection what it is told."""

    def __init__(self, *talks):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = []
        self._talks = list(talks)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections.append(connection)
            talk = self._talks.pop(0) if len(self._talks) > 1 else self._talks[0]
            threading.Thread(target=self._talk, args=(talk, connection), daemon=True).start()

    @staticmethod
    def _talk(talk, connection):
        try:
            talk(connection)
        except OSError:
            pass

    def close(self):
        for open_one in (self._listener, *self.connections):
            open_one.close()


def request_of(connection):
    """Reads until the call is complete; returns its stream."""
    received = b""
    while True:
        part = connection.recv(65_536)
        if not part:
            raise OSError("closed")
        received += part
        rest = received[24:] if received.startswith(b"PRI") else received
        while len(rest) >= 9:
            size, kind, flags = int.from_bytes(rest[:3], "big"), rest[3], rest[4]
            stream = int.from_bytes(rest[5:9], "big")
            if len(rest) < 9 + size:
                break
            if kind == 0 and flags & 1:
                return stream
            rest = rest[9 + size :]


def serves(connection):
    connection.sendall(SETTINGS)
    while True:
        connection.sendall(answer_frames(request_of(connection)))


class Paths(Case):
    def peer(self, *talks):
        peer = Peer(*talks)
        self.addCleanup(peer.close)
        return peer

    def sends(self, peer, **options):
        """An event gets through; how long it took."""
        client = self.client(peer.address, **options)
        began = time.monotonic()
        client.track("A", "u")
        wait_until(lambda: client.counters()["accepted"] == 1, lambda: f"{client.counters()} {self.warnings}")
        return time.monotonic() - began

    def test_a_path_that_died_is_noticed_within_seconds(self):
        """Packets go nowhere, and nothing says so: no answer to a ping either."""
        with mock.patch.multiple(_transport, QUIET_MAX=0.3, PING_TIMEOUT=0.3):
            took = self.sends(self.peer(lambda connection: time.sleep(60), serves))
        self.assertLess(took, 9)  # a call has ten seconds
        self.assertIn("gave no sign of life", self.warnings[0])

    def test_a_slow_answer_is_waited_for_while_the_peer_answers_pings(self):
        def slow(connection):
            connection.sendall(SETTINGS)
            stream = request_of(connection)
            ends_at = time.monotonic() + 2
            connection.settimeout(0.05)
            pings = 0
            while time.monotonic() < ends_at:
                try:
                    received = connection.recv(65_536)
                except socket.timeout:
                    continue
                at = received.find(b"\x00\x00\x08\x06\x00\x00\x00\x00\x00")
                if at >= 0:
                    pings += 1
                    connection.sendall(frame(6, 1, 0, received[at + 9 : at + 17]))
            self.pings = pings
            connection.sendall(answer_frames(stream))
            time.sleep(PATIENCE)

        with mock.patch.multiple(_transport, QUIET_MAX=0.3, PING_TIMEOUT=PATIENCE):
            self.sends(self.peer(slow))
        self.assertGreater(self.pings, 0)
        self.assertEqual(self.warnings, [])

    def test_a_connection_that_the_peer_closed_while_idle_costs_no_retry(self):
        def once(connection):
            connection.sendall(SETTINGS)
            answer, goaway = answer_frames(request_of(connection)), frame(7, 0, 0, struct.pack(">II", 2**31 - 1, 0))
            if together:
                time.sleep(0.2)  # until the client has nothing more to write, which would wake it
                connection.sendall(answer + goaway)
            else:
                connection.sendall(answer)
                connection.sendall(goaway)
            self.assertEqual(self.rest(connection), b"")  # the client leaves, and a draining relay need not wait

        for together in (True, False):
            with self.subTest(together=together):
                self.leaves_three_times(once)

    def leaves_three_times(self, once):
        peer = self.peer(once)
        client = self.client(peer.address)
        for number in range(3):
            client.track("A", "u")
            wait_until(lambda: client.counters()["accepted"] == number + 1)
            wait_until(lambda: client._current[0]._channel._connection is None)
        self.assertEqual(client.counters()["retries"], 0)
        self.assertEqual((len(peer.connections), self.warnings), (3, []))

    @staticmethod
    def rest(connection):
        while received := connection.recv(65_536):
            last = received
        return received and last

    def test_a_call_that_the_peer_did_not_take_goes_again_at_once(self):
        def refuses(connection):
            connection.sendall(SETTINGS)
            request_of(connection)
            connection.sendall(frame(7, 0, 0, struct.pack(">II", 0, 0)))
            time.sleep(PATIENCE)

        self.sends(self.peer(refuses, serves))
        self.assertEqual(self.warnings, [])

    def test_an_answer_behind_a_goaway_is_read(self):
        def goes(connection):
            connection.sendall(SETTINGS)
            stream = request_of(connection)
            connection.sendall(frame(7, 0, 0, struct.pack(">II", stream, 0)) + answer_frames(stream))

        peer = self.peer(goes)
        self.sends(peer)
        self.assertEqual((len(peer.connections), self.warnings), (1, []))

    def test_an_answer_behind_the_two_goaways_of_a_relay_that_stops_is_read(self):
        """The first names no call, and a ping asks whether it has come: the relay
        waits for the answer to that before it says which call was its last."""

        def stops(connection):
            connection.sendall(SETTINGS)
            stream = request_of(connection)
            connection.sendall(frame(7, 0, 0, struct.pack(">II", 2**31 - 1, 0)) + frame(6, 0, 0, b"goingoff"))
            received = b""
            while frame(6, 1, 0, b"goingoff") not in received:
                received += connection.recv(65_536)
            connection.sendall(frame(7, 0, 0, struct.pack(">II", stream, 0)))
            connection.sendall(frame(8, 0, 0, struct.pack(">I", 5000)) + answer_frames(stream))
            self.assertEqual(self.rest(connection), b"")

        peer = self.peer(stops)
        self.sends(peer)
        self.assertEqual((len(peer.connections), self.warnings), (1, []))

    def test_a_call_that_was_refused_before_anything_was_done_goes_again_at_once(self):
        def refuses(connection):
            connection.sendall(SETTINGS)
            connection.sendall(frame(3, 0, request_of(connection), struct.pack(">I", 7)))
            time.sleep(PATIENCE)

        def takes_no_calls(connection):
            connection.sendall(frame(4, 0, 0, struct.pack(">HI", 3, 0)))
            stream = request_of(connection)  # sent before that was heard
            connection.sendall(answer_frames(stream))
            time.sleep(PATIENCE)

        self.sends(self.peer(refuses, serves))
        peer = self.peer(takes_no_calls, serves)
        client = self.client(peer.address)
        for number in range(2):
            client.track("A", "u")
            wait_until(lambda: client.counters()["accepted"] == number + 1, lambda: str(self.warnings))
        self.assertEqual((len(peer.connections), client.counters()["retries"], self.warnings), (2, 0, []))

    def test_an_answer_that_comes_before_the_call_was_read_is_an_answer(self):
        """What is left of the call is not sent, whether the peer says so or not;
        and what it says of calls that are over ends no connection."""

        def answers_early(connection):
            connection.sendall(frame(4, 0, 0, struct.pack(">HI", 4, 100)))  # so small is the window
            for stream in (1, 3, 5):
                self.headers_of(connection, stream)
                connection.sendall(answer_frames(stream))
                connection.sendall(frame(3, 0, stream, struct.pack(">I", 0)) if stream == 5 else b"")
            connection.sendall(frame(8, 0, 1, struct.pack(">I", 10)) + frame(3, 0, 1, struct.pack(">I", 8)))
            connection.sendall(frame(4, 0, 0, struct.pack(">HI", 4, 65_535)))
            connection.sendall(answer_frames(request_of(connection)))
            time.sleep(PATIENCE)

        peer = self.peer(answers_early)
        client = self.client(peer.address)
        for number in range(4):
            client.track("A", "u", {"a": "x" * 5000})
            wait_until(lambda: client.counters()["accepted"] == number + 1, lambda: str(self.warnings))
        self.assertEqual((len(peer.connections), self.warnings), (1, []))

    @staticmethod
    def headers_of(connection, stream):
        received = b""
        while b"\x01\x04" + struct.pack(">I", stream) not in received:  # HEADERS, the only ones of the call
            part = connection.recv(65_536)
            if not part:
                raise OSError("closed")
            received += part

    def test_an_answer_without_bounds_is_not_kept(self):
        window, status = 4 * 1024 * 1024, b"\x88"
        far = frame(0, 0, 1, b"\0" * 16_384) * (window // 16_384)
        entry = b"\x40\x01x" + b"\x7f" + bytes([0x80 | (3000 - 127) & 0x7F, (3000 - 127) >> 7]) + b"x" * 3000
        for said, want in (
            (frame(1, 4, 1, status) + far + frame(0, 0, 1, b"\0"), "an answer of over 4194304 bytes"),
            (frame(1, 0, 1, status) + frame(9, 0, 1, b"\0\x01a\x01b" * 100) * 100, "no HTTP/2"),
            (frame(1, 4, 1, status + entry + b"\xbe" * 1000), "no HTTP/2"),  # 3 MB when unpacked
            (frame(8, 0, 0, struct.pack(">I", 2**31 - 1)), "no HTTP/2"),
            (frame(7, 0, 0, b"\0" * 3), "no HTTP/2"),
            (frame(5, 4, 1, struct.pack(">I", 2) + status), "no HTTP/2"),  # a push, which nobody wanted
        ):
            self.warnings.clear()

            def talk(connection, said=said):
                connection.sendall(SETTINGS)
                request_of(connection)
                connection.sendall(said)
                time.sleep(PATIENCE)

            self.sends(self.peer(talk, serves))
            self.assertIn(want, self.warnings[0])

    def test_headers_that_http2_does_not_have_cost_no_answer(self):
        """As a proxy may send that only knows HTTP/1 behind it."""

        def talk(connection):
            connection.sendall(SETTINGS)
            stream = request_of(connection)
            whole = answer_frames(stream)
            block, rest = whole[9 : 9 + whole[2]], whole[9 + whole[2] :]
            connection.sendall(frame(1, 4, stream, block + b"\0\x0aConnection\x05close") + rest)
            time.sleep(PATIENCE)

        peer = self.peer(talk)
        self.sends(peer)
        self.assertEqual((len(peer.connections), self.warnings), (1, []))

    def test_an_answer_in_pieces_with_padding_continuation_and_strange_frames_is_read(self):
        def pieces(connection):
            stream = 0
            connection.sendall(SETTINGS)
            stream = request_of(connection)
            whole = answer_frames(stream)
            head = whole[: 9 + int.from_bytes(whole[:3], "big")]
            block, rest = head[9:], whole[len(head) :]
            written = (
                frame(99, 3, stream, b"unknown")
                + frame(1, 0x20 | 0x08, stream, b"\x02" + b"\0" * 5 + block[:7] + b"pp")
                + frame(9, 4, stream, block[7:])
                + frame(6, 0, 0, b"12345678")
                + rest
            )
            for byte in written:
                connection.sendall(bytes([byte]))
            time.sleep(PATIENCE)

        peer = self.peer(pieces)
        self.sends(peer)
        self.assertEqual((len(peer.connections), self.warnings), (1, []))

    def test_a_peer_that_speaks_otherwise_is_named_and_the_event_waits(self):
        for said, want in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "speaks HTTP/1"),
            (b"SSH-2.0-OpenSSH_9.2\r\n", "speaks something else"),
            (SETTINGS + frame(1, 5, 1, b"\xff" * 40), "no HTTP/2"),
            (SETTINGS + frame(0, 0, 0, b"x" * 17_000), "a frame of"),
            (SETTINGS + frame(3, 0, 1, b"\0\0\0\x0b"), "the call was reset"),
        ):
            self.warnings.clear()

            def talk(connection, said=said):
                request_of(connection) if said.startswith(SETTINGS) else connection.recv(10)
                connection.sendall(said)
                time.sleep(PATIENCE)

            self.sends(self.peer(talk, serves))
            self.assertIn(want, self.warnings[0])

    def test_answers_of_http_alone(self):
        def literal(value):
            return b"\0\x07:status\x03" + value

        for status, want in (
            (b"503", "UNAVAILABLE: HTTP status 503"),
            (b"404", "UNIMPLEMENTED"),
            (b"200", "no gRPC status"),
        ):
            self.warnings.clear()

            def talk(connection, status=status):
                connection.sendall(SETTINGS)
                stream = request_of(connection)
                connection.sendall(frame(1, 5, stream, literal(status)))
                serves_on(connection)

            def serves_on(connection):
                while True:
                    connection.sendall(answer_frames(request_of(connection)))

            self.sends(self.peer(talk, serves))
            self.assertIn(want, self.warnings[0])

    def test_a_proxy_s_413_splits(self):
        def talk(connection):
            connection.sendall(SETTINGS)
            while True:
                stream = request_of(connection)
                connection.sendall(frame(1, 5, stream, b"\0\x07:status\x03413"))

        client = self.client(self.peer(talk).address, flush_interval=60)
        for number in range(3):
            client.track(f"E{number}", "u")
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(client.counters()["refused"], 3)

    def test_a_large_batch_goes_through_small_windows(self):
        relay = self.relay(options=[("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.max_frame_size", 16_384)])
        client = self.client(relay, batch_max=1000, flush_interval=60)
        for number in range(100):
            client.track(f"E{number}", "u", {"a": "x" * 9_000})
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(relay.names(), [f"E{number}" for number in range(100)])

    def test_a_relay_that_comes_back_is_found_within_seconds(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        client = self.client(f"127.0.0.1:{port}", retry_delay_max=0.5)
        client.track("A", "u")
        wait_until(lambda: client.counters()["retries"] >= 4)
        relay = self.relay(port=port)
        began = time.monotonic()
        relay.wait_for(1)
        self.assertLess(time.monotonic() - began, 10)

    def test_more_than_1024_descriptors_are_no_matter(self):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1300:
            self.skipTest("not run: RLIMIT_NOFILE is below 1,300")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        files = [open("/dev/null") for _ in range(1100)]
        self.addCleanup(lambda: [file.close() for file in files])
        self.assertGreater(files[-1].fileno(), 1024)
        self.sends(self.peer(serves))

    def test_a_peer_that_never_stops_talking_does_not_outlast_the_call(self):
        def floods(connection):
            connection.sendall(SETTINGS)
            while True:
                connection.sendall(frame(6, 0, 0, b"12345678") * 1000)

        client = self.client(self.peer(floods).address)
        client.track("A", "u")
        began = time.monotonic()
        self.assertFalse(client.close(1))
        self.assertLess(time.monotonic() - began, 8)  # a call has ten seconds

    def test_the_system_asks_an_idle_peer_whether_it_lives(self):
        client = self.client(self.relay())
        client.track("A", "u")
        self.assertTrue(client.flush(PATIENCE))
        sock = client._current[0]._channel._connection.sock
        self.assertNotEqual(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), 0)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 20)

    def test_an_address_in_all_its_forms(self):
        relay = self.relay()
        for form in ("{}", "http://{}", "dns:///{}", "http://{}/"):
            client = self.client(form.format(relay.address))
            client.track("A", "u")
            self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(_transport.Target("[::1]:50054", None).host, "::1")


@needs(shutil.which("openssl"), "openssl")
class Tls(Case):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        cls.openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            "/CN=ca",
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        )
        cls.openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            "other.key",
            "-out",
            "other.pem",
            "-days",
            "2",
            "-subj",
            "/CN=other",
        )
        for name in ("relay", "caller"):
            (cls.folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
            cls.openssl(
                "req",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                f"{name}.key",
                "-out",
                f"{name}.csr",
                "-subj",
                f"/CN={name}",
            )
            cls.openssl(
                "x509",
                "-req",
                "-in",
                f"{name}.csr",
                "-CA",
                "ca.pem",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-out",
                f"{name}.pem",
                "-days",
                "2",
                "-extfile",
                "ext",
            )

    @classmethod
    def openssl(cls, *args):
        subprocess.run(["openssl", *args], cwd=cls.folder, check=True, capture_output=True)

    def file(self, name):
        return str(self.folder / name)

    def tls_relay(self, asks):
        key, chain, ca = (pathlib.Path(self.file(name)).read_bytes() for name in ("relay.key", "relay.pem", "ca.pem"))
        return self.relay(credentials=grpc.ssl_server_credentials([(key, chain)], ca if asks else None, asks))

    def test_a_certificate_on_both_sides(self):
        relay = self.tls_relay(True)
        client = self.client(
            relay, ca_file=self.file("ca.pem"), cert_file=self.file("caller.pem"), key_file=self.file("caller.key")
        )
        for number in range(100):
            client.track(f"E{number}", "u", {"a": "x" * 9_000})
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(len(relay.names()), 100)

    def test_an_authority_that_is_unknown_or_no_tls_at_all_keeps_the_events(self):
        relay = self.tls_relay(False)
        for options in ({"tls": True}, {}, {"ca_file": self.file("other.pem")}):
            self.warnings.clear()
            client = self.client(relay, **options)
            client.track("A", "u")
            self.assertFalse(client.flush(0.5))
            self.assertEqual(client.counters()["waiting"], 1)
            wait_until(lambda: self.warnings)
        self.assertEqual(relay.names(), [])

    def test_https_in_the_address_means_tls(self):
        self.assertIsNotNone(_transport.Target("https://localhost:50054", None).tls)


if __name__ == "__main__":
    unittest.main()
