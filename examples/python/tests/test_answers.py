"""What the relay, or something before it, may answer."""

import time
import unittest

import grpc

from support import Case, PATIENCE, _proto, accept_all, wait_until


class Answers(Case):
    def test_an_answer_that_is_unset_or_unknown_is_deferred_with_a_delay(self):
        def answer(request, _):
            if len(relay.requests) > 2:
                return accept_all(request, _)
            if len(relay.requests) == 1:
                return _proto.TrackBatchResponse(answers=[{} for _ in request.items])
            # An answer of a newer relay: a oneof with a field that is not known here.
            return b"".join(b"\x0a\x04\xa2\x06\x01x" for _ in request.items)

        relay = self.relay(answer)
        client = self.client(relay)
        began = time.monotonic()
        client.track("A", "u")
        relay.wait_for(3)
        self.assertGreater(time.monotonic() - began, 1.9)
        self.assertTrue(client.flush())
        self.assertEqual(len(relay.requests), 3)
        self.assertEqual(client.counters()["accepted"], 1)
        self.assertIn("an answer that this version does not know", self.warnings[0])

    def test_what_is_never_answered_does_not_spin(self):
        relay = self.relay(lambda request, _: _proto.TrackBatchResponse(answers=[{} for _ in request.items]))
        client = self.client(relay)
        client.track("A", "u")
        self.assertFalse(client.flush(0.5))
        self.assertFalse(client.close(0.5))
        self.assertLess(len(relay.requests), 6)

    def test_too_few_answers_are_no_answer(self):
        relay = self.relay(
            lambda request, _: _proto.TrackBatchResponse() if len(relay.requests) == 1 else accept_all(request, _)
        )
        client = self.client(relay)
        client.track("A", "u")
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(client.counters()["accepted"], 1)
        self.assertIn("0 answers to 1 events", self.warnings[0])

    def test_deferred_events_go_again_first_with_their_ids_and_times_and_in_order(self):
        def answer(request, _):
            response = _proto.TrackBatchResponse(retry_delay_ms=150)
            for index, _item in enumerate(request.items):
                if len(relay.requests) == 1 and index >= 2:
                    response.answers.add().deferred.reason = "QUEUE_FULL"
                else:
                    response.answers.add().accepted.SetInParent()
            return response

        relay = self.relay(answer)
        client = self.client(relay, batch_max=5)
        ids = [client.track(f"E{number}", "u") for number in range(8)]
        self.assertTrue(client.flush(PATIENCE))
        first, second = [[item.track for item in request.items] for request in relay.requests[:2]]
        self.assertEqual([item.event_name for item in first], ["E0", "E1", "E2", "E3", "E4"])
        self.assertEqual([item.event_name for item in second], ["E2", "E3", "E4", "E5", "E6"])
        self.assertEqual(first[2:], second[:3])
        self.assertEqual([item.event_id for item in first], ids[:5])

    def test_a_lost_answer_is_asked_for_with_the_same_bytes(self):
        def answer(request, context):
            if len(relay.requests) == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            return accept_all(request, context)

        relay = self.relay(answer)
        client = self.client(relay)
        client.track("A", "u", {"a": 1})
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(relay.requests[0], relay.requests[1])
        self.assertIn("1 events wait, the relay does not take them: UNAVAILABLE: gone", self.warnings[0])

    def test_a_refused_event_is_named(self):
        def answer(request, _):
            response = _proto.TrackBatchResponse()
            response.answers.add().refused.violations.add(
                reason="PROPERTY_KEY_EMPTY", field="properties", description="no"
            )
            return response

        client = self.client(self.relay(answer))
        event_id = client.track("Order Placed", "u")
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(
            self.warnings, [f"event refused: 'Order Placed' ({event_id}): properties: no (PROPERTY_KEY_EMPTY)"]
        )
        self.assertEqual(client.counters()["refused"], 1)

    def test_a_limit_of_size_on_the_way_splits_and_a_lone_event_is_refused(self):
        relay = self.relay(options=[("grpc.max_receive_message_length", 20_000)])
        client = self.client(relay, flush_interval=3600)
        for number in range(12):
            client.track(f"E{number}", "u", {"a": "x" * (30_000 if number == 5 else 4_000)})
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(relay.names(), [f"E{number}" for number in range(12) if number != 5])
        self.assertEqual((client.counters()["accepted"], client.counters()["refused"]), (11, 1))
        self.assertIn("event refused: 'E5'", self.warnings[-1])

    def test_a_quota_is_waited_for_and_nothing_is_refused(self):
        def answer(request, context):
            if len(relay.requests) <= 3:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
            return accept_all(request, context)

        relay = self.relay(answer)
        client = self.client(relay)
        client.track("A", "u")
        wait_until(lambda: client.counters()["accepted"] == 1)
        self.assertEqual(client.counters()["refused"], 0)

    def test_any_other_status_keeps_the_events(self):
        codes = iter([grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL])

        def answer(request, context):
            code = next(codes, None)
            if code is not None:
                context.abort(code, "no")
            return accept_all(request, context)

        client = self.client(self.relay(answer))
        client.track("A", "u")
        wait_until(lambda: client.counters()["accepted"] == 1)


class Bounds(Case):
    def test_the_queue_is_bounded_in_events(self):
        client = self.client("127.0.0.1:1", queue_max=10)
        self.assertEqual([client.track("A", "u") is None for _ in range(12)], [False] * 10 + [True] * 2)
        self.assertEqual(client.counters()["dropped"], 2)
        self.assertTrue(any("the queue is full" in warning for warning in self.warnings), self.warnings)

    def test_the_queue_is_bounded_in_bytes_and_what_was_sent_makes_room(self):
        import threading

        gate = threading.Event()

        def answer(request, context):
            gate.wait(PATIENCE)
            return accept_all(request, context)

        client = self.client(self.relay(answer), queue_bytes_max=100_000)
        self.addCleanup(gate.set)
        taken = sum(client.track("A", "u", {"a": "x" * 8_000}) is not None for _ in range(100))
        self.assertEqual(taken, 11)
        self.assertLessEqual(client.counters()["waiting_bytes"], 100_000)
        gate.set()
        self.assertTrue(client.flush(PATIENCE))
        self.assertEqual(client.counters()["waiting_bytes"], 0)
        self.assertIsNotNone(client.track("A", "u", {"a": "x" * 8_000}))

    def test_the_sum_holds(self):
        client = self.client(self.relay())
        for number in range(500):
            client.track("A", number)
            counters = client.counters()
            self.assertEqual(
                counters["queued"], sum(counters[name] for name in ("accepted", "refused", "abandoned", "waiting"))
            )
        self.assertTrue(client.close())


if __name__ == "__main__":
    unittest.main()
