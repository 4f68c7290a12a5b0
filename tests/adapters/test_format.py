"""PEFT's files, read strictly: good ones as PEFT means them, bad ones refused with the reason."""

import json
import math
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from adapters.config import parse_config
from adapters.errors import AdapterFormatError, AdapterIncompatibleError, WrongBaseError
from adapters.format import read_adapter
from adapters.tensors import LinearShape

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
LAYERS = {Q: LinearShape(16, 16), V: LinearShape(16, 8), "model.layers.0.mlp.up_proj": LinearShape(16, 24)}
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def tensors(rank: int = 4) -> dict[str, torch.Tensor]:
    result = {}
    for module in (Q, V):
        shape = LAYERS[module]
        result[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, shape.in_features)
        result[f"base_model.model.{module}.lora_B.weight"] = torch.randn(shape.out_features, rank)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter, for a test to break."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file(tensors(), tmp_path / "adapter_model.safetensors")
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))


def read(folder: Path) -> Any:
    return read_adapter(folder, LAYERS, max_rank=16)


def test_a_good_adapter(folder: Path) -> None:
    files = read(folder)
    assert set(files.weights) == {Q, V}
    assert files.weights[V].lora_a.shape == (4, 16)
    assert files.weights[V].lora_b.shape == (8, 4)
    assert files.weights[V].scaling == 2.0
    assert files.num_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_the_digest_follows_the_content(folder: Path) -> None:
    digest = read(folder).digest
    assert read(folder).digest == digest
    configure(folder, lora_alpha=9)
    changed = read(folder).digest
    assert changed != digest


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        changed = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        change(changed)
        safetensors.torch.save_file(changed, folder / "adapter_model.safetensors")

    return apply


def _value(value: float) -> Callable[[Path], None]:
    return _weights(lambda t: t[f"base_model.model.{Q}.lora_A.weight"].view(-1)[3:4].fill_(value))


def _raw(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "adapter_model.safetensors").write_bytes(data)


def _header(header: dict[str, Any], length: int | None = None) -> Callable[[Path], object]:
    text = json.dumps(header).encode()
    return _raw(struct.pack("<Q", len(text) if length is None else length) + text)


