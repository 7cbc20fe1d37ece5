"""Splats Gaussians with any number of channels into a new view, blends the result by masks and reads off tokens.

Paper   Splat and Distill (SnD) Sec. 3.4: rasterised features, blending (Eq. 4); Sec. 3.5: from pixels to tokens.
        3D Gaussian Splatting (3DGS, Kerbl et al. 2023) Sec. 4 and 6: projection and compositing.
In      Gaussians in the world (means, covariances, opacities, a row of features each) and a camera (w2c, K).
Out     features (H, W, C), alpha (H, W) and depth (H, W); after the blend, tokens (N, C) that a student can learn from.
        Or all of this as one linear map of the context views' tokens, kept as sparse matrices: the splat operator.
Run     python 03_splat.py             held-out views, splatted from two others, as a picture; 6 s on a 2-core CPU
        python 03_splat.py --flight    an animated flight between two views
Copy    03_splat.py alone; its command also needs 01_data.py, 02_lift.py and tiny/.
Read    Render, rasterize_plainly, divide_by_alpha, semantic_blend, bilinear_taps, splat_to_tokens, over_valid_taps:
        this is the method. Then monomials, polynomial, front_to_back (why it is fast), Triplet, render_target,
        splat_operator_plainly, SplatOperator
Try     DILATION = 0.0001: with measured depth, the PSNR of the splatted colours against the photo rises from 22.6 to
        27.6 dB, because the dilation blurs every splat.
        --pixels 49152: mvsplat 23.8 -> 25.5, depth 22.6 -> 26.6: pixels, and with them the dilation, are half as wide.
Not     colour that depends on the view (a Gaussian has one row of features for all sides), second derivatives.
Words   G Gaussians, C channels, H W pixels, N = h*w tokens. alpha_k: how much of the light Gaussian k stops at a pixel;
        T_k = (1 - alpha_1) ... (1 - alpha_{k-1}): the transmittance, the light that is left for it; w_k = alpha_k T_k:
        its weight there. The alpha of Eq. 4 is called `blend`.
"""
from __future__ import annotations

import argparse
import importlib
import io
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

NEAR = 0.01  # Gaussians nearer to the camera are not drawn; in world units (1 is the nearest depth of a `Triplet`)
DILATION = 0.3  # px^2, added to the variance of every splat: none is thinner than about a pixel
MIN_ALPHA, MAX_ALPHA = 1 / 255, 0.99  # as in 3DGS. A smaller alpha is skipped; a larger one is cut, so 1 - alpha > 0
MIN_LIGHT = 1e-4  # a pixel stops just before the Gaussian that would leave no more light than this
COVERED = 0.5  # a pixel of the target view is valid from this alpha on


class Render(NamedTuple):
    features: Tensor  # (H, W, C) sum of w f over all Gaussians, not divided by alpha
    alpha: Tensor  # (H, W) sum of w, between 0 and 1
    depth: Tensor  # (H, W) sum of w z / sum of w, a mean over all surfaces that shine through; 0 where nothing is hit


# ------------------------------------------------------------------------ 1. The definition


def rasterize_plainly(
    means: Tensor,  # (G, 3) world
    covariances: Tensor,  # (G, 3, 3) world
    opacities: Tensor,  # (G,) in [0, 1]
    features: Tensor,  # (G, C)
    w2c: Tensor,  # (4, 4)
    K: Tensor,  # (3, 3) pixels
    height: int,
    width: int,
    background: Tensor | None = None,  # (C,)
) -> Render:
    """The definition: every Gaussian at every pixel, nearest first. Slow, and differentiable as it stands."""
    dtype, size = features.dtype, K.new_tensor([width, height]).double()
    means, covariances, opacities, features, w2c, K = (
        x.double() for x in (means, covariances, opacities, features, w2c, K))
    p = means @ w2c[:3, :3].T + w2c[:3, 3]  # (G, 3) in the frame of the camera
    order = p[:, 2].argsort(stable=True)
    order = order[(p[order, 2] > NEAR) & (opacities[order] >= MIN_ALPHA)]
    p, covariances, opacities, features = (x[order] for x in (p, covariances, opacities, features))
    z = p[:, 2]
    mean = p[:, :2] / z[:, None] @ K[:2, :2].T + K[:2, 2]  # (G, 2) pixels
    # EWA splatting (Zwicker et al. 2001): around a mean, projection is nearly linear, so a Gaussian stays a Gaussian.
    # The derivative of (x, y) / z by (x, y) is I / z, and by z it is -(x, y) / z^2. So d pixel = J d world with
    # J = K [I | -(x, y) / z] R / z, with w2c's rotation R and the 2x2 of K: Sigma_2d = J Sigma J^T. Far outside the
    # view this fails. As in the library gsplat, J is taken at most 15 % of the view's size beyond its border.
    focal, centre = K.diagonal()[:2], K[:2, 2]
    slope = (p[:, :2] / z[:, None]).clamp(-(centre + 0.15 * size) / focal, (1.15 * size - centre) / focal)
    J = torch.cat([torch.eye(2).to(p).expand(len(p), 2, 2), -slope[..., None]], 2)
    J = K[:2, :2] @ J @ w2c[:3, :3] / z[:, None, None]  # (G, 2, 3)
    # Differs: the official code takes Sigma apart into scales and a rotation for its rasteriser. It passes variances as
    # scales, which squares them again, and where the eigenvectors form a reflection it sets the rotation to the
    # identity. We use Sigma itself.
    inverse = torch.linalg.inv(J @ covariances @ J.mT + DILATION * torch.eye(2).to(p))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y], -1).to(p) + 0.5  # (H, W, 2) their centres
    image, total, depth = p.new_zeros(height, width, features.shape[1]), p.new_zeros(height, width), 0.0
    T, stopped = torch.ones_like(total), torch.zeros_like(total, dtype=torch.bool)
    for k in range(len(p)):  # front to back
        d = pixels - mean[k]
        alpha = opacities[k] * torch.exp(-0.5 * (d @ inverse[k] * d).sum(-1))  # (H, W)
        alpha = alpha.where(alpha >= MIN_ALPHA, 0.0).clamp(max=MAX_ALPHA)
        stopped = stopped | (T * (1 - alpha) <= MIN_LIGHT)  # this Gaussian does not count any more
        weight = (alpha * T).where(~stopped, 0.0)  # w_k = alpha_k T_k
        T = T - weight  # T_{k+1} = (1 - alpha_k) T_k
        image, total, depth = image + weight[..., None] * features[k], total + weight, depth + weight * z[k]
    depth = depth / total.where(total > 0, 1.0)  # a division by 0 would make the gradient NaN
    if background is not None:
        image = image + (1 - total)[..., None] * background
    return Render(image.to(dtype), total.to(dtype), depth.to(dtype))


# ------------------------------------------------------------------------ 2. From the rendered view to tokens


def divide_by_alpha(render: Render) -> tuple[Tensor, Tensor]:
    """The mean of the features that a pixel sees (H, W, C), and which pixels see enough to be believed (H, W)."""
    # Differs: the official code does not divide the rendered features by alpha, so they fade at holes and where
    # Gaussians are thin. We divide, and a pixel counts as valid from alpha = 0.5 on.
    return render.features / render.alpha.clamp(min=1e-6)[..., None], render.alpha >= COVERED


def semantic_blend(
    features: Tensor,  # (H, W, C), divided by alpha
    mask: Tensor,  # (H, W) int64 instance ids, 0 = unlabelled
    blend: float = 0.5,  # the alpha of Eq. 4: how much of its own features a pixel keeps
    valid: Tensor | None = None,  # (H, W) bool: only these enter a mean, but the others are moved towards it too
) -> Tensor:
    """Moves each pixel's features towards the mean of its instance, which evens out small errors of the geometry."""
    H, W, C = features.shape
    valid = torch.ones_like(mask, dtype=torch.bool) if valid is None else valid
    assert mask.shape == valid.shape == (H, W), f"mask and valid must be ({H}, {W}) like the features"
    ids, segment = torch.unique(mask, return_inverse=True)  # ids may be huge; from here on they are 0, 1, ...
    mean, known = segment_means(features, segment, valid, len(ids))  # (workshop) (ids, C), and which have a valid pixel
    # Differs: the official code averages over holes too, and blends unlabelled pixels as if 0 were an instance. Here
    # only valid pixels enter a mean, and unlabelled pixels stay as they are.
    blended = (ids != 0) & known  # (ids,)
    mixed = blend * features + (1 - blend) * mean[segment]  # SnD Eq. 4
    return torch.where(blended[segment][..., None], mixed, features)


