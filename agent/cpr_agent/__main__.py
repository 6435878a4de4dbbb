# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m cpr_agent`` is cpr-agentd, whose start guests may wait for."""

import gc

gc.disable()  # until the daemon is ready: imports leave no garbage

from cpr_agent.daemon import main  # noqa: E402 - the collector is off first

main()
