"""``python -m shard4bit inspect | verify | memory | convert | plot``."""

import sys

from shard4bit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
