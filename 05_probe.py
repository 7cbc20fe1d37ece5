"""Probes: what do frozen features know? Depth, normals and segmentation by linear heads, correspondence by matching.

Paper   Splat and Distill (SnD) Sec. 4.1 and Appendix A.4, Fig. 3-7 and 13-14. Normals follow Bae et al. 2021,
        correspondence follows Probe3D (El Banani et al. 2024).
In      ViTs (02_lift), and scenes (01_data) with depth, normals or labels. Also a plain folder of images with such maps
        (--help has the layout, docs/reproduce.md converts NYUv2 and others), or a list of pairs in SuperGlue's format.
Out     a table with one row per model. In out/05_probe/: results.json, report.html (opens offline), features/, views/.
Run     python 05_probe.py      the built-in ViT and out/04_distill/student if it exists: ~1 minute a model, 2-core CPU,
                                on 200 rooms that no student has seen, as the paper probes on other data sets
        python 05_probe.py --models start=tiny snd=out/04_distill/student both=tiny+out/04_distill/student
        python 05_probe.py --scene_dir nyuv2/ --models dinov2_vits14 --preset paper --max_depth 10
Copy    01_data.py 02_lift.py 05_probe.py tiny/rooms.py tiny/vit.safetensors
Read    depth_metrics, normal_metrics, segmentation_metrics, reprojection_error, Views, Features, LinearHead, fit,
        expected_depth, sig_loss, depth_probe, angular_loss, normal_probe, segmentation_probe, Pair, Matches,
        sample_points, match, nearest_with_ratio, match_pair, correspondence, recall, place_share
Try     --no_cls: depth RMSE of the built-in ViT 0.718 -> 0.725 m, so CLS knows a little of the size of a room.
        --layer norm (default: before the last LayerNorm): normals 34.4 -> 35.1 degrees, mIoU 22.8 -> 22.2 %.
        --models tiny+tiny (the second sees mirrored images): normals 34.4 -> 34.0 degrees, depth and mIoU worse.
Not     heads that are not linear, several layers at once, images of several shapes (all are cropped to the first's).
Words   head: one linear layer on frozen tokens. truth: the measured map, 0 (labels: 255) where it is unknown. Letters:
        I images, M matches, K intrinsics. "px": pixels of the image. "grid": the unit is the spacing of the sampled
        points, a quarter of a patch. Place share: how much of the features only says where in the picture one is.
"""
from __future__ import annotations

import argparse
import base64
import hashlib
import html
import importlib
import json
import math
import shlex
import shutil
import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor
from tqdm import tqdm

data, lift = (importlib.import_module(name) for name in ("01_data", "02_lift"))

DEPTH_BINS, MATCHES = 256, 1000  # depth candidates a pixel (A.4), matches a pair of images (Probe3D)
THRESHOLDS = (5, 10, 20)  # pixels; the paper reports 10
VIEWPOINTS = {"0-15": (0, 15), "15-30": (15, 30), "30-60": (30, 60), "60-180": (60, 181)}  # degrees (SnD Fig. 7)

# ------------------------------------------------------------------------ 1. What is measured


def mean_of(rows, names) -> dict:  # rows of scores, one per image or pair -> {name: mean}
    return dict(zip(names, torch.tensor(rows).mean(0).tolist()))


def depth_metrics(depth, truth) -> dict:
    """AbsRel = mean |z - z*| / z*; RMSE = sqrt(mean (z - z*)^2), in the data's unit; delta1 = % with
    max(z / z*, z* / z) < 1.25.

    Both are (I, H, W), or generators of views. Each image is scored where its truth z* is known, then averaged.
    """
    rows = []
    for z, true in zip(depth, truth):
        if (known := true > 0).any():
            z, true = z[known].double(), true[known].double()
            error, ratio = (z - true).abs(), torch.maximum(z / true, true / z.clamp_min(1e-9))
            rows.append(((error / true).mean(), error.square().mean().sqrt(), 100 * (ratio < 1.25).double().mean()))
    return mean_of(rows, ("AbsRel", "RMSE", "delta1"))


def normal_metrics(normal, truth) -> dict:
    """RMSE of the angle to the true normal in degrees, and % of pixels within 11.25, 22.5 and 30 degrees.

    Both are (I, H, W, 3). Each image is scored where its truth is known, then averaged.
    """
    rows = []
    for n, true in zip(normal, truth):
        if (known := (true != 0).any(-1)).any():
            n, true = n[known].double(), true[known].double()
            sine, cosine = torch.linalg.cross(n, true).norm(dim=-1), (n * true).sum(-1)
            angle = torch.atan2(sine, cosine).rad2deg()  # acos(cosine) would be inexact near 0 degrees
            within = [100 * (angle < limit).double().mean() for limit in (11.25, 22.5, 30)]
            rows.append([angle.square().mean().sqrt(), *within])
    return mean_of(rows, ("RMSE", "11.25", "22.5", "30"))


def segmentation_metrics(label, truth, classes) -> dict:
    """aAcc = % of pixels that are right; per class, IoU = |predicted and true| / |predicted or true| and
    acc = |right| / |true|.

    label, truth (I, H, W) hold ids below `classes`; truth 255 is unknown. Pixels of all images are counted together.
    mIoU is the mean over classes that truth or prediction has, mAcc over those that truth has. Other IoUs are None.
    """
    right, true, predicted = torch.zeros(3, classes, dtype=torch.double)  # pixels of each class
    for guess, t in zip(label, truth):
        guess, t = guess[t != 255].long(), t[t != 255].long()
        right += t[t == guess].bincount(minlength=classes)
        true += t.bincount(minlength=classes)
        predicted += guess.bincount(minlength=classes)
    iou = 100 * right / (true + predicted - right)  # NaN where neither has the class
    scores = dict(aAcc=100 * right.sum() / true.sum(), mIoU=iou.nanmean(), mAcc=(100 * right / true).nanmean())
    return {name: x.item() for name, x in scores.items()} | {"IoU": [None if x.isnan() else x.item() for x in iou]}


def reprojection_error(
    a: Tensor,  # (M, 2) pixels of view a
    b: Tensor,  # (M, 2) pixels of view b that they were matched to
    depth: Tensor,  # (M,) z-depth at a
    K_a: Tensor,  # (3, 3)
    K_b: Tensor,  # (3, 3)
    a_to_b: Tensor,  # (4, 4) camera to camera
) -> Tensor:
    """|project(a) - b|, (M,): how many pixels of view b a match is from the true place; infinite behind camera b."""
    points = F.pad(a, (0, 1), value=1.0) @ torch.linalg.inv(K_a).T * depth[:, None]  # (M, 3) camera a
    x, y, z = ((points @ a_to_b[:3, :3].T + a_to_b[:3, 3]) @ K_b.T).unbind(1)
    return torch.where(z > 1e-6, (torch.stack([x, y], 1) / z[:, None] - b).norm(dim=1), torch.inf)


# ------------------------------------------------------------------------ 2. A linear head


class Views(NamedTuple):
    """All views of a split, at one size. `Rows` (workshop) are arrays on disk that are indexed like tensors."""
    where: list  # (scene, index of the view in it)
    images: Tensor | Rows  # (I, 3, H, W) uint8
    K: Tensor  # (I, 3, 3) pixels
    c2w: Tensor  # (I, 4, 4), NaN where poses are not known
    depth: Tensor | Rows  # (I, H, W) z-depth, 0 = unknown
    normal: Tensor | Rows  # (I, H, W, 3) float16, 0 = unknown
    label: Tensor | Rows  # (I, H, W) int16, 255 = unknown


class Features(NamedTuple):
    """Frozen tokens of all views of a split, from before the ViT's last LayerNorm, as in the official depth probe
    (--layer). 04 trains those after it."""
    cls: Tensor | Rows  # (I, C) float16
    patches: Tensor | Rows  # (I, h, w, C) float16


