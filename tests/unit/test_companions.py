# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs beside a QEMU, by its command line; and what an act says of them, and of a QEMU that a signal has ended."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path

import pytest

from cpr_agent.core import machine
from cpr_agent.core.checks import check_vm
from cpr_agent.core.endings import ending
from cpr_agent.core.model import Companion, VmState
from cpr_agent.core.vm import Vm
from cpr_agent.errors import LoadFailed, QemuFailed, QemuRefused
from cpr_agent.vm.blockers import tpm_blockers
from cpr_agent.vm.companions import companions, missing, unsaveable
from cpr_agent.vm.dialects import with_cause
from cpr_agent.vm.networks import forbidden_programs
from tests.bench import Bench
from tests.samples import launch
from tests.scripted_qmp import ScriptedQmp

TPM = ("-chardev", "socket,id=ct,path=/run/tpm", "-tpmdev", "emulator,id=t0,chardev=ct", "-device", "tpm-crb,tpmdev=t0")


@pytest.mark.parametrize(
    ("arguments", "name", "where", "ends", "shared"),
    [
        (TPM, "swtpm", "/run/tpm", True, False),
        (
            ("-chardev", "socket,id=fs,path=/run/fs", "-device", "vhost-user-fs-pci,chardev=fs,tag=x"),
            "virtiofsd",
            "/run/fs",
            True,
            False,
        ),
        (("-chardev", "socket,id=log,host=log,port=7"), "the server of the character device log", "log:7", False, True),
        (
            ("-netdev", "stream,id=n,addr.type=unix,addr.path=/run/passt"),
            "the peer of the network n",
            "/run/passt",
            False,
            False,
        ),
        (("-netdev", "socket,id=n,connect=127.0.0.1:7"), "the peer of the network n", "127.0.0.1:7", False, False),
        (("-drive", "file=nbd+unix:///x?socket=/run/nbd,format=raw"), "the NBD server", "/run/nbd", False, False),
        (("-drive", "file=nbd:unix:/run/nbd:exportname=x"), "the NBD server", "/run/nbd", False, False),
        (("-drive", "file=nbd://store:10809/x"), "the NBD server", "store:10809", False, False),
        (("-drive", "file=nbd:store:10809"), "the NBD server", "store:10809", False, False),
        (
            ("-drive", "file.driver=nbd,file.server.type=inet,file.server.host=s,file.server.port=1"),
            "the NBD server",
            "s:1",
            False,
            False,
        ),
        (("-drive", "file.driver=nbd,file.host=s"), "the NBD server", "an address of its own", False, False),
        (
            ("-blockdev", json.dumps({"driver": "nbd", "server": {"path": "/run/nbd"}})),
            "the NBD server",
            "/run/nbd",
            False,
            False,
        ),
        (("-nic", "socket,connect=127.0.0.1:7"), "the peer of the network (passt", "127.0.0.1:7", False, False),
        (("-nic", "stream,addr.type=unix,addr.path=/run/p"), "the peer of the network (passt", "/run/p", False, False),
        (("-net", "socket,connect=127.0.0.1:7"), "the peer of the network (passt", "127.0.0.1:7", False, False),
        (("-serial", "tcp:log:7"), "the server of -serial", "log:7", False, True),
        (("-serial", "mon:telnet:127.0.0.1:7,server=off"), "the server of -serial", "127.0.0.1:7", False, True),
        (("-parallel", "unix:/run/p"), "the server of -parallel", "/run/p", False, True),
        (("-hda", "nbd:unix:/run/nbd"), "the NBD server", "/run/nbd", False, False),
        (("-cdrom", "nbd://store:10809/x"), "the NBD server", "store:10809", False, False),
        (("-drive", 'file=json:{"driver":"nbd",,"host":"s",,"port":"1"}'), "the NBD server", "s:1", False, False),
        (("-hda", "json:{'file': {'driver': 'nbd', 'path': '/run/nbd'}}"), "the NBD server", "/run/nbd", False, False),
    ],
)
def test_what_a_command_line_needs(arguments: tuple[str, ...], name: str, where: str, *, ends: bool, shared: bool) -> None:
    found = companions(("qemu", "-nodefaults", *arguments, "-S"))
    assert [(one.where, one.ends, one.shared, one.listens) for one in found] == [(where, ends, shared, True)]
    assert found[0].name.startswith(name)
    assert found[0].is_local == where.startswith(("/", "127."))


