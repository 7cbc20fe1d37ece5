"""Lifting: from two posed images to 3D Gaussians that carry the features of a vision transformer (ViT).

Paper   Splat and Distill (SnD) Sec. 3.2 (Eq. 1, geometry from two views) and Sec. 3.3 (Eq. 2-3, mask-aware upscaling),
        Fig. 11. The networks: DINOv2 (Oquab et al. 2023), DUNE (Sariyildiz et al. 2025), MVSplat (Chen et al. 2024).
In      two posed context images, their instance masks or superpixels; measured depth, where there is some.
Out     patch tokens (V, N, C); one Gaussian per pixel (G = V*H*W), which carries the feature of its pixel (G, C).
Run     python 02_lift.py     held-out rooms: depth and features as pictures, Gaussians as .ply files; ~5 s on 2 cores
        python 02_lift.py --scene_dir photos/ --model dinov2_vits14 --mvsplat re10k.ckpt     published weights
Copy    02_lift.py alone. Its command also needs 01_data.py, 03_splat.py, and tiny/vit.safetensors and
        tiny/mvsplat.safetensors for `tiny`.
Read    Gaussians, pixel_rays, bilinear_axis, upscale_weights, mask_aware_upscale, bilinear_upscale, lift_features,
        depth_gaussians: this is the method. Later, the two networks that it needs: Tokens, VisionTransformer,
        MVSplatConfig, MVSplat.forward, MVSplat.match, cost_volume, gaussian_adapter, mvsplat_gaussians
Try     The command prints the mean error of MVSplat's depth on four pairs of held-out views: 6.5 %. (A plane at the
        median depth has 25.9 %.) It is 12.7 % with --near 0.3 --far 20, as the D candidate depths then reach far
        beyond the room (three of the pairs change too), 10.5 % with --pixels 3072 (half the resolution), and 6.4 % with
        --pixels 49152 (twice). In MVSplat.forward, `coarse` in place of `coarse + delta` (no step 4): 9.2 %.
Not     training: tiny/train.py trains the built-in networks, 04_distill.py fine-tunes MVSplat and distils the ViT. The
        code takes any number of views from two on; the method uses two.
Words   tokens, features of pixels: the paper's F_low, F_high; mu, Sigma, alpha: mean, covariance, opacity of a
        Gaussian; V views, C channels, D candidate depths; h x w a small grid: of N tokens, in section 5 H/4 x W/4.
"""
from __future__ import annotations

import argparse
import importlib
import json
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = Path(__file__).parent / "tiny"  # the built-in weights

# ------------------------------------------------------------------------ 1. One Gaussian per pixel


class Gaussians(NamedTuple):
    """Pixel (row, col) of view v owns Gaussian (v * H + row) * W + col. This order is the pixel-to-Gaussian
    correspondence of SnD Sec. 3.2, by which `lift_features` gives each Gaussian the feature of its pixel."""

    means: Tensor  # (G, 3) mu, world frame
    covariances: Tensor  # (G, 3, 3) Sigma, world frame
    opacities: Tensor  # (G,) alpha in [0, 1]
    features: Tensor | None = None  # (G, C), once they are lifted


def pixel_rays(K: Tensor, height, width) -> Tensor:
    """K (3, 3) in pixels -> (H, W, 3): the ray through the centre of each pixel, camera frame, with z = 1.
    A ray times its z-depth is the point that the pixel sees."""
    rows = torch.arange(height, device=K.device) + 0.5
    cols = torch.arange(width, device=K.device) + 0.5
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1).to(K) @ torch.linalg.inv(K).T


# ------------------------------------------------------------------------ 2. From tokens to pixels: inside the masks
# The ViT (section 4) gives one token per patch, and the Gaussians need one feature per pixel. Bilinear interpolation
# between the four nearest tokens would mix the features of an object with those of whatever stands behind it. SnD
# therefore uses only those of the four that lie on the same instance as the pixel, and scales their weights so that
# they sum to 1 again. (The paper says "semantic label", but its masks are those of instances.)


def bilinear_axis(size, count, device):
    """Bilinear interpolation along one axis, from `count` patches, whose tokens sit at their centres, to `size` pixels.
    -> for each pixel the two patches around it and their weights, both (size, 2); for each patch the pixel at its
    centre (count,)."""
    pixel = torch.arange(size, device=device, dtype=torch.float64) + 0.5
    position = (pixel * count / size - 0.5).clamp(0, count - 1)  # on an axis on which patch i has its centre at i
    first = position.floor()
    fraction = position - first
    patches = torch.stack([first, (first + 1).clamp_max(count - 1)], -1).long()
    weights = torch.stack([1 - fraction, fraction], -1)
    centres = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) * size / count
    return patches, weights, centres.long()  # if its size is even, the pixel just past the centre


def upscale_weights(
    mask: Tensor,  # (H, W) int64 instance ids; 0, unlabelled, counts as an id like any other
    grid,  # (h, w) of the tokens
):
    """SnD Eq. 3 in sparse form: each pixel is a weighted sum of four tokens -> index (H*W, 4) int64 into the h*w
    tokens, and weight (H*W, 4). Pixel (row, col) is u = row * W + col, and tokens are numbered alike."""
    (H, W), (h, w) = mask.shape, grid
    rows, row_weight, centre_row = bilinear_axis(H, h, mask.device)
    cols, col_weight, centre_col = bilinear_axis(W, w, mask.device)
    # Two rows and two columns of patches make four tokens: (H, W, 2, 2) -> (H*W, 4)
    index = (rows[:, None, :, None] * w + cols[None, :, None, :]).reshape(H * W, 4)  # N(u), the four tokens around u
    bilinear = (row_weight[:, None, :, None] * col_weight[None, :, None, :]).reshape(H * W, 4)  # w~_uv
    # Differs: the official code reads the id of a token at row linspace(0, H-1, h) of the mask (columns likewise), up
    # to half a patch away from the token. We read it at the centre of the patch.
    token_ids = mask[centre_row[:, None], centre_col].flatten()
    same_id = token_ids[index] == mask.reshape(H * W, 1)  # mask(v) = mask(u)
    shared = bilinear * same_id
    total = shared.sum(1, keepdim=True)  # below 1e-9 it is 0 but for rounding
    # Differs: where none of the four tokens has the pixel's id, Eq. 3 is 0/0. The official code gives such a pixel a
    # zero feature and lifts it all the same. We keep its bilinear weights.
    weight = torch.where(total > 1e-9, shared / total.clamp_min(1e-9), bilinear)  # SnD Eq. 3
    return index, weight.float()


def mask_aware_upscale(tokens: Tensor, mask: Tensor, grid) -> Tensor:
    """tokens (N, C), mask (H, W) int64, grid (h, w) -> features (H, W, C) that do not cross borders of instances."""
    assert len(tokens) == grid[0] * grid[1], f"{len(tokens)} tokens do not fill a grid of {grid[0]}x{grid[1]}"
    index, weight = upscale_weights(mask, grid)
    features = sum(weight[:, k, None].to(tokens) * tokens[index[:, k]] for k in range(4))  # SnD Eq. 2
    return features.view(*mask.shape, -1)


def bilinear_upscale(tokens: Tensor, mask: Tensor, grid) -> Tensor:
    """The same without masks, for comparison (SnD Table 5 B)."""
    return mask_aware_upscale(tokens, torch.zeros_like(mask), grid)


def lift_features(gaussians: Gaussians, tokens: Tensor, masks: Tensor, grid) -> Gaussians:
    """The lift, SnD Sec. 3.3: tokens (V, N, C), masks (V, H, W) -> the Gaussians with the features of their pixels."""
    maps = [mask_aware_upscale(view_tokens, mask, grid) for view_tokens, mask in zip(tokens, masks)]
    return gaussians._replace(features=torch.cat([features.flatten(0, 1) for features in maps]))


