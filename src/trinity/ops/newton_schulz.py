"""Orthogonalising matrices for Muon: the nearest semi-orthogonal matrix U V^T of G = U S V^T.

Source: Newton-Schulz iteration of Muon (Jordan et al. 2024), and the per-iteration coefficients of the Trinity authors'
optimizer. The fast version trades exactness for speed: singular values end near 1, not at 1.
"""

import torch

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's original coefficients: singular values end between about 0.7 and 1.2."""

POLAR_EXPRESS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""One polynomial per iteration: steep while singular values are small, flat at the end."""

COEFFICIENTS = {"quintic": QUINTIC, "polar-express": POLAR_EXPRESS}


def orthogonalize_reference(matrices_BMN: torch.Tensor) -> torch.Tensor:
    """U V^T of each matrix by a singular value decomposition in float64: exact and slow, for tests."""
    u_BMR, _, vh_BRN = torch.linalg.svd(matrices_BMN.double(), full_matrices=False)
    return (u_BMR @ vh_BRN).to(matrices_BMN.dtype)


def orthogonalize(
    matrices_BMN: torch.Tensor,
    coefficients: tuple[tuple[float, float, float], ...] = POLAR_EXPRESS,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Approximate U V^T of each matrix of a batch [B, M, N]; leading dimensions are free.

    `dtype` is the type of the iteration (None: bfloat16 on a GPU, float32 on a CPU), which is also the result's type.
    A matrix of zeros gives zeros.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices_BMN.is_cuda else torch.float32
    norm_B11 = torch.linalg.matrix_norm(matrices_BMN, keepdim=True, dtype=torch.float32)
    x = (matrices_BMN / norm_B11.clamp_min(1e-7)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x
