# SPDX-License-Identifier: GPL-2.0-or-later
"""What the journal says of a VM, folded: the same as by scanning all records, also after compactions."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpr_agent.core.model import RunState
from cpr_agent.core.past import COMPACTED, MAX_LOADS, SPENDING, InterruptedSave, Pasts, Record, VmEvent
from cpr_agent.core.upgrade.ledger import EVENT, IN_FLIGHT, Phase
from cpr_agent.report.story import story_of as tell
from cpr_agent.store import compaction
from tests.journals import Numbered, act, many_upgrades, numbered, renumbered, replayed
from tests.source import parsed

AGENT = Path(__file__).parents[2] / "agent/cpr_agent"
EXAMPLES = int(os.environ.get("CPR_TEST_EXAMPLES", "100"))
VMS = ["web1", "web2", "db"]
CHECKPOINTS = ["c0ffee", "decaf", "beef"]


class Scan:
    """How each question was answered before: by a look at all records. Each function is as it stood in core, but for the
    end of a transfer, which was its undo's announcement then."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def last_record(self, vm: str, *events: str) -> Record:
        found = (r for r in reversed(self.records) if r.get("vm") == vm and r["event"] in events)
        return next(found, {})

    def last_of(self, vm: str, *events: str) -> str:
        return str(self.last_record(vm, *events).get("event", ""))

    def in_refresh(self, vm: str) -> bool:
        return self.last_of(vm, "refresh", "refreshed", "start") == "refresh"

    def in_transfer(self, vm: str) -> bool:
        return self.last_of(vm, "transfer", "resumed", "refreshed", "start") == "transfer"

    def put_to_sleep(self, vm: str) -> bool:
        return self.last_of(vm, "suspend", "woken", "start") == "suspend"

    def awaits_cold_start(self, vm: str) -> bool:
        return self.last_of(vm, "memory-lost", "cold-started") == "memory-lost"

    def load_interrupted(self, vm: str, checkpoint: str) -> bool:
        events = [r["event"] for r in self.records if r.get("checkpoint") == checkpoint]
        begun = events.count("load-begin")
        under_way = self.in_refresh(vm) or (begun and events[-1] in ("load-begin", "load-interrupted"))
        return bool(under_way) and begun < MAX_LOADS

    def interrupted_save(self, vm: str) -> tuple[str, str, str, str, str] | None:
        records = [r for r in self.records if r.get("vm") == vm and "checkpoint" in r]
        last = records[-1] if records else {"event": "none", "checkpoint": ""}
        begun = [r for r in records if r["event"] == "save-begin" and r["checkpoint"] == last["checkpoint"]]
        interrupted = begun and last["event"] in ("save-begin", "save-undone", "rollback")
        if not interrupted:
            return None
        save = begun[-1]
        return save["checkpoint"], str(save["run_state"]), save["path"], last["event"], save.get("upgrade", "")

    def resume_interrupted(self, checkpoint: str) -> bool:
        records = [r for r in self.records if r.get("checkpoint") == checkpoint]
        announced = [r for r in records if r["event"] == "resume"]
        return bool(announced) and records[-1]["event"] == "resume" and announced[-1].get("run_state") != "paused"

    def spent_by(self, checkpoint: str) -> str:
        for record in self.records:
            if record.get("checkpoint") == checkpoint and record["event"] in ("resumed", "resumed-by-hand"):
                return str(record["event"])
        return ""

    def understood(self, vm: str) -> bool:
        """Whether no other save began after the one that the VM's last record is of, and that one is not spent. Else the
        fold, which has only the last save of each VM, leaves the QEMU as it is."""
        named = [r for r in self.records if r.get("vm") == vm and "checkpoint" in r]
        saves = [r["checkpoint"] for r in named if r["event"] == "save-begin"]
        return bool(saves) and saves[-1] == named[-1]["checkpoint"] and not self.spent_by(saves[-1])


