"""`python -m moebius.trainer`, which is what launchers start: the same as `moebius`."""

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from moebius.trainer.cli import main

if __name__ == "__main__":
    # `record` hands an unexpected error's traceback to torchrun, which would hide it otherwise.
    sys.exit(record(main)())
