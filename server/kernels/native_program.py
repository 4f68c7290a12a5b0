"""Native calls of a part of a model, recorded once and made again in one call, with no Python between them.

A recorded call is a row of words. Each is the same in every step, or in proportion to the number of rows (how many
there are, where a result lies among the others), or an address within one of the step's inputs. Engine thread only.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from struct import pack, unpack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.kernels import native
from server.kernels.memory import CACHE_LINE
from server.kernels.native import INT, pointer

MAX_WORDS = 16

# What each word is: P an address, R in proportion to the rows, F a float, C none of these; * the addresses in a table.
WORDS = {
    "linear_group": "PRPP*",
    "attention": "PPPPCPC",
    "write_kv": "PPCPCPR",
    "rms_norm": "PPPFPRC",
    "layer_norm": "PPPPCFPRC",
    "rotary": "PPCCPCCPPR",
    "split_heads": "PPCCR",
    "activation": "CPCPCPRC",
    "add": "PPFRC",
}

if native.library is not None:
    _replay = native.library.loraplex_replay


class NotRecordable(Exception):
    """Something happened beside native calls, or depends on more than the number of rows."""


class _Word(ctypes.Structure):
    _fields_ = (("source", INT), ("fixed", INT), ("per_row", INT))


class _Call(ctypes.Structure):
    _fields_ = (("function", INT), ("num_words", INT), ("words", _Word * MAX_WORDS))


class Workspace:
    """Memory for what lies between the calls of a program, shared by programs that run one after another."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Of at least so many bytes; whatever lay there before is lost."""
        if len(self._memory) < num_bytes + CACHE_LINE:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._memory = torch.empty(num_bytes + CACHE_LINE, dtype=torch.uint8)
        return -(-self._memory.data_ptr() // CACHE_LINE) * CACHE_LINE


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that a recorded call may name: an input of the step, or the result of another call."""

    start: int
    num_bytes: int

    @staticmethod
    def of(tensor: Tensor) -> "Buffer":
        return Buffer(tensor.data_ptr(), tensor.nbytes)

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.start + self.num_bytes


class Program:
    """Recorded calls, for any number of rows."""

    def __init__(self, calls: Sequence[_Call], inputs: Sequence[int], bytes_per_row: int, width: int) -> None:
        """
        Args:
            inputs: those that are needed, of all that it was recorded with.
            bytes_per_row: of memory for what lies between the calls.
            width: elements of a row of the result; 0: the result is the first of the inputs, written in place.
        """
        self.num_calls = len(calls)
        self.inputs = tuple(inputs)
        self.in_place = not width
        self._calls = (_Call * len(calls))(*calls)
        self._bytes_per_row = bytes_per_row
        self._width = width

    def followed_by(self, other: "Program") -> "Program":
        """Both at once, on the same inputs; both are in place, so the other takes this one's result."""
        assert self.in_place
        assert other.in_place
        assert self.inputs == other.inputs
        bytes_per_row = max(self._bytes_per_row, other._bytes_per_row)
        return Program([*self._calls, *other._calls], self.inputs, bytes_per_row, 0)

    def __call__(self, rows: int, inputs: Sequence[int], workspace: Workspace) -> Tensor | None:
        """Makes the calls; returns the result [1, rows, width], None if it is in the first of the inputs.

        Args:
            inputs: the addresses of what stands for `self.inputs` now.
        """
        result = torch.empty(1, rows, self._width) if self._width else None
        words = (INT * (_INPUTS + len(inputs)))(workspace.address(self._bytes_per_row * rows), pointer(result), *inputs)
        if _replay(ctypes.addressof(self._calls), self.num_calls, ctypes.addressof(words), rows):
            raise MemoryError(f"no scratch memory for {rows} rows")
        return result


_WORKSPACE, _RESULT, _INPUTS = range(3)  # the sources of words; the inputs come last


def record(run: Callable[[], Tensor], inputs: Sequence[Buffer], num_rows: int) -> Program:
    """Runs something and makes a program of the native calls in it.

    Args:
        run: gives [1, num_rows, width], as a tensor of its own or in the first of the inputs.
        inputs: what it reads or writes that may lie elsewhere in another step.

    Raises:
        NotRecordable: it does more than native calls and views of tensors.
    """
    with _Allocations() as made, native.recorded_calls() as calls:
        result = run()
    words = [list(_words(call)) for call in calls]
    addresses = [{value for kind, value in row if kind == "P"} for row in words]

    def life(buffer: Buffer) -> tuple[int, int] | None:
        """The first and the last call that name it."""
        numbers = [number for number, named in enumerate(addresses) if any(address in buffer for address in named)]
        return (numbers[0], numbers[-1]) if numbers else None

    if result.dim() != 3 or result.shape[:2] != (1, num_rows) or not result.is_contiguous():
        raise NotRecordable(f"the result is {tuple(result.shape)}, not [1, {num_rows}, width]")
    buffers = [Buffer.of(tensor) for tensor in made.tensors]
    results = [buffer for buffer in buffers if buffer.start == result.data_ptr()]
    in_place = not results and bool(inputs) and result.data_ptr() == inputs[0].start
    if not results and not in_place:
        raise NotRecordable("the result is neither a new tensor nor the first input")
    lives = {buffer: lived for buffer in buffers if buffer not in results and (lived := life(buffer))}
    sizes = [-(-_per_row(buffer, num_rows) // CACHE_LINE) * CACHE_LINE for buffer in lives]
    offsets, bytes_per_row = plan(list(lives.values()), sizes)
    if any(buffer.num_bytes != result.nbytes for buffer in results):
        raise NotRecordable("the result is part of something wider")
    needed = [index for index, buffer in enumerate(inputs) if life(buffer)]
    if in_place and needed[:1] != [0]:
        raise NotRecordable("the result is an input that no call names")
    sources = [_Source(buffer, _WORKSPACE, offset) for buffer, offset in zip(lives, offsets, strict=True)]
    sources += [_Source(buffer, _RESULT, 0) for buffer in results]
    sources += [_Source(inputs[index], _INPUTS + place, 0) for place, index in enumerate(needed)]
    recorded = []
    for call, row in zip(calls, words, strict=True):
        if len(row) > MAX_WORDS:
            raise NotRecordable(f"{call.name} of {len(row)} words")
        resolved = [_resolved(kind, value, sources, num_rows) for kind, value in row]
        recorded.append(_Call(native.recordable(call.name), len(row), (_Word * MAX_WORDS)(*resolved)))
    return Program(recorded, needed, bytes_per_row, 0 if in_place else result.shape[-1])


def plan(lives: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[list[int], int]:
    """Places things in little memory, first come first served: none overlaps another while both live.

    Args:
        lives: the first and the last call that needs each.

    Returns:
        Their offsets, and the size of the whole.
    """
    offsets = [0] * len(sizes)
    placed: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: lives[index]):
        offset = 0
        beside = sorted((offsets[other], sizes[other]) for other in placed if lives[other][1] >= lives[index][0])
        for start, size in beside:
            if offset + sizes[index] <= start:
                break
            offset = max(offset, start + size)
        offsets[index] = offset
        placed.append(index)
    return offsets, max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)


class _Source(NamedTuple):
    buffer: Buffer
    number: int
    per_row: int  # bytes before it, times the rows


def _words(call: native.Recorded) -> Iterator[tuple[str, Any]]:
    """With their kinds."""
    for kind, value in zip(WORDS[call.name], call.args, strict=True):
        if kind == "*":
            yield from (("P", address) for address in value)
        else:
            yield kind, value


def _resolved(kind: str, value: Any, sources: Sequence[_Source], num_rows: int) -> _Word:
    """What the value of a word is made of."""
    if kind == "F":
        return _Word(-1, *unpack("<i", pack("<f", value)), 0)
    if kind == "R":
        if value % num_rows:
            raise NotRecordable(f"{value} is not in proportion to {num_rows} rows")
        return _Word(-1, 0, value // num_rows)
    source = next((source for source in sources if kind == "P" and value in source.buffer), None)
    if source is None:
        return _Word(-1, value, 0)
    fixed = value - source.buffer.start
    if fixed and fixed >= _per_row(source.buffer, num_rows):
        raise NotRecordable("a call begins at a later row")
    return _Word(source.number, fixed, source.per_row)


def _per_row(buffer: Buffer, num_rows: int) -> int:
    if buffer.num_bytes % num_rows:
        raise NotRecordable(f"{buffer.num_bytes} bytes for {num_rows} rows")
    return buffer.num_bytes // num_rows


class _Allocations(TorchDispatchMode):
    """Notes the tensors that are made, and lives as long as their addresses must not be given to others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            self.tensors.append(result)
        elif not (func.is_view and _storages(result) <= _storages(args)):  # `contiguous` may be a view, or a copy
            raise NotRecordable(str(func))
        return result


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
