"""Which tensors a Lance checkpoint holds, and which of them are quantized: tables over `LanceConfig`.

A layer has two experts: the understanding path "und" (no suffix) and the generation path "gen" (`_moe_gen`), seven
linears each (Lance spec sec. 3). What several linears read in common is one input *site*.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.errors import LanceQuantError
from lance_quant.model.config import SPATIAL_DOWNSAMPLE, LanceConfig
from lance_quant.model.request import CLIP_TASKS, TASKS
from lance_quant.model.resolution import Preset

PATHS = ("und", "gen")
SUFFIX = {"und": "", "gen": "_moe_gen"}
SITES = ("qkv", "o", "gate_up", "down")
NORMS = ("input_layernorm", "post_attention_layernorm")
POSITION_TABLE = "latent_pos_embed.pos_embed"
VIT_PREFIX = "vit_model."
# what each layout serves (Lance spec sec. 1); "text" is a decoder alone, `language_model.*` and nothing else
LAYOUT_TASKS = {"image": ("x2t_image", "t2i", "image_edit"), "video": TASKS, "text": ()}
TIME_FREQUENCIES = 256  # width of the timestep sinusoid (Lance spec sec. 11), the same in every Lance

SHOWN = {  # a checkpoint's layout, which its choice in conf/checkpoint is called by -> how it shows
    "image": "no vision tower, so it is an image model",
    "video": "a vision tower, so it is a video model",
    "text": "a decoder alone, so it is a text model",
}
DECODER_PREFIX = "language_model."

HUB = "https://huggingface.co/bytedance-research/Lance"


@dataclass(frozen=True)
class LinearRow:
    """One kind of linear in a layer: its block, leaf, input site, and the config sizes of its two sides."""

    block: str
    leaf: str
    site: str
    outputs: str
    inputs: str
    bias: bool


LINEARS = (
    LinearRow("self_attn", "q_proj", "qkv", "query", "hidden", True),
    LinearRow("self_attn", "k_proj", "qkv", "value", "hidden", True),
    LinearRow("self_attn", "v_proj", "qkv", "value", "hidden", True),
    LinearRow("self_attn", "o_proj", "o", "hidden", "query", False),
    LinearRow("mlp", "gate_proj", "gate_up", "intermediate", "hidden", False),
    LinearRow("mlp", "up_proj", "gate_up", "intermediate", "hidden", False),
    LinearRow("mlp", "down_proj", "down", "hidden", "intermediate", False),
)


@dataclass(frozen=True)
class Target:
    """A linear to quantize. `name` is its module name upstream, without `.weight`."""

    name: str
    path: str
    layer: int
    site: str
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: the files of its parts and its resolved sizes. Nothing is read into memory.

    layout: a row of `LAYOUT_TASKS`. vit_file: None where the model's file bundles the vision tower or there is none;
    vit_config_file, vae_file: None for a text model.
    """

    name: str
    layout: str
    folder: Path
    model_file: Path
    config_file: Path
    vit_file: Path | None
    vit_config_file: Path | None
    vae_file: Path | None
    config: LanceConfig
    pictures: Preset
    clips: Preset
    frames: int

    def edges(self, task: str) -> Preset:
        """Pixel budgets that a task is worked at."""
        return self.clips if task in CLIP_TASKS else self.pictures


def layer_prefix(layer: int) -> str:
    return f"language_model.model.layers.{layer}."


def linear_name(layer: int, path: str, block: str, leaf: str) -> str:
    """Upstream puts the suffix on the leaf in attention and on the block in the MLP (Lance spec sec. 3)."""
    suffix = SUFFIX[path]
    inner = f"{block}.{leaf}{suffix}" if block == "self_attn" else f"{block}{suffix}.{leaf}"
    return layer_prefix(layer) + inner


def norm_name(layer: int, path: str, which: str) -> str:
    """Module name of one of `NORMS`, without `.weight`."""
    return f"{layer_prefix(layer)}{which}{SUFFIX[path]}"


def _sizes(config: LanceConfig) -> dict[str, int]:
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "query": config.num_attention_heads * config.head_dim,
        "value": config.num_key_value_heads * config.head_dim,
    }


def layer_targets(config: LanceConfig, layer: int) -> list[Target]:
    """The 14 linears of a layer: und then gen, each q, k, v, o, gate, up, down."""
    size = _sizes(config)
    return [
        Target(
            linear_name(layer, path, row.block, row.leaf),
            path,
            layer,
            row.site,
            size[row.outputs],
            size[row.inputs],
            row.bias and config.attention_bias,
        )
        for path in PATHS
        for row in LINEARS
    ]