def assert_same(pasts: Pasts, records: Sequence[Record], *, strict: bool = False) -> None:
    """``strict``: also of saves that the fold does not care to understand."""
    scan = Scan(records)
    for vm in VMS:
        past = pasts.of(vm)
        assert past.in_refresh == scan.in_refresh(vm)
        assert past.in_transfer == scan.in_transfer(vm)
        assert past.transfer_checkpoint == (scan.last_record(vm, "transfer")["checkpoint"] if past.in_transfer else "")
        assert past.put_to_sleep == scan.put_to_sleep(vm)
        assert past.awaits_cold_start == scan.awaits_cold_start(vm)
        save = scan.interrupted_save(vm) if strict or scan.understood(vm) else None
        assert past.interrupted_save == save
        for checkpoint in {*CHECKPOINTS, *(str(r["checkpoint"]) for r in records if "checkpoint" in r)}:
            assert past.load_interrupted(checkpoint) == scan.load_interrupted(vm, checkpoint)
            assert past.resume_interrupted(checkpoint) == scan.resume_interrupted(checkpoint)
            named = [r for r in records if r.get("checkpoint") == checkpoint]
            assert past.resume_announced(checkpoint) == (bool(named) and named[-1]["event"] == "resume")
            assert past.spent_by(checkpoint) == scan.spent_by(checkpoint)
            begun = [r for r in records if r.get("checkpoint") == checkpoint and r["event"] == "load-begin"]
            assert past.loads_begun(checkpoint) == len(begun)


# -- journals ----------------------------------------------------------------------------------------------------------

WITHOUT_CHECKPOINT = {
    *(VmEvent.START, VmEvent.SUSPEND, VmEvent.WOKEN, VmEvent.HELD, VmEvent.DISCARD),
    *(VmEvent.COLD_STARTED, VmEvent.REFRESH, VmEvent.REFRESHED),
}
RUN_STATES = st.sampled_from([RunState.RUNNING, RunState.PAUSED, RunState.SUSPENDED])


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """A record of a VM with the facts that its event has; at times one of a newer agent."""
    event = draw(st.sampled_from([*VmEvent, "verified"]))
    record: dict[str, Any] = {"event": str(event), "vm": draw(st.sampled_from(VMS))}
    if event not in WITHOUT_CHECKPOINT:
        record["checkpoint"] = draw(st.sampled_from(CHECKPOINTS))
    if event in (VmEvent.SAVE_BEGIN, VmEvent.RESUME):
        record["run_state"] = str(draw(RUN_STATES))
    if event == VmEvent.SAVE_BEGIN:
        record["path"] = f"/var/lib/{record['vm']}/{draw(st.integers(0, 3))}"
        if upgrade := draw(st.sampled_from(["", "f00"])):
            record["upgrade"] = upgrade
    return record


