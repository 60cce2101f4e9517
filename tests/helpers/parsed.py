"""The files of `conf/`, and Hydra's own, read once a process: to read and type them anew is a third
of what it takes to compose a command, and the quick tests compose a thousand."""

import pickle
from pathlib import Path
from typing import Any

from hydra._internal.config_repository import ConfigRepository

from doremi_train.config import conf_dir

_read = ConfigRepository.load_config
_kept: dict[tuple[Any, ...], bytes] = {}


def _load(self: ConfigRepository, config_path: str) -> Any:
    places = tuple(source.path for source in self.get_sources())
    if any(Path(place).is_absolute() and Path(place) != conf_dir() for place in places):
        return _read(self, config_path)  # a test's own, which may change
    asked = (*places, config_path)
    if asked not in _kept:
        _kept[asked] = pickle.dumps(_read(self, config_path))
    return pickle.loads(_kept[asked])  # noqa: S301 (ours)  # a copy: Hydra changes what it gets


def keep() -> None:
    ConfigRepository.load_config = _load  # type: ignore[method-assign]
