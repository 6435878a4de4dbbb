"""The names of a QEMU's sockets, while another one is tried that binds them anew."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.host.sockets import keep, settle


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """As QEMU does it: an older socket of that name goes."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.setblocking(False)
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
def test_a_name_is_given_back_if_its_owner_stays(tmp_path: Path, bound: bool) -> None:
    path = tmp_path / "qga"
    with listening(path) as first:
        keep([str(path)], 1)
        assert not path.exists()
        with listening(path) if bound else contextlib.nullcontext(first):
            settle([str(path)], 1)
            assert reaches(path, first)
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_goes_to_another_owner_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "qga"
    with listening(path):
        keep([str(path)], 1)
        with listening(path) as second:
            settle([str(path)], 2)
            assert reaches(path, second)
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_kept_is_left(tmp_path: Path) -> None:
    paths = [str(tmp_path / "missing"), "/proc/none", "relative"]
    keep(paths, 1)
    settle(paths, 1)
    assert list(tmp_path.iterdir()) == []
