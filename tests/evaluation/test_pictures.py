"""PSNR, SSIM, relative L2 and cosine against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from lance_quant.errors import LanceQuantError
from lance_quant.evaluation.pictures import PSNR_CAP, TensorErrors, picture_scores, tensor_errors


def picture(height: int = 32, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (height, width, 3), dtype=np.uint8)


def test_identical_pictures_are_capped():
    scores = picture_scores(picture(), picture())
    assert (scores.psnr, scores.ssim) == (PSNR_CAP, 1.0)


def test_psnr_by_hand():
    scores = picture_scores(picture(), picture() + np.uint8(5))
    assert scores.psnr == pytest.approx(20 * math.log10(255 / 5))
    assert 0.9 < scores.ssim < 1


def test_unlike_pictures_score_low():
    scores = picture_scores(picture(), 255 - picture())
    assert scores.psnr < 10 and scores.ssim < 0


@pytest.mark.parametrize("size", [(3, 9), (4, 4), (6, 64)])
def test_small_pictures_get_a_smaller_window(size):
    assert picture_scores(picture(*size), picture(*size) + np.uint8(1)).ssim > 0.9


@pytest.mark.parametrize("other", [picture(16, 16), picture().astype(np.float32), picture()[..., 0], picture(2, 40)])
def test_wrong_pictures_are_one_sentence(other):
    with pytest.raises(LanceQuantError, match="cannot be"):
        picture_scores(picture(), other)


def test_tensor_errors_by_hand():
    errors = tensor_errors(torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [0.0]]))
    assert errors.relative_l2 == pytest.approx(4 / 5)
    assert errors.cosine == pytest.approx(3 / 5)


def test_tensor_errors_accumulate_in_float64():
    ones = torch.ones(2**20)
    assert tensor_errors(ones, ones * (1 + 2**-20)).relative_l2 == pytest.approx(2**-20, rel=1e-6)


def test_zero_tensors():
    zero, one = torch.zeros(3), torch.ones(3)
    assert tensor_errors(zero, zero) == TensorErrors(relative_l2=0.0, cosine=1.0)
    assert tensor_errors(zero, one) == TensorErrors(relative_l2=float("inf"), cosine=0.0)
    assert tensor_errors(one, zero) == TensorErrors(relative_l2=1.0, cosine=0.0)
    with pytest.raises(LanceQuantError, match="one shape"):
        tensor_errors(zero, torch.ones(4))
