# SPDX-License-Identifier: GPL-2.0-or-later
"""One VM: its definition, QEMU's command line, QMP and its dialects. The only importer of qemu.qmp."""
