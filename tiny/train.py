"""The recipes of the weights in tiny/: stand-ins for DINOv2, MVSplat and Distill3R's student.

Paper   He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", for the ViT: 75 % of the patches hidden,
        their normalised pixels predicted. Caron et al. 2021 (DINO) and Zhou et al. 2022 (iBOT) for the semantic one.
        Chen et al. 2024, "MVSplat", for MVSplat: a third view splatted.
In      the training rooms (split "train" of --rooms built-in rooms, written to --scene_dir), and no validation rooms.
Out     tiny/*.safetensors (fp16; the student's matrices in 8 bits). 02, 03 and 05 measure what they know.
Run     python tiny/train.py vit                 makes the ViT
        python tiny/train.py semantic            trains the ViT on, by DINO and masked tokens; on a card if there is one
        python tiny/train.py mvsplat             makes MVSplat; a killed run goes on with --resume
        python tiny/train.py student --encoder out/04_distill/student    makes a student of pointmaps
        python tiny/train.py poses               measures how well the built-in student finds cameras; trains nothing
Not     3D in the ViT: it is trained without pose, depth, mask or label.
"""
import argparse
import copy
import importlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
data, lift, splat, distill, distill3r = (importlib.import_module(name) for name in (
    "01_data", "02_lift", "03_splat", "04_distill", "06_distill3r"))
GeometricTeacher = importlib.import_module("tiny.teacher").GeometricTeacher

# ------------------------------------------------------------------------------------------------ ViT

TINY = dict(patch=8, dim=192, depth=6, heads=3, grid=16, mlp_ratio=2)  # 1.9 M parameters, 3.8 MB in fp16
GRID = (12, 16)  # patches of a 96 x 128 room view


class MaskedAutoencoder(nn.Module):
    """The ViT sees a quarter of the patches; two small blocks paint the others from what it made of them."""

    def __init__(self, vit, hidden=0.75, dim=128):
        super().__init__()
        self.vit, self.hidden = vit, hidden
        self.to_decoder = nn.Linear(vit.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, GRID[0] * GRID[1], dim))
        self.blocks = nn.ModuleList(lift.Block(dim, dim // 64) for _ in range(2))
        self.to_pixels = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * vit.patch**2))

    def forward(self, images, generator):  # (B, 3, H, W) in [0, 1] -> mean squared error of the hidden patches
        B, P = len(images), self.vit.patch
        x = self.vit.embed(images)  # (B, 1 + N, C)
        N = x.shape[1] - 1
        order = torch.rand(B, N, generator=generator).argsort(1)
        seen, unseen = order[:, :round(N * (1 - self.hidden))], order[:, round(N * (1 - self.hidden)):]
        pick = lambda t, index: t.gather(1, index[..., None].expand(-1, -1, t.shape[-1]))
        x = torch.cat([x[:, :1], pick(x[:, 1:], seen)], 1)
        for block in self.vit.blocks:
            x = block(x)
        x = self.to_decoder(self.vit.norm(x)[:, 1:])
        canvas = torch.cat([x, self.mask_token.expand(B, unseen.shape[1], -1).to(x)], 1)
        canvas = canvas + pick(self.positions.expand(B, -1, -1), order)  # in the shuffled order, so no unshuffling
        for block in self.blocks:
            canvas = block(canvas)
        painted = self.to_pixels(canvas[:, seen.shape[1]:])
        patches = F.unfold(images, P, stride=P).transpose(1, 2)  # (B, N, 3 P P)
        truth = pick(patches, unseen)
        truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-4).sqrt()
        return F.mse_loss(painted.float(), truth)


def initialise(vit):
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(vit.pos_embed, std=0.02)
    nn.init.trunc_normal_(vit.cls_token, std=0.02)
    return vit


