"""What is asked of every contender: how many requests at once, over how many adapters."""

import re
from dataclasses import dataclass

UNIFORM_RANKS = (8,)
MIXED_RANKS = (8, 16, 32, 64)
VARIANTS = ("", "ranks", "unused")

_SPEC = re.compile(r"(\d{1,5})x(\d{1,5})(?::(\w+))?")


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` at once; request i uses adapter i mod `num_adapters`, or the base where there are none."""

    num_requests: int
    num_adapters: int
    variant: str = ""  # "ranks": ranks 8, 16, 32, 64 in turn; "unused": adapters are on the device, requests use none

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.num_adapters}" + (f":{self.variant}" if self.variant else "")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the adapters, in turn."""
        return MIXED_RANKS if self.variant == "ranks" else UNIFORM_RANKS

    @property
    def yardstick(self) -> "Workload | None":
        """What it should be nearly as fast as: mixed ranks as uniform ones, anything else as the base alone."""
        if self.variant == "ranks":
            return Workload(self.num_requests, self.num_adapters)
        return Workload(self.num_requests, 0) if self.num_adapters else None


def parse_workload(spec: str) -> Workload:
    """Reads `32x8`, `32x32:ranks` or `32x32:unused`.

    Raises:
        ValueError: it is none of these.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or (match.group(3) or "") not in VARIANTS or int(match.group(1)) == 0:
        raise ValueError(f"{spec!r} is not REQUESTSxADAPTERS, such as 32x8, 32x0, 32x32:ranks or 32x32:unused")
    workload = Workload(int(match.group(1)), int(match.group(2)), match.group(3) or "")
    if workload.variant and not workload.num_adapters:
        raise ValueError(f"{spec!r}: without adapters there is no variant {workload.variant!r}")
    if workload.num_adapters > workload.num_requests:
        raise ValueError(f"{spec!r}: more adapters than requests")
    return workload
