"""Adapters and GGUF files are what they should be, and made once."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch

from adapters.format import read_adapter
from benchmarks.material import Material
from server.config import EngineConfig
from server.engine.build import build_engine


@pytest.fixture
def material(model_dir: Path, tmp_path: Path) -> Material:
    return Material(model_dir, tmp_path, lambda text: None)


def test_adapters_are_read_by_the_server(material: Material, model_dir: Path) -> None:
    layers = build_engine(EngineConfig(model=str(model_dir), device="cpu")).base.linear_layers
    folders = material.adapters((8, 16), 3)
    adapters = [read_adapter(folder, layers, 64) for folder in folders]
    assert [{len(layer.lora_a) for layer in adapter.weights.values()} for adapter in adapters] == [{8}, {16}, {8}]
    assert len({adapter.digest for adapter in adapters}) == 3
    times = [folder.stat().st_mtime_ns for folder in folders]
    assert [folder.stat().st_mtime_ns for folder in material.adapters((8, 16), 3)] == times


def test_prompts_of_fewer_requests_are_the_first(material: Material) -> None:
    assert material.prompts(2, 7) == material.prompts(5, 7)[:2]


def test_an_adapter_as_gguf(material: Material) -> None:
    """Rows of B of the query and key layers change places in pairs; all else is PEFT's tensors under other names."""
    (folder,), (path,) = material.adapters((8,), 1), material.gguf_adapters((8,), 1)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    reader = gguf.GGUFReader(path)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(found) == len(tensors)
    layer = "base_model.model.model.layers.1."
    up = tensors[f"{layer}mlp.up_proj.lora_B.weight"].numpy()
    assert np.array_equal(found["blk.1.ffn_up.weight.lora_b"], up)
    query = tensors[f"{layer}self_attn.q_proj.lora_B.weight"].numpy()
    ours = found["blk.1.attn_q.weight.lora_b"]
    assert np.array_equal(ours[0:16:2], query[0:8])  # a head of 16 rows: its first half on the even places
    assert np.array_equal(ours[1:16:2], query[8:16])
    assert reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents() == 16


def test_a_model_as_gguf(material: Material) -> None:
    reader = gguf.GGUFReader(material.gguf_model("q8_0"))
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.Q8_0
    assert types["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32
    assert reader.fields["llama.block_count"].contents() == 2
