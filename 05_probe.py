"""What did it gain? Four probes of frozen features, any models side by side: depth, normals, segmentation, correspondence.

Paper   Splat and Distill (SnD) Sec. 4.1, Appendix A.4, Fig. 3-7 and 13-14; normals as Bae et al. 2021; correspondence as
        Probe3D (El Banani et al. 2024).
In      ViTs (02_lift), and views (01_data) with depth, normals or labels. Also a plain folder of images with such maps, or
        a list of pairs in SuperGlue's format: --help says how NYUv2, KITTI, ADE20K and Pascal VOC are laid out.
Out     a table; out/05_probe/: results.json, report.html (one file, opens offline), its pictures, features/ (a cache).
Run     python 05_probe.py        the built-in ViT, and out/04_distill/student if it is there: a minute a model on two CPU cores
        python 05_probe.py --models start=tiny snd=out/04_distill/student both=tiny+out/04_distill/student
        python 05_probe.py --scene_dir nyuv2/ --models dinov2_vits14 --preset paper --max_depth 10
Copy    01_data.py 02_lift.py 05_probe.py tiny/vit.safetensors
Not     heads that are not linear, several layers of a ViT at once, images of several shapes (all are cropped to the first's).
Words   head: one linear layer on frozen tokens; truth: the measured map, 0 (labels 255) where unknown; I images, K bins or
        classes, M matches; px are pixels of the views, px of the grid are points where features are matched, 4 a patch.
"""
import argparse
import base64
import hashlib
import html
import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

data, lift = (importlib.import_module(name) for name in ("01_data", "02_lift"))

DEPTH_BINS, MATCHES, THRESHOLDS = 256, 1000, (5, 10, 20)  # A.4; matches a pair; pixels
MAX_CLASS = 9_999  # colours read as ids are larger by far
VIEWPOINTS = {"0-15": (0, 15), "15-30": (15, 30), "30-60": (30, 60), "60-180": (60, 181)}  # degrees (SnD Fig. 7)


class Recipe(NamedTuple):
    """All that a head needs to be trained the same way again."""
    steps: int
    lr: float
    batch: int
    seed: int = 0
    device: str = "cpu"
    log: object = None  # an open file, gets one JSON line every 50 steps


# `paper` is A.4; its ten epochs of normals are those of NYUv2's 795 images, its pairs SuperGlue's 1,500. `tiny` fits the same
# heads into minutes: recipes chosen by score and time on rooms held out of the *training* rooms (of 400, four views each).
PRESETS = {
    "tiny": dict(pixels=96 * 128, views=16, pairs=20, depth=Recipe(1000, 3e-3, 2), normals=Recipe(500, 3e-3, 8),
                 segmentation=Recipe(500, 1e-2, 8)),
    "paper": dict(pixels=480 * 640, views=100_000, pairs=1500, depth=Recipe(307_200, 1e-4, 2), normals=Recipe(1000, 5e-4, 8),
                  segmentation=Recipe(320_000, 1e-3, 2))}

# ------------------------------------------------------------------------------------------------ views with maps


class Views(NamedTuple):
    """All views of a split at one size."""
    where: list  # (scene, index of the view in it)
    images: Tensor  # (I, 3, H, W) uint8
    K: Tensor  # (I, 3, 3) pixels
    c2w: Tensor  # (I, 4, 4), NaN where poses are not known
    depth: Tensor  # (I, H, W) z-depth, 0 = unknown
    normal: Tensor  # (I, H, W, 3) float16, 0 = unknown
    label: Tensor  # (I, H, W) int16, 255 = unknown


