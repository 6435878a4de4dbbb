"""The upgrade as one transaction: its phases, and which may follow which. Each is durable before it is acted on.

Nothing of it is remembered but in the journal: after a crash at any instant the ledger is what its records say
(invariant 5). Verifying, loading and resuming are phases not of the host but of each guest, which waits for no other
(ADR 6).
"""

from __future__ import annotations

import enum
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from cpr_agent.core.events import Event, about
from cpr_agent.core.model import Policy
from cpr_agent.core.ports import Host, Journal

log = logging.getLogger(__name__)

EVENT = "upgrade-"
"""What the journal's events of phases begin with: ``upgrade-saving``."""


class Phase(enum.StrEnum):
    CHECKING = "checking"
    CHECKED = "checked"
    REFUSED = "refused"
    SAVING = "saving"
    SAVED = "saved"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling-back"
    ROLLED_BACK = "rolled-back"
    BOOTED = "booted"
    LOADING = "loading"
    DONE = "done"
    HELD = "held"


NEXT: Mapping[Phase, frozenset[Phase]] = {
    Phase.CHECKING: frozenset({Phase.CHECKED, Phase.REFUSED, Phase.SAVING}),
    Phase.SAVING: frozenset({Phase.SAVING, Phase.SAVED, Phase.ROLLING_BACK}),
    Phase.SAVED: frozenset({Phase.COMMITTING, Phase.ROLLING_BACK, Phase.LOADING}),
    Phase.COMMITTING: frozenset({Phase.ROLLING_BACK}),
    Phase.ROLLING_BACK: frozenset({Phase.ROLLED_BACK}),
    Phase.BOOTED: frozenset({Phase.LOADING}),
    Phase.LOADING: frozenset({Phase.LOADING, Phase.DONE, Phase.HELD, Phase.ROLLED_BACK}),
    Phase.HELD: frozenset({Phase.LOADING}),
    **dict.fromkeys((Phase.CHECKED, Phase.REFUSED, Phase.ROLLED_BACK, Phase.DONE), frozenset()),
}
"""Within one boot. What a new boot finds ``IN_FLIGHT`` becomes BOOTED."""

IN_FLIGHT = frozenset({Phase.SAVING, Phase.SAVED, Phase.COMMITTING, Phase.ROLLING_BACK, Phase.BOOTED, Phase.LOADING})

Kind = Literal["upgrade", "drill", "back", "kexec", "save-all"]
"""``kexec``: somebody typed `systemctl kexec`. ``save-all``: an admin's own save, which no crash takes back."""


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """What the journal says of one transaction. ``boot`` is the one in which its phase was entered; times in epoch s."""

    id: str
    kind: Kind
    phase: Phase
    boot: str
    started_at: float
    changed_at: float
    """When its phase was entered."""
    kernel_from: str
    command_line_from: str = ""
    kernel_to: str = ""
    policy: Policy = Policy.ALL_OR_NOTHING
    shut_down: tuple[str, ...] = ()
    """VMs that it shut down because they could not be saved; they are started again at its end."""
    failures: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    cold_started: tuple[str, ...] = ()
    """VMs whose memory was lost, with why."""
    longest_pause_s: float = 0.0
    reason: str = ""
    interrupted: str = ""
    """What ended the boot before, if that was no kexec."""