# ------------------------------------------------------------------------ 3. Gaussians from measured depth
# Not in the paper: the simplest geometry, which a network that finds depth should come close to. A pixel of known depth
# sees a small piece of surface. Its Gaussian lies on it like a coin: as wide as the pixel's footprint, and thin.


def depth_gaussians(
    depth: Tensor,  # (V, H, W) z-depth; 0 = not measured: the Gaussian keeps its slot, with opacity 0
    K: Tensor,  # (V, 3, 3) pixels
    c2w: Tensor,  # (V, 4, 4)
    opacity=0.95,
    spread=0.35,  # standard deviation in pixels: 0.6 blurs a novel view, 0.2 leaves it thin (8 % of alpha below 0.9)
) -> Gaussians:
    """One flat Gaussian per pixel, on the surface that the depth maps show."""
    parts = []
    for z, k, pose in zip(depth, K, c2w):
        known, rays = z > 0, pixel_rays(k, *z.shape)
        # Normals come from differences of depth (workshop). Their slant is limited to 75 degrees.
        normal = limit_slant(surface_normals(z, k), rays)
        z = torch.where(known, z, 1.0)[..., None]  # any depth will do where the opacity is 0
        # A step of one pixel (x or y) changes the ray r by d, a column of K^-1, and the point p = z r by
        # dp = dz r + z d. It stays on its tangent plane: n . dp = 0, so dz = -z (n . d) / (n . r), and therefore
        # dp = z (d - slope r) with slope = (n . d) / (n . r).
        d_ray = torch.linalg.inv(k)[:, :2].T  # (2, 3)
        slope = (normal @ d_ray.T) / (normal * rays).sum(-1, keepdim=True)  # (H, W, 2)
        d_point = z[..., None] * (d_ray - slope[..., None] * rays[..., None, :])  # (H, W, 2, 3)
        thickness = 0.1 * z / k[0, 0] * normal  # (H, W, 3) a tenth of a pixel along the normal
        axes = torch.cat([spread * d_point, thickness[..., None, :]], -2).mT  # (H, W, 3, 3), an axis in each column
        axes = pose[:3, :3] @ axes  # to the world frame
        covariances = axes @ axes.mT  # the sum of a a^T over the three axes a
        means = (rays * z) @ pose[:3, :3].T + pose[:3, 3]
        parts.append((means.flatten(0, 1), covariances.flatten(0, 1), torch.where(known, opacity, 0.0).to(z).flatten()))
    return Gaussians(*(torch.cat(column) for column in zip(*parts)))


# ------------------------------------------------------------------------ 4. Where the features come from: the ViT
# Sections 1 to 3 are the method; sections 4 and 5 are the networks under it. `Block` is the usual one (below).


class Tokens(NamedTuple):
    cls: Tensor  # (B, C) one for the whole image
    registers: Tensor  # (B, R, C) scratch space of the network; R = 0 in the models without
    patches: Tensor  # (B, N, C), N = h * w, row-major


