# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl -H: the agent of another host, through a real sshd and systemd-stdio-bridge."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import PATIENCE_S, Lab, end_bus, private_bus, script, until

SSHD = "/usr/sbin/sshd"
ME = pwd.getpwuid(os.getuid()).pw_name


@dataclass
class Ssh:
    """An sshd of our own on 127.0.0.1, and an ssh that knows it and has its key."""

    port: int
    client: str
    directory: Path

    @property
    def host(self) -> str:
        return f"{ME}@127.0.0.1:{self.port}"

    def cprctl(self, lab: Lab, *arguments: str, host: str = "") -> subprocess.CompletedProcess[str]:
        with lab.cprctl_started("-H", host or self.host, *arguments, CPRCTL_SSH=self.client) as process:
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sshd(directory: Path, command: str) -> Iterator[Ssh]:
    """One that runs ``command`` whatever it is asked for: our bus is not where the bridge would look for it."""
    if os.geteuid() != 0:
        pytest.skip("sshd wants to be root")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its privilege separation directory
    port = free_port()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    shutil.copy(directory / "user.pub", directory / "authorized")
    public = (directory / "host.pub").read_text()
    (directory / "known").write_text(f"[127.0.0.1]:{port} {public}")
    config = f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {directory}/host
        AuthorizedKeysFile {directory}/authorized
        PidFile none
        StrictModes no
        PermitRootLogin yes
        ForceCommand {command}
    """
    (directory / "sshd_config").write_text(config)
    (directory / "ssh_config").write_text(
        f"Host *\nIdentityFile {directory}/user\nUserKnownHostsFile {directory}/known\nStrictHostKeyChecking yes\n"
        "BatchMode yes\n"
    )
    client = script(directory / "ssh", f'#!/bin/sh\nexec ssh -F {directory}/ssh_config "$@"\n')
    with (directory / "sshd.log").open("wb") as log:
        daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", directory / "sshd_config"], stderr=log)
    try:
        until(lambda: "listening" in (directory / "sshd.log").read_text(), "sshd listens")
        yield Ssh(port, client, directory)
    finally:
        daemon.terminate()
        daemon.wait(PATIENCE_S)
        print(f"--- sshd\n{(directory / 'sshd.log').read_text()}")


@pytest.fixture
def ssh(lab: Lab, tmp_path: Path) -> Iterator[Ssh]:
    directory = tmp_path / "ssh"
    directory.mkdir()
    with sshd(directory, f"systemd-stdio-bridge --bus-path={lab.address.partition(',guid=')[0]}") as found:
        yield found


def test_another_hosts_guest_is_saved_and_loaded(lab: Lab, ssh: Ssh) -> None:
    guest = lab.running()
    lab.address, address = "unix:path=/nonexistent/bus", lab.address  # what cprctl would use here
    assert "running" in ssh.cprctl(lab, "list").stdout
    ended = ssh.cprctl(lab, "save", "--all", "--survives", "qemu-restart")
    assert ended.returncode == 0, ended
    assert "web1: saved" in ended.stderr
    ended = ssh.cprctl(lab, "load", "web1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "web1: loaded\n", "")
    assert ssh.cprctl(lab, "status", "none").returncode == 3
    lab.address = address
    guest.assert_unbroken()


def test_a_host_that_can_not_be_reached(lab: Lab, ssh: Ssh) -> None:
    ended = ssh.cprctl(lab, "list", host=f"{ME}@127.0.0.1:{free_port()}")
    assert ended.returncode == 5, ended
    assert "Connection refused" in ended.stderr
    assert "127.0.0.1" in ended.stderr
    ended = ssh.cprctl(lab, "list", "--json", host="nobody-there.invalid")
    assert ended.returncode == 5, ended
    assert '"kind": "NoBus"' in ended.stdout
    assert "nobody-there.invalid" in ended.stderr


def test_a_host_that_does_not_let_us_in(lab: Lab, ssh: Ssh) -> None:
    (ssh.directory / "authorized").write_text("")
    ended = ssh.cprctl(lab, "list")
    assert ended.returncode == 5, ended
    assert "Permission denied" in ended.stderr


def test_what_is_no_host(lab: Lab, ssh: Ssh) -> None:
    for host in ("-oProxyCommand=touch /tmp/x", "a b", "user@host:ssh"):
        ended = ssh.cprctl(lab, "list", host=host)
        assert ended.returncode == 5, ended
        assert "is not a host" in ended.stderr


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-bridge", "has no systemd-stdio-bridge"),
        ("systemd-stdio-bridge --bus-path=unix:path=/nonexistent/bus", "cannot reach the system bus of"),
        ("echo I am no bridge", "cannot reach the system bus of"),
        ("true", "cannot reach the system bus of"),
    ],
)
def test_a_host_without_a_bridge_or_a_bus(lab: Lab, tmp_path: Path, command: str, said: str) -> None:
    with sshd(tmp_path, command) as ssh:
        ended = ssh.cprctl(lab, "list")
    assert ended.returncode == 5, ended
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_without_an_agent(lab: Lab, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with private_bus(elsewhere) as (address, daemon):
        with sshd(tmp_path, f"systemd-stdio-bridge --bus-path={address.partition(',guid=')[0]}") as ssh:
            ended = ssh.cprctl(lab, "list")
            assert ended.returncode == 5, ended
            assert f"See on {ssh.host}: systemctl status cpr-agent.service" in ended.stderr
        end_bus(daemon)


def test_a_connection_that_breaks_is_told(lab: Lab, tmp_path: Path) -> None:
    """The bridge over there ends in the middle of a call: there is an error, and no wait for ever."""
    bridge = f"systemd-stdio-bridge --bus-path={lab.address.partition(',guid=')[0]}"
    directory = tmp_path / "ssh"
    directory.mkdir()
    cut = script(tmp_path / "cut", f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec {bridge}\n")
    gate = tmp_path / "gate"
    guest = lab.guest(qemu=script(tmp_path / "qemu", f'#!/bin/sh\nread line <{gate}\nexec {lab.qemu} "$@"\n'))
    os.mkfifo(gate)
    with sshd(directory, cut) as ssh:
        starting = lab.cprctl_started("-H", ssh.host, "start", "web1", CPRCTL_SSH=ssh.client)
        guest.until_state("starting")
        os.kill(int((tmp_path / "pid").read_text()), 9)
        _, stderr = starting.communicate(timeout=PATIENCE_S)
    assert starting.returncode == 1, stderr
    assert "the connection was lost before Start was answered" in stderr
    gate.write_text("go\n")
    guest.until_state("running")