@st.composite
def phases(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Of one upgrade, in any order but with those of its begin first; at times one that only a newer agent knows."""
    upgrade, kind = draw(st.uuids()).hex, draw(st.sampled_from(["upgrade", "drill", "save-all"]))
    first = {"event": f"{EVENT}{Phase.CHECKING}", "upgrade": upgrade, "kind": kind, "kernel_from": "6.12.43"}
    later = draw(st.lists(st.sampled_from([*Phase, "verifying"]), max_size=4))
    return [first, *({"event": f"{EVENT}{phase}", "upgrade": upgrade} for phase in later)]


@st.composite
def nonsense(draw: st.DrawFn) -> Numbered:
    length = draw(st.integers(0, 60))
    one = st.one_of(*[anything().map(lambda one: [one])] * 5, phases())
    parts = draw(st.lists(one, min_size=length, max_size=length))
    return numbered([record for part in parts for record in part])


IDLE_ACTS = ["save", "sleep-save", "late-sleep", "fail-save", "refresh", "transfer", "fail-transfer", "start"]
SAVED_ACTS = ["load", "fail-load", "lost", "take-back", "by-hand", "held", "discard"]


@st.composite
def lives(draw: st.DrawFn) -> Numbered:
    """VMs whose acts follow each other as the agent lets them; each may be cut short by the agent's end, and is then
    recovered or not."""
    records: Numbered = []
    saved = dict.fromkeys(VMS, "")
    for number in range(draw(st.integers(0, 14))):
        vm = draw(st.sampled_from(VMS))
        name = draw(st.sampled_from(SAVED_ACTS if saved[vm] else IDLE_ACTS))
        fresh = f"{vm}-{number}"
        script = act(name, vm, saved[vm], fresh, draw(RUN_STATES))
        cut = draw(st.one_of(st.just(len(script)), st.integers(0, len(script))))
        records += [{"event": event, "vm": vm, **facts} for event, facts in script[:cut]]
        events = [event for event, _ in script[:cut]]
        if "resumed" in events or events[-1:] in (
            ["discard"],
            ["resumed-by-hand"],
            ["rollback"],
            ["start"],
            ["cold-started"],
        ):
            saved[vm] = ""
        elif "saved" in events:
            saved[vm] = fresh
    return numbered(records)


def compacted(records: Sequence[Record], **limits: int) -> Numbered:
    """As the journal does it."""
    pasts = Pasts(records)
    kept = [dict(records[index]) for index in compaction.needed(records, pasts, **limits)]
    last = max((record["n"] for record in records), default=-1)
    return kept + numbered([{"event": COMPACTED, **facts} for facts in pasts.condensed()], last + 1)


def without_marks(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.get("event") != COMPACTED]


# -- the fold ----------------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(nonsense())
def test_the_fold_answers_as_a_scan_of_any_records_does(records: Numbered) -> None:
    assert_same(Pasts(records), records)


@settings(max_examples=EXAMPLES, deadline=None)
@given(lives())
def test_the_fold_answers_as_a_scan_of_what_agents_write_after_each_record(records: Numbered) -> None:
    pasts = Pasts()
    for end, record in enumerate(records, 1):
        pasts.fold(record)
        assert_same(pasts, records[:end], strict=True)


def test_who_keeps_a_past_sees_it_change() -> None:
    pasts = Pasts()
    past = pasts.of("web1")
    assert not past.in_refresh
    pasts.fold({"event": VmEvent.REFRESH, "vm": "web1"})
    assert past.in_refresh
    assert pasts.of("web1") is past


def test_an_interrupted_save_is_told_with_what_its_guest_was() -> None:
    begun = {"event": "save-begin", "vm": "web1", "checkpoint": "c0ffee", "run_state": "suspended", "path": "/state"}
    by_upgrade = {**begun, "upgrade": "f00"}
    undone = {"event": "save-undone", "vm": "web1", "checkpoint": "c0ffee"}
    expected = InterruptedSave("c0ffee", RunState.SUSPENDED, "/state", VmEvent.SAVE_BEGIN)
    assert Pasts([by_upgrade]).of("web1").interrupted_save == expected._replace(upgrade="f00")
    assert Pasts([begun]).of("web1").interrupted_save == expected
    assert Pasts([begun, undone]).of("web1").interrupted_save == expected._replace(last=VmEvent.SAVE_UNDONE)
    assert Pasts([begun, {**undone, "event": "saved"}]).of("web1").interrupted_save is None


def test_a_load_is_repeated_until_it_was_begun_three_times() -> None:
    pasts = Pasts()
    past = pasts.of("web1")
    for loads in range(1, MAX_LOADS + 1):
        pasts.fold({"event": VmEvent.LOAD_BEGIN, "vm": "web1", "checkpoint": "c0ffee"})
        assert past.loads_begun("c0ffee") == loads
        assert past.load_interrupted("c0ffee") == (loads < 3)
        pasts.fold({"event": VmEvent.LOAD_INTERRUPTED, "vm": "web1", "checkpoint": "c0ffee"})
        assert past.load_interrupted("c0ffee") == (loads < 3)


def test_a_run_state_that_no_agent_has_a_word_for_is_unknown() -> None:
    begun = {"event": "save-begin", "vm": "web1", "checkpoint": "c0ffee", "run_state": "dreaming"}
    save = Pasts([begun]).of("web1").interrupted_save
    assert save is not None
    assert (save.run_state, save.path) == (RunState.UNKNOWN, "")


@pytest.mark.parametrize("event", SPENDING)
def test_a_checkpoint_is_spent_whichever_vm_it_is_of(event: VmEvent) -> None:
    pasts = Pasts([{"event": event, "vm": "web1", "checkpoint": "c0ffee"}])
    assert pasts.of("web2").spent_by("c0ffee") == event
    assert pasts.of("web2").spent_by("decaf") == ""


def test_only_an_event_of_an_upgrade_changes_the_ledger() -> None:
    records = many_upgrades(1)
    held = [record for record in records if record["event"] == VmEvent.HELD]
    assert held and all(record["upgrade"] == records[0]["upgrade"] for record in held)
    before = replayed(records)
    assert replayed([*records, *held]) == before
    assert replayed([*records, {**records[0], "event": f"{EVENT}verifying"}]) == before, "a phase of a newer agent"
    assert replayed([*records, {**records[0], "kind": "migration"}]) == before
    assert replayed([*records, {**records[0], "upgrade": None}]) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FACTS = [
    "n",
    "at",
    "boot",
    "event",
    "vm",
    "checkpoint",
    "run_state",
    "path",
    "upgrade",
    "kind",
    "checkpoints",
    "last",
    "loads",
]
EVENTS = st.sampled_from([*VmEvent, COMPACTED, *(f"{EVENT}{phase}" for phase in Phase)])


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(FACTS), JSON | EVENTS)))
def test_no_content_of_a_record_is_a_reason_to_fail(contents: list[dict[str, Any]]) -> None:
    """A newer agent wrote it, perhaps."""
    pasts = Pasts(contents)
    replayed(contents)
    assert len(compaction.needed(contents, pasts)) <= len(contents)
    assert list(pasts.condensed())


# -- compaction --------------------------------------------------------------------------------------------------------


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.one_of(nonsense(), lives()), st.integers(0, 60), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20))
def test_nothing_that_comes_after_a_compaction_shows_that_there_was_one(
    records: Numbered, cut: int, times: int, upgrades: int, budget: int
) -> None:
    short, after = records[:cut], records[cut:]
    for _ in range(times):
        short = compacted(short, upgrades=upgrades, budget=budget)
    pasts = Pasts(short)
    assert_same(pasts, records[:cut])
    assert replayed(short) == replayed(records[:cut])
    for end, record in enumerate(after, cut + 1):
        pasts.fold(record)
        assert_same(pasts, records[:end])
    assert replayed([*short, *after]) == replayed(records)


@settings(max_examples=EXAMPLES, deadline=None)
@given(nonsense())
def test_no_record_changes_its_place_and_numbers_go_up(records: Numbered) -> None:
    short = compacted(records)
    kept = without_marks(short)
    assert kept == [record for record in records if record in kept]
    assert [record["n"] for record in short] == sorted({record["n"] for record in short})
    assert short[-1]["event"] == COMPACTED
    again = compacted(short)
    assert without_marks(again) == kept


@settings(max_examples=EXAMPLES, deadline=None)
@given(nonsense())
def test_an_agent_that_knows_no_compaction_answers_the_same_of_its_vms(records: Numbered) -> None:
    """Of checkpoints that are spent it knows those of the last upgrades only."""
    old, new = Scan(records), Scan(without_marks(compacted(records)))
    for vm in VMS:
        for question in (Scan.in_refresh, Scan.in_transfer, Scan.put_to_sleep, Scan.awaits_cold_start):
            assert question(old, vm) == question(new, vm)


def story_ids(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(str(r["upgrade"]) for r in records if str(r["event"]).startswith(EVENT)))


def test_the_last_upgrades_are_told_as_before() -> None:
    records = many_upgrades(compaction.UPGRADES + 6)
    short = without_marks(compacted(records))
    assert story_ids(short) == story_ids(records)[6:]
    for upgrade in story_ids(short):
        assert tell(upgrade, short, [], "host") == tell(upgrade, records, [], "host")


def test_dry_runs_do_not_push_out_the_upgrades_that_stopped_guests() -> None:
    records = many_upgrades(2)
    dry = [
        {"event": f"{EVENT}{phase}", "upgrade": f"d{number:07x}", "kind": "upgrade", "kernel_from": "6.12.57"}
        for number in range(100)
        for phase in (Phase.CHECKING, Phase.CHECKED)
    ]
    records = renumbered([*records, *dry])
    short = story_ids(compacted(records))
    assert story_ids(records)[:2] == short[:2]
    assert len(short) == 2 + compaction.UPGRADES
    assert replayed(compacted(records)).booted == replayed(records).booted


def test_what_upgrade_back_takes_back_is_known_however_long_ago_it_was() -> None:
    booted = many_upgrades(1)
    refused = many_upgrades(5)
    for record in refused:
        record["upgrade"] = f"f{record.get('upgrade')}"
    records = renumbered([*booted, *[r for r in refused if r["event"] in ("upgrade-checking", "upgrade-saving")]])
    short = compacted(records, upgrades=2)
    assert len(story_ids(short)) == 3
    assert replayed(short).booted == replayed(records).booted
    assert replayed(short).booted is not None


def test_upgrades_of_many_guests_are_fewer_that_are_kept() -> None:
    records = many_upgrades(6, 100)
    each = len(records) // 6
    short = without_marks(compacted(records, budget=2 * each))
    assert story_ids(short) == story_ids(records)[-2:]


def test_what_a_vm_of_an_upgrade_did_later_belongs_to_its_story() -> None:
    """Saved by `cprctl save --all`, and resumed by hand one by one."""
    records: list[dict[str, Any]] = []
    for number in range(3):
        upgrade, checkpoint = f"aaaa{number}", f"c0ffee{number}"
        records += [
            {"event": "upgrade-checking", "upgrade": upgrade, "kind": "save-all", "kernel_from": "6.12.43"},
            {"event": "upgrade-saving", "upgrade": upgrade, "shut_down": []},
            {"event": "save-begin", "vm": "web1", "checkpoint": checkpoint, "run_state": "running", "path": "/x"},
            {"event": "saved", "vm": "web1", "checkpoint": checkpoint},
            {"event": "upgrade-saved", "upgrade": upgrade},
            *({"event": "woken", "vm": f"other{number}"} for number in range(5)),
            *({"event": event, "vm": "web1", "checkpoint": checkpoint} for event in ("rollback", "resumed")),
        ]
    records = numbered(records)
    short = without_marks(compacted(records))
    assert short == [record for record in records if not str(record.get("vm")).startswith("other")]
    assert [guest.outcome for guest in tell("aaaa0", short, [], "host").guests] == ["resumed"]
    short = without_marks(compacted(records, budget=1))
    assert story_ids(short) == ["aaaa2"]
    assert [guest.outcome for guest in tell("", short, [], "host").guests] == ["resumed"]


def test_a_save_that_is_taken_back_after_a_compaction_is_understood() -> None:
    saved = [{"event": event, "vm": "web1", **facts} for event, facts in act("save", "", "", "c0ffee", "running")]
    pasts = Pasts(compacted(numbered(saved)))
    assert pasts.of("web1").interrupted_save is None
    pasts.fold({"event": VmEvent.ROLLBACK, "vm": "web1", "checkpoint": "c0ffee"})
    expected = InterruptedSave("c0ffee", RunState.RUNNING, saved[0]["path"], VmEvent.ROLLBACK)
    assert pasts.of("web1").interrupted_save == expected


def test_vms_that_have_gone_leave_no_records_behind() -> None:
    records = []
    for number in range(500):
        script = act("start", "", "", "", "") + act("save", "", "", f"c{number}", "running")
        script += act("load", "", f"c{number}", "", "running")
        records += [{"event": event, "vm": f"vm{number}", **facts} for event, facts in script]
    short = compacted(numbered(records))
    assert {record["event"] for record in short} == {COMPACTED}
    assert len(short) == 2
    past = Pasts(short).of("vm7")
    assert all(past.spent_by(f"c{number}") == "resumed" for number in range(500))


def test_what_a_newer_agent_wrote_is_kept() -> None:
    foreign: list[Record] = [{"event": "moved", "vm": "web1", "checkpoint": "c0ffee", "to": "kvm8"}, {"what": "no event"}]
    records = numbered([*foreign, {"event": "woken", "vm": "web1"}, {"event": "woken", "vm": "web2"}])
    kept = without_marks(compacted(records))
    assert kept == records[:3], "with what came after it of the same VM"


# -- the vocabulary ----------------------------------------------------------------------------------------------------


def test_each_event_that_core_appends_is_in_the_vocabulary() -> None:
    """And each word of it is used."""
    used = set()
    for path in AGENT.glob("core/**/*.py"):
        if path.name == "past.py":
            continue
        for node in ast.walk(parsed(path)):
            match node:
                case ast.Call(func=ast.Attribute(attr="append", value=ast.Attribute(attr="journal"))):
                    if isinstance(node.args[0], ast.Constant):
                        used.add(VmEvent(str(node.args[0].value)))
                case ast.Attribute(value=ast.Name(id="VmEvent"), attr=name):
                    used.add(VmEvent[name])
    assert used == set(VmEvent)


def test_no_phase_of_an_upgrade_is_an_event_of_a_vm() -> None:
    assert not {f"{EVENT}{phase}" for phase in Phase} & {*VmEvent, COMPACTED}
    assert set(Phase) >= IN_FLIGHT
