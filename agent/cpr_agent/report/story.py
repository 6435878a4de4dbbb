"""What happened in one upgrade, or in one load, told from the journal's records and the guests' timelines.

Only what is on record is told: a phase that nobody noted is not there, and neither is a guest whose record is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from cpr_agent import __version__
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.errors import NoSuchReport

Record = Mapping[str, Any]
EVENT = "upgrade-"
MIN_PREFIX = 4
_NAMED_IN_ERROR = 5
_ENDS = ("refused", "checked", "rolled-back", "done", "held")


class Span(msgspec.Struct, frozen=True):
    """A phase, from ``begin`` to ``end`` (epoch s)."""

    name: str
    begin: float
    end: float

    @property
    def length_s(self) -> float:
        return self.end - self.begin


class GuestStory(msgspec.Struct, frozen=True, kw_only=True):
    """One guest's way. ``outcome``: "went on" in a new QEMU; "resumed" where it was, because all was taken back;
    "not saved" and running on; "held"; "saved", and waiting; "shut down"; "booted anew"."""

    vm: str
    outcome: str
    spans: tuple[Span, ...] = ()
    pause_s: float | None = None
    why: str = ""
    evidence: tuple[tuple[str, str, str], ...] = ()
    """What was compared, expected and found."""
    timeline: GuestTimeline | None = None


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """``kind``: of the ledger's, or "load" for a single one. ``outcome``: the last phase, for a load "done". Times in epoch
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
    agent: str = __version__

    @property
    def longest(self) -> GuestStory | None:
        """The guest that paused longest."""
        paused = [guest for guest in self.guests if guest.pause_s is not None]
        return max(paused, key=lambda guest: guest.pause_s or 0.0, default=None)

    def of(self, outcome: str) -> list[GuestStory]:
        return [guest for guest in self.guests if guest.outcome == outcome]


class _Chapter(msgspec.Struct):
    """The records from an upgrade's first to the next one's first."""

    id: str
    records: list[Record] = msgspec.field(default_factory=list)

    def at(self, *phases: str) -> float:
        """When the first of these was entered first; 0 if none was."""
        return next((float(r["at"]) for r in self.records if r["event"] in {f"{EVENT}{p}" for p in phases}), 0.0)

    def fact(self, name: str, default: Any = "") -> Any:
        """As the last phase that told of it has it."""
        told = [
            r[name] for r in self.records if str(r["event"]).startswith(EVENT) and r.get("upgrade") == self.id and name in r
        ]
        return told[-1] if told else default

    @property
    def phase(self) -> str:
        return next(
            str(r["event"]).removeprefix(EVENT) for r in reversed(self.records) if str(r["event"]).startswith(EVENT)
        )

    @property
    def dry(self) -> bool:
        return self.phase == "checked"


def tell(wanted: str, records: Iterable[Record], timelines: Sequence[GuestTimeline], host: str) -> Story:
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
    for record in records:
        if str(record["event"]).startswith(EVENT) and (current is None or current.id != record["upgrade"]):
            current = out.setdefault(str(record["upgrade"]), _Chapter(str(record["upgrade"])))
        if current:
            current.records.append(record)
    return out


# -- a load by itself ---------------------------------------------------------------------------------------------------


