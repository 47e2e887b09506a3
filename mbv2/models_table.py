"""`mbv2 models`: the variants and what others published for them."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from mbv2.errors import UserError
from mbv2.zoo import VARIANTS

_NOTE = "Accuracy in percent on ImageNet's validation set, published by MindSpore / TF, not ours."


def main(argv: Sequence[str]) -> int:
    """Print one line per variant, or with --json a list of objects.

    Raises:
        UserError: an unknown option.
    """
    parser = argparse.ArgumentParser(prog="mbv2 models", description=_NOTE, exit_on_error=False)
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see mbv2 models --help)")
    if arguments.json:
        print(json.dumps({"note": _NOTE, "models": [asdict(variant) for variant in VARIANTS.values()]}, indent=2))
        return 0
    print(f"{'':24}{'MindSpore':^15}{'TensorFlow':^15}")
    print(f"{'model':<24}{'top-1':>7}{'top-5':>7} {'top-1':>7}{'top-5':>7}")
    for variant in VARIANTS.values():
        print(
            f"{variant.name:<24}{variant.mindspore_top1:>7.2f}{variant.mindspore_top5:>7.2f} "
            f"{variant.tf_top1:>7.2f}{variant.tf_top5:>7.2f}"
        )
    print(_NOTE)
    return 0
