# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU command line of somebody else's making, as a VM's definition, and all that can't be the same in it.

Takes what ps(1), /proc/PID/cmdline, ``virsh domxml-to-native qemu-argv`` or ``qm showcmd`` show. Nothing is left out in
silence, and nothing is kept that would not start: what is the agent's own, what dies with the process that started that
QEMU (descriptors, sockets, secrets, companions), and what only an admin can decide, each becomes a note.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from cpr_agent.core.model import Bytes, Imported, Note
from cpr_agent.errors import InvalidArgument
from cpr_agent.text import printable, printable_lines
from cpr_agent.vm.cmdline import OWN, WRITES_RAM, writes_ram
from cpr_agent.vm.connections import DIES, Connections, vhost_user
from cpr_agent.vm.foreign import CommandLine, Option, read_config, refuse_many, split
from cpr_agent.vm.networks import FD_KEYS, at_home
from cpr_agent.vm.paths import whole_paths
from cpr_agent.vm.remains import needs, without_remains

NO_DEVICE = "uuid:see-cprctl-devices"
"""Passes for a device as far as a file can be checked, and is none: ``check`` and ``start`` say so."""
DEFAULT_SIZE = Bytes(128 << 20)
"""What QEMU gives a guest whose command line names no size (qemu(1), ``-m``)."""

MAX_CONFIGS = 16
"""Files of -readconfig that are looked at. libvirt's domains and Proxmox VE's guests have one or two."""

_WHY = {
    **OWN,
    **dict.fromkeys(("-monitor", "-qmp", "-qmp-pretty", "-mon"), "the agent has its own, and leaves admin.sock to you"),
    "-add-fd": "descriptors die with who opened them",
    "-no-shutdown": "QEMU would stay when its guest has powered off",
    "-numa": "the agent makes NUMA nodes of [[memory.node]]",
    "-loadstate": "loads are the agent's",
    "-full-screen": "there is no screen",
    "-id": "Proxmox VE's QEMU alone knows it",
    "-D": "what QEMU logs is in the VM's log",
    "-soundhw": "QEMU 7.1 and newer have no such option: -audiodev and -device say that; till then there is no sound",
    **dict.fromkeys(
        (
            *("-writeconfig", "-enable-fips", "-async-teardown", "-portrait", "-rotate", "-singlestep", "-show-cursor"),
            *("-alt-grab", "-ctrl-grab", "-no-frame", "-no-quit", "-hdachs", "-tdf", "-no-kvm-pit"),
        ),
        "newer QEMUs have no such option",
    ),
    "-tb-size": "newer QEMUs have no such option: -accel tcg,tb-size= says that",
}
"""Options that are left out, and why."""

_INSTEAD = {
    "-no-hpet": (("-machine", "hpet=off"), "QEMU 9 and newer have no such option"),
    "-no-kvm-irqchip": (("-machine", "kernel-irqchip=off"), "newer QEMUs have no such option"),
    "-nodefconfig": (("-no-user-config",), "newer QEMUs have no such option"),
    "-localtime": (("-rtc", "base=localtime"), "newer QEMUs have no such option"),
    "-no-kvm-pit-reinjection": (("-global", "kvm-pit.lost_tick_policy=discard"), "newer QEMUs have no such option"),
    "-rtc-td-hack": (("-rtc", "driftfix=slew"), "newer QEMUs have no such option"),
    "-std-vga": (("-vga", "std"), "newer QEMUs have no such option"),
    "-no-acpi": (("-machine", "acpi=off"), "QEMU 9 and newer have no such option"),
    "-nographic": (("-display", "none"), "there is no terminal: the serial port and the monitor on it are gone"),
    "-curses": (("-display", "none"), "there is no terminal"),
    "-sdl": (("-display", "none"), "there is no screen"),
}
"""Options that become others, and why."""
_RENAMED_BACKENDS = {"tty": "serial", "parport": "parallel"}
"""Of character devices."""
_SCREENS = ("gtk", "sdl", "cocoa", "curses", "spice-app", "default")
_SOUND = ("alsa", "coreaudio", "dsound", "jack", "oss", "pa", "pipewire", "sdl", "sndio")
"""Of a session at a screen. An audiodev that can't reach its server ends QEMU."""

_AFTER_EQUALS = re.compile(r"=([\w.-]+)")
"""QEMU's ids have no other characters (id_wellformed() in util/id.c)."""
_IN_PLACE = ("/dev/dax", "/dev/shm/")  # noqa: S108 - where RAM is that the agent can leave in place
_UNIT = "vm.user and the VM's unit say that"
_UNSAVED = "a guest with it can't be saved: its backend has the guest's RAM mapped"
_ONE_ACCEL = "-accel says that, and QEMU takes one of the two alone"


