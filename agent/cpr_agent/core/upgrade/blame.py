# SPDX-License-Identifier: GPL-2.0-or-later
"""Who cost the guests' pause: the units on the critical path of the shutdown and of the boot, and the kernel's own part.

Both paths are walked backwards, as `systemd-analyze critical-chain` does: from the moment that guests waited for, to the
unit that had to be done before it and was so last, to the one before that. What was slow beside the path cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from cpr_agent.core.model import BootTimes, Finding, Unit, UnitStop
from cpr_agent.core.past import Record
from cpr_agent.core.timeline import COSTS, INITRD, KERNEL, PID_1, PURGATORY, Cost, GuestTimeline, Part
from cpr_agent.core.upgrade.dependents import Dependents, dependents
from cpr_agent.core.upgrade.ledger import Kind, Upgrade
from cpr_agent.core.upgrade.scope import Scope
from cpr_agent.core.upgrade.stop_first import SETTING, obstacle
from cpr_agent.words import length, size

log = logging.getLogger(__name__)

LOADS = "cpr-load.service"
AGENT, EARLY = "cpr-agent.service", "cpr-early.service"
LEAST_S = 0.05
"""Shorter costs are left out: together they are a small part of any pause."""
MOST = 100
"""So many costs are put on record; the paths of a host have some 20 units."""
NOTABLE_S = 1.0
"""From here on a remedy is worth its trouble."""
_SMALLER = "make the initrd smaller: MODULES=dep in /etc/initramfs-tools/initramfs.conf, or hostonly for dracut"


def costs(
    upgrade: Upgrade, timelines: Sequence[GuestTimeline], stops: Iterable[UnitStop], boot: BootTimes, known: Dependents
) -> list[Cost]:
    """Of an upgrade's guests, at least one, that have come through its kexec; oldest first."""
    down_at = max(one.shutdown_at for one in timelines)
    userspace_at, load_at = timelines[0].userspace_at, min(one.load_at for one in timelines)
    saved_at = max(one.saved_at for one in timelines)
    kernel_at = userspace_at - boot.userspace_s if boot.userspace_s else 0.0
    new_kernel = upgrade.kind is not Kind.SOFT_REBOOT
    shutdown = shutdown_path(stops, saved_at, down_at, known, upgrade.stopped_first) if down_at else []
    kernel = kernel_costs(down_at, kernel_at, userspace_at, boot, upgrade.kernel_bytes) if kernel_at and new_kernel else []
    up = boot_path(known, kernel_at, userspace_at, load_at) if kernel_at else []
    return [cost for cost in (*shutdown, *kernel, *up) if cost.length_s >= LEAST_S]


def shutdown_path(
    stops: Iterable[UnitStop], since: float, until: float, known: Dependents, stopped_first: Collection[str] = ()
) -> list[Cost]:
    """From ``since``, when the last guest was saved, to ``until``, when the shutdown's userspace ended (epoch s). What was
    ``stopped_first`` and stops here was started again meanwhile: to name it once more would not help."""
    there = sorted((stop for stop in stops if since < stop.ended_at <= until), key=lambda stop: stop.ended_at)
    out: list[Cost] = []
    waiter, now = "", there.pop() if there else None
    while now:
        unit, stops_first = known.unit(now.unit), now.unit not in stopped_first and not obstacle(now.unit, known)
        out.append(
            Cost(
                what=now.unit,
                part=Part.SHUTDOWN,
                begin=max(now.began_at, since),
                end=min(now.ended_at, until),
                waiter=waiter,
                needed_by=known.of(unit) if unit else "",
                stops_first=stops_first,
            )
        )
        # The last that was done when it began; of those that must stop before it, where PID 1 knows them.
        earlier = [stop for stop in there if stop.ended_at <= now.began_at and stop.unit != now.unit]
        first = [stop for stop in earlier if _stops_before(stop.unit, now.unit, known.units)]
        unknown = now.unit not in known.units
        waiter, now = now.unit, first[-1] if first else earlier[-1] if unknown and earlier else None
        there = [stop for stop in there if now and stop.ended_at < now.ended_at]
    return out[::-1]


