"""Command lines of argparse whose errors are sentences: `mbv2 convert` and `mbv2 export`."""

import argparse
from collections.abc import Mapping, Sequence

from mbv2.errors import UserError


def parser(prog: str, description: str, formats: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser that raises instead of exiting, takes no abbreviations, and explains `formats` at the end of its help.

    Args:
        prog: the command, "mbv2 convert".
        description: a sentence.
        formats: name -> what it is.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="formats: " + "; ".join(f"{name}: {about}" for name, about in formats.items()),
        exit_on_error=False,
        allow_abbrev=False,
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], needed: str) -> argparse.Namespace:
    """What `parser` makes of `argv`.

    Raises:
        UserError: an unknown or wrong option, or the positional arguments, called `needed`, are missing.
    """
    try:
        options, unknown = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see {parser.prog} --help)") from error
    except SystemExit as error:
        # Python 3.11 and older still exit when positional arguments are missing.
        if not error.code:
            raise
        raise UserError(f"{needed} are needed (see {parser.prog} --help)") from error
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see {parser.prog} --help)")
    return options
