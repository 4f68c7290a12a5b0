"""When to merge: a simulated engine whose steps cost what the policy was told, or something else."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from server.engine.merge_policy import MAX_LOSS, MergeCosts, MergePolicy
from server.engine.request import Request, SamplingParams
from server.lora.adapter import Adapter, WeightedAdapter

COSTS = MergeCosts([(1, 1e-3), (4, 1.3e-3), (16, 2e-3), (64, 6e-3)], merge_seconds=0.05, adapter_bytes=1000)
STEP = 0.02  # seconds of a step without bypasses


def adapter(name: str, num_bytes: int = 1000, **settings: Any) -> Adapter:
    return Adapter(name, "1", 1, "", 8, (), {}, num_bytes, 0, **settings)


A, B = adapter("a"), adapter("b")


def request(on: Adapter | None, weight: float = 1.0) -> Request:
    return Request(0, [1], SamplingParams(), [WeightedAdapter(on, weight)] if on else [], frozenset())


class Simulation:
    """Steps of one token a request; `real` times the bypass costs what the policy believes."""

    def __init__(self, real: float = 1.0) -> None:
        self.policy, self.real = MergePolicy(COSTS), real
        self.merged: Adapter | None = None
        self.switches = 0
        self.seconds = self.seconds_without = 0.0

    def step(self, requests: Sequence[Request], waiting: Sequence[Request] = ()) -> None:
        users = [item.sole_adapter for item in requests]
        bypasses = sum(COSTS.bypass(on, users.count(on)) for on in {*users} if on and on is not self.merged)
        without = sum(COSTS.bypass(on, users.count(on)) for on in {*users} if on)
        if self.merged:
            bypasses += COSTS.bypass(self.merged, sum(on is not self.merged for on in users))
        self.seconds += STEP + self.real * bypasses
        self.seconds_without += STEP + self.real * without
        self.policy.observe([(on, 1) for on in users], STEP + self.real * bypasses, self.merged)
        wanted = self.policy.decide([*requests, *waiting], self.merged)
        if wanted is not self.merged:
            seconds = COSTS.merge_seconds if wanted else 0.0
            self.merged, self.switches = wanted, self.switches + 1
            self.seconds += seconds
            self.policy.switched(wanted, seconds)

    def check_losses(self) -> None:
        """They are bounded at any time, but for what one step may cost before the policy hears of it."""
        one_step = self.real * COSTS.bypass(A, 16)
        assert self.seconds - self.seconds_without <= MAX_LOSS * self.seconds + one_step


def test_costs_between_and_beyond_measurements() -> None:
    assert COSTS.bypass(A, 0) == 0
    assert COSTS.bypass(A, 1) == pytest.approx(1e-3)
    assert COSTS.bypass(A, 10) == pytest.approx(1.65e-3)
    assert COSTS.bypass(A, 112) == pytest.approx(10e-3)
    assert COSTS.bypass(adapter("twice", 2000), 16) == pytest.approx(4e-3)


def test_one_adapter_alone_is_merged_and_gains() -> None:
    simulation = Simulation()
    for _ in range(2000):
        simulation.step([request(A)] * 4)
    assert simulation.merged is A
    assert simulation.switches == 1
    assert simulation.seconds < simulation.seconds_without


def test_another_request_every_now_and_then_changes_nothing() -> None:
    simulation = Simulation()
    for step in range(3000):
        simulation.step([request(A)] * 15 + [request(B)] * (step % 100 == 0))
    assert simulation.merged is A
    assert simulation.switches == 1


@pytest.mark.parametrize("mixture", [[A, B] * 8, [A, None] * 8, [A] * 12 + [B] * 4])
def test_mixed_traffic_is_left_alone(mixture: list[Adapter | None]) -> None:
    simulation = Simulation()
    for _ in range(2000):
        simulation.step([request(on) for on in mixture])
    assert simulation.switches == 0


def test_a_queue_of_others_holds_a_merge_back() -> None:
    simulation = Simulation()
    for _ in range(2000):
        simulation.step([request(A)] * 4, waiting=[request(B)])
    assert simulation.switches == 0


def test_scaled_and_mixed_requests_are_others() -> None:
    simulation = Simulation()
    for _ in range(2000):
        simulation.step([request(A, weight=0.5)] * 4)
    assert simulation.switches == 0


def test_who_cannot_gain_is_never_merged() -> None:
    """An aLoRA's prompt takes no bypass while it is apart, and a correction while it is merged."""
    simulation = Simulation()
    on = adapter("on", invocation_tokens=(1,))
    for _ in range(2000):
        simulation.step([request(on)] * 4)
    assert simulation.switches == 0


def test_who_was_refused_is_not_asked_for_again() -> None:
    simulation = Simulation()
    simulation.policy.refused(A)
    for _ in range(2000):
        simulation.step([request(A)] * 4)
    assert simulation.switches == 0
    simulation.policy.forget(A)
    assert not simulation.policy._refused


def test_it_is_taken_out_when_traffic_turns() -> None:
    simulation = Simulation()
    for _ in range(1000):
        simulation.step([request(A)] * 4)
    for _ in range(200):
        simulation.step([request(A)] + [request(B)] * 4)
    assert simulation.merged is None
    for _ in range(2000):
        simulation.step([request(B)] * 4)
    assert simulation.merged is B


@pytest.mark.parametrize("real", [1.0, 0.0, 0.3, 3.0])
@pytest.mark.parametrize("length", [3, 40, 100, 400])
def test_the_worst_traffic_loses_little(length: int, real: float) -> None:
    """Phases of one adapter, then of everybody, just as long as it takes to merge for nothing."""
    simulation = Simulation(real)
    shuffled = random.Random(length)
    for phase in range(3000 // length):
        favourite, others = ((A, B), (B, A))[phase % 2]
        for _ in range(shuffled.randint(1, 2 * length)):
            simulation.step([request(favourite)] * 4)
            simulation.check_losses()
        for _ in range(shuffled.randint(1, length)):
            simulation.step([request(favourite)] + [request(others), request(None)] * 8)
            simulation.check_losses()


@pytest.mark.parametrize("real", [1.0, 0.0, 0.3, 3.0])
@pytest.mark.parametrize("num_alone", [0, 5])
def test_traffic_that_turns_at_every_merge_loses_little(num_alone: int, real: float) -> None:
    """One adapter alone until it is merged, and for a few steps more; then everybody else until it is taken out."""
    simulation = Simulation(real)
    since_merge = 0
    for _ in range(2000):
        since_merge = since_merge + 1 if simulation.merged else 0
        alone = since_merge <= num_alone
        simulation.step([request(A)] * 4 if alone else [request(B), request(None)] * 8)
        simulation.check_losses()
    assert simulation.switches > 5 or real == 0


def test_a_bypass_that_costs_nothing_after_all_is_noticed() -> None:
    """Merged steps are as slow as the others were: the gain that was promised does not count."""
    simulation = Simulation(real=0.0)
    for _ in range(500):
        simulation.step([request(A)] * 4)
    assert simulation.policy._correction() == pytest.approx(0.0, abs=0.05)
