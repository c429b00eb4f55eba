"""What the page shows as one line: the softmaxes of a model that differ in nothing but their layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from attnrewrite.passes.report import Rejection, Report, Site
from attnrewrite.render.layout import Picture, picture
from attnrewrite.render.rows import Row, fold_paths, rows

NOT_ATTENTION = "not-attention"


@dataclass
class Group:
    """Equal sites (``site`` is one of them), or equal softmaxes that are not attention (``site`` is None)."""

    row: Row
    layers: list[str]
    site: Site | None = None
    rejections: list[Rejection] = field(default_factory=list)
    before: Picture | None = None
    after: Picture | None = None

    @property
    def folded(self) -> str:
        """The layers in short: ``model.layers.{0..29}.self_attn``."""
        return ", ".join(path for path, _ in fold_paths(self.layers)) or "(top level)"


def groups(report: Report) -> list[Group]:
    """Group all that a report names; each distinct drawing is laid out once."""
    pictures = {key: picture(drawing) for key, drawing in report.drawings.items()}
    found: dict[object, Group] = {}
    for row, site in zip(rows(report.sites, fold=False), report.sites, strict=True):
        group = Group(row, [], site, site.rejections, pictures.get(site.before), pictures.get(site.after))
        found.setdefault(_key(row, site), group).layers.append(site.layer)
    return [*found.values(), *_others(report.rejections)]


_PLACES = ("layer", "graph", "rejections", "projections")
"""Fields of a site that hold paths of its own."""


def _key(row: Row, site: Site) -> object:
    """Tell what is shown of a site, but for its layer."""
    reasons = [(r.code, r.detail, r.source) for r in site.rejections]
    facts = {name: value for name, value in vars(site).items() if name not in _PLACES}
    return repr((row.source, row.result, reasons, facts))


def _others(rejections: Iterable[Rejection]) -> list[Group]:
    found: dict[object, Group] = {}
    for rejection in rejections:
        row = Row(rejection.layer, rejection.source, "", "", "", f"not attention {rejection.code}", NOT_ATTENTION)
        key = (rejection.code, rejection.detail, rejection.source)
        found.setdefault(key, Group(row, [], None, [rejection])).layers.append(rejection.layer)
    return list(found.values())
