"""The host VM: a throw-away virtual KVM host in which tests really kexec (see scripts/host-vm)."""
