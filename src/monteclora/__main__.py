"""``python -m monteclora`` is ``monteclora``."""

import sys

from monteclora.cli import main

if __name__ == "__main__":
    sys.exit(main())