def _edited(change: Callable[[str], str]) -> Callable[[Path], object]:
    """A good file with another text for a header."""

    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + length].decode().strip()).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def _entries(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def changed(text: str) -> str:
        header = json.loads(text)
        change(header)
        return json.dumps(header)

    return _edited(changed)


def _last(header: dict[str, Any]) -> str:
    """The tensor at the end of the file."""
    return max(header.keys() - {"__metadata__"}, key=lambda name: int(header[name]["data_offsets"][1]))


def _append(folder: Path, data: bytes) -> None:
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(data)


def _pickle_only(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _linked(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.symlink_to(path.rename(folder / "elsewhere"))


A = f"base_model.model.{Q}.lora_A.weight"
B = f"base_model.model.{Q}.lora_B.weight"
EMPTY = {
    f"base_model.model.x{i}.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300)
}

BROKEN_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (_remove("adapter_config.json"), "adapter_config.json is missing"),
    "no weights": (_remove("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
    "pickle only": (_pickle_only, "never opened"),
    "a link": (_linked, "not a plain file"),
    "truncated": (_truncate, "adapter_model.safetensors"),
    "empty": (_raw(b""), "truncated"),
    "a zip": (_raw(b"PK\3\4" + b"\0" * 100), "header"),
    "endless header": (_header({}, length=2**62), "does not fit"),
    "header is no JSON": (_raw(struct.pack("<Q", 4) + b"nope"), "not valid JSON"),
    "header is a bomb": (_raw(struct.pack("<Q", 60_000) + b"[" * 60_000), "not valid JSON"),
    "entry is no object": (_header(dict.fromkeys(tensors(), "F32")), "is not an object"),
    "many empty tensors": (_header(EMPTY), "does not have"),
    "not a number": (_value(math.nan), "not finite"),
    "infinite": (_value(math.inf), "not finite"),
    "infinite downwards": (_value(-math.inf), "not finite"),
    "infinite in half width": (
        _weights(lambda t: t.update({name: (tensor / 0).bfloat16() for name, tensor in t.items()})), "not finite"),
    "eight bytes": (_raw(struct.pack("<Q", 2)), "does not fit"),
    "bad UTF-8": (_raw(struct.pack("<Q", 4) + b'{"\xff"'), "not valid JSON"),
    "bytes at the end": (lambda folder: _append(folder, b"\0" * 8), "adapter_model.safetensors"),
    "duplicate keys": (_edited(lambda text: text[:-1] + "," + text[1:]), "duplicate keys"),
    "metadata that is no text": (_entries(lambda h: h.update(__metadata__={"format": 1})), "safetensors: "),
    "metadata that is no object": (_entries(lambda h: h.update(__metadata__=[])), "__metadata__ is not an object"),
    "overlap": (_entries(lambda h: h[B].update(data_offsets=h[A]["data_offsets"])), "adapter_model.safetensors: "),
    "gap": (_entries(lambda h: h[_last(h)].update(data_offsets=[at + 4 for at in h[_last(h)]["data_offsets"]])), ": "),
    "negative offset": (_entries(lambda h: h[A].update(data_offsets=[-4, 252])), "adapter_model.safetensors: "),
    "offsets that are not numbers": (_entries(lambda h: h[A].update(data_offsets=["0", "256"])), "safetensors: "),
    "fewer bytes than the shape": (
        _entries(lambda h: h[A].update(data_offsets=[h[A]["data_offsets"][0], h[A]["data_offsets"][0] + 4])), ": "),
    "shape that overflows": (_entries(lambda h: h[A].update(shape=[2**63, h[A]["shape"][1]])), "shape"),
    "zero-size tensors that share an offset": (
        _entries(lambda h: [h[name].update(shape=[0, *h[name]["shape"][1:]], data_offsets=[0, 0])
                            for name in (A, A.replace(".q_proj", ".v_proj"))]), "shape"),
    "A without B": (_weights(lambda t: t.pop(B)), "1 of [48] tensors are missing"),
    "extra tensor": (_weights(lambda t: t.update({"lm_head.weight": torch.zeros(1)})), "unexpected tensor"),
    "tensor of an untargeted layer": (
        _weights(lambda t: t.update({A.replace("self_attn.q", "mlp.up"): torch.zeros(4, 16)})), "unexpected tensor"),
    "another layer index": (
        _weights(lambda t: t.update({A.replace(".0.", ".7."): torch.zeros(4, 16)})), "does not have"),
    "transposed": (_weights(lambda t: t.update({A: t[A].T.contiguous()})), "shape"),
    "wrong rank": (_weights(lambda t: t.update({A: t[A][:3]})), "shape"),
    "double precision": (_weights(lambda t: t.update({A: t[A].double()})), "dtype F64"),
    "two dtypes": (_weights(lambda t: t.update({A: t[A].half()})), "different dtypes"),
    "integers": (_weights(lambda t: t.update({A: t[A].int()})), "dtype I32"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN_FILES)
def test_broken_files(folder: Path, fault: str) -> None:
    damage, reason = BROKEN_FILES[fault]
    damage(folder)
    with pytest.raises(AdapterFormatError, match=reason):
        read(folder)


@pytest.mark.parametrize("shape", [(16, 4), (3, 16)], ids=["transposed", "another rank"])
def test_factors_that_contradict_the_configuration_are_no_matter_of_the_base(
    folder: Path, shape: tuple[int, int]
) -> None:
    _weights(lambda t: t.update({A: torch.zeros(shape)}))(folder)
    with pytest.raises(AdapterFormatError, match="rank calls for") as caught:
        read(folder)
    assert not isinstance(caught.value, AdapterIncompatibleError)


@pytest.mark.parametrize("name", ["\ud800", "two\nlines \x1b[31m", "x" * 1_000_000])
def test_what_a_file_says_is_quoted_in_one_short_line(folder: Path, name: str) -> None:
    _header({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})(folder)
    with pytest.raises(AdapterFormatError, match="unexpected tensor") as caught:
        read(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value).encode()) < 2100


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 1.5}, "r is 1.5"),
        ({"r": "8"}, "r is '8'"),
        ({"r": True}, "r is True"),
        ({"r": 10**6}, "r is 1000000"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": 1e-31}, "lora_alpha is 1e-31; a number from 1e-30 to 65536"),
        ({"alpha_pattern": {"q_proj": 1e-300}}, "q_proj is 1e-300"),
        ({"lora_alpha": math.nan}, "not valid JSON"),
        ({"lora_alpha": 1e30}, "lora_alpha is 1e"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": "(?!x)y"}, "regular expression"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"rank_pattern": {"q_proj": "4"}}, "q_proj is '4'"),
        ({"rank_pattern": [4]}, "rank_pattern"),
        ({"rank_pattern": {"\ud800": 4}}, "regular expression"),
        ({"layers_pattern": ["a)(b"], "layers_to_transform": [0]}, "regular expression"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"lora_dropout": "abc"}, "lora_dropout is 'abc'"),
        ({"lora_dropout": [1]}, "lora_dropout"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"bias": "some"}, "bias is 'some'; one of none, lora_only, all"),
        ({"lora_bias": 2}, "lora_bias is 2"),
        ({"use_rslora": 1}, "use_rslora is 1; true or false"),
        ({"use_rslora": 0.0}, "use_rslora is 0.0"),
        ({"alora_invocation_tokens": ["x"]}, "integers are needed"),
        ({"alora_invocation_tokens": [-1]}, "token ids are needed"),
        ({"use_dora": True, "lora_bias": True}, "use_dora goes neither"),
        ({"use_dora": True, "alora_invocation_tokens": [1]}, "use_dora goes neither"),
        ({"use_dora": True}, "2 of 6 tensors are missing: .*lora_magnitude_vector"),
        ({"trust_remote_code": True}, "unknown key 'trust_remote_code'"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "unknown key 'tokenizer_kwargs'"),
    ],
)
def test_bad_configurations(folder: Path, changes: dict[str, Any], reason: str) -> None:
    configure(folder, **changes)
    with pytest.raises(AdapterFormatError, match=reason) as caught:
        read(folder)
    assert not isinstance(caught.value, AdapterIncompatibleError)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"modules_to_save": ["norm", "lm_head"]}, "norm was trained whole"),
        ({"modules_to_save": ["score"]}, r"modules_to_save=\['score'\] is not served: score was trained whole"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS.*generates text"),
        ({"use_qalora": True}, "use_qalora=True is not served: .*GPTQ"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication.*each layer once"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*changed base model; save it as plain LoRA"),
        ({"init_lora_weights": "surprise"}, "surprise.*nobody knows"),
        ({"r": 17}, "--max-lora-rank 17"),
        ({"rank_pattern": {"v_proj": 32}}, "--max-lora-rank 32"),
        ({"target_modules": ["c_attn"]}, "match no linear layer"),
    ],
)
def test_what_is_not_served_is_named(folder: Path, changes: dict[str, Any], reason: str) -> None:
    configure(folder, **changes)
    with pytest.raises(AdapterIncompatibleError, match=reason):
        read(folder)


