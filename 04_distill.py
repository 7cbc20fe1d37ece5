"""Splat and Distill: a student learns from its own teacher's features, carried through 3D into the view it looks at.

Paper   Splat and Distill (SnD) Sec. 3.1-3.5, Eq. 1-5, Table 5, Appendix A.3.
In      posed views (01_data), a pretrained ViT and a geometry (02_lift). Masks are optional: superpixels stand in.
Out     out/04_distill/: student/ (a Hugging Face DINOv2 folder, LoRA merged), log.jsonl, pictures, checkpoints, any adapters.
Run     python 04_distill.py --preset tiny              built-in rooms, no downloads: minutes on a 2-core CPU
        python 04_distill.py --scene_dir my_scene       your own posed images; on a CUDA machine with the paper's setting
        python 04_distill.py --resume                   goes on after a kill, where the last checkpoint was
        torchrun --nproc_per_node=4 04_distill.py --batch 4 ...        four GPUs, one triplet each
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py tiny/vit.safetensors tiny/mvsplat.safetensors
Not     centering or temperature schedules (nor has the paper); no sharding of the head over GPUs.
Words   f_s, f_t student and teacher; F_low tokens, F_high per-pixel features; K prototypes; lambda EMA momentum;
        tau temperature; context views are splatted, the target view is what the student sees.

The geometry and the masks of a triplet never change, so all of Sec. 3.2-3.4 is one sparse matrix on the teacher's tokens, the
splat operator (03_splat). It is computed once per triplet and kept on disk; a step then costs two ViTs and a head. `--online`
takes the plain path instead, which is `splat_features` below: the same loss to rounding, and the one to read.
"""
import argparse
import atexit
import contextlib
import copy
import hashlib
import importlib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

data, lift, splat = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat"))

# `vits` and `vitb` are the paper's setting (A.3); `tiny` fits the same loop into minutes on a CPU.
# Differs: temperatures are not in the paper and 1.0 in its code, where both distributions are nearly uniform (docs/study.md).
# Differs: at 1.9 million parameters `tiny` trains the whole ViT, which reaches further than adapters do (docs/study.md).
PAPER = dict(mvsplat="re10k.ckpt", pixels=574 * 868, triplets=10_000, max_steps=50_000, batch=1, full_finetune=False, lr=2e-5,
             head_lr=2e-5, rank=8, hidden=2048, bottleneck=256, prototypes=65_536, momentum=0.999, ema_every=10, tau_student=1.0,
             tau_teacher=1.0, bf16=True)
PRESETS = {
    "tiny": dict(model="tiny", mvsplat="tiny", pixels=96 * 128, triplets=300, max_steps=200, batch=4, full_finetune=True, lr=3e-4,
                 head_lr=1e-4, rank=8, hidden=512, bottleneck=128, prototypes=2048, momentum=0.99, ema_every=10, tau_student=0.1,
                 tau_teacher=0.05, bf16=False),
    "vits": dict(PAPER, model="dinov2_vits14"),
    "vitb": dict(PAPER, model="dinov2_vitb14")}

# ------------------------------------------------------------------------------------------------ LoRA, head, loss


class LoRALinear(nn.Module):
    """W x + (alpha / r) B A x: W frozen, A and B trained; B starts at 0, so training starts at the pretrained network."""

    def __init__(self, base: nn.Linear, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model, rank=8, alpha=8.0):
    """Freeze `model` and put adapters on the attention's qkv and proj, in place; returns the model. (SnD A.3)"""
    # Differs: the official code matches "proj" by name and so adapts the patch embedding too, and drops out 10 %.
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "proj"):
            setattr(block.attn, name, LoRALinear(getattr(block.attn, name), rank, alpha))
    return model


