"""The models of the Open Inference Protocol: the base model under its own name, and every adapter under its name."""

from dataclasses import dataclass

from server.errors import AdapterNotFound, InvalidRequest
from server.lora.cache import AdapterCache
from server.lora.events import AdapterStatus
from server.lora.store import AdapterRef

BASE_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Model:
    """The base model or one adapter."""

    name: str
    version: str
    reference: str = ""  # as the Inference service takes it
    adapter: AdapterStatus | None = None  # None: the base model

    @property
    def answers(self) -> bool:
        """Whether a request for it would be answered."""
        return self.adapter is None or self.adapter.answers

    @property
    def state(self) -> str:
        """As Triton has it: READY, LOADING or UNAVAILABLE. One on disk is ready: its first request loads it."""
        if self.adapter is not None and self.adapter.loading and self.adapter.adapter is None:
            return "LOADING"
        return "READY" if self.answers else "UNAVAILABLE"

    @property
    def reason(self) -> str:
        """Why it does not answer."""
        return "" if self.adapter is None or self.answers else self.adapter.error


class Models:
    """Finds models by the names that clients use. Event loop only."""

    def __init__(self, base_name: str, adapters: AdapterCache) -> None:
        self._base_name = base_name
        self._adapters = adapters

    async def find(self, name: str, version: str = "") -> Model:
        """The model of that name; without a version, the one that the name means now.

        Raises:
            InvalidRequest, AdapterNotFound.
        """
        if not name:
            raise InvalidRequest(f"no model name; the base model's is {self._base_name!r}", field="model_name")
        reference = f"{name}@{version}" if version else name
        if name == self._base_name:
            if version not in ("", BASE_VERSION):
                raise AdapterNotFound(reference)
            return Model(name, BASE_VERSION)
        status = await self._adapters.get(reference)
        return Model(status.ref.name, status.ref.version, reference, status)

    async def find_lora(self, base_name: str, lora_name: str) -> Model:
        """The adapter that a request to the base model names beside it.

        Raises:
            InvalidRequest, AdapterNotFound.
        """
        if base_name != self._base_name:
            raise InvalidRequest(
                f"lora_name is {lora_name[:80]!r} beside model {base_name[:80]!r}; "
                f"it goes with {self._base_name!r} only",
                field="lora_name",
            )
        return await self.find(lora_name)

    def has(self, name: str, version: str) -> bool:
        """Whether requests may name exactly that."""
        if name == self._base_name:
            return version == BASE_VERSION
        return self._adapters.catalog.has(AdapterRef(name, version))

    def all(self) -> list[Model]:
        adapters = [
            Model(status.ref.name, status.ref.version, str(status.ref), status) for status in self._adapters.statuses()
        ]
        return [Model(self._base_name, BASE_VERSION), *adapters]

    def versions(self, model: Model) -> list[str]:
        """All that requests may name beside it."""
        if model.adapter is None:
            return [model.version]
        return [ref.version for ref in self._adapters.catalog.versions(model.name)]

    def refuse_base(self, name: str) -> None:
        """Raises InvalidRequest for the one model that is neither loaded nor unloaded."""
        if name == self._base_name:
            raise InvalidRequest(f"{name!r} is the base model: it stays as long as the server", field="model_name")
