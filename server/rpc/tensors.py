"""The tensors of a text model in the Open Inference Protocol: their names and types, and values in and out of messages.

A message holds tensors in one of two encodings: typed `contents` in each tensor, or one `raw_…_contents` per tensor.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import InvalidRequest
from server.pb.inference import grpc_service_pb2 as pb

_TYPED_FIELDS = {"BYTES": "bytes_contents", "BOOL": "bool_contents", "UINT32": "uint_contents", "FP32": "fp32_contents"}
_RAW_FORMATS = {"UINT32": "<I", "FP32": "<f"}
_SHAPES = ([1], [1, 1])  # of an input: alone, or as a batch of one


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model's metadata says of one tensor."""

    name: str
    datatype: str
    optional: bool = True
    dims: int = 1  # -1: one element per answer


INPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec("text_input", "BYTES", optional=False),
        TensorSpec("stream", "BOOL"),
        TensorSpec("sampling_parameters", "BYTES"),
        TensorSpec("exclude_input_in_output", "BOOL"),
        TensorSpec("return_finish_reason", "BOOL"),
        TensorSpec("return_cumulative_logprob", "BOOL"),
        TensorSpec("return_logprobs", "BOOL"),
        TensorSpec("return_num_input_tokens", "BOOL"),
        TensorSpec("return_num_output_tokens", "BOOL"),
    )
}
OUTPUTS = {
    spec.name: spec
    for spec in (
        TensorSpec("text_output", "BYTES", dims=-1),
        TensorSpec("finish_reason", "BYTES", dims=-1),
        TensorSpec("cumulative_logprob", "FP32", dims=-1),
        TensorSpec("logprobs", "BYTES", dims=-1),
        TensorSpec("num_input_tokens", "UINT32"),
        TensorSpec("num_output_tokens", "UINT32", dims=-1),
    )
}


@dataclass(frozen=True, slots=True)
class InputValues:
    """The inputs of one request; those that were left out are not there."""

    texts: dict[str, str]
    flags: dict[str, bool]
    raw: bool  # which encoding they came in


def read_inputs(request: pb.ModelInferRequest) -> InputValues:
    """The values of a request's inputs.

    Raises:
        InvalidRequest: an input that is unknown, missing, given twice, or of another type, shape or size.
    """
    raw = bool(request.raw_input_contents)
    if raw and len(request.raw_input_contents) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs",
            field="raw_input_contents",
        )
    values = InputValues({}, {}, raw)
    for index, tensor in enumerate(request.inputs):
        spec = _spec(tensor)
        if spec.name in values.texts or spec.name in values.flags:
            raise _wrong(spec.name, "is given twice")
        element = _raw_element(spec, tensor, request.raw_input_contents[index]) if raw else _typed_element(spec, tensor)
        if spec.datatype == "BOOL":
            values.flags[spec.name] = bool(element[0])
            continue
        try:
            values.texts[spec.name] = element.decode()
        except UnicodeDecodeError as error:
            raise _wrong(spec.name, "is not UTF-8") from error
    missing = [spec.name for spec in INPUTS.values() if not spec.optional and spec.name not in values.texts]
    if missing:
        raise _wrong(missing[0], "is missing")
    return values


def add_output(
    response: pb.ModelInferResponse, name: str, values: Sequence[bytes] | Sequence[int] | Sequence[float], *, raw: bool
) -> None:
    """Appends an output of one dimension to a response."""
    datatype = OUTPUTS[name].datatype
    tensor = response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    if raw:
        response.raw_output_contents.append(b"".join(_packed(datatype, value) for value in values))
    else:
        getattr(tensor.contents, _TYPED_FIELDS[datatype]).extend(values)


def _spec(tensor: pb.ModelInferRequest.InferInputTensor) -> TensorSpec:
    """What the tensor should be, its head held against it."""
    spec = INPUTS.get(tensor.name)
    if spec is None:
        raise _wrong(tensor.name[:80], f"is not known; there are {', '.join(INPUTS)}")
    if tensor.datatype != spec.datatype:
        raise _wrong(spec.name, f"has datatype {tensor.datatype[:80]!r}; it must be {spec.datatype}")
    if list(tensor.shape) not in _SHAPES:
        raise _wrong(spec.name, f"has shape {list(tensor.shape[:8])}; it must be [1] or [1, 1]")
    if tensor.parameters:
        raise _wrong(spec.name, f"has parameter {min(tensor.parameters)[:80]!r}; inputs have none here")
    return spec


def _raw_element(spec: TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor, data: bytes) -> bytes:
    if tensor.HasField("contents"):
        raise _wrong(spec.name, "has both contents and raw_input_contents")
    if spec.datatype == "BOOL":
        if data not in (b"\0", b"\1"):
            raise _wrong(spec.name, f"has {len(data)} raw bytes; a BOOL is one byte, 0 or 1")
        return data
    if len(data) < 4 or struct.unpack_from("<I", data)[0] != len(data) - 4:
        raise _wrong(spec.name, f"has {len(data)} raw bytes; they must be a uint32 size and as many bytes as it says")
    return data[4:]


def _typed_element(spec: TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor) -> bytes:
    expected = _TYPED_FIELDS[spec.datatype]
    for field, values in tensor.contents.ListFields():
        if field.name != expected:
            raise _wrong(spec.name, f"has {field.name}; its datatype {spec.datatype} goes into {expected}")
        if len(values) != 1:
            raise _wrong(spec.name, f"has {len(values)} elements in {expected}; its shape has one")
        return bytes([values[0]]) if spec.datatype == "BOOL" else bytes(values[0])
    raise _wrong(spec.name, f"has no value, neither in contents.{expected} nor in raw_input_contents")


def _packed(datatype: str, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return struct.pack("<I", len(value)) + value
    return struct.pack(_RAW_FORMATS[datatype], value)


def _wrong(name: str, fault: str) -> InvalidRequest:
    return InvalidRequest(f"input {name!r} {fault}", field=f"inputs.{name}")
