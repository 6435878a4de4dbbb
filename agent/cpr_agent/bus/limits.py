"""How much a caller may ask for: so many calls, of so much. Root may call as often as it likes, and not more at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from dbus_next.message import Message
from dbus_next.signature import Variant

from cpr_agent.bus.wire import MAX_BODY_BYTES, lacks_arguments
from cpr_agent.errors import InvalidArgument, LimitsExceeded

CALLS_PER_S = 50.0
BURST = 1000.0
"""Calls that a user may make at once after a quiet time: `cprctl list` asks once for each VM."""
UNDER_WAY = 128
"""Calls of one connection that wait for an answer; dbus-daemon has the same limit (max_replies_per_connection)."""
MAX_OPTIONS = 64
MAX_NAME_CHARS = 64
MAX_TEXT_CHARS = 32 << 10
"""A definition, or a command line that libvirt made, may be long."""
WHOLE_FILES = frozenset({"Validate", "Import"})
"""Methods that take a whole file's text: for them the limit of the body is enough."""
_KEPT_USERS = 1024


class Limits:
    """Counts calls under way by connection, and calls by user. ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._under_way: Counter[str] = Counter()
        self._left: dict[int, tuple[float, float]] = {}
        """By user: calls left, and when that was so."""

    def begin(self, sender: str) -> None:
        """A call of this connection, until its ``end``. Raises LimitsExceeded if too many wait for their answer."""
        if self._under_way[sender] >= UNDER_WAY:
            raise LimitsExceeded(
                f"{UNDER_WAY} calls of yours are waiting for an answer", left="nothing was done", remedy="wait for them"
            )
        self._under_way[sender] += 1

    def end(self, sender: str) -> None:
        self._under_way[sender] -= 1
        if not self._under_way[sender]:
            del self._under_way[sender]

    def spend(self, uid: int) -> None:
        """Take note of a call by this user. Raises LimitsExceeded if it is one too many."""
        now = self._clock()
        left, at = self._left.pop(uid, (BURST, now))
        left = min(BURST, left + (now - at) * CALLS_PER_S) - 1
        self._left[uid] = max(left, -1.0), now
        while len(self._left) > _KEPT_USERS:
            del self._left[next(iter(self._left))]
        if left < 0:
            raise LimitsExceeded(
                f"user {uid} makes more than {CALLS_PER_S:g} calls a second",
                left="nothing was done",
                remedy="wait a second; GetAll and GetManagedObjects answer much in one call",
            )


def refuse_excess(call: Message) -> None:
    """Raises InvalidArgument if the arguments are more than anybody can need, before anything is made of them."""
    if lacks_arguments(call):
        raise InvalidArgument(
            f"its arguments have more than {MAX_BODY_BYTES >> 10} KiB, or can't be read", left="nothing was done"
        )
    for value in call.body:
        if not (isinstance(value, str) and call.member in WHOLE_FILES):
            _refuse_excess(value)


def _refuse_excess(value: Any) -> None:
    match value:
        case str() if len(value) > MAX_TEXT_CHARS:
            raise _excess(f"an argument of {len(value)} characters", MAX_TEXT_CHARS)
        case dict() if len(value) > MAX_OPTIONS:
            raise _excess(f"{len(value)} options", MAX_OPTIONS)
        case dict():
            for name, option in value.items():
                if len(str(name)) > MAX_NAME_CHARS:
                    raise _excess(f"an option whose name has {len(str(name))} characters", MAX_NAME_CHARS)
                _refuse_excess(option)
        case Variant():
            _refuse_excess(value.value)
        case list() if len(value) > MAX_OPTIONS:
            raise _excess(f"a list of {len(value)}", MAX_OPTIONS)
        case list():
            for item in value:
                _refuse_excess(item)


def _excess(what: str, limit: int) -> InvalidArgument:
    return InvalidArgument(f"{what} is too much", left="nothing was done", remedy=f"{limit} is the limit")
