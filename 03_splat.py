"""Splats Gaussians with any number of channels into a new view, blends the result by masks and brings it to a patch grid.

Paper  Splat and Distill Sec. 3.4 (Eq. 4, semantic blending), 3D Gaussian Splatting (tiles, alpha compositing), EWA splatting.
In     Gaussians in the world frame (means, covariances, opacities, one feature row each) and a camera (w2c, K).
Out    features (H, W, C), alpha (H, W), depth (H, W); after the blend, tokens (N, C) that a student can be taught with.
Run    python 03_splat.py    novel views of held-out rooms, colours and features, as a picture; 8 s on a 2-core CPU
Copy   this file alone; PyTorch and, for the .ply functions, numpy.
Not    no spherical harmonics (one feature row per Gaussian, seen alike from all sides), no second derivatives.
Words  alpha_k = opacity * exp(-d' Sigma^-1 d / 2), Sigma the 2-D covariance; T_k = prod_{j<k} (1 - alpha_j), the light left;
       w_k = alpha_k T_k, the weight of Gaussian k at a pixel. A view is cut into blocks of 8x8 = 64 pixels; each block has a
       list of the Gaussians that reach it, nearest first, read in chunks. B blocks in a step, S Gaussians in a chunk, P pixels
       in a block: alpha is (S, B, P). A row of the `table`: mean x, y in whole pixels and the rest, l11, l21, l22, log2 opacity.

Why it is written this way: log2 alpha is a quadratic polynomial in the pixel position, so one matrix product gives it for all
pixels of a block, and a second product turns the weights into all channels at once. A step advances as many blocks as memory
allows by one chunk; finished ones make room for the next. Nothing is kept for the backward pass but the inputs and the rendered
view: it walks the same lists again, so memory follows `max_elements` and not the length of the lists.
"""

import argparse
import importlib
import math
import os
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 8, 8  # pixels; larger blocks evaluate more pixels that a small Gaussian never reaches, smaller ones lengthen the lists
CHUNK = 32  # Gaussians per step of a block's list
FEW_CHANNELS = 64  # so many travel with the geometry through every step; more wait until the weights are known
RANGE = 128.0  # a power of 2 above MAX_ALPHA / (1 - MAX_ALPHA); see `composite`
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


