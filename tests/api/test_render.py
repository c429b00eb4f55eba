import io
import itertools
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from attnrewrite.passes.report import Bias, Box, Drawing, Mask, Projection, Rejection, Report, Site
from attnrewrite.render.html import html_view, write_html, write_text
from attnrewrite.render.layout import picture
from attnrewrite.render.rows import fold_paths, mask_text, rows
from attnrewrite.render.text import text_view

SOURCE = "/lib/site-packages/transformers/models/llama/modeling_llama.py:214"


def site(layer, **changes):
    facts = {"heads": 9, "kv_heads": 3, "query_length": 32, "key_length": 32, "mask": Mask("causal", 0)}
    return Site(layer, SOURCE, **{"status": "matched", "certificate": "proved", **facts, **changes})


@pytest.fixture
def report():
    sites = [site(f"model.layers.{index}.self_attn") for index in range(30)]
    refusal = Rejection("AR203", "tanh stands between the product and the softmax", source=SOURCE)
    sites[7] = site("model.layers.7.self_attn", status="rejected", rejections=[refusal])
    router = Rejection("AR202", "the softmax is a router's", layer="model.layers.2.mlp.router", source=SOURCE)
    timings, versions = {"capture": 2300.0, "match": 41.0}, {"torch": "2.13.0"}
    return Report("tiny-llama", "export", sites, [router], timings, versions)


def printed(renderable, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_text_folds_layers_that_read_alike(report):
    text = printed(text_view(report))
    assert "tiny-llama · 30 attention sites: 29 matched, 1 rejected" in text
    line = next(line for line in text.splitlines() if "{0..6,8..29}" in line)
    assert line.split() == [
        "model.layers.{0..6,8..29}.self_attn",
        "modeling_llama.py:214",
        "9/3",
        "32\N{MULTIPLICATION SIGN}32",
        "causal",
        "matched,",
        "proved",
    ]
    assert "rejected AR203" in text
    assert len(text.splitlines()) < 20


def test_text_says_each_rejection_in_four_lines(report):
    lines = printed(text_view(report)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("AR203"))
    assert "unsupported form of scores" in lines[start]
    assert "model.layers.7.self_attn" in lines[start]
    assert lines[start + 1].strip() == "tanh stands between the product and the softmax"
    assert lines[start + 2].strip().startswith("nearest accepted form: softmax(")
    assert lines[start + 3].strip().startswith("hint: ")


def test_verbose_text_has_every_site_and_the_whole_source(report):
    text = printed(text_view(report, verbose=True), width=200)
    assert text.count("self_attn  ") >= 30
    assert SOURCE in text
    assert "capture 2.3 s · match 41 ms" in text


def test_verbose_text_says_what_is_special_about_a_site():
    made = dict.fromkeys(("query", "key", "value"), Projection(["qkv"], ["qkv.weight"], fused=True))
    facts = {"rope": "half", "rope_dims": 64, "qk_norm": "rms", "dtype": "bfloat16", "softmax_dtype": "float32"}
    facts |= {"projections": made, "cross": False, "cache": "cat", "other_users": ["probs"], "sink": True}
    biased = site("layers.0.attn", bias=[Bias("alibi", [1, 9, 1, 32])], **facts)
    text = printed(text_view(Report("m", "", [biased, site("layers.1.attn")]), verbose=True), width=240)
    assert "rope 64, qk-norm rms, fused qkv, sink, cache cat, softmax in float32, probs used again" in text
    assert "causal, bias alibi" in text
    assert "facts" not in printed(text_view(Report("m", "", [site("layers.1.attn")]), verbose=True))


def test_only_keeps_one_status(report):
    text = printed(text_view(report, only="rejected"))
    assert "{0..6,8..29}" not in text
    assert "rejected AR203" in text
    assert "30 attention sites: 29 matched, 1 rejected · 1 softmax not attention" in text
    assert "AR202" not in text
    assert "AR202" not in printed(text_view(report, only="matched"))


def test_text_of_an_empty_report():
    assert printed(text_view(Report("mlp"))).strip() == "mlp · 0 attention sites"


def test_narrow_terminals_lose_no_letter(report):
    text = printed(text_view(report), width=60)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60


def test_markup_in_names_is_plain_text():
    named = Report("[red]m[/red]", sites=[site("[bold]layer[/bold]")])
    assert "[bold]layer[/bold]" in printed(text_view(named))


@pytest.mark.parametrize(
    ("paths", "folded"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], [("a.{0..2}.b", 3)]),
        (["a.0.b", "a.2.b"], [("a.{0,2}.b", 2)]),
        (["a.5.b"], [("a.5.b", 1)]),
        (["attn", "attn"], [("attn", 1)]),
        (["e.0.l.0.s", "e.1.l.0.s", "e.1.l.1.c"], [("e.{0..1}.l.0.s", 2), ("e.1.l.1.c", 1)]),
        (["conv2d.attn", "conv3d.attn"], [("conv2d.attn", 1), ("conv3d.attn", 1)]),
        (["0", "1"], [("{0..1}", 2)]),
        ([], []),
    ],
)
def test_fold_paths(paths, folded):
    assert fold_paths(paths) == folded


