"""Programs that show a site without its model: each runs by itself and says what the model's report says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spellings import WIDTH, NanoGPT
from tiny import llama
from torch import Tensor, nn

import attnrewrite
from attnrewrite.errors import AttnRewriteError
from attnrewrite.explanation import capture_model, inspect_capture
from attnrewrite.passes.graph.capture import from_program
from attnrewrite.passes.report import Report, Site
from attnrewrite.repro import programs, write_programs

X = torch.randn(2, 13, WIDTH)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(13))

    def scores(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT / torch.sqrt(torch.tensor(float(WIDTH)))


class HeadMask(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (torch.softmax(self.scores(x), -1) * x[:, None, :, 0]) @ self.v(x)


class ScaledByWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x) * self.scale, -1) @ self.v(x)


class Relu(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(torch.relu(self.scores(x)), -1)
        return weights @ self.v(x), weights


class Dropped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(torch.softmax(self.scores(x), -1), 0.5) @ self.v(x)


class WrittenLater(Base):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        weights = torch.softmax(q @ self.k(x).mT / WIDTH**0.5, -1)
        q[:, 1:].mul_(2)
        return weights @ self.v(x) + q


class Einsum(Base):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(13, 13, dtype=torch.bool).tril()
        scores = torch.einsum("bid,bjd->bij", self.q(x), self.k(x)).masked_fill(~mask, float("-inf"))
        return torch.einsum("bij,bjd->bid", (scores * x[:, None, :, 0]).softmax(-1), self.v(x))


class Straddling(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.scores(x)
        return torch.softmax(scores.float(), -1) @ self.v(x)


class NoGradScores(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.softmax(self.scores(x), -1)
        return weights @ self.v(x)


def inspected(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Report, dict[str, str]]:
    report, found = inspect_capture(capture_model(model, args, kwargs))
    return report, programs(report, found)


def ran(text: str, path: Path) -> str:
    path.write_text(text)
    done = subprocess.run([sys.executable, "-P", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return done.stdout


def explained(text: str) -> tuple[str, list[str]]:
    """Run a program in this process; return the status and the codes of its one site."""
    reports: list[Report] = []
    scope: dict[str, Any] = {"__name__": "case"}
    exec(compile(text, "case.py", "exec"), scope)
    scope["plain_text"] = reports.append
    scope["print"] = lambda *_: None
    scope["main"]()
    (site,) = reports[0].sites
    return verdict(site)


def verdict(site: Site) -> tuple[str, list[str]]:
    return site.status, [rejection.code for rejection in site.rejections]


CASES = [HeadMask, ScaledByWeights, Relu, Dropped, WrittenLater, Einsum, Straddling, NoGradScores]


@pytest.mark.parametrize("cls", CASES)
def test_program_shows_the_same_rejection(cls: type[nn.Module]) -> None:
    report, found = inspected(cls(), X)
    (site,), (text,) = report.sites, found.values()
    assert site.status == "rejected"
    assert explained(text) == verdict(site), text


@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_program_of_a_match_matches_and_equal_layers_share_it(how: str) -> None:
    report, found = inspected(llama(attn_implementation=how), input_ids=torch.arange(8)[None])
    ((name, text),) = found.items()
    assert name == "01_matched_model_layers_0_self_attn.py"
    assert "model.layers.1.self_attn" in text
    assert explained(text) == verdict(report.sites[0]) == ("matched", [])


def test_only_rejected_sites_get_a_program_where_there_are_any() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = NanoGPT(), Relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(self.good(x))[0]

    assert list(inspected(Two().eval(), X)[1]) == ["01_AR203_bad.py"]


def test_symbolic_sizes_become_the_sizes_of_the_example() -> None:
    program = torch.export.export(Relu(), (X,), dynamic_shapes={"x": {0: torch.export.Dim("b", max=8)}})
    report, found = inspect_capture(from_program(program))
    (text,) = programs(report, found).values()
    assert "(2, 13, 32)" in text
    assert explained(text)[1] == ["AR203"]


def test_programs_run_by_themselves(tmp_path: Path) -> None:
    report, found = inspect_capture(capture_model(HeadMask(), (X,), {}))
    (path,) = write_programs(report, found, tmp_path / "new" / "cases")
    imports = [line for line in path.read_text().splitlines() if "import " in line and not line.startswith("Made")]
    assert all(line.split()[1].split(".")[0] in ("torch", "attnrewrite") for line in imports)
    said = ran(path.read_text(), tmp_path / "moved.py")
    assert "1 attention site: 1 rejected" in said
    assert "AR203  unsupported form of scores" in said
    assert "nearest accepted form: " in said


def test_a_variant_that_does_not_cover_a_site_is_shown(tmp_path: Path) -> None:
    config = attnrewrite.SelectiveConfig()
    report, found = inspect_capture(capture_model(WithoutMask(), (X,), {}), config)
    (text,) = programs(report, found).values()
    assert "AR307" in ran(text, tmp_path / "case.py")


class WithoutMask(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), -1) @ self.v(x)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    report, found = inspect_capture(capture_model(HeadMask(), (X,), {}))
    with pytest.raises(AttnRewriteError) as raised:
        write_programs(report, found, tmp_path)
    assert raised.value.code == "AR601"
    assert list(tmp_path.iterdir()) == []
