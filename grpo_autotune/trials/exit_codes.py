"""Exit codes of a worker; 0 is the end of its orders."""

RETIRED = 1
"""The outcome was written, and the process is not to be used again: a trial failed in it, or left too much behind."""

CANNOT_WRITE = 74
"""The outcome could not be written (EX_IOERR of sysexits.h)."""

OTHER_ENGINE = 75
"""The process keeps another engine than the trial asks for: a fresh worker can run it (EX_TEMPFAIL of sysexits.h)."""
