"""The training files: those that come with this package, and a user's own."""

from importlib import resources
from pathlib import Path
from typing import Any

from modeling_fromage.io.option_files import read_options

CONFIGS = Path(str(resources.files(__package__) / "configs"))


def packaged_configs() -> list[str]:
    """The names of the training files that come with this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def read_config(path: str, overrides: list[str]) -> dict[str, Any]:
    """The values of a YAML file, or of a config of this package by its name, updated by overrides.

    Raises:
        ValueError: The file cannot be read or is not a mapping, or an override does not have the form key=value.
    """
    if not Path(path).exists() and str(path) in packaged_configs():
        path = str(CONFIGS / f"{path}.yaml")
    return read_options(path, overrides, f"Give a YAML file, or one of: {', '.join(packaged_configs())}")
