#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a test guest said on its console: did it survive?

Its boot id and counter are in its RAM alone, so one boot id and an unbroken counter over a save and a load prove that the
guest went on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

LINE = re.compile(rb"cpr-guest boot=([0-9a-f]+) count=(\d+) bad=(\d+)\r?\n")


@dataclass(frozen=True)
class ConsoleReport:
    """``problems`` is empty if the guest is what it was."""

    boots: tuple[str, ...]
    first: int
    last: int
    lines: int
    problems: tuple[str, ...]

    @property
    def boot(self) -> str:
        return self.boots[-1] if self.boots else ""

    def __str__(self) -> str:
        said = f"boot {self.boot or '?'}, counted from {self.first} to {self.last} in {self.lines} lines"
        return f"{said}: {'; '.join(self.problems) or 'unbroken'}"


def read_console(path: Path, min_lines: int = 2) -> ConsoleReport:
    """Judge a console log, which may have firmware noise, NULs and a last line that is not complete. Raises OSError."""
    log = path.read_bytes().replace(b"\0", b"")
    seen = [(boot.decode(), int(count), int(bad)) for boot, count, bad in LINE.findall(log)]
    problems = []
    if len(seen) < min_lines:
        problems.append(f"only {len(seen)} lines, expected are {min_lines}")
    boots = tuple(dict.fromkeys(boot for boot, _, _ in seen))
    if len(boots) > 1:
        problems.append(f"it was booted {len(boots)} times ({', '.join(boots)})")
    breaks = [(a, b) for (_, a, _), (_, b, _) in pairwise(seen) if b != a + 1]
    problems += [f"the counter went from {a} to {b}" for a, b in breaks[:3]]
    if breaks[3:]:
        problems.append(f"and {len(breaks) - 3} more such breaks")
    if wrong := [(count, bad) for _, count, bad in seen if bad]:
        most = max(bad for _, bad in wrong)
        problems.append(f"the guest found its memory changed, first at count {wrong[0][0]}, up to bad={most}")
    counts = [count for _, count, _ in seen] or [0]
    return ConsoleReport(boots, counts[0], counts[-1], len(seen), tuple(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description="Did the test guest survive? Exits 0 if so.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--min-lines", type=int, default=2)
    parser.add_argument("--same-boot-as", default="", metavar="ID", help="the boot id that it must have")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    options = parser.parse_args()
    try:
        report = read_console(options.file, options.min_lines)
    except OSError as error:
        sys.exit(f"{options.file.stem}: {error}")
    if options.same_boot_as and report.boot != options.same_boot_as:
        report = replace(report, problems=(*report.problems, f"the boot id was {options.same_boot_as}"))
    print(json.dumps(asdict(report)) if options.json else f"{options.file.stem}: {report}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
