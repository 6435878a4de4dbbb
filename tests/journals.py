# SPDX-License-Identifier: GPL-2.0-or-later
"""Journals as agents write them, for tests of what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpr_agent.core.past import Record
from cpr_agent.core.upgrade.ledger import Replay
from cpr_agent.store.journal import _line_of
from tests import stories

Numbered = list[dict[str, Any]]
Script = list[tuple[str, dict[str, Any]]]


def numbered(records: Sequence[Record], first: int = 0) -> Numbered:
    return [{"n": n, "at": 1000.0 + n, "boot": "one", **record} for n, record in enumerate(records, first)]


def renumbered(records: Sequence[Record]) -> Numbered:
    return numbered([{name: fact for name, fact in record.items() if name != "n"} for record in records])


def act(name: str, vm: str, saved: str, fresh: str, run_state: str) -> Script:
    """The events of an act and their facts; ``saved`` is the live checkpoint, ``fresh`` the id of a new one."""
    save = {"checkpoint": fresh, "run_state": run_state, "path": f"/{vm}"}
    load, new = {"checkpoint": saved}, {"checkpoint": fresh}
    going_on: Script = [("resume", {**new, "run_state": run_state}), ("resumed", new)]
    scripts: dict[str, Script] = {
        "start": [("start", {}), ("cold-started", {})],
        "save": [("save-begin", save), ("saved", new)],
        "sleep-save": [("suspend", {}), ("save-begin", save), ("saved", new)],
        "late-sleep": [("suspend", {}), ("woken", {})],
        "fail-save": [("save-begin", save), ("save-undone", new), ("resumed", new)],
        "load": [("load-begin", load), ("resume", {**load, "run_state": run_state}), ("resumed", load), ("woken", {})],
        "fail-load": [("load-begin", load), ("load-failed", load)],
        "lost": [("memory-lost", {**load, "reason": "zero"}), ("start", {}), ("cold-started", {})],
        "take-back": [("rollback", load), ("resumed", load)],
        "by-hand": [("resumed-by-hand", load)],
        "held": [("load-begin", load), ("held", {"reason": "changed", "evidence": []})],
        "discard": [("discard", {})],
        "refresh": [
            ("refresh", {}),
            ("save-begin", save),
            ("saved", new),
            ("load-begin", new),
            *going_on,
            ("refreshed", {}),
        ],
        "transfer": [("refresh", {}), ("transfer", new), *going_on, ("refreshed", {})],
        "fail-transfer": [
            ("refresh", {}),
            ("transfer", new),
            ("transfer-undone", new),
            ("resumed", new),
            ("refreshed", {}),
        ],
    }
    return scripts[name]


def many_upgrades(count: int, guests: int = 3) -> Numbered:
    """Each with a guest that is held."""
    records: list[dict[str, Any]] = []
    for number in range(count):
        for record in stories.upgrade(guests, held=("web2",))[0]:
            more = {"at": record["at"] + number * 1000}
            if "checkpoint" in record:
                more["checkpoint"] = f"{number}-{record['checkpoint']}"
            if "upgrade" in record:
                more["upgrade"] = f"{number:08x}{stories.UPGRADE[8:]}"
            records.append({**record, **more})
    return renumbered(records)


def replayed(records: Sequence[Record]) -> Replay:
    replay = Replay()
    for record in records:
        replay = replay.after(record)
    return replay


def years(count: int = 100_000) -> Numbered:
    """Of 20 guests that were saved, loaded and refreshed for years, with an upgrade of all now and then."""
    records: list[dict[str, Any]] = []
    upgrades = many_upgrades(60, 20)
    each = len(upgrades) // 60
    number = 0
    while len(records) < count:
        number += 1
        if number % 250 == 0:
            first = (number // 250 - 1) * each
            records += upgrades[first : first + each]
        vm, old, new = f"web{number % 20}", f"{number:032x}", f"a{number:031x}"
        script = act("save", vm, "", old, "running") + act("load", vm, old, "", "running")
        script += act("refresh", vm, "", new, "running")
        records += [{"event": event, "vm": vm, **facts} for event, facts in script]
    boot = "0b0c5a7e-2a3b-4d5e-8f90-a1b2c3d4e5f6"
    return [{**record, "n": n, "boot": boot} for n, record in enumerate(records[:count])]


def write(path: Path, records: Sequence[Record]) -> None:
    path.write_bytes(b"".join(_line_of(record) for record in records))
