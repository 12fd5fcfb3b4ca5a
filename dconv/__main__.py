"""``python -m dconv``: the same as the ``dconv`` command."""

import sys

from dconv.cli import main

if __name__ == "__main__":
    sys.exit(main())
