"""`python -m beit_fast` is the command `beit-fast`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
