"""Write the tokens of a corpus to a file: streaming, in constant memory, written aside and renamed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from time import monotonic

import numpy as np

from trainer.checkpoint.files import sync, write_text
from trainer.data.tokenization.documents import DocumentFile
from trainer.data.tokenization.token_file import TokenFileInfo, description_path
from trainer.data.tokenization.tokenizer import TextPart, Tokenizer, divide
from trainer.loggers.terminal import Terminal
from trainer.utils.text import format_bytes

BATCH = 1 << 22  # characters that are encoded together, by all cores


def write_tokens(
    paths: Sequence[Path], field: str, tokenizer: Tokenizer, end: int | None, out: Path, terminal: Terminal
) -> TokenFileInfo:
    """Write the tokens of files to a new file, and then its description beside it.

    Args:
        paths: the files, see `DocumentFile`.
        field: the field of the text in JSON lines.
        tokenizer: encodes the documents.
        end: the token after each document; None: none. Empty documents are left out.
        out: the file.
        terminal: shows the progress.

    Raises:
        ValueError: a file cannot be read, or `out` cannot be written. Nothing is left of it.
    """
    dtype = "uint16" if tokenizer.vocabulary <= 1 << 16 else "uint32"
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    tokens = documents = size = 0
    try:
        with aside.open("wb") as file:
            for texts in _batches(_parts(paths, field, terminal)):
                encoded = iter(tokenizer.encode_parts([part for part in texts if part is not None]))
                for part in texts:
                    if part is None:
                        row = np.array([] if end is None else [end])
                        documents += 1
                    else:
                        row = next(encoded)
                        size += part.bytes
                    file.write(row.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
                    tokens += len(row)
            if not documents:
                raise ValueError("the files have no text: there is nothing to tokenize")
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, out)
        sync(out.parent)
        info = TokenFileInfo(dtype, tokens, tokenizer.vocabulary, documents, size, end, tokenizer.fingerprint)
        write_text(description_path(out), info.to_json())
    except OSError as error:
        raise ValueError(f"out={out} cannot be written: {error.strerror}\n  choose another folder") from error
    finally:
        terminal.close()
        aside.unlink(missing_ok=True)
    return info


def _parts(paths: Sequence[Path], field: str, terminal: Terminal) -> Iterator[TextPart | None]:
    """Yield the parts of all documents, and None after each document."""
    files = [DocumentFile(path, field) for path in paths]
    total, done, began = max(sum(file.size for file in files), 1), 0, monotonic()
    for file in files:
        for pieces in file:
            part = None
            for part in divide(pieces):
                yield part
                if (now := monotonic()) >= terminal.next_refresh:
                    read = done + file.position
                    rate = format_bytes(read / max(now - began, 1e-9))
                    terminal.progress(read / total, f"{read / total:6.1%}  {file.path}  {rate}/s")
            if part is not None:
                yield None
        done += file.size


def _batches(parts: Iterable[TextPart | None]) -> Iterator[list[TextPart | None]]:
    """Collect parts until they have enough characters to keep all cores busy."""
    batch, characters = [], 0
    for part in parts:
        batch.append(part)
        characters += 1 if part is None else len(part.with_context)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    yield batch
