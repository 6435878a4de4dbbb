# SPDX-License-Identifier: GPL-2.0-or-later
"""The check of a saved guest tells what its load would refuse, before somebody needs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import FileDigest, Finding, Located, Manifest, Ram
from cpr_agent.core.vm import Vm
from cpr_agent.errors import CprError
from cpr_agent.files import digest_of
from tests.bench import Bench


class _WithFirmware(Bench):
    """Whose checkpoint names a file that no copy was kept of."""

    def digest(self) -> FileDigest:
        path = self.root / "bios.bin"
        with path.open("rb") as file:
            sha256, size_bytes = digest_of(file, 1 << 20)
        return FileDigest(path=str(path), sha256=sha256, size_bytes=size_bytes)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A saved VM with a disk, whose QEMU is there."""
    bench = _WithFirmware(tmp_path)
    bench.define("web1")
    bench.runner.disks["web1"] = disk = tmp_path / "disk.img"
    disk.write_bytes(b"disk")
    (tmp_path / "bios.bin").write_bytes(b"bios")
    with disk.open("rb"):  # a fake QEMU's files are those of the test
        bench.vm(lambda vm: vm.start())
        bench.vm(lambda vm: vm.save(SaveRequest()))
        store = bench.ports().store
        manifest = store.live("web1")
        assert manifest
        _write(bench, replace(manifest, qemu=replace(manifest.qemu, firmware=(bench.digest(),))))
        yield bench


def _write(bench: Bench, manifest: Manifest) -> None:
    pending = bench.ports().store.reopen("web1", manifest.vmstate.path)
    pending.commit(manifest)


def errors(bench: Bench) -> list[Finding]:
    found = bench.run(lambda manager: manager.vm_findings("web1"))
    return [one for one in found if one.severity == "error"]


def replaced(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.write_bytes(path.with_suffix(".old").read_bytes())


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))


def written(path: Path) -> None:
    path.write_bytes(b"other")


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FILES = ("disk.img", "web1.ram", "bios.bin", "checkpoints/web1/vmstate")
CHANGES = [
    ("disk.img", moved, "DiskChanged"),
    ("disk.img", written, "DiskChanged"),
    ("web1.ram", moved, "DeviceMissing"),
    ("web1.ram", replaced, "MemoryChanged"),
    ("bios.bin", moved, "MachineChanged"),
    ("bios.bin", written, "MachineChanged"),
    ("checkpoints/web1/vmstate", moved, "NotVmstate"),
    ("checkpoints/web1/vmstate", cut_off, "ProofFailed"),
]


@pytest.mark.parametrize("live", [True, False], ids=["its QEMU there", "its QEMU gone"])
def test_a_saved_guest_that_could_be_loaded_has_no_errors(bench: Bench, live: bool) -> None:  # noqa: FBT001
    if not live:
        bench.runner.end("web1")
    assert errors(bench) == []


@pytest.mark.parametrize(("name", "change", "code"), CHANGES)
def test_what_a_load_would_refuse_is_found(bench: Bench, name: str, change: Callable[[Path], None], code: str) -> None:
    bench.runner.end("web1")
    before = sorted(bench.files())
    change(bench.root / name)
    found = errors(bench)
    assert [one.code for one in found] == [code], found
    assert all(one.remedy for one in found), found
    assert sorted(bench.files()) == before or name.startswith("checkpoints")

    async def load(vm: Vm) -> str:
        with pytest.raises(CprError) as caught:
            await vm.load(LoadRequest())
        return caught.value.kind

    assert bench.vm(load) == code


def test_each_thing_that_is_wrong_is_found_at_once(bench: Bench) -> None:
    bench.runner.end("web1")
    for name in FILES:
        moved(bench.root / name)
    assert {one.code for one in errors(bench)} == {"DiskChanged", "DeviceMissing", "MachineChanged", "NotVmstate"}


def test_of_a_guest_that_goes_on_meanwhile_nothing_is_told(bench: Bench) -> None:
    async def story(manager: Manager) -> list[Finding]:
        moved(bench.root / "bios.bin")
        ports = manager.vm("web1").machine.ports
        look = ports.memory.relocate

        async def relocate(memory: Ram, timeout_s: float) -> list[Located]:
            ports.memory.relocate = look  # type: ignore[method-assign]  # the resume looks too
            await manager.vm("web1").resume()
            return await look(memory, timeout_s)

        ports.memory.relocate = relocate  # type: ignore[method-assign, assignment]  # the moment between two looks
        return await manager.vm_findings("web1")

    assert [one for one in bench.run(story) if one.severity == "error"] == []
