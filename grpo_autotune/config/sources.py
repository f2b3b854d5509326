"""The source of a configuration: a path, the name of a shipped profile, or the default."""

from pathlib import Path

from grpo_autotune.errors import ConfigError, nearest_hint
from grpo_autotune.files import is_file, is_folder

DEFAULT_FILE = "grpo.yaml"
DEFAULT_PROFILE = "demo"
SUFFIXES = {".yaml", ".yml"}


def profiles_folder() -> Path:
    """The folder of shipped profiles: inside the package where it was installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "profiles"
    return inside if inside.is_dir() else package.parent / "profiles"


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in profiles_folder().glob("*.yaml"))


def resolve_source(source: str | Path | None) -> tuple[str, Path]:
    """The name in messages and the path of a configuration file, given by its path or by the name of a shipped profile;
    None takes `./grpo.yaml` if it is there, else the profile `demo`. ConfigError, with the nearest name, where there is
    neither such a file nor such a profile."""
    if source is None:
        here = Path(DEFAULT_FILE)
        return (f"./{DEFAULT_FILE}", here) if here.is_file() else resolve_source(DEFAULT_PROFILE)
    path = Path(source)
    if is_file(path):
        return str(source), path
    if is_folder(path) and path.name not in profile_names():
        raise ConfigError("this is a folder", where=str(source), fix="Name the YAML file in it.")
    if path.suffix in SUFFIXES or path.name != str(source):
        fix = "Give a path, or the name of a shipped profile."
        raise ConfigError("there is no such file", where=str(source), fix=fix)
    names = profile_names()
    if path.name in names:
        return f"profile {path.name}", profiles_folder() / f"{path.name}.yaml"
    hint = nearest_hint(path.name, names, f"Profiles: {', '.join(names)}.")
    raise ConfigError("there is neither a file nor a shipped profile of this name", where=str(source), fix=hint)


def read_source(path: Path) -> str:
    """The text of a configuration file; ConfigError if it cannot be read, or is not UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read this file: {error}", where=str(path)) from error
