# SPDX-License-Identifier: GPL-2.0-or-later
"""Every error that a caller can see, one class per D-Bus error name.

    CprError                  org.cpragent1.Error.Failed
    ├── InvalidArgument       a request that makes no sense
    │   └── InvalidDefinition a VM definition or agent.toml that can't be used
    ├── NoSuchVM              a name without a definition
    ├── NoSuchReport          an id without a history record
    ├── AccessDenied          polkit refused, or did not answer
    ├── LimitsExceeded        too many calls
    ├── Busy                  the VM or the host is in the middle of something
    ├── WrongState            the VM's state does not allow the request
    │   ├── AlreadyRunning
    │   ├── AlreadySaved      a live checkpoint stands in the way
    │   ├── NoCheckpoint
    │   └── NothingToDo       the request applies to no VM; no error
    ├── NotAdoptable          this domain of libvirt can't be a VM now; carries every reason
    ├── Blocked               this VM can't be saved now; carries every reason
    ├── MemoryUnusable        the definition's memory can't be used
    │   ├── DeviceMissing
    │   ├── MemoryInUse       another process has it open or mapped
    │   └── MemoryOverlap
    ├── ProofFailed           a load found something other than the save left
    │   ├── NotVmstate
    │   ├── MemoryChanged
    │   ├── DiskChanged
    │   ├── MachineChanged    an older QEMU, fewer CPU features, other firmware
    │   └── CheckpointUnreadable
    ├── QemuFailed            QEMU could not be started, or makes no sense
    │   ├── QemuRefused       it lives, and said no: its guest is in it
    │   ├── QemuUnreachable   it does not answer, or the connection to it is lost
    │   └── QemuEnded         its process has ended
    ├── StorageSilent         the storage of a VM's disks or firmware does not answer
    ├── HostFailed            the host's kernel refused what the agent needs: a full disk, an I/O error
    ├── GuestAgentFailed      the QEMU guest agent hung, refused, or made no sense
    ├── SaveFailed
    │   └── SaveRefused       no guest was saved, because one of them can't be
    ├── LoadFailed
    ├── KernelRefused         the kernel can't be started, or would lose the guests
    └── UpgradeRefused        the host must not be upgraded now; carries the findings

A message names the VM, the failure, the state that it left, and the remedy. The attributes carry each of these.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar, NamedTuple


class Difference(NamedTuple):
    """A value that a proof compared, and found changed."""

    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.what} was {self.expected}, is {self.found}"


class CprError(Exception):
    """The root. ``what`` is the failure, ``left`` the state after it, and ``remedy`` the admin's next step."""

    kind: ClassVar[str] = "Failed"

    def __init__(self, what: str, *, vm: str = "", left: str = "", remedy: str = "") -> None:
        self.what = what
        self.vm = vm
        self.left = left
        self.remedy = remedy
        super().__init__(self.text)

    @property
    def text(self) -> str:
        """The whole message, fit for an admin's screen."""
        subject = f"VM {self.vm}: " if self.vm else ""
        after = (part[0].upper() + part[1:] for part in (self.left, self.remedy) if part)
        parts = (subject + self.what, *after)
        return " ".join(part if part.endswith(("?", "!")) else f"{part.rstrip('.')}." for part in parts)

    @property
    def dbus_name(self) -> str:
        return f"org.cpragent1.Error.{self.kind}"

    def __str__(self) -> str:
        return self.text


_ROOM = "Make room on that file system, and try again"
_SEE_LOG = "See what was done: journalctl -u cpr-agent.service"
_HOST_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EIO: "See the kernel's log (dmesg) for the device, and try again",
    errno.EROFS: "See the kernel's log (dmesg) for why that file system can only be read, and try again",
}


class InvalidArgument(CprError):
    kind = "InvalidArgument"


class InvalidDefinition(InvalidArgument):
    kind = "InvalidDefinition"


class NoSuchVM(CprError):
    kind = "NoSuchVM"


