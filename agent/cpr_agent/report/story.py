# SPDX-License-Identifier: GPL-2.0-or-later
"""The story of one upgrade, or of one load, from the journal's records and the guests' timelines.

A story has only what is on record: a phase without a record is left out, and so is a guest whose record is lost.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from cpr_agent import __version__
from cpr_agent.core.past import Record, VmEvent
from cpr_agent.core.timeline import COSTS, Cost, GuestTimeline
from cpr_agent.core.upgrade.ledger import EVENT, Kind, Phase
from cpr_agent.errors import NoSuchReport

LOAD = "load"
"""The kind of a story of one load; that of an upgrade is the ledger's."""
COSTLIEST = 6
"""So many costs are drawn."""
MIN_PREFIX = 4
_NAMED_IN_ERROR = 5
_PHASES = frozenset(Phase)
_ENDS = (Phase.REFUSED, Phase.CHECKED, Phase.ROLLED_BACK, Phase.DONE, Phase.HELD)


_Moment = Annotated[float, msgspec.Meta(ge=0, lt=2**40)]
"""Epoch seconds; a report can show no other year than one of four digits, or a few more."""


class _Told(msgspec.Struct):
    """What a record may say that a story tells."""

    event: str
    at: _Moment
    upgrade: str = ""
    vm: str = ""
    kind: Kind = Kind.UPGRADE
    kernel_from: str = ""
    kernel_to: str = ""
    kernel: str = ""
    policy: str = ""
    reason: str = ""
    interrupted: str = ""
    failures: tuple[str, ...] = ()
    not_started: tuple[str, ...] = ()
    shut_down: tuple[str, ...] = ()
    by_kexec: bool = True
    userspace_at: _Moment = 0.0
    stopped_at: _Moment = 0.0
    evidence: tuple[tuple[str, str, str], ...] = ()


class Outcome(enum.StrEnum):
    """How an upgrade, or a load, went for one guest."""

    WENT_ON = "went on"
    """In a new QEMU."""
    RESUMED = "resumed"
    """In the QEMU that it had: the upgrade was taken back."""
    NOT_SAVED = "not saved"
    """It runs on."""
    HELD = "held"
    SAVED = "saved"
    """It waits for its load."""
    SHUT_DOWN = "shut down"
    BOOTED_ANEW = "booted anew"


class Span(msgspec.Struct, frozen=True):
    """A phase, from ``begin`` to ``end`` (epoch s)."""

    name: str
    begin: float
    end: float

    @property
    def length_s(self) -> float:
        return self.end - self.begin


class GuestStory(msgspec.Struct, frozen=True, kw_only=True):
    """One guest's way through an upgrade or a load."""

    vm: str
    outcome: Outcome
    spans: tuple[Span, ...] = ()
    pause_s: float | None = None
    why: str = ""
    evidence: tuple[tuple[str, str, str], ...] = ()
    """Each proof that failed: its name, the value at the save, the value at the load."""
    timeline: GuestTimeline | None = None


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """``kind`` is the ledger's, or LOAD. ``outcome`` is the upgrade's last phase; of a load it is DONE. Times are in epoch
    seconds; ``phases`` are the host's."""

    id: str
    kind: str
    outcome: str
    host: str
    started_at: float
    ended_at: float
    kernel_before: str
    kernel_after: str
    kernel_planned: str = ""
    policy: str = ""
    reason: str = ""
    failures: tuple[str, ...] = ()
    phases: tuple[Span, ...] = ()
    guests: tuple[GuestStory, ...] = ()
    costs: tuple[Cost, ...] = ()
    """What guests waited for, of their host; in its order."""
    agent: str = __version__

    @property
    def longest(self) -> GuestStory | None:
        """The guest that paused longest."""
        paused = [guest for guest in self.guests if guest.pause_s is not None]
        return max(paused, key=lambda guest: guest.pause_s or 0.0, default=None)

    @property
    def costliest(self) -> tuple[Cost, ...]:
        """The longest of the costs, in their order."""
        longest = sorted(self.costs, key=lambda cost: cost.length_s, reverse=True)[:COSTLIEST]
        return tuple(cost for cost in self.costs if cost in longest)

    def of(self, outcome: Outcome) -> list[GuestStory]:
        return [guest for guest in self.guests if guest.outcome == outcome]


