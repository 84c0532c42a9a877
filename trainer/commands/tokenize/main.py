"""`python -m trainer tokenize`: writes the tokens of files of text, of any size, to a file for data=tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.exit_codes import FINISHED
from trainer.loggers.terminal import make_terminal
from trainer.utils.errors import ErrorCollector, raise_errors
from trainer.utils.text import format_bytes, suggest

if TYPE_CHECKING:
    from trainer.data.tokenization.tokenizer import Tokenizer

USAGE = """\
python -m trainer tokenize FILE ... tokenizer=PATH out=train.bin [field=text] [end=auto]     texts to a file of tokens

Writes the tokens of the files one after the other, as uint16 or uint32, and a description beside them, train.bin.json.
Train on them with data=tokens. A corpus of any size takes the same memory.

  FILE                 a text, which is one document; or JSON lines (.jsonl, .ndjson, .json) with a document a line.
                       With .gz at the end of its name it is unpacked. A pattern such as 'corpus/*.jsonl.gz' is many
  tokenizer=PATH       a tokenizer.json, or a folder of transformers; nothing is downloaded
  out=FILE             file of the tokens; it must not exist yet
  field=NAME           field of the text in JSON lines; default: text
  end=TOKEN            the token after each document, as it is written: '<|endoftext|>'; null: none; default: auto, that
                       of the tokenizer

Exit codes: 0 finished, 2 bad input."""

DEFAULTS = {"tokenizer": "", "out": "", "field": "text", "end": "auto"}


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit code. Raises ValueError for bad input."""
    from trainer.commands.tokenize.corpus import write_tokens
    from trainer.data.tokenization.tokenizer import load_tokenizer

    errors = ErrorCollector()
    options = {key: _last_value(arguments, key, default) for key, default in DEFAULTS.items()}
    files = errors.collect(lambda: _find_files([argument for argument in arguments if not _is_option(argument)]))
    out = errors.collect(lambda: _output_path(options["out"]))
    tokenizer = errors.collect(lambda: load_tokenizer(_given("tokenizer", options), "tokenizer"))
    end = tokenizer and errors.collect(lambda: _end_token(tokenizer, options["end"]))
    errors.raise_any()
    info = write_tokens(files, options["field"], tokenizer, end, out, make_terminal(sys.stdout))
    print(
        f"{info.tokens:,} tokens of {info.documents:,} documents with {format_bytes(info.bytes)}, "
        f"{info.bytes / max(info.tokens, 1):.2f} bytes a token\n"
        f"train with  data=tokens data.path={out} data.vocabulary={info.vocabulary} "
        f"data.tokenizer={options['tokenizer']}"
    )
    return FINISHED


def _is_option(argument: str) -> bool:
    return argument.partition("=")[0] in DEFAULTS


def _last_value(arguments: Sequence[str], key: str, default: str) -> str:
    """Return the last value of a key among the arguments."""
    return next((each.partition("=")[2] for each in reversed(arguments) if each.startswith(f"{key}=")), default)


def _find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files, those of a pattern sorted by name."""
    if not patterns:
        raise ValueError("there are no files to tokenize\n  valid: python -m trainer tokenize FILE ... tokenizer= out=")
    files, errors = list[Path](), list[str]()
    for pattern in patterns:
        path, (key, equals, _) = Path(pattern).expanduser(), pattern.partition("=")
        found = [path] if path.exists() else sorted(map(Path, glob(str(path), recursive=True)))
        found = [each for each in found if each.is_file()]
        files += found
        if equals and not found:
            errors.append(f"{key} is no key of tokenize{suggest(key, list(DEFAULTS))}")
        elif not found:
            errors.append(f"{pattern}: there is no such file\n  valid: files, or a pattern such as 'corpus/*.jsonl'")
    raise_errors(errors)
    return files


def _given(key: str, options: dict[str, str]) -> str:
    if not options[key]:
        raise ValueError(f"{key} has no value\n  set {key}=...")
    return options[key]


def _output_path(argument: str) -> Path:
    path = Path(_given("out", {"out": argument})).expanduser()
    if path.suffix == ".npy" or not path.parent.is_dir():
        raise ValueError(f"out={path}\n  valid: a file such as train.bin, in an existing folder")
    if path.exists():
        raise ValueError(f"out={path} exists already\n  choose another name, or remove it")
    return path


def _end_token(tokenizer: Tokenizer, written: str) -> int | None:
    """Return the token after each document; None if there is to be none."""
    if written == "null":
        return None
    if written != "auto":
        return tokenizer.token_of(written, "end")
    if tokenizer.end is None:
        raise ValueError(
            f"end=auto: the tokenizer {tokenizer.path} does not say which token ends a text.\n"
            f"  set end= to one of {', '.join(tokenizer.special_tokens) or 'its tokens'}, or end=null for none"
        )
    return tokenizer.end
