"""How a command ends: what its user can mend is one line, not a traceback."""

import errno
import sys
from collections.abc import Callable

from eval.provenance import remember

FULL = (errno.ENOSPC, errno.EDQUOT)


def exit_status(work: Callable[[], object], *mendable: type[Exception]) -> int:
    """Do the work; 0, or 2 after a line on stderr: for a ValueError, one of `mendable`, or a disk
    that is full. Anything else is a fault of ours and is raised. Results name the code as it is at
    the beginning, which is what runs."""
    remember()
    try:
        work()
    except (ValueError, *mendable) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        if problem.errno not in FULL:
            raise
        print(
            f"error: {problem.filename or 'a file'} cannot be written ({problem.strerror}). Make "
            "room and give the same command again: what is finished is kept",
            file=sys.stderr,
        )
        return 2
    return 0
