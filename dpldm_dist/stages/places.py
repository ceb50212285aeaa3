"""Where a data set is read from: its folder, or the mirror of its address. Not a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dpldm_dist.config import Config
from dpldm_dist.data.manifest import MANIFEST
from dpldm_dist.data.remote import Mirror
from dpldm_dist.runtime.rundir import closed_dataset_dir, dataset_dir

Which = Literal["public", "private", "heldout"]
What = Literal["images", "latents"]


def place_of(config: Config, which: Which, what: What) -> Path | Mirror:
    """The place of a data set; what is private in it is closed to other users.

    Raises: PrivacyError; DataError if there is an address and it cannot be read.
    """
    address = getattr(getattr(config.data, which), what)
    if isinstance(address, str):
        mirror = Mirror(
            address,
            dataset_dir(config, which, what),
            most_bytes=int(config.data.cache_gb * 2**30),
        )
        closed_dataset_dir(config, which, what)
        return mirror
    return closed_dataset_dir(config, which, what)


def shown_place(config: Config, which: Which, what: What) -> str:
    """The folder or address of a data set, for messages."""
    address = getattr(getattr(config.data, which), what)
    return address if isinstance(address, str) else str(dataset_dir(config, which, what))


def is_address(config: Config, which: Which, what: What) -> bool:
    """Whether the data set lies elsewhere, finished."""
    return isinstance(getattr(getattr(config.data, which), what), str)


def is_finished(config: Config, which: Which, what: What) -> bool:
    """Whether a data set is there to be read. What an address holds is finished, or an error."""
    there = (dataset_dir(config, which, what) / MANIFEST).is_file()
    return there or is_address(config, which, what)
