"""Splat and Distill: a student learns from its own teacher's features, carried through 3D into the view it looks at.

Paper   Splat and Distill (SnD) Sec. 3.1-3.5, Eq. 1-5, Table 5, Appendix A.3.
In      posed views (01_data), a pretrained ViT and a geometry (02_lift). Masks are optional: superpixels stand in.
Out     out/04_distill/: student/ (a Hugging Face DINOv2 folder with a model card), log.jsonl, pictures, checkpoints.
Run     python 04_distill.py --preset tiny            built-in rooms, no downloads: 3 minutes on a 2-core CPU
        python 04_distill.py --scene_dir my_scene     your own posed images; on a CUDA machine in the paper's setting
        python 04_distill.py --finetune_geometry 40000 --mvsplat re10k.ckpt     as the paper: MVSplat is adapted first
        python 04_distill.py --resume                 goes on after a kill, from the last checkpoint
        torchrun --nproc_per_node=4 04_distill.py --batch 4                     four GPUs, one triplet each
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py tiny/rooms.py tiny/vit.safetensors tiny/mvsplat.safetensors
Read    SETTINGS, DINOHead, distill_loss, LoRALinear, add_lora, Network, ema_update, networks_of, upscale_masks,
        splat_features, Sample, objective, learn, distil, set_rates
Try     --preset tiny alone: matching of held-out views 58.5 -> 69.3 %, effective rank of the tokens 99 -> 91; then
        --target image --no_blend --upscale bilinear --out out/2d: 59.3 %. Here the teacher sees the target, its colours
        jittered, without 3D and without masks. docs/study.md tells what each of the two brings.
        --no_blend: 69.2 %, rank 95. Blending adds nothing to this matching (to recall of 05 it does: docs/study.md).
Not     centering or temperature schedules (A.3 has none either); the head is not sharded over GPUs.
Words   context views: the two that the teacher sees and that are splatted; target view: what the student sees.
        Tokens are a ViT's patch features (N, C), N = h w of the grid. Prototypes are the P directions of the head.

The geometry and the masks of a triplet never change. So all of Sec. 3.2-3.4 is a linear map of the context views'
tokens, the splat operator (03_splat), made of sparse matrices. It is computed once per triplet and kept on disk.
`--online` takes the plain path in each step, `splat_features` below: the same loss to rounding.
"""
from __future__ import annotations

import argparse
import atexit
import contextlib
import copy
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
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

# What `args` holds below, beside some flags that `parse` adds. `vits` and `vitb` are the paper's setting (A.3; the
# temperatures are its code's, triplets and bfloat16 ours); `tiny` fits the same loop into minutes on a CPU.
# Differs: the official code renders at 584x876 (A.6), and resizes to 574x868, 41x62 patches, for the ViT; we load and
# splat at 574x868, so that nothing is resampled twice.
SETTINGS = {  # name: (tiny, vits, help)
    "model": ("tiny", "dinov2_vits14", "ViT to start from: 'tiny', a published name, a file or folder"),
    "mvsplat": ("tiny", "re10k.ckpt", "MVSplat weights: 'tiny', re10k.ckpt, or a file that --finetune_geometry made"),
    "pixels": (96 * 128, 574 * 868, "pixels a view, its aspect kept; lower it when memory runs out"),
    "triplets": (300, 10_000, "triplets drawn, each with an operator on disk; fewer are prepared sooner"),
    "max_steps": (200, 50_000, "training steps"),
    "batch": (4, 1, "triplets a step, over all processes"),
    "full_finetune": (True, False, "train the whole ViT instead of adapters, at the same --lr"),
    "lr": (3e-4, 2e-5, "learning rate of what is trained of the ViT, cosine to 0; halve it when the loss jumps"),
    "head_lr": (1e-4, 2e-5, "the head's; if large, the head learns the task in the ViT's place"),
    "rank": (8, 8, "rank of the LoRA adapters"),
    "hidden": (512, 2048, "width of the head's MLP"),
    "bottleneck": (128, 256, "width of the head's bottleneck"),
    "prototypes": (2048, 65_536, "number of prototypes; lower it when memory runs out"),
    "momentum": (0.99, 0.999, "EMA momentum of the teacher"),
    "ema_every": (10, 10, "steps between teacher updates"),
    "tau_student": (0.1, 1.0, "temperature of the student's softmax"),
    "tau_teacher": (0.05, 1.0, "the teacher's; a lower one is sharper; too low, and features may collapse"),
    "bf16": (False, True, "the ViTs and the head's MLP in bfloat16")}
PRESETS = {preset: {name: row[column] for name, row in SETTINGS.items()}
           for preset, column in (("tiny", 0), ("vits", 1), ("vitb", 1))}
PRESETS["vitb"]["model"] = "dinov2_vitb14"

# ------------------------------------------------------------------------ 1. What is compared


class DINOHead(nn.Module):
    """DINOv2's head, in the sizes of SnD A.3: a three-layer MLP to E channels, then the cosine with each of P
    prototypes, times a learned gain (together a weight-normalised linear layer)."""

    def __init__(self, in_dim, hidden=2048, bottleneck=256, prototypes=65536):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        self.gain = nn.Parameter(torch.ones(prototypes))
        layers = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        for weight in [layer.weight for layer in layers] + [self.prototypes]:
            nn.init.trunc_normal_(weight, std=0.02)
        for layer in layers:
            nn.init.zeros_(layer.bias)

    def embed(self, tokens):  # (N, C) -> (N, E), in float32; in bfloat16 a sharp softmax changes by several per cent
        return F.normalize(self.mlp(tokens).float(), dim=-1)

    def directions(self):  # (P, E)
        return self.gain[:, None] * F.normalize(self.prototypes, dim=-1)

    def forward(self, tokens):  # (N, C) -> (N, P) logits
        return self.embed(tokens) @ self.directions().T


def distill_loss(
    student_logits: Tensor,  # (N, P)
    teacher_logits: Tensor,  # (N, P)
    tau_student,
    tau_teacher,
) -> Tensor:
    """Cross-entropy of the two distributions over prototypes, mean over tokens; called by `blocked_loss` (workshop)."""
    # Differs: the paper does not give its temperatures, and its code has 1.0 for both, which leaves both distributions
    # nearly uniform; preset `tiny` has 0.1 and 0.05, chosen by a study (docs/study.md).
    target = (teacher_logits.detach() / tau_teacher).softmax(-1)  # detach is sg(.), the stop-gradient
    return -(target * (student_logits / tau_student).log_softmax(-1)).sum(-1).mean()  # SnD Eq. 5


# ------------------------------------------------------------------------ 2. Who is taught, and by whom


class LoRALinear(nn.Module):
    """W x + (alpha / r) B A x; `add_lora` freezes W. B starts at 0, so training starts at the pretrained network."""

    def __init__(self, base: nn.Linear, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model, rank=8, alpha=8.0):
    """Freezes `model` and puts adapters on the attention's qkv and proj, in place; returns the model. (SnD A.3)"""
    # Differs: the official code finds layers by the names "qkv" and "proj", so that it adapts the patch embedding's
    # projection as well, and has a dropout of 10 %, in the teacher too. We adapt the attention alone, without dropout.
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "proj"):
            setattr(block.attn, name, LoRALinear(getattr(block.attn, name), rank, alpha))
    return model


