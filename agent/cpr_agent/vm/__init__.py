# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM: its definition, QEMU's command line, QMP and its dialects. The only importer of qemu.qmp."""

from typing import TYPE_CHECKING

from cpr_agent.late import late

if TYPE_CHECKING:
    from cpr_agent.vm import blockers, guest_agent

__all__ = ["blockers", "guest_agent"]

if not TYPE_CHECKING:
    __getattr__ = late(__name__, __all__)
