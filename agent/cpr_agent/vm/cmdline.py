# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line: the admin's arguments, and those that the agent adds.

The descriptors have fixed numbers, so that the argument vector of a load is that of the start, and QEMU opens its RAM
as ``/proc/self/fd/N``: the very object that the launcher proved to be the right one, which cannot be swapped or come
into being between check and use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from cpr_agent.core.model import (
    RAM_ID,
    Definition,
    Firmware,
    KeptFile,
    Launch,
    Located,
    Manifest,
    MemoryIdentity,
    MemorySection,
    Ram,
    ram_of,
)
from cpr_agent.errors import InvalidArgument
from cpr_agent.text import printable

MEMORY_FD = 10
SOCKET_FDS = {"agent.sock": 11, "unit.sock": 12, "admin.sock": 13}
"""The agent's own QMP socket, the one by which the VM's unit stops it, and the one left to the admin."""
CPR_SOCKET, MAIN_SOCKET = "cpr.sock", "main.sock"
"""By which one QEMU hands descriptors over to another one, and device state."""
MORE_MEMORY_FDS = 14
"""And on: of the second NUMA node, and those after it."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""System calls that QEMU forbids itself by seccomp once it is set up (qemu(1), -sandbox), as libvirt has it. The agent gets
a new QEMU without the old one starting a program; cpr-exec would need that."""

ROM_DIRECTORIES = (
    *("share/qemu", "share/seabios", "lib/ipxe/qemu", "share/qemu-firmware"),
    *("share/seavgabios", "share/ipxe/qemu", "share/ipxe", "share/sgabios"),
)
"""Below the prefix of a program, where distributions have QEMU look for ROMs."""
WHOLE_IMAGES = ("-cdrom", "-hda", "-hdb", "-hdc", "-hdd", "-fda", "-fdb", "-sd", "-mtdblock", "-pflash")
"""Options that are the path of an image as a whole."""

OWN = {
    "-m": "the memory size",
    "-name": "the name",
    "-mem-path": "the memory backend",
    "-mem-prealloc": "the memory backend",
    "-incoming": "loads are the agent's",
    "-preconfig": "QEMU would wait for commands that the agent does not give",
    "-S": "the agent decides when the guest runs",
    "-loadvm": "loads are the agent's",
    "-daemonize": "the VM's unit supervises QEMU",
    "-pidfile": "the VM's unit supervises QEMU",
    "-runas": "vm.user names the user",
    "-chroot": "the VM's unit confines QEMU",
    "-snapshot": "writes would be lost with the QEMU process",
    "-readconfig": "its contents can't be checked",
}
WRITES_RAM = "QEMU writes its data to the guest's RAM at every start, that for a load included"
"""Why a generic loader can't have data. Its file is written at a start of the guest alone, as a kernel is."""


def collisions(arguments: tuple[str, ...]) -> list[str]:
    """Arguments of the admin that the agent adds itself, or can't allow. Raises InvalidArgument."""
    found = []
    for index, raw in enumerate(arguments):
        argument = single_dash(raw)
        value = arguments[index + 1] if index + 1 < len(arguments) else ""
        parts = value.split(",")
        if argument in OWN:
            found.append(f"{raw} ({OWN[argument]})")
        elif argument in ("-machine", "-M") and any(part.startswith("memory-backend=") for part in parts):
            found.append(f"{raw} memory-backend= (the memory backend)")
        elif argument in ("-object", "-chardev", "-mon", "-device", "-netdev", "-blockdev", "-drive"):
            own = [part for part in parts if part.startswith(("id=cpr-", "chardev=cpr-"))]
            found.extend(f"{raw} {part} (names that begin with cpr- are the agent's)" for part in own)
        if argument == "-device" and writes_ram(keyed(value)):
            found.append(f"{raw} {value} ({WRITES_RAM})")
    return found


