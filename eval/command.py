"""How a command ends: what its user can mend is one line, not a traceback."""

import errno
import sys
from collections.abc import Callable

from eval.provenance import remember

FULL = (errno.ENOSPC, errno.EDQUOT)
ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def exit_status(work: Callable[[], object], *mendable: type[Exception]) -> int:
    """Do the work; 0, or 2 after a line on stderr: for a ValueError, one of `mendable`, a disk that
    is full, or a place where nothing can be written. Anything else is a fault of ours and is
    raised. Results name the code as it is at the beginning, which is what runs."""
    remember()
    try:
        work()
    except (ValueError, *mendable) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except OSError as problem:
        if problem.errno in FULL:
            what = "written"
            mend = "Make room and give the same command again: what is finished is kept"
        elif problem.errno in ELSEWHERE and problem.filename:
            what, mend = "used", "Give another place, or mend this one"
        else:
            raise
        place = problem.filename or "a file"
        print(f"error: {place} cannot be {what} ({problem.strerror}). {mend}", file=sys.stderr)
        return 2
    return 0
