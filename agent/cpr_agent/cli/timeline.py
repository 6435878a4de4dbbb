# SPDX-License-Identifier: GPL-2.0-or-later
"""A report on the terminal: the timeline, the verdict, and the guests that did not go on."""

from __future__ import annotations

import sys
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cpr_agent.report.phases import COST_LOOKS, look_of
from cpr_agent.report.story import COSTLIEST, Outcome
from cpr_agent.words import length, moment

PIPE_WIDTH = 120
MIN_BAR = 20
TONES = {"good": "green", "fair": "yellow", "bad": "red"}


def show(story: dict[str, Any]) -> None:
    """Bars in colours, or in letters where the terminal has none; in a pipe, lines of 120 columns."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    verdict = story["verdict"]
    began = moment(story["started_at"])
    console.print(f"[bold]{escape(story['headline'])}[/]  {escape(story['host'])}, {began}, id {escape(story['id'][:8])}")
    console.print(f"[{TONES[verdict['tone']]}]{escape(verdict['word'])}[/] {escape(verdict['text'])}")
    for remark in story["remarks"]:
        console.print(f"[yellow]{escape(remark)}[/]", soft_wrap=True)
    console.print()
    _timeline(console, story)
    for guest in story["guests"]:
        if guest["why"]:
            why = escape(f"{guest['outcome']}: {guest['why']}")
            console.print(f"\n[bold]{escape(guest['vm'])}[/] {why}", soft_wrap=True)
            for what, expected, found in guest["evidence"]:
                console.print(f"    {escape(what)}: expected {escape(expected)}, found {escape(found)}", soft_wrap=True)


def blame(story: dict[str, Any]) -> None:
    """What the guests waited for, in its order; then a sentence on each that is worth one, with its remedy."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, emoji=False, highlight=False)
    if not story["costs"]:
        console.print("Who cost the pause is not on record: no guest came through a kexec, or its agent was an older one.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("took", "part", "guests waited for", "which held up"):
        table.add_column(column, overflow="fold")
    table.columns[0].justify = "right"
    for cost in story["costs"]:
        mark = Text.assemble(_mark(COST_LOOKS[cost["part"]], console), f" {cost['part']}")
        table.add_row(length(cost["end"] - cost["begin"]), mark, cost["what"], cost["waiter"])
    console.print(table)
    for one in story["blame"]:
        why = f" ({one['why']})" if one["why"] else ""
        remedy = f": {one['remedy']}" if one["remedy"] else ""
        console.print(f"\n{one['what']}{why}{remedy}.", soft_wrap=True, end="")
    console.print()


def _timeline(console: Console, story: dict[str, Any]) -> None:
    rows = [("host", story["phases"], "", "")]
    longest = sorted(story["costs"], key=lambda cost: cost["begin"] - cost["end"])[:COSTLIEST]
    for cost in (one for one in story["costs"] if one in longest):
        span = {"name": COST_LOOKS[cost["part"]], "begin": cost["begin"], "end": cost["end"]}
        rows.append((f"  {cost['what']}", [span], "", length(cost["end"] - cost["begin"])))
    rows += [
        (guest["vm"], guest["spans"], length(guest["pause_s"]) if guest["pause_s"] is not None else "", guest["outcome"])
        for guest in story["guests"]
    ]
    if not (spans := [span for _, some, _, _ in rows for span in some]):
        return
    # Cut off at the end of the upgrade, as in the picture: a guest may have been held for a week after it.
    begin = min(span["begin"] for span in spans)
    end = max([span["end"] for span in story["phases"]] or [story["ended_at"]])
    names = max(len(name) for name, *_ in rows)
    width = max(MIN_BAR, console.width - names - 32)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(no_wrap=True)
    table.columns[2].justify = "right"
    for name, some, pause, outcome in rows:
        style = "red" if outcome == Outcome.HELD else ""
        table.add_row(Text(name, "bold"), _bar(some, begin, end, width, console), Text(pause, "bold"), Text(outcome, style))
    console.print(table)
    console.print()
    console.print(_legend(story, console))


def _bar(spans: list[dict[str, Any]], begin: float, end: float, width: int, console: Console) -> Text:
    """Each cell shows the phase that fills most of it. A shorter phase still gets a cell, as long as there is room."""
    cell = (end - begin) / width or 1.0
    cells = [""] * width
    last = 0
    for span in spans:
        if span["begin"] < end and span["end"] > span["begin"]:
            first = min(width - 1, max(last, int((span["begin"] - begin) / cell)))
            last = min(width, max(first + 1, round((span["end"] - begin) / cell)))
            cells[first:last] = [span["name"]] * (last - first)
    bar = Text()
    for name in cells:
        bar.append(*(_mark(name, console) if name else (" ", "")))
    return bar


def _legend(story: dict[str, Any], console: Console) -> Columns:
    words = [
        Text.assemble(_mark(name, console), f" {name} {length(end - begin)}", no_wrap=True)
        for name, begin, end in ((span["name"], span["begin"], span["end"]) for span in story["phases"])
    ]
    return Columns(words, padding=(0, 3))


def _mark(phase: str, console: Console) -> tuple[str, str]:
    """A phase's character and colour."""
    look = look_of(phase)
    coloured = console.color_system is not None and not console.no_color
    return "█" if coloured else look.letter, look.terminal
