"""What else could keep the events. Each runs on one core, with one thread for a question."""

import csv
import json
import os
import pwd
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from sql import COLUMNS, ClickHouseDialect, Dialect, DuckDbDialect

# Events that are made ready at once, outside of what is measured.
AT_ONCE = 20_000
# Beyond, PostgreSQL gets most of them by COPY and its indexes after that, which is a matter
# of minutes and not of hours; batches are then appended to what is full.
IN_BATCHES_MAX = 2_000_000
TO_FULL = 200_000

# A type of PostgreSQL, and its number.
TEXT = ("text", 25)

Rows = list[list[Any]]


class NotRun(Exception):
    """What the machine lacks."""


def peak_mb(process: str | int = "self") -> int:
    """The most memory that a process had so far."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def core(which: int) -> int:
    """The first or the last of those that there are."""
    return sorted(os.sched_getaffinity(1))[which]


class Embedded:
    """One that runs in the process that uses it."""

    dialect: Dialect
    suffix: str

    def __init__(self, csv_file: Path, at: str):
        os.sched_setaffinity(0, {core(0)})
        self.csv, self.at = csv_file, at

    @classmethod
    @contextmanager
    def running(cls, csv_file: Path) -> Iterator[str]:
        """A place for it."""
        at = csv_file.with_suffix(cls.suffix)
        _remove(at)
        yield str(at)
        _remove(at)

    def cpu(self) -> float:
        """Processor seconds so far."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    def peak_mb(self) -> int:
        return peak_mb()

    def _at_once(self, sql: str, events: int) -> dict[str, Any]:
        start, before = time.perf_counter(), self.cpu()
        self.ask(sql)
        return figures("all at once", events, time.perf_counter() - start, self.cpu() - before)

    def ask(self, sql: str) -> Rows:
        raise NotImplementedError


def figures(batch: int | str, events: int, wall: float, cpu: float) -> dict[str, Any]:
    """What appending cost."""
    return {"batch": batch, "events_per_s": events / wall, "us": cpu * 1e6 / events}


def _remove(at: Path) -> None:
    if at.is_dir():
        shutil.rmtree(at)
    at.unlink(missing_ok=True)


class DuckDb(Embedded):
    dialect = DuckDbDialect()
    suffix = ".duckdb"

    def __init__(self, csv_file: Path, at: str):
        super().__init__(csv_file, at)
        import duckdb

        self.version = f"DuckDB {duckdb.__version__}"
        self.connection = duckdb.connect(at, config={"threads": 1, "memory_limit": "512MB"})

    def load(self, events: int) -> dict[str, Any]:
        types = {"id": "UUID", "timestamp": "TIMESTAMPTZ", "properties": "JSON"}
        columns = {name: types.get(name, "VARCHAR") for name in COLUMNS}
        declared = ", ".join(f"{name} {kind}" for name, kind in columns.items())
        self.ask(f"CREATE TABLE events ({declared})")
        loaded = f"read_csv('{self.csv}', header = false, nullstr = '', columns = {columns})"
        appended = self._at_once(f"INSERT INTO events SELECT * FROM {loaded}", events)
        self.ask("CHECKPOINT")
        return {"append": [appended], "bytes": Path(self.at).stat().st_size}

    def ask(self, sql: str) -> Rows:
        return [list(row) for row in self.connection.execute(sql).fetchall()]


