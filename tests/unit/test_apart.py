# SPDX-License-Identifier: GPL-2.0-or-later
"""Texts of callers are read in a process of their own, with an end; and no file of root's keeps another from being read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpr_agent.errors import InvalidArgument, InvalidDefinition
from cpr_agent.vm import apart
from cpr_agent.vm.definition import DefinitionDirectory
from tests.lab import until

GOOD = '[vm]\nqemu = "/usr/bin/qemu"\narguments = ["-nodefaults"]\n[memory]\nsize = "16M"\ndevice = "/dev/shm/x"\n'
NUMA = """[[memory.node]]\nsize = "16M"\ndevice = "/dev/shm/x"\n[vm]\nqemu = "/usr/bin/qemu"\n"""
NO_WISHES = {"name": "", "device": "", "offset": "", "user": ""}


@pytest.fixture
def definitions(tmp_path: Path) -> DefinitionDirectory:
    return DefinitionDirectory(tmp_path, tmp_path / "run", tmp_path / "log")


def test_a_definition_is_the_same_by_either_way(definitions: DefinitionDirectory, tmp_path: Path) -> None:
    (tmp_path / "web1.toml").write_text(GOOD)
    good, bad = definitions.load_all()
    assert bad == {}
    assert definitions.parse("web1", GOOD) == good["web1"]


BAD = {
    "a size that is no number": GOOD.replace('"16M"', "inf"),
    "a size beyond all machines": GOOD.replace('"16M"', '"99999999999999999T"'),
    "a number of bytes beyond all machines": GOOD.replace('"16M"', "1e30"),
    "an offset beyond all machines": GOOD + 'offset = "99999999999999999T"\n',
    "a node beyond all machines": NUMA.replace('"16M"', "18446744073709551616") + "arguments = []\n",
    "nodes beyond all machines": "[vm]\narguments = []\n"
    + '[[memory.node]]\nsize = "1048576T"\ndevice = "/dev/shm/x"\n' * 17,
    "a time that is none": GOOD + "[save]\ntimeout = nan\n",
    "a time without end": GOOD + "[save]\ntimeout = inf\n",
    "a time that never comes": GOOD + "[save]\ntimeout = 1e300\n",
    "a time of many digits": GOOD + '[save]\ntimeout = "99999999999999999999h"\n',
    "an order beyond all": GOOD + f"[save]\norder = {'9' * 30}\n",
    "no number at all": GOOD.replace('"16M"', "nan"),
    "a number of too many digits": f"a={'9' * 5000}",
    "nested lists": f"a={'[' * 3000}{']' * 3000}",
    "nested tables": f"a={'{a=' * 3000}1{'}' * 3000}",
    "a key of many parts": f"{'.'.join('a' * 4000)}=1",
    "a key of many parts with spaces": f"{' . '.join('a' * 2000)}=1",
    "a table of many parts": f"[{'.'.join('a' * 4000)}]",
    "a NUL as an escape": GOOD.replace('"/usr/bin/qemu"', r'"/usr/bin/qemu\u0000"'),
    "a NUL in the device": GOOD.replace("/dev/shm/x", r"/dev/shm/x\u0000y"),
    "a NUL in a node's device": NUMA.replace("/dev/shm/x", r"/dev/shm/x\u0000y"),
    "an escape in a list of words": GOOD + r'[save]\nwhen-blocked = ["\u001b"]'.replace(r"\n", "\n", 1),
    "a NUL in a key": r'"\u0000"=1',
    "an escape sequence": GOOD.replace("[vm]", r"[vm]" + "\n" + r'description="\u001b[2J"'),
    "a bidi mark": GOOD.replace("[vm]", "[vm]\ndescription='\u202e'"),
    "an unknown key": f"{'k' * 6000}=1",
    "an argument that is no JSON": f"{NUMA}arguments = ['-numa', '{{']\n",
    "open strings": '"""\\' * 1000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD.keys())
def test_a_bad_definition_is_refused_and_keeps_no_other(
    definitions: DefinitionDirectory, tmp_path: Path, text: str
) -> None:
    with pytest.raises(InvalidDefinition):
        definitions.parse("web1", text)
    (tmp_path / "bad.toml").write_text(text)
    (tmp_path / "good.toml").write_text(GOOD)
    good, bad = definitions.load_all()
    assert (set(good), set(bad)) == ({"good"}, {"bad"})
    assert isinstance(bad["bad"], InvalidDefinition)


