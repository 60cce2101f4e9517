"""A session of the command in this process, for what asks its parts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import hydra
from omegaconf import OmegaConf

from doremi_train import command
from doremi_train.config import conf_dir, load
from doremi_train.parallel import comm
from doremi_train.stages.options import Config
from doremi_train.stages.session import Session, open_session


@contextlib.contextmanager
def opened(*overrides: str) -> Iterator[Session]:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra.compose("config", overrides=list(overrides))
    plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    try:
        with open_session(load(Config, plain), plain, command.child) as session:
            yield session
    finally:
        comm.leave()