def targets(config: LanceConfig) -> list[Target]:
    """Every linear to quantize, layer by layer: 504 in the published models."""
    return [target for layer in range(config.num_hidden_layers) for target in layer_targets(config, layer)]


def expected_shapes(config: LanceConfig, adapters: bool = True) -> dict[str, tuple[int, ...]]:
    """Key -> shape of decoder and adapters (Lance spec sec. 3), the position table and `vit_model.*` aside.

    adapters=False: of a text model, which has none.
    """
    hidden, latent = config.hidden_size, config.latent_channels
    shapes: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for target in layer_targets(config, layer):
            shapes[f"{target.name}.weight"] = (target.out_features, target.in_features)
            if target.bias:
                shapes[f"{target.name}.bias"] = (target.out_features,)
        for path in PATHS:
            for norm in NORMS:
                shapes[f"{norm_name(layer, path, norm)}.weight"] = (hidden,)
            if config.qk_norm:
                for leaf in ("q_norm", "k_norm"):
                    shapes[f"{layer_prefix(layer)}self_attn.{leaf}{SUFFIX[path]}.weight"] = (config.head_dim,)
    for path in PATHS:
        shapes[f"language_model.model.norm{SUFFIX[path]}.weight"] = (hidden,)
    shapes["language_model.lm_head.weight"] = (config.vocab_size, hidden)
    if not adapters:
        return shapes
    return shapes | {
        "time_embedder.mlp.0.weight": (hidden, TIME_FREQUENCIES),
        "time_embedder.mlp.0.bias": (hidden,),
        "time_embedder.mlp.2.weight": (hidden, hidden),
        "time_embedder.mlp.2.bias": (hidden,),
        "vae2llm.weight": (hidden, latent),
        "vae2llm.bias": (hidden,),
        "llm2vae.weight": (latent, hidden),
        "llm2vae.bias": (latent,),
    }


