"""Checkpoints and journal on disk: atomic, checksummed, versioned. The only importer of msgspec's JSON."""
