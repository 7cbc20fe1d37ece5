"""Distill3R: a pointmap network of 650 million parameters teaches one of 72 million, through a cache, on one GPU.

Paper   Distill3R Sec. III-A to III-D (Eq. 1-6), IV and Tables I-III; Fast3R (Yang et al. 2025) for the teacher.
In      a folder of photos or video frames, or posed views (01_data); weights of Fast3R and DUNE where there are any.
Out     out/06_distill3r/: cache/, student/, scene/ (point cloud, depth, cameras: 01_data reads it), pictures, log.jsonl.
Run     python 06_distill3r.py --preset tiny     cache, train, eval, infer on built-in rooms, no downloads: minutes on 2 cores
        python 06_distill3r.py cache --images photos/ --teacher model.safetensors     once; --shard 0/4 does a quarter of it
        python 06_distill3r.py train --images photos/ --encoder dune_vitsmall14_448.pth            torchrun for several GPUs
        python 06_distill3r.py infer --images holiday/ --weights out/06_distill3r/student            photos -> a posed scene
        python 06_distill3r.py eval  --scene_dir my_scene --models student               accuracy, completeness, calibration
        python 06_distill3r.py table                                              Table I: time and memory over the views
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py 06_distill3r.py tiny/vit.safetensors
Not     training of the teacher, bundle adjustment of the cameras, metric scale where the teacher has none.
Words   P^g points_global, P^l points_local; C conf; M masks, the valid pixels; tau the least certainty of one; w the weight of
        a pixel; s the scale that points are divided by; N views a sample. A view's id tells the fusion transformer which tokens
        are of one view; id 0 is the reference, whose camera is the frame of all global points.

Teacher and student are the same kind of network: an encoder a view, attention over all views, two heads a view. The teacher
looks at every sample once; what it says is kept on disk in a fifth of its size, and the student is trained on the files alone.
"""
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
from dataclasses import replace
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

data, lift, splat, distill = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat", "04_distill"))

VIEW_IDS = 1000  # rows in Fast3R's table of view codes, and so the most views in one call
SHARPER = math.sqrt(math.log(137) / math.log(20))  # 1.28: by so much the published student's logits grow in evaluation
PEAK = Path("/proc/self/clear_refs")  # Linux: writing "5" makes the process' peak memory its present one
FAST3R_PAGE, STUDENT_PAGE = "huggingface.co/jedyang97/Fast3R_ViT_Large_512", "github.com/TheFourthKaramazov/Distill3R"
FAR = 20.0  # in typical distances: what is farther is sky, or a mistake
CACHE_FORMAT = "pointmaps 1"  # to be raised with every change of the file's layout or of what is in it
SEAL = rb'{\"sha256\": \"'  # what stands before the checksum in the header of a cached sample

PRESETS = {  # "full" is the paper's setting (Sec. IV): 60 epochs of 22,500 samples in steps of 16
    "tiny": dict(encoder="tiny", size=(48, 64), views=4, stride=1, max_steps=1200, batch=1, lr=5e-4, final_lr=1e-5,
                 encoder_share=0.1, warmup=100, mirror=True, bf16=False),
    "full": dict(encoder="dune_vitsmall14_448", size=(224, 518), views=20, stride=None, max_steps=84_375, batch=16, lr=1e-4,
                 final_lr=5e-5, encoder_share=1.0, warmup=3_500, mirror=False, bf16=True)}
NOT_OF_TRAINING = ("command", "cache", "weights", "teacher", "models", "counts", "shard", "at_once", "stride", "images",
                   "scene_dir", "any_size")  # flags that may differ between a run and its continuation


class Pointmap(NamedTuple):
    """What a network says of one view (Distill3R Sec. III-A). No unit: only ratios of lengths mean something."""
    points_global: Tensor  # (H, W, 3) frame of view 0's camera, shared by all views of the call
    points_local: Tensor  # (H, W, 3) frame of the view's own camera
    conf_global: Tensor  # (H, W) in (1, inf)
    conf_local: Tensor  # (H, W) in (1, inf)


def certainty(conf: Tensor) -> Tensor:
    """Confidence in (1, inf) on a scale from 0 to 1: Fast3R's C = 1 + exp(x) becomes sigmoid(x)."""
    # Differs: the official code compares C itself with tau = 0.3; as C > 1, that filter never removes a pixel.
    return 1 - 1 / conf


# ------------------------------------------------------------------------------------------------ transformer blocks


def rotary_angles(h, w, head_dim, device=None) -> Tensor:
    """(N, 2, head_dim / 4): by how much RoPE turns the pairs of a head, the first half by the row, the second by the column."""
    D = head_dim // 2
    frequency = 100.0 ** (-torch.arange(0, D, 2, device=device) / D)
    place = torch.stack(torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"), -1)
    return place.view(-1, 2, 1) * frequency


def rotate(x: Tensor, angle: Tensor) -> Tensor:  # (B, heads, N, head_dim), (N, 2, head_dim / 4) -> x turned, in its own dtype
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, heads, N, 2, head_dim / 4): a pair is (a, b), not two neighbours
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -2).flatten(-3).to(x.dtype)


class Attention(lift.Attention):
    def forward(self, x, angle=None, scale=None):  # (B, N, C), of rotary_angles, of the logits
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads)
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


class Encoder(nn.Module):  # CroCo's ViT: no class token, places by RoPE
    def __init__(self, dim, heads, depth, patch):
        super().__init__()
        self.patch, self.head_dim = patch, dim // heads
        self.patch_embed = lift.PatchEmbed(patch, dim)
        self.enc_blocks = nn.ModuleList(Block(dim, heads, 1e-6) for _ in range(depth))
        self.enc_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):  # (B, 3, H, W) in [-1, 1] -> (B, N, C)
        angle = rotary_angles(images.shape[2] // self.patch, images.shape[3] // self.patch, self.head_dim, images.device)
        x = self.patch_embed(images)
        for block in self.enc_blocks:
            x = block(x, angle)
        return self.enc_norm(x)


# ------------------------------------------------------------------------------------------------ fusion of all views


def draw_view_ids(count, generator=None) -> list[int]:
    """0 for the reference view, distinct random ids of 1..999 for the others, number for number as Fast3R draws them.

    From `generator` (CPU) or torch's global one: the same state gives the same ids (Distill3R Sec. III-C, embeddings).
    """
    seed = torch.randint(0, 2**32, (1,), generator=generator).item()
    order = torch.randperm(VIEW_IDS - 1, generator=torch.Generator().manual_seed(seed))
    return [0, *(order[:count - 1] + 1).tolist()]


def view_codes(ids, dim) -> Tensor:  # -> (V, dim) fp32: a fixed table, sines first, no parameters
    # Differs: Sec. III-C adds a fixed embedding to the reference view; in the official codes that is row 0 of this table.
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.tensor(ids, dtype=torch.float64)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1).float()


class Fusion(nn.Module):
    """All tokens of all views look at each other; a view's code, added to its tokens, is all that tells whose they are."""

    def __init__(self, enc_dim, dim, heads, depth, sharper=False):
        super().__init__()
        self.dim, self.head_dim, self.sharper = dim, dim // heads, sharper
        self.hooks = depth // 2, depth * 3 // 4, depth  # the blocks whose output the heads see
        self.decoder_embed = nn.Linear(enc_dim, dim)
        self.dec_blocks = nn.ModuleList(Block(dim, heads, 1e-5) for _ in range(depth))
        self.dec_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens, ids, run):  # V of (N_v, C), V ids -> the four levels that the heads see, each V of (N_v, C)
        lengths, x = [len(t) for t in tokens], torch.cat(tokens)[None]
        levels = {0: x}
        codes = view_codes(ids, self.dim).to(x.device).repeat_interleave(torch.tensor(lengths, device=x.device), 0)
        x = self.decoder_embed(x) + codes  # fp32 from here on, in a bf16 autocast too
        scale = SHARPER / math.sqrt(self.head_dim) if self.sharper and not self.training else None
        for number, block in enumerate(self.dec_blocks, 1):
            x = run(block, x, None, scale)
            if number in self.hooks:
                levels[number] = x
        levels[self.hooks[-1]] = self.dec_norm(x)
        return [levels[n][0].split(lengths) for n in (0, *self.hooks)]


# ------------------------------------------------------------------------------------------------ DPT heads


