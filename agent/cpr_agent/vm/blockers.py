# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a guest can't be saved now, as QMP tells it. Every question here leaves QEMU as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tenacity  # noqa: F401 - a save waits by it (vm/retry.py), and imports nothing while its guest stands still

from cpr_agent.core.model import Launch
from cpr_agent.errors import QemuFailed
from cpr_agent.vm.cmdline import replaced_backends
from cpr_agent.vm.companions import emulated_tpms, unsaveable
from cpr_agent.vm.dialects import CONFLICTING
from cpr_agent.vm.inventory import Question
from cpr_agent.vm.qmp import Qmp
from cpr_agent.vm.replies import (
    CAPABILITIES,
    CHARDEVS,
    COLO,
    JOBS,
    MEMORY_BACKENDS,
    MIGRATION,
    PARAMETERS,
    QOM_FLAG,
    QOM_TEXT,
    REPLAY,
    STATUS,
    BlockJob,
    MemoryBackend,
    Migration,
    Mode,
    Query,
)

UNDER_WAY = ("setup", "active", "device", "pre-switchover", "wait-unplug", "cancelling")
_GONE = "disconnected:"
"""Before the address of a socket whose other end was closed (chardev/char-socket.c)."""
_NO_MODE = Mode(mode="none")
_JOBS = {"ready": "job-complete or job-cancel", "pending": "job-finalize or job-cancel", "concluded": "job-dismiss"}
"""What ends a job that waits for a command (JobStatus in qapi/job.json)."""
_ASKED: list[Question] = [
    (COLO, {}),
    (MEMORY_BACKENDS, {}),
    (CAPABILITIES, {}),
    (PARAMETERS, {}),
    (REPLAY, {}),
    (JOBS, {}),
    (MIGRATION, {}),
    (STATUS, {}),
]


async def save_blockers(qmp: Qmp, launch: Launch) -> tuple[str, list[str]]:
    """The run state as QEMU has it, and the reasons. Raises QemuFailed."""
    colo, *known = await qmp.ask_all(_ASKED)
    if None in known:
        raise QemuFailed("QEMU does not say all that a save depends on", vm=qmp.vm)
    backends, capabilities, parameters, replay, jobs, migration, status = known
    reasons = await memory_blockers(qmp, launch, backends)
    on = {one.capability for one in capabilities if one.state}
    reasons += [
        f"the migration capability {name} is on: turn it off (migrate-set-capabilities)"
        for name in CONFLICTING
        if name in on
    ]
    if parameters.tls_creds:
        reasons.append('the migration parameter tls-creds is set: set it to "" (migrate-set-parameters)')
    if replay.mode != "none":
        reasons.append("QEMU records or replays the guest (-icount rr=), which a save would break")
    if (colo or _NO_MODE).mode != "none":
        reasons.append("the VM is part of a COLO pair")
    reasons += [_about_job(job) for job in jobs]
    reasons += await tpm_blockers(qmp, launch)
    return status.status, reasons + unsaveable(launch.base_argv) + migration_blockers(migration)


def _about_job(job: BlockJob) -> str:
    remedy = _JOBS.get(job.status, "wait for its end, or job-cancel")
    return f"block or snapshot job {job.id} is {job.status or 'running'}: {remedy}"


async def tpm_blockers(qmp: Qmp, launch: Launch) -> list[str]:
    """QEMU asks swtpm for the TPM's state as it saves, and can't connect to another one while its guest runs."""
    tpms = emulated_tpms(launch.base_argv)
    chardevs = await qmp.ask(CHARDEVS) if tpms else []
    return [
        f"swtpm{f' at {where}' if where else ''} has ended, and its guest's TPM with it: shut the guest down, "
        "start swtpm, and start the guest afresh"
        for where in (tpms[one.label] for one in chardevs if one.label in tpms and one.filename.startswith(_GONE))
    ]


def migration_blockers(migration: Migration) -> list[str]:
    """QEMU's own, which are those of the migration mode that is set."""
    return ["a migration is already under way"] if migration.status in UNDER_WAY else list(migration.blocked_reasons)


async def memory_blockers(qmp: Qmp, launch: Launch, backends: list[MemoryBackend]) -> list[str]:
    """RAM that a save would lose or copy: private, unnamed, or freed by a clean exit."""
    sizes = {one.object_id: one.size_bytes for one in launch.memory}
    there = {backend.id for backend in backends}
    reasons = [f"its RAM is not in the memory backend {name}" for name in sizes if name not in there]
    unused = replaced_backends(launch.argv)
    used = [backend for backend in backends if backend.id not in unused]
    kinds = [_property(QOM_TEXT, backend, "type") for backend in used]
    discards = [_property(QOM_FLAG, backend, "discard-data") for backend in used]
    answers = await qmp.ask_all([*kinds, *discards])
    found = zip(used, zip(answers[: len(used)], answers[len(used) :], strict=True), strict=True)
    return reasons + [reason for backend, said in found if (reason := _backend_blocker(backend, said, sizes))]


def _property(query: Query[Any], backend: MemoryBackend, name: str) -> Question:
    return query, {"path": f"/objects/{backend.id}", "property": name}


def _backend_blocker(backend: MemoryBackend, said: tuple[str | None, bool | None], sizes: Mapping[str, int]) -> str:
    """``said``: its type, and whether it has discard-data."""
    kind, discards = said
    name = f"memory backend {backend.id or '?'}"
    if not backend.share:
        return f"{name} is private (share=off): all of it would go to the state file"
    if kind != "memory-backend-file":
        return f"{name} has no name outside QEMU ({kind or ''}): it would die with QEMU"
    if backend.id not in sizes:
        return f"{name} is not one that the agent put there and can prove"
    if discards:
        return f"{name} has discard-data=on: QEMU would free the RAM when it exits"
    if backend.size != sizes[backend.id]:
        return f"{name} has {backend.size} bytes, not {sizes[backend.id]}"
    return ""
