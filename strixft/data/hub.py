"""Data sets of the hub, through the `datasets` library and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from strixft.data.arrow import changes_of, rows_of
from strixft.errors import DataError
from strixft.formats import Row, RowFault
from strixft.sources import HUB

ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class HubSet:
    """One split of a data set of the hub, as Arrow on disk."""

    name: str
    rows_on_disk: Any
    """A `datasets.Dataset`."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data set does."""
        return str(self.rows_on_disk._fingerprint)

    def rows(self) -> Iterator[tuple[int, Row | RowFault, int]]:
        """The rows, numbered from 1."""
        number = 0
        rows = self.rows_on_disk.with_format("arrow")
        changes = changes_of(rows.data.schema, self.name)
        for table in rows.iter(ROWS_AT_ONCE):
            for row in rows_of(table, changes):
                number += 1
                yield number, row, table.nbytes // table.num_rows


def open_hub(source: str, split: str, *, offline: bool) -> HubSet:
    """A data set of the hub; from the cache alone where there is no network.

    Args:
        source: `hub:owner/name`, or `hub:owner/name:subset`.
        split: Which of its splits.
        offline: Never ask the network.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    import datasets

    name, _, subset = source.removeprefix(HUB).partition(":")
    settings = datasets.DownloadConfig(local_files_only=offline)
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline  # then it looks into its cache alone
    try:
        found = datasets.load_dataset(name, subset or None, split=split, download_config=settings)
    except Exception as error:  # the library raises what its many back ends raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the data set {name!r} of the hub cannot be loaded: {first}",
            fix="is it a file? then correct its path, relative to the recipe's file; else: is the"
            f" network there, is it gated (hf auth login), is {split!r} one of its splits",
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return HubSet(f"{HUB}{name}", found)