def writes_ram(device: Mapping[str, str]) -> bool:
    """Whether a device is a generic loader with data (QEMU, docs/system/generic-loader.rst). Its reset writes them with
    ``-incoming`` too (hw/core/generic-loader.c), after the witness was read."""
    return device.get("driver", next(iter(device), "")) == "loader" and bool({"data", "data-len"} & set(device))


def numa_collisions(arguments: tuple[str, ...]) -> list[str]:
    """Arguments of the admin that the agent adds itself for ``[[memory.node]]``; distances and CPUs are the admin's."""
    values = [(value, keyed(value)) for value in option(arguments, "-numa")]
    return [f"-numa {value} (the NUMA nodes)" for value, keys in values if "node" in (*keys, keys.get("type"))]


def single_dash(argument: str) -> str:
    """QEMU takes ``--option`` for ``-option``."""
    return argument[1:] if argument.startswith("--") else argument


def plan_start(definition: Definition, located: Sequence[Located], run_dir: Path, log_dir: Path) -> Launch:
    """How to start the VM afresh with the memory that was located."""
    ram = ram_of(located)
    argv = (*_base_argv(definition, ram),)
    return Launch(
        vm=definition.name,
        kind="start",
        argv=argv,
        base_argv=argv,
        memory=ram,
        nodes=tuple(one.node for one in located),
        memory_fds=_memory_fds(ram),
        sockets={str(run_dir / "vm" / definition.name / name): fd for name, fd in SOCKET_FDS.items()},
        log=str(log_dir / f"{definition.name}.log"),
        user=definition.vm.user,
        shutdown_timeout_s=float(definition.vm.shutdown_timeout),
        definition_digest=definition.digest,
    )


def plan_load(manifest: Manifest, located: Sequence[Located], log_dir: Path) -> Launch:
    """How to start the VM so that its checkpoint can be loaded: the recorded arguments, the machine type pinned. The memory
    is the one that was saved, as it is to be found in this boot.

    An alias such as ``q35`` names another machine in another QEMU; a later ``-machine`` overrides an earlier.
    """
    base = manifest.launch.base_argv
    return replace(
        manifest.launch,
        kind="load",
        argv=(*_appending(base), "-machine", f"type={manifest.qemu.machine_type}", "-S", "-incoming", "defer"),
        memory=ram_of(located),
        nodes=tuple(one.node for one in located),
        log=str(log_dir / f"{manifest.vm}.log"),
        checkpoint=manifest.id,
    )


def _appending(argv: Sequence[str]) -> tuple[str, ...]:
    """With each log of a character device continued, where the admin says nothing of that. QEMU empties a file that it does
    not append to (qmp_chardev_open_file_source() and qemu_char_open() in chardev)."""
    out = list(argv)
    for index, word in enumerate(argv[:-1]):
        if single_dash(word) == "-chardev":
            out[index + 1] += "".join(f",{key}=on" for key in _emptied(argv[index + 1]))
    return tuple(out)


def _emptied(chardev: str) -> list[str]:
    """The keys by which QEMU would append to the files of a character device, as far as nothing is said of them."""
    keys = keyed(chardev)
    files = {"append": "file" in (next(iter(keys), ""), keys.get("backend")), "logappend": "logfile" in keys}
    return [key for key, has in files.items() if has and {key, f"no{key}"}.isdisjoint(keys)]


def emptied_logs(argv: Sequence[str]) -> list[str]:
    """Ports whose file each load empties, because they have no word for a log that goes on."""
    ports = ("-serial", "-parallel", "-monitor", "-debugcon")
    found = [(name, value) for name in ports for value in option(argv, name)]
    return [f"{name} {value}" for name, value in found if value.removeprefix("mon:").startswith("file:")]


