# SPDX-License-Identifier: GPL-2.0-or-later
"""A bed for each pair of libvirt and QEMU; each test of a real libvirtd is a case of the tally."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.bus.conftest import interruptible, linux, linux_with_agent, tiny
from tests.libvirt.bed import RELEASES, find_root
from tests.libvirt.lab import Domain, LibvirtLab, libvirt_lab
from tests.libvirt.tally import note

__all__ = ["interruptible", "linux", "linux_with_agent", "tiny"]


def root_of(release: str) -> Path:
    try:
        return find_root(release)
    except FileNotFoundError as error:
        if os.environ.get("CPR_TEST_REQUIRE_QEMUS"):
            pytest.fail(str(error))
        pytest.skip(str(error))


def a_lab(release: str, tmp_path: Path, tiny: Path, kind: type[LibvirtLab] = LibvirtLab) -> Iterator[LibvirtLab]:
    root_of(release)
    with libvirt_lab(release, tmp_path, tiny, kind=kind) as lab:
        lab.start_agent()
        yield lab


@pytest.fixture
def lab(tmp_path: Path, tiny: Path) -> Iterator[LibvirtLab]:
    """For what does not depend on the versions: those of Debian 13."""
    yield from a_lab("13", tmp_path, tiny)


@pytest.fixture(params=list(RELEASES))
def each_lab(request: pytest.FixtureRequest, tmp_path: Path, tiny: Path) -> Iterator[LibvirtLab]:
    yield from a_lab(request.param, tmp_path, tiny)


@pytest.fixture
def running(lab: LibvirtLab) -> Domain:
    """Adopted, and counting."""
    return lab.running_domain()


@pytest.fixture
def saved(running: Domain) -> Domain:
    running.save()
    return running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and {"lab", "each_lab"} & set(getattr(item, "fixturenames", ())):
        note("case", item.name)
        if report.passed:
            note("kept", item.name)
            callspec = getattr(item, "callspec", None)
            release = callspec.params.get("each_lab", callspec.params.get("lab", "13")) if callspec else "13"
            note("pair", RELEASES[release])
    return report
