import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny import llama, llama_folder, llama_gguf
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTForImageClassification

from attnrewrite.errors import AttnRewriteError
from attnrewrite.inputs import example_kwargs
from attnrewrite.loading import LoadOptions, is_program, load_model, load_program


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return llama_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def failure(code, call, *args):
    with pytest.raises(AttnRewriteError) as raised:
        call(*args)
    assert raised.value.code == code
    return str(raised.value)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a writer of an importable module; the name is new for each test."""
    name = f"user_module_{tmp_path.name}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source):
        Path(f"{name}.py").write_text(textwrap.dedent(source))
        return name

    yield write
    sys.modules.pop(name, None)


def test_folder_loads_its_architecture_and_runs(folder):
    loaded = load_model(str(folder), LoadOptions(batch=2, seq_len=7))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not loaded.model.training
    assert loaded.name == "tiny-llama"
    assert loaded.source == folder
    assert loaded.tokenizer is None
    logits = loaded.model(*loaded.example_inputs, **loaded.example_kwargs).logits
    assert logits.shape == (2, 7, 96)
    torch.testing.assert_close(logits, llama()(**loaded.example_kwargs).logits)


def test_folder_takes_dtype_and_attention(folder):
    loaded = load_model(str(folder), LoadOptions(dtype="bfloat16", attention="eager"))
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_gguf_loads_in_float32(gguf, as_folder):
    loaded = load_model(str(gguf.parent if as_folder else gguf), LoadOptions(seq_len=5))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert loaded.model.dtype == torch.float32
    assert loaded.source == (gguf.parent if as_folder else gguf)
    assert loaded.model(**loaded.example_kwargs).logits.shape == (1, 5, 96)


def test_several_gguf_files_in_a_folder_are_ambiguous(gguf, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf.read_bytes())
    assert "a.gguf, b.gguf" in failure("AR103", load_model, str(tmp_path))


@pytest.mark.parametrize("kept", [0, 3, 10, 200, -1])
def test_truncated_gguf_is_named(gguf, tmp_path, kept):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[:kept])
    assert "cut.gguf" in failure("AR602", load_model, str(path))


def test_file_of_another_kind_is_no_gguf(tmp_path):
    path = tmp_path / "page.gguf"
    path.write_text("<html>not found</html>")
    assert "b'<htm'" in failure("AR602", load_model, str(path))


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_safetensors_is_named(folder, tmp_path, kept):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:kept])
    assert "model.safetensors" in failure("AR602", load_model, str(tmp_path))


def test_missing_weights_file_is_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert "model.safetensors does not exist" in failure("AR602", load_model, str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "never opened" in failure("AR602", load_model, str(tmp_path))


def test_missing_shard_is_named(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "00002-of-00002" in failure("AR602", load_model, str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "index" in failure("AR602", load_model, str(tmp_path))


def test_weights_that_the_files_lack_are_never_random(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.self_attn.q_proj" in failure("AR602", load_model, str(tmp_path))


def test_broken_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in failure("AR602", load_model, str(tmp_path))


def test_code_in_the_folder_is_never_run(tmp_path):
    config = {"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    assert "never run" in failure("AR103", load_model, str(tmp_path))


def test_path_that_does_not_exist_names_its_neighbours(folder):
    assert "tiny-llama" in failure("AR103", load_model, str(folder.parent / "tiny-lama"))


def test_folder_without_a_model(tmp_path):
    assert "neither config.json" in failure("AR103", load_model, str(tmp_path))


def test_wrong_dtype_and_length(folder):
    assert "bfloat16" in failure("AR102", load_model, str(folder), LoadOptions(dtype="bfloat"))
    message = failure("AR102", load_model, str(folder), LoadOptions(seq_len=4096))
    assert "4096" in message
    assert "128" in message


def test_attention_that_the_model_lacks(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    assert "leave the option out" in failure("AR102", load_model, str(tmp_path), LoadOptions(attention="sdpa"))
    assert load_model(str(tmp_path)).model.config._attn_implementation == "eager"


def test_missing_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "attnrewrite[hf]" in failure("AR106", load_model, str(folder))


@pytest.mark.parametrize(
    ("body", "positional", "keywords"),
    [
        ("return model", 0, 0),
        ("return model, (x,)", 1, 0),
        ("return model, x", 1, 0),
        ("return model, {'input': x}", 0, 1),
    ],
    ids=["model", "tuple", "tensor", "dict"],
)
def test_function(module, body, positional, keywords):
    name = module(
        f"""
        import torch
        def build():
            model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
            {body}
        """
    )
    loaded = load_model(f"{name}:build", LoadOptions(dtype="float64"))
    assert isinstance(loaded.model, torch.nn.Linear)
    assert loaded.source is None
    assert (len(loaded.example_inputs), len(loaded.example_kwargs)) == (positional, keywords)
    if positional or keywords:
        assert loaded.model(*loaded.example_inputs, **loaded.example_kwargs).dtype == torch.float64


def test_function_mistakes_are_named(module):
    name = module(
        """
        def build_model(): return 3
        def fails(): raise RuntimeError("no weights here")
        """
    )
    assert "'build_model'" in failure("AR103", load_model, f"{name}:build_modle")
    assert "returned int" in failure("AR103", load_model, f"{name}:build_model")
    assert "no weights here" in failure("AR103", load_model, f"{name}:fails")
    assert "no module 'nowhere_to_be_found'" in failure("AR103", load_model, "nowhere_to_be_found:build")
    assert "leave it out" in failure("AR102", load_model, f"{name}:fails", LoadOptions(attention="sdpa"))


def test_function_module_that_fails_to_import(module):
    name = module("import a_package_that_is_not_there")
    assert "needs module 'a_package_that_is_not_there'" in failure("AR103", load_model, f"{name}:build")


def test_program_file(tmp_path):
    path = tmp_path / "linear.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)), path)
    assert is_program(str(path))
    assert load_program(str(path)).module()(torch.ones(1, 3)).shape == (1, 2)
    assert "not changed" in failure("AR103", load_model, str(path))
    path.write_bytes(b"PK")
    assert "linear.pt2" in failure("AR602", load_program, str(path))
    assert "linear" in failure("AR103", load_program, str(tmp_path / "lin.pt2"))


def test_file_of_an_unknown_kind(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"")
    assert ".bin" in failure("AR103", load_model, str(tmp_path / "weights.bin"))


def test_inputs_of_an_encoder_decoder():
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    inputs = example_kwargs(model, batch=2, seq_len=6)
    assert sorted(inputs) == ["decoder_input_ids", "input_ids", "use_cache"]
    assert model(**inputs).logits.shape == (2, 6, 32)


def test_inputs_of_a_vision_model():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=16))
    assert model(**example_kwargs(model, batch=3)).logits.shape[0] == 3


def test_inputs_that_cannot_be_made_up():
    model = torch.nn.Linear(3, 2)
    model.config, model.main_input_name = llama().config, "input_features"
    assert "'input_features'" in failure("AR103", example_kwargs, model)
