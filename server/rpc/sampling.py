"""Sampling parameters from the wire: every value is held against its limit before anything else happens."""

import math
from collections.abc import Iterable, Mapping

from google.protobuf import json_format

from server.engine.request import SamplingParams
from server.errors import InvalidRequest
from server.pb.loraplex.v1 import inference_pb2 as pb

DEFAULT_MAX_TOKENS = 128
MAX_N = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024

# field → (lowest, highest, whether the lowest itself is allowed)
_RANGES = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 10.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}


def check_n(message: pb.SamplingParams) -> None:
    """Raises InvalidRequest: too many answers are asked for, or none."""
    _check("n", message.n, not message.HasField("n") or 1 <= message.n <= MAX_N, f"1 to {MAX_N}")


def sampling_params(
    message: pb.SamplingParams, num_prompt_tokens: int, max_model_len: int, vocab_size: int
) -> SamplingParams:
    """Checks a `SamplingParams` message for a prompt of that length.

    Raises:
        InvalidRequest: a value is out of range; the message names field, value and limit.
    """
    room = max_model_len - num_prompt_tokens
    max_tokens = message.max_tokens if message.HasField("max_tokens") else min(DEFAULT_MAX_TOKENS, room)
    _check("max_tokens", max_tokens, max_tokens >= 1, "at least 1")
    if max_tokens > room:
        raise InvalidRequest(
            f"sampling.max_tokens is {max_tokens:,} and the prompt has {num_prompt_tokens:,} tokens; "
            f"together they may be {max_model_len:,} (--max-model-len)",
            field="sampling.max_tokens",
        )
    min_tokens = message.min_tokens
    _check("min_tokens", min_tokens, min_tokens <= max_tokens, f"at most max_tokens, {max_tokens}")
    check_n(message)
    _check("top_k", message.top_k, message.top_k <= vocab_size, f"0 to {vocab_size}, the size of the vocabulary")
    _check("logprobs", message.logprobs, message.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
    _check_stop(message)
    _check_token_ids("stop_token_ids", message.stop_token_ids, MAX_STOP_TOKEN_IDS, vocab_size)
    _check_token_ids("logit_bias", message.logit_bias, MAX_LOGIT_BIAS, vocab_size)
    for bias in message.logit_bias.values():
        _check("logit_bias", bias, -100 <= bias <= 100, "-100 to 100")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_number(message, "temperature", 0.0),
        top_p=_number(message, "top_p", 1.0),
        top_k=message.top_k,
        min_p=_number(message, "min_p", 0.0),
        repetition_penalty=_number(message, "repetition_penalty", 1.0),
        presence_penalty=_number(message, "presence_penalty", 0.0),
        frequency_penalty=_number(message, "frequency_penalty", 0.0),
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
        seed=message.seed if message.HasField("seed") else None,
        ignore_eos=message.ignore_eos,
        min_tokens=min_tokens,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        logit_bias=dict(message.logit_bias),
    )


def sampling_message(values: Mapping[str, object]) -> pb.SamplingParams:
    """A `SamplingParams` message from values by name, as they come out of JSON; they go by the names of vLLM.

    Numbers may be written as strings, null is the same as left out, and a top_k of -1 is off.

    Raises:
        InvalidRequest: a name that is unknown, or a value of another type.
    """
    message = pb.SamplingParams()
    for name, value in values.items():
        if name not in pb.SamplingParams.DESCRIPTOR.fields_by_name:
            known = ", ".join(pb.SamplingParams.DESCRIPTOR.fields_by_name)
            raise InvalidRequest(
                f"sampling parameter {name[:80]!r} is not known; there are {known}", field="sampling_parameters"
            )
        if name == "stop" and isinstance(value, str):
            value = [value]
        if name == "top_k" and value == -1:
            value = 0
        try:
            json_format.ParseDict({name: value}, message)
        except (json_format.ParseError, OverflowError) as error:
            raise InvalidRequest(
                f"sampling.{name} is {str(value)[:80]}, which is no value for it: {error}", field=f"sampling.{name}"
            ) from error
    return message


def _number(message: pb.SamplingParams, field: str, default: float) -> float:
    if not message.HasField(field):
        return default
    value = float(getattr(message, field))
    low, high, inclusive = _RANGES[field]
    inside = math.isfinite(value) and value <= high and (value >= low if inclusive else value > low)
    _check(field, value, inside, f"{low:g} to {high:g}" if inclusive else f"over {low:g}, up to {high:g}")
    return value


def _check(field: str, value: object, good: bool, limit: str) -> None:
    if not good:
        raise InvalidRequest(f"sampling.{field} is {value}; allowed: {limit}", field=f"sampling.{field}")


def _check_stop(message: pb.SamplingParams) -> None:
    _check("stop", f"{len(message.stop)} strings", len(message.stop) <= MAX_STOP_STRINGS, f"{MAX_STOP_STRINGS} strings")
    for stop in message.stop:
        size = len(stop.encode())
        _check("stop", f"a string of {size} bytes", 1 <= size <= MAX_STOP_BYTES, f"1 to {MAX_STOP_BYTES} bytes")


def _check_token_ids(field: str, ids: Iterable[int], most: int, vocab_size: int) -> None:
    ids = list(ids)
    _check(field, f"{len(ids)} entries", len(ids) <= most, f"{most} entries")
    for token_id in ids:
        _check(field, f"token id {token_id}", token_id < vocab_size, f"0 to {vocab_size - 1}, the vocabulary")
