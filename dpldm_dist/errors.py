"""One tree of errors, one exit code per kind, one line for the user: found, expected, do.

Every class takes one message, so that it survives pickling between processes. A message never
holds anything private: no count of private records, no loss, no content, no key.
"""


class DpldmError(Exception):
    """Anything this package can explain. ``exit_code`` is what the command line returns.

    Formal guarantees: ``str`` gives one line of printable characters, whatever a file is called.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__()
        )


class ConfigError(DpldmError):
    """An option is unknown, ill-typed, out of range, or contradicts another."""

    exit_code = 2


class DataError(DpldmError):
    """A file of images, latents or weights is missing, damaged, or not what its manifest says."""

    exit_code = 3


class PrivacyError(DpldmError):
    """Going on would break the privacy guarantee, or the budget cannot be met."""

    exit_code = 4


class BudgetReached(PrivacyError):
    """One more release would cost more than the budget; it was not made."""


class WorkerError(DpldmError):
    """A training process died or hung; starting again may help."""

    exit_code = 5


class RunError(DpldmError):
    """The run directory cannot be used: busy, full, or opened by another plan."""

    exit_code = 6


class BringUpError(DpldmError):
    """The cluster did not come up; starting again may help."""

    exit_code = 70


class NodeLostError(DpldmError):
    """A node of the cluster was lost; starting again may help."""

    exit_code = 71


class SavedAndStopped(DpldmError):
    """Stopped on request with everything saved: requeue the job, or give the same command again."""

    exit_code = 75
