"""How programs end: within a few seconds, saying what they lost."""

import signal
import subprocess
import sys
import threading
import time
import unittest

from analytics_relay import Analytics
from support import Case, PATIENCE, accept_all, environment, run, wait_until

BEGIN = "import atexit, os, signal, sys, threading, time\nfrom analytics_relay import Analytics\n"
NOBODY = "127.0.0.1:1"


class SilentCase(Case):
    def silent_relay(self):
        """It takes calls and answers none, until the test is over."""
        over = threading.Event()

        def answer(request, context):
            over.wait()
            return accept_all(request, context)

        relay = self.relay(answer)
        self.addCleanup(over.set)
        return relay


class Ends(SilentCase):
    def test_a_program_that_just_ends_sends_what_waits(self):
        relay = self.relay()
        done = run(
            BEGIN + "analytics = Analytics(sys.argv[1], flush_interval=60)\n"
            "for number in range(100): analytics.track(f'E{number}', 'u')",
            relay.address,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(relay.names(), [f"E{number}" for number in range(100)])

    def test_it_ends_within_seconds_without_a_relay_and_says_what_it_lost(self):
        done = run(
            BEGIN + "analytics = Analytics(sys.argv[1])\n"
            "for number in range(7): analytics.track('Order Placed', 'u')",
            NOBODY,
        )
        self.assertEqual(done.returncode, 0)
        self.assertLess(done.seconds, 20)
        self.assertRegex(
            done.stderr, r"closed before the relay had taken 7 events, they are lost; the first is 'Order Placed' \("
        )

    def test_it_ends_within_seconds_with_a_relay_that_never_answers(self):
        relay = self.silent_relay()
        done = run(
            BEGIN + "analytics = Analytics(sys.argv[1])\nanalytics.track('A', 'u'); time.sleep(1)", relay.address
        )
        self.assertLess(done.seconds, 20)
        self.assertIn("had taken 1 events", done.stderr)

    def test_an_event_of_the_last_moment_is_sent_where_no_thread_may_start(self):
        """The first event comes while Python ends: 3.12 refuses a new thread then."""
        relay = self.relay()
        done = run(
            BEGIN + "import analytics_relay.client as client\n"
            "analytics = Analytics(sys.argv[1])\n"
            "atexit.register(lambda: analytics.track('last', 'u'))",
            relay.address,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(relay.names(), ["last"])

    def test_where_threads_cannot_start_the_events_are_sent_at_the_end(self):
        relay = self.relay()
        done = run(
            BEGIN + 'def refuse(self): raise RuntimeError("can\'t start new thread")\n'
            "threading.Thread.start = refuse\n"
            "analytics = Analytics(sys.argv[1])\n"
            "assert analytics.track('A', 'u')",
            relay.address,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(relay.names(), ["A"])
        self.assertIn("no thread to send them", done.stderr)

    def test_a_client_without_events_has_no_thread_and_no_socket(self):
        done = run(
            BEGIN + "analytics = Analytics(sys.argv[1])\n"
            "print(threading.active_count(), analytics.flush(1), analytics.close(1), threading.active_count())",
            NOBODY,
        )
        self.assertEqual(done.stdout, "1 True True 1\n", done.stderr)

    def test_threads_of_the_program_may_track_while_it_ends(self):
        relay = self.relay()
        done = run(
            BEGIN + "analytics = Analytics(sys.argv[1])\n"
            "def work():\n"
            "    while True: analytics.track('A', 'u'); time.sleep(0.001)\n"
            "threading.Thread(target=work, daemon=True).start(); time.sleep(0.3)",
            relay.address,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLess(done.seconds, 20)

    def test_sigterm_that_raises_systemexit_sends_what_waits(self):
        relay = self.relay()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                BEGIN + "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
                "analytics = Analytics(sys.argv[1], flush_interval=60)\n"
                "analytics.track('A', 'u')\nprint('ready', flush=True)\n"
                # A signal just before a sleep begins is seen when it ends.
                "while True: time.sleep(0.01)",
                relay.address,
            ],
            close_fds=False,  # as in `run`
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self.assertEqual(process.stdout.readline(), "ready\n")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE), 0)
        process.stdout.close()
        self.assertEqual(relay.names(), ["A"])


class Limits(SilentCase):
    def test_flush_and_close_keep_their_time_and_say_whether_all_was_sent(self):
        client = self.client(NOBODY)
        client.track("A", "u")
        began = time.monotonic()
        self.assertFalse(client.flush(0.3))
        self.assertLess(time.monotonic() - began, 8)
        self.assertFalse(client.close(0.3))
        self.assertLess(time.monotonic() - began, 16)
        self.assertEqual(client.counters()["abandoned"], 1)
        self.assertIsNone(client.track("B", "u"))
        self.assertEqual(client.counters()["dropped"], 1)
        self.assertFalse(client.close(0.3))

    def test_close_ends_a_call_that_is_under_way(self):
        relay = self.silent_relay()
        client = self.client(relay)
        client.track("A", "u")
        relay.wait_for(1)
        began = time.monotonic()
        self.assertFalse(client.close(0.3))
        self.assertLess(time.monotonic() - began, 8)  # a call has ten seconds

    def test_as_a_context_it_is_closed_at_the_end(self):
        relay = self.relay()
        with self.client(relay, flush_interval=60) as client:
            client.track("A", "u")
        self.assertEqual(relay.names(), ["A"])
        self.assertIsNone(client.track("B", "u"))

    def test_a_client_that_is_forgotten_sends_what_it_has_and_its_thread_ends(self):
        relay = self.relay()
        client = Analytics(relay.address, flush_interval=60)
        client.track("A", "u")
        thread = client._current[0]._thread
        del client
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())
        self.assertEqual(relay.names(), ["A"])

    def test_track_in_a_signal_handler_that_interrupts_track(self):
        client = self.client(self.relay())
        done = []

        def handler(*_):
            done.append(client.track("signal", "u"))

        before = signal.signal(signal.SIGALRM, handler)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        lock = client._current[0]._lock
        with lock:  # as an interrupted `track` does
            signal.raise_signal(signal.SIGALRM)
        wait_until(lambda: done and done[0] is not None)
        self.assertTrue(client.flush(PATIENCE))


if __name__ == "__main__":
    unittest.main()
