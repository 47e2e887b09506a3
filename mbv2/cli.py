"""The command `mbv2`: picks the subcommand, and turns what a user can put right into one line on stderr."""

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from mbv2.errors import UserError

# Subcommand -> (module with a `main(argv) -> int`, what it does). Imported when called: torch takes a second.
COMMANDS = {
    "train": ("mbv2.train.run", "train or fine-tune, in one process or under torchrun, mpirun or srun"),
    "eval": ("mbv2.evaluate", "top-1 and top-5 accuracy of trained weights on labelled pictures"),
    "infer": ("mbv2.infer", "what is on these pictures"),
    "convert": ("mbv2.convert.command", "weights of another library or format into ours, and back to MindSpore"),
    "export": ("mbv2.export.command", "a trained network as ONNX, torch.export, AOTInductor, TorchScript, int8, ..."),
    "models": ("mbv2.models_table", "the 22 published variants, with the accuracy others published for them"),
    "doctor": ("mbv2.doctor", "what will be used on this machine, and why"),
    "quickstart": ("mbv2.quickstart", "draw a small data set, train, evaluate and infer, end to end"),
}
EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for what the user can put right, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else EXIT_USAGE
    if argv[0] in ("-V", "--version"):
        from mbv2 import __version__

        print(f"mbv2 {__version__}")
        return 0
    return run_guarded(lambda: _run(argv[0], argv[1:]))


def run_guarded(run: Callable[[], int]) -> int:
    """Call `run` and return its exit code, or the code of what went wrong, told in one line on stderr."""
    try:
        code = run()
        sys.stdout.flush()  # a closed pipe shows here, not in the interpreter's exit
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("mbv2: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader is gone (`| head`); keep Python's own flush at exit from complaining.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except RuntimeError as error:
        # MBV2_BACKEND names a backend that cannot run: the operators, which know no command line, say so this way.
        kernels = sys.modules.get("mbv2.kernels")
        if kernels is None or not isinstance(error, kernels.BackendError):
            raise
        return _fail(str(error))
    return code


def _run(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"no command {command!r}{meant} (one of {', '.join(COMMANDS)})")
    return importlib.import_module(COMMANDS[command][0]).main(argv)


def _fail(message: str) -> int:
    print(f"mbv2: error: {message}", file=sys.stderr)
    return EXIT_USAGE


def _usage() -> str:
    lines = ["usage: mbv2 COMMAND [options]", "", "MobileNetV2 for PyTorch.", "", "commands:"]
    lines += [f"  {name:<11} {about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", "options:", "  -h, --help  this text; `mbv2 COMMAND --help` lists a command's options"]
    return "\n".join([*lines, "  --version   the version"])
