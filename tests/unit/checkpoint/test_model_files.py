"""Large models are written to several files with an index, one tensor after the other, and read as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.checkpoint import model_files
from trainer.checkpoint.format import LazyTensor
from trainer.checkpoint.model_files import write_model
from trainer.models.pretrained import find_weights_file, load_pretrained, load_saved


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_FILE_BYTES", 1000)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 10), nn.BatchNorm1d(10), nn.Linear(10, 20))


def written(path: Path) -> nn.Sequential:
    module = model()
    write_model(path, dict(module.state_dict()))
    return module


def assert_loads(path: Path, module: nn.Module) -> None:
    for load in (load_pretrained, load_saved):
        other = model()
        load(other, path)
        for name, tensor in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def test_a_small_model_is_one_file(tmp_path: Path):
    module = written(tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_loads(tmp_path / "model.safetensors", module)


def test_a_large_one_is_several_that_transformers_reads(tmp_path: Path, small_files: None):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "model.safetensors"
    module = written(path)
    index = find_weights_file(path)
    assert index and index == tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in module.state_dict().values())
    assert set(content["weight_map"].values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert not path.exists() and max(p.stat().st_size for p in tmp_path.glob("model-*")) < 2000
    assert_loads(index, module)
    other = model()
    load_pretrained(other, tmp_path)  # the folder
    assert torch.equal(other.get_parameter("0.weight"), module.get_parameter("0.weight"))
    files, _ = transformers.utils.hub.get_checkpoint_shard_files(tmp_path, index)
    assert sorted(Path(file).name for file in files) == sorted({*content["weight_map"].values()})
    other = model()
    pytest.importorskip("huggingface_hub").load_torch_model(other, tmp_path)
    assert torch.equal(other.get_parameter("2.weight"), module.get_parameter("2.weight"))


def test_another_model_of_the_name_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.safetensors"
    for limit in (1000, 1 << 30, 1000):
        monkeypatch.setattr(model_files, "MAX_FILE_BYTES", limit)
        module = written(path)
        found = find_weights_file(path)
        assert found and (found == path) == (limit > 1000)
        assert_loads(found, module)
        assert len(list(tmp_path.iterdir())) == (1 if limit > 1000 else 3)


def test_a_save_that_is_killed_leaves_no_earlier_model_beside_the_index(
    tmp_path: Path, small_files: None, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"earlier")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model_files, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        written(path)
    assert find_weights_file(path) is None


def test_tensors_are_read_one_after_the_other(tmp_path: Path, small_files: None):
    """No more than one of them is in memory."""
    live: list[int] = []

    def read(number: int) -> Tensor:
        live.append(number)
        return torch.full((200,), float(number))

    lazy = {str(n): LazyTensor(torch.float32, torch.Size([200]), lambda n=n: read(n)) for n in range(4)}
    write_model(tmp_path / "model.safetensors", lazy)
    assert live == [0, 1, 2, 3] and len(list(tmp_path.glob("model-*"))) == 4


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is damaged"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "names ../other.safetensors"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "which the folder does not have"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, message: str):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        load_pretrained(model(), tmp_path)
