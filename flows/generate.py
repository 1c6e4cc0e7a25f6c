"""Run any of Lance's seven tasks on any checkpoint, bf16 or packed to 4 bits.

    python -m flows.generate task=t2i prompt='a red circle'
    python -m flows.generate task=x2t_image image=photo.jpg prompt='What is this?' checkpoint=image
    python -m flows.generate task=t2v prompt='a red circle' checkpoint=video weights=artifacts/report/<key>/model
    python -m flows.generate -m task=t2i prompt='a red circle' weights=bf16,artifacts/report/<key>/model seed=1,2,3
    python -m flows.generate examples=Lance/config/examples/image_edit_example.json checkpoint=image

Writes `<out>/<task>-<seed>.png`, `.mp4` or `.txt` and a JSON beside it. What an example file asks for goes to
`<out>/<its name>/000001.png` and so on, the runs of a sweep (-m) to `<out>/0`, `<out>/1`. Nothing is overwritten: where
a name is taken, -2, -3 and so on is put behind it, behind the folder's for an example file.
"""

import contextlib
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from flows.command import INTERRUPTED, end, one_sentence, run_command
from lance_quant.checkpoint.config import CheckpointConfig
from lance_quant.errors import LanceQuantError
from lance_quant.model.resolution import PRESETS
from lance_quant.progress import Progress
from tasks.config import CONF, SMALL_WIDTH, register, strict

BF16 = "bf16"
LINES = 9  # of progress, after one for loading
FREE_TEXT = ("prompt", "instruction", "image", "video", "examples")  # taken to the letter, without Hydra's grammar
QUOTED = re.compile(r"""'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.DOTALL)  # for Hydra, by the user


@dataclass(kw_only=True)
class Int4Keys:
    """Of `selection.Int4Config`, which needs torch."""

    backend: str = "auto"
    resident_gb: float = 0.0


@dataclass(kw_only=True)
class GenerateConfig:
    """One request, or an example file's. Every key: docs/configuration.md.

    weights: bf16, or the folder of a pack artifact or of report/<key>/model. resolution: one of PRESETS, else the
    checkpoint's own. height, width, frames: of what is drawn, where nothing given decides it; 0 is a square of the
    resolution's edge, for clips that of clips, and the checkpoint's `frames`. accelerate: auto (on a GPU), on or off
    (docs/performance.md). int4: of packed weights alone (docs/int4.md).
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    weights: str = BF16
    task: str = ""
    prompt: str = ""
    image: str = ""
    video: str = ""
    instruction: str = ""
    examples: str = ""
    resolution: str = ""
    height: int = 0
    width: int = 0
    frames: int = 0
    steps: int = 30
    timestep_shift: float = 3.5
    guidance: float = 4.0
    seed: int = 42
    max_new_tokens: int = 256
    cached: bool = True
    faithful: bool = True
    device: str = "auto"
    accelerate: str = "auto"
    int4: Int4Keys = field(default_factory=Int4Keys)
    artifacts: str = "artifacts"
    out: str = "artifacts/generate"

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise LanceQuantError("checkpoint=null leaves nothing to run: name one of conf/checkpoint/")
        if self.resolution and self.resolution not in PRESETS:
            raise LanceQuantError(f"resolution={self.resolution} is unknown: take one of {', '.join(PRESETS)}")
        for name in ("height", "width", "frames"):
            if getattr(self, name) < 0:
                raise LanceQuantError(f"{name}={getattr(self, name)} must be positive, or 0 for the default")
        own = [name for name in ("prompt", "image", "video", "instruction") if getattr(self, name)]
        if self.examples and own:
            raise LanceQuantError(f"examples={self.examples} brings its own requests: leave {own[0]} out")
        if not self.examples and not self.task:
            raise LanceQuantError("nothing to do: give task=t2i prompt='a red circle', or examples=FILE")
        for name, value in asdict(self.int4).items():
            if self.weights == BF16 and value != getattr(Int4Keys, name):
                raise LanceQuantError(f"int4.{name}={value} is of packed weights: give weights=FOLDER, or leave it out")
        for name in ("weights", "artifacts", "out"):
            if not getattr(self, name):
                raise LanceQuantError(f"{name} is empty: give {name}={getattr(type(self), name)}")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="generate")
def main(composed: DictConfig) -> None:
    with one_sentence():
        cfg = strict(GenerateConfig, composed)
        job = HydraConfig.get()
        if job.mode is RunMode.MULTIRUN:  # runs of a sweep may share task and seed
            cfg.out = str(Path(cfg.out) / str(job.job.num))
        try:
            generate(cfg)
        except KeyboardInterrupt:
            end(f"stopped: what is done lies in {cfg.out}", INTERRUPTED)


