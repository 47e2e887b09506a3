"""`python -m mbv2` is the command `mbv2`."""

import sys

from mbv2.cli import main

code = main()
# Not imported for this alone: most commands that end at once (`--help`) do without torch.
if "mbv2.distributed" in sys.modules:
    sys.modules["mbv2.distributed"].leave(code)
sys.exit(code)
