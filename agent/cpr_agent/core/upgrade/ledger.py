# SPDX-License-Identifier: GPL-2.0-or-later
"""The upgrade as one transaction: its phases, and which may follow which. Each is durable before it is acted on.

The journal is its only memory: after a crash at any instant the journal's records are all of the ledger (invariant 5).
Verifying, loading and resuming are phases of each guest, which waits for no other, and not of the host (ADR 6).
"""

from __future__ import annotations

import enum
import logging
import uuid
from collections.abc import Mapping

import msgspec
from msgspec.structs import asdict

from cpr_agent.core.events import Event, about
from cpr_agent.core.listener import Listener
from cpr_agent.core.model import Policy
from cpr_agent.core.past import Record
from cpr_agent.core.ports import Boot, Journal

log = logging.getLogger(__name__)

EVENT = "upgrade-"
"""What the journal's events of phases begin with: ``upgrade-saving``."""


class Phase(enum.StrEnum):
    CHECKING = "checking"
    CHECKED = "checked"
    REFUSED = "refused"
    STOPPING = "stopping"
    """Units of the host stop, which guests would have to wait for; guests run."""
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
    Phase.CHECKING: frozenset({Phase.CHECKED, Phase.REFUSED, Phase.STOPPING, Phase.SAVING}),
    Phase.STOPPING: frozenset({Phase.SAVING, Phase.ROLLING_BACK}),
    Phase.SAVING: frozenset({Phase.SAVING, Phase.SAVED, Phase.ROLLING_BACK}),
    Phase.SAVED: frozenset({Phase.COMMITTING, Phase.ROLLING_BACK, Phase.LOADING}),
    Phase.COMMITTING: frozenset({Phase.ROLLING_BACK}),
    Phase.ROLLING_BACK: frozenset({Phase.ROLLED_BACK}),
    Phase.BOOTED: frozenset({Phase.LOADING}),
    Phase.LOADING: frozenset({Phase.LOADING, Phase.DONE, Phase.HELD, Phase.ROLLED_BACK}),
    Phase.HELD: frozenset({Phase.LOADING}),
    **dict.fromkeys((Phase.CHECKED, Phase.REFUSED, Phase.ROLLED_BACK, Phase.DONE), frozenset()),
}
"""Within one boot. An upgrade that a new boot finds ``IN_FLIGHT`` becomes BOOTED."""

TAKEN_BACK = frozenset({Phase.STOPPING, Phase.SAVING, Phase.SAVED, Phase.COMMITTING, Phase.ROLLING_BACK})
"""From these phases an upgrade can be rolled back, within one boot."""

IN_FLIGHT = TAKEN_BACK | {Phase.BOOTED, Phase.LOADING}

OVER = frozenset({Phase.CHECKED, Phase.REFUSED, Phase.ROLLED_BACK, Phase.DONE})
"""No phase follows these."""


class Kind(enum.StrEnum):
    """How an upgrade began."""

    UPGRADE = "upgrade"
    DRILL = "drill"
    """A kexec into the kernel that runs."""
    BACK = "back"
    """A kexec into the kernel before the last upgrade."""
    KEXEC = "kexec"
    """A `systemctl kexec` that an admin typed."""
    SOFT_REBOOT = "soft-reboot"
    """A `systemctl soft-reboot` that an admin typed: the kernel stays."""
    SAVE_ALL = "save-all"
    """An admin's own save, which no crash takes back."""

    @property
    def loads_kernel(self) -> bool:
        """Whether the upgrade loads the kernel itself, and so unloads it in a rollback."""
        return self in (Kind.UPGRADE, Kind.DRILL, Kind.BACK)


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """One transaction. ``boot`` is the start of userspace in which its phase was entered (``Boot.start_id``); times in
    epoch s."""

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
    kernel_bytes: int = 0
    """Of the kernel and its initrd, which are hashed before the kernel starts; 0 where somebody else has loaded them."""
    stopped_first: tuple[str, ...] = ()
    """Units that were stopped before the first guest was; they are started again if the upgrade is taken back."""
    not_started: tuple[str, ...] = ()
    """Those of them that could not be, each with the reason."""
    shut_down: tuple[str, ...] = ()
    """VMs that were shut down because they could not be saved; they are started again at the end."""
    failures: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    cold_started: tuple[str, ...] = ()
    """VMs whose memory was lost, each with the reason."""
    longest_pause_s: float = 0.0
    reason: str = ""
    interrupted: str = ""
    """Why the boot before ended, if that was no kexec."""

    @property
    def by_hand(self) -> bool:
        """Whether it is an admin's own save that is complete: it waits for the admin, and for no kexec."""
        return self.kind is Kind.SAVE_ALL and self.phase is Phase.SAVED