def merge_lora(model):
    """A copy of `model` whose adapters are folded into the weights: the plain network again, same outputs to rounding."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name in ("qkv", "proj"):
            adapted = getattr(block.attn, name)
            if isinstance(adapted, LoRALinear):
                adapted.base.weight.data += adapted.scale * adapted.B.data @ adapted.A.data
                setattr(block.attn, name, adapted.base)
    return model


class DINOHead(nn.Module):
    """Three-layer MLP -> L2-normalised bottleneck -> cosine with each of K prototypes, times a learned gain a prototype."""

    def __init__(self, in_dim, hidden=2048, bottleneck=256, prototypes=65536):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gain = nn.Parameter(torch.ones(prototypes))
        for weight in [m.weight for m in self.mlp if isinstance(m, nn.Linear)] + [self.prototypes]:
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.bias)

    def embed(self, tokens):  # (N, C) -> (N, D), of length 1, in fp32: bf16 would move a sharp softmax by several per cent
        return F.normalize(self.mlp(tokens).float(), dim=-1)

    def directions(self):  # (K, D)
        return self.gain[:, None] * F.normalize(self.prototypes, dim=-1)

    def forward(self, tokens):  # (N, C) -> (N, K) logits
        return self.embed(tokens) @ self.directions().T


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, tau_student=0.1, tau_teacher=0.1) -> Tensor:
    """Cross-entropy between the two distributions over prototypes, mean over tokens; (N, K) logits each (SnD Eq. 5)."""
    target = (teacher_logits.detach() / tau_teacher).softmax(-1)  # sg(.) of SnD Eq. 5
    return -(target * (student_logits / tau_student).log_softmax(-1)).sum(-1).mean()


class BlockedLoss(torch.autograd.Function):
    """`distill_loss` of the logits x W' and y V', a block of tokens at a time: no (N, K) tensor ever exists, which would take
    0.7 GB each at the paper's size. Also the teacher's entropy, the part of the loss that nothing can learn.

    The gradient is linear in the incoming one, so each block's is found while its logits are there, and not computed again.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,  # (N, D) student's embeddings
        W: Tensor,  # (K, D) its prototypes
        y: Tensor,  # (N, D) teacher's
        V: Tensor,  # (K, D)
        tau_student: float,
        tau_teacher: float,
        max_elements: int = 2**24,  # of a block of logits
    ):
        N, block = max(1, len(x)), max(1, max_elements // len(W))
        loss, entropy, grad_x, grad_W = x.new_zeros(()), x.new_zeros(()), torch.zeros_like(x), torch.zeros_like(W)
        for i in range(0, len(x), block):
            part, weights = x[i:i + block].detach().requires_grad_(), W.detach().requires_grad_()
            goal, share = y[i:i + block] @ V.T, len(part) / N
            with torch.enable_grad():
                value = share * distill_loss(part @ weights.T, goal, tau_student, tau_teacher)
            grad_x[i:i + block], new = torch.autograd.grad(value, (part, weights))
            grad_W += new
            loss += value.detach()
            entropy += share * distill_loss(goal, goal, tau_teacher, tau_teacher)
        ctx.save_for_backward(grad_x, grad_W)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_W = ctx.saved_tensors
        return grad * grad_x, grad * grad_W, None, None, None, None, None


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s, parameter by parameter, adapters A and B apart (SnD Sec. 3.5)."""
    for theirs, ours in zip(teacher.parameters(), student.parameters()):
        if ours.requires_grad:
            theirs.lerp_(ours, 1 - momentum)


class Network(nn.Module):
    """A ViT with its DINO head (None where the loss is on the tokens themselves): student and teacher are one each."""

    def __init__(self, vit, head):
        super().__init__()
        self.vit, self.head = vit, head

    def forward(self, images):  # (B, 3, H, W) -> (B, N, C)
        return self.vit(images).patches


def objective(student, teacher, seen: Tensor, goal: Tensor, args):
    """Loss of the student's tokens (N, C) against the teacher's splatted ones (N, C), and its part that cannot be learned."""
    if args.loss == "cosine":  # SnD Table 5 C
        return (1 - F.cosine_similarity(seen.float(), goal, dim=-1)).sum() / max(1, len(goal)), goal.new_zeros(())
    if args.loss == "feature":  # SnD Table 5 G: the rendered features themselves, as FiT3D has it
        return (seen.float() - goal).abs().mean(-1).sum() / max(1, len(goal)), goal.new_zeros(())
    if args.loss == "correspondence":  # as MEF (You et al. 2024): what is the same place together, the others of the view apart
        similarity = F.normalize(seen.float(), dim=-1) @ F.normalize(goal, dim=-1).T / 0.07
        each = torch.arange(len(goal), device=goal.device)
        return F.cross_entropy(similarity, each, reduction="sum") / max(1, len(goal)), goal.new_zeros(())
    with torch.autocast(goal.device.type, torch.bfloat16, enabled=args.bf16):
        x = student.head.embed(seen)
        with torch.no_grad():
            y = teacher.head.embed(goal)
    with torch.no_grad():
        V = teacher.head.directions()
    return BlockedLoss.apply(x, student.head.directions(), y, V, args.tau_student, args.tau_teacher)  # SnD Eq. 5


# ------------------------------------------------------------------------------------------------ the 3D-aware teacher


def lift_weights(t: splat.Triplet, grid, upscale="masks", drop_unmatched=False):
    """SnD Eq. 2-3 for both contexts: of which of their 2N tokens each Gaussian's feature is made (G, 4), in what parts (G, 4)."""
    masks = t.masks[:2] if upscale == "masks" else torch.zeros_like(t.masks[:2])  # SnD Table 5 B: plain bilinear
    pairs = [lift.upscale_weights(mask, grid, drop_unmatched) for mask in masks]
    N = grid[0] * grid[1]
    return torch.cat([index + v * N for v, (index, _) in enumerate(pairs)]), torch.cat([weight for _, weight in pairs])


@torch.no_grad()
def splat_features(
    tokens,  # (2, N, C) of the context views
    gaussians,  # G = 2 H W, one a context pixel
    t: splat.Triplet,
    grid,  # (h, w)
    blend=0.5,  # alpha of SnD Eq. 4
    upscale="masks",
    drop_unmatched=False,
    downscale="bilinear",
):
    """The 3D-aware teacher's tokens of the target view (N, C), and which of them are valid (N,): SnD Fig. 2, left to right."""
    index, weight = lift_weights(t, grid, upscale, drop_unmatched)
    features = sum(weight[:, k, None] * tokens.flatten(0, 1).float()[index[:, k]] for k in range(4))  # SnD Eq. 2: one a Gaussian
    opacities = gaussians.opacities * (weight.sum(1) > 0)  # nothing is lifted where Eq. 3 is 0/0 and dropped
    # Differs: the true covariances; the official render passes variances on as scales and draws reflected frames as spheres.
    render = splat.render_target(gaussians._replace(opacities=opacities), features, t)
    valid = render.alpha >= splat.COVERED
    rendered = render.features / render.alpha.clamp_min(1e-6)[..., None]  # Differs: not divided by alpha in the official code
    blended = splat.semantic_blend(rendered, t.masks[2], blend, valid)  # SnD Eq. 4
    return splat.splat_to_tokens(blended, valid, grid, downscale)


@torch.no_grad()
def triplet_operator(
    gaussians, t: splat.Triplet, grid, blend=0.5, upscale="masks", drop_unmatched=False, downscale="bilinear",
) -> splat.SplatOperator:
    """`splat_features` as a matrix on the 2N context tokens, equal to rounding."""
    index, weight = lift_weights(t, grid, upscale, drop_unmatched)
    opacities = gaussians.opacities * (weight.sum(1) > 0)
    return splat.splat_operator(gaussians.means, gaussians.covariances, opacities, index, weight, 2 * grid[0] * grid[1],
                                torch.linalg.inv(t.c2w[2]), t.K[2], *t.images.shape[-2:], grid, t.masks[2], blend, downscale)


@torch.no_grad()
def image_features(tokens: Tensor, t: splat.Triplet, grid, blend=0.5, upscale="masks", downscale="bilinear"):
    """The control without 3D, same shapes as `splat_features`: the teacher's own tokens (N, C) of the target view, upscaled and
    blended by its masks."""
    mask = t.masks[2] if upscale == "masks" else torch.zeros_like(t.masks[2])
    blended = splat.semantic_blend(lift.mask_aware_upscale(tokens.float(), mask, grid), t.masks[2], blend)
    return splat.splat_to_tokens(blended, torch.ones_like(mask, dtype=torch.bool), grid, downscale)


def jitter(images: Tensor, seed) -> Tensor:
    """Brightness, contrast and saturation changed by up to 40 % each; images (B, 3, H, W)."""
    brightness, contrast, saturation = (0.6 + 0.8 * torch.rand(3, generator=torch.Generator().manual_seed(seed))).tolist()
    images = images * brightness
    for centre, factor in ((images.mean((1, 2, 3), keepdim=True), contrast), (images.mean(1, keepdim=True), saturation)):
        images = centre + factor * (images - centre)
    return images.clamp(0, 1)


# ------------------------------------------------------------------------------------------------ triplets and their operators


def draw_triplets(scenes, count, seed, to_context=False):
    """[(scene, (context_a, context_b, target))]; `to_context` takes one of the contexts as the target (SnD Table 5 E)."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in range(count):
        # Sec. 3.1: a scene, two contexts, a distinct target.
        scene = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
        a, b, target = data.sample_triplet(scene, generator)
        found.append((scene, (a, b, (a, b)[n % 2] if to_context else target)))
    return found


def schedule(count, draws, seed) -> list[int]:
    """Which of `count` triplets each of `draws` takes: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(draws / count))]
    return torch.cat(rounds)[:draws].tolist()


