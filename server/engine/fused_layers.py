"""Fused forwards that a decoder layer may have; see `fused_forwards`. Engine thread, once at start."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from server.engine.recorded_forward import Forward
from server.kernels.native_fused import add


def decoder_layers(module: nn.Module, parts: Sequence[Forward], norms: Collection[Any]) -> Iterator[Forward]:
    """Attention and feed-forward with norms around them, one after the other or both from the layer's input.

    Args:
        parts: what the layer calls, in that order; modules are called as such, so that whatever forwards they get later
            are theirs here too.
        norms: those of them that are norms.
    """
    inner = [index for index, part in enumerate(parts) if part not in norms]
    if len(inner) != 2 or len(parts) == 2:
        return
    attention, feed_forward = inner
    factor = float(getattr(module, "residual_multiplier", 1))
    yield from _in_turn(parts, attention, feed_forward, factor)
    if attention == 1 and feed_forward == len(parts) - 1:
        yield _side_by_side(parts[0], parts[1], parts[2:-1], parts[-1], factor)


def _in_turn(parts: Sequence[Forward], attention: int, feed_forward: int, factor: float) -> Iterator[Forward]:
    """The first sum may stand before or after any norm between the two; a norm right after it takes it along."""
    for sum_at in range(attention + 1, feed_forward + 1):
        after, rest = parts[attention + 1 : sum_at], list(parts[sum_at:])
        first_sum = rest.pop(0) if sum_at < feed_forward and factor == 1 else partial(_sum, factor=factor)
        yield _one_after_the_other(parts[:attention], parts[attention], after, first_sum, rest, factor)


def _one_after_the_other(
    before: Sequence[Forward],
    attention: Forward,
    after: Sequence[Forward],
    first_sum: Forward,
    rest: Sequence[Forward],
    factor: float,
) -> Forward:
    """x += factor * after(attention(before(x))), x += factor * rest(x), into the layer's own input."""

    def forward(hidden_states: Tensor, *_: None, **kwargs: Any) -> Tensor:
        x, _ = attention(_chained(before, hidden_states), **kwargs)
        x = first_sum(_chained(after, x), residual=hidden_states)
        return _sum(_chained(rest, x), hidden_states, factor)

    return forward


def _side_by_side(
    norm: Forward, attention: Forward, second_norm: Sequence[Forward], feed_forward: Forward, factor: float
) -> Forward:
    """x += factor * (attention(norm(x)) + feed_forward(norm(x) or second_norm(x))), into the layer's own input."""

    def forward(hidden_states: Tensor, *_: None, **kwargs: Any) -> Tensor:
        x = norm(hidden_states)
        attended, _ = attention(x, **kwargs)
        y = feed_forward(_chained(second_norm, hidden_states) if second_norm else x)
        return _sum(y, _sum(attended, hidden_states, factor), factor)

    return forward


def _sum(x: Tensor | tuple[Tensor, ...], residual: Tensor, factor: float) -> Tensor:
    """Of a feed-forward that gives more than x, as its router's scores, x alone."""
    return add(x if isinstance(x, Tensor) else x[0], residual, factor)


def _chained(forwards: Sequence[Forward], x: Tensor) -> Any:
    for forward in forwards:
        x = forward(x)
    return x
