# SPDX-License-Identifier: GPL-2.0-or-later
"""An argument is rewritten for another image only where that is known for sure."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cpr_agent.core.model import BlockNode, OpenFile
from cpr_agent.vm.carried import carry


def chain(*images: tuple[str, str]) -> list[BlockNode]:
    """Of path and format, the topmost first."""
    nodes = []
    for level, (path, form) in enumerate(images):
        above = ["backing"] * level
        top = BlockNode(disk="d0", role=".".join(above), node="a", driver=form, filename=path)
        file = OpenFile(path=path, st_dev=1, inode=hash(path) & 0xFFFF)
        below = BlockNode(disk="d0", role=".".join([*above, "file"]), node="b", driver="file", filename=path, file=file)
        nodes += [top, below]
    return nodes


WAS = chain(("/a", "raw"))
NOW = chain(("/b,c", "qcow2"), ("/a", "raw"))
DRIVE = "file=/a,format=raw,if=none,id=d0,cache=none"


def rewritten(drive: str, was: list[BlockNode], now: list[BlockNode], *more: str) -> str | None:
    argv = carry(("qemu", "-drive", drive, *more), was, now)
    return argv[2] if argv else None


def test_each_image_of_the_chain_is_named() -> None:
    one = rewritten(DRIVE, WAS, NOW)
    below = "backing.driver=raw,backing.file.driver=file,backing.file.filename=/a"
    assert one == f"if=none,id=d0,cache=none,file=/b,,c,format=qcow2,{below}"
    two = rewritten(one, NOW, chain(("/c", "qcow2"), ("/b,c", "qcow2"), ("/a", "raw")))
    assert two
    assert two.startswith("if=none,id=d0,cache=none,file=/c,format=qcow2,backing.driver=qcow2,")
    assert two.endswith("backing.backing.driver=raw,backing.backing.file.driver=file,backing.backing.file.filename=/a")
    assert rewritten(two, chain(("/c", "qcow2"), ("/b,c", "qcow2"), ("/a", "raw")), WAS) == (
        "if=none,id=d0,cache=none,file=/a,format=raw"
    )


def test_a_chain_that_arguments_have_named_before_is_named_again() -> None:
    """QEMU tells of it as JSON then."""
    now = [replace(NOW[0], filename='json:{"driver": "qcow2", "file": {}, "backing": {"driver": "raw"}}'), *NOW[1:]]
    assert rewritten(DRIVE, WAS, now) == rewritten(DRIVE, WAS, NOW)


def test_the_last_image_has_none_below_it() -> None:
    assert rewritten(DRIVE, WAS, chain(("/m", "qcow2"))) == "if=none,id=d0,cache=none,file=/m,format=qcow2,backing="


@pytest.mark.parametrize(
    "drive",
    [
        "file=/a,if=none,id=d0",
        "file=/a,format=qcow2,id=d0",
        "file=a,format=raw,id=d0",
        "file=/a,format=raw,id=other",
        "file=/a,format=raw,id=d0,copy-on-read=on",
        "file=/a,format=raw,id=d0,snapshot=on",
        "file=/a,format=raw,id=d0,throttling.bps-total=5",
        "file=/a,format=raw,id=d0,backing.file.locking=off",
        '{"file":"/a","format":"raw","id":"d0"}',
    ],
)
def test_an_argument_that_says_more_or_less_is_left_alone(drive: str) -> None:
    assert rewritten(drive, WAS, NOW) is None


def test_two_drives_of_one_name_are_not_chosen_from() -> None:
    assert rewritten(DRIVE, WAS, NOW, "-drive", DRIVE) is None


@pytest.mark.parametrize(
    "now",
    [
        [],
        chain(("/b", "luks"), ("/a", "raw")),
        NOW[:1],
        [NOW[0], replace(NOW[1], driver="nbd"), *NOW[2:]],
        [NOW[0], replace(NOW[1], file=None), *NOW[2:]],
        [NOW[0], replace(NOW[1], file=OpenFile(path="/b,c", nameless=True)), *NOW[2:]],
        [NOW[0], replace(NOW[1], file=OpenFile(path="")), *NOW[2:]],
        [replace(NOW[0], read_only=True), *NOW[1:]],
        [*NOW, replace(NOW[1], role="data-file")],
        [replace(node, role=f"file.{node.role}") for node in NOW],
        [replace(NOW[0], filename='json:{"driver": "qcow2", "encrypt.key-secret": "s0", "file": {}}'), *NOW[1:]],
        [*NOW[:2], replace(NOW[2], filename='json:{"driver": "raw", "offset": 512, "file": {}}'), NOW[3]],
        [replace(NOW[0], filename="json:{"), *NOW[1:]],
        [replace(NOW[0], filename="json:[]"), *NOW[1:]],
    ],
)
def test_a_chain_of_anything_else_is_left_alone(now: list[BlockNode]) -> None:
    assert rewritten(DRIVE, WAS, now) is None
