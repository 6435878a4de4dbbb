# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl edit and import, with a real agent, sed as the editor, and a QEMU that somebody else has started."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpr_agent.bus.client import CallError
from tests.bus.test_cprctl import document, on_terminal
from tests.lab import PATIENCE_S, Guest, Lab, script, until


def edit(lab: Lab, editor: str, *arguments: str) -> tuple[int, str, str]:
    """Run `cprctl edit` with an editor that is a line of shell; its file is "$1"."""
    program = script(lab.root / "editor", f"#!/bin/sh\n{editor}\n")
    with lab.cprctl_started("edit", *arguments, VISUAL=program) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    return process.returncode, stdout, stderr


def test_what_was_edited_is_in_place_and_read(lab: Lab) -> None:
    guest = lab.guest()
    path = lab.definitions / "web1.toml"
    path.chmod(0o640)
    os.chown(path, 0, 4)
    code, stdout, _ = edit(lab, """sed -i 's/^.vm.$/[vm]\\ndescription = "edited"/' "$1" """, "web1")
    assert (code, stdout.splitlines()[0]) == (0, f"{path} was written")
    assert guest.properties["Description"] == "edited"
    status = path.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 0, 4)
    assert sorted(p.name for p in lab.definitions.iterdir()) == ["web1.toml"]


def test_a_running_guest_takes_it_later(lab: Lab) -> None:
    lab.running()
    code, stdout, _ = edit(lab, """sed -i 's/^.vm.$/[vm]\\ndescription = "edited"/' "$1" """, "web1")
    assert code == 0
    assert "VM web1 is running, and takes it from its next start on" in stdout


@pytest.mark.parametrize(
    ("editor", "code", "said"),
    [
        ("true", 2, "nothing to do"),
        ("""sed -i 's/size/sise/' "$1" """, 1, 'Did you mean "size"?'),
        ("""echo '[' >>"$1" """, 1, "is not TOML"),
        ("""printf '\\377' >>"$1" """, 1, "can't decode"),
        ("""sed -i 's/"-nodefaults"/"-S"/' "$1" """, 1, "what the agent adds itself"),
        ("exit 3", 1, "ended with status 3"),
        ("""sed -i 's/^.vm.$/[vm]\\ndescription = "x"/' "$1"; echo '# me too' >>{path}""", 1, "somebody else has changed"),
    ],
)
def test_what_can_not_be_used_changes_nothing_and_is_kept(lab: Lab, editor: str, code: int, said: str) -> None:
    lab.guest()
    path = lab.definitions / "web1.toml"
    before = path.read_text()
    found, _, stderr = edit(lab, editor.replace("{path}", str(path)), "web1")
    assert found == code, stderr
    assert said in stderr
    assert path.read_text().replace("# me too\n", "") == before
    if "your text is in" in stderr:
        kept = Path(stderr.strip().rpartition(" ")[2])
        assert kept.read_bytes()
        kept.unlink()
    assert (code == 1) == ("your text is in" in stderr)


def test_a_new_vm_begins_as_an_example(lab: Lab) -> None:
    code, _, stderr = edit(lab, f"""cp "$1" {lab.root}/template; sed -i 's/21dfda89/31dfda89/' "$1" """, "web9")
    assert code == 0, stderr
    assert "# A VM:" in (lab.root / "template").read_text()
    assert "31dfda89" in (lab.definitions / "web9.toml").read_text()
    assert (lab.definitions / "web9.toml").stat().st_mode & 0o777 == 0o644
    assert "web9" in lab.cprctl("list").stdout
    assert edit(lab, "true", "web10")[0] == 2
    assert not (lab.definitions / "web10.toml").exists()


def test_there_is_no_editor(lab: Lab) -> None:
    lab.guest()
    with lab.cprctl_started("edit", "web1", VISUAL="/nonexistent/editor") as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "cannot run the editor '/nonexistent/editor'" in stderr


def test_names_and_hosts_that_can_not_be_edited(lab: Lab) -> None:
    assert edit(lab, "true", "../web1")[0] == 1
    code, _, stderr = edit(lab, """echo "# more" >>"$1" """, "-x")
    assert code == 64, stderr
    ended = lab.cprctl("-H", "root@host2", "edit", "web1")
    assert (ended.returncode, "on this host only" in ended.stderr) == (64, True)


def test_at_a_terminal_the_editor_comes_again(lab: Lab, tmp_path: Path) -> None:
    """The first time it writes nonsense, the second time it mends that."""
    lab.guest()
    editor = script(
        tmp_path / "editor",
        """#!/bin/sh
        if grep -q nonsense "$1"; then sed -i 's/nonsense/description/' "$1"
        else sed -i 's/^.vm.$/[vm]\\nnonsense = "second thoughts"/' "$1"; fi
        """,
    )
    terminal = on_terminal(lab, tmp_path, "edit web1", VISUAL=editor)
    terminal.until_shows('unknown key "vm.nonsense"')
    terminal.until_shows("Edit it again")
    terminal.type("\n")
    assert terminal.ended() == 0
    assert "second thoughts" in (lab.definitions / "web1.toml").read_text()