def plan_transfer(draft: Manifest, located: Sequence[Located], log_dir: Path, directory: Path) -> Launch:
    """How to start the VM so that it can take its guest over from another QEMU by cpr-transfer (QEMU,
    docs/devel/migration/CPR.rst): it waits in ``directory``, before it has a monitor, for the other QEMU's descriptors."""
    load = plan_load(draft, located, log_dir)
    channel = {"channel-type": "cpr", "addr": transfer_address(directory / CPR_SOCKET)}
    return replace(load, argv=(*load.argv, "-incoming", json.dumps(channel)))


def transfer_address(path: Path) -> dict[str, str]:
    """A MigrationAddress of QAPI."""
    return {"transport": "socket", "type": "unix", "path": str(path)}


def plan_probe(launch: Launch) -> Launch:
    """How to ask the installed program for its version and machine types. It gets no machine, and touches neither RAM nor
    disks."""
    argv = (launch.base_argv[0], *("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"), *_monitors())
    log = Path(launch.log)
    return replace(launch, kind="load", argv=argv, log=str(log.with_name(f"{launch.vm}:probe{log.suffix}")))


def _memory_fds(ram: Ram) -> tuple[int, ...]:
    return (MEMORY_FD, *range(MORE_MEMORY_FDS, MORE_MEMORY_FDS + len(ram) - 1))


def _base_argv(definition: Definition, ram: Ram) -> list[str]:
    argv = [
        definition.vm.qemu,
        *("-name", f"guest={definition.name}"),
        *_sandboxed(definition.vm.arguments),
        *("-m", f"{sum(one.size_bytes for one in ram)}B"),
        *(word for one, fd in zip(ram, _memory_fds(ram), strict=True) for word in ("-object", _backend(one, fd))),
        *(_numa(definition.memory) if definition.memory.node else ("-machine", f"memory-backend={RAM_ID}")),
    ]
    options = {single_dash(argument) for argument in definition.vm.arguments}
    if not options & {"-display", "-nographic", "-curses", "-vnc", "-spice"}:
        argv += ["-display", "none"]
    return [*argv, *_monitors()]


def _monitors() -> list[str]:
    argv = []
    for name, fd in SOCKET_FDS.items():
        chardev = f"cpr-{name.removesuffix('.sock')}"
        argv += ["-chardev", f"socket,id={chardev},fd={fd},server=on,wait=off", "-mon", f"chardev={chardev},mode=control"]
    return argv


def _sandboxed(arguments: tuple[str, ...]) -> list[str]:
    """With QEMU's sandbox, unless the admin says something of it. ``-sandbox off`` is left out: it is what QEMU does
    without a word, and one that was built without seccomp does not know the option."""
    if not option(arguments, "-sandbox"):
        return ["-sandbox", SANDBOX, *arguments]
    out: list[str] = []
    words = iter(arguments)
    for word in words:
        value = next(words, "") if single_dash(word) == "-sandbox" else None
        out += [word] if value is None else [word, value] if value != "off" else []
    return out


def _backend(identity: MemoryIdentity, fd: int) -> str:
    backend = {
        "id": identity.object_id,
        "size": str(identity.size_bytes),
        "mem-path": f"/proc/self/fd/{fd}",
        "share": "on",
    }
    if identity.align_bytes:
        backend["align"] = str(identity.align_bytes)  # device-dax maps at multiples of it only (QEMU docs/nvdimm.txt)
    if identity.offset_bytes:
        backend["offset"] = str(identity.offset_bytes)
    return ",".join(["memory-backend-file", *(f"{key}={value}" for key, value in backend.items())])


def _numa(memory: MemorySection) -> Iterator[str]:
    """``cpus`` of several ranges is to be repeated (QEMU's qemu-options.hx, -numa)."""
    for number, (object_id, node) in enumerate(zip(memory.object_ids, memory.node, strict=True)):
        cpus = "".join(f",cpus={some}" for some in node.cpus.split(",") if some)
        yield from ("-numa", f"node,nodeid={number},memdev={object_id}{cpus}")


def option(argv: Sequence[str], *names: str) -> list[str]:
    """The values of each of these options, in order."""
    return [value for name, value in pairwise(argv) if single_dash(name) in names]


