"""MKL reads its rounding mode once, at its first use: set it before any other test makes torch multiply."""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
