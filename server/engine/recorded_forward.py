"""One forward of a model, recorded: what goes into every part and what comes out. Engine thread, once at start."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

from server.engine.attention import AttentionOptions, AttentionStep

Forward = Callable[..., Any]

STEP = "attention_step"  # the keyword argument that holds a step's attention

_CASTS = {torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.type_as}


@dataclass(slots=True)
class Call:
    """One call of a module, by copies of what it was given and gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    is_repeated: bool = False  # it is the last of several

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """For another call, which may write into them."""
        return _copied(self.args), _copied(self.kwargs)

    def shrunk(self, module: nn.Module, largest: float) -> "Call":
        """A call of the module with every tensor times a factor, after which no entry is larger than `largest`."""

        def small(value: Any) -> Any:
            return value * (largest / float(value.abs().max())) if isinstance(value, Tensor) else value

        args, kwargs = tuple(map(small, self.args)), {name: small(value) for name, value in self.kwargs.items()}
        return Call(args, kwargs, module.forward(*args, **kwargs))

    @property
    def result(self) -> Tensor | None:
        """The output, or the first tensor in it; None: there is none."""
        return next(iter(_tensors(self.output)), None)

    def own_operations(self, module: nn.Module) -> set[str]:
        """What torch computes for a module beside its children and attention; views and casts are left out."""
        args, kwargs = self.arguments()
        if STEP in kwargs:
            kwargs[STEP] = _UnseenStep(kwargs[STEP])
        paused: list[AbstractContextManager[Any]] = []

        def before(child: nn.Module, args: Any, kwargs: Any) -> None:
            paused.append(_disable_current_modes())
            paused[-1].__enter__()

        def after(child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            paused.pop().__exit__(None, None, None)

        handles: list[RemovableHandle] = []
        for child in module.children():
            handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(child.register_forward_hook(after, with_kwargs=True))
        try:
            operations = _Operations()
            with operations:
                module.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return operations.names

    def is_answered_by(self, forward: Forward, tolerance: float) -> bool:
        """Whether another forward gives the same tensors, but for a share `tolerance` of the largest in each."""
        args, kwargs = self.arguments()
        try:
            output = forward(*args, **kwargs)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, AssertionError):
            return False  # the module is called in a way that the other does not know
        got, expected = _tensors(output), _tensors(self.output)
        if type(output) is not type(self.output) or [y.shape for y in got] != [y.shape for y in expected] or not got:
            return False
        return all(
            float((mine - own).abs().max()) <= tolerance * float(own.abs().max())
            for mine, own in zip(got, expected, strict=True)
        )


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket not in _CASTS:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class AttentionCall(NamedTuple):
    """How a layer asked for its attention."""

    layer: int | None
    options: AttentionOptions
    num_heads: int
    num_kv_heads: int
    head_dim: int


class _UnseenStep:
    """A step whose attention no dispatch mode sees."""

    def __init__(self, step: AttentionStep) -> None:
        self._step = step
        self.addresses = step.addresses

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        with _disable_current_modes():
            return self._step.attend(layer, query, key, value, options)


@dataclass(slots=True)
class RecordingStep:
    """Lets a real step do the attention and notes how each layer asked for it."""

    step: AttentionStep
    calls: dict[int | None, AttentionCall] = field(default_factory=dict)

    @property
    def addresses(self) -> tuple[int, ...]:
        return self.step.addresses

    def attend(self, layer: int | None, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        _, num_heads, head_dim = query.shape
        self.calls[layer] = AttentionCall(layer, options, num_heads, key.shape[1], head_dim)
        return self.step.attend(layer, query, key, value, options)


def record_forward(model: nn.Module, run: Callable[[AttentionStep], Any], recording: RecordingStep) -> dict[str, Call]:
    """Calls `run` with a step that notes how layers attend; the last call of every module that took part, by path."""
    calls: dict[str, Call] = {}
    handles = []
    for path, module in model.named_modules():

        def before(module: nn.Module, args: Any, kwargs: Any, *, path: str = path) -> None:
            calls[path] = Call(_copied(args), _copied(kwargs), None, is_repeated=path in calls)

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


def _tensors(output: Any) -> list[Tensor]:
    values = output if isinstance(output, tuple) else (output,)
    return [value for value in values if isinstance(value, Tensor)]


def _copied(value: Any) -> Any:
    """The same with tensors cloned: fused forwards write into what they are given."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
