"""Which version of an adapter a bare name means: the promoted one, and shares for others. Plain data, any thread."""

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

VERSION = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Routing:
    """How requests for a bare name are spread over its versions.

    A request with a label always draws the same number for one name, on every server and after every restart, and a
    share that grows keeps the labels it had.
    """

    promoted: str = ""  # empty: the newest version
    percent_by_version: Mapping[str, int] = field(default_factory=dict)  # the rest goes to the promoted version

    def draw(self, name: str, label: str) -> str | None:
        """The version of whose share this request is part; None: of no share."""
        if not self.percent_by_version:
            return None
        drawn = _percentile(name, label) if label else random.randrange(100)
        for version in sorted(self.percent_by_version, key=int):
            drawn -= self.percent_by_version[version]
            if drawn < 0:
                return version
        return None

    def to_json(self) -> str:
        return json.dumps({"promoted": self.promoted, "percent_by_version": dict(self.percent_by_version)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Routing":
        """Raises ValueError for anything but what `to_json` writes."""
        try:
            raw = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(raw, dict) or raw.keys() != {"promoted", "percent_by_version"}:
            raise ValueError("promoted and percent_by_version are needed, and nothing else")
        promoted, percents = raw["promoted"], raw["percent_by_version"]
        if not isinstance(promoted, str) or (promoted and not VERSION.fullmatch(promoted)):
            raise ValueError(f"promoted is {promoted!r:.100}")
        if not isinstance(percents, dict) or not all(
            VERSION.fullmatch(version) and type(percent) is int and 0 < percent <= 100
            for version, percent in percents.items()
        ):
            raise ValueError(f"percent_by_version is {percents!r:.100}")
        if sum(percents.values()) > 100:
            raise ValueError("the shares come to more than 100 per cent")
        return cls(promoted, percents)


def _percentile(name: str, label: str) -> int:
    """A number from 0 to 99, the same for the same name and label."""
    digest = hashlib.blake2b(f"{name}\0{label}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100
