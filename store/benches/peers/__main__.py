"""The store beside what else could keep its events: PostgreSQL with one wide table and an
index for whatever is asked, DuckDB, and chDB, which is ClickHouse in the process.

    python3 store/benches/peers <folder> <million events> [engines]

reads what `cargo bench -p analytics-relay-store --bench store -- <million events> peers`
wrote to the folder: the events as CSV, and the store's answers with what they cost. Each
engine loads the events and is asked what the store was asked; loading and asking are
processes of their own. Ends with 1 if an answer differs. What the machine lacks is named.
"""

import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from sql import Dialect

HERE = Path(__file__).resolve().parent
VENV = HERE.parents[2] / "target/store-peers-venv"
NAMES = ("postgresql", "duckdb", "chdb")
OURS = "this store"
TIMES = 5
# With more events our answers of many groups may be estimated, as they say: above 500,000
# visitors, of groups together, by HyperLogLog. Four of its standard errors.
EXACT_MAX = 2_000_000
ESTIMATE_ERROR = 4 * 0.0081

Figures = dict[str, Any]
Rows = list[list[Any]]


def in_venv() -> None:
    """Goes on with the packages, which it installs at the first time."""
    python = VENV / "bin/python"
    packages, installed = HERE / "packages.txt", VENV / "installed.txt"
    if not installed.exists() or installed.read_text() != packages.read_text():
        venv.create(VENV, with_pip=True, clear=True)
        # One by one: what cannot be had is missing alone.
        for package in packages.read_text().split():
            install = [python, "-m", "pip", "install", "--quiet", "--no-deps", package]
            if subprocess.run(install, check=False).returncode != 0:
                print(f"not installed: {package}")
        installed.write_text(packages.read_text())
    if Path(sys.prefix) != VENV:
        os.execv(python, [python, HERE, *sys.argv[1:]])


def rows_of(engine: Any, asked: list[list[str]]) -> Rows:
    """The answer to one question, of all that is asked for it."""
    if len(asked) == 1 and len(asked[0]) == 1:
        return engine.ask(asked[0][0])
    return [[value for sql in of_row for value in engine.ask(sql)[0]] for of_row in asked]


def ask(engine: Any) -> Figures:
    """Each question once, then five times: medians, and the answer."""
    asked = {}
    for name, rows in engine.dialect.questions().items():
        took, cpu = [], []
        for _ in range(1 + TIMES):
            start, before = time.perf_counter(), engine.cpu()
            answer = rows_of(engine, rows)
            took.append(time.perf_counter() - start)
            cpu.append(engine.cpu() - before)
        ms, cpu_ms = (statistics.median(of[1:]) * 1e3 for of in (took, cpu))
        asked[name] = {"ms": ms, "cpu_ms": cpu_ms, "rows": answer}
    return {"questions": asked, "ask_peak_mb": engine.peak_mb(), "version": engine.version}


def work(name: str, csv_file: str, at: str, what: str, events: str) -> None:
    """What a process of an engine does: prints its figures."""
    from engines import ENGINES

    engine = ENGINES[name](Path(csv_file), at)
    if what == "load":
        loaded = engine.load(int(events))
        loaded["bytes_an_event"] = loaded.pop("bytes") / int(events)
        print(json.dumps({"loaded": loaded | {"load_peak_mb": engine.peak_mb()}}))
    else:
        print(json.dumps(ask(engine)))


def measure(name: str, csv_file: Path, events: int) -> Figures:
    """All of one engine, or why not."""
    from engines import ENGINES, NotRun

    figures: Figures = {}
    try:
        with ENGINES[name].running(csv_file) as at:
            for what in ("load", "ask"):
                command = [sys.executable, HERE, "--engine", name, csv_file, at, what, str(events)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    return {"not_run": f"{what}: {(done.stderr.strip() or 'no output').splitlines()[-1]}"}
                figures |= json.loads(done.stdout.splitlines()[-1])
    except NotRun as why:
        return {"not_run": str(why)}
    return figures


def is_same(ours: Rows, theirs: Rows, events: int) -> bool:
    """Whether an answer is ours, with visitors of groups, the last of three columns, as near as
    they are meant to be."""
    if events <= EXACT_MAX or len(ours) != len(theirs) or len(ours[0]) != 3:
        return ours == theirs
    near = (abs(a[2] - b[2]) <= ESTIMATE_ERROR * b[2] for a, b in zip(ours, theirs, strict=True))
    return [row[:2] for row in ours] == [row[:2] for row in theirs] and all(near)


def table(all_figures: dict[str, Figures]) -> None:
    """Of what was measured."""
    run = {name: figures for name, figures in all_figures.items() if "not_run" not in figures}

    def line(what: str, values: list[str]) -> None:
        print(f"{what:36}" + "".join(f"{value:>18}" for value in values))

    line("ms (of processor), medians of 5", list(run))
    for question in Dialect().questions():
        asked = [figures["questions"][question] for figures in run.values()]
        line(question, [f"{one['ms']:.1f} ({one['cpu_ms']:.1f})" for one in asked])
    for batch in (1_000, 100, "all at once"):
        line(f"µs an event to append, {batch}", [appended(figures, batch) for figures in run.values()])
    line("bytes an event", [f"{figures['loaded']['bytes_an_event']:.0f}" for figures in run.values()])
    for what, where in (
        ("loading", lambda of: of["loaded"]["load_peak_mb"]),
        ("asking", lambda of: of["ask_peak_mb"]),
    ):
        line(f"peak MB, {what}", [str(where(figures)) for figures in run.values()])


def appended(figures: Figures, batch: int | str) -> str:
    """What appending in such batches took of the processor, and how many came a second."""
    for one in figures["loaded"]["append"]:
        if one["batch"] == batch:
            return f"{one['us']:.1f} ({one['events_per_s'] / 1e3:.0f}k/s)"
    return "-"


def main(folder: str, millions: str, *names: str) -> int:
    in_venv()
    csv_file = Path(folder).resolve() / f"store-bench-{millions}.csv"
    ours = json.loads(csv_file.with_suffix(".answers.json").read_text())
    all_figures, wrong = {OURS: ours}, 0
    for name in names or NAMES:
        figures = all_figures[name] = measure(name, csv_file, ours["events"])
        if "not_run" in figures:
            print(f"not run: {name}: {figures['not_run']}")
            continue
        for question, asked in ours["questions"].items():
            theirs = figures["questions"][question]["rows"]
            if not is_same(asked["rows"], theirs, ours["events"]):
                wrong += 1
                print(f"{name} answers otherwise: {question}\n  {OURS}: {asked['rows']}\n  {name}: {theirs}")
    versions = [figures["version"] for figures in all_figures.values() if "version" in figures]
    print(f"{ours['events']} events; {', '.join(versions)}; load average {os.getloadavg()[0]:.1f}\n")
    table(all_figures)
    print(f"\n{wrong} answers differ" if wrong else "\nall answers are the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        work(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
