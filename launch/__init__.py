"""The demo of shard4bit: training a small GPT on text, saving it and resuming it elsewhere."""