class Ledger:
    """The current upgrade, from the journal and into it; ``changed`` tells the bus."""

    def __init__(self, journal: Journal, host: Host) -> None:
        self._journal = journal
        self._host = host
        self.changed: Callable[[], None] = lambda: None
        self.current: Upgrade | None = None
        self.booted: Upgrade | None = None
        """The last that started another kernel; dry runs, and upgrades that were refused, have come since perhaps."""
        for record in journal.records():
            if str(record["event"]).startswith(EVENT):
                self._replay(record)

    @property
    def phase(self) -> Phase | None:
        return self.current.phase if self.current else None

    @property
    def committed(self) -> bool:
        """The host is on its way into another kernel: no guest may run any more."""
        return bool(self.current) and self.phase is Phase.COMMITTING and not self.rebooted

    @property
    def rebooted(self) -> bool:
        """Whether the host was started anew since the current phase was entered."""
        return self.current is not None and self.current.boot != self._host.boot_id()

    @property
    def free(self) -> bool:
        """Whether a new transaction may begin. Guests that an earlier one left saved are carried along."""
        by_hand = self.current is not None and (self.current.kind, self.phase) == ("save-all", Phase.SAVED)
        return by_hand or self.phase not in (
            Phase.CHECKING,
            Phase.SAVING,
            Phase.SAVED,
            Phase.COMMITTING,
            Phase.ROLLING_BACK,
        )

    def begin(self, kind: Kind, **facts: object) -> Upgrade:
        """Open a new transaction in CHECKING."""
        assert self.free
        self._append(uuid.uuid4().hex, Phase.CHECKING, kind=kind, kernel_from=self._host.kernel(), **facts)
        assert self.current
        return self.current

    def enter(self, phase: Phase, **facts: object) -> None:
        """Make ``phase`` durable. The table is checked here and nowhere else."""
        assert self.current
        allowed = {Phase.BOOTED} if self.rebooted and self.phase in IN_FLIGHT else NEXT[self.current.phase]
        assert phase in allowed, f"{self.current.phase} -> {phase}"
        self._append(self.current.id, phase, **facts)

    def _append(self, upgrade: str, phase: Phase, **facts: object) -> None:
        _tell(self._replay(self._journal.append(f"{EVENT}{phase}", upgrade=upgrade, **facts)))
        self.changed()

    def _replay(self, record: Mapping[str, Any]) -> Upgrade:
        self.current = _replayed(self.current, record)
        if self.phase is Phase.BOOTED and self.current.kind != "drill":
            self.booted = self.current
        return self.current


_TOLD = {
    Phase.CHECKING: (logging.INFO, Event.UPGRADE_BEGUN),
    Phase.REFUSED: (logging.WARNING, Event.UPGRADE_REFUSED),
    Phase.COMMITTING: (logging.INFO, Event.UPGRADE_COMMITTED),
    Phase.ROLLED_BACK: (logging.WARNING, Event.UPGRADE_ROLLED_BACK),
    Phase.DONE: (logging.INFO, Event.UPGRADE_DONE),
    Phase.HELD: (logging.ERROR, Event.UPGRADE_HELD),
}
"""Phases that the system's journal has an event of its own for."""


def _tell(upgrade: Upgrade) -> None:
    level, event = _TOLD.get(upgrade.phase, (logging.INFO, None))
    facts = {
        "upgrade": upgrade.id,
        "kind": upgrade.kind,
        "phase": upgrade.phase,
        "kernel_from": upgrade.kernel_from,
        "kernel_to": upgrade.kernel_to,
        "reason": "; ".join([*([upgrade.reason] if upgrade.reason else []), *upgrade.failures]),
    }
    why = f": {facts['reason']}" if facts["reason"] else ""
    log.log(level, "%s %s: %s%s", upgrade.kind, upgrade.id[:8], upgrade.phase, why, extra=about(event, **facts))


def _replayed(before: Upgrade | None, record: Mapping[str, Any]) -> Upgrade:
    """``before``, after a phase's record."""
    phase = Phase(str(record["event"]).removeprefix(EVENT))
    facts: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name in _FACTS
    }
    if "policy" in facts:
        facts["policy"] = Policy(facts["policy"])
    if before is None or before.id != record["upgrade"]:
        return Upgrade(
            id=record["upgrade"],
            phase=phase,
            boot=record["boot"],
            started_at=record["at"],
            changed_at=record["at"],
            **facts,
        )
    return replace(before, phase=phase, boot=record["boot"], changed_at=record["at"], **facts)


_FACTS = (
    "kind",
    "kernel_from",
    "command_line_from",
    "kernel_to",
    "policy",
    "shut_down",
    "failures",
    "loaded",
    "cold_started",
    "longest_pause_s",
    "reason",
    "interrupted",
)
