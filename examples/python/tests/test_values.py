"""What a caller of Python naturally has, as properties, traits and ids."""

import collections
import datetime
import decimal
import enum
import fractions
import ipaddress
import unittest
import uuid

from support import Case, needs, properties

try:
    import numpy
except ImportError:
    numpy = None


class Plan(enum.Enum):
    PRO = "pro"


class Level(enum.IntEnum):
    HIGH = 3


class Values(Case):
    def test_only_a_none_that_the_caller_wrote_removes_a_trait(self):
        (item,) = self.sent(
            lambda client: client.identify(
                "user-1",
                {
                    "removed": None,
                    "nan": float("nan"),
                    "infinite": float("-inf"),
                    "object": object(),
                    "bytes": b"raw",
                    "nested": {"nan": float("nan"), "kept": 1},
                    "list": [1, float("inf"), 2],
                },
            )
        )
        self.assertEqual(properties(item), {"removed": None, "nested": {"kept": 1}, "list": [1, 2]})

    def test_what_is_left_out_is_named_with_event_and_field_and_without_its_value(self):
        relay = self.relay()
        client = self.client(relay)
        event_id = client.track("Order Placed", "user-1", {"cart": {"lines": [{"total": decimal.Decimal("NaN")}]}})
        self.assertEqual(
            self.warnings,
            [
                f"left out of 'Order Placed' ({event_id}): properties.cart.lines[0].total: got decimal.Decimal, "
                "want a finite number"
            ],
        )
        client.track("Order Placed", "user-1", {"secret": b"hunter2"})
        self.assertEqual(client.counters()["left_out"], 2)
        self.assertNotIn("hunter2", " ".join(self.warnings))

    def test_numbers_of_all_kinds_are_numbers(self):
        self.assertEqual(
            self.sent_properties(
                {
                    "decimal": decimal.Decimal("49.90"),
                    "whole": decimal.Decimal(7),
                    "fraction": fractions.Fraction(1, 4),
                    "int": 9007199254740993,
                    "level": Level.HIGH,
                    "took": datetime.timedelta(seconds=1.5),
                    "yes": True,
                }
            ),
            {
                "decimal": 49.9,
                "whole": 7,
                "fraction": 0.25,
                "int": 9007199254740993,
                "level": 3,
                "took": 1.5,
                "yes": True,
            },
        )

    def test_times_ids_and_enums_are_what_json_would_call_them(self):
        zone = datetime.timezone(datetime.timedelta(hours=2))
        self.assertEqual(
            self.sent_properties(
                {
                    "at": datetime.datetime(2026, 5, 17, 10, 30, tzinfo=zone),
                    "day": datetime.date(2026, 5, 17),
                    "hour": datetime.time(10, 30),
                    "id": uuid.UUID(int=7),
                    "plan": Plan.PRO,
                    "ip": ipaddress.ip_address("203.0.113.9"),
                }
            ),
            {
                "at": "2026-05-17T10:30:00+02:00",
                "day": "2026-05-17",
                "hour": "10:30:00",
                "id": "00000000-0000-0000-0000-000000000007",
                "plan": "pro",
                "ip": "203.0.113.9",
            },
        )

    def test_collections_are_lists_and_objects(self):
        self.assertEqual(
            self.sent_properties(
                {
                    "tuple": (1, 2),
                    "set": {"b", "a"},
                    "frozen": frozenset(["x"]),
                    "deque": collections.deque([1]),
                    "ordered": collections.OrderedDict(a=1),
                    "chain": collections.ChainMap({"b": 2}),
                    "names": {7: "seven", Plan.PRO: 1, None: 2, "": 3},
                }
            ),
            {
                "tuple": [1, 2],
                "set": ["a", "b"],
                "frozen": ["x"],
                "deque": [1],
                "ordered": {"a": 1},
                "chain": {"b": 2},
                "names": {"7": "seven", "pro": 1},
            },
        )

    @needs(numpy, "numpy")
    def test_numpy_is_taken_and_never_imported(self):
        self.assertEqual(
            self.sent_properties(
                {
                    "int": numpy.int64(7),
                    "float": numpy.float32(0.5),
                    "bool": numpy.bool_(True),
                    "text": numpy.str_("x"),
                    "array": numpy.array([[1, 2], [3, 4]]),
                    "nan": numpy.float64("nan"),
                    "at": numpy.datetime64("2026-05-17T10:30:00"),
                    "nat": numpy.datetime64("NaT"),
                    "wide": numpy.longdouble(0.25),
                }
            ),
            {
                "int": 7,
                "float": 0.5,
                "bool": True,
                "text": "x",
                "array": [[1, 2], [3, 4]],
                "at": "2026-05-17T10:30:00",
                "wide": 0.25,
            },
        )

    def test_a_value_that_contains_itself_or_breaks_costs_no_more_than_itself(self):
        loop = {"name": "loop"}
        loop["self"] = loop
        wide = []
        for _ in range(40):
            wide = [wide, wide]

        class Broken(dict):
            def items(self):
                raise RuntimeError("no")

        relay = self.relay()
        client = self.client(relay)
        self.assertIsNotNone(client.track("Loop", "user-1", {"loop": loop}))
        self.assertIsNone(client.track("Wide", "user-1", {"wide": wide}))
        self.assertIsNone(client.track("Broken", "user-1", {"broken": Broken(a=1)}))
        self.assertIsNotNone(client.track("Huge", "user-1", {"huge": 10**5000, "kept": 1}))
        self.assertTrue(client.flush())
        self.assertEqual([properties(item).get("kept") for item in relay.items()], [None, 1])
        self.assertEqual(client.counters()["dropped"], 2)

    def test_text_is_utf_8_and_half_of_an_emoji_costs_no_event(self):
        (item,) = self.sent(
            lambda client: client.track(
                "Купил\ud83d",
                "пользователь",
                {"about": "щ" * 4000, "cut": "ok \ud83d", "pair": "\ud83d\ude00", "key\udc00": 1},
            )
        )
        self.assertEqual(item.track.event_name, "Купил\ufffd")
        self.assertEqual(properties(item), {"about": "щ" * 4000, "cut": "ok \ufffd", "pair": "😀", "key\ufffd": 1})
        self.assertLess(len(item.track.properties_json), 8100)

    def test_ids_that_are_numbers_or_uuids_are_text(self):
        number = uuid.uuid4()
        items = self.sent(
            lambda client: [
                client.track("A", 4821),
                client.track("B", number),
                client.identify(Level.HIGH, {"a": 1}),
                client.track("C", anonymous_id=7, event_id=number),
            ]
        )
        self.assertEqual(
            [items[0].track.user_id, items[1].track.user_id, items[2].identify.user_id], ["4821", str(number), "3"]
        )
        self.assertEqual((items[3].track.anonymous_id, items[3].track.event_id), ("7", str(number)))

    @needs(numpy, "numpy")
    def test_an_id_from_a_data_frame_is_text(self):
        (item,) = self.sent(lambda client: client.track("A", numpy.int64(4821)))
        self.assertEqual(item.track.user_id, "4821")


if __name__ == "__main__":
    unittest.main()
