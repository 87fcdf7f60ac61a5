"""What a caller hands over, as an item of a batch.

Nothing is guessed: what would be wrong data is left out, or drops the event,
and a warning names the event and the field, never the value.
"""

import datetime
import difflib
import enum
import ipaddress
import json
import math
import numbers
import re
import time
import uuid
from collections import deque
from collections.abc import Mapping
from decimal import Decimal

from . import _proto

EVENT_BYTES_MAX = 60 * 1024  # the relay's limit of a message is 64 KB
LEVELS_MAX = 16  # the relay's
VALUES_MAX = 20_000  # more than 10 KB of JSON can hold
INTEGER_BITS_MAX = 1024  # beyond, no provider has a number for it

_FIELDS = {
    "track": (
        "name",
        "user_id",
        "properties",
        "anonymous_id",
        "event_id",
        "timestamp",
        "timestamp_ms",
        "context",
        "durability",
    ),
    "identify": ("user_id", "traits", "anonymous_id", "event_id", "timestamp", "timestamp_ms", "context", "durability"),
}
_MEANT = {
    "event": "name",
    "event_name": "name",
    "userId": "user_id",
    "distinct_id": "user_id",
    "anonymousId": "anonymous_id",
    "message_id": "event_id",
    "messageId": "event_id",
}
_LEFT_OUT = object()


class Dropped(Exception):
    """The event is of another shape. The text says where, got and want."""


def kind_of(value):
    """What a value is, for a warning: never the value itself."""
    if value is None or value is _LEFT_OUT:
        return "None"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "an infinity"
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def encoded(call, args, fields, event_id, left_out):
    """The bytes of a batch with this one event.

    `left_out(field, got, want)` is called for what does not go with it. Several
    such batches, one behind the other, are one batch: so protobuf defines it.
    """
    fields = _named(call, args, fields)
    draft = {
        "event_id": event_id,
        "timestamp_ms": _time(fields, left_out),
        "user_id": identifier("user_id", fields.get("user_id")),
        "anonymous_id": identifier("anonymous_id", fields.get("anonymous_id")),
        "context": _context(fields.get("context"), left_out),
        "durability": _durability(fields.get("durability")),
    }
    if call == "track":
        draft["event_name"] = _name(fields.get("name"))
        kind, values = _proto.TrackEventRequest, "properties"
    else:
        if fields.get("user_id") is None:
            raise Dropped("user_id: got None, want text, int or UUID")
        kind, values = _proto.IdentifyUserRequest, "traits"
    properties = fields.get(values)
    if properties is not None:
        if not isinstance(properties, Mapping):
            raise Dropped(f"{values}: got {kind_of(properties)}, want a dict")
        draft["properties_json"] = Values(left_out).json(properties, values)
    request = _proto.TrackBatchRequest(items=[_proto.TrackBatchItem(**{call: kind(**draft)})])
    batch = request.SerializeToString()
    if len(batch) > EVENT_BYTES_MAX:
        raise Dropped(f"{values}: got {len(batch)} bytes with the rest of the event, want at most {EVENT_BYTES_MAX}")
    return batch


def _named(call, args, fields):
    """Arguments by name. None for one that is given twice, or unknown."""
    known = _FIELDS[call]
    if len(args) > 3:
        raise Dropped(f"got {len(args)} arguments without a name, want at most 3: {', '.join(known[:3])}")
    named = dict(zip(known, args))
    for name, value in fields.items():
        if name not in known:
            meant = _MEANT.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
            hint = f" (meant {meant}?)" if meant in known else ""
            raise Dropped(f"{name}: unknown{hint}, want some of {', '.join(known)}")
        if name in named:
            raise Dropped(f"{name}: given twice")
        named[name] = value
    return named


def _name(value):
    value = _plain(value)
    if not isinstance(value, str):
        raise Dropped(f"name: got {kind_of(value)}, want text")
    return text(value)


