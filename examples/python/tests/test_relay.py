"""The client and a real relay."""

import shutil
import tempfile
import time
import unittest

from support import Case, PATIENCE, Relay, make_certificate, needs, needs_relay, run


@needs_relay
class RealRelay(Case):
    def test_all_that_python_has_arrives_and_a_refusal_names_its_event(self):
        with Relay() as relay:
            client = self.client(relay)
            for number in range(1000):
                client.track(f"Order {number}", number, {"total": 49.9, "items": {"pen", "book"}, "coupon": None})
            client.identify("user-1", {"plan": "про", "trial_ends": None})
            nameless = client.track("", "user-1")
            self.assertTrue(client.flush(PATIENCE))
            counters = client.counters()
            self.assertEqual((counters["accepted"], counters["refused"]), (1001, 1))
            self.assertEqual(
                self.warnings,
                [f"event refused: '' ({nameless}): event_name: got \"\", want 1 to 255 bytes (EVENT_NAME_EMPTY)"],
            )

    def test_8_kb_of_cyrillic_and_half_of_an_emoji_are_accepted(self):
        with Relay() as relay:
            client = self.client(relay)
            client.track("Отзыв", "u", {"text": "щ" * 4000, "cut": "ok \ud83d"})
            self.assertTrue(client.flush(PATIENCE))
            self.assertEqual(client.counters()["accepted"], 1, self.warnings)

    def test_a_relay_that_restarts_gets_what_waited_and_an_idle_client_holds_up_no_drain(self):
        with Relay() as first:
            client = self.client(first, retry_delay_max=0.5)
            client.track("A", "u")
            self.assertTrue(client.flush(PATIENCE))
            began = time.monotonic()
            first.stop()
            self.assertLess(time.monotonic() - began, 7)  # the drain has eight seconds
            client.track("B", "u")
            with Relay(port=first.port):
                self.assertTrue(client.flush(PATIENCE))
                self.assertEqual(client.counters()["accepted"], 2)

    @needs(shutil.which("openssl"), "openssl")
    def test_a_relay_that_serves_tls(self):
        with tempfile.TemporaryDirectory() as folder:
            key, certificate = make_certificate(folder)
            with Relay(GRPC_TLS_CERT_FILE=certificate, GRPC_TLS_KEY_FILE=key) as relay:
                client = self.client(f"https://localhost:{relay.port}", ca_file=certificate)
                client.track("A", "u")
                self.assertTrue(client.flush(PATIENCE), self.warnings)
                self.assertEqual(client.counters()["accepted"], 1)

    def test_forked_workers_of_one_program(self):
        with Relay() as relay:
            done = run(
                """
import os, sys
from analytics_relay import Analytics
analytics = Analytics(sys.argv[1])
analytics.track("parent", "u")
assert analytics.flush(10)
pids = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        for event in range(500):
            analytics.track(f"worker {number} {event}", "u")
        os._exit(0 if analytics.close(20) and analytics.counters()["accepted"] == 500 else 1)
    pids.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
""",
                relay.address,
            )
            self.assertEqual((done.returncode, done.stderr), (0, ""))


if __name__ == "__main__":
    unittest.main()
