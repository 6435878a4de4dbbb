# SPDX-License-Identifier: GPL-2.0-or-later
"""Another machine, other firmware, other disks than those that the guest was saved with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.bus.conftest import QEMUS
from tests.bus.test_proof import grow, replace, touch
from tests.corruption.tally import caught, loads
from tests.lab import Guest, Lab, script, until


def kept(lab: Lab, *arguments: str, name: str = "web1", qemu: str | None = None) -> Guest:
    """Saved, and its QEMU gone."""
    guest = lab.guest(name, *arguments, qemu=qemu)
    guest.start()
    guest.until_counts()
    guest.save()
    guest.call("Stop", "s", "hard")
    return guest


def changing(tmp_path: Path, before: str, after: str) -> tuple[str, Path]:
    """A QEMU that another one takes the place of once a file is there: the host's package was changed."""
    changed = tmp_path / "changed"
    return script(tmp_path / "qemu", f"#!/bin/sh\n[ -e {changed} ] && exec {after}\nexec {before}\n"), changed


def noticed(guest: Guest, changed: Path, kind: str, *words: str) -> None:
    """While the other QEMU is there the load is refused; after that the guest goes on."""
    changed.touch()
    caught(guest, kind, *words)
    changed.unlink()
    loads(guest)


def test_a_cpu_feature_that_is_gone(each_lab: Lab, tmp_path: Path) -> None:
    qemu, changed = changing(tmp_path, f'{each_lab.qemu} "$@" -cpu max', f'{each_lab.qemu} "$@" -cpu max,-avx2,-sse4.2')
    guest = kept(each_lab, "-cpu", "max", qemu=qemu)
    noticed(guest, changed, "MachineChanged", "CPU features", "CPUID 7.0.EBX 0x20", "CPUID 1.0.ECX 0x100000")


def test_features_that_the_host_lacks_are_named(each_lab: Lab, tmp_path: Path) -> None:
    """QEMU itself takes them off the model: by name it knows what the host can't do."""
    qemu, changed = changing(tmp_path, f'{each_lab.qemu} "$@"', f'{each_lab.qemu} "$@" -cpu max,-avx2')
    guest = kept(each_lab, "-cpu", "max,-sha-ni", qemu=qemu)
    noticed(guest, changed, "MachineChanged", "CPUID 7.0.EBX 0x20")


def test_a_cpu_that_is_gone(lab: Lab, tmp_path: Path) -> None:
    qemu, changed = changing(tmp_path, f'{lab.qemu} "$@" -smp 2', f'{lab.qemu} "$@" -smp 1')
    guest = kept(lab, qemu=qemu)
    noticed(guest, changed, "MachineChanged", "number of CPUs was 2, is 1")


OLDEST_FIRST = [QEMUS[version] for version in sorted(QEMUS, key=lambda v: tuple(map(int, v.split("."))))]
of_two_generations = pytest.mark.parametrize(("old", "new"), list(pairwise(OLDEST_FIRST)))


@of_two_generations
def test_another_generation_of_qemu(lab: Lab, tmp_path: Path, old: str, new: str) -> None:
    machine = "-machine", "pc-q35-7.2,accel=tcg"
    qemu, changed = changing(tmp_path, f'{new} "$@"', f'{old} "$@"')
    guest = kept(lab, *machine, qemu=qemu)
    noticed(guest, changed, "MachineChanged", "version of QEMU was")
    newer, updated = changing(lab.root, f'{old} "$@"', f'{new} "$@"')
    other = kept(lab, *machine, name="web2", qemu=newer)
    updated.touch()
    loads(other)


@of_two_generations
def test_a_machine_type_that_an_older_qemu_does_not_have(lab: Lab, tmp_path: Path, old: str, new: str) -> None:
    qemu, changed = changing(tmp_path, f'{new} "$@"', f'{old} "$@"')
    guest = kept(lab, qemu=qemu)
    noticed(guest, changed, "LoadFailed", "unsupported machine type")


def test_the_same_qemu_in_another_file(lab: Lab, tmp_path: Path) -> None:
    qemu = script(tmp_path / "qemu", f'#!/bin/sh\nexec {lab.qemu} "$@"\n')
    guest = kept(lab, qemu=qemu)
    shutil.copy(qemu, tmp_path / "copy")
    (tmp_path / "copy").rename(qemu)
    loads(guest)


