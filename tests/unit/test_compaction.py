# SPDX-License-Identifier: GPL-2.0-or-later
"""The journal's file: whatever happens while it is made smaller, it says the same. The agent is killed around each call to
the kernel, the power is cut there, the disk is full."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpr_agent.core.acts.requests import LoadRequest, Replacement, SaveRequest
from cpr_agent.core.listener import Listener
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Survives, VmState
from cpr_agent.core.past import COMPACTED, VmEvent
from cpr_agent.core.upgrade.ledger import Ledger
from cpr_agent.core.vm import Vm
from cpr_agent.store import journal as module
from cpr_agent.store.journal import GROWN_BYTES, GROWN_RECORDS, FileJournal
from tests.bench import Bench
from tests.fakes import AgentKilled, FakeHost
from tests.journals import Numbered, act, many_upgrades, renumbered, write, years

HOST = FakeHost()


def opened(path: Path) -> FileJournal:
    return FileJournal(path, HOST, HOST)


def history() -> Numbered:
    """Upgrades, VMs that have gone, and one whose save, refresh and sleep are under way."""
    records: list[dict[str, Any]] = many_upgrades(2)
    for number in range(20):
        vm = f"gone{number}"
        script = act("save", vm, "", f"c{number}", "running") + act("load", vm, f"c{number}", "", "running")
        records += [{"event": event, "vm": vm, **facts} for event, facts in script]
    script = [*act("late-sleep", "web1", "", "", "")[:1], *act("refresh", "web1", "", "c0ffee", "suspended")[:2]]
    records += [{"event": event, "vm": "web1", **facts} for event, facts in script]
    return renumbered(records)


def said(journal: FileJournal) -> object:
    """All that any act asks of the journal."""
    vms = [*(f"web{number}" for number in range(4)), *(f"gone{number}" for number in range(20))]
    names = {str(r["checkpoint"]) for r in history() if "checkpoint" in r}
    ledger = Ledger(journal, HOST, Listener())
    return (
        [
            (past.in_refresh, past.in_transfer, past.put_to_sleep, past.awaits_cold_start, past.interrupted_save)
            for past in map(journal.past, vms)
        ],
        [
            (
                past.load_interrupted(name),
                past.resume_announced(name),
                past.resume_interrupted(name),
                past.spent_by(name),
                past.loads_begun(name),
            )
            for past in map(journal.past, vms[:2])
            for name in sorted(names)
        ],
        (ledger.current, ledger.booted),
    )


def reopened(path: Path) -> object:
    """It also goes on, with a higher number."""
    journal = opened(path)
    answers = said(journal)
    last = max(record["n"] for record in journal.records())
    assert journal.append("discard", vm="another")["n"] > last
    journal.close()
    journal = opened(path)
    assert journal.records()[-1]["vm"] == "another"
    assert said(journal) == answers
    journal.close()
    return answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal in a directory of its own."""
    path = tmp_path / "state/journal"
    path.parent.mkdir()
    write(path, history())
    return path


def compact(path: Path) -> None:
    journal = opened(path)
    journal.compact()
    journal.close()


def test_it_is_smaller_and_says_the_same(path: Path) -> None:
    journal = opened(path)
    before, size, records = said(journal), path.stat().st_size, journal.records()
    journal.compact()
    assert said(journal) == before
    assert path.stat().st_size < size * 0.8
    assert [record for record in records if record in journal.records()] == journal.records()
    journal.append("woken", vm="web1")
    journal.close()
    numbers = [json.loads(line[17:])["n"] for line in path.read_bytes().splitlines()]
    assert numbers == sorted(set(numbers))
    again = opened(path)
    assert again.records() == journal.records()
    assert not again.past("web1").put_to_sleep
    assert sorted(p.name for p in path.parent.iterdir()) == ["journal", "journal.reserve"]
    assert path.stat().st_mode & 0o777 == 0o600


# -- when ----------------------------------------------------------------------------------------------------------------


