"""A relay that does as it is told, served by gRPC's own server, and programs to
be run as processes of their own.

    python3 -m unittest discover -s tests

`RELAY_BIN` names a relay for the tests that need a real one.
"""

import importlib.util
import json
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent import futures

_missing = [
    package
    for module, package in (("grpc", "grpcio"), ("google", "protobuf"), ("h2", "h2"))
    if importlib.util.find_spec(module) is None
]
if _missing:
    print(f"not run: {', '.join(_missing)} is missing", flush=True)
    os._exit(77)  # unittest would make an error of anything milder

import grpc  # noqa: E402

from analytics_relay import Analytics, _proto  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
PACKAGE = HERE.parent
PATIENCE = 20


_RESPONSE = _proto.TrackBatchResponse


def accept_all(request, _):
    response = _RESPONSE()
    for _ in request.items:
        response.answers.add().accepted.SetInParent()
    return response


class FakeRelay:
    """`answer(request, context)` decides; `items` are those that it accepted."""

    def __init__(self, answer=accept_all, *, credentials=None, options=(), port=0):
        self.requests, self._answer = [], answer
        self.lock = threading.Lock()
        self.server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0), *options])
        self.server.add_generic_rpc_handlers((self,))
        if credentials is None:
            self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        else:
            self.port = self.server.add_secure_port(f"127.0.0.1:{port}", credentials)
        self.address = f"127.0.0.1:{self.port}"
        self.server.start()

    def service(self, details):
        if details.method != _proto.TRACK_BATCH:
            return None
        return grpc.unary_unary_rpc_method_handler(
            self._serve,
            _proto.TrackBatchRequest.FromString,
            lambda response: response if isinstance(response, bytes) else response.SerializeToString(),
        )

    def _serve(self, request, context):
        with self.lock:
            self.requests.append(request)
        return self._answer(request, context)

    def items(self):
        with self.lock:
            return [item for request in self.requests for item in request.items]

    def names(self):
        return [item.track.event_name for item in self.items()]

    def wait_for(self, count):
        wait_until(lambda: len(self.items()) >= count, lambda: f"{len(self.items())} of {count} events")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.stop(0).wait()


def wait_until(condition, what=lambda: "it did not happen"):
    ends_at = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > ends_at:
            raise AssertionError(what())
        time.sleep(0.01)


def properties(item):
    which = item.track if item.WhichOneof("item") == "track" else item.identify
    return json.loads(which.properties_json) if which.properties_json else None


def environment(*before):
    """Of a program that imports the client, and what lies in the folders `before`."""
    paths = [*map(str, before), str(PACKAGE), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def run(script, *args, before=()):
    """A program with the client; what it printed, and how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(*before),
        check=False,
        close_fds=False,  # or Python 3.9 forks, which grpcio in this process may not survive
    )
    done.seconds = time.monotonic() - began
    return done


class Case(unittest.TestCase):
    """With a relay, and a client of it whose warnings are kept."""

    def setUp(self):
        self.warnings = []
        handler = logging.Handler()
        handler.emit = lambda record: self.warnings.append(record.getMessage())
        log = logging.getLogger("analytics_relay")
        log.addHandler(handler)
        log.propagate = False
        self.addCleanup(log.removeHandler, handler)

    def relay(self, *args, **options):
        relay = FakeRelay(*args, **options)
        self.addCleanup(relay.__exit__)
        return relay

    def client(self, relay, **options):
        client = Analytics(relay if isinstance(relay, str) else relay.address, **options)
        self.addCleanup(client.close, 0)
        return client

    def sent(self, call):
        """The items that the calls make."""
        relay = self.relay()
        client = self.client(relay)
        call(client)
        self.assertTrue(client.flush(PATIENCE))
        return relay.items()

    def sent_properties(self, values):
        """What becomes of a dict of properties."""
        (item,) = self.sent(lambda client: client.track("Seen", "user-1", values))
        return properties(item)


def make_certificate(folder):
    """The paths of a key and of a certificate for this machine that it has signed."""
    key, certificate = os.path.join(folder, "key.pem"), os.path.join(folder, "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
        + ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"],
        check=True,
        capture_output=True,
    )
    return key, certificate


def needs(is_here, what):
    """A test that is skipped without it, or fails where all is asked for."""
    if is_here or os.environ.get("RELAY_REQUIRE") == "all":
        return lambda test: test
    return unittest.skip(f"not run: {what} is missing")


def has(*modules):
    return all(importlib.util.find_spec(module) is not None for module in modules)


RELAY_BIN = os.environ.get("RELAY_BIN")
needs_relay = needs(RELAY_BIN, "RELAY_BIN, the path of a relay,")


class Relay:
    """A real one in test mode, which needs no key and sends nothing."""

    def __init__(self, port=0, **settings):
        self._folder = tempfile.TemporaryDirectory()
        settings = {
            "TEST_MODE": "true",
            "GRPC_PORT": str(port),
            "HTTP_PORT": "off",
            "METRICS_PORT": "0",
            "DATA_DIR": self._folder.name,
            "LOG_FORMAT": "json",
            "LOG_LEVEL": "info",
            **settings,
        }
        self._process = subprocess.Popen(
            [RELAY_BIN],
            env={"PATH": os.environ.get("PATH", ""), **settings},
            cwd=self._folder.name,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in self._process.stdout:
            if '"relay started"' in line:
                self.port = int(json.loads(line)["grpc_addr"].rpartition(":")[2])
                break
        else:
            raise AssertionError("the relay did not start")
        self.address = f"127.0.0.1:{self.port}"
        # Read on, or it would be held up one day.
        self._reader = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reader.start()

    def stop(self):
        self._process.terminate()
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self._folder.cleanup()
