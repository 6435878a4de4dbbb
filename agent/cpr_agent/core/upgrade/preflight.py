# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan of an upgrade, and the host's part of its check. Looks, and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import msgspec

from cpr_agent.core.model import Finding, Kernel, Policy
from cpr_agent.core.paths import AllowedFiles
from cpr_agent.core.ports import Ports
from cpr_agent.core.settings import Settings
from cpr_agent.core.timeline import GuestTimeline
from cpr_agent.core.upgrade.command_line import blacklisted, lost_and_added
from cpr_agent.core.upgrade.ledger import Kind, Upgrade
from cpr_agent.core.upgrade.scope import UNTOUCHED
from cpr_agent.core.vm import Vm
from cpr_agent.errors import InvalidArgument, KernelRefused, UpgradeRefused
from cpr_agent.words import counted, size

STATE_BYTES = 16 << 20
"""Room that a VM's device state may need: some hundred KB are usual, and many vCPUs or devices take a few MB."""
RECENT = 5
"""So many last pauses of a VM predict the next one."""


class UpgradeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A call of Manager.Upgrade; the fields are its options."""

    kernel: str = ""
    kernel_image: str = ""
    initrd: str = ""
    append: str = ""
    reuse_cmdline: bool = False
    policy: Policy | None = None
    max_pause: float | None = None
    dry_run: bool = False
    back: bool = False
    drill: bool = False


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    kind: Kind
    kernel: Kernel
    command_line: str
    policy: Policy
    max_pause_s: float | None = None
    dry_run: bool = False

    @property
    def target(self) -> str:
        """The kernel's version, or its image if the version is not known."""
        return self.kernel.version or self.kernel.image


def plan(request: UpgradeRequest, ports: Ports, settings: Settings, last: Upgrade | None) -> Plan:
    """Which kernel, with which command line; ``last`` is the upgrade to go back from. Raises InvalidArgument,
    KernelRefused."""
    if not ports.kexec.possible:
        raise KernelRefused(
            "the agent does not run under systemd: it can replace QEMU, but start no other kernel",
            left="nothing was done",
            remedy="run it as cpr-agent.service",
        )
    _refuse_contradiction(request)
    kind, kernel = _chosen(request, ports, settings, last)
    return Plan(
        kind=kind,
        kernel=kernel,
        command_line=_command_line(request, ports, last),
        policy=request.policy or settings.upgrade.policy,
        max_pause_s=request.max_pause,
        dry_run=request.dry_run,
    )


def _refuse_contradiction(request: UpgradeRequest) -> None:
    chosen = [name for name in ("kernel", "kernel_image", "back", "drill") if getattr(request, name)]
    if len(chosen) > 1:
        raise InvalidArgument(f"{' and '.join(chosen).replace('_', '-')} exclude each other", left="nothing was done")
    if request.initrd and not request.kernel_image:
        raise InvalidArgument("an initrd was named without a kernel image", left="nothing was done")


def _chosen(request: UpgradeRequest, ports: Ports, settings: Settings, last: Upgrade | None) -> tuple[Kind, Kernel]:
    if request.kernel_image:
        return Kind.UPGRADE, _from_image(request, ports, settings)
    if request.drill:
        return Kind.DRILL, _installed(ports.boot.kernel(), ports)
    if not request.back:
        return Kind.UPGRADE, _installed(request.kernel, ports)
    if last is None or not last.kernel_from:
        raise KernelRefused("there is no earlier upgrade to go back from", left="nothing was done")
    return Kind.BACK, _installed(last.kernel_from, ports)


def _command_line(request: UpgradeRequest, ports: Ports, last: Upgrade | None) -> str:
    running = ports.kernels.command_line()
    if request.back and last and last.command_line_from:
        return last.command_line_from
    return f"{running} {request.append}".strip() if request.reuse_cmdline or not request.append else request.append


def _from_image(request: UpgradeRequest, ports: Ports, settings: Settings) -> Kernel:
    """A kernel by its file; its version is known if it is an installed one."""
    image = _justified(request.kernel_image, settings)
    initrd = _justified(request.initrd, settings) if request.initrd else ""
    known = [kernel for kernel in ports.kernels.installed() if Path(kernel.image).resolve() == Path(image)]
    if known:
        return Kernel(version=known[0].version, image=image, initrd=initrd, config=known[0].config)
    return Kernel(version="", image=image, initrd=initrd)


def _installed(version: str, ports: Ports) -> Kernel:
    """``version`` "" is the newest of the running flavour."""
    installed = ports.kernels.installed()
    for kernel in installed:
        if version in ("", kernel.version):
            return kernel
    raise KernelRefused(
        f"kernel {version} is not installed" if version else "no kernel is installed in /boot",
        left="nothing was done",
        remedy=f"installed are: {', '.join(kernel.version for kernel in installed) or 'none'}",
    )


def _justified(name: str, settings: Settings) -> str:
    """A path below the directories that kernels may be in, symbolic links resolved. Raises InvalidArgument."""
    path = Path(name)
    path = path.resolve() if path.is_absolute() else path
    directories = tuple(Path(directory).resolve() for directory in settings.files.kernel_directories)
    AllowedFiles("kernel file", directories, "kernel-directories").check(path, fixed=path)
    return str(path)