class ChDb(Embedded):
    dialect = ClickHouseDialect()
    suffix = ".chdb"
    settings = (
        "max_threads = 1",
        "max_insert_threads = 1",
        "input_format_parallel_parsing = 0",
        "date_time_input_format = 'best_effort'",
        "output_format_json_quote_64bit_integers = 0",
    )

    def __init__(self, csv_file: Path, at: str):
        super().__init__(csv_file, at)
        from chdb import session

        self.session = session.Session(at)
        for setting in self.settings:
            self.ask(f"SET {setting}")
        self.version = f"ClickHouse {self.ask('SELECT version()')[0][0]} (chDB)"

    def load(self, events: int) -> dict[str, Any]:
        ids = ("user_id", "visitor_id", "session_id", "properties")
        types = {"id": "UUID", "timestamp": "DateTime64(3, 'UTC')"} | {name: "String" for name in ids}
        columns = ", ".join(f"{name} {types.get(name, 'LowCardinality(String)')}" for name in COLUMNS)
        order = "PARTITION BY toYYYYMM(timestamp) ORDER BY (website_id, timestamp, id)"
        self.ask(f"CREATE TABLE events ({columns}) ENGINE = MergeTree {order}")
        loaded = f"INSERT INTO events FROM INFILE '{self.csv}' FORMAT CSV"
        appended = self._at_once(loaded, events)
        size = "SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND table = 'events'"
        return {"append": [appended], "bytes": self.ask(size)[0][0]}

    def ask(self, sql: str) -> Rows:
        answer = str(self.session.query(sql, "JSONCompactEachRow"))
        return [json.loads(line) for line in answer.splitlines() if line]