def random_crop(images, generator):  # (B, 3, H, W): one window of 50 to 100 % of the area for the batch, random flips
    _, _, H, W = images.shape
    side = math.sqrt(0.5 + 0.5 * torch.rand(1, generator=generator).item())
    h, w = round(side * H), round(side * W)
    top, left = (torch.randint(full - part + 1, (1,), generator=generator).item() for full, part in ((H, h), (W, w)))
    crop = F.interpolate(images[:, :, top:top + h, left:left + w], (H, W), mode="bilinear", align_corners=False)
    flip = torch.rand(len(images), generator=generator) < 0.5
    crop[flip] = crop[flip].flip(-1)
    return crop


def warm_up_and_cosine(step, steps, warm=200, least=0.0):  # the share of the peak learning rate
    return min((step + 1) / warm, least + (1 - least) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def decayed(model, decay):  # groups of parameters for AdamW: matrices decay, vectors do not
    groups = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": group, "weight_decay": amount} for group, amount in zip(groups, (decay, 0.0))]


def descend(run, optimiser, network, rate, loss, **more):
    """Takes the step that `network` has gradients for, clipped to a norm of 1, at this learning rate, and logs it."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0).item()
    run.check(norm, "this batch", "gradient")
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    run.log(loss=loss, **more)


def train_vit(args, images):
    """8,000 steps of 32 images (I, 3, H, W) by default. A run that was killed goes on with --resume."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = MaskedAutoencoder(initialise(lift.VisionTransformer(**TINY)))
    optimiser = torch.optim.AdamW(decayed(model, 0.05), betas=(0.9, 0.95))
    changing = {"vit": dict(model.named_parameters())}
    run = distill.Run(args, changing, optimiser, generator=generator, name="masked autoencoder")
    for step in run:
        picked = images[torch.randint(len(images), (32,), generator=generator)].float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(random_crop(picked, generator), generator)
        loss.backward()
        descend(run, optimiser, model, 1e-3 * warm_up_and_cosine(step, args.max_steps), loss.item())
    return model.vit.eval()


@torch.no_grad()
def standardise(vit, images):
    """Set the final norm's scale and shift so that patch tokens have mean 0 and variance 1 in every channel.

    A masked autoencoder leaves a common offset in all tokens (their mean cosine is 0.99), which its own linear decoder
    removes but a cosine does not. The information in a token, and what a linear probe reads, stays the same.
    """
    tokens = torch.cat([vit(batch.float() / 255).patches.flatten(0, 1) for batch in images[::4].split(16)])
    mean, std = tokens.mean(0), tokens.std(0)
    vit.norm.weight.div_(std)
    vit.norm.bias.sub_(mean).div_(std)
    return vit


# ------------------------------------------------------------------------------------------------ a semantic ViT
# A masked autoencoder is a painter. DINOv2's two losses ask for less: that a student names what its teacher, its own
# moving average, names. The teacher sees another window of the picture (DINO's loss, on the class token), or patches
# that are hidden from the student (iBOT's). The ViT starts from the masked autoencoder. From random weights, 4,900
# steps of 128 pictures did not learn what a room is made of (mIoU 7 %).

LOCAL_VIEWS = 4  # small windows of each picture, beside two large ones


class SelfDistilled(nn.Module):
    """A ViT with two of DINO's heads: one for the class token, one for patches."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.hidden = vit, None
        self.heads = nn.ModuleList(distill.DINOHead(vit.dim, 1024, 128, 2048) for _ in range(2))
        vit.patch_embed.register_forward_hook(self.hide)

    def hide(self, layer, inputs, patches):  # (B, N, C)
        if self.hidden is not None:
            return torch.where(self.hidden[..., None], self.vit.mask_token.to(patches), patches)

    def forward(self, images, hidden=None):  # (B, 3, H, W), (B, N) bool -> CLS (B, C), patches (B, N, C)
        self.hidden = hidden
        cls, _, patches = self.vit(images)
        return cls, patches


def window(images, size, least, most, generator):
    """Of each picture another window of `least` to `most` of the area, half of them mirrored, in other colours."""
    B = len(images)
    side, mirror, across, down = torch.rand(4, B, generator=generator)
    side = (least + (most - least) * side).sqrt()
    move = torch.zeros(B, 2, 3)
    move[:, 0, 0], move[:, 1, 1] = torch.where(mirror < 0.5, -side, side), side
    move[:, 0, 2], move[:, 1, 2] = (1 - side) * (2 * across - 1), (1 - side) * (2 * down - 1)
    grid = F.affine_grid(move.to(images.device), (B, 3, *size), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, colour = (0.8 + 0.4 * torch.rand(3, B, 1, 1, 1, generator=generator)).to(images.device)
    images = brightness * images
    for factor, axes in ((contrast, (1, 2, 3)), (colour, 1)):
        images = torch.lerp(images.mean(axes, keepdim=True), images, factor)
    return images.clamp(0, 1)


def hidden_patches(B, generator):  # (B, N) bool: coherent parts, 20 to 60 % of each picture, of half of the pictures
    field = F.interpolate(torch.rand(B, 1, 4, 5, generator=generator), GRID, mode="bilinear").flatten(1)
    share = (0.2 + 0.4 * torch.rand(B, 1, generator=generator)) * (torch.rand(B, 1, generator=generator) < 0.5)
    return field.argsort(1).argsort(1) < share * field.shape[1]


def even(logits, tau):
    """The softmax of (M, P) logits, balanced so that all prototypes are used (three rounds of Sinkhorn)."""
    q = logits.float() / tau
    q = (q - q.amax()).exp()
    for _ in range(3):
        q = q / q.sum(0).clamp_min(1e-20)
        q = q / q.sum(1, keepdim=True).clamp_min(1e-20)
    return q


def self_distillation_loss(student, teacher, images, tau, generator):
    """DINO's loss on class tokens and iBOT's on hidden patches; images (B, 3, H, W)."""
    B, (H, W) = len(images), images.shape[-2:]
    large = torch.cat([window(images, (H, W), 0.4, 1.0, generator) for _ in range(2)])
    small = torch.cat([window(images, (H // 2, W // 2), 0.08, 0.4, generator) for _ in range(LOCAL_VIEWS)])
    hidden = hidden_patches(2 * B, generator).to(images.device)
    with torch.autocast(images.device.type, torch.bfloat16):
        with torch.no_grad():
            cls, patches = teacher(large)
            names = even(teacher.heads[0](cls), tau).view(2, B, -1)
            patch_names = even(teacher.heads[1](patches[hidden]), tau)
        (cls, patches), (small_cls, _) = student(large, hidden), student(small)
        found = student.heads[0](torch.cat([cls, small_cls])).float().view(2 + LOCAL_VIEWS, B, -1)
        patches = student.heads[1](patches[hidden]).float()
    cross_entropy = lambda target, logits: -(target * (logits / 0.1).log_softmax(-1)).sum(-1).mean()
    pairs = [(i, j) for i in range(2) for j in range(len(found)) if i != j]  # a window is not compared with itself
    return sum(cross_entropy(names[i], found[j]) for i, j in pairs) / len(pairs) + cross_entropy(patch_names, patches)


def train_semantic(args, images):
    """4,400 steps of 64 images (I, 3, H, W) by default: 4 minutes on an H200, 10 hours on a core."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    student = SelfDistilled(lift.load_vit("tiny"))
    nn.init.trunc_normal_(student.vit.mask_token, std=0.02)
    student = student.to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.AdamW(decayed(student, 0.04), betas=(0.9, 0.99))
    changing = {"student": dict(student.named_parameters()), "teacher": dict(teacher.named_parameters())}
    run = distill.Run(args, changing, optimiser, generator=generator, name="self-distillation")
    for step in run:
        tau = 0.04 + 0.02 * min(1, step / (0.3 * args.max_steps))
        picked = images[torch.randint(len(images), (64,), generator=generator)].to(args.device).float() / 255
        loss = self_distillation_loss(student, teacher, picked, tau, generator)
        loss.backward()
        descend(run, optimiser, student, 3e-4 * warm_up_and_cosine(step, args.max_steps, warm=300), loss.item())
        slow = 0.004 * 0.5 * (1 + math.cos(math.pi * step / args.max_steps))
        distill.ema_update(teacher, student, 1 - slow)
    return teacher.vit.cpu().eval()


# ------------------------------------------------------------------------------------------------ MVSplat


def rooms_in_memory(scenes):
    """-> images (S, V, 3, H, W) uint8, depth (S, V, H, W), K (S, V, 3, 3), c2w (S, V, 4, 4) of all views."""
    views = [[s.view(i) for i in range(len(s))] for s in tqdm(scenes, desc="rooms")]
    stack = lambda key: torch.stack([torch.stack([key(v) for v in row]) for row in views])
    images = stack(lambda v: (v.image * 255).round().byte())
    return images, stack(lambda v: v.depth), stack(lambda v: v.K), stack(lambda v: v.c2w)


def candidate_loss(probability, depth, far):
    """Cross-entropy (V, h, w) between the candidates' probability (V, D, h, w) and the two around the true depth
    (V, h, w)."""
    D = probability.shape[1]
    place = ((1 / depth.clamp_min(1e-3) - 1 / far) / (1 - 1 / far) * (D - 1)).clamp(0, D - 1.001)
    target = (1 - (place[:, None] - torch.arange(D).view(D, 1, 1)).abs()).clamp_min(0)  # (V, D, h, w)
    return -(target * probability.clamp_min(1e-6).log()).sum(1)


def matching_loss(net, t: splat.Triplet):
    """Stage 1, the quarter-resolution half alone: the true depth should stand out in the raw cost volume where both
    views see it, and in the refined one everywhere."""
    D, K, c2w = net.config.num_depth_candidates, t.K[:2], t.c2w[:2]
    with torch.autocast("cpu", torch.bfloat16):
        _, _, volume, probability = net.match(t.images[:2], K, c2w, torch.linspace(1 / t.far, 1, D).expand(2, D))
    low = F.interpolate(t.depth[:2, None], scale_factor=0.25, mode="nearest")[:, 0]
    seen = torch.stack([distill.covisible_pixels(low, K / K.new_tensor([4, 4, 1])[:, None], c2w, v) for v in (0, 1)])
    raw = candidate_loss(volume.softmax(1), low, t.far)[seen].mean() if seen.any() else volume.sum() * 0
    return 0.3 * raw + candidate_loss(probability.float(), low, t.far).mean()


def gaussian_loss(net, t: splat.Triplet, photometric):
    """Stage 2: the log depth of the two contexts. Stage 3: mostly the third view, splatted with the contexts' pixel
    colours (as features are lifted) where a context sees it."""
    with torch.autocast("cpu", torch.bfloat16):
        gaussians, colours = splat.reconstruct("mvsplat", t, net)
    loss = distill.log_depth_error(gaussians, t.depth[:2], t.c2w[:2])
    if not photometric:
        return loss
    mse, structure = distill.view_error(gaussians, colours, t)
    return 0.1 * loss + 5 * mse + 0.1 * structure


def train_mvsplat(args, scenes):
    """7,500 steps of two triplets by default. A run that was killed goes on with --resume."""
    torch.manual_seed(args.seed)
    net = lift.MVSplat(lift.MVSplatConfig.tiny)
    rooms = rooms_in_memory(scenes)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01, betas=(0.9, 0.95))
    run = distill.Run(args, {"mvsplat": dict(net.named_parameters())}, optimiser, name="mvsplat")
    for step in run:
        stage = 1 + (step >= args.max_steps * 40 / 75) + (step >= args.max_steps * 53 / 75)  # 40, 13, 22 of 75 parts
        generator = torch.Generator().manual_seed(10**6 * args.seed + step)
        for _ in range(2):
            t = draw_sample(scenes, rooms, generator)
            loss = matching_loss(net, t) if stage == 1 else gaussian_loss(net, t, photometric=stage == 3)
            (loss / 2).backward()
        rate = 1e-3 * warm_up_and_cosine(step, args.max_steps, least=0.02)
        descend(run, optimiser, net, rate, loss.item(), stage=stage)  # the gradient of both triplets
    return net.eval()


