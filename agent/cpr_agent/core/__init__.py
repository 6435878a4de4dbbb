"""The decisions: what may be saved, loaded, resumed, and in which order. Imports no library."""
