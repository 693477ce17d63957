"""`python -m xsmae.main --config=...` is `xsmae pretrain --config=...`."""

import sys

from xsmae.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
