# SPDX-License-Identifier: GPL-2.0-or-later
"""No guest runs without its proof in hand (invariant 9): who may let one run, and what a proof is."""

from __future__ import annotations

import ast
import contextlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from cpr_agent.core import gate
from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.gate import Unbroken
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import VmState
from cpr_agent.core.proof import Proven
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError, DiskChanged, MemoryChanged, ProofFailed, WrongState
from tests.bench import Bench
from tests.source import parsed

AGENT = Path(__file__).parent.parent.parent / "agent/cpr_agent"

CALLERS = {
    ("core/acts/load.py", "go_on", "let_run"): "proof",  # of the load, the undo or the transfer that calls it: below
    ("core/acts/load.py", "_has_gone_on", "wake"): "proof",
    ("core/acts/load.py", "load_and_go_on", "let_run_by_load"): "proof",
    ("core/acts/recover.py", "_finish_resume", "let_run"): "Unbroken.RESUME_ANNOUNCED",
    ("core/acts/replace.py", "undo_transfer", "let_run"): "Unbroken.TRANSFER_UNDONE",
    ("core/acts/resume.py", "_unpause", "let_run"): "Unbroken.PAUSED",
    ("core/acts/resume.py", "_go_on_after_failed_save", "let_run"): "Unbroken.SAVE_INTERRUPTED",
    ("core/acts/resume.py", "take_back", "let_run"): "proven",
    ("core/acts/save.py", "_go_on", "let_run"): "Unbroken.SAVE_UNDONE",
    ("core/acts/save.py", "_go_on", "let_run_by_load"): "Unbroken.SAVE_UNDONE",
    ("core/acts/save.py", "_run_again", "let_run"): "Unbroken.SAVE_UNDONE",
    ("core/acts/save.py", "run_after_interrupted_save", "let_run"): "Unbroken.SAVE_INTERRUPTED",
    ("core/acts/sleep.py", "_try_to_wake", "wake"): "Unbroken.ASLEEP",
}
"""Each call of the gate, with its proof. Whoever adds one has thought about invariants 1, 2 and 9."""
GOING_ON = {
    ("core/acts/load.py", "load_into", "go_on"): "proven",
    ("core/acts/load.py", "load_into", "load_and_go_on"): "proven",
    ("core/acts/replace.py", "_transfer", "go_on"): "Unbroken.HANDED_OVER",
}
"""The callers of ``go_on``, which hands their proof to the gate."""


class Place(NamedTuple):
    """``function`` is the innermost one; ``within`` is what the node is a part of."""

    file: str
    function: str
    node: ast.AST
    within: ast.AST


def places(root: Path) -> list[Place]:
    """Every node of the source below ``root``."""
    found: list[Place] = []
    for path in sorted(root.rglob("*.py")):
        _collect(parsed(path), str(path.relative_to(root)), "", found)
    return found


def _collect(node: ast.AST, file: str, function: str, found: list[Place]) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    for child in ast.iter_child_nodes(node):
        found.append(Place(file, function, child, node))
        _collect(child, file, function, found)


def uses(root: Path, *names: str) -> list[tuple[str, str, str, ast.AST]]:
    """File, function, name and surrounding node of each use of a function or method so named: calls, and what is handed on
    or imported under another name."""
    return [
        (file, function, name, within)
        for file, function, node, within in places(root)
        for name in [_used(node)]
        if name in names
    ]


def _used(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name, asname=str()):
            return name
    return ""


def through_the_gate(root: Path) -> list[tuple[str, str, str, str]]:
    """Each use of the gate's functions, with the proof; "?" if it is no plain call."""
    found = []
    for file, function, name, within in uses(root, "let_run", "let_run_by_load", "wake"):
        plain = isinstance(within, ast.Call) and _used(within.func) == name
        if name == "wake" and not (plain and len(within.args) == 2):  # type: ignore[attr-defined]
            continue  # a method so named, which takes no machine and no proof
        proof = ast.unparse(within.args[1 if name == "wake" else 2]) if plain else "?"  # type: ignore[attr-defined]
        found.append((file, function, name, proof))
    return sorted(set(found))


def test_only_the_gate_lets_a_qemu_run_its_guest() -> None:
    found = [(file, function) for file, function, _, _ in uses(AGENT, "cont")]
    assert found == [("core/gate.py", "let_run"), ("domains/qemu.py", "cont")]  # the latter is that of all other QEMUs
    wakes = {(file, function) for file, function, _, within in uses(AGENT, "wake") if not getattr(within, "args", None)}
    assert {one for one in wakes if one[0].startswith("core/")} == {("core/gate.py", "wake")}