def generate(cfg: GenerateConfig) -> None:
    """Run every request and write what comes of it; one line of stdout for each."""
    import torch

    from lance_quant.checkpoint.layout import open_checkpoint
    from lance_quant.devices import choose_device
    from lance_quant.model.inputs import drawn_size
    from lance_quant.model.sampler import FlowConfig
    from lance_quant.runtime.generate import GenerationConfig, Generator, check_request, check_task
    from lance_quant.runtime.selection import Int4Config

    flow = FlowConfig(
        steps=cfg.steps,
        timestep_shift=cfg.timestep_shift,
        guidance=cfg.guidance,
        cached=cfg.cached,
        faithful=cfg.faithful,
    )
    settings = GenerationConfig(flow=flow, seed=cfg.seed, max_new_tokens=cfg.max_new_tokens)
    int4 = None if cfg.weights == BF16 else Int4Config(**asdict(cfg.int4))
    device = choose_device(cfg.device)
    if device == "cpu" and cfg.int4.resident_gb and cfg.int4.backend != "dense":
        raise LanceQuantError(
            f"int4.resident_gb={cfg.int4.resident_gb} has no say on a CPU: leave it out, or give int4.backend=dense"
        )
    checkpoint = open_checkpoint(cfg.checkpoint)
    if cfg.resolution:
        checkpoint = replace(checkpoint, pictures=PRESETS[cfg.resolution], clips=PRESETS[cfg.resolution])
    examples = asked(cfg)
    for example in examples:
        check_task(checkpoint, example.task)
        check_size_keys(cfg, example.task)
    if device == "cpu" and checkpoint.config.hidden_size < SMALL_WIDTH:
        torch.set_num_threads(1)
    weights = None if cfg.weights == BF16 else Path(cfg.weights).expanduser()
    generator = Generator(checkpoint, weights, device, cfg.accelerate, int4)
    out = Path(cfg.out)
    lines = Lines(len(examples))
    identity = None
    for index, example in enumerate(examples):
        edges = checkpoint.edges(example.task)
        request = example.request(
            height=cfg.height or edges.image_edge,
            width=cfg.width or edges.image_edge,
            frames=cfg.frames or checkpoint.frames,
        )
        if index == 0:
            check_request(checkpoint, request)
            print(f"{checkpoint.name}, weights {cfg.weights}, on {device}", file=sys.stderr, flush=True)
            frames = drawn_size(request, edges)[0] if cfg.frames else 0
            if frames != cfg.frames:
                print(f"frames={cfg.frames} draws {frames}: a clip has 4 n + 1", file=sys.stderr, flush=True)
        result = generator.run(request, settings, lines.of(index))
        identity = identity or weights_identity(generator, Path(cfg.artifacts))
        said = asdict(settings) | {"resolution": asdict(edges), "device": device}
        if int4 is not None:
            said["int4"] = asdict(int4)
        if index == 0 and cfg.examples:
            out = own_folder(out / Path(cfg.examples).stem)
        write(out, example.name, result, {"request": recorded(example, result), "settings": said, "weights": identity})


def asked(cfg: GenerateConfig) -> list:
    """The entries of the example file, or the one request of the settings."""
    from lance_quant.examples import Example, list_examples
    from lance_quant.model.request import GENERATION, GIVEN, TASKS, UNDERSTANDING

    if cfg.examples:
        return list_examples(cfg.examples, cfg.task or None)
    task = cfg.task
    if task not in TASKS:
        raise LanceQuantError(f"task={task} is unknown: take one of {', '.join(TASKS)}")
    for name in ("image", "video"):
        if getattr(cfg, name) and GIVEN.get(task) != name:
            raise LanceQuantError(f"task {task} looks at no {name}: leave {name}=... out, or take another task")
    if cfg.instruction and task not in UNDERSTANDING:
        raise LanceQuantError(f"task {task} takes no instruction: say it in prompt=...")
    if not cfg.prompt and task in GENERATION:
        raise LanceQuantError(f"task {task} needs a text and got none: give prompt='...'")
    given = getattr(cfg, GIVEN.get(task, ""), "")
    return [
        Example(
            task=task,
            name=f"{task}-{cfg.seed}",
            prompt=cfg.prompt,
            instruction=cfg.instruction,
            media=Path(given).expanduser() if given else None,
        )
    ]


def check_size_keys(cfg: GenerateConfig, task: str) -> None:
    """Raises LanceQuantError for a height, width or frames that has no say in the task, rather than pass over it."""
    from lance_quant.model.inputs import SIZED
    from lance_quant.model.request import GIVEN, UNDERSTANDING

    for name in ("height", "width", "frames"):
        value = getattr(cfg, name)
        if not value or name in SIZED.get(task, ()):
            continue
        why = f"takes its {name} from {GIVEN[task]}=..." if task in GIVEN else "draws a single frame"
        if task in UNDERSTANDING:
            why = "draws nothing"
        raise LanceQuantError(f"task {task} {why}: leave {name}={value} out")


