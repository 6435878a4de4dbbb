# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints of domains: as long as one is live, libvirt has its image where ``virsh start`` looks for one.

The copy in the store is the one that counts: libvirt deletes its image on a start, drops a damaged one without a word, and
lets anybody change it. implements core.ports.Store over another one.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable

from cpr_agent.core.model import Held, Manifest, Vmstate
from cpr_agent.core.ports import PendingState, Store
from cpr_agent.domains.host import LibvirtPaths
from cpr_agent.domains.reads import Reads
from cpr_agent.errors import CprError, ProofFailed
from cpr_agent.files import write_atomically
from cpr_agent.store.image import MAX_HEAD_BYTES, header_of

log = logging.getLogger(__name__)


class DomainCheckpoints:
    """``finish`` writes the image of an interrupted save anew to a descriptor."""

    def __init__(
        self,
        store: Store,
        host: LibvirtPaths,
        reads: Reads,
        checkpoint_of: Callable[[str], str],
        finish: Callable[[str, int], None],
    ) -> None:
        self._store = store
        self._host = host
        self._reads = reads
        self._checkpoint_of = checkpoint_of
        self._finish = finish

    def live(self, vm: str) -> Manifest | None:
        return self._store.live(vm)

    def verify(self, manifest: Manifest) -> None:
        self._store.verify(manifest)

    def room_bytes(self) -> int:
        return self._store.room_bytes()

    def live_all(self) -> list[str]:
        return self._store.live_all()

    def checkpointed(self, vm: str) -> bool:
        return self._store.checkpointed(vm)

    def begin(self, vm: str, filename: str) -> PendingState:
        return _Pending(self._store.begin(vm, filename), self)

    def reopen(self, vm: str, path: str) -> PendingState:
        """libvirt has written the state aside; whether it was copied as a whole is not known."""
        pending = self._store.reopen(vm, path)
        os.ftruncate(pending.fd, 0)
        self._finish(vm, pending.fd)
        return _Pending(pending, self)

    def open_vmstate(self, manifest: Manifest, filename: str) -> int:
        fd = self._store.open_vmstate(manifest, filename)
        try:
            self._offer(manifest.vm, fd)
        except OSError as error:
            os.close(fd)
            what = f"its image can't be put where libvirt looks for it: {error}"
            raise ProofFailed(what, vm=manifest.vm, left="the checkpoint is kept") from error
        except BaseException:
            os.close(fd)
            raise
        return fd

    def consume(self, manifest: Manifest) -> None:
        """libvirt has the image open, and deletes it itself once the guest is to run."""
        self._store.consume(manifest)

    def restore(self, vm: str, checkpoint: str) -> None:
        self._store.restore(vm, checkpoint)
        self.offer(vm)

    def discard(self, vm: str, suffix: str = "discarded") -> None:
        self._store.discard(vm, suffix)
        self.withdraw(vm)

    def hold(self, vm: str, held: Held) -> None:
        self._store.hold(vm, held)

    def held(self, vm: str) -> Held | None:
        return self._store.held(vm)

    # -- the image ----------------------------------------------------------------------------------------------------

    def settle(self, vm: str) -> None:
        """An agent before this one may have ended in between."""
        if self._store.checkpointed(vm):
            self.offer(vm)
        else:
            self.withdraw(vm)

    def offer(self, vm: str) -> None:
        """Let libvirt have the image of the live checkpoint, unless it has just that. A load by hand needs it, and the
        agent's own puts it there before."""
        try:
            manifest = self._store.live(vm)
            if manifest:
                os.close(self.open_vmstate(manifest, ""))
        except Exception as error:
            log.warning("VM %s: libvirt has no image of its checkpoint: %s", vm, error)

    def _offer(self, vm: str, fd: int) -> None:
        """Raises OSError."""
        path = self._host.image(vm)
        with open(os.dup(fd), "rb") as state:  # noqa: PTH123 - a descriptor
            wanted = state.read()
        os.lseek(fd, 0, os.SEEK_SET)
        with contextlib.suppress(OSError):
            if self._reads.content(path) == wanted:
                return
        write_atomically(path, wanted, durable=False)  # the store's is, and a guest waits
        self._reads.mark_unread(path)

    def withdraw(self, vm: str) -> None:
        """No image of a checkpoint is left to libvirt. One that somebody has had libvirt save has the guest's RAM in it,
        and stays."""
        path = self._host.image(vm)
        with contextlib.suppress(OSError, CprError):
            with path.open("rb") as image:
                head = header_of(image.read(MAX_HEAD_BYTES), str(path), vm)
            if self._checkpoint_of(head.xml):
                path.unlink()


class _Pending:
    """Implements core.ports.PendingState."""

    def __init__(self, pending: PendingState, checkpoints: DomainCheckpoints) -> None:
        self._pending = pending
        self._checkpoints = checkpoints
        self.vm, self.fd, self.path = pending.vm, pending.fd, pending.path

    def too_large(self) -> bool:
        return self._pending.too_large()

    def seal(self) -> Vmstate:
        return self._pending.seal()

    def commit(self, manifest: Manifest) -> None:
        self._pending.commit(manifest)
        self._checkpoints.offer(self.vm)

    def reader(self) -> int:
        return self._pending.reader()

    def abort(self) -> None:
        self._pending.abort()
        self._checkpoints.withdraw(self.vm)
