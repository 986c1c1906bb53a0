import sys
from pathlib import Path


# The example is measured as it is, and is no package.
sys.path.append(str(Path(__file__).parent.parent / "examples"))