def _stops_before(one: str, other: str, units: Mapping[str, Unit]) -> bool:
    """A shutdown reverses the order of the boot."""
    later, earlier = units.get(one), units.get(other)
    return bool((later and other in later.after) or (earlier and one in earlier.before))


def kernel_costs(
    down_at: float, kernel_at: float, userspace_at: float, boot: BootTimes, kernel_bytes: int
) -> Iterator[Cost]:
    """The times are epoch s: the end of the shutdown's userspace (0: unknown), and the begin of the kernel and of the new
    userspace."""
    if down_at:
        yield Cost(what=PURGATORY, part=Part.KERNEL, begin=down_at, end=kernel_at, size_bytes=kernel_bytes)
    initrd_at = kernel_at + boot.initrd_s if boot.initrd_s else userspace_at
    yield Cost(what=KERNEL, part=Part.KERNEL, begin=kernel_at, end=initrd_at)
    if boot.initrd_s:
        yield Cost(what=INITRD, part=Part.KERNEL, begin=initrd_at, end=userspace_at, size_bytes=boot.initrd_bytes)


def boot_path(known: Dependents, kernel_at: float, userspace_at: float, load_at: float) -> list[Cost]:
    """From the begin of userspace to that of the first load; ``kernel_at`` is when the units' own clock began (epoch s)."""
    out: list[Cost] = []
    waiter, known = _last_waiter(known, load_at - kernel_at)
    seen: set[str] = set()
    while waiter and (now := _before(waiter, known.units, seen)):
        seen.add(now.name)
        # A device's unit begins once it is there: whoever waits for it has done so since userspace began.
        begin = max(kernel_at + (0.0 if _is_device(now) else now.began_s), userspace_at)
        end = max(begin, min(kernel_at + now.ended_s, load_at))
        out.append(
            Cost(
                what=now.name,
                part=Part.BOOT,
                begin=begin,
                end=end,
                waiter=waiter.name,
                needed_by=known.of(now),
                early="sysinit.target" in now.before,
            )
        )
        waiter = now
    if waiter and not _is_device(waiter):
        end = max(userspace_at, min(kernel_at + waiter.began_s, load_at))
        out.append(Cost(what=PID_1, part=Part.BOOT, begin=userspace_at, end=end, waiter=waiter.name))
    return out[::-1]


def _last_waiter(known: Dependents, load_s: float) -> tuple[Unit | None, Dependents]:
    """The unit that the first load waited for, and all units as their order was then.

    That is the first VM's own, where what it is ordered after was done later than the agent was ready to load. Where guests
    went on early (ADR 33) the load waited for the agent, and the agent for the unit that has started it, whatever its
    own order. ``load_s`` is on the units' own clock."""
    units, loads = known.units, known.units.get(LOADS)
    agent, early = units.get(AGENT), units.get(EARLY)
    if agent and early and early.began_s and (agent.began_s > load_s or _out_of_order(agent, units)):
        last = AGENT if agent.ended_s <= load_s else EARLY  # the agent has started anew since
        in_order = {**units, AGENT: replace(agent, after=frozenset({EARLY}))}
        return Unit(name=LOADS, after=frozenset({last}), began_s=load_s), known._replace(units=in_order)
    vms = [unit for name in known.vms if (unit := units.get(name)) and unit.began_s]
    first = min(vms, key=lambda unit: unit.began_s, default=None)
    before = _before(first, units)
    return (first if before and not (loads and before.ended_s <= loads.began_s) else loads), known


def _out_of_order(unit: Unit, units: Mapping[str, Unit]) -> bool:
    return any(units[name].ended_s > unit.began_s for name in unit.after if name in units)


def _before(unit: Unit | None, units: Mapping[str, Unit], seen: Collection[str] = ()) -> Unit | None:
    """Of those that it is ordered after and that had started when it began, the last; none of those already ``seen``, since
    units can be ordered in a circle."""
    if unit is None:
        return None
    done = (units[name] for name in unit.after if name in units and name not in (unit.name, *seen))
    started = [one for one in done if one.ended_s and one.ended_s <= unit.began_s]
    return max(started, key=lambda one: (one.ended_s, one.name), default=None)


