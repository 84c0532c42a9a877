"""A file that tells when clients join and leave."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

COLUMNS = ("round", "client", "event")
VALID = "\n  valid: CSV with the columns round (from 1), client (from 0) and event (join or leave)"


@dataclass(frozen=True)
class Event:
    """One line of the file: from this round on (the first is 1) the client is there, or is not."""

    line: int
    round: int
    client: int
    joins: bool


def read_events(path: Path) -> list[Event]:
    """The lines of a CSV file with the columns round, client and event; ValueError names the first that is wrong."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                raise ValueError(f"client_sampling.file={path}, line 1 has not the columns {', '.join(COLUMNS)}{VALID}")
            return [_event(path, reader.line_num, line) for line in reader]
    except OSError as error:
        raise ValueError(f"client_sampling.file={path}: {error.strerror}{VALID}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"client_sampling.file={path} is no text in UTF-8{VALID}") from error


def _event(path: Path, number: int, line: dict[str, str]) -> Event:
    try:
        round, client, event = (str(line[column]).strip() for column in COLUMNS)
        found = Event(number, int(round), int(client), event == "join")
        if found.round >= 1 and found.client >= 0 and event in ("join", "leave"):
            return found
    except ValueError:
        pass
    given = ", ".join(f"{column}={line[column]}" for column in COLUMNS)
    raise ValueError(f"client_sampling.file={path}, line {number}: {given}{VALID}")