def identifier(field, value):
    value = _plain(value)
    if value is None:
        return ""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, uuid.UUID) or isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return str(value)
    raise Dropped(f"{field}: got {kind_of(value)}, want text, int or UUID")


def _plain(value):
    return value.value if isinstance(value, enum.Enum) else value


def _durability(value):
    value = _plain(value)
    name = value.lower() if isinstance(value, str) else value
    if name is None:
        return 0
    if isinstance(name, str) and name in _proto.DURABILITIES:
        return _proto.DURABILITIES[name]
    raise Dropped(f"durability: got {kind_of(value)}, want one of queued, written, synced")


def _context(value, left_out):
    """Never costs the event: what is not understood is left out."""
    context = {}
    if value is None:
        return context
    if not isinstance(value, Mapping):
        left_out("context", kind_of(value), "a dict of ip and user_agent")
        return context
    for name, part in value.items():
        if isinstance(part, (ipaddress.IPv4Address, ipaddress.IPv6Address)):
            part = str(part)
        if name not in ("ip", "user_agent"):
            left_out(f"context.{name}", "a name that is unknown", "ip or user_agent")
        elif isinstance(part, str):
            context[name] = text(part)
        elif part is not None:
            left_out(f"context.{name}", kind_of(part), "text")
    return context


# ISO 8601 as it is met: Python's own parser learned most of it in 3.11 only.
_ISO = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d{1,9}))?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?",
    re.IGNORECASE,
)
_TIME_WANT = "a datetime, a date, ISO 8601 text, or Unix time in s, ms, us or ns"


def _time(fields, left_out):
    """Unix time in milliseconds; now if none is given. A time that cannot be
    read drops the event: whoever gives one does it because now is wrong."""
    given = [name for name in ("timestamp", "timestamp_ms") if fields.get(name) is not None]
    if not given:
        return int(time.time() * 1000)
    if len(given) == 2:
        raise Dropped("timestamp: given together with timestamp_ms, want one of them")
    field, value = given[0], _plain(fields[given[0]])
    try:
        moment = _moment(value)
        if isinstance(moment, datetime.datetime):
            if moment.tzinfo is None:
                moment = moment.astimezone()  # this machine's zone, as Python has it
                if moment.utcoffset():
                    left_out(field, "a time without its zone: taken as this machine's own", "a zone, such as UTC")
            return int(moment.timestamp() * 1000)
        if field == "timestamp" or moment >= 1e11:
            return _unix_ms(moment)
    except (ValueError, OverflowError, OSError):
        pass
    raise Dropped(f"{field}: got {kind_of(value)} that is no time, want {_TIME_WANT}")


def _moment(value):
    """A datetime or a number."""
    if isinstance(value, datetime.datetime):
        return value
    if isinstance(value, datetime.date):
        return datetime.datetime(value.year, value.month, value.day, tzinfo=datetime.timezone.utc)
    if isinstance(value, str):
        return _iso(value.strip())
    if isinstance(value, (numbers.Real, Decimal)) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if type(value).__module__ == "numpy" and type(value).__name__ == "datetime64":
        return _iso(str(value) + "Z" if "T" in str(value) else str(value))  # numpy's have no zone: UTC
    raise ValueError


def _iso(value):
    match = _ISO.fullmatch(value)
    if not match:
        raise ValueError
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    moment = datetime.datetime(
        int(year),
        int(month),
        int(day),
        int(hour or 0),
        int(minute or 0),
        int(second or 0),
        int((fraction or "0").ljust(6, "0")[:6]),
    )
    if zone is None and hour is not None:
        return moment
    if zone is None or zone in "Zz":
        return moment.replace(tzinfo=datetime.timezone.utc)
    digits = zone[1:].replace(":", "").ljust(4, "0")
    offset = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return moment.replace(tzinfo=datetime.timezone(-offset if zone[0] == "-" else offset))


