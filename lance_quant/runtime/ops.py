"""What stands between two products of a layer, each one kernel on a GPU: norm with residual, QK-norm with rotary, SiLU.

Every operation has a torch form here, which rounds where the plain layer does, and a Triton form (`ops_triton`) that a
CUDA tensor takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

from lance_quant.devices import on_triton
from lance_quant.model.decoder import rms_norm
from lance_quant.model.rotary import rotate


@dataclass(frozen=True)
class QKNorm:
    """Weights [head_dim] of one expert's two norms, None where the model has none."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class Place:
    """Where one expert's rows go: `rows` int64, their places along the call's n tokens (None: all in order), behind
    `start` kept tokens: a number, or int32 [B] on the device, one of each batch row."""

    rows: torch.Tensor | None
    start: int | torch.Tensor


@dataclass(frozen=True)
class Heads:
    """The buffers that queries, keys and values are put into: queries [B, n, heads, d], the others [B, kv, room, d]."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def kernels(x: torch.Tensor, name: str, plain: Callable) -> Callable:
    """The Triton form of an operation for a tensor that can take it, else the plain one."""
    return getattr(_triton(), name) if on_triton(x) else plain


@cache
def _triton() -> ModuleType:
    from lance_quant.runtime import ops_triton

    return ops_triton


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y, its norm): the residual stream and what the next product reads. y None: x as it is."""
    return kernels(x, "add_rms_norm", plain_add_rms_norm)(x, y, weight, eps)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up of [..., 2 I], gate first. out: where it goes, contiguous or columns of a matrix."""
    return kernels(gate_up, "silu_mul", plain_silu_mul)(gate_up, out)


def place_heads(
    qkv: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], norm: QKNorm, wide: bool, place: Place, out: Heads
) -> None:
    """Norm and turn q and k of qkv [B, rows, (heads + 2 kv) d], and put all three where they belong.

    tables: cos and sin [1 or B, n, d]. wide: q and k stay float32 up to the end of rotary (quirk Q6).
    """
    kernels(qkv, "place_heads", plain_place_heads)(qkv, tables, norm, wide, place, out)


# ---------------------------------------------------------------- torch


def plain_add_rms_norm(x, y, weight, eps):
    if y is not None:
        x = x + y
    return x, rms_norm(x, weight, eps)


def plain_silu_mul(gate_up, out=None):
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


def plain_place_heads(qkv, tables, norm, wide, place, out):
    batch, rows, _ = qkv.shape
    heads, head_dim = out.queries.shape[2:]
    kv_heads = out.keys.shape[1]
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=2)
    if wide:
        q, k = q.float(), k.float()
    q = q if norm.q is None else rms_norm(q, norm.q, norm.eps)
    k = k if norm.k is None else rms_norm(k, norm.k, norm.eps)
    places = torch.arange(rows, device=qkv.device) if place.rows is None else place.rows
    cos, sin = (table[:, places] for table in tables)
    q, k = (rotate(part.transpose(1, 2), cos, sin).to(v.dtype) for part in (q, k))
    out.queries[:, places] = q.transpose(1, 2)
    start = place.start[:, None] if isinstance(place.start, torch.Tensor) else place.start
    at = (start + places).expand(batch, -1)
    row = torch.arange(batch, device=qkv.device)[:, None]
    out.keys[row, :, at] = k.transpose(1, 2)
    out.values[row, :, at] = v