def weights_id(network) -> str | None:  # of what a network computes
    if network is None:
        return None
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


class Source:
    """Triplets of the scenes at their sizes, their frozen geometry, and the splat operators that both make.

    An operator lies in a file named after all that it depends on (cameras and files of the three views, geometry and its
    weights, masks, blending, sizes): runs with other seeds, losses or backbones of one patch size share it, and none is stale.
    """

    def __init__(self, scenes, args, patch):
        self.args, self.patch = args, patch
        self.sizes = {scene.name: data.fit_size(scene, args.pixels, patch) for scene in scenes}  # a subset keeps the name
        for name, size in self.sizes.items():
            if min(size) < 2 * patch:
                raise ValueError(f"--pixels {args.pixels} leaves {name} fewer than 2x2 patches of {patch} pixels; raise it")
        self.net = lift.load_mvsplat(args.mvsplat).to(args.device) if args.geometry == "mvsplat" else None
        names = ("geometry", "near", "far", "blend", "masks", "upscale", "drop_unmatched", "downscale")
        self.how = {name: getattr(args, name) for name in names}
        self.how.update(version=splat.OPERATOR_FORMAT, weights=weights_id(self.net), patch=patch)
        self.steps = args.blend, args.upscale, args.drop_unmatched, args.downscale  # what lifting and splatting are told

    def grid(self, t: splat.Triplet):  # (h, w)
        return tuple(side // self.patch for side in t.images.shape[-2:])

    def load(self, scene, indices) -> splat.Triplet:
        args = self.args
        return splat.load_triplet(scene, indices, self.sizes[scene.name], args.device, args.masks, args.near, args.far)

    def images(self, scene, indices) -> Tensor:  # (3, 3, H, W), all that a step needs beside the operator
        return torch.stack([scene.view(i, self.sizes[scene.name], maps=False).image for i in indices]).to(self.args.device)

    @torch.no_grad()
    def reconstruct(self, t: splat.Triplet, geometry=None):
        """The frozen 3D model Phi_geom: two context views -> one Gaussian a pixel (SnD Eq. 1)."""
        geometry = geometry or self.args.geometry
        if geometry == "depth" and t.depth is None:
            raise data.DataError(f"{t.name}: no measured depth for --geometry depth; use mvsplat or sweep")
        return splat.reconstruct(geometry, t, self.net)[0]

    def path(self, scene, indices) -> Path:
        frames, facts = [scene.frames[i] for i in indices], [self.how, self.sizes[scene.name], scene.depth_range]
        for frame in frames:
            facts += [frame.name, frame.K.tolist(), frame.c2w.tolist(), repr(frame.distortion)]
            files = [Path(file).stat() for file in (frame.image, frame.mask, frame.depth) if file]
            facts += [(file.st_size, file.st_mtime_ns) for file in files]
        name = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
        return Path(self.args.operators) / name[:2] / f"{name}.safetensors"

    def operator(self, scene, indices) -> splat.SplatOperator:
        """From its file, which is written where it is missing or damaged."""
        path, args = self.path(scene, indices), self.args
        if path.exists():
            with contextlib.suppress(ValueError):
                return splat.SplatOperator.load(path).to(args.device)
        t = self.load(scene, indices)
        made = triplet_operator(self.reconstruct(t), t, self.grid(t), *self.steps)
        made.save(path)
        return splat.SplatOperator.load(path).to(args.device)  # rounded like those that are read, or resuming were not exact

    def prepare(self, triplets, rank, world):
        """Computes the operators that are missing, every `world`-th of them in this process."""
        paths = {self.path(*place): place for place in triplets}
        missing = [place for path, place in paths.items() if not path.exists()][rank::world]
        for place in tqdm(missing, desc="splat operators", disable=rank > 0 or not missing):
            self.operator(*place)
        size = sum(path.stat().st_size for path in paths if path.exists())
        print(f"{len(paths)} splat operators, {size / 1e6:.1f} MB, in {self.args.operators}/")

    def teach(self, teacher, scene, indices, seed):
        """-> images (3, 3, H, W) and the function that makes the goal of the target view (N, C) and where it is valid (N,)."""
        args = self.args
        if not args.online and args.target != "image":
            images, operator = self.images(scene, indices), self.operator(scene, indices)
            return images, lambda: (operator(teacher(images[:2]).flatten(0, 1)), operator.valid)
        t = self.load(scene, indices)
        grid = self.grid(t)
        if args.target == "image":
            how = args.blend, args.upscale, args.downscale
            return t.images, lambda: image_features(teacher(jitter(t.images[2:], seed))[0], t, grid, *how)
        return t.images, lambda: splat_features(teacher(t.images[:2]), self.reconstruct(t), t, grid, *self.steps)


def ahead(function, items, count=4):
    """function(item) of each item in turn, found by threads while the ones before are used."""
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        items = iter(items)
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, count))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        finally:
            for future in waiting:
                future.cancel()


