"""Splat and Distill: a student learns from its own teacher's features, carried through 3D into the view it looks at.

Paper   Splat and Distill (SnD) Sec. 3.1-3.5, Eq. 1-5, Appendix A.3.
In      posed views (01_data), a pretrained ViT (02_lift). Masks are optional: superpixels stand in.
Out     out/04_distill/student/ (a Hugging Face DINOv2 folder, LoRA merged), log.jsonl, heldout.png, checkpoint.
Run     python 04_distill.py                        built-in rooms, no downloads: 3 minutes on a 2-core CPU
        python 04_distill.py --scene_dir my_scene   your own posed images: the same time
        python 04_distill.py --resume               goes on after a kill, where the last checkpoint was
Copy    01_data.py 02_lift.py 03_splat.py 04_distill.py weights/tiny_vit.safetensors
Not     the paper's full-size presets, a cache of splat operators, several GPUs.
Words   f_s, f_t student and teacher; F_low tokens, F_high per-pixel features; K prototypes; lambda EMA momentum;
        tau temperature; context views are splatted, the target view is what the student sees.
"""
import argparse
import copy
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

data, lift, splat = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat"))

# The paper trains 50,000 steps at lr 2e-5 with 65,536 prototypes; `tiny` fits the same loop into minutes.
# Differs: temperatures are not in the paper and 1.0 in its code, where both distributions are nearly uniform (README, study).
PRESETS = {
    "tiny": dict(model="tiny", pixels=96 * 128, max_steps=300, lr=3e-3, head_lr=1e-4, rank=8, hidden=512, bottleneck=128,
                 prototypes=2048, momentum=0.99, ema_every=10, tau_student=0.05, tau_teacher=0.02)}

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

    def forward(self, tokens):  # (N, C) -> (N, K) logits
        return F.normalize(self.mlp(tokens), dim=-1) @ (self.gain[:, None] * F.normalize(self.prototypes, dim=-1)).T


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, tau_student=0.1, tau_teacher=0.1) -> Tensor:
    """Cross-entropy between the two distributions over prototypes, mean over tokens; (N, K) logits each (SnD Eq. 5)."""
    target = (teacher_logits.detach() / tau_teacher).softmax(-1)  # sg(.) of SnD Eq. 5
    return -(target * (student_logits / tau_student).log_softmax(-1)).sum(-1).mean()


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """theta_t <- lambda theta_t + (1 - lambda) theta_s, parameter by parameter, adapters A and B apart (SnD Sec. 3.5)."""
    for theirs, ours in zip(teacher.parameters(), student.parameters()):
        if ours.requires_grad:
            theirs.lerp_(ours, 1 - momentum)


# ------------------------------------------------------------------------------------------------ the 3D-aware teacher


class Triplet(NamedTuple):
    """Two contexts and a target, on the device. The first index of every stacked tensor is the context view."""
    name: str
    images: Tensor  # (2, 3, H, W) contexts
    masks: Tensor  # (2, H, W)
    depth: Tensor | None  # (2, H, W) measured z-depth, 0 = unknown
    K: Tensor  # (2, 3, 3) pixels
    c2w: Tensor  # (2, 4, 4)
    depth_range: tuple  # (near, far)
    image: Tensor  # (3, H, W) target
    mask: Tensor  # (H, W)
    target_K: Tensor  # (3, 3)
    target_w2c: Tensor  # (4, 4)


def load_triplet(scene, indices, size, device, near=None, far=None) -> Triplet:
    """Views (context_a, context_b, target) of `scene` at `size` (H, W), in units of the nearest depth.

    The unit does not matter to features, but the rasteriser's near plane is at 0.01 and COLMAP's units are arbitrary.
    """
    a, b, target = views = [scene.view(i, size) for i in indices]
    near, far = (taken if given is None else given for given, taken in zip((near, far), scene.depth_range))
    if not 0 < near < far:
        raise ValueError(f"{scene.name}: depths from {near:g} to {far:g} make no range; "
                         "give --near and --far in the scene's unit")
    stack = lambda tensors: torch.stack(tensors).to(device)
    c2w = stack([v.c2w for v in views])
    c2w[:, :3, 3] /= near
    depth = stack([a.depth, b.depth]) / near if a.depth is not None and b.depth is not None else None
    return Triplet(f"{scene.name}: {a.name} + {b.name} -> {target.name}", stack([a.image, b.image]),
                   stack([data.regions(a), data.regions(b)]), depth, stack([a.K, b.K]), c2w[:2], (1.0, far / near),
                   target.image.to(device), data.regions(target).to(device), target.K.to(device), torch.linalg.inv(c2w[2]))