LETS_RUN = ("cont", "system_wakeup", "cpr-load", "system_reset", "x-exit-preconfig")
"""QMP commands after which a guest may run."""


def test_each_place_that_knows_a_command_that_lets_a_guest_run_is_known() -> None:
    known = {
        (file, function, node.value)
        for file, function, node, _ in places(AGENT)
        if isinstance(node, ast.Constant) and node.value in LETS_RUN
    }
    assert known == {
        ("vm/dialects.py", "choose", "cpr-load"),  # only asks whether QEMU has it
        ("vm/dialects.py", "load", "cpr-load"),
        ("vm/qemu.py", "_refused_a_lock", "cont"),
        ("vm/qemu.py", "powerdown", "system_wakeup"),  # to be powered off
        ("vm/qemu.py", "wake", "system_wakeup"),
        ("vm/shutdown.py", "main", "system_wakeup"),  # likewise, as its unit stops
    }


def test_each_place_that_has_libvirt_let_a_guest_run_is_known() -> None:
    """By a call of libvirt's, or by a yes to its hook; ``create`` starts a domain, about which the hook is asked."""
    known = {
        (file, function, name)
        for file, function, name, within in uses(AGENT / "domains", "resume", "create", "reset", "reboot", "say")
        if isinstance(within, ast.Call) and _used(within.func) == name and file not in ("ask.py", "hook_server.py")
        if name != "say" or (isinstance(word := within.args[0], ast.Constant) and word.value == "")
    }
    assert known == {
        ("connection.py", "create", "create"),
        ("place.py", "settle", "say"),  # of a guest that stays paused, or that an act has let start afresh
        ("place.py", "_create", "create"),
        ("place.py", "start", "say"),  # afresh: the guest runs already
        ("qemu.py", "_go_on", "say"),
        ("qemu.py", "cont", "resume"),
    }


def test_each_caller_of_the_gate_is_known_with_its_proof() -> None:
    assert through_the_gate(AGENT) == sorted((*caller, proof) for caller, proof in CALLERS.items())


@pytest.mark.parametrize(
    "line",
    [
        "let_run(machine, qemu, Unbroken.PAUSED)",
        "gate.let_run(machine, qemu, Unbroken.PAUSED)",
        "gate.wake(machine, Unbroken.ASLEEP)",
        "on_each(vms, let_run)",
        "from cpr_agent.core.gate import let_run as go",
    ],
)
def test_a_new_caller_is_found_however_it_is_written(tmp_path: Path, line: str) -> None:
    (tmp_path / "bus.py").write_text(f"async def handler(machine, qemu):\n    {line}\n")
    ((file, function, _, _),) = through_the_gate(tmp_path)
    assert (file, function) == ("bus.py", "handler")


def test_each_caller_of_go_on_is_known_with_its_proof() -> None:
    found = [
        (file, function, name, ast.unparse(within.args[3]) if isinstance(within, ast.Call) else "?")
        for file, function, name, within in uses(AGENT, "go_on", "load_and_go_on")
    ]
    assert sorted(found) == sorted((*caller, proof) for caller, proof in GOING_ON.items())


def test_each_reason_for_no_comparison_is_used() -> None:
    used = {proof.removeprefix("Unbroken.") for proof in (*CALLERS.values(), *GOING_ON.values())}
    assert used - {"proof", "proven"} == {one.name for one in Unbroken}


def test_only_a_comparison_makes_a_proof() -> None:
    made = {
        file
        for file, _, name, within in uses(AGENT, "Proven")
        if isinstance(within, ast.Call) and _used(within.func) == name
    }
    assert made == {"core/proof.py"}


# -- what it means --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    bench.vm(lambda vm: vm.start())
    bench.vm(lambda vm: vm.save(SaveRequest()))
    return bench


def spoil(bench: Bench) -> bytes:
    """Somebody writes to the RAM of the saved guest. Returns what was there."""
    with (bench.root / "web1.dax").open("r+b") as ram:
        ram.seek(8192)
        was = ram.read(4096)
        ram.seek(8192)
        ram.write(b"\xaa" * 4096)
    return was


async def state(manager: Manager) -> VmState:
    return manager.vm("web1").state


def test_a_guest_whose_memory_has_changed_is_not_resumed_in_its_old_qemu(bench: Bench) -> None:
    spoil(bench)
    with pytest.raises(MemoryChanged, match=r"its RAM is not what it was: witness \w+ \(sampled\), found \w+"):
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"
    assert bench.run(state) is VmState.HELD
    assert "manifest.json" in bench.files()
    assert bench.runner.violations == []


