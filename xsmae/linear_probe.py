"""`python -m xsmae.linear_probe --encoder=...` is `xsmae probe --encoder=...`."""

import sys

from xsmae.cli.probe import main

if __name__ == "__main__":
    sys.exit(main())
