"""The command line, ``python -m shard4bit``: one file a command, and what they print with."""
