# SPDX-License-Identifier: GPL-2.0-or-later
"""The host VM: a throw-away virtual KVM host in which tests really kexec.

Debian 13 with systemd, two kernels (cloud and generic), QEMU 10, an NVDIMM and nested KVM, all emulated. A scenario is a
program that runs inside once in each boot, as root, in the directory of its payload, with
    HOST_VM_BOOT        1, 2, 3, ...: also counts on over a kexec
    HOST_VM_PAYLOAD     the payload (its working directory; it keeps what the scenario writes there)
    HOST_VM_ARTEFACTS   what is put here comes back as OUT/artefacts/
and these commands:
    host-vm-make-devdax             turns the NVDIMM into a devdax namespace; prints "UUID NODE"
    host-vm-find-dax UUID           prints the namespace's node in this boot
    host-vm-load-kernel FLAVOUR ... loads the cloud or generic kernel for kexec (more words: for its command line)
    host-vm-power-cut FROM TO | off with --power-cuts: has the power cut at a random instant, in seconds from now
    host-vm-verdict N               ends the run: 0 is pass; also what happens when the scenario exits with N
After `systemctl kexec` a scenario sleeps, or exits with 0, and is run again in the next boot. No stop job is made for
it, so it lives until systemd-shutdown kills it and can watch a shutdown being aborted.
"""
