# SPDX-License-Identifier: GPL-2.0-or-later
"""Where distributions and boot loaders put kernels, and which initrd belongs to which.

/boot/vmlinuz-VERSION            Debian, Ubuntu, Fedora, RHEL, openSUSE; with initrd.img-, initramfs-….img, initrd-
/boot/vmlinuz-linux              Arch, Alpine: the version is in the image, or is that of the package (pkgbase)
/boot/vmlinuz-generic-VERSION    Slackware; kernel-genkernel-x86_64-VERSION of an older Gentoo
BOOT/loader/entries/*.conf       Fedora, RHEL (GRUB), systemd-boot: the entry names image and initrd
BOOT/TOKEN/VERSION/linux         kernel-install(8) for systemd-boot
BOOT/EFI/Linux/*.efi             unified kernel images, which bring their initrd
/usr/lib/modules/VERSION/        vmlinuz, and vmlinuz-virt.efi of Fedora and RHEL
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_agent.core.model import Kernel
from cpr_agent.host.kernels.entries import Entry, read_entries, tries_left
from cpr_agent.host.kernels.files import children, exists, text
from cpr_agent.host.kernels.images import is_uki, version_inside
from cpr_agent.host.kernels.versions import VERSION, is_leftover, is_version

BOOTS = ("boot", "efi", "boot/efi")
"""Where the boot partition ($BOOT) and the EFI system partition are mounted."""
MODULES = ("usr/lib/modules", "lib/modules")
INITRDS = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}", "initramfs-{}", "booster-{}.img")
IMAGES = re.compile(r"(?:vmlinuz|Image|kernel)-(.+)")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}(?![0-9a-f])")
_MICROCODE = re.compile(r"ucode|microcode")


class Candidate(NamedTuple):
    """``rank`` is 2 where the initrd is there, 1 where one is named, else 0. What the boot loader's ``entry`` says of it:
    ``tries_left``, and ``others``, which are more initrds; a kexec takes one."""

    version: str
    image: str
    initrd: str = ""
    rank: int = 0
    entry: str = ""
    tries_left: int | None = None
    others: tuple[str, ...] = ()


class Layout:
    """The kernels below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def kernels(self) -> dict[str, Kernel]:
        """One for each version, as its best place has it: with an initrd rather than without, and as files of their own."""
        return {version: self._kernel(candidates[0]) for version, candidates in self._by_version().items()}

    def candidate(self, kernel: Kernel) -> Candidate | None:
        """The place in which ``kernel`` was found."""
        for one in self._by_version().get(kernel.version, []):
            if (one.image, one.initrd) == (kernel.image, kernel.initrd):
                return one
        return None

    def bad_entries(self, version: str) -> list[Entry]:
        """The boot loader's entries for a version that are of no use."""
        return [entry for entry in self._entries() if entry.problem and version in entry.words]

    def module_directories(self, version: str) -> list[Path]:
        return [self._root / top / version for top in MODULES]

    def _by_version(self) -> dict[str, list[Candidate]]:
        found: dict[str, list[Candidate]] = defaultdict(list)
        for candidate in self._candidates():
            if is_version(candidate.version):
                found[candidate.version].append(candidate)
        for candidates in found.values():
            candidates.sort(key=lambda one: one.rank, reverse=True)  # a stable sort: within a rank they stay in order
        return found

    def _kernel(self, candidate: Candidate) -> Kernel:
        places = [directory / "config" for directory in self.module_directories(candidate.version)]
        config = _first([self._root / "boot" / f"config-{candidate.version}", *places])
        return Kernel(version=candidate.version, image=candidate.image, initrd=candidate.initrd, config=config)

    def _candidates(self) -> Iterator[Candidate]:
        yield from self._in_boot()
        yield from self._of_entries()
        yield from self._of_kernel_install()
        yield from self._among_modules()
        yield from self._unified()

    def _in_boot(self) -> Iterator[Candidate]:
        for image in children(self._root / "boot", "*-*"):
            if (named := IMAGES.fullmatch(image.name)) and exists(image):  # openSUSE's are links
                name = named[1]
                version = name if is_version(name) else self._version_of(image, name)
                yield _candidate(version, image, self._initrds(name, version))

    def _version_of(self, image: Path, name: str) -> str:
        """Of an image that is named for its package: what it says, or the modules whose pkgbase is the package's name, or
        the end of its name."""
        if not name[0].isalpha() or is_leftover(name):
            return ""
        directories = (path.parent for top in MODULES for path in children(self._root / top, "*/pkgbase"))
        packages = [directory.name for directory in directories if text(directory / "pkgbase", 256).strip() == name]
        return version_inside(image) or next(iter(packages), "") or _version_in(name)

    def _initrds(self, *names: str) -> list[Path]:
        """Where an initrd of one of these names may be."""
        return [self._root / boot / form.format(name) for name in names if name for boot in BOOTS for form in INITRDS]

    def _entries(self) -> list[Entry]:
        entries = [entry for boot in BOOTS for entry in read_entries(self._root / boot)]
        return [entry for entry in entries if not self._foreign(entry.machine_id)]

    def _foreign(self, token: str) -> bool:
        """Whether what begins with ``token`` is another system's, which shares the partition."""
        own, other = (_MACHINE_ID.match(word) for word in (text(self._root / "etc/machine-id", 64), token))
        return bool(own and other and own[0] != other[0])

    def _of_entries(self) -> Iterator[Candidate]:
        for entry in self._entries():
            if entry.problem or "rescue" in entry.words:
                continue
            image = self._resolve(entry, entry.linux)
            initrds = [self._resolve(entry, initrd) for initrd in entry.initrds]
            main = sorted((one for one in initrds if not _MICROCODE.search(one.name)), key=_size) or initrds
            version = entry.version if is_version(entry.version) else version_inside(image) or _version_in(entry.linux)
            named = Candidate(version, str(image), entry=entry.path, tries_left=entry.tries_left)
            if main:
                others = tuple(map(str, main[:-1]))
                yield named._replace(initrd=str(main[-1]), rank=2 if exists(main[-1]) else 1, others=others)
            else:
                yield named._replace(rank=2 * is_uki(image))

    def _resolve(self, entry: Entry, path: str) -> Path:
        """From the top of the file system that the entry is on, or from the root where /boot is a part of it."""
        below = path.lstrip("/")
        boot = Path(entry.path).parents[2]
        return next((place for place in (boot / below, self._root / below) if exists(place)), boot / below)

    def _of_kernel_install(self) -> Iterator[Candidate]:
        for boot in BOOTS:
            for image in children(self._root / boot, "*/*/linux*"):
                if not self._foreign(image.parent.parent.name):
                    yield _candidate(image.parent.name, image, children(image.parent, "initrd*"))

    def _among_modules(self) -> Iterator[Candidate]:
        for top in MODULES:
            for image in children(self._root / top, "*/vmlinuz"):
                own = [image.parent / name for name in ("initrd", "initramfs.img")]
                yield _candidate(image.parent.name, image, [*self._initrds(image.parent.name), *own])

    def _unified(self) -> Iterator[Candidate]:
        for image in [path for boot in BOOTS for path in children(self._root / boot, "EFI/Linux/*.efi")]:
            if not self._foreign(image.name):
                named = _version_in(re.sub(r"(\+\d+(-\d+)?)?\.efi$", "", image.name))
                version, left = version_inside(image) or named, tries_left(image.name)
                yield Candidate(version, str(image), rank=2 * is_uki(image), tries_left=left)
        for image in [path for top in MODULES for path in children(self._root / top, "*/*.efi")]:
            yield Candidate(image.parent.name, str(image), rank=2 * is_uki(image))


def _candidate(version: str, image: Path, initrds: Iterable[Path]) -> Candidate:
    initrd = _first(initrds)
    return Candidate(version, str(image), initrd, 2 if initrd else 0)


def _version_in(path: str) -> str:
    found = re.search(rf"(?<![\w.]){VERSION.pattern}", path, re.ASCII)
    return found[0] if found else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _first(paths: Iterable[Path]) -> str:
    return next((str(path) for path in paths if exists(path)), "")
