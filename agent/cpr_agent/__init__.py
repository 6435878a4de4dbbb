# SPDX-License-Identifier: GPL-2.0-or-later
"""cpr-agent keeps QEMU guests alive across a host kexec, with their RAM left in place."""

__version__ = "0.1.0"