class Replay(msgspec.Struct, frozen=True):
    """What the journal says of upgrades."""

    current: Upgrade | None = None
    booted: Upgrade | None = None
    """The last that started another kernel; dry runs, and upgrades that were refused, have come since perhaps."""

    def after(self, record: Record) -> Replay:
        """A record of another event says nothing, and neither does one that a newer agent wrote and this one can't read."""
        event = str(record.get("event"))
        if not event.startswith(EVENT):
            return self
        before = self.current if self.current and self.current.id == record.get("upgrade") else None
        facts = {"started_at": record.get("at"), **(asdict(before) if before else {}), **record}
        facts |= {"id": record.get("upgrade"), "phase": event.removeprefix(EVENT), "changed_at": record.get("at")}
        try:
            current = msgspec.convert(facts, Upgrade)
        except msgspec.ValidationError:
            return self
        started_another = current.phase is Phase.BOOTED and record.get("kernel") != current.kernel_from
        return Replay(current, current if started_another else self.booted)


class Ledger:
    """The current upgrade, from the journal and into it; ``listener`` hears of each phase."""

    def __init__(self, journal: Journal, boot: Boot, listener: Listener) -> None:
        self._journal = journal
        self._boot = boot
        self._listener = listener
        self._replay = Replay()
        for record in journal.records():
            self._replay = self._replay.after(record)

    @property
    def current(self) -> Upgrade | None:
        return self._replay.current

    @property
    def booted(self) -> Upgrade | None:
        """See ``Replay``."""
        return self._replay.booted

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
        return self.current is not None and self.current.boot != self._boot.start_id()

    @property
    def free(self) -> bool:
        """Whether a new transaction may begin. Guests that an earlier one left saved are carried along."""
        current = self.current
        return current is None or current.by_hand or current.phase not in {Phase.CHECKING, *TAKEN_BACK}

    def require_current(self) -> Upgrade:
        """Raises RuntimeError if the journal knows of no upgrade."""
        if self.current is None:
            raise RuntimeError("there is no upgrade")
        return self.current

    def begin(self, kind: Kind, **facts: object) -> Upgrade:
        """Open a new transaction in CHECKING. Raises RuntimeError unless ``free``."""
        if not self.free:
            raise RuntimeError(f"an upgrade can't begin while another one is in {self.phase}")
        return self._append(uuid.uuid4().hex, Phase.CHECKING, kind=kind, kernel_from=self._boot.kernel(), **facts)

    def enter(self, phase: Phase, **facts: object) -> Upgrade:
        """Make ``phase`` durable. The table is checked here and nowhere else. Raises RuntimeError if ``phase`` may not
        follow the current one."""
        current = self.require_current()
        allowed = {Phase.BOOTED} if self.rebooted and current.phase in IN_FLIGHT else NEXT[current.phase]
        if phase not in allowed:
            raise RuntimeError(f"phase {phase} can't follow {current.phase}")
        return self._append(current.id, phase, **facts)

    def _append(self, upgrade: str, phase: Phase, **facts: object) -> Upgrade:
        record = self._journal.append(f"{EVENT}{phase}", upgrade=upgrade, **facts)
        self._replay = self._replay.after(record)
        current = self.require_current()
        if (current.id, current.phase) != (upgrade, phase):
            raise TypeError(f"no upgrade can be read from {record}")
        _log_phase(current)
        self._listener.upgrade_changed()
        return current


_EVENTS = {
    Phase.CHECKING: (logging.INFO, Event.UPGRADE_BEGUN),
    Phase.REFUSED: (logging.WARNING, Event.UPGRADE_REFUSED),
    Phase.COMMITTING: (logging.INFO, Event.UPGRADE_COMMITTED),
    Phase.ROLLED_BACK: (logging.WARNING, Event.UPGRADE_ROLLED_BACK),
    Phase.DONE: (logging.INFO, Event.UPGRADE_DONE),
    Phase.HELD: (logging.ERROR, Event.UPGRADE_HELD),
}
"""Phases for which the system's journal has an event of its own."""


def _log_phase(upgrade: Upgrade) -> None:
    level, event = _EVENTS.get(upgrade.phase, (logging.INFO, None))
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
