"""What of a prompt comes from the prefix cache, as clients are told: never what others with another key computed."""

from typing import Any

from server.pb.loraplex.v1 import inference_pb2 as pb
from server.pb.loraplex.v1.adapters_pb2 import LoadAdapterRequest
from tests.server.rpc.conftest import Running

PROMPT = "p" * 50  # three whole blocks, and a bit


async def cached_tokens(running: Running, mix: dict[str, float] | None = None, **fields: Any) -> int:
    parts = [pb.AdapterWeight(adapter=name, weight=weight) for name, weight in (mix or {}).items()]
    request = pb.GenerateRequest(prompt=PROMPT, sampling=pb.SamplingParams(max_tokens=1), mix=parts, **fields)
    answer: pb.GenerateResponse = await running.inference.Generate(request)
    return answer.usage.cached_tokens


async def test_a_prefix_is_shared_under_one_salt(running: Running) -> None:
    assert await cached_tokens(running) == 0
    assert await cached_tokens(running) == 48
    assert await cached_tokens(running, cache_salt="mine") == 0
    assert await cached_tokens(running, cache_salt="mine") == 48
    assert await cached_tokens(running, cache_salt="yours") == 0
    assert await cached_tokens(running) == 48


async def test_a_salt_keeps_users_of_one_adapter_apart(running: Running) -> None:
    assert await cached_tokens(running, adapter="plain", cache_salt="mine") == 0
    assert await cached_tokens(running, adapter="plain", cache_salt="yours") == 0
    assert await cached_tokens(running, adapter="plain") == 0
    assert await cached_tokens(running, adapter="plain", cache_salt="mine") == 48


async def test_a_prefix_is_shared_under_the_same_weights(running: Running) -> None:
    """A mixture is its adapters, their order and their weights; a scale is a weight."""
    assert await cached_tokens(running, {"plain": 0.5, "attention": 1}) == 0
    assert await cached_tokens(running, {"plain": 0.5, "attention": 1}) == 48
    assert await cached_tokens(running, {"plain": 0.5, "attention": 0.9}) == 0
    assert await cached_tokens(running, {"attention": 1, "plain": 0.5}) == 0
    assert await cached_tokens(running, {"plain": 0.5}) == 0
    assert await cached_tokens(running, adapter="plain") == 0
    assert await cached_tokens(running, adapter="plain", adapter_scale=0.5) == 48


async def test_an_adapter_that_is_loaded_anew_finds_nothing(running: Running) -> None:
    assert await cached_tokens(running, adapter="plain") == 0
    await running.adapters.LoadAdapter(LoadAdapterRequest(name="plain", replace=True))
    assert await cached_tokens(running, adapter="plain") == 0
    assert await cached_tokens(running, adapter="plain") == 48
