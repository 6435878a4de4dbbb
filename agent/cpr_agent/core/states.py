# SPDX-License-Identifier: GPL-2.0-or-later
"""The words for a VM's state, a guest's run state, and what its memory outlives."""

from __future__ import annotations

import enum


class Policy(enum.StrEnum):
    """What an upgrade does with a guest that cannot be saved."""

    ALL_OR_NOTHING = "all-or-nothing"
    """Refuse the upgrade."""
    SKIP_UNSAVEABLE = "skip-unsaveable"
    """Shut the guest down in order."""
    FORCE = "force"
    """Shut the guest down, and end its QEMU where that does not answer."""


class RunState(enum.StrEnum):
    """QEMU's ``RunState`` (qapi/run-state.json of 11.1), and ``preconfig`` of QEMU before 6.0."""

    NONE = ""
    """There is no QEMU that answers."""
    COLO = "colo"
    DEBUG = "debug"
    FINISH_MIGRATE = "finish-migrate"
    GUEST_PANICKED = "guest-panicked"
    INMIGRATE = "inmigrate"
    INTERNAL_ERROR = "internal-error"
    IO_ERROR = "io-error"
    PAUSED = "paused"
    POSTMIGRATE = "postmigrate"
    PRECONFIG = "preconfig"
    PRELAUNCH = "prelaunch"
    RESTORE_VM = "restore-vm"
    RUNNING = "running"
    SAVE_VM = "save-vm"
    SHUTDOWN = "shutdown"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    UNKNOWN = "unknown"
    """A state that this agent has no word for."""

    @classmethod
    def _missing_(cls, value: object) -> RunState:  # noqa: ARG003 - whatever it is
        return cls.UNKNOWN


class Survives(enum.StrEnum):
    """What a VM's RAM outlives, or has to."""

    QEMU_RESTART = "qemu-restart"
    SOFT_REBOOT = "soft-reboot"
    """It has to: the kernel stays, and no process of the host's does. What is known of RAM is one of the others."""
    KEXEC = "kexec"


class VmState(enum.StrEnum):
    """What the agent says of a VM. Run states of QEMU are another vocabulary: see ``run-state`` in QAPI."""

    RECOVERING = "recovering"
    """The agent has just started, and does not know yet."""
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    SAVING = "saving"
    SAVED = "saved"
    LOADING = "loading"
    HELD = "held"
    SHUT_DOWN = "shut-down"
    UNREACHABLE = "unreachable"
