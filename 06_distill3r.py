"""Distill3R: a network of 650 million parameters that sees 3D in photos teaches one of 72 million, on a single GPU.

Paper   Distill3R Sec. III-A to III-D (Eq. 1-6), IV and Tables I-III; Fast3R (Yang et al. 2025) for the teacher.
In      a folder of photos or video frames, or posed views (01_data); weights of Fast3R and DUNE, where you have them.
Out     out/06_distill3r/: cache/, student/, scene/ (point cloud, depth and cameras, as 01_data reads them), log.jsonl.
Run     python 06_distill3r.py --preset tiny     cache, train, eval and infer on built-in rooms: 6 minutes on 2 cores
        python 06_distill3r.py cache --images photos/ --teacher model.safetensors     once; --shard 0/4 does a quarter
        python 06_distill3r.py train --images photos/ --encoder dune_vitsmall14_448.pth      torchrun for several GPUs
        python 06_distill3r.py infer --images holiday/ --teacher model.safetensors    photos -> a posed scene, by Fast3R
        python 06_distill3r.py eval  --scene_dir my_scene --models student          accuracy, completeness, calibration
        python 06_distill3r.py table                                         Table I: time and memory over the views
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py 06_distill3r.py tiny/rooms.py tiny/teacher.py
        tiny/vit.safetensors
Read    Pointmap certainty pointmap_loss PointmapNetwork Fusion DPT Fast3R Student write_cache filtered train
        learn_samples estimate_cameras
Try     after --preset tiny: eval --models mean student --views 1      accuracy 0.218 m, by the mean pointmap 0.245
        cache --scene_dir data_small/room_007 --tau 0.9 --out out/sure    69 % of the pixels are valid, not 99.6 %
Not     training of the teacher, bundle adjustment of the cameras, metric scale where the teacher has none.
Words   P^g points_global, P^l points_local; C conf; M masks, the valid pixels; tau the least certainty of one; w the
        weight of a pixel; s the scale that points are divided by; N views a sample. The view id tells the fusion
        transformer which tokens come from one view; the view with id 0 is the reference, whose camera is the world.

Teacher and student are the same kind of network: an encoder for each view, attention over all views, two heads for each
view. The teacher looks at every sample once. Its answers are compressed and kept on disk, and the student is trained
from these files, without the teacher in memory.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import os
import re
import sys
import time
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

data, lift, splat, distill = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat", "04_distill"))

VIEW_IDS = 1000  # rows in Fast3R's table of view codes, and therefore the most views in one call
FAR = 20.0  # in median distances: a point farther away is sky, or a mistake

PRESETS = {  # "full" is the paper's setting (Sec. IV): 60 epochs of 22,500 samples in steps of 16
    "tiny": dict(encoder="tiny", size=(48, 64), views=4, stride=1, max_steps=1200, batch=1, lr=5e-4, final_lr=1e-5,
                 encoder_share=0.1, warmup=100, mirror=True, bf16=False),
    "full": dict(encoder="dune_vitsmall14_448", size=(224, 518), views=20, stride=None, max_steps=84_375, batch=16,
                 lr=1e-4, final_lr=5e-5, encoder_share=1.0, warmup=3_500, mirror=False, bf16=True)}

# ------------------------------------------------------------------------------------------------ 1. A pointmap


class Pointmap(NamedTuple):
    """What a network says about one view (Distill3R Sec. III-A): the 3D point behind each pixel, and how sure it is.

    There is no unit of length: only ratios of lengths mean something.
    """
    points_global: Tensor  # (H, W, 3) in the frame of view 0's camera, which all views of the call share
    points_local: Tensor  # (H, W, 3) in the frame of the view's own camera
    conf_global: Tensor  # (H, W) in (1, inf)
    conf_local: Tensor  # (H, W) in (1, inf)


def certainty(conf: Tensor) -> Tensor:
    """Confidence on a scale from 0 to 1: the networks give C = 1 + exp(x), and this is sigmoid(x)."""
    # Differs: the official code compares C itself with tau = 0.3, and as C > 1 that filter never removes a pixel. We
    # compare 1 - 1/C, which carries the same information on a scale from 0 to 1.
    return 1 - 1 / conf


# ------------------------------------------------------------------------------------------------ 2. The loss


class Loss(NamedTuple):
    total: Tensor
    global_: Tensor  # the parts of the total, unweighted
    local: Tensor
    confidence: Tensor


WEIGHTS = {  # w of Eq. 2, from the confidences of student and teacher
    "teacher": lambda student, teacher: teacher,  # the paper's
    "clamped": lambda student, teacher: (teacher / 10).clamp(0.1, 1),  # the official code's
    "student": lambda student, teacher: (student / 10).clamp(0.1, 1),  # its ablation; the gradient flows through w
    "none": lambda student, teacher: torch.ones_like(teacher)}
# Differs: Distill3R Sec. V-B says that weighting by the student's own confidence costs 9.6 % accuracy and 35.7 %
# completeness, but these numbers are those of the "Labels-Only (No Weighting/Conf)" row of Table III (1.37/1.25 and
# 2.09/1.54). Both readings are flags here: `--weight student --gamma 0` and `--weight none --gamma 0`.


def pointmap_loss(
    pred: list[Pointmap],  # V of the student
    target: list[Pointmap],  # V of the teacher
    masks: list[Tensor],  # V of (H, W) bool, the valid pixels; the others may hold anything, NaN too
    alpha_g=2.0,
    alpha_l=1.0,
    gamma=0.001,
    weight="teacher",  # a name in WEIGHTS
    mean="pixels",  # over all valid pixels; or over "views" of each view's mean, as in the official code
    global_target="direct",  # the teacher's global map; or its local map "aligned" to that, as in the official code
) -> Loss:
    """The distillation loss of the views of one scene (Distill3R Sec. III-D); 0 where no pixel is valid."""
    # Differs: the official code clamps w, takes the mean over views first, and uses aligned local maps as the global
    # target. We compute Eq. 1-6 as written; `--weight clamped --mean views --global_target aligned` is the code.
    # Differs: "the entire batch" of Eq. 4 is one scene, as in the official code, because two scenes share no scale.
    assert weight in WEIGHTS and mean in ("pixels", "views") and global_target in ("direct", "aligned"), \
        f"no such loss: weight {weight!r}, mean {mean!r}, global_target {global_target!r}"
    if global_target == "aligned":
        target = [view._replace(points_global=aligned_global(view, mask)) for view, mask in zip(target, masks)]
    p, t, counts = valid_pixels(pred, target, masks)  # (M, 3) and (M,) of all views; M_k of each view
    number = max(sum(counts), 1)  # |M|
    number_k = torch.tensor(counts).clamp_min(1).to(p.conf_global)  # (V,) |M_k|
    view = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(number_k.device)  # (M,) a pixel's view

    def scene_scale(points):  # s, one number; gradients flow through it
        return (points.norm(dim=-1).sum() / number).clamp_min(1e-8)  # Distill3R Eq. 4

    def view_scale(points):  # s_k, for each pixel that of its view: (M, 1)
        sums = torch.stack([distance.sum() for distance in points.norm(dim=-1).split(counts)])
        return (sums / number_k).clamp_min(1e-8)[view, None]  # Distill3R Eq. 5

    def geometric(ours, theirs, w, scale):
        error = (ours / scale(ours) - theirs / scale(theirs)).square().sum(-1)
        share = 1 / number if mean == "pixels" else 1 / (len(masks) * number_k[view])
        return (share * w * error).sum()  # Distill3R Eq. 2

    w_global, w_local = WEIGHTS[weight](p.conf_global, t.conf_global), WEIGHTS[weight](p.conf_local, t.conf_local)
    global_ = geometric(p.points_global, t.points_global, w_global, scene_scale)
    local = geometric(p.points_local, t.points_local, w_local, view_scale)
    geometry = alpha_g * global_ + alpha_l * local  # Distill3R Eq. 3
    apart = (p.conf_global - t.conf_global).abs() + (p.conf_local - t.conf_local).abs()
    confidence = apart.sum() / (2 * number)  # Distill3R Eq. 6
    return Loss(geometry + gamma * confidence, global_, local, confidence)  # Distill3R Eq. 1


def valid_pixels(pred, target, masks):
    """-> the student's and the teacher's values at the valid pixels of all views, (M, 3) and (M,), and each M_k.

    The pixels are picked by their index. A product with the mask, as in the official code, would let a NaN outside the
    mask into the sum. The index is found once, because a GPU has to stop and tell the CPU how long it is.
    """
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    index = torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0]
    at_valid = lambda maps: Pointmap(*(torch.cat([x.flatten(0, 1) for x in same])[index] for same in zip(*maps)))
    p, t = at_valid(pred), at_valid(target)
    return p, Pointmap(*(x.to(p.conf_global) for x in t)), counts


# ------------------------------------------------------------------------------------------------ 3. The network
# Teacher and student differ in their encoder and in their sizes only. The modules are named as in the published files.


class PointmapNetwork(nn.Module):
    """Photos -> a Pointmap each: encode each view by itself, fuse the views, decode each view with two heads.

    model(images, view_ids, generator) -> list[Pointmap]. images: V of (3, H, W) in [0, 1], of any sizes whose sides are
    multiples of the patch; the first one is the reference. view_ids: V of 0..999, else drawn from `generator`. Encoder
    and heads run on `at_once` views of one size at a time, so that their activations, most of the memory, do not add
    up. With `recompute`, training keeps only the inputs of each part and runs the part again in the backward pass.
    """

    recompute = False

    def __init__(self, patch, encoder, decoder, *dpt_sizes):
        super().__init__()
        self.patch, self.encoder, self.decoder = patch, encoder, decoder
        self.downstream_head = nn.ModuleDict({"dpt": DPT(patch, *dpt_sizes)})  # global maps
        self.downstream_head_local = nn.ModuleDict({"dpt": DPT(patch, *dpt_sizes)})

    def forward(self, images, view_ids=None, generator=None, at_once=8) -> list[Pointmap]:
        ids = checked_ids(images, view_ids, generator, self.patch)
        tokens = self.encode(images, at_once)  # V of (N_v, C)
        levels = self.fuse(tokens, ids)  # four of: V of (N_v, C)
        return self.decode(images, levels, at_once)

    def encode(self, images, at_once=8):
        tokens = [None] * len(images)
        for block in blocks_of_views(images, at_once):
            for index, x in zip(block, self.run(self.tokens, torch.stack([images[i] for i in block]))):
                tokens[index] = x
        return tokens

    def fuse(self, tokens, ids):
        return self.decoder(tokens, ids, self.run)

    def decode(self, images, levels, at_once=8) -> list[Pointmap]:
        maps = [None] * len(images)
        for block in blocks_of_views(images, at_once):
            h, w = (side // self.patch for side in images[block[0]].shape[-2:])
            grids = [torch.stack([level[i] for i in block]).mT.unflatten(2, (h, w)) for level in levels]  # (B, C, h, w)
            points, conf = read_out(self.run(self.downstream_head["dpt"], grids))
            points_local, conf_local = read_out(self.run(self.downstream_head_local["dpt"], grids))
            for index, pointmap in zip(block, zip(points, points_local, conf, conf_local)):
                maps[index] = Pointmap(*pointmap)
        return maps

    def run(self, part, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)


# ------- 3a. Transformer blocks, and the encoder of Fast3R


def rotary_angles(h, w, head_dim, device=None) -> Tensor:
    """(N, 2, head_dim / 4): how far RoPE turns the pairs of a head, one half by the row, the other by the column."""
    D = head_dim // 2
    frequency = 100.0 ** (-torch.arange(0, D, 2, device=device) / D)
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)  # (h, w, 2)
    return place.view(-1, 2, 1) * frequency


def rotate(x: Tensor, angle: Tensor) -> Tensor:  # (B, heads, N, head_dim), (N, 2, head_dim / 4) -> x turned
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, heads, N, 2, head_dim / 4): pairs, not of neighbours
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3).to(x.dtype)


class Attention(lift.Attention):
    def forward(self, x, angle=None, scale=None):  # (B, N, C), of rotary_angles, of the logits
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=eps), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), lift.Mlp(dim, 4 * dim)

    def forward(self, x, angle=None, scale=None):  # (B, N, C)
        x = x + self.attn(self.norm1(x), angle, scale)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """CroCo's ViT, Fast3R's encoder: no class token, and the place of a patch enters by RoPE."""

    def __init__(self, dim, heads, depth, patch):
        super().__init__()
        self.patch, self.head_dim = patch, dim // heads
        self.patch_embed = lift.PatchEmbed(patch, dim)
        self.enc_blocks = nn.ModuleList(Block(dim, heads, 1e-6) for _ in range(depth))
        self.enc_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):  # (B, 3, H, W) in [-1, 1] -> (B, N, C)
        h, w = (side // self.patch for side in images.shape[-2:])
        angle = rotary_angles(h, w, self.head_dim, images.device)
        x = self.patch_embed(images)
        for block in self.enc_blocks:
            x = block(x, angle)
        return self.enc_norm(x)


# ------- 3b. Fusion of all views


class Fusion(nn.Module):
    """All tokens of all views look at each other. Only a view's code, added to its tokens, tells whose they are."""

    SHARPER = math.sqrt(math.log(137) / math.log(20))  # 1.28: the published student's logits in evaluation

    def __init__(self, enc_dim, dim, heads, depth, sharper=False):
        super().__init__()
        self.dim, self.head_dim, self.sharper = dim, dim // heads, sharper
        self.hooks = depth // 2, depth * 3 // 4, depth  # the blocks whose output the heads see
        self.decoder_embed = nn.Linear(enc_dim, dim)
        self.dec_blocks = nn.ModuleList(Block(dim, heads, 1e-5) for _ in range(depth))
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens, ids, run):  # V of (N_v, C), V ids -> the four levels for the heads, each V of (N_v, C)
        lengths, x = [len(t) for t in tokens], torch.cat(tokens)[None]  # (1, N of all views, C)
        levels = {0: x}  # the heads see the encoder's tokens as well
        codes = [code.expand(n, -1) for code, n in zip(view_codes(ids, self.dim).to(x.device), lengths)]
        x = self.decoder_embed(x) + torch.cat(codes)  # fp32 from here on, in a bf16 autocast too
        scale = self.SHARPER / math.sqrt(self.head_dim) if self.sharper and not self.training else None
        for number, block in enumerate(self.dec_blocks, 1):
            x = run(block, x, None, scale)
            if number in self.hooks:
                levels[number] = x
        levels[self.hooks[-1]] = self.dec_norm(x)
        return [levels[n][0].split(lengths) for n in (0, *self.hooks)]


