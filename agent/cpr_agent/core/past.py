# SPDX-License-Identifier: GPL-2.0-or-later
"""What the journal says of the VMs, folded record by record: each question is answered without a look at the records.

The journal's adapter keeps one ``Pasts`` and gives it each record once: those that it finds when it is opened, then each
that it appends.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from cpr_agent.core.model import RunState

Record = Mapping[str, Any]
"""Of the journal: its number ``n``, ``at`` (epoch s), ``boot``, ``event``, and the event's own facts."""

MAX_LOADS = 3
"""A load that was begun so often and never came to an end is left to the admin: it may be what ends the agent."""


class VmEvent(enum.StrEnum):
    """Each event of a VM in the journal. An upgrade's are ``upgrade-PHASE``: see ledger.Phase."""

    START = "start"
    """QEMU is started, and the guest boots."""

    SUSPEND = "suspend"
    """The guest is asked to sleep, so that it can be saved."""
    SAVE_BEGIN = "save-begin"
    SAVED = "saved"
    SAVE_UNDONE = "save-undone"
    """A save failed: its guest will go on."""
    ROLLBACK = "rollback"
    """A save is taken back: its guest will go on in the QEMU that it has."""

    LOAD_BEGIN = "load-begin"
    LOAD_FAILED = "load-failed"
    LOAD_INTERRUPTED = "load-interrupted"
    """The agent ended during the load; the guest has not run."""
    RESUME = "resume"
    """The checkpoint is loaded, and its guest will run."""
    RESUMED = "resumed"
    RESUMED_BY_HAND = "resumed-by-hand"
    """Somebody let the guest run on another socket of its QEMU."""
    WOKEN = "woken"
    HELD = "held"
    """The load was refused: see ``evidence``."""
    DISCARD = "discard"
    """An admin gave the checkpoint up."""
    MEMORY_LOST = "memory-lost"
    COLD_STARTED = "cold-started"
    """The guest has booted after its memory was lost."""

    REFRESH = "refresh"
    """The guest is to get a new QEMU."""
    REFRESHED = "refreshed"
    """The attempt is over, also if it failed."""
    TRANSFER = "transfer"
    """The old QEMU hands the guest over to the new one (cpr-transfer)."""
    TRANSFER_UNDONE = "transfer-undone"
    """The guest will go on in the old one."""


COMPACTED = "compacted"
"""The event of records that stand for those that a compaction left out: see ``Pasts.condensed``."""
_BATCH = 1000
"""As many checkpoints to a record of it: 35 KB."""

SPENDING = (VmEvent.RESUMED, VmEvent.RESUMED_BY_HAND)
"""After one of these the guest's RAM has moved on from its checkpoint (invariant 2)."""

_ANSWERS: Mapping[str, Mapping[str, bool]] = {
    VmEvent.REFRESH: {"in_refresh": True},
    VmEvent.TRANSFER: {"in_transfer": True},
    VmEvent.RESUMED: {"in_transfer": False},
    VmEvent.REFRESHED: {"in_refresh": False, "in_transfer": False},
    VmEvent.SUSPEND: {"put_to_sleep": True},
    VmEvent.WOKEN: {"put_to_sleep": False},
    VmEvent.START: {"in_refresh": False, "in_transfer": False, "put_to_sleep": False},
    VmEvent.MEMORY_LOST: {"awaits_cold_start": True},
    VmEvent.COLD_STARTED: {"awaits_cold_start": False},
}
"""How each event answers the questions of ``Past``."""


class InterruptedSave(NamedTuple):
    """A save that neither ended nor was taken back to its end. Its QEMU tells how far it had come."""

    checkpoint: str
    run_state: RunState
    """The guest's, before the save."""
    path: str
    """The file that QEMU writes its state to."""
    last: VmEvent
    """SAVE_BEGIN: nothing came after. SAVE_UNDONE, ROLLBACK: it was being taken back."""
    upgrade: str = ""
    """The id of the upgrade that saves; "" for a save by hand."""


class CheckpointPast(NamedTuple):
    """``last`` is "" as long as no record names the checkpoint; an event that this agent does not know counts too."""

    last: str = ""
    loads: int = 0
    """How often a load of it was begun."""
    spent_by: str = ""
    """The first event of SPENDING."""
    resumes: bool = False
    """Its last event announced that its guest would run."""

    def after(self, event: str, record: Record) -> CheckpointPast:
        return CheckpointPast(
            event,
            self.loads + (event == VmEvent.LOAD_BEGIN),
            self.spent_by or (event if event in SPENDING else ""),
            event == VmEvent.RESUME and record.get("run_state") != RunState.PAUSED,
        )


_UNKNOWN = CheckpointPast()


class _Condensed(msgspec.Struct):
    """The facts of a COMPACTED record: each of the ``checkpoints`` is what CheckpointPast says."""

    checkpoints: list[str]
    last: str
    loads: int
    spent_by: str
    resumes: bool


