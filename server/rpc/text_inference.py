"""One inference of the Open Inference Protocol: its tensors as a request for text, and answers as tensors.

Inputs, outputs and their meanings are those of Triton's vLLM backend. Sampling is ours: greedy unless a temperature is
given, 128 tokens unless max_tokens is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from server.errors import InvalidRequest
from server.pb.inference import grpc_service_pb2 as pb
from server.pb.loraplex.v1 import inference_pb2
from server.rpc.sampling import check_n, sampling_message
from server.rpc.tensors import OUTPUTS, InputValues, add_output, read_inputs

# Every last response holds text of its own, so none has to be sent empty to say that it is the last.
_EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
_FINISH_REASONS = {inference_pb2.STOP: b"stop", inference_pb2.LENGTH: b"length"}
_UNFINISHED = b"None"  # the word of Triton's vLLM backend


@dataclass(frozen=True, slots=True)
class TextRequest:
    """What a ModelInferRequest asks for."""

    text: str
    stream: bool  # an answer in pieces
    prepend_input: bool
    outputs: tuple[str, ...]
    sampling: inference_pb2.SamplingParams
    lora_name: str  # an adapter on the model that the request names; empty: none
    raw: bool  # encoding of the tensors


def read_text_request(request: pb.ModelInferRequest) -> TextRequest:
    """Checks the tensors and parameters of a request.

    Raises:
        InvalidRequest: the message names the input, output or parameter at fault.
    """
    inputs = read_inputs(request)
    stream = inputs.flags.get("stream", False)
    prepend_input = not inputs.flags.get("exclude_input_in_output", stream)
    if stream and prepend_input:
        raise InvalidRequest(
            "exclude_input_in_output is false and stream is true: a stream holds only what is new",
            field="inputs.exclude_input_in_output",
        )
    outputs = _outputs(request, inputs)
    values = _sampling_values(request, inputs)
    lora_name = values.pop("lora_name", "")
    if not isinstance(lora_name, str):
        raise InvalidRequest(f"lora_name is {str(lora_name)[:80]}; it must be a string", field="lora_name")
    sampling = sampling_message(values)
    check_n(sampling)  # before room is made for so many
    if not sampling.HasField("logprobs") and {"logprobs", "cumulative_logprob"} & set(outputs):
        sampling.logprobs = 0  # of the chosen tokens
    return TextRequest(inputs.texts["text_input"], stream, prepend_input, outputs, sampling, lora_name, inputs.raw)


class TextOutputs:
    """Owns the answers to one request, as far as they have not been sent."""

    def __init__(self, request: TextRequest, num_input_tokens: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._request = request
        self._num_input_tokens = num_input_tokens
        self._tokenizer = tokenizer
        self._num_answers = max(request.sampling.n, 1)
        self._finish_reasons = [_UNFINISHED] * self._num_answers
        self._cumulative_logprobs = [0.0] * self._num_answers
        self._forget_sent()
        if request.prepend_input:
            self._texts = [request.text] * self._num_answers

    @property
    def finished(self) -> bool:
        return _UNFINISHED not in self._finish_reasons

    def add(self, message: inference_pb2.GenerateResponse) -> None:
        """Takes what is new of one answer."""
        index = message.index
        self._texts[index] += message.text
        self._nums_tokens[index] += len(message.token_ids)
        self._cumulative_logprobs[index] += sum(item.logprob for item in message.logprobs)
        self._logprobs[index] += [self._logprob(item) for item in message.logprobs]
        self._finish_reasons[index] = _FINISH_REASONS.get(message.finish_reason, _UNFINISHED)

    def write(self, response: pb.ModelInferResponse) -> None:
        """Puts all that is new into a response, as one element per answer."""
        values: dict[str, Sequence[bytes] | Sequence[int] | Sequence[float]] = {
            "text_output": [text.encode() for text in self._texts],
            "finish_reason": self._finish_reasons,
            "cumulative_logprob": self._cumulative_logprobs,
            "logprobs": [json.dumps(items).encode() for items in self._logprobs],
            "num_input_tokens": [self._num_input_tokens],
            "num_output_tokens": self._nums_tokens,
        }
        for name in self._request.outputs:
            add_output(response, name, values[name], raw=self._request.raw)
        self._forget_sent()

    def _forget_sent(self) -> None:
        self._texts = [""] * self._num_answers
        self._nums_tokens = [0] * self._num_answers
        self._logprobs: list[list[dict[int, dict[str, object]]]] = [[] for _ in range(self._num_answers)]

    def _logprob(self, item: inference_pb2.TokenLogprob) -> dict[int, dict[str, object]]:
        """A token and its alternatives by id, as vLLM writes them; the rank of a token beyond them is not known."""
        ranked: dict[int, tuple[float, int | None]] = {item.token_id: (item.logprob, None)}
        ranked |= {top.token_id: (top.logprob, rank) for rank, top in enumerate(item.top, 1)}
        return {
            token_id: {"logprob": logprob, "rank": rank, "decoded_token": self._tokenizer.decode([token_id])}
            for token_id, (logprob, rank) in ranked.items()
        }


def _outputs(request: pb.ModelInferRequest, inputs: InputValues) -> tuple[str, ...]:
    """Names of the outputs to send: those that the request lists, else text and what the return_… inputs ask for."""
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise InvalidRequest(
                f"output {output.name[:80]!r} is not known; there are {', '.join(OUTPUTS)}", field="outputs"
            )
        if output.parameters:
            raise InvalidRequest(
                f"output {output.name!r} has parameter {min(output.parameters)[:80]!r}; outputs have none here",
                field=f"outputs.{output.name}",
            )
    if request.outputs:
        return tuple(dict.fromkeys(output.name for output in request.outputs))
    return ("text_output", *[name for name in OUTPUTS if inputs.flags.get(f"return_{name}")])


def _sampling_values(request: pb.ModelInferRequest, inputs: InputValues) -> dict[str, object]:
    """Sampling parameters by name, from the input of that name or from the request's parameters."""
    parameters: dict[str, object] = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"parameter {name[:80]!r} has no value", field="parameters")
        parameters[name] = getattr(parameter, kind)
    parameters.pop(_EMPTY_FINAL_RESPONSE, None)
    text = inputs.texts.get("sampling_parameters")
    if text is None:
        return parameters
    if parameters:
        raise InvalidRequest(
            f"parameter {min(parameters)[:80]!r} is given beside the input sampling_parameters; it belongs in there",
            field="parameters",
        )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"sampling_parameters is not JSON: {reason}", field="sampling_parameters") from error
    if not isinstance(values, dict):
        raise InvalidRequest("sampling_parameters is no JSON object", field="sampling_parameters")
    return values