def marks(path: Path) -> int:
    return path.read_bytes().count(f'"event":"{COMPACTED}"'.encode())


@pytest.mark.parametrize(("records", "length"), [(GROWN_RECORDS, 0), (GROWN_BYTES >> 19, 1 << 19)])
def test_it_is_compacted_once_it_has_grown_and_then_not_before_it_has_grown_again(
    tmp_path: Path, records: int, length: int
) -> None:
    path = tmp_path / "journal"
    one = {"event": "woken", "vm": "web1", "text": "x" * length}
    write(path, renumbered([one] * (records - 1)))
    opened(path).close()
    assert marks(path) == 0
    write(path, renumbered([one] * records))
    opened(path).close()
    assert marks(path) == 1
    content = path.read_bytes()
    journal = opened(path)
    for _ in range(3):
        journal.append("woken", vm="web1")
        journal.compact_if_grown()
    assert path.read_bytes().startswith(content)


def test_what_a_compaction_has_left_does_not_count_as_growth(tmp_path: Path) -> None:
    """Of one upgrade of very many guests."""
    path = tmp_path / "journal"
    write(path, many_upgrades(1, GROWN_RECORDS))
    compact(path)
    content = path.read_bytes()
    assert content.count(b"\n") > GROWN_RECORDS
    opened(path).close()
    assert path.read_bytes() == content


def test_one_that_grows_under_an_agent_waits_until_it_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, renumbered([{"event": "woken", "vm": "web1"}] * (GROWN_RECORDS - 1)))
    journal = opened(path)
    journal.append("suspend", vm="web1")
    assert marks(path) == 0
    journal.compact_if_grown()
    assert marks(path) == 1
    assert journal.past("web1").put_to_sleep


# -- killed --------------------------------------------------------------------------------------------------------------


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """``work`` in a process that is killed at its ``number``-th passage into the kernel or out of it; whether it was."""

    def passing(_: FrameType, event: str, function: Any) -> None:
        nonlocal number
        owner = getattr(function, "__self__", None)
        kernel = getattr(owner, "__name__", "") == "posix"
        writes = isinstance(owner, io.IOBase) and function.__name__ in ("write", "flush", "close")
        if event in ("c_call", "c_return") and (kernel or writes):
            number -= 1
            if number < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            sys.setprofile(passing)
            work()
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return status != 0


def each_kill(path: Path, work: Callable[[], None]) -> Iterator[int]:
    """Numbers of passages at which a process was killed in ``work``; ``path`` is then as that left it."""
    whole = path.read_bytes()
    for number in count():
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        path.write_bytes(whole)
        if not killed_at(number, work):
            return
        yield number


def test_killed_at_any_call_to_the_kernel_it_says_the_same(path: Path) -> None:
    expected = said(opened(path))
    found = set()
    for number in each_kill(path, lambda: compact(path)):
        found.add(marks(path))
        assert reopened(path) == expected, f"at passage {number}"
        compact(path)  # what the dead one left is not in the way
        assert reopened(path) == expected
    assert number > 20
    assert len(found) == 2, "the old one or the new one"


def test_killed_as_a_damaged_one_is_set_aside_it_says_what_stood_before_the_damage(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:30], lines[30].replace(b"event", b"evens"), *lines[31:]]))
    damaged = path.read_bytes()
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    expected = said(opened(copy))
    for number in each_kill(path, lambda: opened(path).close()):
        assert reopened(path) == expected, f"at passage {number}"
        assert path.read_bytes().startswith(b"".join(lines[:30]))
        assert damaged in [aside.read_bytes() for aside in path.parent.glob("journal.damaged-*")]
    assert number > 20


# -- the power is cut ----------------------------------------------------------------------------------------------------


