"""From templates to specialised files: what is folded, inlined and removed, and that it computes the same."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from attnrewrite.kernels.dense.call import Call, chosen
from attnrewrite.kernels.dense.catalogue import flags, kernel
from attnrewrite.kernels.dense.configs import configs
from attnrewrite.kernels.dense.launch import forward, run
from attnrewrite.kernels.generation import loading
from attnrewrite.kernels.generation.comments import parse, render
from attnrewrite.kernels.generation.dead import remove_dead
from attnrewrite.kernels.generation.emit import emit, flags_of
from attnrewrite.kernels.generation.fold import Fold
from attnrewrite.kernels.generation.inline import Inline
from attnrewrite.kernels.strips import Options

GOLDEN = Path(__file__).parents[1] / "golden"
KERNELS = {
    "plain_forward": ("forward", 64, {"CAUSAL": True}),
    "ssa_forward": ("forward", 64, {"TEMPERATURES": True, "MASK": "keys", "GROUP": 4}),
    "selective_forward": ("forward", 128, {"CAUSAL": True, "PENALTY": True, "WINDOW": True}),
    "selective_votes": ("votes", 64, {"CAUSAL": True}),
    "plain_backward_keys": ("backward_keys", 80, {}),
    "plain_backward_queries": ("backward_queries", 64, {"CAUSAL": True, "SOFTCAP": True, "DROPOUT": True}),
}


def emitted(name, D, settings):
    return kernel(name, flags(D, D, settings))


def folded(source, **known):
    tree = parse(textwrap.dedent(source))
    return "\n".join(render(Fold(known).block(tree.body)))


def function(source):
    (node,) = parse(textwrap.dedent(source)).body
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize("name", KERNELS)
def test_text(name):
    text = emitted(*KERNELS[name]).text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert text == (GOLDEN / f"{name}.py").read_text(), "rewrite it with: python tests/write_golden.py"


def test_what_is_known_disappears_with_its_comments_in_place():
    found = folded(
        """
        # first
        if A and not B:
            x = 1 if C == "keys" else 2  # beside
        else:
            x = f(3)
        # loop
        for P in tl.static_range(2):
            if P == 0 or open:
                y += P
        """,
        A=True,
        B=False,
        C="keys",
    )
    assert found == "# first\nx = 1  # beside\n# loop\ny += 0\nif open:\n    y += 1"


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("a and T", "a"),
        ("a and F", "False"),
        ("a or T", "True"),
        ("F or a or F", "a"),
        ("not F", "True"),
        ("not a", "not a"),
        ("N < 3", "True"),
        ("a < N", "a < 2"),
        ("x if T else y", "x"),
        ("N + 1", "2 + 1"),
    ],
)
def test_folding(written, wanted):
    assert folded(f"r = {written}", T=True, F=False, N=2) == f"r = {wanted}"


def test_names_for_constants_are_taken_up():
    assert folded("X: tl.constexpr = A or B\nif X:\n    f()", A=False, B=True) == "f()"
    assert folded("X: tl.constexpr = A or b", A=False) == "X: tl.constexpr = b"


def test_inlined_functions_keep_the_callers_names():
    caller = function(
        """
        def kernel(P, n):
            x = load(P + n, True)
            x = twice(x)
            y, z = pair(x, n)
        """
    )
    known = {
        "load": function("def load(Q, M):\n    v = tl.load(Q, mask=M) if M else 0\n    return v"),
        "twice": function("def twice(a):\n    a = a * 2\n    return a"),
        "pair": function("def pair(a, b):\n    return a + b, a - b"),
    }
    Inline(known).function(caller)
    found = [ast.unparse(x) for x in caller.body]
    assert found == ["x = tl.load(P + n, mask=True)", "x = x * 2", "y, z = (x + n, x - n)"]


def test_a_name_that_means_two_things_is_an_error():
    caller = function("def kernel(t, x):\n    y = f(x)\n    z = t")
    with pytest.raises(ValueError, match=r"f: the names \['t'\]"):
        Inline({"f": function("def f(a):\n    t = a + 1\n    return t * t")}).function(caller)


def test_what_nobody_reads_is_removed():
    node = function("def kernel(x):\n    a = x\n    b = a\n    a, c = x\n    tl.store(x, c)")
    remove_dead(node)
    assert [ast.unparse(x) for x in node.body] == ["a, c = x", "tl.store(x, c)"]


def test_flags_must_be_those_of_the_template():
    with pytest.raises(ValueError, match="no flag 'WINDO'"):
        flags(64, 64, {"WINDO": True})
    with pytest.raises(ValueError, match=r"\['WINDOW'\] are missing, \['WINDO'\] are unknown"):
        given = chosen(flags_of("forward", "attention_forward"), flags(64, 64, {}))
        given["WINDO"] = given.pop("WINDOW")
        emit("forward", "attention_forward", given)


def test_the_digest_is_of_what_is_computed():
    plain, other = emitted(*KERNELS["plain_forward"]), emitted(*KERNELS["ssa_forward"])
    assert plain.digest != other.digest
    assert plain == emitted(*KERNELS["plain_forward"])


@pytest.mark.parametrize("more", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
def test_template_and_emitted_file_give_the_same_bits(more, monkeypatch):
    """The template runs as it stands, with its flags as arguments."""
    from attnrewrite.kernels.templates import forward as template

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 50, 16) for _ in range(3))
    call = Call(query, key, value, Options(0.25, True, **more))
    given = chosen(flags_of("forward", "attention_forward"), call.flags())
    config = configs("forward", 16, 32)[0]
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    out, lse = torch.empty_like(query), query.new_empty(1, 2, 50)
    arguments = dict.fromkeys(template.attention_forward.arg_names, 0)
    arguments |= {name: x for name, x in call.arguments().items() if name in arguments and x is not None}
    arguments |= {
        "Out": out,
        "Lse": lse,
        **dict(zip(("stride_ob", "stride_oh", "stride_om"), out.stride(), strict=False)),
    }
    template.attention_forward[(2 * -(-50 // config.block_m),)](**arguments | given | blocks)
    assert all(torch.equal(a, b) for a, b in zip((out, lse), forward(call), strict=True))


def test_files_are_written_once_dumped_and_survive_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ATTNREWRITE_DUMP_DIR", str(tmp_path / "dump"))
    kernel = emitted(*KERNELS["plain_forward"])
    name = f"attention_forward_{kernel.digest[:16]}.py"
    assert loading.load.__wrapped__(kernel).arg_names == list(kernel.parameters)
    for folder in ("cache/kernels", "dump"):
        assert [x.name for x in (tmp_path / folder).iterdir()] == [name]
        assert (tmp_path / folder / name).read_text() == kernel.text
    monkeypatch.delenv("ATTNREWRITE_DUMP_DIR")
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTNREWRITE_CACHE_DIR", str(tmp_path / "file"))
    assert loading.load.__wrapped__(kernel).arg_names == list(kernel.parameters)


def test_emitting_needs_no_triton():
    code = "import sys; from attnrewrite.kernels.generation import emit; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_no_program_is_no_launch():
    empty = torch.empty(0, 2, 5, 16)
    run("forward", Call(empty, empty, empty, Options(1.0)), {}, lambda config: 0)
