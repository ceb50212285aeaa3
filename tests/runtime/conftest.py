"""Make stages_for_tests importable here and in every worker (both launchers pass on sys.path)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
