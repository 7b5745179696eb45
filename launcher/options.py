"""Command-line options made from the fields of a configuration.

A field is an option, and nothing is checked here that the configuration checks itself: only what
was given on the command line is passed on, so that flags come before `BATON_*`, before the YAML
file, before defaults.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import rich_click as click
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from baton.config import ProcessConfig, WorkerConfig, load

C = TypeVar("C", bound=ProcessConfig)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def flag(name: str) -> str:
    """`kv_blocks` is `--kv-blocks`."""
    return f"--{name.replace('_', '-')}"


def config_options(kind: type[ProcessConfig]) -> Decorator:
    """`--config` and one option for each field of `kind`, in the order of the fields."""
    file = click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="BATON_CONFIG",
        show_envvar=True,
        help="YAML file with any of these settings, named as in BATON_*, in lower case",
    )

    # click puts the decorator nearest to the function last
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(kind.model_fields.items()):
            command = _option(name, field, _panel(kind, name))(command)
        return file(command)

    return decorate


def read_config(kind: type[C], options: dict[str, Any]) -> C:
    """The configuration of a command decorated with `config_options`. Raises ConfigError."""
    flags = {k: v for k, v in options.items() if k in kind.model_fields and v is not None}
    return load(kind, flags, options["config_file"])


def with_model(config: C) -> C:
    """`config`, with the demo model where it names none."""
    if config.model is not None:
        return config
    import demo_model

    name = config.model_name or "demo"
    return config.model_copy(update={"model": demo_model.path(), "model_name": name})


def _option(name: str, field: FieldInfo, panel: str) -> Decorator:
    declaration = flag(name)
    if field.annotation is bool:
        declaration = f"{declaration}/--no-{declaration[2:]}"
    return click.option(
        declaration,
        name,
        type=_type(field.annotation),
        default=None,
        metavar="SECRET" if field.annotation is SecretStr else None,
        help=_help(field),
        panel=panel,
    )


def _panel(kind: type[ProcessConfig], name: str) -> str:
    """Which box of the help text a field belongs in: the class that declares it says."""
    for owner, title in ((ProcessConfig, "Every process"), (WorkerConfig, "Every worker")):
        if kind is not owner and name in owner.model_fields:
            return title
    return "Options"


def _type(annotation: Any) -> Any:
    """The click type that parses a value of `annotation`; ranges are left to pydantic."""
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (a for a in get_args(annotation) if a is not types.NoneType)
    if annotation is Path:
        return click.Path(path_type=Path)
    return annotation if annotation in (int, float, bool) else str


def _help(field: FieldInfo) -> str:
    """Description, bounds and default on one line."""
    facts = [
        f"{sign} {getattr(bound, key)}"
        for bound in field.metadata
        for key, sign in _BOUNDS.items()
        if getattr(bound, key, None) is not None
    ]
    default = field.default
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default not in (None, ""):
        facts.append(f"default {str(default).lower() if isinstance(default, bool) else default}")
    return f"{field.description} ({', '.join(facts)})" if facts else f"{field.description}"
