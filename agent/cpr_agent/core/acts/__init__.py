# SPDX-License-Identifier: GPL-2.0-or-later
"""The acts on a VM: functions of its Machine, for whoever holds the VM's lock (core/vm.py)."""

from typing import TYPE_CHECKING

from cpr_agent.late import late

if TYPE_CHECKING:
    from cpr_agent.core.acts import replace, save, start

__all__ = ["replace", "save", "start"]

if not TYPE_CHECKING:
    __getattr__ = late(__name__, __all__)
