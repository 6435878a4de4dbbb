# SPDX-License-Identifier: GPL-2.0-or-later
"""In each run state the check, the save and the resume say the same: what the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpr_agent.core.acts.requests import LoadRequest, SaveRequest
from cpr_agent.core.manager import Manager
from cpr_agent.core.model import Policy, RunState, Survives
from cpr_agent.core.run_states import RUN_STATES
from cpr_agent.core.upgrade.sort import triage
from cpr_agent.errors import AlreadyRunning, CprError, NoCheckpoint, WrongState
from tests.bench import Bench

DOCUMENT = Path(__file__).parent.parent.parent / "docs/run-states.md"
UNSAVEABLE = [state for state, row in RUN_STATES.items() if not row.saves]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    bench = Bench(tmp_path)
    bench.define("web1")
    bench.vm(lambda vm: vm.start())
    return bench


@pytest.mark.parametrize("state", UNSAVEABLE)
def test_check_save_and_upgrade_give_one_reason(bench: Bench, state: RunState) -> None:
    bench.qemu().status = "nonsense" if state is RunState.UNKNOWN else str(state)

    async def story(manager: Manager) -> None:
        problem = RUN_STATES[state].problem
        with pytest.raises(WrongState, match=problem.partition("(")[0]) as caught:
            await manager.vm("web1").save(SaveRequest())
        found = [one for one in await manager.vm_findings("web1") if one.severity == "error"]
        assert [(one.what, one.remedy) for one in found] == [(caught.value.what, caught.value.remedy)]
        sorted_out = await triage([manager.vm("web1")], Survives.QEMU_RESTART, Policy.ALL_OR_NOTHING)
        refused = [error.what for _, error in sorted_out.refused]
        assert refused == ([] if state is RunState.SHUTDOWN else [caught.value.what])

    bench.run(story)


@pytest.mark.parametrize("state", RUN_STATES)
def test_resume_and_load_do_what_the_table_says(bench: Bench, state: RunState) -> None:
    if state is RunState.UNKNOWN:
        return
    bench.qemu().status = str(state)

    async def story(manager: Manager) -> None:
        vm = manager.vm("web1")
        with pytest.raises(NoCheckpoint if RUN_STATES[state].loads else AlreadyRunning):
            await vm.load(LoadRequest())
        if RUN_STATES[state].resumes:
            await vm.resume()
            assert bench.qemu().status == "running"
        else:
            with pytest.raises(CprError, match="nothing to resume"):
                await vm.resume()
            assert bench.qemu().status == str(state)

    bench.run(story)


def test_the_document_has_the_table() -> None:
    text = DOCUMENT.read_text()
    for state, row in RUN_STATES.items():
        saved = "yes" if row.saves else f"no: {row.problem}"
        answers = ("yes" if yes else "no" for yes in (row.resumes, row.loads))
        assert f"| {' | '.join((f'`{state}`', row.shown, saved, *answers))} |\n" in text