# ------------------------------------------------------------------------------------------------ a run that cannot be lost


class Run:
    """`for step in run`: the steps of a training run, kept so that it can be stopped or killed at any moment and goes on.

    In the folder args.out lie log.jsonl, settings.json and the last two checkpoints. `--resume` goes on from the newer one
    that is whole. On a CPU the continued run comes to the same bits as one that was never stopped. Uses args.out,
    args.max_steps, args.resume and args.save_minutes; all other settings must stay the same when a run goes on.
    """

    FREE = "out device resume save_minutes heldout eval_every operators grad_checkpoint because no_blend".split()  # may change

    def __init__(self, args, networks, optimiser, generator=None, rank=0, world=1, name="distil"):
        """networks: {name: (module, names of those of its parameters that change)}; generator: whose state is kept, if any."""
        self.args, self.networks, self.optimiser, self.generator = args, networks, optimiser, generator
        self.out, self.first, self.world, self.name = Path(args.out), rank == 0, world, name  # rank 0 alone writes
        self.path, self.previous = checkpoint_paths(args.out)
        self.settings = {key: value for key, value in vars(args).items() if key not in self.FREE}
        found = [self.find() if self.first else None]
        if world > 1:
            dist.broadcast_object_list(found)  # rank 0's, whatever the other machines have on disk
        self.start, stored = found[0]
        if stored:
            self.restore(stored)
            print(f"resumed at step {self.start} of {args.max_steps}")

    def __iter__(self):
        self.asked, self.clock = False, time.monotonic()
        if self.first:
            self.open_log()
        self.bar = tqdm(range(self.start, self.args.max_steps), initial=self.start, total=self.args.max_steps, desc=self.name,
                        unit="step", disable=not self.first)
        before = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        saved = time.monotonic()
        try:
            for self.step in self.bar:
                yield self.step
                done = self.step + 1 == self.args.max_steps
                asked = max(averaged([float(self.asked)], self.world, self.args.device)) > 0  # any of the processes
                if self.first and (asked or done or time.monotonic() - saved >= 60 * self.args.save_minutes):
                    self.save(self.step + 1)
                    saved = time.monotonic()
                if asked and not done:
                    raise KeyboardInterrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self, value, what, kind="loss"):
        """Stops the run where the loss of `what`, e.g. the triplets of the step, is not a finite number."""
        if not math.isfinite(value):
            raise ValueError(f"step {self.step}: the {kind} is {float(value)} for {what}; start again with a lower learning rate "
                             "and another --out")

    def log(self, show=("loss",), **values):
        """Adds a line to log.jsonl; the numbers named in `show` stand beside the bar as well."""
        if self.first:
            self.bar.set_postfix({name: f"{values[name]:.4f}" for name in show})
            line = dict(step=self.step, **values, seconds=round(time.monotonic() - self.clock, 2))
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def ask_to_stop(self, number, frame):
        if self.asked and number == signal.SIGINT:  # a second Ctrl-C does not wait for the end of the step
            raise KeyboardInterrupt
        self.asked = True

    def save(self, step):
        """Writes a checkpoint; the one before is kept until the next."""
        tensors = {f"{who}.{name}": p for who, (network, names) in self.networks.items()
                   for name, p in network.named_parameters() if name in names}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{i}.{key}": value for key, value in state.items()})
        if self.generator:
            tensors["generator"] = self.generator.get_state()
        aside = self.out / "checkpoint.new.safetensors"
        lift.save_tensors(aside, tensors, {"step": str(step), "settings": json.dumps(self.settings)})
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(aside, self.path)  # killed before this line, the run goes on from the previous one

    @torch.no_grad()
    def restore(self, tensors):
        for who, (network, names) in self.networks.items():
            for name, p in network.named_parameters():
                if name in names:
                    p.copy_(tensors[f"{who}.{name}"])
        state = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, i, name = key.split(".")
                state.setdefault(int(i), {})[name] = value
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        if self.generator:
            self.generator.set_state(tensors["generator"])

    def find(self):
        """-> (step, tensors) to go on from, or (0, None). Refuses, in one line, to lose a run that is not finished."""
        found = [path for path in (self.path, self.previous) if path.exists()]
        if not found:
            return 0, None
        try:
            (step, old, tensors), path = read_run(found[0]), found[0]
        except ValueError as error:
            if len(found) == 1 or not self.args.resume:
                raise
            (step, old, tensors), path = read_run(found[1]), found[1]
            print(f"{error}; going on from {path}")
        if not self.args.resume and step < old["max_steps"]:
            raise ValueError(f"{path}: a run stopped here at step {step} of {old['max_steps']}; --resume goes on, "
                             "another --out starts afresh, or remove the file")
        changed = [f"{key} {old.get(key)} -> {value}" for key, value in self.settings.items() if old.get(key) != value]
        if self.args.resume and changed:
            raise ValueError(f"{path}: was made with other settings ({', '.join(changed)}); use the old ones or another --out")
        return (step, tensors) if self.args.resume else (0, None)

    def open_log(self):
        """Keeps the lines of log.jsonl before the step where the run goes on, and removes what is left of other runs."""
        lines, path = [], self.out / "log.jsonl"
        for line in path.read_text().splitlines() if self.start and path.exists() else []:
            with contextlib.suppress(ValueError):  # the line that was being written when the power went
                lines += [line] if json.loads(line)["step"] < self.start else []
        finished = [] if self.start else [self.path, self.previous]
        for file in (*finished, *self.out.glob(".*.[0-9]*.[0-9]*")):  # the latter are files that a kill left half written
            file.unlink(missing_ok=True)
        data.write_whole(path, "".join(line + "\n" for line in lines).encode())
        data.write_whole(self.out / "settings.json", json.dumps(vars(self.args), indent=1).encode())


