"""What a load test sends, as numbers."""

from dataclasses import Field, dataclass, field, fields
from typing import Any, get_type_hints

Range = tuple[int, int]
Numbers = tuple[int, ...]

MAX_REQUESTS = 10_000_000
_MAX_TOKENS = 10_000_000
_MAX_RATE = 1_000_000  # requests per second
_MAX_SECONDS = 10_000_000


class WorkloadError(Exception):
    """A workload that cannot be sent; the message names the key and what it may be."""


def parameter(
    default: Any, text: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Every parameter of a workload: a key of the YAML file and a flag. The defaults are S-LoRA's synthetic one."""

    rate: float = parameter(2.0, "Requests per second; 0 with a trace: as recorded.", low=0, high=_MAX_RATE)
    duration: float = parameter(300.0, "Seconds of arrivals; 0: the whole trace.", low=0, high=_MAX_SECONDS)
    num_requests: int = parameter(
        0, "Requests to send; 0: rate times duration, or the whole trace.", low=0, high=MAX_REQUESTS
    )
    concurrency: int = parameter(0, "Closed loop: requests at a time; 0: open loop.", low=0, high=100_000)
    seed: int = parameter(42, "Seed of all draws.", low=0, high=2**64 - 1)
    cv: float = parameter(
        1.0, "Coefficient of variation of the Gamma gaps; 1: Poisson, more: bursts.", low=0.001, high=100
    )
    num_adapters: int = parameter(
        200, "Adapters that requests name; 0: the base model only; -1: all of the server's.", low=-1, high=1_000_000
    )
    ranks: Numbers = parameter(
        (), "Ranks with commas between: adapters of these are taken, rank after rank; empty: any.", low=1, high=10_000
    )
    popularity: str = parameter(
        "power",
        "Which adapter a request names.",
        choices=("power", "distinct", "identical", "uniform", "skewed"),
    )
    alpha: float = parameter(
        1.0, "Exponent of the power law; 1: uniform, less: more for the first adapters.", low=0.001, high=100
    )
    drift_seconds: float = parameter(
        0.0, "The ranking of adapters moves on by one this often; 0: never.", low=0, high=_MAX_SECONDS
    )
    lengths: str = parameter("uniform", "How lengths are drawn without a trace.", choices=("uniform", "punica"))
    prompt_tokens: Range = parameter(
        (8, 512), "LOW:HIGH of uniform prompt lengths, HIGH excluded.", low=1, high=_MAX_TOKENS
    )
    output_tokens: Range = parameter(
        (8, 512), "LOW:HIGH of uniform output lengths, HIGH excluded.", low=1, high=_MAX_TOKENS
    )
    max_tokens: int = parameter(2048, "Most tokens of a request with punica lengths.", low=4, high=_MAX_TOKENS)
    trace: str = parameter("", "CSV of TIMESTAMP, ContextTokens, GeneratedTokens that gives arrivals and lengths.")
    churn_seconds: float = parameter(
        0.0, "An adapter is loaded, replaced or unloaded this often; 0: never.", low=0, high=_MAX_SECONDS
    )
    churn_adapters: int = parameter(2, "Adapters that come and go, if any do.", low=1, high=1000)

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if not self.concurrency and not self.rate and not self.trace:
            raise WorkloadError("rate is 0: an open loop without a trace needs a rate (or set concurrency)")
        if self.concurrency and self.drift_seconds:
            raise WorkloadError(
                f"drift_seconds is {self.drift_seconds:g} and concurrency {self.concurrency}: a closed loop has no "
                "times at which the ranking could move on (set one of them to 0)"
            )
        if not self.trace and not 1 <= self.total <= MAX_REQUESTS:
            raise WorkloadError(
                f"rate {self.rate:g} for duration {self.duration:g} is {self.total:,} requests; "
                f"1 to {MAX_REQUESTS:,} can be sent (or set num_requests)"
            )

    @property
    def rate_limits(self) -> tuple[float, float]:
        """An open loop can be sent at rates above the first and up to the second."""
        if self.num_requests or self.trace:
            return 0.0, _MAX_RATE
        return 1 / self.duration, min(_MAX_RATE, MAX_REQUESTS / self.duration)

    @property
    def total(self) -> int:
        """Requests of a workload without a trace."""
        return self.num_requests or int(self.rate * self.duration)


def _check(item: Field[Any], value: Any) -> None:
    name, choices = item.name, item.metadata["choices"]
    low, high = item.metadata["low"], item.metadata["high"]
    wanted = get_type_hints(Workload)[name]
    if wanted == Range:
        if not isinstance(value, tuple) or len(value) != 2 or not all(type(part) is int for part in value):
            raise WorkloadError(
                f"{name} is {value!r}: it takes two whole numbers, [LOW, HIGH] in a file and LOW:HIGH as a flag"
            )
        if not low <= value[0] < value[1] <= high:
            raise WorkloadError(
                f"{name} is {value[0]}:{value[1]}: LOW must be at least {low} and less than HIGH, HIGH at most {high:,}"
            )
        return
    if wanted == Numbers:
        if not isinstance(value, tuple) or not all(type(part) is int and low <= part <= high for part in value):
            raise WorkloadError(
                f"{name} is {value!r}: it takes whole numbers from {low} to {high:,}, [8, 16] in a file and 8,16 as a "
                "flag"
            )
        return
    numbers = (int, float) if wanted is float else wanted
    if isinstance(value, bool) or not isinstance(value, numbers):
        raise WorkloadError(f"{name} is {value!r}: it takes a {'text' if wanted is str else 'number'}")
    if low is not None and not low <= value <= high:
        raise WorkloadError(f"{name} is {value}: it takes {low} to {high:,}")
    if choices and value not in choices:
        raise WorkloadError(f"{name} is {value!r}: it takes one of {', '.join(choices)}")
