from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UnloadMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNLOAD_MODE_UNSPECIFIED: _ClassVar[UnloadMode]
    DRAIN: _ClassVar[UnloadMode]
    FORCE: _ClassVar[UnloadMode]
    IF_IDLE: _ClassVar[UnloadMode]

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    AVAILABLE: _ClassVar[AdapterState]
    READY: _ClassVar[AdapterState]
    FAILED: _ClassVar[AdapterState]
    LOADING: _ClassVar[AdapterState]
    DRAINING: _ClassVar[AdapterState]

class AdapterTier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_TIER_UNSPECIFIED: _ClassVar[AdapterTier]
    DISK: _ClassVar[AdapterTier]
    HOST: _ClassVar[AdapterTier]
    DEVICE: _ClassVar[AdapterTier]
UNLOAD_MODE_UNSPECIFIED: UnloadMode
DRAIN: UnloadMode
FORCE: UnloadMode
IF_IDLE: UnloadMode
ADAPTER_STATE_UNSPECIFIED: AdapterState
AVAILABLE: AdapterState
READY: AdapterState
FAILED: AdapterState
LOADING: AdapterState
DRAINING: AdapterState
ADAPTER_TIER_UNSPECIFIED: AdapterTier
DISK: AdapterTier
HOST: AdapterTier
DEVICE: AdapterTier

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "replace", "expected_generation", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    replace: bool
    expected_generation: int
    pin: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., replace: _Optional[bool] = ..., expected_generation: _Optional[int] = ..., pin: _Optional[bool] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: UploadChunk
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[_Union[UploadChunk, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("name", "files", "replace", "expected_generation", "pin")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    PIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    files: _containers.RepeatedCompositeFieldContainer[UploadFile]
    replace: bool
    expected_generation: int
    pin: bool
    def __init__(self, name: _Optional[str] = ..., files: _Optional[_Iterable[_Union[UploadFile, _Mapping]]] = ..., replace: _Optional[bool] = ..., expected_generation: _Optional[int] = ..., pin: _Optional[bool] = ...) -> None: ...

class UploadFile(_message.Message):
    __slots__ = ("name", "size", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("file", "offset", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: str
    offset: int
    data: bytes
    def __init__(self, file: _Optional[str] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "mode")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: UnloadMode
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[_Union[UnloadMode, str]] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("freed_bytes_device", "freed_bytes_host")
    FREED_BYTES_DEVICE_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    freed_bytes_device: int
    freed_bytes_host: int
    def __init__(self, freed_bytes_device: _Optional[int] = ..., freed_bytes_host: _Optional[int] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token", "bytes_host", "bytes_host_pinned", "bytes_host_limit", "bytes_merged", "draining")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_PINNED_FIELD_NUMBER: _ClassVar[int]
    BYTES_HOST_LIMIT_FIELD_NUMBER: _ClassVar[int]
    BYTES_MERGED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    bytes_host: int
    bytes_host_pinned: int
    bytes_host_limit: int
    bytes_merged: int
    draining: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., bytes_host: _Optional[int] = ..., bytes_host_pinned: _Optional[int] = ..., bytes_host_limit: _Optional[int] = ..., bytes_merged: _Optional[int] = ..., draining: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnpinAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class SetTrafficRequest(_message.Message):
    __slots__ = ("name", "percent_by_version")
    class PercentByVersionEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PERCENT_BY_VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    percent_by_version: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., percent_by_version: _Optional[_Mapping[str, int]] = ...) -> None: ...

class SetTrafficResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class PromoteVersionRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AdapterEvent(_message.Message):
    __slots__ = ("type", "adapter")
    class Type(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        TYPE_UNSPECIFIED: _ClassVar[AdapterEvent.Type]
        SNAPSHOT: _ClassVar[AdapterEvent.Type]
        SYNCED: _ClassVar[AdapterEvent.Type]
        ADDED: _ClassVar[AdapterEvent.Type]
        LOADED: _ClassVar[AdapterEvent.Type]
        REPLACED: _ClassVar[AdapterEvent.Type]
        UNLOADED: _ClassVar[AdapterEvent.Type]
        EVICTED: _ClassVar[AdapterEvent.Type]
        REMOVED: _ClassVar[AdapterEvent.Type]
        FAILED: _ClassVar[AdapterEvent.Type]
        UPDATED: _ClassVar[AdapterEvent.Type]
    TYPE_UNSPECIFIED: AdapterEvent.Type
    SNAPSHOT: AdapterEvent.Type
    SYNCED: AdapterEvent.Type
    ADDED: AdapterEvent.Type
    LOADED: AdapterEvent.Type
    REPLACED: AdapterEvent.Type
    UNLOADED: AdapterEvent.Type
    EVICTED: AdapterEvent.Type
    REMOVED: AdapterEvent.Type
    FAILED: AdapterEvent.Type
    UPDATED: AdapterEvent.Type
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    type: AdapterEvent.Type
    adapter: Adapter
    def __init__(self, type: _Optional[_Union[AdapterEvent.Type, str]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("seconds", "freed_bytes")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    freed_bytes: int
    def __init__(self, seconds: _Optional[float] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "version", "generation", "digest", "state", "rank", "target_modules", "bytes_disk", "bytes_host", "bytes_device", "tier", "requests_running", "error", "merged", "pinned", "requests_waiting", "current", "traffic_percent", "num_layers", "unmatched_targets", "other_base", "adds_nothing", "layers_by_target")
    class LayersByTargetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
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
    PINNED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_WAITING_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    TRAFFIC_PERCENT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    UNMATCHED_TARGETS_FIELD_NUMBER: _ClassVar[int]
    OTHER_BASE_FIELD_NUMBER: _ClassVar[int]
    ADDS_NOTHING_FIELD_NUMBER: _ClassVar[int]
    LAYERS_BY_TARGET_FIELD_NUMBER: _ClassVar[int]
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
    pinned: bool
    requests_waiting: int
    current: bool
    traffic_percent: int
    num_layers: int
    unmatched_targets: _containers.RepeatedScalarFieldContainer[str]
    other_base: str
    adds_nothing: bool
    layers_by_target: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., generation: _Optional[int] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., bytes_disk: _Optional[int] = ..., bytes_host: _Optional[int] = ..., bytes_device: _Optional[int] = ..., tier: _Optional[_Union[AdapterTier, str]] = ..., requests_running: _Optional[int] = ..., error: _Optional[str] = ..., merged: _Optional[bool] = ..., pinned: _Optional[bool] = ..., requests_waiting: _Optional[int] = ..., current: _Optional[bool] = ..., traffic_percent: _Optional[int] = ..., num_layers: _Optional[int] = ..., unmatched_targets: _Optional[_Iterable[str]] = ..., other_base: _Optional[str] = ..., adds_nothing: _Optional[bool] = ..., layers_by_target: _Optional[_Mapping[str, int]] = ...) -> None: ...