def _of_load(timeline: GuestTimeline, host: str) -> Story:
    guest = _gone_on(timeline)
    return Story(
        id=timeline.id,
        kind="load",
        outcome="done",
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
    return GuestStory(vm=timeline.vm, outcome="went on", spans=_forward(spans), pause_s=timeline.pause_s, timeline=timeline)


# -- an upgrade ---------------------------------------------------------------------------------------------------------


def _of_upgrade(chapter: _Chapter, timelines: Sequence[GuestTimeline], host: str) -> Story:
    first = chapter.records[0]
    phases = _host_phases(chapter, timelines)
    guests = [_gone_on(timeline) for timeline in timelines]
    guests += _others(chapter, {timeline.vm for timeline in timelines}, phases)
    planned = str(chapter.fact("kernel_to"))
    before = str(first["kernel_from"])
    after = [timeline.kernel_after for timeline in timelines] or [str(chapter.fact("kernel", before))]
    return Story(
        id=chapter.id,
        kind=str(first["kind"]),
        outcome=chapter.phase,
        host=host,
        started_at=float(first["at"]),
        ended_at=chapter.at(*_ENDS) or float(chapter.records[-1]["at"]),
        kernel_before=before,
        kernel_after=after[-1],
        kernel_planned=planned,
        policy=str(chapter.fact("policy")),
        reason=str(chapter.fact("reason") or chapter.fact("interrupted")),
        failures=tuple(chapter.fact("failures", ())),
        phases=phases,
        guests=tuple(sorted(guests, key=_by_begin)),
    )


def _host_phases(chapter: _Chapter, timelines: Sequence[GuestTimeline]) -> tuple[Span, ...]:
    """What the host was busy with; devices and loads of many guests overlap, and it is the first guest that has its memory
    and the last one that is loaded that count."""
    booted, ended = chapter.at("booted"), chapter.at(*_ENDS)
    marks: list[tuple[str, float]] = [("check", chapter.at("saving", "refused", "checked"))]
    back = chapter.at("rolling-back")
    marks.append(("save", back or chapter.at("committing") or chapter.at("saved")))
    if back:
        marks.append(("take back", chapter.at("rolled-back")))
        return _chain(chapter.at("checking"), marks)
    loading = min((t.load_at for t in timelines), default=chapter.at("loading"))
    if booted:
        start = "kexec + kernel" if chapter.fact("by_kexec", default=True) else "reset + kernel"
        down = max((t.shutdown_at for t in timelines), default=0.0)
        marks.append(("shutdown", down))
        marks.append((start if down else f"shutdown + {start}", float(chapter.fact("userspace_at", 0.0))))
        marks.append(("userspace", loading))
    else:
        marks.append(("saved", loading))
    if timelines:
        through = [t for t in timelines if not ended or t.load_at <= ended]
        marks.append(("devices", min((t.memory_at for t in through), default=0.0)))
        marks.append(("load", max((t.loaded_at or t.resumed_at for t in through), default=0.0)))
        marks.append(("resume", max((t.resumed_at for t in through if t.loaded_at), default=0.0)))
    else:
        marks.append(("load", chapter.at("done", "held") if loading else 0.0))
    return _chain(chapter.at("checking"), marks)


def _chain(begin: float, marks: Iterable[tuple[str, float]]) -> tuple[Span, ...]:
    """Spans that follow each other up to each mark that is known."""
    spans = []
    for name, end in marks:
        if end:
            spans.append(Span(name, begin, end))
            begin = max(begin, end)
    return _forward(spans)


def _forward(spans: Sequence[Span]) -> tuple[Span, ...]:
    """None ends before it begins: the clock of a host that starts anew can be wrong by a second."""
    out, begin = [], spans[0].begin if spans else 0.0
    for span in spans:
        end = max(begin, span.end)
        out.append(Span(span.name, begin, end))
        begin = end
    return tuple(out)


def _others(chapter: _Chapter, gone_on: set[str], phases: Sequence[Span]) -> list[GuestStory]:
    """The guests that did not go on in a new QEMU."""
    saving_over = chapter.at("committing", "rolled-back") or chapter.at("saved", "refused")
    out = []
    saved: dict[str, list[Record]] = {}
    for record in chapter.records:
        if record["event"] == "save-begin" and (not saving_over or record["at"] <= saving_over):
            saved.setdefault(str(record["vm"]), [])
    for record in chapter.records:
        if record.get("vm") in saved:
            saved[str(record["vm"])].append(record)
    for vm, records in saved.items():
        if vm not in gone_on:
            out.append(_stayed(vm, records, phases))
    for vm in chapter.fact("shut_down", ()):
        if vm not in saved and vm not in gone_on:
            ran = any(r["event"] == "start" and r.get("vm") == vm for r in chapter.records)
            why = "it could not be saved, and was shut down in order"
            out.append(GuestStory(vm=vm, outcome="booted anew" if ran else "shut down", why=why))
    return out


def _stayed(vm: str, records: Sequence[Record], phases: Sequence[Span]) -> GuestStory:
    def last(event: str) -> Record | None:
        return next((r for r in reversed(records) if r["event"] == event), None)

    begun, saved, undone, resumed = last("save-begin"), last("saved"), last("save-undone"), last("resumed")
    if begun is None:
        raise ValueError(f"no record says that a save of VM {vm} began")
    stopped_at = float((saved or begun).get("stopped_at") or begun["at"])
    if undone and not saved:
        return GuestStory(vm=vm, outcome="not saved", spans=(Span("save", stopped_at, float(undone["at"])),))
    saved_at = float(saved["at"]) if saved else stopped_at
    save = Span("save", stopped_at, saved_at)
    if last("rollback") and resumed:
        back = Span("take back", saved_at, float(resumed["at"]))
        return GuestStory(vm=vm, outcome="resumed", spans=_forward([save, back]), pause_s=float(resumed["at"]) - stopped_at)
    spans = [save, *(Span(s.name, max(s.begin, saved_at), s.end) for s in phases if s.end > saved_at and s.name != "save")]
    if lost := last("memory-lost"):
        return GuestStory(vm=vm, outcome="booted anew", spans=_forward(spans), why=f"its memory is lost: {lost['reason']}")
    held = last("held")
    evidence = tuple((str(a), str(b), str(c)) for a, b, c in held["evidence"]) if held else ()
    if held:
        before = [s for s in spans if s.begin < held["at"]]
        spans = [*before[:-1], Span(before[-1].name, before[-1].begin, float(held["at"]))] if before else spans
    why = str(held["reason"]) if held else ""
    return GuestStory(vm=vm, outcome="held" if held else "saved", spans=_forward(spans), why=why, evidence=evidence)


def _by_begin(guest: GuestStory) -> tuple[bool, float, str]:
    """As in `systemd-analyze plot`: who stops first stands first; who never stopped stands last."""
    begin = guest.spans[0].begin if guest.spans else 0.0
    return (not guest.spans, round(begin, 1), guest.vm)
