# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of run states: it has all that any QEMU's schema has, and the agent says and does what it says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess

import pytest

from cpr_agent.bus.client import CallError
from cpr_agent.core.model import RunState
from cpr_agent.core.run_states import RUN_STATES
from tests.lab import PATIENCE_S, Guest, Lab, refused, until


def schema_of(qemu: str) -> list[dict[str, object]]:
    """A QEMU without a machine tells all its types."""
    said = subprocess.run(
        [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio"],
        input="".join(json.dumps({"execute": one}) for one in ("qmp_capabilities", "query-qmp-schema", "quit")),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    answers = (json.loads(line) for line in said.splitlines())
    return next(answer["return"] for answer in answers if isinstance(answer.get("return"), list))


def test_each_run_state_of_each_qemu_has_its_row(each_qemu: str) -> None:
    """RunState has no name in the schema that is the same in each version: it is the type of query-status's ``status``."""
    entities: dict[object, dict[str, object]] = {one["name"]: one for one in schema_of(each_qemu)}
    members = entities[entities["query-status"]["ret-type"]]["members"]
    assert isinstance(members, list)
    status = next(member["type"] for member in members if member["name"] == "status")
    values = entities[status]["values"]
    assert isinstance(values, list)
    rows = {str(state) for state in RUN_STATES}
    assert {*values} <= rows, {*values} - rows
    assert rows - {*values} == {RunState.PRECONFIG, RunState.UNKNOWN}


def test_there_is_no_run_state_without_a_row() -> None:
    assert {*RunState} - {*RUN_STATES} == {RunState.NONE}
    for state, row in RUN_STATES.items():
        assert row.saves == (state in (RunState.RUNNING, RunState.PAUSED, RunState.SUSPENDED))
        assert row.saves or row.remedy, state


def says_the_same(lab: Lab, guest: Guest, kind: str, *words: str) -> None:
    """Check and save: one does not let pass what the other refuses."""
    refused(guest, kind, *words, member="CprSave")
    checked = lab.cprctl("check", guest.name)
    assert checked.returncode == 4, checked
    for word in words:
        assert word in checked.stdout, checked.stdout


def stopped_by(guest: Guest, state: str) -> None:
    until(lambda: guest.admin("query-status")["status"] == state, state)


def test_a_disk_that_failed(each_lab: Lab) -> None:
    """Read once in vain by the BIOS, as it looks for a system to boot."""
    image = each_lab.root / "d.raw"
    image.write_bytes(b"\0" * 510 + b"\x55\xaa" + bytes(1 << 20))
    rule = "file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,file.inject-error.0.state=2"
    # QEMU itself reads it once, for its geometry.
    rule += "".join(
        f",file.set-state.{n}.event=read_aio,file.set-state.{n}.state={n + 1},file.set-state.{n}.new_state={n + 2}"
        for n in range(2)
    )
    rule += ",file.inject-error.1.event=read_aio,file.inject-error.1.iotype=discard,file.inject-error.1.state=3"
    drive = f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={image},{rule},if=none,id=d0"
    guest = each_lab.guest()
    guest.definition["vm"]["arguments"] = [
        *("-machine", "pc,accel=tcg", "-nodefaults", "-drive", f"{drive},rerror=stop,werror=stop"),
        *("-device", "ide-hd,drive=d0"),
    ]
    each_lab.define(guest)
    guest.start()
    stopped_by(guest, "io-error")
    says_the_same(each_lab, guest, "WrongState", "a disk failed", "io-error", "cprctl resume web1")
    guest.call("Resume")
    assert guest.state == "running"
    guest.save()
    guest.load()
    assert guest.state == "running"


@pytest.mark.parametrize(
    ("device", "command", "state", "words"),
    [
        ("pvpanic", "o /b 0x505 1", "guest-panicked", "kernel panicked"),
        ("ib700", "o /b 0x443 0xf", "watchdog", "watchdog expired"),
    ],
)
def test_a_guest_that_qemu_was_told_to_stop(each_lab: Lab, device: str, command: str, state: str, words: str) -> None:
    """By a port that its kernel would write to."""
    guest = each_lab.running("web1", "-device", device, "-action", "panic=pause,watchdog=pause")
    guest.admin("human-monitor-command", **{"command-line": command})
    stopped_by(guest, state)
    says_the_same(each_lab, guest, "WrongState", words, state, "cprctl resume web1")
    refused(guest, "AlreadyRunning")
    guest.call("Resume")
    guest.assert_unbroken()
    guest.save()
    guest.load()
    guest.assert_unbroken()


STAYS = pytest.mark.parametrize("how", [("-no-shutdown", "-no-reboot"), ("-action", "shutdown=pause,reboot=shutdown")])


@STAYS
def test_a_guest_that_shut_down_in_a_qemu_that_stays(each_lab: Lab, how: tuple[str, ...]) -> None:
    guest = each_lab.running("web1", *how)
    guest.admin("inject-nmi")  # the tiny guest has no handler: a triple fault
    stopped_by(guest, "shutdown")
    says_the_same(each_lab, guest, "WrongState", "has powered off", "cprctl stop web1")
    refused(guest, "WrongState", "nothing to resume", member="Resume")
    guest.call("Stop", "s", "acpi")
    assert guest.state == "stopped"


@STAYS
def test_a_stop_ends_with_its_guest_also_where_qemu_stays(each_lab: Lab, how: tuple[str, ...]) -> None:
    """And not with the time that the definition gives it."""
    guest = each_lab.guest("web1", *how)
    guest.definition["vm"]["shutdown-timeout"] = "1h"
    each_lab.define(guest)
    guest.start()
    guest.until_counts()
    with socket.socket(socket.AF_UNIX) as monitor, monitor.makefile("rw") as stream:
        monitor.settimeout(PATIENCE_S)
        monitor.connect(str(each_lab.run / "vm/web1/admin.sock"))
        print('{"execute": "qmp_capabilities"}', file=stream, flush=True)
        with each_lab.cprctl_started("stop", "web1") as stopping:
            while '"POWERDOWN"' not in stream.readline():
                assert stopping.poll() is None, "the stop has ended before its guest"
            print('{"execute": "inject-nmi"}', file=stream, flush=True)
            assert stopping.wait(PATIENCE_S) == 0
    assert guest.state == "stopped"


@pytest.mark.parametrize("named", [("web1",), ()])
def test_one_that_hangs(each_lab: Lab, named: tuple[str, ...]) -> None:
    """Nor does it keep the check of all from telling of another."""
    guest, other = each_lab.running(), each_lab.running("web2")
    os.kill(guest.pid, signal.SIGSTOP)
    try:
        checked = until_answered(each_lab, "check", *named)
        assert checked.returncode == 4, checked
        assert "does not answer" in checked.stdout
        assert named or "web2 info: The witness of its RAM" in checked.stdout, checked
        other.assert_unbroken()
    finally:
        os.kill(guest.pid, signal.SIGCONT)
    until(lambda: guest.state == "running", "it answers again")
    guest.assert_unbroken()


def until_answered(lab: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """A QEMU that was well a moment ago has 30 s for each answer."""
    with lab.cprctl_started(*words) as process:
        stdout, stderr = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_preconfig_is_refused_before_it_starts(each_lab: Lab) -> None:
    guest = each_lab.guest("web1", "--preconfig")
    with pytest.raises(CallError, match="--preconfig"):
        guest.start()
    assert not guest.pid