@torch.no_grad()
def reconstruct(t: Triplet, geometry):
    """The frozen 3D model Phi_geom: two context views -> one Gaussian a pixel (SnD Eq. 1)."""
    if geometry == "depth":
        if t.depth is None:
            raise data.DataError(f"{t.name}: no measured depth for --geometry depth; use --geometry sweep")
        return lift.depth_gaussians(t.depth, t.K, t.c2w)
    return lift.sweep_gaussians(t.images, t.K, t.c2w, *t.depth_range)


@torch.no_grad()
def splat_features(
    tokens: Tensor,  # (2, N, C) of the context views
    gaussians,  # G = 2 H W, one a context pixel
    t: Triplet,
    grid,  # (h, w)
    blend=0.5,  # alpha of SnD Eq. 4
    drop_unmatched=False,
):
    """The 3D-aware teacher's tokens of the target view (N, C), and which of them are valid (N,): SnD Fig. 2, left to right."""
    # SnD Eq. 2-3: one feature a pixel, and so one a Gaussian.
    features = torch.cat([lift.mask_aware_upscale(x, mask, grid).flatten(0, 1) for x, mask in zip(tokens, t.masks)])
    opacities = gaussians.opacities
    if drop_unmatched:  # the weights of such a pixel are all 0, those of any other sum to 1
        opacities = opacities * torch.cat([lift.upscale_weights(mask, grid, True)[1].sum(1) for mask in t.masks])
    # Differs: the true covariances; the official render passes variances on as scales and draws reflected frames as spheres.
    render = splat.rasterize(gaussians.means, gaussians.covariances, opacities, features,
                             t.target_w2c, t.target_K, *t.mask.shape)
    valid = render.alpha >= splat.COVERED
    rendered = render.features / render.alpha.clamp_min(1e-6)[..., None]  # Differs: not divided by alpha in the official code
    blended = splat.semantic_blend(rendered, t.mask, blend, valid)  # SnD Eq. 4
    return splat.splat_to_tokens(blended, valid, grid)


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


