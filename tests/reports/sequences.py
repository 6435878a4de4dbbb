# SPDX-License-Identifier: GPL-2.0-or-later
"""What an admin or a backup program may send to a QEMU, step by step; and a judge who knows nothing of the agent's.

The judge reads each disk as its guest would, through an NBD export of the node that the guest's device has. It lists
devices as QEMU does, and reads the console, whose lines say what is in the guest's RAM alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.judge import Harm, Problem, Said, check_order, parse
from tests.lab import Guest, Lab, QmpRefused, until

SIZE = 1 << 20
STEP_S = 20.0
"""How long a job of a step may take; one that takes longer is left to run."""
STANDS = ("running", "paused")
"""Run states in which a guest is looked at."""


class Step(NamedTuple):
    """One command, or the few that belong together; the number chooses among what there is."""

    name: str
    number: int


@dataclass
class Subject:
    """A guest with disks and places to plug others in. ``files`` is where its images are."""

    guest: Guest
    files: Path
    made: int = 0

    def take(self, step: Step) -> None:
        """What QEMU refuses was not to be had: no part of a sequence depends on another."""
        with contextlib.suppress(QmpRefused):
            STEPS[step.name](self, step.number)

    def ask(self, command: str, /, **arguments: Any) -> Any:
        return self.guest.admin(command, **{name.replace("_", "-"): value for name, value in arguments.items()})

    def hmp(self, line: str) -> str:
        return str(self.ask("human-monitor-command", command_line=line))

    def new(self, suffix: str) -> tuple[str, Path]:
        """A name that was never used, and a file of that name."""
        self.made += 1
        name = f"n{self.made}"
        return name, self.files / f"{name}.{suffix}"

    @property
    def status(self) -> str:
        return str(self.ask("query-status")["status"])

    def disks(self) -> dict[str, dict[str, Any]]:
        """What each of the guest's devices has, by its place in QOM or its id; empty without a medium."""
        return {disk["qdev"]: disk.get("inserted", {}) for disk in self.ask("query-block") if disk.get("qdev")}

    def disk(self, number: int) -> tuple[str, dict[str, Any]]:
        """One that can be written."""
        there = sorted((qdev, disk) for qdev, disk in self.disks().items() if disk and not disk["ro"])
        return there[number % len(there)]

    def plugged(self) -> list[str]:
        return [one["name"] for one in self.ask("qom-list", path="/machine/peripheral") if one["type"].startswith("child<")]


def image(path: Path, kind: str = "qcow2", size: int = SIZE) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, str(size)], check=True)
    return path


def subject(lab: Lab, name: str, qemu: str | None = None) -> Subject:
    """Define a guest as a host has them, and start it."""
    files = lab.root / f"{name}.files"
    files.mkdir(exist_ok=True)
    guest = lab.guest(
        name,
        *("-smp", "1,maxcpus=3"),
        *("-drive", f"file={image(files / 'd0.qcow2')},format=qcow2,if=none,id=d0"),
        *("-device", "ahci,id=a0", "-device", "ide-hd,id=disk0,drive=d0,bus=a0.0"),
        *("-drive", f"file={image(files / 'd1.raw', 'raw')},format=raw,if=none,id=d1"),
        *("-device", "virtio-blk-pci,id=disk1,drive=d1"),
        *("-drive", f"file={image(files / 'cd.iso', 'raw')},format=raw,media=cdrom,readonly=on,if=none,id=cd"),
        *("-device", "ide-cd,id=cd0,drive=cd,bus=ide.0"),
        *("-device", "pcie-root-port,id=rp0,chassis=1,slot=1", "-device", "pcie-root-port,id=rp1,chassis=2,slot=2"),
        *("-device", "virtio-scsi-pci,id=scsi0", "-device", "usb-ehci,id=usb", "-device", "virtio-balloon-pci,id=balloon0"),
        qemu=qemu,
    )
    guest.start()
    guest.until_counts()
    return Subject(guest, files)


# --- what is sent


def write(on: Subject, number: int) -> None:
    """The guest writes, as its QEMU would do it."""
    qdev, _ = on.disk(number)
    on.hmp(f'qemu-io -d {qdev} "write -P {1 + number % 250} {number % 16 * 65536} 4096"')


def plug_disk(on: Subject, number: int) -> None:
    name, path = on.new("raw")
    image(path, "raw")
    on.ask("blockdev-add", driver="raw", node_name=name, file={"driver": "file", "filename": str(path)})
    driver = "scsi-hd" if number % 2 else "virtio-blk-pci"
    bus = "scsi0.0" if number % 2 else f"rp{number // 2 % 2}"
    on.ask("device_add", driver=driver, drive=name, id=f"dev-{name}", bus=bus)


def plug_net(on: Subject, number: int) -> None:
    name, _ = on.new("")
    on.ask("netdev_add", type="hubport", hubid=number, id=name)
    on.ask("device_add", driver="virtio-net-pci", netdev=name, id=f"dev-{name}", bus=f"rp{number % 2}")