def project(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,)
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The EWA projection: table (8, G), depth z (G,), and first x, y, last x, y of the pixels reached (4, G), none if unseen."""
    # float64: in float32 near-equal depths swap places and needles change shape, for errors of 6e-3 instead of 7e-6.
    # Components first: every operation then runs over Gaussians that lie side by side in memory.
    means, w2c, K = means.double().T.contiguous(), w2c.double(), K.double()
    covariances, opacities = covariances.double().permute(1, 2, 0).contiguous(), opacities.double()
    R, size = w2c[:3, :3], K.new_tensor([[width], [height]])
    p = R @ means + w2c[:3, 3:]
    # Replaced before anything is divided by z or goes through a logarithm: what is not seen cannot send a NaN back.
    seen = (p[2] > NEAR) & (opacities >= MIN_ALPHA)
    p, opacities = torch.where(seen, p, K.new_tensor([[0.0], [0], [1]])), torch.where(seen, opacities, K.new_ones(()))
    z, ray = p[2], p / p[2]
    mean = K[:2] @ ray
    # Far outside the view the linearisation explodes; gsplat clamps its position to 30 % beyond the border.
    focal, centre = K.diagonal()[:2, None], K[:2, 2:]
    slope = torch.minimum(torch.maximum(ray[:2], -(centre + 0.15 * size) / focal), (1.15 * size - centre) / focal)
    J = ((K[:2, :2] @ R[:2])[..., None] - (K[:2, :2] @ slope)[:, None] * R[2, :, None]) / z  # (2, 3, G) d pixel / d world
    (a, b), (b_, c) = ((J[:, :, None] * covariances).sum(1)[:, None] * J).sum(2)  # J Sigma J'
    # d' Sigma^-1 d as a sum of two squares, so that rounding never makes it negative; the bounds act only on a Sigma that is
    # not positive semi-definite.
    a, b, c = a + DILATION, (b + b_) / 2, (c + DILATION).clamp(min=DILATION / 2)
    det = (a * c - b * b).clamp(min=DILATION**2 / 4)
    root, scale = c.sqrt(), math.sqrt(0.5 / math.log(2))  # exp(-x / 2) = 2^(-scale^2 x)
    l11 = root * (scale / det.sqrt())
    l21, l22, lo = -b / c * l11, scale / root, (opacities / RANGE).log2()
    pixel = mean.detach().round()  # the mean in two parts: a float32 that counts hundreds of pixels is off by 1e-5
    table = torch.stack([*pixel, *(mean - pixel), l11, l21, l22, lo]).to(dtype)
    with torch.no_grad():
        reach = 2 * math.log(2) * (lo + math.log2(RANGE / MIN_ALPHA)) + 1e-4  # squared, in sigmas, with room for rounding
        radius = (reach * torch.stack([a, c])).sqrt()
        first = (mean - radius - 0.5).ceil().clamp(min=0)  # pixel i has its centre at i + 0.5
        last = torch.minimum((mean + radius - 0.5).floor(), size - 1)
        hit = seen & (first <= last).all(0)  # False for NaN too
        box = torch.where(hit, torch.cat([first, last]), K.new_tensor([[0.0], [0], [-1], [-1]])).int()
    return table, z, box


def pieces(count: int, size: int) -> list[slice]:
    """0, 1, ... count - 1 in slices of `size`, but at least 1."""
    return [slice(i, i + max(1, size)) for i in range(0, count, max(1, size))]


class Project(torch.autograd.Function):
    """`project` a piece at a time, forward and again backward, so that none of its float64 steps is kept."""

    @staticmethod
    def forward(ctx, piece, height, width, dtype, w2c, K, *gaussians):
        ctx.save_for_backward(w2c, K, *gaussians)
        ctx.rest = piece, height, width, dtype
        parts = [project(*g, w2c, K, height, width, dtype) for g in zip(*(x.split(max(1, piece)) for x in gaussians))]
        table, z, box = (torch.cat(part, -1) for part in zip(*parts))
        ctx.mark_non_differentiable(box)
        return table.T.contiguous(), z, box

    @staticmethod
    def backward(ctx, grad_table, grad_z, _):
        w2c, K, *gaussians = (x.detach() for x in ctx.saved_tensors)
        piece, height, width, dtype = ctx.rest
        grads = [torch.zeros_like(x) if needed else None for x, needed in zip((w2c, K, *gaussians), ctx.needs_input_grad[4:])]
        for part in pieces(len(grad_z), piece):
            inputs = [w2c, K, *(x[part] for x in gaussians)]
            wanted = [x.requires_grad_() for x, g in zip(inputs, grads) if g is not None]
            with torch.enable_grad():
                table, z, _ = project(*inputs[2:], w2c, K, height, width, dtype)
            found = torch.autograd.grad((table, z), wanted, (grad_table[part].T, grad_z[part]))
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


# --------------------------------------------------------------------------------------------------------------- compositing


def polynomial(
    rows: Tensor,  # (8, S, B) of the table
    centre: Tensor,  # (2, B) of the blocks, pixels
) -> Tensor:
    """log2 alpha = lo - (l11 dx + l21 dy)^2 - (l22 dy)^2 as coefficients (6, S, B) of `monomials` around the block's centre."""
    l11, l21, l22, lo = rows[4:]
    dx, dy = centre[:, None] - rows[:2] - rows[2:4]
    u, v = l11 * dx + l21 * dy, l22 * dy
    linear = [-2 * u * l11, -2 * (u * l21 + v * l22)]
    return torch.stack([lo - u * u - v * v, *linear, -l11 * l11, -2 * l11 * l21, -l21 * l21 - l22 * l22])


def monomials(lattice: Lattice, like: Tensor) -> Tensor:
    """1, x, y, x^2, xy, y^2 at the pixels of a block, as seen from its centre: (6, P)."""
    y, x = torch.meshgrid(*(torch.arange(n).to(like) - (n - 1) / 2 for n in lattice.shape), indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * x, x * y, y * y]).flatten(1)


def composite(
    alpha: Tensor,  # (S, B, P) divided by RANGE
    light: Tensor,  # (B, P) T times RANGE, changed in place to that behind the last Gaussian
    out: Tensor,  # like alpha, or alpha itself
) -> Tensor:
    """The weights w_k = alpha_k T_k, front to back, T_{k+1} = T_k - w_k, and 0 from where a pixel stops: (S, B, P)."""
    # A T too low becomes 0 and stays 0. Its weight goes with it by a minimum, for which alpha T is smaller than RANGE times
    # every other T_{k+1}: torch.where would take twice as long as all the rest.
    for a, w in zip(alpha, out):
        torch.mul(a, light, out=w)
        light.sub_(w, alpha=RANGE)
        torch.nn.functional.threshold_(light, RANGE * MIN_LIGHT, 0.0)
        torch.minimum(w, light, out=w)
    return out


