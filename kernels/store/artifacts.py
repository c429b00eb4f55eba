"""Records among what ``torch.compiler.save_cache_artifacts`` collects, so that they travel with compiled code.

torch knows the kind of these artifacts once this module is imported, which the backend does. A record that is loaded is
read like any other one, wherever it comes from.
"""

from __future__ import annotations

import logging

from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from attnrewrite.kernels.store.record import Record
from attnrewrite.kernels.store.settings import default_store

log = logging.getLogger(__name__)
KIND = "attnrewrite_tuning"


@CacheArtifactFactory.register
class TuningArtifact(CacheArtifact):
    """A record by its path."""

    def populate_cache(self) -> None:
        """Put the record into the store of this process, if it is one."""
        refusal = default_store().accept(self.key, self.content)
        if refusal is not None:
            log.warning("a tuning record among cache artifacts was refused: %s", refusal)

    @staticmethod
    def type() -> str:
        """Return the kind by which torch finds this class."""
        return KIND


def carry(record: Record) -> None:
    """Let the next ``torch.compiler.save_cache_artifacts`` hold a record."""
    CacheArtifactManager.record_artifact(KIND, record.path, record.data)
