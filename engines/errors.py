"""The errors of this room.

HalfstepError
├── BundleError     a bundle on disk is incomplete, altered, or not one of ours
├── BackendError    an engine cannot be loaded or run on this machine
│   └── OutOfMemoryError    it could, with fewer rows or less memory for each
└── RequestError    a caller asked for what the model does not offer; names the field
"""


class HalfstepError(Exception):
    """Base of every error a user should read as one sentence, without a traceback."""


class BundleError(HalfstepError):
    """A bundle is incomplete, altered, or written by an incompatible version."""


class BackendError(HalfstepError):
    """A backend is missing, unsupported on this machine, or failed while running."""


class OutOfMemoryError(BackendError):
    """What an engine holds, or is asked to run, does not fit into its device's memory."""


class RequestError(HalfstepError):
    """A value the model cannot serve.

    param: the public field name (``prompt``, ``steps`` …); code: a stable machine-readable reason.
    """

    def __init__(self, param: str, code: str, message: str) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
