# SPDX-License-Identifier: GPL-2.0-or-later
"""How long one QEMU may let the agent wait, over all of its answers: each could come just before its own timeout."""

from __future__ import annotations

import time
from collections.abc import Callable

CREDIT_S = 30.0
"""At once: a QEMU that answers in milliseconds never uses it up; one on a host in trouble has it for a few answers."""
SHARE = 0.1
"""Of the time that passes comes back."""
SHORTEST_S = 0.5
"""An answer may always take this, and it costs nothing: on a host in trouble each answer takes its time."""


class Patience:
    """``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = CREDIT_S
        self._at = clock()

    def next_s(self) -> float:
        """How long the next answer may take."""
        return max(self._left_s(), SHORTEST_S)

    def waited(self, seconds: float) -> None:
        """For one answer."""
        self._left = max(0.0, self._left_s() - max(0.0, seconds - SHORTEST_S))

    def _left_s(self) -> float:
        now = self._clock()
        self._left = min(CREDIT_S, self._left + (now - self._at) * SHARE)
        self._at = now
        return self._left
