"""`moebius`, which afterwards names the threads that are left to the end of the interpreter."""

import sys
from pathlib import Path

from moebius.trainer.cli import main

if __name__ == "__main__":
    code = main()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    left = " ".join(name for name in names if "gloo" in name)
    print(f"left: [{left}]\n", end="", flush=True)  # in one piece: others print, too
    sys.exit(code)
