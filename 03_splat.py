"""Splats Gaussians with any number of channels into a new view, blends the result by masks and brings it to a patch grid.

Paper  Splat and Distill Sec. 3.4 (Eq. 4, semantic blending), 3D Gaussian Splatting (tiles, alpha compositing), EWA splatting.
In     Gaussians in the world frame (means, covariances, opacities, one feature row each) and a camera (w2c, K).
Out    features (H, W, C), alpha (H, W), depth (H, W); after the blend, tokens (N, C) that a student can be taught with.
Run    python 03_splat.py    novel views of held-out rooms, colours and features, as a picture; 8 s on a 2-core CPU
Copy   this file alone; PyTorch and, for the .ply functions, numpy.
Not    no spherical harmonics (one feature row per Gaussian, seen alike from all sides), no second derivatives.
Words  alpha_k = opacity * exp(-d' Sigma^-1 d / 2), Sigma the 2-D covariance; T_k = prod_{j<k} (1 - alpha_j), the light left;
       w_k = alpha_k T_k, the weight of Gaussian k at a pixel. A view is cut into tiles of 8x8 = 64 pixels; each tile has a
       list of the Gaussians that reach it, nearest first, read in chunks. B tiles in a batch, S Gaussians in a chunk: alpha
       is (B, S, 64). A row of the `table`: mean x, y (pixels), the factor l11, l21, l22, log2 opacity, depth z.

Why it is written this way: log2 alpha is a quadratic polynomial in the pixel position, so one matrix product gives it for all
pixels of a tile, and a second product turns the weights into all channels at once. Nothing is kept for the backward pass but the
inputs and the rendered view: it walks the same lists again, so memory follows `max_elements` and not the length of the lists.
"""

import argparse
import importlib
import math
import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE = 8  # pixels; larger tiles evaluate more pixels that a small Gaussian never reaches, smaller ones lengthen the lists
CHUNK = 32  # Gaussians per step of a tile's list
NEAR = 0.01  # world units
DILATION = 0.3  # px^2, added to the 2-D covariance: no Gaussian is thinner than about a pixel
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.99  # skipped below, clamped above
MIN_LIGHT = 1e-4  # a pixel stops BEFORE the Gaussian that would bring T this low
SH_C0 = 0.28209479177387814  # the constant spherical harmonic, in which .ply files store colours


class Render(NamedTuple):
    features: Tensor  # (H, W, C) sum of w f, not divided by alpha
    alpha: Tensor  # (H, W) sum of w
    depth: Tensor  # (H, W) sum of w z / sum of w, 0 where nothing is hit


# ---------------------------------------------------------------------------------------------------------------- projection


def camera_covariance(
    p: Tensor,  # (G, 3) camera frame
    cov: Tensor,  # (G, 3, 3) camera frame
    K: Tensor,  # (3, 3)
    size: Tensor,  # (2,) width, height
) -> Tensor:
    """The 2-D covariance (G, 2, 2) in px^2 of the EWA approximation, dilated."""
    focal, z = K.diagonal()[:2], p[:, 2:]
    # Far outside the view the linearisation explodes; gsplat clamps its position to 30 % beyond the border.
    low, high = (edge / focal for edge in (-K[:2, 2], size - K[:2, 2]))
    slope = (p[:, :2] / z).clamp(low - 0.15 * size / focal, high + 0.15 * size / focal)
    J = K[:2, :2] @ torch.cat([torch.eye(2).to(p) / z[..., None], -(slope / z)[..., None]], 2)  # (G, 2, 3)
    return J @ cov @ J.mT + DILATION * torch.eye(2).to(p)