def draw_sample(scenes, rooms, generator) -> splat.Triplet:
    """A random triplet of a random room, in units of its nearest depth."""
    images, depth, K, c2w = rooms
    s = int(torch.randint(len(scenes), (1,), generator=generator))
    pick = list(data.sample_triplet(scenes[s], generator))
    shrink, stretch = torch.rand(2, generator=generator).tolist()  # it sees depth ranges wider than the true one, too
    near, far = scenes[s].depth_range
    near, far = near * (0.7 + 0.3 * shrink), far * (1 + 0.5 * stretch)
    poses = c2w[s, pick].clone()
    poses[:, :3, 3] /= near
    return splat.Triplet("", images[s, pick].float() / 255, None, depth[s, pick] / near, K[s, pick], poses, far / near)


def make_mvsplat(args, scenes):
    state = train_mvsplat(args, scenes).state_dict()
    lift.save_tensors(ROOT / "tiny" / "mvsplat.safetensors", {key: value.half() for key, value in state.items()})


# ------------------------------------------------------------------------------------------------ Distill3R's student
# `06_distill3r.py train` alone does not teach a student of this size how the camera moved. Its points are wrong by as
# much as neighbouring cameras are apart, so the loss hardly tells it which tokens of two views show the same place.
# Here it is told: in two blocks of the fusion, one attention head is trained to look at the matching tokens of other
# views. First points are predicted at the tokens alone, which is cheap; then maps are, by Distill3R's loss.

