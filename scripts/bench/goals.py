# SPDX-License-Identifier: GPL-2.0-or-later
"""What there is to measure, and what each figure has to reach. docs/bench.md has the same table; a test compares them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """``reach`` is what the figure has to be: at most, unless ``at_least``. ``unit`` "x" is for a ratio of two medians."""

    figure: str
    reach: float
    unit: str = "x"
    at_least: bool = False

    @property
    def reach_text(self) -> str:
        unit = "" if self.unit == "x" else " "
        return f"{'>=' if self.at_least else '<='} {self.reach:g}{unit}{self.unit}"


GOALS = {
    "save": Goal("save through D-Bus, from STOP to durable, against the bare script with the same fsyncs, 1 VM", 1.15),
    "pause": Goal("whole pause without a reboot (save, new QEMU, load), against the bare script, 1 VM", 1.25),
    "pause-by-hand": Goal("the same by CprSave and then CprLoad, as around a reboot", 1.25),
    "virsh-512": Goal("times faster than virsh managedsave + start; 512 MiB, 70% of it written", 40, at_least=True),
    "virsh-4096": Goal("times faster than virsh managedsave + start; 4 GiB, 70% of it written", 150, at_least=True),
    "by-ram": Goal("pause at 8 GiB against 256 MiB, 70% of it written", 1.1),
    "many-wall": Goal("32 VMs saved and loaded, wall time against the bare script running all in parallel", 1.25),
    "many-mean": Goal("mean pause per VM, 32 VMs against 1, beyond what QEMU's own CPU time explains", 1.5),
    "memory": Goal("resident memory of the agent, 100 VMs defined, 50 running", 70, "MiB"),
    "idle": Goal("CPU time of the agent while idle, over 60 s, of one core; 100 VMs defined, 50 running", 0.1, "%"),
    "start": Goal("start of the agent to READY, against importing its libraries in a bare Python", 1.5),
    "status": Goal("cprctl status in a new process, beyond busctl call of the same", 0.25, "s"),
    "witness": Goal("full witness, bytes per second against a plain read of the same mapping", 0.8, at_least=True),
}
"""Of `make bench`."""

HOST_GOALS = {
    "kexec-pause": Goal("STOP to RESUME over a kexec, against the bare unit", 1.3),
    "userspace": Goal("systemd's first line to the first guest's cont, against the bare unit", 1.5),
    "shutdown": Goal("end of the save to the kexec call, with one guest longer than with none by", 0.3, "s"),
    "slow-stop": Goal("a unit that takes 30 s to stop, in stop-first: longer pause by", 1, "s"),
    "slow-boot": Goal("a service and a foreign mount that take 30 s to start: longer pause by", 1, "s"),
    "soft-reboot": Goal("pause of a guest over a soft reboot, against that over a kexec", 0.6),
    "without-bus": Goal("guests go on in a boot in which dbus.service never starts", 1, "of 1", at_least=True),
    "early": Goal("cont of the first guest before multi-user.target is reached, by", 0, "s", at_least=True),
}
"""Of `make bench-host`."""

DOMAIN_GOALS = {
    "domain-virsh": Goal(
        "domain stopped by cprctl save + load, times less than by virsh managedsave + start; 1 GiB, 70% written",
        5,
        at_least=True,
    ),
    "domain-ram": Goal("domain stopped by cprctl save + load, 4 GiB against 512 MiB, 70% written", 1.1),
    "domain-many": Goal("8 domains saved and loaded, wall time against a bare script with libvirt's API in parallel", 1.5),
}
"""Of `make bench-domains`."""
