"""The files of `conf/`, and Hydra's own, read and put together once a process: to do it anew is two
thirds of what it takes to compose a command, and the quick tests compose a thousand."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository

from doremi_train.config import conf_dir

_kept: dict[tuple[Any, ...], bytes] = {}


def _once(repository: Any, make: Callable[[], Any], *asked: str) -> Any:
    """What `make` gives, of files that do not change while tests run."""
    places = tuple(source.path for source in repository.get_sources())
    if any(Path(place).is_absolute() and Path(place) != conf_dir() for place in places):
        return make()  # a test's own, which may change
    if (places, asked) not in _kept:
        _kept[places, asked] = pickle.dumps(make())
    return pickle.loads(_kept[places, asked])  # noqa: S301 (ours)  # a copy: Hydra changes it


def keep() -> None:
    read = ConfigRepository.load_config
    together = ConfigLoaderImpl._compose_config_from_defaults_list

    def load(self: Any, config_path: str) -> Any:
        return _once(self, lambda: read(self, config_path), config_path)

    def compose(self: Any, defaults: Any, repo: Any) -> Any:
        return _once(repo, lambda: together(self, defaults, repo), "together", repr(defaults))

    ConfigRepository.load_config = load  # type: ignore[method-assign]
    ConfigLoaderImpl._compose_config_from_defaults_list = compose  # type: ignore[method-assign]