def load_views(scenes, size, args) -> Views:
    """At most --views of each scene, evenly spread; truth outside --crop, beyond --max_depth or --ignore_label is unknown."""
    # Differs: truth is compared at the size of the views (--pixels), at the nearest stored pixel; in the paper as it is stored.
    top, bottom, left, right = (round(share * side) for share, side in zip(args.crop, (size[0], size[0], size[1], size[1])))
    outside = torch.ones(size, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    where = [(s, int(i)) for s in scenes for i in np.unique(np.linspace(0, len(s) - 1, min(args.views, len(s))).round())]
    unknown = torch.zeros(size), torch.zeros(*size, 3).half(), torch.full(size, 255).short()
    rows = []
    for scene, i in tqdm(where, desc="views", unit="view", leave=False):
        v = scene.view(i, size)
        depth, normal, label = unknown
        if v.depth is not None:
            depth = v.depth.masked_fill(outside | (v.depth > (args.max_depth or math.inf)), 0)
        if v.normal is not None:
            normal = v.normal.masked_fill(outside[..., None], 0).half()
        if v.label is not None:
            label = v.label.masked_fill(outside | (v.label == args.ignore_label) | (v.label == 65535) | (v.label < 0), 255)
            if label.max() > MAX_CLASS:
                raise data.DataError(f"{scene.frames[i].label}: class {label.max()}; labels are ids from 0 to {MAX_CLASS}, 255 = "
                                     "ignore, in a grey or palette picture")
            label = label.short()
        rows.append(((255 * v.image).round().byte(), v.K, v.c2w, depth, normal, label))
    images, K, c2w, *maps = zip(*rows)
    stack = lambda column, empty: torch.stack(column) if any(x is not empty for x in column) else empty.expand(len(rows), *empty.shape)
    return Views(where, torch.stack(images), torch.stack(K), torch.stack(c2w), *map(stack, maps, unknown))


def plain_folder(folder, args):
    """Images without poses, `images/` and beside it `depth/ normals/ labels/`: a Scene to train on and one held out, from the
    folders `train/` and `val/`; where there are none every eighth image is held out."""
    parts = []
    for root in [folder / "train", folder / "val"] if (folder / "train").is_dir() else [folder]:
        files = sorted((f for f in (root / "images").rglob("*") if f.suffix in data.IMAGE_TYPES), key=data.natural)
        K = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # a stand-in that no probe of single images looks at
        parts.append([data.Frame(f.stem, f, K, np.eye(4), None, **data.maps_beside(f, root)) for f in files])
        if len(files) < 2:
            raise data.DataError(f"{root}: {len(files)} images in images/; give at least two")
        for frame in parts[-1]:
            if problem := data.problem_of(frame):
                raise data.DataError(f"{problem}; mend or remove the file")
            frame.c2w = np.full((4, 4), np.nan)  # unknown: such views make no pairs
    if len(parts) == 1:
        first = min(7, len(parts[0]) - 1)
        parts = [[f for i, f in enumerate(parts[0]) if i < first or (i - first) % 8], parts[0][first::8]]
    return [[data.Scene(name, frames, args.depth_scale)] for name, frames in zip(("train", "val"), parts)]


class ListedPair(data.Scene):
    """Two views that a list of pairs names."""


def read_pairs(file, args):
    """SuperGlue's list, a line nameA nameB rotA rotB K_A(9) K_B(9) T_AB(16), X_B = T_AB X_A: a ListedPair a line."""
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
            raise data.DataError(f"{file}: line {number} is not two names, two zeros and 34 numbers, as SuperGlue writes pairs "
                                 "(what it turns must be upright already)") from None
        frames = []
        for name, K, c2w in zip(names, values[2:20].reshape(2, 3, 3), poses):
            image = data.inside(root / name, root, str(file))
            frames.append(data.Frame(name, image, K, c2w, None, **data.maps_beside(image, file.parent)))
            if problem := data.problem_of(frames[-1]):
                raise data.DataError(f"{file}: line {number}: {problem}")
        scenes.append(ListedPair(f"pair {number}", frames, args.depth_scale))
    if not scenes:
        raise data.DataError(f"{file}: no pairs in it; a line is nameA nameB rotA rotB K_A K_B T_AB")
    return scenes


def open_split(args):
    """-> scenes to train on, held-out scenes, whatever --scene_dir is. Of a single scene every eighth view is held out."""
    path = Path(args.scene_dir)
    if path.is_file():
        return [], read_pairs(path, args)
    if ((path / "images").is_dir() or (path / "train" / "images").is_dir()) and not data.find_scenes(path):
        return plain_folder(path, args)
    scenes = data.open_scenes(path, args.skip_bad_frames)
    if len(scenes) > 1:
        return data.split(scenes, "train"), data.split(scenes, "val")
    hidden = data.held_out_views(scenes[0])
    return [scenes[0].subset([i for i in range(len(scenes[0])) if i not in hidden])], [scenes[0].subset(hidden)]


# ------------------------------------------------------------------------------------------------ frozen features


class Features(NamedTuple):
    cls: Tensor  # (I, C) float16
    patches: Tensor  # (I, h, w, C) float16


def parts_of(path):  # of `a+b`: the models whose channels stand side by side; a path that exists may have a + in it
    pieces, parts = path.split("+"), []
    while pieces:
        count = next((n for n in range(len(pieces), 1, -1) if Path("+".join(pieces[:n])).exists()), 1)
        parts.append("+".join(pieces[:count]))
        pieces = pieces[count:]
    return parts


def content_key(vit, layer, images: Tensor) -> str:
    """A name for the features of these images by these weights: any change of either gives another."""
    digest = hashlib.sha256(f"{layer} {vit.patch} {vit.heads} {vit.positions} {tuple(images.shape)}".encode())
    for x in [*vit.state_dict().values(), images]:
        digest.update(x.contiguous().numpy())
    return digest.hexdigest()[:24]


@torch.no_grad()
def extract(path, images: Tensor, layer, cache, device) -> Features:
    """Tokens of `images` (I, 3, H, W) uint8 by the weights at `path`, or of the folder `cache` if they are there already.

    layer "block": what the last block puts out; "norm": after the final LayerNorm. Sides that are no multiples of the patch are
    rescaled to the nearest one. A path `a+b` is two models, side by side, as FiT3D is scored.
    """
    # Differs: pictures are normalised by ImageNet's mean and deviation (inside the ViT); the official correspondence takes 0.5.
    if len(parts_of(path)) > 1:
        parts = [extract(part, images, layer, cache, device) for part in parts_of(path)]
        return Features(*(torch.cat(column, -1) for column in zip(*parts)))
    vit = lift.load_vit(path)
    file = Path(cache) / f"{content_key(vit, layer, images)}.safetensors"
    try:
        return Features(**lift.read_checkpoint(file))
    except (TypeError, ValueError):
        pass  # not there, or damaged
    if layer == "block":
        vit.norm = nn.Identity()
    vit, batches = vit.to(device), []
    h, w = (max(1, round(side / vit.patch)) for side in images.shape[2:])
    for batch in tqdm(images.split(max(1, 2**14 // (h * w))), desc=f"features of {path}", leave=False):
        batch = batch.to(device).float() / 255
        if batch.shape[2:] != (h * vit.patch, w * vit.patch):
            batch = F.interpolate(batch, (h * vit.patch, w * vit.patch), mode="bilinear", antialias=True)
        cls, _, patches = vit(batch)
        batches.append((cls.half().cpu(), patches.half().cpu().unflatten(1, (h, w))))
    features = Features(*(torch.cat(column) for column in zip(*batches)))
    if not all(x.isfinite().all() for x in features):
        raise ValueError(f"{path}: its tokens are not finite in 16 bits; are the weights whole?")
    lift.save_tensors(file, features._asdict())
    return features


# ------------------------------------------------------------------------------------------------ linear heads


def whitening(x: Tensor, floor):
    """(M, C) -> mean (C,) and a map (C, C). A direction of the standardised channels whose variance is v, 1 on average, has
    v / (v + floor) in (x - mean) @ map: a small floor makes all directions alike but those that hardly vary."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    varies = deviation > max(1e-3 * deviation.max(), 1e-6)
    deviation = torch.where(varies, deviation, 1.0)  # a channel that never varies, as CLS of a single image, is only centred
    x = (x - mean) / deviation
    variance, directions = torch.linalg.eigh(x.T @ x / len(x))
    return mean, directions / (variance.clamp_min(0) + floor).sqrt() / deviation[:, None]


class LinearHead(nn.Module):
    """Whitened tokens, with CLS beside each or not -> one linear layer -> (B, channels, h, w)."""

    def __init__(self, tokens: Features, channels, with_cls, seed):
        super().__init__()
        # Differs: tokens are whitened by the training views, CLS in part. A linear layer can read just the same off them.
        # Where channels are much alike, steps of gradient would not bring it there. CLS varies too little: there is one an image.
        patches = tokens.patches.flatten(0, 2)
        some = patches[torch.linspace(0, len(patches) - 1, min(len(patches), 2**16), dtype=torch.float64).long()]
        for name, x, floor in (("patch", some, 0.01), ("cls", tokens.cls, 1.0)):
            mean, whiten = whitening(x.float(), floor)
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_whiten", whiten)
        self.with_cls, self.linear = with_cls, nn.Linear(len(self.patch_mean) * (1 + with_cls), channels)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, cls, patches):  # (B, C), (B, h, w, C)
        x = (patches - self.patch_mean) @ self.patch_whiten
        if self.with_cls:
            x = torch.cat([x, ((cls - self.cls_mean) @ self.cls_whiten)[:, None, None].expand(x.shape)], -1)
        return self.linear(x).permute(0, 3, 1, 2)


def resize(maps: Tensor, size) -> Tensor:  # (B, C, h, w) -> (B, C, *size), patches by their centres
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def four_times(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, 4h, 4w). A.4 upscales the tokens; a linear layer commutes with that and puts out less."""
    return resize(maps, [4 * side for side in maps.shape[2:]])


def fit(name, head: LinearHead, tokens: Features, truth: Tensor, known: Tensor, decode, loss, r: Recipe):
    """Train `head` on views of which something is known (I, H, W); `decode` brings what it puts out to the size of the truth
    (I, H, W, ...). -> a function from tokens and a last step, `finish`, to the prediction of all their views."""
    size, usable = truth.shape[1:3], known.flatten(1).any(1).nonzero()[:, 0]
    generator, head = torch.Generator().manual_seed(r.seed), head.to(r.device)
    run = lambda some: decode(head(*(x.to(r.device).float() for x in some)), size)
    optimiser = torch.optim.AdamW(head.parameters(), r.lr, weight_decay=0.01)
    for step in (bar := tqdm(range(r.steps), desc=name, unit="step", leave=False)):
        pick = usable[torch.randint(len(usable), (r.batch,), generator=generator)]
        value = loss(run(x[pick] for x in tokens), truth[pick].to(r.device))
        if not value.isfinite():
            raise ValueError(f"{name}: the loss is {value.item()} at step {step}; are the {name} of these views sound?")
        # Differs: a warm-up and cosine decay for all heads; A.4 says so of normals alone.
        optimiser.param_groups[0]["lr"] = r.lr * min(20 * (step + 1) / r.steps, 0.5 + 0.5 * math.cos(math.pi * step / r.steps))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        if r.log and (step % 50 == 0 or step + 1 == r.steps):
            bar.set_postfix(loss=f"{value.item():.4f}")
            r.log.write(json.dumps(dict(head=name, step=step, loss=round(value.item(), 6))) + "\n")

    @torch.no_grad()
    def predict(tokens: Features, finish=lambda maps: maps):
        views = max(1, 2**18 // math.prod(size))  # at once: the scores of 150 classes are large
        return torch.cat([finish(run(some)).cpu() for some in zip(*(x.split(views) for x in tokens))])
    return predict


# ------------------------------------------------------------------------------------------------ depth, normals, segmentation


def mean_of(rows, names) -> dict:  # rows of scores -> {name: mean}
    return dict(zip(names, torch.tensor(rows).mean(0).tolist()))


def expected_depth(logits: Tensor, bins: Tensor) -> Tensor:  # (B, K, h, w), (K,) -> (B, h, w) (A.4, as AdaBins)
    share = logits.relu().permute(0, 2, 3, 1)  # each + 0.1; the sums of that are added to sums
    depth, total = (share @ torch.stack([bins, torch.ones_like(bins)], 1)).unbind(-1)
    return (depth + 0.1 * bins.sum()) / (total + 0.1 * len(bins))


def sig_loss(depth: Tensor, truth: Tensor) -> Tensor:
    """Scale-invariant error of log depth where truth is known (Eigen et al. 2014); any shape."""
    # Differs: A.4 writes "classification loss"; this is the official code's, whose other loss is 0 at its batch size.
    g = (depth[truth > 0] + 1e-3).log() - (truth[truth > 0] + 1e-3).log()
    return (g.square().mean() - 0.85 * g.mean().square()).clamp_min(1e-12).sqrt()


def depth_metrics(depth: Tensor, truth: Tensor) -> dict:
    """AbsRel, RMSE in the data's unit, delta1 in %, (I, H, W) both; where truth is known, then the mean over images."""
    rows = []
    for z, true in zip(depth, truth):
        if (known := true > 0).any():
            z, true = z[known].double(), true[known].double()
            near = torch.maximum(z / true, true / z.clamp_min(1e-9)) < 1.25
            rows.append((((z - true).abs() / true).mean(), (z - true).square().mean().sqrt(), 100 * near.double().mean()))
    return mean_of(rows, ("AbsRel", "RMSE", "delta1"))


def depth_probe(tokens: Features, truth: Tensor, val_tokens: Features, val_truth: Tensor, r: Recipe, with_cls=True):
    """What a linear layer reads of z-depth off frozen tokens -> (depth_metrics, depth) of the val views; truth (I, H, W)."""
    bins = torch.linspace(1e-3, truth.max().item(), DEPTH_BINS, device=r.device)
    decode = lambda logits, size: resize(expected_depth(four_times(logits), bins)[:, None], size)[:, 0]
    head = LinearHead(tokens, DEPTH_BINS, with_cls, r.seed)
    depth = fit("depth", head, tokens, truth, truth > 0, decode, sig_loss, r)(val_tokens)
    return depth_metrics(depth, val_truth), depth


def angular_loss(maps: Tensor, truth: Tensor) -> Tensor:
    """Minus the log-likelihood of the true normals (B, H, W, 3), 0 = unknown (Bae et al. 2021, Eq. 3). maps (B, 4, H, W): a
    direction, of any length, and how sure of it the head is, kappa before its ELU."""
    known = (truth != 0).any(-1)
    maps, truth = maps.permute(0, 2, 3, 1)[known], truth[known].to(maps)
    angle = F.cosine_similarity(maps[:, :3], truth, dim=-1).clamp(-1 + 1e-4, 1 - 1e-4).acos()  # whose slope at 1 is infinite
    kappa = F.elu(maps[:, 3]) + 1 + 0.01
    return (kappa * angle + (-math.pi * kappa).exp().log1p() - (kappa.square() + 1).log()).mean()


def normal_metrics(normal: Tensor, truth: Tensor) -> dict:
    """RMSE of the angle in degrees, % within 11.25, 22.5, 30; (I, H, W, 3) both; where truth is known, mean over images."""
    rows = []
    for n, true in zip(normal, truth):
        if (known := (true != 0).any(-1)).any():
            n, true = n[known].double(), true[known].double()
            angle = torch.atan2(torch.linalg.cross(n, true).norm(dim=-1), (n * true).sum(-1)).rad2deg()  # acos is blunt near 0
            rows.append([angle.square().mean().sqrt()] + [100 * (angle < limit).double().mean() for limit in (11.25, 22.5, 30)])
    return mean_of(rows, ("RMSE", "11.25", "22.5", "30"))


def normal_probe(tokens: Features, truth: Tensor, val_tokens: Features, val_truth: Tensor, r: Recipe):
    """What a linear layer reads of surface normals -> (normal_metrics, normals) of the val views. truth (I, H, W, 3), in any
    frame that all views keep to."""
    decode = lambda maps, size: resize(four_times(maps), size)
    predict = fit("normals", LinearHead(tokens, 4, False, r.seed), tokens, truth, (truth != 0).any(-1), decode, angular_loss, r)
    normal = predict(val_tokens, lambda maps: F.normalize(maps[:, :3], dim=1).permute(0, 2, 3, 1))
    return normal_metrics(normal, val_truth), normal


def segmentation_metrics(label: Tensor, truth: Tensor, classes) -> dict:
    """aAcc, mIoU, mAcc in % from one confusion matrix of all pixels of known truth (I, H, W), and the IoU of each class.

    mIoU is over classes that truth or prediction has, mAcc over those that truth has; the IoU of the others is None.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.double)
    for true, said in zip(truth, label):
        pairs = true[true != 255].long() * classes + said[true != 255].long()
        confusion += pairs.bincount(minlength=classes**2).view(classes, classes)
    hit, true, said = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = 100 * hit / (true + said - hit)  # NaN where neither has the class
    scores = dict(aAcc=100 * hit.sum() / true.sum(), mIoU=iou.nanmean(), mAcc=(100 * hit / true).nanmean())
    return {name: x.item() for name, x in scores.items()} | {"IoU": [None if x.isnan() else x.item() for x in iou]}


def class_count(*labels):
    return 1 + max(int(torch.where(view == 255, 0, view).max()) for x in labels for view in x)


def segmentation_probe(tokens: Features, truth: Tensor, val_tokens: Features, val_truth: Tensor, r: Recipe):
    """How well a linear layer tells classes -> (segmentation_metrics, classes) of the val views. truth (I, H, W) int."""
    classes = class_count(truth, val_truth)
    loss = lambda scores, truth: F.cross_entropy(scores, truth.long(), ignore_index=255)
    predict = fit("segmentation", LinearHead(tokens, classes, False, r.seed), tokens, truth, truth != 255, resize, loss, r)
    label = predict(val_tokens, lambda scores: scores.argmax(1).short())
    return segmentation_metrics(label, val_truth, classes), label


# ------------------------------------------------------------------------------------------------ correspondence


class Pair(NamedTuple):
    a: int  # index into Views
    b: int
    angle: float  # degrees that the camera turns between them
    measured: bool  # both have depth, so errors are those of points; else of epipolar lines


def measured(views: Views, *indices) -> bool:  # enough depth in all of them to match points by
    return all((views.depth[i] > 0).float().mean() > 0.01 for i in indices)


def covisible(views: Views, a, b) -> float:
    """The share of view a that view b sees, or of b that a sees: the smaller. By depth if both have it, else by frustums."""
    if not measured(views, a, b):
        return data.overlap(views.where[a][0], views.where[a][1], views.where[b][1])
    shares = []
    for u, v in ((a, b), (b, a)):
        u_to_v = torch.linalg.inv(views.c2w[v]) @ views.c2w[u]
        seen = lift.cross_check(views.depth[u], views.depth[v], views.K[u], views.K[v], u_to_v) > 0.5
        shares.append(seen[views.depth[u] > 0].float().mean().item())
    return min(shares)


def choose_pairs(views: Views, per_bin, seed) -> list[Pair]:
    """Up to `per_bin` pairs of views of one scene in each range of viewpoint change, those with depth if there are any."""
    # Differs: pairs share a fifth of what they see, and each range has as many; in the paper SuperGlue's list of ScanNet pairs.
    generator, of_scene = torch.Generator().manual_seed(seed), {}
    for i, (scene, _) in enumerate(views.where):
        if views.c2w[i].isfinite().all():
            of_scene.setdefault(scene, []).append(i)
    a, b = torch.cat([torch.empty(0, 2).long(), *(torch.combinations(torch.tensor(members)) for members in of_scene.values())]).T
    R = views.c2w[:, :3, :3].double()
    angle = (((R[a] * R[b]).sum((1, 2)) - 1) / 2).clamp(-1, 1).acos().rad2deg()  # that sum is the trace of R_a' R_b
    deep = torch.tensor([measured(views, i) for i in range(len(views.images))])[torch.stack([a, b])].all(0)
    for is_measured, candidates in ((True, deep), (False, ~deep)):
        found = []
        for low, high in VIEWPOINTS.values():
            inside, good = (candidates & (low <= angle) & (angle < high)).nonzero()[:, 0], []
            for n in inside[torch.randperm(len(inside), generator=generator)[:40 * per_bin]].tolist():
                i, j = a[n].item(), b[n].item()
                listed = isinstance(views.where[i][0], ListedPair)
                if len(good) < per_bin and (listed or covisible(views, i, j) >= 0.2):
                    good.append(Pair(i, j, angle[n].item(), is_measured))
            found += good
        if found:
            return found
    return []


def sample_points(tokens: Tensor, depth: Tensor):
    """Four points a patch's side, where depth is known: pixel centres (M, 2) x y, features (M, C) there, depth (M,).

    tokens (h, w, C), depth (H, W), 0 = unknown. A feature is interpolated at the very pixel whose depth is taken.
    """
    # Differs: the official code samples 120x160 points whatever the patch, and calls their spacing, 4 pixels, a pixel.
    rows, cols = (((torch.arange(4 * n) + 0.5) * side / (4 * n)).long() for n, side in zip(tokens.shape, depth.shape))
    z = depth[rows[:, None], cols]
    points = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1)[z > 0] + 0.5
    grid = (2 * points / torch.tensor(depth.shape[::-1]) - 1).to(tokens)
    features = F.grid_sample(tokens.permute(2, 0, 1)[None], grid[None, None], padding_mode="border", align_corners=False)
    return points, features[0, :, 0].T, z[z > 0]


def nearest_with_ratio(a: Tensor, b: Tensor):
    """For each unit row of a (M, C) the nearest of b by cosine, and 1 - the ratio of the two nearest distances: 1 is sure."""
    index, sure = [], []
    for rows in a.split(max(1, 2**26 // len(b))):
        similarity, nearest = (rows @ b.T).topk(2, dim=1)
        near, second = (1 - similarity).clamp_min(1e-9).unbind(1)
        index, sure = index + [nearest[:, 0]], sure + [1 - near / second]
    return torch.cat(index).cpu(), torch.cat(sure).cpu()


def match(a: Tensor, b: Tensor, count=MATCHES):
    """Features (M, C), (L, C) -> indices into both of the `count` surest matches, half of them found from each side."""
    # Differs: Probe3D can match both ways, as here, but its published script matches one way.
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    (to_b, sure_a), (to_a, sure_b) = nearest_with_ratio(a, b), nearest_with_ratio(b, a)
    best_a, best_b = (sure.topk(min(count // 2, len(sure))).indices for sure in (sure_a, sure_b))
    return torch.cat([best_a, to_a[best_b]]), torch.cat([to_b[best_a], best_b])


def reprojection_error(
    a: Tensor,  # (M, 2) pixels of view a
    b: Tensor,  # (M, 2) pixels of view b
    depth: Tensor,  # (M,) z-depth at a
    K_a: Tensor,  # (3, 3)
    K_b: Tensor,  # (3, 3)
    a_to_b: Tensor,  # (4, 4) camera to camera
) -> Tensor:
    """How many pixels of view b each match is from where its point of view a truly is, (M,); infinite behind the camera."""
    points = F.pad(a, (0, 1), value=1.0) @ torch.linalg.inv(K_a).T * depth[:, None]
    x, y, z = ((points @ a_to_b[:3, :3].T + a_to_b[:3, 3]) @ K_b.T).unbind(1)
    return torch.where(z > 1e-6, (torch.stack([x, y], 1) / z[:, None] - b).norm(dim=1), torch.inf)


def epipolar_error(a: Tensor, b: Tensor, K_a: Tensor, K_b: Tensor, a_to_b: Tensor) -> Tensor:
    """Where depth is unknown: how many pixels of view b each match is from the epipolar line of its point of view a, (M,). The
    true point lies on that line, so no match is farther from the line than it is wrong, and recall is an upper bound."""
    x, y, z = a_to_b[:3, 3].tolist()
    if x == y == z == 0:  # the camera only turned: where the point is does not depend on its depth
        return reprojection_error(a, b, torch.ones_like(a[:, 0]), K_a, K_b, a_to_b)
    essential = a_to_b.new_tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ a_to_b[:3, :3]
    fundamental = torch.linalg.inv(K_b).T @ essential @ torch.linalg.inv(K_a)
    lines = F.pad(a, (0, 1), value=1.0) @ fundamental.T
    return (F.pad(b, (0, 1), value=1.0) * lines).sum(1).abs() / lines[:, :2].norm(dim=1)


class Matches(NamedTuple):
    a: Tensor  # (M, 2) pixels of view a
    b: Tensor  # (M, 2) pixels of view b
    error: Tensor  # (M,) pixels
    by_chance: Tensor  # (M,) the same when the matched points are paired at random


def match_pair(tokens: Features, views: Views, pair: Pair, device) -> Matches:
    depths = [views.depth[i] if pair.measured else torch.ones_like(views.depth[i]) for i in (pair.a, pair.b)]
    (points_a, features_a, depth), (points_b, features_b, _) = (
        sample_points(tokens.patches[i].to(device).float(), z) for i, z in zip((pair.a, pair.b), depths))
    if min(len(points_a), len(points_b)) < 2:
        (scene, i), (_, j) = views.where[pair.a], views.where[pair.b]
        raise ValueError(f"{scene.name}: {scene.frames[i].name} or {scene.frames[j].name} has depth at less than two of the points "
                         "that are matched; change --pixels, or remove their depth to score by epipolar lines")
    index_a, index_b = match(features_a, features_b)
    cameras = views.K[pair.a], views.K[pair.b], torch.linalg.inv(views.c2w[pair.b]) @ views.c2w[pair.a]
    a, b = points_a[index_a], points_b[index_b]
    shuffle = torch.randperm(len(b), generator=torch.Generator().manual_seed(0))
    error = lambda b: reprojection_error(a, b, depth[index_a], *cameras) if pair.measured else epipolar_error(a, b, *cameras)
    return Matches(a, b, error(b), error(b[shuffle]))


def correspondence(tokens: Features, views: Views, pairs: list[Pair], device="cpu"):
    """How many matches between views are right, without training -> (scores, those of random matches, Matches of each pair).

    Scores are the % of matches within 5, 10, 20 pixels of the image ("10 px") or of the grid of matched points ("10 grid"), and
    1.5 patches, mean over pairs; then over those of each range of viewpoint change ("10 px 0-15", if there are any).
    """
    spacing = math.sqrt(views.images[0, 0].numel() / (16 * tokens.patches[0, ..., 0].numel()))  # pixels between matched points
    limits = {f"{t} px": t for t in THRESHOLDS} | {f"{t} grid": t * spacing for t in THRESHOLDS} | {"1.5 patches": 6 * spacing}
    matches = [match_pair(tokens, views, pair, device) for pair in tqdm(pairs, desc="correspondence", unit="pair", leave=False)]

    def recall(errors):
        rows, scores = [[100 * (e < limit).double().mean() for limit in limits.values()] for e in errors], {}
        for name, (low, high) in {"": (0, 181), **VIEWPOINTS}.items():
            if inside := [row for row, p in zip(rows, pairs) if low <= p.angle < high]:
                scores |= mean_of(inside, (f"{limit} {name}".strip() for limit in limits))
        return scores
    return recall([m.error for m in matches]), recall([m.by_chance for m in matches]), matches


# ------------------------------------------------------------------------------------------------ all probes of all models


class Probed(NamedTuple):
    """What came out for one model: numbers, and what pictures show."""
    scores: dict  # {"depth": {"AbsRel": ...}, "normals": ..., "segmentation": ..., "correspondence": ...}, what can be measured
    maps: dict  # {"depth": (4, H, W), ...} predictions of the shown views
    matches: list  # Matches of the shown pairs
    tokens: dict  # {index into Views: (h, w, C)} of the shown groups


def four_of(indices: Tensor) -> Tensor:  # evenly spread, always the same
    return indices[torch.linspace(0, len(indices) - 1, min(4, len(indices))).round().long()]


def shown_views(truth: Tensor, unknown) -> Tensor:  # four views of which something is known
    return four_of((truth != unknown).flatten(1).any(1).nonzero()[:, 0])


def shown_pairs(pairs):  # -> the number of the first pair of each range of viewpoint change
    firsts = [next((n for n, p in enumerate(pairs) if low <= p.angle < high), None) for low, high in VIEWPOINTS.values()]
    return [n for n in firsts if n is not None]


def shown_groups(val: Views, pairs):  # -> views whose features are drawn together: two pairs, or single views if none are
    return [pairs[n][:2] for n in shown_pairs(pairs)[-3:][:2]] or [(i,) for i in four_of(torch.arange(len(val.images))).tolist()]


def truths(train: Views | None, val: Views) -> dict:  # {probe: its maps of both splits}, where both know something
    found = {name: (getattr(train, key), getattr(val, key)) for name, key in TRUTH.items()} if train else {}
    return {name: both for name, both in found.items() if all((x != UNKNOWN[name]).any() for x in both)}


TRUTH = {"depth": "depth", "normals": "normal", "segmentation": "label"}  # of Views
UNKNOWN = {"depth": 0, "normals": 0, "segmentation": 255}
PROBES = {"depth": depth_probe, "normals": normal_probe, "segmentation": segmentation_probe}


def constants(maps: dict) -> dict:
    """The baseline's scores: the mean depth, mean normal and most frequent class of training views, said without looking."""
    scores = {}
    for name, (truth, val) in maps.items():
        if name == "depth":
            scores[name] = depth_metrics((sum(z.double().sum() for z in truth) / (truth > 0).sum()).float().expand(val.shape), val)
        elif name == "normals":
            scores[name] = normal_metrics(F.normalize(sum(n.float().sum((0, 1)) for n in truth), dim=0).expand(val.shape), val)
        else:
            classes = class_count(truth, val)
            counts = sum(view[view != 255].long().bincount(minlength=classes) for view in truth)
            scores[name] = segmentation_metrics(counts.argmax().expand(val.shape), val, classes)
    return scores


def probe(models: dict, train: Views | None, val: Views, pairs: list[Pair], args) -> dict:
    """{name: Probed} of models {name: path}, after the baseline, "no features". Heads train on `train`, are scored on `val`.

    A probe without truth in both splits is left out. One args.seed gives the same numbers, on one machine and count of threads.
    """
    maps, out = truths(train, val), Path(args.out)
    results = {"no features": Probed(constants(maps), {}, [], {})}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "w") as log:
        for name, path in tqdm(models.items(), desc="models", unit="model"):
            frozen = lambda views: views and extract(path, views.images, args.layer, out / "features", args.device)
            tokens, val_tokens = frozen(train), frozen(val)
            scores, said, matches = {}, {}, []
            for kind, (truth, val_truth) in maps.items():
                log.write(json.dumps(dict(model=name, head=kind)) + "\n")
                recipe = getattr(args, kind)._replace(seed=args.seed, device=args.device, log=log)
                more = [not args.no_cls] if kind == "depth" else []
                scores[kind], prediction = PROBES[kind](tokens, truth, val_tokens, val_truth, recipe, *more)
                said[kind] = prediction[shown_views(val_truth, UNKNOWN[kind])]
            if pairs:
                scores["correspondence"], chance, matches = correspondence(val_tokens, val, pairs, args.device)
                results["no features"].scores.setdefault("correspondence", chance)  # of the first model's matches
            drawn = {i: val_tokens.patches[i].float() for group in shown_groups(val, pairs) for i in group}
            results[name] = Probed(scores, said, [matches[n] for n in shown_pairs(pairs)], drawn)
    return results


# ------------------------------------------------------------------------------------------------ tables

COLUMNS = (  # probe, score, heading, digits
    ("depth", "AbsRel", "depth AbsRel ↓", 3), ("depth", "RMSE", "RMSE ↓", 3), ("depth", "delta1", "δ<1.25 % ↑", 1),
    ("normals", "RMSE", "normals RMSE ° ↓", 2), *(("normals", limit, f"<{limit}° % ↑", 1) for limit in ("11.25", "22.5", "30")),
    *(("segmentation", name, f"{name} % ↑", 1) for name in ("aAcc", "mIoU", "mAcc")),
    ("correspondence", "10 px", "recall 10 px % ↑", 1), ("correspondence", "10 grid", "10 px of the grid % ↑", 1),
    ("correspondence", "1.5 patches", "1.5 patches % ↑", 1))
LIMITS = [f"{t} {unit}" for unit in ("px", "grid") for t in THRESHOLDS] + ["1.5 patches"]
EPIPOLAR = "Epipolar recall (an upper bound)"  # where depth is not known
RECALLS = {"Recall, %": [("correspondence", limit, limit.replace("grid", "px of the grid"), 1) for limit in LIMITS]} | {
    f"Recall within {limit} by viewpoint, %": [("correspondence", f"{limit} {name}", f"{name}°", 1) for name in VIEWPOINTS]
    for limit in ("10 px", "1.5 patches")}


def table(scores: dict, columns):
    """-> headings, rows of texts, a model a row. The best of the models is **bold**; columns without a number are left out."""
    value = lambda model, column: scores[model].get(column[0], {}).get(column[1])
    columns = [c for c in columns if any(value(m, c) is not None for m in scores)]
    rows = {m: [m] for m in scores}
    for c in columns:
        texts = {m: "" if value(m, c) is None else f"{value(m, c):.{c[3]}f}" for m in scores}
        judged = [float(text) for text in list(texts.values())[1:] if text]
        best = (min if "↓" in c[2] else max)(judged) if len(judged) > 1 else None
        for n, (m, text) in enumerate(texts.items()):
            rows[m].append(f"**{text}**" if n and text and float(text) == best else text)
    return ["", *(c[2] for c in columns)], list(rows.values())


def markdown(headings, rows) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *rows])


def html_table(headings, rows) -> str:
    lines = [("th", headings), *(("td", row) for row in rows)]
    lines = ["".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) for tag, line in lines]
    bold = re.sub(r"[*]{2}(.*?)[*]{2}", r"<b>\1</b>", "".join(f"<tr>{line}</tr>" for line in lines))
    return f'<div class="wide"><table>{bold}</table></div>'


# ------------------------------------------------------------------------------------------------ pictures

COLOURS = torch.tensor([[150, 150, 150], [31, 119, 180], [214, 39, 40], [44, 160, 44], [148, 103, 189], [255, 127, 14], [140, 86, 75],
                        [227, 119, 194], [188, 189, 34], [23, 190, 207], [0, 0, 0]]) / 255  # the first is that of "no features"


def to_tensor(picture) -> Tensor:  # a Pillow image -> (3, H, W) in [0, 1]
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def rgb(colour) -> tuple:  # (3,) in [0, 1] -> what Pillow draws with
    return tuple(round(255 * float(c)) for c in colour)


def legend(width, entries) -> Tensor:  # entries (colour (3,) in [0, 1], text) -> (3, h, width), as many lines as they need
    font, x, y, places = ImageFont.load_default(14), 6, 6, []
    for colour, text in entries:
        needed = 30 + font.getlength(text)
        x, y = (6, y + 24) if x + needed > width and x > 6 else (x, y)
        places.append((x, y, colour, text))
        x += needed + 12
    picture = Image.new("RGB", (width, y + 28), "white")
    for x, y, colour, text in places:
        ImageDraw.Draw(picture).rectangle([x, y, x + 20, y + 16], fill=rgb(colour), outline=(120, 120, 120))
        ImageDraw.Draw(picture).text((x + 26, y), text, fill="black", font=font)
    return to_tensor(picture)


def colour_map(kind, map: Tensor, like: Tensor) -> Tensor:  # -> (3, H, W); depth on the scale of `like`, unknown black
    if kind == "depth":
        return data.colour_depth(map, like)
    if kind == "normals":
        return ((map.float() * torch.tensor([1.0, -1, -1]) + 1) / 2 * (map != 0).any(-1, keepdim=True)).permute(2, 0, 1)
    return data.colour_ids(torch.where(map == 255, 0, map.long() + 1))


def meanings(kind, maps, like, names):  # -> {text: an example (1, 1, ...) of what it stands for}
    if kind == "depth":
        levels = torch.linspace(*data.usual_range(like).tolist(), 5)
        return {f"{z:.1f}" + " in the data's unit" * (n == 4): z.view(1, 1) for n, z in enumerate(levels)}
    if kind == "normals":
        axes = torch.tensor([1.0, -1, -1]).diag().view(3, 1, 1, 3)
        return dict(zip(("faces right", "faces up", "faces the camera"), axes))
    seen = torch.cat([m.flatten().long() for m in maps]).unique()
    return {names[c] if c < len(names) else f"class {c}": c.view(1, 1) for c in seen if c != 255}


def maps_picture(path, kind, results, val: Views, truth: Tensor, names):
    """Rows are fixed held-out views: image | truth | each model (SnD Fig. 3, 4, 6). names: of classes, as far as known."""
    shown, models = shown_views(truth, UNKNOWN[kind]), [m for m in results if kind in results[m].maps]
    like, maps = truth[shown].flatten(0, 1), [truth[shown], *(results[m].maps[kind] for m in models)]
    rows = [[val.images[i] / 255, *(colour_map(kind, m[n], like) for m in maps)] for n, i in enumerate(shown)]
    entries = [(colour_map(kind, example, like)[:, 0, 0], text) for text, example in meanings(kind, maps, like, names).items()]
    return data.picture_grid(path, ["image", "truth", *models], rows, below=lambda width: legend(width, entries))


def error_colour(error) -> Tensor:  # pixels -> (3,): green where a match is right, red from the largest threshold on
    return torch.tensor([0.15, 0.65, 0.15]).lerp(torch.tensor([0.9, 0.1, 0.15]), min(1.0, error / THRESHOLDS[-1]))


def draw_matches(image_a, image_b, m: Matches, zoom) -> Tensor:  # -> both views side by side and 40 of the matches as lines
    picture = Image.fromarray(torch.cat([image_a, image_b], 2).permute(1, 2, 0).numpy())
    picture = picture.resize((zoom * picture.width, zoom * picture.height), Image.BICUBIC)
    draw, beside = ImageDraw.Draw(picture), torch.tensor([image_a.shape[2], 0])
    for n in torch.linspace(0, len(m.error) - 1, 40).round().long().tolist():
        ends, colour = [(zoom * p).tolist() for p in (m.a[n], m.b[n] + beside)], rgb(error_colour(m.error[n].item()))
        draw.line([*ends[0], *ends[1]], fill=colour)
        for x, y in ends:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
    return to_tensor(picture)


def matches_picture(path, results, val: Views, pairs):
    """Lines between matched points, by their error (SnD Fig. 5): a row a pair, one for each range of viewpoint change."""
    models, zoom = [m for m in results if results[m].matches], max(1, round(200 / val.images.shape[3]))
    shown = [pairs[n] for n in shown_pairs(pairs)]
    draw = lambda p, m: draw_matches(val.images[p.a], val.images[p.b], m, zoom)
    rows = [[draw(p, results[m].matches[k]) for m in models] for k, p in enumerate(shown)]
    off = "px off" if shown[0].measured else "px off the epipolar line"
    entries = [(error_colour(e), f"{e} {off}" + " or more" * (e == 20)) for e in (0, 10, 20)]
    return data.picture_grid(path, models, rows, scale=1, below=lambda width: legend(width, entries))


def recall_picture(path, scores: dict, measured=True, limit="10 px", width=480, height=340):
    """Recall over viewpoint change (SnD Fig. 7), a line a model, grey at random. Drawn twice as large for smooth lines."""
    sheet, font = Image.new("RGB", (2 * width, 2 * height), "white"), ImageFont.load_default(28)
    draw, colours = ImageDraw.Draw(sheet), {m: COLOURS[n and 1 + (n - 1) % (len(COLOURS) - 1)] for n, m in enumerate(scores)}
    at = lambda n, percent: (2 * (64 + n * (width - 110) / 3), 2 * (height - 42 - percent * (height - 84) / 100))
    limits = limit if measured else f"{limit} of the epipolar line"
    draw.text((24, 12), f"% of matches within {limits}, by viewpoint change", fill="black", font=font)
    for percent in range(0, 101, 20):
        draw.line([*at(-0.1, percent), *at(3.1, percent)], fill=(225, 225, 225), width=2)
        draw.text(at(-0.13, percent), str(percent), fill="black", font=font, anchor="rm")
    for n, name in enumerate(VIEWPOINTS):
        draw.text(at(n, -4), f"{name}°", fill="black", font=font, anchor="ma")
    for m, s in scores.items():
        recall = [s["correspondence"].get(f"{limit} {name}") for name in VIEWPOINTS]
        points = [at(n, percent) for n, percent in enumerate(recall) if percent is not None]
        draw.line([c for p in points for c in p], fill=rgb(colours[m]), width=4)
        for x, y in points:
            draw.ellipse([x - 8, y - 8, x + 8, y + 8], fill=rgb(colours[m]))
    chart = to_tensor(sheet.resize((width, height), Image.LANCZOS))
    picture = torch.cat([chart, legend(width, [(colour, m) for m, colour in colours.items()])], 1)
    Image.fromarray((255 * picture).round().byte().permute(1, 2, 0).numpy()).save(path)
    return path


def kmeans(x: Tensor, count=6, rounds=20) -> Tensor:
    """(M, C) -> the cluster (M,) of each row, by its direction from the mean. Starts from rows far apart: needs no seed."""
    x = F.normalize(x - x.mean(0), dim=1)
    centres = x[:1]
    while len(centres) < count:
        centres = torch.cat([centres, x[torch.cdist(x, centres).amin(1).argmax()][None]])
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(1)
        centres = torch.stack([x[nearest == c].mean(0) if (nearest == c).any() else centres[c] for c in range(count)])
    return nearest


def features_picture(path, tokens: dict, val: Views, groups):
    """Features as colours, one block a patch: PCA and k-means of each view alone, and of a pair together (SnD Fig. 13-14)."""
    rows, paired = [], len(groups[0]) > 1
    for group in groups:
        x = torch.stack([tokens[i] for i in group])  # (views, h, w, C)
        both = lift.pca_basis(x.flatten(0, 2)), kmeans(x.flatten(0, 2)).view(x.shape[:3])
        for k, i in enumerate(group):
            alone = lift.pca_basis(x[k].flatten(0, 1)), kmeans(x[k].flatten(0, 1)).view(x.shape[1:3])
            maps = [(alone[0], alone[1])] + [(both[0], both[1][k])] * paired
            colours = [c for basis, ids in maps for c in (lift.pca_colours(x[k], basis), data.colour_ids(1 + ids))]
            rows.append([val.images[i] / 255, *(F.interpolate(c[None], val.images.shape[2:])[0] for c in colours)])
    headings = ["image", "PCA, this view", "k-means, this view"] + ["PCA, both views", "k-means, both views"] * paired
    return data.picture_grid(path, headings, rows)


# ------------------------------------------------------------------------------------------------ the report

STYLE = """body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1100px;padding:12px;color:#222}h2{margin-top:1.6em}
.wide{overflow-x:auto}.wide img{max-width:100%}table{border-collapse:collapse;font-size:14px}pre{overflow-x:auto}
th,td{border-bottom:1px solid #ccc;padding:4px 7px;text-align:right;vertical-align:bottom}li{overflow-wrap:anywhere}
th:first-child,td:first-child{text-align:left;white-space:nowrap;position:sticky;left:0;background:#fff}"""


def in_words(setting) -> str:
    return "{0} steps of {2} views, learning rate {1:g}".format(*setting) if isinstance(setting, Recipe) else str(setting)


def changed_constants(args) -> list:  # what differs from Appendix A.4, in words
    changed = [f"{name}: {in_words(getattr(args, name))} (paper: {in_words(paper)})" for name, paper in PRESETS["paper"].items()
               if getattr(args, name) != paper]
    return changed + ["depth reads patch tokens alone (paper: CLS beside each)"] * args.no_cls


def draw_all(results, train, val, pairs, args):  # -> (title, caption, path) of each picture
    out, names = Path(args.out), data.CLASSES if data.rooms_made(args.scene_dir) else ()
    models = ", ".join(list(results)[1:])
    for kind, (_, truth) in truths(train, val).items():
        path = maps_picture(out / f"{kind}.png", kind, results, val, truth, names)
        yield kind.capitalize(), f"Held-out views. Columns: image, truth, {models}. Black is unknown.", path
    if pairs:
        angles = ", ".join(f"{pairs[n].angle:.0f}°" for n in shown_pairs(pairs))
        path = matches_picture(out / "matches.png", results, val, pairs)
        yield "Correspondence", f"40 of the matches of each pair. Columns: {models}. Rows: the camera turns by {angles}.", path
        path = recall_picture(out / "recall.png", {m: r.scores for m, r in results.items()}, pairs[0].measured)
        yield "Recall over viewpoint change", "Mean over the pairs of each range.", path
    for n, (m, r) in enumerate(list(results.items())[1:]):
        path = features_picture(out / f"features_{n}.png", r.tokens, val, shown_groups(val, pairs))
        yield f"Features of {m}", "One block a patch. In columns of both views, the two of a pair share their colours.", path


def web_page(result, columns, figures) -> str:
    """The report as one file: tables, figures (title, caption, path) with their pictures inside, and how it was made."""
    scores = result["scores"]
    items = lambda title, texts: f"<h2>{title}</h2><ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>"
    page = [f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>Probes of frozen features</title><style>{STYLE}</style><h1>Probes of frozen features</h1>"
            f"<p>{html.escape(result['about'])} Bold is the best model.</p>",
            html_table(*table(scores, columns))]
    for title, columns in RECALLS.items():
        if any("correspondence" in s for s in scores.values()):
            title = title if result["measured"] else title.replace("Recall", EPIPOLAR)
            page.append(f"<h2>{title}</h2>{html_table(*table(scores, columns))}")
    for title, caption, path in figures:
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        least = min(800, Image.open(path).width * 3 // 4)
        picture = f'<div class="wide"><img src="{source}" style="min-width:{least}px"></div>'  # phones scroll it
        page.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>{picture}")
    differs = re.findall(r"^\s*# Differs: (.*)$", Path(__file__).read_text(), re.M)
    page += [f"<h2>Command</h2><pre>{html.escape(result['command'])}</pre>",
             items("Settings", [f"{key}: {value}" for key, value in result["settings"].items()]),
             items("Constants that are not the paper's", result["changed"]),
             items("Where it differs from the paper and its code", differs)]
    return "".join(page)


def report(results: dict, train: Views | None, val: Views, pairs: list[Pair], args) -> str:
    """Writes results.json, the pictures and report.html, which holds them all; returns the table in Markdown."""
    out, scores = Path(args.out), {m: r.scores for m, r in results.items()}
    about = (f"{len(train.images) if train else 0} training views, {len(val.images)} held-out views, "
             f"{'x'.join(map(str, val.images.shape[2:]))}; {len(pairs)} pairs.")
    columns, measured = COLUMNS, not pairs or pairs[0].measured
    if pairs and measured:
        about += " Matches are scored by measured depth and the true pose."
    elif pairs:
        about += " No depth: matches are scored by the epipolar lines of the true pose, so recall is an upper bound."
        columns = [(*c[:2], ("epipolar " if c[0] == "correspondence" else "") + c[2].removeprefix("recall "), c[3]) for c in COLUMNS]
    about += " Depth RMSE is in the unit of the data." * any("depth" in s for s in scores.values())
    settings = {key: in_words(x) if isinstance(x, Recipe) else x for key, x in vars(args).items() if key != "command"}
    settings["torch"] = torch.__version__
    result = dict(command=args.command, about=about, measured=measured, settings=settings, changed=changed_constants(args), scores=scores)
    lift.write_whole(out / "results.json", json.dumps(result, indent=1).encode())
    lift.write_whole(out / "report.html", web_page(result, columns, draw_all(results, train, val, pairs, args)).encode())
    return f"{about}\n\n{markdown(*table(scores, columns))}\n"


# ------------------------------------------------------------------------------------------------ main

LAYOUTS = """
Images without poses: a folder with images/, and beside it depth/ normals/ labels/ (PNG or .npy, named like the image), all of
that once in train/ and once in val/, or once alone: then every eighth image is held out.
  NYUv2       images/: the 480x640 frames
              depth/: 16-bit PNG in millimetres; labels/: class ids, 255 = ignore
              normals/: unit vectors x right, y down, z forward, towards the camera; .npy, or PNG with -1 ... 1 as 0 ... 255
              --max_depth 10 --crop 0.09375 0.98125 0.0640625 0.9390625   (Eigen's crop)
  KITTI       images/: the frames of image_02
              depth/: the 16-bit PNG of the depth benchmark, 256 a metre
              --depth_scale 0.00390625 --max_depth 80 --crop 0.40810811 0.99189189 0.03594771 0.96405229   (Garg's crop)
  ADE20K      train/images/, val/images/: images/training, images/validation
              train/labels/, val/labels/: annotations/training, annotations/validation (150 classes, 0 = other); no crop
              --ignore_label 0
  Pascal VOC  train/images/, val/images/: the JPEGImages that ImageSets/Segmentation/train.txt and val.txt name
              train/labels/, val/labels/: their SegmentationClass (palette PNG, 0 = background, 255 = ignore)
              no flag, no crop
Pairs of images: --scene_dir pairs.txt, lines of nameA nameB rotA rotB K_A K_B T_AB as SuperGlue has them, and beside it images/
and, if there is one, depth/. Without depth, matches are scored by epipolar distance.
"""


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def parse(argv):
    parser = argparse.ArgumentParser(description="Probe frozen features: depth, normals, segmentation, correspondence.",
                                     epilog=LAYOUTS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scene_dir", default="data", help="scenes, images with maps or a list of pairs (below)")
    parser.add_argument("--out", default="out/05_probe", help="report, numbers, and features/, a cache that can be deleted")
    parser.add_argument("--models", nargs="+", help="'tiny', published names, files, folders; a+b puts features of two side "
                        "by side, name=a gives it a name; views are sized to the first's patches (default: tiny, and "
                        "out/04_distill/student if it is there)")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="how heads train, and flags marked [preset]")
    parser.add_argument("--pixels", type=positive, help="pixels a view; raise it for models of larger patches [preset]")
    parser.add_argument("--views", type=positive, help="views a scene; lower it when memory runs out [preset]")
    parser.add_argument("--pairs", type=positive, help="pairs in each range of viewpoint change [preset]")
    parser.add_argument("--max_steps", type=positive, help="at most so many steps a head, for a quick look")
    parser.add_argument("--layer", choices=("block", "norm"), default="block", help="tokens before or after the last LayerNorm")
    parser.add_argument("--no_cls", action="store_true", help="depth reads patch tokens alone")
    parser.add_argument("--max_depth", type=float, help="truth beyond it is not used (default: all of it is)")
    parser.add_argument("--crop", type=float, nargs=4, default=(0, 1, 0, 1), metavar=("TOP", "BOTTOM", "LEFT", "RIGHT"),
                        help="truth outside is not used; in shares of height and width")
    parser.add_argument("--ignore_label", type=int, help="a class that is not scored, beside 255")
    parser.add_argument("--depth_scale", type=float, default=1e-3, help="unit of stored depth, of plain images and of pairs")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the heads and of the choice of pairs")
    args = parser.parse_args(argv)
    (top, bottom, left, right), deepest = args.crop, args.max_depth
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        parser.error("--crop: give shares, 0 <= TOP < BOTTOM <= 1 and 0 <= LEFT < RIGHT <= 1")
    if deepest is not None and not deepest > 0:
        parser.error(f"--max_depth: {deepest:g} is not above 0")
    for name, value in PRESETS[args.preset].items():
        value = value._replace(steps=min(value.steps, args.max_steps or value.steps)) if isinstance(value, Recipe) else value
        setattr(args, name, getattr(args, name, None) or value)
    student = "out/04_distill/student"
    args.models = args.models or ["tiny"] + [student] * Path(student).is_dir()
    args.command = shlex.join(["python", "05_probe.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def prepare(args):
    """-> {name: path}, training views or None, held-out views, pairs: what `probe` takes. Views fit the first's patches."""
    models = dict(text.split("=", 1) if "=" in text and not Path(text).exists() else (text, text) for text in args.models)
    if len(models) < len(args.models) or "no features" in models:
        raise ValueError("--models: two models have one name; name=path gives another")
    patches = {path: [lift.load_vit(part).patch for part in parts_of(path)] for path in models.values()}  # a wrong path ends it here
    train, val = open_split(args)
    size = data.fit_size(val[0], args.pixels, next(iter(patches.values()))[0])
    for path, of_parts in patches.items():
        if len(set(of_parts)) > 1:
            raise ValueError(f"{path}: patches of {' and '.join(map(str, of_parts))} pixels; channels side by side need one size")
        if min(size) < 2 * of_parts[0]:
            raise ValueError(f"--pixels {args.pixels} leaves {path} fewer than 2x2 patches of {of_parts[0]} pixels; raise it")
    train, val = (load_views(scenes, size, args) if scenes else None for scenes in (train, val))
    for name, key in TRUTH.items() if train else ():
        known = {split: bool((getattr(views, key) != UNKNOWN[name]).any()) for split, views in (("training", train), ("held-out", val))}
        if sum(known.values()) == 1:
            print(f"{name}: left out, as only {max(known, key=known.get)} views have its truth")
    pairs = choose_pairs(val, args.pairs, args.seed)
    if not pairs and not truths(train, val):
        raise data.DataError(f"{args.scene_dir}: no depth, normals or labels in both splits, and no pairs of views "
                             "that overlap; --help says where maps go")
    return models, train, val, pairs


def main(argv=None):
    args = parse(argv)
    with data.explained(args, "the same command goes on: features that were finished are kept, heads start again"):
        models, *views = prepare(args)
        print(report(probe(models, *views, args), *views, args))
        print(f"  ->  {Path(args.out) / 'report.html'}, {Path(args.out) / 'results.json'}")


if __name__ == "__main__":
    main()
