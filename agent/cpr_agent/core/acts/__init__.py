# SPDX-License-Identifier: GPL-2.0-or-later
"""The acts on a VM: functions of its Machine, for whoever holds the VM's lock (core/vm.py)."""