def test_a_sibling_of_the_base_with_fewer_layers_is_named(folder: Path) -> None:
    """The adapter has nothing for a layer of ours; one tensor less would be a fault of its own."""
    configure(folder, base_model_name_or_path="someone/sibling", revision="v2")
    layers = LAYERS | {module.replace(".0.", ".1."): shape for module, shape in LAYERS.items()}
    with pytest.raises(WrongBaseError, match=r"on someone/sibling at revision v2, served is large: .*4 of 8 tensors"):
        read_adapter(folder, layers, 16, "large")
    _weights(lambda t: t.pop(B))(folder)
    with pytest.raises(AdapterFormatError, match="5 of 8 tensors are missing") as caught:
        read_adapter(folder, layers, 16, "large")
    assert not isinstance(caught.value, AdapterIncompatibleError)


def test_a_larger_sibling_of_the_base_is_named(folder: Path) -> None:
    """And not the size of the file, which no adapter of ours can have."""
    wide = {name: torch.zeros(4, 100_000) for name in tensors() if "lora_A" in name}
    _weights(lambda t: t.update(wide))(folder)
    with pytest.raises(WrongBaseError, match=r"has shape \[4, 100000\]"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"target_modules": ["q_proj", "self_attn.v_proj", "nothing"]}, {"q_proj": 2, "self_attn.v_proj": 2}),
        ({"target_modules": r".*\.1\..*(q|v)_proj"}, {r".*\.1\..*(q|v)_proj": 2}),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, {"q_proj": 1, "v_proj": 1}),
    ],
)
def test_layers_are_counted_by_target(changes: dict[str, Any], counts: dict[str, int]) -> None:
    layers = [*LAYERS, *(module.replace(".0.", ".1.") for module in LAYERS)]
    assert parse_config(json.dumps(CONFIG | changes).encode()).layers_by_target(layers) == counts


