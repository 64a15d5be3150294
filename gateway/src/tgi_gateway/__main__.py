"""``python -m tgi_gateway``: the same as the command."""

import sys

from tgi_gateway.cli import main

if __name__ == "__main__":
    sys.exit(main())