class _Chapter(msgspec.Struct):
    """The records from an upgrade's first to the next one's first."""

    id: str
    records: list[Record] = msgspec.field(default_factory=list)

    def at(self, *phases: Phase) -> float:
        """When one of ``phases`` was entered for the first time; 0 if none was."""
        return next((float(r["at"]) for r in self.records if r["event"] in {f"{EVENT}{p}" for p in phases}), 0.0)

    def fact(self, name: str, default: Any = "") -> Any:
        """From the last of the upgrade's own records that has it."""
        own = (r for r in reversed(self.records) if r["event"].startswith(EVENT) and r.get("upgrade") == self.id)
        return next((record[name] for record in own if name in record), default)

    @property
    def phase(self) -> str:
        events = (str(record["event"]) for record in reversed(self.records))
        return next(event.removeprefix(EVENT) for event in events if event.startswith(EVENT))

    @property
    def dry(self) -> bool:
        return self.phase == Phase.CHECKED


def story_of(wanted: str, records: Iterable[Record], timelines: Sequence[GuestTimeline], host: str) -> Story:
    """The upgrade or load whose id is ``wanted``, or begins so; for "" the last one that was more than a dry run. Raises
    NoSuchReport."""
    chapters = _chapters(records)
    single = {t.id: t for t in timelines if t.upgrade not in chapters}
    ends = {chapter.id: float(chapter.records[0]["at"]) for chapter in chapters.values()}
    ends |= {t.id: t.stopped_at for t in single.values()}
    found = _find(wanted, ends, {chapter.id for chapter in chapters.values() if chapter.dry})
    if found in chapters:
        return _of_upgrade(chapters[found], [t for t in timelines if t.upgrade == found], host)
    return _of_load(single[found], host)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a list of stories says of one. ``ended_at`` is 0 while it is under way; ``longest_pause_s`` is None if no guest
    was loaded. Times in epoch seconds."""

    id: str
    kind: str
    outcome: str
    reason: str
    started_at: float
    ended_at: float
    kernel_before: str
    kernel_after: str
    vms: tuple[str, ...]
    longest_pause_s: float | None


def list_stories(records: Iterable[Record], timelines: Sequence[GuestTimeline], limit: int, before: float) -> list[Entry]:
    """At most ``limit``, newest first, of those that began before ``before`` (epoch s; 0 for all)."""
    chapters = _chapters(records)
    loads: dict[str, list[GuestTimeline]] = {}
    for timeline in timelines:
        loads.setdefault(timeline.upgrade if timeline.upgrade in chapters else timeline.id, []).append(timeline)
    found = [_upgrade_entry(chapter, loads.pop(chapter.id, [])) for chapter in chapters.values()]
    found += [_load_entry(timeline) for (timeline,) in loads.values()]
    wanted = (entry for entry in found if not before or entry.started_at < before)
    return sorted(wanted, key=lambda entry: entry.started_at, reverse=True)[:limit]


def _upgrade_entry(chapter: _Chapter, timelines: Sequence[GuestTimeline]) -> Entry:
    first = chapter.records[0]
    ended = [float(record["at"]) for record in chapter.records if record["event"] in {f"{EVENT}{end}" for end in _ENDS}]
    return Entry(
        id=chapter.id,
        kind=str(first["kind"]),
        outcome=chapter.phase,
        reason=_reason(chapter),
        started_at=float(first["at"]),
        ended_at=ended[-1] if ended and chapter.phase in _ENDS else 0.0,
        kernel_before=str(first["kernel_from"]),
        kernel_after=_kernel_after(chapter, timelines),
        vms=tuple(sorted({timeline.vm for timeline in timelines})),
        longest_pause_s=max((timeline.pause_s for timeline in timelines), default=None),
    )


def _load_entry(timeline: GuestTimeline) -> Entry:
    return Entry(
        id=timeline.id,
        kind=LOAD,
        outcome=Phase.DONE,
        reason="",
        started_at=timeline.stopped_at,
        ended_at=timeline.resumed_at,
        kernel_before=timeline.kernel_before,
        kernel_after=timeline.kernel_after,
        vms=(timeline.vm,),
        longest_pause_s=timeline.pause_s,
    )


def _reason(chapter: _Chapter) -> str:
    return str(chapter.fact("reason") or chapter.fact("interrupted"))


def _kernel_after(chapter: _Chapter, timelines: Sequence[GuestTimeline]) -> str:
    after = [timeline.kernel_after for timeline in timelines] or [chapter.fact("kernel", chapter.records[0]["kernel_from"])]
    return str(after[-1])


def _find(wanted: str, began: Mapping[str, float], dry: set[str]) -> str:
    newest = sorted(began, key=lambda one: began[one], reverse=True)
    if not wanted and (real := [one for one in newest if one not in dry]):
        return real[0]
    if not newest or not wanted:
        raise NoSuchReport("nothing was upgraded or loaded on this host yet", left="nothing was reported")
    fitting = [one for one in newest if one == wanted or (len(wanted) >= MIN_PREFIX and one.startswith(wanted))]
    if wanted in fitting or len(fitting) == 1:
        return wanted if wanted in fitting else fitting[0]
    what = f"{len(fitting)} reports have an id that begins with {wanted!r}" if fitting else f"there is no report {wanted!r}"
    raise NoSuchReport(what, remedy=f"the last ones are: {', '.join((fitting or newest)[:_NAMED_IN_ERROR])}")


def _chapters(records: Iterable[Record]) -> dict[str, _Chapter]:
    out: dict[str, _Chapter] = {}
    current = None
    for record in filter(_is_readable, records):
        if record["event"].startswith(EVENT) and (current is None or current.id != record["upgrade"]):
            current = out.get(record["upgrade"])
            if current is None and {"kind", "kernel_from"} <= record.keys():
                current = out[record["upgrade"]] = _Chapter(record["upgrade"])
        if current:
            current.records.append(record)
    return out


def _is_readable(record: Record) -> bool:
    """False for one that a newer agent wrote in another way, as in the ledger: the older one tells the rest."""
    try:
        told = msgspec.convert(record, _Told)
    except (msgspec.ValidationError, OverflowError):
        return False
    return not told.event.startswith(EVENT) or (bool(told.upgrade) and told.event.removeprefix(EVENT) in _PHASES)


# -- a load by itself ---------------------------------------------------------------------------------------------------


def _of_load(timeline: GuestTimeline, host: str) -> Story:
    guest = _gone_on(timeline)
    return Story(
        id=timeline.id,
        kind=LOAD,
        outcome=Phase.DONE,
        host=host,
        started_at=timeline.stopped_at,
        ended_at=timeline.resumed_at,
        kernel_before=timeline.kernel_before,
        kernel_after=timeline.kernel_after,
        phases=guest.spans,
        guests=(guest,),
    )


def _gone_on(timeline: GuestTimeline) -> GuestStory:
    spans, begin = [], timeline.stopped_at
    for name, length_s in timeline.phases():
        spans.append(Span(name, begin, begin + length_s))
        begin += length_s
    return GuestStory(
        vm=timeline.vm,
        outcome=Outcome.WENT_ON,
        spans=_forward(spans),
        pause_s=timeline.pause_s,
        timeline=timeline,
    )


# -- an upgrade ---------------------------------------------------------------------------------------------------------


def _of_upgrade(chapter: _Chapter, timelines: Sequence[GuestTimeline], host: str) -> Story:
    first = chapter.records[0]
    phases = _host_phases(chapter, timelines)
    guests = [_gone_on(timeline) for timeline in timelines]
    guests += _others(chapter, {timeline.vm for timeline in timelines}, phases)
    planned = str(chapter.fact("kernel_to"))
    return Story(
        id=chapter.id,
        kind=str(first["kind"]),
        outcome=chapter.phase,
        host=host,
        started_at=float(first["at"]),
        ended_at=chapter.at(*_ENDS) or float(chapter.records[-1]["at"]),
        kernel_before=str(first["kernel_from"]),
        kernel_after=_kernel_after(chapter, timelines),
        kernel_planned=planned,
        policy=str(chapter.fact("policy")),
        reason=_reason(chapter),
        failures=(*chapter.fact("failures", ()), *chapter.fact("not_started", ())),
        phases=phases,
        guests=tuple(sorted(guests, key=_by_begin)),
        costs=_costs(chapter),
    )


def _costs(chapter: _Chapter) -> tuple[Cost, ...]:
    """None where the record is one that this agent can't read."""
    found = [record for record in chapter.records if record["event"] == COSTS and record.get("upgrade") == chapter.id]
    try:
        return msgspec.convert(found[-1].get("costs", ()) if found else (), tuple[Cost, ...])
    except msgspec.ValidationError:
        return ()


