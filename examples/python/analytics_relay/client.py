"""The client as a program sees it; what waits is in `_outbox`."""

from __future__ import annotations

import atexit
import collections
import datetime
import enum
import os
import ssl
import sys
import uuid
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

from . import _event
from ._outbox import Outbox
from ._transport import Target
from ._warn import Warnings

QUEUE_BYTES_MAX = 16 * 1024 * 1024
BATCH_EVENTS_MAX = 1000  # the relay's
EXIT_TIMEOUT = 3.0
LABEL_CHARS_MAX = 100

# What checkers of types are told; a call of another shape raises nothing nevertheless.
Id = Union[str, int, uuid.UUID, enum.Enum]
Time = Union[datetime.date, str, float, enum.Enum]

Settings = collections.namedtuple(
    "Settings", "target queue_max queue_bytes_max batch_max flush_interval call_timeout retry_delay_max"
)


class Analytics:
    """Events wait in a bounded queue; a thread sends them, a batch at a time.

    `track` and `identify` never wait and never raise. What cannot be sent is
    counted and logged (`analytics_relay`), a line of a kind each ten seconds.
    Options that make no sense raise here: TypeError, ValueError, or what the
    certificate's file raises.

    After a fork the child has a queue, a connection and a thread of its own,
    and the parent keeps what waited.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: bool | ssl.SSLContext | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        cert_file: str | os.PathLike[str] | None = None,
        key_file: str | os.PathLike[str] | None = None,
        queue_max: int = 10_000,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        batch_max: int = 50,
        flush_interval: float = 0.1,
        call_timeout: float = 10.0,
        retry_delay_max: float = 10.0,
        exit_timeout: float = EXIT_TIMEOUT,
    ) -> None:
        self._settings = Settings(
            Target(target, _tls(tls, ca_file, cert_file, key_file)),
            _option("queue_max", queue_max, int, 1),
            _option("queue_bytes_max", queue_bytes_max, int, 1),
            _option("batch_max", batch_max, int, 1, BATCH_EVENTS_MAX),
            _option("flush_interval", flush_interval, (int, float), 0, 3600),
            _option("call_timeout", call_timeout, (int, float), 0.1, 3600),
            _option("retry_delay_max", retry_delay_max, (int, float), 0.1, 3600),
        )
        self._exit_timeout = _option("exit_timeout", exit_timeout, (int, float), 0, 3600)
        self._start_over()
        _clients.add(self)
        # A client that is forgotten sends what it has, and its thread ends.
        weakref.finalize(self, _forget, self._current).atexit = False

    if TYPE_CHECKING:

        def track(
            self,
            name: str | enum.Enum,
            user_id: Id | None = None,
            properties: Mapping[str, object] | None = None,
            *,
            anonymous_id: Id | None = None,
            event_id: Id | None = None,
            timestamp: Time | None = None,
            context: Mapping[str, object] | None = None,
            durability: str | enum.Enum | None = None,
        ) -> str | None: ...

        def identify(
            self,
            user_id: Id,
            traits: Mapping[str, object] | None = None,
            *,
            anonymous_id: Id | None = None,
            event_id: Id | None = None,
            timestamp: Time | None = None,
            context: Mapping[str, object] | None = None,
            durability: str | enum.Enum | None = None,
        ) -> str | None: ...

    def track(self, *args, **fields):  # type: ignore[no-redef]
        """track(name, user_id=None, properties=None, *, anonymous_id=None,
        event_id=None, timestamp=None, context=None, durability=None)

        Queues something that a user did. Returns the event's id, or None if the
        event was dropped. `timestamp` is when it happened, if not now.
        """
        return self._put("track", args, fields)

    def identify(self, *args, **fields):  # type: ignore[no-redef]
        """identify(user_id, traits=None, *, anonymous_id=None, event_id=None,
        timestamp=None, context=None, durability=None)

        The same for what is known about a user. None removes a trait.
        """
        return self._put("identify", args, fields)

    def counters(self) -> dict[str, int]:
        """What became of the events of this process: queued = accepted + refused
        + abandoned + waiting. Beside it `dropped`, which never were queued."""
        return self._outbox().counters()

    def flush(self, timeout: float = 5.0) -> bool:
        """Sends what waits at once. True when all of it has been answered
        within `timeout` seconds."""
        return self._outbox().flush(_seconds(timeout))

    def close(self, timeout: float = 5.0) -> bool:
        """Takes nothing more and sends what waits. True when nothing was lost:
        what the relay has not answered after `timeout` seconds is abandoned."""
        return self._outbox().close(_seconds(timeout))

    def __enter__(self) -> Analytics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, call, args, fields):
        outbox, warn = self._outbox(), self._warnings.warn
        label = call
        try:
            label = _label(call, args, fields)
            event_id = _event_id(fields)
            label = f"{label} ({event_id})"

            def left_out(field, got, want):
                outbox.count("left_out")
                warn("left_out", "left out of %s: %s: got %s, want %s", label, field, got, want)

            why = outbox.put(label, _event.encoded(call, args, fields, event_id, left_out))
            if why is None:
                return event_id
            warn("full", "event dropped: %s: %s", label, why)
        except _event.Dropped as error:
            outbox.count("dropped")
            warn("shape", "event dropped: %s: %s", label, error)
        except Exception as error:  # of any value's own code: analytics must not fail a request
            outbox.count("dropped")
            warn("defect", "event dropped: %s: it cannot be encoded: %s", label, type(error).__name__)
        return None

    def _outbox(self):
        outbox = self._current[0]
        if outbox.pid != os.getpid():  # forked by something that calls no hooks of Python's
            outbox.abandon_in_child()
            self._start_over()
            outbox = self._current[0]
        return outbox

    def _start_over(self):
        self._warnings = Warnings()
        self._current = getattr(self, "_current", [None])
        self._current[0] = Outbox(self._settings, self._warnings, _before_first_event)


def _event_id(fields):
    """The caller's own, else a new one: fixed now, so that a second try is harmless."""
    return _event.identifier("event_id", fields.get("event_id")) or str(uuid.uuid4())