def checkpoint_paths(folder):  # -> the newest one and the one before
    return Path(folder) / "checkpoint.safetensors", Path(folder) / "checkpoint.previous.safetensors"


def read_run(path):  # -> step, settings, tensors
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        return int(meta["step"]), json.loads(meta["settings"]), tensors
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a whole checkpoint of this stage; remove it to start again") from None


# ------------------------------------------------------------------------------------------------ measuring agreement


class Agreement(NamedTuple):
    matching: float  # share of target tokens whose nearest splatted token is the right one, within one patch
    cosine: float  # mean cosine of a target token and the one splatted there
    rank: float  # effective rank of the target tokens

    def __str__(self):
        return f"matching {100 * self.matching:.1f} %, cosine {self.cosine:.3f}, effective rank {self.rank:.1f}"


def effective_rank(tokens: Tensor) -> float:
    """(M, C) -> in how many directions they vary: exp(entropy of the normalised singular values) (Roy and Vetterli 2007)."""
    share = F.normalize(torch.linalg.svdvals((tokens - tokens.mean(0)).double()), p=1, dim=0)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item()


def plain_operator(source, t: splat.Triplet) -> splat.SplatOperator:
    """What agreement is measured with: by measured depth where it exists, without masks or blending, so that neither a poor
    reconstruction nor masks help."""
    gaussians = source.reconstruct(t, None if t.depth is None else "depth")
    return triplet_operator(gaussians, t, source.grid(t), blend=1.0, upscale="bilinear")


