"""The pack's exceptions: one small hierarchy, each message one sentence a user can act on."""


class LowbitError(Exception):
    """Base of every error this pack raises on purpose."""


class CheckpointError(LowbitError):
    """A model file is missing, damaged, unsafe or of an unknown kind."""


class FormatError(LowbitError):
    """A weight format name is unknown, or a tensor cannot be stored in it."""


class CapabilityError(LowbitError):
    """This GPU, or an installed package, cannot do what was asked for."""


class StorageError(LowbitError):
    """A file cannot be written: disk full, folder read-only."""


class MemoryBudgetError(LowbitError):
    """A run needs more memory than the GPU, the machine or the user's limit has."""


class WorkerError(LowbitError):
    """A worker process that takes a part of a model's work failed, or is gone."""
