"""The Hugging Face model card of a packed folder: what it holds, what it was measured on, how to read it.

write_card(job, packed / "README.md")
"""

import json
from pathlib import Path

from lance_quant.evaluation.findings import Findings, ReportJob, packed_files
from lance_quant.evaluation.rendering import render

BASE_MODELS = {"image": "bytedance-research/Lance", "video": "bytedance-research/Lance"}  # checkpoint name -> hub name
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
    }
    path.write_text(render("card.md.j2", view), encoding="utf-8")


def front_matter(found: Findings) -> list[tuple[str, str]]:
    """(key, value as JSON, which is YAML too) of the card's header, as the hub reads it."""
    job, base = found.job, BASE_MODELS.get(found.job.name)
    tags = ["lance", "multimodal", "awq", f"{found.bits}-bit", "quantized"]
    tags += [TASKS[task][0] for task in found.meta["tasks_calibrated"] if task in TASKS]
    fields = {
        "license": "apache-2.0",
        "library_name": "lance-quant",
        "pipeline_tag": "any-to-any",
        "base_model": base or f"Lance_{job.name}",
        "base_model_relation": "quantized",
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
