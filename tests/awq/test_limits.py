import subprocess
import sys

import pytest

from lance_quant.awq.limits import check_bits, check_group_size, check_packable, fallback_group
from lance_quant.checkpoint.layout import targets
from lance_quant.errors import LanceQuantError
from tests.random_layers import small_config


def test_a_group_size_that_does_not_divide_names_linear_and_sizes():
    every = targets(small_config())
    check_group_size(every, 32)
    with pytest.raises(LanceQuantError, match=r"group_size=64 .* 96 inputs of .*down_proj; sizes that fit: 16, 32$"):
        check_group_size(every, 64)
    for size in (0, -1, 1, 3):
        with pytest.raises(LanceQuantError, match="does not divide"):
            check_group_size(every, size)


def test_bits():
    for bits in (2, 9):
        with pytest.raises(LanceQuantError, match="3..8"):
            check_bits(bits)
    check_packable(3)
    with pytest.raises(LanceQuantError, match="bits=3 or bits=4"):
        check_packable(5)


@pytest.mark.parametrize(("inputs", "wanted", "taken"), [(96, 32, 32), (96, 64, 32), (2048, 100, 128), (75, 64, 75)])
def test_the_published_fallback(inputs, wanted, taken):
    assert fallback_group(inputs, wanted) == taken


def test_the_checks_need_no_torch():
    code = "import sys, lance_quant.awq.limits, lance_quant.awq.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
