"""A generation request and what flows around it. Plain data: no torch, any thread."""

import enum
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.adapter_metrics import MIXTURE
from server.engine.block_allocator import IdentityChange
from server.errors import InvalidRequest
from server.lora.adapter import Adapter, WeightedAdapter
from server.lora.tier import AdapterTier

GREEDY_BELOW = 1e-5


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to end. Values are checked where they come in (`server.rpc.sampling`)."""

    max_tokens: int = 128
    temperature: float = 0.0  # under GREEDY_BELOW: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None  # alternatives per token
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def filters(self) -> bool:
        """Whether unlikely tokens are left out."""
        return bool(self.top_k or self.min_p or self.top_p < 1)

    @property
    def changes_logits(self) -> bool:
        """Whether logits depend on more than the model: penalties, bias or a minimum length."""
        return bool(
            self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
            or self.logit_bias
            or self.min_tokens
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, logprob), the most likely first


class TokenOutput(NamedTuple):
    """What one step made for one request; the only thing that travels from the engine thread to the event loop."""

    request_id: int
    token_id: int | None  # None: the request ended without a token
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    num_cached_tokens: int = 0
    error: Exception | None = None
    time: float = 0.0  # when the step ended, of `time.monotonic`
    first_step: float = 0.0  # when the request's first step was scheduled
    tiers: tuple[AdapterTier, ...] = ()  # where each adapter of the request was found


class Request:
    """A request inside the engine. Owned by the scheduler from `add` to the end; engine thread only."""

    def __init__(
        self,
        request_id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        adapters: Sequence[WeightedAdapter],
        stop_token_ids: frozenset[int],
        cache_salt: str = "",
    ) -> None:
        """
        Raises:
            InvalidRequest: the adapters cannot be used so, or would do nothing for this prompt.
        """
        self.request_id = request_id
        self.params = params
        self.adapters = tuple(adapters)  # summed; none: the base model. Let go at the end
        self.identities = tuple(part.identity for part in adapters)  # of the adapters, for good
        self.stop_token_ids = stop_token_ids  # of the model and of the request, as far as they end this one
        self.token_ids = list(prompt_token_ids)  # prompt and output
        self.num_prompt_tokens = len(prompt_token_ids)
        self.adapted_from = _first_adapted_token(self.adapters, self.token_ids)
        # KV blocks are shared within an identity and never across. Generations are never reused; the adapter itself
        # would be kept alive by the blocks that remember it. Tokens before the adapters work are the base's.
        self.cache_identity: tuple[object, ...] = (cache_salt,)
        self.cache_change: IdentityChange | None = None
        adapted = (*((part.adapter.generation, part.weight) for part in self.adapters), cache_salt)
        if self.adapted_from:
            self.cache_change = IdentityChange(self.adapted_from, adapted)
        else:
            self.cache_identity = adapted
        self.random = random.Random(params.seed)
        self.status = RequestStatus.WAITING

        # Set by the scheduler.
        self.first_step = 0.0  # when it was first admitted, of `time.monotonic`
        self.num_computed_tokens = 0  # tokens whose K and V are in the cache
        self.block_table: list[int] = []
        self.shared_as: Hashable = None  # what its full blocks are known under; None: nobody else may have them
        self.adapter_slots: tuple[int, ...] = ()  # one per adapter while it runs
        self.tiers: tuple[AdapterTier, ...] = ()  # where each adapter was found, once it has had a slot
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # of the prompt, taken from the prefix cache

    @property
    def adapter_name(self) -> str:
        """For people: the names of the adapters, empty for the base model."""
        return "+".join(identity.name for identity in self.identities)

    @property
    def metrics_name(self) -> str:
        """Under which the request is counted: the adapter's name, one for all mixtures, empty for the base model."""
        return MIXTURE if len(self.identities) > 1 else self.adapter_name

    @property
    def sole_adapter(self) -> Adapter | None:
        """The adapter that the request runs on if it is one, unscaled."""
        return self.adapters[0].adapter if len(self.adapters) == 1 and self.adapters[0].weight == 1 else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_missing_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def append(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Takes a sampled token; says whether it ends the request."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids and self.num_output_tokens >= self.params.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.params.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None


def _first_adapted_token(adapters: Sequence[WeightedAdapter], prompt: Sequence[int]) -> int:
    """Where in the prompt the adapters begin to work."""
    first = 0
    for adapter, weight, _ in adapters:
        if adapter.no_mix and (len(adapters) > 1 or weight != 1):
            raise InvalidRequest(
                f"adapter {adapter.name!r} cannot be scaled or mixed: {adapter.no_mix}",
                field="mix.adapter" if len(adapters) > 1 else "adapter_scale",
            )
        invoked = adapter.first_token(prompt)
        if invoked is None:
            raise InvalidRequest(
                f"adapter {adapter.name!r} would do nothing: the prompt does not hold its invocation tokens "
                f"{list(adapter.invocation_tokens)}",
                field="adapter",
            )
        first = invoked
    return first
