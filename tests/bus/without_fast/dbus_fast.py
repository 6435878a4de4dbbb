# SPDX-License-Identifier: GPL-2.0-or-later
"""On PYTHONPATH, this stands in the way of dbus-fast: the agent and cprctl are on a host that has dbus-next alone."""

raise ImportError("this host has no dbus-fast")
