# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the built packages: clean, complete, and the same in both."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from cpr_agent import __version__
from tests.packages.artifacts import ROOT, built

ONLY_DEB = {
    "/usr/share/doc/cpr-agent/changelog.Debian.gz": "an RPM has its changelog in its header",
    "/usr/share/doc/cpr-agent/changelog.gz": "Debian's name for NEWS.md",
    "/usr/share/doc/cpr-agent/copyright": "Debian's place for it",
    "/usr/share/python3/runtime.d/cpr-agent.rtupdate": "compiles again for another python3 of Debian",
}
ONLY_RPM = {
    "/usr/share/doc/cpr-agent/NEWS.md": "changelog.gz of the .deb",
    "/usr/share/licenses/cpr-agent": "where RPMs have it",
    "/usr/share/licenses/cpr-agent/COPYING": "/usr/share/common-licenses/GPL-2 of Debian",
    "/usr/share/licenses/cpr-agent/copyright": "copyright of the .deb",
}


@dataclass(frozen=True)
class Packed:
    mode: str
    kept: bool
    """A configuration file that an admin's changes are kept in."""


def _said(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def in_deb(name: str = "cpr-agent_*_all.deb") -> dict[str, Packed]:
    deb = built(name)
    listed = subprocess.run(["dpkg-deb", "--info", deb, "conffiles"], check=False, capture_output=True, text=True)
    kept = listed.stdout.split()  # of a package without any dpkg-deb says that there is no such list
    rows = (line.split(maxsplit=5) for line in _said("dpkg-deb", "--contents", deb).splitlines())
    entries = {row[5].removeprefix(".").rstrip("/"): (row[0], row[1]) for row in rows}
    assert {owner for _, owner in entries.values()} == {"root/root"}
    return {path: Packed(mode, path in kept) for path, (mode, _) in entries.items()}


def in_rpm(name: str = "cpr-agent-*.rpm") -> dict[str, Packed]:
    query = "[%{FILEMODES:perms} %{FILEUSERNAME}/%{FILEGROUPNAME} %{FILENAMES} |%{FILEFLAGS:fflags}\\n]"
    rows = [line.split() for line in _said("rpm", "-qp", "--queryformat", query, built(name)).splitlines()]
    assert {owner for _, owner, *_ in rows} == {"root/root"}
    return {path: Packed(mode, flags == "|cn") for mode, _, path, flags in rows}


def test_both_packages_have_the_same_files() -> None:
    def plain(path: str) -> str:
        return path.removesuffix(".gz") if path.startswith("/usr/share/man/") else path

    deb = {plain(path): packed for path, packed in in_deb().items() if path not in ONLY_DEB}
    rpm = {plain(path): packed for path, packed in in_rpm().items() if path not in ONLY_RPM}
    assert set(ONLY_DEB) <= set(in_deb())
    assert set(ONLY_RPM) <= set(in_rpm())
    ours = {path: packed for path, packed in deb.items() if not packed.mode.startswith("d") or "/cpr-agent" in path}
    assert ours == rpm


def test_what_an_admin_changes_is_kept() -> None:
    """The same in the RPM: see test_both_packages_have_the_same_files."""
    packed = in_deb()
    files = {path for path, one in packed.items() if path.startswith("/etc/") and one.mode.startswith("-")}
    assert "/etc/cpr-agent/agent.toml" in files
    assert {path for path, one in packed.items() if one.kept} == files


def test_lintian_finds_no_error_and_no_warning() -> None:
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", str(built("cpr-agent_*_all.deb"))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_versions_agree() -> None:
    changelog = (ROOT / "packaging/debian/changelog").read_text()
    spec = (ROOT / "packaging/rpm/cpr-agent.spec").read_text()
    assert changelog.startswith(f"cpr-agent ({__version__}) ")
    assert f"\nVersion: {__version__}\n" in spec
    assert f" - {__version__}-1\n" in spec.partition("%changelog\n* ")[2]
    assert built("cpr-agent_*_all.deb").name == f"cpr-agent_{__version__}_all.deb"


def test_scripts_of_the_packages_are_clean() -> None:
    """shellcheck; those of the .deb with what debhelper put in, and those of the RPM as rpm runs them."""
    rpm = built("cpr-agent-*.rpm")
    for name in ("POSTIN", "PREUN", "POSTUN"):
        script = _said("rpm", "-qp", "--queryformat", f"%{{{name}}}", rpm)
        assert script.strip() not in ("", "(none)"), name
        done = subprocess.run(["shellcheck", "--shell=sh", "-"], input=script, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}"
