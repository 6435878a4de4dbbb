# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines of libvirt and Proxmox VE: each argument has an outcome, and a real QEMU starts what is kept."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from cpr_agent.core.model import Definition, Imported
from cpr_agent.vm.cmdline import SANDBOX
from cpr_agent.vm.definition import read_definition
from cpr_agent.vm.foreign import split
from cpr_agent.vm.importer import Wanted, import_command_line
from tests.kernel_trees import write

LINES = Path(__file__).parent / "import"
"""``virsh domxml-to-native`` of libvirt 9.0 (offline.argv), what it runs (running.argv); ``qm showcmd`` of Proxmox VE, the
same as ps(1) shows it (ps.txt), and a line with many odd options (other.txt)."""
QEMU = "/usr/bin/qemu-system-x86_64"

ELSEWHERE = {
    r'"driver":"nbd","server":\{[^}]*\},"export":"data"': '"driver":"null-co"',
    r"(rbd|iscsi):[^, ']*|/dev/zvol/[^, ']*": "null-co://",
    r"aio=\w+,?|cache=none,?|,detect-zeroes=on": "",
    r"/usr/share/pve-edk2-firmware//\S+?\.fd": "/usr/share/code.fd",
    r"/dev/pve/vm-114-disk-0,size=540672": "/usr/share/vars.fd",
    r"(-cpu '?)host": r"\1qemu64",
    r",async-teardown=on": "",
    r"pc-q35-9.0\+pve0": "pc-q35-7.2+pve0",
    r",splash=[^, ']*": "",
    r"/run/virtiofsd/web1.sock|/run/ovs/vhu0": "/run/libvirt/gone",
    r"/srv/a.qcow2": "null-co://",
    r"-plugin /usr/lib/x.so": "",
    r"file=/srv/x": "file=/usr/share/x",
}
"""What the machine of a test does not have, and what stands for it: storage elsewhere, KVM, firmware, a newer QEMU."""

PVE_Q35 = """\
[device "ehci"]
  driver = "ich9-usb-ehci1"
  multifunction = "on"
  bus = "pcie.0"
  addr = "1d.7"
[device "pcidmi"]
  driver = "i82801b11-bridge"
  bus = "pcie.0"
  addr = "1e.0"
[device "pci.0"]
  driver = "pci-bridge"
  bus = "pcidmi"
  addr = "1.0"
  chassis_nr = "1"
[device "pci.3"]
  driver = "pci-bridge"
  bus = "pcidmi"
  addr = "4.0"
  chassis_nr = "4"
"""
"""The buses that the guest of ``showcmd`` uses, in the form of the file that makes them there."""


def definition(imported: Imported) -> Definition:
    return read_definition(Path(f"/etc/cpr-agent/vms/{imported.name}.toml"), imported.text.encode())


@pytest.mark.parametrize("name", sorted(path.name for path in LINES.iterdir()))
def test_each_argument_has_an_outcome(name: str) -> None:
    """It is in the definition as it was, or a note names it; the name, the size and where the RAM is have keys of their
    own."""
    text = (LINES / name).read_text()
    imported = import_command_line(text)
    kept = definition(imported).vm.arguments
    pairs = {*pairwise(kept)}
    noted = {note.argument for note in imported.notes}
    for option in split(text).options:
        as_it_was = (option.name, option.text) in pairs if option.text else option.name in kept
        own = option.name in ("-name", "-m")
        assert as_it_was or own or str(option) in noted, option
    assert {note.outcome for note in imported.notes} <= {"left out", "changed", "look"}


@pytest.mark.parametrize("name", sorted(path.name for path in LINES.iterdir()))
def test_no_client_becomes_a_server(name: str) -> None:
    text = (LINES / name).read_text()
    clients = {
        option.value.keys["id"]
        for option in split(text).options
        if option.name == "-chardev" and option.value.first("backend") == "socket" and not option.value.on("server")
    }
    arguments = definition(import_command_line(text)).vm.arguments
    for option in split(shlex.join([QEMU, *arguments])).options:
        assert not (option.name == "-chardev" and option.value.keys["id"] in clients and option.value.on("server")), option


@pytest.mark.parametrize("name", sorted(path.name for path in LINES.iterdir()))
def test_what_is_kept_starts(tmp_path: Path, name: str) -> None:
    """In QEMU's sandbox, as the agent would start it; with interfaces of its own in the place of the host's."""
    text = (LINES / name).read_text()
    for there, here in ELSEWHERE.items():
        text = re.sub(there, here, text)
    write(tmp_path / "share/qemu-server/pve-q35-4.0.cfg", PVE_Q35)
    imported = import_command_line(text, Wanted(device="/dev/shm/x"), tmp_path / "share")
    arguments = [on_this_machine(word, tmp_path) for word in definition(imported).vm.arguments]
    assert_starts(QEMU, arguments)


def assert_starts(qemu: str, arguments: Sequence[str]) -> None:
    own = ["-m", "256M", "-S", "-qmp", "stdio", "-display", "none"]
    ended = subprocess.run(
        [qemu, "-sandbox", SANDBOX, *arguments, *own],
        input='{"execute":"qmp_capabilities"}\n{"execute":"quit"}\n',
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert '"QMP"' in ended.stdout


OLD = """-no-kvm -realtime mlock=off -balloon virtio -tb-size 16 -tdf -alt-grab -rtc-td-hack -no-kvm-pit-reinjection
-device sga -drive if=none,id=d,driver=null-co -device virtio-blk-pci,drive=d,scsi=off -chardev tty,id=t,path=/dev/ptmx"""


def test_what_no_qemu_takes_any_more_starts(each_qemu: str) -> None:
    imported = import_command_line(f"{each_qemu} {OLD}", Wanted(device="/dev/shm/x"))
    assert_starts(each_qemu, definition(imported).vm.arguments)


def on_this_machine(word: str, tmp_path: Path) -> str:
    """With files of the test's own for those of the host; its network is QEMU's own, since a test makes no interfaces."""
    if "ifname" in word:
        name: str = re.findall(r'"?id"?[:=]"?(\w+)', word)[0]
        return f'{{"type":"user","id":"{name}"}}'
    if word == "kvm":
        return "tcg"
    word = word.replace("/run/cpr-agent/vm/", f"{tmp_path}/").replace("accel=kvm,kernel-irqchip=split", "accel=tcg")
    for path in re.findall(r'(?:"filename":"|file=)(/(?:usr|var)/[^",]+)', word):
        image = tmp_path / path.strip("/").replace("/", "-")
        if path.endswith(".qcow2"):
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        else:
            image.write_bytes(bytes(512 << 10))
        word = word.replace(path, str(image))
    (tmp_path / "web1").mkdir(exist_ok=True)
    return word