@dataclass(frozen=True)
class Wanted:
    """What the definition shall have, where it is given."""

    name: str = ""
    device: str = ""
    offset: str = ""
    user: str = ""


def import_command_line(text: str, wanted: Wanted | None = None, shared: Path = Path("/usr/share")) -> Imported:
    """``shared`` is where /usr/share is. Raises InvalidArgument if ``text`` is no command line of QEMU."""
    wanted = wanted or Wanted()
    line = split(text)
    draft = _Draft(line, wanted.device, wanted.offset or "0", wanted.user, shared)
    for word in line.environment:
        draft.note("left out", word, "a VM's unit has an environment of its own")
    if line.unquoted:
        draft.note("look", line.program, "the line has no quotes: words with spaces in them may not be what they were")
    draft.take_name(wanted.name)
    draft.take_options()
    draft.leave_out_remains()
    draft.take_memory()
    draft.take_user()
    for word in (line.program, *(word for words in draft.arguments for word in words)):
        if printable_lines(word, len(word)) != word:
            raise InvalidArgument(f"it has a character that does not show: {printable(word, 100)}")
    return Imported(draft.name, draft.toml(), tuple(draft.notes))


@dataclass
class _Draft:
    line: CommandLine
    device: str
    offset: str
    user: str
    shared: Path
    name: str = ""
    size: Bytes = Bytes(0)
    arguments: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._without_config = False
        self._networks = self._configs = 0
        self._options: list[Option] = []
        for option in self.line.options:
            self._options += self._unfolded(option)
            refuse_many(self._options)
        objects = [option.value for option in self._options if option.name == "-object"]
        self._objects = {value.keys.get("id", ""): value for value in objects}
        self._backends = {
            id_ for id_, value in self._objects.items() if value.first("qom-type").startswith("memory-backend-")
        }
        self._monitors = {option.value.first("chardev") for option in self._options if option.name == "-mon"}
        self._monitors -= {need[1] for option in self._options if option.name != "-mon" for need in needs(option)}
        self._dead = {id_ for id_, value in self._objects.items() if DIES.search(value.keys.get("file", ""))}
        self._dead |= {id_ for id_, value in self._objects.items() if value.keys.get("keyid") in self._dead}
        self._of_devices = {option.value.keys.get("memdev") for option in self._options if option.name == "-device"}
        self._connections = Connections(self._options)
        self._accel = any(option.name == "-accel" for option in self._options)
        self._buses = {option.value.keys["id"] for option in self._options if "id" in option.value.keys}
        machine = "".join(option.text for option in self._options if option.name in ("-machine", "-M"))
        self._buses |= {"pcie", "ide", "isa"} if "q35" in machine else {"pci", "ide", "isa"}

    def _unfolded(self, option: Option) -> list[Option]:
        """An option, or those in the file that it names."""
        if option.name != "-readconfig":
            return [option]
        self._configs += 1
        inside = read_config(option.text, self.shared) if self._configs <= MAX_CONFIGS else None
        if inside is None:
            self._without_config = True
            return [option]
        self.note("changed", option, f"the {len(inside)} options in it stand here by themselves")
        return inside

    def note(self, outcome: str, argument: object, why: str) -> None:
        self.notes.append(Note(outcome, str(argument), why))

    def _left_out(self, option: Option, why: str) -> tuple[str, ...]:
        self.note("left out", option, why)
        return ()

    def _changed(self, option: Option, text: str, why: str) -> tuple[str, ...]:
        self.note("changed", option, why)
        return (option.name, text)

    def toml(self) -> str:
        """The definition, headed by the notes. JSON's strings are TOML's basic ones (toml.io, "String")."""
        head = [f"# Imported from a command line of {self.line.program}."]
        head += ["# What is not as it was there, or needs a look:"] if self.notes else []
        head += [f"#   {note.outcome}: {note.argument}: {note.why}" for note in self.notes]
        words = [f"  {', '.join(_quoted(word) for word in option)}," for option in self.arguments]
        vm = ["", "[vm]", f"qemu = {_quoted(self.line.program)}", "arguments = [", *words, "]"]
        vm += [f"user = {_quoted(self.user)}"] if self.user else []
        memory = {"size": _size(self.size), "device": self.device, "offset": self.offset}
        rest = [*vm, "", "[memory]", *(f"{key} = {_quoted(word)}" for key, word in memory.items()), ""]
        return "\n".join([*(_commentable(line) for line in head), *rest])

    def take_name(self, wanted: str) -> None:
        """The one that was asked for, or the domain's, as far as a VM can be called so."""
        names = [option for option in self._options if option.name == "-name"]
        given = wanted or next((option.value.first("guest") for option in names), "")
        self.name = re.sub(r"[^A-Za-z0-9_.-]", "-", given).lstrip("_.-")[:63] or "imported"
        if self.name != given:
            self.note("changed", f"-name {given}".strip(), f"the VM is called {self.name}")
        for option in names:
            if "process" in option.value.keys:
                self.note("left out", option, "the process is called as its program is")

    def take_options(self) -> None:
        for option in self._options:
            kept = self._kept(option)
            if len(kept) == 2:
                text, notes = whole_paths(kept[0], kept[1], self.line.directory)
                for outcome, why in notes:
                    self.note(outcome, option, why)
                kept = (kept[0], text)
            if kept:
                self.arguments.append(kept)
                self._networks += kept[0] in ("-netdev", "-nic", "-net")
        says = ("-enable-kvm", "-no-kvm")
        said = self._accel or any(one.name in says or "accel" in one.value.keys for one in self._options)
        if self.line.program.endswith("kvm") and not said:
            self.note("changed", self.line.program, "a QEMU of this name takes KVM; -accel says so, whatever it is called")
            self.arguments.append(("-accel", "kvm"))

    def leave_out_remains(self) -> None:
        """Without a part that they name, options would keep QEMU from starting."""
        self.arguments, lost = without_remains(self.arguments)
        for words, why in lost:
            self.note("left out", " ".join(words), why)

    def _kept(self, option: Option) -> tuple[str, ...]:
        """The words that go into the definition for an option: none, its own, or others."""
        if option.name == "-name":
            return ()
        if why := self._connections.why_lost(option):
            return self._left_out(option, why)
        if take := _TAKE.get(option.name):
            return take(self, option)
        if option.name in _WHY:
            return self._left_out(option, _WHY[option.name])
        if option.name in _INSTEAD:
            instead, why = _INSTEAD[option.name]
            self.note("changed", option, why)
            return instead
        return self._plain(option)

    def _plain(self, option: Option) -> tuple[str, ...]:
        if dead := DIES.search(option.text):
            self.note("look", option, f"{dead[0]} is not there without who made it")
        if not self._dead.isdisjoint(_words_in(option.text)):
            self.note("look", option, "it needs a secret that was left out")
        if option.name == "-drive" and option.value.on("snapshot"):
            self.note("look", option, "what the guest writes is in a temporary file, which ends with the QEMU process")
        if option.name == "-tpmdev" and option.value.first("type") == "passthrough":
            self.note("look", option, "what is in the host's TPM is not saved with the guest")
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

    def _without_keys(self, option: Option, keys: tuple[str, ...], why: str) -> tuple[str, ...]:
        rest = str(option.value.without(*keys))
        return self._changed(option, rest, why) if rest else self._left_out(option, why)

    def _without_dead_keys(self, option: Option) -> tuple[str, ...]:
        """A device that has no descriptor is opened by QEMU itself."""
        kept, keys = self._plain(option), set(option.value.keys)
        if keys & set(FD_KEYS):
            why = "its descriptor dies with who opened it: QEMU opens it by itself now"
            kept = self._without_keys(option, FD_KEYS, why)
        if "scsi" in keys and option.value.first("driver").startswith("virtio-blk"):
            kept = self._without_keys(option, ("scsi",), "QEMU 9.1 and newer pass no SCSI commands on from virtio-blk")
        return kept

    def _enable_kvm(self, option: Option) -> tuple[str, ...]:
        return self._left_out(option, _ONE_ACCEL) if self._accel else self._plain(option)

    def _no_kvm(self, option: Option) -> tuple[str, ...]:
        if self._accel:
            return self._left_out(option, _ONE_ACCEL)
        self.note("changed", option, "newer QEMUs have no such option")
        return ("-machine", "accel=tcg")

    def _balloon(self, option: Option) -> tuple[str, ...]:
        kind, comma, rest = option.text.partition(",")
        if kind != "virtio":
            return self._left_out(option, "newer QEMUs have no such option")
        self.note("changed", option, "newer QEMUs have no such option")
        return ("-device", f"virtio-balloon{comma}{rest}")

    def _realtime(self, option: Option) -> tuple[str, ...]:
        self.note("changed", option, "newer QEMUs have no such option")
        return ("-overcommit", f"mem-lock={option.text.removeprefix('mlock=')}")

    def _run_with(self, option: Option) -> tuple[str, ...]:
        if {"user", "chroot"} & set(option.value.keys):
            return self._without_keys(option, ("user", "chroot"), _UNIT)
        return self._plain(option)

    def _action(self, option: Option) -> tuple[str, ...]:
        if option.value.keys.get("shutdown") == "pause":
            return self._without_keys(option, ("shutdown",), _WHY["-no-shutdown"])
        return self._plain(option)

    def _global(self, option: Option) -> tuple[str, ...]:
        if option.text.startswith("migration."):
            return self._left_out(option, "loads are the agent's")
        return self._plain(option)

    def _port(self, option: Option) -> tuple[str, ...]:
        if option.text in ("stdio", "mon:stdio"):
            return self._changed(option, "null", "there is no terminal: it leads nowhere now")
        return self._plain(option)

    def _display(self, option: Option) -> tuple[str, ...]:
        if option.text.split(",")[0] in _SCREENS:
            return self._changed(option, "none", "there is no screen")
        return self._plain(option)

    def _audio(self, option: Option) -> tuple[str, ...]:
        if option.value.first("driver") in _SOUND:
            text = f"none,id={option.value.keys.get('id', '')}"
            return self._changed(option, text, "there is no session whose sound it could be")
        return self._plain(option)

    def _sound(self, option: Option) -> tuple[str, ...]:
        driver, comma, rest = option.text.removeprefix("driver=").partition(",")
        if driver in _SOUND:
            return self._changed(option, f"none{comma}{rest}", "there is no session whose sound it could be")
        return self._plain(option)

    def _watchdog(self, option: Option) -> tuple[str, ...]:
        self.note("changed", option, "QEMU 8 and newer have no such option")
        return ("-device", option.text)

    def _vnc(self, option: Option) -> tuple[str, ...]:
        if option.text.startswith("unix:") and DIES.search(option.text):
            path = f"/run/cpr-agent/vm/{self.name}/vnc.sock"
            text = re.sub(r"^unix:[^,]*", f"unix:{path}", option.text)
            return self._changed(option, text, f"its directory is not the VM's: it is at {path} now")
        return self._plain(option)

    def _machine(self, option: Option) -> tuple[str, ...]:
        """[memory] says what ``memory-backend`` says."""
        keys = option.value.keys
        if "accel" in keys and self._accel:
            self.note("changed", option, _ONE_ACCEL)
            option.value.without("accel")
        text = str(option.value.without("memory-backend"))
        if plain := re.sub(r"\+pve\d+", "", text):
            return self._changed(option, plain, "+pve… is Proxmox VE's") if plain != text else (option.name, text)
        return ()

    def _object(self, option: Option) -> tuple[str, ...]:
        if (id_ := option.value.keys.get("id")) in self._backends:
            own = id_ in self._of_devices
            why = "it is the memory of a device that is left out" if own else "[memory] says where the RAM is"
            return self._left_out(option, why)
        if option.value.keys.get("id") in self._dead:
            return self._left_out(option, "this secret dies with libvirt's domain, or needs one that does")
        if vhost_user(option):
            self.note("look", option, _UNSAVED)
        return self._without_dead_keys(option)

    def _device(self, option: Option) -> tuple[str, ...]:
        if option.value.keys.get("memdev") in self._backends:
            return self._left_out(option, "its memory would not outlive QEMU")
        if writes_ram(option.value.keys):
            return self._left_out(option, WRITES_RAM)
        if option.value.first("driver") == "sga":
            self.note("changed", option, "QEMU 8 and newer have no such device: SeaBIOS itself writes to the serial port")
            return ("-machine", "graphics=off")
        if vhost_user(option):
            self.note("look", option, _UNSAVED)
        bus = option.value.keys.get("bus", "")
        if self._without_config and bus and not {bus, bus.rpartition(".")[0]} & self._buses:
            self.note("look", option, f"its bus {bus} was made by the file that was left out (-readconfig)")
        return self._without_dead_keys(option)

    def _chardev(self, option: Option) -> tuple[str, ...]:
        id_, kind = option.value.keys.get("id", ""), option.value.first("backend")
        if id_ in self._monitors:
            return self._left_out(option, "it is a monitor's, and the agent has its own")
        peer = self._connections.peer(option)
        if kind == "stdio" or (peer.dies and (peer.client or kind != "socket")):
            why = "what it was connected to is not there: it leads nowhere now"
            return self._changed(option, f"null,id={id_}{',mux=on' * option.value.on('mux')}", why)
        if peer.dies:
            path = f"/run/cpr-agent/vm/{self.name}/{id_}.sock"
            why = f"its socket was made for who has started that QEMU: it is at {path} now"
            return self._changed(option, f"socket,id={id_},path={path},server=on,wait=off", why)
        if peer.client:
            who = f"{peer.who} must listen there" if peer.who else "somebody must listen there"
            self.note("look", option, f"QEMU is the client at {peer.where}: {who} before the VM starts")
        elif peer.who:
            self.note("look", option, f"QEMU makes {peer.where}, and waits there for {peer.who}")
        if kind in _RENAMED_BACKENDS:
            why = "newer QEMUs know it by that name alone"
            return self._changed(option, str(option.value.renamed("backend", _RENAMED_BACKENDS[kind])), why)
        return (option.name, option.text)

    def _network(self, option: Option) -> tuple[str, ...]:
        if vhost_user(option):
            self.note("look", option, _UNSAVED)
        changed, why = at_home(option.value, self._interface())
        if changed is not None:
            return self._changed(option, changed, why)
        if why:
            self.note("look", option, why)
        return self._plain(option)

    def _interface(self) -> str:
        return f"{self.name[:12]}-{self._networks}"  # 15 characters are the kernel's limit (IFNAMSIZ)

    def take_memory(self) -> None:
        """The device that was asked for; else the file that the RAM is in already; else none, and that is said."""
        if not self.size:
            self.size = DEFAULT_SIZE
            self.note("look", "-m", "none was given: this is QEMU's default")
        nodes = [one.value for one in self._options if one.name == "-numa" and "memdev" in one.value.keys]
        if len(nodes) > 1:
            why = f"the guest had {len(nodes)} NUMA nodes: write a [[memory.node]] for each to keep them (cpr-vm.toml(5))"
            self.note("look", "memory", why)
        if self.device:
            return
        named = {value.keys["memdev"] for value in nodes}
        named |= {one.value.keys.get("memory-backend", "") for one in self.line.options if one.name in ("-machine", "-M")}
        ram = [self._objects[id_].keys for id_ in self._backends & named or self._backends]
        files = [keys.get("mem-path", "") for keys in ram if keys.get("share", "off").lower() in ("", "on", "true", "yes")]
        if len(files) == len(ram) == 1 and files[0].startswith(_IN_PLACE):
            self.device = files[0]
            return
        self.device = NO_DEVICE
        room = f"`cprctl memory allocate {self.name} --size {_size(self.size)}` finds room"
        self.note("look", "memory.device", f"the RAM was where it outlives nothing; {room}")

    def take_user(self) -> None:
        if self.user:
            return
        if self.line.user not in ("", "root"):
            self.user = self.line.user
        elif self.line.user:
            why = (
                "that QEMU ran as root, and here it runs as a user of its own, which must be able to open disks and devices"
            )
            self.note("changed", "vm.user", why)
        else:
            self.note(
                "look", "vm.user", "QEMU will run as a user of its own, which must be allowed to open its disks and devices"
            )


