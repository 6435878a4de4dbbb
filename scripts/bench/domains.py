# SPDX-License-Identifier: GPL-2.0-or-later
"""python -m scripts.bench.domains: domains under the agent, against libvirt alone and against a bare script, with Debian
13's libvirt and QEMU in a bed of the tests, RAM in /dev/shm. Prints a table, writes bench-domains.json. See docs/bench.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.bench.figures import Figure, Runs, table, write
from scripts.bench.goals import DOMAIN_GOALS
from scripts.bench.machine import MIB, Machine, fill
from tests.lab import ROOT
from tests.libvirt.lab import Domain, LibvirtLab, libvirt_lab

WRITTEN = 0.7
ROUNDS = 7
LIBVIRT_ROUNDS = 5
MANY, MANY_MIB = 8, 64
PROGRAM = str(ROOT / "scripts/bench/bare_domains.py")
PLAIN_RAM = "/dev/shm/plain"  # noqa: S108 - of a bed
_FILE_RAM = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"
_BARE = """  <qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
    <qemu:arg value='-object'/>
    <qemu:arg value='memory-backend-file,id=bare-ram,mem-path={ram},share=on,size={size}'/>
    <qemu:arg value='-machine'/><qemu:arg value='memory-backend=bare-ram'/>
    <qemu:arg value='-chardev'/><qemu:arg value='socket,id=bare,path=/run/bare-domains/{name},server=off'/>
    <qemu:arg value='-mon'/><qemu:arg value='chardev=bare,mode=control'/>
  </qemu:commandline>
