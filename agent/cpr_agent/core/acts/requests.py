# SPDX-License-Identifier: GPL-2.0-or-later
"""The caller's wishes for an act, in one piece."""

from __future__ import annotations

import enum
import math

import msgspec

from cpr_agent.core.model import Survives
from cpr_agent.core.turns import Turn


class SaveRequest(msgspec.Struct, frozen=True):
    """``filename`` "" is the store's own place. The RAM must outlive ``need``. ``upgrade`` is the id of the upgrade that
    saves. The guest stops in its ``turn``; ``limit_s`` is for QEMU's part of it, if its definition allows no less."""

    filename: str = ""
    mode: str = "reboot"
    need: Survives = Survives.QEMU_RESTART
    upgrade: str = ""
    turn: Turn | None = None
    limit_s: float = math.inf


class LoadRequest(msgspec.Struct, frozen=True):
    """``filename`` "" is where the manifest says. A device is awaited before the ``turn``. Unless ``cold_start``,
    lost memory is an error, whatever the definition wants."""

    filename: str = ""
    turn: Turn | None = None
    cold_start: bool = True


class Replacement(enum.StrEnum):
    """How a guest gets a new QEMU."""

    TRANSFER = "transfer"
    """Beside the old one, by QEMU's own cpr-transfer."""
    BESIDE = "beside"
    """Beside the old one, by a save and a load."""
    IN_TURN = "in-turn"
    """By a save and a load, after the old one has ended."""
