# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints: ``checkpoints/VM/{vmstate,manifest.json}``. A VM has at most one live checkpoint.

A checkpoint is live as long as it has its manifest, which is written last and moved away first. A manifest that is there
proves that the state is complete and that the guest has not run since.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import msgspec

from cpr_agent.core.model import Difference, Held, Manifest, Vmstate
from cpr_agent.core.paths import AllowedFiles
from cpr_agent.errors import CheckpointUnreadable, InvalidArgument, NotVmstate, ProofFailed
from cpr_agent.files import make_private_directory, open_own, read_own, rename_aside, sync_directory, write_atomically
from cpr_agent.store import vmstate
from cpr_agent.store.schema import read_manifest

_HELD = msgspec.json.Decoder(Held)
"""See store/schema.py, READ."""


_LOADED = "loaded"
"""The suffix of a checkpoint that was consumed."""
_DISCARDED = "discarded"
"""The suffix of a checkpoint that was taken back or given up."""
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class CheckpointStore:
    """``root`` is the checkpoints directory; callers may name state files of their own below ``file_directories``."""

    def __init__(self, root: Path, file_directories: tuple[Path, ...]) -> None:
        self.root = root
        self.files = AllowedFiles("state file", file_directories, "directories")
        self._known: dict[str, tuple[tuple[int, ...], Manifest]] = {}
        """By VM: its live manifest as it was read last, and what stat(2) said of the file before."""

    def live(self, vm: str) -> Manifest | None:
        """Each change of a VM that is told asks several times: a manifest is read once, as it is replaced as a whole or not
        at all."""
        path = self._manifest(vm)
        try:
            info = path.stat()
        except FileNotFoundError:
            self._known.pop(vm, None)
            return None
        except OSError:  # the reader says what is wrong, if anything
            self._known.pop(vm, None)
            return self._read(vm, path)
        version = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        known = self._known.get(vm)
        if known is None or known[0] != version:
            manifest = self._read(vm, path)
            if manifest is None:
                return None
            known = self._known[vm] = version, manifest
        return known[1]

    def _read(self, vm: str, path: Path) -> Manifest | None:
        try:
            raw = read_own(path)
            envelope = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            body = bytes(envelope["manifest"])
            if hashlib.sha256(body).hexdigest() != msgspec.json.decode(envelope["sha256"], type=str):
                raise ValueError("its checksum does not match")
            manifest = read_manifest(body)
            if manifest.vm != vm:
                raise ValueError(f"it belongs to VM {manifest.vm}")
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, ValueError, KeyError) as error:
            raise CheckpointUnreadable(
                f"the checkpoint manifest {path} cannot be read: {error}",
                vm=vm,
                left="it is kept as it is and the VM will not be started",
                remedy=f"restore the file from a copy, or give the checkpoint up with: cprctl discard {vm}",
            ) from error
        return manifest

    def live_all(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob("*/manifest.json"))

    def checkpointed(self, vm: str) -> bool:
        return self._manifest(vm).exists()

    def begin(self, vm: str, filename: str) -> PendingVmstate:
        """Open a fresh state file; ``filename`` "" is the store's own. Raises InvalidArgument, OSError."""
        directory = self.root / vm
        make_private_directory(directory)
        target = self._justified(filename, vm) if filename else directory / "vmstate"
        if filename and os.path.lexists(target):
            raise InvalidArgument(
                f"{target} exists", vm=vm, left="nothing was saved", remedy="name a file that does not exist yet"
            )
        target.unlink(missing_ok=True)  # of a spent checkpoint; an agent after this one could take it for the new state
        return PendingVmstate(vm, target, self._manifest(vm))

    def reopen(self, vm: str, path: str) -> PendingVmstate:
        return PendingVmstate(vm, Path(path), self._manifest(vm), fresh=False)

    def open_vmstate(self, manifest: Manifest, filename: str) -> int:
        path = self._justified(filename, manifest.vm) if filename else Path(manifest.vmstate.path)
        keep = f"the checkpoint of VM {manifest.vm} is kept and can be loaded from the right file"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NotVmstate(
                f"the state file {path} cannot be opened: {error.strerror}", vm=manifest.vm, left=keep
            ) from error
        try:
            found = vmstate.inspect(fd, str(path), manifest.vm)
            if (found.size_bytes, found.sha256) != (manifest.vmstate.size_bytes, manifest.vmstate.sha256):
                owner = self._owner_of(found)
                what = (
                    f"{path} is the state of VM {owner}"
                    if owner
                    else f"{path} is not the state that was saved: {found.size_bytes} bytes with SHA-256 "
                    f"{found.sha256[:16]}…, saved were {manifest.vmstate.size_bytes} with {manifest.vmstate.sha256[:16]}…"
                )
                sizes = Difference("size of the state", str(manifest.vmstate.size_bytes), str(found.size_bytes))
                digests = Difference("SHA-256 of the state", manifest.vmstate.sha256, found.sha256)
                raise ProofFailed(what, vm=manifest.vm, left=keep, evidence=[sizes, digests])
        except BaseException:
            os.close(fd)
            raise
        return fd

    def verify(self, manifest: Manifest) -> None:
        """Read from the disk and not from the page cache, as far as the kernel drops clean pages (posix_fadvise(2))."""
        for path in (self._manifest(manifest.vm), Path(manifest.vmstate.path)):
            with contextlib.suppress(OSError), open_own(path) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if self._read(manifest.vm, self._manifest(manifest.vm)) != manifest:
            raise CheckpointUnreadable(
                f"its manifest {self._manifest(manifest.vm)} is not what was written", vm=manifest.vm
            )
        os.close(self.open_vmstate(manifest, ""))

    def room_bytes(self) -> int:
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        room = os.statvfs(existing)
        return room.f_bavail * room.f_frsize

    def consume(self, manifest: Manifest) -> None:
        self._retire(manifest.vm, _LOADED)

    def restore(self, vm: str, checkpoint: str) -> None:
        """State first and manifest last, as they are written. Where a consumption or a restoration was interrupted the
        state is in its place, and the one aside is an older checkpoint's."""
        path = self._manifest(vm)
        if path.exists():
            return
        manifest, suffix = self._aside(vm, checkpoint)
        state = Path(manifest.vmstate.path)
        if not state.exists():
            with contextlib.suppress(FileNotFoundError):
                state.with_name(f"{state.name}.{suffix}").rename(state)
                sync_directory(state.parent)
        path.with_name(f"{path.name}.{suffix}").rename(path)
        sync_directory(path.parent)

    def _aside(self, vm: str, checkpoint: str) -> tuple[Manifest, str]:
        """The manifest of a checkpoint that was moved aside, and the suffix that it got. Raises CheckpointUnreadable."""
        path = self._manifest(vm)
        for suffix in (_LOADED, _DISCARDED):
            with contextlib.suppress(CheckpointUnreadable):
                manifest = self._read(vm, path.with_name(f"{path.name}.{suffix}"))
                if manifest and manifest.id == checkpoint:
                    return manifest, suffix
        raise CheckpointUnreadable(
            f"its checkpoint {checkpoint} is not beside {path}",
            vm=vm,
            left="its guest stands still in its QEMU",
            remedy="if you know that its memory is right, `cont` on the admin's QMP socket lets the guest go on",
        )

    def discard(self, vm: str, suffix: str = _DISCARDED) -> None:
        self._retire(vm, suffix)

    def hold(self, vm: str, held: Held) -> None:
        make_private_directory(self.root / vm)
        write_atomically(self.root / vm / "held", msgspec.json.encode(held))

    def held(self, vm: str) -> Held | None:
        try:
            return _HELD.decode(read_own(self.root / vm / "held"))
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, ValueError) as error:
            return Held(reason=f"it was held; the record of the reason cannot be read: {error}")

    def release(self, vm: str) -> None:
        (self.root / vm / "held").unlink(missing_ok=True)

    def _manifest(self, vm: str) -> Path:
        return self.root / vm / "manifest.json"

    def _retire(self, vm: str, suffix: str) -> None:
        """Move manifest and state aside, in this order and durably; the last generation stays as evidence. The hold ends
        before them: one that outlived its checkpoint would keep the guest from running."""
        manifest = self._manifest(vm)
        self.release(vm)
        try:
            state = self.live(vm)
        except CheckpointUnreadable:
            state = None
        with contextlib.suppress(FileNotFoundError):
            rename_aside(manifest, suffix)
        sync_directory(manifest.parent)
        path = Path(state.vmstate.path) if state else manifest.parent / "vmstate"
        with contextlib.suppress(FileNotFoundError):
            rename_aside(path, suffix)
            sync_directory(path.parent)

    def _owner_of(self, found: Vmstate) -> str:
        for vm in self.live_all():
            with contextlib.suppress(CheckpointUnreadable):
                other = self.live(vm)
                if other and other.vmstate.sha256 == found.sha256:
                    return vm
        return ""

    def _justified(self, filename: str, vm: str) -> Path:
        """``filename`` as a path below one of the allowed directories, with no symbolic link on the way. Raises
        InvalidArgument."""
        path = Path(filename)
        if not path.is_absolute() or ".." in path.parts:
            what = f"{filename!r} is not an absolute path without `..`"
            raise InvalidArgument(what, vm=vm, left="nothing was read or written", remedy=self.files.remedy)
        self.files.check(path, fixed=path.parent, vm=vm)
        return path


