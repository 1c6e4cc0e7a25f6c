"""Recorded cases of the upstream model against this one:  python -m flows.parity golden=<folder>

A folder holds `manifest.json` (settings and tensor names of every case, float32 and bfloat16), the weights of a small
random Lance and VAE, and a safetensors file a case. Each check gives the largest difference to what upstream computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from lance_quant.checkpoint.fill import fill
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import LanceConfig, read_json
from lance_quant.model.embedders import latent_positions
from lance_quant.model.lance import Lance
from lance_quant.model.pixels import vae_pixels, vit_patches, vit_pixels
from lance_quant.model.resolution import PRESETS
from lance_quant.model.sampler import FlowConfig, Velocities, run_flow, start_flow
from lance_quant.model.sequence import Sample
from lance_quant.model.understanding import answer
from lance_quant.model.vae import load_vae

Tensors = dict[str, torch.Tensor]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# relative L2; manifest: 2e-4 is generous in float32; in bfloat16 two kinds of CPU differ by 1.2 % on the same code
TOLERANCES = {"f32": 2e-5, "bf16": 2e-2}
WEIGHTS, VAE = "tiny_lance_video.safetensors", "tiny_wan22_vae.safetensors"
FRAME_ROWS, SIDE = 64 * 64, 64  # of the published position table, which the case posembed_2048 samples


@dataclass(frozen=True)
class Verdict:
    """The largest relative L2 difference over what a case records, and where it is; exact: tokens, timesteps, masks."""

    mode: str
    case: str
    difference: float
    where: str
    exact: bool
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.exact and self.difference <= self.tolerance


@dataclass(frozen=True)
class Golden:
    """A folder of recorded cases. Raises LanceQuantError where the manifest or a case's file is missing."""

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
        recorded = self._recorded()
        ids = recorded["compact_special_ids"]
        own = {name: recorded[name] for name in ("max_latent_size", "max_num_frames")}
        own |= {"eos_token_id": ids["eos_token_id"], "video_token_id": ids["image_token_id"]}
        own |= {"vision_start_token_id": ids["start_of_image"], "vision_end_token_id": ids["end_of_image"]}
        return LanceConfig.from_dict(recorded["tiny_llm_config"] | own, tokenizer_length=recorded["vocab_eff"])

    def lance(self, mode: str, device: str = "cpu") -> Lance:
        """The recorded weights in the mode's dtype."""
        return _lance(self, mode, device)

    def cases(self) -> list[tuple[str, str]]:
        """(mode, name) of every case in the manifest."""
        return [(mode, name) for mode in DTYPES for name in self.manifest.get(mode, {}).get("cases", {})]

    def case(self, mode: str, name: str) -> tuple[dict, Tensors]:
        """A case's settings and its tensors."""
        case = self.manifest[mode]["cases"][name]
        path = self.folder / case["file"]
        if not path.is_file():
            raise LanceQuantError(f"{path} is missing: the manifest names it for case '{name}'")
        return case, load_file(path)

    def sample(self, case: dict, tensors: Tensors) -> Sample:
        """A prepared sample as the manifest describes one."""
        ids = tensors["in.text_ids"]
        is_pad = ids == self.config().video_token_id
        none = torch.empty(0, dtype=torch.int64)
        understanding = "in.ce_indexes" in tensors
        vit_grids = _grids(tensors["in.vit_grid_thw"]) if "in.vit_grid_thw" in tensors else ()
        sizes = tensors.get("in.video_sizes_THW", none.view(0, 3)).tolist()
        looked_at = tensors.get("in.vit_token_indexes", is_pad.nonzero().squeeze(1) if understanding else none)
        return Sample(
            task="x2t_image" if understanding else "t2i",  # all that the model asks: does it answer or draw
            ids=ids,
            split_lens=tuple(case["split_lens"]),
            split_modes=tuple(case["attn_modes"]),
            modality=tensors.get("in.modality", torch.full_like(ids, -1)),
            grids=vit_grids if understanding else _grids(tensors["in.rope_grid_thw"]),
            vit_indexes=looked_at,
            vae_indexes=tensors.get("in.vae_token_indexes", none),
            mse_indexes=tensors.get("in.mse_indexes", none),
            latent_grids=tuple(((t - 1) // 4 + 1, h // 16, w // 16) for t, h, w in sizes),
            context_length=int(tensors["in.ce_indexes"][0]) + 1 if understanding else None,
            vit_patches=tensors.get("in.vit_patches"),
            vit_grids=vit_grids,
        )


@lru_cache(maxsize=4)
def _manifest(folder: Path) -> dict:
    return read_json(folder / "manifest.json")


@lru_cache(maxsize=4)
def _lance(golden: Golden, mode: str, device: str) -> Lance:
    with torch.device("meta"):
        lance = Lance(golden.config(), golden.manifest[mode]["tiny_vit_config"], DTYPES[mode]).eval()
    fill(lance, golden.folder / WEIGHTS, device, DTYPES[mode])
    return lance


def _grids(tensor: torch.Tensor) -> tuple:
    return tuple(tuple(row) for row in tensor.reshape(-1, 3).tolist())


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| in float64."""
    value, reference = value.double().cpu(), reference.double()
    return float((value - reference).norm() / reference.norm())


# ---------------------------------------------------------------- what each kind of case compares

Compared = tuple[dict[str, float], bool]


def check_understanding(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Vision tokens and logits of every step; greedy tokens exactly."""
    lance, sample = golden.lance(mode), golden.sample(case, tensors)
    expected = tensors["out.tokens"].tolist()
    result = answer(lance, sample, len(expected), keep_logits=True, cached="KVcache" in case["path"])
    count = min(len(result.tokens), len(expected))
    differences = {
        "vit": relative_l2(lance.look(sample.vit_patches, sample.vit_grids), tensors["out.vit"]),
        "logits": relative_l2(result.logits[:count], tensors["out.logits"][:count]),
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
    times, states, conditional, unconditional = [], [], [], []

    def keep(step: int, t: torch.Tensor, state: torch.Tensor, velocities: Velocities) -> None:
        times.append(t)
        states.append(state.clone())
        conditional.append(velocities.conditional)
        if velocities.unconditional is not None:
            unconditional.append(velocities.unconditional)

    state = tensors["out.x_t"][0].to(lance.dtype)
    final = run_flow(start_flow(lance, sample, state, cfg), state, cfg, keep)
    recorded = [tensors[key] for key in sorted(tensors) if key.startswith("out.final_latent")]
    differences = {
        "state": relative_l2(torch.stack(states), tensors["out.x_t"]),
        "conditional velocity": relative_l2(torch.stack(conditional), tensors["out.v_cond"]),
        "final latent": relative_l2(final, torch.cat([latent.flatten(0, 2) for latent in recorded])),
    }
    if unconditional and "out.v_uncond" in tensors:
        differences["unconditional velocity"] = relative_l2(torch.stack(unconditional), tensors["out.v_uncond"])
    guided = int(tensors["out.cfg_on"].sum()) if cfg.guidance > 1 else 0
    exact = torch.equal(torch.stack(times), tensors["out.timesteps"]) and len(unconditional) == guided
    return differences, exact


def check_vae(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Posterior means and decoded pixels of a clip and of its first frame."""
    vae = load_vae(golden.folder / VAE)
    differences = {}
    for suffix, clip in (("", tensors["video"]), ("1", tensors["video"][:, :1])):
        latents = tensors[f"mu{suffix}_norm"]
        decoded = tensors[f"decoded{suffix}"].clamp(-1, 1)
        differences[f"mu{suffix}"] = relative_l2(vae.encode(clip).permute(3, 0, 1, 2), latents)
        differences[f"decoded{suffix}"] = relative_l2(vae.decode(latents.permute(1, 2, 3, 0)), decoded)
    return differences, True


def check_pixels(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Bucket resize and vision-tower patches: exact."""
    image = Image.fromarray(tensors["image_rgb_uint8"].numpy())
    preset = PRESETS["image_256res"]
    patches, grid = vit_patches(vit_pixels([image], preset.vit_edge))
    pairs = {
        "vae": (vae_pixels([image], preset.image_edge)[:, :, ::4, ::4], tensors["image_256res.vae_tensor_stride4"]),
        "small": (vae_pixels([image], 96), tensors["small.vae_tensor"]),
        "patches": (patches[:48], tensors["image_256res.vit_patches_first48"]),
    }
    differences = {name: relative_l2(mine, recorded) for name, (mine, recorded) in pairs.items()}
    grids = golden.manifest[mode]["preproc"]["image_256res.vit_grid_thw"]
    return differences, all(torch.equal(*pair) for pair in pairs.values()) and [list(grid)] == grids


def check_positions(golden: Golden, mode: str, case: dict, tensors: Tensors) -> Compared:
    """Rows of the published latent position table: exact."""
    rows = [
        latent_positions((i // FRAME_ROWS + 1, i // SIDE % SIDE + 1, i % SIDE + 1), tensors["rows"].shape[1])[-1]
        for i in tensors["ids"].tolist()
    ]
    return {"rows": relative_l2(torch.stack(rows), tensors["rows"])}, torch.equal(torch.stack(rows), tensors["rows"])


CHECKS: tuple[tuple[Callable[[dict, Tensors], bool], Callable[..., Compared]], ...] = (
    (lambda case, tensors: "in.ce_indexes" in tensors, check_understanding),
    (lambda case, tensors: "out.x_t" in tensors, check_generation),
    (lambda case, tensors: "mu_norm" in tensors, check_vae),
    (lambda case, tensors: "image_rgb_uint8" in tensors, check_pixels),
    (lambda case, tensors: "rows" in tensors, check_positions),
)


def run_case(golden: Golden, mode: str, name: str) -> Verdict:
    """Compute one case anew. Raises LanceQuantError for a case of no known kind."""
    case, tensors = golden.case(mode, name)
    check = next((check for fits, check in CHECKS if fits(case, tensors)), None)
    if check is None:
        raise LanceQuantError(f"{golden.folder / case['file']}: case '{name}' is of no known kind")
    differences, exact = check(golden, mode, case, tensors)
    where = max(differences, key=differences.get)
    return Verdict(mode, name, differences[where], where, exact, TOLERANCES[mode])


def run_cases(golden: Golden) -> Iterator[Verdict]:
    """Every case of the manifest, one after the other."""
    for mode, name in golden.cases():
        yield run_case(golden, mode, name)
