# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt writes as it saves a domain, made into the image of a checkpoint: with the checkpoint's id in its XML, and
for a guest that goes on as it was before the save."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from cpr_agent.errors import NotVmstate, SaveFailed
from cpr_agent.files import make_private_directory, read_own, write_atomically
from cpr_agent.store.image import header_of, rewritten
from cpr_agent.store.vmstate import MAX_BYTES


class _About(msgspec.Struct, frozen=True):
    checkpoint: str
    running: bool


class Images:
    """``directory`` is the agent's, and gone with the boot. ``with_checkpoint`` puts an id into a domain's XML."""

    def __init__(self, directory: Path, with_checkpoint: Callable[[str, str], str]) -> None:
        self._directory = directory
        self._with_checkpoint = with_checkpoint

    def begin(self, domain: str, checkpoint: str, *, running: bool) -> Path:
        """The file for libvirt to write. Raises OSError."""
        make_private_directory(self._directory)
        image = self._image(domain)
        image.unlink(missing_ok=True)
        write_atomically(self._about(domain), msgspec.json.encode(_About(checkpoint, running)), durable=False)
        return image

    def finish(self, domain: str, fd: int) -> None:
        """Write the image of the checkpoint to ``fd``, once libvirt has written its own, which stays up to the next save:
        an agent that is killed before the checkpoint is durable has the next one do so again. Blocking. Raises NotVmstate,
        SaveFailed, OSError."""
        path = self._image(domain)
        try:
            about = msgspec.json.decode(read_own(self._about(domain)), type=_About)
        except (OSError, msgspec.MsgspecError) as error:
            raise SaveFailed(f"what its save was to be is not known any more: {error}", vm=domain) from error
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise NotVmstate(f"libvirt has written {size} bytes, and no state has more than {MAX_BYTES}", vm=domain)
            image = file.read()
        head = header_of(image, str(path), domain)
        data = memoryview(rewritten(image, head, self._with_checkpoint(head.xml, about.checkpoint), running=about.running))
        while data:
            data = data[os.write(fd, data) :]

    def _image(self, domain: str) -> Path:
        return self._directory / domain

    def _about(self, domain: str) -> Path:
        return self._directory / f"{domain}.about"