MATCHING = 2, 3  # the blocks of the fusion whose first head is taught
VIEWS, SIZE = 4, (48, 64)  # of a sample
STAGES = {"tokens": (3000, 16, 1e-3), "maps": (2000, 8, 5e-4)}  # steps, samples a step, peak learning rate


class StudentTrainer(nn.Module):
    """A student, points at its tokens, and the attention's logits (V N, V N) of the heads that are taught to match."""

    def __init__(self, args):
        super().__init__()
        self.model = distill3r.new_student(argparse.Namespace(
            encoder=args.encoder, preset="tiny", size=SIZE, seed=args.seed, grad_checkpoint=False))
        self.readout = nn.Linear(self.model.config.dec_dim, 6)  # of the first stage: a local and a global point a token
        self.match, self.logits = args.match, []
        for number in MATCHING:
            attention = self.model.decoder.dec_blocks[number - 1].attn
            attention.qkv.register_forward_hook(partial(self.keep, attention.heads))

    def keep(self, heads, layer, inputs, qkv):  # (1, V N, 3 C), as the attention computes it
        q, k, _ = qkv[0].unflatten(-1, (3, heads, -1))[:, :, 0].float().unbind(1)
        self.logits.append(q @ k.T / math.sqrt(q.shape[-1]))

    def forward(self, images, ids, stage):  # (V, 3, H, W), V ids -> V Pointmaps, of (N, 1) "pixels" for the tokens
        self.logits.clear()
        with torch.autocast("cpu", torch.bfloat16):
            if stage == "maps":
                return self.model(list(images), ids)
            tokens = self.model.decoder(list(self.model.tokens(images)), ids)[-1]
            raw = self.readout(torch.stack(tokens))  # (V, N, 6)
            local, world = (distill3r.read_out(F.pad(part, (0, 1)).mT[..., None]) for part in raw.split(3, -1))
            return [distill3r.Pointmap(*each) for each in zip(world[0], local[0], world[1], local[1])]


