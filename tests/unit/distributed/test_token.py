"""The token of a launch: where it comes from, and who may read it."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest

from trainer.distributed.token import TOKEN, draw_token, find_token, token_file


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_that_of_the_launcher_comes_first_then_a_file_then_that_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = find_token()
    assert own == find_token() and len(own) >= 32
    made = tmp_path / "config/silotrain/token"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600 and stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert list(made.parent.iterdir()) == [made]
    file = tmp_path / "mine"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o600)
    assert find_token(str(file)) == b"0123456789abcdef"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token("~/mine") == b"0123456789abcdef"
    monkeypatch.setenv(TOKEN, "inherited")
    assert find_token(str(file)) == b"inherited"
    assert draw_token() != draw_token()


def test_processes_that_need_one_at_once_get_the_same() -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert len(set(pool.map(find_token, [None] * 16))) == 1


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef")
    file.chmod(0o640)
    with pytest.raises(ValueError, match=rf"launch.token_file={file} may be read by others.\n  chmod 600 {file}"):
        find_token(str(file))


def test_a_file_that_is_missing_or_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"launch.token_file=nowhere: No such file or directory\n  valid: a file"):
        find_token("nowhere")
    short = tmp_path / "short"
    short.write_text("secret")
    short.chmod(0o600)
    with pytest.raises(ValueError, match="has 6 characters"):
        find_token(str(short))


def test_without_a_home_folder_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match=r"launch.token_file=null: Could not determine home directory"):
        find_token()


@pytest.mark.parametrize(
    ("overrides", "file"),
    [([], None), (["launch.token_file=a", "seed=1", "launch.token_file=b"], "b"), (["launch.token_file=null"], None)],
)
def test_the_file_of_overrides(overrides: list[str], file: str | None) -> None:
    assert token_file(overrides) == file