def _is_device(unit: Unit) -> bool:
    return unit.name.endswith(".device")


async def account(scope: Scope) -> None:
    """Put on record who cost the pause of the upgrade that this boot has ended; guests run."""
    ports, upgrade = scope.ports, scope.ledger.require_current()
    through = [one for one in ports.history.all() if one.upgrade == upgrade.id and one.userspace_at and one.by_kexec]
    if not through or not (units := await ports.units.all()):
        return
    since, until = max(one.saved_at for one in through), max(one.shutdown_at for one in through)
    stops = await ports.units.stops(_boot_before(ports.journal.records(), upgrade.id), since, until) if until else []
    about = dependents(ports, units, scope.vms())
    found = costs(upgrade, through, stops, await ports.units.boot_times(), about)
    try:
        ports.journal.append(COSTS, upgrade=upgrade.id, costs=msgspec.to_builtins(found[-MOST:]))
    except OSError as error:  # guests run; a report is not worth failing for
        log.warning("who cost the pause could not be put on record: %s", error)


def _boot_before(records: Iterable[Record], upgrade: str) -> str:
    """The boot in which the upgrade began (``Boot.boot_id``)."""
    return next((str(record["boot"]).partition(".")[0] for record in records if record.get("upgrade") == upgrade), "")


# -- in words -----------------------------------------------------------------------------------------------------------


def findings(some: Iterable[Cost]) -> list[Finding]:
    """A sentence on each cost that is worth one, the longest first, with a remedy where the admin has one."""
    about = {Part.SHUTDOWN: _about_stop, Part.KERNEL: _about_kernel, Part.BOOT: _about_start}
    notable = sorted((cost for cost in some if cost.length_s >= NOTABLE_S), key=lambda cost: -cost.length_s)
    return [about[cost.part](cost) for cost in notable]


def _about_stop(cost: Cost) -> Finding:
    remedy = f"put it into {SETTING}" if cost.stops_first else ""
    return _finding(cost, "slow-stop", f"{cost.what} took {length(cost.length_s)} to stop", remedy)


def _about_kernel(cost: Cost) -> Finding:
    took, bytes_ = length(cost.length_s), size(cost.size_bytes)
    if cost.what == PURGATORY:
        hashed = f", which hashes {bytes_} of kernel and initrd," if cost.size_bytes else ""
        return _finding(cost, "slow-purgatory", f"the end of the shutdown and the purgatory{hashed} took {took}", _SMALLER)
    if cost.what == INITRD:
        return _finding(cost, "slow-initrd", f"the initrd ({bytes_}) took {took}", _SMALLER)
    return _finding(cost, "slow-kernel", f"the kernel took {took} until its first program", "")


def _about_start(cost: Cost) -> Finding:
    took = f"{cost.what} took {length(cost.length_s)}"
    if cost.what == PID_1:
        return _finding(cost, "slow-start", f"{took} before it started the first unit that guests waited for", "")
    if cost.needed_by:
        return _finding(cost, "slow-start", f"{took} to start", "")
    if cost.what.endswith((".mount", ".device", ".swap")):
        remedy = "add nofail to its line in /etc/fstab, so that the boot does not wait for it"
    elif cost.early:
        return _finding(cost, "slow-start", f"{took} to start", "")
    else:
        remedy = f"order it After={LOADS} in a drop-in, and not before {cost.waiter}"
    return _finding(cost, "slow-start", f"{took}, and no guest needs it", remedy)


def _finding(cost: Cost, code: str, what: str, remedy: str) -> Finding:
    why = f"{cost.needed_by} depends on it" if cost.needed_by else ""
    severity: Literal["warning", "info"] = "warning" if remedy else "info"
    return Finding(severity=severity, code=code, what=what, why=why, remedy=remedy, seconds=round(cost.length_s, 3))
