"""When to merge an adapter without being asked, and when to take it out again. Plain Python; engine thread only.

A merged adapter saves its own tokens the bypass and costs everybody else's tokens the same bypass, with a factor of −1.
Both are one function of the number of tokens, measured at the start and corrected by the steps that run. Merging takes
time too, so this is renting or buying skis: an adapter is merged once going on without it would have cost as much as
merging twice, and taken out once having it in has cost as much as a merge. What all this may lose against never merging
is bounded at any time: no merge begins unless losses stay within `MAX_LOSS` of the engine's working time even if it is
for nothing, and costs as much again until it is taken out.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from server.engine.request import Request
from server.lora.adapter import Adapter

MIN_SHARE = 0.9  # of all requests, running and waiting, that an adapter must have to be merged
MAX_LOSS = 0.03  # of the engine's working time
MAX_COMPARED_TOKENS = 64  # larger steps differ by more than a bypass
MAX_CORRECTION = 3.0  # times what was measured at the start, that a bypass may cost in steps
_NEW = 0.05  # weight of a new measurement in a running mean


@dataclass(frozen=True, slots=True)
class MergeCosts:
    """What was measured on this machine before the first request, for an adapter of `adapter_bytes`."""

    bypass_seconds: Sequence[tuple[int, float]]  # (tokens of a step, seconds of its bypasses), tokens rising
    merge_seconds: float
    adapter_bytes: int

    def bypass(self, adapter: Adapter, num_tokens: int) -> float:
        """Seconds, interpolated between measurements and going on beyond them, in proportion to the adapter's size."""
        points = [(0, 0.0), *self.bypass_seconds]
        above = next((index for index, (tokens, _) in enumerate(points) if tokens >= num_tokens), len(points) - 1)
        above = max(above, 1)
        (low, low_seconds), (high, high_seconds) = points[above - 1], points[above]
        seconds = low_seconds + (high_seconds - low_seconds) * (num_tokens - low) / (high - low)
        return seconds * adapter.num_bytes / self.adapter_bytes


class MergePolicy:
    """Owns the balance of what merging saves and costs."""

    def __init__(self, costs: MergeCosts) -> None:
        self.costs = costs
        self._merge_seconds = costs.merge_seconds
        self._refused: set[Adapter] = set()
        self._favourite: Adapter | None = None  # the merged adapter, else the one with most tokens
        self._evidence = 0.0  # seconds that speak for a switch: for merging the favourite, or for taking it out
        self._balance = 0.0  # seconds saved since the start, less those lost
        self._worked = 0.0  # seconds of all steps
        # Mean seconds of steps with the favourite's tokens alone, by their number, without it merged and with.
        self._means: dict[int, list[float | None]] = {}

    def observe(self, step: Iterable[tuple[Adapter | None, int]], seconds: float, merged: Adapter | None) -> None:
        """Takes note of a step: the number of tokens of each request with its sole adapter if any, and its time."""
        self._worked += seconds
        tokens: Counter[Adapter | None] = Counter()
        for adapter, num_tokens in step:
            tokens[adapter] += num_tokens
        if merged is None:
            mergeable = (adapter for adapter in tokens if adapter and self._may_gain(adapter))
            self._favour(max(mergeable, key=tokens.__getitem__, default=None))
        favourite, total = self._favourite, tokens.total()
        if favourite is None:
            return
        own = tokens[favourite]
        if own == total <= MAX_COMPARED_TOKENS:
            means = self._means.setdefault(total, [None, None])
            mean = means[merged is not None]
            means[merged is not None] = seconds if mean is None else mean + _NEW * (seconds - mean)
        bypass = self.costs.bypass
        saved = self._corrected(bypass(favourite, own) - bypass(favourite, total - own), merged)
        if merged is not None:
            self._balance += saved
        self._evidence = max(0.0, self._evidence + (saved if merged is None else -saved))

    def decide(self, requests: Iterable[Request], merged: Adapter | None) -> Adapter | None:
        """The adapter that should be merged from here on, given all requests that run or wait."""
        if merged is not None:
            return None if self._evidence > self._merge_seconds else merged
        if self._favourite is None or self._evidence < 2 * self._merge_seconds:
            return None
        if 2 * self._merge_seconds - self._balance > MAX_LOSS * self._worked:
            return None
        counts = Counter(request.sole_adapter is self._favourite for request in requests)
        return self._favourite if counts[True] >= MIN_SHARE * counts.total() > 0 else None

    def switched(self, merged: Adapter | None, seconds: float) -> None:
        """An adapter was merged, or with None taken out, in so much time."""
        self._balance -= seconds
        self._evidence = 0.0
        if merged is not None:
            self._favour(merged)
            self._merge_seconds += _NEW * (seconds - self._merge_seconds)

    def refused(self, adapter: Adapter) -> None:
        """An adapter cannot be merged: it is not asked for again."""
        self._refused.add(adapter)
        self._favour(None)

    def forget(self, adapter: Adapter) -> None:
        """An adapter has left: its weights must not be kept alive here."""
        self._refused.discard(adapter)
        if adapter is self._favourite:
            self._favour(None)

    def _favour(self, adapter: Adapter | None) -> None:
        if adapter is not self._favourite:
            self._favourite, self._evidence, self._means = adapter, 0.0, {}

    def _may_gain(self, adapter: Adapter) -> bool:
        """aLoRA's tokens before the invocation take no bypass until it is merged, and a correction then."""
        return adapter not in self._refused and not adapter.invocation_tokens

    def _corrected(self, saved: float, merged: Adapter | None) -> float:
        """Seconds that a step has saved, negative if lost, by what bypasses have cost in steps with the favourite.

        Before the same step was seen with it merged and without, a merge counts at its worst: gains for nothing.
        """
        correction = self._correction()
        if correction is None:
            correction = 1.0 if merged is None else MAX_CORRECTION if saved < 0 else 0.0
        return correction * saved

    def _correction(self) -> float | None:
        """What bypasses cost in steps, as a multiple of what was measured at the start; None: not known yet."""
        saved = expected = 0.0
        for num_tokens, (apart, merged) in self._means.items():
            if apart is not None and merged is not None and self._favourite is not None:
                saved += apart - merged
                expected += self.costs.bypass(self._favourite, num_tokens)
        return min(MAX_CORRECTION, max(0.0, saved / expected)) if expected else None
