"""Exit codes of the commands."""

import os

FINISHED, FAILED, BAD_INPUT, PREEMPTED = os.EX_OK, 1, 2, os.EX_TEMPFAIL

DISK_FAILURE = os.EX_IOERR  # of a worker whose disk cannot be written to: another start would fail, too

# Of a run, by the status in its state.json.
CODES = {"finished": FINISHED, "crashed": FAILED, "bad_input": BAD_INPUT, "preempted": PREEMPTED}
