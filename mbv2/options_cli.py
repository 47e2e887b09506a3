"""A dataclass of options out of a command line and a YAML file, for the subcommands that are not training."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from mbv2.errors import UserError

T = TypeVar("T")


def parse(options: type[T], argv: Sequence[str], prog: str, description: str) -> tuple[T, dict[str, Any]]:
    """Fill the dataclass `options` from `argv`; `-c FILE.yaml` gives values that the command line overrides.

    The YAML may be a variant's or a run's, which is written for training: keys that are no field of `options` are
    passed over. What it says of the classes (num_classes, class_offset) describes the data a training would use,
    not the weights at hand, and so is returned apart.

    Args:
        options: a dataclass with plain fields.
        argv: the arguments after the subcommand.
        prog: how the program is called, for usage and messages.
        description: for `--help`, which prints and raises SystemExit(0).

    Returns:
        The options, and {num_classes, class_offset} as far as the YAML has them.

    Raises:
        UserError: an unknown option, a value of the wrong kind, or an unreadable YAML file.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", type=str, help="YAML file with option values, e.g. a variant's recipe")
    parser.add_class_arguments(options)
    config, argv = _split_config(list(argv), prog)
    described = {key: config.pop(key) for key in ("num_classes", "class_offset") if key in config}
    known = {field.name for field in fields(options)}  # type: ignore[arg-type]
    given = [f"--{key}={_text(value)}" for key, value in config.items() if key in known]
    try:
        namespace = parser.parse_args([*given, *argv])
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(f"{_short(str(error))} (see {prog} --help)") from error
    return options(**{name: namespace[name] for name in known}), described


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        UserError: missing, not YAML, or not a mapping of option names to values.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"-c {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise UserError(f"-c {path}: not YAML ({' '.join(str(error).split())})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"-c {path}: must hold option names and values, one `name: value` a line")
    return content


def check_writable(path: str, option: str) -> None:
    """Find out before the work, not after it, that a result could not be written.

    Raises:
        UserError: the folder of `path` does not exist, or `path` is a folder.
    """
    if path and Path(path).is_dir():
        raise UserError(f"{option} {path}: is a folder; give the name of a file")
    if path and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{option} {path}: no folder {Path(path).absolute().parent}; make it first")


def write_text(path: str, text: str, option: str) -> None:
    """Write a result file whole; what the file system refuses becomes a UserError that names `option`."""
    from mbv2.files import write_atomic

    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror})") from error


def _split_config(argv: list[str], prog: str) -> tuple[dict[str, Any], list[str]]:
    finder = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("-c", "--config")
    try:
        found, rest = finder.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see {prog} --help)") from error
    return (read_yaml(found.config) if found.config is not None else {}), rest


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(message: str) -> str:
    """jsonargparse's message on one line, in the words of the command line."""
    message = " ".join(message.split()).replace("Expected a ", "expected ").replace("Got value", "got")
    message = re.sub(r'^Parser key "([^"]+)": ', r"--\1: ", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message).rstrip(":.")
