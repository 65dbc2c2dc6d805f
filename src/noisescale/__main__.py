"""``python -m noisescale``."""

from __future__ import annotations

import sys

from noisescale.cli import main

if __name__ == "__main__":
    sys.exit(main())
