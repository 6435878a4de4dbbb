"""Command lines of QEMU that somebody else has made: into environment, program and options, and arguments into keys."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, NamedTuple, Self

from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import keyed, single_dash

WITHOUT_VALUE = frozenset(
    """S alt-grab audio-help ctrl-grab curses daemonize enable-fips enable-kvm enable-sync-profile full-screen h help
    localtime mem-prealloc no-acpi no-fd-bootchk no-frame no-hpet no-kvm no-kvm-irqchip no-quit no-reboot no-shutdown
    no-user-config nodefaults nodefconfig nographic old-param one-insn-per-tb only-migratable portrait preconfig s sdl
    semihosting show-cursor singlestep snapshot std-vga usb version win2k-hack xen-attach xen-domid-restrict""".split()  # noqa: SIM905
)
"""Options that take no argument (``DEF("...", 0, ...)`` in QEMU's qemu-options.hx, 5.0 to 11.1)."""

KEYED = frozenset(("-name", "-m", "-machine", "-M", "-object", "-chardev", "-mon", "-netdev", "-nic", "-net", "-device"))
"""Options whose argument has keys that an import looks at."""

_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_BEFORE = ("\n", "exec", "sudo", "env")
_AFTER = ("\n", "&")


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

    def first(self, key: str) -> str:
        """The value of ``key``, which may stand first without its name."""
        head = self._words[0].replace("\0", ",") if self._words else ""
        return self.keys.get(key) or (head if "=" not in head else "")

    def __str__(self) -> str:
        if self._json is not None:
            return json.dumps(self._json, separators=(",", ":"))  # as libvirt writes it
        return ",".join(self._words).replace("\0", ",,")


class Option(NamedTuple):
    """``value`` is ``text`` by its keys, empty for an option that is not in KEYED."""

    name: str
    text: str
    value: Value

    def __str__(self) -> str:
        return f"{self.name} {self.text}".strip()


def split(command_line: str) -> tuple[list[str], str, list[Option]]:
    """Environment, program, and options; a word that belongs to none of them is a disk image (qemu(1)). Raises
    InvalidArgument if that is not a command line of QEMU."""
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", command_line))
    except ValueError as error:
        remedy = "give all of it, as the shell takes it"
        raise InvalidArgument(f"this is not a command line: {error}", remedy=remedy) from None
    environment = []
    while words and (words[0] in _BEFORE or _ENVIRONMENT.match(words[0])):
        word = words.pop(0)
        environment += [] if word in _BEFORE else [word]
    while words and words[-1] in _AFTER:
        words.pop()
    program = words.pop(0) if words else ""
    if not re.search(r"(qemu|kvm)[^/]*$", program):
        what = f"this is not a command line of QEMU: it begins with {program!r}"
        raise InvalidArgument(what, remedy="give all of it, from the program on")
    options = []
    while words:
        name, text = single_dash(words.pop(0)), ""
        if not name.startswith("-"):
            name, text = "-drive", f"file={name.replace(',', ',,')},index=0,media=disk"
        elif name[1:] not in WITHOUT_VALUE and words:
            text = words.pop(0)
        options.append(_option(name, text))
    return environment, program, options


def _option(name: str, text: str) -> Option:
    try:
        return Option(name, text, Value(text if name in KEYED else ""))
    except ValueError as error:
        raise InvalidArgument(f"{name} {text}: {error}") from None
