"""`dataset.source`: the files that it means, what each of them holds, and their hashes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from strixft.support.errors import DataError
from strixft.support.files import digest
from strixft.support.tables import did_you_mean

FileKind = Literal["jsonl", "json", "csv", "parquet", "arrow", "text"]

FILE_KINDS: dict[str, FileKind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
"""Ending → contents of the file; a file of another ending is read if it is named itself."""

COMPRESSIONS = (".gz", ".zst")
SPLITS = "dataset_dict.json"
ABOUT = ("dataset_info.json", "state.json", SPLITS)
"""Files that `datasets` saves beside its Arrow files; they hold no rows."""

HUB = "hub:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of data."""

    path: Path
    kind: FileKind

    @property
    def is_plain(self) -> bool:
        """Its bytes are those of its rows: neither packed nor in columns."""
        return self.kind not in ("parquet", "arrow") and not self.path.name.lower().endswith(
            COMPRESSIONS
        )

    @property
    def name(self) -> str:
        """The path as it may be shown."""
        return shown_path(self.path)


def shown_path(path: Path) -> str:
    """Return a path as text that can be printed: bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def unreadable(name: str, error: OSError) -> DataError:
    """Return the error for a file that cannot be read."""
    return DataError(
        f"{name} cannot be read: {error.strerror}", fix=f"ls -l {name}   shows whose it is"
    )


def is_hub(source: str) -> bool:
    """Check that the source is a data set of the hub, not a file: `hub:owner/name`.

    >>> is_hub("hub:owner/name"), is_hub("/data/train.jsonl")
    (True, False)
    """
    return source.startswith(HUB)


def resolve(source: str, folder: Path) -> str:
    """Return a source as an absolute path, or as `hub:…`.

    Args:
        source: As the recipe has it.
        folder: The recipe's; a relative source starts there.
    """
    if is_hub(source):
        return source
    path = Path(source)
    if source.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError:  # no such user: a path that does not exist
            path = Path(source)
    absolute = path if path.is_absolute() else folder / path
    known = _kind_of(path) is not None or bool(_GLOB.search(source))
    if _HUB_ID.fullmatch(source) and not known and not absolute.exists():
        return HUB + source
    return str(absolute if _GLOB.search(source) else _resolved(absolute))


def _resolved(path: Path) -> Path:
    try:
        return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return path


def _kind_of(path: Path) -> FileKind | None:
    name = path.name.lower()
    for ending in COMPRESSIONS:
        name = name.removesuffix(ending)
    return FILE_KINDS.get(Path(name).suffix)


def _paths_in(folder: Path) -> list[Path]:
    """Return what a folder holds at any depth, but for hidden files, in a fixed order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    )


def _is_data(path: Path) -> bool:
    about = path.name in ABOUT and (path.parent / ABOUT[0]).is_file()
    return not (_kind_of(path) is None or path.suffix == ".md" or path.is_dir() or about)


def data_files(folder: Path, most: int = 300) -> list[Path]:
    """Return data files below a folder that a person may mean, the newest first.

    Hidden folders, runs, packages and virtual environments are left out.

    Args:
        folder: The folder.
        most: Number of files at most.
    """
    found: list[Path] = []
    for here, names, files in os.walk(folder):
        names[:] = [name for name in names if _may_hold_data(Path(here, name))]
        paths = (Path(here, name) for name in files if not name.startswith((".", "requirements")))
        found += [path for path in paths if _is_data(path)]
        if len(found) > 20 * most:
            break
    return sorted(filter(Path.is_file, found), key=lambda p: -p.stat().st_mtime)[:most]


def _may_hold_data(folder: Path) -> bool:
    left_out = {"runs", "node_modules", "site-packages", "build", "dist", "strixft"}
    name = folder.name
    hidden = name.startswith((".", "__")) or name in left_out
    return not hidden and not (folder / "pyvenv.cfg").exists()


def _file(path: Path, folder: Path | None = None) -> SourceFile:
    """Return a file to read; refuse a link out of its folder, as the user did not name its target.

    Args:
        path: The file.
        folder: The folder that the user named instead.
    """
    target = path.resolve() if folder and path.is_symlink() else path
    if folder and target is not path and not target.is_relative_to(folder.resolve()):
        raise DataError(
            f"{shown_path(path)} is a link that leaves its folder, to {shown_path(target)}",
            fix=f"name the file itself in dataset.source: {shown_path(target)}",
        )
    if not path.is_file():
        raise DataError(
            f"{shown_path(path)} is not a regular file",
            fix="name files, folders or patterns of files in dataset.source",
        )
    return SourceFile(path, _kind_of(path) or "jsonl")


