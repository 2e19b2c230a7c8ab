"""``python -m bilora``, so that ``accelerate launch -m bilora train …`` can start several processes."""

import sys

from bilora.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
