"""`python -m cachedit_fx` is the command `cachedit-fx`."""

from __future__ import annotations

import sys

from cachedit_fx.shell.command_line import main

if __name__ == "__main__":
    sys.exit(main())
