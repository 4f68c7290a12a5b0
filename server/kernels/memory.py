"""How a process on the CPU holds its memory: big tensors in large pages, freed ones kept for the next step."""

import contextlib
import ctypes
import math
import mmap

import torch
from torch import Tensor

CACHE_LINE = 64  # bytes
CHUNK_BYTES = 64 << 20

# glibc's mallopt
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # more is refused
_KEPT_BYTES = 256 << 20


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory page by page as they are first written, and give it back to the system when they go.

    In large pages where the kernel has them: a step that streams through gigabytes in pages of 4 KiB waits for address
    translation.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones stay small
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)[:size].view(dtype).view(shape)


class Arena:
    """Memory for weights that stay, side by side in large chunks; a chunk lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that starts at a cache line."""
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // CACHE_LINE) * CACHE_LINE
        if taken > len(self._free):
            self._free = lazy_zeros((max(taken, CHUNK_BYTES),), torch.uint8)
        memory, self._free = self._free[:size], self._free[taken:]
        return memory.view(dtype).view(shape)


def keep_freed_memory() -> None:
    """Lets the allocator keep what a step frees, for the next one to write into; does nothing elsewhere than on glibc.

    By default glibc maps each tensor of some megabytes anew and the kernel clears all its pages, a tenth of the time of
    a long prompt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