class Recipe(NamedTuple):
    """All that is needed to train a head the same way again."""
    steps: int
    lr: float
    batch: int
    seed: int = 0
    device: str = "cpu"
    log: object = None  # an open file that gets one JSON line every 50 steps


class LinearHead(nn.Module):
    """One linear layer on tokens -> (B, channels, h, w); `with_cls` concatenates CLS to each patch (A.4)."""

    def __init__(self, tokens: Features, channels, with_cls, seed):
        super().__init__()
        # Differs: A.4 feeds raw tokens to the head; here they are whitened by the training views (CLS less strongly, by
        # a larger floor, as an image has just one). A linear layer can represent the same on both, but learns it in
        # fewer steps.
        self.patch = Whitening(tokens.patches, floor=0.01)  # (workshop)
        self.cls = Whitening(tokens.cls, floor=1.0)
        self.with_cls = with_cls
        self.linear = nn.Linear(tokens.patches.shape[-1] * (1 + with_cls), channels)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, cls, patches):  # (B, C), (B, h, w, C)
        x = self.patch(patches)
        if self.with_cls:
            x = torch.cat([x, self.cls(cls)[:, None, None].expand(x.shape)], -1)
        return self.linear(x).permute(0, 3, 1, 2)


def resize(maps: Tensor, size) -> Tensor:  # (B, C, h, w) -> (B, C, *size); a patch's value sits at its centre
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def four_times(maps: Tensor) -> Tensor:  # (B, C, h, w) -> (B, C, 4h, 4w)
    # A.4 upscales tokens before the linear layer. That gives the same, as bilinear weights sum to 1; this is cheaper.
    return resize(maps, [4 * side for side in maps.shape[2:]])