class VisionTransformer(nn.Module):
    """The ViT of DINOv2 and DUNE; the names of its modules are those of Meta's code, so that published weights load."""

    def __init__(
        self,
        patch=14,  # P, in pixels
        dim=384,  # C
        depth=12,  # number of blocks
        heads=6,
        registers=0,  # R
        grid=37,  # side of the square patch grid that the position embedding was trained for
        mlp_ratio=4,
        swiglu=False,  # True in ViT-g: a gated MLP. This and the next matter to published weights alone
        positions=None,  # how positions are interpolated to other grids: see `interpolate_positions` (workshop)
    ):
        super().__init__()
        self.patch, self.dim, self.heads, self.grid = patch, dim, heads, grid
        self.mlp_ratio, self.swiglu, self.registers = mlp_ratio, swiglu, registers
        self.positions = positions or ("antialiased" if registers else "scale")  # Meta's choices
        self.checkpointing = False  # True: the backward pass computes each block again, which saves most of its memory
        self.patch_embed = PatchEmbed(patch, dim)  # (workshop) a convolution whose stride is its size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # for pretraining alone, but part of the published weights
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tokens:
        """images (B, 3, H, W) in [0, 1], sides multiples of the patch -> tokens after the final norm."""
        x = self.embed(images)  # (B, 1 + N, C)
        R = self.registers
        if R:  # registers have no position, and go between the class token and the patches
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            recompute = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = self.norm(x)  # 04 trains the tokens after this norm; 05 probes those before it
        return Tokens(x[:, 0], x[:, 1:1 + R], x[:, 1 + R:])

    def embed(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> class token and patches, their positions added, (B, 1 + N, C)."""
        B, _, H, W = images.shape
        P = self.patch
        assert H % P == 0 and W % P == 0, f"image {H}x{W} is no multiple of the patch size {P}"
        patches = self.patch_embed(normalised(images))  # (workshop) by ImageNet's mean and deviation
        x = torch.cat([self.cls_token.expand(B, -1, -1), patches], 1)
        return x + interpolate_positions(self.pos_embed, (H // P, W // P), self.positions)


# ------------------------------------------------------------------------ 5. Geometry from two views: MVSplat
# Chen et al. 2024, "MVSplat", Sec. 3. This is the published network, quirks included, without its colours. Five steps:
#
#   1  features         a CNN sees each view alone; a transformer then compares each view with itself and the other
#   2  cost volume      a plane sweep: how well a pixel's features match the other view at each of D candidate depths
#   3  coarse depth     a U-Net cleans the cost volume; its softmax weighs the candidates (all as disparity, 1 / depth)
#   4  refined depth    a second U-Net, at full resolution, corrects the coarse depth by what the images show
#   5  Gaussians        the mean lies on the pixel's ray at that depth; shape and opacity are read off the features
#
# `FeatureCNN`, `MultiViewTransformer`, `UNet`, `conv` and `group_norm` are standard parts (below).


class MVSplatConfig(NamedTuple):
    """Sizes of an MVSplat; the defaults are the published re10k model's. `MVSplatConfig.tiny` is the built-in one's."""

    d_feature: int = 128  # channels C of the features that are matched
    num_depth_candidates: int = 128  # planes D of the cost volume
    costvolume_unet_feat_dim: int = 128  # width of U-Net 1, which cleans the cost volume
    depth_unet_feat_dim: int = 32  # width of U-Net 2, which refines the depth at full resolution
    sh_degree: int = 4  # of the colours, which are not computed
    cnn_widths: tuple = (64, 96, 128)  # fixed in the official code, as is the number of layers
    transformer_layers: int = 6


MVSplatConfig.tiny = MVSplatConfig(
    d_feature=32, num_depth_candidates=48, costvolume_unet_feat_dim=32, depth_unet_feat_dim=16, sh_degree=0,
    cnn_widths=(32, 48, 64), transformer_layers=4)


class MVSplat(nn.Module):
    """Posed images, two or more -> one Gaussian per pixel, in one pass. Its modules have the official names."""

    def __init__(self, config=MVSplatConfig()):
        super().__init__()
        self.config = config
        C, D, m1, m2 = config[:4]  # m1, m2: the widths of U-Net 1 and 2
        raw = 2 + 3 + 4 + 3 * (config.sh_degree + 1) ** 2  # offset in the pixel, scales, quaternion, colours
        self.backbone = nn.ModuleDict({
            "backbone": FeatureCNN(config.cnn_widths, C),
            "transformer": MultiViewTransformer(C, config.transformer_layers)})
        self.depth_predictor = nn.ModuleDict({
            # step 3, from the cost volume and the features
            "corr_refine_net": nn.Sequential(conv(D + C, m1), group_norm(m1), nn.GELU(), UNet(m1, 3), conv(m1, D)),
            "regressor_residual": conv(D + C, D, 1),
            "depth_head_lowres": nn.Sequential(conv(D, 2 * D), nn.GELU(), conv(2 * D, D)),
            # step 4; U-Net 2 takes 3 channels of the image, coarse disparity, its certainty, m2 channels of features
            "upsampler": nn.Sequential(conv(2 * C, C), nn.UpsamplingBilinear2d(scale_factor=4), nn.GELU()),
            "proj_feature": conv(C, m2),
            "refine_unet": nn.Sequential(conv(m2 + 5, m2), group_norm(m2, 4), nn.GELU(), UNet(m2, 5)),
            # step 5, from the output of U-Net 2, the image and the features
            "to_gaussians": nn.Sequential(conv(m2 + 3 + C, 2 * raw), nn.GELU(), conv(2 * raw, raw)),
            # the correction of step 4 and the opacity, from the output of U-Net 2
            "to_disparity": nn.Sequential(conv(m2, 2 * m2), nn.GELU(), conv(2 * m2, 2))})

    def forward(
        self,
        images: Tensor,  # (V, 3, H, W) in [0, 1], V >= 2, any size
        K: Tensor,  # (V, 3, 3) pixels
        c2w: Tensor,  # (V, 4, 4)
        near,  # (V,) or float, in the scene's unit
        far,
    ) -> Gaussians:
        V, _, height, width = images.shape
        # The U-Nets halve the image four times, so it is padded to multiples of 16. The padding is cut off in step 5.
        images = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")
        near, far = (torch.as_tensor(bound).to(images).expand(V) for bound in (near, far))
        fraction = torch.linspace(0, 1, self.config.num_depth_candidates).to(images)
        disparities = 1 / far[:, None] + fraction * (1 / near - 1 / far)[:, None]  # (V, D) 1 / depth, far first

        # Steps 1 to 3, at a quarter of the resolution
        cnn, features, _, probability = self.match(images, K, c2w, disparities)
        coarse = (probability * disparities[:, :, None, None]).sum(1, keepdim=True)  # expected disparity (V, 1, h, w)
        certainty = probability.amax(1, keepdim=True)

        # Step 4: U-Net 2 sees the image, the features, the coarse disparity and how certain it is. Its output
        # yields `delta`, which is added to the coarse disparity, and the logit of the opacity.
        net = self.depth_predictor
        coarse = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=True)
        certainty = F.interpolate(certainty, scale_factor=4, mode="nearest")
        upsampled = net["upsampler"](torch.cat([features, cnn], 1))  # (V, C, H, W)
        x = torch.cat([images, net["proj_feature"](upsampled), coarse, certainty], 1)
        refined = net["refine_unet"](x)  # (V, m2, H, W)
        delta, logit = net["to_disparity"](refined).chunk(2, 1)
        depth = 1 / (coarse + delta).clamp((1 / far).view(V, 1, 1, 1), (1 / near).view(V, 1, 1, 1))

        # Step 5
        first, gelu, last = net["to_gaussians"]
        raw = []
        for maps in zip(refined.split(1), images.split(1), upsampled.split(1)):  # one view at a time, to save memory
            raw.append(gelu(first(torch.cat(maps, 1))))
        # Differs: MVSplat predicts colours as spherical harmonics, and SnD throws them away (Sec. 3.2). We keep their
        # rows in the last layer, so that the published weights load to the last tensor, but do not compute them.
        raw = [F.conv2d(x, last.weight[:9], last.bias[:9], padding=1) for x in raw]  # offset, scales and quaternion
        crop = lambda x: x[:, :, :height, :width].permute(0, 2, 3, 1).to(images)
        depth, opacity, raw = crop(depth), crop(logit.sigmoid()), crop(torch.cat(raw))  # (V, height, width, 1 or 9)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 a camera would be half a pixel off
            means, scales, quaternions = gaussian_adapter(depth, raw, K, c2w)
            rotation = c2w[:, None, None, :3, :3] @ rotation_matrix(quaternions)  # to the world frame
            axes = rotation * scales[..., None, :]  # the columns are the axes of the Gaussian
            return Gaussians(means.flatten(0, 2), (axes @ axes.mT).flatten(0, 2), opacity.flatten())

    def match(self, images, K, c2w, disparities):
        """Steps 1 to 3 -> features (V, C, h, w) before and after the transformer, the cost volume, and the probability
        of each candidate depth, both (V, D, h, w)."""
        cnn = self.backbone["backbone"](images)
        features = self.backbone["transformer"](cnn)
        with torch.autocast(images.device.type, enabled=False):  # for the cameras, as in `forward`
            small_K = K / K.new_tensor([4, 4, 1])[:, None]
            volume = cost_volume(features.to(images), small_K, c2w, disparities)
        net, x = self.depth_predictor, torch.cat([volume, features], 1)
        cleaned = net["corr_refine_net"](x) + net["regressor_residual"](x)
        return cnn, features, volume, net["depth_head_lowres"](cleaned).softmax(1)


def cost_volume(
    features: Tensor,  # (V, C, h, w)
    K: Tensor,  # (V, 3, 3) in pixels of that grid
    c2w: Tensor,  # (V, 4, 4)
    disparities: Tensor,  # (V, D) the candidates, as 1 / depth
) -> Tensor:
    """Step 2: how well each candidate depth of a pixel matches the other views, (V, D, h, w) (MVSplat Sec. 3.1).

    If the pixel had the candidate depth, it would be seen at a certain place in each other view. The match is the
    correlation of the features there with its own, and 0 outside the view.
    """
    V, C, h, w = features.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).to(features)  # (h, w, 3); as published, without the + 0.5
    volume = torch.zeros(V, disparities.shape[1], h, w).to(features)
    for r, s in permutations(range(V), 2):  # r the reference view, s the source view
        to_other = torch.linalg.inv(c2w[s]) @ c2w[r]
        rays = pixels @ (K[r] @ to_other[:3, :3] @ torch.linalg.inv(K[r])).T  # as published: K[r] for both views
        correlations = []
        for disparity in disparities[r].split(8):  # 8 candidates at a time, to bound the memory
            point = rays / disparity[:, None, None, None] + K[r] @ to_other[:3, 3]  # (8, h, w, 3)
            uv = point[..., :2] / point[..., 2:].clamp_min(1e-3)  # behind camera s: far outside of its view
            grid = 2 * uv / uv.new_tensor([w - 1, h - 1]) - 1
            warped = F.grid_sample(features[s].expand(len(disparity), -1, -1, -1), grid, align_corners=True)
            correlations.append((warped * features[r]).sum(1) / C**0.5)
        volume[r] = volume[r] + torch.cat(correlations) / (V - 1)
    return volume


def gaussian_adapter(
    depth: Tensor,  # (V, H, W, 1)
    raw: Tensor,  # (V, H, W, 9) offset within the pixel, scales, quaternion x y z w
    K: Tensor,  # (V, 3, 3) pixels
    c2w: Tensor,  # (V, 4, 4)
):
    """Step 5 (MVSplat Sec. 3.2): means (V, H, W, 3), world frame; scales (V, H, W, 3), the standard deviations along
    the axes; unit quaternions (V, H, W, 4), which turn the axes into the camera frame."""
    V, H, W, _ = raw.shape
    inverse = torch.linalg.inv(K)
    rays = torch.stack([pixel_rays(k, H, W) for k in K])
    rays = rays + (raw[..., :2].sigmoid() - 0.5) @ inverse[:, None, :, :2].mT  # anywhere in the pixel
    unit = F.normalize(rays, dim=-1) @ c2w[:, None, :3, :3].mT
    # As published, the depth is a distance along the ray here, although step 2 searched z-depth. So a point is too near
    # by a factor, the length of its ray at z = 1: 1.4 at the edge of a view of 90 degrees. The network was trained so.
    means = c2w[:, None, None, :3, 3] + depth * unit
    pixel = inverse[:, :2, :2].sum((1, 2)).view(V, 1, 1, 1)  # width + height of a pixel at depth 1, as published
    scales = (0.5 + 14.5 * raw[..., 2:5].sigmoid()) * depth * 0.1 * pixel  # 0.05 to 1.5 times `pixel` at its depth
    quaternions = raw[..., 5:9] / (raw[..., 5:9].norm(dim=-1, keepdim=True) + 1e-8)
    return means, scales, quaternions


def mvsplat_gaussians(
    net: MVSplat,
    images: Tensor,  # (V, 3, H, W) in [0, 1]
    K: Tensor,  # (V, 3, 3) pixels
    c2w: Tensor,  # (V, 4, 4)
    near: float,  # in the scene's unit
    far: float,
) -> Gaussians:
    """MVSplat on a scene of any unit. It was trained where the nearest depth is 1, so the scene is scaled to that, and
    the Gaussians are scaled back."""
    # Differs: the official code gives MVSplat near = 1 and far = 100 in the data set's unit, so that nothing nearer
    # than a metre exists. We take the near and far of the scene and scale the scene so that near is 1.
    poses = c2w.clone()
    poses[:, :3, 3] /= near
    g = net(images, K, poses, 1.0, far / near)  # SnD Eq. 1
    return g._replace(means=near * g.means, covariances=near**2 * g.covariances)


# ---- Workshop: not needed to understand the method ----

# ------------------------------------------------------------------------ geometry of pixels


def step_to_neighbour(points: Tensor, known: Tensor, dim) -> Tensor:
    """How the point that a pixel sees changes from one pixel to the next along `dim`, (H, W, 3); 0 = not known. At the
    edge of an object one neighbour lies on another surface, so the one closer in depth counts."""
    count = points.shape[dim]
    both = known.narrow(dim, 1, count - 1) & known.narrow(dim, 0, count - 1)
    step = torch.where(both[..., None], points.diff(dim=dim), torch.inf)
    border = torch.full_like(points.narrow(dim, 0, 1), torch.inf)
    ahead, behind = torch.cat([step, border], dim), torch.cat([border, step], dim)
    closer = torch.where(behind[..., 2:].abs() <= ahead[..., 2:].abs(), behind, ahead)
    return torch.where(closer.isfinite(), closer, 0.0)


def surface_normals(depth: Tensor, K: Tensor) -> Tensor:
    """z-depth (H, W), 0 = unknown, and K (3, 3) -> unit normals (H, W, 3), camera frame, turned towards the camera."""
    rays = pixel_rays(K, *depth.shape)
    down, right = (step_to_neighbour(rays * depth[..., None], depth > 0, dim) for dim in (0, 1))
    normal = torch.linalg.cross(down, right, dim=-1)
    length = normal.norm(dim=-1, keepdim=True)
    facing = -F.normalize(rays, dim=-1)  # in place of a normal that cannot be found
    return torch.where(length > 1e-12, normal / length.clamp_min(1e-12), facing)


def limit_slant(normal: Tensor, rays: Tensor) -> Tensor:
    """Turns normals that make more than 75 degrees with their ray back to 75: see `depth_gaussians`."""
    towards = -F.normalize(rays, dim=-1)
    cosine = (normal * towards).sum(-1, keepdim=True)
    across = F.normalize(normal - cosine * towards, dim=-1)
    cosine = cosine.clamp(0.25, 1.0)
    return cosine * towards + (1 - cosine**2).clamp_min(0).sqrt() * across


def view_depth(gaussians: Gaussians, c2w: Tensor, height, width) -> Tensor:
    """The z-depth (V, H, W) of one-a-pixel Gaussians in their own views."""
    means = gaussians.means.view(len(c2w), -1, 3)
    return ((means - c2w[:, None, :3, 3]) * c2w[:, None, :3, 2]).sum(-1).view(-1, height, width)


def cross_check(
    depth: Tensor,  # (H, W) z-depth
    other_depth: Tensor,  # (H, W) z-depth of the other view
    K_ref: Tensor,  # (3, 3) pixels
    K_other: Tensor,  # (3, 3) pixels
    ref_to_other: Tensor,  # (4, 4) camera to camera
    tolerance=0.06,
) -> Tensor:
    """How well the depth of a pixel agrees with the other view's where it lands there, (H, W) in [0, 1]; 0 outside."""
    height, width = depth.shape
    points = (pixel_rays(K_ref, height, width) * depth[..., None]) @ ref_to_other[:3, :3].T + ref_to_other[:3, 3]
    pixel = points @ K_other.T
    grid = 2 * pixel[..., :2] / pixel[..., 2:].clamp_min(1e-6) / pixel.new_tensor([width, height]) - 1
    theirs = F.grid_sample(other_depth[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
    error = (theirs - points[..., 2]).abs() / points[..., 2].clamp_min(1e-6)
    return torch.exp(-((error / tolerance) ** 2)) * ((points[..., 2] > 0) & (theirs > 0))


def rotation_matrix(quaternion: Tensor) -> Tensor:  # (..., 4) x y z w -> (..., 3, 3)
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion.square().sum(-1) + 1e-8)
    return torch.stack([1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
                        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
                        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)], -1).unflatten(-1, (3, 3))


# ------------------------------------------------------------------------ ordinary parts of the networks


def normalised(images: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> as the networks were trained
    """With plain numbers, because a GPU would have to wait for constants to be copied to it at each call."""
    channels = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


def interpolate_positions(pos_embed: Tensor, size, way) -> Tensor:
    """(1, 1 + grid * grid, C), learned for a square grid -> (1, 1 + h * w, C) for a grid of size (h, w).

    All implementations interpolate bicubically, but differently. `way` is "scale": by the factor (h + 0.1) / grid (Meta
    without registers, DUNE); "size": to h x w (transformers >= 4.45 without registers); or "antialiased": to h x w with
    antialiasing (timm; Meta and transformers with registers). With random weights, the tokens differ by 6 to 22 %.
    """
    grid, (h, w) = math.isqrt(pos_embed.shape[1] - 1), size
    if h == w == grid:
        return pos_embed
    cls, square = pos_embed[:, :1], pos_embed[:, 1:]
    square = square.view(1, grid, grid, -1).permute(0, 3, 1, 2)
    if way == "scale":  # the 0.1 keeps rounding from making the result one smaller
        square = F.interpolate(square, scale_factor=((h + 0.1) / grid, (w + 0.1) / grid), mode="bicubic")
    else:
        square = F.interpolate(square, size=(h, w), mode="bicubic", antialias=way == "antialiased")
    return torch.cat([cls, square.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4, swiglu=False):
        super().__init__()
        hidden = mlp_ratio * dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = SwiGLU(dim, (int(hidden * 2 / 3) + 7) // 8 * 8) if swiglu else mlp(dim, hidden)
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.ones(dim)}) for _ in range(2))  # a factor per channel

    def forward(self, x):  # (B, N, C)
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):  # (B, 3, H, W)
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)


