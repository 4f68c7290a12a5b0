"""Every error a user can cause, with its gRPC status. Whatever is not a `ServingError` is our bug.

ServingError
├── InvalidRequest          INVALID_ARGUMENT      wrong whatever the server's state
├── InvalidAdapter          INVALID_ARGUMENT      the adapter's files are wrong in themselves
├── IncompatibleAdapter     FAILED_PRECONDITION   a good adapter, but not for this server
├── AdapterNotFound         NOT_FOUND
├── AdapterExists           ALREADY_EXISTS
├── MergeRefused            FAILED_PRECONDITION   this server cannot merge, not on request, or not this one
├── AdapterInUse            FAILED_PRECONDITION   unload if idle, and it is not
├── AdapterChanged          ABORTED               a lost compare-and-swap, or files that changed while they were read
├── AdapterUnloaded         ABORTED               a forced unload ended the request
├── UploadTooSlow           DEADLINE_EXCEEDED     an upload stalled, or took longer than it may
├── AdminOnly               PERMISSION_DENIED     only the admin address changes adapters
├── DamagedAdapter          DATA_LOSS             a published adapter is not what was published
├── StoreNotWritable        FAILED_PRECONDITION
├── Overloaded              RESOURCE_EXHAUSTED
├── Unavailable             UNAVAILABLE           draining, the engine is down, or the disk fails
└── InternalFailure         INTERNAL              the client sees only the incident id
ConfigError                                       at start-up, before there is a client
"""

import grpc

from adapters.errors import printable


class ConfigError(Exception):
    """The server cannot start as asked; the message names the setting to change."""


class ServingError(Exception):
    """Base of all errors that reach a client.

    Attributes:
        code: gRPC status.
        message: one printable line, whatever it quotes.
        reason: machine-readable reason, sent as `google.rpc.ErrorInfo.reason`.
        field: request field at fault, sent as `google.rpc.BadRequest.FieldViolation.field`; empty if none.
    """

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", reason: str = "") -> None:
        self.message = printable(message)
        super().__init__(self.message)
        self.field = field
        if reason:
            self.reason = reason


class InvalidRequest(ServingError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"


class InvalidAdapter(ServingError):
    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ADAPTER"


class IncompatibleAdapter(ServingError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "INCOMPATIBLE_ADAPTER"


class AdapterNotFound(ServingError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"

    def __init__(self, name: str) -> None:
        super().__init__(f"adapter {name!r} is not known here; ListAdapters tells which are", field="adapter")


class AdapterExists(ServingError):
    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ADAPTER_EXISTS"


class MergeRefused(ServingError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MERGE_REFUSED"


class AdapterInUse(ServingError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_IN_USE"


class AdapterChanged(ServingError):
    code = grpc.StatusCode.ABORTED
    reason = "ADAPTER_CHANGED"


class AdapterUnloaded(ServingError):
    code = grpc.StatusCode.ABORTED
    reason = "ADAPTER_UNLOADED"


class UploadTooSlow(ServingError):
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "UPLOAD_TOO_SLOW"


class AdminOnly(ServingError):
    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "ADMIN_ONLY"

    def __init__(self) -> None:
        super().__init__("adapters are loaded and unloaded at the admin address alone (--admin-listen)")


class DamagedAdapter(ServingError):
    code = grpc.StatusCode.DATA_LOSS
    reason = "DAMAGED_ADAPTER"


class StoreNotWritable(ServingError):
    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STORE_NOT_WRITABLE"


class Overloaded(ServingError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OVERLOADED"


class Unavailable(ServingError):
    code = grpc.StatusCode.UNAVAILABLE
    reason = "UNAVAILABLE"


class InternalFailure(ServingError):
    """Our bug. The message is the incident id under which the log holds the traceback."""
