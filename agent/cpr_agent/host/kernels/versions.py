# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels' versions: their order, and the flavour that is in them."""

from __future__ import annotations

import re
from collections.abc import Callable

VERSION = re.compile(r"\d+\.\d[\w.+~-]*", re.ASCII)
_LEFTOVER = re.compile(r"\.(old|bak|sig|hmac|dpkg-\w+|rpm\w+)$|~$|rescue|;")

_NEUTRAL = re.compile(
    r"(?:deb|fc|amzn|mga|lp)\d+\w*?(?=[-+.]|$)|el\d+(?:_\d+)*|bpo\d*|rc\d*|trunk|dirty|-g[0-9a-f]{7,}(?=[-+]|$)|-r\d+(?=-|$)"
)
"""A distribution's release, or a build's: no flavour."""
_WORD = re.compile(r"[a-z]+|(?<![a-z0-9])\d+k(?![a-z0-9])")

_SPECIAL = frozenset(
    ("rt", "realtime", "lowlatency", "preempt", "debug", "dbg", "cloud", "kvmsmall", "kdump", "virt", "16k", "64k")
)
"""Flavours for a purpose. One of them is chosen for a host that runs it, or whose admin names it."""


def is_version(word: str) -> bool:
    """Whether a kernel can be called so; files that are left over from an earlier one can't."""
    return bool(VERSION.fullmatch(word)) and not is_leftover(word)


def is_leftover(name: str) -> bool:
    return bool(_LEFTOVER.search(name))


def version_key(version: str) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    """Orders versions as people read them: 6.12.10 after 6.12.9, 6.12-rc1 before 6.12, and 6.12-rc7 after 6.12.0-rc1."""
    return _tokens(re.sub(r"^(\d+\.\d+)(?![\d.])", r"\1.0", version)), _tokens(version)


def _tokens(version: str) -> list[tuple[int, int, str]]:
    tokens = [
        (3, int(token), "") if token.isdigit() else (0 if token in {"rc", "~"} else 2, 0, token)
        for token in re.findall(r"\d+|[A-Za-z]+|~", version)
    ]
    return [*tokens, (1, 0, "")]


def flavour(version: str) -> frozenset[str]:
    """The words of a version that stay the same in the next one: ``{"cloud", "amd"}`` of 6.12.9+deb13-cloud-amd64."""
    rest = re.sub(r"^\d+(\.\d+)*", "", version.lower())
    return frozenset(_WORD.findall(_NEUTRAL.sub("-", rest)))


def preference(running: str) -> Callable[[str], tuple[int, object]]:
    """A sort key, the best last: newer ones of the flavour that runs, then those without a purpose of their own."""
    own = flavour(running) if running else None

    def key(version: str) -> tuple[int, object]:
        words = flavour(version)
        return 2 if words == own else int(words.isdisjoint(_SPECIAL)), version_key(version)

    return key
