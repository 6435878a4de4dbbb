# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge of power cuts: it must see what must not happen, and not cry wolf at lines that a cut took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.judge import (
    Boot,
    Fate,
    Harm,
    Judgement,
    Kind,
    check_order,
    expect_upgrade,
    judge_guest,
    judge_store,
    judge_told,
    parse,
    phase,
    read_boot,
)

A, B = "aaaa", "bbbb"


def lines(boot: str, first: int, last: int, bad: int = 0) -> bytes:
    return b"".join(b"cpr-guest boot=%s count=%d bad=%d\n" % (boot.encode(), n, bad) for n in range(first, last + 1))


def judge(kind: Kind, before: bytes, after: bytes, *, saved: bool = True) -> Judgement:
    boot = Boot(kind, {"one": len(before)}, {"one": "checkpoint"} if saved else {})
    (judgement,) = judge_guest("one", before + after, [boot])
    return judgement


def harms(judgement: Judgement) -> list[Harm]:
    return [problem.harm for problem in judgement.problems]


def test_saved_guest_that_goes_on_is_restored() -> None:
    judgement = judge(Kind.KEXEC, lines(A, 1, 5), lines(A, 6, 9))
    assert (judgement.fate, judgement.problems) == (Fate.RESTORED, ())


def test_line_that_a_kexec_breaks_in_two_is_one_line() -> None:
    log = lines(A, 1, 9)
    for at in range(len(lines(A, 1, 5)), len(lines(A, 1, 6)) + 1):
        assert judge(Kind.KEXEC, log[:at], log[at:]) == Judgement(Fate.RESTORED, judge_text(log, at))


def judge_text(log: bytes, at: int) -> str:
    first = 6 if at < len(lines(A, 1, 6)) else 7
    return f"restored as {A}, from {first - 1} to {first}, now {parse(log)[-1].count}"


def test_lines_may_be_missing_at_a_cut_and_nowhere_else() -> None:
    assert judge(Kind.CUT, lines(A, 1, 5), lines(A, 30, 40)).problems == ()
    assert harms(judge(Kind.KEXEC, lines(A, 1, 5), lines(A, 30, 40))) == [Harm.CORRUPTED]
    assert harms(judge(Kind.CUT, lines(A, 1, 5), lines(A, 6, 9) + lines(A, 12, 15))) == [Harm.CORRUPTED]


def test_what_a_cut_tore_is_not_joined_to_a_line_that_nobody_said() -> None:
    torn = lines(A, 1, 5) + b"cpr-guest boot=aaaa count=1"
    judgement = judge(Kind.CUT, torn, b"5 bad=7\n" + lines(A, 16, 20))
    assert (judgement.fate, judgement.problems) == (Fate.RESTORED, ())


def test_lines_may_be_missing_where_a_cut_left_nuls() -> None:
    judgement = judge(Kind.CUT, lines(A, 1, 5) + b"\0" * 90 + lines(A, 9, 11), lines(A, 30, 40))
    assert (judgement.fate, judgement.problems) == (Fate.RESTORED, ())


def test_guest_that_was_not_saved_starts_afresh() -> None:
    judgement = judge(Kind.CUT, lines(A, 1, 5), lines(B, 1, 5), saved=False)
    assert (judgement.fate, judgement.problems) == (Fate.COLD_STARTED, ())


def test_saved_guest_that_starts_afresh_is_lost() -> None:
    assert harms(judge(Kind.CUT, lines(A, 1, 5), lines(B, 1, 5))) == [Harm.LOST]


def test_nobody_is_lost_over_a_kexec_saved_or_not() -> None:
    assert Harm.LOST in harms(judge(Kind.KEXEC, lines(A, 1, 5), lines(B, 1, 5), saved=False))


def test_guest_that_goes_on_without_a_checkpoint_was_loaded_twice() -> None:
    assert harms(judge(Kind.CUT, lines(A, 1, 5), lines(A, 6, 9), saved=False)) == [Harm.LOADED_TWICE]


@pytest.mark.parametrize("kind", Kind)
def test_counter_that_goes_back_was_loaded_twice(kind: Kind) -> None:
    assert harms(judge(kind, lines(A, 1, 50), lines(A, 40, 60))) == [Harm.LOADED_TWICE]


def test_guest_that_finds_its_memory_changed_is_corrupted() -> None:
    assert harms(judge(Kind.CUT, lines(A, 1, 5), lines(A, 6, 7, bad=3))) == [Harm.CORRUPTED] * 2


def test_guest_that_is_started_again_within_one_boot_is_lost() -> None:
    assert harms(judge(Kind.CUT, lines(A, 1, 5), lines(A, 6, 7) + lines(B, 1, 2))) == [Harm.LOST]