def _label(call, args, fields):
    """The event's name, for warnings."""
    name = call
    if call == "track":
        given = args[0] if args else fields.get("name")
        name = repr(_event.text(given[:LABEL_CHARS_MAX])) if isinstance(given, str) else "a track"
    return name


def _tls(tls, ca_file, cert_file, key_file):
    """The context, or None for a connection in the clear."""
    if key_file is not None and cert_file is None:
        raise ValueError("key_file: got no cert_file beside it, want both")
    files = ca_file is not None or cert_file is not None
    if isinstance(tls, ssl.SSLContext):
        if files:
            raise ValueError("tls: got a context and files, want one of them")
        return tls
    if tls not in (None, True, False):
        raise TypeError(f"tls: got {type(tls).__name__}, want True, False or an ssl.SSLContext")
    if tls is False and files:
        raise ValueError("tls: got False and files, want True")
    if not tls and not files:
        return None
    context = ssl.create_default_context(cafile=ca_file)
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file)
    return context


def _option(name, value, kind, least, most=None):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number")
    if not (least <= value and (most is None or value <= most)):
        want = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: got {value}, want {want}")
    return value


def _seconds(timeout):
    return _option("timeout", timeout, (int, float), 0, 86_400)


# The ends of processes.

_clients = weakref.WeakSet()
_forgotten = []  # outboxes whose client is gone, and which are not empty yet
_ends_with = None  # the process whose end, as multiprocessing has it, is waited for


def _forget(current):
    outbox = current[0]
    if outbox.pid == os.getpid():
        _forgotten[:] = [other for other in _forgotten if not other.is_closed()]
        _forgotten.append(outbox)
        outbox.begin_close(EXIT_TIMEOUT)


def _at_end():
    """Sends what waits, all clients at the same time. Before Python ends its
    threads, and without a new one: 3.12 cannot start any at this point."""
    ending = [(client._current[0], client._exit_timeout) for client in list(_clients)]
    ending += [(outbox, EXIT_TIMEOUT) for outbox in _forgotten]
    ending = [(outbox, timeout) for outbox, timeout in ending if outbox.pid == os.getpid()]
    for outbox, timeout in ending:
        outbox.begin_close(timeout)
    for outbox, timeout in ending:
        outbox.close(timeout)


def _before_first_event():
    """Called once an outbox starts. A worker of multiprocessing ends without
    `atexit`, by finalizers, which it forgets when it begins: not before now."""
    global _ends_with
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if process is None or util is None or process.parent_process() is None or _ends_with == os.getpid():
        return
    _ends_with = os.getpid()
    util.Finalize(None, _at_end, exitpriority=0)


def _in_child():
    """A new lock, queue, connection and thread: those of the parent are its own,
    and whoever held the lock at the fork is not here."""
    _forgotten.clear()
    for client in list(_clients):
        client._current[0].abandon_in_child()
        client._start_over()


atexit.register(_at_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
