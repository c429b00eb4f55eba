"""Public names of the errors and warnings; the codes live in ``attnrewrite.kernels.diagnostics``."""

from attnrewrite.kernels.diagnostics import DIAGNOSTICS as DIAGNOSTICS
from attnrewrite.kernels.diagnostics import AttnRewriteError as AttnRewriteError
from attnrewrite.kernels.diagnostics import AttnRewriteWarning as AttnRewriteWarning
from attnrewrite.kernels.diagnostics import Diagnostic as Diagnostic