_TAKE = {
    "-m": _Draft._take_size,
    "-enable-kvm": _Draft._enable_kvm,
    "-no-kvm": _Draft._no_kvm,
    "-balloon": _Draft._balloon,
    "-realtime": _Draft._realtime,
    "-run-with": _Draft._run_with,
    "-action": _Draft._action,
    "-global": _Draft._global,
    "-serial": _Draft._port,
    "-parallel": _Draft._port,
    "-display": _Draft._display,
    "-audiodev": _Draft._audio,
    "-audio": _Draft._sound,
    "-watchdog": _Draft._watchdog,
    "-vnc": _Draft._vnc,
    "-machine": _Draft._machine,
    "-M": _Draft._machine,
    "-object": _Draft._object,
    "-device": _Draft._device,
    "-chardev": _Draft._chardev,
    "-netdev": _Draft._network,
    "-nic": _Draft._network,
    "-net": _Draft._network,
}
"""Options that are more than words, and what makes of one what can be kept of it."""


def _words_in(text: str) -> set[str]:
    """All that could be the name of a secret: between two quotes, or after an equals sign."""
    return {*text.split('"')[1:-1], *_AFTER_EQUALS.findall(text)}


def _size(count: int) -> str:
    """As QEMU writes it: in the largest unit that divides it."""
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if count % (1 << shift) == 0:
            return f"{count >> shift}{unit}"
    return str(count)


def _commentable(line: str) -> str:
    """TOML allows no control characters in comments, and a reader's terminal should see none."""
    return "".join(character if character.isprintable() else " " for character in line)


def _quoted(word: str) -> str:
    """As it reads best: JSON without a backslash before each quote."""
    if '"' in word and "'" not in word and word.isprintable():
        return f"'{word}'"
    return json.dumps(word, ensure_ascii=False).replace("\x7f", "\\u007f")