def refuse(findings: list[Finding]) -> None:
    """Raises UpgradeRefused with every error among the findings about the host. The policy decides about those of a VM."""
    errors = [finding for finding in findings if finding.severity == "error" and not finding.vm]
    if errors:
        raise UpgradeRefused(
            "the host can't be upgraded: " + "; ".join(finding.what for finding in errors),
            left=UNTOUCHED,
            remedy="; ".join(dict.fromkeys(finding.remedy for finding in errors if finding.remedy)),
        )


_NOT_LOOKED_AT = Finding(
    severity="info",
    code="not-looked-at",
    what="the new kernel and its initrd, and the hooks of the admin, were not looked at",
    why="you may only look, and each of these costs the host something",
    remedy="check as a user who may manage VMs",
)


async def check_host(the_plan: Plan, ports: Ports, vms: Collection[Vm], *, kernel: bool = True) -> list[Finding]:
    """Find reasons against the plan in the host and, with ``kernel``, in the new kernel and its initrd, and predict how
    long guests will pause."""
    drivers = ports.memory.drivers(tuple(memory for vm in vms for memory in vm.occupied_memory()))
    return [
        *ports.kexec.findings(),
        *ports.surroundings.findings(),
        *(await asyncio.to_thread(ports.kernels.findings, the_plan.kernel, drivers) if kernel else [_NOT_LOOKED_AT]),
        *_command_line_findings(the_plan, ports, drivers),
        *_room_findings(ports, [vm for vm in vms if vm.pid]),
        *_pause_findings(the_plan, ports, [vm.name for vm in vms if vm.pid or vm.checkpointed]),
    ]


def _command_line_findings(the_plan: Plan, ports: Ports, drivers: Collection[str]) -> list[Finding]:
    out = []
    lost, added = lost_and_added(ports.kernels.command_line(), the_plan.command_line)
    difference = [f"lacks {word}" for word in lost] + [f"has {word} in addition" for word in added]
    if difference:
        out.append(
            Finding(
                severity="error",
                code="command-line",
                what=f"the new kernel's command line {', '.join(difference)}",
                why="it decides where persistent memory is: guests' RAM would become free memory, or move",
                remedy="use --reuse-cmdline",
            )
        )
    if banned := sorted(blacklisted(the_plan.command_line) & set(drivers)):
        out.append(
            Finding(
                severity="error",
                code="command-line-blacklist",
                what=f"the new kernel's command line forbids {', '.join(banned)}",
                why="the guests' memory needs these drivers",
                remedy="take them off the blacklist",
            )
        )
    return out


def _room_findings(ports: Ports, live: list[Vm]) -> list[Finding]:
    needed, room = len(live) * STATE_BYTES, ports.store.room_bytes()
    if room >= needed:
        return []
    what = f"{size(room)} are free for the device state of {counted(len(live), 'VM')}, which can take {size(needed)}"
    remedy = "free some room in /var/lib/cpr-agent"
    return [Finding(severity="error", code="no-room", what=what, why="a save would fail half way", remedy=remedy)]


def predict(vms: list[str], history: list[GuestTimeline]) -> tuple[float, int] | None:
    """The longest pause that any of ``vms`` must expect (s), and how many kexecs of this host are on record; None if there
    are none.

    A VM's own last kexecs count, or those of all VMs if it has none. Their median is taken: a clock that was stepped on the
    way must not decide.
    """
    kexecs = [
        timeline
        for timeline in history
        if timeline.userspace_at and timeline.by_kexec and not timeline.soft and timeline.pause_s > 0
    ]
    if not kexecs or not vms:
        return None
    from statistics import median  # it brings fractions and decimals, and guests wait for the agent's start

    own = ([t.pause_s for t in kexecs if t.vm == vm] or [t.pause_s for t in kexecs] for vm in vms)
    return max(median(pauses[-RECENT:]) for pauses in own), len({t.upgrade or t.id for t in kexecs})


def _pause_findings(the_plan: Plan, ports: Ports, vms: list[str]) -> list[Finding]:
    predicted = predict(vms, ports.history.all())
    if predicted is None:
        what = "how long guests will pause is not known: this host has no kexec on record" if vms else "no guest will pause"
        out = [
            Finding(severity="info", code="predicted-pause", what=what, remedy="`cprctl drill` measures it" if vms else "")
        ]
    else:
        pause_s, count = predicted
        what = f"guests will pause for about {pause_s:.1f} s, as in the last of {count} kexecs of this host"
        out = [Finding(severity="info", code="predicted-pause", what=what, seconds=pause_s)]
    if the_plan.max_pause_s is not None and vms and (predicted is None or predicted[0] > the_plan.max_pause_s):
        allowed = f"the pause may take {the_plan.max_pause_s:g} s at most"
        why = "longer than allowed" if predicted else "nothing says that it will be short enough"
        what = f"{allowed}, and {predicted[0]:.1f} s are expected" if predicted else f"{allowed}, and none was measured yet"
        out.append(Finding(severity="error", code="max-pause", what=what, why=why, remedy="allow more with --max-pause"))
    return out
