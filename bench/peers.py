"""The command ``python -m bench.peers``: see ``bench.audit.peers``."""

import sys

from bench.audit.peers import main

if __name__ == "__main__":
    sys.exit(main())
