# SPDX-License-Identifier: GPL-2.0-or-later
"""The names of a QEMU's sockets, while another one is tried that binds them anew."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.host import sockets
from cpr_agent.host.sockets import keep, settle


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """As QEMU does it: an older socket of that name goes."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(0)
        yield listener


def reaches(path: Path, listener: socket.socket) -> bool:
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
            listener.accept()[0].close()
        except (ConnectionRefusedError, BlockingIOError):
            return False
    return True


@pytest.mark.parametrize("bound", [True, False])
def test_a_name_is_given_back_if_its_owner_stays(tmp_path: Path, *, bound: bool) -> None:
    path = tmp_path / "qga"
    with listening(path) as first:
        keep([str(path)], os.getpid())
        assert not path.exists()
        with listening(path) if bound else contextlib.nullcontext(first):
            settle([str(path)], os.getpid())
            assert reaches(path, first)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_goes_to_another_owner_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "qga"
    with listening(path):
        keep([str(path)], os.getpid())
        with listening(path) as second:
            settle([str(path)], os.getppid())
            assert reaches(path, second)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_kept_is_left(tmp_path: Path) -> None:
    paths = [str(tmp_path / "missing"), "/proc/none", "relative"]
    keep(paths, os.getpid())
    settle(paths, os.getpid())
    assert list(tmp_path.iterdir()) == []


def settled_and_kept(path: Path) -> None:
    keep([str(path)], os.getpid())
    settle([str(path)], os.getpid())
    keep([str(path)], os.getpid())


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_file_is_no_socket_and_is_left_alone(tmp_path: Path) -> None:
    """A VM's user may put anything in its directory under the name of a socket."""
    (tmp_path / "qga").write_text("precious")
    (tmp_path / "qga.of-7").write_text("precious")
    settled_and_kept(tmp_path / "qga")
    assert names(tmp_path) == {"qga", "qga.of-7"}
    (tmp_path / "link").symlink_to(tmp_path / "qga")
    settled_and_kept(tmp_path / "link")
    assert names(tmp_path) == {"qga", "qga.of-7", "link"}


def test_a_file_in_the_place_of_a_kept_name_is_not_replaced(tmp_path: Path) -> None:
    with listening(tmp_path / "qga"):
        (tmp_path / f"qga.of-{os.getpid()}").write_text("precious")
        keep([str(tmp_path / "qga")], os.getpid())
        assert (tmp_path / f"qga.of-{os.getpid()}").read_text() == "precious"
        assert (tmp_path / "qga").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="a file of another user takes root to make")
def test_a_socket_of_another_user_is_left_alone(tmp_path: Path) -> None:
    with listening(tmp_path / "qga"):
        os.chown(tmp_path / "qga", 65534, 65534)
        settled_and_kept(tmp_path / "qga")
    assert names(tmp_path) == {"qga"}


@pytest.mark.skipif(os.geteuid() != 0, reason="a directory of another user takes root to make")
def test_a_link_that_another_user_may_have_made_is_not_followed(tmp_path: Path) -> None:
    for directory in ("own", "prey", "vm"):
        (tmp_path / directory).mkdir()
    os.chown(tmp_path / "vm", 65534, 65534)
    (tmp_path / "vm/sub").symlink_to(tmp_path / "prey")
    (tmp_path / "own/sub").symlink_to("../prey")
    with listening(tmp_path / "prey/qga"):
        keep([str(tmp_path / "vm/sub/qga")], os.getpid())
        assert names(tmp_path / "prey") == {"qga"}
        keep([str(tmp_path / "own/sub/qga")], os.getpid())  # by root's own link
        assert names(tmp_path / "prey") == {f"qga.of-{os.getpid()}"}


def test_names_that_begin_alike_are_other_names(tmp_path: Path) -> None:
    with listening(tmp_path / "qga.of-7.of-8"), listening(tmp_path / "qga2.of-7"), listening(tmp_path / "qga.of-x"):
        settle([str(tmp_path / "qga")], os.getpid())
        assert names(tmp_path) == {"qga.of-7.of-8", "qga2.of-7", "qga.of-x"}


def test_a_directory_that_its_owner_has_filled_is_not_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything removed from it then: names that are left there do no harm."""
    path = tmp_path / "qga"
    monkeypatch.setattr(sockets, "MAX_ENTRIES", 0)
    with listening(path):
        keep([str(path)], os.getpid())
        with listening(path):
            settle([str(path)], os.getppid())
    assert len(list(tmp_path.iterdir())) == 2
