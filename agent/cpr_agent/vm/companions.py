# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that a VM's QEMU needs beside it, by its command line.

swtpm ends when a QEMU that it serves does: QEMU tells it to (CMD_SHUTDOWN in backends/tpm/tpm_emulator.c), also without
``--terminate``. virtiofsd ends with its one connection. qemu-nbd and passt stay, and serve one QEMU at a time: a second one
that starts meanwhile waits for the first one's end, and hangs till then.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cpr_agent.core.model import Companion
from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.connections import SWTPM, VIRTIOFSD, companion_of
from cpr_agent.vm.foreign import Option, Value, options_of
from cpr_agent.vm.retry import poll_until

_END = (SWTPM, VIRTIOFSD)


def companions(argv: Sequence[str]) -> list[Companion]:
    options = _options(argv)
    needed = {user[0]: user[1] for option in options if (user := companion_of(option))}
    return [one for option in options for one in _of(option, needed)]


def unsaveable(argv: Sequence[str]) -> list[str]:
    """Why a guest can't be saved that has these: a backend of vhost-user has the guest's RAM mapped, for as long as QEMU
    lives and longer, so that nothing could prove who has written to it; and no saved guest could be taken back."""
    keys = {"-device": "driver", "-netdev": "type"}
    parts = [(one.name, one.value.first(keys[one.name])) for one in _options(argv) if one.name in keys]
    return [
        f"{name} {kind} shares the guest's RAM with a program that is not QEMU: shut the guest down, and start it afresh "
        "without (virtio-blk, vhost-net and NFS need no such program)"
        for name, kind in parts
        if (name == "-device" and kind.startswith("vhost-user-")) or (name == "-netdev" and kind == "vhost-user")
    ]


async def missing(some: Iterable[Companion], timeout_s: float) -> list[Companion]:
    """Those whose socket on this host nobody has made, also after so long."""
    awaited = [one for one in some if one.listens and one.where.startswith("/")]

    async def absent() -> list[Companion]:
        return [one for one in awaited if not _is_socket(one.where)]

    return await poll_until(absent, lambda found: not found, timeout_s)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:
        return False


def _options(argv: Sequence[str]) -> list[Option]:
    """None of a command line that QEMU would not take either."""
    try:
        return options_of(argv[1:])
    except InvalidArgument:
        return []


def _of(option: Option, needed: dict[str, str]) -> Iterator[Companion]:
    value = option.value
    if option.name == "-chardev" and value.first("backend") == "socket":
        id_, where = value.keys.get("id", ""), _place(value.keys)
        who = needed.get(id_, "")
        server = value.on("server")
        if where and (who or not server):
            name, listens = who or f"the server of the character device {id_}", not (server or _retries(value))
            yield Companion(name=name, where=where, ends=who in _END, shared=not who, listens=listens)
    elif option.name == "-netdev" and value.first("type") in ("stream", "socket"):
        where = value.keys.get("connect") or ("" if value.on("server") else _place(value.keys, "addr."))
        if where:
            name = f"the peer of the network {value.keys.get('id', '')} (passt or another)"
            yield Companion(name=name, where=where, listens=not _retries(value))
    elif option.name in ("-drive", "-blockdev"):
        yield from (Companion(name="the NBD server", where=where) for where in _nbd_servers(value))


def _retries(value: Value) -> bool:
    """QEMU starts without its server then, and connects once that is there."""
    return any(value.keys.get(key, "0") != "0" for key in ("reconnect", "reconnect-ms"))


def _place(keys: dict[str, str], prefix: str = "") -> str:
    """Of a SocketAddress of QAPI."""
    path, host, port = (keys.get(prefix + name, "") for name in ("path", "host", "port"))
    return path or (f"{host or 'localhost'}:{port}" if port else "")


def _nbd_servers(value: Value) -> Iterator[str]:
    keys = value.keys
    for key, word in keys.items():
        prefix, _, last = key.rpartition("driver")
        if not last and word == "nbd" and key in (f"{prefix}driver", "driver") and (not prefix or prefix.endswith(".")):
            yield _place(keys, f"{prefix}server.") or _place(keys, prefix) or "an address of its own"
        elif key in ("file", "filename") and word.startswith(("nbd:", "nbd+unix:", "nbd+tcp:")):
            yield _nbd_address(word)


def _nbd_address(uri: str) -> str:
    """``nbd+unix:///name?socket=/path``, ``nbd://host:port/name``, and the older ``nbd:unix:/path`` and ``nbd:host:port``
    (qemu-block-drivers(7))."""
    if "://" in uri:
        parts = urlsplit(uri)
        return next(iter(parse_qs(parts.query).get("socket", [])), "") or parts.netloc
    where = uri.removeprefix("nbd:").removeprefix("unix:")
    return where.partition(":exportname=")[0]
