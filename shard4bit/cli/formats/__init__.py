"""Forms of a training state that ``convert`` reads and writes. Each is one file with ``read`` and ``write``;
between them goes a ``Package``, whose tensors are loaded when they are asked for."""
