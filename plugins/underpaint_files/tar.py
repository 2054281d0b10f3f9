"""The members of a tar file, by their headers alone."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any

import attrs

from underpaint import DataError

__all__ = ["Member", "TruncatedTarError", "members"]

_BLOCK = 512


class TruncatedTarError(Exception):
    """The file ends before the archive does.

    Args:
        problem: Where it ends.
        member: The member that is incomplete, or an empty string when it ends between two.
    """

    def __init__(self, problem: str, member: str = "") -> None:
        super().__init__(problem)
        self.member = member


@attrs.frozen
class Member:
    """A regular file in a tar file.

    Attributes:
        name: Its path.
        offset: Where its content starts, in bytes.
        size: Its length in bytes.
    """

    name: str
    offset: int
    size: int
    _file: Any

    def read(self) -> bytes:
        """Return its content."""
        self._file.seek(self.offset)
        return bytes(self._file.read(self.size))


def members(file: Any, total: int) -> Iterator[Member]:
    """Yield the regular files of an uncompressed tar file.

    Python's own reader takes a file that ends between two members for a complete one; here the end mark
    is required, because a copy that broke off there would lose samples silently.

    Args:
        file: Open for reading, seekable.
        total: Its size in bytes.

    Raises:
        TruncatedTarError: It ends within a member, or without the end mark.
        DataError: It is not a tar file.
    """
    offset, last, long_name = 0, "", ""
    while True:
        file.seek(offset)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise TruncatedTarError(
                f"ends without an end mark after member '{last}'" if last else "is empty or cut off"
            )
        if not any(header):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            where = f"is damaged after member '{last}'" if last else "is not an uncompressed tar file"
            raise DataError(f"'{getattr(file, 'name', 'The file')}' {where}: {error}.") from error
        start = offset + _BLOCK
        offset = start + -(-info.size // _BLOCK) * _BLOCK
        if start + info.size > total:
            name = long_name or info.name
            raise TruncatedTarError(f"ends within member '{name}'", name)
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            long_name = _pax_path(file.read(info.size)) or long_name
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = file.read(info.size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type != tarfile.XGLTYPE:
            last, long_name = long_name or info.name, ""
            if info.isreg():
                yield Member(last, start, info.size, file)


def _pax_path(records: bytes) -> str:
    """Return the ``path`` of a pax header: records of "length key=value" (POSIX.1-2001)."""
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit():
            break
        record = rest[: int(length) - len(length) - 2]
        if record.startswith(b"path="):
            return record[5:].decode("utf-8", "surrogateescape")
        records = records[int(length) :]
    return ""
