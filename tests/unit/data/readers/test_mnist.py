"""Folders of images, written by Pillow."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import Clients, DataSplits, fingerprint, image_folder

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, height: int = 6, width: int = 5) -> np.ndarray:
    """Write an image of random pixels, and return the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = GENERATOR.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Write eight images of cats and four of dogs, one of them in a subfolder."""
    for number in range(8):
        write(tmp_path / f"images/cat/{number}.png")
    for name in ("0.png", "1.PNG", "2.png", "deeper/3.png"):
        write(tmp_path / "images/dog" / name)
    (tmp_path / "images/dog/notes.txt").write_text("no image")
    return tmp_path / "images"


def refusal(path: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match=re.escape(f"data.path={path} cannot be used:\n")) as error:
        image_folder(path, **keys)
    return str(error.value)


def everything(splits: DataSplits) -> torch.Tensor:
    return torch.cat([part.fetch(torch.arange(len(part)))[0] for part in (splits.train, splits.test)])


class TestFolders:
    def test_a_part_of_every_class_is_the_test_set(self, root: Path) -> None:
        splits = image_folder(root, test=0.25)
        assert splits.label_names == ("cat", "dog") and splits.classes == 2
        assert splits.train.labels is not None and splits.test.labels is not None
        assert np.bincount(splits.train.labels).tolist() == [6, 3] and np.bincount(splits.test.labels).tolist() == [
            2,
            1,
        ]
        written = sorted(np.asarray(Image.open(path)).sum() for path in root.rglob("*.[pP][nN][gG]"))
        assert sorted((everything(splits) * 255).round().sum((1, 2, 3)).long().tolist()) == written

    @pytest.mark.parametrize("cache", ["disk", "memory"])
    def test_a_test_folder_is_the_test_set(self, tmp_path: Path, cache: Any) -> None:
        pixels = [write(tmp_path / "images" / name) for name in ("train/b/0.png", "train/a/0.png", "val/b/0.png")]
        splits = image_folder(tmp_path / "images", cache=cache)
        inputs, targets = splits.train.fetch(torch.tensor([1, 0]))
        assert targets.tolist() == [1, 0] and inputs.dtype == torch.float32
        for image, wanted in zip(inputs, pixels, strict=False):
            assert np.allclose(image.numpy(), wanted.transpose(2, 0, 1) / 255)
        assert splits.test.fetch(torch.tensor([0]))[1].tolist() == [1]

    def test_images_are_scaled_cropped_and_made_grey(self, root: Path) -> None:
        Image.new("L", (20, 40), 51).save(root / "cat/0.png")
        splits = image_folder(root, size=[4, 4], channels=1)
        inputs = everything(splits)
        assert inputs.shape == (12, 1, 4, 4) and (inputs == 0.2).flatten(1).all(1).sum() == 1

    def test_are_decoded_once_though_ranks_race(self, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with ThreadPoolExecutor(4) as ranks:
            found = [rank.result() for rank in [ranks.submit(image_folder, root) for _ in range(4)]]
        monkeypatch.setattr("trainer.data.readers.image_folder.decode", lambda *arguments: pytest.fail("decoded again"))
        assert all(torch.equal(everything(splits), everything(found[0])) for splits in [*found, image_folder(root)])
        assert [path.suffix for path in sorted(cache.iterdir())] == [".lock", ".npy"]

    def test_an_image_that_changed_is_decoded_again_and_is_another_data_set(self, root: Path) -> None:
        before = image_folder(root)
        clients = Clients.of(np.zeros(len(before.train), int), np.zeros(len(before.test), int), 1)
        checksum = fingerprint(before, clients)
        Image.new("RGB", (5, 6)).save(root / "cat/3.png")
        after = image_folder(root)
        assert not torch.equal(everything(before), everything(after))
        assert checksum != fingerprint(after, clients) and checksum == fingerprint(before, clients)

    def test_pixels_take_a_byte_each_of_the_file(self, root: Path, cache: Path) -> None:
        image_folder(root, size=16)
        (stored,) = cache.glob("*.npy")
        assert stored.stat().st_size == 12 * 3 * 16 * 16 + 128


class TestRefusals:
    def test_all_unreadable_images_are_reported_at_once(self, root: Path) -> None:
        content = (root / "cat/1.png").read_bytes()
        (root / "cat/1.png").write_bytes(content[: len(content) // 2])
        (root / "cat/0.png").write_bytes(b"")
        (root / "cat/2.png").write_bytes(b"<html>not found")
        write(root / "dog/2.png", height=9)
        message = refusal(root)
        assert "4 of 12 images:\n" in message
        for error in (
            "cat/0.png: not an image, or damaged",
            "cat/1.png: image file is truncated",
            "cat/2.png: not an image, or damaged",
            "dog/2.png: 9 x 5 pixels, and the first image has 6 x 5. Set data.size=",
        ):
            assert error in message, message

    def test_many_errors_are_counted(self, root: Path) -> None:
        for number in range(1, 8):
            (root / f"cat/{number}.png").write_bytes(b"")
        assert "7 of 12 images:" in refusal(root) and "and 2 more" in refusal(root)

    def test_folders_without_images_or_without_classes(self, root: Path, tmp_path: Path) -> None:
        (root / "fox").mkdir()
        assert "fox: no images (.bmp, .gif" in refusal(root)
        (tmp_path / "empty").mkdir()
        assert "no folders; images must be in folders named like their classes" in refusal(tmp_path / "empty")
        assert "there is no folder /" in refusal(tmp_path / "nowhere")

    def test_classes_that_training_does_not_know(self, tmp_path: Path) -> None:
        for name in ("train/cat/0.png", "test/cat/0.png", "test/fox/0.png"):
            write(tmp_path / name)
        assert "test/ has classes that train/ lacks: fox" in refusal(tmp_path)

    def test_values_out_of_range(self, root: Path) -> None:
        text = refusal(root, threads=0, test=2.0)
        assert "data.threads=0" in text and "data.test=2.0" in text
        assert "data.size=0\n    valid: at least 1 pixel" in refusal(root, size=0)

    def test_a_cache_that_cannot_be_written(self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path / "file/cache"))
        assert "set SILOTRAIN_CACHE to a writable folder" in refusal(root)