def view_codes(ids, dim) -> Tensor:
    """-> (V, dim) fp32: rows of a fixed table, sines first. The reference view has id 0; the others get new random ids
    in each pass (`draw_view_ids`), so that a student learns from few views to tell many apart (Sec. III-C)."""
    # Differs: Distill3R Sec. III-C adds "a fixed embedding" to the reference view. In both official codes that is row 0
    # of this table, and so it is here.
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.tensor(ids, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1).float()


# ------- 3c. From tokens to pixels


class DPT(nn.Module):
    """Four levels of tokens -> 4 channels a pixel, from coarse to fine (Ranftl et al. 2021)."""

    def __init__(self, patch, enc_dim, dec_dim, widths=(96, 192, 384, 768), features=256):
        super().__init__()
        a, b, c, d = widths
        self.act_postprocess = nn.ModuleList([  # to 4, 2, 1 and 1/2 times the grid of patches
            nn.Sequential(lift.conv(enc_dim, a, 1), nn.ConvTranspose2d(a, a, 4, 4)),
            nn.Sequential(lift.conv(dec_dim, b, 1), nn.ConvTranspose2d(b, b, 2, 2)),
            nn.Sequential(lift.conv(dec_dim, c, 1)),
            nn.Sequential(lift.conv(dec_dim, d, 1), lift.conv(d, d, 3, 2))])
        self.scratch = nn.ModuleDict()
        for n, width in enumerate(widths, 1):
            self.scratch[f"layer{n}_rn"] = lift.conv(width, features, bias=False)
        for n in (1, 2, 3, 4):
            self.scratch[f"refinenet{n}"] = Refine(features)
        half, to_pixels = features // 2, nn.Upsample(scale_factor=patch / 8, mode="bilinear", align_corners=True)
        self.head = nn.Sequential(lift.conv(features, half), to_pixels,
                                  lift.conv(half, half), nn.ReLU(inplace=True), lift.conv(half, 4, 1))

    def forward(self, levels):  # four of (B, C, h, w) -> (B, 4, H, W)
        one, two, three, four = (self.scratch[f"layer{n}_rn"](project(x))
                                 for n, (project, x) in enumerate(zip(self.act_postprocess, levels), 1))
        h, w = three.shape[-2:]
        x = self.scratch["refinenet4"](four)[..., :h, :w]  # an odd grid comes back one row or column too large
        x = self.scratch["refinenet3"](x, three)
        x = self.scratch["refinenet2"](x, two)
        return self.head(self.scratch["refinenet1"](x, one))


class Refine(nn.Module):
    """One step from coarse to fine. refinenet4 has no level to add, but its first unit is in the published files."""

    def __init__(self, features):
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(features), ResidualUnit(features)
        self.out_conv = lift.conv(features, features, 1)

    def forward(self, x, skip=None):
        x = self.resConfUnit2(x if skip is None else x + self.resConfUnit1(skip))
        # The published order is interpolation, then 1x1 convolution. They commute, and this is four times cheaper.
        return F.interpolate(self.out_conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.conv1, self.conv2 = lift.conv(features, features), lift.conv(features, features)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def read_out(raw: Tensor):  # (B, 4, H, W) -> points (B, H, W, 3), confidence (B, H, W) in (1, inf)
    raw = raw.permute(0, 2, 3, 1).to(torch.promote_types(raw.dtype, torch.float32))  # bf16 would leave 8 bits
    distance = raw[..., :3].norm(dim=-1, keepdim=True)
    return raw[..., :3] / distance.clamp_min(1e-8) * distance.expm1(), 1 + raw[..., 3].exp()


# ------- 3d. The teacher and the student


class Fast3R(PointmapNetwork):
    """The teacher, exactly as published (Yang et al. 2025): ViT-L, RoPE, 24 fusion layers, 647,551,368 parameters."""

    def __init__(self, enc_dim=1024, enc_heads=16, enc_depth=24, dec_dim=1024, dec_heads=16, dec_depth=24):
        encoder, fusion = Encoder(enc_dim, enc_heads, enc_depth, 16), Fusion(enc_dim, dec_dim, dec_heads, dec_depth)
        super().__init__(16, encoder, fusion, enc_dim, dec_dim)

    def tokens(self, images):  # (B, 3, H, W) in [0, 1] -> (B, N, C)
        return self.encoder(2 * images - 1)


class StudentConfig(NamedTuple):
    """The sizes of a student; the defaults are the published one's, 71,969,288 parameters."""
    patch: int = 14  # of the ViT, a DUNE ViT-S
    enc_dim: int = 384
    enc_heads: int = 6
    enc_depth: int = 12
    mlp_ratio: int = 4
    registers: int = 4
    grid: int = 32  # side of the patch grid that the ViT's positions were trained for
    dec_dim: int = 384
    dec_heads: int = 6
    dec_depth: int = 6
    widths: tuple = (96, 192, 384, 768)  # of the DPT's four levels
    features: int = 256
    published: bool = True  # the student that the paper's authors trained, see Student
    size: tuple = (224, 518)  # (H, W) of the landscape pictures that it was trained on


StudentConfig.tiny = StudentConfig(8, 192, 3, 6, 2, 0, 16, 192, 3, 4, (24, 48, 96, 192), 32, False, (48, 64))
STUDENTS = {"tiny": StudentConfig.tiny, "full": StudentConfig()}


class Student(PointmapNetwork):
    """Distill3R's student (Sec. III-C): a ViT-S with DUNE's weights, a thin fusion transformer, two DPT heads."""

    # Differs: the published student's weights want pixels in [-1, 1], although DUNE learned with ImageNet's mean and
    # deviation, and attention logits 1.28 times larger in evaluation than in training. The paper has neither, nor have
    # students that are trained here (published=False).
    def __init__(self, config=StudentConfig()):
        c = config
        # Differs: the paper's learned positions "following Fast3R" are those of the ViT, as Fast3R has none.
        vit = lift.VisionTransformer(c.patch, c.enc_dim, c.enc_depth, c.enc_heads, c.registers, c.grid, c.mlp_ratio,
                                     positions="scale")
        fusion = Fusion(c.enc_dim, c.dec_dim, c.dec_heads, c.dec_depth, sharper=c.published)
        super().__init__(c.patch, vit, fusion, c.enc_dim, c.dec_dim, c.widths, c.features)
        self.config = config

    def tokens(self, images):  # (B, 3, H, W) in [0, 1] -> (B, N, C)
        if self.config.published:
            mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (lift.IMAGENET_MEAN, lift.IMAGENET_STD))
            images = (2 * images - 1) * std + mean  # the ViT undoes this, and sees [-1, 1]
        return self.encoder(images).patches


# ------------------------------------------------------------------------------------------------ 4. The cache
# A teacher is anything that has an `identity`, says by `view_size` at which size it wants a picture of (H, W), and
# turns the views of a sample, and a generator for all that is random, into a Pointmap each. Unknown points are NaN.


def write_cache(
    teacher,  # identity, view_size(H, W), (views, generator) -> list[Pointmap]
    root,  # what 01_data reads, or a folder of photos
    out,
    size=(224, 518),  # (H, W) of landscape pictures, turned for portrait ones
    views=20,  # N, at most, a sample
    stride=None,  # None: by overlap
    tau=0.3,
    seed=0,
    shard=(0, 1),  # (i, n): every n-th sample, from the i-th
    skip_bad_frames=False,
) -> list[Path]:
    """Ask the teacher about every sample below `root`, once, and keep its answers in out/<scene>/<sample>.safetensors.

    Samples that are there and whole stay, so that a killed run continues; damaged ones are made again. The same inputs
    give the same bytes. Returns the files it wrote. Raises DataError where `out` is made of other pictures or settings.
    """
    root, out, (which, shards) = Path(root), Path(out), shard
    lines = make_manifest(root, views, stride, skip_bad_frames)  # one a view (Sec. III-B 1)
    settings = dict(format=CACHE_FORMAT, teacher=teacher.identity, size=list(size), views=views, tau=tau, seed=seed)
    keep_manifest(out, lines, first=which == 0)
    mine = {out / f"{name}.safetensors": sample for name, sample in list(samples_of(lines).items())[which::shards]}
    todo = {path: sample for path, sample in mine.items() if not is_done(path, settings)}
    for path, sample in tqdm(todo.items(), desc=f"cache -> {out}", unit="sample", disable=not todo):
        remove_leftovers(path)
        maps = ask(teacher, root, sample, size, seed, skip_bad_frames)  # all views of the sample in one call
        if not any((certainty(m.conf_local) >= tau).any() for m in maps):
            print(f"{path}: not one pixel is trusted at --tau {tau:g}, so nothing will be learned from it; lower it")
        data.write_whole(path, pack_sample(maps, sample, settings))
    return list(todo)


