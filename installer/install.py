#!/usr/bin/env python3
"""Sets Tonfa up in its own folder and starts it.

    python3 installer/install.py --run      set up what is missing, then open the window
    python3 installer/install.py --test     the same, with what the tests need, then run them

This file alone must be readable by any Python 3, so that an old one can say what is wrong.
"""

import os
import shutil
import subprocess
import sys

OLDEST = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def newer_python() -> "str | None":
    """The path of a Python on this computer that is new enough and starts, or None."""
    for minor in (14, 13, 12, 11):
        found = shutil.which("python3.%d" % minor)
        if found and starts(found):  # a version manager's name for one that is not chosen does not
            return found
    return None


def starts(python: str) -> bool:
    try:
        return subprocess.call([python, "-c", ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def main() -> int:
    if sys.version_info[:2] >= OLDEST:
        sys.path.insert(0, ROOT)
        from installer.setup import main as set_up

        return set_up(sys.argv[1:])
    have, need = "%d.%d" % sys.version_info[:2], "%d.%d" % OLDEST
    other = newer_python()
    if other:
        print("Python %s is too old for Tonfa; going on with %s." % (have, other))
        sys.stdout.flush()
        os.execv(other, [other, os.path.abspath(__file__)] + sys.argv[1:])
    sys.stderr.write("Python %s is too old: Tonfa needs %s or newer.\n" % (have, need))
    sys.stderr.write("Install a newer Python (https://www.python.org/downloads), then run this file with it.\n")
    return 3


if __name__ == "__main__":
    sys.exit(main())
