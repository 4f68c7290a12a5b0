import pytest

from adapters.learner import warmup_cosine


def test_schedule() -> None:
    factors = [warmup_cosine(step, 20, 0.2) for step in range(20)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert warmup_cosine(0, 1, 0.0) == 1.0
