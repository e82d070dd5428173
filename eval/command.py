"""How a command ends: what its user can mend is one line, not a traceback."""

import errno
import io
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout

from eval.provenance import remember
from model import parallel

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


def job_status(work: Callable[[], object], *mendable: type[Exception]) -> int:
    """`exit_status` of work that the processes of a job share, once they have joined it; the first
    of them prints. A lost one is a line, too."""
    silent = redirect_stdout(io.StringIO()) if parallel.started()[0] else nullcontext()
    with silent:
        status = exit_status(parallel.connected()(work), *mendable, parallel.LostProcess)
    if status == 0:  # after a failure the others may stand in a collective, and NCCL would wait too
        parallel.leave()
    return status


def require_one_process(what: str) -> None:
    """Raises ValueError in a job of several, each of which would do all of it."""
    if (world := parallel.started()[1]) > 1:
        raise ValueError(f"{what} is the work of one process, not of {world}: leave out torchrun")
