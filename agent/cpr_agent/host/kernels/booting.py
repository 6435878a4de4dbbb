# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether a kernel can mount its root: its image, its initrd, and the drivers of the root between the two."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from cpr_agent.core.model import Finding, Kernel
from cpr_agent.host.kernels.archive import Contents, read_initrd
from cpr_agent.host.kernels.decompress import BadArchive
from cpr_agent.host.kernels.files import NOT_REGULAR
from cpr_agent.host.kernels.images import NoUki, image_problem, read_uki, version_inside
from cpr_agent.host.kernels.modules import Drivers, Modules
from cpr_agent.host.kernels.roots import NO_DRIVER, Need, devices, root_mounts
from cpr_agent.host.kernels.versions import is_version
from cpr_agent.mounts import Mount

DAX_DRIVERS = frozenset({"dax", "device_dax", "dax_pmem", "dax_hmem", "dax_cxl"})
"""Those that a pmem block device does without."""
PMEM = ("libnvdimm", "nd_pmem")
_FOUND_BY_INITRD = re.compile(r"(?<!\S)root=(?:UUID=|LABEL=|ZFS=|/dev/mapper/|/dev/disk/|[a-z]+:)")
"""What the kernel itself can't find (block/early-lookup.c)."""
LISTS = "/etc/initramfs-tools/modules, dracut's add_drivers, MODULES of mkinitcpio.conf"
NOT_UP = "the new kernel could not mount the root file system, and the host would not come up"


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """What the host is like, as far as a kernel's start depends on it. ``initrds`` says in words which other kernel has an
    initrd, "" if none has."""

    root: Path
    command_line: str
    initrds: str
    running: Modules | None


def about_image(kernel: Kernel) -> Iterator[Finding]:
    if problem := image_problem(kernel.image):
        yield Finding(
            severity="error",
            code="kernel-image",
            what=f"the image of kernel {kernel.version}, {kernel.image}, {problem}",
            why="it can't be loaded for a kexec, or it would not start",
            remedy="install the kernel package again, or choose another kernel",
        )
        return
    inside = version_inside(kernel.image)
    if inside and is_version(kernel.version) and inside != kernel.version:
        yield Finding(
            severity="error",
            code="kernel-version",
            what=f"{kernel.image} is no kernel {kernel.version}: it says that it is {inside}",
            why="it would look for its modules in another place than where the agent looked",
            remedy="install the kernel package again, or choose another kernel",
        )


def about_boot(kernel: Kernel, drivers: Drivers, wanted: Collection[str], host: Situation) -> Iterator[Finding]:
    """The initrd, and what of the root's drivers is in neither of the two. ``wanted`` are those of the guests' memory."""
    shown = root_mounts(host.root)
    needs = list(_needs(shown, drivers, host))
    where, contents, problem = _initrd(kernel)
    if problem:
        yield _bad_initrd(kernel, where, problem)
        return
    if contents is None:
        if image_problem(kernel.image):
            return  # it may be in there
        yield _no_initrd(kernel, drivers, needs, host)
        return
    if problem := _unfit(kernel, contents, drivers):
        known = contents.entries or shown  # of a tree without /proc nobody knows that there is a root to mount
        yield _bad_initrd(kernel, where, problem, "error" if known else "warning")
        return
    if contents.unread:
        yield Finding(
            severity="warning",
            code="initrd-not-read",
            what=f"{where} seems whole, and the agent could not look into it: {contents.unread}",
            why="without the root file system's drivers in it the new kernel can't mount that",
            remedy="install that program",
        )
        return
    yield from _root_drivers(where, contents, drivers, needs)
    for mount in shown:
        if mount.source.startswith("/dev/pmem"):
            yield from _pmem_drivers(where, contents, drivers, mount, wanted)


def _initrd(kernel: Kernel) -> tuple[str, Contents | None, str]:
    """Its name, what is in it, and what is wrong with it."""
    where, part = kernel.initrd, None
    if not where:
        try:
            part = read_uki(kernel.image).sections.get(".initrd")
        except (NoUki, OSError):
            part = None
        if part is None:
            return "", None, ""
        where = f"{kernel.image} (.initrd)"
    try:
        return where, read_initrd(kernel.initrd or kernel.image, part), ""
    except BadArchive as error:
        return where, None, str(error)
    except OSError as error:
        return where, None, f"is {NOT_REGULAR}" if error.strerror == NOT_REGULAR else f"can't be read: {error.strerror}"


