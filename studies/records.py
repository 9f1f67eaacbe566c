"""Results as JSON lines that a killed run continues: the configuration first, then one row per unit of work."""

from __future__ import annotations

import fcntl
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = b'{"configuration": '


class Records:
    """A file of results, open for appending; `done` are the keys of its rows.

    Every row is on the disk before `append` returns. What a killed run left of a last line is dropped.

    Args:
        path: made where it is not there.
        configuration: plain JSON values; all that rows may depend on.

    Raises:
        ValueError: the file is of another configuration (says what differs), is no file of results, or another
            process writes into it.
    """

    def __init__(self, path: Path, configuration: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.done = path, set[str]()
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the file is closed or the process ends
            self._continue(json.loads(json.dumps(configuration)))
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"another run writes into {path}; wait for it or give another folder") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one row with its "key"; a key that is there already is left as it is."""
        if row["key"] not in self.done:
            self._write(row)
            self.done.add(row["key"])

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows from the disk, one at a time."""
        with self.path.open("rb") as file:
            next(file)
            yield from map(json.loads, file)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _continue(self, configuration: dict[str, Any]) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, 1):
            name = "configuration" if number == 1 else "key"
            try:
                if not line.endswith(b"\n") and (number > 1 or START.startswith(line[: len(START)])):
                    break
                found = json.loads(line)[name]
                if number > 1:
                    self.done.add(found)
            except (KeyError, TypeError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
                what = "the configuration" if number == 1 else "a row"
                raise ValueError(f"{self.path}, line {number} is not {what} of a study; move the file away") from error
            if number == 1:
                _check_same(self.path, found, configuration)
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._write({"configuration": configuration})


def _check_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = [
        f"{name} is {_short(there.get(name))} there and {_short(here.get(name))} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if different:
        raise ValueError(
            f"{path} holds results of another configuration: {'; '.join(different)}. Give another folder, or remove it"
        )


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value), 200, placeholder=" ...")
