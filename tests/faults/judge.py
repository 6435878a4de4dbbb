#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What became of the guests of a host whose power was cut again and again? Runs inside the host VM, in each boot.

It reads the guests' consoles and what the scenario noted in each boot before the agent started (``BOOTS/N/``): ``kind``
(how the boot began), ``sizes`` (of the consoles, in bytes), and copies of the manifests (``VM.manifest``), the agent's
``journal`` and its ``listing``. Every boot is judged anew each time, from the first one on. What the agent tells
of the upgrade that the boot before began, and of the guests' pauses, is judged in the boot that loaded them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

try:
    from scripts.guest.console import LINE
except ModuleNotFoundError:  # inside the host VM the two lie side by side
    from console import LINE  # type: ignore[import-not-found,no-redef]


class Kind(StrEnum):
    """How a boot of the host began."""

    KEXEC = "kexec"
    CUT = "cut"


class Fate(StrEnum):
    """What became of a guest over a boot of its host."""

    RESTORED = "restored"
    COLD_STARTED = "cold-started"


class Harm(StrEnum):
    """What must not happen."""

    CORRUPTED = "corrupted"
    LOADED_TWICE = "loaded twice"
    LOST = "lost"
    MISTOLD = "mistold"


@dataclass(frozen=True)
class Said:
    """One line of a guest."""

    boot: str
    count: int
    bad: int


class Problem(NamedTuple):
    harm: Harm
    text: str


@dataclass(frozen=True)
class Boot:
    """What was found before the agent started. ``saved`` maps VMs with a live checkpoint to its id."""

    kind: Kind
    sizes: dict[str, int] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    events: tuple[Mapping[str, object], ...] = ()
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Of one guest over one boot; ``fate`` is None if it said nothing in it."""

    fate: Fate | None
    text: str
    problems: tuple[Problem, ...] = ()


def parse(log: bytes) -> list[Said]:
    return [Said(boot.decode(), int(count), int(bad)) for boot, count, bad in LINE.findall(log.replace(b"\0", b""))]


def split(log: bytes, boots: Iterable[tuple[Kind, int]]) -> list[list[Said]]:
    """The lines said before the first and within each boot, given its kind and where the log ended when it began.

    Over a kexec a line may go on where it was broken off. A cut takes the end of the log with it, or leaves NULs of it:
    what goes on after it is not what was broken off.
    """
    starts, parts = [(Kind.KEXEC, 0)], []
    for kind, size in boots:
        starts.append((kind, log.rfind(b"\n", 0, size) + 1 if kind is Kind.KEXEC else size))
    for (_, begin), (kind, end) in pairwise([*starts, (Kind.KEXEC, len(log))]):
        part = log[begin:end]
        parts.append(parse(part.partition(b"\0")[0] if kind is Kind.CUT else part))
    return parts


def judge_guest(name: str, log: bytes, boots: Sequence[Boot]) -> list[Judgement]:
    """One judgement for each boot."""
    first, *parts = split(log, [(boot.kind, boot.sizes.get(name, 0)) for boot in boots])
    before = first[-1] if first else None
    out = []
    for boot, part in zip(boots, parts, strict=True):
        out.append(_judge_boot(boot.kind, before, part, saved=name in boot.saved))
        before = part[-1] if part else before
    return out


def _judge_boot(kind: Kind, before: Said | None, part: list[Said], *, saved: bool) -> Judgement:
    if not part:
        return Judgement(None, "said nothing")
    now = part[0]
    problems = check_order(part, gaps=False)
    same = before is not None and now.boot == before.boot
    if before and same and now.count <= before.count:
        problems.append(Problem(Harm.LOADED_TWICE, f"its counter had come to {before.count}, then began at {now.count}"))
    if before and same and kind is Kind.KEXEC and now.count > before.count + 1:
        problems.append(Problem(Harm.CORRUPTED, f"its counter went from {before.count} to {now.count} over a kexec"))
    if same and not saved:
        problems.append(Problem(Harm.LOADED_TWICE, "it goes on, and nothing had been saved"))
    if not same and saved:
        problems.append(Problem(Harm.LOST, "it was saved, and was started afresh"))
    if not same and kind is Kind.KEXEC:
        problems.append(Problem(Harm.LOST, "it did not come through a kexec"))
    fate = Fate.RESTORED if same else Fate.COLD_STARTED
    was = f"from {before.count} " if before and same else ""
    return Judgement(fate, f"{fate} as {now.boot}, {was}to {now.count}, now {part[-1].count}", tuple(problems))


def check_order(said: Iterable[Said], *, gaps: bool) -> list[Problem]:
    """Every guest counts on, ``gaps`` allowed or not; its memory is good. Without gaps the lines are of one guest."""
    problems = []
    last: dict[str, Said] = {}
    for line in said:
        if line.bad:
            problems.append(Problem(Harm.CORRUPTED, f"bad={line.bad} at {line.count} of {line.boot}"))
        before = last.get(line.boot)
        if before and line.count <= before.count:
            problems.append(Problem(Harm.LOADED_TWICE, f"{line.boot} counted {before.count}, then {line.count}"))
        elif before and line.count > before.count + 1 and not gaps:
            problems.append(Problem(Harm.CORRUPTED, f"{line.boot} counted {before.count}, then {line.count}"))
        if last and not before and not gaps:
            problems.append(Problem(Harm.LOST, f"{line.boot} began within one boot of the host"))
        last[line.boot] = line
    return problems


def judge_store(boot: Boot) -> list[Problem]:
    """The agent's own records, as the boot found them: intact, and no live checkpoint whose guest has run."""
    problems = [Problem(Harm.CORRUPTED, f"the agent keeps {name}") for name in boot.damaged]
    ran = {record.get("checkpoint") for record in boot.events if record.get("event") == "resumed"}
    problems += [
        Problem(Harm.LOADED_TWICE, f"the checkpoint {checkpoint} of {vm} is live, and its guest has run")
        for vm, checkpoint in boot.saved.items()
        if checkpoint in ran
    ]
    return problems


