"""What each forward counts and which rows it gives, from token counts alone."""

import numpy as np
import pytest
import torch

from lance_quant.awq.score import OutputError, SiteRows, evidence
from lance_quant.calibration.config import CalibrationConfig
from lance_quant.calibration.jobs import Forward, Step, chosen_steps
from lance_quant.calibration.plan import kept_sequences, make_passes, make_plan, quotas, van_der_corput
from lance_quant.checkpoint.layout import PATHS, layer_targets
from tests.random_layers import random_sites, small_config


class Job:
    """As much of a job as the plan looks at: latents of a length at some timesteps, behind some text."""

    def __init__(self, index: int, task: str, text: int, latents: int, steps: int, waves: int = 1):
        self.index, self.task, self.text, self.latents, self.waves = index, task, text, latents, waves
        self.steps = [Step(step, 1 - step / 10, False, step if waves > 1 else 0) for step in range(steps)]

    def forwards(self) -> list[Forward]:
        end = self.text + self.latents + 2
        context = [Forward(self.index, self.task, 0, None, 0, self.text, self.text, 0)]
        return context + [Forward(self.index, self.task, 0, s, self.text, end, 2, self.latents) for s in self.steps]


TASKS = ["x2t_image", "t2i", "t2v"]
JOBS = [
    Job(0, "x2t_image", 600, 0, 0),
    Job(1, "x2t_image", 30, 0, 0),
    Job(2, "t2i", 50, 400, 8),
    Job(3, "t2i", 20, 100, 8),
    Job(4, "t2v", 40, 5000, 8),
]


def rows_by(plan, path, what):
    values = getattr(plan, what)[path]
    return {value: values.count(value) for value in dict.fromkeys(values)}


def test_forwards_of_a_task_count_alike_whatever_their_length():
    plan = make_plan(JOBS, TASKS, CalibrationConfig(rows_per_site=960))
    mass = {}
    for (place, path), share in plan.shares.items():
        forward = plan.forwards[place]
        key = forward.task, path, forward.job, forward.step if path == "gen" else None
        mass[key] = mass.get(key, 0.0) + share.weight * forward.count(path)
    for task in TASKS:
        for path in PATHS:
            each = [value for key, value in mass.items() if key[:2] == (task, path)]
            assert not each or each == pytest.approx([1 / len(each)] * len(each))
    assert rows_by(plan, "gen", "row_tasks") == {"t2i": 480, "t2v": 480}
    assert rows_by(plan, "gen", "row_samples") == {2: 240, 3: 240, 4: 480}
    assert set(rows_by(plan, "gen", "row_timesteps").values()) == {120}
    # the short question gives all it has, the long one the rest of the task's share
    assert rows_by(plan, "und", "row_samples") == {0: 290, 1: 30, 2: 66, 3: 36, 4: 56}


def test_every_token_counts_alike_where_tokens_are_balanced():
    plan = make_plan(JOBS, TASKS, CalibrationConfig(balance="tokens"))
    weights = {share.weight for (place, path), share in plan.shares.items() if plan.forwards[place].task == "t2i"}
    assert weights == {1 / (8 * 500), 1 / (70 + 32)}
    assert plan.weights["t2v"] == {"und": 56.0, "gen": 40000.0} and plan.weights["x2t_image"]["und"] == 630.0


def test_a_weight_gives_rows_and_reaches_the_search():
    plan = make_plan(JOBS, TASKS, CalibrationConfig(weights={"t2i": 3.0}, rows_per_site=800))
    assert rows_by(plan, "gen", "row_tasks") == {"t2i": 600, "t2v": 200}
    assert plan.weights["t2i"]["gen"] == 3.0 and plan.weights["t2v"]["gen"] == 1.0

    sites = random_sites(small_config())
    site = sites["und", "qkv"]
    site.weights.update({"x2t_image": 1.0, "t2i": 3.0})
    known = evidence({("und", "qkv"): site}, layer_targets(small_config(), 0), by_token=False, device="cpu")
    wanted = (site.mean_abs["x2t_image"] + 3 * site.mean_abs["t2i"]) / 4
    for mean in known.mean_abs.values():
        torch.testing.assert_close(mean, wanted)
    rows = known.rows["und", "qkv"]
    assert rows.weights == (1.0, 3.0)
    weight, change = torch.randn(8, 64), torch.randn(8, 64) * 0.01
    apart = [
        OutputError(weight, SiteRows(rows.rows[rows.task == t], torch.zeros(40, dtype=int), 1))(change) for t in (0, 1)
    ]
    assert OutputError(weight, rows)(change) == pytest.approx((apart[0] + 3 * apart[1]) / 4, rel=1e-5)


def test_rows_are_of_the_forward_they_say():
    plan = make_plan(JOBS, TASKS, CalibrationConfig(rows_per_site=100))
    for path in PATHS:
        taken = np.zeros(plan.rows(path), dtype=int)
        for (place, of), share in plan.shares.items():
            if of == path and len(share.tokens):
                assert share.tokens.max() < plan.forwards[place].count(path)
                assert len(set(share.tokens)) == len(share.tokens)
                taken[share.first : share.first + len(share.tokens)] += 1
                assert plan.row_samples[path][share.first] == plan.forwards[place].job
        assert (taken == 1).all()


@pytest.mark.parametrize(
    "sizes, total, wanted",
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([2, 3], 99, [2, 3]),
        ([5] * 6, 3, [1, 0, 1, 0, 1, 0]),
        ([4, 4, 4], 0, [0, 0, 0]),
        ([100, 1, 100], 10, [5, 1, 4]),
    ],
)
def test_quotas(sizes, total, wanted):
    assert quotas(sizes, total) == wanted


def test_sequences_keep_within_their_tokens():
    plan = make_plan(JOBS, TASKS, CalibrationConfig())
    kept = kept_sequences(plan, TASKS, 2, 1000)
    assert [(one.job, one.tokens) for one in kept] == [(1, 30), (2, 452), (3, 122)]
    assert [plan.forwards[one.places[-1]].step.index for one in kept[1:]] == [2, 4]  # of 8, the shorter sample first
    (alone,) = kept_sequences(plan, ["t2i"], 1, 1000)
    assert plan.forwards[alone.places[-1]].step.index == 4  # neither the first nor the last timestep
    assert kept_sequences(plan, TASKS, 0, 1000) == []


def test_timesteps_are_spread_wherever_they_are_cut_off():
    assert [van_der_corput(number) for number in range(1, 8)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


def test_jobs_go_together_as_far_as_there_is_room():
    passes = make_passes(JOBS, [10, 10, 60, 30, 200], 80)
    assert [one.jobs for one in passes] == [(0, 1, 2), (3,), (4,)]
    waves = make_passes([Job(0, "x2t_image", 5, 0, 0), Job(1, "t2i", 5, 9, 2, waves=2)], [1, 1], 9)
    assert [(one.wave, one.jobs) for one in waves] == [(0, (0, 1)), (1, (1,))]


def test_steps_are_stratified():
    assert chosen_steps(30, 40, 0) == list(range(30))
    steps = chosen_steps(30, 8, 3)
    assert steps == sorted(set(steps)) and len(steps) == 8
    assert all(round(i * 30 / 8) <= step < round((i + 1) * 30 / 8) for i, step in enumerate(steps))