class NoSuchReport(CprError):
    kind = "NoSuchReport"


class AccessDenied(CprError):
    kind = "AccessDenied"


class LimitsExceeded(CprError):
    kind = "LimitsExceeded"


class Busy(CprError):
    kind = "Busy"


class WrongState(CprError):
    kind = "WrongState"


class AlreadyRunning(WrongState):
    kind = "AlreadyRunning"


class AlreadySaved(WrongState):
    kind = "AlreadySaved"


class NoCheckpoint(WrongState):
    kind = "NoCheckpoint"


class NothingToDo(WrongState):
    """A job that ends with it has not failed: there was no VM for it."""

    kind = "NothingToDo"


class Blocked(CprError):
    """``reasons`` has every obstacle, and not only the first."""

    kind = "Blocked"

    def __init__(self, reasons: list[str], *, vm: str, remedy: str = "") -> None:
        self.reasons = reasons
        super().__init__(
            "cannot be saved: " + "; ".join(reason.rstrip(".") for reason in reasons),
            vm=vm,
            left="the guest was not touched",
            remedy=remedy,
        )


class NotAdoptable(CprError):
    """``causes`` has every reason, and not only the first."""

    kind = "NotAdoptable"

    def __init__(self, causes: Sequence[str], *, vm: str, remedy: str = "") -> None:
        self.causes = tuple(causes)
        super().__init__(f"can't be adopted: it {'; it '.join(causes)}", vm=vm, left="nothing was changed", remedy=remedy)


class MemoryUnusable(CprError):
    kind = "MemoryUnusable"


class DeviceMissing(MemoryUnusable):
    kind = "DeviceMissing"


class MemoryInUse(MemoryUnusable):
    kind = "MemoryInUse"


class MemoryOverlap(MemoryUnusable):
    kind = "MemoryOverlap"


class ProofFailed(CprError):
    """``evidence`` has the values that were compared and found changed."""

    kind = "ProofFailed"

    def __init__(
        self, what: str, *, vm: str = "", left: str = "", remedy: str = "", evidence: Sequence[Difference] = ()
    ) -> None:
        super().__init__(what, vm=vm, left=left, remedy=remedy)
        self.evidence = tuple(evidence)


class NotVmstate(ProofFailed):
    kind = "NotVmstate"


class MemoryChanged(ProofFailed):
    kind = "MemoryChanged"


class DiskChanged(ProofFailed):
    kind = "DiskChanged"


class MachineChanged(ProofFailed):
    kind = "MachineChanged"


class CheckpointUnreadable(ProofFailed):
    kind = "CheckpointUnreadable"


class QemuFailed(CprError):
    kind = "QemuFailed"


class QemuRefused(QemuFailed):
    """QEMU understood the command and said no."""

    kind = "QemuRefused"


class QemuUnreachable(QemuFailed):
    """Whether its process lives is not said by that."""

    kind = "QemuUnreachable"


class QemuEnded(QemuFailed):
    kind = "QemuEnded"


class StorageSilent(CprError):
    kind = "StorageSilent"


class HostFailed(CprError):
    kind = "HostFailed"

    @classmethod
    def of(cls, error: OSError, vm: str = "") -> HostFailed:
        """What nobody nearer to it has given a meaning."""
        where = f" ({error.filename})" if error.filename else ""
        return cls(f"{error.strerror or error}{where}", vm=vm, remedy=_HOST_REMEDIES.get(error.errno or 0, _SEE_LOG))


class GuestAgentFailed(CprError):
    kind = "GuestAgentFailed"


class SaveFailed(CprError):
    kind = "SaveFailed"


class SaveRefused(SaveFailed):
    kind = "SaveRefused"


class LoadFailed(CprError):
    kind = "LoadFailed"


class KernelRefused(CprError):
    kind = "KernelRefused"


class UpgradeRefused(CprError):
    kind = "UpgradeRefused"
