"""Sends every kind of event with an SDK for Python, Segment's or RudderStack's, which is made of it.

<the SDK's module> <its package> <ids end with> <address> <how many of each> <ids begin with>
"""

import importlib
import sys
import time

module, package, suffix, address, count, prefix = sys.argv[1:]
sdk = importlib.import_module(f"{module}.client")
client = sdk.Client(
    "wk", host=f"http://{address}", gzip=True, upload_size=7, upload_interval=0.2, max_retries=20,
    on_error=lambda error, _items: print(error, file=sys.stderr),
)
for at in range(int(count)):
    user = f"user-{at % 5}"

    def ids(kind):
        return {"message_id": f"{prefix}-{kind}-{at}-of-{suffix}"}

    client.track(user, "Order Placed", {"total": 19.5}, **ids("track"))
    client.identify(user, {"plan": "pro"}, **ids("identify"))
    client.page(user, "Docs", "Home", {"url": "https://x.example/"}, **ids("page"))
    client.screen(user, "Docs", "Main", **ids("screen"))
    client.group(user, "acme", {"plan": "pro"}, **ids("group"))
    client.alias("before", user, **ids("alias"))
    time.sleep(0.005)
# One that no relay takes: it costs the others nothing.
client.track("u", "Bad", message_id="x" * 101)
client.flush()
client.shutdown()
version = importlib.import_module(f"{module}.version").VERSION
print(f"{package} {version}")
