# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM: its devices and files, their identity, and the witness of their contents. The only importer of pyudev and
xxhash."""