def bilinear_taps(size: int, count: int) -> tuple[Tensor, Tensor]:
    """Along one side of the view, the two pixels around each patch centre: index and weight (count, 2), as in
    F.interpolate(mode="bilinear", align_corners=False). It is 02's `bilinear_axis`, pixels and patches exchanged."""
    centre = (torch.arange(count, dtype=torch.float64) + 0.5) * size / count - 0.5  # pixel i has its centre at i here
    centre = centre.clamp(0, size - 1)
    first = centre.floor()
    index = torch.stack([first, first + 1], 1).clamp(max=size - 1).long()
    return index, torch.stack([first + 1 - centre, centre - first], 1)


def splat_to_tokens(
    features: Tensor,  # (H, W, C)
    valid: Tensor,  # (H, W) bool
    grid: tuple[int, int],  # (h, w) patches
) -> tuple[Tensor, Tensor]:
    """Downscales to the patch centres, each between 2x2 pixels (SnD Sec. 3.5): tokens (N, C), 0 where not valid, and
    which are valid (N,)."""
    H, W, C = features.shape
    assert valid.shape == (H, W), f"valid must be ({H}, {W}) like the features, not {tuple(valid.shape)}"
    (y, wy), (x, wx) = bilinear_taps(H, grid[0]), bilinear_taps(W, grid[1])
    # Two rows and two columns make four taps: (h, w, 2, 2) -> (N, 4)
    index = (y[:, None, :, None] * W + x[None, :, None, :]).flatten(0, 1).flatten(1).to(valid.device)
    weight = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(0, 1).flatten(1).to(valid.device)
    hit = valid.flatten()[index]
    scale, token_valid = over_valid_taps(weight, hit)
    weight = (weight * hit * scale[:, None]).to(features.dtype)
    taps = features.reshape(-1, C)[index].where(hit[..., None], 0.0)  # holes may hold anything, NaN too
    return torch.einsum("nk,nkc->nc", weight, taps), token_valid


def over_valid_taps(
    weight: Tensor,  # (N, taps) that sum to 1
    hit: Tensor,  # (N, taps) bool, which taps are valid pixels
) -> tuple[Tensor, Tensor]:
    """-> the factor (N,) that makes the weights of the valid taps sum to 1 again, or 0; and which tokens are valid."""
    # Differs: the official code sets a token to zeros only where the rendered colour is exactly black, and keeps it in
    # the loss. Here a token is valid if valid pixels make up half of its weight; the others leave the loss.
    total = (weight * hit).sum(1)
    valid = total > 0.5 - 1e-9  # half, but for rounding
    return valid / total.clamp(min=0.5), valid


# ------------------------------------------------------------------------ 3. Why that is too slow (may be skipped)
# The definition visits every Gaussian at every pixel: 6.6 s for 73x110 pixels, 16,000 Gaussians and 3 channels.
# `rasterize` (below) renders it in 0.02 s, with the same values and gradients. It uses four tricks. The speed-up of
# each was measured on one core (python tests/bench.py --section tricks):
#   1. Blocks (tiles, in 3DGS) with lists: 73x. A Gaussian reaches few pixels. So the view is cut into blocks of 8x8
#      pixels, each with a list of the Gaussians that reach it, nearest first. `walk` goes down the lists of many blocks
#      at the same time, 32 Gaussians of each in a step, until a list ends or the light of its block is used up.
#   2. One matrix product for the alphas: 3.3x. log2 alpha is a polynomial of second degree in the position of a
#      pixel. For all Gaussians of a step and all pixels of a block it is `polynomial(...).T @ monomials(...)`. Two to
#      that power is alpha, of which `front_to_back` makes weights.
#   3. Weights first: 4.1x for 384 channels. They do not depend on the features, so they are found once for a whole
#      list, and the block is `weights.T @ features[list]`.
#   4. The backward pass goes down the lists again, so only inputs and images are kept for it. Plain autograd on the
#      same blocks takes 870 MB instead of 140, and 5 times as long.


def monomials(shape: tuple[int, int], like: Tensor) -> Tensor:
    """1, -2x, -2y, -x^2, -2xy, -y^2 at the pixels of a block, as seen from its centre: (6, pixels)."""
    y, x = torch.meshgrid(*(torch.arange(n).to(like) - (n - 1) / 2 for n in shape), indexing="ij")
    return torch.stack([torch.ones_like(x), -2 * x, -2 * y, -x * x, -2 * x * y, -y * y]).flatten(1)


def polynomial(dx: Tensor, dy: Tensor, l11: Tensor, l21: Tensor, l22: Tensor, lo: Tensor) -> Tensor:
    """The coefficients (6, ...) of log2 alpha in the `monomials` of x, y, for each Gaussian. With lo = log2 opacity and
    L = ((l11, 0), (l21, l22)), the Cholesky factor of Sigma_2d^-1 / (2 ln 2), it is lo - |L^T (dx + x, dy + y)|^2.
    (dx, dy) leads from the mean to the centre of the block, (x, y) on to a pixel."""
    u, v = l11 * dx + l21 * dy, l22 * dy  # log2 alpha = lo - (u + l11 x + l21 y)^2 - (v + l22 y)^2
    return torch.stack([lo - u * u - v * v, u * l11, u * l21 + v * l22, l11 * l11, l11 * l21, l21 * l21 + l22 * l22])


def front_to_back(
    alpha: Tensor,  # (n, ...) of the next n Gaussians of each list, at each pixel
    light: Tensor,  # (...) T, overwritten by that behind the last Gaussian; 0 where the pixel has stopped
) -> Tensor:
    """The weights w_k = alpha_k T_k (n, ...), and 0 from the Gaussian on at which a pixel stops. (Used on a GPU. On a
    CPU `front_to_back_in_turn`, one Gaussian after the other, is faster.)"""
    T = torch.cat([light[None], 1 - alpha]).cumprod(0)  # T_{k+1} = T_k (1 - alpha_k), so it only falls
    F.threshold_(T, MIN_LIGHT, 0.0)  # too little light becomes none, and it stays so
    light.copy_(T[-1])
    return (alpha * T[:-1]).where(T[1:] > 0, 0.0)


# ------------------------------------------------------------------------ 4. Two context views and a target


class Triplet(NamedTuple):
    """What one training step sees, made by `load_triplet` (workshop): rows 0 and 1 are the context views, row 2 is the
    target. The unit of length is the scene's nearest depth (01's `Scene.depth_range`), so one NEAR suits any scene."""

    name: str
    images: Tensor  # (3, 3, H, W) in [0, 1]
    masks: Tensor | None  # (3, H, W) int64 instance ids or superpixels, 0 = unlabelled; None where not asked for
    depth: Tensor | None  # (3, H, W) measured z-depth, 0 = unknown; None unless all three views have it
    K: Tensor  # (3, 3, 3) pixels
    c2w: Tensor  # (3, 4, 4)
    far: float  # the scene's farthest depth; the nearest is 1


def render_target(gaussians, features: Tensor, triplet: Triplet) -> Render:  # features (G, C)
    camera = torch.linalg.inv(triplet.c2w[2]), triplet.K[2], *triplet.images.shape[-2:]
    return rasterize(gaussians.means, gaussians.covariances, gaussians.opacities, features, *camera)


# ------------------------------------------------------------------------ 5. The splat operator
# 04 visits each triplet many times while only the teacher changes. Geometry and masks stay as they are, so the whole
# way from the context views' tokens x to the target's tokens y is linear: a matrix, computed once a triplet.
#   Gaussian g has the feature f_g = sum_t u_gt x_t. Only four u_gt are not 0: the weights of Eq. 3 at its pixel.
#   Pixel p sees Gaussian g with weight w_pg: w_k, if g is its k-th. Its alpha is alpha_p = sum_g w_pg, its feature
#     F_p = sum_g w_pg f_g / alpha_p = sum_t A_pt x_t,    A_pt = sum_g w_pg u_gt / alpha_p.
#   The blend (Eq. 4) takes it to F'_p = a_p F_p + (1 - a_p) F_m. F_m is the mean of F over the valid pixels of its mask
#   m, and a_p is `blend`, but 1 where p is unlabelled.
#   Token n is y_n = sum_p b_np F'_p over its taps p, where b_np is the weight of a tap, made to sum to 1 over the valid
#   ones by `over_valid_taps`. All in all,
#     y = S x + L (M x),  S_nt = sum_p b_np a_p A_pt,  L_nm = sum_{p in m} b_np (1 - a_p),  M_mt = mean_{p in m} A_pt.
# S, L and M are sparse: a target token has few taps, in few masks, and a context token is seen in few masks. L M is
# not: it would tie each target token to all the thousands of context tokens that its masks' means are made of.


