# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in the packages of Cockpit's page."""

from __future__ import annotations

import gzip
import json
import subprocess

from tests.packages.artifacts import built
from tests.packages.test_packages import in_deb, in_rpm

DEB, RPM = "cockpit-cpr-agent_*_all.deb", "cockpit-cpr-agent-*.rpm"
PAGE = "/usr/share/cockpit/cpr-agent"


def test_both_packages_have_the_same_files() -> None:
    deb = {path: one for path, one in in_deb(DEB).items() if path.startswith(PAGE) or "/metainfo/" in path}
    assert deb
    assert {path: one for path, one in deb.items() if not one.mode.startswith("d")} == {
        path: one for path, one in in_rpm(RPM).items() if not one.mode.startswith("d")
    }


def test_the_page_is_whole_and_says_whose_it_is() -> None:
    def read(name: str) -> bytes:
        tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", built(DEB)], check=True, capture_output=True).stdout
        return subprocess.run(["tar", "-xO", f".{PAGE}/{name}"], input=tar, check=True, capture_output=True).stdout

    assert json.loads(read("manifest.json"))["requires"] == {"cockpit": "287"}
    assert b"org.cpragent1" in gzip.decompress(read("index.js.gz"))
    assert b"pf-v6-c-" in gzip.decompress(read("index.css.gz"))
    licences = read("LICENSES.txt").decode()
    for name in ("react", "@patternfly/react-core", "@patternfly/patternfly"):
        assert f"\n{name} " in f"\n{licences}"
    assert "Permission is hereby granted" in licences


def test_lintian_finds_no_error_and_no_warning() -> None:
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", str(built(DEB))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
