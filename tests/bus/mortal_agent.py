"""An agent that kills itself at one point: cpr-agentd's own parts, but for a journal and a store that carry the knife.

    python -m tests.bus.mortal_agent POINT --root=DIR --bus-address=ADDRESS

POINT is "before X" or "after X", where X is a record of the journal, or an act of the store: seal, commit, consume, ...
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from cpr_agent.bus.service import Service
from cpr_agent.core.settings import Settings
from cpr_agent.daemon import Paths, build
from cpr_agent.host.this_host import ThisHost
from tests.bench import MortalJournal, MortalStore


async def serve(paths: Paths, address: str, point: str) -> None:
    def die_at(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    bus = await Service.connect(address)
    manager = build(paths, Settings(), None)
    manager.ports = replace(
        manager.ports,
        store=MortalStore(paths.state / "checkpoints", die_at),
        journal=MortalJournal(paths.state / "journal", ThisHost(), die_at),
    )
    service = Service(bus, manager, paths.run)
    await service.own_name()
    await manager.reload()
    await manager.recover()
    service.open()
    print("recovered; VMs run as processes", file=sys.stderr, flush=True)
    await service.disconnected()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("point")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--bus-address", required=True)
    options = parser.parse_args()
    asyncio.run(serve(Paths(options.root), options.bus_address, options.point))


if __name__ == "__main__":
    main()