class Network(nn.Module):
    """A ViT with its head (None where the loss is on tokens). Student and teacher are one each."""

    def __init__(self, vit, head):
        super().__init__()
        self.vit, self.head = vit, head

    def forward(self, images):  # (B, 3, H, W) -> (B, N, C) patch tokens
        return self.vit(images).patches


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s for each parameter that is trained (Sec. 3.5).

    lambda is 0.999, every ten steps (A.3; preset `tiny`: 0.99). With LoRA the averages are those of A and of B, not of
    their product.
    """
    for theta_t, theta_s in zip(teacher.parameters(), student.parameters()):
        if theta_s.requires_grad:
            theta_t.lerp_(theta_s, 1 - momentum)


def networks_of(args):
    """-> the pretrained ViT, which is kept to compare with; student, teacher, and the student's optimiser."""
    # Differs: the paper trains adapters; preset `tiny`, whose ViT has 1.9 million parameters, trains the whole ViT
    # (--full_finetune), which gains more in 200 steps (docs/study.md).
    before = lift.load_vit(args.model).to(args.device)
    torch.manual_seed(args.seed)  # set here, as loading may draw random numbers
    vit = copy.deepcopy(before)
    vit = vit if args.full_finetune else add_lora(vit, args.rank, alpha=args.rank)
    vit.mask_token.requires_grad_(False)  # not used
    head = None
    if args.loss == "distill":
        head = DINOHead(before.dim, args.hidden, args.bottleneck, args.prototypes)
    student = Network(vit, head).to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)  # starts equal to the student, then follows it
    # Differs: Sec. 3.5 has one shared head. By default the teacher's head is an EMA like its ViT, as in the official
    # code; `--shared_head` does what the paper writes.
    teacher.head = student.head if args.shared_head else teacher.head
    student.vit.checkpointing = args.grad_checkpoint
    # Differs: the paper has one learning rate; preset `tiny` has a lower one for the head, which would otherwise learn
    # the task in place of the ViT in so short a run.
    groups = [(student.vit, args.lr)] + ([(student.head, args.head_lr)] if head else [])
    groups = [dict(params=list(trained(part).values()), lr=lr, peak=lr) for part, lr in groups]  # peak: for `set_rates`
    optimiser = torch.optim.Adam(groups)
    return before, student, teacher, optimiser


# ------------------------------------------------------------------------ 3. The 3D-aware teacher


def upscale_masks(masks: Tensor, upscale) -> Tensor:
    """The masks that upscaling respects. For "bilinear" (SnD Table 5 B) everything is one object."""
    return masks if upscale == "masks" else torch.zeros_like(masks)


@torch.no_grad()
def splat_features(
    tokens: Tensor,  # (2, N, C) of the context views
    gaussians: lift.Gaussians,  # G = 2 H W, one for each pixel of the context views
    t: splat.Triplet,
    grid,  # (h, w)
    blend=0.5,  # alpha of SnD Eq. 4
    upscale="masks",
):
    """SnD Fig. 2 from left to right: the teacher's tokens of the target view (N, C), and which are valid (N,)."""
    # Lift: each Gaussian gets the feature of its pixel.
    masks = upscale_masks(t.masks[:2], upscale)
    features = lift.lift_features(gaussians, tokens.float(), masks, grid).features  # SnD Eq. 2-3
    # Splat them into the target view.
    rendered, valid = splat.divide_by_alpha(splat.render_target(gaussians, features, t))
    # Blend: each pixel moves towards the mean of its object.
    blended = splat.semantic_blend(rendered, t.masks[2], blend, valid)  # SnD Eq. 4
    return splat.splat_to_tokens(blended, valid, grid)


# ------------------------------------------------------------------------ 4. A training step, and the loop


class Sample(NamedTuple):
    """What a step needs of one triplet."""

    context: Tensor  # (2, 3, H, W) the views that the teacher sees
    target: Tensor  # (1, 3, H, W) the view that the student sees
    # The teacher's tokens of the context (2, N, C) -> those of the target (N, C), valid (N,): the splat operator, or
    # with --online `splat_features`, some channels at a time.
    carry: Callable


def objective(student, teacher, seen: Tensor, goal: Tensor, args):
    """-> the loss of the student's valid tokens (M, C) against the teacher's splatted ones (M, C), and the teacher's
    entropy.

    Cross-entropy is the teacher's entropy plus KL. No student can lower the first; the log has the second as `kl`.
    """
    if args.loss != "distill":
        return token_loss(args.loss, seen.float(), goal), goal.new_zeros(())  # the ablations
    with torch.autocast(goal.device.type, torch.bfloat16, enabled=args.bf16):
        x = student.head.embed(seen)
        with torch.no_grad():
            y = teacher.head.embed(goal)
    with torch.no_grad():
        prototypes = teacher.head.directions()
    # `distill_loss` of the two heads' logits, without ever holding all of them (workshop).
    return blocked_loss(x, student.head.directions(), y, prototypes, args.tau_student, args.tau_teacher)


def learn(batch: list[Sample], student, teacher, args) -> list[float]:
    """Sec. 3.2-3.5: adds the gradient of the batch's mean loss to the student's parameters.

    -> the means of loss, teacher's entropy and share of valid tokens. Samples go one by one, to save memory.
    """
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)
    measured = []
    for sample in batch:
        with torch.no_grad():
            with autocast():
                tokens = teacher(sample.context)
            goal, valid = sample.carry(tokens)  # Sec. 3.2-3.4: lift, splat and blend
        with autocast():
            seen = student(sample.target)[0]  # Sec. 3.5: the student sees the target image alone
        # Differs: the official code sets invalid tokens to 0 on both sides and keeps them in the mean; here they leave
        # the loss.
        at = valid.nonzero()[:, 0]  # if empty, the loss is 0
        loss, entropy = objective(student, teacher, seen[at], goal[at], args)
        (loss / len(batch)).backward()
        measured.append(torch.stack([loss.detach(), entropy, valid.float().mean()]))
    return torch.stack(measured).double().mean(0).tolist()


def distil(batches, student, teacher, optimiser, judged, run, args):
    """Sec. 3.1: the student learns from the teacher, and the teacher follows the student.

    `batches` yields, for each step, the names of its triplets and this process's Samples of them.
    `run` (workshop) counts the steps and keeps log and checkpoints. `judged` are held-out triplets; `agreement`
    (workshop) measures matching on them. `averaged` and `average_gradients` matter only where torchrun runs several
    processes.
    """
    for step, (names, batch) in zip(run, batches):
        set_rates(optimiser, step, args.max_steps)
        optimiser.zero_grad(set_to_none=True)
        loss, entropy, valid = averaged(learn(batch, student, teacher, args), run.world, args.device)  # over processes
        average_gradients(student, run.world)
        run.check(loss, ", ".join(names))  # stops where it is not finite
        optimiser.step()
        # Differs: the official code updates the teacher before the optimiser's step, here it is after it.
        if not args.frozen_teacher and (step + 1) % args.ema_every == 0:
            ema_update(teacher, student, args.momentum)
        due = (step + 1) % args.eval_every == 0
        scores = agreement(student.vit, judged)._asdict() if due else {}
        run.log(triplets=names, valid=round(valid, 4), loss=round(loss, 6), kl=round(loss - entropy, 6),
                lr=optimiser.param_groups[0]["lr"], **scores, show=("loss", "kl"))


def set_rates(optimiser, step, max_steps):  # cosine (SnD A.3), to 0
    for group in optimiser.param_groups:
        group["lr"] = 0.5 * group["peak"] * (1 + math.cos(math.pi * step / max_steps))


# ---- Workshop: not needed to understand the method ----