def splat_operator_plainly(
    means: Tensor, covariances: Tensor, opacities: Tensor,  # of G Gaussians, as in `rasterize_plainly`
    index: Tensor,  # (G, 4) int64, the context tokens that each Gaussian's feature is made of
    weight: Tensor,  # (G, 4) their weights u; float32 or float64, in which the operator is computed
    tokens: int,  # V*N, how many context tokens there are
    w2c: Tensor, K: Tensor, height: int, width: int,  # the target view
    grid: tuple[int, int],  # (h, w) of the target
    mask: Tensor | None = None,  # (H, W) int64 instance ids of the target, 0 = unlabelled; None: no blending
    blend: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """The definition: the matrix S + L M (N, V*N), and which tokens are valid (N,). Column t is what becomes of the
    context tokens if token t is 1 and all others are 0; here the columns are the channels of one render."""
    u = weight.new_zeros(len(index), tokens).scatter_add(1, index, weight)  # (G, V*N)
    A, valid = divide_by_alpha(rasterize(means, covariances, opacities, u, w2c, K, height, width))  # (H, W, V*N)
    if mask is not None:
        A = semantic_blend(A, mask, blend, valid)
    return splat_to_tokens(A, valid, grid)


class SplatOperator(NamedTuple):
    """The same matrix in sparse parts, made by `splat_operator` (workshop): y = operator(x) takes the context views'
    tokens x (V*N, C) to the target's y (N, C), any C; 0 where not valid."""

    S: Tensor  # (N, V*N) sparse, like the next two
    L: Tensor  # (N, masks)
    M: Tensor  # (masks, V*N)
    valid: Tensor  # (N,) bool

    def __call__(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(self.S.dtype)
            return self.S @ x + self.L @ (self.M @ x)

    def to(self, device) -> SplatOperator:
        return SplatOperator(*(x.to(device) for x in self))


# ---- Workshop: not needed to understand the method ----

# ------------------------------------------------------------------------ rasterize
# In the shapes below, a step works on B blocks, S Gaussians of the list of each, and the P pixels of a block.

BLOCK = 8, 8  # pixels. Larger blocks try Gaussians at more pixels that they never reach; smaller ones need longer lists
CHUNK = 32  # Gaussians that one step takes from a block's list
FEW_CHANNELS = 64  # so many features travel with the geometry; more of them wait until the weights of a block are known
MAX_ELEMENTS = 2**20, 2**24  # of the largest tensors of a step: on a CPU, on a GPU


def rasterize(
    means: Tensor, covariances: Tensor, opacities: Tensor,  # as in `rasterize_plainly`
    features: Tensor,  # (G, C) float32 or float64: the type of the compositing and of the result
    w2c: Tensor, K: Tensor, height: int, width: int, background: Tensor | None = None,
    max_elements: int | None = None,  # by default 2^20, on a GPU 2^24
) -> Render:
    """What `rasterize_plainly` gives, value and gradient, fast; any number of channels. `max_elements` bounds the
    memory: a smaller value is slower and changes nothing else."""
    check_arguments(means, covariances, opacities, features, w2c, K, background)
    max_elements, C = max_elements or MAX_ELEMENTS[features.is_cuda], features.shape[1]
    # Differs: the official code renders 3 channels a pass, 128 passes for a ViT-S; here one pass has all channels.
    with full_precision(features.device):
        camera = w2c, K, height, width
        table, z, box = project_in_parts(means, covariances, opacities, *camera, features.dtype, max_elements)
        blocks = whole_view(height, width, means.device)
        most = 8 * max_elements // (blocks.pixels * (C + 2))  # blocks whose sums are held at a time
        lists = BlockLists(box, z, blocks, height, width, 4 * max_elements, most)
        few, many = torch.stack([torch.ones_like(z), z], 1).to(features), features  # alpha and depth are channels too
        if C <= FEW_CHANNELS:
            few, many = torch.cat([features, few], 1), features[:, :0]
        few, many = (image[:height, :width] for image in Composite.apply(lists, max_elements, table, few, many))
    few, alpha, depth = few.split([few.shape[2] - 2, 1, 1], -1)
    image = few if C <= FEW_CHANNELS else many
    depth = depth / alpha.where(alpha > 0, 1.0)  # a division by 0 would make the gradient NaN
    if background is not None:
        image = image + (1 - alpha) * background.to(image)
    return Render(image, alpha[..., 0], depth[..., 0])


def pieces(count: int, size: int) -> list[slice]:
    """0, 1, ... count - 1 in slices of `size`, but at least 1."""
    return [slice(i, i + max(1, size)) for i in range(0, count, max(1, size))]


class Precision:  # how many threads are inside `full_precision`, and what was set outside
    lock, inside, outside = threading.Lock(), 0, None


@contextmanager
def full_precision(device: torch.device):
    """Matrix products in whole float32, whatever is set outside: under bfloat16 autocast log2 alpha would be off by
    whole units, and TF32 on a GPU moves alpha by up to 0.01. There is one setting of TF32 for the whole process, so
    the first thread to come in changes it, and the last one to leave puts it back."""
    matmul, count = torch.backends.cuda.matmul, int(device.type == "cuda")
    with Precision.lock:
        if count and not Precision.inside:
            Precision.outside, matmul.allow_tf32 = matmul.fp32_precision, False
        Precision.inside += count
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with Precision.lock:
            Precision.inside -= count
            if count and not Precision.inside:  # PyTorch has an older and a newer name for it, which must agree
                matmul.allow_tf32 = Precision.outside == "tf32"
                matmul.fp32_precision = Precision.outside


def check_arguments(means, covariances, opacities, features, w2c, K, background):
    G, C = len(means), features.shape[-1]
    shapes = [tuple(x.shape) for x in (means, covariances, opacities, features, w2c, K)]
    wanted = [(G, 3), (G, 3, 3), (G,), (G, C), (4, 4), (3, 3)]
    assert shapes == wanted, f"means, covariances, opacities, features, w2c, K must be {wanted}, not {shapes}"
    assert features.dtype in (torch.float32, torch.float64), f"features must be float32 or 64, not {features.dtype}"
    assert background is None or background.shape == (C,), f"background must be ({C},), a value per channel"


# ------------------------------------------------------------------------ means of instances, checks


def segment_means(features: Tensor, segment: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean of the valid pixels of each segment 0, 1, ... count - 1 (count, C), and which have any (count,)."""
    bins = segment.where(valid, count).flatten()  # invalid pixels, which may be NaN, go to a row of their own
    total = features.new_zeros(count + 1, features.shape[-1], dtype=torch.float64)  # float32 loses digits
    for i, rows in zip(bins.split(2**14), features.flatten(0, 1).split(2**14)):  # a float64 copy of a part at a time
        total.index_add_(0, i, rows.double())
    pixels = torch.bincount(bins, minlength=count + 1)[:-1]
    return (total[:-1] / pixels.clamp(min=1)[:, None]).to(features.dtype), pixels > 0


def companions():
    """01_data and 02_lift, imported late: part 1 can be copied without them."""
    return importlib.import_module("01_data"), importlib.import_module("02_lift")


# ------------------------------------------------------------------------ rasterize: projection


def project(
    means: Tensor, covariances: Tensor, opacities: Tensor, w2c: Tensor, K: Tensor, height: int, width: int,
    dtype: torch.dtype,  # of the table
) -> tuple[Tensor, Tensor, Tensor]:
    """All that the pixels need to know: a table (G, 8), the depth z (G,) and the box of reached pixels (4, G).

    With d = (dx, dy) from the mean to a pixel, log2 alpha = lo - (l11 dx + l21 dy)^2 - (l22 dy)^2. Written as a sum of
    squares, d^T Sigma^-1 d cannot become negative by rounding. The columns of the table are the pixel at the mean (x,
    y), from there to the mean (x, y), l11, l21, l22, lo. The mean comes in two parts because a float32 that counts
    hundreds of pixels is off by 1e-5.
    """
    # In float64: in float32 near-equal depths swap places and needles change shape: errors of 6e-3 instead of 7e-6.
    # Components come first, (3, G), so that every operation runs over Gaussians that lie side by side in memory.
    means, covariances, opacities, w2c, K = (x.double() for x in (means, covariances, opacities, w2c, K))
    R, size = w2c[:3, :3], K.new_tensor([[width], [height]])
    p = R @ means.T + w2c[:3, 3:]
    # What is not seen is replaced before anything is divided by z, so that it cannot send a NaN back.
    seen = (p[2] > NEAR) & (opacities >= MIN_ALPHA)
    p, opacities = torch.where(seen, p, K.new_tensor([[0.0], [0], [1]])), torch.where(seen, opacities, 1.0)
    z, ray = p[2], p / p[2]
    mean = K[:2] @ ray
    focal, centre = K.diagonal()[:2, None], K[:2, 2:]
    slope = torch.minimum(torch.maximum(ray[:2], -(centre + 0.15 * size) / focal), (1.15 * size - centre) / focal)
    a, b, c = splat_covariance(covariances, K[:2, :2] @ slope, z, torch.cat([K[:2, :2] @ R[:2], R[2:]]))
    # The two bounds act only where the covariance that was given is not positive semi-definite.
    c = c.clamp(min=DILATION / 2)
    det = (a * c - b * b).clamp(min=DILATION**2 / 4)
    root, scale = c.sqrt(), math.sqrt(0.5 / math.log(2))  # exp(-x / 2) = 2^(-scale^2 x)
    l11, l22, lo = root * (scale / det.sqrt()), scale / root, opacities.log2().where(seen, -math.inf)
    pixel = mean.detach().round()
    columns = torch.stack([*pixel, *(mean - pixel), l11, -b / c * l11, l22, lo])
    table = columns.T.to(dtype, memory_format=torch.contiguous_format)
    return table, z, reached_pixels(columns.detach(), height, width)


def project_in_parts(means, covariances, opacities, w2c, K, height, width, dtype, max_elements):
    """`project`, some Gaussians at a time. The backward pass computes each part again, so no float64 step is kept."""
    size = max(1, max_elements // 32)
    parts = zip(means.split(size), covariances.split(size), opacities.split(size))
    options = dict(use_reentrant=False, preserve_rng_state=False)
    table, z, box = zip(*(checkpoint(project, *part, w2c, K, height, width, dtype, **options) for part in parts))
    return torch.cat(table), torch.cat(z), torch.cat(box, 1)


def splat_covariance(covariances: Tensor, s: Tensor, z: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigma_2d = M Sigma M^T = ((a, b), (b, c)) in px^2, where M = (K R - s R_z) / z, s (2, G) = K (x, y) / z, bounded,
    and W (3, 3) has the rows K R and R_z."""
    # V = W Sigma W^T is linear in Sigma, and W is common to all: one product with a (6, 9) matrix gives the six
    # different entries of every V. What then depends on the single Gaussian, s and z, is a few differences.
    i, j = torch.triu_indices(3, 3, device=W.device)
    products = (W[i, :, None] * W[j, None] + W[j, :, None] * W[i, None]) / 2  # (6, 3, 3)
    xx, xy, xz, yy, yz, zz = products.flatten(1) @ covariances.flatten(1).T
    sx, sy = s
    a = (xx - sx * (2 * xz - sx * zz)) / z**2 + DILATION
    b = (xy - sx * yz - sy * (xz - sx * zz)) / z**2
    c = (yy - sy * (2 * yz - sy * zz)) / z**2 + DILATION
    return a, b, c


@torch.no_grad()
def reached_pixels(columns: Tensor, height: int, width: int) -> Tensor:
    """First x, y, last x, y of the pixels where alpha >= MIN_ALPHA (4, G) int32; last < first where there is none."""
    l11, l21, l22, lo = columns[4:]
    mean, end = columns[:2] + columns[2:4], columns.new_tensor([[width - 1], [height - 1]])
    # (l11 dx + l21 dy)^2 + (l22 dy)^2 <= reach^2 is an ellipse; these are half its width and half its height.
    reach = (lo - math.log2(MIN_ALPHA) + 1e-4).sqrt()  # with room for rounding; NaN if the Gaussian is not seen
    radius = reach / torch.stack([l11 / (1 + (l21 / l22) ** 2).sqrt(), l22])
    first = (mean - radius - 0.5).ceil().clamp(min=0)  # pixel i has its centre at i + 0.5
    last = torch.minimum((mean + radius - 0.5).floor(), end)
    hit = (first <= last).all(0)  # False for NaN
    return torch.where(hit, torch.cat([first, last]), columns.new_tensor([[0.0], [0], [-1], [-1]])).int()


# ------------------------------------------------------------------------ rasterize: the lists of the blocks


class Blocks(NamedTuple):
    """The pixels to be rasterised, as rows and columns of equal blocks. For a whole view they lie side by side; for the
    operator each has the taps of one token. They may overlap, and reach beyond the view."""

    top: Tensor  # (rows,) the first pixel of each row of blocks, ascending
    left: Tensor  # (columns,) and of each column
    shape: tuple[int, int]  # pixels of a block, down and across

    pixels = property(lambda self: self.shape[0] * self.shape[1])  # P


def whole_view(height: int, width: int, device) -> Blocks:
    return Blocks(*(torch.arange(0, size, n, device=device) for size, n in zip((height, width), BLOCK)), BLOCK)


def reached_blocks(box: Tensor, blocks: Blocks, height: int, width: int) -> Tensor:
    """A box of pixels (4, G) in columns and rows of blocks (4, G); last < first where it lies between the blocks."""
    ends = []
    for start, n, size, first, last in zip(blocks[1::-1], blocks.shape[::-1], (width, height), box[:2], box[2:]):
        pixel = torch.arange(-1, size, device=box.device)  # answered for every pixel; the Gaussians only look it up
        first_block = torch.searchsorted(start + n - 1, pixel).int()  # the first that does not end before the pixel
        last_block = torch.searchsorted(start, pixel, right=True).int() - 1  # the last that does not start behind it
        ends.append((first_block.index_select(0, first + 1), last_block.index_select(0, last + 1)))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1])


def list_lengths(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """How many of the boxes (4, G) hold each block (rows, columns): +1 and -1 at their corners, summed up twice."""
    x0, y0, x1, y1 = boxes
    corners = torch.zeros((rows + 1) * (columns + 1), dtype=torch.int32, device=boxes.device)
    for y, x, sign in ((y0, x0, 1), (y0, x1 + 1, -1), (y1 + 1, x0, -1), (y1 + 1, x1 + 1, 1)):
        corners.index_add_(0, (y * (columns + 1) + x).long(), corners.new_full((1,), sign).expand(len(x)))
    return corners.view(rows + 1, columns + 1).cumsum(0).cumsum(1)[:rows, :columns]


def bands_of(pairs: list[int], columns: int, max_pairs: int, max_blocks: int) -> list[tuple[int, int]]:
    """Cuts rows of blocks, of `pairs` list entries each, into bands [top, bottom) below both limits, or of one row."""
    bands, top = [], 0
    for row in range(1, len(pairs)):
        if sum(pairs[top : row + 1]) > max_pairs or (row + 1 - top) * columns > max_blocks:
            bands, top = bands + [(top, row)], row
    return bands + [(top, len(pairs))]


class Band(NamedTuple):
    """Some rows of blocks with their lists: block i has gaussian[start[i] : start[i + 1]], nearest first."""

    rows: slice
    centre: Tensor  # (2, blocks) x, y in pixels
    start: Tensor  # (blocks + 1,) int64
    lengths: Tensor  # (blocks,) of the lists; on the CPU, so that asking for them makes no GPU wait
    gaussian: Tensor  # (pairs + 1,) int32; the last entry belongs to no list: it is read where a list has ended


class BlockLists:
    """For every block the Gaussians that reach it, nearest first; iterating makes them a band at a time."""

    def __init__(self, box, z, blocks: Blocks, height, width, max_pairs: int, max_blocks: int):
        self.blocks, boxes = blocks, reached_blocks(box, blocks, height, width)
        order = z.detach().view(torch.int64).argsort(stable=True)  # positive floats sort like their bits, but faster
        reaching = (boxes[0] <= boxes[2]) & (boxes[1] <= boxes[3])
        self.order = order.index_select(0, reaching.index_select(0, order).nonzero()[:, 0])
        self.boxes = boxes.index_select(1, self.order)  # (4, G') nearest first
        self.lengths = list_lengths(self.boxes, len(blocks.top), len(blocks.left)).cpu()
        self.bands = bands_of(self.lengths.sum(1).tolist(), len(blocks.left), max_pairs, max_blocks)
        self.kept = []  # a single band is short enough to be kept for the backward pass

    def __iter__(self) -> Iterator[Band]:
        if len(self.bands) == 1:
            self.kept = self.kept or [self.make(*self.bands[0])]
        return iter(self.kept or map(self.make, *zip(*self.bands)))

    def make(self, top: int, bottom: int) -> Band:
        """Lists every Gaussian once for each block of its box, nearest Gaussian first, and sorts that by block."""
        (x0, y0, x1, y1), columns = self.boxes, len(self.blocks.left)
        lengths = self.lengths[top:bottom].flatten()
        y0, y1, across = y0.clamp(min=top) - top, y1.clamp(max=bottom - 1) - top, x1 - x0 + 1
        count = across * (y1 - y0 + 1).clamp(min=0)  # blocks of each box, in this band
        which = torch.repeat_interleave(count, output_size=int(lengths.sum()))  # (pairs,) the box of each pair
        nth = torch.arange(len(which), dtype=torch.int32, device=which.device)
        nth -= (count.cumsum(0) - count).int().index_select(0, which)  # 0, 1, ... within a box, row by row
        across = across.index_select(0, which)
        first, row = (y0 * columns + x0).index_select(0, which), nth.div(across, rounding_mode="floor")
        block = first + nth + row * (columns - across)
        by_block = block.sort(stable=True).indices  # stable, so every list stays nearest first
        gaussian = self.order.int().index_select(0, which.index_select(0, by_block))
        y, x = (start + n / 2 for start, n in zip(self.blocks[:2], self.blocks.shape))
        centre = torch.stack([x.repeat(bottom - top), y[top:bottom].repeat_interleave(columns)])
        start = F.pad(lengths.cumsum(0), (1, 0)).to(which.device)
        return Band(slice(top, bottom), centre, start, lengths, torch.cat([gaussian, gaussian[-1:]]))


# ------------------------------------------------------------------------ rasterize: compositing


class Composite(torch.autograd.Function):
    """Images (H, W, E) and (H, W, C) of sum_k w_k e_k and sum_k w_k f_k; H and W are rounded up to whole blocks."""

    @staticmethod
    def forward(ctx, lists: BlockLists, max_elements, table, few, many):
        # few (G, E) travel beside the geometry and are summed in every step; many (G, C) wait for the weights.
        ctx.lists, ctx.max_elements = lists, max_elements
        size = [len(start) * n for start, n in zip(lists.blocks[:2], lists.blocks.shape)]
        images, table = [x.new_empty(*size, x.shape[1]) for x in (few, many)], torch.cat([table, few], 1)
        for band in lists:
            sums = few.new_zeros(len(band.lengths), few.shape[1], lists.blocks.pixels)  # (blocks, E, P)
            weights = few.new_zeros(len(band.gaussian) if many.shape[1] else 0, lists.blocks.pixels)
            for step in walk(table, band, lists.blocks.shape, max_elements):
                sums.index_add_(0, step.blocks, step.rows[..., 8:].mT @ step.weight.transpose(0, 1))
                if len(weights):
                    weights[step.place.T] = step.weight  # where a list has ended, 0 at the place of no list
            parts = sums, all_channels(band, weights, many, max_elements)
            for image, part in zip(images, parts):
                view = in_blocks(image, lists.blocks.shape)[band.rows]
                view.copy_(part.view(view.shape))
        ctx.save_for_backward(table, many, *images)
        return tuple(images)

    @staticmethod
    def backward(ctx, *grads):
        with full_precision(grads[0].device):
            needed = ctx.needs_input_grad[2:]
            return None, None, *gradients(ctx.lists, ctx.max_elements, ctx.saved_tensors, grads, needed)


class Step(NamedTuple):
    """B blocks, each with the next S Gaussians of its list."""

    blocks: Tensor  # (B,) which of the band, all distinct
    centre: Tensor  # (2, B)
    place: Tensor  # (B, S) in the lists; the last place of all, that of no list, where a block's list has ended
    ids: Tensor  # (B, S) the Gaussians there
    rows: Tensor  # (B, S, 8 + E) their rows of the table
    columns: Tensor  # (8, S, B) the first 8 of them once more
    weight: Tensor  # (S, B, P) w = alpha T
    # For the backward pass:
    light: Tensor | None = None  # (B, P) T before the first of them
    opaque: tuple | None = None  # indices (n,), (n,) into S and B where alpha may have been clamped, or `...`: all
    clamped: Tensor | None = None  # (n, P) where they were


def walk(
    table: Tensor,  # (G, 8 + E), which may carry E features behind the geometry
    band: Band, shape: tuple[int, int], max_elements: int, backward: bool = False,
) -> Iterator[Step]:
    """Goes down the lists of many blocks at the same time: each `Step` has the next CHUNK Gaussians of each, and
    overwrites the last one. Blocks whose list ends, or whose pixels have all stopped, make room for others."""
    pixels, device = monomials(shape, table), table.device
    P, centres, end = pixels.shape[1], band.centre.to(table), band.start[1:]
    # An odd number: a power of 2 apart, the weights of one block would compete for the same few lines of the cache.
    slots = (max(1, max_elements // (CHUNK * P)) - 1) | 1
    # Longest lists first, so that none is left over at the end; in powers of 2, so that neighbours stay together.
    queue = band.lengths.log2().floor().argsort(descending=True, stable=True)
    queue = queue[: int((band.lengths > 0).sum())].to(device)
    ahead = torch.arange(CHUNK, device=device)
    buffer = table.new_empty(CHUNK * min(slots, len(queue)) * P)
    # Asking which blocks are finished makes a GPU wait: it is done every 8 steps there. Until then their weights are 0.
    patience, taken = min(8, -(-int(band.lengths.max()) // CHUNK)) if table.is_cuda else 1, 0
    blocks = at = queue[:0]
    light = table.new_empty(0, P)
    while taken < len(queue) or len(blocks):
        fresh = queue[taken : taken + slots - len(blocks)]
        taken += len(fresh)
        blocks, at = torch.cat([blocks, fresh]), torch.cat([at, band.start[fresh]])
        light = torch.cat([light, light.new_ones(len(fresh), P)])
        for _ in range(patience):
            place = at[:, None] + ahead
            place = place.where(place < end[blocks, None], len(band.gaussian) - 1)
            yield make_step(table, band, blocks, centres[:, blocks], place, light, pixels, buffer, backward)
            at = at + CHUNK
        going = ((at < end[blocks]) & (light.amax(1) > 0)).nonzero()[:, 0]
        blocks, at, light = (x.index_select(0, going) for x in (blocks, at, light))


def make_step(table, band, blocks, centre, place, light, pixels, buffer, backward) -> Step:
    """The weights of B blocks' next Gaussians; takes what they stop from `light` (B, P)."""
    ids = band.gaussian.index_select(0, place.flatten())
    rows = table.index_select(0, ids).view(*place.shape, -1)
    columns = rows[..., :8].permute(2, 1, 0).contiguous()
    coefficients = polynomial(*centre[:, None] - columns[:2] - columns[2:4], *columns[4:])
    coefficients[0].masked_fill_((place == len(band.gaussian) - 1).T, -1e30)  # whatever is there, 2^ it is 0
    alpha = buffer[: place.numel() * pixels.shape[1]].view(CHUNK, len(blocks), -1)
    torch.mm(coefficients.flatten(1).T, pixels, out=alpha.flatten(0, 1)).exp2_()  # all pixels of all blocks at once
    F.threshold_(alpha, MIN_ALPHA, 0.0)
    kept = ()
    if backward:  # which alphas will be clamped: those of few Gaussians, but asking for them would make a GPU wait
        opaque = ... if alpha.is_cuda else tuple((columns[7] > math.log2(MAX_ALPHA)).nonzero().T)
        kept = light.clone(), opaque, alpha[opaque] >= MAX_ALPHA
    # Few large operations suit a GPU. A CPU renders 2.4 times faster with many small ones, which stay in its cache.
    weights_of = front_to_back if alpha.is_cuda else front_to_back_in_turn
    weight = weights_of(alpha.clamp_(max=MAX_ALPHA), light)
    return Step(blocks, centre, place, ids.view(place.shape), rows, columns, weight, *kept)


def in_blocks(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """An image (H, W, C) of whole blocks seen as (rows, columns, C, block height, block width)."""
    return image.unflatten(1, (-1, shape[1])).unflatten(0, (-1, shape[0])).permute(0, 2, 4, 1, 3)


def all_channels(
    band: Band,
    weights: Tensor,  # (pairs + 1, P) of every place in the lists, the last 0
    features: Tensor, max_elements: int,  # (G, C)
) -> Tensor:
    """sum_k w_k f_k (blocks, C, P): a product of weights (P, n) and features (n, C) for the list of each block."""
    P, C, blocks = weights.shape[1], features.shape[1], len(band.lengths)
    out = features.new_empty(blocks, P, C)
    if not C:
        return out.mT
    seen = weights.amax(1).nonzero()[:, 0]  # the places whose Gaussian has any weight: about three in four
    start = torch.searchsorted(seen, band.start)
    lengths, seen = start.diff().tolist(), torch.cat([seen, seen.new_tensor([len(weights) - 1])])
    ahead = torch.arange(max(lengths), device=seen.device)
    for part in pieces(blocks, blocks * max_elements // (4 * len(seen) * C)):
        nth = start[:-1][part, None] + ahead[: max(lengths[part])]  # (b, n)
        place = seen.index_select(0, nth.where(nth < start[1:][part, None], len(seen) - 1).flatten())
        f = features.index_select(0, band.gaussian.index_select(0, place)).view(*nth.shape, C)
        torch.bmm(weights.index_select(0, place).view(*nth.shape, P).mT, f, out=out[part])
    return out.mT


def gradients(lists: BlockLists, max_elements, saved, grads, needed):
    """dL/d table, few and many of `Composite`. With frozen geometry the table needs none, which saves most time."""
    (table, features, *images), (geometry, _, many), shape = saved, needed, lists.blocks.shape
    E, C = table.shape[1] - 8, features.shape[1]
    pixels = math.log(2) * monomials(shape, table)
    # For geometry and `few`. index_add_ is twice as fast with 16 columns or more, and 20 times slower with int32.
    grad_row = table.new_zeros(len(table), max(16, 8 + E))
    grad_features = torch.zeros_like(features) if many else None
    for band in lists:
        cut = lambda image: in_blocks(image, shape)[band.rows].flatten(0, 1).flatten(2).contiguous()
        grad_few, grad_many = map(cut, grads)  # (blocks, E or C, P)
        # What a pixel still receives, sum_j w_j h_j over the Gaussians not yet passed, where h_j = dL/dw_j.
        behind = (grad_few * cut(images[0])).sum(1) + (grad_many * cut(images[1])).sum(1)
        for step in walk(table, band, shape, max_elements, backward=geometry):
            g, ids = grad_few.index_select(0, step.blocks), step.ids.long()
            rows = grad_row.new_zeros(*ids.shape, grad_row.shape[1])
            rows[..., 8 : 8 + E] = (g @ step.weight.permute(1, 2, 0)).mT
            h = step.rows[..., 8:] @ g if geometry else None  # (B, S, P)
            for part in pieces(len(ids) if C else 0, max_elements // (CHUNK * max(1, C))):
                g, gaussian = grad_many.index_select(0, step.blocks[part]), ids[part].flatten()
                if geometry:
                    h[part].baddbmm_(features.index_select(0, gaussian).view(-1, CHUNK, C), g)
                if many:
                    grad_features.index_add_(0, gaussian, (step.weight[:, part].transpose(0, 1) @ g.mT).flatten(0, 1))
            if geometry:
                g = (pixels @ slopes(step, h, behind).flatten(0, 1).T).view(6, *step.columns.shape[1:])
                rows[..., 2:8] = polynomial_gradients(step.columns, step.centre, g).permute(2, 1, 0)
            grad_row.index_add_(0, ids.flatten(), rows.flatten(0, 1))
    return grad_row[:, :8] if geometry else None, grad_row[:, 8 : 8 + E], grad_features


def front_to_back_in_turn(alpha: Tensor, light: Tensor) -> Tensor:
    """`front_to_back`, one Gaussian after the other; `alpha` becomes the weights."""
    threshold_backward = torch.ops.aten.threshold_backward.grad_input  # the backward pass of ReLU
    for w in alpha:
        w.mul_(light)
        light.sub_(w)
        F.threshold_(light, MIN_LIGHT, 0.0)
        threshold_backward(w, light, 0.0, grad_input=w)  # w where light > 0, else 0, in half the time of a mask
    return alpha


def slopes(
    step: Step,
    h: Tensor,  # (B, S, P) dL/dw
    behind: Tensor,  # (blocks, P) sum of w_j h_j over this step and all behind it; the step is taken off
) -> Tensor:
    """alpha_k dL/d alpha_k (S, B, P), which is dL/d log2 alpha_k but for a factor ln 2. May overwrite weights and h.

    As w_j = alpha_j T_j and every T_j behind k has the factor 1 - alpha_k, it is w_k (h_k - sum_{j>k} w_j h_j /
    T_{k+1}).
    """
    slopes_of = slopes_at_once if h.is_cuda else slopes_in_turn  # as in `make_step`
    light = step.light.clamp_(min=MIN_LIGHT)  # where a pixel has stopped, w is 0, and this must only not be 0
    slope, left = slopes_of(step.weight, h.transpose(0, 1), behind.index_select(0, step.blocks), light)
    behind.index_copy_(0, step.blocks, left)
    slope[step.opaque] *= ~step.clamped  # a clamped alpha does not change
    return slope


def slopes_at_once(w: Tensor, h: Tensor, left: Tensor, light: Tensor) -> tuple[Tensor, Tensor]:
    left = left - (w * h).cumsum(0)
    light = light - w.cumsum(0)
    return w * (h - left / light), left[-1]


def slopes_in_turn(w: Tensor, h: Tensor, left: Tensor, light: Tensor) -> tuple[Tensor, Tensor]:
    for w_k, h_k in zip(w, h):
        left.addcmul_(w_k, h_k, value=-1)
        light.sub_(w_k)
        w_k.mul_(h_k.addcdiv_(left, light, value=-1))  # left / light: what the light behind k brings, on average
    return w, left


def polynomial_gradients(columns: Tensor, centre: Tensor, g: Tensor) -> Tensor:
    """dL/d columns 2-7 (6, S, B) from dL/d coefficients g (6, S, B): `polynomial` backwards, its lines in reverse. The
    whole pixels in columns 0-1 are constants."""
    l11, l21, l22, _ = columns[4:]
    dx, dy = centre[:, None] - columns[:2] - columns[2:4]
    u, v = l11 * dx + l21 * dy, l22 * dy
    grad_u, grad_v = l11 * g[1] + l21 * g[2] - 2 * u * g[0], l22 * g[2] - 2 * v * g[0]
    grad_l11 = dx * grad_u + u * g[1] + 2 * l11 * g[3] + l21 * g[4]
    grad_l21 = dy * grad_u + u * g[2] + l11 * g[4] + 2 * l21 * g[5]
    grad_l22 = dy * grad_v + v * g[2] + 2 * l22 * g[5]
    return torch.stack([-l11 * grad_u, -l21 * grad_u - l22 * grad_v, grad_l11, grad_l21, grad_l22, g[0]])


# ------------------------------------------------------------------------ the splat operator


@torch.no_grad()
def splat_operator(
    means: Tensor, covariances: Tensor, opacities: Tensor, index: Tensor, weight: Tensor, tokens: int, w2c: Tensor,
    K: Tensor, height: int, width: int, grid: tuple[int, int], mask: Tensor | None = None, blend: float = 0.5,
    max_elements: int | None = None,
) -> SplatOperator:
    """What `splat_operator_plainly` gives, in the parts of section 5. S needs the taps alone: 2x2 pixels a token, one
    pixel in 49 at the paper's size, which is why `walk` takes blocks of any shape. M needs every pixel. Rows of S and M
    are made alike: (rows x Gaussians) times u (Gaussians x tokens), both sparse."""
    check_arguments(means, covariances, opacities, weight, w2c, K, None)  # the weights as if they were features
    assert index.shape == weight.shape == (len(means), 4), f"index and weight must be ({len(means)}, 4)"
    assert mask is None or mask.shape == (height, width), f"mask must be ({height}, {width}), not {tuple(mask.shape)}"
    max_elements, N, device = max_elements or MAX_ELEMENTS[weight.is_cuda], math.prod(grid), weight.device
    mask = index.new_zeros(height, width) if mask is None or blend == 1 else mask  # all unlabelled
    ids, mask = mask.unique(return_inverse=True)  # from here on 0, 1, ...
    labelled = (ids != 0).to(weight)
    (ty, wy), (tx, wx) = ([part.to(device) for part in bilinear_taps(*side)] for side in zip((height, width), grid))
    taps = Blocks(ty[:, 0].contiguous(), tx[:, 0].contiguous(), (ty.shape[1], tx.shape[1]))  # a block a token
    b = (wy[:, None, :, None] * wx[None, :, None, :]).flatten(0, 1).flatten(1)  # (N, P) float64
    token, m = torch.arange(N, device=device)[:, None].expand(b.shape), pixels_of(mask, taps)
    mixed = (1 - blend) * labelled[m]  # (N, P) 1 - a_p
    with full_precision(device):
        camera = w2c, K, height, width
        table, z, box = project_in_parts(means, covariances, opacities, *camera, weight.dtype, max_elements)
        lift, view = (index, weight, tokens), (table, z, box, height, width)
        row, column, value, covered = token_weights(view, lift, taps, (b * (1 - mixed)).to(weight), token, max_elements)
        scale, valid = over_valid_taps(b, covered)
        S = row, column, value * scale[row].to(weight)
        mean_share = (mixed * scale[:, None] * covered * b).to(weight).flatten()
        used = mean_share.nonzero()[:, 0]
        L = [x.flatten().index_select(0, used) for x in (token, m, mean_share)]
        M = row[:0], column[:0], value[:0]
        if len(used):
            blocks = whole_view(height, width, device)
            share, m = pixels_of(labelled[mask], blocks), pixels_of(mask, blocks)
            row, column, value, covered = token_weights(view, lift, blocks, share, m, max_elements)
            count = share.new_zeros(len(ids)).index_add_(0, m.flatten(), (share * covered).flatten())
            M = row, column, value / count[row]
    sizes = (N, tokens), (N, len(ids)), (len(ids), tokens)
    return SplatOperator(*(sparse(*matrix, size) for matrix, size in zip((S, L, M), sizes)), valid)


def token_weights(
    view,  # (table, z, box, height, width)
    lift,  # (index (G, 4), weight (G, 4), tokens): u
    blocks: Blocks,
    share: Tensor,  # (blocks, P) how much each pixel counts
    row: Tensor,  # (blocks, P) int64, the row of the result that it counts for
    max_elements: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's sum of share_p A_pt over its valid pixels p, as row, column, value; which are valid (blocks, P)."""
    (table, z, box, height, width), (index, weight, tokens), columns = view, lift, len(blocks.left)
    most = 32 * max_elements // share.shape[1], 16 * max_elements // max(1, tokens)
    valid, found = torch.empty_like(share, dtype=torch.bool), []
    for band in BlockLists(box, z, blocks, height, width, *most):
        here = slice(band.rows.start * columns, band.rows.stop * columns)
        # alpha(p), by which every weight is divided, is known only at the end of a list: weights are kept until then.
        alpha, kept = torch.zeros_like(share[here]), []
        for step in walk(table, band, blocks.shape, max_elements):
            alpha.index_add_(0, step.blocks, step.weight.sum(0))
            kept.append((step.blocks, step.ids, step.weight.clone()))
        valid[here] = alpha >= COVERED
        rows, sums = sums_by_row(torch.where(valid[here], share[here] / alpha, 0.0), row[here])
        rows, local = rows.unique(return_inverse=True)  # the rows of this band; (blocks, R) their numbers among them
        total = table.new_zeros(len(rows), tokens)
        for c, block, ids in row_weights(kept, sums, max_elements):
            b, r, k = c.nonzero().T
            g = ids[b, k]
            cell = local[block[b], r, None] * tokens + index.index_select(0, g)  # (n, 4)
            total.view(-1).index_add_(0, cell.flatten(), (c[b, r, k, None] * weight.index_select(0, g)).flatten())
        at, column = total.nonzero().T
        found.append((rows[at], column, total[at, column]))
    return *(torch.cat(x) for x in zip(*found)), valid


def row_weights(kept, sums: Tensor, max_elements: int):
    """Parts of (rows x Gaussians): each row's sum_p share_p w_pk / alpha_p (B, R, S); block (B,), Gaussian (B, S)."""
    if kept:
        blocks, ids = (torch.cat(x) for x in zip(*(step[:2] for step in kept)))
        c = torch.cat([sums.index_select(0, b) @ w.permute(1, 2, 0) for b, _, w in kept])
        for part in pieces(len(c), max_elements // (4 * c.shape[1] * CHUNK)):
            yield c[part], blocks[part], ids[part]


def sums_by_row(share: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows that each block's pixels count for (blocks, R), and the matrices (blocks, R, P) that sum
    share_p over each. A block of fewer than R rows repeats its first row, with sums over no pixel."""
    ordered, place = row.sort(1)
    first_of_its_row = ordered.diff(dim=1, prepend=ordered[:, :1]) != 0
    nth = torch.empty_like(row).scatter_(1, place, first_of_its_row.cumsum(1))  # which of the block's rows it is
    each = torch.arange(int(nth.max()) + 1, device=row.device)
    rows = row[:, :1].repeat(1, len(each)).scatter_(1, nth, row)
    return rows, share[:, None] * (nth[:, None] == each[:, None])


def pixels_of(image: Tensor, blocks: Blocks) -> Tensor:
    """An image (H, W) at the pixels of each block (blocks, P), 0 beyond the view."""
    y, x = (start[:, None] + torch.arange(n, device=image.device) for start, n in zip(blocks[:2], blocks.shape))
    image = F.pad(image, (0, blocks.shape[1], 0, blocks.shape[0]))
    return image[y[:, None, :, None], x[None, :, None, :]].flatten(0, 1).flatten(1)


def sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    with torch.sparse.check_sparse_tensor_invariants(False):  # said aloud, or CUDA warns that nothing is checked
        return torch.sparse_coo_tensor(torch.stack([row, column]), value, shape).coalesce()


OPERATOR_FORMAT = "splat operator 1"  # to be raised with every change of the file's layout or of what the weights mean


def save_operator(operator: SplatOperator, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """A safetensors file of 4 bytes a weight: float16 moves tokens by 1e-4 of their length."""
    stored = {"valid": operator.valid}
    for name, matrix in zip("SLM", operator):
        row, column = matrix.indices()
        stored[name + ".count"] = row.bincount(minlength=matrix.shape[0]).int()  # weights in each row
        stored[name + ".column"] = column.to(torch.uint16 if matrix.shape[1] <= 2**16 else torch.int32)
        stored[name + ".weight"] = matrix.values().to(dtype)
    stored = {name: x.cpu().contiguous() for name, x in stored.items()}
    about = {"format": OPERATOR_FORMAT, "tokens": str(operator.S.shape[1])}
    companions()[0].write_whole(path, save(stored, about))


def load_operator(path: str | Path) -> SplatOperator:
    """On the CPU, in float32 (or float64 if stored so). ValueError where it is missing, damaged or of another form."""
    try:
        with safe_open(path, "pt") as file:
            about, stored = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        if about.get("format") != OPERATOR_FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, not {OPERATOR_FORMAT!r}")
        tokens, masks, matrices = int(about["tokens"]), len(stored["M.count"]), []
        for name, columns in zip("SLM", (tokens, masks, tokens)):
            count, column, weight = (stored[f"{name}.{part}"] for part in ("count", "column", "weight"))
            count, column = count.long(), column.long()
            weight = weight if weight.dtype == torch.float64 else weight.float()
            whole = (count >= 0).all() and count.sum() == len(column) == len(weight) and weight.isfinite().all()
            if not whole or columns >= 2**31 or not ((0 <= column) & (column < columns)).all():
                raise ValueError(f"matrix {name} does not fit together")
            matrices.append(sparse(torch.repeat_interleave(count), column, weight, (len(count), columns)))
        if stored["valid"].dtype != torch.bool or stored["valid"].shape != stored["S.count"].shape:
            raise ValueError("valid does not fit")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a splat operator ({reason}); remove it, and it will be computed again") from None
    return SplatOperator(*matrices, stored["valid"])


# ------------------------------------------------------------------------ .ply files


PLY_FIELDS = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
SH_C0 = 0.28209479177387814  # the constant spherical harmonic, in which .ply files store colours


def rotation_to_quaternion(R: np.ndarray) -> np.ndarray:
    """Rotations (G, 3, 3), of determinant +1 -> unit quaternions (G, 4) as (w, x, y, z)."""
    (a, b, c), (d, e, f), (g, h, i) = R.transpose(1, 2, 0)
    rows = [
        [1 + a + e + i, h - f, c - g, d - b],
        [h - f, 1 + a - e - i, b + d, c + g],
        [c - g, b + d, 1 - a + e - i, f + h],
        [d - b, c + g, f + h, 1 - a - e + i],
    ]
    Q = np.moveaxis(np.array(rows), 2, 0)  # 4 q q': each row is a multiple of q, and that of the largest diagonal safe
    best = Q[np.arange(len(Q)), Q.diagonal(0, 1, 2).argmax(1)]
    return best / np.linalg.norm(best, axis=1, keepdims=True)


def save_ply(
    path: str | Path,
    gaussians,  # anything with .means (G, 3), .covariances (G, 3, 3) and .opacities (G,)
    colours: Tensor,  # (G, 3) in [0, 1]
) -> None:
    """Writes the Gaussians as the viewers of 3DGS files read them."""
    parts = gaussians.means, gaussians.covariances, gaussians.opacities, colours
    means, cov, opacity, colours = (x.detach().cpu().double().numpy() for x in parts)
    assert colours.shape == means.shape, f"colours must be (G, 3) like the means, not {colours.shape}"
    variance, axes = np.linalg.eigh(cov)
    axes[..., 0] *= np.sign(np.linalg.det(axes))[:, None]  # reflections have no quaternion: flip an axis
    opacity = opacity.clip(1e-6, 1 - 1e-6)
    logit, log_scale = np.log(opacity / (1 - opacity))[:, None], 0.5 * np.log(variance.clip(1e-20))
    normals, harmonics = 0 * means, (colours - 0.5) / SH_C0
    table = np.concatenate([means, normals, harmonics, logit, log_scale, rotation_to_quaternion(axes)], 1)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}"]
    header += [*(f"property float {name}" for name in PLY_FIELDS), "end_header", ""]
    companions()[0].write_whole(path, "\n".join(header).encode() + table.astype("<f4").tobytes())


# ------------------------------------------------------------------------ two context views and a target


def name_of(scene, indices) -> str:
    a, b, target = (scene.frames[i].name for i in indices)
    return f"{scene.name}: {a} + {b} -> {target}"


def load_triplet(
    scene,  # of 01_data
    indices,  # (context_a, context_b, target)
    size: tuple[int, int],  # (H, W)
    device,
    masks: str | None = None,  # "files", with superpixels where there are none, or "superpixels"; None: without
) -> Triplet:
    data, _ = companions()
    views, (near, far) = [scene.view(i, size) for i in indices], scene.depth_range
    stack = lambda tensors: torch.stack(tensors).to(device)
    images, K, c2w = (stack([getattr(v, key) for v in views]) for key in ("image", "K", "c2w"))
    c2w[:, :3, 3] /= near
    depth = None if any(v.depth is None for v in views) else stack([v.depth for v in views]) / near
    views = [v._replace(mask=None) for v in views] if masks == "superpixels" else views
    ids = stack([data.regions(v) for v in views]) if masks else None
    return Triplet(name_of(scene, indices), images, ids, depth, K, c2w, far / near)


def reconstruct(geometry: str, triplet: Triplet, net=None):
    """Two views -> one Gaussian a pixel (SnD Eq. 1), and the colours (G, 3) of these pixels. `mvsplat` is learned, the
    MVSplat `net`; `depth` is as measured."""
    _, lift = companions()
    images, K, c2w = triplet.images[:2], triplet.K[:2], triplet.c2w[:2]
    if geometry == "mvsplat":
        gaussians = lift.mvsplat_gaussians(net, images, K, c2w, 1.0, triplet.far)
    else:
        gaussians = lift.depth_gaussians(triplet.depth[:2], K, c2w)
    return gaussians, images.permute(0, 2, 3, 1).reshape(-1, 3)


def psnr(guess: Tensor, truth: Tensor) -> float:  # of values in [0, 1]
    return -10 * (guess - truth).square().mean().clamp(min=1e-10).log10().item()


@torch.no_grad()
def geometry_carries(gaussians, colours: Tensor, triplet: Triplet) -> tuple[float, float]:
    """The PSNR of the splatted context colours (G, 3) against the target, and that of the target's mean colour, where
    the Gaussians cover it. A geometry is of use only where the first is the larger one."""
    image, covered = divide_by_alpha(render_target(gaussians, colours, triplet))
    truth = triplet.images[2].permute(1, 2, 0)
    if not covered.any():
        return 0.0, psnr(truth.mean((0, 1)), truth)
    return psnr(image[covered], truth[covered]), psnr(truth[covered].mean(0), truth[covered])


def warning_of(scores: list[tuple[float, float]]) -> str | None:
    """One line where the results of `geometry_carries` say that the geometry of some triplets cannot be used."""
    bad = [(ours, mean) for ours, mean in scores if ours <= mean]
    if not bad:
        return None
    ours, mean = (sum(column) / len(bad) for column in zip(*bad))
    return (f"warning: in {len(bad)} of {len(scores)} triplets the splatted context views are no nearer to the target "
            f"than its mean colour (psnr {ours:.1f} against {mean:.1f}): the geometry carries nothing there. "
            "Look at the poses and at the depth range (--near --far); 04 takes measured depth with --geometry depth")


# ------------------------------------------------------------------------ pictures and the command


def flight_path(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Camera poses (count, 4, 4) from c2w `a` to `b` (4, 4) and back, slow at both ends, so that the film can loop."""
    t = (0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(count) / count))[:, None, None].to(a)
    poses = (1 - t) * a + t * b
    u, _, vh = torch.linalg.svd(poses[:, :3, :3])
    poses[:, :3, :3] = u @ vh  # the rotations nearest to these mixtures
    return poses


@torch.no_grad()
def fly(scenes, net, args) -> Path:
    """Between the two context views of a held-out triplet and back, as an animated WebP picture."""
    data, _ = companions()
    (scene, indices), = data.held_out_triplets(scenes, args.seed, count=1)
    t = load_triplet(scene, indices, data.fit_size(scene, args.pixels, 16), args.device)
    gaussians, colours = reconstruct("mvsplat", t, net)
    height, width = t.images.shape[-2:]
    frames, zoom = [], max(1, round(640 / width))  # enlarged afterwards: drawn larger, Gaussians are a grid of dots
    for pose in tqdm(flight_path(*t.c2w[:2], 48), desc="flight", leave=False):
        view = t._replace(c2w=torch.stack([*t.c2w[:2], pose]))
        picture = data.to_image(render_target(gaussians, colours, view).features.permute(2, 0, 1))
        frames.append(picture.resize((zoom * width, zoom * height)))  # bicubic
    buffer, path = io.BytesIO(), Path(args.out) / "flight.webp"
    frames[0].save(buffer, "webp", save_all=True, append_images=frames[1:], duration=80, loop=0, quality=80)
    data.write_whole(path, buffer.getvalue())
    return path


@torch.no_grad()
def novel_view(scene, indices, vit, net, args):
    """One row of the picture, and the PSNR of the target by each geometry, on the pixels that all of them cover."""
    data, lift = companions()
    size = data.fit_size(scene, args.pixels, vit.patch)
    t, grid = load_triplet(scene, indices, size, args.device, "files"), tuple(side // vit.patch for side in size)
    truth, tokens = t.images[2].permute(1, 2, 0), vit(t.images[:2]).patches
    images, covered = {}, {}  # of each geometry, colours and features in one image (H, W, 3 + C)
    for name in ("mvsplat", "depth")[: 2 if t.depth is not None else 1]:
        gaussians, colours = reconstruct(name, t, net)
        features = torch.cat([colours, lift.lift_features(gaussians, tokens, t.masks, grid).features], 1)
        images[name], covered[name] = divide_by_alpha(render_target(gaussians, features, t))
    seen, rendered = covered["mvsplat"], images["mvsplat"][..., 3:]
    everywhere = torch.stack(list(covered.values())).all(0)
    if not everywhere.any():
        raise ValueError(f"{scene.name}: the splatted views cover nothing of the target; "
                         f"depth range taken: {scene.depth_range}")
    scores = {name: psnr(image[everywhere][:, :3], truth[everywhere]) for name, image in images.items()}
    scores["mean colour"] = psnr(truth[everywhere].mean(0), truth[everywhere])
    blended = semantic_blend(rendered, t.masks[2], valid=seen)
    basis = lift.pca_basis(rendered[seen])
    splatted = [images[n][..., :3].permute(2, 0, 1) * covered[n] for n in images] + [None] * (2 - len(images))
    return [*t.images, *splatted, *(lift.pca_colours(f, basis) * seen for f in (rendered, blended))], scores


def main(argv=None):
    data, lift = companions()
    parser = argparse.ArgumentParser(description="Splat two views into a third: a picture, or a flight.")
    data.scene_flags(parser, "out/03_splat", view_memory=0)
    parser.add_argument("--model", default="tiny", help="ViT weights: 'tiny', a published name, a file or folder")
    parser.add_argument("--mvsplat", default="tiny", help="MVSplat weights: 'tiny', re10k.ckpt, or fine-tuned by 04")
    parser.add_argument("--flight", action="store_true", help="instead, an animated flight between two held-out views")
    parser.add_argument("--pixels", type=data.positive, default=96 * 128, help="pixels a view; fewer need less memory")
    args = parser.parse_args(argv)
    with data.explained(args, "the same command starts again"):
        scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames, args.near, args.far)
        net = lift.load_mvsplat(args.mvsplat).to(args.device)
        if args.flight:
            print(f"a flight  ->  {fly(scenes, net, args)}")
            return
        vit, rows, scores = lift.load_vit(args.model).to(args.device), [], []
        for scene, indices in data.held_out_triplets(scenes, args.seed):  # four, splatted with every geometry
            row, score = novel_view(scene, indices, vit, net, args)
            rows, scores = rows + [row], scores + [score]
        headings = ["context", "context", "target view", "by mvsplat (black: holes)", "by measured depth",
                    "features (PCA)", "blended"]
        path = data.picture_grid(Path(args.out) / "novel_view.png", headings, rows)
        names = [name for name in scores[0] if all(name in score for score in scores)]
        mean = {name: sum(score[name] for score in scores) / len(scores) for name in names}
        baseline = mean.pop("mean colour")
        answer = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
        print(f"psnr where every geometry covers the target: {answer} (mean colour {baseline:.1f})  ->  {path}")
        if warning := warning_of([(score["mvsplat"], score["mean colour"]) for score in scores]):
            print(warning)


if __name__ == "__main__":
    main()
