# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that a VM's QEMU needs beside it, by its command line.

swtpm ends when a QEMU that it serves does: QEMU tells it to (CMD_SHUTDOWN in backends/tpm/tpm_emulator.c), also without
``--terminate``. virtiofsd ends with its one connection. qemu-nbd and passt stay, and serve one QEMU at a time: a second one
that starts meanwhile waits for the first one's end, and hangs till then.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cpr_agent.core.model import Companion
from cpr_agent.errors import InvalidArgument
from cpr_agent.vm.cmdline import WHOLE_IMAGES
from cpr_agent.vm.connections import SWTPM, VIRTIOFSD, companion_of, vhost_user
from cpr_agent.vm.foreign import Option, Value, options_of
from cpr_agent.vm.retry import poll_until

_END = (SWTPM, VIRTIOFSD)
_PORTS = ("-serial", "-parallel", "-monitor", "-qmp", "-qmp-pretty", "-debugcon")


def companions(argv: tuple[str, ...]) -> list[Companion]:
    options = _options(argv)
    needed = {user[0]: user[1] for option in options if (user := companion_of(option))}
    return [one for option in options for one in _of(option, needed)]


def unsaveable(argv: tuple[str, ...]) -> list[str]:
    """Why a guest can't be saved that has these: a backend of vhost-user has the guest's RAM mapped, for as long as QEMU
    lives and longer, so that nothing could prove who has written to it; and no saved guest could be taken back."""
    return [
        f"{option.name} {kind} shares the guest's RAM with a program that is not QEMU: shut the guest down, and start it "
        "afresh without (virtio-blk, vhost-net and NFS need no such program)"
        for option in _options(argv)
        if (kind := vhost_user(option))
    ]


def emulated_tpms(argv: tuple[str, ...]) -> dict[str, str]:
    """Where the swtpm listens to which a character device leads."""
    options = _options(argv)
    ids = {user[0] for option in options if (user := companion_of(option)) and user[1] == SWTPM}
    chardevs = [option.value.keys for option in options if option.name == "-chardev"]
    return {keys["id"]: _place(keys) for keys in chardevs if keys.get("id") in ids}


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


@lru_cache(maxsize=256)
def _options(argv: tuple[str, ...]) -> tuple[Option, ...]:
    """None of a command line that QEMU would not take either."""
    try:
        return tuple(options_of(argv[1:]))
    except InvalidArgument:
        return ()


def _of(option: Option, needed: dict[str, str]) -> Iterator[Companion]:
    value = option.value
    if option.name == "-chardev" and value.first("backend") == "socket":
        id_ = value.keys.get("id", "")
        yield from _of_chardev(value, needed.get(id_, ""), f"the character device {id_}")
    elif option.name in _PORTS:
        yield from _of_chardev(_as_socket(option.text), "", option.name)
    elif option.name in ("-netdev", "-nic", "-net") and value.first("type") in ("stream", "socket"):
        where = value.keys.get("connect") or ("" if value.on("server") else _place(value.keys, "addr."))
        if where:
            name = " ".join(filter(None, ("the peer of the network", value.keys.get("id"), "(passt or another)")))
            yield Companion(name=name, where=where, listens=not _retries(value))
    elif option.name in ("-drive", "-blockdev"):
        yield from (Companion(name="the NBD server", where=where) for where in _nbd_servers(value))
    elif option.name in WHOLE_IMAGES:
        yield from (Companion(name="the NBD server", where=where) for where in _nbd_servers_of(option.text))


def _of_chardev(value: Value, who: str, of: str) -> Iterator[Companion]:
    where, server = _place(value.keys), value.on("server")
    if where and (who or not server):
        name, listens = who or f"the server of {of}", not (server or _retries(value))
        yield Companion(name=name, where=where, ends=who in _END, shared=not who, listens=listens)


def _as_socket(text: str) -> Value:
    """``tcp:host:port`` or ``unix:path`` with more keys, as those of a character device (qemu_chr_parse_compat() in
    chardev/char.c); one without keys for another kind of port."""
    kind, _, rest = text.removeprefix("mon:").partition(":")
    if kind == "unix":
        return Value(f"path={rest}")
    host, colon, port = rest.partition(",")[0].rpartition(":")
    if kind in ("tcp", "telnet", "tn3270", "websocket") and colon:
        return Value(f"host={host},port={port}{rest[len(host + colon + port) :]}")
    return Value("")


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
        elif key in ("file", "filename"):
            yield from _nbd_servers_of(word)


def _nbd_servers_of(image: str) -> Iterator[str]:
    """QEMU takes JSON after ``json:`` with single quotes too."""
    if image.startswith(("nbd:", "nbd+unix:", "nbd+tcp:")):
        yield _nbd_address(image)
    elif image.startswith("json:"):
        text = image.removeprefix("json:")
        with contextlib.suppress(InvalidArgument):  # QEMU says it better
            yield from _nbd_servers(Value(text if '"' in text else text.replace("'", '"')))


def _nbd_address(uri: str) -> str:
    """``nbd+unix:///name?socket=/path``, ``nbd://host:port/name``, and the older ``nbd:unix:/path`` and ``nbd:host:port``
    (qemu-block-drivers(7))."""
    if "://" in uri:
        parts = urlsplit(uri)
        return next(iter(parse_qs(parts.query).get("socket", [])), "") or parts.netloc
    where = uri.removeprefix("nbd:").removeprefix("unix:")
    return where.partition(":exportname=")[0]
