"""`python -m mbv2` is the command `mbv2`."""

import sys

from mbv2.cli import main

sys.exit(main())
