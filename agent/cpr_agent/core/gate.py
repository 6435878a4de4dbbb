# SPDX-License-Identifier: GPL-2.0-or-later
"""The gate that every guest passes before it runs: with the proof in hand (invariant 9). The only caller of ``Qemu.cont``,
of ``Qemu.wake``, and of a ``Qemu.load`` that lets the guest go on.

A guest that was saved passes with ``Proven``, which only a comparison with its checkpoint makes (core/proof.py). A guest
that was never saved, or whose save came to no end, has no checkpoint to be compared with: then ``Unbroken`` says why its
memory is still its own. tests/unit/test_core_gate.py lists every caller with its proof; a new one fails there until it is
decided.
"""

from __future__ import annotations

import enum

from cpr_agent.core.machine import Machine
from cpr_agent.core.past import VmEvent
from cpr_agent.core.ports import Qemu
from cpr_agent.core.proof import Proven
from cpr_agent.errors import ProofFailed, QemuFailed


class Unbroken(enum.StrEnum):
    """Why no comparison is needed: the guest has been this QEMU's all the time, and no other could have been given it."""

    PAUSED = "paused in the QEMU that it runs in, and never saved"
    ASLEEP = "asleep in the QEMU that it runs in, and never saved"
    SAVE_UNDONE = "stopped by a save that failed in the same act; no checkpoint was left that a load could use"
    SAVE_INTERRUPTED = "stopped by a save that came to no end; no checkpoint was live, and no other process has its memory"
    RESUME_ANNOUNCED = "proved by the load that announced its resume; no other process has its memory"
    HANDED_OVER = "handed from one QEMU to the other by cpr-transfer; one of them had its memory all the time (ADR 9)"
    TRANSFER_UNDONE = "stopped by a transfer that failed; the QEMU that was to take it over has ended, and never ran it"


Proof = Proven | Unbroken


async def let_run(machine: Machine, qemu: Qemu, proof: Proof) -> float:
    """Returns when the guest ran (epoch s). Raises ProofFailed for a held VM; QemuFailed, which says where the guest is;
    LoadFailed if it was just loaded, and has certainly not run."""
    _refuse(machine, proof)
    try:
        return await qemu.cont()
    except QemuFailed as error:
        raise await machine.locating_guest(error) from error


async def let_run_by_load(machine: Machine, qemu: Qemu, proof: Proof, vmstate_fd: int) -> float:
    """For a QEMU whose load itself lets the guest go on (``Qemu.load_runs_guest``). Returns when the guest ran (epoch s), 0
    if it sleeps. Raises ProofFailed for a held VM; LoadFailed if the guest has certainly not run, QemuFailed."""
    _refuse(machine, proof)
    return await qemu.load(vmstate_fd, machine.settings.agent.load_timeout)


async def wake(machine: Machine, proof: Proof) -> float:
    """Wake a guest that the agent has put to sleep. Returns when it woke (epoch s), 0 if it was awake or is gone. Raises
    ProofFailed for a held VM, QemuFailed."""
    if machine.qemu is None:
        return 0.0
    _refuse(machine, proof)
    woken_at = await machine.qemu.wake()
    machine.record(VmEvent.WOKEN)
    return woken_at


def _refuse(machine: Machine, proof: Proof) -> None:
    """No guest runs while it is held, or while a checkpoint stands that a load could use: both are gone before a proof lets
    it run (invariant 2)."""
    held = machine.held()
    if held:
        raise ProofFailed(
            f"is held: {held.reason}",
            vm=machine.name,
            left="the guest does not run; memory and checkpoint are kept as they are",
            remedy=f"see `cprctl status {machine.name}`",
            evidence=held.evidence,
        )
    if machine.checkpointed:
        why = f"its checkpoint could still be loaded ({proof})"
        raise ProofFailed(why, vm=machine.name, left="the guest does not run", remedy=f"cprctl resume {machine.name}")
