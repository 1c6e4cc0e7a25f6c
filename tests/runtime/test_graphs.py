"""When a step is recorded, on a GPU that is not there."""

import pytest
import torch

from lance_quant.model.sampler import FlowConfig, guided_steps
from lance_quant.runtime import graphs
from lance_quant.runtime.graphs import RUNS, RUNS_WAITING, Recorded, RecordedFlow


class Event:
    """Done at once where the GPU waits for the host."""

    done = True

    def record(self, stream):
        pass

    def query(self) -> bool:
        return self.done


class Graph:
    def __init__(self, played: list):
        self.played = played

    def replay(self):
        self.played.append("graph")


@pytest.fixture
def gpu(monkeypatch):
    """What was run, in order: "plain" by the works of a test."""
    played = []

    def record(self, work):
        self.graph = Graph(played)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Recorded, "_record", record)
    return played


@pytest.mark.parametrize(
    ("most", "waits", "kinds"),
    [
        (None, False, ["plain", "graph"]),
        (RUNS + 1, False, ["plain", "graph"]),
        (RUNS, False, ["plain", "plain"]),  # the host is fast enough
        (RUNS_WAITING + 1, True, ["plain", "graph"]),
        (RUNS_WAITING, True, ["plain", "plain"]),
        (1, True, ["plain", "plain"]),
    ],
)
def test_a_graph_is_made_where_it_pays(gpu, monkeypatch, most, waits, kinds):
    monkeypatch.setattr(Event, "done", waits)
    recorded = Recorded(torch.device("cuda"), most=most)
    for _ in range(4):
        recorded(lambda: gpu.append("plain"))
    assert gpu == [*kinds, kinds[1], kinds[1]]


def test_a_cpu_makes_none():
    recorded, runs = Recorded(torch.device("cpu")), []
    for _ in range(3):
        recorded(lambda: runs.append(1))
    assert len(runs) == 3 and recorded.graph is None


class Flow:
    """A `CachedFlow` of one latent."""

    rows, sample = torch.arange(1), None

    class lance:
        device = torch.device("cpu")

    def velocities(self, state, t, guided):
        return graphs.Velocities(state + t, None)


def test_a_flow_whose_guided_steps_wait_records_the_others_at_once(gpu):
    """A picture so small that the GPU waits: three steps without guidance are few, and recorded all the same."""
    flow = RecordedFlow(Flow(), steps={True: 20, False: 3})
    for guided, most in ((True, 20), (False, 3)):
        flow.velocities(torch.zeros(1), torch.tensor(0.5), guided)
        assert flow.steps[guided].most == most
        flow.steps[guided].graph = None
    flow.steps.clear()
    flow.velocities(torch.zeros(1), torch.tensor(0.5), True)
    flow.steps[True].graph = Graph(gpu)
    flow.velocities(torch.zeros(1), torch.tensor(0.5), False)
    assert flow.steps[False].most is None


def test_the_steps_of_a_drawing_are_counted_as_they_are_taken():
    assert guided_steps(FlowConfig()) == {True: 26, False: 4}
    assert guided_steps(FlowConfig(guidance=1.0)) == {False: 30}
