# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout of a timeline's picture, in the manner of `systemd-analyze plot`. The template only writes it down.

Time zero is when the first guest stops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpr_agent.core.timeline import Cost
from cpr_agent.report.phases import COST_LOOKS, look_of
from cpr_agent.report.story import GuestStory, Outcome, Span, Story
from cpr_agent.words import length

WIDTH = 1280
MARGIN = 28
RIGHT = 104
"""Room for the pause behind the longest bar."""
CHAR = 0.58
"""A character's width as a part of its font size: generous, because the reader's font is unknown."""
LEAD = 0.15
"""The largest part of the picture that the time before the first guest stops may take."""
TICKS = 10
FEW = 12
TWO_AXES = 16
"""With more guests than these, a second axis stands below them."""


@dataclass(frozen=True, kw_only=True)
class Box:
    x: float
    y: float
    width: float
    height: float
    css: str
    title: str
    label: str = ""
    """Empty where it does not fit."""


@dataclass(frozen=True, kw_only=True)
class Row:
    y: float
    middle: float
    height: float
    name: str
    full_name: str
    boxes: tuple[Box, ...]
    text: str
    text_x: float
    held: bool
    open_x: float = 0.0
    """The end of a bar that goes on beyond the picture; 0 for a whole one."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    x: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    width: int
    height: float
    left: float
    right: float
    top: float
    bottom: float
    strip: float
    zero: float
    """The x at which the first guest stops; 0 if no guest did."""
    font: float
    two_axes: bool
    phases: tuple[Box, ...]
    columns: tuple[Box, ...]
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    legend: tuple[tuple[float, float, str, str], ...]
    """x, y, class, text."""


STRIP_Y, STRIP_H, AXIS_Y = 92.0, 26.0, 142.0


def draw(story: Story) -> Picture:
    scale = _Scale(story)
    row_h = 27.0 if len(story.guests) <= FEW else 21.0
    font = min(13.0, row_h * 0.62)
    costs = story.costliest
    longest = max(
        (len(name) for name in (*(guest.vm for guest in story.guests), *(cost.what for cost in costs))), default=4
    )
    left = MARGIN + min(230.0, max(70.0, longest * font * CHAR + 14))
    right = WIDTH - MARGIN - RIGHT
    scale.fit(left, right)
    top = AXIS_Y + 10
    bottom = top + row_h * (len(story.guests) + len(costs)) + 4
    phases = tuple(_phase(span, scale, STRIP_Y, STRIP_H, label=True) for span in story.phases if scale.visible(span))
    columns = tuple(
        _phase(span, scale, STRIP_Y + STRIP_H, bottom - STRIP_Y - STRIP_H) for span in story.phases if scale.visible(span)
    )
    rows = (
        *(_row(guest, scale, top + index * row_h, row_h, font) for index, guest in enumerate(story.guests)),
        *(
            _cost_row(cost, scale, top + index * row_h, row_h, font)
            for index, cost in enumerate(costs, len(story.guests))
            if scale.visible(_span_of(cost))
        ),
    )
    two_axes = len(story.guests) > TWO_AXES
    legend = _legend(story, bottom + (54 if two_axes else 36))
    height = max((y for _, y, _, _ in legend), default=bottom) + 28
    return Picture(
        width=WIDTH,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        strip=STRIP_Y,
        zero=scale.x(scale.zero) if scale.has_zero else 0.0,
        font=font,
        two_axes=two_axes,
        phases=phases,
        columns=columns,
        rows=rows,
        ticks=tuple(
            Tick(x=scale.x(scale.zero + at), label=label)
            for at, label in ticks(scale.begin - scale.zero, scale.end - scale.zero)
        ),
        legend=legend,
    )


class _Scale:
    """From epoch seconds to x."""

    def __init__(self, story: Story) -> None:
        stops = [guest.spans[0].begin for guest in story.guests if guest.spans]
        self.has_zero = bool(stops)
        phases_end = max((span.end for span in story.phases), default=story.ended_at)
        self.zero = min(stops) if stops else story.started_at
        ends = [guest.spans[-1].end for guest in story.guests if guest.spans]
        self.end = max(phases_end, *(end for end in ends if end <= story.ended_at), self.zero + 0.001)
        begin = min(story.started_at, self.zero)
        if stops:
            begin = max(begin, self.zero - (self.end - self.zero) * LEAD / (1 - LEAD))
        self.begin = begin
        self._left, self._factor = 0.0, 1.0

    def fit(self, left: float, right: float) -> None:
        self._left, self._factor = left, (right - left) / (self.end - self.begin)

    def x(self, at: float) -> float:
        return round(self._left + (min(max(at, self.begin), self.end) - self.begin) * self._factor, 2)

    def visible(self, span: Span) -> bool:
        return span.end > self.begin and span.begin < self.end and span.length_s > 0


def _phase(span: Span, scale: _Scale, y: float, height: float, *, label: bool = False) -> Box:
    x = scale.x(span.begin)
    width = max(1.0, scale.x(span.end) - x)
    title = f"{span.name}: {length(span.length_s)}"
    shown = ""
    if label:
        shown = next((text for text in (title.replace(": ", "  "), span.name) if len(text) * 12 * CHAR + 10 <= width), "")
    return Box(
        x=x, y=y, width=round(width, 2), height=round(height, 2), css=look_of(span.name).css, title=title, label=shown
    )


def _row(guest: GuestStory, scale: _Scale, y: float, row_h: float, font: float) -> Row:
    bar_h = row_h - (8 if row_h > 24 else 6)
    spans = [span for span in guest.spans if scale.visible(span)]
    boxes = []
    for span in spans:
        box = _phase(span, scale, y + (row_h - bar_h) / 2, bar_h)
        boxes.append(Box(**{**vars(box), "title": f"{guest.vm}: {box.title}"}))
    held = guest.outcome is Outcome.HELD
    if held and guest.spans:
        kept = Span("held", guest.spans[-1].end, scale.end)
        boxes.append(_phase(kept, scale, y + (row_h - bar_h) / 2, bar_h))
    cut = bool(guest.spans) and (guest.spans[-1].end > scale.end + 0.001)
    last = max((box.x + box.width for box in boxes), default=scale.x(scale.zero))
    return Row(
        y=y,
        middle=round(y + row_h / 2, 2),
        height=row_h,
        name=_short(guest.vm, font),
        full_name=guest.vm,
        boxes=tuple(boxes),
        text=length(guest.pause_s) if guest.pause_s is not None else guest.outcome,
        text_x=last + 8 + (7 if cut else 0),
        held=held,
        open_x=last if cut else 0.0,
    )


def _span_of(cost: Cost) -> Span:
    return Span(COST_LOOKS[cost.part], cost.begin, cost.end)


def _cost_row(cost: Cost, scale: _Scale, y: float, row_h: float, font: float) -> Row:
    """A thin bar: what the guests above it waited for."""
    box = _phase(_span_of(cost), scale, y + row_h * 0.35, row_h * 0.3)
    return Row(
        y=y,
        middle=round(y + row_h / 2, 2),
        height=row_h,
        name=_short(cost.what, font),
        full_name=cost.what,
        boxes=(Box(**{**vars(box), "title": f"{cost.what}: {length(cost.length_s)}"}),),
        text=length(cost.length_s),
        text_x=box.x + box.width + 8,
        held=False,
    )


def _short(name: str, font: float) -> str:
    fits = int(216 / (font * CHAR))
    return name if len(name) <= fits else name[: fits - 1] + "…"


def ticks(begin: float, end: float) -> list[tuple[float, str]]:
    """About ten round moments from ``begin`` to ``end`` (s), with their labels."""
    wanted = (end - begin) / TICKS
    power = 10.0 ** math.floor(math.log10(wanted))
    decimal = [power * factor for factor in (1, 2, 5, 10)]
    steps = decimal if wanted <= 10 else [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400]
    step = next((step for step in steps if step >= wanted), math.ceil(wanted / 86400) * 86400.0)
    first, last = math.ceil(begin / step - 1e-9), math.floor(end / step + 1e-9)
    return [(index * step, _tick(index * step, step)) for index in range(first, last + 1)]


def _tick(at: float, step: float) -> str:
    sign, value = ("\N{MINUS SIGN}" if at < 0 else ""), abs(at)
    if step < 1:
        return f"{sign}{value:.{max(1, math.ceil(-math.log10(step)))}f} s"
    if step < 15 or value < 60:
        return f"{sign}{value:.0f} s"
    if step < 3600:
        return f"{sign}{value // 60:.0f}:{value % 60:02.0f} min"
    return f"{sign}{value // 3600:.0f} h"


def _legend(story: Story, y: float) -> tuple[tuple[float, float, str, str], ...]:
    """The host's phases with their lengths, broken into lines."""
    named = [(look_of(span.name).css, f"{span.name} {length(span.length_s)}") for span in story.phases]
    known = {css for css, _ in named}
    extra: Sequence[str] = list(dict.fromkeys(span.name for guest in story.guests for span in guest.spans))
    named += [(css, name) for name in extra if (css := look_of(name).css) not in known]
    if story.of(Outcome.HELD):
        named.append((look_of("held").css, "held"))
    out, x = [], float(MARGIN)
    for css, text in named:
        width = 20 + len(text) * 12 * CHAR + 22
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 24
        out.append((round(x, 2), y, css, text))
        x += width
    return tuple(out)
