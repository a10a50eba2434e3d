"""The optimizers: rules of ``maths.update`` over quantized states, as ``torch.optim.Optimizer``."""
