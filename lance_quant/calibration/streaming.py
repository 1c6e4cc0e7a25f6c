"""Parts of a checkpoint on the device one after another: what embeds, what looks, and then layer after layer.

    for index, layer in stream_layers(checkpoint, "cuda"): ...

Never more than two layers (617 MB of the published model) are there: the one at work and the one being read.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from lance_quant.checkpoint.fill import set_parameter
from lance_quant.checkpoint.layout import VIT_PREFIX, Checkpoint, layer_prefix
from lance_quant.checkpoint.reader import READERS, TensorReader
from lance_quant.model.config import LanceConfig
from lance_quant.model.decoder import Decoder, Layer
from lance_quant.model.lance import Lance, build_lance, complete

DTYPE = torch.bfloat16
NORMS = ("language_model.model.norm.", "language_model.model.norm_moe_gen.")  # where `Lance` looks for its device
HEADS = (*NORMS, "language_model.lm_head.", "llm2vae.")
ADAPTERS = (*NORMS, "language_model.model.embed_tokens.", "time_embedder.", "vae2llm.", "llm2vae.")


def load_adapters(checkpoint: Checkpoint, device: str) -> Lance:
    """A Lance whose embedding table, latent adapters and final norms are filled, and nothing else."""
    lance = build_lance(checkpoint, DTYPE)
    _fill_parts(lance, checkpoint, ADAPTERS, device)
    return lance


def load_heads(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Lance:
    """A Lance whose final norms and what reads them are filled, and nothing else."""
    lance = build_lance(checkpoint, dtype)
    _fill_parts(lance, checkpoint, HEADS, device, dtype)
    return lance


def load_eyes(checkpoint: Checkpoint, device: str) -> Lance:
    """A Lance whose vision tower is filled, and hardly anything else."""
    lance = build_lance(checkpoint, DTYPE)
    _fill_parts(lance, checkpoint, NORMS if checkpoint.vit_file is not None else (*NORMS, VIT_PREFIX), device)
    return complete(lance, checkpoint, device, DTYPE)


def _fill_parts(
    lance: Lance, checkpoint: Checkpoint, prefixes: tuple[str, ...], device: str, dtype: torch.dtype = DTYPE
) -> None:
    parts = {
        name: torch.empty(parameter.shape, device=device, dtype=dtype)
        for name, parameter in lance.named_parameters()
        if name.startswith(prefixes)
    }
    with TensorReader(checkpoint.model_file) as reader:
        reader.read_all(parts)
    for name, value in parts.items():
        set_parameter(lance, name, value)


def one_layer(config: LanceConfig) -> LanceConfig:
    """The sizes of a decoder of one layer: what a key-value cache needs where layers come one at a time."""
    return replace(config, num_hidden_layers=1)


def bare_decoder(config: LanceConfig, rope_inv_freq_bf16: bool | None = None) -> Decoder:
    """A decoder without weights, for what all layers of a call share. rope_inv_freq_bf16: True where float32 states are
    to be turned as the bf16 model's are."""
    with torch.device("meta"):
        decoder = Decoder(replace(config, num_hidden_layers=0))
    decoder.rope_inv_freq_bf16 = rope_inv_freq_bf16
    return decoder


def stream_layers(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype = DTYPE, backwards: bool = False
) -> Iterator[tuple[int, Layer]]:
    """(index, layer) in order, or the last one first, on the device; each stands at place 0 of its own cache.

    Two layers take turns: while one works the other is filled, over a stream of its own so that neither waits for the
    other. A layer is good until the next one is asked for.
    """
    count = checkpoint.config.num_hidden_layers
    order = range(count)[::-1] if backwards else range(count)
    pair = [_empty_layer(checkpoint.config, device, dtype) for _ in range(min(2, count))]
    side = torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None
    with (
        TensorReader(checkpoint.model_file) as reader,
        ThreadPoolExecutor(READERS) as readers,
        ThreadPoolExecutor(1) as ahead,
    ):

        def read(index: int) -> Layer:
            layer = pair[index % 2]

            def fill_one(name: str) -> None:
                with torch.cuda.stream(side):  # does nothing without one
                    reader.read_into(layer_prefix(index) + name, layer.get_parameter(name).data)

            list(readers.map(fill_one, [name for name, _ in layer.named_parameters()]))
            return layer

        def start(index: int) -> Future[Layer]:
            if side is not None:  # what used this memory last must be done before it is filled anew
                torch.cuda.synchronize(device)
            return ahead.submit(read, index)

        following = start(order[0])
        for place, index in enumerate(order):
            layer = following.result()
            if place + 1 < count:
                following = start(order[place + 1])
            yield index, layer


def _empty_layer(config: LanceConfig, device: str, dtype: torch.dtype) -> Layer:
    with torch.device("meta"):
        layer = Layer(config, 0)
    for name, parameter in list(layer.named_parameters()):
        set_parameter(layer, name, torch.empty(parameter.shape, device=device, dtype=dtype))
    return layer.eval()
