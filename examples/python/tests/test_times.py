"""When it happened, in all the ways in which Python says so."""

import datetime
import decimal
import os
import time
import unittest

from support import Case

UTC = datetime.timezone.utc
MOMENT = datetime.datetime(2026, 5, 17, 10, 30, 0, 123000, tzinfo=UTC)
MOMENT_MS = 1_779_013_800_123


class Times(Case):
    def setUp(self):
        super().setUp()
        before = os.environ.get("TZ")

        def restore():
            if before is None:
                os.environ.pop("TZ", None)
            else:
                os.environ["TZ"] = before
            time.tzset()

        self.addCleanup(restore)

    def sent_times(self, values):
        items = self.sent(lambda client: [client.track("Seen", "user-1", timestamp=value) for value in values])
        self.assertEqual(len(items), len(values), self.warnings)
        return [item.track.timestamp_ms for item in items]

    def test_a_time_with_a_zone_is_taken_as_it_is(self):
        rome = datetime.timezone(datetime.timedelta(hours=2))
        self.assertEqual(
            self.sent_times(
                [
                    MOMENT,
                    MOMENT.astimezone(rome),
                    "2026-05-17T10:30:00.123Z",
                    "2026-05-17 12:30:00,123+02:00",
                    "2026-05-17T05:30:00.123456-0500",
                    " 2026-05-17T10:30:00.123000000z ",
                ]
            ),
            [MOMENT_MS] * 6,
        )
        self.assertEqual(self.warnings, [])

    def test_a_number_is_seconds_to_nanoseconds_by_its_size(self):
        self.assertEqual(
            self.sent_times(
                [
                    1_779_013_800.123,
                    decimal.Decimal("1779013800.123"),
                    MOMENT_MS,
                    float(MOMENT_MS),
                    MOMENT_MS * 1000,
                    MOMENT_MS * 1_000_000,
                ]
            ),
            [MOMENT_MS] * 6,
        )
        self.assertEqual(self.sent_times([1_779_013_800]), [MOMENT_MS - 123])

    def test_a_day_is_its_midnight_in_utc(self):
        self.assertEqual(self.sent_times([datetime.date(2026, 5, 17), "2026-05-17"]), [1_778_976_000_000] * 2)

    def test_a_time_without_a_zone_is_this_machine_s_and_says_so_where_that_is_not_utc(self):
        naive = MOMENT.replace(tzinfo=None)
        os.environ["TZ"] = "UTC"
        time.tzset()
        self.assertEqual(self.sent_times([naive, "2026-05-17T10:30:00.123"]), [MOMENT_MS] * 2)
        self.assertEqual(self.warnings, [])
        os.environ["TZ"] = "XXX-2"
        time.tzset()
        self.assertEqual(self.sent_times([naive, "2026-05-17T10:30:00.123"]), [MOMENT_MS - 7_200_000] * 2)
        self.assertEqual(len(self.warnings), 1)
        self.assertIn("timestamp: got a time without its zone: taken as this machine's own", self.warnings[0])

    def test_none_is_now(self):
        before = int(time.time() * 1000)
        (at,) = self.sent_times([None])
        self.assertTrue(before <= at <= time.time() * 1000)

    def test_what_is_no_time_drops_the_event_and_names_the_field(self):
        for value in (
            0,
            -1,
            1e300,
            float("nan"),
            True,
            "yesterday",
            "2026-13-01",
            "2026-05-17T10:30:00+99:99",
            [1],
            object(),
            b"2026-05-17",
        ):
            self.warnings.clear()
            client = self.client("localhost:1")
            self.assertIsNone(client.track("Seen", "user-1", timestamp=value), value)
            self.assertEqual(client.counters()["dropped"], 1)
            self.assertRegex(
                self.warnings[0], r"^event dropped: 'Seen' \([-0-9a-f]{36}\): timestamp: got .*, want a datetime"
            )

    def test_timestamp_ms_is_milliseconds_and_not_both(self):
        items = self.sent(lambda client: client.track("Seen", "user-1", timestamp_ms=MOMENT_MS))
        self.assertEqual(items[0].track.timestamp_ms, MOMENT_MS)
        client = self.client("localhost:1")
        self.assertIsNone(client.track("Seen", timestamp_ms=1_779_013_800))
        self.assertIsNone(client.track("Seen", timestamp_ms=MOMENT_MS, timestamp=MOMENT))

    def test_identify_has_its_time_too(self):
        (item,) = self.sent(lambda client: client.identify("user-1", {"a": 1}, timestamp=MOMENT))
        self.assertEqual(item.identify.timestamp_ms, MOMENT_MS)


if __name__ == "__main__":
    unittest.main()