@pytest.mark.parametrize(
    "arguments",
    [
        ("-chardev", "socket,id=c,path=/run/c,server=on,wait=off", "-serial", "chardev:c"),
        ("-chardev", "socket,id=c,fd=11,server=on"),
        ("-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=/run/n"),
        ("-netdev", "socket,id=n,listen=:1"),
        ("-netdev", "user,id=n"),
        ("-nic", "socket,listen=:1"),
        ("-serial", "tcp::7,server=on,wait=off"),
        ("-serial", "unix:/run/s,server"),
        ("-serial", "stdio"),
        ("-serial", "tcp:7"),
        ("-hda", "/srv/nbd"),
        ("-drive", 'file=json:{"driver"'),
        ("-drive", "file=/srv/nbd,format=raw"),
        ("-blockdev", '{"driver": "file", "filename"'),
    ],
)
def test_what_needs_nobody(arguments: tuple[str, ...]) -> None:
    assert companions(("qemu", *arguments)) == []


def test_who_connects_to_qemu_is_not_waited_for(tmp_path: Path) -> None:
    argv = ("qemu", "-chardev", f"socket,id=c,path={tmp_path}/c,server=on", "-netdev", "vhost-user,id=n,chardev=c")
    (port,) = companions(argv)
    assert not port.listens
    assert asyncio.run(missing([port], 0.0)) == []
    assert [why.partition(" shares")[0] for why in unsaveable(argv)] == ["-netdev vhost-user"]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("-device", "vhost-user-fs-pci,chardev=c"), "-device vhost-user-fs-pci"),
        (("-device", '{"driver":"vhost-user-blk-pci","chardev":"c"}'), "-device vhost-user-blk-pci"),
        (("-netdev", '{"type":"vhost-user","id":"n","chardev":"c"}'), "-netdev vhost-user"),
        (("-nic", "vhost-user,chardev=c"), "-nic vhost-user"),
        (("-nic", "model=e1000,type=vhost-user,chardev=c"), "-nic vhost-user"),
        (("-net", "vhost-user,chardev=c"), "-net vhost-user"),
        (("-object", "cryptodev-vhost-user,id=v,chardev=c"), "-object cryptodev-vhost-user"),
        (("-object", '{"qom-type":"vhost-user-backend","id":"v","chardev":"c"}'), "-object vhost-user-backend"),
    ],
)
def test_every_form_of_vhost_user_is_refused_before_a_save(arguments: tuple[str, str], kind: str) -> None:
    argv = ("qemu", "-chardev", "socket,id=c,path=/run/c", *arguments)
    assert [why.partition(" shares")[0] for why in unsaveable(argv)] == [kind]
    assert [(one.where, one.shared) for one in companions(argv)] == [("/run/c", False)]


def test_what_is_no_vhost_user_can_be_saved() -> None:
    kept = ("-device", "vhost-vsock-pci,guest-cid=3", "-nic", "user,id=vhost-user", "-object", "rng-random,id=vhost-user-x")
    assert unsaveable(("qemu", *kept, "-chardev", "null,id=vhost-user-x")) == []


@pytest.mark.parametrize(
    ("arguments", "listens"),
    [
        (("-chardev", "socket,id=c,path=/run/c,reconnect=1"), False),
        (("-serial", "unix:/run/c,reconnect=1"), False),
        (("-chardev", "socket,id=c,path=/run/c,reconnect-ms=100"), False),
        (("-chardev", "socket,id=c,path=/run/c,reconnect=0"), True),
        (("-netdev", "stream,id=n,server=off,addr.type=unix,addr.path=/run/n,reconnect=1"), False),
        (("-netdev", '{"type": "stream", "id": "n", "addr": {"path": "/run/n"}, "reconnect-ms": 9}'), False),
    ],
)
def test_who_may_come_later_is_not_waited_for(arguments: tuple[str, ...], *, listens: bool) -> None:
    assert [one.listens for one in companions(("qemu", *arguments))] == [listens]


