"""The parity fixtures of `tests/golden/`."""

from pathlib import Path

from lance_quant.model.parity import Golden

FOLDER = Path(__file__).parent / "golden"
GOLDEN = Golden(FOLDER)
RECORDED = GOLDEN.manifest["f32"]
