"""The command ``python -m bench.findings``: see ``bench.audit.findings``."""

import sys

from bench.audit.findings import main

if __name__ == "__main__":
    sys.exit(main())
