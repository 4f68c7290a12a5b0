"""The Triton kernels run by Triton's interpreter, on CPU tensors."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def interpreted_triton_ops() -> Iterator[Any]:
    """The module with its kernels interpreted on CPU tensors: copies of both, since triton.jit decides at import."""
    triton = pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        _repair_bfloat16(patch)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True
            for name in ("server.kernels.triton_kernels", "server.kernels.triton_ops"):
                spec = importlib.util.find_spec(name)
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                patch.setitem(sys.modules, name, module)
                spec.loader.exec_module(module)
        yield module


def _repair_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as uint16: its dot multiplies those as integers, its rounding loses carries."""
    interpreter, tl = pytest.importorskip("triton.runtime.interpreter"), pytest.importorskip("triton.language")
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def repaired_convert(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if target != tl.bfloat16:
            return convert(data, source, target, rounding_mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

    def repaired_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return dot(self, a, b, *others)

    patch.setattr(interpreter, "_convert_float", repaired_convert)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", repaired_dot)
