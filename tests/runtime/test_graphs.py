"""When a work is recorded, and in how many graphs: with graphs that only tell what would be done."""

import threading
from types import SimpleNamespace

import pytest
import torch

import lance_quant.runtime.graphs as graphs
from lance_quant.model.sampler import Velocities
from lance_quant.runtime.fused import _pause, pausing
from lance_quant.runtime.graphs import Recorded, RecordedFlow


class Told:
    """A graph that writes down what is done with it."""

    said: list = []

    def __init__(self):
        self.number = sum(word == "new" for word, _ in Told.said)
        Told.said.append(("new", self.number))

    def pool(self):
        return f"pool of {self.number}"

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        Told.said.append(("begin", pool))

    def capture_end(self):
        Told.said.append(("end", self.number))

    def replay(self):
        Told.said.append(("replay", self.number))


@pytest.fixture
def told(monkeypatch):
    """A device that records."""
    Told.said = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: pausing(None, lambda: None))
    monkeypatch.setattr(graphs, "_recording", lambda device: stream)
    return Told.said


def work(layers: int = 14):
    """As a decoder does it."""
    every, pause = _pause.get() or (layers, None)
    for index in range(layers):
        if index and index % every == 0:
            pause()
    return "out"


CUDA = torch.device("cuda")


def test_the_second_run_is_recorded_in_stretches_that_each_start_at_once(told):
    recorded = Recorded(CUDA, layers=6)
    assert recorded(work) == "out" and told == []
    assert recorded(work) == "out"
    one = [("new", 0), ("begin", None), ("end", 0), ("replay", 0)]
    more = [step for n in (1, 2) for step in [("new", n), ("begin", "pool of 0"), ("end", n), ("replay", n)]]
    assert told == one + more
    told.clear()
    assert recorded(lambda: pytest.fail("is not run again")) == "out"
    assert told == [("replay", 0), ("replay", 1), ("replay", 2)]


def test_another_thread_runs_it_plain_first(told):
    """Also one whose number an earlier thread had."""
    recorded = Recorded(CUDA)
    for _ in range(4):
        other = threading.Thread(target=recorded, args=(work,))
        other.start()
        other.join()
    assert told == []
    recorded(work)
    recorded(work)
    assert [word for word, _ in told] == ["new", "begin", "end", "replay"]


def test_a_decoding_step_is_one_graph(told):
    recorded = Recorded(CUDA)
    for _ in range(3):
        recorded(work)
    assert [word for word, _ in told] == ["new", "begin", "end", "replay", "replay"]


def test_what_fails_while_it_is_recorded_ends_the_recording(told):
    recorded = Recorded(CUDA, compiled=True)
    with pytest.raises(ZeroDivisionError):
        recorded(lambda: 1 / 0)
    assert told[-1] == ("end", 0) and not recorded.graphs


def test_without_graphs_every_run_is_a_plain_one(told):
    for recorded in (Recorded(CUDA, graphs=False), Recorded(torch.device("cpu"))):
        for _ in range(3):
            recorded(work)
    assert told == []


def test_sizes_that_were_drawn_before_are_recorded_at_once(monkeypatch):
    """The number of rows, the lengths of the contexts, guided or not."""
    made = []
    monkeypatch.setattr(
        graphs, "Recorded", lambda device, graphs, layers, compiled: made.append(compiled) or (lambda do: do())
    )

    def draw(rows, *lengths):
        velocity = torch.zeros(rows, 48)
        flow = SimpleNamespace(
            rows=range(rows), sample=None, lance=SimpleNamespace(device=torch.device("cpu")),
            caches=[SimpleNamespace(length=length) for length in lengths],
            velocities=lambda state, t, guided: Velocities(velocity, None),
        )  # fmt: skip
        recorded = RecordedFlow(flow, seen=seen)
        for guided in (True, True, False):
            recorded.velocities(velocity, torch.tensor(0.5), guided)

    seen: set = set()
    draw(4, 9, 5)
    draw(4, 9, 5)
    draw(4, 9, 6)
    draw(8, 9, 5)
    assert made == [False, False, True, True, False, False, False, False]