def test_depth_in_a_text_or_a_comment_is_none(definitions: DefinitionDirectory) -> None:
    deep = "[" * 20 + "{" * 20 + ".".join("a" * 20)
    quoted = GOOD.replace("[vm]", f"# {deep}\n[vm]\ndescription = '{deep}'").replace('"-nodefaults"', f'"""{deep} "x" """')
    assert definitions.parse("web1", quoted).vm.description == deep


def test_what_is_no_file_is_not_waited_for(definitions: DefinitionDirectory, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    (tmp_path / "directory.toml").mkdir()
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20))
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "good.toml").write_text(GOOD)
    good, bad = definitions.load_all()
    assert set(good) == {"good"}
    assert set(bad) == {"fifo", "directory", "large", "zero"}


@pytest.mark.parametrize("name", ["web 1", ".web1", "web1~", "x@y", "-x", "x" * 64, "\udce9", "a\nb", "\u202e"])
def test_a_file_whose_name_is_no_vm_s_is_none(
    definitions: DefinitionDirectory, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{name}.toml").write_text(GOOD)
    (tmp_path / "good.toml").write_text(GOOD)
    good, bad = definitions.load_all()
    assert (set(good), bad) == ({"good"}, {})
    assert "is not read" in caplog.text
    assert caplog.messages[0].isprintable()


def test_an_error_comes_back_as_it_was(definitions: DefinitionDirectory) -> None:
    with pytest.raises(InvalidDefinition, match="memory.device 'x' is neither") as caught:
        definitions.parse("web1", GOOD.replace("/dev/shm/x", "x"))
    assert caught.value.vm == "web1"
    with pytest.raises(InvalidArgument):
        apart.import_apart("not a command line", NO_WISHES)


def test_a_text_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's time; here by an importer that never ends, and an agent that is not asked to wait long for it."""
    endless = "from cpr_agent.vm import apart\napart.CPU_S = 0.2\napart._read = lambda *_: sum(iter(int, 1))\n"
    program = f"{endless}apart.main(['', 'import'])"
    done = subprocess.run([sys.executable, "-c", program], input=b'{"text": ""}', timeout=60, check=False)
    assert done.returncode == -signal.SIGPROF
    monkeypatch.setattr(apart, "WALL_S", 0.01)
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="more time or memory"):
        apart.import_apart("qemu-system-x86_64", NO_WISHES)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text",
    [
        "kvm" * 2600 + "/",
        "qemu " + " " * 8000,
        "A=1 " * 2000 + "qemu",
        "qemu -device '" + '{"a":' * 1500,
        "qemu -m " + "9" * 8000,
        "qemu-system-x86_64 -fw_cfg '{' -unknown '{}x' -smbios '{\"a\":'",
    ],
)
def test_a_command_line_is_read_or_refused_in_time(text: str) -> None:
    began = time.monotonic()
    try:
        apart.import_apart(text, NO_WISHES)
    except InvalidArgument as error:
        assert str(error)
    assert time.monotonic() - began < apart.WALL_S


NO_NICE = """
import ctypes, os, platform, struct, sys
number = {"x86_64": 141, "aarch64": 140}[platform.machine()]  # setpriority
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | 1), (0x06, 0, 0, 0x7FFF0000)]
rules = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(rules)))
libc = ctypes.CDLL(None)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program)
os.execv(sys.executable, [sys.executable, "-m", "cpr_agent.vm.apart", "definition"])
"""
"""A filter of seccomp(2) by which setpriority(2) fails with EPERM."""


def test_the_memory_of_a_text_is_bounded_where_the_unit_forbids_to_be_nice() -> None:
    """SystemCallFilter= of the agent's unit has no @resources."""
    with subprocess.Popen([sys.executable, "-c", NO_NICE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        limits = Path(f"/proc/{child.pid}/limits")
        until(lambda: str(apart.MEMORY_BYTES) in limits.read_text() or child.poll() is not None, "the limit is set")
        out, _ = child.communicate(b'{"text": "", "path": "/x/web1.toml"}', timeout=60)
    assert b"refusal" in out
