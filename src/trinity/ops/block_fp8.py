"""Block-quantised FP8: e4m3 values with one float32 scale for each block of a matrix, value = stored * scale.

The layout that engines read: blocks of 128 x 128 of a weight [out, in], the last ones cut off where a side is no
multiple (`scale [ceil(out / 128), ceil(in / 128)]`), and groups of 128 channels of an activation, scaled on the fly.
Symmetric, the scale being the block's largest magnitude over 448, e4m3's largest number (Micikevicius et al. 2022,
arXiv 2209.05433; blocks after DeepSeek-V3, arXiv 2412.19437, section 3.3).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def quantize_blocks(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> e4m3 of the same shape and float32 scales [..., ceil(out / block), ceil(in / block)]."""
    out, inner = weight.shape[-2:]
    rows, columns = -(-out // block), -(-inner // block)
    tiles = F.pad(weight.float(), (0, columns * block - inner, 0, rows * block - out))
    tiles = tiles.unflatten(-2, (rows, block)).unflatten(-1, (columns, block))
    largest = tiles.abs().amax((-3, -1))
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    scaled = (tiles / scale[..., :, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    stored = scaled.to(torch.float8_e4m3fn).flatten(-2).flatten(-3, -2)
    return stored[..., :out, :inner].contiguous(), scale


def dequantize_blocks(stored: Tensor, scale: Tensor, rows: int = BLOCK, columns: int = BLOCK) -> Tensor:
    """float32 [..., out, in]; blocks of `rows` x `columns` share a scale."""
    out, inner = stored.shape[-2:]
    spread = scale.float().repeat_interleave(rows, -2)[..., :out, :].repeat_interleave(columns, -1)[..., :inner]
    return stored.float() * spread


def fake_quantize_groups(x: Tensor, group: int = BLOCK) -> Tensor:
    """What a dynamically quantised activation [..., D] becomes: to e4m3 and back in groups of `group` channels."""
    width = x.shape[-1]
    groups = F.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    back = (groups / scale).to(torch.float8_e4m3fn).float() * scale
    return back.flatten(-2)[..., :width].to(x.dtype)
