"""The events of one process that wait, and the thread that sends them.

Nothing here outlives a fork: a child makes its own, and leaves the parent's
events to the parent.
"""

import collections
import os
import random
import threading
import time

from . import _proto
from ._transport import CallError, Channel, INTERNAL, INVALID_ARGUMENT, OUT_OF_RANGE, RESOURCE_EXHAUSTED, UNKNOWN, Waker

BATCH_BYTES_MAX = 512 * 1024  # half of what the relay takes
ENTRY_BYTES = 400  # what Python needs for an entry beside the event's bytes
RETRY_DELAY_FIRST = 0.1
# The relay's wish is kept to, but neither none at all nor a day.
DEFER_DELAY_MIN, DEFER_DELAY_MAX = 0.1, 300.0
# An answer that this version does not know: a newer relay's.
UNKNOWN_ANSWER_DELAY = 1.0

COUNTS = ("queued", "accepted", "refused", "abandoned", "dropped", "left_out", "retries")
_ENDED = ("accepted", "refused", "abandoned")

# `label` is the event's name and id.
Entry = collections.namedtuple("Entry", "label encoded queued_at")


class Outbox:
    def __init__(self, settings, warnings, before_first_event):
        self.pid = os.getpid()
        self._settings, self._warnings = settings, warnings
        self._before_first_event = before_first_event
        # One thread may hold it twice: a signal's handler may track too. Never
        # held while anything is waited for.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue, self._bytes = collections.deque(), 0
        self._counts = dict.fromkeys(COUNTS, 0)
        self._hurry, self._closes_at, self._closed = False, None, False
        self._thread, self._waker, self._channel = None, None, None
        self._batch_max, self._failures = settings.batch_max, 0

    # What callers use.

    def count(self, name):
        with self._lock:
            self._counts[name] += 1

    def counters(self):
        with self._lock:
            return {**self._counts, "waiting": len(self._queue), "waiting_bytes": self._bytes}

    def put(self, label, encoded):
        """Never waits. What keeps it out, if anything does."""
        settings, size = self._settings, len(encoded) + ENTRY_BYTES
        with self._lock:
            if self._closes_at is not None:
                self._counts["dropped"] += 1
                return "the client is closed"
            if len(self._queue) >= settings.queue_max or self._bytes + size > settings.queue_bytes_max:
                self._counts["dropped"] += 1
                return f"the queue is full ({len(self._queue)} events, {self._bytes} bytes): the relay is away or slow"
            self._queue.append(Entry(label, encoded, time.monotonic()))
            self._bytes += size
            self._counts["queued"] += 1
            wakes = len(self._queue) in (1, settings.batch_max)
        if self._thread is None:
            self._start()
        elif wakes:
            self._waker.wake()
        return None

    def flush(self, timeout):
        """Sends what waits at once. True when it has been answered in time."""
        with self._lock:
            if self._queue:
                self._start()
            queued = self._counts["queued"]
            self._hurry = True
        if self._waker is not None:
            self._waker.wake()
        with self._changed:
            return self._changed.wait_for(lambda: self._ended() >= queued, timeout)

    def begin_close(self, timeout):
        with self._lock:
            if self._closes_at is None:
                self._closes_at = time.monotonic() + timeout
            if self._queue and self._thread is None:
                self._start()
        if self._waker is not None:
            self._waker.wake()

    def close(self, timeout):
        """Takes nothing more, sends what waits. True when nothing was lost."""
        self.begin_close(timeout)
        if self._thread is None:
            if self._queue:  # no thread may start: the interpreter ends
                self._run()
        elif self._thread is not threading.current_thread():
            # A little longer than its own end; then it is caught in the system's resolver.
            self._thread.join(max(0.0, self._closes_at - time.monotonic()) + 0.5)
        if not self._closed:
            self._give_up()
        return self._counts["abandoned"] == 0

    def is_closed(self):
        return self._closed

    def abandon_in_child(self):
        """This process is a child of the one that made it, which has the events."""
        for part in (self._channel, self._waker):
            if part is not None:
                part.close()

    # What the thread does.

    def _start(self):
        """One thread for the process, when the first event has come. At the end
        of the interpreter none can start: `close` does the work itself then."""
        with self._lock:
            if self._thread is not None or self._closed:
                return
            thread = threading.Thread(target=self._run, name="analytics-relay", daemon=True)
            try:
                self._before_first_event()
                self._waker = self._waker or Waker()
                self._thread = thread
                thread.start()
            except (RuntimeError, OSError) as error:
                self._thread = None
                if "interpreter shutdown" not in str(error):
                    self._warnings.warn("thread", "events wait: no thread to send them: %s", error)

    def _run(self):
        try:
            self._waker = self._waker or Waker()
            self._channel = Channel(self._settings.target, self._waker)
            while batch := self._next_batch():
                delay = self._send(batch)
                if delay:
                    self._pause(delay)
        except Exception as error:  # a defect of ours, or no descriptors: never a silent end
            self._warnings.warn("defect", "the client ends: %s: %s", type(error).__name__, error)
        finally:
            self._give_up()
            if self._channel is not None:
                self._channel.close()
            if self._waker is not None:
                self._waker.close()

    def _next_batch(self):
        """Waits for a batch; nothing when there is no more, or no time left.
        The entries stay in the queue until they are answered."""
        while True:
            with self._lock:
                now, closing = time.monotonic(), self._closes_at is not None
                if closing and (not self._queue or now >= self._closes_at):
                    return []
                timeout = None
                if self._queue:
                    timeout = self._queue[0].queued_at + self._settings.flush_interval - now
                    if closing or self._hurry or timeout <= 0 or len(self._queue) >= self._batch_max:
                        return self._head()
                else:
                    self._hurry = False
            self._channel.idle(timeout)

    def _head(self):
        batch, total = [], 0
        for entry in self._queue:
            total += len(entry.encoded)
            if batch and (len(batch) >= self._batch_max or total > BATCH_BYTES_MAX):
                break
            batch.append(entry)
        return batch

    def _send(self, batch):
        """Sends a batch; returns how long to wait before the next."""
        try:
            answer = self._channel.call(
                _proto.TRACK_BATCH, b"".join(entry.encoded for entry in batch), self._call_ends()
            )
            response = _proto.TrackBatchResponse.FromString(answer)
            if len(response.answers) != len(batch):
                raise CallError(INTERNAL, f"{len(response.answers)} answers to {len(batch)} events")
        except CallError as error:
            return self._failed(batch, error)
        except Exception as error:  # protobuf's own, of a message that is none
            return self._failed(batch, CallError(UNKNOWN, f"the answer cannot be read: {type(error).__name__}"))
        self._failures = 0
        # What was learnt of a limit on the way is forgotten slowly.
        self._batch_max = min(self._settings.batch_max, self._batch_max + max(1, self._batch_max // 8))
        return self._settle(batch, response)

    def _call_ends(self):
        ends_at = time.monotonic() + self._settings.call_timeout
        return lambda: ends_at if self._closes_at is None else min(ends_at, self._closes_at)

    def _settle(self, batch, response):
        """Takes out what was answered for good; returns the delay for the rest."""
        counts, deferred, delay = collections.Counter(), [], response.retry_delay_ms / 1000
        for entry, answer in zip(batch, response.answers):
            what = answer.WhichOneof("answer")
            if what == "accepted":
                counts["accepted"] += 1
            elif what == "refused":
                counts["refused"] += 1
                for violation in answer.refused.violations:
                    self._warnings.warn(
                        "refused",
                        "event refused: %s: %s: %s (%s)",
                        entry.label,
                        violation.field,
                        violation.description,
                        violation.reason,
                    )
            else:
                deferred.append(entry)
                if what != "deferred":
                    delay = max(delay, UNKNOWN_ANSWER_DELAY)
                    self._warnings.warn(
                        "answer", "event waits: %s: an answer that this version does not know", entry.label
                    )
        self._take_out(batch, counts, deferred)
        return min(max(delay, DEFER_DELAY_MIN), DEFER_DELAY_MAX) if deferred else 0

    def _failed(self, batch, error):
        if self._closed:  # `close` waited no longer, and has said so
            return 0
        # The batch as a whole breaks a limit, of the relay's or of something on
        # the way: fewer at a time, and a lone event is to blame.
        breaks_rule = error.code in (INVALID_ARGUMENT, OUT_OF_RANGE) or error.too_large
        may_be_size = breaks_rule or error.code == RESOURCE_EXHAUSTED
        if may_be_size and len(batch) > 1:
            self._batch_max = (len(batch) + 1) // 2
            if breaks_rule:
                return 0
        elif breaks_rule:
            entry = batch[0]
            self._warnings.warn("refused", "event refused: %s: %s", entry.label, error)
            self._take_out(batch, {"refused": 1})
            return 0
        self._failures += 1
        if error.untouched and self._failures == 1:
            return 0  # the relay has closed a connection that was old
        self._warnings.warn("away", "%d events wait, the relay does not take them: %s", len(self._queue), error)
        limit = min(RETRY_DELAY_FIRST * 2 ** min(self._failures - 1, 16), self._settings.retry_delay_max)
        return limit * random.uniform(0.5, 1)

    def _pause(self, delay):
        """Until a flush asks for an attempt, or the end for the last one."""
        ends_at = time.monotonic() + delay
        with self._lock:
            self._counts["retries"] += 1
            was_open, self._hurry = self._closes_at is None, False
        while True:
            with self._lock:
                if self._hurry or was_open and self._closes_at is not None:
                    return
                left = (ends_at if self._closes_at is None else min(ends_at, self._closes_at)) - time.monotonic()
            if left <= 0:
                return
            self._channel.idle(left)

    def _take_out(self, batch, counts, deferred=()):
        with self._lock:
            if self._closed:  # `close` waited no longer: they are counted as abandoned
                return
            for _ in batch:
                self._bytes -= len(self._queue.popleft().encoded) + ENTRY_BYTES
            for entry in reversed(deferred):
                self._queue.appendleft(entry)
                self._bytes += len(entry.encoded) + ENTRY_BYTES
            for name, count in counts.items():
                self._counts[name] += count
            self._changed.notify_all()

    def _give_up(self):
        with self._lock:
            self._closed = True
            self._closes_at = self._closes_at or time.monotonic()
            lost, self._bytes = len(self._queue), 0
            first = self._queue[0] if lost else None
            self._queue.clear()
            self._counts["abandoned"] += lost
            self._changed.notify_all()
        if lost:
            self._warnings.warn(
                "lost", "closed before the relay had taken %d events, they are lost; the first is %s", lost, first.label
            )

    def _ended(self):
        return sum(self._counts[name] for name in _ENDED)