@torch.no_grad()
def agreement(vit, triplets, operators) -> Agreement:
    """How well `vit` agrees with itself across views: its tokens of the target against its splatted tokens of the contexts.

    Measured so that only what is in the picture counts. Tokens are taken relative to the mean token of their place in the
    grid, over all views measured: features that know their place alone would match in 2 of 3 cases, as views move
    little, and a part that all tokens share would make any cosine good. Collapsed features then match by chance.
    """
    tokens, of_shape = [vit(t.images).patches for t in triplets], {}  # (3, N, C) each; scenes may differ in aspect and grid
    for t, x in zip(triplets, tokens):
        of_shape.setdefault(t.images.shape, []).append(x)
    place = {shape: torch.cat(views).mean(0) for shape, views in of_shape.items()}  # (N, C)
    tokens = [x - place[t.images.shape] for t, x in zip(triplets, tokens)]
    right = cosines = total = 0
    for t, x, operator in zip(triplets, tokens, operators):
        columns, at = t.images.shape[-1] // vit.patch, operator.valid.nonzero()[:, 0]
        if len(at):
            splatted = operator(x[:2].flatten(0, 1))
            similarity = F.normalize(x[2][at], dim=1) @ F.normalize(splatted[at], dim=1).T
            nearest = at[similarity.argmax(1)]
            off = torch.maximum((nearest // columns - at // columns).abs(), (nearest % columns - at % columns).abs())
            right, total = right + (off <= 1).sum().item(), total + len(at)
            cosines += similarity.diagonal().sum().item()
    if not total:
        raise data.DataError(f"{triplets[0].name}: the splatted contexts cover no token of the target; give --near and --far "
                             "in the scene's unit (python 01_data.py shows the range that was taken)")
    return Agreement(right / total, cosines / total, effective_rank(torch.cat([x[2] for x in tokens])))


@torch.no_grad()
def heldout_picture(path, before, teacher, after, triplets, source):
    """Rows are fixed held-out targets: target | student before | teacher target | student after; one PCA basis a row."""
    rows, of_target = [], {tuple(t.c2w[2].flatten().tolist()): t for t in reversed(triplets)}
    for t in list(of_target.values())[:-7:-1]:
        grid = source.grid(t)
        goal, valid = splat_features(teacher(t.images[:2]).patches, source.reconstruct(t), t, grid, *source.steps)
        maps = [before(t.images[2:]).patches[0], goal, after(t.images[2:]).patches[0]]
        basis = lift.pca_basis(torch.cat([maps[0], goal[valid], maps[2]]))
        colours = [lift.pca_colours(m.view(*grid, -1), basis) for m in maps]
        colours[1] = colours[1] * valid.view(grid)  # black: not seen by the contexts
        rows.append([t.images[2], *(F.interpolate(c[None], t.images.shape[-2:])[0] for c in colours)])
    return data.picture_grid(path, ["target view", "student before (PCA)", "teacher target", "student after"], rows)


def curve_picture(path, log, before: Agreement, args):
    """What log.jsonl holds as curves over the steps: the loss, smoothed, and the held-out agreement."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    key, window = ("kl" if args.loss == "distill" else "loss"), max(1, len(lines) // 40)
    losses = [line[key] for line in lines]
    parts = {lines[i]["step"] + 1: losses[i:i + window] for i in range(0, len(lines), window)}
    smooth = [(step, sum(part) / len(part)) for step, part in parts.items()]
    measured = [(line["step"] + 1, 100 * line["matching"]) for line in lines if "matching" in line]
    charts = [data.line_chart(f"{title} over steps", {name: curve}) for title, name, curve in (
        ("loss above the teacher's entropy" if key == "kl" else "loss", f"{args.loss} loss", smooth),
        ("agreement of held-out views", "matching, %", [(0, 100 * before.matching), *measured]))]
    return data.picture_grid(path, [""] * len(charts), [charts], scale=1)


# ------------------------------------------------------------------------------------------------ main


def parse(argv):
    parser = argparse.ArgumentParser(description="Distil 3D-aware features: student and EMA teacher, splatted targets (SnD). "
                                     "[p] marks what --preset sets.")
    add, flag = parser.add_argument, lambda name, help: parser.add_argument(name, action="store_true", help=help)
    add("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    add("--out", default="out/04_distill")
    add("--preset", choices=list(PRESETS), help="vits and vitb are the paper's setting, tiny takes minutes on a CPU; "
        "default: vits on a CUDA machine, tiny elsewhere")
    add("--model", help="ViT to start from: 'tiny', a published name such as dinov2_vits14, a file or folder [p]")
    add("--geometry", choices=("mvsplat", "sweep", "depth"), default="mvsplat", help="learned, stereo by hand, or measured depth")
    add("--mvsplat", help="MVSplat weights: 'tiny', re10k.ckpt, or what 03_splat.py has fine-tuned [p]")
    add("--pixels", type=splat.positive, help="pixels a view, its aspect kept; lower it when memory runs out [p]")
    add("--near", type=float, help="nearest depth in the scene's unit; default: from depth maps, sparse points or cameras")
    add("--far", type=float, help="farthest depth")
    add("--max_steps", type=splat.positive, help="training steps [p]")
    add("--batch", type=splat.positive, help="triplets a step, over all processes [p]")
    add("--triplets", type=splat.positive, help="triplets drawn, each with an operator on disk; fewer are prepared sooner [p]")
    add("--operators", default="out/operators", help="folder of splat operators; runs with the same scenes share it")
    flag("--online", "no operators: lift, splat and blend all channels in each step")
    add("--lr", type=float, help="learning rate of what is trained of the ViT, cosine to 0; halve it when the loss jumps [p]")
    add("--head_lr", type=float, help="the head's; if large, the head learns the task in the ViT's place [p]")
    add("--rank", type=splat.positive, help="rank of the LoRA adapters [p]")
    add("--full_finetune", action=argparse.BooleanOptionalAction, help="train the whole ViT instead of adapters, "
        "with a tenth of the --lr [p]")
    add("--hidden", type=splat.positive, help="width of the head's MLP [p]")
    add("--bottleneck", type=splat.positive, help="width of the head's bottleneck [p]")
    add("--prototypes", type=splat.positive, help="number of prototypes; lower it when memory runs out [p]")
    add("--momentum", type=float, help="EMA momentum of the teacher [p]")
    add("--ema_every", type=splat.positive, help="steps between teacher updates [p]")
    add("--tau_student", type=float, help="temperature of the student's softmax [p]")
    add("--tau_teacher", type=float, help="of the teacher's; lower is sharper, and may collapse [p]")
    add("--bf16", action=argparse.BooleanOptionalAction, help="the ViTs and the head's MLP in bfloat16 [p]")
    flag("--grad_checkpoint", "compute activations twice instead of keeping them, when memory runs out")
    flag("--shared_head", "the teacher uses the student's head, not an EMA of it")
    flag("--frozen_teacher", "the teacher stays as it starts (Table 5 D)")
    add("--loss", choices=("distill", "cosine", "feature", "correspondence"), default="distill",
        help="cross-entropy over prototypes, or on the tokens themselves: cosine (Table 5 C), L1 (G, with --frozen_teacher), or "
             "contrast of places (as MEF, with --no_blend --upscale bilinear)")
    add("--target", choices=("novel", "context", "image"), default="novel",
        help="what is splatted into: a third view, one of the contexts (Table 5 E), or nothing, the teacher looks at the target itself "
             "under photometric jitter (the control without 3D)")
    add("--blend", type=float, default=0.5, help="alpha of SnD Eq. 4")
    flag("--no_blend", "as --blend 1 (Table 5 A)")
    add("--upscale", choices=("masks", "bilinear"), default="masks", help="mask-aware or plain upscaling (Table 5 B)")
    flag("--drop_unmatched", "do not lift pixels where Eq. 3 is 0/0")
    add("--downscale", choices=tuple(splat.TAPS), default="bilinear", help="from pixels to tokens: at a patch's centre, or its mean")
    add("--masks", choices=("files", "superpixels"), default="files", help="superpixels also stand in for missing files (Table 5 F)")
    add("--heldout", type=splat.positive, default=24, help="held-out triplets that are measured before, during and after")
    add("--eval_every", type=splat.positive, help="steps between these measurements; default: six a run")
    add("--save_minutes", type=float, default=2.0, help="between checkpoints; 0 writes one after each step")
    flag("--resume", "go on from the checkpoint in --out")
    flag("--skip_bad_frames", "leave out frames without an image or a valid pose")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torchrun gives each process its own")
    add("--seed", type=int, default=0)
    return settle(parser.parse_args(argv))


def settle(args):  # fills in what the preset sets, and says in args.because why it was taken
    cuda = torch.cuda.is_available()
    args.because = "asked for" if args.preset else "a CUDA machine" if cuda else "no CUDA device; vits is the paper's setting"
    args.preset = args.preset or ("vits" if cuda else "tiny")
    preset = dict(PRESETS[args.preset])
    if not args.mvsplat and not Path(preset["mvsplat"]).exists():
        preset["mvsplat"] = "tiny"
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.blend = 1.0 if args.no_blend else args.blend
    args.eval_every = args.eval_every or max(1, args.max_steps // 6)
    return args


def processes(args, batch):
    """-> (rank, world): (0, 1) alone, else as torchrun has started us; a step's `batch` is shared by all."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise ValueError(f"--batch {batch} cannot be shared by {world} processes; make it a multiple of {world}")
    if world > 1:
        cuda = args.device.startswith("cuda")
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        # Rank 0 may prepare and measure for long while the others wait.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
        atexit.register(dist.destroy_process_group)
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def few_threads(args):
    """The tensors of preset tiny are so small that a second thread costs more than it brings: 23 s for 40 steps, 19 s without."""
    if args.preset == "tiny" and args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def prepare(args):  # -> training triplets, held-out triplets, where they come from
    scenes = whole = data.open_scenes(args.scene_dir, args.skip_bad_frames)
    if args.geometry == "depth":
        scenes = [scene.subset([i for i, frame in enumerate(scene.frames) if frame.depth]) for scene in scenes]
        scenes = [scene for scene in scenes if len(scene) >= 3]
        if not scenes:
            raise data.DataError(f"{args.scene_dir}: no scene has measured depth for three views; "
                                 "use --geometry mvsplat or sweep")
    if args.masks == "files" and not any(frame.mask for scene in scenes for frame in scene.frames):
        print("no instance masks: SLIC superpixels stand in (folder masks/ beside images/ is read when it is there)")
    source = Source(scenes, args, lift.load_vit(args.model).patch)
    scenes, heldout = splat.hold_out(scenes, args.heldout, args.seed, whole)
    # Differs: a fresh triplet a step in the paper; here --triplets of them, again and again, so that operators are reused.
    count = min(args.triplets, args.max_steps * args.batch)
    return draw_triplets(scenes, count, args.seed, args.target == "context"), heldout, source


def trained(module):  # the parameters that training changes, by name
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def networks_of(args):  # -> the ViT to start from, student, teacher, the student's optimiser
    torch.manual_seed(args.seed)
    before = lift.load_vit(args.model).to(args.device)
    vit = copy.deepcopy(before) if args.full_finetune else add_lora(copy.deepcopy(before), args.rank, args.rank)
    vit.mask_token.requires_grad_(False)  # takes no part
    head = DINOHead(before.dim, args.hidden, args.bottleneck, args.prototypes) if args.loss == "distill" else None
    student = Network(vit, head).to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)  # starts alike; it is never trained, it follows
    # Differs: Sec. 3.5 writes of a shared head; by default, as in the official code, the teacher's head is an EMA like its ViT.
    teacher.head = student.head if args.shared_head else teacher.head
    student.vit.checkpointing = args.grad_checkpoint
    # Differs: one learning rate in the paper. In a short run the head would then learn the task and the ViT would not (README).
    groups = [(trained(student.vit), args.lr)] + ([(trained(head), args.head_lr)] if head else [])
    optimiser = torch.optim.Adam([{"params": list(group.values()), "lr": lr, "peak": lr} for group, lr in groups])
    return before, student, teacher, optimiser


def averaged(values: list[float], world, device) -> list[float]:  # over the processes
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / world).tolist()


