"""The scripts beside the package are no distribution, so the tests find them by their folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.extend(str(folder) for folder in (ROOT, ROOT / "src") if str(folder) not in sys.path)