class Past:
    """Of one VM, as of the journal's last record: who keeps it sees it change. Only ``Pasts`` changes it."""

    def __init__(self, checkpoints: Mapping[str, CheckpointPast]) -> None:
        self.in_refresh = False
        """Whether the guest was being given a new QEMU."""
        self.in_transfer = False
        """Likewise by cpr-transfer; the guest has run in no other QEMU than its own since."""
        self.put_to_sleep = False
        """Whether the agent was the last to put the guest to sleep, and has not woken it since."""
        self.awaits_cold_start = False
        """Whether its memory was found to be lost, and it was not started afresh yet."""
        self._checkpoints = checkpoints
        self._save: Record = {}
        """The last SAVE_BEGIN."""
        self._last: Record = {}
        """The last that names a checkpoint."""
        self._transfer = ""

    @property
    def transfer_checkpoint(self) -> str:
        """The id of the transfer that the VM is in; "" for none."""
        return self._transfer if self.in_transfer else ""

    @property
    def unfinished(self) -> bool:
        """Whether any record of the VM matters to an answer, now or after whatever comes."""
        pending = bool(self._save) and not self.spent_by(self._save["checkpoint"])
        return self.in_refresh or self.in_transfer or self.put_to_sleep or self.awaits_cold_start or pending

    @property
    def interrupted_save(self) -> InterruptedSave | None:
        """None also for a QEMU that can't be understood: if the VM's last save is of a checkpoint that is spent, or of
        another one than its last record."""
        save, last = self._save, self._last
        checkpoint, event = save.get("checkpoint", ""), last.get("event")
        if event not in (VmEvent.SAVE_BEGIN, VmEvent.SAVE_UNDONE, VmEvent.ROLLBACK):
            return None
        if checkpoint != last["checkpoint"] or self.spent_by(checkpoint):
            return None
        return InterruptedSave(
            checkpoint,
            RunState(str(save.get("run_state"))),
            str(save.get("path", "")),
            VmEvent(str(event)),
            str(save.get("upgrade", "")),
        )

    def loads_begun(self, checkpoint: str) -> int:
        return self._of(checkpoint).loads

    def load_interrupted(self, checkpoint: str) -> bool:
        """Whether the last thing that happened to the live ``checkpoint`` was a load that did not come to its end, and that
        may be repeated (MAX_LOADS)."""
        past = self._of(checkpoint)
        under_way = self.in_refresh or (past.loads and past.last in (VmEvent.LOAD_BEGIN, VmEvent.LOAD_INTERRUPTED))
        return bool(under_way) and past.loads < MAX_LOADS

    def resume_announced(self, checkpoint: str) -> bool:
        """Whether the last record of ``checkpoint`` is that its guest would go on, as it was saved."""
        return self._of(checkpoint).last == VmEvent.RESUME

    def resume_interrupted(self, checkpoint: str) -> bool:
        """Whether it was announced that the guest of ``checkpoint`` would run, and no record says that it did."""
        return self._of(checkpoint).resumes

    def spent_by(self, checkpoint: str) -> str:
        """The event since which the guest's RAM is not what belongs to ``checkpoint``, of whichever VM; "" for none."""
        return self._of(checkpoint).spent_by

    def _of(self, checkpoint: str) -> CheckpointPast:
        return self._checkpoints.get(checkpoint, _UNKNOWN)


class Pasts:
    """The fold. Records of unknown events or contents, which a newer agent may have left, answer no question."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._vms: dict[str, Past] = {}
        self._checkpoints: dict[str, CheckpointPast] = {}
        for record in records:
            self.fold(record)

    def of(self, vm: str) -> Past:
        if vm not in self._vms:
            self._vms[vm] = Past(self._checkpoints)
        return self._vms[vm]

    def fold(self, record: Record) -> None:
        event, vm, checkpoint = record.get("event"), record.get("vm"), record.get("checkpoint")
        if not isinstance(event, str):
            return
        if event == COMPACTED:
            self._expand(record)
        if isinstance(checkpoint, str):
            self._checkpoints[checkpoint] = self._checkpoints.get(checkpoint, _UNKNOWN).after(event, record)
        if not isinstance(vm, str):
            return
        past = self.of(vm)
        for question, answer in _ANSWERS.get(event, {}).items():
            setattr(past, question, answer)
        if isinstance(checkpoint, str):
            past._last = record
            if event == VmEvent.SAVE_BEGIN:
                past._save = record
            elif event == VmEvent.TRANSFER:
                past._transfer = checkpoint

    def unfinished(self) -> set[str]:
        """The VMs of which ``Past.unfinished`` is true."""
        return {name for name, past in self._vms.items() if past.unfinished}

    def condensed(self) -> Iterator[dict[str, object]]:
        """The facts of records, at least one, that say of all checkpoints what the fold knows, in place of theirs.

        A host comes to have tens of thousands, whose ids are all that is to be kept: a backup of any can come back.
        """
        alike: dict[CheckpointPast, list[str]] = {_UNKNOWN: []}
        for checkpoint, past in self._checkpoints.items():
            alike.setdefault(past, []).append(checkpoint)
        for past, checkpoints in alike.items():
            for batch in range(0, max(1, len(checkpoints)), _BATCH):
                yield {**past._asdict(), "checkpoints": checkpoints[batch : batch + _BATCH]}

    def _expand(self, record: Record) -> None:
        with contextlib.suppress(msgspec.ValidationError):
            facts = msgspec.convert(record, _Condensed)
            past = CheckpointPast(facts.last, facts.loads, facts.spent_by, facts.resumes)
            self._checkpoints.update(dict.fromkeys(facts.checkpoints, past))
