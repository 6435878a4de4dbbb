# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of a guest whose disk is another image now: a changed medium, a finished mirror, an external snapshot.

Only what is known for sure is carried over (ADR 23): images of this host by their paths, of which QEMU knows the format,
below a drive that has nothing more to it than options that hold for any image. The new argument names each image of the
chain, so that no header of an image decides what is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

import msgspec

from cpr_agent.core.model import BlockNode
from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import keyed, single_dash

FORMATS = ("raw", "qcow2")
ANY_IMAGE = frozenset(
    ("file", "format", "driver", "id", "if", "media", "readonly", "read-only", "index", "bus", "unit", "cache", "aio")
) | {"discard", "detect-zeroes", "werror", "rerror", "file.locking"}
"""Keys of ``-drive`` that hold for whichever image it has."""
_CHAIN = re.compile(r"(?:backing\.)*backing(?:\.(?:driver|file\.driver|file\.filename))?")
"""Keys that name the images below, as an earlier save has written them."""


class Image(msgspec.Struct, frozen=True):
    path: str
    format: str


def carry(argv: Sequence[str], was: Sequence[BlockNode], now: Sequence[BlockNode]) -> tuple[str, ...] | None:
    """``argv`` for a disk that had the nodes ``was`` by it, and has ``now``; None where it can't be known for sure."""
    old, new = list(images(was)), list(images(now))
    if not old or not new or was[0].read_only != now[0].read_only:
        return None
    found = [place for place in range(1, len(argv)) if _is_drive(argv[place - 1], argv[place], now[0].disk, old[0])]
    if len(found) != 1:
        return None
    drive = _drive(keyed(argv[found[0]]), new)
    return (*argv[: found[0]], drive, *argv[found[0] + 1 :])


def images(nodes: Sequence[BlockNode]) -> Iterator[Image]:
    """The chain, the topmost image first; empty if it is of anything but files of this host that have their names."""
    by_role = {node.role: node for node in nodes}
    depth = 1 + max((node.depth for node in nodes), default=-1)
    found = []
    for level in range(depth):
        above = ["backing"] * level
        node, file = by_role.get(".".join(above)), by_role.get(".".join([*above, "file"]))
        if node is None or file is None or node.driver not in FORMATS or file.driver != "file" or not _plain(node):
            return
        if file.file is None or file.file.nameless or not file.file.path:
            return
        found.append(Image(file.file.path, node.driver))
    if len(nodes) == 2 * depth:
        yield from found


def _plain(node: BlockNode) -> bool:
    """Whether QEMU has opened the image without an option that decides on its contents, such as the offset of a raw one or
    the key of an encrypted one: those are in its name then, as JSON (bdrv_refresh_filename in block.c)."""
    if not node.filename.startswith("json:"):
        return True
    try:
        return bool(json.loads(node.filename.removeprefix("json:")).keys() <= {"driver", "file", "backing"})
    except (ValueError, AttributeError, RecursionError):
        return False


def _is_drive(option: str, value: str, disk: str, image: Image) -> bool:
    """Whether this is the one ``-drive`` of ``disk``, with an image of a known format."""
    if single_dash(option) != "-drive" or value.startswith("{"):
        return False
    try:
        keys = keyed(value)
    except InvalidArgument:
        return False
    known = keys.get("format", keys.get("driver")) == image.format and keys.get("file", "").startswith("/")
    return known and keys.get("id") == disk and all(key in ANY_IMAGE or _CHAIN.fullmatch(key) for key in keys)


def _drive(keys: dict[str, str], chain: Sequence[Image]) -> str:
    replaced = ("file", "format", "driver")
    words = {key: word for key, word in keys.items() if key not in replaced and not _CHAIN.fullmatch(key)}
    words |= {"file": chain[0].path, "format": chain[0].format}
    for level, image in enumerate(chain[1:], 1):
        above = "backing." * level
        words |= {f"{above}driver": image.format, f"{above}file.driver": "file", f"{above}file.filename": image.path}
    if chain[-1].format != "raw":
        words[f"{'backing.' * (len(chain) - 1)}backing"] = ""
    return ",".join(f"{key}={word.replace(',', ',,')}" for key, word in words.items())
