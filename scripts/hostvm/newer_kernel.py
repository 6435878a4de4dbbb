# SPDX-License-Identifier: GPL-2.0-or-later
"""A kernel for the host VM that is newer than those of its image: the generic one of Debian's backports.

A cache entry is `kernel-KEY.tar`: what `tar -x -C /` installs in a host VM that has it as a disk, with modules that are not
compressed, and an initrd as the image's kernels have. It is no part of the image, which all other tests share.
"""

import fcntl
import hashlib
import inspect
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import image
from .image import BACKPORTS, LEFT_OUT, MODULES, RECIPE, HostVmError, cache_directory, say

MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
IN_INITRD = ("virtio_pci", "virtio_blk", "ext4")


def newer_kernel() -> Path:
    """The tar; it is built unless the cache has it. Raises HostVmError."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    own = Path(__file__).read_text() + inspect.getsource(image) + (RECIPE / "initrd-init").read_text()
    entry = cache / f"kernel-{hashlib.sha256(own.encode()).hexdigest()[:16]}.tar"
    with (cache / "kernel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not entry.exists():
            say(f"fetching the kernel of {BACKPORTS}")
            with tempfile.TemporaryDirectory(prefix="kernel-", dir=cache) as scratch:
                try:
                    packed = _build(Path(scratch))
                except subprocess.CalledProcessError as error:
                    raise HostVmError(f"no newer kernel: {error.cmd[0]} failed with {error.returncode}") from error
                for old in cache.glob("kernel-*.tar"):
                    old.unlink()
                packed.rename(entry)
    return entry


def _build(scratch: Path) -> Path:
    tree, packed = scratch / "tree", scratch / "kernel.tar"
    for package in _fetch(scratch):
        _run("dpkg-deb", "--extract", package, tree)
    for pattern in LEFT_OUT:
        if pattern.startswith(MODULES):
            for path in tree.glob(pattern.removeprefix("/").removesuffix("/*")):
                shutil.rmtree(path)
    (modules,) = (tree / "usr/lib/modules").iterdir()
    _run("find", modules, "-name", "*.ko.xz", "-exec", "xz", "--decompress", "{}", "+")
    (tree / "lib").symlink_to("usr/lib")  # as in the host VM; depmod looks there
    _run("depmod", "--basedir", tree, modules.name)
    (tree / "lib").unlink()
    (tree / "boot").mkdir()
    (modules / "vmlinuz").rename(tree / "boot" / f"vmlinuz-{modules.name}")  # as the package's hooks would install it
    _pack_initrd(scratch / "initrd", modules, tree / "boot" / f"initrd.img-{modules.name}")
    _run("tar", "--create", "--owner=0", "--group=0", "--file", packed, "--directory", tree, "boot", "usr/lib/modules")
    return packed


def _fetch(scratch: Path) -> list[Path]:
    """Its packages: those on which linux-image-amd64 depends. From a sources list of our own, as scripts/qemu-cpr does."""
    apt = scratch / "apt"
    for directory in ("lists/partial", "archives/partial"):
        (apt / directory).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {BACKPORTS} main\n")
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
    }
    options = ["-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    _run("apt-get", *options, "update")
    shown = subprocess.run(["apt-cache", *options, "show", "linux-image-amd64"], check=True, capture_output=True, text=True)
    release = re.search(r"^Depends: .*?linux-image-([^ ,]+-amd64)", shown.stdout, re.MULTILINE)
    if not release:
        raise HostVmError(f"{BACKPORTS} has no kernel")
    packages = [f"linux-{part}-{release[1]}" for part in ("image", "base", "binary", "modules")]
    subprocess.run(["apt-get", *options, "download", *packages], check=True, cwd=apt)
    return list(apt.glob("*.deb"))


def _pack_initrd(tree: Path, modules: Path, target: Path) -> None:
    """As scripts/hostvm/image/customize does."""
    for directory in ("bin", "dev", "modules", "root"):
        (tree / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    (tree / "bin/sh").symlink_to("busybox")
    shutil.copyfile(RECIPE / "initrd-init", tree / "init")
    (tree / "init").chmod(0o755)
    for number, module in enumerate(_with_dependencies(modules, IN_INITRD), 100):
        shutil.copy(module, tree / "modules" / f"{number}-{module.name}")
    with target.open("wb") as packed:
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], check=True, cwd=tree, input=names.encode(), stdout=packed)


def _with_dependencies(modules: Path, names: Iterable[str]) -> list[Path]:
    """In the order in which they can be loaded: modules.dep(5) has each module's own the other way round."""
    needs = {
        Path(path).name.removesuffix(".ko").replace("-", "_"): [path, *words.split()]
        for path, words in _dependencies(modules)
    }
    paths = [path for name in names if name in needs for path in reversed(needs[name])]
    return [modules / path for path in dict.fromkeys(paths)]


def _dependencies(modules: Path) -> list[tuple[str, str]]:
    lines = (modules / "modules.dep").read_text().splitlines()
    return [(path, words) for path, _, words in (line.partition(":") for line in lines)]


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
