# SPDX-License-Identifier: GPL-2.0-or-later
"""Host VMs that run at once, and the playbook as an admin runs it on them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scripts.guest.console import ConsoleReport, read_console
from tests.host_vm import ROOT, scenario_command

PLAYBOOK = ROOT / "packaging/ansible/upgrade-hosts.yml"
BOOT_TIMEOUT_S = 600
VERDICT_TIMEOUT_S = 300
SSH_TIMEOUT_S = 120
PLAY_TIMEOUT_S = 1800
LIFE_S = 3600
"""Of a host VM: longer than the test takes."""


class Boot(NamedTuple):
    """Which one a host is in; ``number`` is how many there were."""

    kernel: str
    boot_id: str
    number: int


class Host:
    """A host VM of fleet-scenario, with an SSH server at a port of this machine."""

    def __init__(self, name: str, key: Path) -> None:
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._key = key
        self._up = threading.Event()

    @contextmanager
    def running(self, guests: Path) -> Iterator[None]:
        """From its start to its verdict, which is a pass unless something is raised meanwhile."""
        payload = [guests / "tiny.elf", self._key.with_suffix(".pub")]
        options = ("--allow-reboot", "--memory=2G", f"--port={self.port}:22")
        scenario = Path(__file__).parent / "fleet-scenario"
        _, command = scenario_command(scenario, f"fleet/{self.name}", payload, LIFE_S, *options)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            screen = threading.Thread(target=self._show, args=[run])
            screen.start()
            verdict = 1
            try:
                yield
                verdict = 0
            finally:
                self._end(run, verdict)
                screen.join()
        assert run.returncode == verdict

    def until_up(self) -> None:
        """Wait until its guest runs, and its SSH server."""
        assert self._up.wait(BOOT_TIMEOUT_S), f"{self.name} is not up"

    def _show(self, run: subprocess.Popen[str]) -> None:
        """Until it ends."""
        assert run.stdout is not None
        for line in run.stdout:
            print(f"{self.name} {line}", end="", flush=True)
            if "fleet: up" in line:
                self._up.set()

    def _end(self, run: subprocess.Popen[str], verdict: int) -> None:
        try:
            self.ssh("systemd-run", "--quiet", "--no-block", "host-vm-verdict", str(verdict))
            run.wait(VERDICT_TIMEOUT_S)
        except subprocess.SubprocessError as error:
            print(f"{self.name} takes no verdict: {error}")
            run.terminate()

    @property
    def ssh_options(self) -> list[str]:
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ServerAliveInterval=10")
        return [word for option in options for word in ("-o", option)]

    def ssh(self, *command: str) -> str:
        """Its output. Raises subprocess.SubprocessError."""
        return subprocess.run(
            ["ssh", "-i", self._key, "-p", str(self.port), *self.ssh_options, "root@127.0.0.1", *command],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SSH_TIMEOUT_S,
        ).stdout

    @property
    def boot(self) -> Boot:
        files = ("/proc/sys/kernel/osrelease", "/proc/sys/kernel/random/boot_id", "/var/lib/host-vm/boot")
        kernel, boot_id, count = self.ssh("cat", *files).split()
        return Boot(kernel, boot_id, int(count))

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.ssh("cprctl", "status", "--json")))

    @property
    def guest(self) -> ConsoleReport:
        """All that its guest has ever said, in a moment at which it says more."""
        self.ssh("tail -n 0 -f /srv/consoles/tiny.log | grep -m 2 count=")
        log = ROOT / f"build/fleet/{self.name}.console"
        log.write_text(self.ssh("cat", "/srv/consoles/tiny.log"))
        return read_console(log)

    def variables(self) -> dict[str, Any]:
        """For the inventory."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self._key),
            "ansible_ssh_common_args": " ".join(self.ssh_options),
            "ansible_python_interpreter": "/usr/bin/python3",
        }


@dataclass(frozen=True)
class Play:
    """How a run of the playbook ended."""

    code: int
    said: str
    summary: list[dict[str, Any]]
    table: str

    @property
    def results(self) -> dict[str, str]:
        return {one["host"]: one["result"] for one in self.summary}

    @property
    def failed(self) -> dict[str, str]:
        """Hosts that failed, and why."""
        return dict(re.findall(r'^fatal: \[(\S+)\]: FAILED! => .*"msg": "(.*)"}$', self.said, re.MULTILINE))

    @property
    def changed(self) -> dict[str, int]:
        """Tasks that changed something, of each host that was reached."""
        recap = self.said.partition("PLAY RECAP")[2]
        return {host: int(count) for host, count in re.findall(r"^(\S+) .*changed=(\d+)", recap, re.MULTILINE)}


class Controller:
    """Where the admin sits; what it keeps is below ``home``."""

    def __init__(self, home: Path, hosts: Mapping[str, Mapping[str, object]], playbook: Path = PLAYBOOK) -> None:
        home.mkdir(exist_ok=True)
        self._home = home
        self._playbook = playbook
        self._inventory = home / "hosts.json"
        self._inventory.write_text(json.dumps({"kvm_hosts": {"hosts": hosts}}))

    def play(self, *options: str, **settings: object) -> Play:
        """Run it with these settings of the role, shown as it goes."""
        report = self._home / "report"
        subprocess.run(["rm", "-rf", report], check=True)
        extra = {f"cpr_agent_upgrade_{name}": value for name, value in {"report_dir": str(report), **settings}.items()}
        command = [
            *(str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self._inventory)),
            *("-e", json.dumps(extra), *options, str(self._playbook)),
        ]
        print("\n$ ansible-playbook", *options, json.dumps(settings), flush=True)
        with subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            limit = threading.Timer(PLAY_TIMEOUT_S, run.terminate)
            limit.start()
            said = _shown(run)
            limit.cancel()
        summary = report / "summary.json"
        records = json.loads(summary.read_text()) if summary.exists() else []
        return Play(run.returncode, said, records, (report / "summary.txt").read_text() if records else "")

    @property
    def _environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_HOME": str(self._home / "ansible"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_NOCOLOR": "true",
            "ANSIBLE_ROLES_PATH": str(PLAYBOOK.parent / "roles"),
            "ANSIBLE_PIPELINING": "true",
            # An admin may have this; it must not start an upgrade twice.
            "ANSIBLE_SSH_RETRIES": "3",
            "ANSIBLE_TIMEOUT": "60",
            "LC_ALL": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
        }


def _shown(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        print(line, end="", flush=True)
        said.append(line)
    return "".join(said)