class PendingVmstate:
    """A state file under a temporary name, open write-only for QEMU. Each save has a fresh one."""

    def __init__(self, vm: str, target: Path, manifest: Path, *, fresh: bool = True) -> None:
        self.vm = vm
        self.target = target
        self.manifest = manifest
        self.path = str(target)
        self._temporary = target.with_name(f".{target.name}.saving")
        if fresh:
            self._temporary.unlink(missing_ok=True)
            self.fd = os.open(self._temporary, _WRITE | os.O_CREAT | os.O_EXCL, 0o600)
        else:
            self.fd = self._open(_WRITE)

    def too_large(self) -> bool:
        """By its length, or by the room that it takes (fallocate(2), FALLOC_FL_KEEP_SIZE)."""
        info = os.fstat(self.fd)
        return max(info.st_size, info.st_blocks * 512) > vmstate.MAX_BYTES

    def seal(self) -> Vmstate:
        """Make durable what QEMU has written, which it does not fsync itself, and its name. Without a manifest it is
        nothing yet."""
        os.fsync(self.fd)
        fd = self.reader()
        try:
            found = vmstate.inspect(fd, self.path, self.vm)
        finally:
            os.close(fd)
        with contextlib.suppress(FileNotFoundError):  # an agent before this one did so, and ended
            self._temporary.rename(self.target)
        sync_directory(self.target.parent)
        return found

    def commit(self, manifest: Manifest) -> None:
        body = msgspec.json.encode(manifest)
        digest = hashlib.sha256(body).hexdigest()
        write_atomically(self.manifest, b'{"sha256":"%s","manifest":%s}\n' % (digest.encode(), body))
        self._close()

    def reader(self) -> int:
        """A descriptor to read the state with; it outlives an abort. Raises OSError."""
        return self._open(os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._temporary, flags)
        except FileNotFoundError:  # it has been sealed
            return os.open(self.target, flags)

    def abort(self) -> None:
        """Remove the state durably, also after a commit that failed half way. After an OSError the guest must not run."""
        self._close()
        self.manifest.unlink(missing_ok=True)
        sync_directory(self.manifest.parent)
        self._temporary.unlink(missing_ok=True)
        self.target.unlink(missing_ok=True)

    def _close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
