"""The native kernels on every instruction set that this processor has."""

from collections.abc import Iterator

import pytest
import torch

from server.kernels import native


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


def random_split(total: int) -> list[int]:
    """Sizes of random pieces of `total`."""
    sizes: list[int] = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, 40, ()).item()), total - sum(sizes)))
    return sizes
