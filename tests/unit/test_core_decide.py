# SPDX-License-Identifier: GPL-2.0-or-later
"""ADR 4's table as a function: what becomes of a live QEMU that an earlier agent left in the middle of an act."""

from __future__ import annotations

from itertools import product

import pytest

from cpr_agent.core.acts.recover import Facts, Recovery, decide
from cpr_agent.core.model import RunState

STANDS = Facts(RunState.POSTMIGRATE)
LOADED = Facts(RunState.PAUSED, started_for_load=True)


@pytest.mark.parametrize(
    ("facts", "recovery"),
    [
        (Facts(RunState.RUNNING), Recovery.NOTHING),
        (Facts(RunState.PAUSED), Recovery.NOTHING),
        (STANDS._replace(checkpointed=True, saved_run_state=RunState.RUNNING), Recovery.NOTHING),
        (STANDS._replace(checkpointed=True), Recovery.NOTHING),
        (STANDS, Recovery.LEAVE),
        (STANDS._replace(interrupted_save=RunState.RUNNING), Recovery.RUN_ON),
        (Facts(RunState.PAUSED, interrupted_save=RunState.RUNNING, stopped_first=True), Recovery.RUN_ON),
        (Facts(RunState.PAUSED, interrupted_save=RunState.RUNNING), Recovery.NOTHING),  # somebody else has stopped it
        (Facts(RunState.PAUSED, interrupted_save=RunState.PAUSED, stopped_first=True), Recovery.NOTHING),
        (
            Facts(RunState.PAUSED, checkpointed=True, interrupted_save=RunState.RUNNING, stopped_first=True),
            Recovery.NOTHING,
        ),
        (STANDS._replace(interrupted_save=RunState.RUNNING, save_was_taken_back=True), Recovery.RUN_ON),
        (
            STANDS._replace(interrupted_save=RunState.RUNNING, save_was_taken_back=True, proved_before=True),
            Recovery.TAKE_BACK_AGAIN,
        ),
        (STANDS._replace(interrupted_save=RunState.PAUSED), Recovery.FINISH_SAVE),
        (STANDS._replace(interrupted_save=RunState.SUSPENDED), Recovery.FINISH_SAVE),
        (STANDS._replace(interrupted_save=RunState.PAUSED, has_launch=False), Recovery.LEAVE),
        (STANDS._replace(interrupted_save=RunState.PAUSED, save_was_taken_back=True), Recovery.LEAVE),
        (STANDS._replace(interrupted_save=RunState.UNKNOWN), Recovery.FINISH_SAVE),
        (STANDS._replace(in_transfer=True, in_refresh=True), Recovery.UNDO_TRANSFER),
        (
            STANDS._replace(in_refresh=True, checkpointed=True, saved_run_state=RunState.RUNNING),
            Recovery.TAKE_BACK,
        ),
        (
            STANDS._replace(in_refresh=True, checkpointed=True, saved_run_state=RunState.PAUSED),
            Recovery.NOTHING,
        ),
        (
            LOADED._replace(checkpointed=True, loads_checkpoint=True, saved_run_state=RunState.RUNNING),
            Recovery.REPEAT_LOAD,
        ),
        (
            Facts(RunState.INMIGRATE, checkpointed=True, loads_checkpoint=True, started_for_load=True),
            Recovery.REPEAT_LOAD,
        ),
        (LOADED._replace(resume_announced=True, resume_interrupted=True), Recovery.FINISH_RESUME),
        (LOADED, Recovery.NOTHING),
        (LOADED._replace(checkpointed=True), Recovery.NOTHING),
        (LOADED._replace(resume_announced=True), Recovery.NOTE_RESUMED),
        (Facts(RunState.INMIGRATE, started_for_load=True, resume_interrupted=True), Recovery.PUT_BACK),
        (Facts(RunState.RUNNING, started_for_load=True, resume_announced=True), Recovery.NOTE_RESUMED),
    ],
)
def test_what_is_true_decides(facts: Facts, recovery: Recovery) -> None:
    assert decide(facts) is recovery


def all_facts() -> list[Facts]:
    yes_or_no = [name for name in Facts._fields if isinstance(Facts._field_defaults.get(name), bool)]
    states = [None, RunState.RUNNING, RunState.PAUSED]
    return [
        Facts(now, saved_run_state=saved, interrupted_save=begun, **dict(zip(yes_or_no, answers, strict=True)))
        for now in RunState
        for saved in states
        for begun in states
        for answers in product((False, True), repeat=len(yes_or_no))
    ]


def test_no_guest_goes_on_where_a_checkpoint_could_still_be_loaded() -> None:
    """Whatever else is true: only a comparison lets it (TAKE_BACK), or it waits."""
    for facts in all_facts():
        if facts.checkpointed:
            assert decide(facts) in (Recovery.NOTHING, Recovery.REPEAT_LOAD, Recovery.TAKE_BACK), facts


def test_a_guest_that_runs_is_left_alone() -> None:
    for facts in all_facts():
        if facts.run_state is RunState.RUNNING:
            assert decide(facts) in (Recovery.NOTHING, Recovery.NOTE_RESUMED), facts
