"""A batching client of analytics-relay: never waits, never raises, keeps order.

    from analytics_relay import Analytics

    analytics = Analytics("localhost:50054")    # one for the process, before a fork or after
    analytics.track("Order Placed", "user-1", {"total": 49.9, "items": ["book", "pen"]})
    analytics.identify("user-1", {"plan": "pro", "trial_ends": None})   # None removes a trait

What waits is sent when the program ends. `flush` and `close` do so earlier.
"""

from .client import Analytics

__all__ = ["Analytics"]
