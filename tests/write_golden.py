"""Write the emitted kernels that the tests compare with: ``python tests/write_golden.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from test_generation import GOLDEN, KERNELS, emitted

for name, what in KERNELS.items():
    (GOLDEN / f"{name}.py").write_text(emitted(*what).text)
