"""A run that was stopped goes on as if it had not been, and its schedule ends at zero whichever bound rules."""

import pytest
import torch
from torch import nn

from lance_quant.tiny.state import Schedule, Step, TrainingRun


def run_in(folder, steps: int) -> TrainingRun:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    run = TrainingRun(model, Schedule(steps=40, minutes=1e9, peak=1e-2, warmup=5), folder=folder, name="s", seed=3)
    run.resume()
    run.start(1e9)
    step = Step(run, lambda x: {"square": (model(x) - x).square().mean()})
    while run.step < steps:
        generator = run.begin_step()
        step(torch.randn(8, 4, generator=generator))
        run.end_step()
    return run


def test_resume_is_exact(tmp_path):
    whole = run_in(tmp_path / "whole", 30)
    run_in(tmp_path / "parts", 13).save()
    parts = run_in(tmp_path / "parts", 30)
    for name, value in whole.parameters.items():
        assert torch.equal(value, parts.parameters[name])
        assert torch.equal(whole.average[name], parts.average[name])


@pytest.mark.parametrize(("step", "seconds"), [(100, 0.0), (0, 600.0)])
def test_either_bound_ends_the_run(step, seconds):
    schedule = Schedule(steps=100, minutes=10, peak=1.0, warmup=1)
    assert schedule.progress(step, seconds) == 1
    assert schedule.rate(step, seconds) < 0.01
    assert schedule.rate(step // 2, seconds / 2) == 1


def test_average_is_what_ships(tmp_path):
    run = run_in(tmp_path, 20)
    run.load_average()
    assert all(torch.equal(value, run.average[name]) for name, value in run.parameters.items())
