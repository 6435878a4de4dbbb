# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m cpr_agent`` is cpr-agentd, whose start guests may wait for (ADR 27)."""

import gc
import sys
from types import ModuleType

gc.disable()  # until the daemon is ready: imports leave no garbage

# Libraries import these where they are installed, and do without: asyncio TLS, msgspec the names of later Pythons, shutil
# what compresses its archives.
_SPARED = ("ssl", "typing_extensions", "bz2", "lzma")
sys.modules.update(dict.fromkeys(_SPARED))  # type: ignore[arg-type]  # "not there", to import
import asyncio  # noqa: E402, F401 - it goes without TLS then


class _Ssl(ModuleType):
    """To qemu.qmp, which wants the name of a type."""

    SSLContext = object


sys.modules["ssl"] = _Ssl("ssl")

from cpr_agent.daemon import main  # noqa: E402 - the lines above come first

for name in _SPARED:
    del sys.modules[name]  # what is imported later has them

main()