def recorded(example, result) -> dict:
    """The request as its JSON tells of it: what has a say in its task, sizes as they were drawn."""
    from lance_quant.model.inputs import SIZED
    from lance_quant.model.request import GIVEN, INSTRUCTIONS, UNDERSTANDING

    task = example.task
    record = {"task": task, "prompt": example.prompt}
    if task in UNDERSTANDING:
        record |= {"instruction": example.instruction or INSTRUCTIONS[task], "reference": example.answer}
    if task in GIVEN:
        record[GIVEN[task]] = str(example.media.resolve())
    return record | {name: value for name, value in sizes(result).items() if name in SIZED.get(task, ())}


def sizes(result) -> dict[str, int]:
    """frames, height and width of what was drawn; nothing for an answer."""
    return {} if result.frames is None else dict(zip(("frames", "height", "width"), result.frames.shape, strict=False))


def write(out: Path, name: str, result, origin: dict) -> None:
    """`<name>.png`, `.mp4` or `.txt`, and `<name>.json`, which says how it came about."""
    from lance_quant.media import write_clip, write_image

    out.mkdir(parents=True, exist_ok=True)
    made = sizes(result)
    if result.frames is None:
        file = own_file(out, name, ".txt")
        file.write_text(result.text + "\n", encoding="utf-8")
        made = {"answer": result.text, "answer_with_stop_token": result.raw, "tokens": list(result.tokens)}
    elif len(result.frames) == 1:
        file = own_file(out, name, ".png")
        write_image(file, result.frames[0])
    else:
        file = own_file(out, name, ".mp4")
        write_clip(file, result.frames)
    cost = {"seconds": {part: round(value, 4) for part, value in result.seconds.items()}}
    cost |= {name: round(value, 4) for name, value in result.rate.items()} | {"gpu_peak_bytes": result.peak_bytes}
    record = {"file": file.name} | made | origin | cost
    file.with_suffix(".json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{file}  {result.text}".rstrip(), flush=True)


def own_file(out: Path, name: str, suffix: str) -> Path:
    """A new empty file, `<name><suffix>` or with -2, -3 ... behind the name: the first that no file of `out` bears."""
    taken = {file.stem for file in out.iterdir()}
    for candidate in candidates(name):
        if candidate not in taken:
            with contextlib.suppress(FileExistsError):  # another process was quicker
                (out / f"{candidate}{suffix}").touch(exist_ok=False)
                return out / f"{candidate}{suffix}"


def own_folder(folder: Path) -> Path:
    """The folder, new and empty, or with -2, -3 ... behind its name where it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for candidate in candidates(folder.name):
        with contextlib.suppress(FileExistsError):
            folder.with_name(candidate).mkdir()
            return folder.with_name(candidate)


def candidates(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{count}" for count in itertools.count(2))


def weights_identity(generator, artifacts: Path) -> dict:
    """Which weights made a result: the checkpoint, the file and its SHA-256, remembered where full_run does."""
    from lance_quant.checkpoint.inspect import file_hash
    from lance_quant.checkpoint.native import META_FILE, STATE_FILE

    checkpoint, folder = generator.checkpoint, generator.weights
    file = checkpoint.model_file if folder is None else folder / STATE_FILE
    identity = {"checkpoint": checkpoint.name, "layout": checkpoint.layout, "file": str(file.resolve())}
    identity |= {"bytes": file.stat().st_size, "sha256": file_hash(file, artifacts / "hashes.json")}
    if folder is None:
        return identity | {"bits": 16}
    meta = (folder / META_FILE).read_bytes()
    values = json.loads(meta)
    sizes = {"bits": values["n_bit"], "group_size": values["group_size"]}
    return identity | sizes | {"meta_sha256": hashlib.sha256(meta).hexdigest()}


class Lines:
    """Progress of all requests together on stderr, in at most LINES lines."""

    def __init__(self, requests: int):
        self.requests, self.told = requests, 0

    def of(self, index: int) -> Progress:
        def progress(done: int, total: int, what: str) -> None:
            share = (index * total + done) * LINES // (self.requests * total)
            if share > self.told:
                self.told = share
                print(
                    f"{(index + done / total) / self.requests:4.0%}  {what}: {done} of {total}",
                    file=sys.stderr,
                    flush=True,
                )

        return progress


def literal(words: list[str]) -> list[str]:
    """Command-line words in which the values of FREE_TEXT keys are quoted, where they are not yet.

    In Hydra's grammar a comma starts a sweep and a brace a dict. `${` is escaped twice: OmegaConf resolves it when the
    settings are composed and again when they meet their schema.
    """

    def quoted(word: str) -> str:
        key, _, value = word.partition("=")
        if key not in FREE_TEXT or QUOTED.fullmatch(value):
            return word
        value = value.replace("${", r"\\\${")
        value = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), value)
        return f"{key}='{value}'"

    return [quoted(word) for word in words]


def register_settings() -> None:
    """Make the schema known to Hydra; once a process, before it composes."""
    register()
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)


if __name__ == "__main__":
    register_settings()
    sys.argv[1:] = literal(sys.argv[1:])
    run_command(main)
