# SPDX-License-Identifier: GPL-2.0-or-later
"""cprctl: commands and tables. It talks to the agent over D-Bus only. The only importer of click and rich."""
