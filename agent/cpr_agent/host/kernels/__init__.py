# SPDX-License-Identifier: GPL-2.0-or-later
"""Kernels on disk: which there are, what speaks against each, and the one that is loaded for a kexec.

``layout`` finds them as distributions and boot loaders lay them out, ``versions`` orders them, the other modules look at
one: its ``images``, its ``archive`` (the initrd), its ``modules``, and ``roots``, which is what it has to mount.
"""

from cpr_agent.host.kernels.installed import InstalledKernels
from cpr_agent.host.kernels.versions import version_key

__all__ = ["InstalledKernels", "version_key"]
