"""The Hugging Face model card of a packed folder: what it holds, what it was measured on, how to read it.

write_card(job, packed / "README.md")
"""

import json
from pathlib import Path

from lance_quant.evaluation.findings import Findings, ReportJob, packed_files
from lance_quant.evaluation.rendering import render

HUB_MODEL = "bytedance-research/Lance"
LEAST_PUBLISHED = 10**9  # parameters; anything smaller is a Lance-tiny of this project, under its licence
TASKS = {  # task of Lance -> (pipeline tag of the hub, plain words)
    "x2t_image": ("image-text-to-text", "answers about pictures"),
    "x2t_video": ("video-text-to-text", "answers about videos"),
    "t2i": ("text-to-image", "pictures from text"),
    "t2v": ("text-to-video", "videos from text"),
    "i2v": ("image-to-video", "videos from a picture"),
    "image_edit": ("image-to-image", "picture editing"),
    "video_edit": ("video-to-video", "video editing"),
}


def write_card(job: ReportJob, path: Path) -> None:
    """Writes the card to `path`: front matter, scores and samples, sizes, tensors, a snippet that reads one weight."""
    found = Findings(job)
    calibrated = found.meta["tasks_calibrated"]
    view = {
        "found": found,
        "job": job,
        "metrics": found.metrics,
        "front": front_matter(found),
        "calibrated": [TASKS.get(task, ("", task))[1] for task in calibrated],
        "example": next(iter(found.meta["per_weight"])).removesuffix(".weight"),
        "files": packed_files(job),
        "answers": len(found.answers),
        "pictures": len(found.pictures),
        "base": None if is_shipped(found) else HUB_MODEL,
    }
    path.write_text(render("card.md.j2", view), encoding="utf-8")


def is_shipped(found: Findings) -> bool:
    """Whether the weights are those of Lance-tiny: by size, since a name is free to choose."""
    return found.job.checkpoint["parameters"] < LEAST_PUBLISHED


def front_matter(found: Findings) -> list[tuple[str, str]]:
    """(key, value as JSON, which is YAML too) of the card's header, as the hub reads it."""
    job = found.job
    tags = ["lance", "multimodal", "awq", f"{found.bits}-bit", "quantized"]
    tags += [TASKS[task][0] for task in found.meta["tasks_calibrated"] if task in TASKS]
    origin = {"license": "apache-2.0"}
    if not is_shipped(found):  # the licence of other weights is their maker's to say
        origin = {"base_model": HUB_MODEL, "base_model_relation": "quantized"}
    fields = origin | {
        "library_name": "lance-quant",
        "pipeline_tag": "any-to-any",
        "tags": list(dict.fromkeys(tags)),
        "quantization": {
            "bits": found.bits,
            "group_size": found.group_size,
            "scheme": found.meta["scheme"],
            "recipe": job.recipe,
            "linears": len(found.meta["per_weight"]),
            "tasks_calibrated": found.meta["tasks_calibrated"],
            "source_fingerprint": job.checkpoint["fingerprint"],
        },
    }
    return [(key, json.dumps(value)) for key, value in fields.items()]
