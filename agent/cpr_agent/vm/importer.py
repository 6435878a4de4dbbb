"""A QEMU command line of somebody else's making, as a VM's definition, and all that can't be the same in it.

Takes what ps(1), /proc/PID/cmdline or ``virsh domxml-to-native qemu-argv`` show. Nothing is left out in silence: what is
the agent's own, what dies with the process that started that QEMU (descriptors, sockets, secrets), and what only an admin
can decide, each becomes a note.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from cpr_agent.core.model import Bytes, Imported, Note
from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import OWN
from cpr_agent.vm.foreign import Option, split

NO_DEVICE = "uuid:see-cprctl-devices"
"""Passes for a device as far as a file can be checked, and is none: ``check`` and ``start`` say so."""
DEFAULT_SIZE = Bytes(128 << 20)
"""What QEMU gives a guest whose command line names no size (qemu(1), ``-m``)."""

_WHY = {
    **OWN,
    **dict.fromkeys(("-monitor", "-qmp", "-qmp-pretty", "-mon"), "the agent has its own, and leaves admin.sock to you"),
    "-add-fd": "descriptors die with who opened them",
    "-no-shutdown": "QEMU would stay when its guest has powered off",
    "-numa": "the agent makes NUMA nodes of [[memory.node]]",
}
"""Options that are left out, and why."""

_DIES = re.compile(r"/dev/fdset/|/var/lib/libvirt/qemu/(?:domain|channel)[-/]|/(?:var/)?run/libvirt/")
"""What is there only while libvirt runs the domain."""
_FD_KEYS = ("fd", "fds", "vhostfd", "vhostfds")
_IN_PLACE = ("/dev/dax", "/dev/shm/")  # noqa: S108 - where RAM is that the agent can leave in place
_YES = ("on", "True", "yes")


def import_command_line(text: str, *, name: str = "", device: str = "", offset: str = "", user: str = "") -> Imported:
    """``name``, ``device``, ``offset`` and ``user`` are what the definition shall have, where given. Raises InvalidArgument
    if ``text`` is no command line of QEMU."""
    environment, program, options = split(text)
    draft = _Draft(program, options, device, offset or "0", user)
    for word in environment:
        draft.note("left out", word, "a VM's unit has an environment of its own")
    draft.take_name(name)
    draft.take_options()
    draft.take_memory()
    if not user:
        draft.note("look", "vm.user", "QEMU will run as cpr-vm, which must be allowed to open its disks and devices")
    return Imported(draft.name, draft.toml(), tuple(draft.notes))


@dataclass
class _Draft:
    qemu: str
    options: list[Option]
    device: str
    offset: str
    user: str
    name: str = ""
    size: Bytes = Bytes(0)
    arguments: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._objects = {
            option.value.keys.get("id", ""): option.value for option in self.options if option.name == "-object"
        }
        self._backends = {
            id_ for id_, value in self._objects.items() if value.first("qom-type").startswith("memory-backend-")
        }
        self._monitors = {option.value.first("chardev") for option in self.options if option.name == "-mon"}
        self._dead = {id_ for id_, value in self._objects.items() if _DIES.search(value.keys.get("file", ""))}
        self._dead |= {id_ for id_, value in self._objects.items() if value.keys.get("keyid") in self._dead}

    def note(self, outcome: str, argument: object, why: str) -> None:
        self.notes.append(Note(outcome, str(argument), why))

    def _left_out(self, option: Option, why: str) -> tuple[str, ...]:
        self.note("left out", option, why)
        return ()

    def toml(self) -> str:
        """The definition, headed by the notes. JSON's strings are TOML's basic ones (toml.io, "String")."""
        head = [f"# Imported from a command line of {self.qemu}."]
        head += ["# What is not as it was there, or needs a look:"] if self.notes else []
        head += [f"#   {note.outcome}: {note.argument}: {note.why}".replace("\n", " ") for note in self.notes]
        words = [f"  {', '.join(_quoted(word) for word in option)}," for option in self.arguments]
        vm = ["", "[vm]", f"qemu = {_quoted(self.qemu)}", "arguments = [", *words, "]"]
        vm += [f"user = {_quoted(self.user)}"] if self.user else []
        memory = {"size": _size(self.size), "device": self.device, "offset": self.offset}
        return "\n".join([*head, *vm, "", "[memory]", *(f"{key} = {_quoted(word)}" for key, word in memory.items()), ""])

    def take_name(self, wanted: str) -> None:
        """The one that was asked for, or the domain's, as far as a VM can be called so."""
        given = wanted or next((option.value.first("guest") for option in self.options if option.name == "-name"), "")
        self.name = re.sub(r"[^A-Za-z0-9_.-]", "-", given).lstrip("_.-")[:63] or "imported"
        if self.name != given:
            self.note("changed", f"-name {given}".strip(), f"the VM is called {self.name}")

    def take_options(self) -> None:
        for option in self.options:
            if kept := self._kept(option):
                self.arguments.append(kept)

    def _kept(self, option: Option) -> tuple[str, ...]:
        """The words that go into the definition for an option: none, its own, or others."""
        match option.name:
            case "-name":
                return ()
            case "-m":
                return self._take_size(option)
            case name if name in _WHY:
                return self._left_out(option, _WHY[name])
            case "-run-with" if re.search(r"\b(user|chroot)=", option.text):
                return self._left_out(option, "vm.user and the VM's unit say that")
            case "-serial" if option.text in ("stdio", "mon:stdio"):
                self.note("changed", option, "there is no terminal: it leads nowhere now")
                return ("-serial", "null")
            case "-nographic":
                self.note("changed", option, "there is no terminal: the serial port and the monitor on it are gone")
                return ("-display", "none")
            case "-machine" | "-M" if "memory-backend" in option.value.keys:
                return (option.name, str(option.value.without("memory-backend")))
            case "-object":
                return self._object(option)
            case "-device" if option.value.keys.get("memdev") in self._backends:
                return self._left_out(option, "its memory would not outlive QEMU")
            case "-chardev":
                return self._chardev(option)
            case "-netdev" | "-nic" | "-net" if set(_FD_KEYS) & set(option.value.keys):
                return self._network(option)
            case _:
                return self._plain(option)

    def _plain(self, option: Option) -> tuple[str, ...]:
        if dead := _DIES.search(option.text):
            self.note("look", option, f"{dead[0]} is not there without who made it")
        if any(f'"{secret}"' in option.text or f"={secret}" in option.text for secret in self._dead):
            self.note("look", option, "it needs a secret that was left out")
        return (option.name, option.text) if option.text else (option.name,)

    def _take_size(self, option: Option) -> tuple[str, ...]:
        size = option.value.first("size")
        try:
            self.size = Bytes.parse(f"{size}M" if size.isdigit() else size)
        except ValueError as error:
            raise InvalidArgument(f"{option}: {error}") from None
        if {"slots", "maxmem"} & set(option.value.keys):
            return self._left_out(option, "there is no memory hotplug: the VM has the size that it began with")
        return ()

    def _object(self, option: Option) -> tuple[str, ...]:
        if option.value.keys.get("id") in self._backends:
            return self._left_out(option, "[memory] says where the RAM is")
        if option.value.keys.get("id") in self._dead:
            return self._left_out(option, "this secret dies with libvirt's domain, or needs one that does")
        return self._plain(option)

    def _chardev(self, option: Option) -> tuple[str, ...]:
        id_, kind = option.value.keys.get("id", ""), option.value.first("backend")
        if id_ in self._monitors:
            return self._left_out(option, "it is a monitor's, and the agent has its own")
        if kind != "stdio" and "fd" not in option.value.keys and not _DIES.search(option.text):
            return self._plain(option)
        if kind == "socket":
            path = f"/run/cpr-agent/vm/{self.name}/{id_}.sock"
            self.note("changed", option, f"what it was connected to dies with libvirt: it is at {path} now")
            return (option.name, f"socket,id={id_},path={path},server=on,wait=off")
        self.note("changed", option, "what it was connected to is not there: it leads nowhere now")
        return (option.name, f"null,id={id_}")

    def _network(self, option: Option) -> tuple[str, ...]:
        if option.value.first("type") != "tap":
            self.note("look", option, "its descriptor dies with who opened it")
            return (option.name, option.text)
        number = sum(kept[0] in ("-netdev", "-nic", "-net") for kept in self.arguments)
        interface = f"{self.name[:12]}-{number}"  # 15 characters are the kernel's limit (IFNAMSIZ)
        why = f"its descriptor dies with who opened it: have a tap interface {interface} at boot, or name another"
        self.note("changed", option, why)
        more: dict[str, str | bool] = {"ifname": interface, "script": "no", "downscript": "no"}
        if {"vhostfd", "vhostfds"} & set(option.value.keys):
            more["vhost"] = True
        return (option.name, str(option.value.without(*_FD_KEYS, *more).with_(**more)))

    def take_memory(self) -> None:
        """The device that was asked for; else the file that the RAM is in already; else none, and that is said."""
        if not self.size:
            self.size = DEFAULT_SIZE
            self.note("look", "-m", "none was given: this is QEMU's default")
        if self.device:
            return
        backends = [self._objects[id_].keys for id_ in self._backends]
        files = [keys.get("mem-path", "") for keys in backends if keys.get("share") in _YES]
        if len(files) == len(backends) == 1 and files[0].startswith(_IN_PLACE):
            self.device = files[0]
            return
        self.device = NO_DEVICE
        room = f"`cprctl memory allocate {self.name} --size {_size(self.size)}` finds room"
        self.note("look", "memory.device", f"the RAM was where it outlives nothing; {room}")


def _size(count: int) -> str:
    """As QEMU writes it: in the largest unit that divides it."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return str(count)


def _quoted(word: str) -> str:
    """As it reads best: JSON without a backslash before each quote."""
    if '"' in word and "'" not in word and word.isprintable():
        return f"'{word}'"
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")
