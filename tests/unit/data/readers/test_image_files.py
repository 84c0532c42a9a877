"""Images as cameras, archives, notebooks and macOS leave them: read as they are, or refused."""

from __future__ import annotations

import re
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import DataSplits, image_folder
from trainer.data.readers import image_decoding

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (16, 8, 3), np.uint8)
NFC, NFD = "café", "café"


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def pixels_of(splits: DataSplits) -> np.ndarray:
    """Return the images, [N, C, H, W] in 0 to 255, of training and test."""
    parts = [part.fetch(torch.arange(len(part)))[0] for part in (splits.train, splits.test)]
    return (torch.cat(parts) * 255).round().numpy()


def read(folder: Path, **keys: Any) -> DataSplits:
    return image_folder(folder, cache="memory", **keys)


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(ValueError, match=re.escape(f"data.path={folder} cannot be used:\n")) as error:
        read(folder, **keys)
    return str(error.value)


class TestPixels:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "jp2"])
    def test_sixteen_bits_are_divided_by_256(self, tmp_path: Path, suffix: str, channels: Any) -> None:
        """`convert` clips them to white from 256 on."""
        pixels = GENERATOR.integers(0, 65_536, (8, 8)).astype(np.uint16)
        for number in range(2):
            save(tmp_path / f"cat/{number}.{suffix}", pixels) if suffix != "jp2" else jpeg_2000(
                tmp_path, pixels, number
            )
        found = pixels_of(read(tmp_path, channels=channels, test=0.5))
        assert np.array_equal(found, np.broadcast_to(pixels >> 8, (2, channels, 8, 8)))

    def test_sixteen_bits_of_big_endian_tiff(self, tmp_path: Path) -> None:
        pixels = GENERATOR.integers(0, 65_536, (8, 8)).astype(">u2")
        for number in range(2):
            (tmp_path / "cat").mkdir(exist_ok=True)
            Image.frombytes("I;16B", (8, 8), pixels.tobytes()).save(tmp_path / f"cat/{number}.tif")
        assert np.array_equal(pixels_of(read(tmp_path, channels=1, test=0.5))[0, 0], pixels >> 8)

    @pytest.mark.parametrize(
        ("dtype", "message"), [(np.float32, "floating-point numbers"), (np.int32, "integers of 32 bits")]
    )
    def test_numbers_without_a_white_are_refused(self, tmp_path: Path, dtype: Any, message: str) -> None:
        for number in range(2):
            save(tmp_path / f"cat/{number}.tif", GENERATOR.random((8, 8)).astype(dtype))
        assert f"cat/0.tif: its pixels are {message}, which have no white" in refusal(tmp_path)

    @pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_turns_an_image_upright(self, tmp_path: Path, orientation: int, suffix: str) -> None:
        """The stored pixels are those that a viewer turns back."""
        stored = {
            1: PIXELS,
            2: PIXELS[:, ::-1],
            3: PIXELS[::-1, ::-1],
            4: PIXELS[::-1],
            5: PIXELS.transpose(1, 0, 2),
            6: np.rot90(PIXELS, 1),  # turned clockwise it is upright
            7: np.rot90(PIXELS, 2).transpose(1, 0, 2),
            8: np.rot90(PIXELS, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x112] = orientation
        for number in range(2):
            options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
            options = options if suffix in ("webp", "jpg") else {}
            save(tmp_path / f"cat/{number}.{suffix}", np.ascontiguousarray(stored), exif=exif, **options)
        found = pixels_of(read(tmp_path, test=0.5))[0].transpose(1, 2, 0)
        assert np.abs(found - PIXELS).mean() < (4 if suffix == "jpg" else 1e-6)

    def test_sixteen_bits_are_turned_too(self, tmp_path: Path) -> None:
        pixels, exif = GENERATOR.integers(0, 65_536, (16, 8)).astype(np.uint16), Image.Exif()
        exif[0x112] = 6
        for number in range(2):
            save(tmp_path / f"cat/{number}.png", np.ascontiguousarray(np.rot90(pixels, 1)), exif=exif)
        assert np.array_equal(pixels_of(read(tmp_path, channels=1, test=0.5))[0, 0], pixels >> 8)

    @pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x05\0"])
    @pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
    def test_damaged_exif_says_nothing(self, tmp_path: Path, exif: bytes) -> None:
        for number in range(2):
            save(tmp_path / f"cat/{number}.jpg", PIXELS, exif=exif)
        assert pixels_of(read(tmp_path, test=0.5)).shape == (2, 3, 16, 8)

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
    def test_modes_are_those_of_their_colours(self, tmp_path: Path, mode: str) -> None:
        image = Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode)
        suffix = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "tif"
        (tmp_path / "cat").mkdir()
        for number in range(2):
            image.save(tmp_path / f"cat/{number}.{suffix.upper()}")
        assert (pixels_of(read(tmp_path, test=0.5)) == 255).all()

    def test_the_first_frame_of_a_gif(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        frames = [Image.new("L", (8, 8), grey) for grey in (255, 0)]
        for number in range(2):
            frames[0].save(tmp_path / f"cat/{number}.gif", save_all=True, append_images=frames[1:])
        assert (pixels_of(read(tmp_path, test=0.5)) == 255).all()


def jpeg_2000(folder: Path, pixels: np.ndarray, number: int) -> None:
    """Write it under the name that users give it, .png: images are known by their content."""
    (folder / "cat").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"cat/{number}.png", "JPEG2000")


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of some bytes that claims this size."""
    parts = [(b"IHDR", width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\0\0\0"), (b"IDAT", zlib.compress(b"\0"))]
    chunks = [len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4) for name, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class TestLimits:
    @pytest.mark.parametrize("size", [(10_000, 9_000), (13_000, 13_000), (100_000, 100_000), (2**31 - 1, 1)])
    @pytest.mark.parametrize("keys", [{}, {"size": 8}])
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_a_header_that_claims_too_many_pixels(self, tmp_path: Path, size: tuple[int, int], keys: Any) -> None:
        (tmp_path / "cat").mkdir()
        for number in range(2):
            (tmp_path / f"cat/{number}.png").write_bytes(png_header(*size))
        assert re.search(r"cat/0.png: .*(pixels, and 89478485 are allowed|exceeds limit)", refusal(tmp_path, **keys))

    def test_a_header_of_all_the_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All images are taken to have the size of the first."""
        for number in range(2):
            save(tmp_path / f"cat/{number}.png", PIXELS)
        monkeypatch.setattr("trainer.data.readers.limits.psutil.virtual_memory", lambda: Memory(2 * 3 * 16 * 8 - 1))
        assert "images: 768 B unpacked, and this machine has 767 B of memory" in refusal(tmp_path)

    def test_a_disk_without_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Room is taken before the file is mapped: a write to a mapped file on a full disk kills the process."""

        def full(*arguments: Any) -> None:
            raise OSError(28, "No space left on device")

        for number in range(2):
            save(tmp_path / f"images/cat/{number}.png", PIXELS)
        monkeypatch.setenv("SILOTRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(
            ValueError, match=r"No space left on device\n.*set SILOTRAIN_CACHE to a writable folder with"
        ):
            image_folder(tmp_path / "images")
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]

    @pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"gimp xcf file\0"])
    def test_other_formats_are_refused_before_a_program_is_started(
        self, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Pillow knows an image by its content, and gives one of PostScript to Ghostscript."""
        monkeypatch.setattr("subprocess.check_call", lambda *arguments, **options: pytest.fail("started"))
        for name in ("0.png", "1.png"):
            (tmp_path / "cat").mkdir(exist_ok=True)
            (tmp_path / "cat" / name).write_bytes(content)
        assert "cat/0.png: not an image, or damaged" in refusal(tmp_path)
        with pytest.raises(ValueError, match="not an image"):
            image_decoding.shape_of({"bytes": content}, None, 3)

    def test_bytes_in_a_column_have_the_same_rules(self) -> None:
        content, exif = BytesIO(), Image.Exif()
        exif[0x112] = 6
        Image.fromarray(np.ascontiguousarray(np.rot90(PIXELS, 1))).save(content, "PNG", exif=exif)
        assert image_decoding.shape_of({"image": content.getvalue()}, None, 3) == (3, 16, 8)


