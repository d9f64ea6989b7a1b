"""Entry point of the `moebius` script and of `python -m moebius`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C ends quietly even while libraries are still being imported."""
    try:
        from moebius.trainer.cli import main as run

        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
