"""How far two greedy runs give the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    requests: int
    equal_requests: int
    share_before_divergence: float  # of all tokens: those before a request's first difference
    share_of_tokens: float  # of all tokens: those equal at their place, by chance after a difference


def agreement(outputs: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Agreement:
    total = before = same = equal = 0
    for tokens, expected in zip(outputs, reference, strict=True):
        matches = [token == other for token, other in zip(tokens, expected, strict=True)]
        total += len(matches)
        same += sum(matches)
        before += matches.index(False) if False in matches else len(matches)
        equal += all(matches)
    return Agreement(len(outputs), equal, before / total, same / total)
