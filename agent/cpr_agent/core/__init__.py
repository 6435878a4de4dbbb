# SPDX-License-Identifier: GPL-2.0-or-later
"""The decisions: what may be saved, loaded, resumed, and in which order. Imports no library."""

from typing import TYPE_CHECKING

from cpr_agent.late import late

if TYPE_CHECKING:
    from cpr_agent.core import adoption, allocation, checks, separation

__all__ = ["adoption", "allocation", "checks", "separation"]

if not TYPE_CHECKING:
    __getattr__ = late(__name__, __all__)
