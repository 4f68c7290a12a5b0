"""The base model that is served, as far as adapters must fit it. Immutable."""

import re
from dataclasses import dataclass

import torch

from adapters.errors import WrongBaseError
from adapters.format import AdapterFiles
from server.lora.base_weights import BaseWeights

# What a base model is called within a path: the last part, or the repository's name in a cache of the hub.
_IN_HUB_CACHE = re.compile(r"models--(?:.*--)?(?P<name>[^/]+)/snapshots/")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBase:
    """What an adapter must fit to be served here."""

    weights: BaseWeights
    max_rank: int
    name: str = ""
    fingerprint: str = ""  # see `adapters.base_fingerprint`; empty: any base will do whose layers fit
    lora_dtype: torch.dtype | None = None  # of adapters' factors in memory; None: as they were saved

    def check(self, files: AdapterFiles) -> None:
        """Raises WrongBaseError for an adapter with the fingerprint of another base."""
        theirs = files.base_fingerprint
        if theirs and self.fingerprint and theirs != self.fingerprint:
            raise WrongBaseError(
                f"it was trained on {files.config.trained_on} with fingerprint {theirs[:12]!r}; served is "
                f"{self.name} with fingerprint {self.fingerprint[:12]!r}",
                "WRONG_BASE",
            )

    def other_base(self, files: AdapterFiles) -> str:
        """The base that an adapter says it was trained on, if that is not called as this one and no fingerprint shows
        that it is this one all the same; else empty.

        A folder may be called anything, so this is to be told and is no reason to refuse.
        """
        proven = files.base_fingerprint and files.base_fingerprint == self.fingerprint
        named = files.config.base_model
        return "" if proven or not named or _base_name(named) == _base_name(self.name) else files.config.trained_on


def _base_name(text: str) -> str:
    """What two names or folders of one base model have in common."""
    path = text.replace("\\", "/").rstrip("/")
    cached = _IN_HUB_CACHE.search(path)
    return (cached["name"] if cached else path.rpartition("/")[2]).lower()