def test_masks_in_words():
    assert mask_text(Mask("causal", 0)) == "causal"
    assert mask_text(Mask("causal", 4)) == "causal +4"
    assert mask_text(Mask("window+padding", 0, 8, True)) == "window 8+padding"


def test_result_says_variant_and_implementation():
    done = site("a", status="rewritten", variant="ssa", implementation="reference")
    assert rows([done])[0].result == "rewritten → ssa → reference"


class Page(HTMLParser):
    """Collects what a reader and a network watcher would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def chain(*names):
    """A drawing in which every box reads the one before it."""
    boxes = [Box(name, "input" if n == 0 else name, "", "float32", [2, 5]) for n, name in enumerate(names)]
    return Drawing(boxes, [list(pair) for pair in itertools.pairwise(names)])


def test_page_shows_every_site_and_needs_nothing_beside_it(report):
    report.drawings = {"a": chain("query", "einsum", "exp"), "b": chain("query", "flash")}
    for drawn in report.sites:
        drawn.before, drawn.after = "a", "b"
    text = html_view(report)
    page = Page(text)
    assert page.tags.count("details") == 3  # 29 equal layers, a rejected one, a router
    assert page.tags.count("svg") == 4
    assert page.tags.count("rect") == 10
    assert page.links == []
    assert "://" not in text
    assert all(f"model.layers.{index}.self_attn" in text for index in range(30))
    content = " ".join(page.words)
    for word in (
        "tiny-llama",
        "einsum",
        "float32 [2, 5]",
        "flash",
        "nearest accepted form: softmax(",
        "AR203",
        "AR202",
        "2.3 s",
        "2.13.0",
        SOURCE,
    ):
        assert word in content


def test_page_escapes_what_the_model_says():
    evil = "<script>alert(1)</script>"
    report = Report(evil, sites=[site(evil, before="a")], rejections=[Rejection("AR202", evil)])
    report.drawings = {"a": Drawing([Box(evil, evil, evil, evil, [evil])], [])}
    text = html_view(report)
    assert evil not in text
    assert Page(text).tags.count("script") == 1


def test_drawings_flow_downwards_and_no_boxes_overlap():
    drawing = chain("query", "matmul", "add", "softmax", "matmul_2")
    drawing.nodes += [Box("key", "input"), Box("mask", "input", "mask", "bool", ["s0", 1]), Box("value", "input")]
    drawing.edges += [["key", "matmul"], ["mask", "add"], ["value", "matmul_2"], ["query", "matmul_2"]]
    found = picture(drawing)
    places = {placed.box.name: placed for placed in found.boxes}
    assert all(places[a].y + places[a].height < places[b].y for a, b in drawing.edges)
    assert len(found.lines) == len(drawing.edges)
    for one, other in itertools.combinations(found.boxes, 2):
        assert one.y != other.y or one.x + one.width <= other.x or other.x + other.width <= one.x
    for placed in found.boxes:
        assert 0 <= placed.x < placed.x + placed.width <= found.width
        assert 0 <= placed.y < placed.y + placed.height <= found.height
    assert places["mask"].value == "bool [s0, 1]"
    assert places["key"].y == places["query"].y


def test_a_drawing_of_nothing():
    assert picture(Drawing()).boxes == []


def test_page_of_an_empty_report():
    assert "No attention was found" in html_view(Report("mlp"))


def test_page_is_written_in_one_step(report, tmp_path):
    path = tmp_path / "new" / "report.html"
    write_html(report, path)
    assert path.read_text(encoding="utf-8") == html_view(report)
    with pytest.raises(TypeError):
        write_text(path, None)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == html_view(report)


def test_report_survives_json(report):
    report.drawings["a"] = chain("query", "matmul")
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
