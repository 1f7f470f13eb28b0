"""What reading and writing checkpoints raises."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, with the reason; what was there before a failed write is
    untouched."""
