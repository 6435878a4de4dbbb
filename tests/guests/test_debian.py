# SPDX-License-Identifier: GPL-2.0-or-later
"""A Debian guest with systemd, four CPUs, a disk under load and a TCP connection: saved, loaded, and given a new QEMU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.guest.console import read_console
from scripts.hostvm.image import find_image
from scripts.hostvm.vm import pack_payload
from tests.bus.conftest import qemu_of
from tests.guests.debian import HERE, Debian, Nic, command_line, judge, network, rebase
from tests.guests.tally import case
from tests.guests.test_refresh import installed, refresh, version
from tests.host_vm import run_scenario
from tests.lab import Lab, refused

NIC = "virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56"
TAP = "tap,id=net0,ifname=cpr0,script=no,downscript=no"


@contextlib.contextmanager
def debian(lab: Lab, qemu: str, *, queues: int = 1, smp: int = 4) -> Iterator[Debian]:
    """Its tap device has one queue, or is made for several."""
    nic = Nic(TAP, NIC)
    if queues > 1:
        nic = Nic(f"{TAP},queues={queues}", f"{NIC},mq=on,vectors={2 * queues + 2}")
    with network("cpr0", *(["multi_queue"] if queues > 1 else [])) as namespace:
        guest = Debian(lab, namespace, nic, qemu, smp)
        try:
            yield guest
        finally:
            guest.close()


@pytest.mark.parametrize("version", ["10.0", "11.1"])
def test_saved_and_loaded(lab: Lab, version: str) -> None:
    with debian(lab, qemu_of(version)) as one:
        with case(f"a Debian guest under load, saved and loaded on {version}"):
            one.guest.save()
            one.guest.load()
            one.goes_on()
        with case(f"a Debian guest under load, saved and taken back on {version}"):
            one.guest.save()
            one.guest.call("Resume")
            one.goes_on()
            one.shut_down()


@pytest.mark.parametrize("queues", [1, 2])
def test_a_new_qemu_where_there_is_a_tap_device(lab: Lab, queues: int) -> None:
    """Two QEMUs can't have it at once; with several queues a second one could open it, and would cut the first one off."""
    installed(lab, "10.0")
    with debian(lab, str(lab.root / "qemu"), queues=queues) as one:
        before = one.guest.pid
        with case(f"a Debian guest with a tap device of {queues} queues, refreshed beside"):
            why = "two at once can't have the tap device cpr0. Its guest goes on in the QEMU that it had"
            assert "cprctl refresh --in-turn debian" in refused(one.guest, "LoadFailed", why, member="Refresh")
            assert one.guest.pid == before
            one.goes_on()
        with case(f"a Debian guest under load, refreshed in turn, {queues} queues"):
            refresh(one.guest, "--in-turn")
            assert one.guest.pid != before
            one.goes_on()
        with case("a newer QEMU, that reads the guest's state or (docs/guests.md) does not"):
            installed(lab, "11.1")
            done = lab.cprctl("refresh", "debian", "--in-turn")
            print(done.stderr)
            if done.returncode:
                assert "It stays saved: its old QEMU could not be kept (a wrapper" in done.stderr
                assert "It was saved by QEMU 10.0" in done.stderr
                installed(lab, "10.0")
                one.guest.load()
            one.goes_on()
            one.shut_down()


def test_two_new_qemus_one_after_the_other(lab: Lab) -> None:
    """One CPU: with more of them QEMU 7.2 would corrupt this guest's kernel by itself."""
    installed(lab, "7.2")
    with debian(lab, str(lab.root / "qemu"), smp=1) as one:
        for newer in ("10.0", "11.1"):
            with case(f"a Debian guest under load that 7.2 has booted, refreshed to {newer}"):
                installed(lab, newer)
                refresh(one.guest, "--in-turn")
                assert version(one.guest) == newer
                one.goes_on()
        one.shut_down()


def test_a_kexec_of_its_host(tmp_path: Path) -> None:
    """In the host VM. Its TCP peer would be on that host, so there is none."""
    image, payload, words = find_image(), tmp_path / "debian.tar", tmp_path / "command-line"
    pack_payload(payload, HERE / "debian-guest")
    words.write_text(command_line())
    with case("a Debian guest under load, through a kexec of its host"):
        scenario, files = HERE / "debian-kexec-scenario", [payload, words, HERE / "scenario-lib"]
        out, verdict = run_scenario(scenario, "test-debian", files, 2000, f"--disk=debian={image.base}")
        assert verdict == 0, f"see {out}"
        console, disk = out / "artefacts/debian.log", out / "artefacts/debian.qcow2"
        report = read_console(console, min_lines=10)
        assert report.problems == (), str(report)
        rebase(image, disk)
        judge(image, console, disk, tmp_path)
        disk.unlink()
