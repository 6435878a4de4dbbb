# SPDX-License-Identifier: GPL-2.0-or-later
"""Units of the host that stop before the first guest does, so that no guest stands still for them: `stop-first`.

They start again if the upgrade is taken back. After a kexec they start as in each boot.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from cpr_agent.core.jobs import Job
from cpr_agent.core.model import UNIT_NAME, UNIT_NAME_CHARS, Finding, Unit
from cpr_agent.core.ports import Ports
from cpr_agent.core.upgrade.dependents import Dependents, dependents
from cpr_agent.core.upgrade.ledger import Phase
from cpr_agent.core.upgrade.roll_back import or_roll_back
from cpr_agent.core.upgrade.scope import Scope
from cpr_agent.core.vm import Vm
from cpr_agent.errors import SaveFailed
from cpr_agent.words import length

SETTING = "stop-first in [upgrade] of agent.toml"


async def findings(ports: Ports, names: Sequence[str], vms: Collection[Vm]) -> list[Finding]:
    """What speaks against the stop of these units, and what else stops with them."""
    if not names:
        return []
    units = await ports.units.all(list(filter(is_unit_name, names)))
    if not units:
        what, why = "systemd has not told of its units", f"whether those of {SETTING} may stop is not known"
        return [Finding(severity="error", code="stop-first", what=what, why=why, remedy="see: systemctl show")]
    return list(_findings(names, dependents(ports, units, vms)))


def _findings(names: Sequence[str], known: Dependents) -> Iterator[Finding]:
    for name in names:
        if wrong := obstacle(name, known):
            why, remedy = "an upgrade is to stop it before the first guest", f"take it out of {SETTING}"
            yield Finding(severity="error", code="stop-first", what=wrong, why=why, remedy=remedy)
    stopping = _stopping(names, known)
    for unit in (known.unit(name) for name in names):
        if unit and (back := sorted(_restarters(unit, known) - set(stopping))):
            what = f"{unit.name} can be started again by {', '.join(back)} before the guests are saved"
            why = "guests would stand still for its stop all the same"
            remedy = f"put {'it' if len(back) == 1 else 'them'} into {SETTING} too"
            yield Finding(severity="warning", code="stop-first", what=what, why=why, remedy=remedy)
    if stopping:
        what = f"before the first guest stops: {', '.join(stopping)}"
        yield Finding(severity="info", code="stops-first", what=what, why=SETTING)


def is_unit_name(name: str) -> bool:
    return len(name) <= UNIT_NAME_CHARS and bool(re.fullmatch(UNIT_NAME, name))


def obstacle(name: str, known: Dependents) -> str:
    """Why an upgrade may not stop it; "" if it may."""
    if not is_unit_name(name):
        return f"{name!r} is not the name of a unit (systemd.unit(5))"
    unit = known.unit(name)
    if unit is None:
        return f"there is no unit {name} on this host"
    if who := known.of(unit):
        return f"{name} may not stop first: {who} depends on it"
    if not unit.stoppable:
        return f"systemd lets nobody stop {name} by hand"
    if once := sorted(one.name for one in known.taken_along(unit).values() if one.runs and not one.startable):
        return f"{', '.join(once)} could not be started again if the upgrade is taken back"
    return ""


async def stop(scope: Scope, job: Job) -> None:
    """From CHECKING to STOPPING, where there is anything to stop. Returns once all of it has stopped; or all is taken back
    and it raises SaveFailed. No guest has stopped by then."""
    names, ports = scope.settings.stop_first, scope.ports
    if not names:
        return
    known = dependents(ports, await ports.units.all(list(filter(is_unit_name, names))), scope.vms())
    stopping = _stopping(names, known)
    if not stopping:
        return
    scope.ledger.enter(Phase.STOPPING, stopped_first=stopping)
    async with or_roll_back(scope, job, f"mend the cause, or take it out of {SETTING}"):
        job.enter(f"stopping {', '.join(stopping)}")
        await _stop_each(ports, _named(names, known), scope.settings.stop_first_timeout)


async def _stop_each(ports: Ports, units: Iterable[Unit], timeout_s: float) -> None:
    """Raises SaveFailed."""
    stops = {asyncio.create_task(ports.units.stop(unit.name)): unit.name for unit in units}
    try:
        done, hanging = await asyncio.wait(stops, timeout=timeout_s)
    finally:
        for task in stops:
            task.cancel()
    if hanging:
        which = ", ".join(sorted(stops[task] for task in hanging))
        raise SaveFailed(f"{which} did not stop within {length(timeout_s)}")
    if failed := sorted(said for task in done if (said := task.result())):
        raise SaveFailed(f"could not be stopped: {'; '.join(failed)}")


def _named(names: Iterable[str], known: Dependents) -> list[Unit]:
    """The units that may be stopped, and run."""
    units = (known.unit(name) for name in names if not obstacle(name, known))
    return list({unit.name: unit for unit in units if unit and unit.runs}.values())


def _stopping(names: Iterable[str], known: Dependents) -> list[str]:
    """With all that stops along, and runs."""
    along = {name: one for unit in _named(names, known) for name, one in known.taken_along(unit).items()}
    return sorted(name for name, one in along.items() if one.runs)


def _restarters(unit: Unit, known: Dependents) -> set[str]:
    return {name for name in unit.triggered_by if (one := known.unit(name)) and one.runs}