def test_a_held_guest_is_resumed_once_its_memory_is_right_again(bench: Bench) -> None:
    was = spoil(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.resume())
    with (bench.root / "web1.dax").open("r+b") as ram:
        ram.seek(8192)
        ram.write(was)
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "running"
    assert bench.run(state) is VmState.RUNNING
    assert bench.vm(lambda vm: _held(vm)) is False


async def _held(vm: Vm) -> bool:
    return vm.held() is not None


def test_a_guest_is_held_also_while_its_old_qemu_is_there(bench: Bench) -> None:
    spoil(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.load(LoadRequest()))
    assert bench.qemu().status == "postmigrate"
    assert bench.run(state) is VmState.HELD


def test_a_held_guest_is_given_up_and_its_qemu_ends(bench: Bench) -> None:
    spoil(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.resume())
    bench.vm(lambda vm: vm.discard())
    assert bench.runner.qemus == {}
    assert bench.run(state) is VmState.STOPPED
    assert "manifest.json.discarded" in bench.files()
    bench.vm(lambda vm: vm.start())
    assert bench.run(state) is VmState.RUNNING


def test_a_hold_keeps_no_other_guest_from_a_kexec(bench: Bench) -> None:
    """Its own guest is saved, whether its old QEMU is still there or not."""
    spoil(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.resume())

    async def hook(manager: Manager) -> None:
        bench.kexec.begin()
        await manager.before_kexec().over()

    bench.run(hook)
    assert bench.kexec.promised
    assert bench.run(state) is VmState.HELD


def test_an_agent_that_dies_as_it_ends_a_hold_leaves_none(bench: Bench) -> None:
    """The memory is right again, and the guest is resumed: a hold without a checkpoint would stop it for ever."""
    was = spoil(bench)
    with pytest.raises(MemoryChanged):
        bench.vm(lambda vm: vm.resume())
    with (bench.root / "web1.dax").open("r+b") as ram:
        ram.seek(8192)
        ram.write(was)
    with contextlib.suppress(OSError):
        bench.vm(_resume_while_the_checkpoint_can_not_be_moved)
    assert "held" not in bench.files()
    assert "manifest.json" in bench.files()
    bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "running"


async def _resume_while_the_checkpoint_can_not_be_moved(vm: Vm) -> None:
    """The agent gets no further than to that."""
    aside = Path(vm.machine.live_checkpoint().vmstate.path).with_name("manifest.json.discarded")  # type: ignore[union-attr]
    (aside / "in-the-way").mkdir(parents=True)
    try:
        await vm.resume()
    finally:
        shutil.rmtree(aside)


def test_a_saved_guest_that_could_be_resumed_is_not_given_up(bench: Bench) -> None:
    with pytest.raises(WrongState, match="its QEMU still has the guest"):
        bench.vm(lambda vm: vm.discard())
    assert bench.qemu().status == "postmigrate"


def test_a_disk_that_was_written_to_meanwhile_holds_a_resume_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.define("web1", bench.define_device("web1"))
    bench.runner.disks["web1"] = disk = tmp_path / "disk.img"
    disk.write_bytes(b"before")
    with disk.open("rb"):  # a fake QEMU's files are those of the test
        bench.vm(lambda vm: vm.start())
        bench.vm(lambda vm: vm.save(SaveRequest()))
    disk.write_bytes(b"written by somebody else")
    with pytest.raises(DiskChanged, match="size_bytes"):
        bench.vm(lambda vm: vm.resume())
    assert bench.qemu().status == "postmigrate"
    assert bench.run(state) is VmState.HELD


def test_the_gate_itself_refuses_what_is_held_or_could_still_be_loaded(bench: Bench) -> None:
    async def through(vm: Vm) -> list[str]:
        machine, refused = vm.machine, []
        qemu = machine.require_qemu()
        for proof in (Proven("of another"), Unbroken.PAUSED):
            try:
                await gate.let_run(machine, qemu, proof)
            except ProofFailed as error:
                refused.append(error.what)
        return refused

    assert ["could still be loaded" in what for what in bench.vm(through)] == [True, True]
    spoil(bench)
    with pytest.raises(CprError):
        bench.vm(lambda vm: vm.resume())
    assert [what.startswith("is held: ") for what in bench.vm(through)] == [True, True]
    assert bench.qemu().status == "postmigrate"
