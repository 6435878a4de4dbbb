# SPDX-License-Identifier: GPL-2.0-or-later
"""A job on a terminal: a row for each guest, and below them the job's step. Imported when it is needed: rich is slow."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cpr_agent.cli.tables import STYLES
from cpr_agent.core.states import VmState

MOVING = frozenset({VmState.RECOVERING, VmState.STARTING, VmState.SAVING, VmState.LOADING})
OFF = frozenset({VmState.STOPPED, VmState.SHUT_DOWN})
REFRESHES_PER_S = 8
BELOW = 2
"""Lines below the guests' rows."""


@dataclass
class Row:
    """``began`` is when the VM left its last resting state, or was seen first; ``took_s`` how long it was on its way
    since."""

    state: str
    began: float = 0.0
    took_s: float = 0.0
    changed: bool = False


@dataclass
class Screen:
    rows: dict[str, Row] = field(default_factory=dict)
    what: str = "starting"
    done: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._spinner: Spinner | str = Spinner("line")

    def step(self, what: str, done: float) -> None:
        self.what, self.done = what or self.what, done

    def vm(self, name: str, state: str) -> None:
        now = time.monotonic()
        row = self.rows.setdefault(name, Row(state, now))
        if row.state != state:
            row.changed = True
            if row.state not in MOVING:
                row.began = now
            row.state, row.took_s = state, now - row.began

    def over(self) -> None:
        """The job has ended: stop the spinner."""
        self._spinner = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many rows as the terminal has room for, moving guests first; the rest as counts."""
        now = time.monotonic()
        shown = [(name, row) for name, row in sorted(self.rows.items()) if row.changed or row.state not in OFF]
        room = max(1, console.height - BELOW)
        if len(shown) > room:
            shown.sort(key=lambda item: (item[1].state not in MOVING, not item[1].changed))
        listed, rest = (shown, []) if len(shown) <= room else (shown[: room - 1], shown[room - 1 :])
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, max_width=max(12, options.max_width - 30))
        table.add_column()
        table.add_column(justify="right")
        for name, row in sorted(listed):
            moving = row.state in MOVING
            seconds = f"{now - row.began if moving else row.took_s:.1f} s" if row.changed or moving else ""
            table.add_row(name, Text(row.state, STYLES.get(row.state, "bold" if moving else "")), seconds)
        yield table
        if rest:
            states = [row.state for _, row in rest]
            counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
            yield Text(f"and {len(rest)} more: {counts}")
        yield self._line(now)

    def _line(self, now: float) -> Table:
        line = Table.grid(padding=(0, 1))
        line.add_column()
        line.add_column(width=20)
        line.add_column(justify="right", width=4)
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right")
        minutes, seconds = divmod(int(now - self.began), 60)
        line.expand = True
        bar = ProgressBar(completed=self.done * 100, width=20)
        line.add_row(self._spinner, bar, f"{self.done:.0%}", self.what, f"{minutes}:{seconds:02}")
        return line


@contextlib.contextmanager
def screen() -> Iterator[Screen]:
    """Show a job on stderr until it ends; the rows stay. The terminal is restored in any case."""
    what = Screen()
    with Live(
        what,
        console=Console(stderr=True, markup=False, emoji=False),
        refresh_per_second=REFRESHES_PER_S,
        redirect_stdout=False,
    ):
        try:
            yield what
        finally:
            what.over()
