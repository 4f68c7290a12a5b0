"""The check of a churn: that no request noticed.

Each answer of a name that came and went must name weights that held the name at some moment between its sending and
its first token. Every answer, those of the bystanders too, must name the same weights in every message, and hold
exactly the tokens that these weights gave when nothing else ran. Pure.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.client import CallResult
from loadtest.histogram import percentile

References = dict[tuple[str, int], tuple[int, ...]]  # (digest, prompt) -> tokens

_BLIND = (
    "every adapter that the names were loaded from has the same weights, so an answer of weights that were replaced "
    "looks like a right one: the server needs two adapters that differ"
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One call to the Adapters service; times by time.monotonic()."""

    kind: str  # load, replace or unload
    name: str
    asked: float
    answered: float
    generation: int = 0  # now under the name; 0 after an unload
    digest: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ChurnReview:
    """What the check found."""

    checked: int  # answers of the names that came and went
    refused: frozenset[int]  # indices of results that rightly were NOT_FOUND: the name was away
    faults: tuple[str, ...]
    operations: tuple[Operation, ...]
    bystanders: int = 0  # answers of all others that were checked
    warning: str = ""  # what the check cannot see on this server

    def summary(self) -> dict[str, Any]:
        """For the report."""
        kinds: dict[str, list[float]] = {}
        for operation in self.operations:
            kinds.setdefault(operation.kind, []).append(operation.answered - operation.asked)
        return {
            "checked": self.checked,
            "bystanders_checked": self.bystanders,
            "warning": self.warning,
            "refused_while_unloaded": len(self.refused),
            "faults": list(self.faults),
            "operations": {
                kind: {"count": len(seconds), "p50": percentile(seconds, 50), "max": max(seconds)}
                for kind, seconds in sorted(kinds.items())
            },
        }


def review(
    results: Sequence[CallResult],
    names: Collection[str],
    operations: Sequence[Operation],
    references: References,
    digests: Collection[str],
) -> ChurnReview:
    """Holds every answer against the operations and the references.

    Args:
        names: of the adapters that came and went.
        digests: of the weights that they were loaded from.
    """
    faults = [operation.error for operation in operations if operation.error]
    histories: dict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        histories[operation.name].append(operation)
    checked, bystanders, refused = 0, 0, set()
    for index, result in enumerate(results):
        if result.adapter in names:
            checked += 1
        else:
            bystanders += 1
        history = histories.get(result.adapter, [])
        if result.code == "NOT_FOUND" and _was_absent(history, result):
            refused.add(index)
        elif fault := _fault(result, history if result.adapter in names else None, references):
            faults.append(f"{result.adapter}, request {result.request_id}: {fault}")
    if not checked:
        faults.append("no request went to an adapter that came and went, so nothing was checked")
    warning = "" if len(set(digests)) > 1 else _BLIND
    return ChurnReview(checked, frozenset(refused), tuple(faults), tuple(operations), bystanders, warning)


def _fault(result: CallResult, history: list[Operation] | None, references: References) -> str:
    """What is wrong with an answer; empty: nothing. A bystander has no history."""
    if not result.ok:
        return f"failed with {result.code}: {result.details}"
    if not result.same_weights:
        return "its messages name different generations"
    if result.adapter and not result.generation:
        return "the base model answered"
    if history is not None and (fault := _not_held(history, result)):
        return fault
    reference = references.get((result.digest, int(result.request_id)))
    if reference is None:
        return f"digest {result.digest[:12]} has no reference: its files changed after the references were taken"
    if result.token_ids != reference:
        return f"tokens are not those of generation {result.generation} alone"
    return ""


def _not_held(history: list[Operation], result: CallResult) -> str:
    """How the weights that answered did not hold the name in time; empty: they did."""
    written = [index for index, operation in enumerate(history) if operation.generation == result.generation]
    if not written:
        return f"generation {result.generation} never had the name"
    first_token = result.due + (result.first_token or result.total)
    asked, until = history[written[0]].asked, _answered(history, written[0] + 1)
    if not (asked <= first_token and until >= result.due + result.lateness):
        return f"generation {result.generation} did not have the name between the request and its first token"
    if result.digest != history[written[0]].digest:
        return f"generation {result.generation} answered with digest {result.digest[:12]}"
    return ""


def _answered(history: list[Operation], index: int) -> float:
    return history[index].answered if index < len(history) else float("inf")


def _was_absent(history: list[Operation], result: CallResult) -> bool:
    """Whether the name was away at some moment of a request's life."""
    return any(
        operation.kind == "unload"
        and operation.asked <= result.ended
        and _answered(history, index + 1) >= result.due + result.lateness
        for index, operation in enumerate(history)
    )
