"""How reports call tasks, samples and scores: tables, no arithmetic."""

from typing import NamedTuple


class TaskName(NamedTuple):
    """tag: of the hub's pipelines; title: of what is made; one, many: a sample and several, in a sentence."""

    tag: str
    title: str
    one: str
    many: str


TASK_NAMES = {
    "x2t_image": TaskName(
        tag="image-text-to-text",
        title="Questions about pictures",
        one="question about a picture",
        many="questions about pictures",
    ),
    "x2t_video": TaskName(
        tag="video-text-to-text",
        title="Questions about clips",
        one="question about a clip",
        many="questions about clips",
    ),
    "t2i": TaskName("text-to-image", "Pictures from text", "picture from text", "pictures from text"),
    "t2v": TaskName("text-to-video", "Clips from text", "clip from text", "clips from text"),
    "i2v": TaskName("image-to-video", "Clips from a picture", "clip from a picture", "clips from pictures"),
    "image_edit": TaskName("image-to-image", "Edited pictures", "edited picture", "edited pictures"),
    "video_edit": TaskName("video-to-video", "Edited clips", "edited clip", "edited clips"),
}
SOURCE_NAMES = {  # of calibration and evaluation samples
    "scenes": "drawn scenes of coloured shapes",
    "bundled": "charts, texts, photographs and clips that lance-quant brings along",
    "published": "the example files that Lance's authors published",
    "text": "plain text",
}
PATH_TITLES = {"understanding": "Understanding", "generation": "Generation"}
INGREDIENT_TITLES = {
    "folds": "Folds",
    "clip": "Clip",
    "gptq": "GPTQ",
    "residual": "Residual",
    "learned": "Learned",
}


def counted(task: str, count: int) -> str:
    """`3 edited clips`."""
    name = TASK_NAMES[task]
    return f"{count} {name.one if count == 1 else name.many}"


class Score(NamedTuple):
    """One row of the scores table: where its mean stands in metrics.json and its samples in a Parquet file.

    kind: how the number is written, percent | ratio | small | plain | decibel. worst: which end of the column is the
    worst sample.
    """

    key: str
    path: str
    title: str
    meaning: str
    kind: str
    best: str
    table: str = ""
    column: str = ""
    worst: str = "min"


UND, GEN = "understanding", "generation"
SCORES = (
    Score(key="x2t_exact", path=UND, title="Identical answers", kind="percent", best="100 %",
          meaning="Share of answers that are the bf16 answer, character for character."),
    Score(key="x2t_levenshtein", path=UND, title="Character similarity", kind="ratio", best="1",
          meaning="1 minus the edits that turn one answer into the other, per character (Levenshtein).",
          table="answers", column="levenshtein"),
    Score(key="x2t_difflib", path=UND, title="Sequence similarity", kind="ratio", best="1",
          meaning="Share of the text that lies in common runs of characters (difflib ratio).",
          table="answers", column="difflib"),
    Score(key="x2t_jaccard", path=UND, title="Word overlap", kind="ratio", best="1",
          meaning="Words used by both answers, of the words used by either (Jaccard).",
          table="answers", column="jaccard"),
    Score(key="top1", path=UND, title="Same next token", kind="percent", best="100 %",
          meaning="How often both models put the same token first, when both are led along the bf16 answer.",
          table="forced", column="top1"),
    Score(key="kl", path=UND, title="KL divergence", kind="small", best="0",
          meaning="Information lost per token, in nats, between the two next-token distributions.",
          table="forced", column="kl", worst="max"),
    Score(key="perplexity_baseline", path=UND, title="Perplexity, bf16", kind="plain", best="1",
          meaning="How many tokens bf16 hesitates between, on its own answers.",
          table="forced", column="perplexity_baseline", worst="max"),
    Score(key="perplexity_int4", path=UND, title="Perplexity, {label}", kind="plain", best="as bf16",
          meaning="The same for the quantized model, on the same bf16 answers.",
          table="forced", column="perplexity_int4", worst="max"),
    Score(key="velocity_relative_l2", path=GEN, title="Velocity error", kind="small", best="0",
          meaning="Size of the error of one denoising step's output, relative to it, on the bf16 trajectory.",
          table="velocity", column="relative_l2", worst="max"),
    Score(key="velocity_guided_relative_l2", path=GEN, title="Velocity error, guided", kind="small", best="0",
          meaning="The same after classifier-free guidance, which enlarges small differences.",
          table="velocity", column="guided_relative_l2", worst="max"),
    Score(key="velocity_cosine", path=GEN, title="Velocity direction", kind="plain", best="1",
          meaning="Cosine between the two outputs of one denoising step: 1 is the same direction.",
          table="velocity", column="cosine"),
    Score(key="latent_relative_l2", path=GEN, title="Final latent error", kind="small", best="0",
          meaning="Relative error of the finished latent, each model on its own trajectory from the same noise.",
          table="pictures", column="latent_relative_l2", worst="max"),
    Score(key="psnr", path=GEN, title="Picture PSNR", kind="decibel", best="100 dB",
          meaning="Pixel difference of the decoded pictures, frame by frame in clips, in decibels; 100 dB stands for "
          "identical.",
          table="pictures", column="psnr"),
    Score(key="ssim", path=GEN, title="Picture SSIM", kind="ratio", best="1",
          meaning="Likeness of local structure as the eye weighs it.",
          table="pictures", column="ssim"),
)  # fmt: skip

# path -> (score within a task, heading, kind) of the table with a row a task
TASK_COLUMNS = {
    UND: (
        ("exact", "Same answer", "percent"),
        ("correct_baseline", "Right, bf16", "percent"),
        ("correct_int4", "Right, {label}", "percent"),
        ("levenshtein", "Characters", "ratio"),
        ("jaccard", "Words", "ratio"),
        ("top1", "Next token", "percent"),
        ("kl", "KL", "small"),
    ),
    GEN: (
        ("correct_baseline", "As asked, bf16", "percent"),
        ("correct_int4", "As asked, {label}", "percent"),
        ("velocity_relative_l2", "Velocity", "small"),
        ("velocity_guided_relative_l2", "Guided", "small"),
        ("latent_relative_l2", "Latent", "small"),
        ("psnr", "PSNR", "decibel"),
        ("ssim", "SSIM", "ratio"),
    ),
}
