# SPDX-License-Identifier: GPL-2.0-or-later
"""What the agent costs: each figure a ratio from one run, against the least that could do the same on this machine."""
