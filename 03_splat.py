"""Splats Gaussians with any number of channels into a new view, blends the result by masks and brings it to a patch grid.

Paper  Splat and Distill Sec. 3.4 (Eq. 4, semantic blending), 3D Gaussian Splatting (tiles, alpha compositing), EWA splatting.
In     Gaussians in the world frame (means, covariances, opacities, one feature row each) and a camera (w2c, K).
Out    features (H, W, C), alpha (H, W), depth (H, W); after the blend, tokens (N, C) that a student can be taught with. Or all
       of it as one sparse matrix on tokens, the splat operator, made without touching a channel.
Run    python 03_splat.py                       novel views of held-out rooms as a picture; 6 s on a 2-core CPU
       python 03_splat.py --geometry mvsplat    fine-tunes MVSplat by splatting (SnD A.3) and measures it; 3 minutes
       python 03_splat.py --flight              an animated flight between two views; --ply file.ply flies around a file
Copy   this file alone for everything up to the .ply files; the commands need 01_data.py 02_lift.py, --mvsplat tiny its weights.
Not    no spherical harmonics (one feature row per Gaussian, seen alike from all sides), no second derivatives.
Words  alpha_k = opacity * exp(-d' Sigma^-1 d / 2), Sigma the 2-D covariance; T_k = prod_{j<k} (1 - alpha_j), the light left;
       w_k = alpha_k T_k, the weight of Gaussian k at a pixel. A view is cut into blocks of 8x8 = 64 pixels; each block has a
       list of the Gaussians that reach it, nearest first, read in chunks. B blocks in a step, S Gaussians in a chunk, P pixels
       in a block: alpha is (S, B, P). A row of the `table`: mean x, y in whole pixels, their rest, l11, l21, l22, log2 opacity.

Why it is written this way: log2 alpha is a quadratic polynomial in the pixel position, so one matrix product gives it for all
pixels of a block, and a second product turns the weights into all channels at once. A step advances as many blocks as memory
allows by one chunk; finished ones make room for the next. Nothing is kept for the backward pass but the inputs and the rendered
view: it walks the same lists again, so memory follows `max_elements` and not the length of the lists.
"""

import argparse
import importlib
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

BLOCK = 8, 8  # pixels; larger blocks evaluate more pixels that a small Gaussian never reaches, smaller ones lengthen the lists
CHUNK = 32  # Gaussians per step of a block's list
FEW_CHANNELS = 64  # so many travel with the geometry through every step; more wait until the weights are known
RANGE = 128.0  # a power of 2 above MAX_ALPHA / (1 - MAX_ALPHA); see `composite`
NEAR = 0.01  # world units
DILATION = 0.3  # px^2, added to the 2-D covariance: no Gaussian is thinner than about a pixel
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.99  # skipped below, clamped above
COVERED = 0.5  # a target pixel is valid from this alpha on
MIN_LIGHT = 1e-4  # a pixel stops BEFORE the Gaussian that would bring T this low
SH_C0 = 0.28209479177387814  # the constant spherical harmonic, in which .ply files store colours


class Render(NamedTuple):
    features: Tensor  # (H, W, C) sum of w f, not divided by alpha
    alpha: Tensor  # (H, W) sum of w
    depth: Tensor  # (H, W) sum of w z / sum of w, 0 where nothing is hit


# ---------------------------------------------------------------------------------------------------------------- projection


