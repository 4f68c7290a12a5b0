"""What the server says of itself when it starts, and what it looks at for that."""

from pathlib import Path

from server.banner import MAX_CHECKED, refused_adapters
from server.lora.store import AdapterRef


def test_a_bounded_number_of_configurations_is_looked_at_and_no_weights(tmp_path: Path, opened: list[str]) -> None:
    folders = {AdapterRef(f"adapter-{index}", "1"): tmp_path / str(index) for index in range(MAX_CHECKED + 100)}
    for folder in folders.values():
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
        (folder / "adapter_model.safetensors").touch()
    opened.clear()
    refused = refused_adapters(folders, {}, 8, "tiny")
    assert list(dict.fromkeys(opened)) == [
        str(folder / "adapter_config.json") for folder in list(folders.values())[:MAX_CHECKED]
    ]
    assert list(refused) == list(folders)[:MAX_CHECKED]
