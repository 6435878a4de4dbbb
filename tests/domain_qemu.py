# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU as libvirt starts one, without a guest: a process of its own that has its RAM mapped and a monitor.

    domain_qemu.py -name guest=NAME MEMORY OFFSET SIZE MONITOR STATUS

It tells on stdout of each command that it got. Lines on stdin say what happens: the first that it may begin, then
``resume``, ``status WORD``.
"""

from __future__ import annotations

import json
import mmap
import select
import socket
import sys
import time


def main() -> None:
    memory, offset, size, monitor, status = sys.argv[3:]
    sys.stdin.readline()  # libvirt notes its PID first
    with open(memory, "r+b") as ram:  # noqa: PTH123 - as small as can be
        mapped = mmap.mmap(ram.fileno(), int(size), offset=int(offset))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(monitor)
    connection.sendall(b'{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 0}}, "capabilities": []}}\r\n')
    sources, buffer = [connection, sys.stdin], ""
    while True:
        ready, _, _ = select.select(sources, [], [])
        if sys.stdin in ready:
            word, _, rest = sys.stdin.readline().strip().partition(" ")
            if not word:
                break
            status = "running" if word == "resume" else rest
            if word == "resume":
                now = time.time()
                stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
                connection.sendall(json.dumps({"event": "RESUME", "timestamp": stamp}).encode() + b"\r\n")
        if connection in ready:
            piece = connection.recv(65536)
            if not piece:
                sources.remove(connection)  # the agent has gone, and QEMU stays
                continue
            buffer = (buffer + piece.decode()).lstrip()
            while buffer:
                try:
                    asked, end = json.JSONDecoder().raw_decode(buffer)  # no line feed ends a command
                except ValueError:
                    break
                buffer = buffer[end:].lstrip()
                answer = {"status": status, "running": status == "running"} if asked["execute"] == "query-status" else {}
                print(json.dumps(asked), flush=True)
                said = {"return": answer, **({"id": asked["id"]} if "id" in asked else {})}
                connection.sendall(json.dumps(said).encode() + b"\r\n")
    mapped.close()


main()
