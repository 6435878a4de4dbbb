"""Checkpoints and journal on disk: atomic, checksummed, versioned."""
