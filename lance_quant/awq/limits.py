"""What can be asked of the quantizer: bits and group sizes, checked before anything is read. Needs no torch."""

from collections.abc import Iterable

from lance_quant.checkpoint.layout import Target
from lance_quant.errors import LanceQuantError

MIN_BITS, MAX_BITS = 3, 8
PACKED_BITS = 4  # the native layout holds nibbles; 3-bit codes lie in them too
FALLBACK_GROUPS = (128, 64, 32, 16)


def check_bits(bits: int) -> None:
    """What the search takes."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise LanceQuantError(f"bits={bits} is outside {MIN_BITS}..{MAX_BITS}")


def check_packable(bits: int) -> None:
    """What pack takes."""
    if not MIN_BITS <= bits <= PACKED_BITS:
        raise LanceQuantError(f"bits={bits} does not fit the 4-bit native layout: pack takes bits=3 or bits=4")


def check_group_size(targets: Iterable[Target], group_size: int) -> None:
    """Raise LanceQuantError naming the first linear that `group_size` does not divide, and the sizes that would do."""
    targets = list(targets)
    for target in targets:
        if group_size < 2 or group_size % 2 or target.in_features % group_size:
            sizes = ", ".join(map(str, common_group_sizes(targets))) or "none between 16 and 256"
            raise LanceQuantError(
                f"group_size={group_size} does not divide the {target.in_features} inputs of {target.name}; "
                f"sizes that fit: {sizes}"
            )


def common_group_sizes(targets: Iterable[Target], low: int = 16, high: int = 256) -> list[int]:
    """Even group sizes within low..high that divide the inputs of every target."""
    widths = {target.in_features for target in targets}
    return [size for size in range(low, high + 1, 2) if all(width % size == 0 for width in widths)]


def fallback_group(in_features: int, group_size: int) -> int:
    """The published quantizer's group size of one linear: the wanted one where it divides, else the first that does."""
    return next(size for size in (group_size, *FALLBACK_GROUPS, in_features) if in_features % size == 0)
