"""QEMU's command line: what the admin wrote, and what the agent adds to it.

The descriptors have fixed numbers, so that the argument vector of a load is that of the start, and QEMU opens its RAM
as ``/proc/self/fd/N``: the very object that the launcher proved to be the right one, which cannot be swapped or come
into being between check and use.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cpr_agent.core.model import RAM_ID, Definition, Launch, Located, Manifest

MEMORY_FD = 10
SOCKET_FDS = {"agent.sock": 11, "unit.sock": 12, "admin.sock": 13}
"""The agent's own QMP socket, the one by which the VM's unit stops it, and the one left to the admin."""

_OWN = {
    "-m": "the memory size",
    "-name": "the name",
    "-mem-path": "the memory backend",
    "-mem-prealloc": "the memory backend",
    "-incoming": "loads are the agent's",
    "-S": "the agent decides when the guest runs",
    "-loadvm": "loads are the agent's",
    "-daemonize": "the VM's unit supervises QEMU",
    "-pidfile": "the VM's unit supervises QEMU",
    "-runas": "vm.user names the user",
    "-chroot": "the VM's unit confines QEMU",
    "-snapshot": "writes would be lost with the QEMU process",
    "-readconfig": "its contents can't be checked",
}


def collisions(arguments: tuple[str, ...]) -> list[str]:
    """What in the admin's arguments the agent adds itself or can't have there; empty if nothing."""
    found = []
    for index, raw in enumerate(arguments):
        argument = _single_dash(raw)
        value = arguments[index + 1] if index + 1 < len(arguments) else ""
        parts = value.split(",")
        if argument in _OWN:
            found.append(f"{raw} ({_OWN[argument]})")
        elif argument in ("-machine", "-M") and any(part.startswith("memory-backend=") for part in parts):
            found.append(f"{raw} memory-backend= (the memory backend)")
        elif argument in ("-object", "-chardev", "-mon", "-device", "-netdev", "-blockdev", "-drive"):
            own = [part for part in parts if part.startswith(("id=cpr-", "chardev=cpr-"))]
            found.extend(f"{raw} {part} (names that begin with cpr- are the agent's)" for part in own)
    return found


def _single_dash(argument: str) -> str:
    """QEMU takes ``--option`` for ``-option``."""
    return argument[1:] if argument.startswith("--") else argument


def plan_start(definition: Definition, located: Located, run_dir: Path, log_dir: Path) -> Launch:
    """How to start the VM afresh with the memory that was located."""
    argv = (*_base_argv(definition, located),)
    return Launch(
        vm=definition.name,
        kind="start",
        argv=argv,
        base_argv=argv,
        memory=located.identity,
        node=located.node,
        memory_fd=MEMORY_FD,
        sockets={str(run_dir / "vm" / definition.name / name): fd for name, fd in SOCKET_FDS.items()},
        log=str(log_dir / f"{definition.name}.log"),
        user=definition.vm.user,
        shutdown_timeout_s=float(definition.vm.shutdown_timeout),
        definition_digest=definition.digest,
    )


def plan_load(manifest: Manifest, located: Located, log_dir: Path) -> Launch:
    """How to start the VM so that its checkpoint can be loaded: the recorded arguments, the machine type pinned.

    An alias such as ``q35`` names another machine in another QEMU (FACTS.md); a later ``-machine`` overrides an earlier.
    """
    base = manifest.launch.base_argv
    return replace(
        manifest.launch,
        kind="load",
        argv=(*base, "-machine", f"type={manifest.qemu.machine_type}", "-S", "-incoming", "defer"),
        node=located.node,
        log=str(log_dir / f"{manifest.vm}.log"),
        checkpoint=manifest.id,
    )


def _base_argv(definition: Definition, located: Located) -> list[str]:
    identity = located.identity
    backend = {
        "qom-type": "memory-backend-file",
        "id": RAM_ID,
        "size": str(identity.size_bytes),
        "mem-path": f"/proc/self/fd/{MEMORY_FD}",
        "share": "on",
    }
    if identity.align_bytes:
        backend["align"] = str(identity.align_bytes)  # device-dax maps at multiples of it only (QEMU docs/nvdimm.txt)
    if identity.offset_bytes:
        backend["offset"] = str(identity.offset_bytes)
    argv = [
        definition.vm.qemu,
        *("-name", f"guest={definition.name}"),
        *definition.vm.arguments,
        *("-m", f"{identity.size_bytes}B"),
        *("-object", ",".join(value if key == "qom-type" else f"{key}={value}" for key, value in backend.items())),
        *("-machine", f"memory-backend={RAM_ID}"),
    ]
    options = {_single_dash(argument) for argument in definition.vm.arguments}
    if not options & {"-display", "-nographic", "-curses", "-vnc", "-spice"}:
        argv += ["-display", "none"]
    for name, fd in SOCKET_FDS.items():
        chardev = f"cpr-{name.removesuffix('.sock')}"
        argv += [
            "-chardev",
            f"socket,id={chardev},fd={fd},server=on,wait=off",
            "-mon",
            f"chardev={chardev},mode=control",
        ]
    return argv