class Memory:
    def __init__(self, total: int):
        self.total = total


class TestFolders:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train", "test"),
            ("Training", "Testing"),
            ("TRAIN", "VAL"),
            ("training_set", "test_set"),
            ("seg_train/seg_train", "seg_test/seg_test"),
            ("train2017", "val2017"),
            ("images-train", "images-validation"),
            ("dataset/Train", "dataset/Valid"),
        ],
    )
    def test_usual_names_of_parts(self, tmp_path: Path, train: str, test: str) -> None:
        for name in (f"{train}/cat/0.png", f"{train}/dog/0.png", f"{train}/dog/1.png", f"{test}/dog/0.png"):
            save(tmp_path / name, PIXELS)
        splits = read(tmp_path)
        assert splits.label_names == ("cat", "dog")
        assert splits.train.labels is not None and splits.train.labels.tolist() == [0, 1, 1]
        assert splits.test.labels is not None and splits.test.labels.tolist() == [1]

    def test_test_images_are_preferred_to_those_of_validation(self, tmp_path: Path) -> None:
        for name in ("Train/cat/0.png", "Validation/cat/0.png", "Validation/cat/1.png", "Test/cat/0.png"):
            save(tmp_path / name, PIXELS)
        splits = read(tmp_path)
        assert (len(splits.test), len(splits.validation)) == (1, 2) and splits.has_validation

    def test_a_validation_folder_with_another_class(self, tmp_path: Path) -> None:
        for name in ("train/cat/0.png", "val/dog/0.png", "test/cat/0.png"):
            save(tmp_path / name, PIXELS)
        with pytest.raises(ValueError, match="val/ has classes that train/ lacks: dog"):
            read(tmp_path)

    @pytest.mark.parametrize("inner", ["train", "images", "archive/Training"])
    def test_a_folder_around_all_classes_is_none(self, tmp_path: Path, inner: str) -> None:
        for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
            save(tmp_path / inner / name, PIXELS)
        splits = read(tmp_path, test=0.5)
        assert splits.label_names == ("cat", "dog") and (len(splits.train), len(splits.test)) == (2, 2)

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        for name in ("bus", "train", "test tube"):
            for number in range(2):
                save(tmp_path / name / f"{number}.png", PIXELS)
        assert read(tmp_path, test=0.5).label_names == ("bus", "test tube", "train")

    @pytest.mark.parametrize(
        ("folders", "message"),
        [
            (["test", "val"], "test/, val/ without train/"),
            (["Testing", "Testing 2"], "Testing/, Testing 2/ without train/"),
            (["train_1", "train_2", "test"], "train_1/, train_2/, test/: there must be one folder of training"),
        ],
    )
    def test_parts_that_are_no_two_are_refused(self, tmp_path: Path, folders: list[str], message: str) -> None:
        for name in folders:
            for label in ("cat", "dog"):
                save(tmp_path / name / label / "0.png", PIXELS)
        assert message in refusal(tmp_path)

    def test_a_class_in_either_form_of_unicode(self, tmp_path: Path) -> None:
        """A folder copied from a Mac has the decomposed name."""
        for name in (f"train/{NFC}/0.png", "train/zoo/0.png", f"test/{NFD}/0.png"):
            save(tmp_path / "parts" / name, PIXELS)
        splits = read(tmp_path / "parts")
        assert splits.label_names == (NFC, "zoo") and splits.test.labels is not None
        assert splits.test.labels.tolist() == [0]
        for name in (f"{NFC}/0.png", f"{NFD}/1.png", "zoo/0.png", "zoo/1.png"):
            save(tmp_path / "both" / name, PIXELS)
        both = read(tmp_path / "both", test=0.5)
        assert both.label_names == (NFC, "zoo") and len(both.train) == len(both.test) == 2

    def test_hidden_files_and_folders_are_skipped(self, tmp_path: Path) -> None:
        """Notebooks keep copies, and macOS metadata under the names of images."""
        for name in ("cat/0.png", "cat/1.png", ".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png"):
            save(tmp_path / name, PIXELS)
        for name in ("cat/._0.png", "__MACOSX/cat/._0.png", ".DS_Store"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"\0\5\x16\7")
        splits = read(tmp_path, test=0.5)
        assert splits.label_names == ("cat",) and len(splits.train) + len(splits.test) == 2

    def test_dangling_links_and_pages_are_named(self, tmp_path: Path) -> None:
        save(tmp_path / "cat/0.png", PIXELS)
        (tmp_path / "cat/1.png").write_bytes(b"<html>404</html>")
        (tmp_path / "cat/2.png").symlink_to(tmp_path / "gone.png")
        message = refusal(tmp_path)
        assert "cat/1.png: not an image, or damaged" in message and "cat/2.png: [Errno 2] No such file" in message