def plug_usb(on: Subject, number: int) -> None:
    name, _ = on.new("")
    on.ask("device_add", driver=("usb-tablet", "usb-kbd")[number % 2], id=f"dev-{name}", bus="usb.0")


def plug_cpu(on: Subject, number: int) -> None:
    free = [slot for slot in on.ask("query-hotpluggable-cpus") if "qom-path" not in slot]
    if free:
        slot = free[number % len(free)]
        on.ask("device_add", driver=slot["type"], id=on.new("")[0], **slot["props"])


def unplug(on: Subject, number: int) -> None:
    there = on.plugged()
    on.ask("device_del", id=there[number % len(there)])


def snapshot(on: Subject, number: int) -> None:
    """As `virsh snapshot-create --disk-only` and backup programs do it; by either command that there is."""
    name, path = on.new("qcow2")
    _, disk = on.disk(number)
    node = disk["node-name"]
    if number % 2:
        on.ask("blockdev-snapshot-sync", node_name=node, snapshot_file=str(path), snapshot_node_name=name, format="qcow2")
        return
    image(path, size=disk["image"]["virtual-size"])
    file = {"driver": "file", "filename": str(path)}
    on.ask("blockdev-add", driver="qcow2", node_name=name, file=file, backing=None)
    on.ask("blockdev-snapshot", node=node, overlay=name)


def snapshot_internal(on: Subject, number: int) -> None:
    command = ("blockdev-snapshot-internal-sync", "blockdev-snapshot-delete-internal-sync")[number % 2]
    on.ask(command, device="d0", name=f"s{number // 2 % 3}")


def savevm(on: Subject, number: int) -> None:
    on.hmp(f"{('savevm', 'delvm')[number % 2]} v{number // 2 % 2}")


def settle(on: Subject, job: str, number: int) -> None:
    """Complete a job, cancel it, or leave it."""

    def there() -> dict[str, Any]:
        jobs: dict[str, Any] = next((one for one in on.ask("query-jobs") if one["id"] == job), {})
        return jobs

    if number % 4 == 0:
        return
    with contextlib.suppress(AssertionError):
        until(lambda: there().get("status", "ready") in ("ready", "concluded"), "it is ready", STEP_S)
        if there():
            on.ask("job-cancel" if number % 4 == 1 else "job-complete", id=job)
            until(lambda: not there(), "it has ended", STEP_S)


def mirror(on: Subject, number: int) -> None:
    job, path = on.new("copy")
    _, disk = on.disk(number)
    sync = ("full", "top")[number // 4 % 2]
    on.ask("drive-mirror", job_id=job, device=disk["node-name"], target=str(path), sync=sync, format="qcow2")
    settle(on, job, number)


def backup(on: Subject, number: int) -> None:
    job, path = on.new("backup")
    _, disk = on.disk(number)
    on.ask("drive-backup", job_id=job, device=disk["node-name"], target=str(path), sync="full", format="qcow2")
    settle(on, job, number)


def commit(on: Subject, number: int) -> None:
    job, _ = on.new("")
    on.ask("block-commit", job_id=job, device=on.disk(number)[1]["node-name"])
    settle(on, job, number)


def stream(on: Subject, number: int) -> None:
    job, _ = on.new("")
    on.ask("block-stream", job_id=job, device=on.disk(number)[1]["node-name"])
    settle(on, job, number)


def change_medium(on: Subject, number: int) -> None:
    if number % 3 == 0:
        on.ask("eject", id="cd0", force=True)
        return
    _, path = on.new("iso")
    path.write_bytes(bytes([number % 256]) * SIZE)
    on.ask("blockdev-change-medium", id="cd0", filename=str(path), format="raw")


def resize(on: Subject, number: int) -> None:
    _, disk = on.disk(number)
    on.ask("block_resize", node_name=disk["node-name"], size=disk["image"]["virtual-size"] + (1 + number % 4) * 65536)


def throttle(on: Subject, number: int) -> None:
    limits = {"iops": 100 + number, **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"), 0)}
    on.ask("block_set_io_throttle", id=f"disk{number % 2}", **limits)


def bitmap(on: Subject, number: int) -> None:
    name, _ = on.new("")
    on.ask("block-dirty-bitmap-add", node=on.disk(number)[1]["node-name"], name=name, persistent=number % 2 == 0)


def export(on: Subject, number: int) -> None:
    """A backup program reads; it may go away and leave its export."""
    with exported(on, on.disk(number)[1]["node-name"], keep=number % 3 == 0):
        pass


def replace_image(on: Subject, number: int) -> None:
    """Somebody puts a file at the path of an image, as rsync, mv and a restore do."""
    path = Path(on.disk(number)[1]["image"]["filename"])
    if path.is_file():
        shutil.copy(path, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)


def pause(on: Subject, number: int) -> None:
    on.ask(("stop", "cont")[number % 2])


def balloon(on: Subject, number: int) -> None:
    on.ask("balloon", value=(8 + number % 8) << 20)


def reset(on: Subject, _number: int) -> None:
    """A guest that stands still would boot later, and nobody could tell its boot from a loss."""
    if on.status == "running":
        boots = len(on.guest.report.boots)
        on.ask("system_reset")
        until(lambda: len(on.guest.report.boots) > boots, f"{on.guest.name} boots again")


STEPS: dict[str, Callable[[Subject, int], None]] = {
    act.__name__: act
    for act in (
        *(write, plug_disk, plug_net, plug_usb, plug_cpu, unplug, snapshot, snapshot_internal, savevm, mirror, backup),
        *(commit, stream, change_medium, resize, throttle, bitmap, export, replace_image, pause, balloon, reset),
    )
}


# --- the judge


@contextlib.contextmanager
def exported(on: Subject, node: str, *, keep: bool = False) -> Iterator[str]:
    """An NBD export of a node, at the URI that is yielded; its server may be there already."""
    name, path = on.new("")[0], on.files / "nbd"
    with contextlib.suppress(QmpRefused):
        on.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    on.ask("block-export-add", type="nbd", id=name, node_name=node, name=name)
    try:
        yield f"nbd+unix:///{name}?socket={path}"
    finally:
        if not keep:
            on.ask("block-export-del", id=name, mode="hard")
            until(lambda: name not in [one["id"] for one in on.ask("query-block-exports")], "the export is gone")
            if not on.ask("query-block-exports"):
                on.ask("nbd-server-stop")


def contents(on: Subject, qdev: str) -> str:
    """What the device reads, as its size and a digest. A job that ends takes its filter from the top of the nodes."""
    copy = on.files / "read"
    for _ in range(3):
        disk = on.disks()[qdev]
        if not disk:
            return "no medium"
        with contextlib.suppress(QmpRefused), exported(on, disk["node-name"]) as uri:
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copy], check=True, timeout=60)
            break
    with copy.open("rb") as file:
        return f"{copy.stat().st_size} bytes, {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