IN_FLIGHT = ("stopping", "saving", "saved", "committing", "rolling-back", "booted", "loading")
REASON = "the host went down while {}, and was not started by a kexec"


def expect_upgrade(boot: Boot, kernel: str = "") -> tuple[str, str] | None:
    """Phase and reason that the agent must tell of its last upgrade once the boot, of this ``kernel``, has loaded its
    guests; None: of none. A cut while they were loaded takes the host back into the kernel that it starts by itself."""
    phases = [record for record in boot.events if str(record["event"]).startswith("upgrade-")]
    if not phases:
        return None
    last = phases[-1]
    came_to = str(last["event"]).removeprefix("upgrade-")
    same = [record for record in phases if record["upgrade"] == last["upgrade"]]
    if came_to == "checking":
        return "refused", "the agent was interrupted"
    if came_to not in IN_FLIGHT:
        return came_to, str(next((record["reason"] for record in reversed(same) if "reason" in record), ""))
    reason = REASON.format(came_to)
    if came_to in ("booted", "loading"):  # a boot before has told what ended the one before it
        reason = str(next((record["interrupted"] for record in reversed(same) if "interrupted" in record), ""))
    elif came_to == "committing" and boot.kind is Kind.KEXEC:
        reason = ""
    if reason:
        return "rolled-back", reason
    planned = str(next((record["kernel_to"] for record in reversed(same) if record.get("kernel_to")), ""))
    return "done", f"the host runs kernel {kernel}, planned was {planned}" if planned and kernel not in (
        "",
        planned,
    ) else ""


def judge_told(boot: Boot, upgrade: dict[str, Any], by_kexec: dict[str, bool], kernel: str = "") -> list[Problem]:
    """What the agent tells once the guests run: ``upgrade`` by D-Bus, and of each checkpoint that was loaded how the boot
    before ended."""
    problems = []
    expected = expect_upgrade(boot, kernel)
    told = (str(upgrade["phase"]), str(upgrade["reason"])) if upgrade else None
    if told != expected:
        problems.append(Problem(Harm.MISTOLD, f"of its last upgrade the agent says {told}, expected is {expected}"))
    if missing := set(boot.saved) - set(upgrade.get("loaded", ())):
        problems.append(Problem(Harm.MISTOLD, f"the agent leaves {', '.join(sorted(missing))} out of its last upgrade"))
    for name, checkpoint in boot.saved.items():
        if by_kexec.get(checkpoint) is not (boot.kind is Kind.KEXEC):
            what = f"of the pause of {name} the agent says by kexec: {by_kexec.get(checkpoint)}"
            problems.append(Problem(Harm.MISTOLD, what))
    return problems


