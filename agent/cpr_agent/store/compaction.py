# SPDX-License-Identifier: GPL-2.0-or-later
"""Which records of the journal a later decision or report needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cpr_agent.core.past import COMPACTED, Pasts, Record, VmEvent
from cpr_agent.core.timeline import COSTS
from cpr_agent.core.upgrade.ledger import EVENT, Phase, Replay

UPGRADES = 24
"""So many upgrades are told in full: of those that stopped guests, and of all. That is two years of a kernel a month, also
where many dry runs came before each. The guests that went on in an older one have their timelines in ``history/``."""
RECORDS = 4000
"""The older ones go once they have more records than that. 100 guests make 600 an upgrade; to read one takes 3 us."""


def needed(records: Sequence[Record], pasts: Pasts, *, upgrades: int = UPGRADES, budget: int = RECORDS) -> list[int]:
    """Indexes of the records that stay as they are, in their order; ``pasts`` is the fold of all.

    Followed by ``pasts.condensed()`` they fold into the same again. Each question about a VM is answered by the last of
    some of its events. So the last record of each event stays, for a VM that has unfinished business or that a kept record
    names. Any other VM is as if there were no record of it.
    """
    kept = _of_upgrades(records, upgrades, budget) | _foreign(records)
    vms = pasts.unfinished() | {_text(records[index], "vm") for index in kept}
    last = {
        (vm, _text(record, "event")): index for index, record in enumerate(records) if (vm := _text(record, "vm")) in vms
    }
    kept |= {index for (vm, _), index in last.items() if vm}
    return sorted(kept)


def _of_upgrades(records: Sequence[Record], upgrades: int, budget: int) -> set[int]:
    """The phases of the current upgrade and of that which `upgrade --back` takes back; and the last upgrades in full."""
    phases: defaultdict[str, list[int]] = defaultdict(list)
    naming: defaultdict[str, list[int]] = defaultdict(list)
    stopping, replay = set(), Replay()
    for index, record in enumerate(records):
        naming[_text(record, "checkpoint")].append(index)
        naming[_text(record, "upgrade")].append(index)
        event, upgrade = _text(record, "event"), _text(record, "upgrade")
        if upgrade and event.startswith(EVENT):
            replay = replay.after(record)
            phases[upgrade].append(index)
            if event == f"{EVENT}{Phase.SAVING}":
                stopping.add(upgrade)
    kept = {index for one in (replay.current, replay.booted) if one for index in phases[one.id]}
    wanted = {*list(phases)[-upgrades:], *[one for one in phases if one in stopping][-upgrades:]}
    told: set[int] = set()
    for upgrade in [one for one in reversed(phases) if one in wanted]:
        more = set(range(phases[upgrade][0], phases[upgrade][-1] + 1))
        saved = {_text(records[index], "checkpoint") for index in more if records[index].get("event") == VmEvent.SAVE_BEGIN}
        for name in {upgrade, *saved} - {""}:
            more.update(naming[name])
        if told and len(told | more) > budget:
            break
        told |= more
    return kept | told


def _foreign(records: Sequence[Record]) -> set[int]:
    """What only a newer agent can read, and may want to after the next update: the last of each kind."""
    last = {
        (event, _text(record, "vm"), _text(record, "checkpoint")): index
        for index, record in enumerate(records)
        if (event := _text(record, "event")) not in _KNOWN and not event.startswith(EVENT)
    }
    return set(last.values())


_KNOWN = {COMPACTED, COSTS, *VmEvent}


def _text(record: Record, name: str) -> str:
    """ "" for a fact that is not there, or no text."""
    value = record.get(name)
    return value if isinstance(value, str) else ""
