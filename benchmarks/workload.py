"""What is asked of every contender: how many requests at once, over how many adapters."""

import random
import re
from dataclasses import dataclass

UNIFORM_RANKS = (8,)
MIXED_RANKS = (8, 16, 32, 64)
VARIANTS = ("", "ranks", "skewed", "unused")
ALPHA = 0.3  # of the power law of popularity, as `bench adapters` has it: P(adapter < k) = (k / K) ** alpha

_SPEC = re.compile(r"(\d{1,5})x(\d{1,5})(?::(\w+))?")


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_requests` at once over `num_adapters`, or on the base where there are none.

    Variants: "ranks", adapters of ranks 8, 16, 32, 64 in turn; "skewed", a few adapters get most of the requests;
    "unused", adapters are on the device and requests use none.
    """

    num_requests: int
    num_adapters: int
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.num_adapters}" + (f":{self.variant}" if self.variant else "")

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the adapters, in turn."""
        return MIXED_RANKS if self.variant == "ranks" else UNIFORM_RANKS

    @property
    def choices(self) -> list[int]:
        """The adapter of each request, the same in every run: in turn, or drawn from the power law; none of none."""
        if self.variant == "skewed":
            chance = random.Random(0)
            return [int(self.num_adapters * chance.random() ** (1 / ALPHA)) for _ in range(self.num_requests)]
        return [index % self.num_adapters for index in range(self.num_requests) if self.num_adapters]

    @property
    def yardstick(self) -> "Workload | None":
        """What it should be nearly as fast as: mixed ranks and skew as the plain workload, others as the base alone."""
        if self.variant in ("ranks", "skewed"):
            return Workload(self.num_requests, self.num_adapters)
        return Workload(self.num_requests, 0) if self.num_adapters else None


def parse_workload(spec: str) -> Workload:
    """Reads `32x8`, `32x32:ranks`, `32x32:skewed` or `32x32:unused`.

    Raises:
        ValueError: it is none of these.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or (match.group(3) or "") not in VARIANTS or int(match.group(1)) == 0:
        variants = ", ".join(f"32x32:{variant}" for variant in VARIANTS if variant)
        raise ValueError(f"{spec!r} is not REQUESTSxADAPTERS, such as 32x8, 32x0, or {variants}")
    workload = Workload(int(match.group(1)), int(match.group(2)), match.group(3) or "")
    if workload.variant and not workload.num_adapters:
        raise ValueError(f"{spec!r}: without adapters there is no variant {workload.variant!r}")
    if workload.num_adapters > workload.num_requests:
        raise ValueError(f"{spec!r}: more adapters than requests")
    return workload