class PostgreSql:
    """With one wide table and an index for whatever is asked, as it is done at first."""

    dialect = Dialect()
    settings = {
        "shared_buffers": "256MB",
        "work_mem": "64MB",
        "max_wal_size": "4GB",
        "jit": "off",
        "max_parallel_workers_per_gather": "0",
        "max_parallel_maintenance_workers": "0",
        "listen_addresses": "",
    }
    indexes = (
        "(event_type)",
        "(timestamp)",
        "(user_id)",
        "(visitor_id, session_id)",
        "(event_type, timestamp)",
        "(website_id, timestamp)",
        "USING GIN (properties)",
    )
    # Of those that are no texts.
    types = {"id": ("uuid", 2950), "timestamp": ("timestamptz", 1184), "properties": ("jsonb", 3802)}

    def __init__(self, csv_file: Path, at: str):
        import psycopg

        os.sched_setaffinity(0, {core(-1)})
        self.csv, self.folder = csv_file, Path(at)
        self.server = int((self.folder / "data/postmaster.pid").read_text().split()[0])
        self.connection = psycopg.connect(f"host={at} dbname=postgres user=bench", autocommit=True)
        self.version = f"PostgreSQL {self.ask('SHOW server_version')[0][0].split()[0]}"

    @classmethod
    @contextmanager
    def running(cls, csv_file: Path) -> Iterator[str]:
        """A server in a folder of its own, which is gone afterwards."""
        found = sorted(glob("/usr/lib/postgresql/*/bin/postgres"))
        if not found:
            raise NotRun("no PostgreSQL in /usr/lib/postgresql")
        binaries = Path(found[-1]).parent
        user = cls._user()
        folder = Path(tempfile.mkdtemp(prefix="store-peers-"))
        if user:
            os.chown(folder, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        as_user: dict[str, Any] = (
            {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        )
        try:
            data = folder / "data"
            initdb = [
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "bench",
                "-A",
                "trust",
                "--locale=C",
                "-E",
                "UTF8",
            ]
            subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)
            options = [f"--{name}={value}" for name, value in cls.settings.items()]
            command = [
                "taskset",
                "-c",
                str(core(0)),
                binaries / "postgres",
                "-D",
                data,
                "-k",
                folder,
                *options,
            ]
            with (folder / "log").open("w") as log:
                server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_user)
            try:
                cls._wait(binaries, folder, server)
                yield str(folder)
            finally:
                server.send_signal(signal.SIGINT)
                server.wait()
        finally:
            shutil.rmtree(folder)

    @staticmethod
    def _user() -> str | None:
        """Whom it runs as: it refuses to be root."""
        if os.geteuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"

    @staticmethod
    def _wait(binaries: Path, folder: Path, server: "subprocess.Popen[bytes]") -> None:
        ready = [binaries / "pg_isready", "-q", "-h", folder]
        while subprocess.run(ready, check=False).returncode != 0:
            if server.poll() is not None:
                raise NotRun(f"PostgreSQL did not start: {(folder / 'log').read_text()[-300:]}")
            time.sleep(0.1)

    def load(self, events: int) -> dict[str, Any]:
        columns = ", ".join(f"{name} {self.types.get(name, ('varchar(500)', 0))[0]}" for name in COLUMNS)
        self.ask(f"CREATE TABLE events ({columns}, PRIMARY KEY (id))")
        with self.csv.open(newline="") as file:
            if events > IN_BATCHES_MAX:
                self._copy(islice(file, events - TO_FULL))
                of_batch = {1_000: TO_FULL // 2, 100: TO_FULL // 2}
            else:
                of_batch = {1_000: events * 8 // 10, 100: events * 2 // 10}
            for index in self.indexes:
                self.ask(f"CREATE INDEX ON events {index}")
            rows = csv.reader(file)
            appended = [self._append(rows, batch, count) for batch, count in of_batch.items()]
        assert self.ask("SELECT count(*) FROM events") == [[events]]
        size = self.ask("SELECT pg_total_relation_size('events')")[0][0]
        # As its own upkeep would do within minutes.
        self.ask("VACUUM (ANALYZE) events")
        return {"append": appended, "bytes": size}

    def _copy(self, lines: Iterator[str]) -> None:
        with self.connection.cursor().copy("COPY events FROM STDIN (FORMAT csv)") as copy:
            while part := "".join(islice(lines, 10_000)):
                copy.write(part)

    def _append(self, rows: Iterator[list[str]], batch: int, events: int) -> dict[str, Any]:
        """In batches, each committed and synced; what is there already is left out."""
        kinds = (self.types.get(name, TEXT)[0] for name in COLUMNS)
        values = ", ".join(f"${n}::{kind}[]" for n, kind in enumerate(kinds, 1))
        sql = f"INSERT INTO events SELECT * FROM unnest({values}) ON CONFLICT (id) DO NOTHING"
        raw, name = self.connection.pgconn, f"append{batch}".encode()
        raw.prepare(name, sql.encode())
        wall = cpu = 0.0
        for _ in range(0, events, AT_ONCE):
            batches = [self._arrays(list(islice(rows, batch))) for _ in range(AT_ONCE // batch)]
            start, before = time.perf_counter(), self.cpu()
            for arrays in batches:
                done = raw.exec_prepared(name, arrays, [1] * len(COLUMNS))
                if done.status != 1:
                    raise RuntimeError(done.error_message.decode())
            wall += time.perf_counter() - start
            cpu += self.cpu() - before
        return figures(batch, events, wall, cpu)

    def _arrays(self, rows: list[list[str]]) -> list[bytes]:
        """The columns, as the server takes them."""
        return [self._array(name, column) for name, column in zip(COLUMNS, zip(*rows))]

    def _array(self, name: str, column: tuple[str, ...]) -> bytes:
        values = [b"\xff\xff\xff\xff" if text == "" else _sized(_binary(name, text)) for text in column]
        head = struct.pack("!iiIii", 1, "" in column, self.types.get(name, TEXT)[1], len(column), 1)
        return head + b"".join(values)

    def ask(self, sql: str) -> Rows:
        cursor = self.connection.execute(sql)
        return [list(row) for row in cursor.fetchall()] if cursor.description else []

    def cpu(self) -> float:
        """Processor seconds of the server with all its processes."""
        children = Path(f"/proc/{self.server}/task/{self.server}/children").read_text().split()
        alive = sum(_processor_ns(process) for process in (self.server, *children))
        gone = Path(f"/proc/{self.server}/stat").read_text().rsplit(")", 1)[1].split()[13:15]
        return alive / 1e9 + sum(map(int, gone)) / os.sysconf("SC_CLK_TCK")

    def peak_mb(self) -> int:
        """Of the process that answers, with what it touched of the shared memory."""
        return peak_mb(self.connection.info.backend_pid)


def _processor_ns(process: str | int) -> int:
    """Processor time of a process with one thread."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0])


_2000 = datetime(2000, 1, 1, tzinfo=timezone.utc)


def _binary(name: str, text: str) -> bytes:
    match name:
        case "id":
            return uuid.UUID(text).bytes
        case "timestamp":
            return struct.pack("!q", (datetime.fromisoformat(text) - _2000) // timedelta(microseconds=1))
        case "properties":
            return b"\x01" + text.encode()
    return text.encode()


def _sized(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


ENGINES = {"postgresql": PostgreSql, "duckdb": DuckDb, "chdb": ChDb}
