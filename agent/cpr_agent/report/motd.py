"""One line for who logs in (motd(5)): how the last upgrade went, and who is held."""

from __future__ import annotations

from collections.abc import Sequence

from cpr_agent.words import counted, length, moment, printable

_WORDS = {
    "done": "{guests} went on, longest pause {pause}",
    "held": "{guests} went on, longest pause {pause}",
    "rolled-back": "all was taken back",
}


def line(
    kind: str, phase: str, kernels: tuple[str, str], at: float, loaded: int, pause_s: float, held: Sequence[str]
) -> str:
    """ "" if there is nothing to tell: an upgrade under way tells of itself, and a refused one has told its caller."""
    parts = []
    if phase in _WORDS:
        before, after = kernels
        way = f"{before} -> {after}" if after and after != before else before
        went = _WORDS[phase].format(guests=counted(loaded, "guest"), pause=length(pause_s))
        parts.append(f"{kind} {way}, {moment(at)}: {phase.replace('-', ' ')}, {went}.")
    if held:
        names = ", ".join(held[:5]) + (f" and {len(held) - 5} more" if len(held) > 5 else "")
        parts.append(f"Held, and waiting for you: {names} (cprctl status VM).")
    text = " ".join(parts)
    return f"cpr-agent: {printable(text)}\n" if text else ""
