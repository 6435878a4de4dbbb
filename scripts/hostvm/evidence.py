# SPDX-License-Identifier: GPL-2.0-or-later
"""What a run leaves behind: the journal of every boot and the scenario's artefacts, also of a run that was killed."""

import shutil
import subprocess
from pathlib import Path

from .image import say
from .qemu import loader_command

RECOVERY_TIMEOUT_S = 120


def collect_artefacts(root: Path, archive: Path, out: Path) -> None:
    """Unpacks what host-vm-verdict handed over into OUT/artefacts and writes the journal out as text and export."""
    shutil.rmtree(out / "artefacts", ignore_errors=True)
    # Not tarfile: Debian 12's has no filters yet, and without one it must not unpack what a guest wrote.
    unpack = ["tar", "-x", "--no-same-owner", "--no-same-permissions", "-f", str(archive), "-C", str(out)]
    done = subprocess.run([*unpack, "artefacts", "journal"], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        say(f"the artefacts are incomplete: {done.stderr.strip()}")
    _write_journal(root, out)


def recover_from_disk(root: Path, overlay: Path, scratch: Path, out: Path) -> None:
    """Best effort for a run without a verdict: reads the journal and the artefacts from the guest's disk."""
    say("no verdict: reading the journal from the guest's disk")
    raw = scratch / "recovered.img"
    dump = scratch / "recovered"
    dump.mkdir()
    qemu_img = loader_command(root, "usr/bin/qemu-img")
    steps = [
        [*qemu_img, "convert", "-U", "-O", "raw", str(overlay), str(raw)],
        ["e2fsck", "-fy", str(raw)],
        ["debugfs", "-R", f'rdump /var/log/journal /var/lib/host-vm/artefacts "{dump}"', str(raw)],
    ]
    for step in steps:
        try:
            subprocess.run(step, check=False, capture_output=True, timeout=RECOVERY_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            say(f"could not recover everything: {error}")
    for name in ("artefacts", "journal"):
        if (dump / name).is_dir():
            subprocess.run(["cp", "-r", str(dump / name), str(out)], check=False)
    _write_journal(root, out)


def _write_journal(root: Path, out: Path) -> None:
    """Turns OUT/journal, in systemd's own format, into artefacts/journal.txt and artefacts/journal.export."""
    if not (out / "journal").is_dir():
        say("no journal came back")
        return
    (out / "artefacts").mkdir(exist_ok=True)
    journalctl = [*loader_command(root, "usr/bin/journalctl"), "-q", "--no-pager", "-D", str(out / "journal")]
    for form, name in (("short-precise", "journal.txt"), ("export", "journal.export")):
        with (out / "artefacts" / name).open("wb") as target:
            subprocess.run([*journalctl, "-o", form], check=False, stdout=target, timeout=RECOVERY_TIMEOUT_S)
    shutil.rmtree(out / "journal")