def run_distillation(args, rank=0, world=1):
    """All that stands around `distil`: triplets and their operators before it, what is measured and saved after it."""
    scenes, heldout, source = prepare(args, rank, world)  # `source` makes a Sample of a triplet
    before, student, teacher, optimiser = networks_of(args)
    ours, theirs = trained(student), dict(teacher.named_parameters())  # of a shared head there is one
    changes = {"student": ours, "teacher": {name: theirs[name] for name in ours if theirs[name] is not ours[name]}}
    run = Run(args, changes, optimiser, rank, world)
    if args.finetune_geometry:  # A.3, before anything is distilled: rank 0 adapts MVSplat, and then all use it
        if run.first:
            train_geometry(source, scenes, heldout, run.out / "geometry")
        if world > 1:
            dist.barrier()
        source.use(lift.load_mvsplat(run.out / "geometry" / "mvsplat.safetensors").to(args.device))
    # Differs: the paper draws a fresh triplet for each step; here --triplets of them are drawn and taken again and
    # again, so that their operators are computed once.
    count = min(args.triplets, args.max_steps * args.batch)
    triplets = draw_triplets(scenes, count, args.seed, args.target == "context")
    levels = [data.best_pairs(scene, target)[0] for scene, (*_, target) in triplets]
    print(f"{count} triplets: {data.in_levels(levels)}")
    source.make_missing(triplets, run)
    judged = judged_triplets(source, heldout)
    start = agreement(before, judged)
    # All that is random is a function of the seed and the step, so a resumed run needs no saved generator.
    order = schedule(count, args.max_steps * args.batch, args.seed)

    def batch_of(step):
        draws = range(step * args.batch, (step + 1) * args.batch)
        names = [splat.name_of(*triplets[order[n]]) for n in draws]
        return names, [source.sample(*triplets[order[n]], args.seed + n) for n in draws[rank::world]]
    batches = ahead(batch_of, range(run.start, args.max_steps))  # loads while a step runs
    distil(batches, student, teacher, optimiser, judged, run, args)
    if run.first:
        finish(source, before, student.vit, teacher.vit, judged, start)


def token_loss(name, seen: Tensor, goal: Tensor) -> Tensor:
    """The losses of the ablations, on the tokens themselves instead of prototypes; (N, C) each. 0 for no tokens."""
    count = max(1, len(goal))
    if name == "cosine":  # SnD Table 5 C
        return (1 - F.cosine_similarity(seen, goal, dim=-1)).sum() / count
    if name == "feature":  # SnD Table 5 G, with --frozen_teacher: the rendered features themselves, as in FiT3D
        return (seen - goal).abs().mean(-1).sum() / count
    # "correspondence", as in MEF (You et al. 2024): tokens of the same place attract, all others of the view repel.
    similarity = F.normalize(seen, dim=-1) @ F.normalize(goal, dim=-1).T / 0.07
    return F.cross_entropy(similarity, torch.arange(len(goal), device=goal.device), reduction="sum") / count


