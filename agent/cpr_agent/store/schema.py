"""What was written by an older agent, as this one has it: a guest's checkpoint, and the record of how its QEMU was started,
outlive the agent that wrote them."""

from __future__ import annotations

from typing import Any

import msgspec

from cpr_agent.core.model import MANIFEST_SCHEMA, Launch, Manifest

READ = msgspec.json.Decoder(tuple[Manifest, Launch])
"""Not used itself: msgspec works a type out when it first reads one, and threads that are at that at once end in a
segmentation fault (measured with 0.19 and 0.22). What threads may read has a decoder from the start, when there is one."""


def read_launch(raw: bytes) -> Launch:
    """Raises msgspec.MsgspecError."""
    return msgspec.convert(_launch(msgspec.json.decode(raw, type=dict[str, Any])), Launch)


def read_manifest(raw: bytes) -> Manifest:
    """Raises msgspec.MsgspecError, KeyError, ValueError."""
    body = msgspec.json.decode(raw, type=dict[str, Any])
    if body["schema"] == 1:
        body |= {"schema": 2, "memory": [body["memory"]], "launch": _launch(body["launch"])}
    if body["schema"] == 2:
        body |= {"schema": MANIFEST_SCHEMA}  # its witness does not say what chose the pages: see Witness
    if body["schema"] != MANIFEST_SCHEMA:
        raise ValueError(f"its schema is {body['schema']}, this agent reads up to {MANIFEST_SCHEMA}")
    return msgspec.convert(body, Manifest)


def _launch(body: dict[str, Any]) -> dict[str, Any]:
    """Before schema 2 there was one range of memory."""
    if "memory_fd" not in body:
        return body
    return {**body, "memory": [body["memory"]], "nodes": [body["node"]], "memory_fds": [body["memory_fd"]]}
