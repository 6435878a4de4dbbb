# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m scripts.bench: measure, print a table, write bench.json and the pictures. See docs/bench.md.

exit codes: 0 all was measured, whether or not it reached what it should; 1 something could not be measured
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.bench import many, memory, pause, weight
from scripts.bench.figures import Figure, number, table, write


@dataclass(frozen=True)
class Part:
    """What is measured together, and the names of the goals whose figures it yields."""

    measure: Callable[[], Iterator[Figure]]
    names: tuple[str, ...]


PARTS = (
    Part(pause.against_bare, ("save", "pause", "pause-by-hand")),
    Part(pause.against_libvirt, ("virsh-512", "virsh-4096")),
    Part(pause.by_ram, ("by-ram",)),
    Part(many.figures, ("many-wall", "many-mean")),
    Part(weight.at_rest, ("memory", "idle")),
    Part(weight.start, ("start",)),
    Part(weight.status, ("status",)),
    Part(memory.witness, ("witness",)),
)


def main() -> int:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="figures with WORD in their names, and no bench.json")
    parser.add_argument("--out", type=Path, default=Path("build"), help="default: %(default)s")
    options = parser.parse_args()
    parts = [part for part in PARTS if any(options.only in name for name in part.names)]
    if not parts:
        parser.error(f"none of {', '.join(name for part in PARTS for name in part.names)} has {options.only!r} in it")
    signal.signal(signal.SIGTERM, _end)
    figures, failed = measure(parts)
    print(table(figures))
    if not options.only:
        write(figures, options.out / "bench.json")
        print(options.out / "bench.json")
    try:
        from scripts.bench.plots import draw  # what is printed needs no matplotlib
    except ImportError as error:
        print(f"bench: no pictures: {error}; run: scripts/bootstrap --bench", file=sys.stderr)
        return 1
    for path in draw(figures, options.out):
        print(path)
    for what in failed:
        print(f"bench: could not be measured: {what}", file=sys.stderr)
    return 1 if failed else 0


def _end(*_: object) -> None:
    """Unwind, so that QEMUs end and RAM is given back; once, whoever sends what more."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def measure(parts: list[Part]) -> tuple[list[Figure], list[str]]:
    """All figures that could be measured, and the names of the others; what went wrong is told on stderr."""
    figures: list[Figure] = []
    failed: list[str] = []
    begun = time.monotonic()
    for part in parts:
        told = ", ".join(part.names)
        print(f"[{time.monotonic() - begun:5.0f} s] {told} ...", file=sys.stderr, flush=True)
        try:
            found = list(part.measure())
        except Exception:  # one that can't be measured does not take the others with it
            traceback.print_exc()
            failed.append(told)
            continue
        assert tuple(figure.name for figure in found) == part.names
        figures += found
        for figure in found:
            print(f"{'':10}{figure.name}: {number(figure.value)} {figure.goal.unit}", file=sys.stderr, flush=True)
    print(f"[{time.monotonic() - begun:5.0f} s] done", file=sys.stderr)
    return figures, failed


if __name__ == "__main__":
    sys.exit(main())
