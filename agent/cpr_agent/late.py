# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules that are imported when they are first named, or a while after the start: no boot needs them (ADR 27)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib import import_module
from types import ModuleType


def late(package: str, names: Collection[str]) -> Callable[[str], ModuleType]:
    """The ``__getattr__`` (PEP 562) of ``package`` for its modules ``names``."""

    def imported(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    return imported
