"""Entry point of ``pretrain COMMAND`` and of ``python -m pretrain COMMAND``."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run one command, see ``pretrain.cli.main``; Ctrl-C while that is imported is one line, too."""
    try:
        from pretrain.cli.main import main as run
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
