"""Entry point of ``python -m pretrain COMMAND``, which is the same as ``pretrain COMMAND``."""

from __future__ import annotations

import sys

from pretrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
