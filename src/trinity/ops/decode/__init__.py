"""Triton kernels for generation, each beside its plain reference: one token of a few requests, or rows of prompts.

At small batches a step is bound by the bytes of the weights and by the number of launches, so each kernel reads its
weights once and does everything on the way that does not need the whole row of another kernel. Two regimes:

- few rows (`FEW`): products on the ordinary cores, one program a tile of weight rows and a token, with the norm before
  the product computed again in every program;
- many rows: tensor-core products over all rows at once, an expert's weights read once for all its tokens.

Importing a module of this package needs Triton; nothing else in the project does.
"""

FEW = 4
"""Rows up to which the first regime is used."""