def blocked_loss(
    x: Tensor,  # (N, E) student's embeddings
    W: Tensor,  # (P, E) its prototypes
    y: Tensor,  # (N, E) teacher's
    W_teacher: Tensor,  # (P, E)
    tau_student: float,
    tau_teacher: float,
    max_elements: int = 2**24,  # of a block of logits
):
    """`distill_loss` of the two heads' logits, a block of tokens at a time, and the teacher's entropy.

    No (N, P) tensor ever exists, which would take 0.7 GB at the paper's size. The gradient of each block is computed
    while its logits are there, as computing them again in the backward pass takes 1.3 to 1.7 times as long.
    """
    block, loss, entropy = max(1, max_elements // len(W)), x.new_zeros(()), x.new_zeros(())
    grad_x, grad_W = torch.zeros_like(x), torch.zeros_like(W)
    for i in range(0, len(x), block):
        part, weights = x[i:i + block].detach().requires_grad_(), W.detach().requires_grad_()
        with torch.no_grad():
            goal = y[i:i + block] @ W_teacher.T
            entropy += len(part) / len(x) * distill_loss(goal, goal, tau_teacher, tau_teacher)
        with torch.enable_grad():
            value = len(part) / len(x) * distill_loss(part @ weights.T, goal, tau_student, tau_teacher)
        grad_x[i:i + block], more = torch.autograd.grad(value, (part, weights))
        loss, grad_W = loss + value.detach(), grad_W + more
    # What is added is 0, and its derivatives are the gradients that were found.
    return loss + ((x - x.detach()) * grad_x).sum() + ((W - W.detach()) * grad_W).sum(), entropy


# ------------------------------------------------------------------------ triplets and operators


def prepare(args, rank=0, world=1):
    """-> training scenes, held-out triplets [(scene, indices)], and the Source of what a step needs of a triplet."""
    if args.finetune_geometry and args.geometry != "mvsplat":
        raise ValueError(f"--geometry {args.geometry} has nothing to fine-tune; leave out --finetune_geometry")
    if rank:
        wait_for_first()  # it makes or fetches what is missing
    scenes = whole = data.open_scenes(args.scene_dir, args.skip_bad_frames, args.near, args.far)
    if args.finetune_geometry and args.depth_weight and not any(f.depth for scene in scenes for f in scene.frames):
        raise data.DataError(f"{args.scene_dir}: no measured depth for --depth_weight; leave it at 0")
    if args.geometry == "depth":
        measured = [[i for i, frame in enumerate(scene.frames) if frame.depth] for scene in scenes]
        scenes = [scene.subset(views) for scene, views in zip(scenes, measured) if len(views) >= 3]
        if not scenes:
            raise data.DataError(f"{args.scene_dir}: no scene has measured depth for three views; "
                                 "use --geometry mvsplat")
    if args.masks == "files" and not any(frame.mask for scene in scenes for frame in scene.frames):
        print("no instance masks: SLIC superpixels stand in (folder masks/ beside images/ is read when it is there)")
    source = Source(scenes, args, lift.load_vit(args.model).patch)
    if world > 1 and not rank:
        dist.barrier()
    train, heldout, source.kind = hold_out(scenes, args.heldout, args.seed, whole)
    return train, heldout, source


MAX_FEATURES = 2**27  # numbers, 0.5 GB: the features of all Gaussians that are splatted at a time


def splat_in_blocks(tokens, gaussians, t, grid, *steps):
    """`splat_features` of some channels at a time, so that memory does not grow with their number."""
    channels = max(1, MAX_FEATURES // len(gaussians.means))
    parts = [splat_features(part, gaussians, t, grid, *steps) for part in tokens.split(channels, -1)]
    return torch.cat([goal for goal, _ in parts], -1), parts[0][1]


def draw_triplets(scenes, count, seed, to_context=False):
    """[(scene, (context_a, context_b, target))]; `to_context` makes one of the contexts the target (SnD Table 5 E)."""
    generator, found = torch.Generator().manual_seed(seed), []
    for n in range(count):
        scene = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
        a, b, target = data.sample_triplet(scene, generator)
        found.append((scene, (a, b, (a, b)[n % 2] if to_context else target)))
    return found


def schedule(count, draws, seed) -> list[int]:
    """Which of `count` triplets each of `draws` takes: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(math.ceil(draws / count))]
    return torch.cat(rounds)[:draws].tolist()


def has_triplet(scene, targets=None) -> bool:
    with contextlib.suppress(data.DataError):
        return bool(data.sample_triplet(scene, torch.Generator(), targets))
    return False


def hold_out(scenes, count, seed, whole=None):
    """-> training scenes, triplets [(scene, indices)] to measure on, and what to call them: held-out or training.

    The scenes of the part `val` are held out; of a single scene, every eighth view is (as a target), as in 05_probe.py.
    `whole`: the scenes as they were read, if views without depth have been left out of `scenes`.
    """
    whole = whole or scenes
    hidden = {(scene.name, frame.name) for scene in data.split(whole, "val") for frame in scene.frames}
    if len(whole) == 1:
        hidden = {(whole[0].name, whole[0].frames[i].name) for i in data.held_out_views(whole[0])}
    usable, train, places = [scene for scene in scenes if has_triplet(scene)], [], []
    for scene in scenes:
        if scene not in usable:
            print(f"{scene.name}: left out, no three views overlap with a usable baseline")
            continue
        targets = [i for i, frame in enumerate(scene.frames) if (scene.name, frame.name) in hidden]
        rest = scene.subset([i for i in range(len(scene)) if i not in targets]) if targets else scene
        train += [rest] if len(rest) >= 3 and has_triplet(rest) else []
        places += [(scene, targets)] if targets and has_triplet(scene, targets) else []
    kind = "held-out"
    if not usable:
        raise data.DataError(f"{scenes[0].name}: no three views overlap with a usable baseline; add views in between")
    if not train or not places:
        print(f"{usable[0].name}: too few views to hold any out; those measured below are training views")
        train, places, kind = usable, [(scene, None) for scene in usable], "training"
    generator, found = torch.Generator().manual_seed(1000 + seed), []
    for n in range(4 * count):  # distinct triplets, fewer than `count` where the scenes have no more
        scene, targets = places[n % len(places)]
        triplet = data.sample_triplet(scene, generator, targets)
        if (scene, triplet) not in found and len(found) < count:
            found.append((scene, triplet))
    return train, found, kind


@torch.no_grad()
def triplet_operator(g, t: splat.Triplet, grid, blend=0.5, upscale="masks") -> splat.SplatOperator:
    """`splat_features` of the Gaussians g as a matrix on the 2N context tokens; both agree to rounding."""
    masks, N = upscale_masks(t.masks[:2], upscale), grid[0] * grid[1]
    (index_a, weight_a), (index_b, weight_b) = (lift.upscale_weights(mask, grid) for mask in masks)
    index, weight = torch.cat([index_a, index_b + N]), torch.cat([weight_a, weight_b])  # b's tokens come behind a's
    camera = torch.linalg.inv(t.c2w[2]), t.K[2], *t.images.shape[-2:]
    return splat.splat_operator(g.means, g.covariances, g.opacities, index, weight, 2 * N, *camera, grid, t.masks[2],
                                blend)


@torch.no_grad()
def image_features(tokens: Tensor, t: splat.Triplet, grid, blend=0.5, upscale="masks"):
    """The control without 3D (--target image): `splat_features` where the teacher has seen the target itself, jittered.

    Its tokens (N, C) are upscaled, blended by the target's masks and scaled down again; nothing is splatted.
    """
    upscaled = lift.mask_aware_upscale(tokens.float(), upscale_masks(t.masks[2], upscale), grid)
    blended = splat.semantic_blend(upscaled, t.masks[2], blend)
    return splat.splat_to_tokens(blended, torch.ones_like(t.masks[2], dtype=torch.bool), grid)


def jitter(images: Tensor, seed) -> Tensor:
    """Brightness, contrast and saturation changed by up to 40 % each; images (B, 3, H, W)."""
    factors = 0.6 + 0.8 * torch.rand(3, generator=torch.Generator().manual_seed(seed))
    brightness, contrast, saturation = factors.tolist()
    images = images * brightness
    grey, colourless = images.mean((1, 2, 3), keepdim=True), images.mean(1, keepdim=True)
    for centre, factor in ((grey, contrast), (colourless, saturation)):
        images = centre + factor * (images - centre)
    return images.clamp(0, 1)


class Source:
    """Makes a step's samples: loads a triplet's views, reconstructs them, and keeps the splat operators on disk.

    An operator's file is named after all that it depends on: cameras and files of the three views, the geometry and its
    weights, masks, blending and sizes. So runs with other seeds, losses or backbones of one patch size share it, and a
    stale one is never read.
    """

    def __init__(self, scenes, args, patch):
        self.args, self.patch, self.kind = args, patch, "held-out"  # of the triplets that are measured
        self.sizes = {scene.name: data.fit_size(scene, args.pixels, patch) for scene in scenes}
        for name, size in self.sizes.items():
            if min(size) < 2 * patch:
                raise ValueError(f"--pixels {args.pixels} leaves {name} fewer than 2x2 patches of {patch} pixels")
        self.steps = args.blend, args.upscale  # what `splat_features` is told
        self.use(lift.load_mvsplat(args.mvsplat).to(args.device) if args.geometry == "mvsplat" else None)

    def use(self, net):
        """Takes `net` as the geometry from here on."""
        self.net = net
        how = self.args.geometry, net and weights_id(net), *self.steps, self.args.masks, self.patch
        self.facts = [*how, splat.OPERATOR_FORMAT]

    def grid(self, t: splat.Triplet):  # (h, w)
        return tuple(side // self.patch for side in t.images.shape[-2:])

    def load(self, scene, indices) -> splat.Triplet:
        return splat.load_triplet(scene, indices, self.sizes[scene.name], self.args.device, self.args.masks)

    @torch.no_grad()
    def reconstruct(self, t: splat.Triplet, geometry=None) -> lift.Gaussians:
        """The frozen 3D model: two context views -> one Gaussian a pixel (SnD Eq. 1)."""
        return splat.reconstruct(geometry or self.args.geometry, t, self.net)[0]

    def path(self, scene, indices) -> Path:
        facts = [self.facts, self.sizes[scene.name], scene.depth_range]
        for frame in (scene.frames[i] for i in indices):
            files = [Path(file).stat() for file in (frame.image, frame.mask, frame.depth) if file]
            facts += [frame.name, frame.K.tolist(), frame.c2w.tolist(), repr(frame.distortion)]
            facts += [(file.st_size, file.st_mtime_ns) for file in files]
        name = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]
        return Path(self.args.operators) / name[:2] / f"{name}.safetensors"

    def operator(self, scene, indices) -> splat.SplatOperator:
        """From its file, which is written first where it is missing or damaged."""
        path = self.path(scene, indices)
        with contextlib.suppress(ValueError):
            return splat.load_operator(path).to(self.args.device)
        t = self.load(scene, indices)
        splat.save_operator(triplet_operator(self.reconstruct(t), t, self.grid(t), *self.steps), path)
        return splat.load_operator(path).to(self.args.device)  # read back: rounded like all others

    def make_missing(self, triplets, run):
        """Computes the operators that are not on disk yet; each of torchrun's processes makes its share."""
        if self.args.online or self.args.target == "image":
            return
        paths = {self.path(*place): place for place in triplets}
        missing = [place for path, place in list(paths.items())[run.rank::run.world] if not path.exists()]
        for place in tqdm(missing, desc="splat operators", disable=not run.first or not missing):
            self.operator(*place)
        if run.world > 1:
            dist.barrier()  # no process trains before all operators are there
        size = sum(path.stat().st_size for path in paths)
        print(f"{len(paths)} splat operators, {size / 1e6:.1f} MB, in {self.args.operators}/")

    def sample(self, scene, indices, seed) -> Sample:
        """What a step needs of a triplet; `seed` is that of the control's jitter."""
        if not self.args.online and self.args.target != "image":
            views = [scene.view(i, self.sizes[scene.name], maps=False) for i in indices]
            images = torch.stack([view.image for view in views]).to(self.args.device)
            operator = self.operator(scene, indices)
            return Sample(images[:2], images[2:], lambda tokens: (operator(tokens.flatten(0, 1)), operator.valid))
        t = self.load(scene, indices)
        grid = self.grid(t)
        if self.args.target == "image":
            carry = lambda tokens: image_features(tokens[0], t, grid, *self.steps)
            return Sample(jitter(t.images[2:], seed), t.images[2:], carry)
        carry = lambda tokens: splat_in_blocks(tokens, self.reconstruct(t), t, grid, *self.steps)
        return Sample(t.images[:2], t.images[2:], carry)


def weights_id(network) -> str:  # the same for two networks that compute the same
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def ahead(function, items, count=4):
    """function(item) of each item in turn, computed by threads while the ones before are used."""
    pool, waiting = ThreadPoolExecutor(count), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------ fine-tuning MVSplat (SnD A.3)


def covisible_pixels(depth: Tensor, K: Tensor, c2w: Tensor, target=2) -> Tensor:
    """(H, W) bool: the pixels of view `target` that view 0 or 1 sees too, from depth (V, H, W) and the cameras."""
    w2c = torch.linalg.inv(c2w)
    checks = [lift.cross_check(depth[target], depth[v], K[target], K[v], w2c[v] @ c2w[target])
              for v in (0, 1) if v != target]
    return (torch.stack(checks).amax(0) > 0.5) & (depth[target] > 0)


def dissimilarity(a: Tensor, b: Tensor) -> Tensor:
    """1 - SSIM over windows of 7x7 pixels (Wang et al. 2004): two pictures (3, H, W) -> (3, H, W)."""
    mean = lambda x: F.avg_pool2d(x, 7, 1, 3, count_include_pad=False)
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    return 1 - ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)))