def project(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,)
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The EWA projection: table (8, G) and depth z (G,), float64; where a Gaussian is not seen, log2 opacity is -inf."""
    # float64: in float32 near-equal depths swap places and needles change shape, for errors of 6e-3 instead of 7e-6.
    # Components first: every operation then runs over Gaussians that lie side by side in memory.
    means, covariances, opacities, w2c, K = (x.double() for x in (means, covariances, opacities, w2c, K))
    R, size = w2c[:3, :3], K.new_tensor([[width], [height]])
    p = R @ means.T + w2c[:3, 3:]
    # Replaced before anything is divided by z or goes through a logarithm: what is not seen cannot send a NaN back.
    seen = (p[2] > NEAR) & (opacities >= MIN_ALPHA)
    p, opacities = torch.where(seen, p, K.new_tensor([[0.0], [0], [1]])), torch.where(seen, opacities, K.new_ones(()))
    z, ray = p[2], p / p[2]
    mean = K[:2] @ ray
    # Far outside the view the linearisation explodes; gsplat clamps its position to 30 % beyond the border.
    focal, centre = K.diagonal()[:2, None], K[:2, 2:]
    slope = torch.minimum(torch.maximum(ray[:2], -(centre + 0.15 * size) / focal), (1.15 * size - centre) / focal)
    # d pixel / d world is J = (K R - s R_z) / z. W = (K R, R_z) is common to all Gaussians, and W Sigma W' linear in Sigma: one
    # matrix product for all of them. J Sigma J' = ((a, b), (b, c)) is then a few differences.
    W, (i, j) = torch.cat([K[:2, :2] @ R[:2], R[2:]]), torch.triu_indices(3, 3, device=K.device)
    W = (W[i, :, None] * W[j, None] + W[j, :, None] * W[i, None]) / 2  # (6, 3, 3)
    xx, xy, xz, yy, yz, zz = W.flatten(1) @ covariances.flatten(1).T
    sx, sy = K[:2, :2] @ slope
    a = (xx - sx * (2 * xz - sx * zz)) / z**2 + DILATION
    b = (xy - sx * yz - sy * (xz - sx * zz)) / z**2
    c = (yy - sy * (2 * yz - sy * zz)) / z**2 + DILATION
    # d' Sigma^-1 d as a sum of two squares, so that rounding never makes it negative; the bounds act only on a Sigma that is
    # not positive semi-definite.
    c = c.clamp(min=DILATION / 2)
    det = (a * c - b * b).clamp(min=DILATION**2 / 4)
    root, scale = c.sqrt(), math.sqrt(0.5 / math.log(2))  # exp(-x / 2) = 2^(-scale^2 x)
    l11 = root * (scale / det.sqrt())
    l21, l22, lo = -b / c * l11, scale / root, (opacities / RANGE).log2().where(seen, -math.inf)
    pixel = mean.detach().round()  # the mean in two parts: a float32 that counts hundreds of pixels is off by 1e-5
    return torch.stack([*pixel, *(mean - pixel), l11, l21, l22, lo]), z


@torch.no_grad()
def reached_pixels(
    table: Tensor,  # (8, G) float64
    height: int,
    width: int,
) -> Tensor:
    """First x, y and last x, y of the pixels where alpha >= MIN_ALPHA, (4, G); none, last < first, if a Gaussian is unseen."""
    l11, l21, l22, lo = table[4:]
    mean, end = table[:2] + table[2:4], table.new_tensor([[width - 1], [height - 1]])
    # (l11 dx + l21 dy)^2 + (l22 dy)^2 <= reach^2 is an ellipse; where dy is largest, the first square is 0.
    reach = (lo - math.log2(MIN_ALPHA / RANGE) + 1e-4).sqrt()  # with room for rounding; NaN if unseen
    radius = reach / torch.stack([l11 / (1 + (l21 / l22) ** 2).sqrt(), l22])
    first = (mean - radius - 0.5).ceil().clamp(min=0)  # pixel i has its centre at i + 0.5
    last = torch.minimum((mean + radius - 0.5).floor(), end)
    hit = (first <= last).all(0)  # False for NaN
    return torch.where(hit, torch.cat([first, last]), table.new_tensor([[0.0], [0], [-1], [-1]])).int()


def pieces(count: int, size: int) -> list[slice]:
    """0, 1, ... count - 1 in slices of `size`, but at least 1."""
    return [slice(i, i + max(1, size)) for i in range(0, count, max(1, size))]


class Project(torch.autograd.Function):
    """table (G, 8), z (G,) and box (4, G) by `project` and `reached_pixels`, a piece at a time, forward and again backward, so
    that none of their float64 steps is kept."""

    @staticmethod
    def forward(ctx, piece, height, width, dtype, w2c, K, *gaussians):
        ctx.save_for_backward(w2c, K, *gaussians)
        ctx.rest = piece, height, width
        empty, G = partial(torch.empty, device=w2c.device), len(gaussians[0])
        table, z, box = empty(G, 8, dtype=dtype), empty(G, dtype=torch.float64), empty(4, G, dtype=torch.int32)
        for part in pieces(G, piece):
            columns, z[part] = project(*(x[part] for x in gaussians), w2c, K, height, width)
            table[part], box[:, part] = columns.T, reached_pixels(columns, height, width)
        ctx.mark_non_differentiable(box)
        return table, z, box

    @staticmethod
    def backward(ctx, grad_table, grad_z, _):
        w2c, K, *gaussians = (x.detach() for x in ctx.saved_tensors)
        piece, *size = ctx.rest
        grads = [torch.zeros_like(x) if needed else None for x, needed in zip((w2c, K, *gaussians), ctx.needs_input_grad[4:])]
        for part in pieces(len(grad_z), piece):
            inputs = [w2c, K, *(x[part] for x in gaussians)]
            wanted = [x.requires_grad_() for x, g in zip(inputs, grads) if g is not None]
            with torch.enable_grad():
                outputs = project(*inputs[2:], w2c, K, *size)
            found = torch.autograd.grad(outputs, wanted, (grad_table[part].T.double(), grad_z[part]))
            for n, g in enumerate(grads):
                if g is not None:
                    new, *found = found
                    (g if n < 2 else g[part]).add_(new)
        return None, None, None, None, *grads


# --------------------------------------------------------------------------------------------------------------------- lists


class Lattice(NamedTuple):
    """The pixels to rasterise: blocks of one shape in rows and columns, which may overlap or reach beyond the view."""

    y: Tensor  # (rows,) first pixel of each row of blocks, ascending
    x: Tensor  # (columns,)
    shape: tuple[int, int]  # pixels of a block, down and across


def whole_view(height: int, width: int, device) -> Lattice:
    return Lattice(*(torch.arange(0, size, block, device=device) for size, block in zip((height, width), BLOCK)), BLOCK)


def nearest_first(z: Tensor) -> Tensor:  # (G,) float64
    return z.detach().view(torch.int64).argsort(stable=True)  # positive floats sort like their bits, and integers faster


def reached_blocks(
    box: Tensor,  # (4, G) first x, y, last x, y in pixels
    lattice: Lattice,
    height: int,
    width: int,
) -> Tensor:
    """The box in columns and rows of blocks (4, G); last < first where it lies between the blocks."""
    ends = []
    for start, block, size, first, last in zip(lattice[1::-1], lattice.shape[::-1], (width, height), box[:2], box[2:]):
        pixel = torch.arange(-1, size, device=box.device)  # answers for every pixel, which each Gaussian only looks up
        unfinished = torch.searchsorted(start + block - 1, pixel).int()  # the first block that does not end before the pixel
        begun = torch.searchsorted(start, pixel, right=True).int() - 1  # the last block that starts at the pixel or before
        ends.append((unfinished.index_select(0, first + 1), begun.index_select(0, last + 1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1])


class Band(NamedTuple):
    """Some rows of blocks with their lists: block i has gaussian[start[i] : start[i + 1]], nearest first."""

    rows: slice
    centre: Tensor  # (2, blocks) x, y in pixels
    start: Tensor  # (blocks + 1,)
    gaussian: Tensor  # (pairs,) int32


def row_bands(
    boxes: Tensor,  # (4, G) blocks
    rows: int,
    columns: int,
    max_pairs: int,
    max_blocks: int,
) -> list[tuple[int, int]]:
    """Cuts the view into bands of whole rows [top, bottom): lists of max_pairs and max_blocks in all, or one row more."""
    x0, y0, x1, y1 = boxes
    across = (x1 - x0 + 1).clamp(min=0) * (y0 <= y1)
    pairs = torch.bincount(y0, across, rows + 1) - torch.bincount(y1 + 1, across, rows + 1)  # more than in the row before
    pairs = pairs.cumsum(0).cumsum(0)[:rows]  # in all rows up to this one
    number = pairs // max_pairs + torch.arange(rows, device=boxes.device) * columns // max(1, max_blocks)
    bottoms = list(accumulate(torch.unique_consecutive(number, return_counts=True)[1].tolist()))
    return list(zip([0, *bottoms], bottoms))


def block_lists(
    boxes: Tensor,  # (4, G) blocks
    order: Tensor,  # (G,) nearest first
    lattice: Lattice,
    top: int,
    bottom: int,
) -> Band:
    """The lists of a band: every Gaussian once for each block of its box, nearest first, then sorted by block."""
    columns, device = len(lattice.x), boxes.device
    inside = (boxes[0] <= boxes[2]) & (boxes[1] <= boxes[3]) & (boxes[1] < bottom) & (boxes[3] >= top)
    nearest = order.index_select(0, inside.index_select(0, order).nonzero()[:, 0])
    x0, y0, x1, y1 = boxes.index_select(1, nearest)
    y0, y1, across = y0.clamp(min=top) - top, y1.clamp(max=bottom - 1) - top, x1 - x0 + 1
    count = across * (y1 - y0 + 1)
    which = torch.repeat_interleave(count)  # (pairs,)
    nth = torch.arange(len(which), dtype=torch.int32, device=device)
    nth -= (count.cumsum(0) - count).int().index_select(0, which)  # 0, 1, ... within a box
    across = across.index_select(0, which)
    block = (y0 * columns + x0).index_select(0, which) + nth + nth.div(across, rounding_mode="floor") * (columns - across)
    block, by_block = block.sort(stable=True)  # stable: every list stays nearest first
    start = torch.searchsorted(block, torch.arange((bottom - top) * columns + 1, dtype=torch.int32, device=device))
    y, x = (start + size / 2 for start, size in zip(lattice[:2], lattice.shape))
    centre = torch.stack([x.repeat(bottom - top), y[top:bottom].repeat_interleave(columns)])
    return Band(slice(top, bottom), centre, start, nearest.int().index_select(0, which.index_select(0, by_block)))


def plan_lists(
    order: Tensor,  # (G,) nearest first
    box: Tensor,  # (4, G) pixels
    lattice: Lattice,
    height: int,
    width: int,
    max_pairs: int,
    max_blocks: int,
) -> tuple[list[tuple[int, int]], Callable[[int, int], Band]]:
    """The bands [top, bottom) that the lattice is cut into, and the function that makes the lists of one."""
    boxes = reached_blocks(box, lattice, height, width)
    cuts = row_bands(boxes, len(lattice.y), len(lattice.x), max_pairs, max_blocks)
    return cuts, partial(block_lists, boxes, order, lattice)


# --------------------------------------------------------------------------------------------------------------- compositing


def polynomial(
    columns: Tensor,  # (8, S, B) of the table
    centre: Tensor,  # (2, B) of the blocks, pixels
) -> Tensor:
    """log2 alpha = lo - (l11 dx + l21 dy)^2 - (l22 dy)^2 about a block's centre, (6, S, B): of 1, -2x, -2y, -xx, -2xy, -yy."""
    l11, l21, l22, lo = columns[4:]
    dx, dy = centre[:, None] - columns[:2] - columns[2:4]
    u, v = l11 * dx + l21 * dy, l22 * dy
    return torch.stack([lo - u * u - v * v, u * l11, u * l21 + v * l22, l11 * l11, l11 * l21, l21 * l21 + l22 * l22])


def monomials(lattice: Lattice, like: Tensor) -> Tensor:
    """1, x, y, x^2, xy, y^2 at the pixels of a block, as seen from its centre: (6, P)."""
    y, x = torch.meshgrid(*(torch.arange(n).to(like) - (n - 1) / 2 for n in lattice.shape), indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).flatten(1)


def composite(
    alpha: Tensor,  # (S, B, P) divided by RANGE, changed in place to the weights
    light: Tensor,  # (B, P) T times RANGE, changed in place to that behind the last Gaussian
) -> Tensor:
    """The weights w_k = alpha_k T_k, front to back, T_{k+1} = T_k - w_k, and 0 from where a pixel stops: (S, B, P)."""
    # A T too low becomes 0 and stays 0. Its weight goes with it by a minimum, for which alpha T is smaller than RANGE times
    # every other T_{k+1}: torch.where would take twice as long as all the rest.
    for w in alpha:
        w.mul_(light)
        light.sub_(w, alpha=RANGE)
        torch.nn.functional.threshold_(light, RANGE * MIN_LIGHT, 0.0)
        torch.minimum(w, light, out=w)
    return alpha


class Step(NamedTuple):
    blocks: Tensor  # (B,) of the band, all distinct
    centre: Tensor  # (2, B)
    ids: Tensor  # (B, S) Gaussians; where a list has ended, any, with weight 0
    rows: Tensor  # (B, S, 8 + E) of the table
    columns: Tensor  # (8, S, B), the first of them again
    weight: Tensor  # (S, B, P) w = alpha T
    # For the backward pass:
    light: Tensor | None = None  # (B, P) T times RANGE before the first Gaussian
    opaque: Tensor | None = None  # (2, n) the k < S and b < B whose opacity is above MAX_ALPHA
    clamped: Tensor | None = None  # (n, P) where their alpha is, too


