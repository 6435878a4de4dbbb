# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU that failed has said at last, or the signal that has ended it without a word, and what helps then."""

from __future__ import annotations

import contextlib
import signal
from typing import NamedTuple

from cpr_agent.core.ports import Place
from cpr_agent.errors import CprError, ProofFailed, QemuRefused

EXITING_S = 1.0
"""Between the end of a QEMU's connection and that of its process."""


class LastWords(NamedTuple):
    said: str = ""
    """The end of its log, and what has ended it."""
    remedy: str = ""
    """For the signal that has ended it."""


_CRASHED = LastWords("it crashed", "`coredumpctl info` may have the place; install another QEMU, or report it")
_ENDINGS = {
    signal.SIGSYS: LastWords(
        "its sandbox forbids a system call that it made",
        "`journalctl -k` has its number (type=1326): have a definition without what needs it, such as a network's script "
        "or helper, or allow it with -sandbox in vm.arguments",
    ),
    signal.SIGKILL: LastWords(
        "the kernel had no memory left, or somebody ended it",
        "see `journalctl -k` for `Out of memory` and `oom-kill`: free some memory, or allow its unit more",
    ),
    signal.SIGBUS: LastWords(
        "memory that it has mapped is not there",
        "see `journalctl -k` for memory failures, and whether what its RAM is in is full or was cut off",
    ),
    signal.SIGTERM: LastWords("somebody ended it", "see who did so, such as a stop of its unit"),
    signal.SIGSEGV: _CRASHED,
    signal.SIGABRT: _CRASHED,
    signal.SIGILL: _CRASHED,
    signal.SIGFPE: _CRASHED,
    signal.SIGTRAP: _CRASHED,
}


async def last_words(place: Place, error: BaseException) -> LastWords:
    """Of the QEMU in ``place``, which failed by ``error``: before anybody ends it."""
    lives = not isinstance(error, CprError) or isinstance(error, (QemuRefused, ProofFailed))
    number = await place.ended_by(0.0 if lives else EXITING_S)
    why, remedy = ending(number)
    return LastWords("; ".join(filter(None, (place.log_tail(), why))), remedy)


def ending(number: int) -> LastWords:
    """What it means that this signal has ended a QEMU; nothing for 0, which is none."""
    if not number:
        return LastWords()
    name = f"signal {number}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
    why, remedy = _ENDINGS.get(number, LastWords())  # type: ignore[call-overload]  # a signal is its number
    return LastWords(f"it was ended by {name}{why and f': {why}'}", remedy)
