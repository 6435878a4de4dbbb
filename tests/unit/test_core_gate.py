# SPDX-License-Identifier: GPL-2.0-or-later
"""No guest runs without its proof in hand (invariant 9): who may let one run, and what a proof is."""

from __future__ import annotations

import ast
import contextlib
import shutil
from collections import Counter
from pathlib import Path

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

AGENT = Path(__file__).parent.parent.parent / "agent/cpr_agent"

CALLERS = {
    ("core/acts/load.py", "go_on", "let_run"): "proof",  # of the load, the undo or the transfer that calls it: below
    ("core/acts/load.py", "_has_gone_on", "wake"): "proof",
    ("core/acts/load.py", "load_and_go_on", "let_run_by_load"): "proof",
    ("core/acts/recover.py", "_finish_resume", "let_run"): "Unbroken.RESUME_ANNOUNCED",
    ("core/acts/replace.py", "undo_transfer", "let_run"): "Unbroken.TRANSFER_UNDONE",
    ("core/acts/resume.py", "_unpause", "let_run"): "Unbroken.PAUSED",
    ("core/acts/resume.py", "take_back", "let_run"): "proven",
    ("core/acts/save.py", "_run_again", "let_run"): "Unbroken.SAVE_UNDONE",
    ("core/acts/save.py", "_run_again", "let_run_by_load"): "Unbroken.SAVE_UNDONE",
    ("core/acts/save.py", "run_after_interrupted_save", "let_run"): "Unbroken.SAVE_INTERRUPTED",
    ("core/acts/sleep.py", "_try_to_wake", "wake"): "Unbroken.ASLEEP",
}
"""Each call of the gate, with its proof. Whoever adds one has thought about invariants 1, 2 and 9."""
GOING_ON = {
    ("core/acts/load.py", "load_into"): "proven",
    ("core/acts/replace.py", "_transfer"): "Unbroken.HANDED_OVER",
    ("core/acts/save.py", "_run_again"): "Unbroken.SAVE_UNDONE",
}
"""The callers of ``go_on``, which hands their proof to the gate."""


def calls(*names: str) -> list[tuple[str, str, ast.Call]]:
    """File, innermost function and call of each function or method so named."""
    found: list[tuple[str, str, ast.Call]] = []
    for path in sorted(AGENT.rglob("*.py")):
        _collect(ast.parse(path.read_text()), str(path.relative_to(AGENT)), "", names, found)
    return found


def _collect(
    node: ast.AST, file: str, function: str, names: tuple[str, ...], found: list[tuple[str, str, ast.Call]]
) -> None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    if isinstance(node, ast.Call) and called(node) in names:
        found.append((file, function, node))
    for child in ast.iter_child_nodes(node):
        _collect(child, file, function, names, found)


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def test_only_the_gate_lets_a_qemu_run_its_guest() -> None:
    found = Counter((file, function) for file, function, _ in calls("cont"))
    assert found == {("core/gate.py", "let_run"): 1}
    wakes = {(file, function) for file, function, node in calls("wake") if isinstance(node.func, ast.Attribute)}
    assert {one for one in wakes if one[0].startswith("core/")} == {("core/gate.py", "wake")}


def test_only_one_method_sends_each_command_that_lets_a_guest_run() -> None:
    """Of the QMP commands: ``cont``, ``system_wakeup``, and ``cpr-load``, which does it by itself."""
    sent = {
        (file, function, node.args[0].value)
        for file, function, node in calls("execute", "ask")
        if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }
    lets_run = {one for one in sent if one[2] in ("cont", "system_wakeup", "cpr-load", "system_reset", "x-exit-preconfig")}
    assert lets_run == {
        ("vm/dialects.py", "load", "cpr-load"),
        ("vm/qemu.py", "cont", "cont"),
        ("vm/qemu.py", "powerdown", "system_wakeup"),
        ("vm/qemu.py", "wake", "system_wakeup"),
    }


def test_each_caller_of_the_gate_is_known_with_its_proof() -> None:
    found = {}
    for file, function, node in calls("let_run", "let_run_by_load", "wake"):
        if isinstance(node.func, ast.Name) and file.startswith("core/"):
            found[file, function, node.func.id] = ast.unparse(node.args[1 if node.func.id == "wake" else 2])
    assert found == CALLERS


def test_each_caller_of_go_on_is_known_with_its_proof() -> None:
    found = {(file, function): ast.unparse(node.args[3]) for file, function, node in calls("go_on", "load_and_go_on")}
    assert found == GOING_ON


def test_each_reason_for_no_comparison_is_used() -> None:
    used = {proof.removeprefix("Unbroken.") for proof in (*CALLERS.values(), *GOING_ON.values())}
    assert used - {"proof", "proven"} == {one.name for one in Unbroken}


def test_only_a_comparison_makes_a_proof() -> None:
    assert {file for file, _, _ in calls("Proven")} == {"core/proof.py"}


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
