"""The model, free of parallelism.

Suffix legend of arrays, used everywhere: B rows, T positions, N = B*T tokens, D model width, H query heads, G key and
value heads, K head channels, F hidden width of an FFN, E experts, k experts per token, L MoE layers, V vocabulary.
`x_BTD`, `scores_NE`. Counts start with `num_`.
"""

from trinity.model.transformer import Transformer

__all__ = ["Transformer"]
