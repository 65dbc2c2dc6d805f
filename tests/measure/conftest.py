from __future__ import annotations

import sys
from pathlib import Path

# tests/reference.py is shared by every folder of tests, which are no packages.
sys.path.insert(0, str(Path(__file__).parents[1]))
