"""Programs of the host VM's root directory, run on this machine without chroot.

They go through the root's own dynamic loader, so that file descriptors, paths and /dev/shm are this machine's while
the program and every library are the root's.
"""

import shlex
from pathlib import Path

LIBRARIES = "usr/lib/x86_64-linux-gnu"


def loader_command(root: Path, program: str) -> list[str]:
    """The start of a command line that runs ROOT/PROGRAM."""
    path = f"{root}/{LIBRARIES}:{root}/{LIBRARIES}/systemd"
    loader = root / LIBRARIES / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", path, "--argv0", program.rsplit("/", 1)[-1], str(root / program)]


def qemu_wrapper(entry: Path) -> Path:
    """A script that is the root's qemu-system-x86_64; written when missing or when the cache has moved."""
    root = entry / "root"
    firmware = [f"{root}/usr/share/qemu", f"{root}/usr/share/seabios", f"{root}/usr/lib/ipxe/qemu"]
    command = [*loader_command(root, "usr/bin/qemu-system-x86_64"), *(x for d in firmware for x in ("-L", d))]
    # QEMU looks for its modules beside its executable, which is the loader here.
    modules = shlex.quote(f"{root}/{LIBRARIES}/qemu")
    text = f'#!/bin/sh\nexport QEMU_MODULE_DIR={modules}\nexec {shlex.join(command)} "$@"\n'
    wrapper = entry / "qemu-system-x86_64"
    if not wrapper.exists() or wrapper.read_text() != text:
        fresh = wrapper.with_name("qemu-system-x86_64.new")
        fresh.write_text(text)
        fresh.chmod(0o755)
        fresh.rename(wrapper)
    return wrapper