def photometric(image: Tensor, truth: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error and 1 - SSIM of (3, H, W) pictures over the pixels `where` (H, W) bool."""
    return (image - truth).square().mean(0)[where].mean(), dissimilarity(image, truth).mean(0)[where].mean()


def log_depth_error(gaussians, depth: Tensor, c2w: Tensor) -> Tensor:
    """Mean |log z - log depth| of one-a-pixel Gaussians in their own views, where depth (V, H, W) is known."""
    z = lift.view_depth(gaussians, c2w, *depth.shape[1:])
    return (z.clamp_min(1e-3).log() - depth.clamp_min(1e-3).log()).abs()[depth > 0].mean()


def view_error(gaussians, colours, t: splat.Triplet) -> tuple[Tensor, Tensor]:
    """Mean squared error and 1 - SSIM of the target view, splatted with the colours of the context pixels.

    Colours are not divided by alpha: else a network would gain by hiding what it cannot explain. Where depth is known,
    pixels that no context sees are left out. Else all count, as leaving out uncovered pixels would reward holes.
    """
    image = splat.render_target(gaussians, colours, t).features.permute(2, 0, 1)
    where = torch.ones_like(image[0], dtype=torch.bool)
    if t.depth is not None and (seen := covisible_pixels(t.depth, t.K, t.c2w)).any():
        where = seen
    return photometric(image, t.images[2], where)


def geometry_loss(net, t: splat.Triplet, depth_weight: float, bf16=False) -> Tensor:
    """MVSplat's loss: the splatted target view against the picture."""
    with torch.autocast(t.images.device.type, torch.bfloat16, enabled=bf16):
        gaussians, colours = splat.reconstruct("mvsplat", t, net)
    mse, structure = view_error(gaussians, colours, t)
    # Differs: MVSplat adds 0.05 LPIPS to the squared error, which needs a downloaded network; we add 0.05 (1 - SSIM).
    loss = mse + 0.05 * structure
    if depth_weight and t.depth is not None and (t.depth[:2] > 0).any():
        # Differs: MVSplat is never shown depth; --depth_weight adds the log depth error where depth is measured.
        loss = loss + depth_weight * log_depth_error(gaussians, t.depth[:2], t.c2w[:2])
    return loss


def train_geometry(source, scenes, heldout, folder):
    """Learns to splat the third view of a triplet from the other two; no depth is needed (SnD A.3).

    What is there already is taken up without being asked, so that nothing of it can be lost.
    """
    args, net = source.args, source.net
    names = "scene_dir near far mvsplat pixels geometry_lr depth_weight bf16 seed device save_minutes".split()
    same = {name: getattr(args, name) for name in names}
    own = argparse.Namespace(**same, out=str(folder), max_steps=args.finetune_geometry, resume=True)
    optimiser = torch.optim.Adam(net.parameters(), args.geometry_lr)
    run = Run(own, {"mvsplat": dict(net.named_parameters())}, optimiser, name="fine-tune MVSplat")
    made = folder / "mvsplat.safetensors"
    if run.start == own.max_steps and made.exists():
        return
    load = lambda place: splat.load_triplet(*place, source.sizes[place[0].name], args.device)
    draw = lambda step: load(draw_triplets(scenes, 1, args.seed + step)[0])
    for step, t in zip(run, ahead(draw, range(run.start, own.max_steps))):
        # Differs: SnD gives the number of steps, but no optimiser. Ours is Adam with a short warm-up, cosine decay and
        # gradients clipped to a norm of 0.5.
        decay = 0.5 * (1 + math.cos(math.pi * step / own.max_steps))
        optimiser.param_groups[0]["lr"] = args.geometry_lr * min(decay, 20 * (step + 1) / own.max_steps)
        optimiser.zero_grad(set_to_none=True)
        loss = geometry_loss(net, t, args.depth_weight, args.bf16)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5).item()
        run.check(norm, t.name, "gradient")
        optimiser.step()
        run.log(triplet=t.name, loss=loss.item(), lr=optimiser.param_groups[0]["lr"])
    before = lift.load_mvsplat(args.mvsplat).to(args.device)
    report_geometry({"start": before, "fine-tuned": net.eval()}, map(load, heldout), source.kind, folder)
    lift.save_tensors(made, net.state_dict())  # written last: that it exists means that fine-tuning is finished


@torch.no_grad()
def report_geometry(networks, triplets, kind, folder):
    """Prints the mean PSNR of the target views as the networks {name: MVSplat} and measured depth splat them."""
    found = {name: [] for name in (*networks, "depth")}
    for t in triplets:
        ways = {name: splat.reconstruct("mvsplat", t, net) for name, net in networks.items()}
        ways |= {} if t.depth is None else {"depth": splat.reconstruct("depth", t)}
        for name, way in ways.items():
            found[name].append(-10 * view_error(*way, t)[0].log10().item())
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    data.write_whole(folder / "result.json", json.dumps(means, indent=1).encode())
    shown = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
    print(f"MVSplat on {len(found['start'])} {kind} triplets, PSNR: {shown}  ->  {folder}")


# ------------------------------------------------------------------------ a run that cannot be lost