def project(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,)
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tiles need of the G' Gaussians in front of the camera, nearest first.

    Returns the table (G', 7), the row in the input (G',) and the box of tiles (G', 4).
    """
    # float64: in float32 near-equal depths swap places and needles change shape, for errors of 6e-3 instead of 7e-6.
    means, covariances, opacities, w2c, K = (x.double() for x in (means, covariances, opacities, w2c, K))
    z = means @ w2c[2, :3] + w2c[2, 3]
    # Chosen before anything is divided by z or goes through a logarithm: what is not chosen cannot send a NaN back.
    seen = ((z > NEAR) & (opacities >= MIN_ALPHA)).nonzero()[:, 0]
    order = seen[z.detach()[seen].argsort(stable=True)]
    p = means[order] @ w2c[:3, :3].T + w2c[:3, 3]
    size = torch.tensor([width, height]).to(p)
    cov = camera_covariance(p, w2c[:3, :3] @ covariances[order] @ w2c[:3, :3].T, K, size)
    mean = (p / p[:, 2:]) @ K[:2].T
    # d' Sigma^-1 d as a sum of two squares, so that rounding never makes it negative; the bounds act only on a Sigma that is
    # not positive semi-definite.
    a, b, c = cov[:, 0, 0], (cov[:, 0, 1] + cov[:, 1, 0]) / 2, cov[:, 1, 1].clamp(min=DILATION / 2)
    det = (a * c - b * b).clamp(min=DILATION**2 / 4)
    scale = math.sqrt(0.5 / math.log(2))  # exp(-x / 2) = 2^(-scale^2 x)
    l11, l21, l22 = scale * (c / det).sqrt(), -scale * b / (c * det).sqrt(), scale / c.sqrt()
    table = torch.stack([*mean.T, l11, l21, l22, opacities[order].log2(), p[:, 2]], 1)  # (G', 7)
    reach = 2 * (opacities[order, None] / MIN_ALPHA).log() + 1e-4  # squared radius in sigmas, with room for rounding
    return table, order, tile_box(mean.detach(), (reach * torch.stack([a, c], 1)).detach().sqrt(), size)


def tile_box(
    mean: Tensor,  # (G, 2) pixels
    radius: Tensor,  # (G, 2) pixels
    size: Tensor,  # (2,) width, height
) -> Tensor:
    """First and last tile (x0, y0, x1, y1) with a pixel centre within the radius; last < first where there is none."""
    first = (mean - radius - 0.5).ceil().clamp(min=0)
    last = torch.minimum((mean + radius - 0.5).floor(), size - 1)
    hit = (first <= last).all(1, keepdim=True)  # False for NaN too
    box = torch.cat([first, last], 1).where(hit, torch.tensor([0.0, 0, -1, -1]).to(mean))
    return box.div(TILE, rounding_mode="floor").long()


# --------------------------------------------------------------------------------------------------------------------- lists


def tile_rows(
    boxes: Tensor,  # (G, 4) tiles
    rows: int,
    max_pairs: int,
) -> list[tuple[int, int]]:
    """Cuts the view into bands of whole tile rows [top, bottom): lists of max_pairs in all, or one row more."""
    across = (boxes[:, 2] - boxes[:, 0] + 1).clamp(min=0)
    change = torch.zeros(rows + 1, dtype=torch.long, device=boxes.device)
    pairs = change.index_add(0, boxes[:, 1], across).index_add(0, boxes[:, 3] + 1, -across).cumsum(0)[:rows]  # per row
    heights = torch.unique_consecutive(pairs.cumsum(0) // max_pairs, return_counts=True)[1].tolist()
    bottoms = list(accumulate(heights))
    return list(zip([0, *bottoms], bottoms))


def tile_lists(
    boxes: Tensor,  # (G, 4) tiles
    top: int,
    bottom: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Gaussians of all tiles of a band, tile after tile and nearest first (pairs,), and the length of each list (tiles,)."""
    x0, y0, x1, y1 = boxes.T
    y0, y1 = y0.clamp(min=top), y1.clamp(max=bottom - 1)
    across, count = x1 - x0 + 1, (x1 - x0 + 1).clamp(min=0) * (y1 - y0 + 1).clamp(min=0)
    gaussian = torch.arange(len(boxes), device=boxes.device).repeat_interleave(count)
    nth = torch.arange(len(gaussian), device=boxes.device) - (count.cumsum(0) - count)[gaussian]  # 0, 1, ... within a box
    across = across[gaussian]
    tile = ((y0 - top)[gaussian] + nth // across) * columns + x0[gaussian] + nth % across
    tile, by_tile = tile.int().sort(stable=True)  # stable: the table is in depth order, so every list is
    return gaussian[by_tile], torch.bincount(tile, minlength=(bottom - top) * columns)


def polynomial(
    rows: Tensor,  # (B, S, 7) of the table
    centre: Tensor,  # (B, 2) of the tile, pixels
) -> Tensor:
    """log2 alpha = lo - (l11 dx + l21 dy)^2 - (l22 dy)^2 as coefficients (B, S, 6) of `monomials` around the tile's centre."""
    x, y, l11, l21, l22, lo, _ = rows.unbind(-1)
    dx, dy = centre[:, :1] - x, centre[:, 1:] - y
    u, v = l11 * dx + l21 * dy, l22 * dy
    linear = [-2 * u * l11, -2 * (u * l21 + v * l22)]
    return torch.stack([lo - u * u - v * v, *linear, -l11 * l11, -2 * l11 * l21, -l21 * l21 - l22 * l22], -1)


def monomials(
    like: Tensor,  # any tensor of the wanted type and device
) -> Tensor:
    """1, x, y, x^2, xy, y^2 at the pixel centres of a tile, as seen from its centre: (6, 64)."""
    y, x = torch.meshgrid(*[torch.arange(TILE).to(like) - (TILE - 1) / 2] * 2, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).flatten(1)


def transmittance(
    alpha: Tensor,  # (B, S, 64)
    light: Tensor,  # (B, 64) T at the start of the chunk
) -> Tensor:
    """T before each Gaussian of the chunk and after the last, (B, S + 1, 64)."""
    if alpha.is_cuda:
        return torch.cat([light[:, None], 1 - alpha], 1).cumprod(1)
    T = alpha.new_empty(alpha.shape[0], alpha.shape[1] + 1, alpha.shape[2])
    T[:, 0] = light
    for k in range(alpha.shape[1]):  # on the CPU ten times faster than cumprod over a middle dimension
        torch.addcmul(T[:, k], T[:, k], alpha[:, k], value=-1, out=T[:, k + 1])
    return T


class Step(NamedTuple):
    tiles: Tensor  # (B,) which tiles, all distinct
    centre: Tensor  # (B, 2) their centres, pixels
    ids: Tensor  # (B, S) rows of the table; where a list has ended, any row, with weight 0
    alpha: Tensor  # (B, S, 64) after skipping and clamping
    weight: Tensor  # (B, S, 64) w = alpha T


def walk(
    table: Tensor,  # (G', 7) in depth order
    boxes: Tensor,  # (G', 4) tiles
    grid: tuple[int, int],  # rows and columns of tiles
    dtype: torch.dtype,
    batch: int,  # tiles
    max_pairs: int,
) -> Iterator[Step]:
    """Yields the weights of every tile and Gaussian, front to back. All that is rendered is linear in these weights."""
    basis = monomials(torch.empty(0, dtype=dtype, device=table.device))
    slots = torch.arange(CHUNK, device=table.device)
    for top, bottom in tile_rows(boxes, grid[0], max_pairs):
        gaussian, length = tile_lists(boxes, top, bottom, grid[1])
        start = length.cumsum(0) - length
        # Lists of like length share a batch, so that few slots are padding.
        for tiles in length.argsort(descending=True)[: int((length > 0).sum())].split(batch):
            light = torch.ones(len(tiles), TILE * TILE, dtype=dtype, device=table.device)
            at = 0
            while len(tiles):
                ids = gaussian[(start[tiles, None] + at + slots).clamp(max=len(gaussian) - 1)]
                centre = (torch.stack([tiles % grid[1], top + tiles // grid[1]], 1) + 0.5).to(table) * TILE
                coefficients = polynomial(table[ids], centre)
                coefficients[..., 0].masked_fill_(at + slots >= length[tiles, None], -1e4)  # 2^-1e4 = 0
                alpha = torch.exp2(coefficients.to(dtype) @ basis)
                alpha = torch.nn.functional.threshold(alpha, MIN_ALPHA, 0.0).clamp_(max=MAX_ALPHA)
                T = transmittance(alpha, light)
                # T only falls, so the Gaussian that brings it too low takes all behind it along.
                weight = (T[:, :-1] * alpha).where(T[:, 1:] > MIN_LIGHT, 0.0)
                yield Step(top * grid[1] + tiles, centre, ids, alpha, weight)
                at += CHUNK
                unfinished = (length[tiles] > at) & (T[:, -1] > MIN_LIGHT).any(1)
                tiles, light = tiles[unfinished], T[unfinished, -1]


# --------------------------------------------------------------------------------------------------------------- compositing


def payload(
    table: Tensor,  # (G', 7)
    features: Tensor,  # (G, C)
    order: Tensor,  # (G',) rows of the features
    ids: Tensor,  # (B, S) rows of the table
) -> Tensor:
    """What is composited of each Gaussian in a chunk: its features, 1 for alpha, z for depth. (B, S, C + 2)"""
    z = table[ids, 6, None].to(features)
    return torch.cat([features[order[ids]], torch.ones_like(z), z], -1)


class Composite(torch.autograd.Function):
    """Sum over k of w_k (f_k, 1, z_k): table (G', 7), features (G, C) -> (tiles, C + 2, 64)."""

    @staticmethod
    def forward(ctx, table, features, order, boxes, grid, batch, max_pairs):
        ctx.walk = grid, features.dtype, batch, max_pairs
        out = features.new_zeros(grid[0] * grid[1], features.shape[1] + 2, TILE * TILE)
        for step in walk(table, boxes, *ctx.walk):
            out.index_add_(0, step.tiles, payload(table, features, order, step.ids).mT @ step.weight)
        ctx.save_for_backward(table, features, order, boxes, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return (*Composite.gradients(ctx, grad), None, None, None, None, None)

    @staticmethod
    def gradients(ctx, grad):
        table, features, order, boxes, out = ctx.saved_tensors
        basis = monomials(out)
        upto = torch.ones(CHUNK, CHUNK).tril().to(out)  # as a product, a running sum over k
        grad_table, grad_features = torch.zeros_like(table), torch.zeros_like(features)
        behind = (grad * out).sum(1)  # (tiles, 64) sum of w_j h_j over all j not yet passed; h = dL/dw
        for tiles, centre, ids, alpha, weight in walk(table, boxes, *ctx.walk):
            g = grad[tiles]  # (B, C + 2, 64)
            wh = weight * (payload(table, features, order, ids) @ g)  # (B, S, 64)
            rest = behind[tiles, None] - upto @ wh  # sum over j > k
            behind[tiles] = rest[:, -1]
            # alpha dL/dalpha: own weight, less the light taken from all behind; log2 alpha has no say where it is clamped.
            slope = (wh - rest * alpha / (1 - alpha)).where((weight > 0) & (alpha < MAX_ALPHA), 0.0)
            with torch.enable_grad():
                rows = table[ids].requires_grad_()
                coefficients = polynomial(rows, centre)
            grad_rows = torch.autograd.grad(coefficients, rows, (math.log(2) * slope @ basis.T).to(table))[0]
            grad_payload = weight @ g.mT  # (B, S, C + 2)
            grad_rows[..., 6] += grad_payload[..., -1]
            grad_table.index_add_(0, ids.flatten(), grad_rows.flatten(0, 1))
            grad_features.index_add_(0, order[ids].flatten(), grad_payload[..., :-2].flatten(0, 1))
        return grad_table, grad_features


def rasterize(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,) in [0, 1]
    features: Tensor,  # (G, C) float32 or float64; its type is that of the compositing and of the result
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
    background: Tensor | None = None,  # (C,)
    max_elements: int = 2**20,
) -> Render:
    """Renders the Gaussians, any C at once, in the convention of 3DGS and gsplat; differentiable in every tensor.

    Each step, forward or backward, works on a handful of tensors that hold about max_elements numbers together with their
    copies of the features; tile lists are built for as many (Gaussian, tile) pairs at a time, or one row of tiles. A smaller
    value is slower and changes nothing else. What comes on top is a few dozen numbers per Gaussian and the view itself.
    """
    G, C = len(means), features.shape[-1]
    shapes = [tuple(x.shape) for x in (means, covariances, opacities, features)]
    assert shapes == [(G, 3), (G, 3, 3), (G,), (G, C)], f"need (G, 3), (G, 3, 3), (G,), (G, C) with one G, not {shapes}"
    assert features.dtype in (torch.float32, torch.float64), f"features must be float32 or float64, not {features.dtype}"
    assert w2c.shape == (4, 4) and K.shape == (3, 3), f"w2c must be (4, 4) and K (3, 3), not {tuple(w2c.shape)}, {tuple(K.shape)}"
    assert background is None or background.shape == (C,), f"background must be ({C},), one value per channel of the features"
    assert height > 0 and width > 0 and max_elements > 0, "height, width and max_elements must be at least 1"
    table, order, boxes = project(means, covariances, opacities, w2c, K, height, width)
    grid = -(-height // TILE), -(-width // TILE)
    batch = max(1, max_elements // (CHUNK * TILE * TILE + (CHUNK + TILE * TILE) * (C + 2)))
    with torch.autocast(features.device.type, enabled=False):  # in bfloat16 log2 alpha would be off by whole units
        out = Composite.apply(table, features, order, boxes, grid, batch, max_elements)  # (tiles, C + 2, 64)
    image = out.view(*grid, C + 2, TILE, TILE).permute(0, 3, 1, 4, 2)  # (rows, 8, columns, 8, C + 2)
    rendered, alpha, depth = (part.flatten(2, 3).flatten(0, 1)[:height, :width] for part in image.split([C, 1, 1], -1))
    depth = depth / alpha.where(alpha > 0, 1.0)  # a division by 0, even in the branch not taken, would make NaN gradients
    if background is not None:
        rendered = rendered + (1 - alpha) * background.to(rendered)
    return Render(rendered, alpha[..., 0], depth[..., 0])


# ------------------------------------------------------------------------------------------------- from the view to the tokens


def semantic_blend(
    features: Tensor,  # (H, W, C) already divided by alpha
    mask: Tensor,  # (H, W) int64 instance ids, 0 = unlabelled
    alpha: float = 0.5,
    valid: Tensor | None = None,  # (H, W) bool, which pixels may enter a mean
) -> Tensor:
    """Draws each pixel's features towards the mean of its instance, which evens out small errors of the geometry. (H, W, C)"""
    H, W, C = features.shape
    valid = torch.ones_like(mask, dtype=torch.bool) if valid is None else valid
    assert mask.shape == valid.shape == (H, W), f"mask and valid must be ({H}, {W}) like the features"
    ids, segment = torch.unique(mask, return_inverse=True)  # ids may be huge: numbered 0, 1, ...
    bins = segment.where(valid, len(ids)).flatten()  # what is not valid goes to a row of its own, NaN or not
    total = torch.zeros(len(ids) + 1, C, dtype=torch.float64, device=features.device)  # float32 loses digits over 10^5 pixels
    for i, rows in zip(bins.split(2**14), features.flatten(0, 1).split(2**14)):  # no float64 copy of the whole map
        total.index_add_(0, i, rows.double())
    count = torch.bincount(bins, minlength=len(ids) + 1)[:-1]
    mean = (total[:-1] / count.clamp(min=1)[:, None]).to(features.dtype)  # (ids, C)
    # Differs: the official code also averages over holes and blends unlabelled pixels, as if 0 were an instance.
    blended = ((ids != 0) & (count > 0))[segment][..., None]
    return torch.where(blended, alpha * features + (1 - alpha) * mean[segment], features)  # SnD Eq. 4


def bilinear_taps(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The two pixels around each patch centre along one side, index (count, 2) int64, and their weights (count, 2) float64."""
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) * size / count - 0.5  # in units where pixel i has its centre at i
    centre = centre.clamp(0, size - 1)  # more patches than pixels: the outermost pixel counts alone
    first = centre.floor()
    index = torch.stack([first, first + 1], 1).clamp(max=size - 1).long()
    return index, torch.stack([first + 1 - centre, centre - first], 1)


def splat_to_tokens(
    features: Tensor,  # (H, W, C)
    valid: Tensor,  # (H, W) bool
    grid: tuple[int, int],  # (h, w)
) -> tuple[Tensor, Tensor]:
    """The features at the patch centres: tokens (N, C), 0 where invalid, and which are valid (N,)."""
    H, W, C = features.shape
    assert valid.shape == (H, W), f"valid must be ({H}, {W}) like the features, not {tuple(valid.shape)}"
    (y, wy), (x, wx) = (bilinear_taps(size, count) for size, count in zip((H, W), grid))
    index = (y[:, None, :, None] * W + x[None, :, None, :]).view(-1, 4).to(valid.device)  # (N, 4)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).view(-1, 4).to(valid.device)
    hit = valid.flatten()[index]
    weight = weight * hit
    # Differs: the official code drops a token only where the rendered colour is exactly black, and then teaches it as zeros.
    token_valid = weight.sum(1) > 0.5 - 1e-9  # at least half; the weights are rounded
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=0.5)).to(features.dtype) * token_valid[:, None]
    taps = features.reshape(-1, C)[index].where(hit[..., None], 0.0)  # holes may hold anything, NaN too
    return torch.einsum("nk,nkc->nc", weight, taps), token_valid


# ----------------------------------------------------------------------------------------------------------------- .ply files

PLY_FIELDS = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
PLY_TYPES = {"float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8", "uchar": "u1", "uint8": "u1", "int": "<i4"}


class PlyGaussians(NamedTuple):
    means: Tensor  # (G, 3) world
    covariances: Tensor  # (G, 3, 3) world
    opacities: Tensor  # (G,)
    colours: Tensor  # (G, 3) in [0, 1]


def quaternion_to_rotation(
    q: np.ndarray,  # (G, 4) as (w, x, y, z), of any length; 0 is no rotation
) -> np.ndarray:
    """Rotation matrices (G, 3, 3)."""
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True).clip(1e-12)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), 2, 0)


def rotation_to_quaternion(
    R: np.ndarray,  # (G, 3, 3) with determinant +1
) -> np.ndarray:
    """Unit quaternions (G, 4) as (w, x, y, z)."""
    (a, b, c), (d, e, f), (g, h, i) = R.transpose(1, 2, 0)
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    Q = np.moveaxis(np.array(rows), 2, 0)  # 4 q q': every row is a multiple of q; the one with the largest diagonal is safe
    best = Q[np.arange(len(Q)), Q.diagonal(0, 1, 2).argmax(1)]
    return best / np.linalg.norm(best, axis=1, keepdims=True)


def save_ply(
    path: str | Path,
    gaussians,  # anything with .means (G, 3), .covariances (G, 3, 3) and .opacities (G,)
    colours: Tensor,  # (G, 3) in [0, 1]
) -> None:
    """Writes the Gaussians as the viewers of 3DGS files read them."""
    means, cov, opacity, colours = (
        x.detach().cpu().double().numpy() for x in (gaussians.means, gaussians.covariances, gaussians.opacities, colours)
    )
    assert colours.shape == means.shape, f"colours must be (G, 3) like the means, not {colours.shape}"
    variance, axes = np.linalg.eigh(cov)
    axes[..., 0] *= np.sign(np.linalg.det(axes))[:, None]  # a reflected frame has no quaternion; either sign of an axis serves
    opacity = opacity.clip(1e-6, 1 - 1e-6)
    table = np.concatenate([
        means, 0 * means, (colours - 0.5) / SH_C0, np.log(opacity / (1 - opacity))[:, None],
        0.5 * np.log(variance.clip(1e-20)), rotation_to_quaternion(axes),
    ], 1)  # fmt: skip
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}"]
    header += [*(f"property float {name}" for name in PLY_FIELDS), "end_header", ""]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write("\n".join(header).encode() + table.astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_vertices(path: Path) -> np.ndarray:
    """The vertex element of a binary .ply file as a structured array; ValueError where it is none of ours."""
    head, end, body = path.read_bytes().partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    if not end or lines[:1] != [["ply"]]:
        raise ValueError(f"{path}: not a .ply file (no ply ... end_header at its start)")
    if ["format", "binary_little_endian", "1.0"] not in lines:
        raise ValueError(f"{path}: only binary_little_endian 1.0 is read; save it in that format")
    elements = [i for i, line in enumerate(lines) if line[:1] == ["element"]] + [len(lines)]
    if len(elements) < 2 or len(vertex := lines[elements[0]]) != 3 or vertex[1] != "vertex" or not vertex[2].isdigit():
        raise ValueError(f"{path}: its first element is not 'vertex' with a count")
    fields = [line for line in lines[elements[0] + 1 : elements[1]] if line[:1] == ["property"]]
    if any(len(field) != 3 or field[1] not in PLY_TYPES for field in fields):
        raise ValueError(f"{path}: a vertex property is of none of the types {' '.join(PLY_TYPES)}")
    names = [name for _, _, name in fields]
    if missing := [name for name in PLY_FIELDS if name not in [*names, "nx", "ny", "nz"]]:
        raise ValueError(f"{path}: no Gaussians, the vertices lack {' '.join(missing)}")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two vertex properties share a name")
    layout = np.dtype([(name, PLY_TYPES[kind]) for _, kind, name in fields])
    count = int(vertex[2])
    if len(body) < count * layout.itemsize:
        raise ValueError(f"{path}: truncated, {len(body)} bytes where {count} Gaussians need {count * layout.itemsize}")
    return np.frombuffer(body, layout, count)


def load_ply(path: str | Path) -> PlyGaussians:
    """Reads a 3DGS .ply file of any training code, as float32; colours are the constant harmonic (f_rest_* is left aside)."""
    vertices = read_vertices(Path(path))
    table = np.stack([vertices[name].astype(np.float64) for name in PLY_FIELDS if name not in ("nx", "ny", "nz")], 1)
    means, colours, logit, scale, rotation = np.split(table, [3, 6, 7, 10], 1)
    axes = quaternion_to_rotation(rotation) * np.exp(scale)[:, None]  # columns as long as the sigmas
    parts = means, axes @ axes.transpose(0, 2, 1), logit[:, 0], (SH_C0 * colours + 0.5).clip(0, 1)
    means, covariances, logit, colours = (torch.from_numpy(part) for part in parts)
    return PlyGaussians(means.float(), covariances.float(), logit.sigmoid().float(), colours.float())


# ----------------------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def novel_view(scene, triplet, vit, pixels: int, device: str):
    """One row of the picture, and the PSNR of the target view by name, on the pixels that the swept geometry covers."""
    data, lift = importlib.import_module("01_data"), importlib.import_module("02_lift")
    a, b, target = (scene.view(i, data.fit_size(scene, pixels, vit.patch)) for i in triplet)
    images, K, c2w = (torch.stack([getattr(a, key), getattr(b, key)]).to(device) for key in ("image", "K", "c2w"))
    truth, grid = target.image.permute(1, 2, 0).to(device), tuple(side // vit.patch for side in images.shape[-2:])
    tokens, masks = vit(images).patches, [data.regions(v).to(device) for v in (a, b)]
    features = torch.cat([lift.mask_aware_upscale(t, m, grid).flatten(0, 1) for t, m in zip(tokens, masks)])
    payload = torch.cat([images.permute(0, 2, 3, 1).reshape(-1, 3), features], 1)  # colours and features in one pass
    geometries = {"swept depth": lift.sweep_gaussians(images, K, c2w, *scene.depth_range)}
    if a.depth is not None and b.depth is not None:
        geometries["measured depth"] = lift.depth_gaussians(torch.stack([a.depth, b.depth]).to(device), K, c2w)
    views, alphas = {}, {}
    for name, g in geometries.items():
        camera = torch.linalg.inv(target.c2w).to(device), target.K.to(device), *truth.shape[:2]
        render = rasterize(g.means, g.covariances, g.opacities, payload, *camera)
        views[name], alphas[name] = render.features / render.alpha.clamp(min=1e-6)[..., None], render.alpha
    seen = alphas["swept depth"] >= 0.5
    if not seen.any():
        raise ValueError(f"{scene.name}: the splatted views cover nothing of the target; depth range taken: {scene.depth_range}")
    psnr = lambda guess, where: -10 * (guess - truth)[where].square().mean().log10().item()
    both = seen & (alphas.get("measured depth", alphas["swept depth"]) >= 0.5)
    scores = {name: psnr(view[..., :3], both) for name, view in views.items()}
    scores["mean colour"] = psnr(truth[both].mean(0), both)
    rendered = views["swept depth"][..., 3:]
    blended = semantic_blend(rendered, data.regions(target).to(device), valid=seen)  # SnD Eq. 4
    basis = lift.pca_basis(rendered[seen])
    colours = [views[name][..., :3].permute(2, 0, 1) * (alphas[name] >= 0.5) if name in views else None
               for name in ("swept depth", "measured depth")]
    return [a.image, b.image, target.image, *colours, *(lift.pca_colours(f, basis) * seen for f in (rendered, blended))], scores


def main(argv=None):
    parser = argparse.ArgumentParser(description="Splat two views into a third: colours and features of held-out triplets.")
    parser.add_argument("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    parser.add_argument("--model", default="tiny", help="ViT weights: 'tiny' or a Hugging Face DINOv2 folder")
    parser.add_argument("--pixels", type=int, default=96 * 128, help="pixels a view; cost grows in proportion")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out triplets")
    parser.add_argument("--out", default="out/03_splat")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    args = parser.parse_args(argv)
    data, lift = importlib.import_module("01_data"), importlib.import_module("02_lift")
    try:
        vit = lift.load_vit(args.model).to(args.device)
        scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
        scenes = (data.split(scenes, "val") or scenes)[:4]
        rows, scores = [], []
        for n in range(4):
            scene = scenes[n % len(scenes)]
            triplet = data.sample_triplet(scene, torch.Generator().manual_seed(args.seed + n))
            row, score = novel_view(scene, triplet, vit, args.pixels, args.device)
            rows, scores = rows + [row], scores + [score]
        headings = ["context", "context", "target view", "splatted (swept)", "splatted (measured)", "features (PCA)", "blended"]
        path = data.picture_grid(Path(args.out) / "novel_view.png", headings, rows)
        mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0] if all(name in s for s in scores)}
        baseline = mean.pop("mean colour")
        answer = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
        print(f"psnr where covered: {answer} (mean colour {baseline:.1f})  ->  {path}")
    except (data.DataError, ValueError) as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
