# SPDX-License-Identifier: GPL-2.0-or-later
"""Numbers for node_exporter's textfile collector.

The text is OpenMetrics 1.0 (https://openmetrics.io) and at the same time the older format that the collector parses. It has
gauges alone: no other kind is written alike in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from cpr_agent.core.upgrade.ledger import Phase

OUTCOMES = (Phase.DONE, Phase.HELD, Phase.ROLLED_BACK, Phase.REFUSED)


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """``states``, ``pauses`` (s), ``checkpoints`` (bytes of device state) and ``held`` are by VM."""

    version: str
    kernel: str
    states: Mapping[str, str] = msgspec.field(default_factory=dict)
    known_states: tuple[str, ...] = ()
    pauses: Mapping[str, float] = msgspec.field(default_factory=dict)
    checkpoints: Mapping[str, int] = msgspec.field(default_factory=dict)
    held: frozenset[str] = frozenset()
    kind: str = ""
    """The last upgrade's; "" if there was none."""
    outcome: str = ""
    changed_at: float = 0.0


def openmetrics(numbers: Numbers) -> str:
    counts = Counter(numbers.states.values())
    families = [
        _family("cpr_agent_info", "The agent, and the kernel that it runs on.", [(_about(numbers), 1)]),
        _family("cpr_guests", "Guests by state.", [({"state": s}, counts[s]) for s in numbers.known_states]),
        _family(
            "cpr_guest_held",
            "1 for a guest that is kept untouched until an admin decides.",
            [({"vm": vm}, int(vm in numbers.held)) for vm in sorted(numbers.states)],
        ),
        _family(
            "cpr_guest_pause_seconds",
            "How long the guest stood still when it was last loaded.",
            [({"vm": vm}, pause) for vm, pause in sorted(numbers.pauses.items())],
            "seconds",
        ),
        _family(
            "cpr_checkpoint_bytes",
            "Size of the device state of a guest that is saved.",
            [({"vm": vm}, size) for vm, size in sorted(numbers.checkpoints.items())],
            "bytes",
        ),
    ]
    if numbers.kind:
        families.append(
            _family(
                "cpr_last_upgrade_result",
                "How the last upgrade ended: 1 at one of them; none while it is under way.",
                [({"kind": numbers.kind, "result": str(outcome)}, int(outcome == numbers.outcome)) for outcome in OUTCOMES],
            )
        )
        families.append(
            _family(
                "cpr_last_upgrade_timestamp_seconds",
                "When the last upgrade ended, or entered its current phase (Unix time).",
                [({"kind": numbers.kind}, numbers.changed_at)],
                "seconds",
            )
        )
    return "".join(families) + "# EOF\n"


def _about(numbers: Numbers) -> dict[str, str]:
    return {"version": numbers.version, "kernel": numbers.kernel}


def _family(name: str, explained: str, samples: Iterable[tuple[Mapping[str, str], float]], unit: str = "") -> str:
    lines = [f"# HELP {name} {explained}", f"# TYPE {name} gauge"]
    if unit:
        lines.append(f"# UNIT {name} {unit}")
    for labels, value in samples:
        written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{name}{{{written}}} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