def test_arguments_that_were_edited(lab: Lab) -> None:
    """The recorded ones count, whatever the definition says by now."""
    guest = kept(lab)
    guest.definition["vm"]["arguments"] += ["-smp", "4", "-device", "no-such-device"]
    lab.define(guest)
    loads(guest)


def nvram(lab: Lab) -> tuple[Path, Path]:
    """SeaBIOS, from a flash; and one with variables, which it does not use. QEMU wants whole sectors."""
    code, variables = lab.root / "code.fd", lab.root / "vars.fd"
    shutil.copy("/usr/share/seabios/bios-256k.bin", code)
    variables.write_bytes(bytes(64 << 10))
    return code, variables


def test_firmware_and_its_variables(lab: Lab) -> None:
    code, variables = nvram(lab)
    guest = kept(
        lab,
        *("-blockdev", f"driver=file,node-name=variables,filename={variables}"),
        *("-machine", "pflash1=variables,pflash0=code"),
        *("-blockdev", f"driver=file,node-name=code,filename={code},read-only=on"),
    )
    for path in (code, variables):
        content, times = path.read_bytes(), path.stat()
        with path.open("r+b") as file:
            file.write(b"other")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        text = caught(guest, "MachineChanged", f"{path}: SHA-256 was")
        assert text.count("SHA-256") == 1
        with path.open("r+b") as file:
            file.write(content[:5])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    loads(guest)


@pytest.fixture
def image(lab: Lab) -> Path:
    path = lab.root / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


@pytest.mark.parametrize(("change", "said"), [(touch, "mtime_ns"), (grow, "size_bytes"), (replace, "inode")])
def test_a_disk(lab: Lab, image: Path, change: Callable[[Path], None], said: str) -> None:
    guest = kept(lab, "-drive", f"file={image},if=virtio,format=qcow2")
    change(image)
    caught(guest, "DiskChanged", f"{image}: {said} was")


def test_a_disk_on_the_network_that_grew(lab: Lab) -> None:
    """Of one behind nbd the size is all that tells."""
    raw, socket = lab.root / "disk.raw", lab.root / "nbd"
    raw.write_bytes(bytes(8 << 20))
    serve = ["qemu-nbd", "--format=raw", "--persistent", "--shared=0", f"--socket={socket}", str(raw)]

    def export() -> subprocess.Popen[bytes]:
        server = subprocess.Popen(serve)
        until(socket.exists, "qemu-nbd listens")
        return server

    def end(server: subprocess.Popen[bytes]) -> None:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)

    server = export()
    try:
        guest = kept(lab, "-drive", f"file=nbd+unix:///?socket={socket},if=virtio,format=raw")
        end(server)
        os.truncate(raw, 16 << 20)
        server = export()
        caught(guest, "MachineChanged", "size_bytes was 8388608, is 16777216")
        end(server)
        os.truncate(raw, 8 << 20)
        server = export()
        loads(guest)
        guest.call("Stop", "s", "hard")
    finally:
        end(server)


def test_a_tpm_that_is_gone(each_lab: Lab, tmp_path: Path) -> None:
    tpm_is_gone(each_lab, tmp_path, "tpm-tis,tpmdev=tpm0")


def tpm_is_gone(each_lab: Lab, tmp_path: Path, device: str) -> None:
    """Its state travels in QEMU's file; the swtpm behind the VM ends with QEMU's connection, and is another at the load."""
    socket, state = each_lab.root / "tpm", each_lab.root / "tpm-state"
    state.mkdir()
    tpm = f"-chardev socket,id=tpm,path={socket} -tpmdev emulator,id=tpm0,chardev=tpm -device {device}"
    qemu, changed = changing(tmp_path, f'{each_lab.qemu} "$@" {tpm}', f'{each_lab.qemu} "$@"')

    def emulator() -> subprocess.Popen[bytes]:
        command = ["swtpm", "socket", "--tpm2", f"--tpmstate=dir={state}", f"--ctrl=type=unixio,path={socket}"]
        process = subprocess.Popen(command)
        until(socket.exists, "swtpm listens")
        return process

    first = emulator()
    guest = kept(each_lab, qemu=qemu)
    first.wait()
    second = emulator()
    noticed(guest, changed, "MachineChanged", "TPM was tpm0 tpm-tis emulator, is none")
    guest.call("Stop", "s", "hard")
    second.wait()
