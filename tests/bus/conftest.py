# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures: the QEMUs of this machine, the tiny guest, a lab with a running agent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.library import name
from tests.lab import ROOT, Guest, Lab, private_bus

DIALECTS = {"ignore-shared": "7.2", "cpr-reboot": "10.0"}


def _qemus() -> dict[str, str]:
    """Name to path: this machine's own QEMU, that of the host VM's Debian 13, and the newer one of its backports."""
    found = {}

    def wrapper(*options: str) -> str:
        command = ["scripts/host-vm", "qemu-wrapper", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    for path in (shutil.which("qemu-system-x86_64"), wrapper(), wrapper("--newer")):
        if path:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            found[".".join(said.split()[3].split(".")[:2])] = path
    return found


QEMUS = _qemus()


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """The one that `make` says these tests are for, if it says: agent and cprctl take the same."""
    wanted = os.environ.get("CPR_TEST_LIBRARY")
    assert wanted in (None, name()), f"{name()} is what is used here"


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and so would every program that a test interrupts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guest") / "tiny.elf"
    subprocess.run([ROOT / "scripts/guest/build-tiny", out], check=True)
    return out


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with vmlinuz and initrd.img, the kernel from the host VM's root."""
    out = tmp_path_factory.mktemp("guest")
    subprocess.run([ROOT / "scripts/guest/build-all", out], check=True)
    return out


@pytest.fixture(scope="session")
def linux_with_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with Debian's qemu-ga."""
    out = tmp_path_factory.mktemp("guest")
    found = subprocess.run(["scripts/host-vm", "root"], cwd=ROOT, capture_output=True, text=True, check=True)
    root = Path(found.stdout.strip())
    kernel = max(root.glob("boot/vmlinuz-*-cloud-amd64"))
    subprocess.run([ROOT / "scripts/guest/build-linux", out, kernel, "", root], check=True)
    return out


def qemu_of(version: str) -> str:
    if version not in QEMUS:
        missing = f"no QEMU {version} here (found: {', '.join(QEMUS) or 'none'}); build it with: make host-root"
        # Debian 13's own QEMU is the other one's version: there the older dialect has no binary.
        if os.environ.get("CPR_TEST_REQUIRE_QEMUS") and 'VERSION_ID="12"' in Path("/etc/os-release").read_text():
            pytest.fail(missing)
        pytest.skip(missing)
    return QEMUS[version]


@pytest.fixture(scope="session")
def any_qemu() -> str:
    """For what does not depend on the dialect."""
    return next(iter(QEMUS.values())) if QEMUS else qemu_of("10.0")


@pytest.fixture(params=["7.2", "10.0"])
def each_qemu(request: pytest.FixtureRequest) -> str:
    return qemu_of(request.param)


def running_lab(tmp_path: Path, tiny: Path, qemu: str, kind: type[Lab] = Lab) -> Iterator[Lab]:
    shm = Path(tempfile.mkdtemp(prefix="cpr-agent-test-", dir="/dev/shm"))
    with private_bus(tmp_path) as bus:
        lab = kind(tmp_path / "root", shm, bus, tiny, qemu)
        try:
            lab.start_agent()
            yield lab
        finally:
            lab.close()
            shutil.rmtree(shm)
            if lab.log.exists():
                print(f"--- {lab.log}\n{lab.log.read_text()}")


@pytest.fixture
def lab(tmp_path: Path, tiny: Path, any_qemu: str) -> Iterator[Lab]:
    """A running agent, and any QEMU."""
    yield from running_lab(tmp_path, tiny, any_qemu)


@pytest.fixture
def each_lab(tmp_path: Path, tiny: Path, each_qemu: str) -> Iterator[Lab]:
    """The same once for each QEMU, that is, for each dialect."""
    yield from running_lab(tmp_path, tiny, each_qemu)


@pytest.fixture
def saved(lab: Lab) -> Guest:
    guest = lab.running()
    guest.save()
    return guest
