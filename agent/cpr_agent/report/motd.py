# SPDX-License-Identifier: GPL-2.0-or-later
"""One line for those who log in (motd(5)): how the last upgrade went, and which guests are held."""

from __future__ import annotations

from collections.abc import Sequence

from cpr_agent.core.upgrade.ledger import Phase, Upgrade
from cpr_agent.words import counted, length, moment, printable

NAMED = 5
"""So many held guests are named; the others are counted."""
_OUTCOMES = {
    Phase.DONE: "{guests} went on, longest pause {pause}",
    Phase.HELD: "{guests} went on, longest pause {pause}",
    Phase.ROLLED_BACK: "all was taken back",
}
"""An upgrade in another phase has no line: it is under way, or was refused, which its caller knows."""


def line(last: Upgrade | None, kernel: str, held: Sequence[str]) -> str:
    """``kernel`` is the running one. Returns "" if there is nothing to report."""
    parts = []
    if last and last.phase in _OUTCOMES:
        way = last.kernel_from if kernel == last.kernel_from else f"{last.kernel_from} -> {kernel}"
        guests, pause = counted(len(last.loaded), "guest"), length(last.longest_pause_s)
        outcome = _OUTCOMES[last.phase].format(guests=guests, pause=pause)
        parts.append(f"{last.kind} {way}, {moment(last.changed_at)}: {last.phase.replace('-', ' ')}, {outcome}.")
    if held:
        names = ", ".join(held[:NAMED]) + (f" and {len(held) - NAMED} more" if len(held) > NAMED else "")
        parts.append(f"Held, and waiting for you: {names} (cprctl status VM).")
    text = " ".join(parts)
    return f"cpr-agent: {printable(text)}\n" if text else ""