class Disk:
    """A directory whose names and contents are durable once they were synced (fsync(2)). Others may be there or not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = self._names_now()
        self.contents = {inode: (root / name).read_bytes() for name, inode in self.names.items()}
        self.after_cuts: list[dict[str, bytes]] = []

    def _names_now(self) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in self.root.iterdir()}

    def synced(self, fd: int) -> None:
        if os.fstat(fd).st_ino == self.root.stat().st_ino:
            self.names = self._names_now()
        else:
            self.contents[os.fstat(fd).st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()

    def cut(self) -> None:
        """What may be there after a power cut now: of the names that were changed, and of the contents."""
        now = self._names_now()
        for names in (self.names, now):
            for written in (0, 0.5, 1):
                after = {}
                for name, inode in names.items():
                    durable = self.contents.get(inode, b"")
                    late = (self.root / name).read_bytes()[len(durable) :] if now.get(name) == inode else b""
                    after[name] = durable + late[: int(len(late) * written)]
                if after not in self.after_cuts:
                    self.after_cuts.append(after)


@pytest.fixture
def disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The power may be cut before and after each call that changes it."""
    disk = Disk(path.parent)

    def observed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            disk.cut()
            result = real(*arguments, **options)
            if real.__name__ == "fsync":
                disk.synced(*arguments)
            disk.cut()
            return result

        return call

    for name in ("open", "write", "fsync", "rename", "link", "unlink", "ftruncate", "close"):
        monkeypatch.setattr(os, name, observed(getattr(os, name)))
    return disk


def test_after_a_power_cut_it_says_the_same(path: Path, tmp_path: Path, disk: Disk) -> None:
    journal = opened(path)
    expected = said(journal)
    journal.compact()
    journal.close()
    states = list(disk.after_cuts)
    assert len({state["journal"] for state in states}) == 2, "the old one or the new one"
    assert len(states) > 3
    for number, state in enumerate(states):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name, content in state.items():
            (directory / name).write_bytes(content)
        assert reopened(directory / "journal") == expected


def test_after_a_power_cut_an_appended_record_is_there(path: Path, tmp_path: Path, disk: Disk) -> None:
    """Also right after a compaction."""
    journal = opened(path)
    journal.compact()
    disk.after_cuts.clear()
    journal.append("woken", vm="web1")
    disk.after_cuts.clear()
    disk.cut()
    for number, state in enumerate(disk.after_cuts):
        (tmp_path / str(number)).write_bytes(state["journal"])
        assert opened(tmp_path / str(number)).records()[-1]["event"] == "woken"


# -- the disk is full ----------------------------------------------------------------------------------------------------


