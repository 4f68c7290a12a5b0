"""Memory of the CPU's tensors: where they start, what they share, what the kernel is asked for again."""

import ctypes
import resource

import pytest
import torch

from server.kernels.memory import CACHE_LINE, CHUNK_BYTES, Arena, keep_freed_memory, lazy_zeros


def test_lazy_zeros_start_at_a_cache_line() -> None:
    for shape, dtype in (((3, 5), torch.float32), ((7,), torch.bfloat16), ((0, 4), torch.int8)):
        zeros = lazy_zeros(shape, dtype)
        assert (zeros.shape, zeros.dtype) == (shape, dtype)
        assert zeros.data_ptr() % CACHE_LINE == 0
        assert not zeros.any()


def test_tensors_of_an_arena_lie_side_by_side() -> None:
    arena = Arena()
    first = arena.zeros((3, 5), torch.float32).fill_(1)
    second = arena.zeros((7,), torch.bfloat16).fill_(2)
    assert second.data_ptr() - first.data_ptr() == CACHE_LINE
    big = arena.zeros((CHUNK_BYTES + 1,), torch.int8)
    after = arena.zeros((2,), torch.float32).fill_(3)
    assert (first == 1).all()
    assert (second == 2).all()
    assert not big.any()
    assert (after == 3).all()
    assert all(tensor.data_ptr() % CACHE_LINE == 0 for tensor in (first, second, big, after))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_written_again_without_page_faults() -> None:
    keep_freed_memory()

    def faults_of_a_step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            torch.ones(4 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults_of_a_step()
    assert faults_of_a_step() < 100