def _bad_initrd(kernel: Kernel, where: str, problem: str, severity: Literal["error", "warning"] = "error") -> Finding:
    return Finding(
        severity=severity,
        code="initrd",
        what=f"the initrd of kernel {kernel.version}, {where}, {problem}",
        why=NOT_UP,
        remedy=f"make it again: update-initramfs -u -k {kernel.version}, dracut --force --kver {kernel.version}, "
        "or mkinitcpio -P",
    )


def _no_initrd(kernel: Kernel, drivers: Drivers, needs: list[Need], host: Situation) -> Finding:
    """An error, unless all speaks for a host whose kernels do without."""
    modules = [need for need in needs if drivers.place(need.driver) in ("loadable", "nowhere") and need.certain]
    found = _FOUND_BY_INITRD.search(host.command_line)
    reasons = [f"{host.initrds} has one"] if host.initrds else []
    reasons += [f"{need.driver}, which {need.of} needs, is not built into it" for need in modules[:1]]
    reasons += [f"{found[0]}… can be found by an initrd only"] if found else []
    return Finding(
        severity="error" if reasons else "warning",
        code="initrd-none",
        what=f"kernel {kernel.version} has no initrd" + (f": {'; '.join(reasons)}" if reasons else ""),
        why=NOT_UP if reasons else "unless it was built to do without one it can't mount the root file system",
        remedy=f"make one: update-initramfs -c -k {kernel.version}, dracut --kver {kernel.version}, or mkinitcpio -P; "
        "or choose another kernel with --kernel",
    )


def _unfit(kernel: Kernel, contents: Contents, drivers: Drivers) -> str:
    config = drivers.config or {}
    if any(symbol.startswith("RD_") for symbol in config):
        for symbol in sorted(contents.compressions):
            if config.get(symbol) != "y":
                return f"is compressed in a way that the kernel was not built for (CONFIG_{symbol})"
    if contents.versions and is_version(kernel.version) and kernel.version not in contents.versions:
        return f"has the modules of {', '.join(sorted(contents.versions))}, and none of this kernel's"
    if contents.init or contents.unread:
        return ""
    if not contents.entries:
        return "holds no files"
    return "has no /init to start: it is a part of one alone, such as the processor's microcode"


def _needs(shown: list[Mount], drivers: Drivers, host: Situation) -> Iterator[Need]:
    """The root's drivers that can be modules; as far as it is known, of this host."""
    for mount in shown:
        if mount.kind not in NO_DRIVER and "." not in mount.kind:
            name = drivers.modules.of_file_system(mount.kind) if drivers.modules else mount.kind
            yield Need(name, f"the file system of {mount.point} ({mount.kind})")
        for need in devices(host.root, mount):
            known = host.running is None or need.driver in host.running.builtin or need.driver in host.running.loadable
            yield need._replace(certain=need.certain and known)


def _root_drivers(where: str, contents: Contents, drivers: Drivers, needs: list[Need]) -> Iterator[Finding]:
    missing: dict[str, Need] = {}
    for need in needs:
        place = drivers.place(need.driver)
        if place == "loadable":
            lacking = sorted(drivers.needs(need.driver) - contents.modules)
            missing |= {module: need for module in lacking if module not in missing}
        elif place == "nowhere" and need.certain and need.driver not in contents.modules:
            missing.setdefault(need.driver, need)
    for module, need in missing.items():
        lost = drivers.place(module) == "nowhere"
        lacks = f"neither the kernel nor {where} has the driver" if lost else f"{where} lacks the module"
        yield Finding(
            severity="error",
            code="driver-not-in-initrd",
            what=f"{lacks} {module}, which {need.of} needs, and that is the root's",
            why=NOT_UP,
            remedy=f"make the initrd again with {module} in it ({LISTS}), or choose another kernel",
        )


def _pmem_drivers(
    where: str, contents: Contents, drivers: Drivers, mount: Mount, wanted: Collection[str]
) -> Iterator[Finding]:
    """What an initrd mounts has no other place to take its drivers from. /var comes later, from the root."""
    candidates = {*PMEM, *wanted} - DAX_DRIVERS
    for driver in sorted(candidates - contents.modules):
        if drivers.modules and driver in drivers.modules.loadable:
            yield Finding(
                severity="error" if driver in PMEM else "warning",
                code="driver-not-in-initrd",
                what=f"{where} lacks the module {driver}, and {mount.source} holds the root file system",
                why="if it needs this driver the new kernel can't mount it, and the host does not come up",
                remedy=f"make the initrd again with {driver} in it ({LISTS})",
            )
