# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's hook and the agent's end of its socket: with the real shell script, real processes, and real sockets."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from cpr_agent.domains import ask
from cpr_agent.domains.hook_server import MAX_AT_ONCE, RELEASED, HookRequest, HookServer
from cpr_agent.errors import MemoryChanged

ROOT = Path(__file__).parents[2]
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
NOBODY = 65534
PLAIN = b"<domain type='kvm'><name>plain</name></domain>"
ADOPTED = b'<domain><metadata><cpr:vm xmlns:cpr="urn:org.cpragent1:domain:1"/></metadata></domain>'
NO_WAIT = {"prepare": 0.2, "started": 0.2}
PATIENCE_S = 60
"""For a process on a busy machine."""


class Hook:
    """The hook as it is installed, but below ``root``."""

    def __init__(self, root: Path, *, read: str = "cat", **limits: object) -> None:
        self.socket = root / "hook.sock"
        self.program = root / "ask.py"
        self._script = root / "cpr-agent"
        text = Path(ask.__file__).read_text().replace(ask.SOCKET, str(self.socket))
        for name, value in limits.items():
            text, count = re.subn(rf"(?m)^{name} = .+$", f"{name} = {value}", text)
            assert count == 1
        self.program.write_text(text)
        script = (ROOT / "units/libvirt-hook").read_text()
        places = {"/usr/lib/cpr-agent/cpr_agent/domains/ask.py": self.program}
        places |= {f"/run/cpr-agent/{name}": root / name for name in ("monitor", "released")}
        for installed, here in places.items():
            assert installed in script
            script = script.replace(installed, str(here))
        self._script.write_text(script.replace("$(cat)", f"$({read})"))
        self._script.chmod(0o755)

    def command(self, domain: str, operation: str, sub_operation: str) -> list[str]:
        return [str(self._script), domain, operation, sub_operation, "-"]

    def run(
        self, operation: str, xml: bytes = ADOPTED, domain: str = "web1", sub_operation: str = "begin"
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            self.command(domain, operation, sub_operation), input=xml, capture_output=True, timeout=PATIENCE_S, check=False
        )
        assert done.stdout == b"", "libvirt would take it for XML"
        return done

    async def start(self, operation: str, domain: str = "web1") -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *self.command(domain, operation, "begin"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin
        process.stdin.write(ADOPTED)
        process.stdin.close()
        return process


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    return Hook(tmp_path)


async def outcome(process: asyncio.subprocess.Process) -> tuple[int, str]:
    async with asyncio.timeout(PATIENCE_S):
        _, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stderr.decode()


def with_server(hook: Hook, decide: Callable[[HookRequest], Awaitable[str]], story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        server = HookServer(hook.socket, decide)
        server.open()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await story()
        finally:
            await server.close()

    asyncio.run(run())


async def yes(_: HookRequest) -> str:
    return ""


def listening(path: Path) -> socket.socket:
    """An agent that accepts connections, as the kernel does for it, and is no more than that."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


# The hook


@pytest.mark.parametrize(
    "operation", ["prepare", "start", "started", "stopped", "release", "restore", "reconnect", "migrate"]
)
def test_a_domain_that_is_not_adopted_starts_also_while_the_agent_hangs(hook: Hook, operation: str) -> None:
    with listening(hook.socket):
        done = hook.run(operation, PLAIN)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_domain_that_is_not_adopted_starts_without_agent_package_and_python(hook: Hook) -> None:
    hook.program.unlink()
    done = hook.run("prepare", PLAIN)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("operation", ["restore", "reconnect", "migrate", "attach", "start", "an operation to come"])
def test_other_operations_never_fail_and_ask_nobody(hook: Hook, operation: str) -> None:
    hook.program.unlink()
    done = hook.run(operation)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("operation", ["prepare", "started"])
def test_an_adopted_domain_does_not_start_without_the_agent(tmp_path: Path, operation: str) -> None:
    hook = Hook(tmp_path, ABSENT_S=NO_WAIT)
    done = hook.run(operation)
    assert done.returncode == 1
    assert b"the agent does not answer (No such file or directory), and has to say whether this guest waits" in done.stderr
    listening(hook.socket).close()  # of an agent that was killed
    assert b"(Connection refused)" in hook.run(operation).stderr


@pytest.mark.parametrize("operation", ["prepare", "started"])
def test_an_agent_that_is_restarted_at_that_moment_is_waited_for(hook: Hook, operation: str) -> None:
    async def story() -> None:
        process = await hook.start(operation)
        server = HookServer(hook.socket, yes)
        server.open()
        assert await outcome(process) == (0, "")
        await server.close()

    listening(hook.socket).close()
    asyncio.run(story())


def test_an_adopted_domain_does_not_start_once_the_package_is_removed(hook: Hook) -> None:
    hook.program.unlink()
    done = hook.run("prepare")
    assert done.returncode == 1
    assert b"cpr-agent is not installed any more" in done.stderr


def test_a_domain_whose_metadata_were_edited_away_is_still_asked_for(tmp_path: Path) -> None:
    hook = Hook(tmp_path, ABSENT_S=NO_WAIT)
    rest = b"<qemu:arg value='memory-backend-file,id=cpr-ram,mem-path=/run/cpr-agent/gate/web1'/>"
    assert hook.run("prepare", rest).returncode == 1


def test_a_domain_that_could_not_be_read_is_adopted_if_it_has_a_monitor(tmp_path: Path) -> None:
    hook = Hook(tmp_path, read="head -c 9; false", ABSENT_S=NO_WAIT)
    assert hook.run("started").returncode == 0
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor/web1").touch()
    assert hook.run("started").returncode == 1
    assert hook.run("started", domain="plain").returncode == 0


@pytest.mark.parametrize("operation", ["stopped", "release"])
def test_an_end_is_never_refused_and_waits_for_nobody(hook: Hook, operation: str) -> None:
    for left_by_an_agent in (False, True):
        if left_by_an_agent:  # that was killed: nobody reads
            os.mkfifo(hook.socket.with_name(RELEASED))
            listening(hook.socket).close()
        done = hook.run(operation, sub_operation="end")
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_agent_hears_of_a_domain_that_libvirt_is_through_with_before_it_starts_again(hook: Hook) -> None:
    heard = []

    async def decide(request: HookRequest) -> str:
        heard.append((request.operation, request.sub_operation, request.domain, request.waiting))
        if request.domain == "web3":
            raise ZeroDivisionError
        return ""

    async def story() -> None:
        for domain in ("web1", "a b", "../x", "web2", "web3"):
            await asyncio.to_thread(hook.run, "release", ADOPTED, domain, "end")
        await asyncio.to_thread(hook.run, "release", PLAIN, "plain", "end")
        assert await outcome(await hook.start("prepare")) == (0, "")

    with_server(hook, decide, story)
    assert heard == [
        ("release", "end", "web1", True),
        ("release", "end", "web2", True),
        ("release", "end", "web3", True),
        ("prepare", "begin", "web1", True),
    ]


def test_many_are_heard_at_once(hook: Hook) -> None:
    names = [f"web{number}" for number in range(3000)]
    heard: list[str] = []
    all_heard = asyncio.Event()

    async def decide(request: HookRequest) -> str:
        heard.append(request.domain)
        if len(heard) == len(names):
            all_heard.set()
        return ""

    async def story() -> None:
        with hook.socket.with_name(RELEASED).open("w") as pipe:
            for name in names:
                pipe.write(f"{name}\n")
                pipe.flush()
        await all_heard.wait()

    with_server(hook, decide, story)
    assert heard == names


def test_yes_is_yes_and_no_is_no_with_its_reason(hook: Hook) -> None:
    async def decide(request: HookRequest) -> str:
        return "" if request.operation == "prepare" else "its disk /srv/web1.qcow2 was written to"

    async def story() -> None:
        assert await outcome(await hook.start("prepare")) == (0, "")
        assert await outcome(await hook.start("started")) == (1, "cpr-agent: its disk /srv/web1.qcow2 was written to\n")

    with_server(hook, decide, story)


@pytest.mark.parametrize("domain", ["web1", "..", "a b", "-x", "ü", "$(id)", "`id`", "';", "%s\\n", "*"])
def test_the_request_says_what_libvirt_says(hook: Hook, domain: str) -> None:
    heard = []
    xml = ADOPTED.decode() + "\n$(id) `id` \\n %s \u00fc\n"

    async def decide(request: HookRequest) -> str:
        heard.append((request.operation, request.sub_operation, request.domain, request.xml.rstrip("\n")))
        assert Path(f"/proc/{request.pid}").exists()
        return ""

    async def story() -> None:
        done = await asyncio.to_thread(hook.run, "prepare", xml.encode(), domain)
        assert (done.returncode, done.stderr) == (0, b"")

    with_server(hook, decide, story)
    assert heard == [("prepare", "begin", domain, xml.rstrip("\n"))]


def test_a_very_long_domain_is_asked_for_and_one_beyond_all_bounds_refused(hook: Hook) -> None:
    async def story() -> None:
        longest = ADOPTED + b" " * (4 << 20)
        assert (await asyncio.to_thread(hook.run, "prepare", longest)).returncode == 0
        done = await asyncio.to_thread(hook.run, "prepare", ADOPTED + b" x" * (ask.MAX_BYTES // 2))
        assert done.returncode == 1
        assert b"the agent reads 5242880 at most" in done.stderr
        assert (await asyncio.to_thread(hook.run, "prepare", PLAIN + b" " * (4 << 20))).returncode == 0

    with_server(hook, yes, story)


def test_an_agent_that_accepts_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    hook = Hook(tmp_path, SILENCE_S=0.3)
    with listening(hook.socket):
        done = hook.run("prepare")
    assert done.returncode == 1
    assert b"the agent has not answered in time" in done.stderr


def test_an_agent_that_does_not_even_accept_is_given_up(tmp_path: Path) -> None:
    hook = Hook(tmp_path, CONNECT_S=0.3, ABSENT_S=NO_WAIT)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(hook.socket))
    listener.listen(0)
    with listener, socket.socket(socket.AF_UNIX) as filling:
        filling.connect(str(hook.socket))  # the queue is full
        done = hook.run("prepare")
    assert done.returncode == 1
    assert b"the agent does not answer" in done.stderr


def test_an_agent_that_decides_too_slowly_is_given_up(tmp_path: Path) -> None:
    hook = Hook(tmp_path, ANSWER_S={"prepare": 0.5, "started": 0.5})

    async def decide(request: HookRequest) -> str:
        await request.until_gone()
        return "nobody hears this"

    async def story() -> None:
        code, said = await outcome(await hook.start("started"))
        assert code == 1
        assert "the agent has not answered in time" in said

    with_server(hook, decide, story)


@pytest.mark.parametrize("answer", [b"yes", b"+-", b"\0", b"+ but", b"x" * 10000])
def test_what_is_no_plain_yes_is_a_no(hook: Hook, answer: bytes) -> None:
    async def story() -> None:
        with listening(hook.socket) as listener:
            listener.settimeout(PATIENCE_S)
            process = await hook.start("started")
            connection, _ = await asyncio.to_thread(listener.accept)
            with connection:
                connection.settimeout(PATIENCE_S)
                await asyncio.to_thread(connection.recv, ask.MAX_BYTES)
                connection.sendall(answer)
            code, said = await outcome(process)
        assert code == 1
        assert said.startswith("cpr-agent: ")

    asyncio.run(story())


@AS_ROOT
def test_a_socket_of_another_user_is_not_the_agent_s(hook: Hook) -> None:
    serve = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        "print('up', flush=True); c, _ = s.accept(); c.recv(9); c.sendall(b'+')"
    )
    hook.socket.parent.chmod(0o777)
    for parent in list(hook.socket.parents)[1:-2]:
        parent.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", serve, str(hook.socket)], stdout=subprocess.PIPE) as false_agent:
        assert false_agent.stdout
        assert false_agent.stdout.readline() == b"up\n"
        done = hook.run("prepare")
        false_agent.kill()
    assert done.returncode == 1
    assert b"belongs to user 65534" in done.stderr


def test_an_agent_that_is_killed_and_comes_back_is_asked_again(hook: Hook) -> None:
    """It may have acted on its yes: a no would end the guest, which is in no checkpoint any more."""
    agent = (
        "import asyncio, os, pathlib, sys\n"
        "from cpr_agent.domains.hook_server import HookServer\n"
        "async def decide(request):\n"
        "    if request.hold():\n"
        "        os.kill(os.getpid(), 9)\n"
        "async def main():\n"
        "    HookServer(pathlib.Path(sys.argv[1]), decide).open()\n"
        "    print('up', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )

    async def story() -> None:
        first = await asyncio.create_subprocess_exec(
            sys.executable, "-c", agent, str(hook.socket), stdout=asyncio.subprocess.PIPE
        )
        assert first.stdout
        assert await first.stdout.readline() == b"up\n"
        process = await hook.start("started")
        assert await first.wait() == -signal.SIGKILL
        second = HookServer(hook.socket, yes)
        second.open()
        assert await outcome(process) == (0, "")
        await second.close()

    asyncio.run(story())


def test_an_agent_that_is_killed_and_stays_away_is_a_no(tmp_path: Path) -> None:
    hook = Hook(tmp_path, RETURN_S=0.3)

    async def story() -> None:
        with listening(hook.socket) as listener:
            listener.settimeout(PATIENCE_S)
            process = await hook.start("started")
            connection, _ = await asyncio.to_thread(listener.accept)
        connection.close()
        code, said = await outcome(process)
        assert code == 1
        assert "the agent does not answer" in said

    asyncio.run(story())


# The agent's end


def test_a_refusal_is_one_printable_line_whatever_it_is(hook: Hook) -> None:
    async def decide(request: HookRequest) -> str:
        if request.domain == "web1":
            raise MemoryChanged("is not what\nit \x1b[31mwas", vm="web1", remedy="look")
        raise ZeroDivisionError("oh")

    async def story() -> None:
        code, said = await outcome(await hook.start("prepare"))
        assert (code, said) == (1, "cpr-agent: VM web1: is not what\\nit \\x1b[31mwas. Look.\n")
        code, said = await outcome(await hook.start("prepare", "web2"))
        assert (code, said) == (1, "cpr-agent: the agent has failed: oh\n")

    with_server(hook, decide, story)


def test_a_hook_that_is_killed_is_noticed_and_nothing_is_held_for_it(hook: Hook) -> None:
    asked, decided = asyncio.Event(), asyncio.Event()
    held = []

    async def decide(request: HookRequest) -> str:
        asked.set()
        await request.until_gone()
        held.append(request.hold())
        decided.set()
        return ""

    async def story() -> None:
        process = await hook.start("started")
        await asked.wait()
        process.kill()
        await decided.wait()
        await process.wait()

    with_server(hook, decide, story)
    assert held == [False]


def test_a_hook_that_was_just_killed_is_noticed_by_the_next_look(hook: Hook) -> None:
    held = []
    processes: list[asyncio.subprocess.Process] = []

    async def decide(request: HookRequest) -> str:
        pidfd = os.pidfd_open(request.pid)
        processes[0].kill()
        assert select.select([pidfd], [], [], PATIENCE_S)[0]  # the loop gets no turn
        os.close(pidfd)
        held.append(request.hold())
        return ""

    async def story() -> None:
        processes.append(await hook.start("started"))
        await processes[0].wait()

    with_server(hook, decide, story)
    assert held == [False]


def test_a_hook_whose_libvirt_has_ended_is_not_waited_for(hook: Hook) -> None:
    """libvirtd's unit has KillMode=process: the hook lives on, and nobody waits for what it says."""
    asked = asyncio.Event()
    held = []

    async def decide(request: HookRequest) -> str:
        asked.set()
        await request.until_gone()
        held.append(request.hold())
        os.kill(request.pid, signal.SIGKILL)
        return ""

    async def story() -> None:
        libvirt = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run(sys.argv[2:], input=sys.argv[1].encode())",
            ADOPTED.decode(),
            *hook.command("web1", "started", "begin"),
        )
        await asked.wait()
        libvirt.kill()
        await libvirt.wait()

    with_server(hook, decide, story)
    assert held == [False]


def test_requests_of_one_domain_come_one_after_the_other_and_others_meanwhile(hook: Hook) -> None:
    under_way: dict[str, int] = {"web1": 0, "web2": 0}
    both, first = asyncio.Event(), asyncio.Event()

    async def decide(request: HookRequest) -> str:
        under_way[request.domain] += 1
        assert under_way[request.domain] == 1
        if request.domain == "web1":
            first.set()
            await both.wait()
        else:
            await first.wait()
            both.set()
        under_way[request.domain] -= 1
        return ""

    async def story() -> None:
        processes = [await hook.start("prepare", domain) for domain in ("web1", "web1", "web2", "web1")]
        assert [await outcome(process) for process in processes] == [(0, "")] * 4

    with_server(hook, decide, story)


async def _ask(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    await writer.drain()
    answer = await reader.read()
    writer.close()
    return answer.lstrip(ask.ALIVE)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        (3).to_bytes(4, "big") + b"abc",
        (5).to_bytes(4, "big") + b"a\0b\0c",
        ask.message("prepare", "begin", b"web1", b"\xff\xfe"),
        ask.message("prepare", "begin", b"we\0b1", b"<domain/>"),
        ask.message("restore", "begin", b"web1", b"<domain/>"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(hook: Hook, data: bytes) -> None:
    async def decide(request: HookRequest) -> str:
        raise AssertionError(request)

    async def story() -> None:
        assert (await _ask(hook.socket, data)).startswith(b"-a request that can't be read")

    with_server(hook, decide, story)


def test_a_flood_is_refused_and_the_agent_answers_after_it(hook: Hook) -> None:
    """Connections that never say a word take the places until their time is over; they are hung up on then, or here."""

    async def story() -> None:
        flood = [await asyncio.open_unix_connection(hook.socket) for _ in range(MAX_AT_ONCE)]
        code, said = await outcome(await hook.start("prepare"))
        assert code == 1
        assert said.startswith("cpr-agent: the agent has 64 requests to decide on already")
        for _, writer in flood:
            writer.close()
            await writer.wait_closed()
        assert await outcome(await hook.start("prepare")) == (0, "")

    with_server(hook, yes, story)


@AS_ROOT
def test_another_user_can_t_reach_it_and_would_not_be_heard(hook: Hook) -> None:
    call = (
        "import os, socket, sys; os.setgroups([]); os.setuid(65534); s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect(sys.argv[1]); print(s.recv(9))\n"
        "except PermissionError: print('refused')"
    )

    async def attempt() -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", call, str(hook.socket), stdout=asyncio.subprocess.PIPE
        )
        return (await process.communicate())[0]

    async def story() -> None:
        for parent in list(hook.socket.parents)[:-2]:
            parent.chmod(0o755)
        assert await attempt() == b"refused\n"
        hook.socket.chmod(0o777)
        assert await attempt() == b"b''\n"

    with_server(hook, yes, story)


def test_an_agent_that_stops_finishes_what_it_has_acted_on_and_lets_the_next_one_decide_the_rest(hook: Hook) -> None:
    acting, waiting, finish = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def decide(request: HookRequest) -> str:
        if request.domain == "held":
            assert request.hold()
            acting.set()
            await finish.wait()
        else:
            waiting.set()
            await request.until_gone()
        return ""

    async def story() -> None:
        server = HookServer(hook.socket, decide)
        server.open()
        held, other = await hook.start("started", "held"), await hook.start("prepare", "other")
        await acting.wait()
        await waiting.wait()
        closing = asyncio.create_task(server.close())
        await asyncio.wait({closing}, timeout=0)
        finish.set()
        await closing
        assert await outcome(held) == (0, "")
        following = HookServer(hook.socket, yes)
        following.open()
        assert await outcome(other) == (0, "")
        await following.close()

    asyncio.run(story())


def test_a_socket_that_an_agent_has_left_is_replaced(hook: Hook) -> None:
    listening(hook.socket).close()

    async def story() -> None:
        assert await outcome(await hook.start("prepare")) == (0, "")

    with_server(hook, yes, story)
