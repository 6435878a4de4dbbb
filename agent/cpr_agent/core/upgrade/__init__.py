# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests of a host through a kexec, or not at all: check, save, commit, roll back, load."""

from typing import TYPE_CHECKING

from cpr_agent.late import late

if TYPE_CHECKING:
    from cpr_agent.core.upgrade import (
        blame,
        dependents,
        kernel,
        preflight,
        refresh_all,
        roll_back,
        save_all,
        sort,
        stop_first,
        uptime,
    )

__all__ = [
    "blame",
    "dependents",
    "kernel",
    "preflight",
    "refresh_all",
    "roll_back",
    "save_all",
    "sort",
    "stop_first",
    "uptime",
]

if not TYPE_CHECKING:
    __getattr__ = late(__name__, __all__)
