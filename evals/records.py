"""Strict reading of JSON and JSON-lines files: a file is read whole and understood whole, or not at all.

Every fault is a `DataError` of one sentence that names the file, the line (or byte offset) and what to do.
A `Faults` made with ``skip=True`` lets faulty *records* pass and counts them; a file that cannot be read to
its end is always refused, because nobody can count what is missing from it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEPT_MESSAGES = 20


class DataError(ValueError):
    """An input file does not hold what it should; the message names the file and the place."""


@dataclass
class Faults:
    """What happens to a faulty record: refused (the default), or skipped and counted.

    >>> faults = Faults(skip=True)
    >>> with faults.tolerated():
    ...     raise DataError("answers.jsonl, line 3: no answer")
    >>> faults.count, faults.messages
    (1, ['answers.jsonl, line 3: no answer'])
    """

    skip: bool = False
    count: int = 0
    messages: list[str] = field(default_factory=list)  # the first `KEPT_MESSAGES` of them

    @contextmanager
    def tolerated(self) -> Iterator[None]:
        """Run a block that handles one record; swallow and count its `DataError` when skipping."""
        try:
            yield
        except DataError as error:
            if not self.skip:
                raise
            self.count += 1
            if len(self.messages) < KEPT_MESSAGES:
                self.messages.append(str(error))


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and where it stands, so that whoever finds a fault in it can say where."""

    data: dict[str, Any]
    where: str  # "answers.jsonl, line 3"

    def error(self, message: str) -> DataError:
        """The exception to raise about this record."""
        return DataError(f"{self.where}: {message}")

    def id(self, key: str) -> str:
        """The identifier under `key`, an integer or a non-empty string, as a string: 7 and "7" are one."""
        value = self._value(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise self.error(f'"{key}" is {_brief(value)}; give an integer or a string')

    def text(self, key: str) -> str:
        """The string under `key`, possibly empty."""
        value = self._value(key)
        if not isinstance(value, str):
            raise self.error(f'"{key}" is {_brief(value)}; give a string')
        return value

    def _value(self, key: str) -> Any:
        if key not in self.data:
            raise self.error(f'has no "{key}"; add it')
        return self.data[key]


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, unpacked if it is gzip.

    Raises `OSError` if it cannot be opened and `DataError` if it is a damaged or truncated gzip file.
    """
    packed = Path(path).read_bytes()
    if packed[:2] == b"\x1f\x8b":
        return _unpack(packed, path)
    if str(path).endswith(".gz"):
        raise DataError(f"{path}: is not gzip in spite of its name; rename it or compress it")
    return packed


def read_json(path: str | Path) -> Any:
    """The one JSON value that a (possibly gzipped) UTF-8 file holds; keys given twice are an error."""
    data = read_bytes(path)
    _refuse_utf16(data, path)
    try:
        return _parse(_decode(data, str(path), 0))
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        reason = error.msg.removesuffix(" starting at")
        raise DataError(f"{place}: not valid JSON ({reason}); correct it or make the file again") from None
    except _KeyTwice as error:
        raise DataError(f"{path}: {error}") from None


def read_jsonl(path: str | Path, faults: Faults | None = None) -> Iterator[Record]:
    """Yield the objects of a (possibly gzipped) UTF-8 file with one JSON object a line; blank lines may be.

    Raises `OSError` if it cannot be opened and `DataError` for a line that is not one JSON object.
    """
    faults = faults or Faults()
    data = read_bytes(path)
    _refuse_utf16(data, path)
    offset = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        record = None
        with faults.tolerated():
            record = _record(line, f"{path}, line {number}", offset) if line.strip() else None
        if record:
            yield record
        offset += len(line) + 1


def check_place(path: str | Path) -> None:
    """Refuse a file that cannot be written because of where it is. Raises `OSError`."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; make it first")


def write_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line; the file appears complete or not at all. Raises `OSError`."""
    check_place(path)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


class _KeyTwice(ValueError):
    pass


def _record(line: bytes, where: str, offset: int) -> Record:
    try:
        value = _parse(_decode(line, where, offset))
    except json.JSONDecodeError as error:
        # Some messages end in "at" themselves.
        reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({reason}); correct the line") from None
    except _KeyTwice as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds {_brief(value)}; give one JSON object a line")
    return Record(value, where)


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, _KeyTwice):
        raise
    except (ValueError, RecursionError):  # numbers of thousands of digits, brackets thousands deep
        raise json.JSONDecodeError("nested too deep or a number too long", text, 0) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _KeyTwice(f'the key "{twice}" is given twice in one object; keep one')
    return values


def _refuse_utf16(data: bytes, path: str | Path) -> None:
    """Of UTF-16 a byte order mark tells, or that every other byte of the first few, which JSON has from ASCII, is 0."""
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if marked or (len(data) >= 2 and {data[:4:2].strip(b"\0"), data[1:4:2].strip(b"\0")} > {b""}):
        raise DataError(f"{path}: is UTF-16, not UTF-8; save it as UTF-8")


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02X} at offset {offset + error.start}"
        raise DataError(f"{where}: not UTF-8 ({place}); save the file as UTF-8") from None


def _unpack(packed: bytes, path: str | Path) -> bytes:
    parts: list[bytes] = []
    rest = packed
    while rest.strip(b"\0"):  # a gzip file may hold several members, and zero padding after the last
        member = zlib.decompressobj(wbits=31)
        start = len(packed) - len(rest)
        try:
            parts.append(member.decompress(rest))
        except zlib.error as error:
            reason = str(error).rsplit(": ", 1)[-1]
            raise DataError(
                f"{path}: damaged gzip ({reason}) in the part at offset {start}; make or copy the file again"
            ) from None
        if not member.eof:
            raise DataError(f"{path}: gzip ends early, at offset {len(packed)}; make or copy the file again")
        rest = member.unused_data
    return b"".join(parts)


def _brief(value: Any) -> str:
    text = "null" if value is None else ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
