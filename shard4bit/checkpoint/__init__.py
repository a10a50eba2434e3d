"""The canonical checkpoint: rectangles of tensors in safetensors files, and a manifest. Knows tensors
and ranks, but neither optimizers nor engines."""