@torch.no_grad()
def agreement(vit, triplets, geometry) -> Agreement:
    """How well `vit` agrees with itself across views: its tokens of the target against its splatted tokens of the contexts.

    Measured so that only what is in the picture counts. Tokens are taken relative to the mean token of their place in the
    grid, over all views measured: features that know their place alone would match in 2 of 3 cases, as views move
    little, and a part that all tokens share would make any cosine good. Collapsed features then match by chance.
    Measured depth is used where it exists, without masks or blending: neither a poor reconstruction nor masks help.
    """
    tokens = [torch.cat([vit(t.images).patches, vit(t.image[None]).patches]) for t in triplets]  # (3, N, C) each
    of_shape = {}  # scenes may differ in aspect, and then in their grids
    for t, x in zip(triplets, tokens):
        of_shape.setdefault(t.mask.shape, []).append(x)
    place = {shape: torch.cat(views).mean(0) for shape, views in of_shape.items()}  # (N, C)
    tokens = [x - place[t.mask.shape] for t, x in zip(triplets, tokens)]
    right = cosines = total = 0
    for t, x in zip(triplets, tokens):
        grid, target = tuple(side // vit.patch for side in t.mask.shape), x[2]
        plain = t._replace(masks=torch.zeros_like(t.masks))
        gaussians = reconstruct(t, geometry if t.depth is None else "depth")
        splatted, valid = splat_features(x[:2], gaussians, plain, grid, blend=1.0)
        at = valid.nonzero()[:, 0]
        if len(at):
            similarity = F.normalize(target[at], dim=1) @ F.normalize(splatted[at], dim=1).T
            nearest = at[similarity.argmax(1)]
            off = torch.maximum((nearest // grid[1] - at // grid[1]).abs(), (nearest % grid[1] - at % grid[1]).abs())
            right, cosines, total = right + (off <= 1).sum().item(), cosines + similarity.diagonal().sum().item(), total + len(at)
    if not total:
        raise data.DataError(f"{triplets[0].name}: the splatted contexts cover no token of the target; give --near and --far "
                             "in the scene's unit (python 01_data.py shows the range that was taken)")
    return Agreement(right / total, cosines / total, effective_rank(torch.cat([x[2] for x in tokens])))


@torch.no_grad()
def heldout_picture(path, before, teacher, after, triplets, args):
    """Rows are fixed held-out targets: target | student before | teacher target | student after; one PCA basis a row."""
    rows, of_target = [], {tuple(t.target_w2c.flatten().tolist()): t for t in reversed(triplets)}
    for t in list(of_target.values())[:-7:-1]:
        grid = tuple(side // after.patch for side in t.mask.shape)
        goal, valid = splat_features(teacher(t.images).patches, reconstruct(t, args.geometry), t, grid, args.blend)
        maps = [before(t.image[None]).patches[0], goal, after(t.image[None]).patches[0]]
        basis = lift.pca_basis(torch.cat([maps[0], goal[valid], maps[2]]))
        colours = [lift.pca_colours(m.view(*grid, -1), basis) for m in maps]
        colours[1] = colours[1] * valid.view(grid)  # black: not seen by the contexts
        rows.append([t.image, *(F.interpolate(c[None], t.mask.shape)[0] for c in colours)])
    return data.picture_grid(path, ["target view", "student before (PCA)", "teacher target", "student after"], rows)


# ------------------------------------------------------------------------------------------------ main


def parse(argv):
    parser = argparse.ArgumentParser(description="Distil 3D-aware features: student and EMA teacher, splatted targets (SnD).")
    parser.add_argument("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    parser.add_argument("--out", default="out/04_distill")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="sets the defaults of all flags marked [preset]")
    parser.add_argument("--model", help="ViT to start from: 'tiny', a published name such as dinov2_vits14, a file or folder [preset]")
    parser.add_argument("--pixels", type=splat.positive, help="pixels a view, its aspect kept; lower it when memory runs out [preset]")
    parser.add_argument("--geometry", choices=("sweep", "depth"), default="sweep", help="from the images, or measured depth")
    parser.add_argument("--near", type=float, help="nearest depth; default: from depth maps, sparse points or cameras")
    parser.add_argument("--far", type=float, help="farthest depth of the sweep")
    parser.add_argument("--max_steps", type=splat.positive, help="training steps [preset]")
    parser.add_argument("--lr", type=float, help="learning rate of the adapters, cosine to 0; halve it when the loss jumps [preset]")
    parser.add_argument("--head_lr", type=float, help="the head's; if large, the head learns the task in the ViT's place [preset]")
    parser.add_argument("--rank", type=splat.positive, help="rank of the LoRA adapters [preset]")
    parser.add_argument("--hidden", type=splat.positive, help="width of the head's MLP [preset]")
    parser.add_argument("--bottleneck", type=splat.positive, help="width of the head's bottleneck [preset]")
    parser.add_argument("--prototypes", type=splat.positive, help="number of prototypes; lower it when memory runs out [preset]")
    parser.add_argument("--momentum", type=float, help="EMA momentum of the teacher [preset]")
    parser.add_argument("--ema_every", type=splat.positive, help="steps between teacher updates [preset]")
    parser.add_argument("--tau_student", type=float, help="temperature of the student's softmax [preset]")
    parser.add_argument("--tau_teacher", type=float, help="of the teacher's; lower is sharper, and may collapse [preset]")
    parser.add_argument("--blend", type=float, default=0.5, help="alpha of SnD Eq. 4; 1 switches semantic blending off")
    parser.add_argument("--drop_unmatched", action="store_true", help="do not lift pixels where Eq. 3 is 0/0")
    parser.add_argument("--heldout", type=splat.positive, default=24, help="held-out triplets that are measured before and after")
    parser.add_argument("--save_every", type=splat.positive, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def prepare(args):  # -> training scenes, held-out triplets, a function that loads triplets
    scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
    if args.geometry == "depth":
        scenes = [scene.subset([i for i, frame in enumerate(scene.frames) if frame.depth]) for scene in scenes]
        scenes = [scene for scene in scenes if len(scene) >= 3]
        if not scenes:
            raise data.DataError(f"{args.scene_dir}: no scene has measured depth for three views; use --geometry sweep")
    if not any(frame.mask for scene in scenes for frame in scene.frames):
        print("no instance masks: SLIC superpixels stand in (folder masks/ beside images/ is read when it is there)")
    patch = lift.load_vit(args.model).patch
    sizes = {scene: data.fit_size(scene, args.pixels, patch) for scene in scenes}
    for scene, size in sizes.items():
        if min(size) < 2 * patch:
            raise ValueError(f"--pixels {args.pixels} leaves {scene.name} fewer than 2x2 patches of {patch} pixels; raise it")
    by_name = {scene.name: size for scene, size in sizes.items()}  # a subset keeps its scene's name
    load = lambda scene, indices: load_triplet(scene, indices, by_name[scene.name], args.device, args.near, args.far)
    scenes, heldout = splat.hold_out(scenes, args.heldout, args.seed)
    return scenes, [load(*place) for place in tqdm(heldout, desc="held-out triplets", leave=False)], load


def trained(module):  # the parameters that training changes, by name
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def networks_of(args):  # -> the ViT to start from, student, teacher, the student's optimiser
    before = lift.load_vit(args.model).to(args.device)
    student = nn.ModuleDict(dict(vit=add_lora(copy.deepcopy(before), args.rank, args.rank),
                                 head=DINOHead(before.dim, args.hidden, args.bottleneck, args.prototypes))).to(args.device)
    # Differs: Sec. 3.5 writes of a shared head; here, as in the official code, the teacher's head is an EMA like its ViT.
    teacher = copy.deepcopy(student).requires_grad_(False)  # starts alike; it is never trained, it follows
    # Differs: one learning rate in the paper. In a short run the head would then learn the task and the ViT would not (README).
    optimiser = torch.optim.Adam([{"params": list(trained(student["vit"]).values()), "lr": args.lr, "peak": args.lr},
                                  {"params": list(student["head"].parameters()), "lr": args.head_lr, "peak": args.head_lr}])
    return before, student, teacher, optimiser


def run(args):
    out = Path(args.out)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    print(f"preset {args.preset}: {args.model} ViT at about {args.pixels} pixels, {args.max_steps} steps, "
          f"{args.geometry} geometry, on {args.device}")
    start, stored = splat.find_checkpoint(args)
    scenes, heldout, load = prepare(args)
    before, student, teacher, optimiser = networks_of(args)
    names = set(trained(student))
    networks, checkpoint = {"student": (student, names), "teacher": (teacher, names)}, out / "checkpoint.safetensors"
    if stored:
        splat.restore(stored, networks, optimiser, generator)
        print(f"resumed at step {start} of {args.max_steps}")
    else:
        checkpoint.unlink(missing_ok=True)  # of a finished run, which this one replaces
    agreed_before = agreement(before, heldout, args.geometry)
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, desc="distil", unit="step")
    clock = time.perf_counter()
    with splat.open_log(out, args, start) as log:
        for step in bar:
            # Sec. 3.1: a scene, two contexts, a distinct target.
            scene = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
            t = load(scene, data.sample_triplet(scene, generator))
            grid = tuple(side // before.patch for side in t.mask.shape)

            # Sec. 3.2-3.4: the teacher's context features, lifted, splatted and blended in the target view.
            with torch.no_grad():
                tokens = teacher["vit"](t.images).patches
                goal, valid = splat_features(tokens, reconstruct(t, args.geometry), t, grid, args.blend, args.drop_unmatched)
                teacher_logits = teacher["head"](goal[valid])

            # Sec. 3.5: the student sees the target image alone. Differs: invalid tokens leave the loss, they are not zeroed.
            line = dict(step=step, triplet=t.name, valid=round(valid.float().mean().item(), 4))
            if valid.any():
                student_logits = student["head"](student["vit"](t.image[None]).patches[0][valid])
                loss = distill_loss(student_logits, teacher_logits, args.tau_student, args.tau_teacher)  # SnD Eq. 5
                if not loss.isfinite():
                    raise ValueError(f"step {step}: the loss is {loss.item()} for {t.name}; "
                                     "start again with a lower --lr and another --out")
                for group in optimiser.param_groups:
                    group["lr"] = 0.5 * group["peak"] * (1 + math.cos(math.pi * step / args.max_steps))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                # Most of a cross-entropy is the teacher's own entropy; what can be learned is the rest.
                learnable = loss.item() - distill_loss(teacher_logits, teacher_logits, args.tau_teacher, args.tau_teacher).item()
                line.update(loss=round(loss.item(), 6), kl=round(learnable, 6), lr=optimiser.param_groups[0]["lr"])
                bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{learnable:.4f}")
            log.write(json.dumps({**line, "seconds": round(time.perf_counter() - clock, 2)}) + "\n")
            if (step + 1) % args.ema_every == 0:
                ema_update(teacher, student, args.momentum)  # Differs: after the optimiser's step, in the official code before
            if (step + 1) % args.save_every == 0 or step + 1 == args.max_steps:
                log.flush()
                splat.save_checkpoint(checkpoint, step + 1, splat.run_settings(args), networks, optimiser, generator)

    report(out, before, merge_lora(student["vit"]).eval(), teacher["vit"], agreed_before, heldout, args)


def report(out, before, after, teacher, agreed_before, heldout, args):
    """Save the student; print the answer beside its baseline, and where everything is."""
    lift.save_vit(after, out / "student")
    agreed = agreement(after, heldout, args.geometry)
    picture = heldout_picture(out / "heldout.png", before, teacher, after, heldout, args)
    result = dict(before=agreed_before._asdict(), after=agreed._asdict(), heldout=[t.name for t in heldout])
    lift.write_whole(out / "result.json", json.dumps(result, indent=1).encode())
    print(f"{len(heldout)} held-out triplets\n  before: {agreed_before}\n  after:  {agreed}\n  ->  {picture}, {out / 'student'}")


def main(argv=None):
    args = parse(argv)
    try:
        torch.zeros(1, device=args.device)
        run(args)
    except (data.DataError, ValueError) as error:
        sys.exit(str(error))
    except (AssertionError, RuntimeError) as error:
        if "CUDA" not in str(error) and "device" not in str(error):
            raise
        sys.exit(f"--device {args.device}: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; `--resume --out {args.out}` goes on from the last checkpoint")


if __name__ == "__main__":
    main()
