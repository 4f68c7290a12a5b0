"""Typed access to the native CPU kernels (native.c); any one thread at a time calls them, the engine's.

Here is the library itself; `native_linear`, `native_lora`, `native_attention` and `native_fused` call it, and
`native_program` replays what they called.
Tensors are float32 and row-major; an output row has the same bits whatever other rows share its call. Objects made once
(weights, slots, caches, a step's segments and block tables) check shapes when built and keep their tensors alive, so
that a call is little more than its pointers. The library needs torch imported first, whose OpenMP threads it shares.
"""

import ctypes
import importlib.machinery
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

PANEL = 16  # output features of a packed panel

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

_SIGNATURES: dict[str, tuple[object, ...]] = {
    "linear_group": (POINTER, INT, POINTER, POINTER, POINTER),
    "add_embedding_lora": (POINTER, POINTER, POINTER, INT, POINTER),
    "attention": (POINTER, POINTER, POINTER, POINTER, INT, POINTER, INT),
    "write_kv": (POINTER, POINTER, INT, POINTER, INT, POINTER, INT),
    "rms_norm": (POINTER, POINTER, POINTER, FLOAT, POINTER, INT, INT),
    "layer_norm": (POINTER, POINTER, POINTER, POINTER, INT, FLOAT, POINTER, INT, INT),
    "rotary": (POINTER, POINTER, INT, INT, POINTER, INT, INT, POINTER, POINTER, INT),
    "split_heads": (POINTER, POINTER, INT, INT, INT),
    "activation": (INT, POINTER, INT, POINTER, INT, POINTER, INT, INT),
    "add": (POINTER, POINTER, FLOAT, INT, INT),
    "replay": (POINTER, INT, POINTER, INT),
}
_CAN_FAIL = {"linear_group", "attention", "replay"}  # they need scratch memory


_ABI = 3  # of native.c, as these modules know it; counts up with structs, kinds and exported functions


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none that can be used."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_native" + suffix)
        if not path.exists():
            continue
        try:
            return _typed(ctypes.CDLL(str(path))), ""
        except (OSError, ValueError, AttributeError) as error:
            return None, f"cannot be loaded, build them anew ({error})"
    return None, "are not built (no C compiler at install)"


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """
    Raises:
        ValueError: the library was built from another native.c.
        AttributeError: it lacks a function.
    """
    abi = ctypes.c_int.in_dll(loaded, "loraplex_abi").value
    if abi != _ABI:
        raise ValueError(f"{loaded._name} has layout {abi}, this server needs {_ABI}")
    for name, argtypes in _SIGNATURES.items():
        function = getattr(loaded, f"loraplex_{name}")
        function.argtypes = argtypes
        function.restype = ctypes.c_int if name in _CAN_FAIL else None
    loaded.loraplex_isa.restype = ctypes.c_char_p
    loaded.loraplex_set_isa.argtypes = (ctypes.c_char_p,)
    loaded.loraplex_recordable.argtypes = (ctypes.c_char_p,)
    loaded.loraplex_recordable.restype = INT
    return loaded


library, missing_because = _load()


class Function:
    """A native function whose calls can be recorded."""

    _recording: ClassVar[list["Recorded"] | None] = None

    def __init__(self, name: str) -> None:
        self.name = name
        self._call = getattr(library, f"loraplex_{name}", None)

    def __call__(self, *args: Any) -> Any:
        if Function._recording is not None:
            Function._recording.append(Recorded(self.name, args))
        return self._call(*args)  # type: ignore[misc]


class Recorded(NamedTuple):
    name: str
    args: tuple[Any, ...]


@contextmanager
def recorded_calls() -> Iterator[list[Recorded]]:
    """Within, the calls of `Function`s are noted, as they are made."""
    assert Function._recording is None
    calls: list[Recorded] = []
    Function._recording = calls
    try:
        yield calls
    finally:
        Function._recording = None


def available() -> bool:
    return library is not None


def isa() -> str:
    """The instruction set in use: "avx512_bf16", "avx512", "avx2" or "generic"."""
    name: bytes = _loaded().loraplex_isa()
    return name.decode()


def set_isa(name: str | None) -> None:
    """Uses a given instruction set; None: the widest that this processor has."""
    if _loaded().loraplex_set_isa(name.encode() if name else None):
        raise ValueError(f"this processor or build has no {name} kernels")


def recordable(name: str) -> int:
    """The number of a function in recorded calls."""
    number: int = _loaded().loraplex_recordable(name.encode())
    assert number >= 0, name
    return number


@contextmanager
def float32_products() -> Iterator[None]:
    """Within, x is not rounded for bfloat16 weights: another order of sums changes as little as in float32."""
    chosen = isa()
    if chosen == "avx512_bf16":
        set_isa("avx512")
    try:
        yield
    finally:
        set_isa(chosen)


def _loaded() -> ctypes.CDLL:
    if library is None:
        raise RuntimeError(f"the native kernels {missing_because}")
    return library


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(x: Tensor) -> Tensor:
    assert x.dtype is torch.float32
    return x if x.is_contiguous() else x.contiguous()
