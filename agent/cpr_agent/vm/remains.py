# SPDX-License-Identifier: GPL-2.0-or-later
"""Options that need a part which another option makes, as a disk needs its drive: without it QEMU does not start."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from cpr_agent.vm.foreign import Option, make_option

Words = tuple[str, ...]
Part = tuple[str, str]
"""The option that makes it, and its name."""

_MAKERS: dict[str, tuple[str, ...]] = {
    "drive": ("-drive", "-blockdev"),
    "netdev": ("-netdev", "-nic", "-net"),
    "chardev": ("-chardev",),
    "tpmdev": ("-tpmdev",),
    "fsdev": ("-fsdev",),
    "audiodev": ("-audiodev",),
    **dict.fromkeys(("iothread", "rng", "cryptodev"), ("-object",)),
}
"""Keys that name a part which another option makes, and these options."""
_MADE_UP = re.compile(r"[a-z]+\d+(?:-(?:hd|cd)\d+)?")
"""How QEMU calls a drive that has no id (drive_new() in blockdev.c)."""
_NAMES = ("id", "node-name", "name")
_PORTS = ("-serial", "-parallel")


def needs(option: Option) -> list[tuple[str, str]]:
    """The parts that an option needs, by what it calls them: ``("chardev", "char0")``."""
    if option.name in _PORTS and option.text.startswith("chardev:"):
        return [("chardev", option.text.removeprefix("chardev:"))]
    if option.name not in ("-device", "-object", "-mon"):
        return []
    return [(key, option.value.keys[key]) for key in _MAKERS if option.value.keys.get(key)]


def without_remains(arguments: Sequence[Words]) -> tuple[list[Words], list[tuple[Words, str]]]:
    """Those that have what they need, and the others, each with the reason. One that goes may have made a part for others,
    which are looked at again: each option once for all that it needs, and once for each part of those that goes."""
    options = {index: make_option(*words) for index, words in enumerate(arguments) if len(words) == 2}
    makers = Counter(part for option in options.values() for part in _made(option))
    users: dict[Part, list[int]] = defaultdict(list)
    for index, option in options.items():
        for part in _wanted(option):
            users[part].append(index)
    lost: dict[int, str] = {}
    suspects = list(options)
    while suspects:
        found = {index: why for index in suspects if index not in lost and (why := _why_incomplete(options[index], makers))}
        lost |= found
        gone = Counter(part for index in found for part in _made(options[index]))
        makers.subtract(gone)
        suspects = sorted({user for part in gone if not makers[part] for user in users[part]})
    kept = [words for index, words in enumerate(arguments) if index not in lost]
    return kept, [(arguments[index], why) for index, why in lost.items()]


def _made(option: Option) -> set[Part]:
    return {(option.name, option.value.keys[key]) for key in _NAMES if key in option.value.keys}


def _wanted(option: Option) -> Iterator[Part]:
    """Each part that could be one which the option needs."""
    for key, name in needs(option):
        yield from ((maker, name) for maker in _MAKERS[key])
    if option.name == "-set":
        yield _owner(option)


def _owner(option: Option) -> Part:
    """Of the property that a ``-set GROUP.ID.PROPERTY=VALUE`` sets."""
    group, _, rest = option.text.partition(".")
    return f"-{group}", rest.partition(".")[0]


def _why_incomplete(option: Option, makers: Counter[Part]) -> str:
    for key, name in needs(option):
        made = any(makers[maker, name] for maker in _MAKERS[key])
        if not made and not (key == "drive" and _MADE_UP.fullmatch(name)):
            return f"there is no {key} {name}, which it needs"
    if option.name == "-set" and not makers[_owner(option)]:
        return "what it sets a property of is not there"
    return ""
