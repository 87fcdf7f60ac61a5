"""Warnings of a client that may have something to say a thousand times a second."""

import logging
import time

log = logging.getLogger("analytics_relay")

INTERVAL = 10.0


class Warnings:
    """One line of a kind each ten seconds; the next one counts those between."""

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._kinds = {}  # when the last line was written, how many were not since

    def warn(self, kind, text, *values):
        try:
            now = self._clock()
            written_at, unwritten = self._kinds.get(kind, (None, 0))
            if written_at is not None and now - written_at < INTERVAL:
                self._kinds[kind] = (written_at, unwritten + 1)
                return
            self._kinds[kind] = (now, 0)
            more = f" (and {unwritten} more like it before)" if unwritten else ""
            log.warning(text + more, *values)
        except Exception:  # a handler of the program's own: analytics must not fail a request
            pass