def keyed(value: str) -> dict[str, str]:
    """``a=b,c=d`` as QEMU reads it, with ``,,`` for a comma in a value; JSON where it takes that too. Raises
    InvalidArgument."""
    if value.startswith("{"):
        try:
            found: dict[str, str] = {}
            _flatten(json.loads(value), "", found)
            return found
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{printable(value, 100)} can't be read as JSON: {error}") from error
    words = (word.replace("\0", ",").partition("=") for word in value.replace(",,", "\0").split(","))
    return {key: word for key, _, word in words}


def _flatten(value: dict[str, Any], prefix: str, found: dict[str, str]) -> None:
    """``{"file": {"filename": "x"}}`` as ``file.filename=x``, which is the same to QEMU."""
    for key, word in value.items():
        if isinstance(word, dict):
            _flatten(word, f"{prefix}{key}.", found)
        else:
            found[f"{prefix}{key}"] = str(word)


MAX_CPUS = 1 << 16
"""No machine type of QEMU has as many (hw/i386/pc_q35.c: 4096)."""
_TOPOLOGY = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


def cpus(argv: Sequence[str]) -> int:
    """Those that the guest begins with (qemu(1), -smp); 0 if that can't be told, as of no command line at all."""
    try:
        given = [keyed(value) for value in option(argv, "-smp")]
        words = {key: word for one in given for key, word in one.items()}
        bare = [int(key) for one in given for key, word in one.items() if not word and key.isdecimal()]
        if bare or "cpus" in words:
            found = bare[-1] if bare else int(words["cpus"])
        else:
            found = prod(int(words.get(name, 1)) for name in _TOPOLOGY) if argv else 0
        return found if 0 <= found <= MAX_CPUS else 0
    except (InvalidArgument, ValueError):
        return 0


def replaced_backends(argv: Sequence[str]) -> set[str]:
    """Memory that was to be the machine's, and is not: a later ``-machine`` wins. It is no part of QEMU's state."""
    named = [machine.get("memory-backend", "") for machine in map(keyed, option(argv, "-machine", "-M"))]
    given = list(filter(None, named))
    return {*given[:-1]} - {*given[-1:]}


def tap_devices(argv: Sequence[str]) -> list[str]:
    """Those that have a name. One with several queues a second QEMU can open, and by that sets back the size of the header
    before each packet, for both: the guest in the first one has no network from then on (measured; net_tap_fd_init in QEMU,
    TUNSETVNETHDRSZ in the kernel's tun.c)."""
    return [net["ifname"] for net in map(keyed, option(argv, "-netdev", "-nic", "-net")) if net.get("ifname")]


def listening_sockets(argv: Sequence[str]) -> dict[str, str]:
    """Paths of the Unix sockets at which QEMU listens by its command line, by the names of their character devices; those
    without a name by their paths. The agent's own are handed over as descriptors, and have no path here."""
    chardevs = [(one.get("id", ""), one) for one in map(keyed, option(argv, "-chardev")) if one.get("path")]
    unnamed = option(argv, "-serial", "-parallel", "-monitor", "-qmp", "-qmp-pretty", "-gdb")
    chardevs += [("", keyed(f"path={value.removeprefix('unix:')}")) for value in unnamed if value.startswith("unix:")]
    found = [(name or one["path"], one["path"]) for name, one in chardevs if one.get("server", "off") in ("", "on")]
    return {name: path for name, path in found if path.startswith("/")}


def password_displays(argv: Sequence[str]) -> list[str]:
    """Displays that take a password which no argument has: it is set on the monitor, and lasts as long as its QEMU."""
    displays = [(name, keyed(value)) for name in ("-vnc", "-spice") for value in option(argv, name)]
    return [
        name[1:].upper()
        for name, keys in displays
        if "password-secret" not in keys and (_on(keys.get("password", "off") or "on") if name == "-vnc" else _asks(keys))
    ]


