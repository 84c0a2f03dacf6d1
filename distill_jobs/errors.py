"""The errors of this room, each with the exit code its command ends with.

JobError (1)
├── RecipeError (2)   the recipe is wrong, or differs from the one the run folder was started with
│   ├── TeacherError  the teacher's folder is incomplete, or not what it says it is
│   └── DataError     the data set is missing, incomplete or cannot be read
├── LockedError (3)   another job works in this run folder
├── Interrupted (4)   stopped by a signal after writing a checkpoint; resume with --resume
├── DivergedError (5) the loss or gradient stayed non-finite, or a gate refused the result
└── StorageError (6)  the disk refused a write; what was written before is intact
"""

from engines.errors import HalfstepError


def first_line(error: Exception) -> str:
    """What another library says of what went wrong, in one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


class JobError(HalfstepError):
    """Base of what a distillation job reports in one sentence."""

    exit_code = 1


class RecipeError(JobError):
    exit_code = 2


class TeacherError(RecipeError):
    """A pipeline folder that cannot be a teacher."""


class DataError(RecipeError):
    """Images or captions that cannot be read."""


class NoneReadableError(DataError):
    """None of the images can be read."""


class LockedError(JobError):
    exit_code = 3


class Interrupted(JobError):  # noqa: N818 - not an error of the job
    exit_code = 4


class DivergedError(JobError):
    exit_code = 5


class StorageError(JobError):
    exit_code = 6
