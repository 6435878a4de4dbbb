# SPDX-License-Identifier: GPL-2.0-or-later
"""How much a caller may ask for: so many calls, of so much.

Root is exempt from the rate limit, not from the concurrency limit. A call costs its user more if it costs the agent more.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from cpr_agent.bus.frames import MAX_BODY_BYTES, lacks_arguments
from cpr_agent.bus.library import Message, Variant
from cpr_agent.bus.shape import MAX_VALUES
from cpr_agent.errors import InvalidArgument, LimitsExceeded

CALLS_PER_S = 50.0
BURST = 1000.0
"""Calls that a user may make at once after a quiet time: `cprctl list` asks once for each VM."""
UNDER_WAY = 128
"""Calls of one connection that wait for an answer; dbus-daemon has the same limit (max_replies_per_connection)."""
UNDER_WAY_PER_USER = 1024
"""Of all connections of a user other than root: each call under way is a task, of some KB."""
COSTS = {
    **dict.fromkeys(("Validate", "Import", "Report", "Check"), 20.0),
    **dict.fromkeys(
        ("GetManagedObjects", "ListHistory", "ListReports", "ListDevices", "AllocateMemory", "Adopt", "Release"), 5.0
    ),
    "GetAll": 2.0,
}
"""Calls that are worth several: they start a program, ask QEMUs, or look through much."""
HEAVY_COST = 5.0
HEAVY_PER_USER = 4
HEAVY_IN_ALL = 8
"""Calls of at least that cost under way for one user, and for all users but root."""
MAX_TEXT_BYTES = 8 << 10
"""The whole text of a file from a user other than root."""
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
        self._heavy: Counter[int] = Counter()
        self._of_user: Counter[int] = Counter()

    def begin(self, sender: str) -> None:
        """A call of this connection, until its ``end``. Raises LimitsExceeded if too many wait for their answer."""
        if self._under_way[sender] >= UNDER_WAY:
            raise LimitsExceeded(
                f"{UNDER_WAY} calls of yours are waiting for an answer", left="nothing was done", remedy="wait for them"
            )
        self._under_way[sender] += 1

    def has_room(self, sender: str, uid: int | None) -> bool:
        """For one more call of this connection. ``uid`` is its user, None for root and for one that is not known yet."""
        if self._under_way[sender] >= UNDER_WAY:
            return False
        return uid is None or (self._of_user[uid] < UNDER_WAY_PER_USER and self._left_of(uid, self._clock()) >= 1.0)

    def end(self, sender: str) -> None:
        self._under_way[sender] -= 1
        if not self._under_way[sender]:
            del self._under_way[sender]

    def spend(self, uid: int, cost: float = 1.0) -> None:
        """Take note of a call by this user. Raises LimitsExceeded if it is one too many."""
        now = self._clock()
        left = self._left_of(uid, now) - cost
        self._left.pop(uid, None)  # the last who called stands last
        self._left[uid] = max(left, -1.0), now
        while len(self._left) > _KEPT_USERS:
            del self._left[next(iter(self._left))]
        if left < 0:
            raise LimitsExceeded(
                f"user {uid} makes more than {CALLS_PER_S:g} calls a second",
                left="nothing was done",
                remedy="wait a second; GetAll and GetManagedObjects answer much in one call",
            )

    def _left_of(self, uid: int, now: float) -> float:
        left, at = self._left.get(uid, (BURST, now))
        return min(BURST, left + (now - at) * CALLS_PER_S)

    @contextlib.contextmanager
    def one_more(self, uid: int) -> Iterator[None]:
        """While a call of this user, on whichever connection, is under way. Raises LimitsExceeded."""
        if self._of_user[uid] >= UNDER_WAY_PER_USER:
            raise LimitsExceeded(
                f"{UNDER_WAY_PER_USER} calls of user {uid} are waiting for an answer",
                left="nothing was done",
                remedy="wait",
            )
        self._of_user[uid] += 1
        try:
            yield
        finally:
            self._of_user[uid] -= 1
            if not self._of_user[uid]:
                del self._of_user[uid]

    @contextlib.contextmanager
    def under_way(self, uid: int, cost: float) -> Iterator[None]:
        """While a call of this user is done. Raises LimitsExceeded if too many heavy ones are."""
        if cost < HEAVY_COST:
            yield
            return
        if self._heavy[uid] >= HEAVY_PER_USER or self._heavy.total() >= HEAVY_IN_ALL:
            raise LimitsExceeded(
                f"{self._heavy[uid]} such calls of user {uid} are under way, {self._heavy.total()} of all users",
                left="nothing was done",
                remedy="wait for them",
            )
        self._heavy[uid] += 1
        try:
            yield
        finally:
            self._heavy[uid] -= 1
            if not self._heavy[uid]:
                del self._heavy[uid]


def refuse_long_text(call: Message) -> None:
    """For users other than root. Raises InvalidArgument."""
    if call.member in WHOLE_FILES and any(isinstance(text, str) and len(text) > MAX_TEXT_BYTES for text in call.body):
        raise _excess(f"a text of more than {MAX_TEXT_BYTES >> 10} KiB", MAX_TEXT_BYTES)


def refuse_excess(call: Message) -> None:
    """Raises InvalidArgument if the arguments are more than anybody can need, before anything is made of them."""
    if lacks_arguments(call):
        raise InvalidArgument(
            f"its arguments have more than {MAX_BODY_BYTES >> 10} KiB or {MAX_VALUES} values, or can't be read",
            left="nothing was done",
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
        case list() | tuple() if len(value) > MAX_OPTIONS:
            raise _excess(f"a list of {len(value)}", MAX_OPTIONS)
        case list() | tuple():
            for item in value:
                _refuse_excess(item)


def _excess(what: str, limit: int) -> InvalidArgument:
    return InvalidArgument(f"{what} is too much", left="nothing was done", remedy=f"{limit} is the limit")
