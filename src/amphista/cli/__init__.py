"""The command line. Importing it is starting the program, so it may set what the library leaves alone."""

import os

# A step reads every weight once, and with pages of 4 KB looking them up takes its time, too: torch asks the system for
# pages of 2 MB then. torch reads this once, before its first tensor; programs of other people set it themselves.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
