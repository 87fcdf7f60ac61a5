"""A batching client of the relay: never waits, never raises, keeps order.

    pip install grpcio grpcio-tools
    python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. proto/analytics/v1/analytics.proto

    analytics = Analytics("localhost:50054")
    analytics.track("Order Placed", "user-1", {"total": 49.9, "items": ["book", "pen"]})
    ...
    analytics.close()           # also at exit

One for the process; make it after a fork, not before. A handler of SIGTERM
raises SystemExit, and the events are sent at exit; it does not call `close`,
which may have to wait for what the handler has interrupted.
"""

import atexit
import collections
import json
import logging
import random
import threading
import time
import uuid

import grpc
from analytics.v1 import analytics_pb2 as pb
from analytics.v1 import analytics_pb2_grpc

log = logging.getLogger("analytics_relay")

EVENT_BYTES_MAX = 64 * 1024  # more than the relay's limits leave
BATCH_BYTES_MAX = 512 * 1024  # half of what the relay takes
# A relay that vanished without a word is noticed.
KEEP_ALIVE = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 5_000)]
RETRY_DELAY_FIRST = 0.1
# The batch as a whole breaks a limit: fewer at a time, and a lone event is to blame.
TOO_LARGE = (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INVALID_ARGUMENT)


class Analytics:
    """Events wait in a bounded queue; a thread sends them, a batch at a time.

    `counters()` says what became of them: queued = accepted + refused +
    abandoned + waiting. What did not fit into the queue is `dropped`.
    """

    def __init__(self, target, *, queue_max=10_000, batch_max=50, flush_interval=0.1,
                 call_timeout=10.0, retry_delay_max=10.0, channel=None):
        self._channel = channel or grpc.insecure_channel(target, KEEP_ALIVE)
        self._stub = analytics_pb2_grpc.AnalyticsServiceStub(self._channel)
        self._queue_max, self._batch_max = queue_max, batch_max
        self._flush_interval, self._call_timeout = flush_interval, call_timeout
        self._retry_delay_max = retry_delay_max
        self._queue = collections.deque()
        self._changed = threading.Condition()
        self._counts = collections.Counter()
        self._hurry = False
        self._closes_at = None
        self._call = None
        self._thread = threading.Thread(target=self._run, name="analytics-relay", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def track(self, name, user_id="", properties=None, **fields):
        """Queues an event and returns its id; None if it was dropped."""
        return self._put("track", pb.TrackEventRequest,
                         dict(fields, event_name=name, user_id=user_id), properties)

    def identify(self, user_id, traits=None, **fields):
        """The same for what is known about a user; None removes a trait."""
        return self._put("identify", pb.IdentifyUserRequest, dict(fields, user_id=user_id), traits)

    def counters(self):
        with self._changed:
            return {**dict.fromkeys(("queued", "accepted", "refused", "abandoned", "dropped", "retries"), 0),
                    **self._counts, "waiting": self._counts["queued"] - self._ended()}

    def flush(self, timeout=None):
        """Sends what waits at once. True when all of it has been answered."""
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            queued = self._counts["queued"]
            return self._changed.wait_for(lambda: self._ended() >= queued, timeout)

    def _ended(self):
        return sum(self._counts[name] for name in ("accepted", "refused", "abandoned"))

    def close(self, patience=5.0):
        """Takes nothing more and sends what waits; what the relay has not
        accepted when `patience` is over is abandoned. Returns the counters."""
        with self._changed:
            if self._closes_at is None:
                self._closes_at = time.monotonic() + patience
                call = self._call
                self._changed.notify_all()
                if call is not None:  # its deadline was set for a client that stays open
                    timer = threading.Timer(patience, call.cancel)
                    timer.daemon = True
                    timer.start()
        self._thread.join(patience + 5)
        self._channel.close()
        atexit.unregister(self.close)
        return self.counters()

    def _put(self, kind, request, fields, properties):
        try:
            # An id and a time before the first try make a second one harmless.
            fields["event_id"] = fields.get("event_id") or str(uuid.uuid4())
            if not fields.get("timestamp"):
                fields["timestamp_ms"] = fields.get("timestamp_ms") or int(time.time() * 1000)
            if properties:
                fields["properties_json"] = json.dumps(properties, allow_nan=False, default=str).encode()
            item = pb.TrackBatchItem(**{kind: request(**fields)})
            size = item.ByteSize()
            if size > EVENT_BYTES_MAX:
                raise ValueError(f"got {size} bytes, want at most {EVENT_BYTES_MAX}")
        except Exception:  # of any value's own code: analytics must not fail a request
            log.exception("event dropped: it cannot be encoded")
            with self._changed:
                self._counts["dropped"] += 1
            return None
        with self._changed:
            if self._closes_at is not None or len(self._queue) >= self._queue_max:
                self._counts["dropped"] += 1
                if self._counts["dropped"] == 1:
                    log.warning("event dropped: the queue is full or closed; counters() tells of the others")
                return None
            self._queue.append((item, size))
            self._counts["queued"] += 1
            if len(self._queue) in (1, self._batch_max):
                self._changed.notify_all()
        return fields["event_id"]

    def _run(self):
        batch_max, failures = self._batch_max, 0
        while batch := self._next_batch(batch_max):
            request = pb.TrackBatchRequest(items=batch)
            try:
                response = self._send(request)
                failures, batch_max = 0, self._batch_max
                delay = self._settle(len(batch), response)
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                failures += 1
                code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.CANCELLED
                if code in TOO_LARGE and len(batch) > 1:
                    batch_max, delay = (len(batch) + 1) // 2, 0.001
                elif code in TOO_LARGE:
                    log.warning("event refused: %s", error)
                    delay = self._take_out(1, {"refused": 1})
                else:
                    log.log(logging.WARNING if failures == 1 else logging.DEBUG,
                            "the relay does not take events, they wait: %s", error)
                    limit = min(RETRY_DELAY_FIRST * 2 ** min(failures, 16), self._retry_delay_max)
                    delay = limit * random.uniform(0.5, 1)
            if delay:
                with self._changed:
                    self._counts["retries"] += 1
                    is_open, self._hurry = self._closes_at is None, False
                    # Until a flush asks for an attempt, or the end for the last one.
                    self._changed.wait_for(
                        lambda: self._hurry or is_open and self._closes_at is not None, self._time_left(delay))
        with self._changed:
            if self._queue:
                log.warning("closed before the relay had taken %d events: they are lost", len(self._queue))
            self._counts["abandoned"] += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()

    def _send(self, request):
        with self._changed:
            call = self._stub.TrackBatch.future(request, timeout=self._time_left(self._call_timeout))
            self._call = call
        try:
            return call.result()
        finally:
            self._call = None

    def _time_left(self, seconds):
        """So long, or until the client has to be closed."""
        closes_at = self._closes_at
        return seconds if closes_at is None else max(0.001, min(seconds, closes_at - time.monotonic()))

    def _next_batch(self, batch_max):
        """Waits for a batch; nothing when there is no more, or no time left.
        The items stay in the queue until they are answered."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closes_at is not None)
            self._changed.wait_for(
                lambda: len(self._queue) >= batch_max or self._hurry or self._closes_at is not None,
                self._flush_interval)
            if self._closes_at is not None and time.monotonic() >= self._closes_at:
                return []
            batch, total = [], 0
            for item, size in self._queue:
                total += size
                if batch and (len(batch) >= batch_max or total > BATCH_BYTES_MAX):
                    break
                batch.append(item)
            self._hurry = self._hurry and len(batch) < len(self._queue)
            return batch

    def _settle(self, sent, response):
        """Takes out what was answered for good; returns the delay for the rest."""
        if len(response.answers) != sent:
            log.error("%d answers to %d events, sending again", len(response.answers), sent)
            return self._retry_delay_max
        counts, deferred = collections.Counter(), []
        for index, answer in enumerate(response.answers):
            if answer.WhichOneof("answer") == "accepted":
                counts["accepted"] += 1
            elif answer.WhichOneof("answer") == "refused":
                counts["refused"] += 1
                for violation in answer.refused.violations:
                    log.warning("event refused: %s: %s (%s)", violation.field, violation.description,
                                violation.reason)
            else:
                deferred.append(index)
        self._take_out(sent, counts, deferred)
        return max(response.retry_delay_ms / 1000, 0.001) if deferred else 0

    def _take_out(self, sent, counts, deferred=()):
        with self._changed:
            batch = [self._queue.popleft() for _ in range(sent)]
            self._queue.extendleft(batch[index] for index in reversed(deferred))
            self._counts.update(counts)
            self._changed.notify_all()
        return 0
