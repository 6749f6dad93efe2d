"""Models of transformers on ``relative_attention``: names of parameters and files stay theirs.

Importing this needs transformers 5, which the rest of ``kernelab.nn`` does not.
"""

from .bert import relative_bert
from .deberta import replace_disentangled_attention
from .interface import register

__all__ = ["register", "relative_bert", "replace_disentangled_attention"]