class Step(NamedTuple):
    blocks: Tensor  # (B,) of the band, all distinct
    centre: Tensor  # (2, B)
    ids: Tensor  # (B, S) Gaussians; where a list has ended, any, with weight 0
    rows: Tensor  # (B, S, 8 + E) of the table
    alpha: Tensor  # (S, B, P) divided by RANGE, after skipping and clamping; overwritten by the weights unless asked for
    weight: Tensor  # (S, B, P) w = alpha T


def walk(
    table: Tensor,  # (G, 8 + E), which may carry more in its further columns
    band: Band,
    lattice: Lattice,
    max_elements: int,
    keep_alpha: bool = False,
) -> Iterator[Step]:
    """Yields the weights of every Gaussian at every pixel, front to back; a step's tensors are good until the next one."""
    start, end = band.start[:-1], band.start[1:]
    basis, centres = monomials(lattice, table), band.centre.to(table)
    slots = max(1, max_elements // (CHUNK * basis.shape[1]))
    ahead = torch.arange(CHUNK, device=table.device)
    # Longest first, lest one is left over at the end; alike in powers of 2 only, so that neighbours stay together in the cache.
    queue = (end - start).log2().floor().argsort(descending=True, stable=True)[: int((end > start).sum())]
    work = [table.new_empty(min(slots, len(queue)) * CHUNK * basis.shape[1]) for _ in range(1 + keep_alpha)]
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
        coefficients = polynomial(rows[..., :8].permute(2, 1, 0).contiguous(), centre)
        coefficients[0].masked_fill_((place >= end[blocks, None]).T, -1e30)  # wherever the polynomial leads from there, 2^ it is 0
        alpha, weight = (w[: place.numel() * basis.shape[1]] for w in (work[0], work[-1]))
        torch.mm(coefficients.flatten(1).T, basis, out=alpha.view(-1, basis.shape[1])).exp2_()
        torch.nn.functional.threshold_(alpha, MIN_ALPHA / RANGE, 0.0).clamp_(max=MAX_ALPHA / RANGE)
        alpha, weight = (x.view(CHUNK, len(blocks), -1) for x in (alpha, weight))
        yield Step(blocks, centre, ids.view(place.shape), rows, alpha, composite(alpha, light, weight))
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
    block, ids, weight = (torch.cat(x) for x in zip(*pairs))
    weight = torch.cat([weight, torch.zeros_like(weight[:1])])  # the last row pads the shorter lists
    block, by_block = block.int().sort(stable=True)
    start = torch.searchsorted(block, torch.arange(blocks + 1, dtype=torch.int32, device=ids.device))
    lengths = start.diff().tolist()
    out = features.new_empty(blocks, weight.shape[1], features.shape[1])
    size = blocks * max_elements // (4 * max(1, len(ids)) * features.shape[1])
    for part in pieces(blocks, size):
        place = start[:-1][part, None] + torch.arange(max(lengths[part]), device=ids.device)  # (b, n)
        row = by_block.index_select(0, place.clamp(max=max(len(ids) - 1, 0)).flatten())
        f = features.index_select(0, ids.index_select(0, row)).view(*place.shape, features.shape[1])
        row = row.masked_fill((place >= start[1:][part, None]).flatten(), len(ids))
        torch.bmm(weight.index_select(0, row).view(*place.shape, weight.shape[1]).mT, f, out=out[part])
    return out.mT


class Composite(torch.autograd.Function):
    """Images (H, W, E) and (H, W, C) of the sums over k of w_k e_k and w_k f_k; H and W are rounded up to whole blocks.

    `extra` e is carried through the walk beside the geometry, which is best for few channels; `features` f is for many.
    """

    @staticmethod
    def forward(ctx, plan, table, extra, features):
        cuts, lists, lattice, max_elements = ctx.plan = plan
        shape = [n * size for n, size in zip((len(lattice.y), len(lattice.x)), lattice.shape)]
        images = [x.new_empty(*shape, x.shape[1]) for x in (extra, features)]
        table = torch.cat([table, extra], 1)
        for band in map(lists, *zip(*cuts)):
            few, pairs = extra.new_zeros(band.centre.shape[1], extra.shape[1], math.prod(lattice.shape)), []
            for step in walk(table, band, lattice, max_elements):
                few.index_add_(0, step.blocks, step.rows[..., 8:].mT @ step.weight.transpose(0, 1))
                if features.shape[1]:
                    pairs.append(seen_pairs(step))
            many = spread(pairs, features, len(few), max_elements) if pairs else few.new_zeros(len(few), features.shape[1], few.shape[2])
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
        cuts, lists, lattice, max_elements = ctx.plan
        table, features, *images = ctx.saved_tensors
        basis = monomials(lattice, table)
        C, grad_table, grad_features = features.shape[1], torch.zeros_like(table), torch.zeros_like(features) if ctx.needs_input_grad[3] else None
        for band in map(lists, *zip(*cuts)):
            cut = lambda image: in_blocks(image, lattice.shape)[band.rows].flatten(0, 1).flatten(2).contiguous()  # (blocks, C, P)
            grad_few, grad_many = map(cut, grads)
            # The sum of w_j h_j over all j not yet passed, where h = dL/dw.
            behind = (grad_few * cut(images[0])).sum(1) + (grad_many * cut(images[1])).sum(1)
            for step in walk(table, band, lattice, max_elements, keep_alpha=True):
                g = grad_few.index_select(0, step.blocks)
                h = step.rows[..., 8:] @ g  # (B, S, P) dL/dw
                for part in pieces(len(step.blocks) if C else 0, max_elements // (CHUNK * max(1, C))):
                    g_many, ids = grad_many.index_select(0, step.blocks[part]), step.ids[part].flatten().long()
                    h[part].baddbmm_(features.index_select(0, ids).view(-1, CHUNK, C), g_many)
                    if grad_features is not None:
                        grad_features.index_add_(0, ids, (step.weight[:, part].transpose(0, 1) @ g_many.mT).flatten(0, 1))
                rows = torch.zeros_like(step.rows)
                rows[..., 8:] = (g @ step.weight.permute(1, 2, 0)).mT
                if ctx.needs_input_grad[1]:
                    rows[..., :8] = geometry_gradient(step, h, behind, basis)
                grad_table.index_add_(0, step.ids.flatten().long(), rows.flatten(0, 1))  # 20 times slower with int32
        return *grad_table.split([8, table.shape[1] - 8], 1), grad_features


def geometry_gradient(
    step: Step,
    h: Tensor,  # (B, S, P) dL/dw; overwritten
    behind: Tensor,  # (blocks, P) sum of w_j h_j over this step and all behind; the step is taken off
    basis: Tensor,  # (6, P)
) -> Tensor:
    """dL/d rows of the table (B, S, 8), through alpha_k dL/dalpha_k = w_k h_k - alpha_k / (1 - alpha_k) sum_{j>k} w_j h_j."""
    slope = step.weight * h.transpose(0, 1)
    ratio = torch.sub(behind.new_ones(()), step.alpha, alpha=RANGE, out=h.view(slope.shape))
    ratio = torch.div(step.alpha, ratio, out=ratio)
    left = behind.index_select(0, step.blocks)
    for wh, r in zip(slope, ratio):
        left.sub_(wh)
        wh.addcmul_(left, r, value=-RANGE)
    behind.index_copy_(0, step.blocks, left)
    slope *= torch.sign(step.weight, out=ratio)  # behind the stop there is nothing
    slope *= step.alpha.lt_(MAX_ALPHA / RANGE)  # and log2 alpha has no say where alpha is clamped
    with torch.enable_grad():
        rows = step.rows[..., :8].permute(2, 1, 0).contiguous().requires_grad_()
        coefficients = polynomial(rows, step.centre)
    grad = math.log(2) * (basis @ slope.flatten(0, 1).T).view(coefficients.shape)
    return torch.autograd.grad(coefficients, rows, grad)[0].permute(2, 1, 0)


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
    assert w2c.shape == (4, 4) and K.shape == (3, 3), f"w2c must be (4, 4) and K (3, 3), not {tuple(w2c.shape)}, {tuple(K.shape)}"
    assert background is None or background.shape == (C,), f"background must be ({C},), one value per channel of the features"
    max_elements = max_elements or (2**24 if features.is_cuda else 2**20)
    assert height > 0 and width > 0 and max_elements > 0, "height, width and max_elements must be at least 1"
    with torch.autocast(features.device.type, enabled=False):  # in bfloat16 log2 alpha would be off by whole units
        gaussians = means, covariances, opacities
        table, z, box = Project.apply(max_elements // 32, height, width, features.dtype, w2c, K, *gaussians)
        lattice = whole_view(height, width, means.device)
        boxes = reached_blocks(box, lattice, height, width)
        order = z.detach().view(torch.int64).argsort(stable=True)  # positive floats sort like their bits, and integers faster
        rows, columns, max_blocks = len(lattice.y), len(lattice.x), 8 * max_elements // (math.prod(BLOCK) * (C + 2))
        cuts = row_bands(boxes, rows, columns, 4 * max_elements, max_blocks)
        lists = partial(block_lists, boxes, order, lattice)
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
