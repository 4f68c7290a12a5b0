from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    AVAILABLE: _ClassVar[AdapterState]
    READY: _ClassVar[AdapterState]
    FAILED: _ClassVar[AdapterState]

class AdapterTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_TIER_UNSPECIFIED: _ClassVar[AdapterTier]
    DISK: _ClassVar[AdapterTier]
    HOST: _ClassVar[AdapterTier]
    DEVICE: _ClassVar[AdapterTier]
ADAPTER_STATE_UNSPECIFIED: AdapterState
AVAILABLE: AdapterState
READY: AdapterState
FAILED: AdapterState
ADAPTER_TIER_UNSPECIFIED: AdapterTier
DISK: AdapterTier
HOST: AdapterTier
DEVICE: AdapterTier

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "replace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    replace: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., replace: _Optional[bool] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("freed_bytes_device", "freed_bytes_host")
    FREED_BYTES_DEVICE_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    freed_bytes_device: int
    freed_bytes_host: int
    def __init__(self, freed_bytes_device: _Optional[int] = ..., freed_bytes_host: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class MergeAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class MergeAdapterResponse(_message.Message):
    __slots__ = ("seconds", "adapter", "bytes_merged")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    BYTES_MERGED_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    adapter: Adapter
    bytes_merged: int
    def __init__(self, seconds: _Optional[float] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ..., bytes_merged: _Optional[int] = ...) -> None: ...

class UnmergeAdapterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnmergeAdapterResponse(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "version", "generation", "digest", "state", "rank", "target_modules", "bytes_disk", "bytes_host", "bytes_device", "tier", "requests_running", "error", "merged")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    BYTES_DISK_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_DEVICE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    generation: int
    digest: str
    state: AdapterState
    rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    bytes_disk: int
    bytes_host: int
    bytes_device: int
    tier: AdapterTier
    requests_running: int
    error: str
    merged: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., bytes_disk: _Optional[int] = ..., bytes_host: _Optional[int] = ..., bytes_device: _Optional[int] = ..., tier: _Optional[_Union[AdapterTier, str]] = ..., requests_running: _Optional[int] = ..., error: _Optional[str] = ..., merged: _Optional[bool] = ...) -> None: ...
