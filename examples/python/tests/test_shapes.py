"""Calls of another shape, options that make no sense, and warnings."""

import datetime
import unittest

from analytics_relay import Analytics
from analytics_relay._warn import Warnings
from support import Case, properties


class Shapes(Case):
    def dropped(self, call, *want):
        client = self.client("localhost:1")
        self.warnings.clear()
        self.assertIsNone(call(client))
        self.assertEqual(client.counters()["dropped"], 1)
        self.assertEqual(client.counters()["queued"], 0)
        for text in want:
            self.assertIn(text, self.warnings[0])

    def test_a_call_of_another_shape_is_dropped_and_says_where(self):
        self.dropped(lambda client: client.track({"event": "Seen"}), "name: got dict, want text")
        self.dropped(lambda client: client.track(), "name: got None, want text")
        self.dropped(lambda client: client.track("Seen", {"total": 1}), "'Seen'", "user_id: got dict")
        self.dropped(lambda client: client.track("Seen", 48.21), "user_id: got float")
        self.dropped(lambda client: client.track("Seen", True), "user_id: got bool")
        self.dropped(lambda client: client.track("Seen", "u", ["a"]), "properties: got list, want a dict")
        self.dropped(lambda client: client.track("Seen", "u", {}, "more"), "got 4 arguments without a name")
        self.dropped(lambda client: client.track("Seen", userId="u"), "userId: unknown (meant user_id?)")
        self.dropped(lambda client: client.track(event="Seen", user_id="u"), "event: unknown (meant name?)")
        self.dropped(lambda client: client.track("Seen", "u", user_id="u"), "user_id: given twice")
        self.dropped(lambda client: client.track("Seen", durability="forever"), "durability: got str")
        self.dropped(lambda client: client.track("Seen", event_id=b"1"), "event_id: got bytes")
        self.dropped(lambda client: client.identify({"plan": "pro"}), "identify", "user_id: got dict")
        self.dropped(lambda client: client.identify(None, {"plan": "pro"}), "user_id: got None")
        self.dropped(lambda client: client.identify("u", properties={}), "properties: unknown")

    def test_arguments_may_all_have_names(self):
        items = self.sent(
            lambda client: [
                client.track(name="Seen", user_id="u", properties={"a": 1}, durability="QUEUED"),
                client.identify(user_id="u", traits={"b": 2}),
            ]
        )
        self.assertEqual([properties(item) for item in items], [{"a": 1}, {"b": 2}])
        self.assertEqual(items[0].track.durability, 1)

    def test_context_never_costs_the_event(self):
        items = self.sent(
            lambda client: [
                client.track("Seen", context={"ip": "203.0.113.9", "user_agent": "Mozilla", "locale": "it"}),
                client.track("Seen", context="Mozilla"),
                client.track("Seen", context={"ip": ["203.0.113.9"]}),
            ]
        )
        self.assertEqual([item.track.context.ip for item in items], ["203.0.113.9", "", ""])
        self.assertIn("context.locale: got a name that is unknown, want ip or user_agent", self.warnings[0])

    def test_an_event_that_is_too_large_names_itself(self):
        self.dropped(lambda client: client.track("Seen", "u", {"a": "x" * 70_000}), "'Seen'", "bytes")

    def test_options_that_make_no_sense_raise_when_the_client_is_made(self):
        for error, options in (
            (TypeError, {"queueMax": 5}),
            (TypeError, {"batch_max": "50"}),
            (ValueError, {"batch_max": 0}),
            (ValueError, {"batch_max": 1001}),
            (ValueError, {"flush_interval": -1}),
            (TypeError, {"tls": "yes"}),
            (ValueError, {"key_file": "key.pem"}),
            (FileNotFoundError, {"ca_file": "/nowhere.pem"}),
        ):
            with self.assertRaises(error, msg=options):
                Analytics("localhost:50054", **options)
        for error, target in (
            (TypeError, None),
            (ValueError, "localhost"),
            (ValueError, "ftp://localhost:1"),
            (ValueError, "localhost:0"),
            (ValueError, "http://localhost:1/path"),
            (ValueError, "localhost:port"),
            (ValueError, ":50054"),
            (ValueError, "x" * 70 + ".example:1"),
        ):
            with self.assertRaises(error, msg=target):
                Analytics(target)

    def test_a_time_limit_that_is_none_raises(self):
        client = self.client("localhost:1")
        for call in (client.flush, client.close):
            with self.assertRaises(TypeError):
                call(None)
            with self.assertRaises(TypeError):
                call(datetime.timedelta(seconds=1))


class OneAWhile(Case):
    def test_a_kind_of_warning_has_a_line_each_ten_seconds_and_the_next_counts_the_others(self):
        now = [0.0]
        warnings = Warnings(lambda: now[0])
        for at in (0, 1, 9, 9.5, 10, 11):
            now[0] = at
            warnings.warn("a", "first %s", at)
        warnings.warn("b", "another kind")
        self.assertEqual(self.warnings, ["first 0", "first 10 (and 3 more like it before)", "another kind"])

    def test_ten_thousand_bad_events_are_one_line_and_no_traceback(self):
        client = self.client("localhost:1")
        for _ in range(10_000):
            client.track("Seen", object())
        self.assertEqual(client.counters()["dropped"], 10_000)
        self.assertEqual(len(self.warnings), 1)
        self.assertNotIn("\n", self.warnings[0])


if __name__ == "__main__":
    unittest.main()
