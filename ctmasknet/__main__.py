"""`python -m ctmasknet` is the command `ctmasknet`."""

import sys

from ctmasknet.cli import main

if __name__ == "__main__":
    sys.exit(main())
