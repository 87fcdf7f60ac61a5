"""Forks and worker processes. Each is a program of its own: this one has gRPC's
server in it, which no fork may meet."""

import collections
import os
import pathlib
import shutil
import tempfile
import unittest

import grpc

from support import Case, make_certificate, needs, run

BEGIN = """
import multiprocessing, os, sys, threading, time
from analytics_relay import Analytics

def wait(pid):
    _, status = os.waitpid(pid, 0)
    assert status == 0, status

def ends(timeout=30):
    # A process that hangs is killed, and the test fails.
    def kill():
        time.sleep(timeout)
        os.kill(os.getpid(), 9)
    threading.Thread(target=kill, daemon=True).start()
"""


FORKS_DURING_CALLS = """
analytics = Analytics(sys.argv[1], batch_max=3, flush_interval=0, ca_file=sys.argv[2] if sys.argv[2:] else None)
stop = threading.Event()
def send():
    while not stop.is_set():
        analytics.track("parent", "u", {"fill": "x" * 5000})
        # No more than a few calls wait, or what is left at the end is more than a
        # machine that is busy sends in the time that `close` has.
        while analytics.counters()["waiting"] > 20 and not stop.is_set():
            time.sleep(0.001)
thread = threading.Thread(target=send)
thread.start()
forks, during = 0, 0
while during < 40 and forks < 2000:
    during += analytics.counters()["waiting"] > 0
    forks += 1
    pid = os.fork()
    if pid == 0:
        ends()
        analytics.track("child", "u")
        os._exit(0 if analytics.close(20) else 1)
    wait(pid)
stop.set(); thread.join()
assert analytics.close(20), analytics.counters()
print(forks, during, analytics.counters()["accepted"])
"""