class Windows(NamedTuple):
    images: torch.Tensor  # (B, V, 3, H, W) in [0, 1]
    depth: torch.Tensor  # (B, V, H, W)
    K: torch.Tensor  # (B, V, 3, 3)
    c2w: torch.Tensor  # (B, V, 4, 4)


def draw_windows(rooms, count, strides, generator, mirror=True) -> Windows:
    """Of `rooms_in_memory`: views of one room at equal steps along the walk, in either direction. Half of the batches
    are mirrored left to right."""
    images, depth, K, c2w = rooms
    room = torch.randint(len(depth), (count,), generator=generator)
    stride = torch.tensor(strides)[torch.randint(len(strides), (count,), generator=generator)]
    start = (torch.rand(count, generator=generator) * (depth.shape[1] - (VIEWS - 1) * stride)).long()
    view = start[:, None] + stride[:, None] * torch.arange(VIEWS)
    backwards = torch.rand(count, generator=generator) < 0.5
    view = torch.where(backwards[:, None], view.flip(1), view)
    images, depth, K, c2w = (x[room[:, None], view] for x in (images, depth, K, c2w))
    if mirror and torch.rand((), generator=generator) < 0.5:
        flip = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
        images, depth, c2w = images.flip(-1), depth.flip(-1), flip @ c2w @ flip
    return Windows(images.float() / 255, depth, K, c2w)


