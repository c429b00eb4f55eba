"""The operator ``attnrewrite::sea_one_document``: only the data tell whether a sequence holds several documents.

transformers counts documents from position ids wherever these are given and no mask is, also of ordinary sequences.
Importing this module defines the operator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnrewrite.kernels.diagnostics import error


@torch.library.custom_op("attnrewrite::sea_one_document", mutates_args=())
def one_document(features: Tensor, documents: Tensor) -> Tensor:
    """Return a copy of ``features``, for the estimate to depend on the check.

    Args:
        features: of any shape.
        documents: boolean, whether a query and a key lie in one document.

    Raises:
        VariantError: AR307 where a sequence holds several.
    """
    if not bool(documents.all()):
        raise error(
            "AR307",
            "SEA cuts slices from one sequence, and here position_ids count several packed documents",
            hint="pass sequences one by one, or an attention_mask where they are padded; transformers reads documents "
            "from position_ids that do not rise by one",
        )
    return features.clone()


@one_document.register_fake
def _(features: Tensor, documents: Tensor) -> Tensor:
    return torch.empty_like(features)