def walk(
    table: Tensor,  # (G, 8 + E), which may carry more in its further columns
    band: Band,
    lattice: Lattice,
    max_elements: int,
    backward: bool = False,
) -> Iterator[Step]:
    """Yields the weights of every Gaussian at every pixel, front to back; a step's tensors are good until the next one."""
    start, end = band.start[:-1], band.start[1:]
    basis = monomials(lattice, table) * table.new_tensor([[1], [-2], [-2], [-1], [-2], [-1]])
    centres = band.centre.to(table)
    # An odd number: by a power of 2 apart, the weights of one block would compete for the same few lines of the cache.
    slots = (max(1, max_elements // (CHUNK * basis.shape[1])) - 1) | 1
    ahead = torch.arange(CHUNK, device=table.device)
    # Longest first, lest one is left over at the end; alike in powers of 2 only, so that neighbours stay together in the cache.
    queue = (end - start).log2().floor().argsort(descending=True, stable=True)[: int((end > start).sum())]
    buffer = table.new_empty(CHUNK * min(slots, len(queue)) * basis.shape[1])
    blocks = at = queue[:0]
    light, taken = table.new_empty(0, basis.shape[1]), 0
    while taken < len(queue) or len(blocks):
        fresh = queue[taken : taken + slots - len(blocks)]
        taken += len(fresh)
        blocks, at = torch.cat([blocks, fresh]), torch.cat([at, start[fresh]])
        light = torch.cat([light, light.new_full((len(fresh), light.shape[1]), RANGE)])
        place = at[:, None] + ahead  # (B, S)
        ids = band.gaussian.index_select(0, place.clamp(max=len(band.gaussian) - 1).flatten())
        rows, centre = table.index_select(0, ids).view(*place.shape, -1), centres[:, blocks]
        columns = rows[..., :8].permute(2, 1, 0).contiguous()
        coefficients = polynomial(columns, centre)
        coefficients[0].masked_fill_((place >= end[blocks, None]).T, -1e30)  # wherever that leads, 2^ it is 0
        alpha = buffer[: place.numel() * basis.shape[1]].view(CHUNK, len(blocks), -1)
        torch.mm(coefficients.flatten(1).T, basis, out=alpha.flatten(0, 1)).exp2_()
        torch.nn.functional.threshold_(alpha, MIN_ALPHA / RANGE, 0.0).clamp_(max=MAX_ALPHA / RANGE)
        kept = ()
        if backward:
            opaque = (columns[7] > math.log2(MAX_ALPHA / RANGE)).nonzero().T
            kept = light.clone(), opaque, alpha[*opaque] >= MAX_ALPHA / RANGE
        yield Step(blocks, centre, ids.view(place.shape), rows, columns, composite(alpha, light), *kept)
        at = at + CHUNK
        going = ((at < end[blocks]) & (light.amax(1) > 0)).nonzero()[:, 0]
        blocks, at, light = (x.index_select(0, going) for x in (blocks, at, light))


def in_blocks(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """An image (H, W, C) of whole blocks seen as (rows, columns, C, block height, block width)."""
    return image.unflatten(1, (-1, shape[1])).unflatten(0, (-1, shape[0])).permute(0, 2, 4, 1, 3)


def seen_pairs(step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Block (n,), Gaussian (n,) and weights (n, P) of the pairs that have any; about three in four."""
    block, k = (step.weight.amax(2).T > 0).nonzero().T
    return step.blocks[block], step.ids[block, k], step.weight.flatten(0, 1).index_select(0, k * len(step.blocks) + block)


def spread(
    pairs: list[tuple[Tensor, Tensor, Tensor]],  # of `seen_pairs`
    features: Tensor,  # (G, C)
    blocks: int,
    max_elements: int,
) -> Tensor:
    """The sum over k of w_k f_k, (blocks, C, P): with many channels it pays to write each block once, from its whole list."""
    block, ids, weight = pairs[0]
    padding = block.new_full((1,), blocks), ids.new_zeros(1), weight.new_zeros(1, weight.shape[1])  # sorted last
    block, ids, weight = (torch.cat(x) for x in zip(*pairs, padding))
    block, by_block = block.int().sort(stable=True)
    start = torch.searchsorted(block, torch.arange(blocks + 1, dtype=torch.int32, device=ids.device))
    lengths = start.diff().tolist()
    ahead = torch.arange(max(lengths), device=ids.device)
    out = features.new_empty(blocks, weight.shape[1], features.shape[1])
    for part in pieces(blocks, blocks * max_elements // (4 * len(ids) * features.shape[1])):
        place = start[:-1][part, None] + ahead[: max(lengths[part])]  # (b, n)
        row = by_block.index_select(0, place.where(place < start[1:][part, None], len(ids) - 1).flatten())
        f = features.index_select(0, ids.index_select(0, row)).view(*place.shape, features.shape[1])
        torch.bmm(weight.index_select(0, row).view(*place.shape, weight.shape[1]).mT, f, out=out[part])
    return out.mT


class Composite(torch.autograd.Function):
    """Images (H, W, E) and (H, W, C) of the sums over k of w_k e_k and w_k f_k; H and W are rounded up to whole blocks.

    `extra` e is carried through the walk beside the geometry, which is best for few channels; `features` f is for many.
    """

    @staticmethod
    def forward(ctx, plan, table, extra, features):
        cuts, lists, lattice, max_elements = ctx.plan = plan
        C, shape = features.shape[1], [n * size for n, size in zip((len(lattice.y), len(lattice.x)), lattice.shape)]
        images = [x.new_empty(*shape, x.shape[1]) for x in (extra, features)]
        table = torch.cat([table, extra], 1)
        for band in map(lists, *zip(*cuts)):
            few, pairs = extra.new_zeros(band.centre.shape[1], extra.shape[1], math.prod(lattice.shape)), []
            for step in walk(table, band, lattice, max_elements):
                few.index_add_(0, step.blocks, step.rows[..., 8:].mT @ step.weight.transpose(0, 1))
                if C:
                    pairs.append(seen_pairs(step))
            many = spread(pairs, features, len(few), max_elements) if pairs else few.new_zeros(len(few), C, few.shape[2])
            for image, part in zip(images, (few, many)):
                view = in_blocks(image, lattice.shape)[band.rows]
                view.copy_(part.view(view.shape))
        ctx.save_for_backward(table, features, *images)
        return tuple(images)

    @staticmethod
    def backward(ctx, *grads):
        with torch.autocast(grads[0].device.type, enabled=False):
            return None, *Composite.gradients(ctx, grads)

    @staticmethod
    def gradients(ctx, grads):
        """dL/d table, extra and features. A table that needs none, as where geometry is frozen, saves most of the work."""
        cuts, lists, lattice, max_elements = ctx.plan
        table, features, *images = ctx.saved_tensors
        _, geometry, _, many = ctx.needs_input_grad
        E, C, basis = table.shape[1] - 8, features.shape[1], monomials(lattice, table)
        # The moments and dL/de; index_add_ is twice as fast with 16 columns or more, and 20 times slower with int32.
        sums, grad_features = table.new_zeros(len(table), max(16, 6 + E)), torch.zeros_like(features) if many else None
        for band in map(lists, *zip(*cuts)):
            cut = lambda image: in_blocks(image, lattice.shape)[band.rows].flatten(0, 1).flatten(2).contiguous()
            grad_few, grad_many = map(cut, grads)  # (blocks, E or C, P)
            # The sum of w_j h_j over all j not yet passed, where h = dL/dw.
            behind = (grad_few * cut(images[0])).sum(1) + (grad_many * cut(images[1])).sum(1)
            for step in walk(table, band, lattice, max_elements, backward=geometry):
                g, ids = grad_few.index_select(0, step.blocks), step.ids.long()
                rows = sums.new_zeros(*ids.shape, sums.shape[1])
                rows[..., 6 : 6 + E] = (g @ step.weight.permute(1, 2, 0)).mT
                h = step.rows[..., 8:] @ g if geometry else None  # (B, S, P)
                for part in pieces(len(ids) if C else 0, max_elements // (CHUNK * max(1, C))):
                    g, gaussian = grad_many.index_select(0, step.blocks[part]), ids[part].flatten()
                    if geometry:
                        h[part].baddbmm_(features.index_select(0, gaussian).view(-1, CHUNK, C), g)
                    if many:
                        grad_features.index_add_(0, gaussian, (step.weight[:, part].transpose(0, 1) @ g.mT).flatten(0, 1))
                if geometry:
                    rows[..., :6] = moments(step, slopes(step, h, behind), basis)
                sums.index_add_(0, ids.flatten(), rows.flatten(0, 1))
        return table_gradient(table, sums) if geometry else None, sums[:, 6 : 6 + E], grad_features


def slopes(
    step: Step,
    h: Tensor,  # (B, S, P) dL/dw
    behind: Tensor,  # (blocks, P) sum of w_j h_j over this step and all behind; the step is taken off
) -> Tensor:
    """alpha_k dL/dalpha_k = w_k (h_k - sum_{j>k} w_j h_j / T_{k+1}), 0 where alpha is clamped: (S, B, P), in place of w."""
    left = behind.index_select(0, step.blocks)
    light = step.light.clamp_(min=RANGE * MIN_LIGHT)  # where a pixel has stopped, w is 0, and this must only not be 0
    for w, h in zip(step.weight, h.unbind(1)):
        left.addcmul_(w, h, value=-1)
        light.sub_(w, alpha=RANGE)
        w.mul_(h.addcdiv_(left, light, value=-RANGE))  # left / light: what the light behind k brings, on average
    behind.index_copy_(0, step.blocks, left)
    step.weight[*step.opaque] *= ~step.clamped
    return step.weight


def moments(
    step: Step,
    slope: Tensor,  # (S, B, P)
    basis: Tensor,  # (6, P) monomials
) -> Tensor:
    """Sums over a block's pixels of slope times 1, u, v, u dx, u dy, v dy: (B, S, 6). As log2 alpha = lo - u^2 - v^2 with
    u = l11 dx + l21 dy and v = l22 dy, its derivatives by the table's columns are made of them."""
    one, x, y, xx, xy, yy = (basis @ slope.flatten(0, 1).T).view(6, *slope.shape[:2])  # as seen from the block's centre
    dx, dy = step.centre[:, None] - step.columns[:2] - step.columns[2:4]  # of which this is dx, dy
    l11, l21, l22, _ = step.columns[4:]
    u, v = l11 * dx + l21 * dy, l22 * dy
    sum_u, sum_v = u * one + l11 * x + l21 * y, v * one + l22 * y
    ux, uy, vy = u * x + l11 * xx + l21 * xy, u * y + l11 * xy + l21 * yy, v * y + l22 * yy
    return torch.stack([one, sum_u, sum_v, ux + dx * sum_u, uy + dy * sum_u, vy + dy * sum_v]).permute(2, 1, 0)


def table_gradient(
    table: Tensor,  # (G, 8 + E)
    sums: Tensor,  # (G, 6 or more) `moments` over all blocks
) -> Tensor:
    """dL/d table (G, 8); the whole pixels of the mean are constants."""
    l11, l21, l22 = table.T[4:7]
    one, u, v, ux, uy, vy = math.log(2) * sums.T[:6]
    columns = [2 * l11 * u, 2 * (l21 * u + l22 * v), -2 * ux, -2 * uy, -2 * vy, one]
    return torch.nn.functional.pad(torch.stack(columns, 1), (2, 0))


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
    max_elements: int | None = None,  # by default 2^20, on a GPU 2^24
) -> Render:
    """Renders the Gaussians, any C at once, in the convention of 3DGS and gsplat; differentiable in every tensor.

    Each step, forward or backward, works on a handful of tensors that hold about max_elements numbers together with their
    copies of the features; lists are built for four times as many (Gaussian, block) pairs at a time, or one row of blocks. A
    smaller value is slower and changes nothing else. What comes on top is a few dozen numbers per Gaussian and the view itself.
    """
    G, C = len(means), features.shape[-1]
    shapes = [tuple(x.shape) for x in (means, covariances, opacities, features)]
    assert shapes == [(G, 3), (G, 3, 3), (G,), (G, C)], f"need (G, 3), (G, 3, 3), (G,), (G, C) with one G, not {shapes}"
    assert features.dtype in (torch.float32, torch.float64), f"features must be float32 or float64, not {features.dtype}"
    sizes = tuple(w2c.shape), tuple(K.shape)
    assert sizes == ((4, 4), (3, 3)), f"w2c must be (4, 4) and K (3, 3), not {sizes[0]}, {sizes[1]}"
    assert background is None or background.shape == (C,), f"background must be ({C},), one value per channel of the features"
    max_elements = max_elements or (2**24 if features.is_cuda else 2**20)
    assert height > 0 and width > 0 and max_elements > 0, "height, width and max_elements must be at least 1"
    with torch.autocast(features.device.type, enabled=False):  # in bfloat16 log2 alpha would be off by whole units
        gaussians = means, covariances, opacities
        table, z, box = Project.apply(max_elements // 32, height, width, features.dtype, w2c, K, *gaussians)
        lattice = whole_view(height, width, means.device)
        max_blocks = 8 * max_elements // (math.prod(BLOCK) * (C + 2))
        cuts, lists = plan_lists(nearest_first(z), box, lattice, height, width, 4 * max_elements, max_blocks)
        if len(cuts) == 1:  # short enough to keep for the backward pass
            band = lists(*cuts[0])
            lists = lambda top, bottom: band
        extra = torch.stack([torch.ones_like(z), z], 1).to(features)
        if C <= FEW_CHANNELS:
            extra, features = torch.cat([features, extra], 1), features[:, :0]
        few, many = Composite.apply((cuts, lists, lattice, max_elements), table, extra, features)
    few, alpha, depth = few[:height, :width].split([few.shape[2] - 2, 1, 1], -1)
    rendered = many[:height, :width] if C > FEW_CHANNELS else few
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


def area_taps(size: int, count: int) -> tuple[Tensor, Tensor]:
    """All pixels of each patch along one side, index (count, n) int64, and the shares of the patch that they fill (count, n)."""
    edge = torch.arange(count + 1, dtype=torch.float64) * size / count
    low, high = edge[:-1, None], edge[1:, None]
    index = low.floor() + torch.arange(math.ceil(size / count) + 1)
    overlap = (torch.minimum(index + 1, high) - torch.maximum(index, low)).clamp(min=0)
    some = (overlap > 1e-9).any(0)
    return index[:, some].clamp(max=size - 1).long(), (overlap / overlap.sum(1, keepdim=True))[:, some]


TAPS = {"bilinear": bilinear_taps, "area": area_taps}


def rescale(
    weight: Tensor,  # (N, taps)
    hit: Tensor,  # (N, taps) bool, which of them are valid
) -> tuple[Tensor, Tensor]:
    """What makes a token's weights that hit sum to 1 again (N,), 0 if the token is not valid; and which tokens are (N,)."""
    # Differs: the official code drops a token only where the rendered colour is exactly black, and then teaches it as zeros.
    total = (weight * hit).sum(1)
    valid = total > 0.5 - 1e-9  # at least half; the weights are rounded
    return valid / total.clamp(min=0.5), valid


def splat_to_tokens(
    features: Tensor,  # (H, W, C)
    valid: Tensor,  # (H, W) bool
    grid: tuple[int, int],  # (h, w)
    downscale: str = "bilinear",  # between the 2x2 pixels at a patch's centre, or "area", over the whole patch
) -> tuple[Tensor, Tensor]:
    """The features at the patch centres: tokens (N, C), 0 where invalid, and which are valid (N,)."""
    H, W, C = features.shape
    assert valid.shape == (H, W), f"valid must be ({H}, {W}) like the features, not {tuple(valid.shape)}"
    (y, wy), (x, wx) = (TAPS[downscale](size, count) for size, count in zip((H, W), grid))
    index = (y[:, None, :, None] * W + x[None, :, None, :]).flatten(0, 1).flatten(1).to(valid.device)  # (N, taps)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(0, 1).flatten(1).to(valid.device)
    hit = valid.flatten()[index]
    scale, token_valid = rescale(weight, hit)
    weight = (weight * hit * scale[:, None]).to(features.dtype)
    taps = features.reshape(-1, C)[index].where(hit[..., None], 0.0)  # holes may hold anything, NaN too
    return torch.einsum("nk,nkc->nc", weight, taps), token_valid


def write_whole(path: str | Path, content: bytes) -> None:
    """Written under another name, flushed, and renamed: a killed run leaves the old file or the new, nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # still there where the disk was full


# --------------------------------------------------------------------------------------------------------- the splat operator
# While geometry and masks stand still, everything from the context tokens x (V*N, C) to the target's is linear. A Gaussian has
# f_g = sum_t u_gt x_t with four weights u (SnD Eq. 2-3), a pixel F(p) = sum_g w_pg f_g / alpha(p) = sum_t A_pt x_t with
#     A_pt = sum_g w_pg u_gt / alpha(p),
# and a token is sum_p b_np F(p) over its valid taps p: only these pixels (2x2 of them) are rasterised, and their weights pushed on to x.
# Blending (Eq. 4, a_p = alpha, but 1 where p is unlabelled) needs means over whole masks m. They stay factored out, L (M x):
#     y = S x + L (M x),   S_nt = sum_p b_np a_p A_pt,   L_nm = sum_{p in m} b_np (1 - a_p),   M_mt = mean_{valid p in m} A_pt.

OPERATOR_FORMAT = "splat operator 1"  # to be raised with every change of the file's layout or of what the weights mean


class SplatOperator(NamedTuple):
    """y = operator(x) takes context tokens (V*N, C) to target tokens (N, C), for any C; 0 where not valid."""

    S: Tensor  # (N, V*N) sparse, like the next two
    L: Tensor  # (N, masks)
    M: Tensor  # (masks, V*N)
    valid: Tensor  # (N,) bool

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(self.S.dtype)
            return self.S @ x + self.L @ (self.M @ x)

    def to(self, device) -> "SplatOperator":
        return SplatOperator(*(x.to(device) for x in self))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """A safetensors file of 4 bytes a weight: float16 moves tokens by 1e-4 of their length, bfloat16 training by 2e-3."""
        stored = {"valid": self.valid}
        for name, matrix in zip("SLM", self):
            row, column = matrix.indices()
            stored[name + ".count"] = row.bincount(minlength=matrix.shape[0]).int()  # weights in each row
            stored[name + ".column"] = column.to(torch.uint16 if matrix.shape[1] <= 2**16 else torch.int32)
            stored[name + ".weight"] = matrix.values().to(dtype)
        content = save({name: x.cpu().contiguous() for name, x in stored.items()},
                       {"format": OPERATOR_FORMAT, "tokens": str(self.S.shape[1])})  # fmt: skip
        write_whole(path, content)

    @staticmethod
    def load(path: str | Path) -> "SplatOperator":
        """On the CPU, in float32 (or float64 if stored so). ValueError where it is damaged or not of this format."""
        try:
            with safe_open(path, "pt") as file:
                about, stored = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); remove it, it can be computed again") from None
        if about.get("format") != OPERATOR_FORMAT:
            found = f"{about.get('format')!r} where {OPERATOR_FORMAT!r} is read"
            raise ValueError(f"{path}: {found}; remove it, it can be computed again")
        tokens, masks, matrices = int(about["tokens"]), len(stored["M.count"]), []
        for name, columns in zip("SLM", (tokens, masks, tokens)):
            count, column, weight = (stored[f"{name}.{part}"] for part in ("count", "column", "weight"))
            weight = weight if weight.dtype == torch.float64 else weight.float()
            matrices.append(sparse(torch.repeat_interleave(count.long()), column.long(), weight, (len(count), columns)))
        return SplatOperator(*matrices, stored["valid"])


def sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([row, column]), value, shape, check_invariants=False).coalesce()


def at_lattice(image: Tensor, lattice: Lattice) -> Tensor:
    """An image (H, W) at the pixels of each block (blocks, P), 0 beyond the view."""
    y, x = (start[:, None] + torch.arange(n, device=image.device) for start, n in zip(lattice[:2], lattice.shape))
    image = torch.nn.functional.pad(image, (0, lattice.shape[1], 0, lattice.shape[0]))
    return image[y[:, None, :, None], x[None, :, None, :]].flatten(0, 1).flatten(1)


def sums_by_row(
    share: Tensor,  # (blocks, P)
    row: Tensor,  # (blocks, P) int64
) -> tuple[Tensor, Tensor]:
    """Which rows the pixels of each block add to (blocks, R), and the matrices (blocks, R, P) that sum share_p over each."""
    ordered, place = row.sort(1)
    nth = torch.empty_like(row).scatter_(1, place, (ordered.diff(dim=1, prepend=ordered[:, :1]) != 0).cumsum(1))
    each = torch.arange(int(nth.max()) + 1, device=row.device)
    rows = row[:, :1].repeat(1, len(each)).scatter_(1, nth, row)  # a block with fewer has its first again, with sums of nothing
    return rows, share[:, None] * (nth[:, None] == each[:, None])


def push_to_tokens(
    projected: tuple[Tensor, Tensor, Tensor],  # table, order, box
    view: tuple[int, int],  # height, width
    lift: tuple[Tensor, Tensor, int],  # index, weight, tokens
    max_elements: int,
    lattice: Lattice,
    share: Tensor,  # (blocks, P)
    row: Tensor,  # (blocks, P) int64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each row the sums of share_p A_pt over its valid pixels p, as row, column, value; and which are valid (blocks, P)."""
    (table, order, box), (index, weight, tokens), P = projected, lift, share.shape[1]
    cuts, lists = plan_lists(order, box, lattice, *view, 32 * max_elements // P, 16 * max_elements // max(1, tokens))
    covered, found = torch.empty_like(share, dtype=torch.bool), []
    for top, bottom in cuts:
        band, of_band = lists(top, bottom), slice(top * len(lattice.x), bottom * len(lattice.x))
        alpha, steps = torch.zeros_like(share[of_band]), []
        for step in walk(table, band, lattice, max_elements):
            alpha.index_add_(0, step.blocks, step.weight.sum(0))
            steps.append((step.blocks, step.ids, step.weight.clone()))  # alpha is known only at the end, hence kept
        covered[of_band] = alpha >= COVERED
        rows, sums = sums_by_row(torch.where(covered[of_band], share[of_band] / alpha, 0.0), row[of_band])
        rows, local = rows.unique(return_inverse=True)
        total = table.new_zeros(len(rows), tokens)
        for at, ids, w in steps:
            c = sums.index_select(0, at) @ w.permute(1, 2, 0)  # (B, R, S)
            b, r, k = c.nonzero().T
            g = ids[b, k]
            cell = local[at[b], r, None] * tokens + index.index_select(0, g)  # (pairs, 4)
            total.view(-1).index_add_(0, cell.flatten(), (c[b, r, k, None] * weight.index_select(0, g)).flatten())
        at, column = total.nonzero().T
        found.append((rows[at], column, total[at, column]))
    return *(torch.cat(x) for x in zip(*found)), covered


@torch.no_grad()
def splat_operator(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,) in [0, 1]
    index: Tensor,  # (G, 4) int64, the context tokens that each Gaussian's feature is made of
    weight: Tensor,  # (G, 4) their weights u; its type, float32 or float64, is that of the compositing and of the operator
    tokens: int,  # V*N, how many context tokens there are
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
    grid: tuple[int, int],  # (h, w) of the target
    mask: Tensor | None = None,  # (H, W) int64 instance ids of the target, 0 = unlabelled; None: no blending
    alpha: float = 0.5,
    downscale: str = "bilinear",  # or "area"
    max_elements: int | None = None,  # by default 2^20, on a GPU 2^24; 32 times as many weights are kept at a time
) -> SplatOperator:
    """What `rasterize`, division by alpha, `semantic_blend` where alpha >= COVERED and `splat_to_tokens` make of the tokens."""
    G, N, max_elements = len(means), math.prod(grid), max_elements or (2**24 if weight.is_cuda else 2**20)
    shapes = tuple(index.shape), tuple(weight.shape)
    assert shapes == ((G, 4), (G, 4)), f"index and weight must be ({G}, 4), not {shapes[0]}, {shapes[1]}"
    assert weight.dtype in (torch.float32, torch.float64), f"weight must be float32 or float64, not {weight.dtype}"
    assert mask is None or mask.shape == (height, width), f"mask must be ({height}, {width}), not {tuple(mask.shape)}"
    mask = index.new_zeros(height, width) if mask is None or alpha == 1 else mask
    ids, mask = mask.unique(return_inverse=True)  # numbered 0, 1, ...
    labelled, device = (ids != 0).to(weight), weight.device
    (y, wy), (x, wx) = ([part.to(device) for part in TAPS[downscale](*side)] for side in zip((height, width), grid))
    tap = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(0, 1).flatten(1)  # (N, taps)
    read = Lattice(*(i[:, 0].contiguous() for i in (y, x)), (y.shape[1], x.shape[1]))  # all pixels that a token needs
    token, number = torch.arange(N, device=device)[:, None].expand(tap.shape), at_lattice(mask, read)
    mixed = (1 - alpha) * labelled[number]  # 1 - a_p
    with torch.autocast(device.type, enabled=False):  # in bfloat16 log2 alpha would be off by whole units
        table, z, box = Project.apply(max_elements // 32, height, width, weight.dtype, w2c, K, means, covariances, opacities)
        projected = table, nearest_first(z), box
        push = partial(push_to_tokens, projected, (height, width), (index, weight, tokens), max_elements)
        row, column, value, covered = push(read, (tap * (1 - mixed)).to(weight), token)
        scale, valid = rescale(tap, covered)
        S = row, column, value * scale[row].to(weight)
        L = (mixed * scale[:, None] * covered * tap).to(weight)
        L, M = [x[L != 0] for x in (token, number, L)], (row[:0], row[:0], value[:0])
        if len(L[0]):
            whole = whole_view(height, width, device)
            share, of = at_lattice(labelled[mask], whole), at_lattice(mask, whole)
            row, column, value, covered = push(whole, share, of)
            M = row, column, value / of.flatten().bincount((share * covered).flatten(), len(ids))[row]
    sizes = (N, tokens), (N, len(ids)), (len(ids), tokens)
    return SplatOperator(*(sparse(*matrix, size) for matrix, size in zip((S, L, M), sizes)), valid)


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
    write_whole(path, "\n".join(header).encode() + table.astype("<f4").tobytes())


def read_vertices(path: Path) -> np.ndarray:
    """The vertex element of a binary .ply file as a structured array; ValueError where it is none of ours."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
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


# ------------------------------------------------------------------------------------- two views, their geometry, a third view


def companions():
    """01_data and 02_lift, imported late: all above can be copied without them."""
    return importlib.import_module("01_data"), importlib.import_module("02_lift")


class Triplet(NamedTuple):
    """Context, context, target, stacked in this order, in units of the nearest depth: the near plane suits any scene then."""

    name: str
    images: Tensor  # (3, 3, H, W) in [0, 1]
    masks: Tensor | None  # (3, H, W) int64, where asked for
    depth: Tensor | None  # (3, H, W) measured z-depth, 0 = unknown; None unless all three views have it
    K: Tensor  # (3, 3, 3) pixels
    c2w: Tensor  # (3, 4, 4)
    far: float  # the nearest depth is 1


def name_of(scene, indices) -> str:
    a, b, target = (scene.frames[i].name for i in indices)
    return f"{scene.name}: {a} + {b} -> {target}"


def load_triplet(
    scene,  # of 01_data
    indices,  # (context_a, context_b, target)
    size: tuple[int, int],  # (H, W)
    device,
    masks: str | None = None,  # "files", with superpixels where there are none, or "superpixels"; None: without
    near: float | None = None,  # in the scene's unit; None: as the scene has them
    far: float | None = None,
) -> Triplet:
    data, _ = companions()
    views = [scene.view(i, size) for i in indices]
    near, far = (taken if given is None else given for given, taken in zip((near, far), scene.depth_range))
    if not 0 < near < far:
        raise ValueError(f"{scene.name}: depths from {near:g} to {far:g} make no range; give --near and --far in the scene's unit")
    stack = lambda tensors: torch.stack(tensors).to(device)
    images, K, c2w = (stack([getattr(v, key) for v in views]) for key in ("image", "K", "c2w"))
    c2w[:, :3, 3] /= near
    depth = None if any(v.depth is None for v in views) else stack([v.depth for v in views]) / near
    views = [v._replace(mask=None) for v in views] if masks == "superpixels" else views
    return Triplet(name_of(scene, indices), images, stack([data.regions(v) for v in views]) if masks else None, depth, K, c2w, far / near)


def reconstruct(geometry: str, s: Triplet, net=None):
    """Two views -> one Gaussian a pixel (SnD Eq. 1) and their colours (G, 3). `mvsplat` is learned, the MVSplat `net`, and has colours
    of its own, as the target's camera sees them; `sweep` is stereo by hand, `depth` as measured, both with the pixels' colours."""
    _, lift = companions()
    context = s.images[:2], s.K[:2], s.c2w[:2]
    if geometry == "mvsplat":
        gaussians = lift.mvsplat_gaussians(net, *context, 1.0, s.far, harmonics=True)
        return gaussians, lift.view_colours(gaussians, s.c2w[2, :3, 3])
    colours = s.images[:2].permute(0, 2, 3, 1).reshape(-1, 3)
    if geometry == "sweep":
        return lift.sweep_gaussians(*context, 1.0, s.far), colours
    return lift.depth_gaussians(s.depth[:2], *context[1:]), colours


def render_target(gaussians, features: Tensor, s: Triplet) -> Render:  # features (G, C)
    camera = torch.linalg.inv(s.c2w[2]), s.K[2], *s.images.shape[-2:]
    return rasterize(gaussians.means, gaussians.covariances, gaussians.opacities, features, *camera)


# ---------------------------------------------------------------------------------------- fine-tuning MVSplat (SnD Appendix A.3)


def covisible(depth: Tensor, K: Tensor, c2w: Tensor, target=2) -> Tensor:
    """(H, W) bool: the pixels of view `target` that view 0 or 1 sees too, from depth (V, H, W), K (V, 3, 3), c2w (V, 4, 4)."""
    _, lift = companions()
    w2c = torch.linalg.inv(c2w)
    checks = [lift.cross_check(depth[target], depth[v], K[target], K[v], w2c[v] @ c2w[target]) for v in (0, 1) if v != target]
    return (torch.stack(checks).amax(0) > 0.5) & (depth[target] > 0)


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:  # (3, H, W) twice -> 1 - SSIM over 7x7 windows, (3, H, W)
    _, lift = companions()
    mean_a, mean_b, square_a, square_b, product = (lift.box_mean(x, 7) for x in (a, b, a * a, b * b, a * b))
    variance_a, variance_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    return 1 - ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)))  # fmt: skip


def photometric(image: Tensor, truth: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and 1 - SSIM of (3, H, W) pictures over the pixels `where` (H, W) bool."""
    return (image - truth).square().mean(0)[where].mean(), dissimilarity(image, truth).mean(0)[where].mean()


def log_depth_error(gaussians, depth: Tensor, c2w: Tensor) -> Tensor:
    """Mean |log z - log depth| of one-a-pixel Gaussians in their own views, where depth (V, H, W) is known; c2w (V, 4, 4)."""
    z = companions()[1].view_depth(gaussians, c2w, *depth.shape[1:])
    return (z.clamp_min(1e-3).log() - depth.clamp_min(1e-3).log()).abs()[depth > 0].mean()


def judged_pixels(s: Triplet) -> Tensor:
    """(H, W) bool, where a novel view is compared with the truth: what a context sees too, as far as depth can tell. Without
    depth it is the whole view on black, as MVSplat is trained: leaving out what no Gaussian covers would reward holes."""
    everywhere = torch.ones_like(s.images[2, 0], dtype=torch.bool)
    seen = everywhere if s.depth is None else covisible(s.depth, s.K, s.c2w)
    return seen if seen.any() else everywhere


def geometry_loss(net, s: Triplet, depth_weight: float) -> tuple[Tensor, dict]:
    """MVSplat's loss of the splatted target view, and its parts by name."""
    with torch.autocast(s.images.device.type, torch.bfloat16):  # the network; its cameras and the rasteriser stay in fp32
        gaussians, colours = reconstruct("mvsplat", s, net)
    image = render_target(gaussians, colours, s).features.permute(2, 0, 1)  # not divided by alpha, or transparency were free
    mse, structure = photometric(image, s.images[2], judged_pixels(s))
    parts, loss = dict(mse=mse, structure=structure), mse + 0.05 * structure  # Differs: 1 - SSIM in the place of LPIPS
    if depth_weight and s.depth is not None and (s.depth[:2] > 0).any():
        parts["depth"] = log_depth_error(gaussians, s.depth[:2], s.c2w[:2])  # Differs: MVSplat never sees depth
        loss = loss + depth_weight * parts["depth"]
    return loss, {name: part.item() for name, part in parts.items()}


@torch.no_grad()
def judge(geometry: str, s: Triplet, net=None):
    """-> novel view (3, H, W), its depth (H, W), {"PSNR", "SSIM", "covered": where judged, "AbsRel": of the contexts' depth}."""
    gaussians, colours = reconstruct(geometry, s, net)
    render = render_target(gaussians, colours, s)
    covered, where = render.alpha >= 0.5, judged_pixels(s)
    image = (render.features / render.alpha.clamp(min=1e-6)[..., None]).permute(2, 0, 1) * covered
    mse, structure = photometric(image, s.images[2], where)
    scores = {"PSNR": -10 * mse.clamp(min=1e-10).log10().item(), "SSIM": 1 - structure.item()}
    scores["covered"] = covered[where].float().mean().item()
    if s.depth is not None and (known := s.depth[:2] > 0).any():
        z = companions()[1].view_depth(gaussians, s.c2w[:2], *covered.shape)
        scores["AbsRel"] = ((z - s.depth[:2]).abs() / s.depth[:2])[known].mean().item()
    return image, render.depth * covered, scores


def mean_scores(scores: list[dict]) -> dict:  # of each name over those that have it
    columns = {name: [s[name] for s in scores if name in s] for name in ("PSNR", "SSIM", "covered", "AbsRel")}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def has_triplet(scene, target=None) -> bool:
    data, _ = companions()
    try:
        return bool(data.sample_triplet(scene, torch.Generator().manual_seed(0), None if target is None else [target]))
    except data.DataError:
        return False


def hold_out(scenes, count: int, seed: int, whole=None):
    """-> training scenes, [(scene, triplet)] held out: `val` scenes, or of a single scene every eighth view, as a target.

    `whole`: the scenes as they were read, where `scenes` lacks some of them or some views: what is held out does not depend on
    what can be used, so that whatever looks at the same folder (05_probe.py) holds out the same.
    """
    data, _ = companions()
    whole = whole or scenes
    usable = [scene for scene in scenes if has_triplet(scene)]
    for scene in scenes:
        if scene not in usable:
            print(f"{scene.name}: left out, no three views overlap with a usable baseline")
    if not usable:
        raise data.DataError(f"{scenes[0].name}: no three views overlap with a usable baseline; add views in between")
    hidden = {scene.name for scene in data.split(whole, "val")}
    train, places = ([scene for scene in usable if (scene.name in hidden) == part] for part in (False, True))
    places = [(scene, None) for scene in places]
    if len(usable) == 1 and not places:
        (scene,), (as_read,) = usable, [s for s in whole if s.name == usable[0].name]
        hidden = {as_read.frames[i].name for i in data.held_out_views(as_read)}
        parts = [[i for i, frame in enumerate(scene.frames) if (frame.name in hidden) == part] for part in (False, True)]
        train, places = [scene.subset(parts[0])], [(scene, [i for i in parts[1] if has_triplet(scene, i)])]
        if len(parts[0]) < 3 or not has_triplet(train[0]) or not places[0][1]:
            train = []
    if not train or not places:
        print(f"{usable[0].name}: too few views to hold any out, so what is measured below are training views")
        train, places = usable, [(scene, None) for scene in usable]
    generator, found = torch.Generator().manual_seed(1000 + seed), []
    for n in range(4 * count):  # distinct triplets, fewer than `count` where the scenes have no more
        scene, targets = places[n % len(places)]
        triplet = data.sample_triplet(scene, generator, targets)
        if (scene, triplet) not in found and len(found) < count:
            found.append((scene, triplet))
    return train, found


def save_checkpoint(folder, step, settings, networks, optimiser, generator=None):
    """All that a run needs to go on exactly; networks is {name: (module, names of its trained parameters)}. The one before is kept."""
    tensors = {f"{who}.{name}": p for who, (network, names) in networks.items()
               for name, p in network.named_parameters() if name in names}  # fmt: skip
    for i, state in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser.{i}.{key}": value for key, value in state.items()})
    if generator:
        tensors["generator"] = generator.get_state()
    path, previous = checkpoint_paths(folder)
    aside = path.with_name("checkpoint.new.safetensors")
    companions()[1].save_tensors(aside, tensors, {"step": str(step), "settings": json.dumps(settings)})
    if path.exists():
        os.replace(path, previous)
    os.replace(aside, path)  # killed before this line, the run goes on from the previous one


def checkpoint_paths(folder) -> tuple[Path, Path]:
    return Path(folder) / "checkpoint.safetensors", Path(folder) / "checkpoint.previous.safetensors"


def read_run(path):  # -> step, settings, tensors
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        return int(meta["step"]), json.loads(meta["settings"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a whole checkpoint of this stage; remove it to start again") from None


@torch.no_grad()
def restore(tensors, networks, optimiser, generator=None):
    for who, (network, names) in networks.items():
        for name, p in network.named_parameters():
            if name in names:
                p.copy_(tensors[f"{who}.{name}"])
    state = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    if generator:
        generator.set_state(tensors["generator"])


def run_settings(args):  # what must not change between a run and its continuation
    free = ("out", "device", "resume", "save_minutes", "heldout", "eval_every", "operators", "grad_checkpoint", "because", "no_blend")
    return {k: v for k, v in vars(args).items() if k not in free}


def find_checkpoint(args):
    """-> (step, tensors) to go on from, or (0, None). Refuses, in one line, to lose a run that is not finished."""
    found = [path for path in checkpoint_paths(args.out) if path.exists()]
    if not found:
        return 0, None
    try:
        (step, old, tensors), path = read_run(found[0]), found[0]
    except ValueError as error:
        if len(found) == 1 or not args.resume:
            raise
        (step, old, tensors), path = read_run(found[1]), found[1]
        print(f"{error}; going on from {path}")
    if not args.resume and step < old["max_steps"]:
        raise ValueError(f"{path}: a run stopped here at step {step} of {old['max_steps']}; --resume goes on, "
                         "another --out starts afresh, or remove the file")  # fmt: skip
    changed = [f"{k} {old.get(k)} -> {v}" for k, v in run_settings(args).items() if old.get(k) != v]
    if args.resume and changed:
        raise ValueError(f"{path}: was made with other settings ({', '.join(changed)}); use the old ones or another --out")
    return (step, tensors) if args.resume else (0, None)


def open_log(out, args, start):
    """The run's log.jsonl, with the lines before step `start` kept; the settings are written beside it."""
    lines, path = [], out / "log.jsonl"
    for line in path.read_text().splitlines() if start and path.exists() else []:
        try:
            lines += [line] if json.loads(line)["step"] < start else []
        except ValueError:
            pass  # the line that was being written when the power went
    replaced = [] if start else checkpoint_paths(out)  # those of a finished run
    for file in (*replaced, *out.glob(".checkpoint.*")):  # and what a kill has left half written
        file.unlink(missing_ok=True)
    write_whole(path, "".join(line + "\n" for line in lines).encode())
    write_whole(out / "settings.json", json.dumps(vars(args), indent=1).encode())
    return open(path, "a")


class Stop:
    """`with Stop() as stop:` SIGINT and SIGTERM set stop.asked, so that a step can end and be saved; a second SIGINT does not wait."""

    def __enter__(self):
        self.asked, self.before = False, {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def finetune(args):
    """Adapts MVSplat to the scenes by splatting third views, no depth needed (SnD A.3: 40,000 steps on ScanNet++)."""
    data, lift = companions()
    out, net = Path(args.out), lift.load_mvsplat(args.mvsplat).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    begin, stored = find_checkpoint(args)
    scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
    if args.depth_weight and not any(frame.depth for scene in scenes for frame in scene.frames):
        raise data.DataError(f"{args.scene_dir}: no measured depth for --depth_weight; leave it at 0")
    sizes = {scene.name: data.fit_size(scene, args.pixels, 16) for scene in scenes}  # a subset keeps its scene's name
    load = lambda scene, triplet: load_triplet(scene, triplet, sizes[scene.name], args.device)
    scenes, heldout = hold_out(scenes, args.heldout, args.seed)
    heldout = [load(*place) for place in tqdm(heldout, desc="held-out triplets", leave=False)]
    start = [judge("mvsplat", s, net)[2] for s in tqdm(heldout, desc="before", leave=False)]
    optimiser = torch.optim.Adam(net.parameters(), args.lr)
    networks = {"mvsplat": (net, dict(net.named_parameters()))}
    if stored:
        restore(stored, networks, optimiser, generator)
        print(f"resumed at step {begin} of {args.max_steps}")
    bar = tqdm(range(begin, args.max_steps), initial=begin, total=args.max_steps, desc="fine-tune", unit="step")
    clock = saved = time.monotonic()
    with open_log(out, args, begin) as log, Stop() as stop:
        for step in bar:
            optimiser.zero_grad(set_to_none=True)
            for _ in range(args.batch):
                scene = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
                s = load(scene, data.sample_triplet(scene, generator))
                loss, parts = geometry_loss(net, s, args.depth_weight)
                (loss / args.batch).backward()
            # Of the optimiser SnD says the number of steps and no more: Adam, short warm-up and cosine below, gradients cut in length.
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            if not norm.isfinite():
                raise ValueError(f"step {step}: the gradient is {norm.item()} for {s.name}; "
                                 "start again with a lower --lr and another --out")  # fmt: skip
            decay = 0.5 * (1 + math.cos(math.pi * step / args.max_steps))
            optimiser.param_groups[0]["lr"] = args.lr * min(decay, 20 * (step + 1) / args.max_steps)
            optimiser.step()
            parts = {"loss": loss.item(), **parts}
            bar.set_postfix({name: f"{value:.4f}" for name, value in parts.items()})
            line = dict(step=step, triplet=s.name, **parts, lr=optimiser.param_groups[0]["lr"])
            log.write(json.dumps({**line, "seconds": round(time.monotonic() - clock, 2)}) + "\n")
            if stop.asked or step + 1 == args.max_steps or time.monotonic() - saved >= 60 * args.save_minutes:
                log.flush()
                save_checkpoint(out, step + 1, run_settings(args), networks, optimiser, generator)
                saved = time.monotonic()
            if stop.asked and step + 1 < args.max_steps:
                raise KeyboardInterrupt
    report(net, start, heldout, args)


def report(net, start: list[dict], heldout: list[Triplet], args):
    """Saves the network; prints the answer beside its baselines, and where everything is."""
    data, lift = companions()
    out, judged = Path(args.out), {"start": start}
    lift.save_tensors(out / "mvsplat.safetensors", net.state_dict())
    ours = [judge("mvsplat", s, net) for s in tqdm(heldout, desc="after", leave=False)]
    judged["fine-tuned"] = [scores for *_, scores in ours]
    judged["sweep"] = [judge("sweep", s)[2] for s in heldout]
    judged["depth"] = [judge("depth", s)[2] for s in heldout if s.depth is not None]
    table = {name: mean_scores(scores) for name, scores in judged.items() if scores}
    coloured = lambda z, s: data.colour_depth(z.cpu(), (z if s.depth is None else s.depth[2]).cpu())
    rows = [[*s.images, image, 2 * (image - s.images[2]).abs(), coloured(z, s)] for s, (image, z, _) in zip(heldout[:6], ours)]
    headings = ["context", "context", "target", "render", "error x 2", "depth"]
    picture = data.picture_grid(out / "finetune.png", headings, rows)
    write_whole(out / "result.json", json.dumps({**table, "heldout": [s.name for s in heldout]}, indent=1).encode())
    where = "whole views" if all(s.depth is None for s in heldout) else "where a context sees it too"
    print(f"{len(heldout)} held-out triplets, {where}")
    for name, scores in table.items():
        print(f"  {name:<10} " + ", ".join(f"{key} {value:.{2 if key == 'PSNR' else 3}f}" for key, value in scores.items()))
    print(f"  ->  {picture}, {out / 'mvsplat.safetensors'} (for --mvsplat)")


# ------------------------------------------------------------------------------------------------------------ a flight, animated


def between(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Camera poses (count, 4, 4) from c2w `a` to `b` (4, 4) and back, slow at both ends, so that the film can loop."""
    t = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(count) / count)[:, None]
    q, p = rotation_to_quaternion(torch.stack([a, b])[:, :3, :3].double().cpu().numpy())
    q = (1 - t.double().numpy()) * q + t.double().numpy() * (p if q @ p > 0 else -p)  # p and -p are one rotation
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, :3, :3] = torch.from_numpy(quaternion_to_rotation(q))
    poses[:, :3, 3] = (1 - t) * a[:3, 3].cpu() + t * b[:3, 3].cpu()
    return poses


def looking(forward: Tensor, up: Tensor) -> Tensor:
    """Of a camera that looks along `forward` (..., 3), unit, its axes in the world as columns (..., 3, 3): right, down, forward."""
    right = normalize(torch.linalg.cross(forward, up.expand_as(forward)), dim=-1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], -1)


def orbit(means: Tensor, count: int) -> Tensor:
    """Camera poses (count, 4, 4) once around the median of `means` (G, 3). Files of Gaussians do not say what is up: -y (as from
    COLMAP) or z is taken, along whichever they spread less."""
    centre = means.median(0).values
    offset = (means - centre).abs()  # medians: far floaters do not matter
    up = means.new_tensor([0, -1, 0] if offset[:, 1].median() < offset[:, 2].median() else [0, 0, 1])
    x = means.new_tensor([1, 0, 0])
    angle = 2 * math.pi * torch.arange(count).to(means)[:, None] / count
    forward = -normalize(angle.cos() * x + angle.sin() * torch.linalg.cross(up, x) + 0.4 * up)
    poses = torch.eye(4).to(means).repeat(count, 1, 1)
    poses[:, :3, :3] = looking(forward, up)
    poses[:, :3, 3] = centre - 2.5 * (means - centre).norm(dim=1).median() * forward
    return poses


@torch.no_grad()
def film(path: Path, gaussians, colours: Tensor, poses: Tensor, K: Tensor, height: int, width: int) -> Path:
    """Colours beside depth along `poses` (n, 4, 4), K (3, 3), as an animated picture: WebP or GIF, as `path` ends."""
    from PIL import Image

    data, lift = companions()
    arguments = gaussians.means, gaussians.covariances, gaussians.opacities, colours
    renders = [rasterize(*arguments, torch.linalg.inv(pose), K, height, width) for pose in tqdm(poses, desc="flight", leave=False)]
    depths = torch.stack([(r.depth * (r.alpha >= 0.5)).cpu() for r in renders])
    frames, zoom = [], max(1, round(320 / width))  # enlarged only now: closer up, one Gaussian a pixel is a grid of dots
    for render, depth in zip(renders, depths):
        pair = [render.features.permute(2, 0, 1).cpu(), data.colour_depth(depth, depths[:: 1 + len(depths) // 8, ::4, ::4])]
        pixels = (torch.cat(pair, 2).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
        frames.append(Image.fromarray(pixels).resize((2 * zoom * width, zoom * height), Image.BICUBIC))
    buffer = io.BytesIO()
    frames[0].save(buffer, path.suffix[1:], save_all=True, append_images=frames[1:], duration=80, loop=0, quality=80)
    write_whole(path, buffer.getvalue())
    return path


def fly(args):
    """Between the two contexts of a held-out triplet, or around the Gaussians of a .ply file."""
    data, lift = companions()
    path = Path(args.out) / "flight.webp"
    if args.ply:
        g, (height, width) = PlyGaussians(*(x.to(args.device) for x in load_ply(args.ply))), (240, 320)
        if not len(g.means):
            raise ValueError(f"{args.ply}: holds no Gaussians")
        K = g.means.new_tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]])
        return film(path, g, g.colours, orbit(g.means, 48), K, height, width)
    scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
    scene = (data.split(scenes, "val") or scenes)[0]
    triplet = data.sample_triplet(scene, torch.Generator().manual_seed(args.seed))
    s = load_triplet(scene, triplet, data.fit_size(scene, args.pixels, 16), args.device)
    if args.geometry == "depth" and s.depth is None:
        raise ValueError(f"{scene.name}: no measured depth for --geometry depth; use mvsplat or sweep")
    gaussians, colours = reconstruct(args.geometry or "mvsplat", s, lift.load_mvsplat(args.mvsplat).to(args.device))
    return film(path, gaussians, colours, between(*s.c2w[:2], 48).to(args.device), s.K[2], *s.images.shape[-2:])


# ----------------------------------------------------------------------------------------------------------------------- main


@torch.no_grad()
def novel_view(scene, triplet, vit, net, pixels: int, device: str):
    """One row of the picture, and the PSNR of the target view by geometry, on the pixels that all of them cover."""
    data, lift = companions()
    size = data.fit_size(scene, pixels, vit.patch)
    s, (a, b, target) = load_triplet(scene, triplet, size, device), (scene.view(i, size) for i in triplet)
    truth, grid = s.images[2].permute(1, 2, 0), tuple(side // vit.patch for side in size)
    tokens, masks = vit(s.images[:2]).patches, [data.regions(v).to(device) for v in (a, b)]
    features = torch.cat([lift.mask_aware_upscale(t, m, grid).flatten(0, 1) for t, m in zip(tokens, masks)])
    payload = torch.cat([s.images[:2].permute(0, 2, 3, 1).reshape(-1, 3), features], 1)  # colours and features in one pass
    views, alphas = {}, {}
    for name in ("mvsplat", "sweep", "depth")[: 3 if s.depth is not None else 2]:
        render = render_target(reconstruct(name, s, net)[0], payload, s)
        views[name], alphas[name] = render.features / render.alpha.clamp(min=1e-6)[..., None], render.alpha >= 0.5
    seen = alphas["mvsplat"]
    covered = torch.stack(list(alphas.values())).all(0)
    if not covered.any():
        raise ValueError(f"{scene.name}: the splatted views cover nothing of the target; depth range taken: {scene.depth_range}")
    psnr = lambda guess: -10 * (guess - truth)[covered].square().mean().log10().item()
    scores = {name: psnr(view[..., :3]) for name, view in views.items()} | {"mean colour": psnr(truth[covered].mean(0))}
    rendered = views["mvsplat"][..., 3:]
    blended = semantic_blend(rendered, data.regions(target).to(device), valid=seen)  # SnD Eq. 4
    basis = lift.pca_basis(rendered[seen])
    colours = [views[name][..., :3].permute(2, 0, 1) * alphas[name] for name in views] + [None] * (3 - len(views))
    return [*s.images, *colours, *(lift.pca_colours(f, basis) * seen for f in (rendered, blended))], scores


def show(args):
    """Four held-out triplets splatted with every geometry, as a picture."""
    data, lift = companions()
    vit, net = lift.load_vit(args.model).to(args.device), lift.load_mvsplat(args.mvsplat).to(args.device)
    scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
    scenes, rows, scores = (data.split(scenes, "val") or scenes)[:4], [], []
    for n in range(4):
        scene = scenes[n % len(scenes)]
        triplet = data.sample_triplet(scene, torch.Generator().manual_seed(args.seed + n))
        row, score = novel_view(scene, triplet, vit, net, args.pixels, args.device)
        rows, scores = rows + [row], scores + [score]
    headings = ["context", "context", "target view", "by mvsplat", "by sweep", "by measured depth", "features (PCA)", "blended"]
    path = data.picture_grid(Path(args.out) / "novel_view.png", headings, rows)
    mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0] if all(name in s for s in scores)}
    baseline = mean.pop("mean colour")
    answer = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
    print(f"psnr where all cover the target: {answer} (mean colour {baseline:.1f})  ->  {path}")


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(description="Splat two views into a third: a picture of held-out triplets. With --geometry "
                                     "mvsplat: fine-tune the geometry. With --flight or --ply: an animated picture.")  # fmt: skip
    parser.add_argument("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    parser.add_argument("--out", default="out/03_splat")
    parser.add_argument("--model", default="tiny", help="ViT weights: 'tiny', a published name, a file or folder")
    parser.add_argument("--mvsplat", default="tiny", help="MVSplat weights, or what to start from: 'tiny', re10k.ckpt, own")
    parser.add_argument("--geometry", choices=("mvsplat", "sweep", "depth"), help="fine-tune it; with --flight, whose Gaussians")
    parser.add_argument("--flight", action="store_true", help="fly between two views of a held-out scene, as an animated picture")
    parser.add_argument("--ply", help="a .ply file of Gaussians to fly around")
    parser.add_argument("--pixels", type=positive, default=96 * 128, help="pixels a view; lower it when memory runs out")
    parser.add_argument("--max_steps", type=positive, default=300, help="of fine-tuning; 40000 in the paper")
    parser.add_argument("--batch", type=positive, default=1, help="triplets a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate, cosine to 0; halve it when the loss jumps")
    parser.add_argument("--depth_weight", type=float, default=0.0, help="of the log depth error, where depth is measured; try 0.05")
    parser.add_argument("--heldout", type=positive, default=24, help="held-out triplets that are measured before and after")
    parser.add_argument("--save_minutes", type=float, default=2.0, help="between checkpoints; 0 writes one after each step")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.geometry in ("sweep", "depth") and not args.flight:
        parser.error(f"--geometry {args.geometry} has nothing to fine-tune; it goes with --flight")
    return args


def main(argv=None):
    args = parse(argv)
    with companions()[0].explained(args, f"`--resume --out {args.out}` goes on from the last checkpoint"):
        if args.flight or args.ply:
            print(f"a flight  ->  {fly(args)}")
        else:
            finetune(args) if args.geometry else show(args)


if __name__ == "__main__":
    main()
