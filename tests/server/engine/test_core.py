"""When the engine gives out what it has made: beside the next step's computing, and at once when nothing follows."""

from pathlib import Path
from typing import Any

from server.engine.request import TokenOutput
from tests.server.engine.conftest import Engine


def given_out(engine: Engine) -> list[str]:
    """What happens from now on, in order: a forward's native calls that begin, and outputs by their requests."""
    happened: list[str] = []
    run = engine.parts.runner.run

    def watched(batch: Any, computing: Any) -> Any:
        def begin() -> None:
            happened.append("computing")
            computing()

        return run(batch, begin)

    def emit(outputs: list[TokenOutput]) -> None:
        happened.append(",".join(str(output.request_id) for output in outputs))

    engine.parts.runner.run = watched  # type: ignore[assignment, method-assign]
    engine.core.connect(emit)
    return happened


def test_tokens_go_out_when_the_next_step_computes_and_the_last_at_once(model_dir: Path) -> None:
    engine = Engine(model_dir)
    happened = given_out(engine)
    request_id = engine.submit([5, 6, 7], max_tokens=3, ignore_eos=True)
    engine.run()
    token = str(request_id)
    assert happened == ["computing", "computing", token, "computing", token, token]


def test_nothing_waits_when_a_step_fails(model_dir: Path) -> None:
    engine = Engine(model_dir)
    happened = given_out(engine)
    request_id = engine.submit([5, 6, 7], max_tokens=3, ignore_eos=True)
    engine.core.step()
    assert happened == ["computing"]
    engine.parts.runner.run = None  # type: ignore[assignment]
    engine.core.step()
    assert happened == ["computing", f"{request_id},{request_id}"]