class Run:
    """`for step in run`: the steps of a training run that can be stopped or killed at any moment, and goes on.

    In the folder args.out lie log.jsonl, settings.json and the last two checkpoints. With args.resume it goes on from
    the newer one that is whole. On a CPU the result has the same bits as that of a run that was never stopped, on CUDA
    it is the same to rounding, as each run sums in another order. args.max_steps is the number of steps in all, and
    args.save_minutes the time between checkpoints.
    """

    # What may change when a run goes on; all other settings must stay the same.
    FREE = """out device resume save_minutes heldout eval_every operators grad_checkpoint because no_blend
        view_memory""".split()

    def __init__(self, args, parameters, optimiser, rank=0, world=1, generator=None, name="distil"):
        """parameters: {network: {name: parameter that changes}}; generator: one to keep, if any."""
        self.args, self.parameters, self.optimiser, self.generator = args, parameters, optimiser, generator
        self.out, self.rank, self.world, self.name = Path(args.out), rank, world, name
        self.first = rank == 0  # it alone writes
        self.path, self.previous = checkpoint_paths(args.out)
        self.settings = {key: value for key, value in vars(args).items() if key not in self.FREE}
        found = [self.find() if self.first else None]
        if self.first:
            self.keep_others_out()
        if world > 1:
            dist.broadcast_object_list(found)  # rank 0's, whatever the other machines have on disk
        self.start, stored = found[0]
        if self.first and not self.start and (self.out / "student").exists():
            print(f"{self.out}/student is of an earlier run and is replaced at the end; another --out keeps it")
        if stored is not None:
            self.restore(stored)
            print(f"resumed at step {self.start} of {args.max_steps}")

    def __iter__(self):
        self.asked, self.clock, steps = False, time.monotonic(), range(self.start, self.args.max_steps)
        before = {number: signal.signal(number, self.ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.first:
                self.open_log()
            saved = time.monotonic()
            self.bar = tqdm(steps, self.name, self.args.max_steps, initial=self.start, disable=not self.first)
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

    def ask_to_stop(self, number, frame):
        if self.asked and number == signal.SIGINT:  # a second Ctrl-C does not wait for the end of the step
            raise KeyboardInterrupt
        self.asked = True

    def check(self, value, what, kind="loss"):
        """Stops the run where the loss of `what`, e.g. the triplets of the step, is not a finite number."""
        if not math.isfinite(value):
            raise ValueError(f"step {self.step}: the {kind} is {float(value)} for {what}; start again with a lower "
                             "learning rate and another --out")

    def log(self, show=("loss",), **values):
        """Adds a line to log.jsonl; the numbers named in `show` stand beside the bar as well."""
        if self.first:
            self.bar.set_postfix({name: f"{values[name]:.4f}" for name in show})
            line = dict(step=self.step, **values, seconds=round(time.monotonic() - self.clock, 2))
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

    def state(self):
        """All that training changes, by name."""
        tensors = {f"{who}.{name}": p for who, named in self.parameters.items() for name, p in named.items()}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors.update({f"optimiser.{i}.{key}": value for key, value in state.items()})
        return tensors | ({"generator": self.generator.get_state()} if self.generator else {})

    def save(self, step):
        aside = self.out / "checkpoint.new.safetensors"
        tensors = self.state()
        about = {"step": str(step), "settings": json.dumps(self.settings), "tensors": str(len(tensors))}
        lift.save_tensors(aside, tensors, about)
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(aside, self.path)  # killed before this line, the run goes on from the previous one

    @torch.no_grad()
    def restore(self, stored):
        moments = {}
        for key in stored:
            if key.startswith("optimiser."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = stored[key]
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        for key, tensor in self.state().items():
            tensor.copy_(stored[key])
        if self.generator:
            self.generator.set_state(stored["generator"])

    def keep_others_out(self):
        """Two processes would overwrite each other's files."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.out / ".lock", "a")
        try:
            import fcntl
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when this process ends
        except BlockingIOError:
            raise ValueError(f"{self.out}: another run is writing here; wait until it ends, or give another "
                             "--out") from None
        except (ImportError, OSError):  # Windows and some network disks have no such lock
            pass

    def find(self):
        """-> (step, tensors) to go on from, or (0, None). Refuses to lose a run that is not finished."""
        found = [path for path in (self.path, self.previous) if path.exists()]
        whole = next(((path, *run) for path in found if (run := read_run(path))), None)
        if found and not whole:
            raise ValueError(f"{found[0]}: not a whole checkpoint; remove it to start again")
        if not whole:
            if self.args.resume:
                print(f"{self.path}: not there yet, so this run begins at step 0")
            return 0, None
        path, step, old, tensors = whole
        if not self.args.resume and step < old["max_steps"]:
            raise ValueError(f"{path}: a run stopped here at step {step} of {old['max_steps']}; --resume goes on, "
                             "another --out starts afresh, or remove the file")
        changed = [f"{key} {old.get(key)} -> {new}" for key, new in self.settings.items() if old.get(key) != new]
        if self.args.resume and changed:
            raise ValueError(f"{path}: was made with other settings ({', '.join(changed)}); use the old ones or "
                             "another --out")
        if self.args.resume and (odd := self.odd_ones(tensors)):
            raise ValueError(f"{path}: does not fit this run ({odd[0]}); remove it to start again")
        return (step, tensors) if self.args.resume else (0, None)

    def odd_ones(self, tensors):  # -> names of those that are missing, not finite, or of another shape or type
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        like = self.state() | {f"optimiser.{i}.{moment}": p for i, p in enumerate(parameters)
                               for moment in ("exp_avg", "exp_avg_sq") if f"optimiser.{i}.step" in tensors}
        return [key for key, x in like.items() if key not in tensors or (tensors[key].shape, tensors[key].dtype) !=
                (x.shape, x.dtype) or not tensors[key].isfinite().all()]

    def open_log(self):
        """Keeps the lines of log.jsonl before the step to go on from; removes what is left of other runs."""
        lines, path = [], self.out / "log.jsonl"
        for line in path.read_text(errors="replace").splitlines() if self.start and path.exists() else []:
            # Broken lines are left out, for example one that was being written when the power failed.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                lines += [line] if json.loads(line)["step"] < self.start else []
        half_written = self.out.glob(".*.[0-9]*.[0-9]*")  # by a run that was killed
        for file in (*half_written, *([] if self.start else checkpoint_paths(self.out))):
            file.unlink(missing_ok=True)
        data.write_whole(path, "".join(line + "\n" for line in lines).encode())
        data.write_whole(self.out / "settings.json", json.dumps(vars(self.args), indent=1).encode())


def checkpoint_paths(folder):  # -> the newest one and the one before
    return Path(folder) / "checkpoint.safetensors", Path(folder) / "checkpoint.previous.safetensors"


def read_run(path):  # -> step, settings, tensors; None where it is damaged
    damage = SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError
    with contextlib.suppress(*damage), safe_open(path, "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        step, settings = int(meta["step"]), json.loads(meta["settings"])
        if 0 < step <= settings["max_steps"] and len(tensors) == int(meta["tensors"]):
            return step, settings, tensors


# ------------------------------------------------------------------------ more than one process


def processes(args, batch):
    """-> (rank, world): (0, 1) alone, else as torchrun has started us; a step's `batch` is shared by all."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if batch % world:
        raise ValueError(f"--batch {batch} cannot be shared by {world} processes; make it a multiple of {world}")
    if world == 1:
        return 0, 1
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    # A long timeout: rank 0 may prepare, fine-tune and measure for long while the others wait.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=7))
    atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    return dist.get_rank(), world


def wait_for_first():  # for rank 0
    try:
        dist.barrier()
    except RuntimeError:  # it has ended, and has said why
        sys.exit(1)


def averaged(values: list[float], world, device) -> list[float]:  # over the processes
    if world == 1:
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return (values / world).tolist()


def average_gradients(model, world):
    for p in model.parameters() if world > 1 else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world


def few_threads(args):
    """One thread for preset tiny: its tensors are so small that a second one costs time (40 steps: 19 s; two: 23)."""
    if args.preset == "tiny" and args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def trained(module):  # the parameters that training changes, by name
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------ measuring agreement


class Agreement(NamedTuple):
    matching: float  # share of target tokens whose nearest splatted token is the right one, within one patch
    cosine: float  # mean cosine of a target token and the one splatted there
    rank: float  # effective rank of the target tokens

    def __str__(self):
        return f"matching {100 * self.matching:.1f} %, cosine {self.cosine:.3f}, effective rank {self.rank:.1f}"


class Judged(NamedTuple):
    """A held-out triplet that agreement is measured on.

    Its operator takes measured depth where there is any, and neither masks nor blending, so that neither a poor
    reconstruction nor good masks make a difference.
    """

    place: tuple  # (scene, indices)
    images: Tensor  # (3, 3, H, W)
    operator: splat.SplatOperator


@torch.no_grad()
def judged_triplets(source, places) -> list[Judged]:
    """Loads them, and warns where the geometry that teaches carries nothing into their targets."""
    found, carried = [], []
    for place in places:
        t = source.load(*place)
        gaussians = source.reconstruct(t, None if t.depth is None else "depth")
        operator = triplet_operator(gaussians, t, source.grid(t), blend=1.0, upscale="bilinear")
        found.append(Judged(place, t.images, operator))
        carried.append(splat.geometry_carries(*splat.reconstruct(source.args.geometry, t, source.net), t))
    if (warning := splat.warning_of(carried)) and source.args.target != "image":
        print(warning)
    return found


def effective_rank(tokens: Tensor) -> float:
    """(M, C) -> in how many directions they vary: exp of the singular values' entropy (Roy and Vetterli 2007)."""
    centred = (tokens - tokens.mean(0)).double()
    squared = torch.linalg.eigvalsh(centred.T @ centred)  # the squares of the singular values, from C x C numbers
    share = F.normalize(squared.clamp_min(0).sqrt(), p=1, dim=0)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item()


def matches(t: Judged, x: Tensor, patch):
    """Of the tokens (3, N, C) of a triplet: the valid places (M,), where the splatted token nearest to the target's is
    (M,), whether that is right within one patch (M,), and the cosines at the same place (M,)."""
    at, columns = t.operator.valid.nonzero()[:, 0], t.images.shape[-1] // patch
    splatted = t.operator(x[:2].flatten(0, 1))
    similarity = F.normalize(x[2][at], dim=1) @ F.normalize(splatted[at], dim=1).T
    found = at[similarity.argmax(1)]
    down, across = (found // columns - at // columns).abs(), (found % columns - at % columns).abs()
    return at, found, torch.maximum(down, across) <= 1, similarity.diagonal()


@torch.no_grad()
def relative_tokens(vit, triplets):
    """The tokens (3, N, C) of each triplet's views, relative to the mean token of their place in the grid."""
    tokens, of_shape = [vit(t.images).patches for t in triplets], {}  # scenes may differ in grid
    for t, x in zip(triplets, tokens):
        of_shape.setdefault(t.images.shape, []).append(x)
    mean = {shape: torch.cat(views).mean(0) for shape, views in of_shape.items()}  # (N, C)
    return [x - mean[t.images.shape] for t, x in zip(triplets, tokens)]


@torch.no_grad()
def agreement(vit, triplets: list[Judged]) -> Agreement:
    """How well `vit` agrees with itself across views: its tokens of the target against those splatted into it. Matching
    is the share of target tokens whose most similar splatted token lies within one patch of the right place.

    Only what is in the picture counts, as tokens are taken relative to the mean token of their place. Features that
    know their place alone would match in 2 of 3 cases, as views move little, and a part that all tokens share would
    make any cosine good. Collapsed features match by chance.
    """
    tokens, right, cosines, total = relative_tokens(vit, triplets), 0, 0.0, 0
    for t, x in zip(triplets, tokens):
        at, _, is_right, cosine = matches(t, x, vit.patch)
        right, cosines, total = right + is_right.sum().item(), cosines + cosine.sum().item(), total + len(at)
    if not total:
        raise data.DataError(f"{triplets[0].place[0].name}: the splatted contexts cover no token of the target; give "
                             "--near and --far in the scene's unit (python 01_data.py shows the range that was taken)")
    return Agreement(right / total, cosines / total, effective_rank(torch.cat([x[2] for x in tokens])))


# ------------------------------------------------------------------------ what a run ends with


def merge_lora(model):
    """A copy of `model` with the adapters folded into the weights: a plain network again, same outputs to rounding."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name in ("qkv", "proj"):
            adapted = getattr(block.attn, name)
            if isinstance(adapted, LoRALinear):
                adapted.base.weight.data += adapted.scale * adapted.B.data @ adapted.A.data
                setattr(block.attn, name, adapted.base)
    return model


def finish(source, before, adapted, teacher, judged, start: Agreement):
    """Saves the student with its model card; prints the answer beside its baseline, and where everything is."""
    args, out, after = source.args, Path(source.args.out), merge_lora(adapted).eval()
    lift.save_vit(after, out / "student")
    if not args.full_finetune:
        lift.save_tensors(out / "adapters.safetensors", trained(adapted))
    end = agreement(after, judged)
    measured = f"{len(judged)} {source.kind} triplets"
    data.write_whole(out / "student" / "README.md", model_card(args, after, measured, start, end).encode())
    picture = heldout_picture(out / "heldout.png", before, teacher, after, judged, source)
    names = [splat.name_of(*t.place) for t in judged]
    result = dict(before=start._asdict(), after=end._asdict(), heldout=names)
    data.write_whole(out / "result.json", json.dumps(result, indent=1).encode())
    print(f"{measured}\n  before: {start}\n  after:  {end}")
    print(f"  ->  {picture}, {out / 'student'}")


CARD = """---
license: {licence}
pipeline_tag: image-feature-extraction
---
# {model}, made 3D-aware by Splat and Distill

A student of Splat and Distill (Shavin and Benaim, ICLR 2026), made by 04_distill.py. It started from `{model}` and was
distilled for {max_steps} steps of {batch} triplets on `{scenes}`.
{release}

| on {measured} | matching across views | cosine | effective rank |
|---|---|---|---|
| before | {before} |
| after | {after} |

Settings: {settings}.

Licence: {rights}

```python
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("path/to/this/folder").eval()
images = torch.rand(1, 3, {height}, {width})  # in [0, 1]; sides are multiples of {patch}
mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
tokens = model(pixel_values=(images - mean) / std).last_hidden_state[:, {skip}:]  # (1, patches, {dim})
```

For pictures of other than {grid}x{grid} patches, transformers interpolates positions differently from the training
code, which changes the tokens by one or two per cent (measured with `tiny`).
"""


def model_card(args, vit, measured, start: Agreement, end: Agreement) -> str:
    """What others need to know of the student: where it comes from, what it is for, how good it is, how to load it."""
    row = lambda a: f"{100 * a.matching:.1f} % | {a.cosine:.3f} | {a.rank:.1f}"
    release = "It is an ablation, and corresponds to neither of the paper's two releases."
    if (args.target, args.loss, args.upscale, args.frozen_teacher) == ("novel", "distill", "masks", False):
        use = "without blending, for correspondence" if args.blend == 1 else \
            "with blending, for depth, normals and segmentation"
        release = f"It corresponds to the paper's release {use}."
    licence, rights = "other", f"that of the weights it started from, {args.model}."
    if args.model.startswith("dinov2"):
        licence, rights = "apache-2.0", "it started from DINOv2's weights, which are under the Apache License 2.0."
    if args.model == "tiny":
        licence, rights = "mit", "the project's own, as its start was trained on built-in rooms."
    names = """geometry finetune_geometry masks blend upscale loss target frozen_teacher full_finetune rank lr head_lr
        prototypes momentum ema_every tau_student tau_teacher seed""".split()
    return CARD.format(
        **vars(args), licence=licence, rights=rights, release=release, measured=measured, before=row(start),
        after=row(end), scenes=Path(args.scene_dir).name, settings=", ".join(f"{n} {getattr(args, n)}" for n in names),
        height=20 * vit.patch, width=30 * vit.patch, patch=vit.patch, skip=1 + vit.registers, dim=vit.dim,
        grid=vit.grid)


@torch.no_grad()
def heldout_picture(path, before, teacher, after, judged: list[Judged], source):
    """A row for each held-out target: features by the student before, by the teacher (the goal), by the student after.

    Each map is drawn relative to its own mean, all three in one PCA basis. Then the matches, before and after: they are
    what `agreement` counts.
    """
    rows, tokens = [], [relative_tokens(vit, judged) for vit in (before, after)]
    for n, t in enumerate(judged[:6]):
        size, sample = t.images.shape[-2:], source.sample(*t.place, 0)
        goal, valid = sample.carry(teacher(sample.context).patches)
        maps = [before(sample.target).patches[0], goal, after(sample.target).patches[0]]
        maps = [x - x[valid].mean(0) for x in maps]
        basis = lift.pca_basis(torch.cat([x[valid] for x in maps]))
        colours = [lift.pca_colours(x.view(*source.grid(t), -1), basis) for x in maps]
        colours[1] = colours[1] * valid.view(source.grid(t))  # black: not seen by the contexts
        shown = [F.interpolate(c[None], size)[0] for c in colours]
        rows.append([t.images[2], *shown, *(match_picture(t, x[n], source.patch) for x in tokens)])
    headings = ["target view", "student before (PCA)", "teacher's goal", "student after"]
    headings += ["matches before (red: wrong)", "matches after (red: wrong)"]
    return data.picture_grid(path, headings, rows)


def match_picture(t: Judged, x: Tensor, patch) -> Tensor:
    """The target view, each patch replaced by the one that its token is matched with; where that is right, the view
    stays as it is. Wrong patches are red, and those that the contexts do not see are black."""
    at, found, is_right, _ = matches(t, x, patch)
    patches = F.unfold(t.images[2:], patch, stride=patch)[0]  # (3 patch^2, N)
    shown = torch.zeros_like(patches)
    shown[:, at] = patches[:, found]
    wrong = at[~is_right]
    red = patches.new_tensor([0.7, 0.0, 0.0]).repeat_interleave(patch * patch)[:, None]
    shown[:, wrong] = 0.4 * shown[:, wrong] + 0.6 * red
    return F.fold(shown[None], t.images.shape[-2:], patch, stride=patch)[0]


# ------------------------------------------------------------------------ command line

def parse(argv):
    parser = argparse.ArgumentParser(description="Distil 3D-aware features: student, EMA teacher, splatted targets.")
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    data.scene_flags(parser, "out/04_distill")
    add("--preset", choices=list(PRESETS), help="vits and vitb are the paper's setting, tiny takes minutes on a CPU; "
        "default: vits on a CUDA machine, tiny elsewhere")
    for name, (tiny, vits, what) in SETTINGS.items():
        kind = dict(type=data.positive if isinstance(tiny, int) else type(tiny))
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(tiny, bool) else kind
        add(f"--{name}", help=f"{what} (tiny: {tiny}, vits: {vits})", **kind)
    add("--geometry", choices=("mvsplat", "depth"), default="mvsplat", help="learned, or measured depth")
    add("--finetune_geometry", type=int, default=0, metavar="STEPS",
        help="first adapt MVSplat to the scenes, for so many steps; 40000 in the paper")
    add("--geometry_lr", type=float, default=2e-4, help="its peak learning rate; halve it when its loss jumps")
    add("--depth_weight", type=float, default=0.0,
        help="weight of the log depth error in its loss, where depth is measured; try 0.05")
    add("--operators", default="out/operators", help="folder of splat operators; runs with the same scenes share it")
    flag("--online", help="no operators: lift, splat and blend all channels in each step")
    flag("--grad_checkpoint", help="compute activations twice instead of keeping them, when memory runs out")
    # The flags of the paper's Table 5, and of what the paper leaves open.
    flag("--no_blend", help="as --blend 1 (Table 5 A). The paper trains its student for correspondence like this "
         "(Sec. 4.1), that for depth, normals and segmentation with blending")
    add("--upscale", choices=("masks", "bilinear"), default="masks", help="mask-aware or plain upscaling (Table 5 B)")
    add("--loss", choices=("distill", "cosine", "feature", "correspondence"), default="distill",
        help="cross-entropy over prototypes, or on the tokens themselves: cosine (Table 5 C), L1 (G, with "
             "--frozen_teacher), or contrast of places (as MEF, with --no_blend --upscale bilinear)")
    flag("--frozen_teacher", help="the teacher stays as it starts (Table 5 D; H with --no_blend --upscale bilinear)")
    add("--target", choices=("novel", "context", "image"), default="novel",
        help="the view that both contexts are splatted into and that the student sees: a third one, or one of the two "
             "(Table 5 E). `image` splats nothing: the teacher sees the target itself, jittered (control without 3D)")
    add("--masks", choices=("files", "superpixels"), default="files",
        help="superpixels also stand in for missing files (Table 5 F)")
    add("--blend", type=float, default=0.5, help="alpha of SnD Eq. 4")
    flag("--shared_head", help="the teacher uses the student's head, not an EMA of it")
    add("--heldout", type=data.positive, default=24, help="held-out triplets, measured before, during and after")
    add("--eval_every", type=data.positive, help="steps between these measurements; default: six a run")
    add("--save_minutes", type=float, default=2.0, help="minutes between checkpoints; 0 writes one after each step")
    flag("--resume", help="go on from the checkpoint in --out")
    return settle(parser.parse_args(argv))


def settle(args):
    """Fills in what the preset sets; args.because says why it was taken."""
    cuda = torch.cuda.is_available()
    taken = "a CUDA machine" if cuda else "no CUDA device; vits is the paper's setting"
    args.because = "asked for" if args.preset else taken
    args.preset = args.preset or ("vits" if cuda else "tiny")
    if not args.mvsplat and not Path(PRESETS[args.preset]["mvsplat"]).exists():
        args.mvsplat = "tiny"  # stands in where none was asked for; the first line that is printed says so
    given = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(PRESETS[args.preset] | given)
    args.blend = 1.0 if args.no_blend else args.blend
    args.eval_every = args.eval_every or max(1, args.max_steps // 6)
    if args.bf16 and args.device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        print("--bf16: this card has no bfloat16, it would emulate it slowly; everything is computed in float32")
        args.bf16 = False
    return args


def main(argv=None):
    args = parse(argv)
    with data.explained(args, f"`--resume --out {args.out}` goes on from the last checkpoint"):
        rank, world = processes(args, args.batch)
        few_threads(args)
        weights = f" ({args.mvsplat} weights)" if args.geometry == "mvsplat" else ""
        print(f"preset {args.preset} ({args.because}): {args.model} ViT at about {args.pixels} pixels, "
              f"{args.max_steps} steps, {args.geometry} geometry{weights}, on {args.device}")
        run_distillation(args, rank, world)


if __name__ == "__main__":
    main()