def test_a_socket_that_is_there_is_not_missing(tmp_path: Path) -> None:
    there, gone = (Companion(name="x", where=str(tmp_path / name)) for name in ("there", "gone"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(there.where)
        elsewhere = Companion(name="x", where="store:10809")
        assert asyncio.run(missing([there, gone, elsewhere], 0.01)) == [gone]


@pytest.mark.parametrize(
    ("sandbox", "network", "forbidden"),
    [
        ((), "tap,id=n,ifname=t0", True),
        ((), "tap,id=n,ifname=t0,script=no", False),
        ((), "tap,id=n,fd=3", False),
        ((), "type=bridge,id=n", True),
        ((), "user,id=n", False),
        ((), '{"type": "tap", "id": "n", "helper": "/h"}', True),
        ((), '{"type', False),
        (("-sandbox", "off"), "bridge,id=n", False),
        (("-sandbox", "on"), "bridge,id=n", False),
        (("-sandbox", "on,spawn=deny"), "bridge,id=n", True),
    ],
)
def test_programs_that_its_sandbox_forbids(sandbox: tuple[str, ...], network: str, *, forbidden: bool) -> None:
    assert bool(forbidden_programs((*sandbox, "-netdev", network))) == forbidden


def with_tpm(root: Path) -> Bench:
    bench = Bench(root)
    bench.define("web1")
    path = bench.definitions / "web1.toml"
    words = [word.replace("/run/tpm", str(root / "tpm")) for word in TPM]
    path.write_text(path.read_text().replace("[vm]\n", f"[vm]\narguments = {json.dumps(words)}\n"))
    return bench


def test_one_that_ends_rules_a_refresh_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "COMPANION_S", 0.01)
    bench = with_tpm(tmp_path)
    bench.vm(lambda vm: vm.start())
    with pytest.raises(LoadFailed, match="swtpm at .*/tpm serves one QEMU, and ends with it.*`cprctl save web1`"):
        bench.vm(lambda vm: vm.replace_qemu())
    assert bench.qemu().status == "running"

    async def check(vm: Vm) -> list[str]:
        return [found.what for found in await check_vm(vm, vm.machine.ports, [], {}) if found.code == "companion"]

    assert bench.vm(check) == [f"it needs swtpm at {tmp_path}/tpm, which ends with its QEMU"]


def test_one_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "COMPANION_S", 0.01)
    bench = with_tpm(tmp_path)
    bench.runner.faults["web1", "connect"] = QemuFailed(f"can't connect to {tmp_path}/tpm", vm="web1")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(QemuFailed, match=f"Start swtpm at {tmp_path}/tpm first, by a unit"),
    ):
        bench.vm(lambda vm: vm.start())
    assert f"VM web1: not there yet: swtpm at {tmp_path}/tpm" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "filename", "said"),
    [
        (TPM, "unix:/run/tpm", []),
        (TPM, "disconnected:unix:/run/tpm", ["swtpm at /run/tpm has ended"]),
        (("-chardev", "socket,id=ct,fd=25", *TPM[2:]), "disconnected:unix:", ["swtpm has ended"]),
        (("-chardev", "socket,id=ct,path=/run/log,reconnect=1"), "disconnected:unix:/run/log", []),
    ],
)
def test_a_tpm_that_has_ended_is_told_before_a_save(arguments: tuple[str, ...], filename: str, said: list[str]) -> None:
    """QEMU alone knows: a socket stays in its directory when a signal has ended who made it."""
    qmp = ScriptedQmp(lambda *_: [{"label": "ct", "filename": filename}, {"label": "other", "filename": "disconnected:x"}])
    found = asyncio.run(tpm_blockers(qmp, launch(base_argv=("qemu", *arguments))))
    assert [why.partition(",")[0] for why in found] == said
    assert all("start swtpm, and start the guest afresh" in why for why in found)


def test_a_tpm_that_gives_no_state_is_named() -> None:
    assert "(swtpm does not give the TPM's state" in with_cause("pre-save failed: tpm-emulator")


def test_every_signal_has_its_words() -> None:
    assert ending(0).said == ""
    assert ending(31).said == "it was ended by SIGSYS: its sandbox forbids a system call that it made"
    assert ending(10).said == "it was ended by SIGUSR1"
    assert ending(63).said == "it was ended by signal 63"


@pytest.mark.parametrize("refused", [False, True])
def test_a_qemu_that_a_signal_ends_at_its_start_is_told(tmp_path: Path, *, refused: bool) -> None:
    bench = Bench(tmp_path)
    bench.define("web1")
    kind = QemuRefused if refused else QemuFailed
    bench.runner.faults["web1", "connect"] = kind("no QMP", vm="web1")
    bench.runner.signals["web1"] = 31
    with pytest.raises(QemuFailed, match="no QMP: it was ended by SIGSYS: its sandbox.*type=1326"):
        bench.vm(lambda vm: vm.start())


def test_a_qemu_that_a_signal_ends_later_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.define("web1")

    async def end(vm: Vm) -> None:
        await vm.start()
        bench.runner.signals["web1"] = 9
        bench.runner.qemus.pop("web1")
        await vm.refresh()
        assert vm.state is VmState.STOPPED
        assert "its QEMU has ended: it was ended by SIGKILL" in vm.error

    bench.vm(end)