</domain>"""


class Watched:
    """libvirt's events of one domain's life, as it tells them to a client."""

    def __init__(self, domain: Domain) -> None:
        self._process = domain.bed.popen("python3", PROGRAM, "watch", domain.name, stdout=subprocess.PIPE)
        assert self._process.stdout
        self._lines = self._process.stdout
        self._lines.readline()

    def pause(self) -> float:
        """Seconds from when the guest was stopped to when it ran again, the next time that happens."""
        times: dict[str, float] = {}
        while "resumed" not in times:
            event, at = self._lines.readline().split()
            if event == "resumed" or not times:
                times[event] = float(at)
        return times["resumed"] - times["suspended"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def watched(domain: Domain) -> Iterator[Watched]:
    watch = Watched(domain)
    try:
        yield watch
    finally:
        watch.close()


def figures(lab: LibvirtLab, here: Machine) -> Iterator[Figure]:
    big, small = _adopted(lab, "big", 4096), _adopted(lab, "small", 512)
    with watched(big) as of_big, watched(small) as of_small:
        pauses = [(_ours(here, small, of_small), _ours(here, big, of_big)) for _ in range(ROUNDS)]
    for domain in (big, small):
        domain.assert_unbroken()
        _forget(domain)
    by_size = {"512 MiB": Runs([one for one, _ in pauses]), "4096 MiB": Runs([one for _, one in pauses])}

    guest, plain = _adopted(lab, "ours", 1024), _plain(lab, 1024)
    ours: list[float] = []
    theirs: list[float] = []
    with watched(guest) as of_ours, watched(plain) as of_theirs:
        for _ in range(LIBVIRT_ROUNDS):  # in turn, so that what disturbs the one disturbs the other
            ours.append(_ours(here, guest, of_ours))
            plain.virsh("managedsave")
            plain.virsh("start")
            theirs.append(of_theirs.pause())
    for domain in (guest, plain):
        domain.assert_unbroken()
        _forget(domain)
    against = {"cprctl save and load": Runs(ours), "virsh managedsave and start": Runs(theirs)}
    value = against["virsh managedsave and start"].median / against["cprctl save and load"].median
    yield Figure("domain-virsh", DOMAIN_GOALS["domain-virsh"], value, against, "both in turn, by libvirt's own events")
    value = by_size["4096 MiB"].median / by_size["512 MiB"].median
    yield Figure("domain-ram", DOMAIN_GOALS["domain-ram"], value, by_size, "both in turn, by libvirt's own events")
    yield _many(lab, here)


def _many(lab: LibvirtLab, here: Machine) -> Figure:
    """In turn; who is not at work stands still."""
    agents = [_adopted(lab, f"web{number}", MANY_MIB) for number in range(MANY)]
    bare = [_bare(lab, f"bare{number}", MANY_MIB) for number in range(MANY)]
    names = [domain.name for domain in bare]
    pipe = subprocess.PIPE
    ours: list[float] = []
    theirs: list[float] = []
    with lab.bed.popen("python3", PROGRAM, "save-and-load", *names, stdin=pipe, stdout=pipe) as script:
        assert script.stdin
        assert script.stdout
        script.stdout.readline()
        for _ in range(LIBVIRT_ROUNDS):
            with _paused(agents):
                print("go", file=script.stdin, flush=True)
                theirs.append(float(script.stdout.readline()))
            with _paused(bare):
                wall_s, _ = here.save_and_load_all(MANY)
                ours.append(wall_s)
        script.stdin.close()
    for domain in (*agents, *bare):
        domain.assert_unbroken()
    runs = {"agent": Runs(ours), "bare script": Runs(theirs)}
    value = runs["agent"].median / runs["bare script"].median
    return Figure("domain-many", DOMAIN_GOALS["domain-many"], value, runs, f"{MANY_MIB} MiB each; both in turn")


@contextmanager
def _paused(domains: list[Domain]) -> Iterator[None]:
    """Their QEMUs take no time from what is measured."""
    for domain in domains:
        domain.bed.kill(domain.qemu_pid, 19)
    try:
        yield
    finally:
        for domain in domains:
            domain.bed.kill(domain.qemu_pid, 18)


def _ours(here: Machine, domain: Domain, watch: Watched) -> float:
    here.save_and_load(domain)
    return watch.pause()


def _adopted(lab: LibvirtLab, name: str, size_mib: int) -> Domain:
    domain = lab.running_domain(name, size_mib=size_mib)
    fill(domain.ram, size_mib * MIB, WRITTEN)
    return domain


def _plain(lab: LibvirtLab, size_mib: int) -> Domain:
    """Its RAM is a shared file in /dev/shm, too, that can be written from outside; libvirt saves it all the same."""
    domain = lab.domain("plain", size_mib=size_mib)
    xml = domain.virsh("dumpxml", "--inactive")
    domain.define_xml(xml.replace("<vcpu", f"{_FILE_RAM}<vcpu", 1))
    domain.virsh("start")
    domain.until_counts()
    ram = max(lab.bed.path(PLAIN_RAM).rglob("*"), key=lambda path: path.stat().st_size)
    fill(ram, size_mib * MIB, WRITTEN)
    return domain


def _bare(lab: LibvirtLab, name: str, size_mib: int) -> Domain:
    domain = lab.domain(name, size_mib=size_mib)
    with domain.ram.open("wb") as file:
        file.truncate(size_mib * MIB)
    domain.ram.chmod(0o666)
    more = _BARE.format(ram=domain.ram, size=size_mib * MIB, name=name)
    domain.define_xml(domain.virsh("dumpxml", "--inactive").replace("</domain>", more))
    return domain


def _forget(domain: Domain) -> None:
    domain.virsh("destroy")
    domain.virsh("undefine")
    domain.ram.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        "bench-domains", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--release", default="13", help="whose libvirt and QEMU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build"), help="default: %(default)s")
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cpr-agent-bench-") as scratch:
        directory = Path(scratch)
        subprocess.run([ROOT / "scripts/guest/build-tiny", directory / "tiny.elf"], check=True)
        with libvirt_lab(options.release, directory, directory / "tiny.elf", quiet=True, ram=PLAIN_RAM) as lab:
            lab.start_agent()
            found = list(figures(lab, Machine(directory, lab)))
    print(table(found))
    write(found, options.out / "bench-domains.json")
    print(options.out / "bench-domains.json", f"({time.monotonic() - begun:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