def phase(boot: Boot) -> str:
    """How far the agent had come when the power went: each VM's last event in its journal."""
    last = {str(record["vm"]): str(record["event"]) for record in boot.events if "vm" in record}
    hostwide = [str(record["event"]) for record in boot.events if "vm" not in record]
    said = [f"{vm} {event}{' (checkpoint is live)' if vm in boot.saved else ''}" for vm, event in sorted(last.items())]
    return ", ".join([*said, *hostwide[-1:]]) or "no record"


def read_boot(directory: Path) -> Boot:
    sizes = dict(line.rsplit(" ", 1) for line in (directory / "sizes").read_text().splitlines())
    saved, damaged = {}, []
    for path in sorted(directory.glob("*.manifest")):
        try:
            saved[path.stem] = str(json.loads(path.read_bytes())["manifest"]["id"])
        except (ValueError, KeyError):
            saved[path.stem] = ""
            damaged.append(f"a manifest of {path.stem} that can't be read")
    damaged += [name for name in (directory / "listing").read_text().split() if ".damaged-" in name]
    journal = directory / "journal"
    return Boot(
        kind=Kind((directory / "kind").read_text().strip()),
        sizes={Path(name).stem: int(size) for name, size in sizes.items()},
        saved=saved,
        events=_read_journal(journal.read_bytes()) if journal.exists() else (),
        damaged=tuple(damaged),
    )


def _read_journal(data: bytes) -> tuple[dict[str, object], ...]:
    """A line that a cut tore is the agent's to cut off; it sets a journal aside that is damaged elsewhere."""
    records = []
    for line in data.splitlines():
        try:
            records.append(dict(json.loads(line.partition(b" ")[2])))
        except ValueError:
            break
    return tuple(records)


def main() -> int:
    parser = argparse.ArgumentParser(description="What became of the guests? Exits 0 if nothing that must not happen did.")
    parser.add_argument("boots", type=Path)
    parser.add_argument("consoles", type=Path, nargs="+")
    parser.add_argument("--status", type=Path, help="what `cprctl status --json` says")
    parser.add_argument("--history", type=Path, help="the directory with the agent's timelines")
    parser.add_argument("--summary", action="store_true", help="of all boots after a cut, in one line")
    options = parser.parse_args()
    kernel = os.uname().release
    boots = [read_boot(path) for path in sorted(options.boots.glob("[0-9]*"))]
    judged = {path.stem: judge_guest(path.stem, path.read_bytes(), boots) for path in options.consoles}
    problems = [problem for boot in boots for problem in judge_store(boot)]
    problems += [problem for judgements in judged.values() for judgement in judgements for problem in judgement.problems]
    problems += [
        Problem(Harm.LOST, f"{name} does not run") for name, judgements in judged.items() if not judgements[-1].fate
    ]
    if options.status:
        upgrade = json.loads(options.status.read_bytes())["LastUpgrade"]
        timelines = [json.loads(path.read_bytes()) for path in options.history.glob("*.json")]
        by_kexec = {timeline["id"]: timeline["by_kexec"] for timeline in timelines}
        problems += judge_told(boots[-1], upgrade, by_kexec, kernel)
    if options.summary:
        after_cut = [
            judgement.fate
            for judgements in judged.values()
            for boot, judgement in zip(boots, judgements, strict=True)
            if boot.kind is Kind.CUT
        ]
        harms = [problem.harm for problem in problems]
        print(
            f"power cuts {sum(boot.kind is Kind.CUT for boot in boots)}: guests "
            + ", ".join(f"{fate} {after_cut.count(fate)}" for fate in Fate)
            + f", {Harm.CORRUPTED} {harms.count(Harm.CORRUPTED)}, {Harm.LOADED_TWICE} {harms.count(Harm.LOADED_TWICE)}"
        )
    else:
        print(f"a {boots[-1].kind}; before it: {phase(boots[-1])}")
        for name, judgements in judged.items():
            print(f"{name}: {judgements[-1].text}")
        if options.status:
            print(f"upgrade: {': '.join(filter(None, expect_upgrade(boots[-1], kernel) or ['none']))}")
    for problem in problems:
        print(f"{problem.harm}: {problem.text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