def _host_phases(chapter: _Chapter, timelines: Sequence[GuestTimeline]) -> tuple[Span, ...]:
    """The host's phases. Those of many guests overlap: "devices" ends with the first guest that has its memory, "load" with
    the last one that is loaded."""
    booted, ended = chapter.at(Phase.BOOTED), chapter.at(*_ENDS)
    back, stopping = chapter.at(Phase.ROLLING_BACK), chapter.at(Phase.STOPPING)
    marks: list[tuple[str, float]] = []
    if stopping:
        marks += [("check", stopping), ("stop first", chapter.at(Phase.SAVING) or back)]
    else:
        marks += [("check", chapter.at(Phase.SAVING, Phase.REFUSED, Phase.CHECKED))]
    if chapter.at(Phase.SAVING) or not stopping:
        marks.append(("save", back or chapter.at(Phase.COMMITTING) or chapter.at(Phase.SAVED)))
    if back:
        marks.append(("take back", chapter.at(Phase.ROLLED_BACK)))
        return _chain(chapter.at(Phase.CHECKING), marks)
    loading = min((t.load_at for t in timelines), default=chapter.at(Phase.LOADING))
    if booted:
        start = "kexec + kernel" if chapter.fact("by_kexec", default=True) else "reset + kernel"
        down = max((t.shutdown_at for t in timelines), default=0.0)
        marks.append(("shutdown", down))
        soft = chapter.records[0]["kind"] == Kind.SOFT_REBOOT
        until = start if down else "shutdown" if soft else f"shutdown + {start}"
        marks.append((until, float(chapter.fact("userspace_at", 0.0))))
        marks.append(("userspace", loading))
    else:
        marks.append(("saved", loading))
    if timelines:
        through = [t for t in timelines if not ended or t.load_at <= ended]
        marks.append(("devices", min((t.memory_at for t in through), default=0.0)))
        marks.append(("load", max((t.loaded_at or t.resumed_at for t in through), default=0.0)))
        marks.append(("resume", max((t.resumed_at for t in through if t.loaded_at), default=0.0)))
    else:
        marks.append(("load", chapter.at(Phase.DONE, Phase.HELD) if loading else 0.0))
    return _chain(chapter.at(Phase.CHECKING), marks)


