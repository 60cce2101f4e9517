"""Configurations as Hydra composes them."""

from typing import Any

import hydra
from omegaconf import OmegaConf

from doremi_train.config import conf_dir


def compose(*overrides: str) -> dict[str, Any]:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose("config", overrides=list(overrides))
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return plain
