import json
import re
import subprocess
import sys

import click
import pytest
import torch
from tiny import llama_folder, llama_gguf

from attnrewrite.cli import VERBS, cli, main
from attnrewrite.errors import DIAGNOSTICS
from attnrewrite.kernels.diagnostics import error
from attnrewrite.variants import SSAConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(llama_folder(tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture
def run(capsys):
    """Run a command; return its exit code, stdout and stderr."""

    def call(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    """Run a command with ``--format json``; return its exit code and the one object it prints."""

    def call(*words):
        code, out, err = run(*words, "--format", "json")
        assert err == ""
        return code, json.loads(out)

    return call


# --- what all verbs share ---


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_examples_of_that_verb(run, verb):
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    examples = out.partition("Examples:")[2].split("\n")
    examples = [line.strip() for line in examples if line.strip()]
    assert 2 <= len(examples) <= 3
    assert all(line.startswith(f"attnrewrite {verb}") for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_examples_parse(verb):
    command = cli.get_command(click.Context(cli), verb)
    for example in command.examples:
        words = [word.strip("'") for word in example.split()]
        with command.make_context(verb, words[1:]) as context:
            assert context.command is command


@pytest.mark.parametrize("verb", VERBS)
def test_list_says_what_the_verb_says(verb):
    command = cli.get_command(click.Context(cli), verb)
    assert command.help.strip().splitlines()[0] == VERBS[verb]


def test_no_words_show_the_help(run):
    code, out, err = run()
    assert code == 2
    assert "Commands:" in out + err


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"attnrewrite \d+\.\d+\.\d+\n", out)


def test_unknown_verb_names_the_closest(run):
    code, out, err = run("explian")
    assert (code, out) == (2, "")
    assert "'explain'" in err


def test_unknown_option_names_the_closest(run, run_json):
    code, _, err = run("explain", "model", "--seq-length", "8")
    assert code == 2
    assert "--seq-len" in err
    code, data = run_json("explain", "model", "--seq-length", "8")
    assert code == 2
    assert "--seq-len" in data["error"]["detail"]


def test_format_may_stand_before_the_verb(run):
    _, out, _ = run("--format", "json", "code", "AR203")
    assert json.loads(out)["code"] == "AR203"


def test_quiet_prints_nothing_but_errors(run):
    assert run("code", "AR203", "--format", "quiet") == (0, "", "")
    code, out, err = run("code", "AR999", "--format", "quiet")
    assert (code, out) == (1, "")
    assert "AR999" in err


def test_errors_are_a_few_lines_and_no_traceback(run, run_json):
    code, out, err = run("explain", "no-such-model")
    assert (code, out) == (1, "")
    assert err.startswith("AR103 ")
    assert 2 <= len(err.splitlines()) <= 6
    code, data = run_json("explain", "no-such-model")
    assert code == 1
    assert sorted(data["error"]) == ["code", "detail", "hint", "layer", "source", "title"]


def test_verbose_errors_have_the_traceback(run):
    _, _, err = run("explain", "no-such-model", "-v")
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (error("AR201", "nothing here"), 3, "AR201"),
        (error("AR306", "no such layer"), 3, "AR306"),
        (error("AR205", "they differ"), 4, "AR205"),
        (error("AR313", "they differ"), 4, "AR313"),
        (error("AR104", "bad shapes"), 1, "AR104"),
        (ZeroDivisionError("by zero"), 1, "AR901"),
        (PermissionError(13, "Permission denied", "/etc/x"), 1, "/etc/x: Permission denied"),
        (KeyboardInterrupt(), 130, "nothing was written"),
    ],
    ids=lambda value: value.code if hasattr(value, "code") else type(value).__name__,
)
def test_exit_codes(run, monkeypatch, raised, code, said):
    def fail(*args, **kwargs):
        raise raised

    monkeypatch.setattr("attnrewrite.loading.load_model", fail)
    found, out, err = run("explain", "model")
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_coded_error_inside_a_compilation_is_shown_as_itself(run, monkeypatch):
    class WrappedError(RuntimeError):
        inner_exception = error("AR312", "the site moved")

    def fail(*args, **kwargs):
        raise WrappedError("a long story")

    monkeypatch.setattr("attnrewrite.loading.load_model", fail)
    code, _, err = run("explain", "model")
    assert code == 1
    assert err.startswith("AR312 ")
    assert "a long story" not in err


def test_interrupted_conversion_says_that_out_is_untouched(run, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("attnrewrite.loading.load_model", interrupt)
    code, _, err = run("convert", "model", tmp_path / "out", "--variant", "ssa")
    assert code == 130
    assert f"{tmp_path / 'out'} was not written" in err


def test_output_into_a_pipe_has_no_padding(run):
    _, out, _ = run("code")
    assert all(line == line.rstrip() for line in out.splitlines())


# --- code, env, variants ---


def test_code_lists_and_explains(run, run_json):
    code, out, _ = run("code")
    assert code == 0
    assert all(name in out for name in DIAGNOSTICS)
    assert run_json("code")[1]["codes"]["AR203"] == DIAGNOSTICS["AR203"].title
    _, out, _ = run("code", "ar203")
    for part in (DIAGNOSTICS["AR203"].title, DIAGNOSTICS["AR203"].hint):
        assert part in out


def test_env(run, run_json):
    code, out, _ = run("env")
    assert code == 0
    assert torch.__version__ in out
    assert run_json("env")[1]["versions"]["torch"] == torch.__version__


def test_variants(run, run_json):
    code, out, _ = run("variants")
    assert code == 0
    for name in ("sdpa", "selective", "ssa"):
        assert name in out
    known = {entry["name"]: entry for entry in run_json("variants")[1]["variants"]}
    assert not known["sdpa"]["changes_meaning"]
    assert known["ssa"]["adds_parameters"]


def test_variant_page(run, run_json):
    _, out, _ = run("variants", "ssa")
    for name in ("gate", "position"):
        assert name in out
    fields = {field["name"] for field in run_json("variants", "ssa")[1]["fields"]}
    assert {"gate", "position"} <= fields
    code, data = run_json("variants", "saa")
    assert code == 1
    assert data["error"]["code"] == "AR301"
    assert "'ssa'" in data["error"]["detail"]


# --- explain ---


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


def test_explain_only(run_json, folder):
    code, data = run_json("explain", folder, "--only", "rejected")
    assert (code, data["sites"]) == (0, [])
    assert data["summary"]["matched"] == 2


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


# --- convert ---


def test_convert_keeps_the_base_files_and_adds_the_conversion(run_json, folder, tmp_path):
    out = tmp_path / "out"
    code, data = run_json("convert", folder, out, "--variant", "ssa", "--seq-len", 8)
    assert code == 0
    assert sorted(data["sites"]) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert data["new_parameters"] > 0
    assert data["verified"]
    assert "attnrewrite_config.json" in data["files"]
    base = (tmp_path.parent / folder / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == base
    code, data = run_json("convert", folder, out, "--variant", "ssa")
    assert (code, data["error"]["code"]) == (1, "AR601")
    assert run_json("convert", folder, out, "--variant", "ssa", "--overwrite")[0] == 0


def test_convert_for_people(run, folder, tmp_path):
    code, out, _ = run(
        "convert", folder, tmp_path / "out", "--variant", "ssa", "--set", "position=sigmoid", "--no-verify"
    )
    assert code == 0
    assert "2 sites converted, outputs not compared" in out
    assert "position=sigmoid" in out


def test_convert_dry_run_writes_nothing(run_json, folder, tmp_path):
    out = tmp_path / "out"
    code, data = run_json("convert", folder, out, "--variant", "ssa", "--target", "*.1.*", "--dry-run")
    assert (code, list(data["sites"]), data["files"]) == (0, ["model.layers.1.self_attn"], [])
    assert not out.exists()


def test_convert_exclude(run_json, folder, tmp_path):
    words = ("--variant", "selective", "--exclude", "*.1.*", "--dry-run")
    _, data = run_json("convert", folder, tmp_path / "out", *words)
    assert list(data["sites"]) == ["model.layers.0.self_attn"]


def test_convert_target_without_a_layer_exits_with_3(run_json, folder, tmp_path):
    code, data = run_json("convert", folder, tmp_path / "out", "--variant", "ssa", "--target", "decoder.*")
    assert (code, data["error"]["code"]) == (3, "AR306")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("as_plan", [False, True], ids=["config", "plan"])
def test_convert_config_file(run_json, folder, tmp_path, as_plan):
    config = SSAConfig().to_dict()
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model.layers.*": config} if as_plan else config))
    code, data = run_json("convert", folder, tmp_path / "out", "--config", file, "--dry-run")
    assert code == 0
    assert {site["variant"] for site in data["sites"].values()} == {"ssa"}


@pytest.mark.parametrize(
    ("text", "said"), [("{", "JSON"), ("[]", "no config"), ('{"variant": "saa"}', "ssa"), ("{}", "no config")]
)
def test_convert_config_file_mistakes(run_json, folder, tmp_path, text, said):
    file = tmp_path / "config.json"
    file.write_text(text)
    code, data = run_json("convert", folder, tmp_path / "out", "--config", file)
    assert code == 1
    assert said in data["error"]["detail"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--variant", "ssa", "--config", "f.json"),
        ("--config", "f.json", "--set", "a=b"),
        ("--variant", "ssa", "--set", "a"),
    ],
)
def test_convert_wrong_usage(run, folder, tmp_path, words):
    assert run("convert", folder, tmp_path / "out", *words)[0] == 2


def test_convert_unknown_field(run_json, folder, tmp_path):
    code, data = run_json("convert", folder, tmp_path / "out", "--variant", "ssa", "--set", "gait=head")
    assert (code, data["error"]["code"]) == (1, "AR302")
    assert "'gate'" in data["error"]["detail"]


def test_convert_gguf_file(run_json, tmp_path):
    file = llama_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    code, data = run_json("convert", file, tmp_path / "out", "--variant", "ssa")
    assert code == 0
    assert "tiny.gguf" in data["files"]
    assert "other.gguf" not in data["files"]


def test_converted_folder_is_a_model(run_json, folder, tmp_path):
    out = tmp_path / "out"
    run_json("convert", folder, out, "--variant", "ssa")
    code, data = run_json("eval", out, "--baseline", folder, "--max-tokens", 64, "--seq-len", 32)
    assert code == 0
    assert data["model"]["loss"] == pytest.approx(data["baseline"]["loss"], abs=1e-4)


# --- eval ---


def test_eval(run, run_json, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the keeper lit the lamp and wrote it down " * 4)
    code, data = run_json("eval", folder, "--text", text, "--seq-len", 16, "--max-tokens", 50)
    assert code == 0
    assert data["model"]["tokens"] == 46
    assert 10 < data["model"]["perplexity"] < 1000
    code, out, _ = run("eval", folder, "--text", text, "--seq-len", 16, "--max-tokens", 50)
    assert code == 0
    assert f"{data['model']['perplexity']:.3f}" in out


def test_eval_mistakes(run_json, folder, tmp_path):
    code, data = run_json("eval", folder, "--text", tmp_path / "none.txt")
    assert (code, data["error"]["code"]) == (1, "AR602")
    code, data = run_json("eval", folder, "--seq-len", 4096)
    assert (code, data["error"]["code"]) == (1, "AR102")
    file = llama_gguf(tmp_path / "no-tokenizer.gguf")
    code, data = run_json("eval", file, "--seq-len", 16)
    assert (code, data["error"]["code"]) == (1, "AR103")


# --- as a program ---


def test_console_script_runs():
    command = [sys.executable, "-P", "-c", "import sys; from attnrewrite.cli import main; sys.exit(main())"]
    done = subprocess.run([*command, "code", "AR999"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("AR102")
