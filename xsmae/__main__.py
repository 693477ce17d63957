"""`python -m xsmae COMMAND ...` is `xsmae COMMAND ...`."""

import sys

from xsmae.cli import main

if __name__ == "__main__":
    sys.exit(main())
