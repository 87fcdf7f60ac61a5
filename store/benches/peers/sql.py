"""The questions in SQL. What our words mean in it: a visitor is the user, else the device;
a session counts where it starts, so sessions are made of a day more at both ends.

Not in it is what the events do not have: machines, devices that change hands, aliases,
sessions without an id or of more than a day. Only the embedded store minds them.
"""

from datetime import datetime, timedelta, timezone

# As `peers.rs` writes them.
COLUMNS = (
    "id website_id event_type timestamp user_id visitor_id session_id host page source channel "
    "country region city browser browser_version os device properties"
).split()
_END = datetime.fromtimestamp(1_780_000_000 + 90 * 86_400, timezone.utc)
_STEPS = ("/page/0", "/page/1", "/page/2")


class Dialect:
    """That of PostgreSQL."""

    hour = "date_trunc('hour', timestamp, 'Europe/Berlin')"
    date = "date_trunc('day', timestamp, 'Europe/Berlin')"
    visitor = "COALESCE(user_id, visitor_id)"
    plan = "properties->>'plan'"
    # Of a bucket; the lengths of sessions together.
    ms_of_bucket = "CAST(EXTRACT(EPOCH FROM bucket) * 1000 AS BIGINT)"
    ms_of_sessions = "CAST(EXTRACT(EPOCH FROM sum(ended - started)) * 1000 AS BIGINT)"

    def day(self, before: int) -> str:
        """The time so many days before the end."""
        return f"TIMESTAMPTZ '{_END - timedelta(days=before):%Y-%m-%d %H:%M:%S+00}'"

    def questions(self) -> dict[str, list[list[str]]]:
        """What to ask for each: a list for each row of the answer, or one for all of them;
        what those of one list answer stands side by side."""
        filters = " AND country = 'AA' AND browser = 'Chrome'"
        return {
            "by hour, 7 d": [[self._by_time(self.hour, 7)]],
            "by day, 90 d": [[self._by_time(self.date, 90)]],
            "uniques, 30 d": [
                [f"SELECT count(*), {self._visitors} FROM events WHERE {self._between(30, 0)}"]
            ],
            "dashboard + previous, 30 d": [self._dashboard(30, 0), self._dashboard(60, 30)],
            "top pages, visitors": [[self._by_value("page")]],
            "top pages, 2 filters": [[self._by_value("page", filters)]],
            "by a property": [[self._by_value(self.plan)]],
            "funnel, 3 steps": [[self._funnel()]],
        }

    @property
    def _visitors(self) -> str:
        return f"count(DISTINCT {self.visitor})"

    def _between(self, first: int, last: int) -> str:
        return f"website_id = 'site-0' AND timestamp >= {self.day(first)} AND timestamp < {self.day(last)}"

    def _by_time(self, bucket: str, days: int) -> str:
        return f"""
            SELECT {self.ms_of_bucket}, n, visitors
            FROM (SELECT {bucket} AS bucket, count(*) AS n, {self._visitors} AS visitors
                  FROM events WHERE {self._between(days, 0)} GROUP BY 1) AS buckets
            ORDER BY 1"""

    def _by_value(self, value: str, filters: str = "") -> str:
        return f"""
            SELECT {value} AS value, count(*) AS n, {self._visitors} AS visitors
            FROM events WHERE {self._between(30, 0)}{filters}
            GROUP BY 1 ORDER BY 3 DESC, 2 DESC, 1 LIMIT 10"""

    def _dashboard(self, first: int, last: int) -> list[str]:
        views = "count(*) FILTER (WHERE event_type = 'pageview')"
        events = f"SELECT count(*), {views}, {self._visitors} FROM events WHERE {self._between(first, last)}"
        sessions = f"""
            SELECT count(*), count(*) FILTER (WHERE views > 0), count(*) FILTER (WHERE views = 1 AND n = 1),
                   {self.ms_of_sessions}, CAST(sum(views) AS BIGINT)
            FROM (SELECT min(timestamp) AS started, max(timestamp) AS ended, count(*) AS n, {views} AS views
                  FROM events WHERE {self._between(first + 1, last - 1)} GROUP BY session_id) AS sessions
            WHERE started >= {self.day(first)} AND started < {self.day(last)}"""
        return [events, sessions]

    def _acts(self) -> str:
        """Where the steps are: later ones may lie a day behind the range."""
        return f"events WHERE {self._between(30, -1)} AND page IN {_STEPS}"

    def _funnel(self) -> str:
        """At each step the latest start of a walk that came there. (To join the first times
        of each step loses who begins twice.)"""
        so_far = "OVER (PARTITION BY visitor ORDER BY timestamp, page ROWS UNBOUNDED PRECEDING)"

        def walk(step: int) -> str:
            near = f"timestamp - max(start{step - 1}) {so_far} <= INTERVAL '1' DAY"
            is_it = f"page = '{_STEPS[step]}' AND {near}"
            return f"SELECT *, CASE WHEN {is_it} THEN max(start{step - 1}) {so_far} END AS start{step}"

        begins = f"page = '{_STEPS[0]}' AND timestamp < {self.day(0)}"
        reached = (f"count(DISTINCT visitor) FILTER (WHERE start{step} IS NOT NULL)" for step in range(3))
        return f"""
            WITH acts AS (SELECT {self.visitor} AS visitor, timestamp, page FROM {self._acts()}),
                 walks0 AS (SELECT *, CASE WHEN {begins} THEN timestamp END AS start0 FROM acts),
                 walks1 AS ({walk(1)} FROM walks0),
                 walks2 AS ({walk(2)} FROM walks1)
            SELECT {", ".join(reached)} FROM walks2"""


class DuckDbDialect(Dialect):
    hour = "date_trunc('hour', timestamp AT TIME ZONE 'Europe/Berlin')"
    date = "date_trunc('day', timestamp AT TIME ZONE 'Europe/Berlin')"
    ms_of_bucket = "epoch_ms(bucket AT TIME ZONE 'Europe/Berlin')"
    ms_of_sessions = "CAST(sum(epoch_ms(ended) - epoch_ms(started)) AS BIGINT)"


class ClickHouseDialect(Dialect):
    hour = "toStartOfHour(timestamp, 'Europe/Berlin')"
    date = "toStartOfDay(timestamp, 'Europe/Berlin')"
    visitor = "if(user_id = '', visitor_id, user_id)"
    plan = "JSONExtractString(properties, 'plan')"
    ms_of_bucket = "toUnixTimestamp(bucket) * 1000"
    ms_of_sessions = "sum(toUnixTimestamp64Milli(ended) - toUnixTimestamp64Milli(started))"

    def day(self, before: int) -> str:
        return f"toDateTime64('{_END - timedelta(days=before):%Y-%m-%d %H:%M:%S}', 3, 'UTC')"

    def _funnel(self) -> str:
        first, second, third = (f"page = '{page}'" for page in _STEPS)
        time = "toUInt64(toUnixTimestamp64Milli(timestamp))"
        steps = f"{first} AND timestamp < {self.day(0)}, {second}, {third}"
        return f"""
            SELECT countIf(level >= 1), countIf(level >= 2), countIf(level >= 3)
            FROM (SELECT {self.visitor} AS visitor, windowFunnel(86400000)({time}, {steps}) AS level
                  FROM {self._acts()} GROUP BY visitor)"""
