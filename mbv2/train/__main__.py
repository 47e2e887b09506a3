"""`python -m mbv2.train` is `mbv2 train`, in the form that torchrun starts."""

import sys

from mbv2.cli import main
from mbv2.distributed import leave

leave(main(["train", *sys.argv[1:]]))
