# SPDX-License-Identifier: GPL-2.0-or-later
"""The results of checks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """A kernel that can be started. ``initrd`` and ``config`` are "" where there is none."""

    version: str
    image: str
    initrd: str = ""
    config: str = ""


HookPhase = Literal["check", "pre-save", "post-load"]


class HookFailure(NamedTuple):
    hook: str
    why: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One result of a check: what is so, why it matters, how to mend it."""

    severity: Literal["error", "warning", "info"]
    code: str
    what: str
    why: str = ""
    remedy: str = ""
    vm: str = ""
    seconds: float | None = None