def _asks(spice: Mapping[str, str]) -> bool:
    return not spice.get("password") and not _on(spice.get("disable-ticketing", "off") or "on")


BOOT_FILES = ("-kernel", "-initrd", "-dtb", "-shim", "-option-rom")
"""What a guest boots without a boot loader of its own."""
_TABLES = {"-fw_cfg": ("file",), "-acpitable": ("file", "data"), "-smbios": ("file", "path")}
_NOT_COPIED = {
    "-object": (("secret", "file"), ("authz-list-file", "filename"), ("tls-creds-", "dir"), ("input-linux", "evdev")),
    "-fsdev": (("local", "path"),),
    "-virtfs": (("local", "path"),),
    "-chardev": (("serial", "path"), ("parallel", "path")),
}
"""How the kinds begin of parts without which QEMU does not start, and their keys: secrets, directories and devices."""


def read_at_start(argv: Sequence[str]) -> list[str]:
    """Files that QEMU reads as it starts, also for a load, and does not keep open: whole paths."""
    files = [*option(argv, "-bios"), *_option_roms(argv), *_boot_files(argv)]
    for name, kinds in _NOT_COPIED.items():
        for keys in map(keyed, option(argv, name)):
            kind = keys.get("qom-type", next(iter(keys), ""))
            files += [keys[key] for start, key in kinds if kind.startswith(start) and key in keys]
    return [file for file in dict.fromkeys(files) if file.startswith("/")]


def _boot_files(argv: Sequence[str]) -> list[str]:
    """Kernels, and tables and data for the guest's firmware. A value that is several files is left out: modules of a
    multiboot kernel, and tables that are put together."""
    files = [path for path in option(argv, *BOOT_FILES) if " " not in path and "," not in path]
    for name, known in _TABLES.items():
        tables = map(keyed, option(argv, name))
        files += [keys[key] for keys in tables for key in known if key in keys and ":" not in keys[key]]
    loaders = map(keyed, option(argv, "-device"))
    return files + [keys["file"] for keys in loaders if "loader" in (*keys, keys.get("driver")) and "file" in keys]


def firmware_files(argv: Sequence[str]) -> list[str]:
    """Files of the VM's firmware and its variables that the admin named by their whole paths."""
    files = [*option(argv, "-bios", "-pflash"), *_option_roms(argv), *(path for path, _ in _flash(argv))]
    return [file for file in dict.fromkeys(files) if file.startswith("/")]


def _option_roms(argv: Sequence[str]) -> list[str]:
    return [device["romfile"] for device in map(keyed, option(argv, "-device")) if device.get("romfile")]


