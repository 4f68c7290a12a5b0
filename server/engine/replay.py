"""Replays of a model's parts: what they call of the native kernels, made in one call. Engine thread.

A decoder layer is some ten native calls; between them Python only says where things lie, which takes longer than the
calls themselves when a step has few rows, and holds the interpreter's lock, which the event loop needs. No architecture
is known by name: whatever does nothing but native calls is replayed, the largest parts first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import AttentionStep
from server.engine.recorded_forward import STEP, Call, Forward, RecordingStep, record_forward
from server.kernels.native_program import Buffer, NotRecordable, Program, Workspace, record

_MIN_CALLS = 2  # of a part that is worth it

Place = tuple[int | str, ...]  # keys and indices that lead to one of a call's arguments


@torch.inference_mode()
def replay(
    model: nn.Module,
    run: Callable[[AttentionStep], Any],
    step: AttentionStep,
    passes: Callable[[], Any],
    starting: Callable[[], None],
) -> int:
    """Gives the outermost parts that do nothing but native calls a replay; says how many.

    Args:
        run: computes one forward of the model on the CPU, with the step it is given.
        step: the attention of that forward, over the cache that all others use.
        passes: the bypasses of the running step, as the kernels want them.
        starting: called before each row of native calls.
    """
    calls = record_forward(model, run, RecordingStep(step))
    workspace = Workspace()

    def visit(path: str, module: nn.Module) -> int:
        call = calls.get(path)
        if call is not None:
            if call.is_repeated:
                return 0
            forward = _replay_of(module.forward, call, passes, starting, workspace)
            if forward is not None and call.is_answered_by(forward, tolerance=0):
                module.forward = forward
                return 1
        found = sum(visit(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children())
        if isinstance(module, nn.ModuleList):
            _join([(child, calls.get(f"{path}.{name}")) for name, child in module.named_children()])
        return found

    return visit("", model)


def _join(layers: Sequence[tuple[nn.Module, Call | None]]) -> None:
    """Lets the first of several layers that follow one another replay them all, and the others hand its result on."""
    first: _Replay | None = None
    before: Call | None = None
    for layer, call in layers:
        replay = layer.forward
        if not isinstance(replay, _Replay) or call is None:
            first = before = None
            continue
        if first is None or before is None or not first.goes_on_with(replay, before, call):
            first = replay
        else:
            layer.forward = _HandedOn(first, replay)
        before = call


def _replay_of(
    forward: Forward, call: Call, passes: Callable[[], Any], starting: Callable[[], None], workspace: Workspace
) -> "_Replay | None":
    """None: it is no row of native calls over rows."""
    args, kwargs = call.arguments()
    found = dict(_tensors(args, kwargs))
    tensors = list(found.values())
    if not tensors or tensors[0].dim() != 3 or len(tensors[0]) != 1:
        return None
    inputs = [Buffer.of(tensor) for tensor in tensors]
    inputs += [Buffer(address, 1) for address in _addresses(passes, kwargs)]
    outputs: list[Any] = []

    def run() -> Tensor:
        outputs.append(forward(*args, **kwargs))
        tensor = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
        if not isinstance(tensor, Tensor):
            raise NotRecordable("the result is no tensor")
        return tensor

    try:
        program = record(run, inputs, tensors[0].shape[1])
    except NotRecordable:
        return None
    if program.num_calls < _MIN_CALLS:
        return None
    beside = outputs[0][1:] if isinstance(outputs[0], tuple) else None
    if beside and any(value is not None for value in beside):
        return None
    if not all(tensor.is_contiguous() for index, tensor in enumerate(tensors) if index in program.inputs):
        return None
    places = [place for index, place in enumerate(found) if index in program.inputs]
    of_step = [index - len(tensors) for index in program.inputs if index >= len(tensors)]
    return _Replay(forward, program, places, of_step, passes, starting, workspace, beside)


class _Replay:
    """A part's forward; where a tensor is missing or its rows lie apart, it is computed as it always was."""

    def __init__(
        self,
        forward: Forward,
        program: Program,
        places: Sequence[Place],
        of_step: Sequence[int],
        passes: Callable[[], Any],
        starting: Callable[[], None],
        workspace: Workspace,
        beside: tuple[None, ...] | None,
    ) -> None:
        """
        Args:
            places: where the tensors that the program needs are among the arguments; they come first in its inputs.
            of_step: which addresses of the step follow.
            beside: what follows the result in a tuple; None: the result stands alone.
        """
        self._forward = forward
        self._program = program
        self._places = places
        self._of_step = of_step
        self._passes = passes
        self._starting = starting
        self._workspace = workspace
        self._beside = beside
        self.replayed = False  # by the last call

    def goes_on_with(self, other: "_Replay", before: Call, call: Call) -> bool:
        """Replays another layer too from here on, if that takes what the one `before` gave and all else as it did."""
        if not (self._program.in_place and other._program.in_place) or self._program.inputs != other._program.inputs:
            return False
        if (self._places, self._of_step, self._beside) != (other._places, other._of_step, other._beside):
            return False
        given = [_at(place, call.args, call.kwargs) for place in self._places]
        taken = [before.result, *(_at(place, before.args, before.kwargs) for place in self._places[1:])]
        if not all(map(torch.equal, given, taken)):
            return False
        self._program = self._program.followed_by(other._program)
        return True

    def handed_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What is returned when the first of the tensors holds the result."""
        return self._returned(_at(self._places[0], args, kwargs))

    def _returned(self, result: Tensor) -> Any:
        return result if self._beside is None else (result, *self._beside)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.replayed = False
        try:
            tensors = [_at(place, args, kwargs) for place in self._places]
        except (KeyError, IndexError, TypeError):
            return self._forward(*args, **kwargs)
        if not all(isinstance(tensor, Tensor) and tensor.is_contiguous() for tensor in tensors):
            return self._forward(*args, **kwargs)
        self.replayed = True
        inputs = [tensor.data_ptr() for tensor in tensors]
        addresses = _addresses(self._passes, kwargs)
        inputs += [addresses[index] for index in self._of_step]
        self._starting()
        result = self._program(tensors[0].shape[1], inputs, self._workspace)
        return self._returned(tensors[0] if result is None else result)


class _HandedOn:
    """The forward of a layer that an earlier one's replay has computed already."""

    def __init__(self, first: _Replay, own: _Replay) -> None:
        self._first = first
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own.handed_on(args, kwargs) if self._first.replayed else self._own(*args, **kwargs)


def _addresses(passes: Callable[[], Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """What else a step brings that native calls read."""
    step = kwargs.get(STEP)
    return passes().pointer, *(step.addresses if step is not None else ())


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Place, Tensor]]:
    """Every tensor among the arguments, with the keys that lead to it."""

    def within(place: Place, value: Any) -> Iterator[tuple[Place, Tensor]]:
        if isinstance(value, Tensor):
            yield place, value
        elif isinstance(value, tuple | list | dict):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from within((*place, key), item)

    for index, value in enumerate(args):
        yield from within((index,), value)
    for name, value in kwargs.items():
        yield from within((name,), value)


def _at(place: Place, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    key, *rest = place
    value = args[key] if isinstance(key, int) else kwargs[key]
    for index in rest:
        value = value[index]
    return value