def fit(name, head: LinearHead, decode, loss, tokens: Features, truth, recipe: Recipe, unknown=0):
    """Minimise loss(decode(output), truth) over `head`; `decode` brings its output to the size of the truth.

    -> predict(tokens), which yields what the trained head says of each view, one by one: a split may exceed memory.
    """
    head, device = head.to(recipe.device), recipe.device
    generator = torch.Generator().manual_seed(recipe.seed)
    usable = views_with_truth(truth, unknown)  # (workshop) indices of the views of which something is known
    read = lambda views, tokens: decode(head(*(x[views].to(device).float() for x in tokens)))
    optimiser = torch.optim.AdamW(head.parameters(), recipe.lr, weight_decay=0.01)
    for step in (bar := tqdm(range(recipe.steps), desc=name, unit="step", leave=False)):
        views = usable[torch.randint(len(usable), (recipe.batch,), generator=generator)]
        value = loss(read(views, tokens), truth[views].to(device))
        # Differs: A.4 gives a schedule (linear warm-up, cosine decay) for normals alone; here all three heads have it.
        # The rate rises over a twentieth of the steps.
        warm_up, cosine = 20 * (step + 1) / recipe.steps, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
        optimiser.param_groups[0]["lr"] = recipe.lr * min(warm_up, cosine)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        note_loss(name, step, value.item(), recipe, bar)  # (workshop) stops where it is not finite

    @torch.no_grad()
    def predict(tokens):
        at_once = max(1, 2**18 // math.prod(truth.shape[1:3]))  # the scores of 150 classes at full size are large
        for views in torch.arange(len(tokens.patches)).split(at_once):
            yield from read(views, tokens).cpu()
    return predict


# ------------------------------------------------------------------------ 3. Depth


def expected_depth(logits: Tensor, bins: Tensor) -> Tensor:
    """(B, bins, h, w), (bins,) -> (B, h, w): the sum of p_k bin_k, where p_k is relu(logit_k) + 0.1, normalised (A.4;
    0.1 is the official code's epsilon)."""
    weight = logits.relu().permute(0, 2, 3, 1)  # 0.1 is added to the two sums below, which saves a copy of all weights
    depth, total = (weight @ torch.stack([bins, torch.ones_like(bins)], 1)).unbind(-1)
    return (depth + 0.1 * bins.sum()) / (total + 0.1 * len(bins))


def sig_loss(depth: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant log loss (Eigen et al. 2014): with g = log z - log z*, sqrt(mean g^2 - 0.85 (mean g)^2), so that
    a wrong scale of depth counts less."""
    # Differs: A.4 writes "classification loss"; the official code trains with this one, and so do we.
    g = (depth[truth > 0] + 1e-3).log() - (truth[truth > 0] + 1e-3).log()
    return (g.square().mean() - 0.85 * g.mean().square()).clamp_min(1e-12).sqrt()


def depth_probe(tokens: Features, truth, val_tokens: Features, val_truth, recipe: Recipe, with_cls=True):
    """Depth that a linear layer reads -> (depth_metrics of the held-out views, predict). truth (I, H, W)."""
    # Differs: A.4's bins lie between a mindepth and a maxdepth that it does not give. Here they end at the deepest
    # training truth; --max_depth cuts off truth beyond it, in training and held-out views.
    deepest = max(view.max().item() for view in truth)
    bins = torch.linspace(1e-3, deepest, DEPTH_BINS, device=recipe.device)
    head = LinearHead(tokens, DEPTH_BINS, with_cls, recipe.seed)
    decode = lambda logits: resize(expected_depth(four_times(logits), bins)[:, None], truth.shape[1:3])[:, 0]
    predict = fit("depth", head, decode, sig_loss, tokens, truth, recipe)
    return depth_metrics(predict(val_tokens), val_truth), predict


# ------------------------------------------------------------------------ 4. Normals


def angular_loss(maps: Tensor, truth: Tensor) -> Tensor:
    """Minus the log-likelihood of the true normals, up to a constant (Bae et al. 2021, Eq. 3): with the angle a between
    normal and truth, kappa a + log(1 + exp(-pi kappa)) - log(kappa^2 + 1), mean over known pixels.

    maps (B, 4, H, W): a direction of any length, and the head's certainty kappa before its ELU.
    truth (B, H, W, 3), 0 = unknown.
    """
    known = (truth != 0).any(-1)
    maps, truth = maps.permute(0, 2, 3, 1)[known], truth[known].to(maps)
    cosine = F.cosine_similarity(maps[:, :3], truth, dim=-1)
    angle = cosine.clamp(-1 + 1e-4, 1 - 1e-4).acos()  # the slope of acos is infinite at 1
    kappa = F.elu(maps[:, 3]) + 1 + 0.01
    return (kappa * angle + (-math.pi * kappa).exp().log1p() - (kappa.square() + 1).log()).mean()


def normal_probe(tokens: Features, truth, val_tokens: Features, val_truth, recipe: Recipe):
    """Surface normals that a linear layer reads -> (normal_metrics, predict). truth (I, H, W, 3), camera frame."""
    head = LinearHead(tokens, 4, False, recipe.seed)
    decode = lambda maps: resize(four_times(maps), truth.shape[1:3])
    fitted = fit("normals", head, decode, angular_loss, tokens, truth, recipe)

    def predict(tokens):
        return (F.normalize(maps[:3], dim=0).permute(1, 2, 0) for maps in fitted(tokens))
    return normal_metrics(predict(val_tokens), val_truth), predict


# ------------------------------------------------------------------------ 5. Segmentation


def segmentation_probe(tokens: Features, truth, val_tokens: Features, val_truth, recipe: Recipe):
    """Classes that a linear layer tells apart -> (segmentation_metrics, predict). truth (I, H, W) int, 255 = unknown.

    The head has one output for each class of the training views, so what is ignored there can never be predicted.
    """
    classes = pixels_of_classes(truth).nonzero()[:, 0]  # (workshop) the ids that occur, ascending
    head = LinearHead(tokens, len(classes), False, recipe.seed)
    decode = lambda scores: resize(scores, truth.shape[1:3])

    def loss(scores, truth):
        output = torch.searchsorted(classes.to(truth.device), truth.long())  # the output that belongs to a pixel's id
        return F.cross_entropy(scores, output.masked_fill(truth == 255, -1), ignore_index=-1)
    fitted = fit("segmentation", head, decode, loss, tokens, truth, recipe, unknown=255)

    def predict(tokens):
        return (classes[scores.argmax(0)].short() for scores in fitted(tokens))
    return segmentation_metrics(predict(val_tokens), val_truth, class_count(truth, val_truth)), predict


# ------------------------------------------------------------------------ 6. Correspondence


class Pair(NamedTuple):
    a: int  # index into Views
    b: int
    angle: float  # degrees that the camera turns between them
    measured: bool  # both have depth, so errors are exact; else, if the camera moved, distances from epipolar lines


class Matches(NamedTuple):
    a: Tensor  # (M, 2) pixels of view a
    b: Tensor  # (M, 2) pixels of view b
    error: Tensor  # (M,) pixels
    by_chance: Tensor  # (M,) the same when the matched points are paired at random


def sample_points(tokens: Tensor, depth: Tensor):
    """The points at which features are matched, 4x4 a patch: pixel centres (M, 2) x y, features (M, C), depth (M,).

    tokens (h, w, C); depth (H, W): points where it is 0 are left out. A feature is interpolated between patch centres,
    at the very pixel whose depth is taken.
    """
    # Differs: the official code samples 120x160 points whatever the patch size, so its "10 px" are 10 spacings of them,
    # or 40 pixels of a 480x640 image. Here a patch's side has four points, and recall is given in both units.
    sides = zip(tokens.shape[:2], depth.shape)
    rows, cols = (((torch.arange(4 * n) + 0.5) * side / (4 * n)).long() for n, side in sides)
    z = depth[rows[:, None], cols]
    points = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1)[z > 0] + 0.5
    grid = (2 * points / torch.tensor(depth.shape[::-1]) - 1).to(tokens)
    maps = tokens.permute(2, 0, 1)[None]
    features = F.grid_sample(maps, grid[None, None], padding_mode="border", align_corners=False)
    return points, features[0, :, 0].T, z[z > 0]


def match(a: Tensor, b: Tensor, count=MATCHES):
    """Features (M, C), (L, C) -> indices into both of the `count` best matches by the ratio test (A.4), half of them
    found from each side (what both find counts twice)."""
    # Differs: Probe3D describes matching both ways, as here, but its published script matches from one image only.
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    to_b, sure_a = nearest_with_ratio(a, b)
    to_a, sure_b = nearest_with_ratio(b, a)
    best_a, best_b = (sure.topk(min(count // 2, len(sure))).indices for sure in (sure_a, sure_b))
    return torch.cat([best_a, to_a[best_b]]), torch.cat([to_b[best_a], best_b])


def nearest_with_ratio(a: Tensor, b: Tensor):
    """For each unit row of a (M, C): its nearest row of b by cosine, and how sure: 1 - first / second distance."""
    index, sure = [], []
    for rows in a.split(max(1, 2**26 // len(b))):  # in blocks that bound memory
        similarity, nearest = (rows @ b.T).topk(2, dim=1)
        first, second = (1 - similarity).clamp_min(1e-9).unbind(1)
        index, sure = index + [nearest[:, 0]], sure + [1 - first / second]
    return torch.cat(index).cpu(), torch.cat(sure).cpu()


def match_pair(tokens: Features, views: Views, pair: Pair, device) -> Matches:
    """Match the views of a pair. Without depth, the error is the distance from the epipolar line (workshop), which is
    at most the true error."""
    # `points_to_match` (workshop) is `sample_points` of a view of the pair.
    points_a, features_a, depth = points_to_match(pair.a, tokens, views, pair, device)
    points_b, features_b, _ = points_to_match(pair.b, tokens, views, pair, device)
    index_a, index_b = match(features_a, features_b)
    a, b, depth = points_a[index_a], points_b[index_b], depth[index_a]
    a_to_b = torch.linalg.inv(views.c2w[pair.b]) @ views.c2w[pair.a]
    cameras = views.K[pair.a], views.K[pair.b], a_to_b
    exact = pair.measured or only_turned(views.c2w[pair.a], views.c2w[pair.b])  # turning needs no depth
    error = reprojection_error if exact else epipolar_error
    shuffled = b[torch.randperm(len(b), generator=torch.Generator().manual_seed(0))]
    return Matches(a, b, error(a, b, depth, *cameras), error(a, shuffled, depth, *cameras))


def correspondence(tokens: Features, views: Views, pairs: list[Pair], device="cpu"):
    """How many matches are right, without any training -> (scores, scores of random matches, Matches of each pair).

    Recall is the % of matches within 5, 10, 20 pixels ("10 px") or spacings of the points ("10 grid", the official
    code's 10 px), and 1.5 patches: the mean over all pairs, and over those of each viewpoint change ("10 px 0-15").
    """
    pixels, points = math.prod(views.images.shape[2:]), 16 * math.prod(tokens.patches.shape[1:3])
    spacing = math.sqrt(pixels / points)  # pixels between matched points
    limits = {f"{t} px": t for t in THRESHOLDS} | {f"{t} grid": t * spacing for t in THRESHOLDS}
    limits["1.5 patches"] = 6 * spacing  # there are four points a patch
    bar = tqdm(pairs, desc="correspondence", unit="pair", leave=False)
    matches = [match_pair(tokens, views, pair, device) for pair in bar]
    scores = recall([m.error for m in matches], pairs, limits)
    return scores, recall([m.by_chance for m in matches], pairs, limits), matches


def recall(errors, pairs, limits) -> dict:  # % of each pair's errors below each limit: means over ranges of angles
    rows, scores = [[100 * (e < limit).double().mean() for limit in limits.values()] for e in errors], {}
    for name, (low, high) in {"": (0, 181), **VIEWPOINTS}.items():
        if inside := [row for row, p in zip(rows, pairs) if low <= p.angle < high]:
            scores |= mean_of(inside, (f"{limit} {name}".strip() for limit in limits))
    return scores


# ------------------------------------------------------------------------ 7. Is there anything to gain?


def place_share(patches, norm=nn.Identity()) -> dict:
    """-> {"all", "rough"}: % of the variance of tokens (I, h, w, C) that their place in the grid explains.

    Not in the paper. "all" is the variance of the mean token of each place. Perspective is part of it, and smooth:
    floors, say, are at the bottom. "rough" is what is left of these means when a cubic polynomial in row and column is
    taken off. Splatting carries features to other places, and so averages out what is tied to a place: the larger
    "rough" is, the more there is to gain. The variance that means of few views have by chance is subtracted, so that
    tokens without a pattern score 0. `norm` is applied first: the ViT's last LayerNorm, if it is still to come.
    """
    views, (h, w), squares, total = len(patches), patches.shape[1:3], 0.0, 0.0
    for tokens in patches:
        x = norm(tokens.float()).detach().double()
        total, squares = total + x, squares + x.square().mean().item()
    place = (total / views).flatten(0, 1)  # (N, C)
    around = squares / views - place.square().mean()  # variance of tokens around the mean of their place
    place = place - place.mean(0)
    chance = around / (views - 1)  # the variance of such a mean by chance
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    cubic = torch.stack([(x**a * y**b).flatten() for a in range(4) for b in range(4 - a)], 1).double()  # (N, 10)
    rough = place - cubic @ torch.linalg.lstsq(cubic, place, driver="gelsd").solution
    everything = around + place.square().mean()
    share = lambda x: (100 * (x.square().mean() - chance) / everything).item()
    return {"all": share(place), "rough": share(rough)}


# ---- Workshop: not needed to understand the method ----

PROBES = {"depth": depth_probe, "normals": normal_probe, "segmentation": segmentation_probe}
TRUTH = {"depth": ("depth", 0), "normals": ("normal", 0), "segmentation": ("label", 255)}  # field of Views, "unknown"

# `paper` is A.4. Its ten epochs of normals are over NYUv2's 795 images, its pairs are SuperGlue's 1,500. `tiny` trains
# the same heads in minutes; its numbers were chosen by score and time on rooms held out of the *training* rooms.
PRESETS = {
    "tiny": dict(pixels=96 * 128, views=16, pairs=20, depth=Recipe(1000, 3e-3, 2), normals=Recipe(500, 3e-3, 8),
                 segmentation=Recipe(500, 1e-2, 8)),
    "paper": dict(pixels=480 * 640, views=100_000, pairs=1500, depth=Recipe(307_200, 1e-4, 2),
                  normals=Recipe(1000, 5e-4, 8), segmentation=Recipe(320_000, 1e-3, 2))}
AT_ONCE = 32  # views that are in memory while views and features are written
NO_CLASS = 10_000  # class ids are below; larger values are instance ids or colours

# ------------------------------------------------------------------------ arrays on disk


class Rows:
    """An array (I, ...) in a file, one row a view. rows[views] reads those rows; nothing else of it stays in memory."""

    def __init__(self, path, shape, dtype):
        self.path, self.shape, self.dtype = Path(path), tuple(shape), dtype
        self.bytes = math.prod(self.shape[1:]) * dtype.itemsize  # of a row

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, which) -> Tensor:
        # Mapped anew each time, because pages of a mapping that stays open count as memory of the process.
        mapped = torch.from_file(str(self.path), size=math.prod(self.shape), dtype=self.dtype)
        return mapped.view(self.shape)[which].clone()

    def write(self, first, rows: Tensor):
        with data.naming(self.path), open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.seek(first * self.bytes)
            file.write(rows.to(self.dtype).contiguous().numpy())


class SideBySide(Rows):
    """Arrays of the same views whose channels stand side by side."""

    def __init__(self, parts):
        self.parts, self.shape = parts, (*parts[0].shape[:-1], sum(x.shape[-1] for x in parts))

    def __getitem__(self, which):
        return torch.cat([x[which] for x in self.parts], -1)


def on_disk(stem, columns, count, make, what, at_once=AT_ONCE) -> dict:
    """{name: Rows} in the files `stem`.name, of columns {name: (shape of a row, dtype)}.

    make(first, last) -> {name: rows of these views}. What is there already is kept, so that a run that was killed goes
    on where it stopped.
    """
    rows = {name: Rows(f"{stem}.{name}", (count, *shape), dtype) for name, (shape, dtype) in columns.items()}
    done = min(x.path.stat().st_size // x.bytes if x.path.exists() else 0 for x in rows.values())
    folder = Path(stem).parent
    folder.mkdir(parents=True, exist_ok=True)
    missing, free = (count - done) * sum(x.bytes for x in rows.values()) / 1e9, shutil.disk_usage(folder).free / 1e9
    if missing > 0.1:
        print(f"{what}: {count - done} of {count} views, {missing:.1f} GB, go to {folder} ({free:.1f} GB are free)")
    if missing > free:
        raise data.DataError(f"{folder}: {what} do not fit; give another --out, or fewer --views")
    for first in tqdm(range(done, count, at_once), desc=what, unit=f"{at_once} views", leave=False):
        for name, part in make(first, first + at_once).items():
            rows[name].write(first, part)
    return rows


# ------------------------------------------------------------------------ views and their truth


def chosen_views(scenes, args, part) -> list:
    """[(scene, view)]: --views of each scene, evenly spread. What is left out is said."""
    where = []
    for scene in scenes:
        plain_images = scene.c2w.isnan().any()  # all of them count, unless told otherwise
        limit = args.views or (len(scene) if plain_images else PRESETS[args.preset]["views"])
        where += [(scene, int(i)) for i in np.linspace(0, len(scene) - 1, min(limit, len(scene))).round()]
    if len(where) < (total := sum(map(len, scenes))):
        print(f"{part}: {len(where)} of {total} views are used; --views takes more of each scene")
    return where


def store_views(scenes, size, args, part="val") -> Views:
    """The chosen views of `scenes`, scaled to `size` and kept on disk. --crop counts for the held-out part alone."""
    # Differs: the paper compares truth as it is stored; here it is compared at the size of the views (--pixels), at the
    # nearest stored pixel.
    where = chosen_views(scenes, args, part)
    unknown = dict(depth=torch.zeros(size), normal=torch.zeros(*size, 3).half(), label=torch.full(size, 255).short())
    columns = {"images": ((3, *size), torch.uint8), "K": ((3, 3), torch.float32)}
    for kind, map in unknown.items():
        if any(getattr(scene.frames[i], kind) for scene, i in where):
            columns[kind] = map.shape, map.dtype

    def make(first, last):
        rows = [unknown | view_row(*place, size, args, part) for place in where[first:last]]
        return {name: torch.stack([row[name] for row in rows]) for name in columns}
    stem = Path(args.out) / "views" / views_key(where, size, args, part)
    rows = on_disk(stem, columns, len(where), make, f"{part} views")
    maps = [rows[kind] if kind in rows else map.expand(len(where), *map.shape) for kind, map in unknown.items()]
    return Views(where, rows["images"], rows["K"][:], torch.stack([scene.c2w[i] for scene, i in where]), *maps)


def views_key(where, size, args, part) -> str:
    """A name for these views. Another file, camera, size or way to read them gives another."""
    told = [size, args.max_depth, args.ignore_label, args.crop if part == "val" else None]
    told.append(Path(data.__file__).read_text())
    for frame, scale in ((scene.frames[i], scene.depth_scale) for scene, i in where):
        files = [f.resolve() for f in (frame.image, frame.depth, frame.normal, frame.label) if f]
        told += [frame, scale, [(f, f.stat().st_size, f.stat().st_mtime_ns) for f in files]]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def view_row(scene, i, size, args, part) -> dict:
    """A row of `Views`. --max_depth, --ignore_label and --crop make the truth that is not to be used unknown."""
    v, used, (height, width) = scene.view(i, size), torch.zeros(size, dtype=torch.bool), size
    top, bottom, left, right = args.crop if part == "val" else (0, 1, 0, 1)  # shares of the sides
    used[round(top * height):round(bottom * height), round(left * width):round(right * width)] = True
    row = dict(images=(255 * v.image).round().byte(), K=v.K)
    if v.depth is not None:
        row["depth"] = v.depth.where(used & (v.depth <= args.max_depth), 0)
    if v.normal is not None:
        row["normal"] = v.normal.where(used[..., None], 0).half()
    if v.label is not None:
        ignored = (v.label == args.ignore_label) | (v.label == 65535) | (v.label < 0)
        label = v.label.where(used & ~ignored, 255)
        if label.max() >= NO_CLASS:
            raise data.DataError(f"{scene.frames[i].label}: class {label.max()}; labels are ids from 0 to "
                                 f"{NO_CLASS - 1}, 255 = ignore, in a grey or palette picture")
        row["label"] = label.short()
    return row


def plain_frames(root):  # of the images in root/images, whose cameras are not known: such views make no pairs
    files = sorted((f for f in (root / "images").rglob("*") if data.is_picture(f)), key=data.natural)
    if len(files) < 2:
        raise data.DataError(f"{root}: {len(files)} images in images/; give at least two")
    for note in data.left_out((root / "images").rglob("*")):
        print(f"{root / 'images'}: {note}")
    K, c2w, frames = np.eye(3), np.full((4, 4), np.nan), []
    for file in files:
        frames.append(data.Frame(file.stem, file, K, c2w, data.stored_size(file), **data.maps_beside(file, root)))
        if problem := data.problem_of_maps(frames[-1], thorough=False):
            raise data.DataError(f"{problem}; mend or remove the file")
    return frames


def plain_folder(folder, args):
    """Images without poses, in train/ and val/, or in one folder of which every eighth is held out -> both parts."""
    if (folder / "train").is_dir():
        train, val = plain_frames(folder / "train"), plain_frames(folder / "val")
    else:
        frames = plain_frames(folder)
        train, val = data.split(frames, "train"), data.split(frames, "val")
    scene = lambda name, frames: [data.Scene(name, frames, depth_scale=args.depth_scale)]
    return scene("train", train), scene("val", val)


def read_pairs(file, args):
    """SuperGlue's list, a line nameA nameB rotA rotB K_A(9) K_B(9) T_AB(16), with X_B = T_AB X_A."""
    root, scenes = file.parent / "images" if (file.parent / "images").is_dir() else file.parent, []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        names, numbers = line.split()[:2], line.split()[2:]
        try:
            values = np.array(numbers, float)
            assert len(values) == 36 and not values[:2].any()
            poses = np.eye(4), np.linalg.inv(values[20:].reshape(4, 4))
        except (AssertionError, ValueError, np.linalg.LinAlgError):
            raise data.DataError(f"{file}: line {number} is not two names, two zeros and 34 numbers, as in SuperGlue's "
                                 "lists (images that it would rotate must be upright already)") from None
        frames = []
        for name, K, c2w in zip(names, values[2:20].reshape(2, 3, 3), poses):
            image = data.inside(root / name, root, str(file))
            frames.append(data.Frame(name, image, K, c2w, None, **data.maps_beside(image, file.parent)))
            if problem := data.problem_of(frames[-1]):
                raise data.DataError(f"{file}: line {number}: {problem}; mend or remove the file")
        scenes.append(data.Scene(f"pair {number}", frames, depth_scale=args.depth_scale))
    if not scenes:
        raise data.DataError(f"{file}: no pairs in it; a line is nameA nameB rotA rotB K_A K_B T_AB")
    return scenes


def open_split(args):
    """-> scenes to train on and held-out scenes. Of a single scene every eighth view is held out."""
    path = Path(args.scene_dir)
    if path.is_file():
        return [], read_pairs(path, args)
    if ((path / "images").is_dir() or (path / "train" / "images").is_dir()) and not data.find_scenes(path):
        return plain_folder(path, args)
    scenes = data.open_scenes(path, args.skip_bad_frames, args.near, args.far)
    if len(scenes) > 1:
        return data.split(scenes, "train"), data.split(scenes, "val")
    hidden = data.held_out_views(scenes[0])
    return [scenes[0].subset([i for i in range(len(scenes[0])) if i not in hidden])], [scenes[0].subset(hidden)]


@lru_cache(16)  # it looks at all of an array, which takes long for one on disk
def views_with_truth(truth, unknown) -> Tensor:  # indices of the views of which something is known
    return torch.tensor([i for i, view in enumerate(truth) if (view != unknown).any()], dtype=torch.long)


def truths(train: Views | None, val: Views) -> dict:  # {probe: its maps of both splits}, where both know something
    found = {name: (getattr(train, key), getattr(val, key)) for name, (key, _) in TRUTH.items()} if train else {}
    return {name: both for name, both in found.items() if all(len(views_with_truth(x, TRUTH[name][1])) for x in both)}


@lru_cache(16)
def pixels_of_classes(labels):  # (I, H, W) -> how many pixels each class id has, unknown ones left out
    return sum(view[view != 255].long().bincount(minlength=NO_CLASS) for view in labels)


def class_count(*labels):  # one more than the largest id
    return 1 + max(int(pixels_of_classes(x).nonzero().max()) for x in labels)


# ------------------------------------------------------------------------ pairs of views


def shared_share(views: Views, pair: Pair) -> float:
    """The share of view a that b sees, or of b that a sees: the smaller. By depth if both have it, else by frustums."""
    if not pair.measured:
        return data.overlap(views.where[pair.a][0], views.where[pair.a][1], views.where[pair.b][1])
    shares = []
    for u, v in (pair[:2], pair[1::-1]):
        u_to_v = torch.linalg.inv(views.c2w[v]) @ views.c2w[u]
        seen = lift.cross_check(views.depth[u], views.depth[v], views.K[u], views.K[v], u_to_v) > 0.5
        shares.append(seen[views.depth[u] > 0].float().mean().item())
    return min(shares)


def candidate_pairs(views: Views):
    """All pairs of posed views of one scene -> (N,) each: indices a, b, the angle between them, do both have depth?"""
    of_scene, columns = {}, [(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))]
    for i in views.c2w.isfinite().all((1, 2)).nonzero()[:, 0].tolist():
        of_scene.setdefault(views.where[i][0], []).append(i)
    for members in of_scene.values():
        some = members[::1 + len(members) // 500]  # from a long video, views are taken at even steps
        a, b = torch.combinations(torch.tensor(some)).unbind(1)
        R = views.c2w[:, :3, :3].double()
        trace = (R[a] * R[b]).sum((1, 2))  # of R_a^T R_b
        columns.append((a, b, ((trace - 1) / 2).clamp(-1, 1).acos().rad2deg()))
    a, b, angle = map(torch.cat, zip(*columns))
    deep = torch.tensor([(z > 0).float().mean().item() > 0.01 for z in views.depth])  # enough to match points by
    return a, b, angle, deep[a] & deep[b]


def choose_pairs(views: Views, per_range, seed, least=0.2) -> list[Pair]:
    """Up to `per_range` pairs in each range of viewpoint change, which share at least the part `least` of what they
    see. If any pair has depth, those without are not used."""
    # Differs: the paper evaluates SuperGlue's list of ScanNet pairs. In posed scenes we draw pairs that share a fifth
    # of what they see, as many in each range of viewpoint change. A list in SuperGlue's format is used as it is.
    generator, (a, b, angle, deep) = torch.Generator().manual_seed(seed), candidate_pairs(views)
    is_good = lambda pair: not least or shared_share(views, pair) >= least
    for measured in (True, False):
        chosen = []
        for low, high in VIEWPOINTS.values():
            inside = ((deep == measured) & (low <= angle) & (angle < high)).nonzero()[:, 0]
            drawn = inside[torch.randperm(len(inside), generator=generator)[:40 * per_range]].tolist()
            pairs = (Pair(a[n].item(), b[n].item(), angle[n].item(), measured) for n in drawn)
            chosen += islice(filter(is_good, pairs), per_range)
        if chosen:
            return chosen
    return []


def why_no_pairs(views: Views) -> str:
    a, b, angle, deep = candidate_pairs(views)
    pairs = [Pair(*each) for each in zip(a.tolist(), b.tolist(), angle.tolist(), deep.tolist())]
    if not pairs:
        return "no scene has two held-out views"
    shares = {pair: shared_share(views, pair) for pair in pairs[:: 1 + len(pairs) // 200]}
    best = max(shares, key=shares.get)
    first, second = (scene.frames[i].name for scene, i in (views.where[best.a], views.where[best.b]))
    return (f"a pair must share 20 % of what it sees, and of all held-out views {first} and {second} share most, "
            f"{100 * shares[best]:.0f} %; views that lie closer together are needed")


def points_to_match(i, tokens: Features, views: Views, pair: Pair, device):  # all points count where there is no depth
    depth = views.depth[i] if pair.measured else torch.ones(views.images.shape[2:])
    found = sample_points(tokens.patches[i].to(device).float(), depth)
    if len(found[0]) < 2:
        scene, n = views.where[i]
        raise ValueError(f"{scene.name}: {scene.frames[n].name} has depth at fewer than two of the matched points; "
                         "change --pixels, or remove the depth to score by epipolar lines")
    return found


def only_turned(c2w_a: Tensor, c2w_b: Tensor) -> bool:
    """Whether both views are from one place, up to the rounding of positions."""
    a, b = c2w_a[:3, 3], c2w_b[:3, 3]
    return (a - b).norm().item() <= 1e-5 * max(1.0, a.norm().item(), b.norm().item())


def epipolar_error(a: Tensor, b: Tensor, depth, K_a: Tensor, K_b: Tensor, a_to_b: Tensor) -> Tensor:
    """For matches without depth: how many pixels of view b each is from the epipolar line of its point of view a, (M,).

    The true place lies on that line. So the distance is at most the true error, and recall is an upper bound.
    """
    x, y, z = a_to_b[:3, 3].tolist()
    essential = a_to_b.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ a_to_b[:3, :3]
    fundamental = torch.linalg.inv(K_b).T @ essential @ torch.linalg.inv(K_a)
    lines = F.pad(a, (0, 1), value=1.0) @ fundamental.T
    return (F.pad(b, (0, 1), value=1.0) * lines).sum(1).abs() / lines[:, :2].norm(dim=1)


# ------------------------------------------------------------------------ features and heads


def parts_of(path: str) -> list:  # the models of `a+b`, whose channels stand side by side
    return [path] if Path(path).exists() else path.split("+")


def extract(path, images, layer, cache, device, mirrored=False) -> Features:
    """Tokens of `images` (I, 3, H, W) uint8 by the weights at `path`, in files of the folder `cache`, where they stay.

    layer "block": what the last block puts out; "norm": after the final LayerNorm. Sides that are no multiples of the
    patch are rescaled to the nearest one. A path `a+b` is two models side by side, as FiT3D is scored. `a+a` is its
    control of equal width: the second time the model sees mirrored images, and its tokens are mirrored back.
    """
    # Differs: the official correspondence code normalises pictures by mean and deviation 0.5; here ImageNet's are used
    # in all probes, inside the ViT.
    if len(parts := parts_of(path)) > 1:
        found = [extract(part, images, layer, cache, device, part in parts[:n]) for n, part in enumerate(parts)]
        return Features(*map(SideBySide, zip(*found)))
    vit = lift.load_vit(path)
    digest = hashlib.sha256(f"{layer} {vit.patch} {vit.heads} {vit.positions} {tuple(images.shape)}".encode())
    for tensors in (vit.state_dict().values(), images):
        for x in tensors:
            digest.update(x.contiguous().numpy())
    key = digest.hexdigest()[:24] + "-mirrored" * mirrored  # another image or weight has another key
    if layer == "block":
        vit.norm = nn.Identity()
    vit, grid = vit.to(device), [max(1, round(side / vit.patch)) for side in images.shape[2:]]
    size, at_once = tuple(n * vit.patch for n in grid), min(AT_ONCE, max(1, 2**14 // math.prod(grid)))

    @torch.no_grad()
    def make(first, last):
        x = images[first:last].to(device).float() / 255
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        cls, _, patches = vit(x.flip(3) if mirrored else x)
        patches = patches.unflatten(1, grid)
        cls, patches = cls.half().cpu(), (patches.flip(2) if mirrored else patches).half().cpu()
        if not (cls.isfinite().all() and patches.isfinite().all()):
            raise ValueError(f"{path}: its tokens are not finite in 16 bits; check the weights file")
        return dict(cls=cls, patches=patches)
    columns = {"cls": ((vit.dim,), torch.float16), "patches": ((*grid, vit.dim), torch.float16)}
    return Features(**on_disk(Path(cache) / key, columns, len(images), make, f"features of {path}", at_once))


class Whitening(nn.Module):
    """Centre, standardise and decorrelate tokens by the statistics of training tokens (I, ..., C).

    Along a principal direction of variance v (1 on average), tokens are scaled by 1 / sqrt(v + floor). A small floor
    gives all directions a variance near 1, except those that hardly vary: scaling them up would amplify noise.
    """

    def __init__(self, tokens, floor):
        super().__init__()
        total = math.prod(tokens.shape[:-1])
        some = torch.linspace(0, total - 1, min(total, 2**16), dtype=torch.float64).long()  # spread over all views
        x = tokens[torch.unravel_index(some, tokens.shape[:-1])].float()
        mean, deviation = x.mean(0), x.std(0, correction=0)
        varies = deviation > max(1e-3 * deviation.max(), 1e-6)
        deviation = torch.where(varies, deviation, 1.0)  # a constant channel (CLS of a single image) is only centred
        x = (x - mean) / deviation
        variance, directions = torch.linalg.eigh(x.T @ x / len(x))
        self.register_buffer("mean", mean)
        self.register_buffer("map", directions / (variance.clamp_min(0) + floor).sqrt() / deviation[:, None])  # (C, C)

    def forward(self, x):  # (..., C) -> (..., C)
        return (x - self.mean) @ self.map


def note_loss(name, step, value, recipe: Recipe, bar):
    if not math.isfinite(value):
        raise ValueError(f"{name}: the loss is {value} at step {step}; check the {name} of these views")
    if recipe.log and (step % 50 == 0 or step + 1 == recipe.steps):
        bar.set_postfix(loss=f"{value:.4f}")
        recipe.log.write(json.dumps(dict(head=name, step=step, loss=round(value, 6))) + "\n")


class Probed(NamedTuple):
    """What came out for one model: numbers, and what the pictures show."""
    scores: dict  # {"depth": {"AbsRel": ...}, "normals": ..., ...} of the probes that have truth
    chance: dict | None = None  # recall of random matches
    maps: dict = {}  # {"depth": (4, H, W), ...} predictions of the shown views
    matches: list = []  # Matches of the shown pairs
    tokens: Tensor | None = None  # (4, h, w, C) of the shown views


def probe(models: dict, train: Views | None, val: Views, pairs: list[Pair], args) -> dict:
    """{name: Probed} of models {name: path}. Heads train on `train` and are scored on `val`.

    The first row is what one gets without features: the mean depth, the mean normal, the most frequent class, random
    matches. A probe without truth in both splits is left out. The same seed gives the same numbers, on one machine.
    """
    maps = truths(train, val)
    results = {"no features": Probed(baseline(maps))}
    for name, path in tqdm(models.items(), desc="models", unit="model"):
        results[name] = probe_model(name, path, train, val, maps, pairs, args)  # extracts features, runs each probe
        if pairs:  # random matches of the points that the first model matched
            results["no features"].scores.setdefault("correspondence", results[name].chance)
    return results


def probe_model(name, path, train, val, maps, pairs, args) -> Probed:
    frozen = lambda views: extract(path, views.images, args.layer, Path(args.out) / "features", args.device)
    tokens, val_tokens = train and frozen(train), frozen(val)
    scores, shown, matches, chance = {}, {}, [], None
    with open(Path(args.out) / "log.jsonl", "a") as log:
        log.write(json.dumps(dict(model=name)) + "\n")
        for kind, (truth, val_truth) in maps.items():
            recipe = getattr(args, kind)._replace(seed=args.seed, device=args.device, log=log)
            more = [not args.no_cls] if kind == "depth" else []
            scores[kind], predict = PROBES[kind](tokens, truth, val_tokens, val_truth, recipe, *more)
            views = shown_views(val_truth, TRUTH[kind][1])
            shown[kind] = torch.stack(list(predict(Features(*(x[views] for x in val_tokens)))))
    if pairs:
        scores["correspondence"], chance, matches = correspondence(val_tokens, val, pairs, args.device)
    if len(parts_of(path)) == 1 < len(val.images):
        norm = nn.Identity() if args.layer == "norm" else lift.load_vit(path).norm
        scores["place share"] = place_share(val_tokens.patches, norm)
    drawn = val_tokens.patches[shown_views(val.images)].float()
    return Probed(scores, chance, shown, [matches[n] for n in shown_pairs(pairs)], drawn)


def baseline(maps: dict) -> dict:
    """Scores without looking at an image: the mean depth, mean normal and most frequent class of the training views."""
    scores = {}
    for name, (truth, val) in maps.items():
        if name == "depth":
            total, known = sum(torch.stack([z.double().sum(), (z > 0).sum().double()]) for z in truth)
            scores[name] = depth_metrics((total / known).float().expand(val.shape), val)
        elif name == "normals":
            mean = F.normalize(sum(n.float().sum((0, 1)) for n in truth), dim=0)
            scores[name] = normal_metrics(mean.expand(val.shape), val)
        else:
            most = pixels_of_classes(truth).argmax()
            scores[name] = segmentation_metrics(most.expand(val.shape), val, class_count(truth, val))
    return scores


def shares_in_words(scores) -> str:
    shares = {m: s["place share"] for m, s in scores.items() if "place share" in s}
    listed = "; ".join(f"{m} {x['all']:.1f} %, rough part {max(0, x['rough']):.1f} %" for m, x in shares.items())
    return (f"Place share: {listed}. The rough part is artifacts that are tied to places in the picture. Splatting "
            "carries features to other places and so averages them out: where it is large, more can be gained (error "
            "of depth, built-in ViT: -1 % at a rough part of 1.3 %, -3 % at 26.5 %; docs/study.md).") if shares else ""


# ------------------------------------------------------------------------ pictures


def shown_views(truth, unknown=None) -> Tensor:  # four views of which something is known, evenly spread
    known = views_with_truth(truth, unknown) if unknown is not None else torch.arange(len(truth))
    return known[torch.linspace(0, len(known) - 1, min(4, len(known))).round().long()]


def shown_pairs(pairs) -> list:  # the number of the first pair of each range of viewpoint change
    within = [[n for n, p in enumerate(pairs) if low <= p.angle < high] for low, high in VIEWPOINTS.values()]
    return [numbers[0] for numbers in within if numbers]


def colour_map(kind, map: Tensor, like: Tensor) -> Tensor:  # (3, H, W); depth on the scale of `like`, unknown black
    if kind == "depth":
        return data.colour_depth(map, like)
    if kind == "normals":
        return data.colour_normals(map.float()) * (map != 0).any(-1)
    return data.colour_ids(torch.where(map == 255, 0, map.long() + 1))


def draw_matches(image_a, image_b, m: Matches, zoom) -> Tensor:  # both views side by side, 40 of the matches as lines
    picture = data.to_image(torch.cat([image_a, image_b], 2) / 255)
    picture = picture.resize((zoom * picture.width, zoom * picture.height))  # bicubic
    draw, width = ImageDraw.Draw(picture), image_a.shape[2]
    for n in torch.linspace(0, len(m.error) - 1, 40).round().long().tolist():
        (x, y), (u, v), wrong = m.a[n].tolist(), m.b[n].tolist(), min(1, m.error[n].item() / THRESHOLDS[-1])
        colour = (round(40 + 190 * wrong), round(220 - 195 * wrong), 40)  # green is right, red is wrong
        draw.line([zoom * x, zoom * y, zoom * (u + width), zoom * v], fill=colour)
    return data.from_image(picture)


def draw_all(results, train, val: Views, pairs, out):
    """-> (title, caption, path) of each picture. Columns are models, rows fixed held-out views or pairs."""
    models, size = list(results)[1:], val.images.shape[2:]
    for name in (*TRUTH, "matches"):  # of an earlier run on other data
        (out / f"{name}.png").unlink(missing_ok=True)
    captions = dict(depth="Near is yellow, far is blue", segmentation="One colour a class",
                    normals="Red faces right, green up, blue the camera")
    for kind, (_, truth) in truths(train, val).items():  # SnD Fig. 3, 4, 6
        shown = shown_views(truth, TRUTH[kind][1])
        maps = [truth[shown], *(results[m].maps[kind] for m in models)]
        like = maps[0].flatten(0, 1)
        rows = [[val.images[i] / 255, *(colour_map(kind, m[n], like) for m in maps)] for n, i in enumerate(shown)]
        below = (lambda width: data.depth_legend(width, like)) if kind == "depth" else None
        path = data.picture_grid(out / f"{kind}.png", ["image", "truth", *models], rows, below=below)
        yield kind.capitalize(), f"Held-out views. {captions[kind]}, black is unknown.", path
    if pairs:  # SnD Fig. 5
        shown, zoom = [pairs[n] for n in shown_pairs(pairs)], max(1, round(200 / size[1]))
        rows = [[draw_matches(val.images[p.a], val.images[p.b], results[m].matches[k], zoom) for m in models]
                for k, p in enumerate(shown)]
        angles = ", ".join(f"{p.angle:.0f}°" for p in shown)
        caption = f"40 matches of pairs that turn by {angles}. Green is right, red {THRESHOLDS[-1]} px off or more."
        yield "Correspondence", caption, data.picture_grid(out / "matches.png", models, rows, scale=1)
    rows = [[val.images[i] / 255] for i in shown_views(val.images)]  # SnD Fig. 13-14
    for tokens in (results[m].tokens for m in models):
        basis = lift.pca_basis(tokens.flatten(0, 2))
        for row, x in zip(rows, tokens):
            row.append(F.interpolate(lift.pca_colours(x, basis)[None], size)[0])
    path = data.picture_grid(out / "features.png", ["image", *models], rows)
    yield "Features", "The three directions in which a model's features vary most, as colours.", path


# ------------------------------------------------------------------------ the report

COLUMNS = (  # probe, score, heading, digits
    ("depth", "AbsRel", "depth AbsRel ↓", 3), ("depth", "RMSE", "RMSE ↓", 3), ("depth", "delta1", "δ<1.25 % ↑", 1),
    ("normals", "RMSE", "normals RMSE ° ↓", 2),
    *(("normals", limit, f"<{limit}° % ↑", 1) for limit in ("11.25", "22.5", "30")),
    *(("segmentation", name, f"{name} % ↑", 1) for name in ("aAcc", "mIoU", "mAcc")),
    ("correspondence", "10 px", "recall 10 px % ↑", 1), ("correspondence", "10 grid", "10 px of the grid % ↑", 1),
    ("correspondence", "1.5 patches", "1.5 patches % ↑", 1))
RECALL = {  # more tables of the report: title -> scores
    "Recall, %": [f"{t} {unit}" for unit in ("px", "grid") for t in THRESHOLDS] + ["1.5 patches"],
    "Recall by degrees that the camera turns, %": [f"10 px {name}" for name in VIEWPOINTS],
    "The same within 1.5 patches, %": [f"1.5 patches {name}" for name in VIEWPOINTS]}
STYLE = "body{font:16px sans-serif;margin:auto;max-width:1100px;padding:12px}pre{overflow-x:auto}img{max-width:100%}"


def table(scores: dict, columns) -> str:
    """In Markdown, a row a model. The best model is **bold**; a column without a number is left out."""
    value = lambda model, column: scores[model].get(column[0], {}).get(column[1])
    columns = [c for c in columns if any(value(m, c) is not None for m in scores)]
    cells = [["", "---", *scores]]
    for c in columns:
        texts = ["" if value(m, c) is None else f"{value(m, c):.{c[3]}f}" for m in scores]
        judged = [float(text) for text in texts[1:] if text]  # the baseline, first, is not judged
        best = (min if "↓" in c[2] else max)(judged) if len(judged) > 1 else None
        bold = [f"**{text}**" if text and float(text) == best else text for text in texts[1:]]
        cells.append([c[2], "---", texts[0], *bold])
    widths = [max(map(len, column)) for column in cells]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in zip(*cells))


def report(results: dict, train: Views | None, val: Views, pairs: list[Pair], args) -> str:
    """Writes results.json, the pictures and report.html, which holds them all; returns the table in Markdown."""
    out, scores, columns = Path(args.out), {m: r.scores for m, r in results.items()}, COLUMNS
    about = (f"{len(train.images) if train else 0} training views, {len(val.images)} held-out views, "
             "{1}x{0} pixels".format(*val.images.shape[2:]) + f"; {len(pairs)} pairs" * bool(pairs) + ".")
    if pairs and pairs[0].measured:
        about += " Matches are scored by measured depth and the true pose."
    elif pairs:
        about += " No depth: matches are scored by epipolar lines of the true pose, so recall is an upper bound."
        columns = [(*c[:2], c[2].replace("recall", "epipolar recall"), c[3]) for c in COLUMNS]
    about += " Depth RMSE is in the unit of the data." * any("depth" in s for s in scores.values())
    paper, shares, texts = PRESETS["paper"], shares_in_words(scores), {"Scores": table(scores, columns)}
    settings = [f"{key}: {x}" + f" (paper: {paper.get(key)})" * (paper.get(key, x) != x)
                for key, x in vars(args).items()]
    result = dict(command=args.command, about=about, settings=settings, scores=scores)
    data.write_whole(out / "results.json", json.dumps(result, indent=1).encode())
    for title, names in RECALL.items() if pairs else ():
        texts[title] = table(scores, [("correspondence", name, name, 1) for name in names])
    texts["Settings"] = "\n".join(settings)
    page = [f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}'
            f"</style><title>Probes</title><h1>Probes of frozen features</h1><p>{html.escape(about)}</p>"
            f"<p>{html.escape(shares)}</p>"]
    for name, card in ((n, Path(part, "README.md")) for n, path in args.models.items() for part in parts_of(path)):
        if card.is_file():
            link = html.escape(card.resolve().as_uri())
            page.append(f'<p>Model card of <a href="{link}">{html.escape(name)}</a></p>')
    for title, text in texts.items():
        page.append(f"<h2>{title}</h2><pre>{html.escape(text)}</pre>")
    for title, caption, path in draw_all(results, train, val, pairs, out):
        source = base64.b64encode(path.read_bytes()).decode()
        page.append(f'<h2>{title}</h2><p>{html.escape(caption)}</p><img src="data:image/png;base64,{source}">')
    data.write_whole(out / "report.html", "".join(page).encode())
    return f"{about}\n\n{texts['Scores']}\n\n{shares}\n"


# ------------------------------------------------------------------------ command

LAYOUTS = """
The student with blending is for depth, normals and segmentation, the one without (04_distill.py --no_blend) for
correspondence (Sec. 4.1). Both beside their start:
  python 05_probe.py --models start=tiny dense=out/04_distill/student matching=out/no_blend/student
FiT3D is scored with its features beside the start's, so its heads are twice as wide. The fair control is start+start,
where the second start sees mirrored images: as wide, and it knows nothing new.

Images without poses: a folder with images/, and beside it depth/ normals/ labels/ (PNG or .npy, named like the image).
Either train/ and val/ hold such folders, or there is one set, and every eighth image is held out.
  depth    16-bit PNG in millimetres, or other units by --depth_scale; 0 = unknown
  normals  unit vectors x right, y down, z forward, towards the camera; .npy, or PNG (-1 to 1 as 0 to 255)
  labels   class ids in a grey or palette PNG; 255 = ignore, and --ignore_label
Pairs of images: --scene_dir pairs.txt, lines of nameA nameB rotA rotB K_A K_B T_AB as SuperGlue has them, and beside it
images/ and, if there is one, depth/. Without depth, matches are scored by epipolar distance.
docs/reproduce.md converts public data sets to these layouts. In --out, views/ and features/ may be deleted at any time.
"""


def named(text):  # -> name, path; a path that exists may have a = in it
    return text.split("=", 1) if "=" in text and not Path(text).exists() else (text, text)


def parse(argv):
    parser = argparse.ArgumentParser(description="Probe frozen features: depth, normals, segmentation, correspondence.",
                                     epilog=LAYOUTS, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, student = parser.add_argument, "out/04_distill/student"
    data.scene_flags(parser, "out/05_probe", view_memory=0, scenes="data_probe")
    default = [named(path) for path in ["tiny"] + [student] * Path(student).is_dir()]
    add("--models", nargs="+", type=named, default=default,
        help="'tiny', published names, files, folders; name=a gives a name, a+b puts the features of two side by side "
        "(a+a: a control of equal width, below); views are sized to the first's patches (default: tiny, and "
        "out/04_distill/student if it exists)")
    add("--preset", choices=list(PRESETS), default="tiny", help="how heads train, and flags marked [preset]")
    add("--pixels", type=data.positive, help="pixels a view; raise it for models of larger patches [preset]")
    add("--views", type=data.positive, help="views of each posed scene [preset] or plain folder (default: all)")
    add("--pairs", type=data.positive, help="pairs in each range of viewpoint change [preset]")
    add("--max_steps", type=data.positive, help="at most so many steps a head, for a quick look")
    add("--layer", choices=("block", "norm"), default="block", help="tokens before or after the last LayerNorm")
    add("--no_cls", action="store_true", help="depth reads patch tokens alone")
    add("--max_depth", type=float, default=math.inf, help="truth beyond it is not used, in training and in evaluation")
    add("--crop", type=float, nargs=4, default=(0, 1, 0, 1), metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"),
        help="held-out views are scored inside it; in shares of height and width")
    add("--ignore_label", type=int, help="a class that is not scored, beside 255")
    add("--depth_scale", type=float, default=1e-3, help="unit of stored depth, of plain images and of pairs")
    args = parser.parse_args(argv)
    top, bottom, left, right = args.crop
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        parser.error("--crop: give shares, 0 <= TOP < BOTTOM <= 1 and 0 <= LEFT < RIGHT <= 1")
    if len(dict(args.models)) < len(args.models):
        parser.error("--models: two models have one name; name=path gives another")
    args.models = dict(args.models)
    for name, value in PRESETS[args.preset].items():
        if isinstance(value, Recipe):
            value = value._replace(steps=min(value.steps, args.max_steps or value.steps))
        if name != "views":  # depends on what is in --scene_dir
            setattr(args, name, getattr(args, name, None) or value)
    args.command = shlex.join(["python", "05_probe.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def open_data(args):
    """-> {name: path} of models, training views or None, held-out views, pairs: what `probe` takes."""
    train, val = open_split(args)
    size = None
    for path in args.models.values():  # loads each model once: a wrong path is found now
        patch, *others = sorted({lift.load_vit(part).patch for part in parts_of(path)})
        if others:
            raise ValueError(f"{path}: patches of {patch} and {others[0]} pixels; channels side by side need one size")
        size = size or data.fit_size(val[0], args.pixels, patch)  # in whole patches of the first model
        if min(size) < 2 * patch:
            raise ValueError(f"--pixels {args.pixels} leaves {path} fewer than 2x2 patches of {patch} px; raise it")
    train = store_views(train, size, args, "train") if train else None
    val = store_views(val, size, args, "val")
    for name, (key, unknown) in TRUTH.items() if train else ():
        in_train, in_val = (len(views_with_truth(getattr(views, key), unknown)) > 0 for views in (train, val))
        if in_train != in_val:
            print(f"{name}: left out, as only {'training' if in_train else 'held-out'} views have its truth")
    pairs = choose_pairs(val, args.pairs, args.seed, least=0 if Path(args.scene_dir).is_file() else 0.2)
    if not pairs and val.c2w.isfinite().all():
        print(f"no pairs, so no correspondence: {why_no_pairs(val)}")
    if not pairs and not truths(train, val):
        raise data.DataError(f"{args.scene_dir}: no depth, normals or labels in both splits, and no pairs of views "
                             "that overlap; --help says where maps go")
    (Path(args.out) / "log.jsonl").unlink(missing_ok=True)  # of an earlier run: all heads are trained anew
    return args.models, train, val, pairs


def main(argv=None):
    args = parse(argv)
    with data.explained(args, "the same command goes on: written views and features are kept, heads start again"):
        models, *views = open_data(args)
        print(report(probe(models, *views, args), *views, args))
        print(f"  ->  {Path(args.out) / 'report.html'}, {Path(args.out) / 'results.json'}")


if __name__ == "__main__":
    main()
