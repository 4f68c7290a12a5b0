"""What a CUDA graph does, on the CPU: the operations that a function called are called again on the same tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from server.engine.decode_graphs import Replay

# Reading a value back to the host and copying one from there wait for the device, which no captured stream may do.
NOT_CAPTURED = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"}


class Recorder:
    """A `Capture`: whatever the host decides while a function is recorded stays decided."""

    def __init__(self) -> None:
        self.num_replays: list[int] = []  # of every capture, in their order
        self._calls: list[Callable[[], None]] | None = None  # of the capture that is going on

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        calls = self._calls = []
        with _Recording(calls):
            output = run()
        self._calls = None
        index = len(self.num_replays)
        self.num_replays.append(0)

        def replay() -> Tensor:
            self.num_replays[index] += 1
            for call in calls:
                call()
            return output

        return replay

    @contextmanager
    def kernels(self, module: Any, *names: str) -> Iterator[list[str]]:
        """Within, launches of a module's interpreted kernels are recorded too; gives the names as they are launched."""
        launched: list[str] = []
        kernels = {name: getattr(module, name) for name in names}
        for name, kernel in kernels.items():
            setattr(module, name, _Launches(name, kernel, launched, self))
        try:
            yield launched
        finally:
            for name, kernel in kernels.items():
                setattr(module, name, kernel)

    def launch(self, call: Callable[[], None]) -> None:
        with _disable_current_modes():
            call()
        if self._calls is not None:
            self._calls.append(call)


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        assert name not in NOT_CAPTURED, f"{name} cannot be captured"
        kwargs = kwargs or {}
        result = function(*args, **kwargs)

        def call() -> None:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else it is a view, or in place
                    old.copy_(new)

        self._calls.append(call)
        return result


class _Launches:
    """Stands in for a Triton kernel: `kernel[grid](...)`."""

    def __init__(self, name: str, kernel: Any, launched: list[str], recorder: Recorder) -> None:
        self._name, self._kernel, self._launched, self._recorder = name, kernel, launched, recorder

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self._launched.append(self._name)
            self._recorder.launch(lambda: self._kernel[grid](*args, **options))

        return launch