def _chain(begin: float, marks: Iterable[tuple[str, float]]) -> tuple[Span, ...]:
    """Spans that follow each other; a mark at 0 is unknown, and its span is left out."""
    spans = []
    for name, end in marks:
        if end:
            spans.append(Span(name, begin, end))
            begin = max(begin, end)
    return _forward(spans)


def _forward(spans: Sequence[Span]) -> tuple[Span, ...]:
    """``spans`` with no end before its begin: the clock of a host that has just started can be wrong by a second."""
    out, begin = [], spans[0].begin if spans else 0.0
    for span in spans:
        end = max(begin, span.end)
        out.append(Span(span.name, begin, end))
        begin = end
    return tuple(out)


def _others(chapter: _Chapter, gone_on: set[str], phases: Sequence[Span]) -> list[GuestStory]:
    """The guests that did not go on in a new QEMU."""
    saving_over = chapter.at(Phase.COMMITTING, Phase.ROLLED_BACK) or chapter.at(Phase.SAVED, Phase.REFUSED)
    out = []
    saved: dict[str, list[Record]] = {}
    for record in chapter.records:
        if record["event"] == VmEvent.SAVE_BEGIN and record.get("vm") and (not saving_over or record["at"] <= saving_over):
            saved.setdefault(str(record["vm"]), [])
    for record in chapter.records:
        if record.get("vm") in saved:
            saved[str(record["vm"])].append(record)
    for vm, records in saved.items():
        if vm not in gone_on:
            out.append(_stayed(vm, records, phases))
    for vm in chapter.fact("shut_down", ()):
        if vm not in saved and vm not in gone_on:
            ran = any(r["event"] == VmEvent.START and r.get("vm") == vm for r in chapter.records)
            why = "it could not be saved, and was shut down in order"
            out.append(GuestStory(vm=vm, outcome=Outcome.BOOTED_ANEW if ran else Outcome.SHUT_DOWN, why=why))
    return out


