"""Distill3R: a network of 650 million parameters that sees 3D in photos teaches one of 72 million, on one workstation.

Paper   Distill3R Sec. III-A to III-D (Eq. 1-6), IV, V, Tables I-III; Fast3R (Yang et al. 2025) for the teacher.
In      a folder of photos or video frames, or posed views (01_data); weights of Fast3R and DUNE, where you have them.
Out     out/06_distill3r/: cache/, student/, scene/ (point cloud, depth and cameras, as 01_data reads them), log.jsonl.
Run     python 06_distill3r.py --preset tiny     cache, train, eval and infer on built-in rooms: 6 minutes on 2 cores
        python 06_distill3r.py cache --images photos/ --teacher model.safetensors    once; on several GPUs by torchrun
        python 06_distill3r.py train --images photos/ --encoder dune_vitsmall14_448.pth      torchrun for several GPUs
        python 06_distill3r.py infer --images holiday/ --teacher model.safetensors    photos -> a posed scene, by Fast3R
        python 06_distill3r.py eval  --scene_dir my_scene --models student          accuracy, completeness, calibration
        python 06_distill3r.py table                                         Table I: time and memory over the views
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py 06_distill3r.py tiny/rooms.py tiny/teacher.py
        tiny/vit.safetensors tiny/student.safetensors
Read    Pointmap, certainty, Loss, WEIGHTS, pointmap_loss, PointmapNetwork, read_out, Fusion, view_codes, Fast3R,
        StudentConfig, Student, CachedSample, write_cache, ask, filtered, train, learn_samples, loss_of, learning_rate,
        Cameras, estimate_cameras, focal_length, similarity
Try     after --preset tiny: eval --models mean student --views 1: points are off by 0.218 m, the mean map's by 0.245
        infer --images data_small/room_007/images --weights tiny --out out/room_007: colours carried to the next photo
        agree to 51 % (0: pixels at random) by the cameras found, to 41 % had none moved. Look at cloud.png.
Not     training of the teacher, bundle adjustment of the cameras, metric scale where the teacher has none.
Words   P^g points_global, P^l points_local; C conf; tau the certainty that valid pixels need; w the weight of a pixel;
        s the scale that points are divided by. In shapes V views (the paper's N), N tokens of a view, M valid pixels
        (the paper's |M|), C channels, H W pixels, h w patches.

Teacher and student are the same kind of network: one encoder, applied to each view; attention over all views; two
heads, applied to each view. The teacher looks at every sample once. Its answers are compressed and kept on disk, and
the student is trained from these files, without the teacher in memory.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import math
import os
import re
import sys
import time
import timeit
import zlib
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

OUT = "out/06_distill3r"
VIEW_IDS = 1000  # how many view codes Fast3R has, and therefore the most views in one call

# "full" is the paper's setting (Sec. IV): 60 epochs of 450,000 / 20 samples in steps of 16. encoder_share: the
# encoder's learning rate over that of the rest.
PRESETS = {
    "tiny": dict(encoder="tiny", size=(48, 64), views=4, max_steps=1200, batch=1, lr=5e-4, final_lr=1e-5,
                 encoder_share=0.1, warmup=100, mirror=True, bf16=False, grad_checkpoint=False),
    "full": dict(encoder="dune_vitsmall14_448", size=(224, 518), views=20, max_steps=84_375, batch=16, lr=1e-4,
                 final_lr=5e-5, encoder_share=1.0, warmup=3_500, mirror=False, bf16=True, grad_checkpoint=True)}

# ------------------------------------------------------------------------ 1. A pointmap


class Pointmap(NamedTuple):
    """What a network says about one view (Distill3R Sec. III-A): the 3D point behind each pixel, and how sure it is.

    Points have no unit of length: the loss (section 2) divides those of student and teacher each by their own scale.
    """
    points_global: Tensor  # (H, W, 3) in the frame of view 0's camera, which all views of the call share
    points_local: Tensor  # (H, W, 3) in the frame of the view's own camera
    conf_global: Tensor  # (H, W) in (1, inf), as Fast3R gives it; Sec. III-A writes [0, inf)
    conf_local: Tensor  # (H, W) in (1, inf)


def certainty(conf: Tensor) -> Tensor:
    """Confidence on a scale from 0 to 1: the networks give C = 1 + exp(x), and this is sigmoid(x)."""
    # Differs: Sec. III-B and the official code compare C itself with tau = 0.3; as C > 1, that never removes a pixel.
    # We compare 1 - 1/C.
    return 1 - 1 / conf


# ------------------------------------------------------------------------ 2. The loss


class Loss(NamedTuple):
    total: Tensor
    global_: Tensor  # the parts of the total, before alpha and gamma (`global` alone is a keyword of Python)
    local: Tensor
    confidence: Tensor


WEIGHTS = {  # w of Eq. 2, from the confidences of student and teacher
    "teacher": lambda student, teacher: teacher,  # the paper's: no student can lower its loss by being unsure
    "clamped": lambda student, teacher: (teacher / 10).clamp(0.1, 1),  # the official code's
    "student": lambda student, teacher: (student / 10).clamp(0.1, 1),  # its ablation; the gradient flows through w
    "none": lambda student, teacher: torch.ones_like(teacher)}


def pointmap_loss(
    pred: list[Pointmap],  # V of the student
    target: list[Pointmap],  # V of the teacher
    masks: list[Tensor],  # V of (H, W) bool, the valid pixels; the others may hold anything, NaN too
    alpha_g=2.0,
    alpha_l=1.0,
    gamma=0.001,
    weight="teacher",  # which of WEIGHTS
    mean="pixels",  # of Eq. 2: over all valid pixels; "views": the mean of each view's mean
    global_target="direct",  # the teacher's global map; "aligned": its local map, moved onto its global one
) -> Loss:
    """The distillation loss of the views of one scene (Distill3R Sec. III-D); 0 where no pixel is valid."""
    # Differs: the official code clamps w, takes the mean over views first, and uses aligned local maps as the global
    # target. We compute Eq. 1-6 as written; `--weight clamped --mean views --global_target aligned` is the code.
    # Differs: "the entire batch" of Eq. 4 is one scene, as in the official code, because two scenes share no scale.
    if global_target == "aligned":
        target = [m._replace(points_global=aligned_global(m, mask)) for m, mask in zip(target, masks)]  # (workshop)
    # `valid_pixels` (workshop) puts the valid pixels of all views in one row: points (M, 3), confidences (M,).
    student, teacher, counts = valid_pixels(pred, target, masks)  # counts: |M_k|, how many are of view k
    count = max(sum(counts), 1)  # |M|
    count_k = torch.tensor(counts).clamp_min(1).to(student.conf_global)  # (V,) |M_k|
    view_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(count_k.device)  # (M,)
    share = 1 / count if mean == "pixels" else 1 / (len(counts) * count_k[view_of])  # of a pixel in the mean

    # Gradients flow through the student's scale too. The loss does not see how large the student makes its scene; if
    # the scale were a constant for the gradients, they would change that size all the same.
    def scene_scale(points):  # s, one number
        return (points.norm(dim=-1).sum() / count).clamp_min(1e-8)  # Distill3R Eq. 4

    def view_scale(points):  # s_k, for each pixel that of its view: (M, 1)
        sums = torch.stack([distances.sum() for distances in points.norm(dim=-1).split(counts)])
        return (sums / count_k).clamp_min(1e-8)[view_of, None]  # Distill3R Eq. 5

    def geometric(ours, theirs, w, scale):  # on the p~ of Eq. 4-5: each side has its own scale (the paper is silent)
        error = (ours / scale(ours) - theirs / scale(theirs)).square().sum(-1)
        return (share * w * error).sum()  # Distill3R Eq. 2

    w_global = WEIGHTS[weight](student.conf_global, teacher.conf_global)
    w_local = WEIGHTS[weight](student.conf_local, teacher.conf_local)
    global_ = geometric(student.points_global, teacher.points_global, w_global, scene_scale)
    local = geometric(student.points_local, teacher.points_local, w_local, view_scale)
    geometry = alpha_g * global_ + alpha_l * local  # Distill3R Eq. 3
    apart = (student.conf_global - teacher.conf_global).abs() + (student.conf_local - teacher.conf_local).abs()
    confidence = apart.sum() / (2 * count)  # Distill3R Eq. 6
    return Loss(geometry + gamma * confidence, global_, local, confidence)  # Distill3R Eq. 1


# ------------------------------------------------------------------------ 3. The network
# Teacher and student differ in their encoder and in their sizes only. The modules are named as in the published files.


class PointmapNetwork(nn.Module):
    """Photos -> a Pointmap each: encode each view by itself, fuse the views, decode each view with two heads.

    model(images, view_ids, generator) -> list[Pointmap]. images: V of (3, H, W) in [0, 1], of any sizes whose sides are
    multiples of the patch; the first one is the reference. view_ids: V of 0..999, else drawn from `generator`, or from
    torch's global one.
    """

    def __init__(self, patch, encoder, decoder, *dpt_sizes):
        super().__init__()
        self.patch, self.encoder, self.decoder = patch, encoder, decoder
        # A DPT (workshop) refines four levels of tokens, from coarse to fine, into 4 channels a pixel.
        self.downstream_head = nn.ModuleDict({"dpt": DPT(patch, *dpt_sizes)})  # global maps
        self.downstream_head_local = nn.ModuleDict({"dpt": DPT(patch, *dpt_sizes)})

    def forward(self, images, view_ids=None, generator=None, at_once=8) -> list[Pointmap]:
        ids = checked_ids(images, view_ids, generator, self.patch)  # (workshop)
        # `a_few_at_once` (workshop) calls its first argument with `at_once` views at a time, which saves memory.
        encoded = a_few_at_once(self.tokens, at_once, images)  # V of (N_v, C)
        levels = self.decoder(encoded, ids)  # four levels, each V of (N_v, C)
        return a_few_at_once(self.heads, at_once, images, *levels)

    def heads(self, images, *levels) -> Pointmap:  # (B, 3, H, W), four of (B, N, C) -> maps of all B views
        h, w = (side // self.patch for side in images.shape[-2:])
        grids = [level.mT.unflatten(2, (h, w)) for level in levels]  # (B, C, h, w)
        points, conf = read_out(self.downstream_head["dpt"](grids))
        points_local, conf_local = read_out(self.downstream_head_local["dpt"](grids))
        return Pointmap(points, points_local, conf, conf_local)


def read_out(raw: Tensor):  # (B, 4, H, W) -> points (B, H, W, 3), confidence (B, H, W) in (1, inf)
    """A head gives log(C - 1), and a direction times log(1 + distance), so that near and far are learned alike."""
    raw = raw.permute(0, 2, 3, 1).to(torch.promote_types(raw.dtype, torch.float32))  # bf16 would leave 8 bits
    log_distance = raw[..., :3].norm(dim=-1, keepdim=True)
    return raw[..., :3] / log_distance.clamp_min(1e-8) * log_distance.expm1(), 1 + raw[..., 3].exp()


class Fusion(nn.Module):
    """All tokens of all views look at each other. Only the ID embedding of its view tells a token where it belongs."""

    def __init__(self, enc_dim, dim, heads, depth):
        super().__init__()
        self.dim = dim
        self.hooks = depth // 2, depth * 3 // 4, depth  # the blocks whose output the heads see
        self.decoder_embed = nn.Linear(enc_dim, dim)
        self.dec_blocks = nn.ModuleList(Block(dim, heads, eps=1e-5) for _ in range(depth))  # (workshop) a ViT's
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens, ids):  # V of (N_v, C), V ids -> the four levels for the heads, each V of (N_v, C)
        lengths, x = [len(t) for t in tokens], torch.cat(tokens)[None]  # (1, N of all views, C)
        levels = {0: x}  # by the number of blocks before; the heads see the encoder's tokens as well
        codes = [code.expand(n, -1) for code, n in zip(view_codes(ids, self.dim).to(x.device), lengths)]
        x = self.decoder_embed(x) + torch.cat(codes)  # float32 from here, as the codes are, under bf16 autocast too
        for number, block in enumerate(self.dec_blocks, 1):
            x = block(x)
            if number in self.hooks:
                levels[number] = x
        levels[self.hooks[-1]] = self.dec_norm(x)
        return [levels[n][0].split(lengths) for n in (0, *self.hooks)]


def view_codes(ids, dim) -> Tensor:
    """View ID embeddings (V, dim) fp32: rows of a fixed table, sines first. The reference view has id 0. The others get
    new random ids in each pass (`draw_view_ids`, workshop): these tell the views apart, and augment the data (Sec.
    III-C). As any of 999 ids may occur, more views can be told apart than a training sample has."""
    # Differs: Distill3R Sec. III-C adds "a fixed embedding" to the reference view. In both official codes that is row 0
    # of this table, and so it is here.
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.tensor(ids, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1).float()


class Fast3R(PointmapNetwork):
    """The teacher, exactly as published (Yang et al. 2025): ViT-L, RoPE, 24 fusion layers, 647,551,368 parameters."""

    def __init__(self, enc_dim=1024, enc_heads=16, enc_depth=24, dec_dim=1024, dec_heads=16, dec_depth=24):
        encoder = Encoder(enc_dim, enc_heads, enc_depth, 16)  # (workshop) CroCo's ViT
        super().__init__(16, encoder, Fusion(enc_dim, dec_dim, dec_heads, dec_depth), enc_dim, dec_dim)

    def tokens(self, images):
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
    published: bool = True  # for the weights of the paper's authors, not for those of `train`
    size: tuple = (224, 518)  # (H, W) of the landscape pictures that it was trained on


class Student(PointmapNetwork):
    """Distill3R's student (Sec. III-C): a ViT-S with DUNE's weights, a thin fusion transformer, two DPT heads."""

    def __init__(self, config=StudentConfig()):
        c = config
        # Differs: Sec. III-C adds learned positions "following Fast3R", but Fast3R learns none: it rotates queries and
        # keys by their place (RoPE). Here they are the ViT's learned ones.
        vit = lift.VisionTransformer(c.patch, c.enc_dim, c.enc_depth, c.enc_heads, c.registers, c.grid, c.mlp_ratio,
                                     positions="scale")
        fusion = Fusion(c.enc_dim, c.dec_dim, c.dec_heads, c.dec_depth)
        super().__init__(c.patch, vit, fusion, c.enc_dim, c.dec_dim, c.widths, c.features)
        self.config = config
        sharpen(fusion, c.published)  # (workshop) published weights want it, and [-1, 1] (`undo_imagenet`)

    def tokens(self, images):
        return self.encoder(undo_imagenet(images) if self.config.published else images).patches


# ------------------------------------------------------------------------ 4. The cache


class CachedSample(NamedTuple):
    """What training gets: V photos that belong together, and what the teacher said about each of them."""
    name: str
    images: list  # of (3, H, W) in [0, 1]
    targets: list  # of Pointmap, at the student's size; masked pixels are read as points 0 and confidence 1
    masks: list  # of (H, W) bool, the valid pixels


# What happens to each sample (Sec. III-B 2):
#
#   1  ask           the teacher looks at all of its views in one call; its maps are resampled to the student's size
#   2  filtered      pixels of which it is not sure are masked; the others are rounded to float16
#   3  pack_sample   (below) maps and masks are coded without loss (by zlib, the paper: run lengths) into one file
#
# A teacher is anything with these three: `identity`, a name; `view_size(H, W)`, the size at which it wants a picture of
# that size; and `teacher(views, generator)`, which turns 01_data's views into a Pointmap each. `generator` is for all
# that is random, and unknown points are NaN. A Fast3R takes images and view ids instead; a `NetworkTeacher` (below)
# around it is a teacher. GeometricTeacher (tiny/teacher.py) needs no network.


def write_cache(
    teacher,
    root,  # what 01_data reads, or a folder of photos
    out,
    size=(224, 518),  # (H, W) of landscape pictures, turned for portrait ones
    views=20,  # V (the paper's N), the most that a sample may have
    stride=1,  # n: every n-th picture
    tau=0.3,
    seed=0,
    shard=(0, 1),  # (i, n): every n-th sample, from the i-th, in each of n processes
    skip_bad_frames=False,
) -> list[Path]:
    """Ask the teacher about every sample below `root`, once, and keep its answers in out/<scene>/<sample>.safetensors.

    Complete files stay, so that a killed run continues; damaged ones are made again. -> the files that it wrote.
    """
    root, out, (first, step) = Path(root), Path(out), shard
    rows = make_manifest(root, views, stride, skip_bad_frames)  # (workshop) one for each view (Sec. III-B 1)
    settings = dict(teacher=teacher.identity, size=list(size), views=views, tau=tau, seed=seed)
    keep_manifest(out, settings, rows, write=first == 0)  # (workshop) refuses a cache of other rows or settings
    todo = {}  # missing file -> rows of its sample
    for name, sample in list(samples_of(rows).items())[first::step]:
        path = out / f"{name}.safetensors"
        if not (path.is_file() and readable(read_sample, path)):
            todo[path] = sample
    for path, sample in tqdm(todo.items(), desc=f"cache -> {out}", unit="sample", disable=not todo):
        maps = ask(teacher, root, sample, size, seed, skip_bad_frames)
        if not any((certainty(m.conf_local) >= tau).any() for m in maps):
            print(f"{path}: not one pixel is trusted at --tau {tau:g}, so nothing will be learned from it; lower it")
        data.write_whole(path, pack_sample(maps, tau))
    return list(todo)


def ask(teacher, root, rows, size, seed, skip_bad_frames=False) -> list[Pointmap]:
    """The teacher's maps of one sample at the student's size. What is random depends on the sample and `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {rows[0]['sample']}".encode()))
    maps = teacher(load_views(root, rows, teacher.view_size, skip_bad_frames), generator)
    return [resampled(m, row["size"], oriented(size, *row["size"])) for m, row in zip(maps, rows, strict=True)]


def filtered(m: Pointmap, tau):
    """-> the eight channels of a map (8, H, W) as float16, and its valid pixels (H, W): those whose points are known
    and in float16's range, and whose local confidence is high enough (Sec. III-B 2; the global one is not used)."""
    points = torch.cat([m.points_global, m.points_local], -1).permute(2, 0, 1)
    conf = torch.stack([m.conf_global, m.conf_local]).clamp(max=65504)  # float16's largest number
    channels = torch.cat([points, conf]).half()  # a coordinate beyond 65504 becomes infinite
    mask = channels.isfinite().all(0) & (certainty(m.conf_local) >= tau)
    return channels.numpy(), mask.numpy()


# ------------------------------------------------------------------------ 5. Training


def train(student, optimiser, batches, args, world=1):
    """One training step for each (step, (samples, seeds)) of `batches`. Yields step, losses and the gradient's norm to
    `train_from_cache` (workshop), which draws the samples and keeps log and checkpoints. Each of `world` processes
    (torchrun) has its part of a step's samples."""
    for step, (samples, seeds) in batches:
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * learning_rate(step, args)  # share: see `new_optimiser` (workshop)
        optimiser.zero_grad(set_to_none=True)
        losses = learn_samples(samples, student, args, seeds)
        distill.average_gradients(student, world)
        norm = nn.utils.clip_grad_norm_(distill.trained(student).values(), 1.0).item()
        optimiser.step()
        yield step, losses, norm


def learn_samples(batch, student, args, seeds) -> list[float]:
    """The samples of a step go through the student one by one and add up gradients; -> the mean of their losses. From a
    sample's seed come its mirroring and its view ids."""
    sums = [0.0] * len(Loss._fields)
    for sample, seed in zip(batch, seeds):
        # Differs: the paper augments by view ids alone. With --mirror, for small sets, half the samples are mirrored.
        if args.mirror and torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:
            sample = mirrored(sample)
        loss = loss_of(student, sample, args, seed)
        (loss.total / len(batch)).backward()
        sums = [total + part / len(batch) for total, part in zip(sums, torch.stack(loss).tolist())]
    return sums


def loss_of(student, sample: CachedSample, args, seed) -> Loss:
    """The student's loss on one sample; its view ids are drawn from `seed`."""
    device = torch.device(args.device)
    images, masks = ([x.to(device) for x in part] for part in (sample.images, sample.masks))
    targets = [Pointmap(*(x.to(device) for x in m)) for m in sample.targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        maps = student(images, generator=torch.Generator().manual_seed(seed))
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


# ------------------------------------------------------------------------ 6. Cameras
# Distill3R reports no cameras; it says that its student misses rotations (Sec. V-C). Here cameras are read off the maps
# as in DUSt3R (Wang et al. 2024, Sec. 3.3).


class Cameras(NamedTuple):
    focal: Tensor  # (V,) pixels of the maps; the optical axis goes through the middle
    scale: Tensor  # (V,) from a view's local unit to the world's
    c2w: Tensor  # (V, 4, 4) the world is the frame of the global maps, so view 0's is nearly the identity


def estimate_cameras(maps: list[Pointmap], tau=0.3, names=None) -> Cameras:
    """Where each picture was taken. A view's points are known in two frames, p_global = s R p_local + t for all of its
    pixels; so R, t is the pose of its camera, camera to world, and s leads from its own unit to the world's.

    Views of one size are assumed to share a focal length, the median of theirs. ValueError names a view without three
    points to go by.
    """
    scale, of_size, c2w = [], {}, torch.eye(4).repeat(len(maps), 1, 1)
    for k, m in enumerate(maps):
        # Both are in the workshop. `usable_pixels` (H, W): known, before the camera, not too far; and trusted, if
        # enough of these are. `robust_similarity`: `similarity`, reweighted in turn, so that outliers count less.
        use = usable_pixels(m, tau, names[k] if names else f"view {k}")
        s, R, t = robust_similarity(m.points_local[use], m.points_global[use], m.conf_global[use])
        c2w[k, :3] = torch.cat([R, t[:, None]], 1)
        scale.append(s.float())
        f = focal_length(m.points_local, torch.where(use, m.conf_local, 0.0))
        of_size.setdefault(m.conf_local.shape, []).append(f)
    focal = [np.median(of_size[m.conf_local.shape]) for m in maps]
    return Cameras(torch.tensor(focal).float(), torch.stack(scale), c2w)


def focal_length(points: Tensor, weight: Tensor, rounds=10) -> float:
    """The focal length of local points (H, W, 3), in pixels: f minimises the weighted sum of |pixel - f (x, y) / z|,
    with pixels relative to the centre. Distances and not their squares, so that outliers count less; each of
    Weiszfeld's rounds is a least-squares fit that is weighted by 1 / the distances of the last one."""
    h, w = weight.shape
    y, x = torch.meshgrid(torch.arange(h) + 0.5 - h / 2, torch.arange(w) + 0.5 - w / 2, indexing="ij")
    use = (weight > 0) & (points[..., 2] > 0)
    pixel, ray = torch.stack([x, y], -1)[use].double(), (points[..., :2] / points[..., 2:])[use].double()
    weights = weight[use].double()
    for _ in range(rounds):
        f = (weights * (pixel * ray).sum(1)).sum() / (weights * ray.square().sum(1)).sum()
        weights = weight[use].double() / (pixel - f * ray).norm(dim=1).clamp_min(1e-3)
    return max(f.item(), 0.1 * max(h, w))  # that of an untrained network may be negative


def similarity(source: Tensor, target: Tensor, weight: Tensor | None = None):
    """(M, 3), (M, 3), (M,) -> s, R (3, 3), t (3,) in float64 that minimise sum w |s R source + t - target|^2. R is a
    rotation, never a reflection (Umeyama 1991)."""
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

# ------------------------------------------------------------------------ loss and networks


def aligned_global(view: Pointmap, mask: Tensor, quantile=0.85) -> Tensor:
    """(H, W, 3): the local points, moved as a whole onto the global ones, as the official code does for its target;
    fitted to the valid pixels at or above that quantile of global confidence, or where fewer than 3 are, to all valid
    ones."""
    if mask.sum() < 3:
        return view.points_local
    sure = mask & (view.conf_global >= view.conf_global[mask].float().quantile(quantile))
    sure = sure if sure.sum() >= 3 else mask
    s, R, t = similarity(view.points_local[sure], view.points_global[sure])
    return (s * view.points_local.double() @ R.T + t).to(view.points_local)


def valid_pixels(pred, target, masks):
    """-> the student's and the teacher's values at the valid pixels of all views, (M, 3) and (M,), and each |M_k|."""
    # Picked by their index: a product with the mask, as in the official code, would let a NaN outside of it into the
    # sum. The index is found once, because a GPU has to stop and tell the CPU how long it is.
    counts = torch.stack([mask.sum() for mask in masks]).tolist()
    index = torch.cat([mask.flatten() for mask in masks]).nonzero()[:, 0]
    p, t = (Pointmap(*(torch.cat([x.flatten(0, 1) for x in same])[index] for same in zip(*maps)))
            for maps in (pred, target))
    return p, Pointmap(*(x.to(p.conf_global) for x in t)), counts


def rotary_angles(h, w, head_dim, device=None) -> Tensor:
    """(N, 2, head_dim / 4): how far RoPE turns the pairs of a head, one half by the row, the other by the column."""
    D = head_dim // 2
    frequency = 100.0 ** (-torch.arange(0, D, 2, device=device) / D)
    place = torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device))  # (N, 2)
    return place[..., None] * frequency


def rotate(x: Tensor, angle: Tensor) -> Tensor:  # (B, heads, N, head_dim), (N, 2, head_dim / 4) -> x turned
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # channel i is paired with i + head_dim / 4, not with i + 1
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3).to(x.dtype)


class Attention(lift.Attention):
    sharper = False  # in evaluation; see `sharpen`

    def forward(self, x, angle=None):  # (B, N, C); angle of `rotary_angles`
        B, N, C = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads)
        if angle is not None:
            q, k = rotate(q, angle), rotate(k, angle)
        sharper_scale = math.sqrt(math.log(137) / math.log(20)) / math.sqrt(q.shape[-1])  # 1.28 times the usual one
        scale = sharper_scale if self.sharper and not self.training else None
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(B, N, C))


class Block(nn.Module):
    def __init__(self, dim, heads, eps):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=eps), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), lift.mlp(dim, 4 * dim)

    def forward(self, x, angle=None):  # (B, N, C)
        x = x + self.attn(self.norm1(x), angle)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):  # CroCo's ViT, Fast3R's encoder: no class token, and the place of a patch enters by RoPE
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


class DPT(nn.Module):  # four levels of tokens -> 4 channels a pixel, from coarse to fine (Ranftl et al. 2021)
    def __init__(self, patch, enc_dim, dec_dim, widths=(96, 192, 384, 768), features=256):
        super().__init__()
        a, b, c, d = widths
        self.act_postprocess = nn.ModuleList([  # to 4, 2, 1 and 1/2 times the grid of patches
            nn.Sequential(lift.conv(enc_dim, a, 1), nn.ConvTranspose2d(a, a, 4, 4)),
            nn.Sequential(lift.conv(dec_dim, b, 1), nn.ConvTranspose2d(b, b, 2, 2)),
            nn.Sequential(lift.conv(dec_dim, c, 1)),
            nn.Sequential(lift.conv(dec_dim, d, 1), lift.conv(d, d, 3, 2))])
        scratch = {f"layer{n}_rn": lift.conv(width, features, bias=False) for n, width in enumerate(widths, 1)}
        scratch |= {f"refinenet{n}": Refine(features) for n in (1, 2, 3, 4)}
        self.scratch = nn.ModuleDict(scratch)
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


class Refine(nn.Module):  # one step finer; refinenet4 adds no level, but its first unit is in the published files
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


def sharpen(fusion, sharper):  # whether attention's logits are 1.28 times larger in evaluation than in training
    # Differs: both official codes make attention sharper in evaluation than in training. Distill3R's feeds DUNE with
    # pixels in [-1, 1], although it learned with ImageNet's mean and deviation. The paper has neither. We do so for the
    # published weights, and not for students that are trained here (published=False).
    for block in fusion.dec_blocks:
        block.attn.sharper = sharper


def undo_imagenet(images):  # a ViT of 02_lift takes ImageNet's mean and deviation off again, and sees [-1, 1]
    mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (lift.IMAGENET_MEAN, lift.IMAGENET_STD))
    return (2 * images - 1) * std + mean


def checked_ids(images, view_ids, generator, patch):  # -> V ids, or ValueError for what cannot be run
    if not 0 < len(images) <= VIEW_IDS:
        raise ValueError(f"{len(images)} views in one call, not 1 to {VIEW_IDS}; leave some out (--stride 2)")
    for index, image in enumerate(images):
        if image.ndim != 3 or len(image) != 3 or any(side < 1 or side % patch for side in image.shape[1:]):
            raise ValueError(f"view {index} is {tuple(image.shape)}; give (3, H, W), H and W multiples of {patch}")
    ids = draw_view_ids(len(images), generator) if view_ids is None else [int(i) for i in view_ids]
    if len(ids) != len(images) or not all(0 <= i < VIEW_IDS for i in ids):
        raise ValueError(f"view_ids: {len(ids)} for {len(images)} views; give one a view, each in 0..{VIEW_IDS - 1}")
    return ids


def draw_view_ids(count, generator=None) -> list[int]:
    """0 for the reference view, distinct random ids of 1..999 for the others, number for number as Fast3R draws them
    from the same state of `generator` (or of torch's global one)."""
    seed = torch.randint(0, 2**32, (1,), generator=generator).item()
    order = torch.randperm(VIEW_IDS - 1, generator=torch.Generator().manual_seed(seed))
    return [0, *(order[:count - 1] + 1).tolist()]


def a_few_at_once(part, at_once, *inputs) -> list:
    """part(*inputs) for V views, which may differ in size: in blocks of views of one size, at most `at_once` in each.
    Each input is a list of V tensors. `part` takes batches of them, and returns a tensor or a Pointmap of (B, ...).
    -> V results."""
    by_size, found = {}, [None] * len(inputs[0])
    for index, x in enumerate(inputs[0]):
        by_size.setdefault(x.shape, []).append(index)
    for block in [same[n:n + at_once] for same in by_size.values() for n in range(0, len(same), at_once)]:
        given = part(*(torch.stack([views[i] for i in block]) for views in inputs))
        for n, i in enumerate(block):
            found[i] = given[n] if isinstance(given, Tensor) else Pointmap(*(x[n] for x in given))
    return found


def recompute(model):
    """--grad_checkpoint: only the inputs of encoder, blocks and heads are kept; the backward pass runs these again."""
    heads = model.downstream_head["dpt"], model.downstream_head_local["dpt"]
    for part in (model.encoder, *model.decoder.dec_blocks, *heads):
        part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)


StudentConfig.tiny = StudentConfig(
    patch=8, enc_dim=192, enc_heads=3, enc_depth=6, mlp_ratio=2, registers=0, grid=16, dec_dim=192, dec_heads=3,
    dec_depth=4, widths=(24, 48, 96, 192), features=32, published=False, size=(48, 64))


# ------------------------------------------------------------------------ weights

def load_fast3r(path) -> Fast3R:
    """Fast3R in fp32 and evaluation mode, from the published `model.safetensors`, its folder, or a training checkpoint
    (prefix `net.`). ValueError names a file that is none."""
    path, config = find_network(path, "get model.safetensors from huggingface.co/jedyang97/Fast3R_ViT_Large_512")
    stored, sizes = network_tensors(path, "net."), []
    for part, short in (("encoder", "enc"), ("decoder", "dec")):
        norm, block = f"{part}.{short}_norm.weight", rf"{part}\.{short}_blocks\.(\d+)\."
        if norm not in stored:
            raise ValueError(f"{path}: lacks '{norm}'; it is no Fast3R")
        depth, dim = len({m[1] for name in stored if (m := re.match(block, name))}), len(stored[norm])
        # The tensors tell all sizes but the number of heads: without a config.json they are taken to be 64 wide.
        sizes += [dim, config.get(f"{part}_args", {}).get("num_heads", max(1, dim // 64)), depth]
    model = built(Fast3R, *sizes)
    sharpen(model.decoder, config.get("decoder_args", {}).get("attn_bias_for_inference_enabled", False))
    return lift.load_strictly(model, stored, path)


def load_student(path) -> Student:
    """A student in evaluation mode: "tiny", the built-in one; or from a folder of `save_student`, or from the official
    Lightning checkpoint (prefix `student.`), which has no config.json and the published sizes. ValueError names a file
    that is none."""
    if str(path) == "tiny":
        return built_in_student()
    path, config = find_network(path, "give 'tiny', the folder that `train` wrote (--weights), or the checkpoint "
                                "linked at github.com/TheFourthKaramazov/Distill3R")
    try:
        config = StudentConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
        sizes = [*config[:10], *config.widths, config.features, *config.size]
        positive = all((config.enc_heads, config.dec_heads, *config.size)) and len(config.size) == 2
        if not positive or not all(type(n) is int and 0 <= n < 2**20 for n in sizes):
            raise ValueError("its sizes are no sizes")
        model = built(Student, config)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path.with_name('config.json')}: not of a student that `train` wrote ({reason}); give its "
                         "folder, or 'tiny'") from None
    return lift.load_strictly(model, network_tensors(path, "student."), path)


def built_in_student() -> Student:  # its matrices are stored in 8 bits, with a scale for each row
    path = lift.WEIGHTS / "student.safetensors"
    stored = lift.read_checkpoint(path)
    for name in [name for name in stored if name.endswith(".scale")]:
        scale, name = stored.pop(name).float(), name.removesuffix(".scale")
        stored[name] = torch.einsum("r...,r->r...", stored[name].float(), scale)
    return lift.load_strictly(built(Student, StudentConfig.tiny), stored, path)


def save_student(model: Student, folder):  # {model.safetensors, config.json}, each file whole or not at all
    lift.save_tensors(Path(folder, "model.safetensors"), model.state_dict())
    data.write_whole(Path(folder, "config.json"), json.dumps(model.config._asdict(), indent=1).encode())


def write_card(args, cached, folder):
    """folder/README.md: what the student is made of, for those it is passed on to; `eval` adds its scores."""
    log = [json.loads(line) for line in Path(args.out, "log.jsonl").read_text().splitlines()]
    heldout = [f"{line['heldout']:.4f} after {line['step'] + 1} steps" for line in log if "heldout" in line]
    names = "max_steps", "batch", "lr", "encoder_share", "weight", "gamma", "mean", "global_target", "seed"
    settings = ", ".join(f"--{name} {getattr(args, name)}" for name in names)
    made_of = dict(encoder=args.encoder, teacher=cached.settings["teacher"])
    licences = [words for name, words in LICENCES.items() if any(name in part for part in made_of.values())]
    card = CARD.format(**made_of, samples=len(cached), views=args.views, size=args.size, settings=settings,
                       licence="; ".join(licences) or "unknown", heldout=", ".join(heldout) or "not measured")
    data.write_whole(Path(folder, "README.md"), card.encode())


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


def find_network(path, remedy):  # a file or folder of weights -> the file, and config.json beside it
    path = lift.weights_in(Path(path))
    beside = path.with_name("config.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such weights; {remedy}")
    return path, lift.read_json(beside) if beside.is_file() else {}


def network_tensors(path, prefix):
    """{our name: tensor} of a file; of a Lightning checkpoint those with the prefix. DUNE's chunks are joined."""
    state = lift.state_within(path)
    prefixed = any(name.startswith(prefix) for name in state)
    return {re.sub(r"^encoder\.blocks\.\d+\.(?=\d)", "encoder.blocks.", name.removeprefix(prefix)): value
            for name, value in state.items()
            if name.startswith(prefix) == prefixed and isinstance(value, Tensor)
            and ".scratch.layer_rn." not in name}  # second names of layer1_rn .. layer4_rn


def built(network, *sizes):  # uninitialised: 650 million random numbers would only be overwritten
    with torch.device("meta"):
        return network(*sizes).to_empty(device="cpu")


class NetworkTeacher:  # a network with the interface of a teacher
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


# ------------------------------------------------------------------------ photos and manifest


def photo_at(path):  # -> a frame whose camera is not known, to be turned as its EXIF tag says
    frame = data.Frame(path.name, path, np.eye(3), np.eye(4), data.stored_size(path))
    with contextlib.suppress(Exception), Image.open(path) as image:
        image.getexif().get(0x0112)  # raises where the tag is damaged; then the picture is taken as it is stored
        frame.size, frame.upright = data.upright_size(path, frame.size), True
    return frame


def readable(reader, path):  # says what is wrong where it cannot be read
    try:
        return bool(reader(path))
    except data.DataError as error:
        print(error)


@functools.lru_cache(8)
def scene_folders(root):
    """{scene name: folder} of the posed scenes in `root`; where there are none, of all folders with pictures."""
    root = Path(root)
    if not root.is_dir():
        raise data.DataError(f"{root}: no such folder; give a folder of photos, a scene, or a folder of scenes")
    found = [folder for folder, _ in data.find_scenes(root)] or photo_folders(root)
    own = root.resolve().name  # the name of pictures in `root` itself, unless a folder in it is called that
    own = "." if root / own in found else own
    return {folder.relative_to(root).as_posix() if folder != root else own: folder for folder in found}


def photo_folders(root):  # `root` and folders below it that have pictures; not hidden ones, nor those of maps
    folders = [root, *(d for d in root.rglob("*") if d.is_dir() and "/." not in f"/{d.relative_to(root).as_posix()}")]
    notes = data.left_out(path for folder in folders for path in folder.iterdir())
    maps = [d for d in folders if d.name in ("masks", "depth", "normals", "labels") and d.with_name("images").is_dir()]
    found = [folder for folder in folders if folder not in maps and any(map(data.is_picture, folder.iterdir()))]
    if not found:
        notes = "".join(f" ({note})" for note in notes) or "; of a video, extract the frames first"
        raise data.DataError(f"{root}: no picture in here that can be read{notes}")
    for note in notes:
        print(f"{root}: {note}")
    return sorted(found, key=data.natural)


@functools.lru_cache(64)
def open_scene(root, name, skip_bad_frames=False):
    """-> a posed scene or photos below `root`, and {path of a picture from `root`: its index}, in natural order."""
    folder = scene_folders(root).get(name)
    if not folder:
        raise data.DataError(f"{root}: scene {name} is no longer in here; restore it or cache again")
    if data.reader_of(folder):
        scene = data.load_scenes(folder, skip_bad_frames)[0]
    else:
        photos = [path for path in folder.iterdir()
                  if data.is_picture(path) and (not skip_bad_frames or readable(data.decode, path))]
        scene = data.Scene(name, [photo_at(path) for path in photos])
    paths = {Path(os.path.relpath(frame.image, root)).as_posix(): i for i, frame in enumerate(scene.frames)}
    return scene, dict(sorted(paths.items(), key=lambda item: data.natural(item[0])))


def make_manifest(root, views=20, stride=1, skip_bad_frames=False) -> list[dict]:
    """One line for each view (Sec. III-B 1), `views` of them a sample; the rest of a scene makes a sample of fewer. The
    size of the file tells when another picture has taken its name."""
    # Differs: the official code sorts frame10 before frame2, and drops tails and scenes of under 20 views. We sort by
    # number and keep all of them.
    # Differs: Distill3R Sec. IV takes every n-th frame, n by the kind of scene and its overlap. Here --stride says n.
    # Differs: the paper's manifest holds absolute paths. Ours are relative to the folder of pictures, which may move.
    root, rows = Path(root), []
    scene_folders.cache_clear(), open_scene.cache_clear()  # the folder may have changed
    for name in scene_folders(root):
        scene, index = open_scene(root, name, skip_bad_frames)
        for n, (path, i) in enumerate(list(index.items())[::stride]):
            frame, sample = scene.frames[i], f"{name}/{n // views:03d}"
            rows.append(dict(scene=name, sample=sample, size=list(frame.size), path=path,
                             bytes=frame.image.stat().st_size))
    return rows


def read_manifest(path):  # -> the settings of its first line, the lines of the views
    try:
        settings, *lines = map(json.loads, path.read_text().splitlines())
        assert all(type(side) is int for side in settings["size"]) and isinstance(settings["teacher"], str)
        for line in lines:
            height, width = line["size"]
            assert all(isinstance(line[key], str) for key in ("scene", "sample", "path")) and height > 0 < width
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise data.DataError(f"{path}: not a whole manifest of a cache; remove it and cache again") from None
    return settings, lines


def samples_of(lines):  # -> {sample: its lines}
    return {name: list(views) for name, views in itertools.groupby(lines, lambda line: line["sample"])}


def load_views(root, lines, size_of, skip_bad_frames=False, maps=True):
    """The views of a sample; `size_of` (H, W of the stored picture) -> the size wanted. DataError names a lost file."""
    scene, index = open_scene(root, lines[0]["scene"], skip_bad_frames)
    for line in lines:
        path = Path(root, line["path"])
        if line["path"] not in index or path.stat().st_size != line["bytes"]:
            raise data.DataError(f"{path}: no longer the picture that the manifest lists; restore it or cache again")
    return [scene.view(index[line["path"]], size_of(*line["size"]), maps=maps) for line in lines]


def oriented(size, height, width):  # (H, W) of a landscape picture -> the same, upright for a picture that stands
    # Differs: the official code lays portrait images on their side, but not their targets. We keep both upright.
    return (max(size), min(size)) if height > width else (min(size), max(size))


def resampled(m: Pointmap, photo, size) -> Pointmap:
    """The map at another size, bilinear; pixels that it does not show are NaN. Both are centre crops of the photo
    (H, W): a place has the same distance from the middle in both, in pixels of the photo."""
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
    points, conf = found.permute(1, 2, 0).split((6, 2), -1)
    points = torch.where((grid.abs() <= 1).all(-1, keepdim=True), points, torch.nan)
    return Pointmap(*points.split(3, -1), *conf.unbind(-1))


# ------------------------------------------------------------------------ samples on disk


def coded(channels, mask) -> bytes:
    """The valid pixels of (8, H, W) float16 without loss, in a quarter of the bytes; masked ones become 0. Neighbours
    are alike: the bits, read as whole numbers, differ little along columns and rows, and most high bytes are 0."""
    steps = np.where(mask, channels, np.float16(0)).view(np.int16)
    for axis in (1, 2):  # differences may wrap around, which loses nothing
        steps = np.diff(steps, axis=axis, prepend=np.int16(0))
    zigzag = (steps << 1 ^ steps >> 15).view(np.uint16)  # 0 -1 1 -2 2 ... -> 0 1 2 3 4 ...
    return zlib.compress(np.stack([zigzag & 255, zigzag >> 8], 1).astype(np.uint8).tobytes())


def inflated(stored: bytes, count):
    """Unpacks `count` bytes and never more, so that a damaged file cannot fill the memory."""
    found = np.frombuffer(zlib.decompressobj().decompress(stored, count + 1), np.uint8)
    if len(found) != count:
        raise ValueError(f"{len(found)} bytes where {count} are needed")
    return found


def decoded(stored: bytes, shape):  # the inverse of `coded` -> (8, H, W) float16
    planes = inflated(stored, 16 * math.prod(shape)).reshape(8, 2, *shape).astype(np.uint16)
    zigzag = planes[:, 0] | planes[:, 1] << 8
    steps = (zigzag >> 1 ^ -(zigzag & 1)).view(np.int16)
    return steps.cumsum(2, dtype=np.int16).cumsum(1, dtype=np.int16).view(np.float16)


def pack_sample(maps, tau) -> bytes:
    """A sample as a safetensors file: of each view the coded maps and the mask, and a checksum over all of them."""
    # Differs: the paper run-length codes the masks. zlib over their bits is as lossless, and a third of the size.
    parts = {}
    for k, m in enumerate(maps):
        channels, mask = filtered(m, tau)
        parts[f"{k}.maps"], parts[f"{k}.mask"] = coded(channels, mask), zlib.compress(np.packbits(mask).tobytes())
    parts["sha256"] = checksum(parts)
    return save({name: torch.frombuffer(bytearray(part), dtype=torch.uint8) for name, part in parts.items()})


def checksum(parts, layout=b"pointmaps 3") -> bytes:  # give another `layout` whenever what a sample holds is changed
    return hashlib.sha256(layout + b"".join(name.encode() + part for name, part in sorted(parts.items()))).digest()


def read_sample(path) -> dict:
    """-> {name: bytes} of what a sample holds. DataError names a file that is damaged."""
    with contextlib.suppress(Exception):  # whatever damaged bytes make the reader raise
        parts = {name: x.numpy().tobytes() for name, x in load(Path(path).read_bytes()).items()}
        if parts.pop("sha256") == checksum(parts):
            return parts
    raise data.DataError(f"{path}: damaged, cut off or of another version; run the cache command again, it makes this "
                         "sample anew")


def unpack_sample(path, sizes):  # (H, W) of each view -> [Pointmap] float32, [mask (H, W) bool]
    parts, maps, masks = read_sample(path), [], []
    try:
        for k, size in enumerate(sizes):
            bits = np.unpackbits(inflated(parts.pop(f"{k}.mask"), math.ceil(math.prod(size) / 8)))
            mask = torch.from_numpy(bits[:math.prod(size)].reshape(size).astype(bool))
            channels = torch.from_numpy(decoded(parts.pop(f"{k}.maps"), size)).float()
            points_global, points_local = channels[:6].permute(1, 2, 0).split(3, -1)
            maps.append(Pointmap(points_global, points_local, *torch.where(mask, channels[6:], 1.0)))
            masks.append(mask)
            if not all(x.isfinite().all() for x in maps[-1]) or maps[-1].conf_local.min() < 1:
                raise ValueError("its numbers are no pointmap")
        if parts:
            raise ValueError(f"it holds more than {len(sizes)} views")
    except (KeyError, ValueError, zlib.error) as error:
        raise data.DataError(f"{path}: not the sample that the manifest lists ({error}); remove it and run the cache "
                             "command again") from None
    return maps, masks


def keep_manifest(out, settings, lines, write):
    """Beside the samples: the settings in the first line, then a line for each view. Two manifests are never mixed."""
    path = out / "manifest.jsonl"
    content = "".join(json.dumps(line) + "\n" for line in [settings, *lines]).encode()
    before = path.read_bytes() if path.exists() else None
    if before not in (None, content) and any(out.rglob("*.safetensors")):
        old, _ = read_manifest(path)
        changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
        raise data.DataError(f"{path}: made of other pictures or settings ({', '.join(changed) or 'pictures'}); use "
                             "those or give another --out")
    if write and before != content:
        data.write_whole(path, content)


class CachedViews:
    """What `write_cache` wrote, with its images: item i -> CachedSample. `scenes`: the names to keep, or all."""

    def __init__(self, root, cache, scenes=None, skip_bad_frames=False):
        self.root, self.cache, self.skip_bad_frames = Path(root), Path(cache), skip_bad_frames
        manifest = self.cache / "manifest.jsonl"
        if not manifest.is_file():
            raise data.DataError(f"{manifest}: no such file; run the cache command first")
        self.settings, lines = read_manifest(manifest)
        self.samples = list(samples_of(line for line in lines if scenes is None or line["scene"] in scenes).items())
        if not self.samples:
            raise data.DataError(f"{cache}: no sample in it is of {root}; cache that folder, with an --out of its own")
        missing = [name for name, _ in self.samples if not Path(cache, f"{name}.safetensors").is_file()]
        if missing:
            raise data.DataError(f"{cache}: {len(missing)} of {len(self.samples)} samples are not there yet "
                                 f"({', '.join(missing[:3])}); run the cache command to its end")
        self.identity = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i) -> CachedSample:
        name, lines = self.samples[i]
        size_of = functools.partial(oriented, self.settings["size"])
        views = load_views(self.root, lines, size_of, self.skip_bad_frames, maps=False)
        sizes = [size_of(*line["size"]) for line in lines]
        targets, masks = unpack_sample(self.cache / f"{name}.safetensors", sizes)
        return CachedSample(name, [view.image for view in views], targets, masks)


# ------------------------------------------------------------------------ around the loop


def cached_part(args, part, root):  # "val": every eighth scene, None where there is but one; "train": the others
    scenes = data.split(list(scene_folders(root)), part)
    return CachedViews(root, args.cache, scenes, args.skip_bad_frames) if scenes else None


def train_from_cache(args, rank, world):
    """Trains the student from the cache alone and leaves it in out/student. A killed run goes on where it was."""
    cached, heldout = (cached_part(args, part, source_of(args)) for part in ("train", "val"))
    for name in ("size", "views"):
        made, asked = cached.settings[name], getattr(args, name)
        if made != asked and name in args.asked:
            raise data.DataError(f"{args.cache}: made with --{name} {made}, not {asked}; leave it out, or cache again")
        setattr(args, name, made)
    student = new_student(args).to(args.device)
    optimiser = new_optimiser(student, args)
    free = "command cache weights teacher models counts at_once stride images scene_dir asked".split()
    settings = {key: value for key, value in vars(args).items() if key not in free}  # those that must stay the same
    run = distill.Run(argparse.Namespace(**settings, cached=cached.identity), {"student": distill.trained(student)},
                      optimiser, rank=rank, world=world, name="train")
    # All that is random depends on the seed and the step, so a resumed run needs no saved generator.
    order = distill.schedule(len(cached), args.max_steps * args.batch, args.seed)
    draws = [range(step * args.batch, (step + 1) * args.batch) for step in range(args.max_steps)]

    def load_batch(step):  # the part of this process
        mine = draws[step][rank::world]
        return [cached[order[n]] for n in mine], [args.seed + n for n in mine]
    with contextlib.closing(distill.ahead(load_batch, range(run.start, args.max_steps))) as batches:
        for step, losses, norm in train(student, optimiser, zip(run, batches), args, world):
            loss = dict(zip(Loss._fields, distill.averaged(losses, world, args.device)))
            names = [cached.samples[order[n]][0] for n in draws[step]]
            run.check(loss["total"], ", ".join(names))
            due = (step + 1) * 6 // args.max_steps > step * 6 // args.max_steps  # six times in a run
            measured = {"heldout": heldout_loss(student, heldout, args)} if run.first and heldout and due else {}
            run.log(show=("total",), samples=names, **loss, grad_norm=norm, lr=learning_rate(step, args), **measured)
    if run.first:
        save_student(student, Path(args.out, "student"))
        write_card(args, cached, Path(args.out, "student"))
        print(f"  ->  {args.out}/student")


def new_student(args) -> Student:
    """A student of the preset's size on a pretrained ViT, any that 02_lift reads; the rest starts at random."""
    vit = lift.load_vit(args.encoder)
    sizes = {"tiny": StudentConfig.tiny, "full": StudentConfig()}[args.preset]
    torch.manual_seed(args.seed)
    student = Student(sizes._replace(
        patch=vit.patch, enc_dim=vit.dim, enc_heads=vit.heads, enc_depth=len(vit.blocks), mlp_ratio=vit.mlp_ratio,
        registers=vit.registers, grid=vit.grid, published=False, size=tuple(args.size)))
    student.encoder.load_state_dict(vit.state_dict())
    for name, p in student.named_parameters():  # these are in the published files, but nothing is computed from them
        p.requires_grad_(not (name == "encoder.mask_token" or ".refinenet4.resConfUnit1." in name))
    if args.grad_checkpoint:
        recompute(student)
    return student.train()


def new_optimiser(student, args):
    # Differs: the paper has one learning rate. With few samples a pretrained encoder keeps more of what it knows at a
    # lower one: --encoder_share is 0.1 in the preset `tiny`, and 1 in `full`.
    # Differs: Distill3R Sec. IV names AdamW and its weight decay only. The betas (0.9, 0.95), and the clipping of the
    # gradients' norm at 1.0 in `train`, are those of the official code.
    encoder, rest = ([p for name, p in distill.trained(student).items() if name.startswith("encoder.") == inside]
                     for inside in (True, False))
    groups = [dict(params=rest, share=1.0), dict(params=encoder, share=args.encoder_share)]
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def mirrored(sample: CachedSample) -> CachedSample:
    """Left and right exchanged: pictures, masks and maps are flipped, and x changes its sign in both frames."""
    points = lambda x: x.flip(1) * x.new_tensor([-1, 1, 1])
    targets = [Pointmap(points(m.points_global), points(m.points_local), m.conf_global.flip(1), m.conf_local.flip(1))
               for m in sample.targets]
    return CachedSample(sample.name, [x.flip(2) for x in sample.images], targets, [x.flip(1) for x in sample.masks])


@torch.no_grad()
def heldout_loss(student, heldout: CachedViews, args, most=8) -> float:  # of so many samples that are not trained on
    some = np.linspace(0, len(heldout) - 1, min(most, len(heldout))).astype(int)
    losses = [loss_of(student, heldout[i], args, seed=int(i)).total.item() for i in some]
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------ cameras and scenes

FAR = 20.0  # in median distances: a point farther away is sky, or a mistake


def usable_pixels(m: Pointmap, tau, name, most=20_000) -> Tensor:
    """(H, W) bool: the pixels that say where the camera is, evenly thinned out to about `most`."""
    known = m.points_local.isfinite().all(-1) & m.points_global.isfinite().all(-1) & (m.points_local[..., 2] > 0)
    for points in (m.points_local, m.points_global) if known.any() else ():
        distance = points.norm(dim=-1)
        known &= distance <= FAR * distance[known].median()  # a few points of the sky would outweigh all the others
    trusted = known & (certainty(torch.minimum(m.conf_local, m.conf_global)) >= tau)
    use = trusted if trusted.sum() >= 100 else known  # else a rough pose is better than none
    if use.sum() < 3:
        raise ValueError(f"{name}: fewer than three of its points are known and in front of the camera; leave this "
                         "picture out, or train the student for longer")
    every = use.sum() // most + 1
    return use & (use.flatten().cumsum(0) % every == 0).view(use.shape)


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
    points, colours: V of (M, 3), in the frames of their cameras; photos: V of (3, H, W); focal (V,); c2w (V, 4, 4)"""
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


def write_scene(out, views, maps: list[Pointmap], tau=0.3, photos=None) -> Path:
    """Writes what pointmaps say about their pictures, for 01_data and for other tools, and returns the folder `out`:
    images/, depth/ (16-bit PNG, z in the unit that transforms.json names, 0 = not trusted), confidence/ (8-bit PNG of
    1 - 1/C), transforms.json (nerfstudio), sparse/0 (COLMAP text), cloud.ply, cloud.png, maps.png. A view's image may
    be of any multiple of its map's size. The world is the frame of view 0, in the unit of the global maps."""
    out, cameras = Path(out), estimate_cameras(maps, tau, [view.name for view in views])
    depths = [torch.where(certainty(m.conf_local) >= tau, s * m.points_local[..., 2], 0.0).nan_to_num().clamp_min(0)
              for m, s in zip(maps, cameras.scale)]
    known = torch.cat([depth[depth > 0] for depth in depths])
    if not len(known):
        raise ValueError(f"{out}: not one pixel is trusted at --tau {tau:g}; lower it, or look at other pictures")
    depths = [torch.where(depth <= FAR * known.median(), depth, 0.0) for depth in depths]
    unit = 10.0 ** math.ceil(math.log10(max(d.max().item() for d in depths) / 65000))  # the farthest fits 16 bits
    (out / "transforms.json").unlink(missing_ok=True)  # of an earlier scene; this is none until it has one of its own
    for folder in (out / part for part in ("images", "depth", "confidence")):
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("[0-9]*.*"):
            file.unlink()
    frames = [write_view(out, k, view, maps[k], depths[k] / unit, cameras) for k, view in enumerate(views)]
    points, radii, colours, small = zip(*(points_of(*each) for each in zip(views, depths, cameras.focal)))
    poses = cameras.c2w, torch.eye(4).expand_as(cameras.c2w)  # as found, and as if no camera had moved
    agreement = [photo_agreement(points, colours, small, cameras.focal, c2w) for c2w in poses]
    points = torch.cat([p @ c2w[:3, :3].T + c2w[:3, 3] for p, c2w in zip(points, cameras.c2w)])
    radii, colours = torch.cat(radii), torch.cat(colours)
    write_colmap(out / "sparse/0", frames, cameras.c2w, points, colours)
    write_points(out / "cloud.ply", points, colours)
    cloud = draw_cloud(points, radii, colours, cameras.c2w[:, :3, 3])
    headings = ["from behind the first camera (cameras: red)", "first photo", "last photo"]
    data.picture_grid(out / "cloud.png", headings, [[cloud, views[0].image, views[-1].image]])
    rows = [[views[k].image, data.colour_depth(depths[k]), certainty(maps[k].conf_local).expand(3, -1, -1)]
            for k in np.linspace(0, len(views) - 1, min(5, len(views))).astype(int)]
    headings = ["image", "depth", "confidence 1 - 1/C"]
    data.picture_grid(out / "maps.png", headings, rows, below=data.depth_legend)
    meta = dict(camera_model="PINHOLE", depth_unit_scale_factor=unit, agreement=agreement, frames=frames)
    meta |= {"photos": str(photos)} if photos else {}
    data.write_whole(out / "transforms.json", json.dumps(meta, indent=1).encode())  # last: now it is a scene
    return out


def write_view(out, k, view, m, steps, cameras) -> dict:  # its files -> its entry in transforms.json; steps: of depth
    height, width = view.image.shape[1:]
    f = cameras.focal[k].item() * width / steps.shape[1]
    data.to_image(view.image).save(out / f"images/{k:03d}.jpg", quality=95, subsampling=0)
    Image.fromarray(steps.round().numpy().astype(np.uint16)).save(out / f"depth/{k:03d}.png")
    Image.fromarray((certainty(m.conf_local) * 255).round().byte().numpy()).save(out / f"confidence/{k:03d}.png")
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
    properties = "float x", "float y", "float z", "uchar red", "uchar green", "uchar blue"
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
              *(f"property {each}" for each in properties), "end_header", ""]
    vertices = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"], vertices["rgb"] = points.numpy(), (colours * 255).round().numpy()
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


def draw_cloud(points, radii, colours, centres, size=480) -> Tensor:
    """(M, 3), (M,), (M, 3), (V, 3) -> (3, size, size): seen from behind and above the first camera, whose frame is the
    world. Each point is a small round Gaussian, each camera a red one."""
    some = slice(None, None, len(points) // 1_000_000 + 1)
    points, radii, colours = points[some], radii[some] * some.step**0.5, colours[some]
    back = points[:, 2].median()  # the viewpoint is as far behind the camera as the median point is in front of it
    w2c = torch.eye(4)
    w2c[1, 3], w2c[2, 3] = 0.4 * back, back
    K = torch.tensor([[1.4 * size, 0, size / 2], [0, 1.4 * size, 0.3 * size], [0, 0, 1]])
    colours = torch.cat([colours, torch.tensor([1.0, 0.1, 0.1]).expand(len(centres), 3)])
    means, radii = torch.cat([points, centres]), torch.cat([radii, (back / 90).expand(len(centres))])
    gaussians = means, radii.square()[:, None, None] * torch.eye(3), torch.full_like(radii, 0.9), colours
    drawn = splat.rasterize(*gaussians, w2c, K, size, size, background=torch.full((3,), 0.12))
    return drawn.features.permute(2, 0, 1)


# ------------------------------------------------------------------------ evaluation


# Accuracy: from the prediction to the truth, completeness: from the truth to the prediction, both in the unit of the
# truth. Scale: by what the prediction had to be multiplied; 1 = metric.
SCORES = "accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median", "scale"


def evaluate(teacher, scenes, size, views=20, seed=0) -> dict:
    """Accuracy, completeness, scale and calibration of a teacher (or student) on scenes with depth (Sec. IV-B): at most
    `views` views a scene, spread over it, at `size` (H, W). -> mean score over scenes, each scene's, and the rank
    correlation of confidence and error (-1: confidence orders the errors perfectly)."""
    scores, sure, wrong = {}, [], []
    for scene in tqdm(scenes, desc=teacher.identity, unit="scene", leave=False):
        known, of_scene = [i for i, frame in enumerate(scene.frames) if frame.depth], []
        shown = [known[n] for n in np.linspace(0, len(known) - 1, min(views, len(known))).astype(int)]
        asked = [scene.view(i, teacher.view_size(*scene.frames[i].size)) for i in shown]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {scene.name}".encode()))
        for i, m in zip(shown, teacher(asked, generator) if asked else []):
            goal = oriented(size, *scene.frames[i].size)
            truth, m = scene.view(i, goal), resampled(m, scene.frames[i].size, goal)
            use = (truth.depth > 0) & m.points_local.isfinite().all(-1)
            if use.sum() >= 100:
                points = (lift.pixel_rays(truth.K, *goal) * truth.depth[..., None])[use]
                score, off = score_view(m.points_local[use], points)
                of_scene.append(score)
                sure.append(m.conf_local[use])
                wrong.append(off)
        if of_scene:
            scores[scene.name] = dict(zip(SCORES, np.mean(of_scene, axis=0).tolist()))
    if not scores:
        raise data.DataError("no scene has a view with measured depth to compare with; give another --scene_dir")
    mean = np.mean([list(score.values()) for score in scores.values()], axis=0).tolist()
    return dict(mean=dict(zip(SCORES, mean)), scenes=scores,
                calibration=dict(rank=rank_correlation(torch.cat(sure), torch.cat(wrong))))


def score_view(points: Tensor, truth: Tensor, most=5_000):
    """(M, 3) twice, pixel by pixel -> SCORES, and (M,) how far each pixel is off after the alignment: one similarity a
    view (Sec. IV-B), over all pixels, so that a network gains nothing by being confident of few. Distances are taken
    from at most so many pixels, evenly spread, to all points of the other side."""
    s, R, t = similarity(points, truth)
    aligned, some = (s * points.double() @ R.T + t).to(truth), slice(None, None, len(points) // most + 1)
    there, back = nearest_distance(aligned[some], truth), nearest_distance(truth[some], aligned)
    score = there.mean(), there.median(), back.mean(), back.median(), s
    return [x.item() for x in score], (aligned - truth).norm(dim=1)


def nearest_distance(queries: Tensor, points: Tensor, block=256) -> Tensor:  # (M, 3), (N, 3) -> (M,)
    exact = "donot_use_mm_for_euclid_dist"  # matrix products would round
    return torch.cat([torch.cdist(some, points, compute_mode=exact).amin(1) for some in queries.split(block)])


def rank_correlation(a: Tensor, b: Tensor) -> float:  # (M,) twice; Spearman's, 0 where one of them is constant
    def ranks(x):  # places in order of size; equal values share the mean of their places
        _, inverse, count = x.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[inverse].double()
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].nan_to_num().item()


class MeanTeacher:  # always the mean of the cached maps, whatever the picture: what a student must beat
    def __init__(self, cached: CachedViews):
        size = tuple(cached[0].masks[0].shape)
        total, count = torch.zeros(*size, 6), torch.zeros(*size, 1)
        for sample in (cached[i] for i in range(len(cached))):
            for m, mask in zip(sample.targets, sample.masks):
                if mask.shape == size:
                    total += torch.cat([m.points_global, m.points_local], -1)  # 0 where masked
                    count += mask[..., None]
        points = (total / count.clamp_min(1)).split(3, -1)
        self.mean, self.identity = Pointmap(*points, *torch.full((2, *size), 2.0)), "mean pointmap"
        self.view_size = lambda height, width: size

    def __call__(self, views, generator) -> list[Pointmap]:
        return [self.mean] * len(views)


# ------------------------------------------------------------------------ the commands


def cached_root(args) -> Path | None:  # the folder whose pictures are cached
    record = args.cache / "root.json"
    if not record.is_file() and (args.command in (None, "cache") or not (args.cache / "manifest.jsonl").exists()):
        return None  # there is no cache yet, or not the whole of it
    try:
        return Path(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise data.DataError(f"{record}: does not name the cached pictures; run the cache command to its end, or "
                             f"remove {args.cache}") from None


def source_of(args) -> Path:  # the pictures' folder: as asked for, or that of the cache
    given = args.images or args.scene_dir or cached_root(args)
    return Path(given or ("data_small" if args.preset == "tiny" else "data"))


def unseen(args, scenes):
    """Those of `scenes` that the student was not trained on: held-out ones of the cached folder, all of any other."""
    held_out = data.split(scenes, "val") if cached_root(args) == source_of(args).resolve() else scenes
    if not held_out:
        print("the student was trained on this very scene, as there is no other in the cache")
    return held_out or scenes


def model_of(args, name):  # "student", "tiny", "teacher" or "mean", all with the interface of a teacher
    if name == "mean":
        return MeanTeacher(cached_part(args, "train", cached_root(args)))
    if name in ("student", "tiny"):
        student = load_student(args.weights if name == "student" else "tiny")
        if "size" not in args.asked:  # then it looks at pictures of the size that it was trained on
            args.size = list(student.config.size)
        if any(side % student.patch for side in args.size):
            raise ValueError(f"--size {args.size[0]} {args.size[1]}: give multiples of {student.patch}, its patch")
        identity = "built-in student" if "tiny" in (name, args.weights) else "student"
        return NetworkTeacher(student, identity, lambda *stored: oriented(args.size, *stored), args.device)
    if args.teacher == "geometry":
        return importlib.import_module("tiny.teacher").GeometricTeacher(args.size)
    fast3r = load_fast3r(args.teacher)
    return NetworkTeacher(fast3r, f"fast3r {distill.weights_id(fast3r)[:16]}", fast3r_size, args.device)


def cache(args, rank, world):
    """Asks the teacher about every sample once."""
    root, begin, teacher = source_of(args), time.monotonic(), model_of(args, "teacher")
    written = write_cache(teacher, root, args.cache, args.size, args.views, args.stride, args.tau, args.seed,
                          (rank, world), args.skip_bad_frames)
    if world > 1:
        dist.barrier()
    if rank == 0:
        data.write_whole(args.cache / "root.json", json.dumps(str(root.resolve())).encode())
    sizes = [file.stat().st_size for file in args.cache.rglob("*.safetensors")]
    print(f"{teacher.identity}: {len(written)} samples written in {time.monotonic() - begin:.0f} s; "
          f"{len(sizes)} samples, {sum(sizes) / 1e6:.1f} MB  ->  {args.cache}")


def measure(args):
    """Accuracy, completeness, scale and calibration of the models, on scenes that the student has not seen."""
    scenes = unseen(args, data.open_scenes(source_of(args), args.skip_bad_frames))
    wanted = [name for name in ("student", "tiny", "mean", "teacher") if name in args.models]
    if "mean" in wanted and not cached_root(args):
        print(f"mean: left out, as {args.cache} holds no cache to take the mean of; run the cache command first")
        wanted.remove("mean")
    models = {name: model_of(args, name) for name in wanted}  # the student says at what size
    results = {name: evaluate(model, scenes, args.size, args.views, args.seed) for name, model in models.items()}
    table = [f"scenes: {len(scenes)}, views of each: at most {args.views}; distances are in their unit",
             f"{'':10}{'accuracy':>20}{'completeness':>20}{'scale':>8}{'conf. rank':>12}",
             f"{'':10}{'mean':>10}{'median':>10}{'mean':>10}{'median':>10}"]
    for name, r in results.items():
        *distances, scale = r["mean"].values()
        numbers = "".join(f"{value:10.4f}" for value in distances)
        what = f"  ({models[name].identity})" if name in ("teacher", "tiny") else ""
        table.append(f"{name:10}{numbers}{scale:8.3f}{r['calibration']['rank']:12.2f}{what}")
    path = Path(args.out, "result.json")
    data.write_whole(path, json.dumps(results, indent=1).encode())
    table, card = "\n".join(table), Path(args.weights, "README.md")
    print(table, f"\n  ->  {path}")
    if "student" in models and args.weights != "tiny" and card.exists():  # of a student that was trained here
        before = card.read_text().partition("\n## Scores\n")[0]
        data.write_whole(card, f"{before}\n## Scores\n\n```\n{table}\n```\n".encode())


def infer(args):
    """Photos without poses -> a scene with poses, depth and a point cloud, for 01_data and for other tools."""
    root, out = source_of(args), Path(args.out, "scene")
    which = "student" if args.teacher == "geometry" else "teacher"
    if which == "student" and args.preset == "tiny" and not args.command:
        which = "tiny"
        print("a student of a few minutes does not know yet how the camera moved; what follows is by the built-in one")
    names = list(scene_folders(root))
    chosen = (names if which == "teacher" else unseen(args, names))[0]
    if len(names) > 1 and args.command:
        print(f"{root}: {len(names)} scenes in here, this is {chosen}; give the folder of another one to see that one")
    scene, index = open_scene(root, chosen, args.skip_bad_frames)
    shown = list(index.values())[::args.stride]
    if not (args.command or args.scene_dir or args.images):
        shown = shown[max(0, len(shown) - args.views) // 2:][:args.views]  # one sample, as in training
    network = model_of(args, which)
    sizes = [network.view_size(*scene.frames[i].size) for i in shown]
    views = [scene.view(i, size, maps=False) for i, size in zip(shown, sizes)]
    print(f"{network.identity}, {len(shown)} views: {forecast(network.model, sizes, args.device)}")
    maps = ask_in_groups(network, views, torch.Generator().manual_seed(args.seed))
    for k, (i, (height, width)) in enumerate(zip(shown, sizes)):  # other stages want more pixels than a map has
        if 2 * height <= scene.frames[i].size[0] and 2 * width <= scene.frames[i].size[1]:
            views[k] = scene.view(i, (2 * height, 2 * width), maps=False)
    write_scene(out, views, maps, args.tau, root.resolve())
    good, why = data.trust(json.loads((out / "transforms.json").read_text())["agreement"])
    if len(shown) > 1:
        print(f"{scene.name}, {len(shown)} views by {network.identity}: "
              f"{'the cameras explain the photos' if good else 'do not trust the cameras'}: {why} "
              "(100 %: all colours are equal, 0 %: no better than random pixels)")
    further = f"; python 04_distill.py --scene_dir {out} --geometry depth" if good and len(shown) >= 3 else ""
    print(f"  ->  {out / 'cloud.png'}, {out / 'cloud.ply'}{further}")


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
    a = torch.ones(1024, 1024, device=device)
    product = min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=3))  # s; `item` waits for the GPU
    seconds = 2 * product / 2**31 * (transformers + 28 * features**2 * pixels)
    duration = f"{math.ceil(seconds)} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
    return f"about {max(gigabytes, 0.1):.1f} GB and {duration} on {device}"


def check_scene_folder(args):  # where infer is going to write, before anything is computed
    root, out = source_of(args).resolve(), Path(args.out, "scene").resolve()
    if out.is_relative_to(root) or root.is_relative_to(out):
        raise ValueError(f"{out}: the scene that infer writes would lie among the pictures of {root}, or over them; "
                         "give another --out")
    record = out / "transforms.json"
    before = json.loads(record.read_bytes()).get("photos") if record.exists() else None
    if before and before != str(root):
        if args.out == OUT:
            raise ValueError(f"{out}: holds the scene of other photos ({before}); give another --out, or remove it")
        print(f"{out}: the scene of other photos ({before}) will be replaced")


@torch.no_grad()
def table_one(args):
    """Table I: time, and on a GPU peak memory, of both networks over numbers of views, with generated weights."""
    # Differs: the paper runs the heads on all views at once, here they run on `at_once` at a time.
    networks, rows, cuda = {"teacher": Fast3R, "student": Student}, [], args.device.startswith("cuda")
    models = {name: built(network).to(args.device).eval() for name, network in networks.items() if name in args.models}
    for model in models.values():
        for p in model.parameters():
            nn.init.normal_(p, std=0.02)
    print(f"a forward pass over N views of {args.size[0]}x{args.size[1]}, in sizes of the published networks")
    for count in args.counts:
        for name, model in models.items():
            shape = [max(1, round(side / model.patch)) * model.patch for side in args.size]  # 378x518; 384x512
            images = list(torch.rand(count, 3, *shape, device=args.device))
            try:
                seconds, gigabytes = min(cost_of_pass(model, images, args.at_once, cuda) for _ in range(2))
            except torch.OutOfMemoryError:
                seconds = gigabytes = math.inf
            rows.append(dict(model=name, views=count, seconds=seconds, gigabytes=gigabytes))
            print(f"{count:5} views, {name}: {seconds:8.2f} s" + (f" {gigabytes:7.2f} GB" if cuda else ""))
    path = Path(args.out, "table.json")
    data.write_whole(path, json.dumps(rows, indent=1).encode())
    print(f"  ->  {path}")


def cost_of_pass(model, images, at_once, cuda):  # -> seconds, GB at the peak with weights and pictures (CPU: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    with torch.autocast(images[0].device.type, torch.bfloat16, enabled=cuda):
        model(images, range(len(images)), at_once=at_once)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 1e9 if cuda else None


# ------------------------------------------------------------------------ command line


def parse(argv):
    parser = argparse.ArgumentParser(description="cache, train, eval and infer, or one step. [p]: what --preset sets.")
    add = parser.add_argument
    add("command", nargs="?", choices=("cache", "train", "eval", "infer", "table"), help="one step, or Table I")
    add("--scene_dir", help="a scene or a folder of scenes; default: what was cached, or built-in rooms")
    add("--images", help="a folder of photos or video frames without poses, in its place")
    add("--out", default=OUT)
    add("--preset", choices=list(PRESETS), help="full: the paper's setting, default on CUDA; tiny: minutes on a CPU")
    add("--cache", help="folder of the teacher's pointmaps; default: cache/ in --out")
    add("--teacher", default="geometry", help="Fast3R's weights, for infer too; 'geometry': true depth, disturbed")
    add("--weights", help="student for eval and infer: a folder, a checkpoint or 'tiny'; default: student/ in --out")
    add("--size", type=data.positive, nargs=2, metavar=("H", "W"), help="of landscape pictures, multiples of the "
        "patch; infer and eval take what the student was trained on [p]")
    add("--views", type=data.positive, help="views a sample, N; lower it when memory runs out [p]")
    add("--stride", type=data.positive, default=1, help="take every n-th picture; of a slow video every 5th or 10th")
    add("--tau", type=float, default=0.3, help="pixels of a lower certainty 1 - 1/C are not used; 0 to 1")
    add("--models", nargs="+", choices=("mean", "student", "tiny", "teacher"), default=["mean", "student", "teacher"],
        help="for eval and table; mean is the mean pointmap of the cache, tiny the built-in student")
    add("--counts", type=data.positive, nargs="+", help="numbers of views in table")
    add("--at_once", type=data.positive, default=8, help="views at once in table; lower it when memory runs out")
    add("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torchrun gives each process its own")
    add("--seed", type=int, default=0)
    add_training_flags(parser)
    args, cuda = parser.parse_args(argv), torch.cuda.is_available()
    args.preset = args.preset or ("full" if cuda else "tiny")
    args.counts = args.counts or ([12, 32, 64, 96, 128] if cuda else [2, 4, 8])
    args.cache, args.weights = Path(args.cache or f"{args.out}/cache"), args.weights or f"{args.out}/student"
    args.asked = [name for name in ("size", "views") if getattr(args, name)]  # else they are the cache's or student's
    if args.command == "table":
        args.size = args.size or (378, 518)
    given = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(PRESETS[args.preset] | given)
    args.size = list(args.size)  # as a checkpoint gives it back
    return args


def add_training_flags(parser):
    add = parser.add_argument_group("training").add_argument
    add("--encoder", help="ViT that the student starts from: 'tiny', a published name, a file or folder [p]")
    add("--max_steps", type=data.positive, help="training steps [p]")
    add("--batch", type=data.positive, help="samples a step, over all processes; gradients add up one by one [p]")
    add("--lr", type=float, help="peak learning rate; halve it when the loss jumps [p]")
    add("--encoder_share", type=float, help="learning rate of the pretrained encoder, in parts of the others' [p]")
    add("--warmup", type=data.positive, help="steps until the peak [p]")
    add("--gamma", type=float, default=0.001, help="weight of Eq. 6 in Eq. 1; 0 with --weight none: labels only")
    # Differs: Distill3R Sec. V-B says that weighting by the student's own confidence costs 9.6 % accuracy and 35.7 %
    # completeness, but these numbers are those of the "Labels-Only (No Weighting/Conf)" row of Table III (1.37/1.25 and
    # 2.09/1.54). Both readings are flags here: `--weight student --gamma 0` and `--weight none --gamma 0`.
    add("--weight", choices=list(WEIGHTS), default="teacher", help="w of Eq. 2; clamped is the official code's")
    add("--mean", choices=("pixels", "views"), default="pixels", help="views: over views first, as the official code")
    add("--global_target", choices=("direct", "aligned"), default="direct", help="aligned: as the official code")
    add("--mirror", action=argparse.BooleanOptionalAction, help="half of the samples mirrored, where there are few [p]")
    add("--bf16", action=argparse.BooleanOptionalAction, help="the networks in bfloat16 [p]")
    add("--grad_checkpoint", action=argparse.BooleanOptionalAction,
        help="compute activations twice: a third of the memory, 1.8 times the time of a step [p]")
    add("--save_minutes", type=float, default=2.0, help="minutes between checkpoints; 0 writes one after each step")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")


def main(argv=None):
    args = parse(argv)
    training = args.command in (None, "train")
    with data.explained(args, "the same command with --resume goes on"):
        if args.command in (None, "infer"):
            check_scene_folder(args)
        rank, world = distill.processes(args, args.batch if training else 0)
        if rank:
            distill.wait_for_first()  # it makes or fetches what is missing
        if args.command != "table" and not args.images and str(source_of(args)) in data.BUILT_IN:
            data.open_scenes(source_of(args))  # makes them
        if world > 1 and not rank:
            if training:
                lift.load_vit(args.encoder)
            dist.barrier()
        if args.preset == "tiny" and not args.command:
            args.models = [*args.models, "tiny"]
        for command in [args.command] if args.command else ["cache", "train", "eval", "infer"]:
            if command in ("cache", "train"):
                distill.few_threads(args)
                {"cache": cache, "train": train_from_cache}[command](args, rank, world)
            elif not rank:
                {"eval": measure, "infer": infer, "table": table_one}[command](args)


if __name__ == "__main__":
    sys.modules["06_distill3r"] = sys.modules[__name__]  # what tiny/teacher.py imports is this very module
    main()
