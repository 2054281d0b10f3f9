"""Checkpoints that are complete or absent: written aside, hashed, named in a manifest, then renamed into place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from underpaint.errors import DataError, UnderpaintError
from underpaint.training.ranks import Ranks
from underpaint.weights import file_hash

__all__ = ["Checkpoint", "CheckpointStore"]

_log = logging.getLogger("underpaint")

FORMAT = 1
MANIFEST = "manifest.json"
MAX_FAILURES = 3

_COMMITTED = re.compile(r"step-(\d{7,})")
_LEFTOVER = re.compile(r"step-\d{7,}\.tmp-[0-9a-f]+")


@attrs.frozen
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        step: Step it was made after.
        folder: Where it is.
        world_size: Ranks that wrote it.
        config_hash: Hash of the configuration of the run.
        plugins: Version of each plugin by name.
        extra: What the caller stored.
    """

    step: int
    folder: Path
    world_size: int
    config_hash: str
    plugins: Mapping[str, str]
    extra: Mapping[str, Any]


class _InvalidError(Exception):
    """Why a folder is no valid checkpoint."""


class _OtherFormatError(_InvalidError):
    """A checkpoint of another version of underpaint: whole, for all that this one can tell."""


def _own(rank: int) -> str:
    return f"rank-{rank:05d}"


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read(path: Path, *, verify: bool) -> Checkpoint:
    """Check a folder and read its manifest.

    Raises:
        _InvalidError: It is not a complete checkpoint.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise _InvalidError("it has no manifest") from None
    except OSError as error:
        raise _InvalidError(f"its manifest cannot be read: {error.strerror}") from None
    try:
        manifest = json.loads(text)
        body, digest = manifest["body"], manifest["sha256"]
        version = body["format"]
    except (ValueError, KeyError, TypeError):
        raise _InvalidError("its manifest is malformed") from None
    if version != FORMAT:
        raise _OtherFormatError(f"it has format {version}, and this version reads {FORMAT}")
    if _digest(body) != digest:
        raise _InvalidError("its manifest is damaged")
    for name, expected in body["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["size"]:
                raise _InvalidError(f"'{name}' has {size} bytes instead of {expected['size']}")
            if verify and file_hash(file) != expected["sha256"]:
                raise _InvalidError(f"the content of '{name}' does not match its hash")
        except FileNotFoundError:
            raise _InvalidError(f"'{name}' is missing") from None
        except OSError as error:
            raise _InvalidError(f"'{name}' cannot be read: {error.strerror}") from None
    return Checkpoint(
        step=body["step"],
        folder=path,
        world_size=body["world_size"],
        config_hash=body["config_hash"],
        plugins=body["plugins"],
        extra=body["extra"],
    )


class CheckpointStore:
    """The checkpoints of one stage, in folders ``step-0000100``.

    A folder is a checkpoint when its manifest parses and every file in it has the size that it says, and the content
    where `latest` compares that. Anything else is left alone and skipped, with one warning. All methods are called by
    every rank and give the same answer on each. Saving needs the run's lock.

    Args:
        folder: Where they are; made at the first save.
        keep: Valid checkpoints to keep, at least 1.
        ranks: The processes.
        config_hash: Recorded in the manifest.
        plugins: Versions by name, recorded in the manifest.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        ranks: Ranks,
        *,
        config_hash: str = "",
        plugins: Mapping[str, str] | None = None,
    ) -> None:
        assert keep >= 1, keep
        self._folder = folder
        self._keep = keep
        self._ranks = ranks
        self._config_hash = config_hash
        self._plugins = dict(plugins or {})
        self._failures = 0
        # Names of folders that were found to be no valid checkpoint; of content, only a look at every byte finds out.
        self._damaged: set[str] = set()

    def _committed(self) -> list[tuple[int, Path]]:
        """Return what looks like a checkpoint, newest first."""
        if not self._folder.is_dir():
            return []
        matches = ((_COMMITTED.fullmatch(path.name), path) for path in self._folder.iterdir())
        return sorted(((int(match.group(1)), path) for match, path in matches if match is not None), reverse=True)

    def _look(self, path: Path, *, verify: bool = False) -> Checkpoint:
        if path.name in self._damaged:
            raise _InvalidError("it was found to be damaged before")
        return _read(path, verify=verify)

    def _valid(self, *, verify: bool = False, refuse: bool = False) -> Iterator[Checkpoint]:
        for _, path in self._committed():
            try:
                yield self._look(path, verify=verify)
            except _OtherFormatError as reason:
                if refuse:
                    raise DataError(
                        f"The checkpoint '{path}' was written by another version of underpaint: {reason}; go on with "
                        "the version that the run's provenance.json names, or choose another --out to start anew."
                    ) from None
            except _InvalidError as reason:
                if path.name not in self._damaged:
                    self._damaged.add(path.name)
                    _log.warning("The checkpoint '%s' is skipped: %s.", path, reason)

    def latest(self, *, verify: bool = False) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None.

        Args:
            verify: Also compare the content of every file with its hash.

        Raises:
            DataError: It is of another format. Starting anew would throw away what it holds.
        """
        found: Checkpoint | str | None = None
        if self._ranks.is_main:
            try:
                found = next(self._valid(verify=verify, refuse=True), None)
            except DataError as error:
                found = str(error)
        found = self._ranks.broadcast_object(found)
        if isinstance(found, str):
            raise DataError(found)
        return found

    def save(self, step: int, write: Callable[[Path], None], extra: Mapping[str, Any]) -> Checkpoint | None:
        """Make a checkpoint, or leave everything as it was.

        Args:
            step: Step that was finished last.
            write: Called on every rank with a folder of the rank's own; the files that it writes there become files of
                the checkpoint, and their names must differ between ranks. An OSError in it fails the save. A `write`
                that uses collectives must raise on all ranks when it raises between two of them, as `Engine.save` does.
            extra: JSON values of rank 0.

        Returns:
            The checkpoint, or None when it could not be made. Training can go on then: older ones are intact.

        Raises:
            UnderpaintError: The third save in a row failed; or `write` raised something else on another rank.
        """
        name = f"step-{step:07d}"
        begun = self._begin(name) if self._ranks.is_main else None
        temporary, problem = self._ranks.broadcast_object(begun or ("", None))
        path = self._folder / temporary
        if temporary and problem is None:
            problem = self._write_all(path, step, write, extra)
        if problem is None:
            self._failures = 0
            made = _read(self._folder / name, verify=False) if self._ranks.is_main else None
            return self._ranks.broadcast_object(made)
        if self._ranks.is_main:
            shutil.rmtree(path, ignore_errors=True)
            _log.error("The checkpoint '%s' could not be saved (%s); training goes on.", self._folder / name, problem)
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            raise UnderpaintError(
                f"{self._failures} checkpoints in a row could not be saved in '{self._folder}' ({problem}); "
                "free space or mend the disk and start again: older checkpoints are intact."
            )
        return None

    def _begin(self, name: str) -> tuple[str, str | None]:
        """Make the temporary folder, with one for each rank.

        Returns:
            Its name, empty when the checkpoint exists already; and what went wrong, or None.
        """
        temporary = f"{name}.tmp-{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)
            try:
                self._look(self._folder / name)
            except _InvalidError:
                for rank in range(self._ranks.world_size):
                    (self._folder / temporary / _own(rank)).mkdir(parents=True)
                return temporary, None
        except OSError as error:
            return temporary, f"rank 0: {error}"
        return "", None

    def _write_all(self, path: Path, step: int, write: Callable[[Path], None], extra: Mapping[str, Any]) -> str | None:
        """Write the files of all ranks and commit them.

        Returns:
            What went wrong, or None.
        """
        failure: Exception | None = None
        files: dict[str, dict[str, Any]] = {}
        try:
            write(path / _own(self._ranks.rank))
            files = self._hand_in(path)
        except Exception as error:
            failure = error
        # Every rank gets here, whatever happened to it, so none waits in a collective for one that has left.
        fatal = failure is not None and not isinstance(failure, OSError)
        reports = self._ranks.all_gather_object((files, None if failure is None else str(failure), fatal))
        if fatal:
            assert failure is not None
            raise failure
        problems = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(reports) if text is not None]
        # By the reports: of two ranks that look into the folder at one time, neither sees the other's file.
        owners = Counter(name for report, *_ in reports for name in report)
        problems += [f"{count} ranks have a file '{name}'" for name, count in owners.items() if count > 1]
        if any(is_fatal for *_, is_fatal in reports):
            raise UnderpaintError(f"The checkpoint of step {step} failed ({'; '.join(problems)}).")
        if problems:
            return "; ".join(problems)
        merged = {name: facts for report, *_ in reports for name, facts in report.items()}
        problem = self._commit(path, step, merged, extra) if self._ranks.is_main else None
        return self._ranks.broadcast_object(problem)

    def _hand_in(self, path: Path) -> dict[str, dict[str, Any]]:
        """See this rank's files onto the disk and move them to those of the others.

        Returns:
            Size and hash of each file.
        """
        own = path / _own(self._ranks.rank)
        report: dict[str, dict[str, Any]] = {}
        for file in sorted(item for item in own.rglob("*") if item.is_file()):
            _sync(file)
            name = file.relative_to(own).as_posix()
            report[name] = {"size": file.stat().st_size, "sha256": file_hash(file)}
            target = path / name
            if name == MANIFEST:
                raise FileExistsError(f"a file of a checkpoint cannot be called '{name}'")
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
            _sync(target.parent)
        shutil.rmtree(own)
        return report

    def _commit(self, path: Path, step: int, files: Mapping[str, Any], extra: Mapping[str, Any]) -> str | None:
        """Write the manifest and put the folder into place.

        Returns:
            What went wrong, or None.
        """
        body = {
            "format": FORMAT,
            "step": step,
            "world_size": self._ranks.world_size,
            "config_hash": self._config_hash,
            "plugins": self._plugins,
            "files": files,
            "extra": extra,
        }
        target = self._folder / f"step-{step:07d}"
        try:
            with (path / MANIFEST).open("w") as file:
                json.dump({"body": body, "sha256": _digest(body)}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync(path)
            if target.exists():
                self._remove(target)
            path.rename(target)
            self._damaged.discard(target.name)
            _sync(self._folder)
        except OSError as error:
            return f"rank 0: {error}"
        for old in list(self._valid())[self._keep :]:
            try:
                self._remove(old.folder)
            except OSError as error:
                _log.warning("The old checkpoint '%s' could not be removed: %s.", old.folder, error)
        return None

    def _remove(self, path: Path) -> None:
        # Under another name first: a folder that lost half its files must not be there under this one.
        doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
