"""What a user may write as a device, and what is said of one that is not there."""

import pytest
import torch

from lance_quant.devices import choose_device, exact_device, fixed_order, found_devices, repeatable
from lance_quant.errors import LanceQuantError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(("available", "name"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_where_there_is_one(available, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert choose_device("auto") == name


def test_a_device_that_is_there_keeps_its_name(two_gpus):
    assert [choose_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize(("given", "name"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu:0", "cpu")])
def test_a_device_has_one_exact_spelling(given, name, two_gpus):
    assert exact_device(given, "runner.devices") == name


@pytest.mark.parametrize("given", ["cuda:-1", "cpu0", "meta", "gpu", ""])
def test_an_unknown_device_is_refused(given):
    with pytest.raises(LanceQuantError, match=f"device={given} is unknown: take auto, cpu, cuda or cuda:1"):
        choose_device(given)


def test_a_missing_device_is_refused(two_gpus, monkeypatch):
    with pytest.raises(LanceQuantError, match="this machine has 2 CUDA devices: take auto or cuda:0, cuda:1"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LanceQuantError, match="runner.devices=cuda, .* has 0 CUDA devices: take auto or cpu"):
        exact_device("cuda", "runner.devices")


def test_all_gpus_or_the_cpu(two_gpus, monkeypatch):
    assert found_devices() == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert found_devices() == ["cpu"]


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_a_fixed_order_is_asked_for_within_alone(before):
    """On a GPU; what was set before is set afterwards, also where something fails in between."""
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    try:
        with repeatable("cpu"):
            assert not fixed_order()
        with pytest.raises(ZeroDivisionError), repeatable("cuda"), repeatable("cuda:1"):
            assert fixed_order() and torch.is_deterministic_algorithms_warn_only_enabled()
            raise ZeroDivisionError
        assert not fixed_order()
        assert torch.are_deterministic_algorithms_enabled() == before[0]
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before[1]
    finally:
        torch.use_deterministic_algorithms(False)
