# SPDX-License-Identifier: GPL-2.0-or-later
"""Device-DAX devices by uuid, from sysfs and the kernel's own events: those that are there, and those that appear.

udevd has no part in that, which at boot comes to a device long after the kernel has made its node: the agent opens the node
for QEMU, and lets its user in (ADR 24).

A namespace's node can have another name after a kexec: /dev/dax1.0 was /dev/dax0.0 then. The uuid stays. It is that of the
parent nd device, which ``ndctl list`` shows; udev has no property for it, so it is read from sysfs.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyudev

from cpr_agent.core.model import DaxDevice

MEMORY_BUSES = frozenset({"dax", "nd", "cxl"})
"""The buses of drivers/dax, drivers/nvdimm and drivers/cxl."""


class Devices(Protocol):
    """The port of backends.py to sysfs and udev. Unit tests have a fake, because a machine need not have a dax device."""

    def list(self) -> list[DaxDevice]: ...

    async def wait(self, good: Callable[[DaxDevice], bool], timeout_s: float) -> DaxDevice | None:
        """The first device that is ``good``, as soon as there is one; None on timeout."""

    def volume(self, st_dev: int) -> str:
        """The UUID of the file system on the block device with this number; "" without such a device or UUID."""

    def drivers_below(self, st_dev: int) -> tuple[str, ...]:
        """Kernel modules of the block device with this number, as a DaxDevice has them."""


class UdevDevices:
    """The devices of this host."""

    def __init__(self) -> None:
        self._context = pyudev.Context()

    def list(self) -> list[DaxDevice]:
        found = (_read(device) for device in self._context.list_devices(subsystem="dax"))
        return sorted((device for device in found if device), key=lambda device: device.node)

    def volume(self, st_dev: int) -> str:
        device = self._block_device(st_dev)
        return str(device.properties.get("ID_FS_UUID", "")) if device else ""

    def drivers_below(self, st_dev: int) -> tuple[str, ...]:
        device = self._block_device(st_dev)
        while device is not None and device.subsystem == "block":  # a partition, or the disk
            device = device.parent
        return _drivers(device)

    def _block_device(self, st_dev: int) -> Any:
        try:
            return pyudev.Devices.from_device_number(self._context, "block", st_dev)
        except pyudev.DeviceNotFoundError:
            return None

    async def wait(self, good: Callable[[DaxDevice], bool], timeout_s: float) -> DaxDevice | None:
        changed = asyncio.Event()
        with self._monitor(changed.set):  # before the listing, so that nothing falls between
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        changed.clear()
                        for device in self.list():
                            if good(device) and (device.system_ram or has_driver(device.node)):
                                return device
                        await changed.wait()
            except TimeoutError:
                return None

    @contextmanager
    def _monitor(self, changed: Callable[[], None]) -> Any:
        """Call ``changed`` after any change of a dax device. The events themselves are not used: a listing follows, which
        also covers events that the kernel had to drop (ENOBUFS). The kernel tells when a driver has bound the device, too
        (KOBJ_BIND in drivers/base/dd.c)."""
        monitor = pyudev.Monitor.from_netlink(self._context, source="kernel")
        monitor.filter_by("dax")
        monitor.start()
        loop = asyncio.get_running_loop()

        def drain() -> None:
            try:
                while monitor.poll(timeout=0) is not None:
                    pass
            except OSError:
                pass
            changed()

        loop.add_reader(monitor.fileno(), drain)
        try:
            yield
        finally:
            loop.remove_reader(monitor.fileno())


def _read(device: Any) -> DaxDevice | None:
    """Read from sysfs. None for a device that is going away, or that has no node (kmem)."""
    parent = device.parent
    if not device.device_node or parent is None:
        return None
    size = _text(device, "size")
    if not size:
        return None
    resource = _text(device, "resource")
    return DaxDevice(
        node=device.device_node,
        uuid=_text(parent, "uuid"),
        size_bytes=int(size),
        align_bytes=int(_text(device, "align") or _text(parent, "align") or 0),
        resource=int(resource, 16) if resource else None,
        numa_node=int(_text(device, "numa_node") or -1),
        region=_region(device),
        provider=_provider(device),
        drivers=_drivers(device),
        system_ram="kmem" in _bound_to(device),
    )


def has_driver(node: str) -> bool:
    """The node is there a moment before its driver is: it can't be opened until then (ENXIO)."""
    try:
        os.close(os.open(node, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENXIO, errno.ENODEV)
    return True


def _bound_to(device: Any) -> tuple[str, str]:
    """Names of the device's driver and of its module, which are one for kmem; a driver that is built in has no module."""
    driver = Path(device.sys_path, "driver")  # in system-ram mode the node stays, and can't be opened (ENXIO)
    return driver.resolve().name, (driver / "module").resolve().name


def _region(device: Any) -> str:
    """The region's begin, if the agent may read it, and its length in bytes."""
    region = _ancestor(device, "region")
    return f"{_text(region, 'resource')}+{_text(region, 'size')}" if region else ""


def _provider(device: Any) -> str:
    bus = _ancestor(device, "ndbus")
    return _text(bus, "provider") if bus else ""


def _ancestor(device: Any, prefix: str) -> Any:
    """The nearest device at or above it whose name in sysfs begins with ``prefix``, or None."""
    while device is not None and not device.sys_name.startswith(prefix):
        device = device.parent
    return device


def _drivers(device: Any) -> tuple[str, ...]:
    """Modules of the drivers from the device up to the provider of the memory: the first device that is on none of the
    memory's own buses (an ACPI or virtio device). Every kernel has the drivers above that, as for PCI bridges."""
    modules = []
    while device is not None:
        module = Path(device.sys_path, "driver/module")  # missing if the driver can only be built in
        if module.exists():
            modules.append(module.resolve().name)
        device = device.parent if device.subsystem in MEMORY_BUSES else None
    if "dax_pmem" in modules:
        # It is bound to none of these devices, but made the first (nd_pmem_probe() in drivers/nvdimm/pmem.c).
        modules.append("nd_pmem")
    return tuple(dict.fromkeys(modules))


def _text(device: Any, attribute: str) -> str:
    try:
        return str(device.attributes.asstring(attribute)).strip()
    except (KeyError, OSError, UnicodeDecodeError):
        return ""
