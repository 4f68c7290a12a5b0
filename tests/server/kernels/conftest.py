"""The native kernels on every instruction set that this processor has."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from server.kernels import Segment, native, native_linear, native_lora


def supported_isas() -> list[str]:
    """The instruction sets of this processor that the kernels are built for, the widest first."""
    every = ["avx512_bf16", "avx512", "avx2", "generic"]
    return every[every.index(native.isa()) :] if native.available() else every


@pytest.fixture(params=supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if not native.available():
        pytest.skip("the native kernels are not built")
    name: str = request.param
    native.set_isa(name)
    torch.manual_seed(0)
    yield name
    native.set_isa(None)


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_split(total: int) -> list[int]:
    """Sizes of random pieces of `total`."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, 40, ()).item()), total - sum(sizes)))
    return sizes


def apply(
    x: Tensor, linear: native_linear.LinearGroup, lora: Sequence[native_lora.LoRASlots] = (), *passes: Sequence[Segment]
) -> list[Tensor]:
    """What the layers of a group give, with slots of their own (none: empty ones)."""
    slots = lora or [native_lora.LoRASlots(linear.in_features, out, 1) for out in linear.outs]
    group = native_lora.AdaptedGroup(linear, native_lora.LoRAGroup(slots))
    return group(x, native_lora.Passes([native_lora.Segments(segments) for segments in passes]))