def _unix_ms(value):
    """The size tells the unit: each covers the years 1973 to 5138, and the next
    one begins there. Nobody's event is older."""
    if not 1e8 <= value < 1e20:
        raise ValueError
    if value < 1e11:
        return int(value * 1000)
    if value < 1e14:
        return int(value)
    return int(value // 1000) if value < 1e17 else int(value // 1_000_000)


def text(value):
    """UTF-8 has no half of a pair: U+FFFD stands in its place."""
    try:
        value.encode()
        return value
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Values:
    """Values of Python as those of JSON.

    A null removes a trait, so only a None that the caller wrote becomes one.
    What JSON does not have is left out.
    """

    def __init__(self, left_out):
        self._left_out = left_out
        self._count = 0

    def json(self, properties, path):
        plain = self._dict(properties, path, 1)
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()

    def _value(self, value, path, level):
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return text(value)
        if isinstance(value, enum.Enum):  # before the types that an enum may be made of
            return self._value(value.value, path, level)
        if isinstance(value, str):
            return text(str.__str__(value))
        if isinstance(value, numbers.Integral):
            number = int(value)
            return number if number.bit_length() <= INTEGER_BITS_MAX else self._out(path, value, "a smaller integer")
        if isinstance(value, (numbers.Real, Decimal)):
            return self._number(value, path)
        if isinstance(value, Mapping):
            return self._level(self._dict, value, path, level)
        if isinstance(value, (list, tuple, deque)):
            return self._level(self._list, value, path, level)
        if isinstance(value, (set, frozenset)):
            return self._level(self._list, sorted(value, key=repr), path, level)
        return self._object(value, path, level)

    def _number(self, value, path):
        try:
            number = float(value)
        except (OverflowError, ValueError):  # a signalling NaN; a fraction too large
            number = math.nan
        return number if math.isfinite(number) else self._out(path, value, "a finite number")

    def _object(self, value, path, level):
        if isinstance(value, (datetime.date, datetime.time)):
            written = value.isoformat()
            return written if written != "NaT" else self._out(path, value, "a time")
        if isinstance(value, datetime.timedelta):
            return value.total_seconds()
        if isinstance(value, (uuid.UUID, ipaddress.IPv4Address, ipaddress.IPv6Address)):
            return str(value)
        if type(value).__module__ == "numpy":  # which need not be installed
            if type(value).__name__ == "datetime64":
                written = str(value)
                return written if written != "NaT" else self._out(path, value, "a time")
            if hasattr(value, "tolist"):
                return self._level(self._value, value.tolist(), path, level)
        return self._out(path, value, "text, a number, a bool, a list, a dict or a time")

    def _level(self, convert, value, path, level):
        """One level down; a value that contains itself ends here."""
        if level >= LEVELS_MAX and convert != self._value or level > LEVELS_MAX:
            return self._out(path, value, f"at most {LEVELS_MAX} levels")
        return convert(value, path, level + 1)

    def _dict(self, value, path, level):
        plain = {}
        for key, part in value.items():
            name = self._key(key, path)
            if name is not None:
                part = self._counted(part, f"{path}.{name}", level)
                if part is not _LEFT_OUT:
                    plain[name] = part
        return plain

    def _key(self, key, path):
        key = _plain(key)
        if isinstance(key, str) and key:
            return text(str.__str__(key))
        if isinstance(key, uuid.UUID) or isinstance(key, numbers.Integral) and not isinstance(key, bool):
            return str(key)
        got = "an empty name" if isinstance(key, str) else f"a name that is {kind_of(key)}"
        self._left_out(path, got, "names that are text")
        return None

    def _list(self, value, path, level):
        parts = (self._counted(part, f"{path}[{index}]", level) for index, part in enumerate(value))
        return [part for part in parts if part is not _LEFT_OUT]

    def _counted(self, value, path, level):
        self._count += 1
        if self._count > VALUES_MAX:
            raise Dropped(f"{path}: got over {VALUES_MAX} values, want at most 10,240 bytes of JSON")
        return self._value(value, path, level)

    def _out(self, path, value, want):
        self._left_out(path, kind_of(value), want)
        return _LEFT_OUT
