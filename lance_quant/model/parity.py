"""Recorded cases of the upstream model against this one:  python -m flows.parity golden=<folder>

A folder holds `manifest.json` (settings and tensor names of every case, float32 and bfloat16), the weights of a small
random Lance and VAE, and a safetensors file a case. Each check gives the largest difference to what upstream computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from lance_quant.checkpoint.fill import fill
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig, read_json
from lance_quant.model.embedders import latent_positions
from lance_quant.model.lance import Lance
from lance_quant.model.pixels import vae_pixels, vit_patches, vit_pixels
from lance_quant.model.positions import grid_tokens
from lance_quant.model.recorded import (
    CHANNELS,
    FRAME_ROWS,
    PATCH,
    SIDE,
    TABLE_ROWS,
    check_tensors,
    expect_shape,
    setting_of,
    tensor_of,
)
from lance_quant.model.resolution import PRESETS
from lance_quant.model.sampler import FlowConfig, Velocities, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer
from lance_quant.model.vae import load_vae

Tensors = dict[str, torch.Tensor]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Relative L2. The shipped manifest calls 2e-4 generous in float32 and speaks of about 1 % in bfloat16, in words: there
# two kinds of CPU differ by 1.2 % on the same code.
TOLERANCES = {"f32": 2e-5, "bf16": 2e-2}
WEIGHTS, VAE = "tiny_lance_video.safetensors", "tiny_wan22_vae.safetensors"


@dataclass(frozen=True)
class Verdict:
    """The largest relative L2 difference over what a case records, and where it is; exact: tokens, timesteps, masks.

    The difference is nan or inf where a value is not finite, on either side.
    """

    mode: str
    case: str
    difference: float
    where: str
    exact: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.exact and self.difference <= self.tolerance  # never true of nan

    @property
    def line(self) -> str:
        state = "ok" if self.passed else "DIFFERS"
        exact = "" if self.exact else "; tokens or timesteps differ"
        found = f"{self.difference:.1e} in {self.where} (at most {self.tolerance:g}){exact}"
        return f"{state:8}{self.mode:5} {self.case:22} {found}"


@dataclass(frozen=True)
class Failure:
    """A case that could not be computed, and the sentence that says why."""

    mode: str
    case: str
    sentence: str

    passed: ClassVar[bool] = False

    @property
    def line(self) -> str:
        return f"{'FAILED':8}{self.mode:5} {self.case:22} {self.sentence}"


@dataclass(frozen=True)
class Golden:
    """A folder of recorded cases. Raises LanceQuantError where the manifest or a case's file is missing or broken."""

    folder: Path

    @property
    def manifest(self) -> dict:
        return _manifest(self.folder)

    def _recorded(self) -> dict:
        """What was recorded of the model, in whichever mode there is."""
        modes = [self.manifest[mode] for mode in DTYPES if mode in self.manifest]
        if not modes:
            raise LanceQuantError(f"{self.folder}/manifest.json has no cases: it wants one of {', '.join(DTYPES)}")
        return modes[0]

    def config(self) -> LanceConfig:
        """The recorded model's sizes and compact token ids."""
        model = self._recorded()
        ids = setting_of(model, "compact_special_ids")
        own = {name: setting_of(model, name) for name in ("max_latent_size", "max_num_frames")}
        own |= {"eos_token_id": setting_of(ids, "eos_token_id"), "video_token_id": setting_of(ids, "image_token_id")}
        own |= {"vision_start_token_id": setting_of(ids, "start_of_image")}
        own |= {"vision_end_token_id": setting_of(ids, "end_of_image")}
        sizes = setting_of(model, "tiny_llm_config")
        return LanceConfig.from_dict(
            sizes | own, tokenizer_length=setting_of(model, "vocab_eff"), source="tiny_llm_config of manifest.json"
        )

    def tolerance(self, mode: str) -> float:
        """The mode's limit: the manifest's own where that is a number, not words, and stricter."""
        own = self.manifest.get("tolerances", {}).get(mode)
        return min(TOLERANCES[mode], own) if isinstance(own, int | float) else TOLERANCES[mode]

    def lance(self, mode: str, device: str = "cpu") -> Lance:
        """The recorded weights in the mode's dtype."""
        return _lance(self, mode, device)

    def cases(self) -> list[tuple[str, str]]:
        """(mode, name) of every case in the manifest. Raises LanceQuantError where there is none."""
        found = []
        for mode in DTYPES:
            part = self.manifest.get(mode, {})
            if not isinstance(part, dict) or not isinstance(part.get("cases", {}), dict):
                raise LanceQuantError(
                    f"{self.folder}/manifest.json: '{mode}' must be an object whose 'cases' is one too"
                )
            found += [(mode, name) for name in part.get("cases", {})]
        if not found:
            raise LanceQuantError(
                f"{self.folder}/manifest.json has no cases under {' or '.join(DTYPES)}: nothing to run"
            )
        return found

    def case(self, mode: str, name: str) -> tuple[dict, Tensors]:
        """A case's settings and its tensors."""
        case = self.manifest[mode]["cases"][name]
        if not isinstance(case, dict) or not isinstance(case.get("file"), str):
            raise LanceQuantError(
                f"{self.folder}/manifest.json: case '{name}' lacks 'file', the name of its tensors' file"
            )
        path = self.folder / case["file"]
        if not path.is_file():
            raise LanceQuantError(f"{path} is missing: the manifest names it for case '{name}'")
        try:
            return case, load_file(path)
        except SafetensorError as error:
            raise LanceQuantError(f"{path} of case '{name}' is not a readable safetensors file ({error})") from None

    def sample(self, case: dict, tensors: Tensors) -> Sample:
        """A prepared sample as the manifest describes one.

        Raises LanceQuantError where splits and modes, or grids and what they count, disagree.
        """
        modes = case["attn_modes"]
        if len(modes) != len(case["split_lens"]):
            raise LanceQuantError(
                f"manifest.json has {len(modes)} 'attn_modes' for {len(case['split_lens'])} 'split_lens'"
            )
        ids = tensors["in.text_ids"]
        is_pad = ids == self.config().video_token_id
        none = torch.empty(0, dtype=torch.int64)
        understanding = "in.ce_indexes" in tensors
        vit_grids = _grids(tensor_of(tensors, "in.vit_grid_thw")) if "in.vit_patches" in tensors else ()
        sizes = tensors.get("in.video_sizes_THW", none.view(0, 3)).tolist()
        latent_grids = tuple(((t - 1) // 4 + 1, h // 16, w // 16) for t, h, w in sizes)
        latents = tensors.get("in.vae_token_indexes", none)
        expect_shape(latents, [_rows(latent_grids)], "in.vae_token_indexes")
        if "in.vit_patches" in tensors:
            expect_shape(tensors["in.vit_patches"], [_rows(vit_grids), PATCH], "in.vit_patches")
        grid_key = "in.vit_grid_thw" if understanding else "in.rope_grid_thw"
        grids = _grids(tensor_of(tensors, grid_key))
        pads, counted = int(is_pad.sum()), sum(grid_tokens(grid) for grid in grids)
        if pads != counted:
            raise LanceQuantError(f"tensor '{grid_key}' counts {counted} vision tokens, but 'in.text_ids' holds {pads}")
        looked_at = tensors.get("in.vit_token_indexes", is_pad.nonzero().squeeze(1) if understanding else none)
        return Sample(
            task="x2t_image" if understanding else "t2i",  # all that the model asks: does it answer or draw
            ids=ids,
            split_lens=tuple(case["split_lens"]),
            split_modes=tuple(modes),
            modality=tensors.get("in.modality", torch.full_like(ids, -1)),
            grids=grids,
            vit_indexes=looked_at,
            vae_indexes=latents,
            mse_indexes=tensors.get("in.mse_indexes", none),
            latent_grids=latent_grids,
            context_length=int(tensors["in.ce_indexes"][0]) + 1 if understanding else None,
            vit_patches=tensors.get("in.vit_patches"),
            vit_grids=vit_grids,
        )


@lru_cache(maxsize=4)
def _manifest(folder: Path) -> dict:
    path = folder / "manifest.json"
    if not path.is_file():
        raise LanceQuantError(f"{path} is missing: name a folder of recorded cases")
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise LanceQuantError(f"{path} is not a JSON object: name a folder of recorded cases")
    return manifest


@lru_cache(maxsize=4)
def _lance(golden: Golden, mode: str, device: str) -> Lance:
    with torch.device("meta"):
        lance = Lance(golden.config(), setting_of(golden.manifest[mode], "tiny_vit_config"), DTYPES[mode]).eval()
    fill(lance, golden.folder / WEIGHTS, device, DTYPES[mode])
    return lance


def _grids(tensor: torch.Tensor) -> tuple:
    return tuple(tuple(row) for row in tensor.reshape(-1, 3).tolist())


def _rows(grids: Sequence[tuple]) -> int:
    return sum(math.prod(grid) for grid in grids)


def relative_l2(value: torch.Tensor, reference: torch.Tensor, key: str) -> float:
    """|value - reference| / |reference| in float64: 0 where they are equal, nan or inf where one is not finite.

    Raises LanceQuantError where the shapes differ; `key` names the recorded tensor.
    """
    expect_shape(reference, value.shape, key)
    value, reference = value.double().cpu(), reference.double()
    distance = (value - reference).norm()
    return float(distance / reference.norm()) if distance != 0 else 0.0


# ---------------------------------------------------------------- what each kind of case compares

Compared = tuple[dict[str, float], bool]


def check_understanding(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Vision tokens and logits of every step; greedy tokens exactly."""
    lance, sample = golden.lance(mode), golden.sample(case, tensors)
    expected = tensors["out.tokens"].tolist()
    result = answer(lance, sample, len(expected), keep_logits=True, cached="KVcache" in case["path"])
    count = min(len(result.tokens), len(expected))
    differences = {
        "vit": relative_l2(lance.look(sample.vit_patches, sample.vit_grids), tensors["out.vit"], "out.vit"),
        "logits": relative_l2(result.logits[:count], tensors["out.logits"][:count], "out.logits"),
    }
    return differences, result.tokens == expected


def check_generation(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Sampler states, both velocities of every step and final latents; timesteps and guided steps exactly."""
    lance, sample = golden.lance(mode), golden.sample(case, tensors)
    cfg = FlowConfig(
        steps=case["steps"],
        timestep_shift=case["timestep_shift"],
        guidance=case["cfg_text_scale"],
        guidance_low=case["cfg_interval"][0],
        guidance_high=case["cfg_interval"][1],
        renorm=case["cfg_renorm_type"] or "none",
        renorm_min=case["cfg_renorm_min"],
        cached="KVcache" in case["path"],
        bf16_norms=mode == "bf16",  # the cases were recorded on a CPU
    )
    times, states, conditional, unconditional, guided = [], [], [], [], []

    def keep(step: int, t: torch.Tensor, state: torch.Tensor, velocities: Velocities) -> None:
        times.append(t)
        states.append(state.clone())
        conditional.append(velocities.conditional)
        guided.append(velocities.unconditional is not None)
        if velocities.unconditional is not None:
            unconditional.append(velocities.unconditional)

    state = tensors["out.x_t"][0].to(lance.dtype)
    final = run_flow(start_flow(lance, sample, state, cfg), state, cfg, keep)
    blocks = sorted(key for key in tensors if key.startswith("out.final_latent"))
    if len(blocks) != len(sample.latent_grids):
        raise LanceQuantError(
            f"there are {len(blocks)} tensors 'out.final_latent' to {len(sample.latent_grids)} VAE blocks"
        )
    for key, grid in zip(blocks, sample.latent_grids, strict=True):
        expect_shape(tensors[key], (*grid, CHANNELS), key)
    drawn = torch.cat([tensors[key].flatten(0, 2) for key in blocks])
    differences = {
        "state": relative_l2(torch.stack(states), tensors["out.x_t"], "out.x_t"),
        "conditional velocity": relative_l2(torch.stack(conditional), tensors["out.v_cond"], "out.v_cond"),
        "final latent": relative_l2(final, drawn, "out.final_latent"),
    }
    if unconditional:
        reference = tensor_of(tensors, "out.v_uncond")
        differences["unconditional velocity"] = relative_l2(torch.stack(unconditional), reference, "out.v_uncond")
    if "out.vit" in tensors:
        seen = lance.look(tensor_of(tensors, "in.vit_patches"), sample.vit_grids)
        differences["vit"] = relative_l2(seen, tensors["out.vit"], "out.vit")
    on = [bool(flag) and cfg.guidance > 1 for flag in tensors["out.cfg_on"].tolist()]
    return differences, torch.equal(torch.stack(times), tensors["out.timesteps"]) and guided == on


def check_vae(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Posterior means and decoded pixels of a clip and of its first frame."""
    vae = load_vae(golden.folder / VAE)
    differences = {}
    for suffix, clip in (("", tensors["video"]), ("1", tensors["video"][:, :1])):
        mu, decoded = f"mu{suffix}", f"decoded{suffix}"
        latents = tensors[f"{mu}_norm"]
        differences[mu] = relative_l2(vae.encode(clip).permute(3, 0, 1, 2), latents, f"{mu}_norm")
        pixels = vae.decode(latents.permute(1, 2, 3, 0))
        differences[decoded] = relative_l2(pixels, tensors[decoded].clamp(-1, 1), decoded)
    return differences, True


def check_pixels(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Bucket resize and vision-tower patches: exact."""
    image = Image.fromarray(tensors["image_rgb_uint8"].numpy())
    preset = PRESETS["image_256res"]
    patches, grid = vit_patches(vit_pixels([image], preset.vit_edge))
    made = {
        "vae": ("image_256res.vae_tensor_stride4", vae_pixels([image], preset.image_edge)[:, :, ::4, ::4]),
        "small": ("small.vae_tensor", vae_pixels([image], 96)),
        "patches": ("image_256res.vit_patches_first48", patches[:48]),
    }
    differences = {name: relative_l2(mine, tensors[key], key) for name, (key, mine) in made.items()}
    grids = setting_of(setting_of(golden.manifest[mode], "preproc"), "image_256res.vit_grid_thw")
    return differences, all(torch.equal(mine, tensors[key]) for key, mine in made.values()) and [list(grid)] == grids


def check_positions(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Rows of the published latent position table: exact."""
    rows = [
        latent_positions((i // FRAME_ROWS + 1, i // SIDE % SIDE + 1, i % SIDE + 1), tensors["rows"].shape[1])[-1]
        for i in tensors["ids"].tolist()
    ]
    made = torch.stack(rows)
    return {"rows": relative_l2(made, tensors["rows"], "rows")}, torch.equal(made, tensors["rows"])


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of case: the tensor that tells it, what the manifest and the file must hold beside, and its check."""

    marker: str
    settings: tuple[str, ...] = ()
    tensors: tuple[str, ...]
    check: Callable[[Golden, str, dict, Tensors], Compared]


SEQUENCE = ("path", "split_lens", "attn_modes")

KINDS = (
    Kind(
        marker="in.ce_indexes",
        settings=SEQUENCE,
        tensors=("in.text_ids", "in.vit_grid_thw", "in.vit_patches", "out.vit", "out.tokens", "out.logits"),
        check=check_understanding,
    ),
    Kind(
        marker="out.x_t",
        settings=(
            *SEQUENCE,
            "steps",
            "timestep_shift",
            "cfg_text_scale",
            "cfg_interval",
            "cfg_renorm_type",
            "cfg_renorm_min",
        ),
        tensors=(
            "in.text_ids",
            "in.modality",
            "in.vae_token_indexes",
            "in.mse_indexes",
            "in.video_sizes_THW",
            "in.rope_grid_thw",
            "out.timesteps",
            "out.cfg_on",
            "out.v_cond",
            "out.final_latent.0",
        ),
        check=check_generation,
    ),
    Kind(marker="mu_norm", tensors=("video", "decoded", "mu1_norm", "decoded1"), check=check_vae),
    Kind(
        marker="image_rgb_uint8",
        tensors=("image_256res.vae_tensor_stride4", "small.vae_tensor", "image_256res.vit_patches_first48"),
        check=check_pixels,
    ),
    Kind(marker="rows", tensors=("ids",), check=check_positions),
)


def kind_of(golden: Golden, case: dict, tensors: Tensors) -> Kind:
    """The kind of a case that holds all its kind asks for, in the right shapes and ranges; else LanceQuantError."""
    kind = next((kind for kind in KINDS if kind.marker in tensors), None)
    if kind is None:
        markers = ", ".join(kind.marker for kind in KINDS)
        raise LanceQuantError(f"it is of no known kind, as it has none of the tensors {markers}")
    for key in kind.settings:
        setting_of(case, key)
    for key in kind.tensors:
        tensor_of(tensors, key)

    sizes = {"table": TABLE_ROWS}
    if "split_lens" in kind.settings:
        sizes |= {"tokens": sum(case["split_lens"]), "vocabulary": golden.config().vocab_size}
    if "steps" in kind.settings:
        sizes["steps"] = case["steps"]
    check_tensors(tensors, sizes)
    return kind


def run_case(golden: Golden, mode: str, name: str) -> Verdict:
    """Compute one case anew. Raises LanceQuantError, which names case and file, where it cannot be computed."""
    case, tensors = golden.case(mode, name)
    try:
        differences, exact = kind_of(golden, case, tensors).check(golden, mode, case, tensors)
        tolerance = golden.tolerance(mode)
    except Exception as error:  # a malformed case sets off any; the cases behind it are still to be run
        words = str(error) if isinstance(error, LanceQuantError) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise LanceQuantError(f"{golden.folder / case['file']}: case '{name}' cannot be computed: {words}") from error
    # what no check compares must be finite too; what a case was given shows in its outputs, where it is read at all
    judged = {key: tensor for key, tensor in tensors.items() if not key.startswith("in.")}
    differences |= {key: math.nan for key, tensor in judged.items() if not tensor.isfinite().all()}
    where = max(differences, key=lambda place: (math.isnan(differences[place]), differences[place]))
    return Verdict(mode, name, differences[where], where, exact, tolerance)


def run_cases(golden: Golden) -> Iterator[Verdict | Failure]:
    """Every case of the manifest, one after the other. Raises LanceQuantError where there is none."""
    for mode, name in golden.cases():
        try:
            outcome = run_case(golden, mode, name)
        except LanceQuantError as error:
            outcome = Failure(mode, name, str(error))
        yield outcome
