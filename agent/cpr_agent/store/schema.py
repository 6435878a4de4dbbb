# SPDX-License-Identifier: GPL-2.0-or-later
"""Manifests and launch records of older agents, read as today's: they outlive the agent that wrote them."""

from __future__ import annotations

from typing import Any

import msgspec

from cpr_agent.core.model import MANIFEST_SCHEMA, Launch, Manifest

READ = msgspec.json.Decoder(tuple[Manifest, Launch])
"""Unused: with a decoder msgspec works a type out at import, where there is one thread. A type that threads may read needs
one, because two threads that are the first to read it end in a segmentation fault (measured with 0.19 and 0.22)."""


def read_launch(raw: bytes) -> Launch:
    """Raises msgspec.MsgspecError."""
    return msgspec.convert(_launch(msgspec.json.decode(raw, type=dict[str, Any])), Launch)


def read_manifest(raw: bytes) -> Manifest:
    """Raises msgspec.MsgspecError, KeyError, ValueError."""
    body = msgspec.json.decode(raw, type=dict[str, Any])
    if body["schema"] == 1:
        body |= {"schema": 2, "memory": [body["memory"]], "launch": _launch(body["launch"])}
    if body["schema"] == 2:
        body |= {"schema": 3}  # its witness has no ``chosen_by``: see Witness
    if body["schema"] == 3:
        body |= {"schema": MANIFEST_SCHEMA, "inventory": None}  # its load can compare the disks alone
    if body["schema"] != MANIFEST_SCHEMA:
        raise ValueError(f"its schema is {body['schema']}, this agent reads up to {MANIFEST_SCHEMA}")
    return msgspec.convert(body, Manifest)


def _launch(body: dict[str, Any]) -> dict[str, Any]:
    """A launch record from before schema 2, when a VM had one range of memory, in today's form."""
    if "memory_fd" not in body:
        return body
    return {**body, "memory": [body["memory"]], "nodes": [body["node"]], "memory_fds": [body["memory_fd"]]}