@pytest.mark.parametrize("changes", [{"lora_bias": True}, {"alora_invocation_tokens": [1]}])
def test_what_an_embedding_cannot_have_is_named(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, target_modules=["embed_tokens"], **changes)
    with pytest.raises(
        AdapterFormatError, match=rf"embed_tokens is an embedding, which {next(iter(changes))} does not"
    ):
        read_adapter(folder, {**LAYERS, "model.embed_tokens": LinearShape(32, 16, "embedding")}, 16)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"nope", b'{"r": 4, "r": 5}', b'{"a":' * 100_000, b"\xff\xfe", b'"' + b"x" * (2 << 20) + b'"']
)
def test_configurations_that_are_no_json_object(folder: Path, text: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(text)
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rank_pattern": {f"layer-{number}": 4 for number in range(2000)}}, "2,000 patterns .* at most 1,024"),
        ({"target_modules": [f"layer-{number}" for number in range(5000)]}, "target_modules lists 5,000 items"),
        ({"layers_to_transform": list(range(5000))}, "layers_to_transform lists 5,000 items"),
        ({"revision": "x" * 5000}, "revision has 5,000 characters; at most 1,024"),
        ({"target_modules": "(a{500}){500}"}, "not a plain regular expression"),
    ],
)
def test_configurations_without_end(folder: Path, changes: dict[str, Any], reason: str) -> None:
    configure(folder, **changes)
    with pytest.raises(AdapterFormatError, match=reason):
        read(folder)


def test_a_catastrophic_pattern_costs_nothing(folder: Path) -> None:
    configure(folder, target_modules=r"(([a-z_.0-9])+.)+[A-Z]([a-z_.0-9])+$")
    started = time.process_time()
    with pytest.raises(AdapterIncompatibleError, match="match no linear layer"):
        read(folder)
    assert time.process_time() - started < 0.5


def test_keys_that_import_code_import_nothing(folder: Path) -> None:
    configure(
        folder,
        auto_mapping={"base_model_class": "X", "parent_library": "antigravity"},
        megatron_core="antigravity",
        megatron_config={"x": 1},
    )
    read(folder)
    assert "antigravity" not in sys.modules


def test_other_files_are_never_opened(folder: Path, opened: list[str]) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "modeling.py", "adapter_model.bin"):
        (folder / name).write_bytes(b"\0")
    opened.clear()
    read(folder)
    assert {Path(path).name for path in opened} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("config", "module", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q, True),
        ({"target_modules": ["proj"]}, Q, False),
        ({"target_modules": ["self_attn.q_proj"]}, Q, True),
        ({"target_modules": [Q]}, Q, True),
        ({"target_modules": r".*\.q_proj"}, Q, True),
        ({"target_modules": "q_proj"}, Q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, Q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks"]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers|x"}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(?P<layer>layers)"}, Q, True),
    ],
)
def test_targets_as_peft_means_them(config: dict[str, Any], module: str, expected: bool) -> None:
    assert parse_config(json.dumps({**CONFIG, **config}).encode()).targets(module) is expected