def ask(teacher, root, lines, size, seed, skip_bad_frames=False) -> list[Pointmap]:
    """The teacher's maps of one sample at the student's size. What is random depends on the sample and `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {lines[0]['sample']}".encode()))
    maps = teacher(load_views(root, lines, teacher.view_size, skip_bad_frames), generator)
    return [resampled(m, line["size"], oriented(size, *line["size"])) for m, line in zip(maps, lines, strict=True)]


def filtered(m: Pointmap, tau):
    """-> the eight channels of a map (8, H, W) as float16, and its valid pixels M (H, W) (Sec. III-B 2, "filtering").

    Valid is a pixel whose points are known and in float16's range, and which the teacher trusts by at least tau.
    """
    points = torch.cat([m.points_local, m.points_global], -1).permute(2, 0, 1)
    conf = torch.stack([m.conf_local, m.conf_global]).clamp(max=65504)  # the surest pixels are the last to leave out
    channels = torch.cat([points, conf]).half()
    mask = channels.isfinite().all(0) & (certainty(m.conf_local) >= tau)
    return channels.numpy(), mask.numpy()


class CachedSample(NamedTuple):
    """What training gets: the photos of a sample and what the teacher said about them."""
    name: str
    images: list  # of (3, H, W) in [0, 1]
    targets: list  # of Pointmap; masked pixels have points 0 and confidence 1
    masks: list  # of (H, W) bool, the valid pixels M


# ------------------------------------------------------------------------------------------------ 5. Training


def train(args, rank, world):
    """Trains the student from the cache alone and leaves it in out/student. A killed run goes on where it was."""
    cached, heldout = cached_parts(args)
    student = new_student(args).to(args.device)
    optimiser = new_optimiser(student, args)
    run = distill.Run(run_settings(args, cached), {"student": distill.trained(student)}, optimiser,
                      rank=rank, world=world, name="train")
    model = nn.parallel.DistributedDataParallel(student) if world > 1 else student  # averages gradients over processes
    # All that is random depends on the seed and the step, so that a run which goes on needs no generator's state.
    order = distill.schedule(len(cached), args.max_steps * args.batch, args.seed)
    draws = lambda step: range(step * args.batch, (step + 1) * args.batch)
    load_batch = lambda step: [cached[order[n]] for n in draws(step)[rank::world]]
    with contextlib.closing(distill.ahead(load_batch, range(run.start, args.max_steps))) as batches:
        for step, batch in zip(run, batches):
            rate = learning_rate(step, args)
            for group in optimiser.param_groups:
                group["lr"] = group["share"] * rate
            optimiser.zero_grad(set_to_none=True)
            loss = learn_samples(batch, model, args, [args.seed + n for n in draws(step)[rank::world]], world)
            loss = Loss(*distill.averaged(loss, world, args.device))
            names = [cached.samples[order[n]][0] for n in draws(step)]
            run.check(loss.total, ", ".join(names))
            norm = nn.utils.clip_grad_norm_(distill.trained(student).values(), 1.0).item()
            optimiser.step()
            measured = {}
            if run.first and heldout and (step + 1 == args.max_steps or (step + 1) % args.eval_every == 0):
                measured["heldout"] = heldout_loss(student, heldout, args)
            run.log(show=("total",), samples=names, **loss._asdict(), grad_norm=norm, lr=rate, **measured)
    if run.first:
        save_student(student, Path(args.out, "student"))
        write_card(args, cached, Path(args.out, "student"))


def learn_samples(batch, model, args, seeds, world=1) -> list[float]:
    """The samples of a step go through the student one by one and add up gradients; -> the mean of their losses."""
    sums = [0.0] * len(Loss._fields)
    for n, (sample, seed) in enumerate(zip(batch, seeds)):
        # Differs: the paper has no augmentation. With --mirror (few samples) half of them are mirrored left to right.
        if args.mirror and torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:
            sample = mirrored(sample)
        with contextlib.nullcontext() if world == 1 or n + 1 == len(batch) else model.no_sync():
            loss = loss_of(model, sample, args, seed)
            (loss.total / len(batch)).backward()
        sums = [total + part / len(batch) for total, part in zip(sums, torch.stack(loss).tolist())]
    return sums


def loss_of(model, sample: CachedSample, args, seed) -> Loss:
    """The student's loss on one sample; its view ids are drawn from `seed`."""
    device = torch.device(args.device)
    images, masks = ([x.to(device) for x in part] for part in (sample.images, sample.masks))
    targets = [Pointmap(*(x.to(device) for x in m)) for m in sample.targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        maps = model(images, generator=torch.Generator().manual_seed(seed))
    how = dict(gamma=args.gamma, weight=args.weight, mean=args.mean, global_target=args.global_target)
    return pointmap_loss(maps, targets, masks, **how)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine from --lr to the preset's final rate over the rest of the run."""
    # Differs: the official code's schedule counts epochs that are never trained, so that its rate hardly falls. Ours
    # covers the run that is trained.
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.max_steps - args.warmup)
    return args.final_lr + 0.5 * (args.lr - args.final_lr) * (1 + math.cos(math.pi * done))


def new_optimiser(student, args):
    # Differs: the paper has one learning rate. With few samples a pretrained encoder keeps more of what it knows at a
    # lower one: --encoder_share is 0.1 in the preset `tiny`, and 1 in `full`.
    # Differs: Distill3R Sec. IV names AdamW and its weight decay only. The betas (0.9, 0.95), and the clipping of the
    # gradients' norm at 1.0 in `train`, are those of the official code.
    trained = distill.trained(student)
    encoder = [p for name, p in trained.items() if name.startswith("encoder.")]
    rest = [p for name, p in trained.items() if not name.startswith("encoder.")]
    groups = [dict(params=rest, share=1.0), dict(params=encoder, share=args.encoder_share)]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


# ------------------------------------------------------------------------------------------------ 6. Cameras


class Cameras(NamedTuple):
    focal: Tensor  # (V,) pixels of the maps; the optical axis goes through the middle
    scale: Tensor  # (V,) from a view's local unit to the world's
    c2w: Tensor  # (V, 4, 4) the world is the frame of the global maps


def estimate_cameras(maps: list[Pointmap], tau=0.3, names=None) -> Cameras:
    """Where each picture was taken: the similarity that carries its local map onto its global map is its camera's pose.

    Pictures of one size are taken to be of one camera. Raises ValueError, naming it, for a view without three points.
    """
    scale, of_size, c2w = [], {}, torch.eye(4).repeat(len(maps), 1, 1)
    for k, m in enumerate(maps):
        use = usable_pixels(m, tau)
        if use.sum() < 3:
            name = names[k] if names else f"view {k}"
            raise ValueError(f"{name}: fewer than three of its points are known and before the camera; leave this "
                             "picture out, or train the student for longer")
        s, R, t = robust_similarity(m.points_local[use], m.points_global[use], m.conf_global[use])
        c2w[k, :3] = torch.cat([R, t[:, None]], 1)
        scale.append(s.float())
        f = focal_length(m.points_local, torch.where(use, m.conf_local, 0.0))
        of_size.setdefault(m.conf_local.shape, []).append(f)
    focal = [np.median(of_size[m.conf_local.shape]) for m in maps]
    return Cameras(torch.tensor(focal).float(), torch.stack(scale), c2w)


def similarity(source: Tensor, target: Tensor, weight: Tensor | None = None):
    """(M, 3), (M, 3), (M,) -> s, R (3, 3), t (3,) in float64 that minimise sum w |s R source + t - target|^2.

    R is a rotation, never a reflection (Umeyama 1991).
    """
    source, target = source.double(), target.double()
    w = torch.ones_like(source[:, 0]) if weight is None else weight.double()
    w = w / w.sum()
    mean_source, mean_target = w @ source, w @ target
    a, b = source - mean_source, target - mean_target
    U, sigma, Vh = torch.linalg.svd(b.T @ (w[:, None] * a))
    sign = torch.cat([torch.ones_like(sigma[:2]), torch.det(U @ Vh).sign()[None]])
    R = (U * sign) @ Vh
    s = (sigma * sign).sum() / (w @ a.square().sum(1)).clamp_min(1e-24)
    return s, R, mean_target - s * R @ mean_source


# ---- Workshop: not needed to understand the method ----


def checked_ids(images, view_ids, generator, patch):  # -> V ids, or ValueError for what cannot be run
    if not 0 < len(images) <= VIEW_IDS:
        raise ValueError(f"{len(images)} views in one call, but there are ids for 1 to {VIEW_IDS}; leave some out "
                         "(--stride 2), or run groups that begin with the same view: all have its frame then, each "
                         "with a scale of its own")
    for index, image in enumerate(images):
        if image.ndim != 3 or len(image) != 3 or any(side < 1 or side % patch for side in image.shape[1:]):
            raise ValueError(f"view {index} is {tuple(image.shape)}; give (3, H, W), H and W multiples of {patch}")
    ids = draw_view_ids(len(images), generator) if view_ids is None else [int(i) for i in view_ids]
    if len(ids) != len(images) or not all(0 <= i < VIEW_IDS for i in ids):
        raise ValueError(f"view_ids: {len(ids)} for {len(images)} views; give one a view, each in 0..{VIEW_IDS - 1}")
    return ids


def draw_view_ids(count, generator=None) -> list[int]:
    """0 for the reference view, distinct random ids of 1..999 for the others, new ones in each pass (Sec. III-C).

    Number for number as Fast3R draws them: the same state of `generator` (or of torch's global one) gives the same ids.
    """
    seed = torch.randint(0, 2**32, (1,), generator=generator).item()
    order = torch.randperm(VIEW_IDS - 1, generator=torch.Generator().manual_seed(seed))
    return [0, *(order[:count - 1] + 1).tolist()]


def blocks_of_views(images, at_once) -> list[list[int]]:  # indices of views of one size, at most `at_once` in a block
    by_size = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-2:]), []).append(index)
    return [group[start:start + at_once] for group in by_size.values() for start in range(0, len(group), at_once)]


def aligned_global(view: Pointmap, mask: Tensor, quantile=0.85) -> Tensor:
    """(H, W, 3): the local points, moved as a whole onto the global ones, as the official code does for its target.

    Fitted to the valid pixels at or above that quantile of global confidence, or to all of them where they are under 3.
    """
    if mask.sum() < 3:
        return view.points_local
    sure = mask & (view.conf_global >= view.conf_global[mask].float().quantile(quantile))
    sure = sure if sure.sum() >= 3 else mask
    s, R, t = similarity(view.points_local[sure], view.points_global[sure])
    return (s * view.points_local.double() @ R.T + t).to(view.points_local)


# ------------------------------------------------------------------------------------------------ weights

FAST3R_PAGE = "huggingface.co/jedyang97/Fast3R_ViT_Large_512"
STUDENT_PAGE = "github.com/TheFourthKaramazov/Distill3R"


