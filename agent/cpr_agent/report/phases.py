# SPDX-License-Identifier: GPL-2.0-or-later
"""The look of each phase of an upgrade: in a picture, on a page, on a terminal.

Colours go from light to dark and back from phase to phase, so that neighbours differ on a printer without colours too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cpr_agent.core.timeline import Part


class Look(NamedTuple):
    """``css`` is its class in a style sheet and ``fill`` its colour there; ``dark`` is the colour on a dark screen, where
    that differs. ``terminal`` is the colour on a terminal, and ``letter`` stands for the phase on one without colours."""

    css: str
    letter: str
    terminal: str
    fill: str
    dark: str = ""
    dark_label: bool = False
    """``fill`` is too light for a white label."""


KERNEL = Look("kernel", "k", "purple", "#54378a", "#7d5fbd")
"""For each phase that includes the new kernel's start: the shutdown before it may be part of the phase."""
LOOKS: Mapping[str, Look] = {
    "check": Look("check", "c", "grey46", "#a9b4bf", "#a3aeb9", dark_label=True),
    "stop first": Look("first", "f", "grey93", "#f3ecd8", dark_label=True),
    "save": Look("save", "s", "blue", "#1f5fa8", "#3476bd"),
    "shutdown": Look("shutdown", "d", "sky_blue1", "#9cc3e6", dark_label=True),
    "saved": Look("saved", "-", "sky_blue1", "#9cc3e6", dark_label=True),
    "userspace": Look("userspace", "u", "plum2", "#d3b1e0", dark_label=True),
    "devices": Look("devices", "v", "dark_orange3", "#a84c14", "#c8662b"),
    "load": Look("load", "l", "gold1", "#f3b75f", dark_label=True),
    "resume": Look("resume", "r", "green4", "#14714c", "#2b996c"),
    "take back": Look("back", "b", "dark_orange3", "#a84c14", "#c8662b"),
    "held": Look("held", "#", "red", "url(#cpr-hatch)"),
}


COST_LOOKS: Mapping[str, str] = {Part.SHUTDOWN: "shutdown", Part.KERNEL: "kexec + kernel", Part.BOOT: "userspace"}
"""By the part of an upgrade that a cost is in, the phase whose look it has."""


def look_of(phase: str) -> Look:
    return LOOKS.get(phase, KERNEL)