def test_the_agent_itself_says_what_is_valid(lab: Lab) -> None:
    text = (Path(__file__).parents[2] / "agent/cpr_agent/cli/example-vm.toml").read_text()

    def validate(name: str, definition: str) -> None:
        lab.client(lambda client: client.manager("Validate", "ss", name, definition))

    validate("web1", text)
    for name, definition, said in (
        ("a/b", text, "is not a VM name"),
        ("", text, "is not a VM name"),
        ("web1", text.replace("4G", "4.5G"), "is not a size"),
        ("web1", "#" * (1 << 17), "64 KiB"),
    ):
        with pytest.raises(CallError) as caught:
            validate(name, definition)
        assert said in str(caught.value)


@pytest.fixture
def foreign(lab: Lab) -> Iterator[tuple[Guest, int]]:
    """A guest as its admin would have started it by hand: in RAM of QEMU's own, with monitors; and QEMU's PID."""
    guest = lab.guest("hand")
    (lab.definitions / "hand.toml").unlink()
    lab.client(lambda client: client.manager("Reload"))
    command = [
        *(guest.definition["vm"]["qemu"], "-name", "guest=hand,debug-threads=on", "-m", "16"),
        *("-object", "memory-backend-ram,id=pc.ram,size=16M", "-display", "none"),
        *("-machine", "memory-backend=pc.ram", *guest.definition["vm"]["arguments"]),
        *("-qmp", f"unix:{lab.root}/qmp,server=on,wait=off", "-monitor", "none", "-pidfile", str(lab.root / "hand.pid")),
    ]
    process = subprocess.Popen(command)
    try:
        guest.until_counts()
        yield guest, int((lab.root / "hand.pid").read_text())
    finally:
        process.kill()
        process.wait()


def test_a_guest_that_runs_elsewhere_becomes_a_vm(lab: Lab, foreign: tuple[Guest, int]) -> None:
    guest, pid = foreign
    ended = lab.cprctl("import", "--pid", str(pid), "--install", "--device", str(guest.ram), "--user", "root", "--json")
    assert ended.returncode == 0, ended
    found = document(ended, "import")
    assert (found["name"], found["problem"], found["file"]) == ("hand", "", str(lab.definitions / "hand.toml"))
    assert {note["argument"].split()[0] for note in found["notes"]} == {"-object", "-qmp", "-monitor", "-pidfile"}
    assert "left out: -pidfile" in ended.stderr
    assert "left out: -pidfile" in (lab.definitions / "hand.toml").read_text()
    os.kill(pid, 9)
    until(lambda: not Path(f"/proc/{pid}/exe").exists(), "it is gone")
    guest.console.unlink()
    guest.start()
    guest.until_counts()
    guest.save()
    guest.load()
    guest.assert_unbroken()
    again = lab.cprctl("import", "--cmdline", "/dev/null", "--install")
    assert again.returncode == 1, again


def test_what_is_imported_goes_where_it_is_wanted(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "line").write_text("qemu-system-x86_64 -name web7 -m 1G \\\n -S -nodefaults\n")
    ended = lab.cprctl("import", "--cmdline", str(tmp_path / "line"))
    assert ended.returncode == 0, ended
    assert "left out: -S: the agent decides" in ended.stderr
    assert 'device = "uuid:see-cprctl-devices"' in ended.stdout
    out = tmp_path / "out.toml"
    for code in (0, 1):
        assert lab.cprctl("import", "--cmdline", str(tmp_path / "line"), "--output", str(out)).returncode == code
    assert out.read_text() == ended.stdout
    found = document(lab.cprctl("import", "--cmdline", str(tmp_path / "line"), "--name", "b", "--json"), "import")
    assert (found["name"], found["file"]) == ("b", "")
    assert lab.cprctl("import", "--cmdline", str(tmp_path / "line"), "--install").returncode == 0
    assert (
        "no device" in " ".join(lab.cprctl("check", "web7").stdout.split()) or lab.cprctl("start", "web7").returncode == 1
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 64, "give --pid or --cmdline"),
        (("--pid", "1", "--cmdline", "-"), 64, "give --pid or --cmdline"),
        (("--pid", "4194305"), 1, "there is no process 4194305"),
        (("--cmdline", "/dev/null"), 1, "not a command line of QEMU"),
        (("--cmdline", "/nonexistent"), 64, "No such file"),
        (("--pid", "self"), 64, "is not a valid"),
    ],
)
def test_what_can_not_be_imported(lab: Lab, arguments: tuple[str, ...], code: int, said: str) -> None:
    ended = lab.cprctl("import", *arguments)
    assert ended.returncode == code, ended
    assert said in ended.stderr
    as_json = lab.cprctl("import", *arguments, "--json")
    assert (as_json.returncode, json.loads(as_json.stdout)["error"]["message"] != "") == (code, True)
