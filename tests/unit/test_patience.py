# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that answers slowly each time uses up the time that it has for all answers together."""

from __future__ import annotations

import pytest

from cpr_agent.vm.patience import CREDIT_S, SHARE, SHORTEST_S, Patience


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_slow_answers_are_waited_for_in_all_hardly_longer_than_the_credit() -> None:
    clock = Clock()
    patience = Patience(clock)
    waited = 0.0
    while (slow := min(28.0, patience.next_s())) > 2 * SHORTEST_S:
        clock.now += slow
        patience.waited(slow)
        waited += slow
    assert waited <= 1.2 * CREDIT_S


@pytest.mark.parametrize("takes_s", [0.005, SHORTEST_S])
def test_answers_that_take_no_longer_than_any_may_cost_nothing(takes_s: float) -> None:
    """Half a second is what an answer takes on a host that has far too much to do."""
    clock = Clock()
    patience = Patience(clock)
    for _ in range(10_000):
        clock.now += takes_s
        patience.waited(takes_s)
    assert patience.next_s() == CREDIT_S


def test_credit_comes_back_with_time_and_has_an_end() -> None:
    clock = Clock()
    patience = Patience(clock)
    patience.waited(CREDIT_S * 2)
    assert patience.next_s() == SHORTEST_S
    clock.now += 50.0
    assert patience.next_s() == 50.0 * SHARE
    clock.now += 1e6
    assert patience.next_s() == CREDIT_S
