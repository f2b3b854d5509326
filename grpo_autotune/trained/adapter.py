"""`model.adapter` in a user's words made the one folder that a run, its trials and its resumption all start from."""

from collections.abc import Callable

from grpo_autotune.config.places import check_same_adapter
from grpo_autotune.config.schema import RunConfig
from grpo_autotune.errors import ConfigError
from grpo_autotune.trained.source import find_whole

WHERE = "model.adapter"


def settled(config: RunConfig, say: Callable[[str], None]) -> RunConfig:
    """The configuration with `model.adapter` as a folder of PEFT's, named as `find_whole` takes them; `say` is told
    where that adapter was trained on a base of another name.

    Raises:
        ConfigError: There is nothing there, or whole weights, or the `peft` section is another one's.
    """
    if config.model.adapter is None:
        return config
    try:
        trained = find_whole(config.model.adapter)
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{WHERE} {error.where}", fix=error.fix) from error
    if trained.adapter is None:
        fix = f"Write model.name_or_path: {trained.path} in its place."
        raise ConfigError(f"{trained.path} holds whole weights, and no adapter", where=WHERE, fix=fix)
    check_same_adapter(config.peft, str(trained.path))
    bases = {trained.base, trained.config.model.name_or_path if trained.config is not None else None}
    if config.model.name_or_path is not None and config.model.name_or_path not in bases:
        say(f"model.adapter was trained on {trained.base}, and goes onto {config.model.name_or_path}")
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(trained.path)})})