def with_files_of_at_most(size: int, work: Callable[[], None]) -> None:
    """In a process of its own: a write beyond writes what fits, or fails (setrlimit(2), RLIMIT_FSIZE)."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def lift_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("room", [0, 1, 50])
def test_a_record_for_which_there_is_no_room_leaves_nothing(path: Path, room: int) -> None:
    whole = path.read_bytes()

    def fill() -> None:
        journal = opened(path)
        with pytest.raises(OSError):
            journal.append("woken", vm="web1")
        assert path.read_bytes() == whole
        assert journal.past("web1").put_to_sleep
        lift_limit()
        assert journal.append("discard", vm="web1")["n"] == len(history())

    with_files_of_at_most(len(whole) + room, fill)
    assert path.read_bytes().startswith(whole)
    assert opened(path).records()[-1]["event"] == "discard"


def test_without_room_for_the_new_one_the_old_one_stays(path: Path) -> None:
    whole = path.read_bytes()

    def fill() -> None:
        journal = opened(path)
        before = said(journal)
        journal.compact()
        assert (path.read_bytes(), said(journal)) == (whole, before)
        lift_limit()
        journal.append("woken", vm="web1")
        assert path.read_bytes().startswith(whole)

    with_files_of_at_most(len(whole) // 4, fill)
    assert opened(path).records()[-1]["event"] == "woken"


def test_one_that_somebody_else_wrote_to_is_left_for_the_next_start(path: Path) -> None:
    journal = opened(path)
    with path.open("ab") as file:
        file.write(b"something")
    content = path.read_bytes()
    assert content.endswith(b"something")
    lines = content.splitlines(keepends=True)
    for changed in (content[:-1000], content.replace(b"upgrade-saved", b"upgrade-sawed", 1), b"".join(lines[1:])):
        path.write_bytes(changed)
        journal.compact()
        assert path.read_bytes() == changed


# -- what is in it -------------------------------------------------------------------------------------------------------


def test_a_record_that_is_too_long_is_shortened(path: Path) -> None:
    journal = opened(path)
    evidence = [["witness", "a" * 3000, '"' * 3000]] * 500
    record = journal.append(VmEvent.HELD, vm="web1", reason="\0" * 300_000, evidence=evidence, upgrade="f00")
    journal.close()
    assert (record["vm"], record["upgrade"], record["event"]) == ("web1", "f00", "held")
    assert 0 < len(record["reason"]) < 300_000
    assert all(len(one) == 3 for one in record["evidence"])
    assert len(path.read_bytes().splitlines()[-1]) <= module._LINE_BYTES
    assert opened(path).records()[-1] == record


def line(content: object) -> bytes:
    return module._line(msgspec.json.encode(content))


@pytest.mark.parametrize(
    "bad",
    [
        line({"event": "woken", "text": "x" * module._LINE_BYTES}),
        line(["no", "object"]),
        line("text"),
        module._line(b"{"),
        module._line(b'{"event":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        module._line(b'{"event":"\xff"}'),
        b"\n",
        b"x" * (3 * module._LINE_BYTES) + b"\n",
    ],
    ids=["long", "list", "text", "no JSON", "deep", "no UTF-8", "empty", "very long"],
)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_that_is_no_record_is_damage(path: Path, bad: bytes, *, last: bool) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + bad + (b"" if last else line({"event": "woken", "vm": "web1"})))
    content = path.read_bytes()
    opened(path).close()
    assert path.read_bytes() == whole
    asides = list(path.parent.glob("journal.damaged-*"))
    torn = last and len(bad) <= module._LINE_BYTES
    assert [aside.read_bytes() for aside in asides] == ([] if torn else [content])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["n", "at", "boot", "event", "vm", "checkpoint", "run_state", "upgrade", "kind", "checkpoints"])
WORDS = st.sampled_from([COMPACTED, "save-begin", "upgrade-checking", "upgrade-saving", "upgrade-booted", "web1"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.dictionaries(NAMES, JSON | WORDS), max_size=12))
def test_no_record_stops_the_start_and_each_is_kept(tmp_path: Path, contents: list[dict[str, Any]]) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"".join(line(content) for content in contents))
    whole = path.read_bytes()
    journal = opened(path)
    Ledger(journal, HOST, Listener())
    number = journal.append("woken", vm="web1")["n"]
    assert path.read_bytes().startswith(whole)
    journal.compact()
    assert journal.append("woken", vm="web1")["n"] > number
    journal.close()
    journal = opened(path)
    Ledger(journal, HOST, Listener())
    assert journal.records()[-1]["event"] == "woken"
    journal.close()


@pytest.mark.parametrize("number", [2**53, 2**70, -5, 1.5, "7", None])
def test_a_number_that_no_agent_gave_is_not_gone_on_from(path: Path, number: object) -> None:
    with path.open("ab") as file:
        file.write(line({"event": "woken", "vm": "web1", "n": number, "at": 1.0}))
    assert opened(path).append("woken", vm="web1")["n"] == len(history()) + 1


# -- what core makes of it -----------------------------------------------------------------------------------------------


async def save_and_load(vm: Vm) -> None:
    await vm.save(SaveRequest())
    await vm.load(LoadRequest())


async def save_and_resume(vm: Vm) -> None:
    await vm.save(SaveRequest())
    await vm.resume()


async def refresh(vm: Vm) -> None:
    await vm.replace_qemu()


async def refresh_in_turn(vm: Vm) -> None:
    await vm.replace_qemu(Replacement.IN_TURN)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (save_and_load, "running"),
        (save_and_load, "paused"),
        (save_and_load, "sleeping"),
        (save_and_resume, "running"),
        (refresh, "running"),
        (refresh, "transferred"),
        (refresh_in_turn, "running"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_next_agent_does_the_same_by_a_journal_that_was_compacted(
    tmp_path: Path, act: Callable[[Vm], Any], kind: str
) -> None:
    """Whatever record the one before died at."""

    def fresh(name: str) -> Bench:
        (tmp_path / name).mkdir()
        bench = Bench(tmp_path / name)
        bench.define("web1")
        bench.vm(lambda vm: vm.start())
        bench.runner.transfers = kind == "transferred"
        if kind == "paused":
            bench.qemu().by_hand("paused")
        if kind == "sleeping":
            bench.runner.vfio["web1"] = ["net0 (vfio-pci)"]
        return bench

    def life(name: str, point: str, *, compacted: bool) -> tuple[object, ...]:
        bench = fresh(name)
        bench.dies(point, act)
        if compacted:
            compact(bench.root / "journal")
            assert marks(bench.root / "journal")
        before = len(bench.records())

        async def look(vm: Vm) -> VmState:
            return vm.state

        state = bench.vm(look)
        return state, bench.records()[before:], bench.files(), bench.runner.counts, bench.runner.violations

    bench = fresh("points")
    bench.vm(act)
    events = [event for event in dict.fromkeys(bench.records()) if event != "start"]
    for number, event in enumerate(events):
        for when in ("before", "after"):
            point, name = f"{when} {event}", f"{number}-{when}"
            assert life(f"{name}-c", point, compacted=True) == life(name, point, compacted=False), point


@pytest.mark.parametrize("point", ["", "before compact", "after compact"])
def test_it_is_compacted_between_jobs_and_an_agent_that_dies_there_leaves_nothing_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())

    async def save_all(manager: Manager) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(module, "GROWN_RECORDS", 5)
            bench.runner.die_at = point
            await manager.save_all(Survives.QEMU_RESTART).over()

    with pytest.raises(AgentKilled) if point else contextlib.nullcontext():
        bench.run(save_all)
    bench.runner.die_at = ""
    assert bool(marks(bench.root / "journal")) == (point != "before compact")
    assert bench.files() == ["manifest.json", "vmstate"]
    bench.run(lambda manager: manager.load_all().over())
    assert bench.qemu().status == "running"
    assert bench.records()[-1] == "upgrade-done"
    assert bench.runner.violations == []


# -- how long ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["years", "large-upgrades"])
def test_a_hundred_thousand_records_cost_little_once_compacted(tmp_path: Path, what: str) -> None:
    """Against reading the same bytes as JSON, the best of five each, in turn: a busy machine slows both. A quiet machine
    opens either in less than 60 ms."""
    path = tmp_path / "journal"
    records = years() if what == "years" else many_upgrades(500, 100)[:100_000]
    assert len(records) == 100_000
    write(path, records)
    compact(path)
    assert len(path.read_bytes().splitlines()) < 5000
    times, reading = [], []
    gc.disable()  # as the agent does while it starts
    for _ in range(5):
        begin = time.process_time()
        journal = opened(path)
        times.append(time.process_time() - begin)
        journal.close()
        begin = time.process_time()
        for line in path.read_text().splitlines():
            json.loads(line[line.index("{") :])
        reading.append(time.process_time() - begin)
    gc.enable()
    print(f"{what}: opened in {min(times) * 1e3:.1f} ms, read as JSON in {min(reading) * 1e3:.1f} ms")
    assert opened(path).append("woken", vm="web1")["n"] > 99_999
    spent = {str(r["checkpoint"]) for r in records if r["event"] == "resumed"}
    assert all(journal.past("web1").spent_by(checkpoint) for checkpoint in spent)
    assert min(times) < 6 * min(reading)
