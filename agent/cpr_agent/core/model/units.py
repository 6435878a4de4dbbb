# SPDX-License-Identifier: GPL-2.0-or-later
"""Sizes and durations, as an admin writes them."""

from __future__ import annotations

import re
from typing import Self

MAX_MEMORY_BYTES = 1 << 60
"""Beyond every machine; and a few of them fit into a number of the bus."""
MAX_SECONDS = 366 * 86_400.0


class Bytes(int):
    """A number of bytes, written in TOML as ``"4G"`` (powers of 1024) or a plain integer."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
        if not match:
            raise ValueError(f"{text!r} is not a size such as 512M or 4G")
        return cls.of(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2].upper()])

    @classmethod
    def of(cls, value: float) -> Self:
        """Raises ValueError."""
        if not 0 <= value <= MAX_MEMORY_BYTES:
            raise ValueError(f"{value!r} is not a size of at most {MAX_MEMORY_BYTES >> 40}T")
        return cls(value)


class Seconds(float):
    """A duration in seconds, written in TOML as ``"60s"``, ``"2min"``, ``"500ms"`` or a plain number."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h|)", text.strip())
        if not match:
            raise ValueError(f"{text!r} is not a duration such as 60s or 2min")
        return cls.of(float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "min": 60, "h": 3600}[match[2]])

    @classmethod
    def of(cls, value: float) -> Self:
        """Raises ValueError: a time that is no number would put the timers of others out of order."""
        if not 0 <= value <= MAX_SECONDS:
            raise ValueError(f"{value!r} is not a duration of at most {MAX_SECONDS / 3600:g}h")
        return cls(value)
