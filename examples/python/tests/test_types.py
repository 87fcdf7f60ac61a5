"""What checkers of types see. Nothing of it is asked of a running program."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

from support import environment, has, needs

RIGHT = """
from __future__ import annotations
import datetime, uuid
from decimal import Decimal
from analytics_relay import Analytics

with Analytics("localhost:50054", tls=True, ca_file="ca.pem", batch_max=10, flush_interval=1) as analytics:
    one: str | None = analytics.track("Seen", 7, {"total": Decimal("1.5"), "items": {"pen"}}, durability="synced")
    analytics.track(name="Seen", anonymous_id=uuid.uuid4(), timestamp=datetime.datetime.now(), context={"ip": "::1"})
    analytics.identify("user-1", {"plan": None}, timestamp=1_700_000_000.5, event_id="1")
    all_of_it: bool = analytics.flush(5)
    waiting: int = analytics.counters()["waiting"]
"""
WRONG = """
from analytics_relay import Analytics
analytics = Analytics("localhost:50054")
analytics.track({"event": "Seen"})
analytics.track("Seen", {"total": 1})
analytics.track("Seen", userId="u")
analytics.track()
analytics.identify("u", properties={})
analytics.flush("5")
Analytics(50054)
"""


@needs(has("mypy"), "mypy")
class Types(unittest.TestCase):
    def checked(self, program):
        """What is said of a program that uses the package as it is installed: by its marker `py.typed`."""
        with tempfile.TemporaryDirectory() as folder:
            (pathlib.Path(folder) / "program.py").write_text(program)
            command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", folder, "program.py"]
            done = subprocess.run(
                command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
            )
        return done.stdout + done.stderr

    def test_right_calls_are_right_and_each_wrong_one_is_named(self):
        self.assertIn("Success", self.checked(RIGHT))
        said = self.checked(WRONG)
        for number, line in enumerate(WRONG.splitlines(), 1):
            if line.startswith(("analytics.", "Analytics(")):
                self.assertIn(f"program.py:{number}: error", said)


if __name__ == "__main__":
    unittest.main()
