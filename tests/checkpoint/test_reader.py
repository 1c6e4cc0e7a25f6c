"""Reading by pieces and by several threads: what comes out, what is held, and what is refused."""

import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import lance_quant.checkpoint.reader as reader_module
from lance_quant.checkpoint.reader import TensorReader
from lance_quant.errors import LanceQuantError

TENSORS = {
    "wide": torch.randn(37, 11),
    "half": torch.randn(5, 3, 2).to(torch.bfloat16),
    "codes": torch.arange(9, dtype=torch.uint8).view(3, 3),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "line": torch.randn(1000),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 400)
    save_file(TENSORS, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_reads_what_safetensors_wrote(path):
    with TensorReader(path) as reader:
        assert reader.names() == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_all_of_them_at_once(path, dtype):
    with torch.inference_mode():  # capture loads inside it; the reading threads are outside
        outs = {name: torch.full(tensor.shape, 77, dtype=dtype) for name, tensor in TENSORS.items()}
    with TensorReader(path) as reader:
        reader.read_all(outs)
    for name, tensor in TENSORS.items():
        assert torch.equal(outs[name], tensor.to(dtype)), name


def test_fills_a_transposed_tensor(path):
    with TensorReader(path) as reader:
        out = reader.read_into("wide", torch.empty(11, 37).T)
    assert torch.equal(out, TENSORS["wide"])


def test_pieces_are_small_and_whole(path):
    with TensorReader(path) as reader:
        for name, tensor in TENSORS.items():
            pieces = [piece.clone() for piece in reader.pieces(name)]
            assert all(piece.nbytes <= 400 for piece in pieces)
            if tensor.numel():
                assert torch.equal(torch.cat(pieces) if tensor.dim() else pieces[0], tensor)


def test_page_locked_buffers_are_few_and_lent_again(monkeypatch):
    made = []

    def pinned(size: int) -> torch.Tensor:
        made.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(reader_module, "_pinned", pinned)
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 400)
    buffers = reader_module.PinnedBuffers(2)
    for _ in range(5):
        with buffers.lend(100):
            pass
    assert made == [400]  # as large as a piece, and the same one each time
    together = threading.Barrier(2)

    def use(size: int) -> int:
        with buffers.lend(size) as buffer:
            together.wait(timeout=10)
            return buffer.numel()

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(use, (100, 900, 100, 900)))[-2:] == [900, 900]
    assert len(made) <= 1 + 1 + 2  # the second buffer, and either grown once


def test_refuses_a_wrong_shape(path):
    with TensorReader(path) as reader, pytest.raises(LanceQuantError, match=r"'wide' is \[37, 11\].*\[11, 37\]"):
        reader.read_all({"wide": torch.empty(11, 37)})


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a header of 0 bytes"),
        (b"not a checkpoint at all", "not a safetensors file"),
        (header(b"{broken"), "not a safetensors file"),
        (header(b"[1, 2]"), "not a safetensors file"),
        (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(4)), "its header announces"),
        (header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', bytes(8)), "'a' spans 8 bytes"),
        (header(b'{"a": {"dtype": "Q2", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)), "unknown dtype Q2"),
    ],
)
def test_refuses_what_is_no_whole_file(tmp_path, content, sentence):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(LanceQuantError, match=sentence) as raised:
        TensorReader(path)
    assert "t.safetensors is truncated or not a safetensors file" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_says_which_file_is_missing(tmp_path):
    with pytest.raises(LanceQuantError, match="none.safetensors is missing"):
        TensorReader(tmp_path / "none.safetensors")


def test_a_file_cut_while_it_is_read(path):
    with TensorReader(path) as reader:
        path.write_bytes(path.read_bytes()[:-4100])
        with pytest.raises(LanceQuantError, match="became shorter"):
            reader.read("line")


def test_agrees_with_the_library_on_a_real_checkpoint():
    from tests.golden_cases import FOLDER

    file = FOLDER / "tiny_lance_video.safetensors"
    expected = load_file(file)
    with TensorReader(file) as reader:
        assert reader.names() == sorted(expected)
        assert all(torch.equal(reader.read(name), tensor) for name, tensor in expected.items())
