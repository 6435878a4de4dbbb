# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts are upgraded with the Ansible role, one after the other, and left alone where anything speaks against it."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

from tests.fleet.fleet import Controller, Host
from tests.host_vm import ROOT, build_guests

OWN_CHECKS = {"health_commands": ["/srv/own-check"], "health_retries": 1, "health_delay": 1}
"""In fleet-scenario; it fails on a kernel for which there is a file unwell-on-VERSION."""


class Fleet:
    def __init__(self, hosts: list[Host], home: Path) -> None:
        self.hosts = hosts
        self.first, self.second = hosts
        self.admin = Controller(home / "admin", {host.name: host.variables() for host in hosts})

    def refuses_a_kernel_that_is_not_there(self) -> None:
        before = [host.boot for host in self.hosts]
        play = self.admin.play(kernel="5.0")
        assert play.code != 0
        assert "kernel 5.0 is not installed" in play.table
        assert play.results == {self.first.name: "failed", self.second.name: "not begun"}
        assert [host.boot for host in self.hosts] == before

    def stops_nothing_in_check_mode(self, kernel: str) -> None:
        before = [host.boot for host in self.hosts]
        play = self.admin.play("--check", kernel=kernel)
        assert play.code == 0
        assert set(play.results.values()) == {"would be upgraded"}
        assert set(play.changed.values()) == {1}
        for host in self.hosts:
            assert host.status()["LastUpgrade"]["phase"] == "checked"
        assert [host.boot for host in self.hosts] == before

    def is_upgraded(self, kernel: str) -> None:
        """One host after the other: a guest of the second is not stopped before that of the first goes on."""
        play = self.admin.play(kernel=kernel, **OWN_CHECKS)
        assert play.code == 0
        assert set(play.results.values()) == {"upgraded"}
        assert set(play.changed.values()) == {1}
        assert [(host.boot.kernel, host.boot.number) for host in self.hosts] == [(kernel, 2)] * len(self.hosts)
        (earlier,), (later,) = (record["guests"] for record in play.summary)
        assert earlier["resumed-at"] < later["stopped-at"]
        print(play.table)

    def is_left_alone(self, kernel: str) -> None:
        before = [host.boot for host in self.hosts]
        play = self.admin.play(kernel=kernel, **OWN_CHECKS)
        assert play.code == 0
        assert set(play.results.values()) == {"unchanged"}
        assert set(play.changed.values()) == {0}
        assert [host.boot for host in self.hosts] == before

    def stops_at_a_failed_check(self, kernel: str) -> bool:
        """The first host is not well on its new kernel: whether the second is as it was."""
        before = self.second.boot, self.second.status()["LastUpgrade"]
        self.first.ssh("touch", f"/srv/unwell-on-{kernel}")
        play = self.admin.play(kernel=kernel, **OWN_CHECKS)
        assert self.first.boot.kernel == kernel
        assert "/srv/own-check: this host is not well" in play.table
        print(play.table)
        results = {self.first.name: "failed", self.second.name: "not begun"}
        untouched = (self.second.boot, self.second.status()["LastUpgrade"]) == before
        return play.code != 0 and play.results == results and untouched


def test_a_fleet_of_two(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    guests = build_guests(tmp_path / "guests")
    hosts = [Host(name, key) for name in ("kvm1", "kvm2")]
    with ExitStack() as stack:
        for host in hosts:
            stack.enter_context(host.running(guests))
        for host in hosts:
            host.until_up()
        fleet = Fleet(hosts, tmp_path)
        before = [host.boot for host in hosts]
        old = before[0].kernel
        (new,) = {*hosts[0].status()["Kernels"]} - {old}

        fleet.refuses_a_kernel_that_is_not_there()
        fleet.stops_nothing_in_check_mode(new)
        fleet.is_upgraded(new)
        upgraded = [host.boot.kernel for host in hosts].count(new)
        fleet.is_left_alone(new)
        stopped = fleet.stops_at_a_failed_check(old)

        consoles = {host.name: host.guest for host in hosts}
        kept = [report for report in consoles.values() if not report.problems]
        line = (
            f"fleet: hosts {len(hosts)}, upgraded {upgraded}, guests kept {len(kept)} of {len(hosts)}, "
            f"stopped at the first failed check: {'yes' if stopped else 'no'}"
        )
        (ROOT / "build/fleet/summary").write_text(f"{line}\n")
        assert (upgraded, len(kept), stopped) == (2, 2, True), consoles
