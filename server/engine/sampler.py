"""From logits to tokens, for a whole batch at once. Engine thread only."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from server.engine.request import Request, SamplingParams, TokenLogprob


class Sampled(NamedTuple):
    """What one row gave; `token_id` is None when its logits were not finite."""

    token_id: int | None
    logprob: TokenLogprob | None = None


def sample(logits: Tensor, requests: Sequence[Request]) -> list[Sampled]:
    """Chooses each request's next token.

    Every row depends on its own logits and its own request only, so a request samples the same in any batch.

    Args:
        logits: [num_requests, vocab_size]; not changed.
    """
    logits = logits.float()
    best = _argmax(logits)  # of a NaN or +inf, if there is one
    finite = torch.isfinite(logits.gather(1, best[:, None])[:, 0]).tolist()
    adjusted = _adjust(logits, requests)
    token_ids = (best if adjusted is logits else _argmax(adjusted)).tolist()
    drawing = [row for row, request in enumerate(requests) if not request.params.greedy and finite[row]]
    if drawing:
        drawn = _draw(adjusted[drawing], [requests[row] for row in drawing])
        for row, token_id in zip(drawing, drawn, strict=True):
            token_ids[row] = token_id
    return [
        Sampled(token_ids[row], _logprob(logits[row], token_ids[row], request.params.logprobs))
        if finite[row]
        else Sampled(None)
        for row, request in enumerate(requests)
    ]


def _argmax(logits: Tensor) -> Tensor:
    """Of each row. On the host by numpy, which takes a tenth of torch's time: 0.2 ms for 64 rows of 49,152."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _adjust(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Applies penalties, bias and minimum length to the rows that ask for them; the others are shared, not copied."""
    changing = [row for row, request in enumerate(requests) if request.params.changes_logits]
    if not changing:
        return logits
    logits = logits.clone()
    for row in changing:
        _adjust_row(logits[row], requests[row])
    return logits


def _adjust_row(logits: Tensor, request: Request) -> None:
    params = request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(request.token_ids, device=logits.device)  # one that comes twice is written twice alike
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(request.output_token_ids)
        ids = torch.tensor(list(counts), dtype=torch.long, device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if request.num_output_tokens < params.min_tokens and request.stop_token_ids:
        logits[sorted(request.stop_token_ids)] = float("-inf")


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """Temperature, then the filters of requests that have some, then one uniform number per request.

    The numbers come from each request's own generator by inverse transform, so a seed gives the same tokens on every
    device and in every batch.
    """
    params = [request.params for request in requests]
    probabilities = torch.softmax(logits / _column([p.temperature for p in params], logits), dim=-1)
    uniform = _column([request.random.random() for request in requests], logits).double()
    token_ids = _invert(probabilities, uniform)
    filtered = [row for row, p in enumerate(params) if p.filters]
    if filtered:  # only these are worth a sort
        order, kept = _filter(probabilities[filtered], [params[row] for row in filtered])
        token_ids[filtered] = order.gather(1, _invert(kept, uniform[filtered]))
    return token_ids[:, 0].tolist()


def _filter(probabilities: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Token ids from the most likely on, and their probabilities, zero where top-k, min-p or top-p leave them out."""
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probabilities.shape[-1], device=probabilities.device)[None]
    keep = ranks < _column([p.top_k or probabilities.shape[-1] for p in params], ranks)
    keep &= probabilities >= probabilities[:, :1] * _column([p.min_p for p in params], ranks)
    kept = torch.where(keep, probabilities, 0)
    before = kept.cumsum(dim=-1) - probabilities
    keep &= before < _column([p.top_p for p in params], ranks) * kept.sum(dim=-1, keepdim=True)
    keep[:, 0] = True  # a tiny top_p times a tiny probability may be zero
    return order, torch.where(keep, probabilities, 0)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """[rows, 1]: the first index at which the running sum of a row's weights is over a share `uniform` of the whole."""
    cumulative = weights.double().cumsum(dim=-1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, uniform * total, right=True)
    return torch.minimum(chosen, torch.searchsorted(cumulative, total))  # a product rounded up ends at the last weight


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None]


def _logprob(logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
    """Log-probabilities of the model's own distribution, before temperature and penalties."""
    if num_top is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = logprobs.topk(num_top)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id, float(logprobs[token_id]), top)