class ResidualUnit(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.conv1, self.conv2 = lift.conv(features, features), lift.conv(features, features)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Refine(nn.Module):  # one step from coarse to fine; refinenet4's first unit is in the files, but there is no level to add
    def __init__(self, features):
        super().__init__()
        self.resConfUnit1, self.resConfUnit2 = ResidualUnit(features), ResidualUnit(features)
        self.out_conv = lift.conv(features, features, 1)

    def forward(self, x, skip=None):
        x = self.resConfUnit2(x if skip is None else x + self.resConfUnit1(skip))
        # The published order is interpolation, then 1x1 convolution: they commute, and this one is four times cheaper.
        return F.interpolate(self.out_conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class DPT(nn.Module):
    """Four levels of tokens -> 4 channels a pixel (Ranftl et al. 2021); module names are the published ones."""

    def __init__(self, patch, enc_dim, dec_dim, widths=(96, 192, 384, 768), features=256):
        super().__init__()
        a, b, c, d = widths
        self.act_postprocess = nn.ModuleList([  # to 4, 2, 1 and 1/2 times the grid of patches
            nn.Sequential(lift.conv(enc_dim, a, 1), nn.ConvTranspose2d(a, a, 4, 4)),
            nn.Sequential(lift.conv(dec_dim, b, 1), nn.ConvTranspose2d(b, b, 2, 2)),
            nn.Sequential(lift.conv(dec_dim, c, 1)),
            nn.Sequential(lift.conv(dec_dim, d, 1), lift.conv(d, d, 3, 2))])
        self.scratch = nn.ModuleDict({f"layer{n}_rn": lift.conv(x, features, bias=False) for n, x in enumerate(widths, 1)})
        self.scratch.update({f"refinenet{n}": Refine(features) for n in (1, 2, 3, 4)})
        half, to_pixels = features // 2, nn.Upsample(scale_factor=patch / 8, mode="bilinear", align_corners=True)
        self.head = nn.Sequential(lift.conv(features, half), to_pixels,
                                  lift.conv(half, half), nn.ReLU(inplace=True), lift.conv(half, 4, 1))

    def forward(self, levels):  # four of (B, C, h, w) -> (B, 4, H, W)
        one, two, three, four = (self.scratch[f"layer{n}_rn"](project(x))
                                 for n, (project, x) in enumerate(zip(self.act_postprocess, levels), 1))
        h, w = three.shape[-2:]
        x = self.scratch["refinenet4"](four)[..., :h, :w]  # an odd grid comes back one too large
        x = self.scratch["refinenet3"](x, three)
        x = self.scratch["refinenet2"](x, two)
        return self.head(self.scratch["refinenet1"](x, one))


def read_out(raw: Tensor):  # (B, 4, H, W) -> points (B, H, W, 3), confidence (B, H, W) in (1, inf)
    raw = raw.permute(0, 2, 3, 1).to(torch.promote_types(raw.dtype, torch.float32))  # bf16 would leave 8 bits
    distance = raw[..., :3].norm(dim=-1, keepdim=True)
    return raw[..., :3] / distance.clamp_min(1e-8) * distance.expm1(), 1 + raw[..., 3].exp()


# ------------------------------------------------------------------------------------------------ the networks


def blocks_of_views(images, at_once) -> list[list[int]]:  # indices of views of one size, at most `at_once` in a block
    by_size = {}
    for index, image in enumerate(images):
        by_size.setdefault(tuple(image.shape[-2:]), []).append(index)
    return [group[start:start + at_once] for group in by_size.values() for start in range(0, len(group), at_once)]


class PointmapNetwork(nn.Module):
    """Encoder a view, fusion of all views, two heads a view: what teacher and student have in common.

    model(images, view_ids, generator) -> a Pointmap a view. images: V of (3, H, W) in [0, 1], of any sizes whose sides are
    multiples of the patch; the first is the reference. view_ids: V of 0..999, else drawn from `generator` (draw_view_ids).
    Encoder and heads run on `at_once` views of one size at a time: their activations, most of the memory, do not add up.
    With `recompute` set, training keeps the inputs of the parts alone and repeats each part in the backward pass.
    """

    recompute = False

    def __init__(self, patch, encoder, decoder, *dpt_sizes):
        super().__init__()
        self.patch, self.encoder, self.decoder = patch, encoder, decoder
        self.downstream_head, self.downstream_head_local = (nn.ModuleDict({"dpt": DPT(patch, *dpt_sizes)}) for _ in range(2))

    def run(self, part, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def forward(self, images, view_ids=None, generator=None, at_once=8) -> list[Pointmap]:
        ids = self.checked_ids(images, view_ids, generator)
        return self.decode(images, self.fuse(self.encode(images, at_once), ids), at_once)

    def checked_ids(self, images, view_ids, generator):  # -> V ids, or ValueError for what cannot be run
        if not 0 < len(images) <= VIEW_IDS:
            raise ValueError(f"{len(images)} views in one call, but there are ids for 1 to {VIEW_IDS}; leave some out (--stride 2), or run "
                             "groups that begin with the same view: all have its frame then, each with a scale of its own")
        for index, image in enumerate(images):
            if image.ndim != 3 or len(image) != 3 or any(side < 1 or side % self.patch for side in image.shape[1:]):
                raise ValueError(f"view {index} is {tuple(image.shape)}; give (3, H, W), H and W multiples of {self.patch}")
        ids = draw_view_ids(len(images), generator) if view_ids is None else [int(i) for i in view_ids]
        if len(ids) != len(images) or not all(0 <= i < VIEW_IDS for i in ids):
            raise ValueError(f"view_ids: {len(ids)} for {len(images)} views; give one a view, each in 0..{VIEW_IDS - 1}")
        return ids

    def encode(self, images, at_once=8):  # -> V of (N_v, C)
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
            (points, conf), (points_local, conf_local) = (read_out(self.run(head["dpt"], grids))
                                                          for head in (self.downstream_head, self.downstream_head_local))
            for index, pointmap in zip(block, zip(points, points_local, conf, conf_local)):
                maps[index] = Pointmap(*pointmap)
        return maps


class Fast3R(PointmapNetwork):
    """The teacher, exactly as published (Yang et al. 2025): ViT-L encoder with RoPE, 24 fusion layers, 647,551,368 parameters.

    Module names are those of `model.safetensors`. The call is PointmapNetwork's, with patches of 16.
    """

    def __init__(self, enc_dim=1024, enc_heads=16, enc_depth=24, dec_dim=1024, dec_heads=16, dec_depth=24):
        encoder, fusion = Encoder(enc_dim, enc_heads, enc_depth, 16), Fusion(enc_dim, dec_dim, dec_heads, dec_depth)
        super().__init__(16, encoder, fusion, enc_dim, dec_dim)

    def tokens(self, images):  # (B, 3, H, W) in [0, 1] -> (B, N, C)
        return self.encoder(2 * images - 1)


class StudentConfig(NamedTuple):
    """Sizes of a student; the defaults are the published one's, 71,969,288 parameters. `StudentConfig.tiny` is for a CPU."""
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
    published: bool = True  # see Student
    size: tuple = (224, 518)  # (H, W) of the landscape pictures that it was trained on


StudentConfig.tiny = StudentConfig(8, 192, 3, 6, 2, 0, 16, 192, 3, 4, (24, 48, 96, 192), 32, False, (48, 64))  # on the `tiny` ViT
STUDENTS = {"tiny": StudentConfig.tiny, "full": StudentConfig()}


class Student(PointmapNetwork):
    """Distill3R's student (Sec. III-C): a ViT-S with DUNE's weights, a thin fusion transformer, two DPT heads.

    Module names are those of the official checkpoint. The call is PointmapNetwork's, with patches of `config.patch`.
    """

    # Differs: the published weights want pixels in [-1, 1], where DUNE learned with ImageNet's mean and deviation, and logits
    # 1.28 times larger in evaluation than in training. The paper has neither, nor have students trained here (published=False).
    def __init__(self, config=StudentConfig()):
        c = config
        # Differs: learned positions "following Fast3R" are the ViT's own, Fast3R has none.
        vit = lift.VisionTransformer(c.patch, c.enc_dim, c.enc_depth, c.enc_heads, c.registers, c.grid, c.mlp_ratio,
                                     positions="scale")
        fusion = Fusion(c.enc_dim, c.dec_dim, c.dec_heads, c.dec_depth, sharper=c.published)
        super().__init__(c.patch, vit, fusion, c.enc_dim, c.dec_dim, c.widths, c.features)
        self.config = config

    def tokens(self, images):  # (B, 3, H, W) in [0, 1] -> (B, N, C)
        if self.config.published:
            mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (lift.IMAGENET_MEAN, lift.IMAGENET_STD))
            images = (2 * images - 1) * std + mean  # the ViT takes this off again
        return self.encoder(images).patches


# ------------------------------------------------------------------------------------------------ weights


def find_network(path, remedy):  # a file, or a folder's model.safetensors -> that file, and config.json beside it as a dict
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
    """{our name: tensor} of a file: without Lightning's prefix and all that lacks it, without DUNE's chunks, each once."""
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


def load_fast3r(path) -> Fast3R:
    """Fast3R with its weights, in fp32 and evaluation mode: the published `model.safetensors` (712 tensors), its folder, or a
    training checkpoint (prefix `net.`). The tensors tell all sizes but the number of heads: that stands in config.json beside
    the file; without one they are 64 wide. Raises ValueError, one line naming the file, as `load_vit` does."""
    path, config = find_network(path, f"put model.safetensors and config.json of {FAST3R_PAGE} there")
    stored = network_tensors(path, "net.")
    encoder, decoder = (config.get(part, {}) for part in ("encoder_args", "decoder_args"))
    depth = lambda part: len({m[1] for name in stored if (m := re.match(rf"\w+\.{part}_blocks\.(\d+)\.", name))})
    try:
        enc_dim, dec_dim = (len(stored[name]) for name in ("encoder.enc_norm.weight", "decoder.dec_norm.weight"))
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; it is no Fast3R") from None
    model = built(Fast3R, enc_dim, encoder.get("num_heads", max(1, enc_dim // 64)), depth("enc"),
                  dec_dim, decoder.get("num_heads", max(1, dec_dim // 64)), depth("dec"))
    model.decoder.sharper = decoder.get("attn_bias_for_inference_enabled", False)
    return lift.load_strictly(model, stored, path)


def save_student(model: Student, folder):
    """Write `folder/{model.safetensors, config.json}`, which `load_student` reads, each file whole or not at all."""
    lift.save_tensors(Path(folder, "model.safetensors"), model.state_dict())
    lift.write_whole(Path(folder, "config.json"), json.dumps(model.config._asdict(), indent=1).encode())


def load_student(path) -> Student:
    """A student with its weights, in evaluation mode: a folder of `save_student`, or the official Lightning checkpoint (prefix
    `student.`), which has no config.json and the published sizes. Raises ValueError, one line, as `load_vit` does."""
    path, config = find_network(path, f"give the folder that `train` wrote, or the checkpoint that {STUDENT_PAGE} links to")
    try:
        config = StudentConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    except TypeError as error:
        raise ValueError(f"{path.with_name('config.json')}: not of a student ({error}); copy it again") from None
    return lift.load_strictly(built(Student, config), network_tensors(path, "student."), path)


def trained_size(path) -> tuple:
    """The size of pictures that a student at `path` was trained on; the published checkpoint has no config.json to tell."""
    config = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
    try:
        return tuple(json.loads(config.read_text())["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return StudentConfig().size


# ------------------------------------------------------------------------------------------------ loss (Distill3R Eq. 1-6)


class Loss(NamedTuple):
    total: Tensor  # Eq. 1: alpha_g global + alpha_l local + gamma confidence
    global_: Tensor  # Eq. 2, unweighted
    local: Tensor
    confidence: Tensor  # Eq. 6


def similarity(source: Tensor, target: Tensor, weight: Tensor | None = None):
    """(M, 3), (M, 3), (M,) -> s, R (3, 3), t (3,) in float64 that minimise sum w |s R source + t - target|^2 (Umeyama 1991).

    R is a rotation, never a reflection.
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


def aligned_global(view: Pointmap, mask: Tensor, quantile=0.85) -> Tensor:
    """(H, W, 3): the local points, moved as a whole onto the global ones where the global confidence is highest.

    Fitted on the valid pixels at or above that quantile of it, on all valid ones if those are fewer than 3.
    """
    if mask.sum() < 3:
        return view.points_local
    sure = mask & (view.conf_global >= view.conf_global[mask].float().quantile(quantile))
    sure = sure if sure.sum() >= 3 else mask
    s, R, t = similarity(view.points_local[sure], view.points_global[sure])
    return (s * view.points_local.double() @ R.T + t).to(view.points_local)


WEIGHTS = {  # w of Eq. 2 from the confidences of student and teacher
    "teacher": lambda student, teacher: teacher,
    "clamped": lambda student, teacher: (teacher / 10).clamp(0.1, 1),  # the official code's
    "student": lambda student, teacher: (student / 10).clamp(0.1, 1),  # Table III's; the gradient flows through it
    "none": lambda student, teacher: torch.ones_like(teacher)}


def pointmap_loss(
    pred: list[Pointmap],  # V of the student
    target: list[Pointmap],  # V of the teacher
    masks: list[Tensor],  # V of (H, W) bool, the valid pixels; elsewhere anything may stand, NaN too
    alpha_g=2.0,
    alpha_l=1.0,
    gamma=0.001,
    weight="teacher",  # see WEIGHTS
    mean="pixels",  # over all valid pixels, or over views of their means, as in the official code
    global_target="direct",  # the teacher's global map, or its local one "aligned" to that, as in the official code
) -> Loss:
    """The distillation loss of the views of one scene (Distill3R Sec. III-D); 0 where no pixel is valid.

    Student and teacher are each divided by their own scale, through which gradients flow.
    """
    assert weight in WEIGHTS and mean in ("pixels", "views") and global_target in ("direct", "aligned"), \
        f"no such loss: weight {weight!r}, mean {mean!r}, global_target {global_target!r}"
    # Differs: Eq. 1-6 as written; the official code clamps w, takes means of views, and aligns local targets to be global ones.
    # Differs: "the entire batch" of Eq. 4 is one scene, as in the official code; scenes have no scale in common.
    if global_target == "aligned":
        target = [view._replace(points_global=aligned_global(view, mask)) for view, mask in zip(target, masks)]
    # By indexing: a product with the mask would turn a NaN outside it into a NaN of the sum, as in the official code.
    at_valid = lambda maps: Pointmap(*(torch.cat([x[mask] for x, mask in zip(same, masks)]) for same in zip(*maps)))
    p, t = at_valid(pred), at_valid(target)  # (M, 3) and (M,), the valid pixels of all views
    t = Pointmap(*(x.to(p.conf_global) for x in t))
    counts = [int(mask.sum()) for mask in masks]  # |M_k|
    number = max(sum(counts), 1)  # |M|
    number_k = torch.tensor(counts).clamp_min(1).to(p.conf_global)
    view = torch.repeat_interleave(torch.tensor(counts, device=p.conf_global.device))  # (M,) which view a pixel is of

    def one_scale(points):  # Eq. 4
        return (points.norm(dim=-1).sum() / number).clamp_min(1e-8)

    def scale_of_view(points):  # Eq. 5, (M, 1)
        sums = torch.stack([lengths.sum() for lengths in points.norm(dim=-1).split(counts)])
        return (sums / number_k).clamp_min(1e-8)[view, None]

    def geometric(ours, theirs, conf, teacher_conf, scale):  # Eq. 2
        error = (ours / scale(ours) - theirs / scale(theirs)).square().sum(-1)
        share = 1 / number if mean == "pixels" else 1 / (len(masks) * number_k[view])
        return (share * WEIGHTS[weight](conf, teacher_conf) * error).sum()

    global_ = geometric(p.points_global, t.points_global, p.conf_global, t.conf_global, one_scale)
    local = geometric(p.points_local, t.points_local, p.conf_local, t.conf_local, scale_of_view)
    confidence = ((p.conf_global - t.conf_global).abs() + (p.conf_local - t.conf_local).abs()).sum() / (2 * number)  # Eq. 6
    return Loss(alpha_g * global_ + alpha_l * local + gamma * confidence, global_, local, confidence)  # Eq. 1 and 3


# ------------------------------------------------------------------------------------------------ teachers
# A teacher has an `identity`, says by `view_size` at which size it wants a picture of (H, W), and turns the views of a sample,
# and a generator for all that is random, into a Pointmap each. Points that it knows nothing of are NaN.


class NetworkTeacher:
    """Fast3R, or any network with its call: images -> pointmaps. Also the student, when it is measured."""

    def __init__(self, model, identity, view_size, device="cpu"):
        self.model, self.identity, self.view_size, self.device = model.to(device).eval(), identity, view_size, device

    @torch.no_grad()
    def __call__(self, views, generator) -> list[Pointmap]:
        maps = self.model([view.image.to(self.device) for view in views], generator=generator)
        return [Pointmap(*(part.float().cpu() for part in m)) for m in maps]


def fast3r_size(height, width, long_side=512, patch=16):
    """The size at which Fast3R looks at a picture: long side 512, both sides cut to whole patches."""
    # Differs: the official loader also cuts square pictures to 4:3.
    scale = long_side / max(height, width)
    return tuple(max(1, round(side * scale) // patch) * patch for side in (height, width))


def smooth_noise(height, width, generator) -> Tensor:
    """(H, W) of unit variance, alike over some 4 and some 16 pixels: a network's errors are no salt and pepper."""
    fields = [F.interpolate(torch.randn(1, 1, height // cell + 2, width // cell + 2, generator=generator),
                            (height, width), mode="bicubic", align_corners=False) for cell in (4, 16)]
    total = sum(fields)[0, 0]
    return total / total.std()


class GeometricTeacher:
    """The true geometry with the errors of a network: a teacher where no weights of one can be had.

    What is wrong with a depth, relative to it: noise and a pull towards the camera, both growing with depth, and at depth
    edges half of the way to the mean of the surroundings. Global maps have errors of their own, in a pose that is off too.
    The confidence is the one that DUSt3R's loss, C * error - 0.2 log C, makes best: 0.2 / expected error.
    """

    def __init__(self, size, strength=1.0):
        self.size, self.strength = tuple(size), strength
        self.identity = f"geometry, errors x {strength:g}"

    def view_size(self, height, width):
        return oriented(self.size, height, width)

    def disturbed(self, depth, typical, generator):  # (H, W) -> with errors, and the error to expect in typical depths
        window, far = 2 * (min(depth.shape) // 80) + 3, depth / typical
        around = lift.box_mean(depth, window) / lift.box_mean((depth > 0).to(depth), window).clamp_min(1e-9)
        noise, pull = 0.006 + 0.006 * far, 0.01 * far
        smear = 0.5 * (around - depth) / depth.clamp_min(1e-9)
        error = noise * smooth_noise(*depth.shape, generator) - pull + smear
        return depth * (1 + self.strength * error), self.strength * far * (noise**2 + pull**2 + smear**2).sqrt()

    def __call__(self, views, generator) -> list[Pointmap]:
        for view in views:
            if view.depth is None or view.c2w is None:
                raise data.DataError(f"{view.name}: no measured depth for the geometric teacher; give --teacher a network")
        world_to_first, maps = torch.linalg.inv(views[0].c2w), []
        for k, view in enumerate(views):
            known, rays, pose = view.depth > 0, lift.pixel_rays(view.K, *view.depth.shape), world_to_first @ view.c2w
            typical = view.depth[known].median() if known.any() else torch.tensor(1.0)
            (z, error), (z_global, error_global) = (self.disturbed(view.depth, typical, generator) for _ in range(2))
            turn, shift = self.strength * (k > 0) * torch.randn(2, 3, generator=generator) * torch.tensor([[0.004], [0.008]])
            turn = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), turn.expand(3, 3)))  # radians about an axis
            points = (rays * z_global[..., None]) @ (pose[:3, :3] @ turn).T + pose[:3, 3] + typical * shift
            pose_error = self.strength * (k > 0) * (0.008**2 + (0.004 * z_global / typical) ** 2) ** 0.5
            conf = [torch.where(known, 0.2 / e.clamp_min(1e-4), 1).clamp_min(1 + 2**-10)  # the float16 next to 1
                    for e in (torch.hypot(error_global, pose_error), error)]
            maps.append(Pointmap(*(torch.where(known[..., None], p, torch.nan) for p in (points, rays * z[..., None])), *conf))
        return maps


# ------------------------------------------------------------------------------------------------ manifest (Sec. III-B 1)


class Photo(NamedTuple):
    image: Path
    size: tuple  # (H, W) the right way up
    turn: Image.Transpose | None = None  # what brings it there: cameras store portrait photos lying, with a note to turn them


class Photos:
    """Pictures of one place without poses: as much of `data.Scene` as a pointmap network needs."""

    def __init__(self, name, paths):
        self.name, self.frames = name, [photo_at(path) for path in paths]

    def __len__(self):
        return len(self.frames)

    def view(self, i, size=None) -> data.View:
        """Picture i, scaled to cover `size` (H, W) and centre-cropped, as `data.Scene.view` does it; no camera, no maps."""
        path, stored, turn = self.frames[i]
        height, width = size or stored
        _, box = data.covering_crop(stored, (height, width))
        image = data.decode(path, colour=True)
        image = (image if turn is None else image.transpose(turn)).resize((width, height), Image.BICUBIC, box=box)
        return data.View(path.name, torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255, *[None] * 6)


TURNS = dict(enumerate((Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE, Image.ROTATE_270,
                        Image.TRANSVERSE, Image.ROTATE_90), 2))  # by the EXIF orientation


def photo_at(path) -> Photo:
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                note = int(image.getexif().get(0x0112, 1))
            except Exception:  # whatever a damaged note makes the reader raise, the picture is as it is
                note = 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise data.DataError(f"{path}: not a picture; restore it or pass --skip_bad_frames") from None
    return Photo(path, (width, height) if note in (5, 6, 7, 8) else (height, width), TURNS.get(note))


def photos_in(folder):
    return [path for path in folder.iterdir() if path.suffix in data.IMAGE_TYPES and path.name[0] != "."]


def is_whole(path):  # decoded to its end; says so where it cannot be
    try:
        return bool(data.decode(path))
    except data.DataError as error:
        print(f"left out: {error}")


@lru_cache(8)
def scene_folders(root):
    """{scene name: folder} of the posed scenes in `root`, or where it has none, of the folders of pictures."""
    root = Path(root)
    if not root.is_dir():
        raise data.DataError(f"{root}: no such folder; give a folder of photos, a scene, or a folder of scenes")
    found = [folder for folder, _ in data.find_scenes(root)]
    if found and root not in found and photos_in(root):
        print(f"{root}: the {len(photos_in(root))} pictures in it are left out, as there are posed scenes below")
    if not found:
        folders = [root, *(d for d in root.rglob("*") if d.is_dir() and "/." not in f"/{d.relative_to(root).as_posix()}")]
        maps = lambda folder: folder.name in ("masks", "depth", "normals", "labels") and folder.with_name("images").is_dir()
        found = sorted((folder for folder in folders if photos_in(folder) and not maps(folder)), key=data.natural)
    if not found:
        raise data.DataError(f"{root}: no picture in here (.png, .jpg, .jpeg); of a video, extract the frames first")
    own = root.resolve().name  # of pictures in `root` itself, unless a folder in it has that name
    own = "." if root / own in found else own
    return {folder.relative_to(root).as_posix() if folder != root else own: folder for folder in found}


@lru_cache(64)
def open_scene(root, name, skip_bad_frames=False):
    """-> a posed scene or a folder of photos below `root`, the same without depth and masks (which take time to decode), and
    {path of an image, relative to `root`: its index} in natural order of the paths."""
    folder = scene_folders(root).get(name)
    if not folder:
        raise data.DataError(f"{root}: scene {name} is no longer in here; restore it or make the cache again")
    if data.reader_of(folder):
        scene = data.load_scenes(folder, skip_bad_frames)[0]
        images = data.Scene(name, [replace(frame, **dict.fromkeys(data.MAPS)) for frame in scene.frames])
    else:
        scene = images = Photos(name, [path for path in photos_in(folder) if not skip_bad_frames or is_whole(path)])
    paths = [Path(os.path.relpath(frame.image, root)).as_posix() for frame in scene.frames]
    return scene, images, {paths[i]: i for i in sorted(range(len(paths)), key=lambda i: data.natural(paths[i]))}


def picture_overlap(a, b, alike=0.7):
    """The share of a grey thumbnail (h, w) that another one shows too: the largest that a shift makes correlate, or 0."""
    height, width = a.shape
    shifts = [(y, x) for y in range(-(height // 2), height // 2 + 1) for x in range(-(width // 2), width // 2 + 1)]
    for y, x in sorted(shifts, key=lambda shift: -(height - abs(shift[0])) * (width - abs(shift[1]))):
        ours = a[max(0, y):height + min(0, y), max(0, x):width + min(0, x)]
        theirs = b[max(0, -y):height + min(0, -y), max(0, -x):width + min(0, -x)]
        ours, theirs = ours - ours.mean(), theirs - theirs.mean()
        if (ours * theirs).sum() > alike * ((ours**2).sum() * (theirs**2).sum()) ** 0.5:
            return ours.size / a.size
    return 0.0


def choose_stride(scene, order, views, enough=0.5):
    """The largest step at which neighbours still share half of what they see, and the scene still fills a sample.

    By the frusta where poses are known, else by shifting thumbnails over each other (Sec. IV: overlap, number of images).
    """
    thumbnail = lru_cache(None)(lambda i: scene.view(i, (24, 32)).image.mean(0).numpy())

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


def make_manifest(root, views=20, stride=None, skip_bad_frames=False) -> list[dict]:
    """One line a view: dataset, scene, sample, view, size (H, W), path relative to `root`, and the file's number of bytes, which
    tells whether another picture has taken its name; N = `views` views a sample.

    `stride` n takes every n-th picture; by default it is what `choose_stride` finds. The tail of a scene is a sample of fewer
    views, and so is a short scene.
    """
    # Differs: the official code sorts frame10 before frame2, and drops tails and scenes of under 20 views.
    root, lines = Path(root), []
    scene_folders.cache_clear(), open_scene.cache_clear()  # the folder may have changed
    for name in scene_folders(root):
        scene, _, index = open_scene(root, name, skip_bad_frames)
        step = stride or choose_stride(scene, list(index.values()), views)
        for n, (path, i) in enumerate(list(index.items())[::step]):
            lines.append(dict(dataset=root.resolve().name, scene=name, sample=f"{name}/{n // views:03d}", view=n % views,
                              size=list(scene.frames[i].size), path=path, bytes=scene.frames[i].image.stat().st_size))
    return lines


def samples_of(lines):  # -> {sample: its lines}
    samples = {}
    for line in lines:
        samples.setdefault(line["sample"], []).append(line)
    return samples


def load_views(root, lines, size_of, skip_bad_frames=False, images_alone=False):
    """The views of a sample; `size_of` (H, W of the stored picture) -> the size wanted. Raises DataError naming a lost file."""
    scene, images, index = open_scene(root, lines[0]["scene"], skip_bad_frames)
    lost = next((Path(root, line["path"]) for line in lines if line["path"] not in index), None)
    if lost:
        raise data.DataError(f"{lost}: in the manifest, but no longer in its scene; restore it or make the cache again")
    other = next((Path(root, line["path"]) for line in lines if Path(root, line["path"]).stat().st_size != line["bytes"]), None)
    if other:
        raise data.DataError(f"{other}: not the picture that the manifest lists; restore it or make the cache again")
    source = images if images_alone else scene
    return [source.view(index[line["path"]], size_of(*line["size"])) for line in lines]


def oriented(size, height, width):  # (H, W) wide -> the same turned upright for a picture that stands
    # Differs: the official code lays portrait images on their side but not their targets.
    return (max(size), min(size)) if height > width else (min(size), max(size))


def resampled(m: Pointmap, picture, size) -> Pointmap:
    """A teacher's map at the student's size, bilinear: both are centre crops of one picture (H, W), scaled to cover their size.

    The same pixel of image and target thus sees the same point. What the teacher's crop left out is NaN. (Sec. III-B 2)
    """
    # Differs: the official code stretches every picture to 224x518.
    have = m.conf_local.shape
    if have == tuple(size):
        return m
    zoom = data.covering_crop(picture, have)[0] / data.covering_crop(picture, size)[0]
    y, x = (((torch.arange(n) + 0.5 - n / 2) * zoom + h / 2) * (2 / h) - 1 for n, h in zip(size, have))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]  # (1, H, W, 2)
    stacked = torch.cat([m.points_global, m.points_local, m.conf_global[..., None], m.conf_local[..., None]], -1)
    found = F.grid_sample(stacked.permute(2, 0, 1)[None], grid, align_corners=False, padding_mode="border")[0].permute(1, 2, 0)
    inside = (grid[0].abs() <= 1).all(-1, keepdim=True)
    points = torch.where(inside, found[..., :6], torch.nan)
    return Pointmap(points[..., :3], points[..., 3:], found[..., 6], found[..., 7])


def ask(teacher, root, lines, size, seed, skip_bad_frames=False) -> list[Pointmap]:
    """The teacher's maps of one sample at the cache's size; what is random in them depends on the sample and `seed` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {lines[0]['sample']}".encode()))
    maps = teacher(load_views(root, lines, teacher.view_size, skip_bad_frames), generator)
    return [resampled(m, line["size"], oriented(size, *line["size"])) for m, line in zip(maps, lines, strict=True)]


# ------------------------------------------------------------------------------------------------ coding of pointmaps
# Float16 values, exactly, in a fifth of the bytes. A view is eight channels: x y z (local), X Y Z (global), local and global
# confidence. Each is predicted from those before it: a pixel's points lie on its ray, so x and y follow from z, and in the
# global map two coordinates from the third. What is stored is by how many steps of float16 the prediction is off.


def ordered(code):  # int16 <-> int16: bits of float16 <-> numbers in the order of their values; its own inverse
    return code ^ (code >> 15 & 0x7FFF)


def halves(values):  # (H, W) float32 -> int16 steps; NaN becomes a number, as its bits differ between machines
    return ordered(np.fmin(np.fmax(values, -65504), 65504).astype(np.float16).view(np.int16))


def fit_rays(maps, mask):
    """(8, H, W), (H, W) -> (16,): x = z (a u + b), y = z (c v + d), and global = t + A local, by least squares."""
    if not mask.any():
        return np.zeros(16, np.float32)
    x, y, z, *other = maps[:6, mask].astype(np.float64)
    v, u = np.nonzero(mask)
    solve = lambda columns, goal: np.linalg.lstsq(np.stack(columns, 1), goal, rcond=None)[0]
    rays = [solve([z * (at + 0.5), z], goal) for at, goal in ((u, x), (v, y))]
    affine = solve([x, y, z, np.ones_like(z)], np.stack(other, 1))  # (4, 3)
    return np.concatenate([*rays, affine.ravel()]).astype(np.float32)


def coding_order(fit):  # the global coordinate that the view looks along comes before the other two
    main = int(np.abs(fit[10:13]).argmax())
    return 2, 0, 1, 3 + main, 3 + (main + 1) % 3, 3 + (main + 2) % 3, 6, 7


def prediction(channel, maps, fit):
    """(H, W) int16 steps, from the channels before it; one rounding an operation, so that every machine finds the same."""
    height, width = maps.shape[1:]
    ray = [(np.arange(width, dtype=np.float32) + np.float32(0.5)) * fit[0] + fit[1],
           ((np.arange(height, dtype=np.float32) + np.float32(0.5)) * fit[2] + fit[3])[:, None]]
    main, (A, t) = coding_order(fit)[3] - 3, np.split(fit[4:].reshape(4, 3), [3])
    along = lambda c: ray[0] * A[0, c] + ray[1] * A[1, c] + A[2, c]
    if channel in (2, 6):
        return np.int16(0)
    if channel == 7:
        return ordered(maps[6].view(np.int16))
    with np.errstate(all="ignore"):  # masked pixels hold anything
        if channel < 2:
            return halves(maps[2].astype(np.float32) * ray[channel])
        if channel == 3 + main:
            return halves(maps[2].astype(np.float32) * along(main) + t[0, main])
        distance = (maps[3 + main].astype(np.float32) - t[0, main]) / along(main)
        return halves(distance * along(channel - 3) + t[0, channel - 3])


def second_difference(steps, mask):
    """(8, H, W) int16, (H, W) -> the same, to be undone by a cumsum along both axes; 0 at masked pixels, which hold what
    makes it so. Smooth surfaces leave little. Sums wrap around, which loses nothing."""
    filled, above = np.empty_like(steps), np.zeros_like(steps[:, 0])
    for row, valid in enumerate(mask):
        last = np.maximum.accumulate(np.where(valid, np.arange(len(valid)), -1))  # the valid pixel at or before each
        above = above + np.where(last >= 0, (steps[:, row] - above)[:, last], 0).astype(np.int16)
        filled[:, row] = above
    down = np.diff(filled, axis=1, prepend=np.zeros_like(filled[:, :1]))
    return np.diff(down, axis=2, prepend=np.zeros_like(filled[:, :, :1]))


def encode_view(maps, mask):
    """(8, H, W) float16, (H, W) bool with M True -> rays (16,), which channels are differences (8,), steps (8, M) int16."""
    fit = fit_rays(maps, mask)
    steps = np.stack([ordered(maps[c].view(np.int16)) - prediction(c, maps, fit) for c in range(8)])
    differences, steps = second_difference(steps, mask)[:, mask], steps[:, mask]
    smooth = np.abs(differences.astype(np.int32)).sum(1) < np.abs(steps.astype(np.int32)).sum(1)
    return fit, smooth, np.where(smooth[:, None], differences, steps)


def decode_view(fit, smooth, stored, mask):
    """The inverse of `encode_view` -> (8, H, W) float16; masked pixels hold anything."""
    maps = np.zeros((8, *mask.shape), np.float16)
    for c in coding_order(fit):
        steps = np.zeros(mask.shape, np.int16)
        steps[mask] = stored[c]
        if smooth[c]:
            steps = steps.cumsum(0, dtype=np.int16).cumsum(1, dtype=np.int16)
        maps[c] = ordered(steps + prediction(c, maps, fit)).view(np.float16)
    return maps


def byte_planes(steps) -> bytes:
    """(8, M) int16 -> per channel all low bytes, then all high ones; 0 -1 1 -2 2 ... become 0 1 2 3 4 ..., so those are 0."""
    zigzag = (steps << 1 ^ steps >> 15).view(np.uint16)
    return np.stack([zigzag & 255, zigzag >> 8], 1).astype(np.uint8).tobytes()


def from_byte_planes(planes: bytes):  # -> (8, M) int16
    low, high = np.frombuffer(planes, np.uint8).reshape(8, 2, -1).transpose(1, 0, 2).astype(np.uint16)
    zigzag = low | high << 8
    return (zigzag >> 1 ^ -(zigzag & 1)).view(np.int16)


def run_lengths(mask):  # (H, W) bool -> (R, 2) int32: first pixel and length of every run of True, row-major
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=False, append=False))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], 1).astype(np.int32)


def from_run_lengths(runs, shape):  # -> (H, W) bool
    mask = np.zeros(math.prod(shape), bool)
    for start, length in runs:
        mask[start:start + length] = True
    return mask.reshape(shape)


# ------------------------------------------------------------------------------------------------ cache (Sec. III-B 2)


def valid_halves(m: Pointmap, tau):
    """-> the eight channels (8, H, W) float16, and M (H, W): all known, in float16's range, and trusted by at least tau."""
    points = torch.cat([m.points_local, m.points_global], -1).permute(2, 0, 1)
    conf = torch.stack([m.conf_local, m.conf_global]).clamp(max=65504)  # such a pixel is the last to be left out
    maps = torch.cat([points, conf]).half()
    mask = maps.isfinite().all(0) & (certainty(m.conf_local) >= tau)
    return maps.numpy(), mask.numpy()


def pack_sample(maps, lines, settings) -> bytes:
    """One sample as a safetensors file: coded maps, run-length masks, and in its one metadata entry (two would come in
    random order) who made it, from what, and the checksum of every other byte of the file."""
    channels, masks = zip(*(valid_halves(m, settings["tau"]) for m in maps))
    fits, smooth, steps = zip(*(encode_view(*view) for view in zip(channels, masks)))
    runs = [run_lengths(mask) for mask in masks]
    tensors = dict(fit=np.stack(fits), smooth=np.stack(smooth),
                   runs=np.concatenate(runs), run_count=np.array([len(r) for r in runs]),
                   steps=np.frombuffer(zlib.compress(byte_planes(np.concatenate(steps, 1)), 6), np.uint8).copy())
    about = dict(sha256="0" * 64, settings=settings, paths=[line["path"] for line in lines], sizes=[m.shape for m in masks])
    content = save({key: torch.from_numpy(value) for key, value in tensors.items()}, {"sample": json.dumps(about)})
    at = content.index(SEAL) + len(SEAL)
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + 64:]


def check_sample(path):
    """-> what is said about the sample, and its file's bytes. Raises DataError, naming the file, if any bit is wrong."""
    content = Path(path).read_bytes()
    at = content.find(SEAL) + len(SEAL)
    blank = content[:at] + b"0" * 64 + content[at + 64:]
    if at < len(SEAL) or hashlib.sha256(blank).hexdigest().encode() != content[at:at + 64]:
        raise data.DataError(f"{path}: damaged or cut off; run the cache command again, it makes this sample anew")
    header = json.loads(content[8:8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["sample"]), content


def unpack_sample(path):
    """-> what is said about the sample, [Pointmap] float32, [mask (H, W) bool]; masked pixels have points 0, confidence 1."""
    about, content = check_sample(path)
    if about["settings"]["format"] != CACHE_FORMAT:
        raise data.DataError(f"{path}: its format is {about['settings']['format']}, not {CACHE_FORMAT}; make the cache again")
    stored = {key: value.numpy() for key, value in load(content).items()}
    counts = stored["run_count"].cumsum()[:-1]
    masks = [from_run_lengths(*pair) for pair in zip(np.split(stored["runs"], counts), about["sizes"])]
    steps = from_byte_planes(zlib.decompress(stored["steps"].tobytes()))
    steps = np.split(steps, np.cumsum([mask.sum() for mask in masks])[:-1], axis=1)
    maps = []
    for view in zip(stored["fit"], stored["smooth"], steps, masks):
        channels, mask = torch.from_numpy(decode_view(*view)).float(), torch.from_numpy(view[3])
        points, conf = torch.where(mask, channels[:6], 0.0).permute(1, 2, 0), torch.where(mask, channels[6:], 1.0)
        maps.append(Pointmap(points[..., 3:], points[..., :3], conf[1], conf[0]))
    return about, maps, [torch.from_numpy(mask) for mask in masks]


def keep_manifest(out, lines, first):
    """Write the manifest beside the samples, by the first shard alone; refuse to mix samples of another one with these."""
    path, content = out / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()
    changed = path.exists() and path.read_bytes() != content
    if changed and any(out.rglob("*.safetensors")):
        raise data.DataError(f"{path}: lists other pictures or samples than are here now; give another --out or remove {out}")
    if first and (changed or not path.exists()):
        remove_leftovers(path)
        splat.write_whole(path, content)


def remove_leftovers(path):  # what `write_whole` had not yet renamed when it was killed
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()


def is_done(path, settings):
    """Whether a sample is there and whole. Says so where it is damaged; raises DataError where another run made it."""
    if not path.exists():
        return False
    try:
        about, _ = check_sample(path)
    except data.DataError as error:
        print(error)
        return False
    old = about["settings"]
    changed = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
    if changed:
        raise data.DataError(f"{path}: made with other settings ({', '.join(changed)}); use the old ones or another --out")
    return True


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
    """Ask the teacher once for every sample below `root`, and keep what it says in out/<scene>/<sample>.safetensors.

    Samples that are there and whole stay, so a killed run continues, and a damaged sample is made again. Same inputs, same
    bytes. Returns the files it wrote. Raises DataError where `out` holds samples of other pictures or settings.
    """
    root, out, (which, shards) = Path(root), Path(out), shard
    lines = make_manifest(root, views, stride, skip_bad_frames)
    settings = dict(format=CACHE_FORMAT, teacher=teacher.identity, size=list(size), views=views, tau=tau, seed=seed)
    keep_manifest(out, lines, first=which == 0)
    mine = {out / f"{name}.safetensors": sample for name, sample in list(samples_of(lines).items())[which::shards]}
    todo = {path: sample for path, sample in mine.items() if not is_done(path, settings)}
    for path, sample in tqdm(todo.items(), desc=f"cache -> {out}", unit="sample", disable=not todo):
        remove_leftovers(path)
        maps = ask(teacher, root, sample, size, seed, skip_bad_frames)
        if not any((certainty(m.conf_local) >= tau).any() for m in maps):
            print(f"{path}: not one pixel is trusted at --tau {tau:g}, so nothing will be learned from it; lower it")
        splat.write_whole(path, pack_sample(maps, sample, settings))
    return list(todo)


class CachedSample(NamedTuple):
    name: str
    images: list  # of (3, H, W) in [0, 1]
    targets: list  # of Pointmap
    masks: list  # of (H, W) bool, the valid pixels M


class CachedViews(torch.utils.data.Dataset):
    """What `write_cache` wrote, with the images it was made of: item i -> CachedSample. `scenes`: the names to keep, or all."""

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
            raise data.DataError(f"{manifest}: not a manifest as it is written now; make the cache again, with another --out") from None
        if not self.samples:
            raise data.DataError(f"{self.cache}: no sample in it is of {self.root}; cache that folder, with an --out of its own")
        missing = [name for name, _ in self.samples if not (self.cache / f"{name}.safetensors").exists()]
        if missing:
            raise data.DataError(f"{self.cache}: {len(missing)} of {len(self.samples)} samples are not there yet"
                                 f" ({', '.join(missing[:3])}); run the cache command to its end")
        self.settings = check_sample(self.cache / f"{self.samples[0][0]}.safetensors")[0]["settings"]
        self.identity = hashlib.sha256(manifest.read_bytes() + json.dumps(self.settings).encode()).hexdigest()[:16]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i) -> CachedSample:
        name, lines = self.samples[i]
        path = self.cache / f"{name}.safetensors"
        about, targets, masks = unpack_sample(path)
        if about["paths"] != [line["path"] for line in lines]:
            raise data.DataError(f"{path}: made of other pictures than {self.cache}/manifest.jsonl lists; remove it and run "
                                 "the cache command again")
        size = about["settings"]["size"]
        views = load_views(self.root, lines, lambda *stored: oriented(size, *stored), self.skip_bad_frames, images_alone=True)
        return CachedSample(name, [view.image for view in views], targets, masks)


# ------------------------------------------------------------------------------------------------ training (Sec. IV)


def cached_part(args, part, root=None) -> CachedViews:  # "train" or "val": every eighth scene is held out
    root = root or source_of(args)
    return CachedViews(root, args.cache, data.split(list(scene_folders(root)), part), args.skip_bad_frames)


def learning_rate(step, args):
    """Linear warm-up, then half a cosine from --lr to --final_lr over the rest of the run."""
    # Differs: the official schedule counts epochs that are never trained, so that its rate hardly falls.
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(1, args.max_steps - args.warmup)
    return args.final_lr + 0.5 * (args.lr - args.final_lr) * (1 + math.cos(math.pi * done))


def new_student(args) -> Student:
    """A student of the preset's size on a pretrained ViT, which may be any that `lift.load_vit` reads; the rest is random."""
    vit = lift.load_vit(args.encoder)
    registers = 0 if vit.register_tokens is None else vit.register_tokens.shape[1]
    config = STUDENTS[args.preset]._replace(
        patch=vit.patch, enc_dim=vit.dim, enc_heads=vit.heads, enc_depth=len(vit.blocks), mlp_ratio=vit.mlp_ratio,
        registers=registers, grid=vit.grid, published=False, size=tuple(args.size))
    torch.manual_seed(args.seed)
    student = Student(config)
    student.encoder.load_state_dict(vit.state_dict())
    for name, p in student.named_parameters():  # of these, which the files have, nothing is computed
        p.requires_grad_(not (name == "encoder.mask_token" or ".refinenet4.resConfUnit1." in name))
    student.recompute = args.grad_checkpoint
    return student.train()


def mirrored(sample: CachedSample) -> CachedSample:
    """Left and right exchanged: pictures, masks and maps flipped, and the x of both frames turned round."""
    flip = lambda m: Pointmap(*(x.flip(1) * x.new_tensor([-1, 1, 1]) for x in m[:2]), *(x.flip(1) for x in m[2:]))
    images, masks = [x.flip(2) for x in sample.images], [x.flip(1) for x in sample.masks]
    return CachedSample(sample.name, images, [flip(m) for m in sample.targets], masks)


def loss_of(model, sample: CachedSample, args, seed) -> Loss:
    """The student's loss on one sample, its view ids drawn anew from `seed`."""
    device = torch.device(args.device)
    images, masks = ([x.to(device) for x in part] for part in (sample.images, sample.masks))
    targets = [Pointmap(*(x.to(device) for x in m)) for m in sample.targets]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        maps = model(images, generator=torch.Generator().manual_seed(seed))
    how = dict(gamma=args.gamma, weight=args.weight, mean=args.mean, global_target=args.global_target)
    return pointmap_loss(maps, targets, masks, **how)


def learn(batch, model, args, seeds, world) -> list[float]:
    """Leaves the gradients of a step's samples, which go through the student one by one; -> the mean of their losses."""
    sums = [0.0] * len(Loss._fields)
    for n, (sample, seed) in enumerate(zip(batch, seeds)):
        if args.mirror and torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:  # Differs: not in the paper
            sample = mirrored(sample)
        with contextlib.nullcontext() if world == 1 or n + 1 == len(batch) else model.no_sync():
            loss = loss_of(model, sample, args, seed)
            (loss.total / len(batch)).backward()
        sums = [total + part.item() / len(batch) for total, part in zip(sums, loss)]
    return sums


@torch.no_grad()
def heldout_loss(student, heldout: CachedViews, args) -> float:
    student.eval()
    some = np.linspace(0, len(heldout) - 1, min(args.heldout, len(heldout))).astype(int)
    losses = [loss_of(student, heldout[i], args, seed=int(i)).total.item() for i in some]
    student.train()
    return sum(losses) / len(losses)


def train(args, rank, world):
    """Trains the student on the cache alone and leaves it in out/student. Goes on exactly where a killed run was."""
    out, first, root = Path(args.out), rank == 0, source_of(args)
    cached, heldout = cached_part(args, "train"), cached_part(args, "val") if len(scene_folders(root)) > 1 else None
    if cached.settings["size"] != args.size and not args.any_size:
        raise data.DataError(f"{args.cache}: made at {cached.settings['size']}, not {args.size}; leave --size out, or make the cache "
                             "again")
    args.size = cached.settings["size"]
    run = {key: value for key, value in vars(args).items() if key not in NOT_OF_TRAINING}
    run = argparse.Namespace(**run, cached=cached.identity)
    found = [splat.find_checkpoint(run) if first else None]
    if world > 1:
        dist.broadcast_object_list(found)
    (start, stored), student = found[0], new_student(args).to(args.device)
    trained = distill.trained(student)
    networks, weights = {"student": (student, set(trained))}, list(trained.values())
    # Differs: the paper has one rate; where there are few samples, a pretrained encoder keeps more of what it knows with less.
    encoder, rest = ([p for name, p in trained.items() if name.startswith("encoder.") == which] for which in (True, False))
    groups = [dict(params=rest, share=1.0), dict(params=encoder, share=args.encoder_share)]
    optimiser = torch.optim.AdamW(groups, args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    print(f"{sum(p.numel() for p in weights) / 1e6:.1f} million parameters, {len(cached)} samples of up to {args.views} views, "
          f"{args.max_steps} steps of {args.batch}, on {args.device}")
    if stored:
        splat.restore(stored, networks, optimiser)
        print(f"resumed at step {start} of {args.max_steps}")
    # All that is random is a function of the seed and the step, so a run that goes on needs no generator's state.
    places = distill.schedule(len(cached), args.max_steps * args.batch, args.seed)
    draws = lambda step: range(step * args.batch, (step + 1) * args.batch)
    load = lambda step: [cached[places[n]] for n in draws(step)[rank::world]]
    model = nn.parallel.DistributedDataParallel(student) if world > 1 else student  # averages gradients over processes
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="train", unit="step", disable=not first)
    clock = saved = time.monotonic()
    with (splat.Stop() as stop, splat.open_log(out, run, start) if first else contextlib.nullcontext() as log,
          contextlib.closing(distill.ahead(load, range(start, args.max_steps))) as batches):
        for step, batch in zip(bar, batches):
            for group in optimiser.param_groups:
                group["lr"] = group["share"] * learning_rate(step, args)
            optimiser.zero_grad(set_to_none=True)
            sums = learn(batch, model, args, [args.seed + n for n in draws(step)[rank::world]], world)
            *sums, asked = distill.averaged([*sums, float(stop.asked)], world, args.device)
            used, done = [cached.samples[places[n]][0] for n in draws(step)], step + 1 == args.max_steps
            if not all(map(math.isfinite, sums)):
                raise ValueError(f"step {step}: the loss is {sums[0]} for {', '.join(used)}; start again with a lower --lr "
                                 "and another --out")
            norm = nn.utils.clip_grad_norm_(weights, 1.0).item()
            optimiser.step()
            if first:
                bar.set_postfix(loss=f"{sums[0]:.4f}")
                line = dict(step=step, samples=used, **dict(zip(Loss._fields, sums)), grad_norm=norm,
                            lr=optimiser.param_groups[0]["lr"], seconds=round(time.monotonic() - clock, 2))
                if heldout and (done or (step + 1) % args.eval_every == 0):
                    line["heldout"] = heldout_loss(student, heldout, args)
                log.write(json.dumps(line) + "\n")
                if asked or done or time.monotonic() - saved >= 60 * args.save_minutes:
                    log.flush()
                    splat.save_checkpoint(out, step + 1, splat.run_settings(run), networks, optimiser)
                    saved = time.monotonic()
            if asked and not done:
                raise KeyboardInterrupt
    if first:
        save_student(student, out / "student")


# ------------------------------------------------------------------------------------------------ cameras from pointmaps


def robust_similarity(source: Tensor, target: Tensor, weight: Tensor, rounds=10):
    """`similarity`, where some points are far off: each round weighs them by how well the last one fitted them (Cauchy)."""
    s, R, t = similarity(source, target, weight)
    for _ in range(rounds):
        off = (target - (s * source.double() @ R.T + t)).norm(dim=1)
        s, R, t = similarity(source, target, weight / (1 + (off / off.median().clamp_min(1e-12)).square()))
    return s, R, t


def focal_length(points: Tensor, weight: Tensor, rounds=10) -> float:
    """Pixels, from local points (H, W, 3) with the optical axis through the middle: the f that makes the weighted sum of
    |pixel - f (x, y) / z| least, by Weiszfeld's rounds, as in DUSt3R Sec. 3.3."""
    height, width = weight.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    use = (weight > 0) & (points[..., 2] > 0)
    pixel, ray = torch.stack([x, y], -1)[use].double(), (points[..., :2] / points[..., 2:])[use].double()
    w = weight[use].double()
    for _ in range(rounds):
        f = (w * (pixel * ray).sum(1)).sum() / (w * ray.square().sum(1)).sum()
        w = weight[use].double() / (pixel - f * ray).norm(dim=1).clamp_min(1e-3)
    return max(f.item(), 0.1 * max(height, width))  # that of an untrained network may be negative


class Cameras(NamedTuple):
    focal: Tensor  # (V,) pixels of the maps; the optical axis goes through the middle
    scale: Tensor  # (V,) from a view's local unit to the world's
    c2w: Tensor  # (V, 4, 4) the world is the frame of the global maps


def estimate_cameras(maps: list[Pointmap], tau=0.3, names=None) -> Cameras:
    """Where each picture was taken: the similarity that carries its local map to its global one (weighted Procrustes).

    Pictures of one size are taken to be of one camera. Raises ValueError, with its name, for a view without three usable points.
    """
    focals, scales, poses = [], [], torch.eye(4).repeat(len(maps), 1, 1)
    for k, m in enumerate(maps):
        known = m.points_local.isfinite().all(-1) & m.points_global.isfinite().all(-1) & (m.points_local[..., 2] > 0)
        for points in (m.points_local, m.points_global) if known.any() else ():  # sky and mistakes would outweigh all the others
            length = points.norm(dim=-1)
            known &= length <= FAR * length[known].median()
        trusted = known & (certainty(torch.minimum(m.conf_local, m.conf_global)) >= tau)
        use = trusted if trusted.sum() >= 100 else known  # better a poor pose than none
        if use.sum() < 3:
            raise ValueError(f"{names[k] if names else f'view {k}'}: fewer than three of its points are known and before the camera; "
                             "leave this picture out, or train the student for longer")
        use &= (use.flatten().cumsum(0) % (use.sum() // 20_000 + 1) == 0).view(use.shape)  # so many decide as well as all
        s, R, t = robust_similarity(m.points_local[use], m.points_global[use], m.conf_global[use])
        poses[k, :3] = torch.cat([R, t[:, None]], 1)
        scales.append(s.float())
        focals.append(focal_length(m.points_local, torch.where(use, m.conf_local, 0.0)))
    of_size = {m.conf_local.shape: [] for m in maps}
    for f, m in zip(focals, maps):
        of_size[m.conf_local.shape].append(f)
    return Cameras(torch.tensor([np.median(of_size[m.conf_local.shape]) for m in maps]).float(), torch.stack(scales), poses)


# ------------------------------------------------------------------------------------------------ a scene for other tools


def save_picture(path, picture):  # (3, H, W) or (H, W) in [0, 1]
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (picture.clamp(0, 1) * 255).round().byte()
    Image.fromarray((values.permute(1, 2, 0) if values.dim() == 3 else values).numpy()).save(path, quality=95, subsampling=0)


def write_points(path, points: Tensor, colours: Tensor):  # (M, 3), (M, 3) in [0, 1] -> a .ply of coloured points
    vertices = np.empty(len(points), [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")])
    for name, column in zip(vertices.dtype.names, [*points.T, *(colours * 255).round().T]):
        vertices[name] = column.numpy()
    kinds = {"<f4": "float", "|u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property {kinds[vertices.dtype[name].str]} {name}" for name in vertices.dtype.names] + ["end_header", ""]
    splat.write_whole(path, "\n".join(header).encode() + vertices.tobytes())


def write_colmap(folder, names, sizes, K, c2w, points, colours):
    """A COLMAP text model: one camera a view, poses world-to-camera; points without tracks, at most 50,000."""
    w2c = torch.linalg.inv(c2w.double()).numpy()
    quaternions = splat.rotation_to_quaternion(w2c[:, :3, :3])
    numbers = lambda values: " ".join(f"{float(value):.9g}" for value in values)
    cameras = [f"{i} PINHOLE {w} {h} {numbers(k[[0, 1, 0, 1], [0, 1, 2, 2]])}"
               for i, ((h, w), k) in enumerate(zip(sizes, K), 1)]
    images = [f"{i} {numbers(q)} {numbers(m[:3, 3])} {i} {name}\n"  # an empty second line: no 2D points
              for i, (q, m, name) in enumerate(zip(quaternions, w2c, names), 1)]
    some = slice(None, None, len(points) // 50_000 + 1)
    rows = zip(points[some].tolist(), (colours[some] * 255).round().int().tolist())
    points3d = [f"{i} {numbers(p)} {' '.join(map(str, c))} 0" for i, (p, c) in enumerate(rows, 1)]
    for name, lines in (("cameras", cameras), ("images", images), ("points3D", points3d)):
        splat.write_whole(folder / f"{name}.txt", "".join(line + "\n" for line in lines).encode())


def agreement(points, colours, photos, focal, c2w) -> float:
    """How well neighbouring photos agree through the geometry: 1 where each point of one, as its camera sees it, meets its own
    colour in the other, 0 where it meets as different ones as pixels drawn at random, or none. V of (M, 3), (M, 3), (3, H, W);
    (V,) pixels, (V, 4, 4)"""
    off, some = torch.zeros(2), torch.Generator().manual_seed(0)
    for i, j in ((i, j) for i in range(len(photos)) for j in (i - 1, i + 1) if 0 <= j < len(photos)):
        motion, (h, w) = torch.linalg.inv(c2w[j]) @ c2w[i], photos[j].shape[1:]
        p = points[i] @ motion[:3, :3].T + motion[:3, 3]
        at = p[:, :2] / p[:, 2:].clamp_min(1e-6) * focal[j] / torch.tensor([w / 2, h / 2])
        seen = (p[:, 2] > 0) & (at.abs() < 1).all(1)
        there = F.grid_sample(photos[j][None], at[seen][None, None], align_corners=False)[0, :, 0].T
        strangers = there[torch.randperm(len(there), generator=some)]
        off += torch.stack([(colours[i][seen] - other).abs().sum() for other in (there, strangers)])
    return 1 - (off[0] / off[1]).item() if off[1] > 0 else 0.0


def draw_points(points, radii, colours, eye, at, up, focal, size) -> Tensor:
    """(M, 3), (M,), (M, 3) -> (3, size, size): every point a small round Gaussian, seen from `eye` (3,) towards `at` (3,)."""
    c2w, K = torch.eye(4), torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    c2w[:3, :3], c2w[:3, 3] = splat.looking(F.normalize(at - eye, dim=0), up), eye
    gaussians = points, radii.square()[:, None, None] * torch.eye(3), torch.full_like(radii, 0.9), colours
    return splat.rasterize(*gaussians, torch.linalg.inv(c2w), K, size, size, background=torch.full((3,), 0.12)).features.permute(2, 0, 1)


def doubt(agree) -> str:  # where cameras that never moved explain the photos as well as those that were found
    return ": do not trust the cameras" * (agree[0] < agree[1] + 0.02)


def cloud_picture(path, photos, points, radii, colours, c2w, agree, size=480):
    """The cloud from behind the first photo's camera and aside of it; from above, cut off over the cameras as a ceiling would
    hide the room; and from the side, the cameras in red. Below, three of the photos. points, radii, colours and c2w are (M, 3),
    (M,), (M, 3), (V, 4, 4); `agree` is the `agreement` through these cameras, and without any motion."""
    some = slice(None, None, len(points) // 1_000_000 + 1)
    points, radii, colours = points[some], radii[some] * some.step**0.5, colours[some]
    up = F.normalize(-c2w[:, :3, 1].mean(0), dim=0)
    right = F.normalize(torch.linalg.cross(c2w[0, :3, 2], up), dim=0)
    ahead, centres = torch.linalg.cross(up, right), c2w[:, :3, 3]
    low, high = (points[::len(points) // 100_000 + 1].quantile(q, 0) for q in (0.005, 0.995))  # a stray point makes all small
    inside = ((points - (low + high) / 2).abs() < 0.55 * (high - low)).all(1)
    low, high = torch.minimum(low, centres.amin(0)), torch.maximum(high, centres.amax(0))
    extent, middle = (high - low).norm(), (low + high) / 2
    open_top = inside & (points @ up < (centres @ up).max() + 0.03 * extent)
    cloud = lambda keep: (torch.cat([points[keep], centres]), torch.cat([radii[keep], extent.expand(len(centres)) / 150]),
                          torch.cat([colours[keep], torch.tensor([1.0, 0.1, 0.1]).expand(len(centres), 3)]))
    far, first = 10 * extent, c2w[0, :3, 3]  # from so far there is no perspective
    aside = first + 0.35 * (first - middle) - 0.35 * (first - middle).norm() * (right - up)
    seen = [draw_points(*cloud(inside), aside, middle, up, 0.75 * size, size),
            draw_points(*cloud(open_top), middle + far * up, middle, ahead, 9 * size, size),
            draw_points(*cloud(inside), middle - far * ahead, middle, up, 9 * size, size)]
    found, still = (f"{100 * value:.0f}" for value in agree)
    headings = ["from aside of the first photo", "from above, without what is over the cameras (red)",
                "from the side" + f"{doubt(agree)}; photos agree to {found} % ({still} without motion)" * (len(c2w) > 1)]
    return data.picture_grid(path, headings, [seen, photos])


def write_scene(out, views, maps: list[Pointmap], tau=0.3) -> Path:
    """Write what pointmaps say of their pictures, for 01_data and for other tools, and return the folder `out`.

    images/, depth/ (16-bit PNG, z in the unit that transforms.json names, 0 = not trusted), confidence/ (8-bit PNG, 1 - 1/C),
    transforms.json (nerfstudio), sparse/0 (COLMAP text), cloud.ply, cloud.png, maps.png. A view's image may be of any
    multiple of its map's size. The world is the frame of view 0, in the unit of the global maps.
    """
    out, cameras = Path(out), estimate_cameras(maps, tau, [view.name for view in views])
    depths = [torch.where(certainty(m.conf_local) >= tau, s * m.points_local[..., 2], 0.0).nan_to_num().clamp_min(0)
              for m, s in zip(maps, cameras.scale)]
    known = torch.cat([depth[depth > 0] for depth in depths])
    if not len(known):
        raise ValueError(f"{out}: not one pixel is trusted at --tau {tau:g}; lower it, or look at other pictures")
    depths = [torch.where(depth <= FAR * known.median(), depth, 0.0) for depth in depths]
    farthest = max(depth.max().item() for depth in depths)
    unit = 10.0 ** math.ceil(math.log10(farthest / 65000))  # 16 bits hold the farthest
    for file in [out / "transforms.json", *(f for part in ("images", "depth", "confidence") for f in out.glob(f"{part}/[0-9]*.*"))]:
        file.unlink(missing_ok=True)  # of a scene that was here before: from now on it is none
    names = [f"images/{k:03d}.jpg" for k in range(len(views))]
    sizes, K, frames, points, radii, colours, small = [], [], [], [], [], [], []
    for k, (view, m, depth) in enumerate(zip(views, maps, depths, strict=True)):
        height, width = view.image.shape[1:]
        f = cameras.focal[k].item() * width / depth.shape[1]
        sizes.append((height, width))
        K.append(np.array([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]]))
        save_picture(out / names[k], view.image)
        save_picture(out / f"confidence/{k:03d}.png", certainty(m.conf_local))
        (out / "depth").mkdir(exist_ok=True)
        Image.fromarray((depth / unit).round().numpy().astype(np.uint16)).save(out / f"depth/{k:03d}.png")
        frames.append(dict(file_path=names[k], depth_file_path=f"depth/{k:03d}.png", source=view.name, w=width, h=height,
                           fl_x=f, fl_y=f, cx=width / 2, cy=height / 2,
                           transform_matrix=(cameras.c2w[k].double().numpy() @ data.OPENGL).tolist()))
        shrink = np.array([depth.shape[1] / width, depth.shape[0] / height, 1])[:, None]
        rays = lift.pixel_rays(torch.from_numpy(shrink * K[-1]).float(), *depth.shape)
        points.append((rays * depth[..., None])[depth > 0])  # as other tools will see it
        radii.append(0.6 * depth[depth > 0] / cameras.focal[k])  # of a pixel there
        small.append(F.interpolate(view.image[None], depth.shape, mode="bilinear", antialias=True)[0].clamp(0, 1))
        colours.append(small[-1].permute(1, 2, 0)[depth > 0])
    agree = [agreement(points, colours, small, cameras.focal, c2w) for c2w in (cameras.c2w, torch.eye(4).expand_as(cameras.c2w))]
    points = torch.cat([p @ c2w[:3, :3].T + c2w[:3, 3] for p, c2w in zip(points, cameras.c2w)])
    radii, colours = torch.cat(radii), torch.cat(colours)
    write_colmap(out / "sparse/0", [Path(name).name for name in names], sizes, K, cameras.c2w, points, colours)
    write_points(out / "cloud.ply", points, colours)
    photos = [views[k * (len(views) - 1) // 2].image for k in range(3)]
    cloud_picture(out / "cloud.png", photos, points, radii, colours, cameras.c2w, agree)
    shown = np.linspace(0, len(views) - 1, min(5, len(views))).astype(int)
    rows = [[views[k].image, data.colour_depth(depths[k]), certainty(maps[k].conf_local).expand(3, -1, -1)] for k in shown]
    data.picture_grid(out / "maps.png", ["image", "depth (black: not trusted)", "confidence 1 - 1/C"], rows)
    meta = dict(camera_model="PINHOLE", depth_unit_scale_factor=unit, agreement=agree, frames=frames)
    splat.write_whole(out / "transforms.json", json.dumps(meta, indent=1).encode())  # last: now it is a scene
    return out


# ------------------------------------------------------------------------------------------------ evaluation (Sec. IV-B)


def along_curve(points: Tensor) -> Tensor:  # (M, 3) -> (M,) order along a curve that stays near (Morton)
    low, high = points.amin(0), points.amax(0)
    cell = ((points - low) / (high - low).amax().clamp_min(1e-12) * 1023).long()
    bits = [(cell[:, axis] >> bit & 1) << 3 * bit + axis for bit in range(10) for axis in range(3)]
    return sum(bits).argsort()


def nearest_distance(queries: Tensor, points: Tensor, block=64) -> Tensor:
    """(M, 3), (N, 3) -> (M,): from each query to the nearest point, exact, without M x N distances.

    Both are walked along a curve in blocks; a block whose box is farther than what was found already is not opened.
    """
    points = points[along_curve(points)]
    points = torch.cat([points, points[-1:].expand(-len(points) % block, 3)]).view(-1, block, 3)
    low, high = points.amin(1), points.amax(1)
    order = along_curve(queries)
    distance = torch.empty_like(queries[:, 0])
    for some in order.split(block):
        q = queries[some]
        gap = (low - q.amax(0)).maximum(q.amin(0) - high).clamp_min(0).norm(dim=1)  # box to box, a lower bound
        exact = lambda q, opened: torch.cdist(q, points[opened].flatten(0, 1),
                                              compute_mode="donot_use_mm_for_euclid_dist").amin(1)  # products would round
        near = gap.topk(min(4, len(gap)), largest=False).indices
        best = exact(q, near)
        reach = (low - q[:, None]).maximum(q[:, None] - high).clamp_min(0).norm(dim=2) < best[:, None]  # (block, blocks)
        reach[:, near] = False
        far = reach.any(1)
        if far.any():
            best[far] = torch.minimum(best[far], exact(q[far], reach.any(0)))
        distance[some] = best
    return distance


class Score(NamedTuple):
    """Of one view, in the unit of the truth; means over views and scenes have the same form."""
    accuracy_mean: float  # from the prediction to the truth
    accuracy_median: float
    completeness_mean: float  # from the truth to the prediction
    completeness_median: float
    scale: float  # by which the prediction had to be multiplied; 1 = metric


def score_view(points: Tensor, truth: Tensor, most=5_000):
    """(M, 3) twice, pixel by pixel -> Score, and (M,) how far each pixel is off after the alignment.

    Similarity per view (Sec. IV-B) over all pixels, so that none gains by what it is confident of. Distances are taken from at
    most so many pixels, evenly spread, to all points of the other side.
    """
    s, R, t = similarity(points, truth)
    aligned, some = (s * points.double() @ R.T + t).to(truth), slice(None, None, len(points) // most + 1)
    there, back = nearest_distance(aligned[some], truth), nearest_distance(truth[some], aligned)
    return (Score(there.mean().item(), there.median().item(), back.mean().item(), back.median().item(), s.item()),
            (aligned - truth).norm(dim=1))


def ranks(x: Tensor) -> Tensor:  # (M,) -> (M,) places in order of size; equals share the mean of their places
    _, inverse, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[inverse].double()


def calibration(conf: Tensor, error: Tensor) -> dict:
    """(M,) twice -> the mean error of each tenth of the pixels, least confident first, and Spearman's rank correlation of
    confidence and error: -1 where confidence orders the errors perfectly, 0 where it says nothing."""
    tenths = [part.mean().item() for part in error[conf.argsort(stable=True)].tensor_split(10)]
    correlation = torch.corrcoef(torch.stack([ranks(conf), ranks(error)]))[0, 1]
    return dict(tenths=tenths, rank=correlation.nan_to_num().item())  # NaN where one of them is constant


def evaluate(teacher, scenes, size, views=20, seed=0) -> dict:
    """Accuracy, completeness, scale and calibration of a teacher (or student) on scenes with depth and poses.

    At most `views` views a scene, spread over it, at `size` (H, W). -> mean score over scenes, each scene's, calibration, and
    the speed in views a second.
    """
    scores, sure, wrong, seconds, asked_for = {}, [], [], 0.0, 0
    for scene in tqdm(scenes, desc=teacher.identity, unit="scene", leave=False):
        shown = [i for i, frame in enumerate(scene.frames) if frame.depth]
        shown = [shown[n] for n in np.linspace(0, len(shown) - 1, min(views, len(shown))).astype(int)]
        pictures = [scene.frames[i].size for i in shown]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {scene.name}".encode()))
        asked = [scene.view(i, teacher.view_size(*picture)) for i, picture in zip(shown, pictures)]
        of_scene, begin = [], time.perf_counter()
        maps = teacher(asked, generator) if asked else []
        seconds, asked_for = seconds + time.perf_counter() - begin, asked_for + len(asked)
        for i, picture, m in zip(shown, pictures, maps):
            goal = oriented(size, *picture)
            truth, m = scene.view(i, goal), resampled(m, picture, goal)
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
        raise data.DataError("no scene has a view with measured depth, so nothing can be evaluated; give another --scene_dir")
    return dict(mean=Score(*np.mean(list(scores.values()), axis=0).tolist()), scenes=scores,
                calibration=calibration(torch.cat(sure), torch.cat(wrong)), speed=asked_for / seconds)


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
        self.mean = (total / count.clamp_min(1)).split(3, -1)

    def view_size(self, height, width):
        return tuple(self.mean[0].shape[:2])

    def __call__(self, views, generator) -> list[Pointmap]:
        return [Pointmap(*self.mean, *torch.full((2, *self.mean[0].shape[:2]), 2.0)) for _ in views]


# ------------------------------------------------------------------------------------------------ efficiency (Table I)


class Cost(NamedTuple):
    model: str
    views: int
    part: str  # encoder, fusion, heads or all
    seconds: float
    gigabytes: float  # at the peak, weights and pictures included


def start_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PEAK.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what is free already is no part of the next peak
        PEAK.write_text("5")


def peak_memory(device) -> float:  # bytes, the most since start_peak; on a CPU of the whole process, which only Linux tells
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", PEAK.with_name("status").read_text())[1]) if PEAK.exists() else math.nan


@torch.no_grad()
def cost_of_parts(model: PointmapNetwork, images, at_once) -> dict[str, tuple]:  # part -> seconds, bytes beyond weights and pictures
    device, ids, result, costs = images[0].device, list(range(len(images))), None, {}
    parts = {"encoder": lambda _: model.encode(images, at_once), "fusion": lambda tokens: model.fuse(tokens, ids),
             "heads": lambda levels: model.decode(images, levels, at_once)}
    start_peak(device)
    before = peak_memory(device)
    for name, part in parts.items():
        start_peak(device)
        begin = time.perf_counter()
        result = part(result)
        peak = peak_memory(device)  # waits for the GPU
        costs[name] = time.perf_counter() - begin, peak - before
    return costs


def efficiency(models: dict[str, PointmapNetwork], counts, size=(378, 518), at_once=8, repeats=2) -> list[Cost]:
    """Time and peak memory of each model's forward pass over N = counts views of about `size`, in parts and whole.

    Sides are rounded to the model's patch: the default is the paper's 378x518 for the student and 384x512 for Fast3R. Times are
    the fastest of `repeats`, in bf16 on a GPU. What does not fit into a GPU costs infinity.
    """
    # Differs: the paper runs the heads on all views at once, here on `at_once`.
    costs = []
    for count in counts:
        for name, model in models.items():
            device = next(model.parameters()).device
            shape = [max(1, round(side / model.patch)) * model.patch for side in size]
            images = list(torch.rand(count, 3, *shape, generator=torch.Generator().manual_seed(0)).to(device))
            held = sum(x.numel() * x.element_size() for x in [*model.parameters(), *images])
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    runs = [cost_of_parts(model, images, at_once) for _ in range(repeats)]
                rows = {part: (min(r[part][0] for r in runs), max(r[part][1] for r in runs)) for part in runs[0]}
            except torch.OutOfMemoryError:
                rows = {"encoder": (math.inf, math.inf)}
            rows["all"] = sum(seconds for seconds, _ in rows.values()), max(peak for _, peak in rows.values())
            costs += [Cost(name, count, part, seconds, (held + peak) / 1e9) for part, (seconds, peak) in rows.items()]
    return costs


def efficiency_table(costs: list[Cost]) -> str:
    """One line for each number of views and part: seconds and GB of each model, of two how many times faster the second is."""
    names, lines = list(dict.fromkeys(c.model for c in costs)), {}
    for c in costs:
        lines.setdefault((c.views, c.part), {})[c.model] = c
    table = ["views  part     " + "".join(f"{name:>22}" for name in names) + "   faster" * (len(names) > 1)]
    for (views, part), of in lines.items():
        cells = "".join(f"{of[n].seconds:10.2f} s {of[n].gigabytes:6.2f} GB" if n in of else f"{'-':>22}" for n in names)
        both = len(names) > 1 and len(of) == len(names)
        table.append(f"{views:5}  {part:9}{cells}" + (f"   {of[names[0]].seconds / of[names[-1]].seconds:5.1f}x" if both else ""))
    return "\n".join(table)


# ------------------------------------------------------------------------------------------------ the commands


class CameraError(NamedTuple):
    position: float  # median, in the unit of the true cameras, after a similarity of the centres
    rotation: float  # median over all pairs of cameras of how far the rotation between the two is off, degrees
    spread: float  # of the true centres: rms distance from their mean

    def __str__(self):
        return (f"position off by {self.position:.3f} (cameras spread {self.spread:.3f}), "
                f"rotation between two by {self.rotation:.1f} degrees (medians)")


def camera_error(c2w: Tensor, truth: Tensor) -> CameraError:  # (V, 4, 4) twice
    ours, theirs = c2w[:, :3, 3].double(), truth[:, :3, 3].double()
    s, R, t = similarity(ours, theirs)
    i, j = torch.triu_indices(len(c2w), len(c2w), 1)
    found, true = (x[i, :3, :3].double().mT @ x[j, :3, :3].double() for x in (c2w, truth))
    angle = (((found.mT @ true).diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1).acos().rad2deg()
    spread = (theirs - theirs.mean(0)).square().sum(1).mean().sqrt()
    return CameraError((s * ours @ R.T + t - theirs).norm(dim=1).median().item(), angle.median().item(), spread.item())


def cached_root(args) -> Path | None:  # the folder whose pictures are cached
    record = args.cache / "root.json"
    try:
        return Path(json.loads(record.read_text())) if record.exists() else None
    except (ValueError, TypeError):
        raise data.DataError(f"{record}: damaged; run the cache command again, with --scene_dir or --images") from None


def source_of(args) -> Path:  # the pictures' folder: as asked for, or that of the cache
    given = args.images or args.scene_dir
    return Path(given) if given else cached_root(args) or Path("data_small" if args.preset == "tiny" else "data")


def teacher_of(args):
    if args.teacher == "geometry":
        return GeometricTeacher(args.size)
    model = load_fast3r(args.teacher)
    return NetworkTeacher(model, f"fast3r {distill.weights_id(model)[:16]}", fast3r_size, args.device)


def student_of(args) -> NetworkTeacher:
    return NetworkTeacher(load_student(args.weights), "student", lambda *stored: oriented(args.size, *stored), args.device)


def cache(args, rank, world):
    """Asks the teacher about every sample once."""
    root, shard = source_of(args), (rank, world) if world > 1 else args.shard
    begin, teacher = time.monotonic(), teacher_of(args)
    how = args.size, args.views, args.stride, args.tau, args.seed, shard, args.skip_bad_frames
    written = write_cache(teacher, root, args.cache, *how)
    if world > 1:
        dist.barrier()
    if shard[0] == 0:
        splat.write_whole(args.cache / "root.json", json.dumps(str(root.resolve())).encode())
    files = list(args.cache.rglob("*.safetensors"))
    print(f"{teacher.identity}: {len(written)} samples written in {time.monotonic() - begin:.0f} s; "
          f"{len(files)} samples, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB  ->  {args.cache}")


def unseen(args, scenes):
    """Those of `scenes` that the student was not trained on: held-out ones of what was cached, all of any other folder."""
    if cached_root(args) != source_of(args).resolve():
        return scenes
    if not (hidden := data.split(scenes, "val")):
        print("the student was trained on this very scene, as there is no other in the cache")
    return hidden or scenes


def measure(args):
    """Accuracy, completeness, scale, calibration and speed of the models, on scenes that the student has not seen."""
    scenes = unseen(args, data.open_scenes(source_of(args), args.skip_bad_frames))
    make = {"teacher": lambda: teacher_of(args), "student": lambda: student_of(args),
            "mean": lambda: MeanTeacher(cached_part(args, "train", cached_root(args)))}
    models = [name for name in args.models if name != "mean" or cached_root(args)]
    if not models:
        raise data.DataError(f"{args.cache}: the mean pointmap is that of a cache, and there is none; run the cache command first")
    results = {name: evaluate(make[name](), scenes, args.size, args.views, args.seed) for name in models}
    if len(models) < len(args.models):
        print(f"mean: left out, as {args.cache} holds no cache to take the mean of")
    if "teacher" in models and args.teacher == "geometry":
        print("teacher: measured depth with a network's errors, as no weights are given (--teacher model.safetensors)")
    lines = [f"{len(results[models[0]]['scenes'])} scenes, up to {args.views} views each; distances in their unit",
             f"{'':10}{'accuracy':>20}{'completeness':>20}{'scale':>8}{'conf. rank':>12}{'views/s':>9}",
             f"{'':10}{'mean':>10}{'median':>10}{'mean':>10}{'median':>10}"]
    for name, r in results.items():
        numbers = "".join(f"{value:10.4f}" for value in r["mean"][:4])
        lines.append(f"{name:10}{numbers}{r['mean'].scale:8.3f}{r['calibration']['rank']:12.2f}{r['speed']:9.1f}")
    path = Path(args.out, "result.json")
    in_words = lambda scores: {scene: score._asdict() for scene, score in scores.items()}
    named = {name: {**r, "mean": r["mean"]._asdict(), "scenes": in_words(r["scenes"])} for name, r in results.items()}
    splat.write_whole(path, json.dumps(named, indent=1).encode())
    print("\n".join(lines), f"\n  ->  {path}")


def infer(args):
    """Photos without poses -> a scene with poses, depth and a point cloud, for 01_data and for other tools."""
    root = source_of(args)
    out, names = Path(args.out, "scene"), list(scene_folders(root))
    if out.resolve().is_relative_to(root.resolve()) or root.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out}: the scene that infer writes would lie among the pictures of {root}, or over them; give another "
                         "--out")
    chosen = unseen(args, names)[0]
    if len(names) > 1 and args.command:
        print(f"{root}: {len(names)} scenes in here, this is {chosen}; give the folder of another one for that")
    _, scene, index = open_scene(root, chosen, args.skip_bad_frames)
    shown, student = list(index.values())[::args.stride or 1], student_of(args)
    if not (args.command or args.scene_dir or args.images):
        shown = shown[max(0, len(shown) - args.views) // 2:][:args.views]  # the demonstration: one sample, as in training
    sizes = [(scene.frames[i].size, student.view_size(*scene.frames[i].size)) for i in shown]
    views = [scene.view(i, size) for i, (_, size) in zip(shown, sizes)]
    maps = student(views, torch.Generator().manual_seed(args.seed))
    # Other stages want more pixels than the maps have: twice as many down and across, where the photo has them.
    views = [scene.view(i, (2 * h, 2 * w)) if 2 * h <= full_h and 2 * w <= full_w else view
             for view, i, ((full_h, full_w), (h, w)) in zip(views, shown, sizes)]
    write_scene(out, views, maps, args.tau)
    meta = json.loads((out / "transforms.json").read_text())
    trusted = torch.cat([(certainty(m.conf_local) >= args.tau).flatten() for m in maps]).float().mean()
    print(f"{scene.name}: {len(views)} views, {100 * trusted:.0f} % of the pixels trusted, focal length "
          f"{meta['frames'][0]['fl_x']:.0f} pixels at a width of {views[0].image.shape[2]}")
    if len(views) > 1:
        found, still = (f"{100 * value:.0f}" for value in meta["agreement"])
        print(f"photos agree with their neighbours to {found} % through this geometry, to {still} % if no camera had moved "
              f"(100: in every colour, 0: as strangers){doubt(meta['agreement'])}")
    if isinstance(scene, data.Scene) and len(views) > 2:
        true = scene.c2w[shown]
        error, still = (camera_error(c2w, true) for c2w in (data.load_scenes(out)[0].c2w, torch.eye(4).expand_as(true)))
        print(f"against the true poses, which were not used: {error}; without motion by {still.rotation:.1f}")
    further = f"; python 04_distill.py --scene_dir {out} --geometry depth" if len(views) > 2 else ""
    print(f"  ->  {out / 'cloud.png'}, {out / 'cloud.ply'}{further}")


def table(args):
    """Table I of the published networks, whose speed does not depend on their weights."""
    models = {"Fast3R": built(Fast3R)} if "teacher" in args.models else {}
    models |= {"student": built(Student, StudentConfig())} if "student" in args.models else {}
    if not models:
        raise ValueError("table: give --models teacher, student or both")
    for model in models.values():
        for p in model.to(args.device).eval().parameters():
            nn.init.normal_(p, std=0.02)
    costs = efficiency(models, args.counts, args.size, args.at_once, args.repeats)
    path = Path(args.out, "table.json")
    splat.write_whole(path, json.dumps([cost._asdict() for cost in costs], indent=1).encode())
    print(f"{efficiency_table(costs)}\n  ->  {path}")


# ------------------------------------------------------------------------------------------------ main


def parse(argv):
    parser = argparse.ArgumentParser(description="Distill3R: without a command cache, train, eval and infer, one by one. "
                                     "[p] marks what --preset sets.")
    add, flag = parser.add_argument, lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("command", nargs="?", choices=("cache", "train", "eval", "infer", "table"), help="one of the steps, or Table I; "
        "default: the first four")
    add("--scene_dir", help="a scene or a folder of scenes; default: what was cached, else data_small/ (tiny) or data/, where "
        "built-in rooms are made")
    add("--images", help="a folder of photos or video frames without poses, in its place")
    add("--out", default="out/06_distill3r")
    add("--preset", choices=list(PRESETS), help="full is the paper's setting, tiny takes minutes on a CPU; default: full on a "
        "CUDA machine")
    add("--cache", help="folder of the teacher's pointmaps; default: cache/ in --out")
    add("--teacher", default="geometry", help="Fast3R's model.safetensors, or 'geometry': measured depth with a network's "
        "errors")
    add("--encoder", help="ViT that the student starts from: 'tiny', a published name, a file or folder [p]")
    add("--weights", help="student for eval and infer; default: student/ in --out")
    add("--size", type=splat.positive, nargs=2, metavar=("H", "W"), help="of landscape pictures, multiples of the patch; lower it "
        "when memory runs out; infer and eval take what the student was trained on [p]")
    add("--views", type=splat.positive, help="views a sample, N; lower it when memory runs out [p]")
    add("--stride", type=splat.positive, help="take every n-th picture; default in full: cache finds it by overlap, infer "
        "takes all [p]")
    add("--tau", type=below_one, default=0.3, help="least certainty 1 - 1/C of a pixel that counts")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="cache the I-th of N parts (I from 0) in this process")
    add("--max_steps", type=splat.positive, help="training steps [p]")
    add("--batch", type=splat.positive, help="samples a step, over all processes; gradients add up one by one [p]")
    add("--lr", type=float, help="peak learning rate; halve it when the loss jumps [p]")
    add("--final_lr", type=float, help="at the end of the run [p]")
    add("--encoder_share", type=float, help="learning rate of the pretrained encoder, in parts of the others' [p]")
    add("--warmup", type=splat.positive, help="steps until the peak [p]")
    add("--gamma", type=float, default=0.001, help="weight of the confidence loss, Eq. 6; 0 with --weight none is Table III's "
        "labels only")
    add("--weight", choices=list(WEIGHTS), default="teacher", help="w of Eq. 2; none and student are Table III's, clamped the "
        "official code's")
    add("--mean", choices=("pixels", "views"), default="pixels", help="over all valid pixels, or as in the official code over "
        "views first")
    add("--global_target", choices=("direct", "aligned"), default="direct", help="aligned: the local map moved onto the "
        "global one (official)")
    add("--mirror", action=argparse.BooleanOptionalAction, help="half of the samples left-right exchanged, where there are "
        "few [p]")
    add("--bf16", action=argparse.BooleanOptionalAction, help="the networks in bfloat16 [p]")
    flag("--grad_checkpoint", "compute activations twice instead of keeping them, when memory runs out")
    add("--at_once", type=splat.positive, default=8, help="views at once in table; lower it when memory runs out")
    add("--heldout", type=splat.positive, default=8, help="held-out samples whose loss is measured during training")
    add("--eval_every", type=splat.positive, help="steps between these measurements; default: six a run")
    add("--save_minutes", type=float, default=2.0, help="between checkpoints; 0 writes one after each step")
    flag("--resume", "go on from the checkpoint in --out")
    add("--models", nargs="+", choices=("mean", "student", "teacher"), default=["mean", "student", "teacher"],
        help="those that eval measures (mean is the mean pointmap of the cache), or table (teacher, student)")
    add("--counts", type=splat.positive, nargs="+", help="numbers of views in table")
    add("--repeats", type=splat.positive, default=2, help="passes of each in table, of which the fastest counts")
    flag("--skip_bad_frames", "leave out frames without an image or a valid pose")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torchrun gives each process its own")
    add("--seed", type=int, default=0)
    return settle(parser.parse_args(argv))


def shard(text):
    which, count = map(int, text.split("/"))
    if not 0 <= which < count:
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 0 <= I < N")
    return which, count


def below_one(text):
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def settle(args):  # fills in what the preset sets
    cuda = torch.cuda.is_available()
    args.preset = args.preset or ("full" if cuda else "tiny")
    preset = dict(PRESETS[args.preset])
    if args.command == "table":
        preset["size"], args.counts = (378, 518), args.counts or ([12, 32, 64, 96, 128] if cuda else [2, 4, 8])
    args.cache, args.weights = Path(args.cache or f"{args.out}/cache"), args.weights or f"{args.out}/student"
    if args.command == "infer" or args.command == "eval" and "student" in args.models:
        preset["size"] = trained_size(args.weights)
    args.any_size = args.size is None  # train takes the cache's then
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.size = list(args.size)  # as a checkpoint gives it back
    args.eval_every = args.eval_every or max(1, args.max_steps // 6)
    return args


def run(args):
    training = args.command in (None, "train")
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
            {"eval": measure, "infer": infer, "table": table}[command](args)


def main(argv=None):
    args = parse(argv)
    with data.explained(args, "the same command with --resume goes on"):
        run(args)


if __name__ == "__main__":
    main()
