# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to guests and hosts that an admin wants to be told by name, in the system's journal.

Each has a MESSAGE_ID (host/journald.py) and an entry in the catalog (units/cpr-agent.catalog).
"""

from __future__ import annotations

import enum
from typing import Any


class Event(enum.StrEnum):
    HELD = "held"
    MEMORY_LOST = "memory-lost"
    SAVED = "saved"
    SAVE_FAILED = "save-failed"
    LOADED = "loaded"
    LOAD_FAILED = "load-failed"
    CLOCK_NOT_SET = "clock-not-set"
    HOOK_FAILED = "hook-failed"
    UPGRADE_BEGUN = "upgrade-begun"
    UPGRADE_REFUSED = "upgrade-refused"
    UPGRADE_COMMITTED = "upgrade-committed"
    UPGRADE_ROLLED_BACK = "upgrade-rolled-back"
    UPGRADE_DONE = "upgrade-done"
    UPGRADE_HELD = "upgrade-held"


def about(event: Event | None, **fields: object) -> dict[str, Any]:
    """``extra`` of a call to a logger: which event this is, and the entry's fields, which get the prefix ``CPR_``."""
    return {"cpr_event": event, "cpr_fields": fields}
