import sys
from pathlib import Path


# The examples are scripts, not a package
sys.path.append(str(Path(__file__).parent.parent / "examples"))