def _in_folder(folder: Path) -> list[SourceFile]:
    paths = _paths_in(folder)
    for path in paths:
        if path.name == SPLITS:  # `datasets` divided it: its test rows are not to be trained
            names = sorted(p.name for p in path.parent.iterdir() if (p / ABOUT[0]).is_file())
            named = path.parent / ("train" if "train" in names or not names else names[0])
            raise DataError(
                f"the folder {shown_path(path.parent)} holds the splits {', '.join(names)}",
                fix=f"name one of them in dataset.source: {shown_path(named)}",
            )
    found = [_file(path, folder) for path in paths if _is_data(path)]
    if not found:
        raise DataError(
            f"the folder {shown_path(folder)} holds no data files",
            fix=f"put files with one of these endings into it: {', '.join(FILE_KINDS)}"
            " (also with .gz or .zst)",
        )
    return found


def _matching(pattern: str) -> list[SourceFile]:
    parts = Path(pattern).parts
    start = next(i for i, part in enumerate(parts) if _GLOB.search(part))
    root, rest = Path(*parts[:start]), "/".join(parts[start:])
    try:
        found = sorted(p for p in root.glob(rest) if p.is_file() and not p.name.startswith("."))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{pattern!r} is not a pattern of files: {error}", fix="use * and ? in dataset.source"
        ) from None
    if not found:
        raise DataError(
            f"no file matches {pattern!r}", fix=f"ls {shown_path(root)}   shows what is there"
        )
    return [_file(path) for path in found]


PLACEHOLDER = "train.jsonl"
"""The file that recipes name which ship without data."""


def _missing(path: Path) -> DataError:
    own = "--set dataset.source=my-chats.jsonl"
    if not path.parent.is_dir():
        fix = f"correct dataset.source, or your own: {own}"
    else:
        names = sorted(shown_path(Path(p.name)) for p in path.parent.iterdir() if _is_data(p))
        if path.name == PLACEHOLDER and not names and any(path.parent.glob("*.yaml")):
            return DataError(
                "the recipe comes without data: give it your own",
                fix=f"{own}   a file, a folder or a data set on the hub; docs/data.md has the"
                " formats",
            )
        near = f"{did_you_mean(path.name, names[:200])}, or your own: " if names else ""
        fix = f"{near}{own}"
    return DataError(f"there is no data file {shown_path(path)}", fix=fix)


def find_files(source: str) -> list[SourceFile]:
    """Return the files that a source means, in a fixed order.

    Args:
        source: A file, a folder or a pattern, as `resolve` gave it.

    Raises:
        DataError: There is none, or one is not a file to read.
    """
    path = Path(source)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.exists():
            return [_file(path)]
        if not path.is_symlink() and _GLOB.search(source):
            return _matching(source)
        raise _missing(path)
    except PermissionError as error:
        raise unreadable(shown_path(path), error) from None
    except (OSError, ValueError) as error:  # name too long, a null byte, a loop of links
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{shown_path(path)[:200]} cannot be found: {error}", fix="correct dataset.source"
        ) from None


def ignored_files(source: str) -> list[str]:
    """Return the files of a folder that are not read, since their ending is unknown."""
    folder = Path(source)
    paths = _paths_in(folder) if folder.is_dir() else []
    return [shown_path(path) for path in paths if path.is_file() and not _is_data(path)]


def find_sources(sources: Iterable[str]) -> list[SourceFile]:
    """Return the files of several sources; data sets of the hub are left out.

    Raises:
        DataError: There is none, or one is not a file to read.
    """
    return [one for source in sources if not is_hub(source) for one in find_files(source)]


def fingerprint(sources: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return one hash over all files of sources, and each file with its size and hash.

    Of a single file the hash is its SHA-256. Data sets of the hub are left out: their cached
    revision is noted when they are read.

    Raises:
        DataError: A file is missing or cannot be read.
    """
    files: list[dict[str, Any]] = []
    for file in find_sources(sources):
        try:
            size = file.path.stat().st_size
            files.append({"path": file.name, "bytes": size, "sha256": digest(file.path)})
        except OSError as error:
            raise unreadable(file.name, error) from None
    hashes = [row["sha256"] for row in files]
    if len(hashes) == 1:
        return hashes[0], files
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest(), files