def in_turn(**modules):  # one after the other, by their published names
    return nn.Sequential(OrderedDict(modules))


def mlp(dim, hidden):
    return in_turn(fc1=nn.Linear(dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, dim))


class SwiGLU(nn.Module):  # in place of the Mlp in ViT-g
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


# ------------------------------------------------------------------------ parts of MVSplat


def conv(c_in, c_out, kernel=3, stride=1, bias=True):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)


def group_norm(channels, groups=8):
    return nn.GroupNorm(groups if channels % groups == 0 else 4, channels)


class CnnBlock(nn.Module):  # of FeatureCNN
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.conv2 = conv(c_in, c_out, 3, stride, bias=False), conv(c_out, c_out, bias=False)
        self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride)) if stride > 1 or c_in != c_out else None

    def forward(self, x):
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu((x if self.downsample is None else F.instance_norm(self.downsample(x))) + y)


class FeatureCNN(nn.Module):  # (V, 3, H, W) in [0, 1] -> (V, C, H / 4, W / 4)
    def __init__(self, widths, channels):
        super().__init__()
        a, b, c = widths
        self.conv1 = conv(3, a, 7, 2, bias=False)
        self.layer1 = nn.Sequential(CnnBlock(a, a, 1), CnnBlock(a, a, 1))
        self.layer2 = nn.Sequential(CnnBlock(a, b, 2), CnnBlock(b, b, 1))
        self.layer3 = nn.Sequential(CnnBlock(b, c, 1), CnnBlock(c, c, 1))
        self.conv2 = conv(c, channels, 1)

    def forward(self, images):
        x = F.relu(F.instance_norm(self.conv1(normalised(images))))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class MultiViewTransformer(nn.Module):
    """In each layer every view looks at itself, then at the others, so that a feature knows what it could be taken
    for. Attention stays within windows, and in every second layer the windows lie across the borders of the others."""

    def __init__(self, dim, layers):
        super().__init__()
        layer = lambda: nn.ModuleDict({
            "self_attn": WindowAttention(dim, ffn=False), "cross_attn_ffn": WindowAttention(dim, ffn=True)})
        self.layers = nn.ModuleList(layer() for _ in range(layers))

    def forward(self, features):  # (V, C, h, w) -> the same
        V, C, h, w = features.shape
        x = (features + window_positions(C, h, w).to(features)).permute(0, 2, 3, 1)  # (V, h, w, C)
        for number, layer in enumerate(self.layers):
            others = [torch.stack([x[u] for u in range(V) if u != v], -2) for v in range(V)]
            others = torch.stack(others)  # (V, h, w, V - 1, C), as they were before this layer (as published)
            x = layer["self_attn"](x, x[..., None, :], shifted=number % 2)
            x = layer["cross_attn_ffn"](x, others, shifted=number % 2)
        return x.permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Attention with one head, from the tokens of each view to the tokens of `target` in the same window."""

    def __init__(self, dim, ffn):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim)
        if ffn:
            wider, narrower = nn.Linear(2 * dim, 8 * dim, bias=False), nn.Linear(8 * dim, dim, bias=False)
            self.mlp = nn.Sequential(wider, nn.GELU(), narrower)
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, target, shifted):  # (V, h, w, C), (V, h, w, M, C) -> (V, h, w, C)
        q, k, v = self.q_proj(x), self.k_proj(target), self.v_proj(target)
        if shifted and target.shape[3] > 1:
            k, v = misplaced(k), misplaced(v)  # a quirk of the published network
        message = torch.empty_like(q)
        for rows, cols in windows(*x.shape[1:3], shifted):
            query = q[:, None, rows, cols].flatten(2, 3)  # (V, 1 head, L, C)
            key, value = (y[:, None, rows, cols].flatten(2, 4) for y in (k, v))  # (V, 1 head, L * M, C)
            mixed = F.scaled_dot_product_attention(query, key, value)
            message[:, rows, cols] = mixed.view_as(q[:, rows, cols])
        message = self.norm1(self.merge(message))
        if hasattr(self, "mlp"):
            message = self.norm2(self.mlp(torch.cat([x, message], -1)))
        return x + message


def windows(h, w, shifted):
    """The rows and columns of each window: the four quadrants, or nine windows that lie across their borders. (The
    official code rolls the image and masks the wrong neighbours that this makes: the same up to exp(-100).)"""
    cuts = lambda n: (0, n // 4, 3 * n // 4, n) if shifted else (0, n // 2, n)
    parts = lambda n: [slice(a, b) for a, b in zip(cuts(n), cuts(n)[1:])]
    return [(rows, cols) for rows in parts(h) for cols in parts(w)]


def window_positions(channels, h, w) -> Tensor:
    """-> (C, h, w): sines and cosines of the row (first half) and the column (second half) within a quadrant."""
    half = channels // 2
    k = torch.arange(half)
    omega = 10000 ** (2 * (k // 2) / half)
    codes = []
    for n in (h // 2, w // 2):
        angle = 2 * math.pi * (torch.arange(1, n + 1) / (n + 1e-6))[:, None] / omega
        codes.append(torch.where(k % 2 == 0, angle.sin(), angle.cos()).T)  # (C / 2, n)
    rows, cols = codes[0][:, :, None].expand(-1, -1, w // 2), codes[1][:, None].expand(-1, h // 2, -1)
    return torch.cat([rows, cols]).tile(1, 2, 2)


def misplaced(x: Tensor) -> Tensor:
    """A quirk of the published MVSplat with three or more views: in a shifted window, keys are ordered by pixel, then
    view, but their mask by view, then pixel. So each key is masked as if it stood at the place of another. Here it is
    moved to that place, within each quadrant of the rolled image. (V, h, w, M, C) -> the same."""
    V, h, w, M, C = x.shape
    x = x.roll((-(h // 4), -(w // 4)), (1, 2)).view(V, 2, h // 2, 2, w // 2, M, C).transpose(2, 3)
    x = x.reshape(V, 2, 2, M, h // 2, w // 2, C).movedim(3, 5)
    x = x.transpose(2, 3).reshape(V, h, w, M, C)
    return x.roll((h // 4, w // 4), (1, 2))


class ResidualBlock(nn.Module):  # of UNet
    def __init__(self, c_in, c_out):
        super().__init__()
        self.in_layers = nn.Sequential(conv(c_in, c_out), group_norm(c_out), nn.SiLU())
        self.out_layers = nn.Sequential(conv(c_out, c_out), group_norm(c_out), nn.SiLU())
        self.skip_connection = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def forward(self, x):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class UNet(nn.Module):
    """A U-Net over all views, with one width at all levels and cross-view attention at the coarsest (MVSplat Sec. 3.1).
    The outputs of its input blocks are kept; each output block takes one of them beside its input, the latest first."""

    def __init__(self, width, levels):
        super().__init__()

        def block(c_in, level, *more):
            attention = [CrossViewAttention(width)] if level == levels - 1 else []
            return nn.Sequential(ResidualBlock(c_in, width), *attention, *more)

        self.input_blocks = nn.ModuleList([nn.Sequential(conv(width, width))])
        for level in range(levels):
            if level > 0:
                self.input_blocks.append(nn.Sequential(in_turn(op=conv(width, width, 3, 2))))  # half the size
            self.input_blocks.append(block(width, level))
        self.middle_block = nn.Sequential(ResidualBlock(width, width), nn.Identity(), ResidualBlock(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.output_blocks.append(block(2 * width, level))
            double = [in_turn(up=nn.Upsample(scale_factor=2), conv=conv(width, width))] if level > 0 else []
            self.output_blocks.append(block(2 * width, level, *double))
        self.out = nn.Sequential(conv(width, width), group_norm(width), nn.SiLU())

    def forward(self, x):  # (V, width, h, w) -> the same
        kept = []
        for block in self.input_blocks:
            x = block(x)
            kept.append(x)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = block(torch.cat([x, kept.pop()], 1))
        return self.out(x)


class CrossViewAttention(nn.Module):
    """Attention among the pixels of all views at once."""

    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.qkv, self.proj_out, self.norm = nn.Conv1d(dim, 3 * dim, 1), nn.Conv1d(dim, dim, 1), group_norm(dim)

    def forward(self, x):  # (V, m, h, w) -> the same
        V, m, h, w = x.shape
        pixels = x.transpose(0, 1).reshape(1, m, V * h * w)  # all views in one row
        qkv = self.qkv(pixels).view(self.heads, 3, m // self.heads, V * h * w)
        q, k, v = qkv.permute(1, 0, 3, 2).contiguous()[:, None]  # each (1, heads, V*h*w, m / heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self.proj_out(mixed.mT.reshape(1, m, V * h * w))
        return x + self.norm(mixed.view(m, V, h, w).transpose(0, 1))


# ------------------------------------------------------------------------ weights: networks from files

# How the layouts name what we name as Meta does, and how their code interpolates positions in models without registers.
RENAMES = {
    "meta": (), "timm": ((r"^register_tokens", "reg_token"), (r"\.w12\.", ".fc1."), (r"\.w3\.", ".fc2.")),
    "transformers": (
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
        (r"^norm\.", "layernorm."), (r"\.w12\.", ".weights_in."), (r"\.w3\.", ".weights_out."))}
POSITIONS = {"meta": "scale", "timm": "antialiased", "transformers": "size"}

# Dicts within a file; prefixes of DDP, torch.compile, Meta's training code, DUNE and transformers; and what stands
# beside the ViT and is left out knowingly: heads, losses, and the student where the teacher is there too.
WITHIN = ("model", "model_state_dict", "state_dict", "teacher", "student")
WRAPPERS = r"^((module|_orig_mod|model|teacher|backbone|vit|dinov2(_with_registers)?|encoder(?!\.layer))\.)+"
BESIDE = r"(student|(dino|ibot)_head|(dino|ibot_patch)_loss|projectors|teacher_norms|classifier|(linear_)?head|fc)\."


def load_vit(name_or_path) -> VisionTransformer:
    """A DINOv2 (ViT-S/B/L/g, with or without registers) or DUNE ViT with its weights, in fp32 and evaluation mode.

    It comes from `tiny` (built in), a published name (`PUBLISHED`), a file, or a folder such as `save_vit` writes. The
    names of the tensors tell the layout, their shapes every size, and config.json the number of heads (without it they
    are 64 wide, as in all published models). Raises ValueError, one line naming the file, where anything does not fit.
    """
    path = find_weights(str(name_or_path))
    stored, chunked = backbone_tensors(path)
    layout = "meta" if {"mask_token", "register_tokens"} & stored.keys() else "timm"
    layout = "transformers" if any(name.startswith("embeddings.") for name in stored) else layout
    names = lambda key: stored_names(key, layout)
    beside = path.with_name("config.json")
    config = read_json(beside) if layout == "transformers" and beside.is_file() else None
    try:
        sizes = vit_sizes(stored, names, config)
        with torch.device("meta"):  # without memory, until all shapes are known to fit
            model = VisionTransformer(**sizes)
    except Exception as error:  # foreign tensors can break any line of these
        raise fault(path, f"not in any layout of DINOv2 or DUNE ({type(error).__name__}: {error}); give "
                          "weights of one of these") from None
    # Differs: SnD trained with Meta's way of interpolating positions, but its weights are opened in timm, which has
    # another. We take the way of the code whose layout the weights have, and `save_vit` keeps it.
    way = "antialiased" if sizes["registers"] else POSITIONS[layout]
    if chunked or path.name == "vit.safetensors":  # DUNE is as Meta without registers; tiny/ has no config.json
        way = "scale"
    model.positions = (config or {}).get("positions", way)
    if layout == "timm" and sizes["registers"] and sound(stored["pos_embed"]):  # in timm none for the class token
        stored["pos_embed"] = F.pad(stored["pos_embed"], (0, 0, 1, 0))
    stored.setdefault(names("mask_token")[0], torch.zeros(1, model.dim))  # timm has none; no forward pass uses it
    return load_strictly(model, stored, path, names)


def backbone_tensors(path):
    """-> the ViT's tensors without what training code wraps around them, and whether its blocks came in chunks."""
    state, stored, chunked = state_within(path), {}, False
    student_alone = not any("cls_token" in str(key) and "student." not in str(key) for key in state)
    for full_name, value in state.items():
        name = str(full_name).replace("student.", "") if student_alone else str(full_name)
        name = re.sub(WRAPPERS, "", name)
        name, chunks = re.subn(r"^blocks\.\d+\.(?=\d)", "blocks.", name)  # blocks.0.3.x -> blocks.3.x
        if not re.match(BESIDE, name):
            if name in stored:
                raise fault(path, f"{full_name} is there twice; save the state_dict() of the ViT alone")
            stored[name], chunked = value, chunked or bool(chunks)
    return stored, chunked


