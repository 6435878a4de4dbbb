# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether only root could swap a file for another, which callers name and hooks are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cpr_agent.core.paths import AllowedFiles, is_node_name, why_swappable
from cpr_agent.errors import InvalidArgument
from cpr_agent.host.hooks import HookDirectory

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hooks.d/check.d/10-test"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def linked(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


CHANGES = [
    (lambda place: place.chmod(0o777), "others may write to {} (mode 0777)"),
    (lambda place: place.chmod(0o775), "others may write to {} (mode 0775)"),
    (lambda place: place.chmod(0o757), "others may write to {} (mode 0757)"),
    (linked, "{} is a symbolic link"),
    pytest.param(lambda place: os.chown(place, NOBODY, NOBODY), f"{{}} belongs to user {NOBODY}", marks=AS_ROOT),
]


@pytest.mark.parametrize("above", [0, 1, 2])
@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_each_place_on_the_way_must_be_root_s_alone(
    file: Path, change: Callable[[Path], object], said: str, above: int
) -> None:
    place = (file, *file.parents)[above]
    assert why_swappable(file) == ""
    change(place)
    assert why_swappable(file) == said.format(place)


def test_a_sticky_directory_may_be_on_the_way_and_not_be_the_last(file: Path) -> None:
    file.parent.chmod(0o1777)
    assert why_swappable(file) == ""
    assert why_swappable(file.parent) == f"others may write to {file.parent} (mode 1777)"


def test_a_file_is_no_way(file: Path) -> None:
    assert why_swappable(file / "below") == f"{file} is not a directory"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hook: None, "exited with 1"),
        (lambda hook: hook.chmod(0o777), "was not run: others may write to"),
        (lambda hook: hook.parent.chmod(0o1777), "was not run: others may write to"),
        (lambda hook: hook.parent.parent.chmod(0o777), "was not run: others may write to"),
        (linked, "is a symbolic link"),
        (lambda hook: (hook.unlink(), hook.mkdir()), "is not a regular file"),
    ],
)
def test_a_hook_that_others_could_swap_is_not_run(file: Path, change: Callable[[Path], object], said: str) -> None:
    change(file)
    hooks = HookDirectory(file.parent.parent, 10.0)
    failures = {Path(one.hook).name: one.why for one in asyncio.run(hooks.run("check", "web1", "", {}))}
    assert said in failures["10-test"]


def test_files_that_callers_name_are_below_a_directory_that_is_allowed(file: Path) -> None:
    allowed = AllowedFiles("kernel file", (file.parent,), "kernel-directories")
    allowed.check(file, fixed=file)
    with pytest.raises(InvalidArgument, match="is not below a directory that kernel files may be in.*kernel-directories"):
        allowed.check(file.parent.parent / "other", fixed=file.parent.parent / "other")
    with pytest.raises(InvalidArgument, match="can't be a kernel file: .*No such file"):
        allowed.check(file.with_name("none"), fixed=file.with_name("none"))
    file.chmod(0o666)
    with pytest.raises(InvalidArgument, match=r"can't be a kernel file: others may write to .*\(mode 0666\)"):
        allowed.check(file, fixed=file)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        *(("/dev/vdb", True), ("/dev/mapper/vg-root", True), ("/dev/disk/by-id/x", True)),
        *(
            ("/dev/../srv/link", False),
            ("/dev/./vdb", False),
            ("/dev//vdb", False),
            ("/dev/vdb/", False),
            ("/srv/disk", False),
        ),
        *(("/dev/shm/link", False), ("/dev/mqueue/link", False), ("dev/vdb", False), ("", False), ("/device", False)),
    ],
)
def test_a_name_of_a_node_is_one_that_root_alone_makes(name: str, *, plain: bool) -> None:
    assert is_node_name(name) is plain
