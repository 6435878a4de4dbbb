"""Time, identity and programs of this boot; implements core.ports.Host."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path


class ThisHost:
    """``userspace_at`` asks systemd when this boot's userspace began (epoch seconds); 0 where nobody knows."""

    def __init__(self, userspace_at: Callable[[], float] = lambda: 0.0) -> None:
        self._userspace_at = userspace_at
        self._digests: dict[tuple[int, int, int], str] = {}

    def now(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        """random(4): new at each boot, also after a kexec."""
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def kernel(self) -> str:
        return os.uname().release

    def program_digest(self, pid: int) -> str:
        program = Path(f"/proc/{pid}/exe")
        info = program.stat()
        key = (info.st_dev, info.st_ino, info.st_mtime_ns)
        if key not in self._digests:
            with program.open("rb") as file:
                self._digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._digests[key]

    def boot_times(self) -> dict[str, float]:
        """``kernel`` is when CLOCK_BOOTTIME was 0.

        After a kexec the wall clock comes from the RTC, in whole seconds, until NTP corrects it.
        """
        return {"kernel": time.time() - time.clock_gettime(time.CLOCK_BOOTTIME), "userspace": self._userspace_at()}