def test_boot_that_was_cut_before_a_guest_spoke_is_passed_over() -> None:
    before, after = lines(A, 1, 5), lines(A, 6, 9)
    seen = {"one": len(before)}
    boots = [Boot(Kind.KEXEC, seen, {"one": "c"}), Boot(Kind.CUT, seen, {"one": "c"})]
    silent, restored = judge_guest("one", before + after, boots)
    assert (silent.fate, restored.fate, restored.problems) == (None, Fate.RESTORED, ())


def test_from_outside_guests_are_told_apart_and_lines_may_be_missing() -> None:
    log = lines(A, 5, 5) + lines(B, 1, 1) + lines(A, 10, 10) + lines(B, 6, 6)
    assert check_order(parse(log), gaps=True) == []
    (problem,) = check_order(parse(log + lines(A, 7, 7)), gaps=True)
    assert problem.harm is Harm.LOADED_TWICE


def test_live_checkpoint_of_a_guest_that_has_run_is_seen() -> None:
    events = tuple({"vm": "one", "checkpoint": "c", "event": event} for event in ("save-begin", "saved", "resume"))
    boot = Boot(Kind.CUT, saved={"one": "c"}, events=events)
    assert judge_store(boot) == []
    ran = Boot(Kind.CUT, saved={"one": "c"}, events=(*events, {**events[0], "event": "resumed"}))
    assert [problem.harm for problem in judge_store(ran)] == [Harm.LOADED_TWICE]


def upgrade_came_to(kind: Kind, *phases: str, **facts: str) -> Boot:
    return Boot(kind, saved={"one": "c"}, events=tuple({"event": f"upgrade-{p}", "upgrade": "u", **facts} for p in phases))


@pytest.mark.parametrize("came_to", ["saving", "saved", "committing", "rolling-back"])
def test_upgrade_that_a_cut_ended_is_rolled_back_and_says_why(came_to: str) -> None:
    reason = f"the host went down while {came_to}, and was not started by a kexec"
    assert expect_upgrade(upgrade_came_to(Kind.CUT, "checking", came_to)) == ("rolled-back", reason)


def test_upgrade_that_came_through_its_kexec_is_done() -> None:
    assert expect_upgrade(upgrade_came_to(Kind.KEXEC, "committing")) == ("done", "")
    assert expect_upgrade(upgrade_came_to(Kind.CUT, "committing", "loading", interrupted="")) == ("done", "")


def test_cut_while_guests_are_loaded_leaves_the_upgrade_what_it_was() -> None:
    assert expect_upgrade(upgrade_came_to(Kind.CUT, "loading", interrupted="why")) == ("rolled-back", "why")
    assert expect_upgrade(upgrade_came_to(Kind.CUT, "done", reason="another kernel")) == ("done", "another kernel")
    assert expect_upgrade(upgrade_came_to(Kind.CUT, "checking")) == ("refused", "the agent was interrupted")
    assert expect_upgrade(Boot(Kind.CUT)) is None
    elsewhere = upgrade_came_to(Kind.CUT, "loading", interrupted="", kernel_to="6.12.2")
    assert expect_upgrade(elsewhere, "6.12.2") == ("done", "")
    assert expect_upgrade(elsewhere, "6.12.1") == ("done", "the host runs kernel 6.12.1, planned was 6.12.2")


def test_agent_that_takes_a_cut_for_a_kexec_is_seen() -> None:
    cut = upgrade_came_to(Kind.CUT, "committing")
    phase_told, reason = expect_upgrade(cut) or ("", "")
    assert judge_told(cut, {"phase": phase_told, "reason": reason, "loaded": ["one"]}, {"c": False}) == []
    told = judge_told(cut, {"phase": "done", "reason": "", "loaded": ["one"]}, {"c": True})
    assert [problem.harm for problem in told] == [Harm.MISTOLD] * 2
    assert [problem.harm for problem in judge_told(cut, {}, {})] == [Harm.MISTOLD] * 3


def test_guest_that_is_left_out_of_its_upgrade_is_seen() -> None:
    boot = upgrade_came_to(Kind.KEXEC, "committing")
    (problem,) = judge_told(boot, {"phase": "done", "reason": "", "loaded": []}, {"c": True})
    assert "leaves one out" in problem.text


def test_notes_of_a_boot_are_read(tmp_path: Path) -> None:
    record = json.dumps({"n": 0, "vm": "one", "event": "saved", "checkpoint": "c"})
    files = {
        "kind": "cut\n",
        "sizes": "/srv/consoles/one.log 120\n",
        "listing": "/var/lib/cpr-agent:\njournal\njournal.damaged-17\n",
        "one.manifest": json.dumps({"sha256": "", "manifest": {"id": "c"}}),
        "two.manifest": "{",
        "journal": f"0123456789abcdef {record}\n0123 {{",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    boot = read_boot(tmp_path)
    assert (boot.kind, boot.sizes, boot.saved) == (Kind.CUT, {"one": 120}, {"one": "c", "two": ""})
    assert boot.damaged == ("a manifest of two that can't be read", "journal.damaged-17")
    assert phase(boot) == "one saved (checkpoint is live)"
