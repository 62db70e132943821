"""The recipe lies beside the model that it made, and is no part of the installed program."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "assets" / "tonfa-mini"))
