"""report.html and report.md over a small run's artifacts: content, self-containment, absent tasks, equal bytes."""

import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pandas as pd
import pytest

from lance_quant.evaluation.report import word_difference, write_report


class Nesting(HTMLParser):
    """Every tag is closed, in order; void elements aside."""

    VOID = {"meta", "img"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def check_nesting(html: str) -> None:
    parser = Nesting()
    parser.feed(html)
    assert parser.open == []


def written(job, out):
    out.mkdir()
    summary = write_report(job, out)
    return summary, (out / "report.html").read_text(), (out / "report.md").read_text()


def test_everything_is_in_both_reports(make_job, tmp_path):
    summary, html, md = written(make_job(), tmp_path / "out")
    assert summary.headline == (
        "4 bits at group size 64: 6 of 8 answers identical to bf16, pictures 31.7 dB from bf16, 5.25 times smaller."
    )
    assert asdict(summary) | {"headline": "", "bytes": 0} == {
        "html": "report.html",
        "markdown": "report.md",
        "card": "README.md",
        "sensitivity": "sensitivity.parquet",
        "headline": "",
        "answers": 8,
        "pictures": 4,
        "bytes": 0,
    }
    assert summary.bytes == (tmp_path / "out" / "report.html").stat().st_size
    for text in (html, md):
        for wanted in (
            summary.headline,
            "9.60 MB",
            "4.80 MB",
            "1.83 MB",
            "Identical answers",
            "75.0 %",
            "Velocity error",
            "0.0340",
            "0.0680",
            "three blue circles",
            "three green circles on a pale ground",
            "6 of 8",
            "2 lost, 0 gained",
            "layers.3.mlp.down_proj_moe_gen",
            "4,093" if text is html else "4093",
            "evaluation.tasks",
            "x2t_image, t2i",
            "asym_int4_grouped_awq",
            "input_norm",
        ):
            assert wanted in text.replace("\u00a0", " "), wanted
    check_nesting(html)


def test_html_is_self_contained(make_job, tmp_path):
    _, html, _ = written(make_job(), tmp_path / "out")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 8 + 4 * 3 and all(source.startswith("data:image/") for source in sources)
    assert "<script" not in html and "url(" not in html and "@import" not in html
    assert html.count('class="panel"') == 2 * 4 and html.count('class="chart"') == 2


def test_text_of_the_model_is_escaped(make_job, tmp_path):
    _, html, md = written(make_job(), tmp_path / "out")
    assert "<b>exactly</b>" not in html and "&lt;b&gt;exactly&lt;/b&gt;" in html
    assert "picture \\| &lt;b>exactly" in md


def test_what_differs_comes_first(make_job, tmp_path):
    _, html, md = written(make_job(), tmp_path / "out")
    names = re.findall(r"^\| (x2t_image_\d\d) ", md, flags=re.M)
    assert names == [f"x2t_image_{i:02d}" for i in (1, 5, 0, 2, 3, 4, 6, 7)]
    assert html.index("<mark>two</mark> blue circles") < html.index('badge same">same')


def test_pictures_of_the_markdown_exist(make_job, tmp_path):
    _, _, md = written(make_job(), tmp_path / "out")
    linked = re.findall(r"\]\((pictures/[^)]*)\)", md)
    assert len(linked) == 8 and all((tmp_path / "out" / path).is_file() for path in linked)
    assert (tmp_path / "out" / "pictures" / "x2t_image_00.input.png").is_file()


@pytest.mark.parametrize(("x2t", "t2i"), [(3, 0), (0, 2), (1, 1)])
def test_absent_tasks_leave_their_sections_out(make_job, tmp_path, x2t, t2i):
    summary, html, md = written(make_job(x2t_image=x2t, t2i=t2i), tmp_path / "out")
    for text in (html, md):
        assert ("Answers side by side" in text) == ("Identical answers" in text) == bool(x2t)
        assert ("Pictures side by side" in text) == ("Velocity direction" in text) == bool(t2i)
    assert ("answers identical" in summary.headline, "dB" in summary.headline) == (bool(x2t), bool(t2i))
    check_nesting(html)


def test_a_recipe_without_search_or_capture(make_job, tmp_path):
    _, html, md = written(make_job(searched=False), tmp_path / "out")
    for text in (html, md):
        assert "searches for no scales" in text and "Calibration coverage" not in text and "took off" not in text


def rows_under(md: str, head: str) -> list[list[str]]:
    """Cells of the Markdown table whose head starts so."""
    lines = md[md.index(f"\n| {head} ") :].split("\n\n")[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_what_each_ingredient_took_off(make_job, tmp_path):
    """The weighed error's shares where there are some; the layer's last."""
    _, html, md = written(make_job(layers=3), tmp_path / "out")
    table = rows_under(md, "path | site | folds")
    assert table[0] == ["path", "site", "folds", "clip", "gptq", "left"]
    assert [row[0] for row in table[1:]] == ["und"] * 4 + ["gen"] * 4 + ["both"]
    assert table[5] == ["gen", "input of q, k, v", "25.0 %", "12.5 %", "12.5 %", "50.0 %"]
    assert table[1][4].startswith("-10.")  # of und's unweighed errors, which gptq raises
    assert table[9] == ["both", "the layer's output", "25.0 %", "0.0 %", "50.0 %", "25.0 %"]
    assert html.count('<td class="n">12.5 %</td>') == 8 and "the layer&#39;s output" in html
    for text in (html, md):
        assert "weighed where gradients came" in text and "sensitivity.parquet" in text


def test_the_worst_linears_tell_how_they_were_rounded(make_job, tmp_path):
    _, html, md = written(make_job(layers=1), tmp_path / "out")
    rows = rows_under(md, "linear | site")
    assert rows[0] == ["linear", "site", "group", "scheme", "alpha", "clip", "before", "after", "of the"]
    found = {row[0].strip("`").removeprefix("language_model.model.layers.0."): row[1:] for row in rows[1:]}
    scheme = ["64", "`asym_int4_grouped_awq`"]
    clip = "0.91 / 0.94"
    assert list(found)[0] == "mlp.down_proj_moe_gen" and list(found)[-1] == "self_attn.q_proj"
    assert found["self_attn.q_proj"] == ["qkv", *scheme, "0.35 (input_norm)", clip, "0.0900", "0.0500", "output"]
    assert found["mlp.down_proj_moe_gen"] == ["down", *scheme, "", clip, "0.1800", "0.0900", "output, weighed"]
    assert html.count("weighed error of the output") == 4 and html.count(clip) == 8
    assert len(rows_under(written(make_job(layers=8), tmp_path / "many")[2], "linear | site")) == 1 + 10


def test_many_samples_fold_away(make_job, tmp_path):
    _, html, md = written(make_job(x2t_image=20, t2i=18, layers=1), tmp_path / "out")
    assert html.count("<article") == 12 and "8 more" in html and md.count("\n| x2t_") == 20
    assert html.count("<figure") == 8 and "8 furthest apart of 18" in html and md.count("\n| three") == 18


ALL_TASKS = {"x2t_image": 2, "x2t_video": 3, "t2i": 2, "t2v": 2, "i2v": 2, "image_edit": 2, "video_edit": 2}


def test_all_seven_tasks_have_their_rows_and_pictures(make_job, tmp_path):
    summary, html, md = written(make_job(**ALL_TASKS, layers=1), tmp_path / "out")
    assert "pictures and clips 31.7 dB from bf16" in summary.headline
    assert (summary.answers, summary.pictures) == (5, 10)
    for text in (html, md):
        for wanted in ("3 questions about clips", "2 clips from pictures", "Edited clips", "As asked, int4", "All"):
            assert wanted in text, wanted
    for task in ALL_TASKS:
        assert f"<code>{task}</code>" in html and f"\n| `{task}` |" in md
    # given, bf16, int4 and difference; strips where clips are
    assert html.count('class="shots of4 strips"') == 2 + 2 and html.count('class="shots of4"') == 2
    assert html.count('class="shots of3 strips"') == html.count('class="shots of3"') == 2
    assert html.count('class="card answer strip"') == 3
    assert html.count('class="line task ') == 2 * 5
    assert (tmp_path / "out" / "pictures" / "video_edit_00.input.png").is_file()
    check_nesting(html)


def test_no_task_at_all(make_job, tmp_path):
    summary, html, md = written(make_job(x2t_image=0), tmp_path / "out")
    assert summary.headline == "4 bits at group size 64: 5.25 times smaller."
    for text in (html, md):
        assert "no task was run" in text and "Task by task" not in text
    check_nesting(html)


def test_the_samples_are_called_by_their_source(make_job, tmp_path):
    job = make_job(layers=1)
    assert "drawn scenes" in written(job, tmp_path / "scenes")[1]
    _, html, md = written(replace(job, evaluated_on="bundled"), tmp_path / "bundled")
    for text in (html, md):
        assert "charts, texts, photographs and clips" in text and "drawn scenes" not in text


def test_uncovered_sites_are_named(make_job, tmp_path):
    job = make_job()
    _, html, md = written(replace(job, min_tokens=4095), tmp_path / "out")
    assert "too few, layer 3" in html and "too few, layer 3" in md
    assert "too few" not in written(job, tmp_path / "covered")[1]


def test_equal_artifacts_give_equal_bytes(make_job, tmp_path):
    job = make_job()
    written(job, tmp_path / "one")
    moved = tmp_path / "elsewhere"
    shutil.copytree(job.metrics, moved)
    answers = pd.read_parquet(moved / "answers.parquet")
    answers.sample(frac=1, random_state=1).to_parquet(moved / "answers.parquet")  # the order of rows does not matter
    written(replace(job, metrics=moved), tmp_path / "two")
    for name in ("report.html", "report.md", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_word_difference():
    assert word_difference("three red circles", "two red circles") == [("two", True), ("red circles", False)]
    assert word_difference("a b", "a") == [("a", False)]
    assert word_difference("a", "") == []


def test_loss_panels_mark_the_chosen_alpha(make_job, tmp_path):
    job = make_job(layers=1)
    path = job.layers[0] / "losses.parquet"
    losses = pd.read_parquet(path)
    _, html, _ = written(job, tmp_path / "out")
    assert "α 0.4, 0.5<" in html and "dotted level: <code>identity</code>" in html
    plain = (losses["path"] == "gen") & (losses["fold"] == "input_norm")
    losses.loc[plain, "chosen"] = losses["family"] == "identity"  # no scale was better than any
    losses.to_parquet(path)
    assert "α 0.4, none<" in written(job, tmp_path / "again")[1]
