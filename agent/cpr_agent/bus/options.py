# SPDX-License-Identifier: GPL-2.0-or-later
"""``a{sv}`` in and out: strict when it comes from a caller, typed when it goes to one."""

from __future__ import annotations

from typing import Any

from cpr_agent.bus.library import Variant
from cpr_agent.errors import InvalidArgument


def take_options(options: dict[str, Variant], known: dict[str, str]) -> dict[str, Any]:
    """The values of ``options``; ``known`` has each allowed name and its signature. Raises InvalidArgument."""
    out = {}
    for name, variant in options.items():
        if name not in known:
            raise InvalidArgument(f"unknown option {name!r}", remedy=f"known are: {', '.join(sorted(known)) or 'none'}")
        if variant.signature != known[name]:
            raise InvalidArgument(f"option {name!r} has type {variant.signature!r}, it must be {known[name]!r}")
        out[name] = variant.value
    return out


def vardict(**values: object) -> dict[str, Variant]:
    """Plain values as ``a{sv}``; a None is left out, names get dashes."""
    return {name.replace("_", "-"): _variant(value) for name, value in values.items() if value is not None}


def _variant(value: object) -> Variant:
    match value:
        case Variant():
            return value
        case bool():
            return Variant("b", value)
        case int():
            return Variant("t" if value >= 0 else "x", value)
        case float():
            return Variant("d", value)
        case str():
            return Variant("s", str(value))
        case _:
            raise TypeError(f"{value!r} has no D-Bus type here")
