"""The token-level report: every completion with its tokens coloured by KL to the teacher, as one HTML file.

`trl-distill report` makes one from saved models, [`TokenReport`] during training.
"""

from .callback import TokenReport
from .page import page
from .table import Completion, Opinion, Summary, TokenTable, View


__all__ = ["Completion", "Opinion", "Summary", "TokenReport", "TokenTable", "View", "page"]
