import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lance_quant.checkpoint.writer import TensorSpec, TensorWriter
from lance_quant.errors import LanceQuantError

TENSORS = {
    "codes": torch.arange(15, dtype=torch.uint8).view(3, 5),
    "norm": torch.randn(7).to(torch.bfloat16),
    "scale": torch.randn(2, 3),
    "number": torch.tensor(3.5),
    "last": torch.randn(4, 2).to(torch.bfloat16),
}
WORDS = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
SPECS = [TensorSpec(name, WORDS[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_safetensors_reads_what_is_written(tmp_path):
    with TensorWriter(tmp_path / "t.safetensors", SPECS) as writer:
        assert [spec.name for spec in writer.specs] == ["scale", "number", "norm", "last", "codes"]
        for spec in writer.specs:
            writer.write(spec.name, TENSORS[spec.name])
    read = load_file(tmp_path / "t.safetensors")
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]


def test_header_is_aligned_and_offsets_follow_each_other(tmp_path):
    with TensorWriter(tmp_path / "t.safetensors", SPECS, {"made": "here"}) as writer:
        for spec in writer.specs:
            writer.write(spec.name, TENSORS[spec.name])
    data = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"made": "here"}
    ends = [0]
    for entry in header.values():
        assert entry["data_offsets"][0] == ends[-1]
        ends.append(entry["data_offsets"][1])
    assert len(data) == 8 + length + ends[-1]


def test_a_tensor_may_come_in_pieces(tmp_path):
    rows = torch.randn(10, 3)
    with TensorWriter(tmp_path / "t.safetensors", [TensorSpec("rows", "F32", (10, 3))]) as writer:
        for piece in rows.split(4):
            writer.write("rows", piece)
    assert torch.equal(load_file(tmp_path / "t.safetensors")["rows"], rows)


@pytest.mark.parametrize(
    ("writes", "said"),
    [
        ([], "a was not written .*.0 rows"),
        ([("a", torch.zeros(1, 2))], "a was not written .*.1 rows"),
        ([("b", torch.zeros(2, 2))], "expects tensor a next, not b"),
        ([("a", torch.zeros(2, 3))], "does not fit its entry F32 .2, 2."),
        ([("a", torch.zeros(3, 2))], "does not fit"),
        ([("a", torch.zeros(4))], "does not fit"),
        ([("a", torch.zeros(2, 2, dtype=torch.bfloat16))], "does not fit"),
        ([("a", torch.zeros(2, 2)), ("a", torch.zeros(2, 2))], "one too many"),
    ],
)
def test_refusals_leave_no_file(tmp_path, writes, said):
    with pytest.raises(LanceQuantError, match=said):
        with TensorWriter(tmp_path / "t.safetensors", [TensorSpec("a", "F32", (2, 2))]) as writer:
            for name, tensor in writes:
                writer.write(name, tensor)
    assert not list(tmp_path.iterdir())


def test_a_key_listed_twice_is_refused(tmp_path):
    with pytest.raises(LanceQuantError, match="listed twice"):
        with TensorWriter(tmp_path / "t.safetensors", [TensorSpec("a", "U8", (1,))] * 2):
            pass
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with TensorWriter(tmp_path / "t.safetensors", SPECS):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_memory_is_one_piece_not_the_file(tmp_path):
    """256 MB in pieces of 4 MB; the peak of the process may not move by more than 32 MB."""
    piece = torch.zeros(1024, 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with TensorWriter(tmp_path / "t.safetensors", [TensorSpec("a", "F32", (64 * 1024, 1024))]) as writer:
        for _ in range(64):
            writer.write("a", piece)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024
    assert (tmp_path / "t.safetensors").stat().st_size > 256 * 2**20