def true_points(w: Windows):
    """-> local and global points (B, V, H, W, 3), and poses in the first view's frame (B, V, 4, 4)."""
    local = lift.pixel_rays(w.K[0, 0], *w.depth.shape[2:]) * w.depth[..., None]
    poses = torch.linalg.inv(w.c2w[:, :1]) @ w.c2w
    return local, torch.einsum("bvij,bvhwj->bvhwi", poses[..., :3, :3], local) + poses[..., None, None, :3, 3], poses


def matching_tokens(w: Windows, local, P):
    """Where the other views show what a token's centre shows: weights (B, V N, V N), rows sum to 1, bilinear over four
    tokens of each view that sees it; and which rows (B, V N) are seen in any."""
    B, V, H, W = w.depth.shape
    centres = local[:, :, P // 2::P, P // 2::P].flatten(2, 3)  # (B, V, N, 3)
    N, rows, cols = centres.shape[2], H // P, W // P
    world = torch.einsum("bvij,bvnj->bvni", w.c2w[..., :3, :3], centres) + w.c2w[:, :, None, :3, 3]
    w2c = torch.linalg.inv(w.c2w)
    there = torch.einsum("buij,bvnj->bvnui", w2c[..., :3, :3], world) + w2c[:, None, None, :, :3, 3]  # (B, V, N, U, 3)
    pixel = there @ w.K[0, 0].T
    xy, z = pixel[..., :2] / pixel[..., 2:].clamp_min(1e-6), there[..., 2]
    inside = (z > 0.05) & (xy > 0).all(-1) & (xy[..., 0] < W) & (xy[..., 1] < H)
    at = xy.clamp_min(0).long()
    sample, other = torch.arange(B).view(B, 1, 1, 1), torch.arange(V)
    depth = w.depth[sample, other, at[..., 1].clamp_max(H - 1), at[..., 0].clamp_max(W - 1)]
    seen = inside & ((depth - z).abs() < 0.06 * z) & (other.view(1, V, 1, 1) != other)
    place = (xy / P - 0.5).clamp_min(0).minimum(xy.new_tensor([cols - 1, rows - 1]))
    share = lambda x, n: (1 - (x[..., None] - torch.arange(n)).abs()).clamp_min(0)  # of each of n tokens in a row
    across, down = share(place[..., 0], cols), share(place[..., 1], rows)
    weights = (down[..., None] * across[..., None, :] * seen[..., None, None]).view(B, V * N, V * N)
    total = weights.sum(-1, keepdim=True)
    return weights / total.clamp_min(1e-6), total[..., 0] > 0


def learn_windows(trainer, w: Windows, ids, stage, generator) -> float:
    """Adds the gradients of the samples, one by one, and returns the mean of their losses. Both stages have Distill3R's
    loss: on the true points at the tokens, without confidences; on the maps of tiny/teacher.py, as it is."""
    teacher, Pointmap, P, total = GeometricTeacher(SIZE), distill3r.Pointmap, trainer.model.patch, 0.0
    local, world, _ = true_points(w)
    weights, seen = matching_tokens(w, local, P)
    centres = lambda points: points[:, P // 2::P, P // 2::P].reshape(VIEWS, -1, 1, 3)
    for b in range(len(w.depth)):
        if stage == "tokens":
            one = torch.ones(len(weights[b]) // VIEWS, 1)
            targets = [Pointmap(*points, one, one) for points in zip(centres(world[b]), centres(local[b]))]
            masks, how = [one > 0] * VIEWS, dict(weight="none", gamma=0)
        else:
            views = [argparse.Namespace(name="", depth=depth, K=K, c2w=c2w)
                     for depth, K, c2w in zip(w.depth[b], w.K[b], w.c2w[b])]
            targets, masks, how = teacher(views, generator), list(w.depth[b] > 0), {}
        loss = distill3r.pointmap_loss(trainer(w.images[b], ids[b], stage), targets, masks, **how).total / len(w.depth)
        for logits in trainer.logits:
            cost = -(weights[b] * logits.log_softmax(-1)).sum(-1)[seen[b]].sum() / seen.sum()
            loss = loss + trainer.match * cost / len(MATCHING)
        loss.backward()
        total += loss.item()
    return total


def train_stage(args, trainer, rooms, stage):  # "tokens" or "maps"
    steps, batch, peak = STAGES[stage]
    optimiser = distill3r.new_optimiser(trainer.model, argparse.Namespace(lr=peak, encoder_share=0.3))
    optimiser.add_param_group({"params": trainer.readout.parameters(), "share": 1.0})
    args = argparse.Namespace(**vars(args) | dict(out=str(Path(args.out, stage)), max_steps=args.max_steps or steps))
    run = distill.Run(args, {"student": dict(trainer.named_parameters())}, optimiser, name=stage)
    for step in run:
        generator = torch.Generator().manual_seed(step)
        w = draw_windows(rooms, batch, (1, 2, 3, 4), generator)  # neighbouring views, and views farther apart
        ids = [distill3r.draw_view_ids(VIEWS, generator) for _ in w.depth]
        loss = learn_windows(trainer, w, ids, stage, generator)
        descend(run, optimiser, trainer, peak * warm_up_and_cosine(step, args.max_steps, least=0.02), loss)


def train_student(args, scenes):
    """First on tokens, then on maps. A run that was killed goes on with --resume."""
    torch.manual_seed(args.seed)
    trainer, rooms = StudentTrainer(args), rooms_in_memory(scenes)
    after_tokens = Path(args.out, "tokens.safetensors")
    if not after_tokens.exists():
        train_stage(args, trainer, rooms, "tokens")
        lift.save_tensors(after_tokens, trainer.state_dict())
    trainer.load_state_dict(load_file(after_tokens))
    train_stage(args, trainer, rooms, "maps")
    return trainer.model.eval()


@torch.no_grad()
def compare_poses(model, rooms, stride, windows=100):
    """Cameras of four views, `stride` apart along the walk, found from their pictures.

    -> over consecutive cameras: the median error of the rotation between them and that of standing still (degrees), the
    share in which the former is smaller (%), and the median angle between found and true direction of motion (degrees).
    """
    generator, rows = torch.Generator().manual_seed(1), []
    angle = lambda R: ((R.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2).clamp(-1, 1).acos().rad2deg()
    w = draw_windows(rooms, windows, (stride,), generator, mirror=False)
    for images, truth in zip(w.images, true_points(w)[2]):
        found = distill3r.estimate_cameras(model(list(images), generator=generator)).c2w
        found, true = (torch.linalg.inv(poses[:-1]) @ poses[1:] for poses in (found, truth))
        still, off = angle(true[:, :3, :3]), angle(found[:, :3, :3].mT @ true[:, :3, :3])
        turned = F.cosine_similarity(found[:, :3, 3], true[:, :3, 3]).clamp(-1, 1).acos().rad2deg()
        rows.append(torch.stack([off, still, 100.0 * (off < still), turned], 1))
    rows = torch.cat(rows)
    off, still, _, turned = rows.median(0).values.tolist()
    return off, still, rows[:, 2].mean().item(), turned


def in_8_bits(state) -> dict:
    """Matrices as int8 with a scale a row (`name.scale`), all else in fp16; `load_student("tiny")` of 06 undoes it."""
    stored = {}
    for name, x in state.items():
        stored[name] = x.half()
        if x.ndim > 1:
            scale = (x.flatten(1).abs().amax(1) / 127).clamp_min(1e-6).half()
            stored[name] = torch.einsum("r...,r->r...", x, 1 / scale.float()).round().clamp(-127, 127).to(torch.int8)
            stored[f"{name}.scale"] = scale
    return stored


def make_student(args):
    data.make_rooms(args.scene_dir, args.rooms, size=SIZE, seed=7)
    student = train_student(args, data.load_scenes(args.scene_dir))
    lift.save_tensors(ROOT / "tiny" / "student.safetensors", in_8_bits(student.state_dict()))
    print_poses()


def print_poses():
    held_out = rooms_in_memory(data.open_scenes("data_small")[:100])  # of another seed
    print("| views apart | rotation off by | standing still | better in % | direction off by |\n|---|---|---|---|---|")
    for stride in (1, 2, 3):
        found = compare_poses(distill3r.load_student("tiny"), held_out, stride)
        print("| {} | {:.2f} | {:.2f} | {:.0f} | {:.0f} |".format(stride, *found))


# ------------------------------------------------------------------------------------------------ main


def make_vit(args, scenes):
    images, aside = rooms_in_memory(scenes)[0].flatten(0, 1), Path(args.out) / "vit"
    lift.save_vit(standardise(train_vit(args, images), images), aside)  # in Hugging Face's names, which load_vit knows
    stored = load_file(aside / "model.safetensors")
    lift.save_tensors(ROOT / "tiny" / "vit.safetensors", {key: value.half() for key, value in stored.items()})


def make_semantic(args, scenes):
    images = rooms_in_memory(scenes)[0].flatten(0, 1)
    lift.save_vit(standardise(train_semantic(args, images), images), Path(args.out) / "vit")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train a tiny network on the training rooms.")
    parser.add_argument("what", choices=("vit", "semantic", "mvsplat", "student", "poses"), help="what to make; poses "
                        "makes nothing: it measures how well the built-in student finds cameras")
    parser.add_argument("--scene_dir", help="where the rooms are, or are written; default out/tiny/rooms, for student "
                        "out/tiny/small")
    parser.add_argument("--rooms", type=data.positive, help="default: 400, for student 1500 of 48x64")
    parser.add_argument("--out", help="the run's folder; default out/tiny/ and what is made")
    parser.add_argument("--max_steps", type=data.positive, help="default: 8000 for vit, 4400 for semantic, "
                        "7500 for mvsplat, 3000 and 2000 for student")
    parser.add_argument("--encoder", default="tiny", help="the ViT that a student starts from")
    parser.add_argument("--match", type=float, default=0.3, help="weight of a student's matching; 0: without it")
    parser.add_argument("--save_minutes", type=float, default=2.0,
                        help="minutes between checkpoints; 0 writes one after each step")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.what == "poses":
        return print_poses()
    args.device = "cuda" if args.what == "semantic" and torch.cuda.is_available() else "cpu"
    args.out = args.out or f"out/tiny/{args.what}"
    rooms, folder, steps = dict(vit=(400, "rooms", 8000), semantic=(400, "rooms", 4400),
                                mvsplat=(400, "rooms", 7500), student=(1500, "small", None))[args.what]
    args.rooms, args.max_steps = args.rooms or rooms, args.max_steps or steps
    args.scene_dir = args.scene_dir or f"out/tiny/{folder}"
    with data.explained(args, f"`--resume --out {args.out}` goes on from the last checkpoint"):
        if args.what == "student":
            return make_student(args)
        data.make_rooms(args.scene_dir, args.rooms)
        scenes = data.load_scenes(args.scene_dir)
        make = dict(vit=make_vit, semantic=make_semantic, mvsplat=make_mvsplat)[args.what]
        make(args, data.split(scenes, "train"))


if __name__ == "__main__":
    main()