def state_within(path):  # the dict of tensors in a file, out of the dicts that training code puts around it
    state = read_checkpoint(path)
    for wrapper in WITHIN:
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    return state


def stored_names(key, layout):
    """Our name -> a list of the layout's; of three, for query, key and value, where transformers split a qkv."""
    names = [key]
    if layout == "transformers" and ".attn.qkv." in key:
        names = [key.replace("attn.qkv", f"attention.attention.{third}") for third in ("query", "key", "value")]
    for ours, theirs in RENAMES[layout]:
        names = [re.sub(ours, theirs, name) for name in names]
    return names


def vit_sizes(stored, names, config):
    """The arguments of VisionTransformer, from the shapes of the tensors; names(our key) lists the stored ones."""
    shape = lambda key: stored[names(key)[0]].shape
    w12, w3 = "blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"
    C = shape("cls_token")[-1]
    registers = shape("register_tokens")[1] if names("register_tokens")[0] in stored else 0
    swiglu = names(w12)[0] in stored and shape(w12)[0] == 2 * shape(w3)[1]
    heads = max(1, C // 64) if config is None else config["num_attention_heads"]
    if heads < 1 or C % heads:
        raise ValueError(f"{C} channels cannot be shared by {heads} heads of config.json")
    depth = len({found[2] for name in stored if (found := re.match(r"(blocks|encoder\.layer)\.(\d+)\.", name))})
    ratio = 4 if swiglu else shape("blocks.0.mlp.fc1.weight")[0] // C
    grid = math.isqrt(shape("pos_embed")[1])  # with the class token's position or, in timm with registers, without
    return dict(patch=shape("patch_embed.proj.weight")[-1], dim=C, depth=depth, heads=heads, registers=registers,
                grid=grid, mlp_ratio=ratio, swiglu=swiglu)


def load_strictly(model, stored, path, names=lambda key: [key]):
    """`model` with the tensors of `stored`, in evaluation mode. names(our key) lists the stored tensors that, one after
    the other, make it up. ValueError names one that is missing, left over or does not fit."""
    # Differs: SnD's README loads its weights with strict=False, which hides errors. Here, every tensor must fit.
    kind, state = type(model).__name__, {}
    for key, value in model.state_dict().items():
        for name, part in zip(names(key), value.chunk(len(names(key)))):
            found = tuple(stored[name].shape) if name in stored else "missing"
            if found != part.shape:
                raise fault(path, f"{name} is {found}, but {tuple(part.shape)} was expected; give the whole "
                                  f"weights of one {kind}")
            if not sound(stored[name]):
                raise fault(path, f"{name} is no dense tensor of finite floats; copy the file again, or save it so")
        state[key] = torch.cat([stored.pop(name) for name in names(key)]).to(value.dtype)  # a copy: files may change
    if stored:
        name = next(iter(stored))
        raise fault(path, f"has a tensor that no part of the {kind} takes: {name}; save the {kind} without it")
    model.load_state_dict(state, assign=True)
    return model.eval()


def sound(tensor):  # with strides of 0, a file of a few bytes can claim a tensor of any size
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.is_floating_point()
    return plain and tensor.nbytes <= tensor.untyped_storage().nbytes() and tensor.isfinite().all()


def load_mvsplat(name_or_path) -> MVSplat:
    """An MVSplat with its weights: `tiny` (built in), or the official Lightning checkpoint `re10k.ckpt` (or its tensors
    as .safetensors). Every size is read off the tensors. Raises ValueError, one line, as `load_vit` does."""
    path = WEIGHTS / "mvsplat.safetensors" if str(name_or_path) == "tiny" else weights_in(Path(name_or_path))
    if not path.is_file():
        raise fault(path, "no such weights; give 'tiny', or put re10k.ckpt there, from the folder that "
                          "github.com/donydchen/mvsplat links to")
    stored = {key.removeprefix("encoder."): value for key, value in state_within(path).items()
              if str(key).startswith(("encoder.", "backbone.", "depth_predictor.")) and isinstance(value, Tensor)}
    rows = lambda name: len(stored[name + ".weight"])
    cnn, net, layer = "backbone.backbone.", "depth_predictor.", r"backbone\.transformer\.layers\.(\d+)\."
    try:
        config = MVSplatConfig(
            rows(cnn + "conv2"), rows(net + "regressor_residual"), rows(net + "corr_refine_net.0"),
            rows(net + "refine_unet.0"), math.isqrt((rows(net + "to_gaussians.2") - 9) // 3) - 1,
            tuple(rows(cnn + name) for name in ("conv1", "layer2.0.conv1", "layer3.0.conv1")),
            len({found[1] for key in stored if (found := re.match(layer, key))}))
        with torch.device("meta"):
            model = MVSplat(config)
    except Exception as error:
        raise fault(path, f"lacks {error}; it is no MVSplat, give re10k.ckpt or 'tiny'") from None
    return load_strictly(model, stored, path)


# ------------------------------------------------------------------------ weights: reading files safely

# What training frameworks leave in a checkpoint beside its tensors, e.g. Lightning's OneCycleLR a `getattr`.
HARMLESS = (r"(argparse|collections|functools|lightning|lightning_fabric|numpy|omegaconf|pathlib|pytorch_lightning"
            r"|torch\.optim|typing)\.[\w.]+|builtins\.(bool|dict|float|getattr|int|list|str|tuple)")


class Inert:  # in place of a foreign class or function: takes anything, keeps nothing, does nothing
    __new__ = lambda cls, *args: object.__new__(cls)
    __setstate__ = lambda self, state: None


class InertDict:  # in place of a defaultdict and the like, which are filled after they are made
    __new__ = lambda cls, *args: {}


def fault(path, text):
    """The error to raise about a file, as one printable line, whatever the names in the file are."""
    line = f"{path}: {text}".replace("\n", " ")
    return ValueError("".join(c if c.isprintable() else "?" for c in line))


def read_checkpoint(path) -> dict:
    """What a .safetensors or torch file (.pth, .pt, .ckpt, .bin) holds, on the CPU, or the files of an .index.json.

    No code that a file names is run. Objects of training frameworks (`HARMLESS`) come back as empty `Inert` ones; their
    modules are not imported. Raises ValueError, one line, for a damaged file or one that names anything else.
    """
    path, start = Path(path), b""
    if path.name.endswith(".index.json"):
        return read_shards(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        found = load_file(path) if start[8:9] == b"{" else read_pickled(path)  # by what it holds: people rename files
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}, not tensors by name"
    except Exception as error:  # a damaged file can raise anything
        reason = re.split(r"\. |\n", f"{type(error).__name__}: {error}")[0]
        if isinstance(error, pickle.UnpicklingError) and (foreign := re.search(r"GLOBAL (\S+)", str(error))):
            raise fault(path, f"refused, because it names {foreign[1]}, which weights do not need (nothing of it was "
                              "run); if it is your own file, save its state_dict() alone") from None
    remedy = "copy it again; unpack it if it is an archive; save a state_dict() if it is TorchScript"
    if start.startswith(b"version https://git-lfs"):
        remedy = "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    elif start.lstrip()[:1] == b"<":
        remedy = "it is a web page; download the file itself"
    what = "not a whole safetensors file" if start[8:9] == b"{" else "cannot be read as a checkpoint"
    raise fault(path, f"{what} ({reason}); {remedy}")


def read_pickled(path):
    """A torch file, read by torch's own pass for weights alone, with stand-ins for what is foreign but harmless."""
    foreign = []
    if zipfile.is_zipfile(path):  # as torch writes since 1.6, without compression
        with zipfile.ZipFile(path) as held:
            if sum(entry.file_size for entry in held.infolist()) > path.stat().st_size:
                raise OverflowError("it unpacks to more than it holds")
            if damaged := held.testzip():  # torch.load does not look at the checksums
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    stand_ins = [(InertDict if name.lower().endswith("dict") else Inert, name)
                 for name in foreign if re.fullmatch(HARMLESS, name)]
    with open(path, "rb") as file, torch.serialization.safe_globals(stand_ins):
        return torch.load(file, map_location="cpu", weights_only=True)


def read_shards(index):
    """The tensors of all the files that a `model.safetensors.index.json` or `pytorch_model.bin.index.json` lists."""
    try:
        files = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (AttributeError, KeyError, TypeError):
        raise fault(index, "has no weight_map of tensors to files; fetch it again") from None
    tensors = {}
    for name in files:
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):  # no other folder, and no list within the list
            raise fault(index, f"lists {name}, which is no file of weights beside it; fetch the files again")
        if not index.with_name(name).is_file():
            raise fault(index, f"lists {name}, which is missing; fetch that file too")
        tensors |= read_checkpoint(index.with_name(name))
    return tensors


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise fault(path, f"not JSON ({error}); copy it again") from None


# ------------------------------------------------------------------------ weights: saving, names and addresses


def save_vit(model: VisionTransformer, folder):
    """Write `folder/{config.json, model.safetensors}` in the Hugging Face DINOv2 layout, each file whole or not at all.

    transformers opens it, but away from the trained image size it interpolates positions in its own way. `load_vit`
    keeps the model's, which stands in config.json (see `interpolate_positions`).
    """
    state = {}
    for key, value in model.state_dict().items():
        names = stored_names(key, "transformers")
        state.update({name: part.clone() for name, part in zip(names, value.chunk(len(names)))})
    kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if model.registers else ("dinov2", "Dinov2Model")
    config = dict(
        model_type=kind[0], architectures=[kind[1]], hidden_size=model.dim, num_hidden_layers=len(model.blocks),
        num_attention_heads=model.heads, mlp_ratio=model.mlp_ratio, patch_size=model.patch,
        image_size=model.grid * model.patch, num_channels=3, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True,
        use_swiglu_ffn=model.swiglu, positions=model.positions, torch_dtype="float32",
        **({"num_register_tokens": model.registers} if model.registers else {}))
    save_tensors(Path(folder) / "model.safetensors", state)
    importlib.import_module("01_data").write_whole(Path(folder) / "config.json", json.dumps(config, indent=1).encode())


def save_tensors(path, tensors, metadata=None):
    """A safetensors file, whole or not at all, from {name: tensor on any device}; metadata is {name: text}."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    importlib.import_module("01_data").write_whole(path, save(tensors, {"format": "pt", **(metadata or {})}))


# Names of published weights and their official addresses. None of these projects publishes a checksum.
PUBLISHED = (
    (r"dinov2_vit[sblg]14", r"https://dl.fbaipublicfiles.com/dinov2/\g<0>/\g<0>_pretrain.pth"),
    (r"(dinov2_vit[sblg]14)_reg", r"https://dl.fbaipublicfiles.com/dinov2/\1/\1_reg4_pretrain.pth"),
    (r"dune_vit((small|base)14_(336|448)|base14_448_paper)", r"https://download.europe.naverlabs.com/dune/\g<0>.pth"),
    (r"dinov2_(small|base)_snd", r"https://huggingface.co/david-shavin/SnD/resolve/main/\g<0>.pth"),
    (r"facebook/dinov2(-with-registers)?-(small|base|large|giant)"
     r"|timm/vit_(small|base|large|giant)_patch14(_reg4)?_dinov2\.lvd142m",
     r"https://huggingface.co/\g<0>/resolve/main/model.safetensors"))


def weights_in(path: Path) -> Path:
    """The file of weights in a folder: one that transformers or 04 writes, or the only one. A file is handed back."""
    if not path.is_dir():
        return path
    names = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    usual = [path / name for name in (*names, "student/model.safetensors")]
    cached = [file for file in sorted(path.glob("snapshots/*/*")) if file.name in names]  # Hugging Face's cache
    endings = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
    others = [file for file in sorted(path.iterdir()) if file.suffix in endings]
    found = [file for file in usual if file.is_file()][:1] or cached or others or usual[:1]
    if len(found) > 1:
        listed = ", ".join(str(file.relative_to(path)) for file in found[:5])
        raise fault(path, f"has several files of weights ({listed}); give one of them")
    return found[0]


def find_weights(name: str) -> Path:
    """The file of a path, of `tiny`, or of a published name; the latter is fetched once, into torch.hub's cache."""
    path = WEIGHTS / "vit.safetensors" if name == "tiny" else weights_in(Path(name))
    address = next((found.expand(url) for pattern, url in PUBLISHED if (found := re.fullmatch(pattern, name))), None)
    if address and not path.exists():
        file = address.rsplit("/", 1)[1].replace("model.", name.replace("/", "_") + ".")  # .pth files as in torch.hub
        path = Path(torch.hub.get_dir(), "checkpoints", file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(address, str(path))
        except Exception as error:  # of the disk, or of the network in any of its layers
            raise ValueError(f"{name}: cannot be fetched ({error}); put {address} at {path}, or use the built-in "
                             "weights (--model tiny; 05: --models tiny)") from None
    if not path.is_file():
        raise fault(path, "no such weights; give 'tiny', a .pth or .safetensors file, a folder with one, or a name "
                          "like dinov2_vits14_reg, dune_vitsmall14_448, dinov2_small_snd or facebook/dinov2-small")
    return path


# ------------------------------------------------------------------------ pictures and the command


def pca_basis(features: Tensor):
    """features (M, C) -> (mean, axes (C, 3), low, high): the three directions that vary most, as red, green, blue."""
    mean = features.mean(0)
    centred = features - mean
    axes = torch.linalg.eigh((centred.T @ centred).double())[1][:, -3:].flip(1).to(features)
    axes = axes * torch.sign(axes.sum(0) + 1e-12)  # the sign of an axis is arbitrary; pictures should not be
    low, high = (centred @ axes).quantile(torch.tensor([0.02, 0.98]).to(features), dim=0)
    return mean, axes, low, high


def pca_colours(features: Tensor, basis) -> Tensor:  # (H, W, C) -> (3, H, W) in [0, 1]
    mean, axes, low, high = basis
    return (((features - mean) @ axes - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).permute(2, 0, 1)


def depth_errors(depth, scene, views):
    """{what: mean relative error} of a depth (2, H, W), and of one plane at the median depth, against measured depth
    or, where there is none, COLMAP's points."""
    data = importlib.import_module("01_data")
    if all(view.depth is not None for view in views):
        truth, where = torch.stack([view.depth for view in views]), ""
    elif scene.points is not None and len(scene.points):
        frames = [data.Frame(v.name, None, v.K.numpy(), v.c2w.numpy(), v.image.shape[1:]) for v in views]
        truth = torch.stack([torch.from_numpy(data.depth_of_points(scene.points, frame)) for frame in frames])
        where = " (at COLMAP's points)"
    else:
        return {}
    known = truth > 0
    guesses = {"mvsplat": depth, "one plane": truth[known].median()}
    return {name + where: ((guess - truth).abs() / truth)[known].mean().item()
            for name, guess in guesses.items() if known.any()}


@torch.no_grad()
def lifted_pair(scene, views, vit, mvsplat, device):
    """-> the Gaussians of two views with their features, the views' depth (2, H, W), and {heading: picture (3, H, W)}
    of the first view."""
    data = importlib.import_module("01_data")
    images, K, c2w = (torch.stack([getattr(v, key) for v in views]).to(device) for key in ("image", "K", "c2w"))
    masks = torch.stack([data.regions(view) for view in views]).to(device)
    size, grid = images.shape[2:], tuple(side // vit.patch for side in images.shape[2:])
    tokens = vit(images).patches
    gaussians = lift_features(mvsplat_gaussians(mvsplat, images, K, c2w, *scene.depth_range), tokens, masks, grid)

    depth, measured = view_depth(gaussians, c2w, *size).cpu(), views[0].depth
    solid = depth[0] * (gaussians.opacities.view(2, *size)[0] >= 0.5).cpu()
    scale, basis = depth[0] if measured is None else measured, pca_basis(tokens[0])
    return gaussians, depth, {
        "context": views[0].image, "other context": views[1].image,
        "context's regions": data.colour_ids(masks[0].cpu()),
        "depth: mvsplat": data.colour_depth(solid, scale),
        "depth: measured": None if measured is None else data.colour_depth(measured, scale),
        "bilinear (PCA)": pca_colours(bilinear_upscale(tokens[0], masks[0], grid), basis),
        "mask-aware (PCA)": pca_colours(gaussians.features.view(2, *size, -1)[0], basis)}


def main(argv=None):
    data, splat = importlib.import_module("01_data"), importlib.import_module("03_splat")
    parser = argparse.ArgumentParser(description="Lift features to 3D: depth and features of held-out pairs.")
    data.scene_flags(parser, "out/02_lift")
    add = parser.add_argument
    add("--model", default="tiny", help="ViT weights: 'tiny', a published name such as dinov2_vits14, a file or folder")
    add("--mvsplat", default="tiny", help="MVSplat weights: 'tiny' or the official re10k.ckpt")
    add("--pixels", type=data.positive, default=96 * 128, help="pixels a view; raise it for larger models")
    args = parser.parse_args(argv)
    with data.explained(args, "the same command starts again"):
        vit, mvsplat = load_vit(args.model).to(args.device), load_mvsplat(args.mvsplat).to(args.device)
        scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames, args.near, args.far)
        rows, errors, files = [], {}, []
        for scene, (a, b, _) in data.held_out_triplets(scenes, args.seed):
            views = [scene.view(i, data.fit_size(scene, args.pixels, vit.patch)) for i in (a, b)]
            gaussians, depth, pictures = lifted_pair(scene, views, vit, mvsplat, args.device)
            rows.append(list(pictures.values()))
            for name, error in depth_errors(depth, scene, views).items():
                errors.setdefault(name, []).append(error)
            files.append(Path(args.out) / f"{scene.name.replace('/', '_')}_{a}_{b}.ply")
            colours = torch.cat([view.image.permute(1, 2, 0).flatten(0, 1) for view in views])
            splat.save_ply(files[-1], gaussians, colours)
        path = data.picture_grid(Path(args.out) / "lift.png", list(pictures), rows, below=data.depth_legend)
        answer = ", ".join(f"{name} {100 * sum(e) / len(e):.1f} %" for name, e in errors.items())
        answer = answer or "unknown, because nothing was measured"
        print(f"mean error of depth: {answer}  ->  {path}, {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
