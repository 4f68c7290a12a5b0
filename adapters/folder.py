"""An adapter's folder on disk: written whole or not at all, whatever is killed on the way."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors.torch

from adapters.base_fingerprint import METADATA_KEY
from adapters.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, to_peft
from adapters.format import LoRAWeights
from adapters.tensors import PREFIX

SCRATCH_PREFIX = ".loraplex-"  # of folders beside an adapter that hold what is being written
_AT_FDCWD = -100  # paths are relative to the working directory
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # by the file system, or by the system


def write_adapter(
    folder: Path, config: AdapterConfig, weights: Mapping[str, LoRAWeights], base_fingerprint: str = ""
) -> None:
    """Writes an adapter as PEFT would, whole or not at all: temporary folder, fsync, rename.

    An adapter that is already in `folder` is replaced; any other folder is left alone. A kill leaves the old adapter or
    the new one, and maybe the temporary folder beside it, which the next call removes. Where the file system cannot
    exchange two folders, as NFS, a kill between two renames leaves both in the temporary folder.

    Raises:
        FileExistsError: `folder` exists and holds something that is not an adapter.
    """
    check_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{SCRATCH_PREFIX}{folder.name}-"
    remove_abandoned(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    with scratch_folder(folder.parent, prefix) as scratch:
        fresh = scratch / "new"
        _write_files(fresh, config, weights, base_fingerprint)
        if folder.exists():
            _exchange(fresh, folder)
        else:
            fresh.rename(folder)
        fsync(folder.parent)


def check_writable(folder: Path) -> None:
    """Raises FileExistsError if `folder` holds something else than one adapter, which `write_adapter` would refuse."""
    entries = list(folder.iterdir()) if folder.exists() else []
    if entries and not (folder / CONFIG_FILE).is_file():
        raise FileExistsError(f"{folder} holds something that is not an adapter: choose another folder")
    if folders := sorted(entry.name for entry in entries if entry.is_dir()):
        raise FileExistsError(f"{folder} holds more than an adapter, {folders[0]}/ for one: choose another folder")


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str = "") -> Iterator[Path]:
    """A folder for what is not complete yet, within. Locked: by this mark others see that it is in use."""
    with contextlib.ExitStack() as undo:
        path, handle = _locked_folder(parent, prefix)
        undo.callback(os.close, handle)
        undo.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes scratch of those that were killed; those that live keep theirs."""
    for path in paths:
        with contextlib.suppress(OSError):  # somebody else was faster, or it is in use
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def fsync(path: Path) -> None:
    """Makes a file's content last, or the renames into a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and the open handle that locks it."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        with contextlib.suppress(FileNotFoundError):  # it was taken for abandoned before it was locked
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a file system without locks, where nobody removes anything
                fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():
                return path, handle
            os.close(handle)


def _write_files(
    folder: Path, config: AdapterConfig, weights: Mapping[str, LoRAWeights], base_fingerprint: str
) -> None:
    tensors = {}
    for module, layer in weights.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = layer.lora_a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = layer.lora_b.detach().cpu().contiguous()
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(to_peft(config), indent=2) + "\n")
    metadata = {"format": "pt"} | ({METADATA_KEY: base_fingerprint} if base_fingerprint else {})
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    (folder / WEIGHTS_FILE).chmod((folder / CONFIG_FILE).stat().st_mode)  # the library makes it private to its owner
    for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder):
        fsync(path)


def _exchange(fresh: Path, folder: Path) -> None:
    """Gives each of two folders the other's name, in one step where the file system can."""
    system = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(fresh), os.fsencode(folder)
    if not hasattr(system, "renameat2"):
        code = errno.ENOSYS
    elif not system.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE):
        return
    else:
        code = ctypes.get_errno()
    if code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(folder))
    old = fresh.with_name("old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
