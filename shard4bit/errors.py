"""The exceptions that users of shard4bit meet; all are ``ValueError`` so that one clause catches them."""


class Shard4bitError(ValueError):
    """Something a user can mend: the message says what arrived, what was expected and how."""


class LayoutError(Shard4bitError):
    """A parameter is sharded in a way that this call cannot serve."""


class StateError(Shard4bitError):
    """A state (of a ``state_dict``) that does not fit this optimizer."""


class CheckpointError(Shard4bitError):
    """A checkpoint that is missing, damaged, or of another model."""
