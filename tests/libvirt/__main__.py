# SPDX-License-Identifier: GPL-2.0-or-later
"""A bed to try things in: ``python -m tests.libvirt 12|13|backports [COMMAND…]`` starts libvirtd and the agent, defines
web1, and runs a shell, or the command, in it. All of it ends with that."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.lab import ROOT
from tests.libvirt.lab import libvirt_lab


def main() -> int:
    release, *command = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="cpr-bed-") as name:
        directory = Path(name)
        subprocess.run([ROOT / "scripts/guest/build-tiny", directory / "tiny.elf"], check=True)
        with libvirt_lab(release, directory, directory / "tiny.elf") as lab:
            lab.start_agent()
            guest = lab.domain()
            print(f"bed {lab.bed.pid}, agent's log {lab.log}, console {guest.console}", file=sys.stderr)
            return lab.bed.popen(*(command or ["bash"]), env=lab.environment()).wait()


if __name__ == "__main__":
    sys.exit(main())
