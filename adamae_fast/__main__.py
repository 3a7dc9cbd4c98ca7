"""``python -m adamae_fast``."""

import sys

from adamae_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