def _stayed(vm: str, records: Sequence[Record], phases: Sequence[Span]) -> GuestStory:
    def last(event: VmEvent) -> Record | None:
        return next((r for r in reversed(records) if r["event"] == event), None)

    begun, saved, undone = last(VmEvent.SAVE_BEGIN), last(VmEvent.SAVED), last(VmEvent.SAVE_UNDONE)
    resumed = last(VmEvent.RESUMED)
    if begun is None:
        raise ValueError(f"no record says that a save of VM {vm} began")
    stopped_at = float((saved or begun).get("stopped_at") or begun["at"])
    if undone and not saved:
        return GuestStory(vm=vm, outcome=Outcome.NOT_SAVED, spans=(Span("save", stopped_at, float(undone["at"])),))
    saved_at = float(saved["at"]) if saved else stopped_at
    save = Span("save", stopped_at, saved_at)
    if last(VmEvent.ROLLBACK) and resumed:
        resumed_at = float(resumed["at"])
        way = _forward([save, Span("take back", saved_at, resumed_at)])
        return GuestStory(vm=vm, outcome=Outcome.RESUMED, spans=way, pause_s=resumed_at - stopped_at)
    spans = [save, *(Span(s.name, max(s.begin, saved_at), s.end) for s in phases if s.end > saved_at and s.name != "save")]
    if lost := last(VmEvent.MEMORY_LOST):
        why = f"its memory is lost: {lost.get('reason', '')}"
        return GuestStory(vm=vm, outcome=Outcome.BOOTED_ANEW, spans=_forward(spans), why=why)
    held = last(VmEvent.HELD)
    if held is None:
        return GuestStory(vm=vm, outcome=Outcome.SAVED, spans=_forward(spans))
    if before := [span for span in spans if span.begin < held["at"]]:
        spans = [*before[:-1], Span(before[-1].name, before[-1].begin, float(held["at"]))]
    evidence = tuple((str(a), str(b), str(c)) for a, b, c in held.get("evidence", ()))
    why = str(held.get("reason", ""))
    return GuestStory(vm=vm, outcome=Outcome.HELD, spans=_forward(spans), why=why, evidence=evidence)


def _by_begin(guest: GuestStory) -> tuple[bool, float, str]:
    """As in `systemd-analyze plot`: in the order in which guests stop; those that never stopped stand last."""
    begin = guest.spans[0].begin if guest.spans else 0.0
    return (not guest.spans, round(begin, 1), guest.vm)