def load_fast3r(path) -> Fast3R:
    """Fast3R with its weights, in fp32 and evaluation mode: the published `model.safetensors`, its folder, or a
    training checkpoint (prefix `net.`). Raises ValueError, one line naming the file, as `load_vit` does."""
    path, config = find_network(path, f"put model.safetensors and config.json of {FAST3R_PAGE} there")
    stored = network_tensors(path, "net.")
    encoder, decoder = (config.get(part, {}) for part in ("encoder_args", "decoder_args"))
    depth = lambda part: len({m[1] for name in stored if (m := re.match(rf"\w+\.{part}_blocks\.(\d+)\.", name))})
    try:
        enc_dim, dec_dim = (len(stored[name]) for name in ("encoder.enc_norm.weight", "decoder.dec_norm.weight"))
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; it is no Fast3R") from None
    # The tensors tell all sizes but the number of heads: without a config.json they are taken to be 64 wide.
    model = built(Fast3R, enc_dim, encoder.get("num_heads", max(1, enc_dim // 64)), depth("enc"),
                  dec_dim, decoder.get("num_heads", max(1, dec_dim // 64)), depth("dec"))
    model.decoder.sharper = decoder.get("attn_bias_for_inference_enabled", False)
    return lift.load_strictly(model, stored, path)


def load_student(path) -> Student:
    """A student with its weights, in evaluation mode: a folder of `save_student`, or the official Lightning checkpoint
    (prefix `student.`), which has no config.json and the published sizes. Raises ValueError as `load_fast3r` does."""
    path, config = find_network(path, f"give the folder that `train` wrote, or the checkpoint linked at {STUDENT_PAGE}")
    try:
        config = StudentConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
    except TypeError as error:
        raise ValueError(f"{path.with_name('config.json')}: not of a student ({error}); copy it again") from None
    return lift.load_strictly(built(Student, config), network_tensors(path, "student."), path)


def save_student(model: Student, folder):  # {model.safetensors, config.json}, each file whole or not at all
    lift.save_tensors(Path(folder, "model.safetensors"), model.state_dict())
    data.write_whole(Path(folder, "config.json"), json.dumps(model.config._asdict(), indent=1).encode())


def write_card(args, cached, folder):
    """folder/README.md: what the student is made of, for those it is passed on to; `eval` adds its scores."""
    log = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    heldout = [f"{line['heldout']:.4f} after {line['step'] + 1} steps" for line in log if "heldout" in line]
    names = "max_steps", "batch", "lr", "encoder_share", "weight", "gamma", "mean", "global_target", "seed"
    made_of = dict(encoder=args.encoder, teacher=cached.settings["teacher"])
    licences = [words for name, words in LICENCES.items() if any(name in part for part in made_of.values())]
    card = CARD.format(
        **made_of, samples=len(cached), views=args.views, size=args.size, heldout=", ".join(heldout) or "not measured",
        settings=", ".join(f"--{name} {getattr(args, name)}" for name in names),
        licence="; ".join(licences) or "unknown")
    data.write_whole(Path(folder, "README.md"), card.encode())


def add_scores(folder, table):  # to the card of a student that was trained here
    card = Path(folder, "README.md")
    if card.exists():
        before = card.read_text().partition("\n## Scores\n")[0]
        data.write_whole(card, f"{before}\n## Scores\n\n```\n{table}\n```\n".encode())


LICENCES = {"tiny": "the encoder is this project's, MIT", "dune": "DUNE is NAVER's, non-commercial",
            "dinov2": "DINOv2 is Meta's, Apache-2.0", "fast3r": "the teacher Fast3R is FAIR's, non-commercial"}
CARD = """# A pointmap student (Distill3R)

- The encoder starts from: {encoder}. Teacher: {teacher}.
- Data: {samples} samples of up to {views} views of {size} (H, W).
- Settings: {settings}.
- Licences of what it is made of: {licence}.
- Loss on held-out samples: {heldout}.

```python
import importlib, torch
d3r = importlib.import_module("06_distill3r")
student = d3r.load_student("path/to/this/folder")
photos = [torch.rand(3, *student.config.size) for _ in range(2)]  # in [0, 1]; the camera of the first one is the world
with torch.no_grad():
    cameras = d3r.estimate_cameras(student(photos))
```
"""


def find_network(path, remedy):  # a file, or a folder's model.safetensors -> that file, and config.json beside it
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    beside = path.with_name("config.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such weights; {remedy}")
    try:
        return path, json.loads(beside.read_text()) if beside.exists() else {}
    except ValueError as error:
        raise ValueError(f"{beside}: not JSON ({error}); copy it again") from None


def network_tensors(path, prefix):
    """{our name: tensor} of a file; of a Lightning checkpoint those with the prefix. DUNE's chunks are joined."""
    state = lift.read_checkpoint(path)
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    prefixed = any(name.startswith(prefix) for name in state)
    return {re.sub(r"^encoder\.blocks\.\d+\.(?=\d)", "encoder.blocks.", name.removeprefix(prefix)): value
            for name, value in state.items()
            if name.startswith(prefix) == prefixed and isinstance(value, Tensor)
            and ".scratch.layer_rn." not in name}  # second names of layer1_rn .. layer4_rn


def built(network, *sizes):  # uninitialised: 650 million random numbers would only be overwritten
    with torch.device("meta"):
        return network(*sizes).to_empty(device="cpu")


class NetworkTeacher:
    """A network with the interface of a teacher: Fast3R for the cache, the student when it is measured."""

    def __init__(self, model, identity, view_size, device="cpu"):
        self.model, self.identity, self.view_size, self.device = model.to(device).eval(), identity, view_size, device

    @torch.no_grad()
    def __call__(self, views, generator) -> list[Pointmap]:
        maps = self.model([view.image.to(self.device) for view in views], generator=generator)
        return [Pointmap(*(part.float().cpu() for part in m)) for m in maps]


def fast3r_size(height, width, long_side=512, patch=16):
    """The size at which Fast3R looks at a picture: long side 512, both sides cut to whole patches."""
    # Differs: the official loader also cuts square pictures to 4:3. We leave them square.
    scale = long_side / max(height, width)
    return tuple(max(1, round(side * scale) // patch) * patch for side in (height, width))


# ------------------------------------------------------------------------------------------------ photos


class Photos:
    """Pictures of one place without poses: as much of `data.Scene` as a pointmap network needs."""

    def __init__(self, name, paths):
        self.name, self.frames = name, [photo_at(path) for path in paths]

    def __len__(self):
        return len(self.frames)

    def view(self, i, size=None, maps=True) -> data.View:
        """Picture i without any maps, scaled to cover `size` (H, W) and cropped, as `data.Scene.view` does it."""
        frame = self.frames[i]
        pixels = data.read_image(frame, tuple(size or frame.size)).float() / 255
        return data.View(frame.name, pixels, *[None] * 6)


def photo_at(path):  # -> a frame without a camera, to be turned as its EXIF tag says
    size, upright = data.stored_size(path), True
    try:
        with Image.open(path) as image:
            image.getexif().get(0x0112)
    except Exception:  # whatever a damaged tag makes Pillow raise: the picture is taken as it is stored
        upright = False
    return data.Frame(path.name, path, None, None, data.upright_size(path, size) if upright else size, upright=upright)


def photos_in(folder):
    return [path for path in folder.iterdir() if data.is_picture(path)]


def is_whole(path):  # decoded to its end; says so where it cannot be
    try:
        return bool(data.decode(path))
    except data.DataError as error:
        print(f"left out: {error}")


MAP_FOLDERS = "masks", "depth", "normals", "labels"  # beside images/


@lru_cache(8)
def scene_folders(root):
    """{scene name: folder} of the posed scenes in `root`; where there are none, of all folders with pictures."""
    root = Path(root)
    if not root.is_dir():
        raise data.DataError(f"{root}: no such folder; give a folder of photos, a scene, or a folder of scenes")
    found = [folder for folder, _ in data.find_scenes(root)]
    if found and root not in found and photos_in(root):
        print(f"{root}: the {len(photos_in(root))} pictures in it are left out, as there are posed scenes below")
    if not found:
        hidden = lambda folder: "/." in f"/{folder.relative_to(root).as_posix()}"
        maps = lambda folder: folder.name in MAP_FOLDERS and folder.with_name("images").is_dir()
        folders = [root, *(d for d in root.rglob("*") if d.is_dir() and not hidden(d))]
        found = sorted((folder for folder in folders if photos_in(folder) and not maps(folder)), key=data.natural)
        notes = data.left_out(path for folder in folders for path in folder.iterdir())
        if not found:
            notes = "".join(f" ({note})" for note in notes) or "; of a video, extract the frames first"
            raise data.DataError(f"{root}: no picture in here that can be read{notes}")
        for note in notes:
            print(f"{root}: {note}")
    own = root.resolve().name  # the name of pictures in `root` itself, unless a folder in it is called that
    own = "." if root / own in found else own
    return {folder.relative_to(root).as_posix() if folder != root else own: folder for folder in found}


@lru_cache(64)
def open_scene(root, name, skip_bad_frames=False):
    """-> a posed scene or photos below `root`, and {path of a picture from `root`: its index}, in natural order."""
    folder = scene_folders(root).get(name)
    if not folder:
        raise data.DataError(f"{root}: scene {name} is no longer in here; restore it or make the cache again")
    if data.reader_of(folder):
        scene = data.load_scenes(folder, skip_bad_frames)[0]
    else:
        scene = Photos(name, [path for path in photos_in(folder) if not skip_bad_frames or is_whole(path)])
    paths = {Path(os.path.relpath(frame.image, root)).as_posix(): i for i, frame in enumerate(scene.frames)}
    return scene, dict(sorted(paths.items(), key=lambda item: data.natural(item[0])))


# ------------------------------------------------------------------------------------------------ manifest


def make_manifest(root, views=20, stride=None, skip_bad_frames=False) -> list[dict]:
    """One line a view (Sec. III-B 1), `views` views a sample; the rest of a scene makes a sample of fewer.

    The file's number of bytes is there to notice another picture of the same name. `stride` n takes every n-th picture;
    by default `choose_stride` finds it.
    """
    # Differs: the official code sorts frame10 before frame2, and drops tails and scenes of under 20 views. We sort by
    # number and keep all of them.
    # Differs: the paper's manifest holds absolute paths. Ours are relative to the folder of pictures, which may move.
    root, lines = Path(root), []
    scene_folders.cache_clear(), open_scene.cache_clear()  # the folder may have changed
    for name in scene_folders(root):
        scene, index = open_scene(root, name, skip_bad_frames)
        step = stride or choose_stride(scene, list(index.values()), views)
        for n, (path, i) in enumerate(list(index.items())[::step]):
            frame = scene.frames[i]
            lines.append(dict(
                dataset=root.resolve().name, scene=name, sample=f"{name}/{n // views:03d}", view=n % views,
                size=list(frame.size), path=path, bytes=frame.image.stat().st_size))
    return lines


def samples_of(lines):  # -> {sample: its lines}
    samples = {}
    for line in lines:
        samples.setdefault(line["sample"], []).append(line)
    return samples


def load_views(root, lines, size_of, skip_bad_frames=False, maps=True):
    """The views of a sample; `size_of` (H, W of the stored picture) -> the size wanted. DataError names a lost file."""
    scene, index = open_scene(root, lines[0]["scene"], skip_bad_frames)
    for line in lines:
        path = Path(root, line["path"])
        if line["path"] not in index:
            raise data.DataError(f"{path}: in the manifest, but no longer in its scene; restore it or cache again")
        if path.stat().st_size != line["bytes"]:
            raise data.DataError(f"{path}: not the picture that the manifest lists; restore it or cache again")
    return [scene.view(index[line["path"]], size_of(*line["size"]), maps=maps) for line in lines]


def choose_stride(scene, order, views, enough=0.5):
    """The largest step at which neighbours still share half of what they see, and the scene still fills a sample
    (Sec. IV): by the frusta where poses are known, else by shifting thumbnails over each other."""
    thumbnail = lru_cache(None)(lambda i: scene.view(i, (24, 32), maps=False).image.mean(0).numpy())

    def shared(i, j):
        posed = isinstance(scene, data.Scene)
        return data.overlap(scene, i, j) if posed else picture_overlap(thumbnail(i), thumbnail(j))
    stride = 1
    for step in range(2, min(len(order) // views, len(order) - 1) + 1):
        starts = np.linspace(0, len(order) - 1 - step, 8).astype(int)
        if np.median([shared(order[i], order[i + step]) for i in starts]) < enough:
            break
        stride = step
    return stride


def picture_overlap(a, b, alike=0.7):
    """The share of a grey thumbnail (h, w) that another shows too: the largest that a shift makes correlate, or 0."""
    height, width = a.shape
    part = lambda x, dy, dx: x[max(0, dy):height + min(0, dy), max(0, dx):width + min(0, dx)]
    shifts = [(dy, dx) for dy in range(-(height // 2), height // 2 + 1) for dx in range(-(width // 2), width // 2 + 1)]
    for dy, dx in sorted(shifts, key=lambda shift: -(height - abs(shift[0])) * (width - abs(shift[1]))):
        ours, theirs = (x - x.mean() for x in (part(a, dy, dx), part(b, -dy, -dx)))
        if (ours * theirs).sum() > alike * ((ours**2).sum() * (theirs**2).sum()) ** 0.5:
            return ours.size / a.size
    return 0.0


def oriented(size, height, width):  # (H, W) of a landscape picture -> the same, upright for a picture that stands
    # Differs: the official code lays portrait images on their side, but not their targets. We keep both upright.
    return (max(size), min(size)) if height > width else (min(size), max(size))


def resampled(m: Pointmap, photo, size) -> Pointmap:
    """The map at another size, bilinear; pixels that the map does not show are NaN.

    Map and result are both centre crops of the photo (H, W), each scaled to cover its own size. What a pixel has in
    common in the two is its distance from the middle, in pixels of the photo.
    """
    # Differs: the official code stretches every picture to 224x518. We scale it to cover that size and crop it.
    have = m.conf_local.shape
    if have == tuple(size):
        return m
    scale_have, scale_size = (data.covering_crop(photo, shape)[0] for shape in (have, size))
    from_middle = [(torch.arange(n) + 0.5 - n / 2) / scale_size for n in size]
    y, x = (distance * scale_have / (n / 2) for distance, n in zip(from_middle, have))  # -1 ... 1 over the map
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2)
    stacked = torch.cat([m.points_global, m.points_local, m.conf_global[..., None], m.conf_local[..., None]], -1)
    found = F.grid_sample(stacked.permute(2, 0, 1)[None], grid[None], align_corners=False, padding_mode="border")[0]
    found = found.permute(1, 2, 0)  # (H, W, 8)
    points = torch.where((grid.abs() <= 1).all(-1, keepdim=True), found[..., :6], torch.nan)
    return Pointmap(points[..., :3], points[..., 3:], found[..., 6], found[..., 7])


# ------------------------------------------------------------------------------------------------ samples on disk

CACHE_FORMAT = "pointmaps 2"  # to be raised with every change of a sample's layout or of what is in it


def coded(channels, mask) -> bytes:
    """The valid pixels of (8, H, W) float16 without loss, in a quarter of the bytes.

    Neighbouring points differ little, so small whole numbers are stored: float16 values are numbered in the order of
    their size, and their differences are taken along columns and rows. Masked pixels repeat the valid one before them.
    """
    steps = in_order(np.where(mask, channels, np.float16(0)).view(np.int16))
    valid_before = np.maximum.accumulate(np.where(mask.ravel(), np.arange(mask.size), 0))
    steps = steps.reshape(8, -1)[:, valid_before].reshape(channels.shape)
    for axis in (1, 2):  # differences may wrap around, which loses nothing
        steps = np.diff(steps, axis=axis, prepend=np.zeros_like(steps.take([0], axis)))
    zigzag = (steps << 1 ^ steps >> 15).view(np.uint16)  # 0 -1 1 -2 2 ... -> 0 1 2 3 4 ...: high bytes are mostly 0
    return zlib.compress(np.stack([zigzag & 255, zigzag >> 8], 1).astype(np.uint8).tobytes())


def decoded(stored: bytes, shape):  # the inverse of `coded` -> (8, H, W) float16; masked pixels hold anything
    planes = np.frombuffer(zlib.decompress(stored), np.uint8).reshape(8, 2, *shape).astype(np.uint16)
    zigzag = planes[:, 0] | planes[:, 1] << 8
    steps = (zigzag >> 1 ^ -(zigzag & 1)).view(np.int16)
    return in_order(steps.cumsum(2, dtype=np.int16).cumsum(1, dtype=np.int16)).view(np.float16)


def in_order(code):  # int16 <-> int16: bits of float16 <-> numbers in the order of their values; its own inverse
    return code ^ (code >> 15 & 0x7FFF)


def run_lengths(mask):  # (H, W) bool -> (R, 2) int32: first pixel and length of every run of True, row-major
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=False, append=False))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], 1).astype(np.int32)


def from_run_lengths(runs, shape):  # -> (H, W) bool
    mask = np.zeros(math.prod(shape), bool)
    for start, length in runs:
        mask[start:start + length] = True
    return mask.reshape(shape)


def pack_sample(maps, lines, settings) -> bytes:
    """One sample as a safetensors file (Sec. III-B 2, "compression"): of each view the coded maps and the mask as run
    lengths, then who made them from which pictures, with a checksum over everything."""
    tensors, sizes = {}, []
    for k, m in enumerate(maps):
        channels, mask = filtered(m, settings["tau"])
        tensors[f"{k}.maps"] = torch.frombuffer(bytearray(coded(channels, mask)), dtype=torch.uint8)
        tensors[f"{k}.runs"] = torch.from_numpy(run_lengths(mask))
        sizes.append(mask.shape)
    about = dict(settings=settings, paths=[line["path"] for line in lines], sizes=sizes)
    about["sha256"] = checksum(about, tensors)
    return save(tensors, {"sample": json.dumps(about)})  # one entry, as several would come in random order


def checksum(about, tensors):
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + x.numpy().tobytes())
    return digest.hexdigest()


def read_sample(path):
    """-> what the file says about its sample, and its tensors. Raises DataError, naming the file, if it is damaged."""
    content = Path(path).read_bytes()
    try:
        header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
        about, tensors = json.loads(header["__metadata__"]["sample"]), load(content)
        made_as = about["settings"]["format"]
        whole = made_as != CACHE_FORMAT or about.pop("sha256") == checksum(about, tensors)
    except Exception:  # whatever damaged bytes make the readers raise
        whole = False
    if not whole:
        raise data.DataError(f"{path}: damaged or cut off; run the cache command again, it makes this sample anew")
    if made_as != CACHE_FORMAT:
        raise data.DataError(f"{path}: its format is {made_as}, not {CACHE_FORMAT}; run the cache command again")
    return about, tensors


def unpack_sample(path):
    """-> what the file says about its sample, [Pointmap] float32, [mask (H, W) bool]."""
    (about, tensors), maps, masks = read_sample(path), [], []
    for k, size in enumerate(about["sizes"]):
        masks.append(torch.from_numpy(from_run_lengths(tensors[f"{k}.runs"].numpy(), size)))
        channels = torch.from_numpy(decoded(tensors[f"{k}.maps"].numpy().tobytes(), size)).float()
        points = torch.where(masks[-1], channels[:6], 0.0).permute(1, 2, 0)
        conf_local, conf_global = torch.where(masks[-1], channels[6:], 1.0)
        maps.append(Pointmap(points[..., 3:], points[..., :3], conf_global, conf_local))
    return about, maps, masks


def is_done(path, settings):
    """Whether a sample is there and whole. Says so where it is damaged; DataError where another run made it."""
    if not path.exists():
        return False
    try:
        old = read_sample(path)[0]["settings"]
    except data.DataError as error:
        print(error)
        return False
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
    if changed:
        raise data.DataError(f"{path}: made with other settings ({', '.join(changed)}); use those or another --out")
    return True


def keep_manifest(out, lines, first):
    """Writes the manifest beside the samples, by the first shard alone; refuses to mix samples of two manifests."""
    path, content = out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()
    changed = path.exists() and path.read_bytes() != content
    if changed and any(out.rglob("*.safetensors")):
        raise data.DataError(f"{path}: lists other pictures or samples than are here now; give another --out")
    if first and (changed or not path.exists()):
        remove_leftovers(path)
        data.write_whole(path, content)


def remove_leftovers(path):  # what `write_whole` had not yet renamed when it was killed
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()


class CachedViews(torch.utils.data.Dataset):
    """What `write_cache` wrote, with its images: item i -> CachedSample. `scenes`: the names to keep, or all."""

    def __init__(self, root, cache, scenes=None, skip_bad_frames=False):
        self.root, self.cache, self.skip_bad_frames = Path(root), Path(cache), skip_bad_frames
        manifest = self.cache / "manifest.jsonl"
        if not manifest.exists():
            raise data.DataError(f"{manifest} does not exist; run the cache command first")
        try:
            lines = [json.loads(line) for line in manifest.read_text().splitlines()]
            assert all(line["bytes"] for line in lines)
            self.samples = list(samples_of(line for line in lines if scenes is None or line["scene"] in scenes).items())
        except (AssertionError, ValueError, KeyError, TypeError):
            raise data.DataError(f"{manifest}: not a manifest; make the cache again, with another --out") from None
        if not self.samples:
            raise data.DataError(f"{cache}: no sample in it is of {root}; cache that folder, with an --out of its own")
        missing = [name for name, _ in self.samples if not self.path(name).exists()]
        if missing:
            raise data.DataError(f"{cache}: {len(missing)} of {len(self.samples)} samples are not there yet "
                                 f"({', '.join(missing[:3])}); run the cache command to its end")
        self.settings = read_sample(self.path(self.samples[0][0]))[0]["settings"]
        self.identity = hashlib.sha256(manifest.read_bytes() + json.dumps(self.settings).encode()).hexdigest()[:16]

    def path(self, name):
        return self.cache / f"{name}.safetensors"

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i) -> CachedSample:
        name, lines = self.samples[i]
        about, targets, masks = unpack_sample(self.path(name))
        if about["paths"] != [line["path"] for line in lines]:
            raise data.DataError(f"{self.path(name)}: made of other pictures than {self.cache}/manifest.jsonl lists; "
                                 "remove it and run the cache command again")
        size = about["settings"]["size"]
        views = load_views(self.root, lines, lambda *stored: oriented(size, *stored), self.skip_bad_frames, maps=False)
        return CachedSample(name, [view.image for view in views], targets, masks)


# ------------------------------------------------------------------------------------------------ around the loop


def cached_part(args, part, root=None) -> CachedViews:  # "train" or "val": every eighth scene is held out
    root = root or source_of(args)
    return CachedViews(root, args.cache, data.split(list(scene_folders(root)), part), args.skip_bad_frames)


def cached_parts(args):  # -> training and held-out samples (None of a single scene); args.size becomes the cache's
    cached = cached_part(args, "train")
    heldout = cached_part(args, "val") if len(scene_folders(source_of(args))) > 1 else None
    size = cached.settings["size"]
    if size != args.size and not args.any_size:
        raise data.DataError(f"{args.cache}: made at {size}, not {args.size}; leave --size out, or cache again")
    args.size = size
    return cached, heldout


def run_settings(args, cached):  # for `Run`: settings that must stay the same when a run goes on
    free = ("command", "cache", "weights", "teacher", "models", "counts", "shard", "at_once", "stride", "images",
            "scene_dir", "any_size")
    return argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in free}, cached=cached.identity)


def new_student(args) -> Student:
    """A student of the preset's size on a pretrained ViT, any that 02_lift reads; the rest starts at random."""
    vit = lift.load_vit(args.encoder)
    registers = 0 if vit.register_tokens is None else vit.register_tokens.shape[1]
    config = STUDENTS[args.preset]._replace(
        patch=vit.patch, enc_dim=vit.dim, enc_heads=vit.heads, enc_depth=len(vit.blocks), mlp_ratio=vit.mlp_ratio,
        registers=registers, grid=vit.grid, published=False, size=tuple(args.size))
    torch.manual_seed(args.seed)
    student = Student(config)
    student.encoder.load_state_dict(vit.state_dict())
    for name, p in student.named_parameters():  # these are in the published files, but nothing is computed from them
        p.requires_grad_(not (name == "encoder.mask_token" or ".refinenet4.resConfUnit1." in name))
    student.recompute = args.grad_checkpoint
    return student.train()


def mirrored(sample: CachedSample) -> CachedSample:
    """Left and right exchanged: pictures, masks and maps are flipped, and x changes its sign in both frames."""
    points = lambda x: x.flip(1) * x.new_tensor([-1, 1, 1])
    targets = [Pointmap(points(m.points_global), points(m.points_local), m.conf_global.flip(1), m.conf_local.flip(1))
               for m in sample.targets]
    return CachedSample(sample.name, [x.flip(2) for x in sample.images], targets, [x.flip(1) for x in sample.masks])


@torch.no_grad()
def heldout_loss(student, heldout: CachedViews, args) -> float:
    student.eval()
    some = np.linspace(0, len(heldout) - 1, min(args.heldout, len(heldout))).astype(int)
    losses = [loss_of(student, heldout[i], args, seed=int(i)).total.item() for i in some]
    student.train()
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------ around the cameras


def usable_pixels(m: Pointmap, tau, most=20_000) -> Tensor:
    """(H, W) bool: the pixels that say where the camera is, evenly thinned out to about `most`."""
    known = m.points_local.isfinite().all(-1) & m.points_global.isfinite().all(-1) & (m.points_local[..., 2] > 0)
    for points in (m.points_local, m.points_global) if known.any() else ():
        distance = points.norm(dim=-1)
        known &= distance <= FAR * distance[known].median()  # a few points of the sky would outweigh all the others
    trusted = known & (certainty(torch.minimum(m.conf_local, m.conf_global)) >= tau)
    use = trusted if trusted.sum() >= 100 else known  # where next to nothing is trusted, a poor pose beats none
    every = use.sum() // most + 1
    return use & (use.flatten().cumsum(0) % every == 0).view(use.shape)


def focal_length(points: Tensor, weight: Tensor, rounds=10) -> float:
    """Of local points (H, W, 3), in pixels: the f that minimises the weighted sum of |pixel - f (x, y) / z|, pixels
    counted from the middle. Each of Weiszfeld's rounds is a least-squares fit (DUSt3R Sec. 3.3)."""
    h, w = weight.shape
    y, x = torch.meshgrid(torch.arange(h) + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2, indexing="ij")
    use = (weight > 0) & (points[..., 2] > 0)
    pixel, ray = torch.stack([x, y], -1)[use].double(), (points[..., :2] / points[..., 2:])[use].double()
    weights = weight[use].double()
    for _ in range(rounds):
        f = (weights * (pixel * ray).sum(1)).sum() / (weights * ray.square().sum(1)).sum()
        weights = weight[use].double() / (pixel - f * ray).norm(dim=1).clamp_min(1e-3)
    return max(f.item(), 0.1 * max(h, w))  # that of an untrained network may be negative


def robust_similarity(source: Tensor, target: Tensor, weight: Tensor, rounds=10):
    """`similarity` where some points are far off: each round weighs points by how well the last one fitted them."""
    s, R, t = similarity(source, target, weight)
    for _ in range(rounds):
        off = (target - (s * source.double() @ R.T + t)).norm(dim=1)
        s, R, t = similarity(source, target, weight / (1 + (off / off.median().clamp_min(1e-12)).square()))
    return s, R, t


def photo_agreement(points, colours, photos, focal, c2w) -> float:
    """How well neighbouring photos agree through the geometry: 1 where each point of one photo meets its own colour in
    the other, 0 where the colours are as wrong as those of pixels drawn at random, or where no point meets the other.

    points, colours: V of (M, 3), in the frames of their cameras; photos: V of (3, H, W); focal (V,); c2w (V, 4, 4)
    """
    off, some = torch.zeros(2), torch.Generator().manual_seed(0)
    for i, j in ((i, j) for i in range(len(photos)) for j in (i - 1, i + 1) if 0 <= j < len(photos)):
        motion, (h, w) = torch.linalg.inv(c2w[j]) @ c2w[i], photos[j].shape[1:]
        p = points[i] @ motion[:3, :3].T + motion[:3, 3]  # as camera j sees them
        at = p[:, :2] / p[:, 2:].clamp_min(1e-6) * focal[j] / torch.tensor([w / 2, h / 2])  # -1 ... 1 over its photo
        seen = (p[:, 2] > 0) & (at.abs() < 1).all(1)
        there = F.grid_sample(photos[j][None], at[seen][None, None], align_corners=False)[0, :, 0].T
        strangers = there[torch.randperm(len(there), generator=some)]
        off += torch.stack([(colours[i][seen] - other).abs().sum() for other in (there, strangers)])
    return 1 - (off[0] / off[1]).item() if off[1] > 0 else 0.0


def doubtful(agreement) -> bool:  # cameras that never moved would explain the photos as well as those that were found
    found, still = agreement
    return found < still + 0.02


# ------------------------------------------------------------------------------------------------ a scene for others


def write_scene(out, views, maps: list[Pointmap], tau=0.3, photos="") -> Path:
    """Writes what pointmaps say about their pictures, for 01_data and for other tools, and returns the folder `out`.

    images/, depth/ (16-bit PNG, z in the unit that transforms.json names, 0 = not trusted), confidence/ (8-bit PNG of
    1 - 1/C), transforms.json (nerfstudio), sparse/0 (COLMAP text), cloud.ply, cloud.png, maps.png. A view's image may
    be of any multiple of its map's size. The world is the frame of view 0, in the unit of the global maps.
    """
    out, cameras = Path(out), estimate_cameras(maps, tau, [view.name for view in views])
    depths = trusted_depths(maps, cameras.scale, tau, out)
    unit = 10.0 ** math.ceil(math.log10(max(d.max().item() for d in depths) / 65000))  # the farthest fits 16 bits
    before = [file for part in ("images", "depth", "confidence") for file in out.glob(f"{part}/[0-9]*.*")]
    for file in [out / "transforms.json", *before]:
        file.unlink(missing_ok=True)  # of a scene that was here before: from now on it is none
    frames = [write_view(out, k, view, maps[k], depths[k] / unit, cameras) for k, view in enumerate(views)]
    points, radii, colours, small = zip(*(points_of(*each) for each in zip(views, depths, cameras.focal)))
    poses = cameras.c2w, torch.eye(4).expand_as(cameras.c2w)  # as found, and as if no camera had moved
    agreement = [photo_agreement(points, colours, small, cameras.focal, c2w) for c2w in poses]
    points = torch.cat([p @ c2w[:3, :3].T + c2w[:3, 3] for p, c2w in zip(points, cameras.c2w)])
    radii, colours = torch.cat(radii), torch.cat(colours)
    write_colmap(out / "sparse/0", frames, cameras.c2w, points, colours)
    write_points(out / "cloud.ply", points, colours)
    cloud_picture(out / "cloud.png", [views[0].image, views[-1].image], points, radii, colours, cameras.c2w)
    shown = np.linspace(0, len(views) - 1, min(5, len(views))).astype(int)
    sure = [certainty(m.conf_local).expand(3, -1, -1) for m in maps]
    rows = [[views[k].image, data.colour_depth(depths[k]), sure[k]] for k in shown]
    data.picture_grid(out / "maps.png", ["image", "depth (black: not trusted)", "confidence 1 - 1/C"], rows)
    meta = dict(camera_model="PINHOLE", depth_unit_scale_factor=unit, agreement=agreement, photos=str(photos),
                frames=frames)
    data.write_whole(out / "transforms.json", json.dumps(meta, indent=1).encode())  # last: now it is a scene
    return out


def trusted_depths(maps, scale, tau, out):  # -> V of (H, W) z-depth in the world's unit, 0 where it is not trusted
    depths = [torch.where(certainty(m.conf_local) >= tau, s * m.points_local[..., 2], 0.0).nan_to_num().clamp_min(0)
              for m, s in zip(maps, scale)]
    known = torch.cat([depth[depth > 0] for depth in depths])
    if not len(known):
        raise ValueError(f"{out}: not one pixel is trusted at --tau {tau:g}; lower it, or look at other pictures")
    return [torch.where(depth <= FAR * known.median(), depth, 0.0) for depth in depths]


def write_view(out, k, view, m, steps, cameras) -> dict:  # its files -> its entry in transforms.json; steps: of depth
    height, width = view.image.shape[1:]
    f = cameras.focal[k].item() * width / steps.shape[1]
    image, depth, confidence = (out / f"{part}/{k:03d}" for part in ("images", "depth", "confidence"))
    to_bytes = lambda x: (x.clamp(0, 1) * 255).round().byte().numpy()
    for path in (image, depth, confidence):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(view.image).transpose(1, 2, 0)).save(f"{image}.jpg", quality=95, subsampling=0)
    Image.fromarray(steps.round().numpy().astype(np.uint16)).save(f"{depth}.png")
    Image.fromarray(to_bytes(certainty(m.conf_local))).save(f"{confidence}.png")
    pose = (cameras.c2w[k].double().numpy() @ data.OPENGL).tolist()
    return dict(file_path=f"images/{k:03d}.jpg", depth_file_path=f"depth/{k:03d}.png", source=view.name, w=width,
                h=height, fl_x=f, fl_y=f, cx=width / 2, cy=height / 2, transform_matrix=pose)


def points_of(view, depth, focal):
    """-> the trusted points of a view in its camera's frame (M, 3), the radius of a pixel there (M,), their colours
    (M, 3), and the photo at the size of the map (3, h, w)."""
    h, w = depth.shape
    K = torch.tensor([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1]])
    small = F.interpolate(view.image[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)
    points = (lift.pixel_rays(K, h, w) * depth[..., None])[depth > 0]
    return points, 0.6 * depth[depth > 0] / focal, small.permute(1, 2, 0)[depth > 0], small


def write_points(path, points: Tensor, colours: Tensor):  # (M, 3), (M, 3) in [0, 1] -> a .ply of coloured points
    colour = [(name, "u1") for name in ("red", "green", "blue")]
    vertices = np.empty(len(points), [(name, "<f4") for name in "xyz"] + colour)
    for name, column in zip(vertices.dtype.names, [*points.T, *(colours * 255).round().T]):
        vertices[name] = column.numpy()
    properties = [f"property {'float' if name in 'xyz' else 'uchar'} {name}" for name in vertices.dtype.names]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header", ""]
    data.write_whole(path, "\n".join(header).encode() + vertices.tobytes())


def write_colmap(folder, frames, c2w, points, colours):
    """A COLMAP text model: one camera a view, poses world-to-camera; points without tracks, at most 50,000."""
    w2c = torch.linalg.inv(c2w.double()).numpy()
    numbers = lambda values: " ".join(f"{float(value):.9g}" for value in values)
    cameras, images, points3d = [], [], []
    for i, (frame, q, m) in enumerate(zip(frames, splat.rotation_to_quaternion(w2c[:, :3, :3]), w2c), 1):
        lens = numbers(frame[key] for key in ("fl_x", "fl_y", "cx", "cy"))
        cameras.append(f"{i} PINHOLE {frame['w']} {frame['h']} {lens}\n")
        images.append(f"{i} {numbers(q)} {numbers(m[:3, 3])} {i} {Path(frame['file_path']).name}\n\n")  # no 2D points
    some = slice(None, None, len(points) // 50_000 + 1)
    for i, (p, c) in enumerate(zip(points[some].tolist(), (colours[some] * 255).round().int().tolist()), 1):
        points3d.append(f"{i} {numbers(p)} {' '.join(map(str, c))} 0\n")
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points3d)):
        data.write_whole(folder / f"{name}.txt", "".join(lines).encode())


def cloud_picture(path, photos, points, radii, colours, c2w, size=480):
    """The cloud from behind the first camera, and from above with the cameras in red; below, the first and last photo.

    points, radii, colours, c2w: (M, 3), (M,), (M, 3), (V, 4, 4)
    """
    some = slice(None, None, len(points) // 1_000_000 + 1)
    points, radii, colours = points[some], radii[some] * some.step**0.5, colours[some]
    up, centres = F.normalize(-c2w[:, :3, 1].mean(0), dim=0), c2w[:, :3, 3]
    right = F.normalize(torch.linalg.cross(c2w[0, :3, 2], up), dim=0)
    ahead = torch.linalg.cross(up, right)
    low, high = (points[::len(points) // 100_000 + 1].quantile(q, 0) for q in (0.005, 0.995))  # without stray points
    inside = ((points - (low + high) / 2).abs() < 0.55 * (high - low)).all(1)
    low, high = torch.minimum(low, centres.amin(0)), torch.maximum(high, centres.amax(0))
    extent, middle = (high - low).norm(), (low + high) / 2
    open_top = inside & (points @ up < (centres @ up).max() + 0.03 * extent)  # a ceiling would hide the room
    away = centres[0] - middle
    behind = middle + 1.35 * away - 0.35 * away.norm() * (right - up)
    red, large = torch.tensor([1.0, 0.1, 0.1]).expand(len(centres), 3), extent.expand(len(centres)) / 150
    cloud = lambda keep: [torch.cat([x[keep], y]) for x, y in ((points, centres), (radii, large), (colours, red))]
    drawn = [draw_points(*cloud(inside), behind, middle, up, 0.75 * size, size),
             draw_points(*cloud(open_top), middle + 10 * extent * up, middle, ahead, 9 * size, size)]  # no perspective
    headings = ["point cloud from behind the first camera", "from above (red: cameras)"]
    return data.picture_grid(path, headings, [drawn, photos])


def draw_points(points, radii, colours, eye, at, up, focal, size) -> Tensor:
    """(M, 3), (M,), (M, 3) -> (3, size, size): each point a small round Gaussian, seen from `eye` (3,) towards `at`."""
    forward = F.normalize(at - eye, dim=0)
    right = F.normalize(torch.linalg.cross(forward, up), dim=0)
    c2w, K = torch.eye(4), torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    c2w[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], 1)
    c2w[:3, 3] = eye
    gaussians = points, radii.square()[:, None, None] * torch.eye(3), torch.full_like(radii, 0.9), colours
    grey = torch.full((3,), 0.12)
    return splat.rasterize(*gaussians, torch.linalg.inv(c2w), K, size, size, background=grey).features.permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------ evaluation


class Score(NamedTuple):
    """Of one view, in the unit of the truth; means over views and scenes have the same form."""
    accuracy_mean: float  # from the prediction to the truth
    accuracy_median: float
    completeness_mean: float  # from the truth to the prediction
    completeness_median: float
    scale: float  # by which the prediction had to be multiplied; 1 = metric


def evaluate(teacher, scenes, size, views=20, seed=0) -> dict:
    """Accuracy, completeness, scale and calibration of a teacher (or student) on scenes with depth (Sec. IV-B).

    At most `views` views a scene, spread over it, at `size` (H, W). -> mean score over scenes, each scene's, the rank
    correlation of confidence and error (-1: confidence orders the errors perfectly), and the speed in views a second.
    """
    scores, sure, wrong, seconds, asked_for = {}, [], [], 0.0, 0
    for scene in tqdm(scenes, desc=teacher.identity, unit="scene", leave=False):
        shown = [i for i, frame in enumerate(scene.frames) if frame.depth]
        shown = [shown[n] for n in np.linspace(0, len(shown) - 1, min(views, len(shown))).astype(int)]
        asked = [scene.view(i, teacher.view_size(*scene.frames[i].size)) for i in shown]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {scene.name}".encode()))
        of_scene, begin = [], time.perf_counter()
        maps = teacher(asked, generator) if asked else []
        seconds, asked_for = seconds + time.perf_counter() - begin, asked_for + len(asked)
        for i, m in zip(shown, maps):
            photo = scene.frames[i].size
            goal = oriented(size, *photo)
            truth, m = scene.view(i, goal), resampled(m, photo, goal)
            use = (truth.depth > 0) & m.points_local.isfinite().all(-1)
            if use.sum() >= 100:
                points = (lift.pixel_rays(truth.K, *goal) * truth.depth[..., None])[use]
                score, off = score_view(m.points_local[use], points)
                of_scene.append(score)
                sure.append(m.conf_local[use])
                wrong.append(off)
        if of_scene:
            scores[scene.name] = Score(*np.mean(of_scene, axis=0).tolist())
    if not scores:
        raise data.DataError("no scene has a view with measured depth to compare with; give another --scene_dir")
    return dict(mean=Score(*np.mean(list(scores.values()), axis=0).tolist()), scenes=scores,
                calibration=dict(rank=rank_correlation(torch.cat(sure), torch.cat(wrong))), speed=asked_for / seconds)


def score_view(points: Tensor, truth: Tensor, most=5_000):
    """(M, 3) twice, pixel by pixel -> Score, and (M,) how far each pixel is off after the alignment.

    One similarity a view (Sec. IV-B), over all pixels, so that a network gains nothing by being confident of few.
    Distances are taken from at most so many pixels, evenly spread, to all points of the other side.
    """
    s, R, t = similarity(points, truth)
    aligned, some = (s * points.double() @ R.T + t).to(truth), slice(None, None, len(points) // most + 1)
    there, back = nearest_distance(aligned[some], truth), nearest_distance(truth[some], aligned)
    score = Score(there.mean().item(), there.median().item(), back.mean().item(), back.median().item(), s.item())
    return score, (aligned - truth).norm(dim=1)


def nearest_distance(queries: Tensor, points: Tensor, block=256) -> Tensor:  # (M, 3), (N, 3) -> (M,)
    exact = "donot_use_mm_for_euclid_dist"  # matrix products would round
    return torch.cat([torch.cdist(some, points, compute_mode=exact).amin(1) for some in queries.split(block)])


def rank_correlation(a: Tensor, b: Tensor) -> float:  # (M,) twice; Spearman's, 0 where one of them is constant
    def ranks(x):  # places in order of size; equal values share the mean of their places
        _, inverse, count = x.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[inverse].double()
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].nan_to_num().item()


class MeanTeacher:
    """Always the mean of the cached maps, whatever the picture: what a student must beat."""

    identity = "mean pointmap"

    def __init__(self, cached: CachedViews):
        first = cached[0].targets[0].conf_local.shape
        total, count = torch.zeros(*first, 6), torch.zeros(*first, 1)
        for sample in (cached[i] for i in range(len(cached))):
            for m, mask in zip(sample.targets, sample.masks):
                if mask.shape == first:
                    total += torch.cat([m.points_global, m.points_local], -1)  # 0 where masked
                    count += mask[..., None]
        points = (total / count.clamp_min(1)).split(3, -1)
        self.mean = Pointmap(*points, *torch.full((2, *first), 2.0))

    def view_size(self, height, width):
        return tuple(self.mean.conf_local.shape)

    def __call__(self, views, generator) -> list[Pointmap]:
        return [self.mean] * len(views)


class CameraError(NamedTuple):
    position: float  # median, in the unit of the true cameras, after a similarity of the centres
    rotation: float  # median over all pairs of cameras of how far the rotation between the two is off, degrees


def camera_error(c2w: Tensor, truth: Tensor) -> CameraError:  # (V, 4, 4) twice
    ours, theirs = c2w[:, :3, 3].double(), truth[:, :3, 3].double()
    s, R, t = similarity(ours, theirs)
    i, j = torch.triu_indices(len(c2w), len(c2w), 1)
    found, true = (x[i, :3, :3].double().mT @ x[j, :3, :3].double() for x in (c2w, truth))
    angle = (((found.mT @ true).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos().rad2deg()
    return CameraError((s * ours @ R.T + t - theirs).norm(dim=1).median().item(), angle.median().item())


# ------------------------------------------------------------------------------------------------ time and memory


class Cost(NamedTuple):
    model: str
    views: int
    seconds: float
    gigabytes: float  # at the peak, weights and pictures included


@torch.no_grad()
def efficiency(models: dict[str, PointmapNetwork], counts, size=(378, 518), at_once=8, repeats=2) -> list[Cost]:
    """Time and peak memory of each model's forward pass over N = counts views of about `size` (Table I).

    Sides are rounded to the model's patch: the default is the paper's 378x518 for the student, 384x512 for Fast3R.
    Times are the fastest of `repeats`, in bf16 on a GPU. What does not fit into a GPU costs infinity.
    """
    # Differs: the paper runs the heads on all views at once, here they run on `at_once` at a time.
    costs = []
    for count, (name, model) in ((count, item) for count in counts for item in models.items()):
        device = next(model.parameters()).device
        shape = [max(1, round(side / model.patch)) * model.patch for side in size]
        images = list(torch.rand(count, 3, *shape, generator=torch.Generator().manual_seed(0)).to(device))
        held = sum(x.numel() * x.element_size() for x in [*model.parameters(), *images])
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                seconds, peaks = zip(*(cost_of_pass(model, images, at_once) for _ in range(repeats)))
        except torch.OutOfMemoryError:
            seconds = peaks = [math.inf]
        costs.append(Cost(name, count, min(seconds), (held + max(peaks)) / 1e9))
    return costs


def cost_of_pass(model, images, at_once):  # -> seconds, bytes beyond weights and pictures
    device = images[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PEAK.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what is free already is no part of the next peak
        PEAK.write_text("5")
    before, begin = peak_memory(device), time.perf_counter()
    model(images, range(len(images)), at_once=at_once)
    peak = peak_memory(device)  # waits for the GPU
    return time.perf_counter() - begin, peak - before


PEAK = Path("/proc/self/clear_refs")  # Linux: writing "5" makes the process' peak memory its present one


def peak_memory(device) -> float:  # bytes; on a CPU that of the whole process, which only Linux tells
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    status = PEAK.with_name("status").read_text() if PEAK.exists() else ""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1]) if status else math.nan


def efficiency_table(costs: list[Cost]) -> str:
    """One line for each number of views: seconds and GB of each model; of two, how many times faster the second is."""
    names, lines = list(dict.fromkeys(c.model for c in costs)), {}
    for c in costs:
        lines.setdefault(c.views, []).append(c)
    table = ["views" + "".join(f"{name:>22}" for name in names) + "   faster" * (len(names) > 1)]
    for views, row in lines.items():
        faster = f"   {row[0].seconds / row[-1].seconds:5.1f}x" if len(row) > 1 else ""
        table.append(f"{views:5}" + "".join(f"{c.seconds:10.2f} s {c.gigabytes:6.2f} GB" for c in row) + faster)
    return "\n".join(table)


# ------------------------------------------------------------------------------------------------ the commands


def source_of(args) -> Path:  # the pictures' folder: as asked for, or that of the cache
    given = args.images or args.scene_dir
    return Path(given) if given else cached_root(args) or Path("data_small" if args.preset == "tiny" else "data")


def cached_root(args) -> Path | None:  # the folder whose pictures are cached
    record = args.cache / "root.json"
    try:
        return Path(json.loads(record.read_text())) if record.exists() else None
    except (ValueError, TypeError):
        raise data.DataError(f"{record}: damaged; run the cache command again, with --scene_dir or --images") from None


def unseen(args, scenes):
    """Those of `scenes` that the student was not trained on: held-out ones of the cached folder, all of any other."""
    if cached_root(args) != source_of(args).resolve():
        return scenes
    if not (hidden := data.split(scenes, "val")):
        print("the student was trained on this very scene, as there is no other in the cache")
    return hidden or scenes


def teacher_of(args):
    if args.teacher == "geometry":
        return importlib.import_module("tiny.teacher").GeometricTeacher(args.size)
    network = fast3r_of(args)
    network.identity = f"fast3r {distill.weights_id(network.model)[:16]}"
    return network


def fast3r_of(args):
    return NetworkTeacher(load_fast3r(args.teacher), "Fast3R", fast3r_size, args.device)


def student_of(args):  # asked at the size of pictures that it was trained on, where --size says nothing else
    model = load_student(args.weights)
    if args.any_size:
        args.size = list(model.config.size)
    return NetworkTeacher(model, "student", lambda *stored: oriented(args.size, *stored), args.device)


def cache(args, rank, world):
    """Asks the teacher about every sample once."""
    root, part = source_of(args), (rank, world) if world > 1 else args.shard
    begin, teacher = time.monotonic(), teacher_of(args)
    written = write_cache(teacher, root, args.cache, args.size, args.views, args.stride, args.tau, args.seed, part,
                          args.skip_bad_frames)
    if world > 1:
        dist.barrier()
    if part[0] == 0:
        data.write_whole(args.cache / "root.json", json.dumps(str(root.resolve())).encode())
    files = list(args.cache.rglob("*.safetensors"))
    print(f"{teacher.identity}: {len(written)} samples written in {time.monotonic() - begin:.0f} s; "
          f"{len(files)} samples, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB  ->  {args.cache}")


def measure(args):
    """Accuracy, completeness, scale, calibration and speed of the models, on scenes that the student has not seen."""
    scenes = unseen(args, data.open_scenes(source_of(args), args.skip_bad_frames))
    models = {}
    if "student" in args.models:
        models["student"] = student_of(args)
    if "teacher" in args.models:
        models["teacher"] = teacher_of(args)
        if args.teacher == "geometry":
            print("teacher: true depth with a network's errors, as no weights are given (--teacher model.safetensors)")
    if "mean" in args.models and cached_root(args):
        models = {"mean": MeanTeacher(cached_part(args, "train", cached_root(args))), **models}
    elif "mean" in args.models:
        print(f"mean: left out, as {args.cache} holds no cache to take the mean of")
    if not models:
        raise data.DataError(f"{args.cache}: the mean pointmap is that of a cache; run the cache command first")
    results = {name: evaluate(model, scenes, args.size, args.views, args.seed) for name, model in models.items()}
    first = next(iter(results.values()))
    table = [f"{len(first['scenes'])} scenes, up to {args.views} views each; distances in their unit",
             f"{'':10}{'accuracy':>20}{'completeness':>20}{'scale':>8}{'conf. rank':>12}{'views/s':>9}",
             f"{'':10}{'mean':>10}{'median':>10}{'mean':>10}{'median':>10}"]
    for name, r in results.items():
        numbers = "".join(f"{value:10.4f}" for value in r["mean"][:4])
        speed = "" if name == "mean" else f"{r['speed']:9.1f}"
        table.append(f"{name:10}{numbers}{r['mean'].scale:8.3f}{r['calibration']['rank']:12.2f}{speed}")
        r.update(mean=r["mean"]._asdict(), scenes={scene: score._asdict() for scene, score in r["scenes"].items()})
    path = Path(args.out, "result.json")
    data.write_whole(path, json.dumps(results, indent=1).encode())
    print("\n".join(table), f"\n  ->  {path}")
    if "student" in models:
        add_scores(args.weights, "\n".join(table))


def infer(args):
    """Photos without poses -> a scene with poses, depth and a point cloud, for 01_data and for other tools."""
    root, out = source_of(args), Path(args.out, "scene")
    names = list(scene_folders(root))
    chosen = (unseen(args, names) if args.teacher == "geometry" else names)[0]
    if len(names) > 1 and args.command:
        print(f"{root}: {len(names)} scenes in here, this is {chosen}; give the folder of another one for that")
    scene, index = open_scene(root, chosen, args.skip_bad_frames)
    shown = list(index.values())[::args.stride or 1]
    if not (args.command or args.scene_dir or args.images):
        shown = shown[max(0, len(shown) - args.views) // 2:][:args.views]  # one sample, as in training
    network = student_of(args) if args.teacher == "geometry" else fast3r_of(args)
    sizes = [network.view_size(*scene.frames[i].size) for i in shown]
    print(f"{network.identity}, {len(shown)} views: {forecast(network.model, sizes, args.device)}")
    views = [scene.view(i, size, maps=False) for i, size in zip(shown, sizes)]
    maps = ask_in_groups(network, views, torch.Generator().manual_seed(args.seed))
    write_scene(out, [enlarged(scene, i, view) for i, view in zip(shown, views)], maps, args.tau, root.resolve())
    report_scene(scene, shown, out)


def check_scene_folder(args):  # where infer is going to write, before anything is computed
    root, out = source_of(args), Path(args.out, "scene")
    if out.resolve().is_relative_to(root.resolve()) or root.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the scene that infer writes would lie among the pictures of {root}, or over them; "
                         "give another --out")
    try:
        before = json.loads((out / "transforms.json").read_text()).get("photos")
    except (OSError, ValueError, AttributeError):
        before = None
    if before and before != str(root.resolve()):
        if Path(args.out) == Path(OUT):
            raise ValueError(f"{out}: holds the scene of other photos ({before}); give another --out, or remove it")
        print(f"{out}: the scene of other photos ({before}) is replaced")


def ask_in_groups(network, views, generator, most=VIEW_IDS) -> list[Pointmap]:
    """More views than there are ids go in groups that begin with view 0, so that its camera is the frame of all.
    Each group has a unit of its own; what it says about view 0 tells by how much it has to be scaled."""
    maps = network(views[:most], generator)
    for start in range(most, len(views), most - 1):
        first, *others = network([views[0], *views[start:start + most - 1]], generator)
        ratio = maps[0].points_global.norm(dim=-1) / first.points_global.norm(dim=-1)
        unit = ratio[ratio.isfinite()].median()
        maps += [m._replace(points_global=m.points_global * unit) for m in others]
    return maps


def forecast(model, sizes, device, at_once=8) -> str:
    """Memory and time of a call, said beforehand: from the sizes of its largest tensors, and from its floating-point
    operations at the rate of a matrix product on this machine. Memory is right to a tenth, time to a factor of two."""
    sizes = sizes[:VIEW_IDS]
    pixels, largest = sum(h * w for h, w in sizes), max(h * w for h, w in sizes)
    tokens, dim, depth = pixels // model.patch**2, model.decoder.dim, len(model.decoder.dec_blocks)
    count = lambda module: sum(p.numel() for p in module.parameters())
    features = model.downstream_head["dpt"].head[0].in_channels
    heads = 1.5 * features * largest * min(at_once, len(sizes)) + 4 * tokens * dim + 8 * pixels
    gigabytes = 4e-9 * (count(model) + 3 * pixels + max(heads, 15 * tokens * dim))
    transformers = 2 * tokens * (count(model.encoder) + count(model.decoder)) + 4 * tokens**2 * dim * depth
    a, times = torch.ones(1024, 1024, device=device), []
    for _ in range(3):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the GPU
        times.append(time.perf_counter() - begin)
    seconds = 2 * min(times) / 2**31 * (transformers + 28 * features**2 * pixels)
    duration = f"{math.ceil(seconds)} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"about {max(gigabytes, 0.1):.1f} GB and {duration} on {device}"


def enlarged(scene, i, view):  # other stages want more pixels than a map has: twice as many each way, if the photo can
    height, width = (2 * side for side in view.image.shape[1:])
    fits = height <= scene.frames[i].size[0] and width <= scene.frames[i].size[1]
    return scene.view(i, (height, width), maps=False) if fits else view


def report_scene(scene, shown, out):  # one verdict, whether the cameras are to be trusted, and what to do next
    meta = json.loads((out / "transforms.json").read_text())
    first, doubt = meta["frames"][0], doubtful(meta["agreement"])
    print(f"{scene.name}: {len(shown)} views, focal length {first['fl_x']:.0f} pixels at a width of {first['w']}")
    if len(shown) > 1:
        found, still = (f"{100 * value:.0f} %" for value in meta["agreement"])
        print(f"{'do not trust the cameras' if doubt else 'the cameras explain the photos'}: through them neighbouring "
              f"photos agree to {found}, and to {still} if no camera had moved (100: in every colour, 0: as strangers)")
    if isinstance(scene, data.Scene) and len(shown) > 2:
        true, found = scene.c2w[shown], data.load_scenes(out)[0].c2w
        error, still = camera_error(found, true), camera_error(torch.eye(4).expand_as(true), true)
        print(f"against the true poses, which were not used: position off by {error.position:.3f}, rotation of two "
              f"by {error.rotation:.1f} degrees (medians); without any motion by {still.position:.3f} and "
              f"{still.rotation:.1f}")
    further = "" if doubt or len(shown) < 3 else f"; python 04_distill.py --scene_dir {out} --geometry depth"
    print(f"  ->  {out / 'cloud.png'}, {out / 'cloud.ply'}{further}")


def table_one(args):
    """Table I of the published networks, whose speed does not depend on their weights."""
    models = {"Fast3R": built(Fast3R)} if "teacher" in args.models else {}
    models |= {"student": built(Student, StudentConfig())} if "student" in args.models else {}
    if not models:
        raise ValueError("table: give --models teacher, student or both")
    for model in models.values():
        for p in model.to(args.device).eval().parameters():
            nn.init.normal_(p, std=0.02)
    costs, path = efficiency(models, args.counts, args.size, args.at_once), Path(args.out, "table.json")
    data.write_whole(path, json.dumps([cost._asdict() for cost in costs], indent=1).encode())
    print(f"{efficiency_table(costs)}\n  ->  {path}")


# ------------------------------------------------------------------------------------------------ command line


OUT = "out/06_distill3r"


def parse(argv):
    parser = argparse.ArgumentParser(description="Distill3R: without a command cache, train, eval and infer, one after "
                                     "the other. [p] marks what --preset sets.")
    add = parser.add_argument
    add("command", nargs="?", choices=("cache", "train", "eval", "infer", "table"), help="one step, or Table I")
    add("--scene_dir", help="a scene or a folder of scenes; default: what was cached, else data_small/ (tiny) or "
        "data/, where built-in rooms are made")
    add("--images", help="a folder of photos or video frames without poses, in its place")
    add("--out", default=OUT)
    add("--preset", choices=list(PRESETS), help="full is the paper's setting, tiny takes minutes on a CPU; default: "
        "full on a CUDA machine")
    add("--cache", help="folder of the teacher's pointmaps; default: cache/ in --out")
    add("--teacher", default="geometry", help="Fast3R's model.safetensors, which infer asks instead of the student; or "
        "'geometry': true depth with a network's errors")
    add("--weights", help="student for eval and infer; default: student/ in --out")
    add("--size", type=data.positive, nargs=2, metavar=("H", "W"), help="of landscape pictures, multiples of the "
        "patch; lower it when memory runs out; infer and eval take what the student was trained on [p]")
    add("--views", type=data.positive, help="views a sample, N; lower it when memory runs out [p]")
    add("--stride", type=data.positive, help="take every n-th picture; default in full: cache finds it by overlap, "
        "infer takes all [p]")
    add("--tau", type=below_one, default=0.3, help="least certainty 1 - 1/C of a pixel that counts")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="cache part I of N (I from 0) in this process")
    add("--models", nargs="+", choices=("mean", "student", "teacher"), default=["mean", "student", "teacher"],
        help="those that eval measures (mean: the mean pointmap of the cache), or table (teacher, student)")
    add("--counts", type=data.positive, nargs="+", help="numbers of views in table")
    add("--at_once", type=data.positive, default=8, help="views at once in table; lower it when memory runs out")
    add("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torchrun gives each process its own")
    add("--seed", type=int, default=0)
    add_training_flags(parser)
    return settle_flags(parser.parse_args(argv))


def add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    add("--encoder", help="ViT that the student starts from: 'tiny', a published name, a file or folder [p]")
    add("--max_steps", type=data.positive, help="training steps [p]")
    add("--batch", type=data.positive, help="samples a step, over all processes; gradients add up one by one [p]")
    add("--lr", type=float, help="peak learning rate; halve it when the loss jumps [p]")
    add("--encoder_share", type=float, help="learning rate of the pretrained encoder, in parts of the others' [p]")
    add("--warmup", type=data.positive, help="steps until the peak [p]")
    add("--gamma", type=float, default=0.001, help="weight of the confidence loss, Eq. 6; Table III's labels only: 0, "
        "with --weight none")
    add("--weight", choices=list(WEIGHTS), default="teacher", help="w of Eq. 2; none and student are Table III's, "
        "clamped is the official code's")
    add("--mean", choices=("pixels", "views"), default="pixels", help="over all valid pixels, or, as the official "
        "code, over views first")
    add("--global_target", choices=("direct", "aligned"), default="direct", help="aligned, as the official code: the "
        "local map moved onto the global one")
    add("--mirror", action=argparse.BooleanOptionalAction, help="half of the samples mirrored, where there are few [p]")
    add("--bf16", action=argparse.BooleanOptionalAction, help="the networks in bfloat16 [p]")
    add("--grad_checkpoint", action="store_true", help="compute activations twice when memory runs out: 20 "
        "views at 224x518 then take 4 GB, not 10")
    add("--heldout", type=data.positive, default=8, help="held-out samples whose loss is measured during training")
    add("--eval_every", type=data.positive, help="steps between these measurements; default: six a run")
    add("--save_minutes", type=float, default=2.0, help="between checkpoints; 0 writes one after each step")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")


def shard(text):
    which, count = map(int, text.split("/"))
    if not 0 <= which < count:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 0 <= I < N")
    return which, count


def below_one(text):
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def settle_flags(args):  # fills in what the preset sets
    cuda = torch.cuda.is_available()
    args.preset = args.preset or ("full" if cuda else "tiny")
    preset = dict(PRESETS[args.preset])
    if args.command == "table":
        preset["size"], args.counts = (378, 518), args.counts or ([12, 32, 64, 96, 128] if cuda else [2, 4, 8])
    args.cache, args.weights = Path(args.cache or f"{args.out}/cache"), args.weights or f"{args.out}/student"
    args.any_size = args.size is None  # then train takes the cache's, infer and eval the student's
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.size = list(args.size)  # as a checkpoint gives it back
    args.eval_every = args.eval_every or max(1, args.max_steps // 6)
    return args


def run_commands(args):
    training = args.command in (None, "train")
    if args.command in (None, "infer"):
        check_scene_folder(args)
    rank, world = distill.processes(args, args.batch if training else 0)
    if rank:
        sys.stdout = open(os.devnull, "w")  # one voice
        dist.barrier()  # until rank 0 has made or fetched what is missing
    if args.command != "table" and not args.images and str(source_of(args)) in data.BUILT_IN:
        data.open_scenes(source_of(args))  # makes them
    if world > 1 and not rank:
        if training:
            lift.load_vit(args.encoder)
        dist.barrier()
    for command in [args.command] if args.command else ["cache", "train", "eval", "infer"]:
        if command in ("cache", "train"):
            distill.few_threads(args)
            {"cache": cache, "train": train}[command](args, rank, world)
        elif not rank:
            {"eval": measure, "infer": infer, "table": table_one}[command](args)


def main(argv=None):
    args = parse(argv)
    with data.explained(args, "the same command with --resume goes on"):
        run_commands(args)


if __name__ == "__main__":
    main()
