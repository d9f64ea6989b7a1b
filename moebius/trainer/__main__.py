"""`python -m moebius.trainer`, which is what launchers start: the same as `moebius`.

Tracebacks go to stderr. torch's `record` would hand them to torchrun in a file as well, which is
not written in one piece: a launcher that reads it too early dies instead of restarting the workers.
"""

import sys

from moebius.trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