def _flat(devices: list[dict[str, Any]], at: str = "") -> Iterator[str]:
    for device in devices:
        place = f"{at}/{device['slot']:02x}.{device['function']}"
        about = (device["qdev_id"], device["id"], device["class_info"]["class"], device["regions"])
        yield f"{place} {about}"
        yield from _flat(device.get("pci_bridge", {}).get("devices", []), place)


@dataclass(frozen=True)
class Seen:
    """A guest, as somebody sees it who has its monitor and its console. ``last`` is the last line that it said."""

    status: str
    disks: dict[str, str]
    pci: tuple[str, ...]
    plugged: dict[str, str]
    cpus: tuple[str, ...]
    memory: tuple[str, ...]
    last: Said

    def differences(self, other: Seen) -> list[str]:
        found = []
        for name in (field.name for field in fields(self) if field.name != "last"):
            mine, its = getattr(self, name), getattr(other, name)
            if isinstance(mine, dict):
                mine, its = ({f"{key}: {value}" for key, value in one.items()} for one in (mine, its))
            if mine == its:
                continue
            if isinstance(mine, str):
                found.append(f"{name}: {mine}, then {its}")
            else:
                found.append(f"{name}: {sorted(set(mine) - set(its))}, then {sorted(set(its) - set(mine))}")
        return found


def look(on: Subject) -> Seen:
    """A guest that runs or stands still."""
    plugged = {
        f"{where}/{one['name'] if where == 'peripheral' else number}": one["type"]
        for where in ("peripheral", "peripheral-anon")
        for number, one in enumerate(on.ask("qom-list", path=f"/machine/{where}"))
    }
    return Seen(
        status=on.status,
        disks={qdev: contents(on, qdev) for qdev in on.disks()},
        pci=tuple(line for bus in on.ask("query-pci") for line in _flat(bus["devices"])),
        plugged=plugged,
        cpus=tuple(f"{cpu['qom-path'].rpartition('/')[2]} {cpu['props']}" for cpu in on.ask("query-cpus-fast")),
        memory=tuple(str(one) for one in on.ask("query-memory-devices")),
        last=parse(on.guest.console.read_bytes())[-1],
    )


def said_since(guest: Guest, seen: Seen) -> list[Said]:
    """From the last line that it had said then; what it has said before it may have said in another boot."""
    lines = parse(guest.console.read_bytes())
    return lines[max(place for place, line in enumerate(lines) if line == seen.last) :]


def harms(on: Subject, before: Seen) -> list[Problem]:
    """What has become of the guest; one that stood still is let run at last."""
    now = look(on)
    found = [Problem(Harm.CORRUPTED, text) for text in before.differences(now)]
    if now.status == "paused":
        on.ask("cont")
    count = len(said_since(on.guest, before))
    try:
        until(lambda: len(said_since(on.guest, before)) > count + 2, "it counts")
    except AssertionError:
        found.append(Problem(Harm.LOST, f"it does not count: {on.status}"))
    return found + check_order(said_since(on.guest, before), gaps=False)