@needs(hasattr(os, "fork"), "fork")
class Forks(Case):
    def runs(self, script, want=None, *args, **options):
        """What it printed, and the names of the events that the relay took."""
        relay = self.relay(**options)
        done = run(BEGIN + script, relay.address, *args)
        self.assertEqual(done.returncode, 0, done.stderr)
        if want is not None:
            self.assertEqual(sorted(relay.names()), sorted(want), done.stderr)
        return done.stdout, relay.names()

    def test_parent_and_child_send_their_own_and_nothing_twice(self):
        self.runs(
            """
analytics = Analytics(sys.argv[1], flush_interval=0.5)
analytics.track("before", "u")                  # waits while the fork happens
pid = os.fork()
if pid == 0:
    ends()
    assert analytics.counters()["queued"] == 0
    analytics.track("in the child", "u")
    assert analytics.close(10)
    os._exit(0)
analytics.track("in the parent", "u")
wait(pid)
assert analytics.close(10)
""",
            ["before", "in the child", "in the parent"],
        )

    def test_workers_of_a_server_that_loads_the_program_first(self):
        """As gunicorn does with `preload_app`: the parent has sent before and after
        its workers were made, and a worker that dies is replaced."""
        want = ["loaded"] + [f"worker {number} {event}" for number in range(4) for event in range(50)] + ["replaced"]
        self.runs(
            """
analytics = Analytics(sys.argv[1])
analytics.track("loaded", "u")
assert analytics.flush(10)                      # a connection is open at the fork
def worker(number):
    pid = os.fork()
    if pid == 0:
        ends()
        for event in range(50):
            analytics.track(f"worker {number} {event}", "u")
        sys.exit()                              # `atexit` sends
    return pid
pids = [worker(number) for number in range(4)]
for pid in pids:
    wait(pid)
analytics.track("replaced", "u")
""",
            want,
        )

    def test_a_fork_while_another_thread_holds_the_lock(self):
        self.runs(
            """
analytics = Analytics(sys.argv[1])
lock, held, done = analytics._current[0]._lock, threading.Event(), threading.Event()
def hold():
    with lock:
        held.set()
        done.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
pid = os.fork()
if pid == 0:
    ends()
    analytics.track("in the child", "u")
    assert analytics.close(10)
    os._exit(0)
wait(pid)
done.set()
""",
            ["in the child"],
        )

    def test_forks_while_a_call_is_under_way(self):
        """The child has a thread that was sending, and a socket with half a call."""
        printed, names = self.runs(FORKS_DURING_CALLS)
        self.check(printed, names)

    @needs(shutil.which("openssl"), "openssl")
    def test_forks_while_a_call_is_under_way_over_tls(self):
        with tempfile.TemporaryDirectory() as folder:
            key, certificate = make_certificate(folder)
            parts = (pathlib.Path(key).read_bytes(), pathlib.Path(certificate).read_bytes())
            credentials = grpc.ssl_server_credentials([parts])
            printed, names = self.runs(FORKS_DURING_CALLS, None, certificate, credentials=credentials)
        self.check(printed, names)

    def check(self, printed, names):
        forks, during, accepted = map(int, printed.split())
        self.assertGreaterEqual(during, 40, "too few forks met a call")
        counts = collections.Counter(names)
        self.assertEqual((counts["child"], counts["parent"]), (forks, accepted))

    def test_a_child_of_a_child(self):
        self.runs(
            """
analytics = Analytics(sys.argv[1])
analytics.track("1", "u")
pid = os.fork()
if pid == 0:
    ends()
    analytics.track("2", "u")
    pid = os.fork()
    if pid == 0:
        ends()
        analytics.track("3", "u")
        sys.exit()
    wait(pid)
    sys.exit()
wait(pid)
""",
            ["1", "2", "3"],
        )

    def test_a_child_of_a_process_whose_client_is_closed_has_an_open_one(self):
        self.runs(
            """
analytics = Analytics(sys.argv[1])
analytics.track("parent", "u")
assert analytics.close(10)
pid = os.fork()
if pid == 0:
    ends()
    analytics.track("child", "u")
    sys.exit()
wait(pid)
""",
            ["parent", "child"],
        )

    def test_a_fork_that_calls_no_hook_of_the_client_is_noticed_by_the_process_id(self):
        self.runs(
            """
import analytics_relay.client
analytics_relay.client._in_child.__code__ = (lambda: None).__code__
analytics = Analytics(sys.argv[1])
analytics.track("parent", "u")
assert analytics.flush(10)
pid = os.fork()
if pid == 0:
    ends()
    analytics.track("child", "u")
    os._exit(0 if analytics.close(10) else 1)
wait(pid)
""",
            ["parent", "child"],
        )

    def test_worker_processes_send_what_waits_when_they_end(self):
        """They end without `atexit`. The client is made before, or in the worker."""
        for method in ("fork", "spawn", "forkserver"):
            with self.subTest(method):
                want = [f"made {number}" for number in range(20)] + ["forgotten"]
                self.runs(WORKERS.replace("METHOD", method), want + ["inherited"] * (method == "fork"))


WORKERS = '''
import importlib, tempfile
JOBS = """
import multiprocessing
from analytics_relay import Analytics
inherited = None

def inherits(address):
    inherited.track("inherited", "u")

def makes(address):
    global mine                                 # alive at the end, as after a pool's initializer
    mine = Analytics(address, flush_interval=5)
    for number in range(20):
        mine.track(f"made {number}", "u")

def makes_and_forgets(address):
    Analytics(address, flush_interval=5).track("forgotten", "u")
"""
with tempfile.TemporaryDirectory() as folder:
    sys.path.insert(0, folder)
    with open(os.path.join(folder, "jobs.py"), "w") as file:
        file.write(JOBS)
    import jobs
    jobs.inherited = Analytics(sys.argv[1], flush_interval=5)
    context = multiprocessing.get_context("METHOD")
    todo = [jobs.makes, jobs.makes_and_forgets] + ([jobs.inherits] if "METHOD" == "fork" else [])
    for job in todo:
        process = context.Process(target=job, args=(sys.argv[1],))
        process.start()
        process.join(30)
        assert process.exitcode == 0, (job, process.exitcode)
'''


if __name__ == "__main__":
    unittest.main()
