"""What can go wrong, by name: every error a user can meet is a ``TvmtrainError`` and also the builtin that fits it."""

from __future__ import annotations

from pathlib import Path


class TvmtrainError(Exception):
    """The root of all errors raised on purpose by tvmtrain."""


class ModelError(TvmtrainError, ValueError):
    """A model, loss or example input that cannot become a training step."""


class UnsupportedOperatorError(ModelError, NotImplementedError):
    """Operators of a model that cannot be imported or differentiated; the message lists all of them with their places."""


class PlanError(TvmtrainError, ValueError):
    """An update plan that does not fit the model."""


class InputError(TvmtrainError, ValueError):
    """Data whose shape, dtype, label range or values do not fit the compiled step."""


class NonFiniteLossError(TvmtrainError, ArithmeticError):
    """The loss was NaN or infinite; the state before the step was kept."""


class ArtifactError(TvmtrainError, ValueError):
    """An artifact that is damaged, foreign, incomplete or of another version."""


class CheckpointError(TvmtrainError, ValueError):
    """A checkpoint that is damaged or belongs to another model."""


class DeviceError(TvmtrainError, ValueError):
    """A device that is unknown, wrongly described or cannot be built for here."""


class StorageError(TvmtrainError, OSError):
    """A folder or disk that cannot be written; what was there before is intact."""


class MissingPackageError(TvmtrainError, ImportError):
    """A package that an extra of tvmtrain brings and this command needs."""


class BusyMachineError(TvmtrainError, RuntimeError):
    """A machine on which something else runs, so that a time measured on it would be that of both."""


class RemoteError(TvmtrainError, ConnectionError):
    """A board at the other end of a connection that cannot be reached, refuses, fails or goes away.

    ``saved``: the checkpoint that a run which it ended has written.
    """

    saved: Path | None = None
