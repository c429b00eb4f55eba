import sys

import pytest
import torch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_explain_finds_every_layer(run_json, folder, attention):
    code, data = run_json("explain", folder, "--attn", attention, "--seq-len", 8)
    assert code == 0
    assert [site["layer"] for site in data["sites"]] == [f"model.layers.{n}.self_attn" for n in (0, 1)]
    assert {site["status"] for site in data["sites"]} == {"matched"}
    assert (data["model"], data["schema_version"]) == ("tiny-llama", 2)


def test_explain_for_people(run, folder, tmp_path):
    page = tmp_path / "report.html"
    code, out, err = run("explain", folder, "--html", page)
    assert code == 0
    assert "tiny-llama · 2 attention sites: 2 matched" in out
    assert "model.layers.{0..1}.self_attn" in out
    assert str(page) in err
    assert "model.layers.1.self_attn" in page.read_text(encoding="utf-8")


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """A model with a matched attention, a rejected one and a router."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mixed_models", raising=False)
    (tmp_path / "mixed_models.py").write_text(MIXED)
    return "mixed_models:build"


MIXED = """
import torch


class Mixed(torch.nn.Module):
    def forward(self, x):
        good = torch.softmax(x @ x.mT, -1) @ x
        bad = torch.softmax(torch.relu(x @ x.mT), -1) @ x
        return good + bad * torch.softmax(x, -1)


def build():
    return Mixed(), torch.ones(1, 5, 4)
"""


def test_explain_says_of_every_softmax_what_it_is(run, run_json, mixed):
    code, data = run_json("explain", mixed)
    assert code == 0
    assert data["summary"] == {"sites": 2, "rewritten": 0, "matched": 1, "rejected": 1, "skipped": 0}
    refused = next(site for site in data["sites"] if site["status"] == "rejected")["rejections"]
    (other,) = data["rejections"]
    assert [refused[0]["code"], other["code"]] == ["AR203", "AR202"]
    for rejection in (*refused, other):
        assert "mixed_models.py:" in rejection["source"]
        assert all(rejection[name] for name in ("title", "detail", "nearest", "hints"))
    _, out, _ = run("explain", mixed)
    assert "2 attention sites: 1 matched, 1 rejected · 1 softmax not attention" in out
    for rejection in (*refused, other):
        for part in (rejection["code"], rejection["detail"], rejection["nearest"], rejection["hints"][0]):
            assert part in out
    assert out.count("mixed_models.py:") == 4


@pytest.mark.parametrize(
    ("only", "statuses", "codes", "drawings"),
    [("matched", ["matched"], [], 2), ("rejected", ["rejected"], [], 1), ("not-attention", [], ["AR202"], 0)],
)
def test_explain_only(run, run_json, mixed, only, statuses, codes, drawings):
    code, data = run_json("explain", mixed, "--only", only)
    assert (code, [site["status"] for site in data["sites"]]) == (0, statuses)
    assert [rejection["code"] for rejection in data["rejections"]] == codes
    assert data["summary"]["sites"] == 2
    assert len(data["drawings"]) == drawings
    _, out, _ = run("explain", mixed, "--only", only)
    shown = [name for name in ("proved", "AR203", "AR202") if name in out]
    assert shown == {"matched": ["proved"], "rejected": ["AR203"], "not-attention": ["AR202"]}[only]


def test_explain_strict_exits_with_3_where_a_site_is_rejected(run, folder, mixed):
    assert run("explain", mixed)[0] == 0
    assert run("explain", mixed, "--strict")[0] == 3
    assert run("explain", folder, "--strict")[0] == 0


def test_explain_writes_programs_into_a_new_folder(run, run_json, mixed, tmp_path):
    code, _, err = run("explain", mixed, "--repro", tmp_path / "cases")
    assert code == 0
    assert "wrote 1 program to" in err
    assert [path.name for path in (tmp_path / "cases").iterdir()] == ["01_AR203_top.py"]
    code, data = run_json("explain", mixed, "--repro", tmp_path / "cases")
    assert (code, data["error"]["code"]) == (1, "AR601")


def test_explain_variant_tells_what_each_site_would_become(run_json, folder):
    _, data = run_json("explain", folder, "--variant", "ssa")
    assert [site["variant"] for site in data["sites"]] == ["ssa", "ssa"]
    assert data["sites"][0]["config"]["gate"] == "head"
    code, data = run_json("explain", folder, "--variant", "saa")
    assert (code, data["error"]["code"]) == (1, "AR301")


def test_explain_without_attention_exits_with_3(run_json, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = "import torch\n\ndef build():\n    return torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
    (tmp_path / "plain_models.py").write_text(source)
    code, data = run_json("explain", "plain_models:build")
    assert (code, data["sites"]) == (3, [])


def test_explain_program(run, run_json, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    path = tmp_path / "attention.pt2"
    torch.export.save(torch.export.export(Attention(), (torch.ones(1, 2, 5, 4),)), path)
    code, data = run_json("explain", path)
    assert (code, len(data["sites"]), data["model"]) == (0, 1, "attention.pt2")
    assert run("explain", path, "--variant", "ssa")[0] == 2


def test_a_wrong_variant_is_said_before_anything_is_loaded(run_json, monkeypatch):
    monkeypatch.setattr("attnrewrite.loading.load_model", None)
    code, data = run_json("explain", "./model", "--variant", "selektive")
    assert (code, data["error"]["code"]) == (1, "AR301")