def _flash(argv: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Each file that is flash memory, and whether it is read only."""
    for drive in map(keyed, option(argv, "-drive")):
        if drive.get("if") == "pflash":
            yield drive.get("file", ""), _on(drive.get("readonly") or drive.get("read-only"))
    nodes = {node.get("node-name", ""): node for node in map(keyed, option(argv, "-blockdev"))}
    for machine in map(keyed, option(argv, "-machine", "-M")):
        for flash in ("pflash0", "pflash1"):
            node = nodes.get(machine.get(flash, ""), {})
            below = nodes.get(node.get("file", ""), {})
            path = node.get("filename") or node.get("file.filename") or below.get("filename", "")
            yield path, _on(node.get("read-only"))


def _on(flag: str | None) -> bool:
    """A flag of JSON is Python's word by now."""
    return (flag or "off").lower() in ("on", "yes", "true")


def kept_firmware(argv: Sequence[str]) -> Firmware:
    """What QEMU reads as firmware, or as a kernel, and does not write. It looks for other ROMs in its data directories:
    those of ``-L``, then those beside its program (get_relocated_path() in util/cutils.c; --firmwarepath of Debian's and
    Fedora's packages)."""
    named = [*option(argv, "-bios"), *_option_roms(argv), *(path for path, read_only in _flash(argv) if read_only)]
    program = Path(argv[0]).resolve()
    directories = [path for path in option(argv, "-L") if path.startswith("/")]
    return Firmware(
        files=tuple(name for name in dict.fromkeys([*named, *_boot_files(argv)]) if name.startswith("/")),
        names=tuple(name for name in named if name and "/" not in name),
        directories=(*directories, *(str(program.parent.parent / name) for name in ROM_DIRECTORIES)),
    )


def with_firmware(argv: Sequence[str], copies: Sequence[KeptFile]) -> tuple[str, ...]:
    """Copies in the place of files. The directory of ROMs is looked at before QEMU's own."""
    paths = {file.path: file.copy for file in copies if not file.rom}
    out = with_paths(argv, paths) if paths else tuple(argv)
    roms = next((str(Path(file.copy).parent) for file in copies if file.rom), "")
    return (out[0], "-L", roms, *out[1:]) if roms else out


def with_paths(argv: Sequence[str], paths: Mapping[str, str]) -> tuple[str, ...]:
    """Each of these paths replaced by another, where it is the value of an option or of a key."""
    return (argv[0], *(word if word.startswith("-") else _with_paths(word, paths) for word in argv[1:]))


def _with_paths(word: str, paths: Mapping[str, str]) -> str:
    if word in paths:
        return paths[word]
    if word.startswith("{"):
        try:
            before = json.loads(word)
            after = _replaced(before, paths)
        except (ValueError, RecursionError):
            return word
        return word if after == before else json.dumps(after)
    parts = [part.partition("=") for part in word.replace(",,", "\0").split(",")]
    if not any(value.replace("\0", ",") in paths for _, _, value in parts):
        return word
    changed = [(key, equals, paths.get(value.replace("\0", ","), value.replace("\0", ","))) for key, equals, value in parts]
    return ",".join(f"{key}{equals}{value.replace(',', ',,')}" for key, equals, value in changed)


def _replaced(value: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, paths) for key, inner in value.items()}
    return paths.get(value, value) if isinstance(value, str) else value


def image_files(argv: Sequence[str]) -> list[str]:
    """Files of the host that are disks or firmware by the command line, as the admin named them."""
    files = option(argv, *WHOLE_IMAGES)
    for keys in map(keyed, option(argv, "-drive", "-blockdev")):
        files += [keys.get("file", ""), keys.get("filename", ""), keys.get("file.filename", "")]
    return [file for file in dict.fromkeys(files) if file.startswith("/")]


def files_below(argv: Sequence[str]) -> list[str]:
    """Those of ``image_files`` that the command line itself puts below the first image of a disk."""
    nodes = {keys["node-name"]: keys for keys in map(keyed, option(argv, "-blockdev")) if "node-name" in keys}
    left = [keys["backing"] for keys in nodes.values() if "backing" in keys]
    below: set[str] = set()
    while left:
        name = left.pop()
        if name in nodes and name not in below:
            below.add(name)
            left += [nodes[name].get(role, "") for role in ("file", "backing")]
    return [nodes[name][key] for name in sorted(below) for key in ("filename", "file.filename") if key in nodes[name]]


def cpu_model(argv: Sequence[str]) -> dict[str, Any]:
    """The ``-cpu`` argument as a CpuModelInfo of QAPI; qemu64 is the default on x86."""
    name, *features = (option(argv, "-cpu") or ["qemu64"])[-1].split(",")
    props: dict[str, object] = {}
    for feature in features:
        key, _, value = feature.partition("=")
        if key.startswith(("+", "-")):
            props[key[1:]] = key.startswith("+")
        else:
            props[key] = {"on": True, "off": False}.get(value, int(value, 0) if _number(value) else value)
    return {"name": name, "props": props}


def _number(text: str) -> bool:
    try:
        int(text, 0)
    except ValueError:
        return False
    return True