def learn(batch, model, student, teacher, args, world):
    """Sec. 3.2-3.5 for a step's triplets: leaves gradients; -> mean loss, teacher's entropy, share of valid tokens."""
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)
    sums = [0.0, 0.0, 0.0]
    for n, (images, teach) in enumerate(batch):
        # Sec. 3.2-3.4: the teacher's context features, lifted, splatted and blended in the target view.
        with torch.no_grad(), autocast():
            goal, valid = teach()
        # Sec. 3.5: the student sees the target image alone. Differs: invalid tokens leave the loss, they are not zeroed.
        with contextlib.nullcontext() if world == 1 or n + 1 == len(batch) else model.no_sync():
            with autocast():
                seen = model(images[2:])[0]
            loss, entropy = objective(student, teacher, seen[valid], goal[valid], args)
            (loss / len(batch)).backward()
        parts = loss.item(), entropy.item(), valid.float().mean().item()
        sums = [total + part / len(batch) for total, part in zip(sums, parts)]
    return sums


def run(args):
    out, (rank, world) = Path(args.out), processes(args, args.batch)
    first = rank == 0
    few_threads(args)
    if not first:
        sys.stdout = open(os.devnull, "w")  # one voice
        dist.barrier()  # until rank 0 has made or fetched what is missing
    print(f"preset {args.preset} ({args.because}): {args.model} ViT at about {args.pixels} pixels, {args.max_steps} steps, "
          f"{args.geometry} geometry{f' ({args.mvsplat} weights)' if args.geometry == 'mvsplat' else ''}, on {args.device}")
    found = [splat.find_checkpoint(args) if first else None]
    triplets, heldout, source = prepare(args)
    before, student, teacher, optimiser = networks_of(args)
    if world > 1:
        if first:
            dist.barrier()
        dist.broadcast_object_list(found)
    (start, stored), names = found[0], set(trained(student))
    followed = {name for name in names if not (args.shared_head and name.startswith("head."))}
    networks = {"student": (student, names), "teacher": (teacher, followed)}
    if stored:
        splat.restore(stored, networks, optimiser)
        print(f"resumed at step {start} of {args.max_steps}")
    if not args.online and args.target != "image":
        source.prepare(triplets, rank, world)
    if first:
        heldout = [source.load(*place) for place in tqdm(heldout, desc="held-out triplets", leave=False)]
        operators = [plain_operator(source, t) for t in heldout]
        agreed = agreement(before, heldout, operators)
    # All that is random is a function of the seed and the step, so a run that goes on needs no generator's state.
    places = schedule(len(triplets), args.max_steps * args.batch, args.seed)
    draws = lambda step: range(step * args.batch, (step + 1) * args.batch)
    load = lambda step: [source.teach(teacher, *triplets[places[n]], seed=args.seed + n) for n in draws(step)[rank::world]]
    model = nn.parallel.DistributedDataParallel(student) if world > 1 else student  # averages gradients over processes
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="distil", unit="step", disable=not first)
    clock = saved = time.monotonic()
    with (splat.open_log(out, args, start) if first else contextlib.nullcontext() as log, splat.Stop() as stop,
          contextlib.closing(ahead(load, range(start, args.max_steps))) as batches):
        for step, batch in zip(bar, batches):
            for group in optimiser.param_groups:
                group["lr"] = 0.5 * group["peak"] * (1 + math.cos(math.pi * step / args.max_steps))
            optimiser.zero_grad(set_to_none=True)
            sums = learn(batch, model, student, teacher, args, world)
            loss, entropy, valid, asked = averaged([*sums, float(stop.asked)], world, args.device)
            used = [splat.name_of(*triplets[places[n]]) for n in draws(step)]
            if not math.isfinite(loss):
                raise ValueError(f"step {step}: the loss is {loss} for {', '.join(used)}; "
                                 "start again with a lower --lr and another --out")
            optimiser.step()
            if not args.frozen_teacher and (step + 1) % args.ema_every == 0:
                ema_update(teacher, student, args.momentum)  # Differs: after the optimiser's step, in the official code before
            done = step + 1 == args.max_steps
            if first:
                bar.set_postfix(loss=f"{loss:.4f}", kl=f"{loss - entropy:.4f}")
                line = dict(step=step, triplets=used, valid=round(valid, 4), loss=round(loss, 6), kl=round(loss - entropy, 6),
                            lr=optimiser.param_groups[0]["lr"], seconds=round(time.monotonic() - clock, 2))
                if (step + 1) % args.eval_every == 0:
                    line.update(agreement(student.vit, heldout, operators)._asdict())
                log.write(json.dumps(line) + "\n")
                if asked or done or time.monotonic() - saved >= 60 * args.save_minutes:
                    log.flush()
                    splat.save_checkpoint(out, step + 1, splat.run_settings(args), networks, optimiser)
                    saved = time.monotonic()
            if asked and not done:
                raise KeyboardInterrupt
    if first:
        report(out, before, student.vit, teacher.vit, agreed, heldout, operators, source)


def report(out, before, adapted, teacher, agreed, heldout, operators, source):
    """Save the student; print the answer beside its baseline, and where everything is."""
    after = merge_lora(adapted).eval()
    lift.save_vit(after, out / "student")
    if not source.args.full_finetune:
        lift.save_tensors(out / "adapters.safetensors", trained(adapted))
    final = agreement(after, heldout, operators)
    pictures = [heldout_picture(out / "heldout.png", before, teacher, after, heldout, source),
                curve_picture(out / "curve.png", out / "log.jsonl", agreed, source.args)]
    result = dict(before=agreed._asdict(), after=final._asdict(), heldout=[t.name for t in heldout])
    lift.write_whole(out / "result.json", json.dumps(result, indent=1).encode())
    print(f"{len(heldout)} held-out triplets\n  before: {agreed}\n  after:  {final}\n  ->  ", end="")
    print(*pictures, out / "student", sep=", ")


def main(argv=None):
    args = parse(argv)
    with data.explained(args, f"`--resume --out {args.out}` goes on from the last checkpoint"):
        run(args)


if __name__ == "__main__":
    main()
