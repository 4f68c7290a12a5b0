"""Gives the small parts of a model fused forwards: norms, feed-forwards, rotary attention, residual sums, sigmoids.

No architecture is known by name. One recorded forward shows what goes into every part and what comes out; a part gets a
fused forward only if that gives the same output for the same input. Whatever is not recognized stays as it is.
Engine thread, once at start.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from server.engine.attention import AttentionStep
from server.engine.fused_forwards import candidates
from server.engine.recorded_forward import RecordingStep, record_forward
from server.engine.sigmoids import with_native_sigmoids
from server.kernels import native

# What fused forwards stand for. Anything else, as a clamp or a factor that grows with the position, may do nothing on
# the recorded prompt and something later on.
_KNOWN = {
    "add", "sub", "mul", "neg", "mean", "pow", "rsqrt", "layer_norm", "cat", "stack", "repeat_interleave", "dropout",
    "empty",
}  # fmt: skip
_TOLERANCE = 1e-5  # of the largest output: rounding in another order
_SMALL = 1e-3  # the largest entry of an input of norms that shows what they add to the variance


@torch.inference_mode()
@native.float32_products()
def fuse(model: nn.Module, run: Callable[[AttentionStep], Any], step: AttentionStep) -> Counter[str]:
    """Gives the parts of a model fused forwards; says how many of each kind.

    Meanwhile x is not rounded for bfloat16 weights, which makes more of the last bit of an x than `_TOLERANCE`.

    Args:
        run: computes one forward of the model on the CPU, with the step it is given.
        step: the attention of that forward.
    """
    recording = RecordingStep(step)
    calls = record_forward(model, run, recording)
    modules = dict(model.named_modules())
    children: dict[str, list[nn.Module]] = defaultdict(list)
    for path in calls:
        if path:
            children[path.rpartition(".")[0]].append(modules[path])
    fused: dict[nn.Module, str] = {}
    # From the inside out: a layer is built from parts that are fused already.
    for path, module in reversed(modules.items()):
        if path not in calls or calls[path].is_repeated:
            continue
        operations = calls[path].own_operations(module)
        if "sigmoid" in operations:
            forward = with_native_sigmoids(module.forward)
            if calls[path].is_answered_by(forward, _TOLERANCE):
                module.forward = forward
                fused[module] = "sigmoid"
        if operations - _KNOWN:
            continue
        norms = [part for part in children[path] if fused.get(part, "").endswith("norm")]
        attention = recording.calls.get(getattr(module, "layer_idx", None))
        for kind, forward in candidates(module, calls[path], children[path], norms, attention):
            trials = [calls[path]]
            if kind.endswith("norm"):
                trials.append(calls[path].shrunk(module, _SMALL))
            if all(trial.is_answered_by(forward, _TOLERANCE) for trial in trials):
                module.forward = forward
                fused[module] = kind
                break
    return Counter(fused.values())
