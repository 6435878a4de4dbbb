# SPDX-License-Identifier: GPL-2.0-or-later
"""One row for each run state of QEMU: what the agent calls the VM then, what speaks against a save, and what may be done.

The check, the save, the resume and the load look here, so that they say the same. tests/reports/test_run_states.py compares
the table with the schema of each QEMU.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cpr_agent.core.states import RunState, VmState


class Row(msgspec.Struct, frozen=True):
    shown: VmState
    problem: str = ""
    """Why a guest can't be saved then; "" if it can."""
    remedy: str = ""
    """``{vm}`` is its name."""
    resumes: bool = False
    """``resume`` lets a guest go on that was never saved: QEMU has had it all the time."""
    loads: bool = False
    """Its checkpoint may be loaded into a new QEMU, which ends this one."""

    @property
    def saves(self) -> bool:
        return not self.problem


_RESUME = "mend the cause, then `cprctl resume {vm}`"
_WAIT = "wait for its end, and try again"
_ANEW = "`cprctl stop --hard {vm}`, then `cprctl start {vm}`: it boots anew"
_STANDS = "`cprctl resume {vm}` lets it go on if that was a save that failed; else `cont` does, on the admin's QMP socket"
_ADMIN = "see `cprctl status {vm}`; on the admin's QMP socket `cont` lets it go on"

RUN_STATES: Mapping[RunState, Row] = {
    RunState.RUNNING: Row(VmState.RUNNING),
    RunState.PAUSED: Row(VmState.PAUSED, resumes=True),
    RunState.SUSPENDED: Row(VmState.SUSPENDED),
    RunState.IO_ERROR: Row(VmState.PAUSED, "QEMU has stopped its guest because a disk failed", _RESUME, resumes=True),
    RunState.WATCHDOG: Row(
        VmState.PAUSED,
        "QEMU has stopped its guest because its watchdog expired",
        "`cprctl resume {vm}` lets it go on",
        resumes=True,
    ),
    RunState.GUEST_PANICKED: Row(
        VmState.PAUSED,
        "QEMU has stopped its guest because its kernel panicked",
        "`cprctl resume {vm}` lets it go on, to a crash dump or a reboot; `cprctl stop {vm}` ends it",
        resumes=True,
    ),
    RunState.DEBUG: Row(
        VmState.PAUSED,
        "a debugger has stopped its guest",
        "let the debugger go, or `cprctl resume {vm}`",
        resumes=True,
    ),
    RunState.FINISH_MIGRATE: Row(
        VmState.PAUSED,
        "a migration has stopped its guest, and failed or is not done",
        "`cprctl resume {vm}` lets it go on once no migration is under way",
        resumes=True,
    ),
    RunState.POSTMIGRATE: Row(VmState.PAUSED, "its guest stands where a migration has left it", _STANDS, loads=True),
    RunState.INTERNAL_ERROR: Row(
        VmState.PAUSED, "QEMU can't run its guest any further (an internal error; see its log)", _ANEW
    ),
    RunState.SHUTDOWN: Row(VmState.SHUT_DOWN, "its guest has powered off", "`cprctl stop {vm}` ends its QEMU"),
    RunState.PRELAUNCH: Row(
        VmState.STARTING, "its guest has not begun to run", f"wait until it has; if nothing comes of that, {_ANEW}"
    ),
    RunState.PRECONFIG: Row(VmState.STARTING, "QEMU has no machine yet (--preconfig)", _ANEW),
    RunState.INMIGRATE: Row(VmState.LOADING, "QEMU waits for a state to load", _WAIT),
    RunState.RESTORE_VM: Row(VmState.PAUSED, "QEMU is loading a snapshot of its guest", _WAIT),
    RunState.SAVE_VM: Row(VmState.PAUSED, "QEMU is taking a snapshot of its guest", _WAIT),
    RunState.COLO: Row(VmState.PAUSED, "it is one of a COLO pair", "end COLO (x-colo-lost-heartbeat)"),
    RunState.UNKNOWN: Row(VmState.PAUSED, "its QEMU is in a run state that this agent does not know", _ADMIN),
}
"""NONE has no row: there is no QEMU that answers."""

SAVEABLE = tuple(state for state, row in RUN_STATES.items() if row.saves)
"""Run states in which a guest can be saved, and in which it may be after a load."""
