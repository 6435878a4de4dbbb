# SPDX-License-Identifier: GPL-2.0-or-later
"""Command lines of QEMU that somebody else has made: into environment, program and options, and arguments into keys."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self

import msgspec

from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import keyed, single_dash

WITHOUT_VALUE = frozenset(
    """S alt-grab async-teardown audio-help ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile
    full-screen h help localtime mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-kvm-irqchip no-quit
    no-reboot no-shutdown no-user-config nodefaults nodefconfig nographic old-param one-insn-per-tb only-migratable
    portrait preconfig s sdl semihosting show-cursor singlestep snapshot std-vga usb version win2k-hack xen-attach
    xen-domid-restrict no-kvm-pit no-kvm-pit-reinjection rtc-td-hack tdf""".split()  # noqa: SIM905
)
"""Options that take no argument (``DEF("...", 0, ...)`` in QEMU's qemu-options.hx, 5.0 to 11.1), and four of older ones."""

KEYED = frozenset(
    """name m machine M object chardev mon netdev nic net device drive blockdev audiodev action run-with numa tpmdev fw_cfg
    fsdev virtfs smbios acpitable""".split()  # noqa: SIM905
)
"""Options whose argument has keys that an import looks at."""

_ENVIRONMENT = r"[A-Za-z_][A-Za-z0-9_]*="
_BEFORE = ("exec", "env", "nohup", "setsid")
_AFTER = ("&",)
_UNQUOTED_JSON = r"""(?<!\S)\{"[^'\\]"""
"""A shell would take its quotes away; ps(1) shows words as they are."""
CONFIG_BYTES = 64 << 10
MAX_DIRECTORY = 255
"""Characters: each relative path, and the note on it, becomes longer by them."""
MAX_OPTIONS = 1024
"""Of an import, those in the files that it names included: a domain of libvirt with 300 disks has fewer."""


class Value:
    """An option's argument, ``a,b=c`` or JSON, that keys can be taken out of; else it stays as it was written."""

    def __init__(self, text: str) -> None:
        self.keys = keyed(text)
        self._json: dict[str, Any] | None = json.loads(text) if text.startswith("{") else None
        self._words = [] if self._json is not None else text.replace(",,", "\0").split(",")

    def without(self, *keys: str) -> Self:
        for key in keys:
            self.keys.pop(key, None)
            if self._json is not None:
                self._json.pop(key, None)
        self._words = [word for word in self._words if word.partition("=")[0] not in keys]
        return self

    def with_(self, **more: str | bool) -> Self:
        words = {key: ("on" if value else "off") if isinstance(value, bool) else value for key, value in more.items()}
        if self._json is not None:
            self._json.update(more)
        else:
            self._words += ["=".join((key, word.replace(",", "\0"))) for key, word in words.items()]
        self.keys.update(words)
        return self

    def renamed(self, key: str, value: str) -> Self:
        """With another value of ``key``, which may stand first without its name."""
        if self._json is not None or key in self.keys:
            rest = self.keys.get(key)
            return self if rest == value else self.without(key)._first(key, value)
        self._words[0] = value
        return self

    def _first(self, key: str, value: str) -> Self:
        self.keys = {key: value, **self.keys}
        if self._json is not None:
            self._json = {key: value, **self._json}
        else:
            self._words.insert(0, f"{key}={value}")
        return self

    def on(self, key: str) -> bool:
        """Whether a key of yes or no is set; without a value it is."""
        return self.keys.get(key, "off").lower() in ("", "on", "yes", "true", "y")

    def first(self, key: str) -> str:
        """The value of ``key``, which may stand first without its name."""
        head = self._words[0].replace("\0", ",") if self._words else ""
        return self.keys.get(key) or (head if "=" not in head else "")

    def __str__(self) -> str:
        if self._json is not None:
            return json.dumps(self._json, separators=(",", ":"))  # as libvirt writes it
        return ",".join(self._words).replace("\0", ",,")


class Option(msgspec.Struct, frozen=True):
    """``value`` is ``text`` by its keys, empty for an option that is not in KEYED."""

    name: str
    text: str
    value: Value

    def __str__(self) -> str:
        return f"{self.name} {self.text}".strip()


class CommandLine(msgspec.Struct, frozen=True):
    """``directory`` is where the program was started, "" if that is not said; ``user`` who it ran as, by ``sudo``."""

    program: str
    options: list[Option]
    environment: list[str]
    directory: str = ""
    user: str = ""
    unquoted: bool = False
    """As ps(1) shows it: words with spaces in them may have been taken for several."""


def split(command_line: str) -> CommandLine:
    """A word that belongs to no option is a disk image (qemu(1)). Raises InvalidArgument if that is not a command line of
    QEMU."""
    import shlex  # for this alone

    unquoted = bool(re.search(_UNQUOTED_JSON, command_line))
    text = re.sub(r"\\\r?\n", " ", command_line)
    try:
        words = deque(_words_as_shown(text) if unquoted else shlex.split(text))
    except ValueError as error:
        remedy = "give all of it, as the shell takes it"
        raise InvalidArgument(f"this is not a command line: {error}", remedy=remedy) from None
    environment, directory, user = _take_prefix(words)
    while words and words[-1] in _AFTER:
        words.pop()
    program = words.popleft() if words else ""
    if not re.search("qemu|kvm", program.rpartition("/")[2]):
        what = f"this is not a command line of QEMU: it begins with {program!r}"
        raise InvalidArgument(what, remedy="give all of it, from the program on")
    pairs = _pairs(words, joined=unquoted)
    refuse_many(pairs)
    options = [make_option(name, text) for name, text in pairs]
    return CommandLine(program, options, environment, directory, user, unquoted)


def refuse_many(options: Sequence[object]) -> None:
    """Raises InvalidArgument for more than MAX_OPTIONS."""
    if len(options) > MAX_OPTIONS:
        raise InvalidArgument(
            f"this command line has more than {MAX_OPTIONS} options, which is the most of an import",
            remedy="leave some out, and add them to the VM's definition (cpr-vm.toml(5), vm.arguments)",
        )


def _words_as_shown(text: str) -> list[str]:
    """Words that are separated by spaces, JSON among them. Raises ValueError."""
    words, at = [], 0
    while found := re.compile(r"\S+").search(text, at):
        at = found.end()
        if found[0].startswith('{"'):
            _, at = json.JSONDecoder().raw_decode(text, found.start())
        words.append(text[found.start() : at])
    return words


def _take_prefix(words: deque[str]) -> tuple[list[str], str, str]:
    """What a shell does before it starts the program: environment, directory, user. Raises InvalidArgument."""
    environment, directory, user = [], "", ""
    while words:
        if words[0] in _BEFORE:
            words.popleft()
        elif re.match(_ENVIRONMENT, words[0]):
            environment.append(words.popleft())
        elif words[0] == "cd" and len(words) > 2 and words[2] in ("&&", ";"):
            directory = words[1]
            if len(directory) > MAX_DIRECTORY:
                what = f"the directory in which QEMU was started has more than {MAX_DIRECTORY} characters"
                raise InvalidArgument(what, remedy="write paths from the root, and leave out the cd")
            for _ in range(3):
                words.popleft()
        elif words[0] == "sudo":
            words.popleft()
            user = "root"
            while words and words[0].startswith("-"):
                if words.popleft() in ("-u", "--user") and words:
                    user = words.popleft()
        else:
            break
    return environment, directory, user


def options_of(words: Iterable[str]) -> list[Option]:
    """Raises InvalidArgument."""
    return [make_option(name, text) for name, text in _pairs(words, joined=False)]


def _pairs(some: Iterable[str], *, joined: bool) -> list[tuple[str, str]]:
    """Options with their arguments. With ``joined`` a word that belongs to no option is the rest of the one before it,
    which has a space in it."""
    words = iter(some)
    pairs: list[tuple[str, list[str]]] = []
    for name in map(single_dash, words):
        if name.startswith("-"):
            text = "" if name[1:] in WITHOUT_VALUE else next(words, "")
            pairs.append((name, [text]))
        elif joined and pairs and pairs[-1][1] != [""]:
            pairs[-1][1].append(name)
        else:
            pairs.append(("-drive", [f"file={name.replace(',', ',,')},index=0,media=disk"]))
    return [(name, " ".join(parts)) for name, parts in pairs]


def make_option(name: str, text: str) -> Option:
    """Raises InvalidArgument."""
    try:
        return Option(name, text, Value(text if name[1:] in KEYED else ""))
    except InvalidArgument as error:
        raise InvalidArgument(f"{name}: {error.what}") from error


def read_config(path: str, shared: Path) -> list[Option] | None:
    """The options in a file of ``-readconfig`` that everybody may read, since a package brought it to /usr/share, which is
    at ``shared``. None if it is somewhere else, or can't be read as a whole."""
    try:
        place = (shared / PurePosixPath(path).relative_to("/usr/share")).resolve()
        if not place.is_relative_to(shared.resolve()) or not place.is_file():
            return None
        with place.open("rb") as file:
            raw = file.read(CONFIG_BYTES + 1)
        lines = raw.decode().splitlines()
    except (OSError, ValueError):
        return None
    if len(raw) > CONFIG_BYTES:
        return None
    sections: list[tuple[str, dict[str, str]]] = []
    for line in map(str.strip, lines):
        if section := re.fullmatch(r'\[([\w-]+)(?:\s+"([^"]+)")?\]', line):
            sections.append((section[1], {"id": section[2]} if section[2] else {}))
        elif (pair := re.fullmatch(r'([\w.-]+)\s*=\s*"([^"]*)"', line)) and sections:
            sections[-1][1][pair[1]] = pair[2]
        elif line and not line.startswith("#"):
            return None
    return [make_option(f"-{group}", _joined(keys)) for group, keys in sections]


def _joined(keys: dict[str, str]) -> str:
    first = {key: keys[key] for key in ("driver", "qom-type", "backend", "type") if key in keys}
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in (first | keys).items())
