# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU that answers slowly each time uses up the time that it has for all answers together."""

from __future__ import annotations

from cpr_agent.vm.patience import CREDIT_S, SHARE, Patience


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_slow_answers_are_waited_for_in_all_no_longer_than_the_credit() -> None:
    clock = Clock()
    patience = Patience(clock)
    waited = 0.0
    for _ in range(100):
        slow = min(28.0, patience.left_s())
        clock.now += slow
        patience.waited(slow)
        waited += slow
    assert waited <= CREDIT_S / (1 - SHARE) + 1


def test_quick_answers_cost_nothing_that_does_not_come_back() -> None:
    clock = Clock()
    patience = Patience(clock)
    for _ in range(10_000):
        clock.now += 0.1
        patience.waited(0.005)
    assert patience.left_s() > CREDIT_S - 0.1


def test_credit_comes_back_with_time_and_has_an_end() -> None:
    clock = Clock()
    patience = Patience(clock)
    patience.waited(CREDIT_S * 2)
    assert patience.left_s() == 0.0
    clock.now += 50.0
    assert patience.left_s() == 50.0 * SHARE
    clock.now += 1e6
    assert patience.left_s() == CREDIT_S
