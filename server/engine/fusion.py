"""Gives the small parts of a model fused forwards: norms, gated feed-forwards, rotary attention, residual sums.

No architecture is known by name. One recorded forward shows what goes into every part and what comes out; a part gets a
fused forward only if that gives the same output for the same input. Whatever is not recognized stays as it is.
Engine thread, once at start.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import AttentionOptions, AttentionStep
from server.engine.fused_forwards import AttentionCall, Forward, candidates
from server.kernels import native

_TOLERANCE = 1e-5  # of the largest output: rounding in another order


@dataclass(slots=True)
class _Call:
    """One recorded call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(slots=True)
class _RecordingStep:
    """Lets a real step do the attention and notes how each layer asked for it."""

    step: AttentionStep
    calls: dict[int | None, AttentionCall] = field(default_factory=dict)

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        _, num_heads, head_dim = query.shape
        self.calls[layer] = AttentionCall(layer, options, num_heads, key.shape[1], head_dim)
        return self.step.attend(layer, query, key, value, options)


@torch.inference_mode()
@native.float32_products()
def fuse(model: nn.Module, run: Callable[[AttentionStep], Any], step: AttentionStep) -> Counter[str]:
    """Gives the parts of a model fused forwards; says how many of each kind.

    Meanwhile x is not rounded for bfloat16 weights, which makes more of the last bit of an x than `_TOLERANCE`.

    Args:
        run: computes one forward of the model on the CPU, with the step it is given.
        step: the attention of that forward.
    """
    recording = _RecordingStep(step)
    calls = _record(model, run, recording)
    modules = dict(model.named_modules())
    children: dict[str, list[nn.Module]] = defaultdict(list)
    for path in calls:
        if path:
            children[path.rpartition(".")[0]].append(modules[path])
    fused: dict[nn.Module, str] = {}
    # From the inside out: a layer is built from parts that are fused already.
    for path, module in reversed(modules.items()):
        if path not in calls:
            continue
        norms = [part for part in children[path] if fused.get(part, "").endswith("norm")]
        attention = recording.calls.get(getattr(module, "layer_idx", None))
        for kind, forward in candidates(module, children[path], norms, attention):
            if _gives_the_same(forward, calls[path], recording):
                module.forward = forward
                fused[module] = kind
                break
    return Counter(fused.values())


def _record(model: nn.Module, run: Callable[[AttentionStep], Any], recording: _RecordingStep) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, *, path: str = path) -> None:
            calls[path] = _Call(_copied(args), _copied(kwargs), None)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, *, path: str = path) -> None:
            calls[path].output = _copied(output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        run(recording)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _gives_the_same(forward: Forward, call: _Call, recording: _RecordingStep) -> bool:
    try:
        output = forward(*_copied(call.args), **_copied(call.kwargs))
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False  # the module is called in a way that the candidate does not know
    got, expected = _tensor(output), _tensor(call.output)
    if type(output) is not type(call.output) or got is None or expected is None or got.shape != expected.shape:
        return False
    return float((got - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else None


def _copied(value: Any) -> Any:
    """The same with tensors cloned: fused forwards write into what they are given."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
