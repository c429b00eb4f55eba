"""What holds for the repository as a whole."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from attnrewrite.cli import VERBS, cli
from attnrewrite.errors import DIAGNOSTICS
from attnrewrite.render.diagnostics import markdown

ROOT = Path(__file__).parents[1]
ROOMS = ("attnrewrite", "passes", "kernels")
MAY_IMPORT = {"kernels": ("kernels",), "passes": ("passes", "kernels")}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OF_ALL = {"dense", "generation", "store", "templates", "tuning"}  # what the kernels of several variants share
VARIANTS = sorted(p.parent for p in (ROOT / "kernels").glob("*/__init__.py") if p.parent.name not in OF_ALL)


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path):
    """Return the modules that a file names in its import statements, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def run_python(code, **variables):
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_downwards(room):
    allowed = tuple(f"attnrewrite.{name}" for name in MAY_IMPORT[room])
    for path in sources(room):
        ours = [name for name in imported(path) if name.split(".")[0] in ROOMS]
        wrong = [name for name in ours if name != "attnrewrite" and not name.startswith(allowed)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_rooms_are_imported_by_their_full_names():
    for path in sources(*ROOMS, "tests", "examples"):
        bare = [name for name in imported(path) if name.split(".")[0] in ("passes", "kernels")]
        assert not bare, f"{path.relative_to(ROOT)} imports {bare}"


@pytest.mark.parametrize(
    "code",
    [
        "import attnrewrite",
        "import attnrewrite; dir(attnrewrite); attnrewrite.__version__",
        "from attnrewrite.cli import main; main(['--help'])",
        "from attnrewrite.cli import main; main(['--version'])",
        *(f"from attnrewrite.cli import main; main([{verb!r}, '--help'])" for verb in VERBS),
        "from attnrewrite.cli import main; main(['code', 'AR203'])",
        "from attnrewrite.cli import main; main(['cache', 'ls'])",
    ],
)
def test_torch_is_not_imported_early(code):
    said = run_python(f"{code}\nimport sys\nprint('torch' in sys.modules, 'transformers' in sys.modules)")
    assert said.splitlines()[-1] == "False False"


def test_packages_in_pyproject_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in sources(*ROOMS) if path.name == "__init__.py"]
    names = [".".join(folder.parts) for folder in folders]
    assert sorted(listed) == sorted(name if name.startswith("attnrewrite") else f"attnrewrite.{name}" for name in names)


def test_package_data_covers_every_data_file():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for package, folder in (("attnrewrite", "attnrewrite"), ("attnrewrite.kernels", "kernels")):
        covered = {path for pattern in patterns[package] for path in (ROOT / folder).glob(pattern)}
        others = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".py"]
        missing = [path for path in others if path not in covered and "__pycache__" not in path.parts]
        assert not missing, f"not in the wheel: {missing}"


def test_diagnostics_page_is_up_to_date():
    page = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    assert page == markdown(), "run `make docs`"
    assert all(f"### {code}: " in page for code in DIAGNOSTICS)


@pytest.mark.parametrize("code", DIAGNOSTICS)
def test_every_code_is_raised_by_a_test(code):
    tests = [path for path in sources("tests") if path.name != Path(__file__).name]
    assert any(code in path.read_text(encoding="utf-8") for path in tests)


@pytest.mark.parametrize("code", DIAGNOSTICS)
def test_every_code_is_used(code):
    users = [path for path in sources(*ROOMS) if path.name != "codes.py"]
    assert any(f'"{code}"' in path.read_text(encoding="utf-8") for path in users)


@pytest.mark.parametrize("path", EXAMPLES or [ROOT / "examples"], ids=lambda path: path.stem)
def test_example_has_main_and_runs(path):
    assert path.is_file(), "there are no examples"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_command_has_examples(verb):
    command = cli.get_command(click.Context(cli), verb)
    assert "Examples:" in command.get_help(click.Context(command, info_name=verb))


def test_files_are_short():
    folders = (*ROOMS, "tests", "examples", "benchmarks")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*folders)}
    assert {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 450} == {}


@pytest.mark.parametrize("folder", VARIANTS, ids=lambda folder: folder.name)
def test_variant_has_maths_reference_and_tests(folder):
    for name in ("README.md", "reference.py"):
        assert (folder / name).is_file()
    assert list((ROOT / "tests" / "kernels").glob(f"*{folder.name}*.py"))


def test_nothing_prints_in_library_code():
    for path in sources(*ROOMS):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        called = [node.func for node in nodes if isinstance(node, ast.Call)]
        prints = [name.lineno for name in called if isinstance(name, ast.Name) and name.id == "print"]
        assert not prints, f"{path.relative_to(ROOT)}: print in lines {prints}"


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_page_names_only_what_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    verbs = re.findall(r"\battnrewrite ([a-z]+)\b", code)
    targets = re.findall(r"\bmake ([a-z-]+)\b", code)
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(verbs) <= set(VERBS)
    assert set(targets) <= set(known)
    assert targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), f"{page} links to {link}"


def test_readme_names_every_verb():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"attnrewrite {verb}" not in text] == []
