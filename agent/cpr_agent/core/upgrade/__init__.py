# SPDX-License-Identifier: GPL-2.0-or-later
"""All guests of a host through a kexec, or not at all: check, save, commit, roll back, load."""