def vision_shapes(vision: dict) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a vision tower (its `config.json`), without prefix: 390 in the published one."""
    hidden, wide = vision["hidden_size"], vision["intermediate_size"]
    merged = hidden * vision.get("spatial_merge_size", 2) ** 2
    patch = vision["patch_size"]
    colours, frames = vision.get("in_channels", vision.get("in_chans", 3)), vision.get("temporal_patch_size", 2)
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (hidden, colours, frames, patch, patch)}
    linears = {"attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden)}
    linears |= {"mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    for block in range(vision["depth"]):
        for norm in ("norm1", "norm2"):
            shapes[f"blocks.{block}.{norm}.weight"] = (hidden,)
        for name, shape in linears.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    shapes["merger.ln_q.weight"] = (hidden,)
    for name, rows in (("merger.mlp.0", merged), ("merger.mlp.2", vision["out_hidden_size"])):
        shapes[f"{name}.weight"] = (rows, merged)
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def open_checkpoint(cfg: CheckpointConfig) -> Checkpoint:
    """Find the parts of a checkpoint (Lance spec sec. 1) and read its config.

    Raises LanceQuantError where a part is missing, with where to get it and which option takes its path.
    """
    from lance_quant.checkpoint.reader import TensorReader

    if not cfg.path:
        raise LanceQuantError(f"checkpoint '{cfg.name}' has no path: give its folder as checkpoint.path=...")
    folder = Path(cfg.path).expanduser()
    if folder.is_file():
        raise LanceQuantError(f"checkpoint.path={folder} is a file: give the folder that holds it")
    if not folder.is_dir():
        # a text model is anyone's
        source = "" if cfg.name == "text" else f"get it from {HUB} and "
        raise LanceQuantError(
            f"checkpoint '{cfg.name}' is not at {folder}: {source}give its folder as checkpoint.path=..."
        )
    such = "" if cfg.name == "text" else " (such as Lance_3B)"
    model_file = _first(
        [folder / "model.safetensors", folder / "ema.safetensors"],
        f"{folder} holds no model.safetensors: give the model's own folder{such} as checkpoint.path=...",
    )
    with TensorReader(model_file) as reader:
        layout = layout_of(reader.names())
    vit_file = vit_config = vae_file = None
    if layout != "text":
        vit_folder = Path(cfg.vit).expanduser() if cfg.vit else folder.parent / "Qwen2.5-VL-ViT"
        vit_config = _first(
            [vit_folder / "config.json"],
            f"the vision tower's config.json is not in {vit_folder}: get it from {HUB} and set checkpoint.vit=FOLDER",
        )
        vae = Path(cfg.vae).expanduser() if cfg.vae else folder.parent / "Wan2.2_VAE.pth"
        vae_file = _first(
            [vae, vae.with_suffix(".safetensors")],
            f"the VAE file is not at {vae}: get it from {HUB} and give it as checkpoint.vae=...",
        )
    if layout == "image":  # the video file bundles the vision tower, which then overrides the standalone one
        vit_file = _first(
            [vit_folder / "vit.safetensors"],
            f"{vit_folder} holds no vit.safetensors: get the folder from {HUB} and give it as checkpoint.vit=...",
        )
    checkpoint = Checkpoint(
        name=cfg.name,
        layout=layout,
        folder=folder,
        model_file=model_file,
        config_file=folder / "llm_config.json",
        vit_file=vit_file,
        vit_config_file=vit_config,
        vae_file=vae_file,
        config=LanceConfig.from_folder(folder, text_only=layout == "text"),
        pictures=Preset(cfg.image_edge, cfg.vit_edge),
        clips=Preset(cfg.video_edge, cfg.video_vit_edge),
        frames=cfg.frames,
    )
    check_name(checkpoint)
    check_picture_size(checkpoint)
    return checkpoint


def check_name(checkpoint: Checkpoint) -> None:
    """Refuse an image model called video and the reverse; other names say nothing of the layout."""
    if checkpoint.name in SHOWN and checkpoint.name != checkpoint.layout:
        raise LanceQuantError(
            f"{checkpoint.model_file} holds {SHOWN[checkpoint.layout]}: choose checkpoint={checkpoint.layout}, "
            f"or give the {checkpoint.name} model's folder as checkpoint.path=..."
        )


def check_picture_size(checkpoint: Checkpoint) -> None:
    """Refuse pictures whose latents are more than the position table has rows for."""
    most = checkpoint.config.max_latent_size * SPATIAL_DOWNSAMPLE
    for field, preset in (("image_edge", checkpoint.pictures), ("video_edge", checkpoint.clips)):
        if preset.image_edge > most:
            raise LanceQuantError(
                f"checkpoint.{field}={preset.image_edge} is beyond the position table of {checkpoint.folder}: "
                f"at most {most} pixels"
            )


def check_task_list(key: str, tasks, known: Sequence[str] = TASKS) -> None:
    """Refuse a setting that is neither "auto" nor a list that names some of the known tasks, each once."""
    if tasks == "auto":
        return
    if not isinstance(tasks, list | tuple):
        raise LanceQuantError(f"{key}={tasks} must be auto or a list such as [x2t_image,t2i]")
    check_known(key, tasks, known)
    if not tasks or len(set(tasks)) < len(tasks):
        raise LanceQuantError(f"{key}={list(tasks)} must name each task once, of {', '.join(TASKS)}")


def check_known(key: str, tasks: Iterable[str], known: Sequence[str] = TASKS) -> None:
    for task in tasks:
        if task not in known:
            raise LanceQuantError(f"{key} has no '{task}'; choose from {', '.join(TASKS)}")


def served_tasks(key: str, tasks, layout: str) -> list[str]:
    """The tasks of a checked setting on a checkpoint of a layout, "auto" resolved.

    Raises LanceQuantError for one that the layout does not serve.
    """
    served = LAYOUT_TASKS[layout]
    if tasks == "auto":
        return list(served)
    for task in tasks:
        if task not in served:
            raise LanceQuantError(
                f"{key} has '{task}', which a checkpoint of the {layout} layout does not serve: "
                f"{'choose from ' + ', '.join(served) if served else 'leave it at auto'}"
            )
    return list(tasks)


def layout_of(names: Sequence[str]) -> str:
    """Which of `LAYOUT_TASKS` a model file's tensor names show."""
    if all(name.startswith(DECODER_PREFIX) for name in names):
        return "text"
    return "video" if any(name.startswith(VIT_PREFIX) for name in names) else "image"


def _first(candidates: list[Path], complaint: str) -> Path:
    for path in candidates:
        if path.is_file():
            return path
    raise LanceQuantError(complaint)
