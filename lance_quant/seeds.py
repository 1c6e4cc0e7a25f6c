"""`seed_of`: the seed of each random draw of a run, from the run's own and the draw's number."""

STRIDE = 1_000_003  # more draws than any run has


def seed_of(seed: int, index: int, held_out: bool = False) -> int:
    """held_out: what is evaluated starts from noise that no calibration sample starts from."""
    return seed * STRIDE + (STRIDE // 2 if held_out else 0) + index
