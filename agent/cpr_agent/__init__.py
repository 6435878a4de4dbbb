"""cpr-agent: kernel updates of a KVM host with every guest's RAM left in place."""

__version__ = "0.1.0"
