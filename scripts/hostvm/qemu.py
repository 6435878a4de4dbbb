# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs of the host VM's root directory, run on this machine without chroot.

They go through the root's own dynamic loader, so that file descriptors, paths and /dev/shm are this machine's while
the program and every library are the root's.
"""

import shlex
from pathlib import Path

LIBRARIES = "usr/lib/x86_64-linux-gnu"


def loader_command(root: Path, program: str, over: Path | None = None) -> list[str]:
    """The start of a command line that runs ROOT/PROGRAM, or OVER/PROGRAM with what is not in OVER from ROOT."""
    libraries = [f"{tree}/{LIBRARIES}" for tree in (over, root) if tree]
    path = ":".join([*libraries, f"{root}/{LIBRARIES}/systemd"])
    loader = root / LIBRARIES / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", path, "--argv0", program.rsplit("/", 1)[-1], str((over or root) / program)]


def qemu_wrapper(entry: Path, *, newer: bool = False) -> Path:
    """A script that is the root's qemu-system-x86_64, or the newer; written when missing or when the cache has moved."""
    root, over = entry / "root", entry / "newer" if newer else None
    tree = over or root
    firmware = [f"{place}/usr/share/{name}" for place in dict.fromkeys((tree, root)) for name in ("qemu", "seabios")]
    command = [*loader_command(root, "usr/bin/qemu-system-x86_64", over), *(x for d in firmware for x in ("-L", d))]
    # QEMU looks for its modules beside its executable, which is the loader here.
    modules = shlex.quote(f"{tree}/{LIBRARIES}/qemu")
    text = f'#!/bin/sh\nexport QEMU_MODULE_DIR={modules}\nexec {shlex.join(command)} "$@"\n'
    wrapper = entry / ("newer-qemu-system-x86_64" if newer else "qemu-system-x86_64")
    if not wrapper.exists() or wrapper.read_text() != text:
        fresh = wrapper.with_name(f"{wrapper.name}.new")
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.rename(wrapper)
    return wrapper
