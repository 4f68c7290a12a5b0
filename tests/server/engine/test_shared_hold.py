"""Several answers, one hold: made by the first, let go by the last."""

import asyncio
from contextlib import ExitStack

import pytest

from server.engine.shared_hold import SharedHold
from server.errors import AdapterNotFound
from server.lora.adapter import Adapter
from server.lora.cache import Found
from server.lora.tier import AdapterTier


class Name:
    """What a name means, and who holds that."""

    def __init__(self) -> None:
        self.num_holds = self.num_held = 0
        self.fails = 0

    async def hold(self, held: ExitStack) -> Found:
        self.num_holds += 1
        await asyncio.sleep(0)
        if self.fails:
            self.fails -= 1
            raise AdapterNotFound("a")
        self.num_held += 1
        held.callback(self._let_go)
        adapter = Adapter("a", "1", self.num_holds, "", 1, (), {}, 0, 0)  # another generation each time
        return [(adapter, AdapterTier.HOST)]

    def _let_go(self) -> None:
        self.num_held -= 1


async def test_the_first_holds_for_all_and_the_last_lets_go() -> None:
    name, answers = Name(), [ExitStack() for _ in range(3)]
    with SharedHold(3) as shared:
        adapters = await asyncio.gather(*[shared.adapters(held, name.hold) for held in answers])
        assert {adapter.generation for [(adapter, _)] in adapters} == {1}
        for left, held in enumerate(answers, start=-len(answers) + 1):
            assert name.num_held == 1
            held.close()
            assert name.num_held == bool(left)
        assert shared._adapters is None
    assert (name.num_holds, name.num_held) == (1, 0)


async def test_answers_that_never_began_hold_nothing() -> None:
    name, answer = Name(), ExitStack()
    with SharedHold(3) as shared:
        await shared.adapters(answer, name.hold)
        answer.close()
        assert name.num_held == 1
    assert name.num_held == 0


async def test_who_fails_leaves_it_to_the_next() -> None:
    name, answers = Name(), [ExitStack() for _ in range(2)]
    name.fails = 1
    with SharedHold(2) as shared:
        with pytest.raises(AdapterNotFound):
            await shared.adapters(answers[0], name.hold)
        answers[0].close()
        await shared.adapters(answers[1], name.hold)
        assert name.num_held == 1
        answers[1].close()
        assert name.num_held == 0
