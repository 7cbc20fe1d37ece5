"""The recipes of tiny/vit.safetensors and tiny/mvsplat.safetensors, stand-ins for DINOv2 and MVSplat.

Paper   He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", for the ViT: 75 % of the patches hidden, their
        normalised pixels predicted from the rest. Chen et al. 2024, "MVSplat", for MVSplat: a third view splatted.
In      the training rooms (split "train" of --rooms built-in rooms, written to --scene_dir). Validation rooms are not seen.
Out     tiny/*.safetensors (fp16), and the tables of tiny/README.md.
Run     python tiny/train.py vit                 makes the ViT
        python tiny/train.py mvsplat             makes MVSplat; a killed run goes on where it was
        python tiny/train.py mvsplat --probe     only measures the weights that are here
Not     3D in the ViT: it is trained without pose, depth, mask or label; the probes alone read them.
"""
import argparse
import importlib
import io
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
data, lift, splat = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat"))

# ------------------------------------------------------------------------------------------------ ViT

TINY = dict(patch=8, dim=192, depth=6, heads=3, grid=16, mlp_ratio=2)  # 1.9 M parameters, 3.7 MB in fp16
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


def train_vit(scenes, steps, batch, lr, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.stack([(s.view(i).image * 255).byte() for s in tqdm(scenes, desc="rooms") for i in range(len(s))])
    model = MaskedAutoencoder(initialise(lift.VisionTransformer(**TINY)))
    decay = [p for p in model.parameters() if p.ndim > 1]
    optimiser = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05},
                                   {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}], lr, betas=(0.9, 0.95))
    warm = lambda step: min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm)
    bar = tqdm(range(steps), desc="masked autoencoder", mininterval=5)
    average = None
    for _ in bar:
        picked = images[torch.randint(len(images), (batch,), generator=generator)].float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(random_crop(picked, generator), generator)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.set_postfix(loss=f"{average:.4f}")
    return model.vit


@torch.no_grad()
def standardise(vit, scenes):
    """Set the final norm's scale and shift so that patch tokens have mean 0 and variance 1 in every channel.

    A masked autoencoder leaves a common offset in all tokens (their mean cosine is 0.99), which its own linear decoder
    removes but a cosine does not. The information in a token, and what a linear probe reads, stays the same.
    """
    tokens = torch.cat([vit(s.view(i).image[None]).patches[0] for s in scenes for i in range(0, len(s), 4)])
    mean, std = tokens.mean(0), tokens.std(0)
    vit.norm.weight.div_(std)
    vit.norm.bias.sub_(mean).div_(std)
    return vit


@torch.no_grad()
def probe(vit, train_scenes, val_scenes):
    """Linear probes (ridge regression, closed form) from a token to what its patch centre shows, and matching.

    -> depth RMSE (m), depth AbsRel, normal RMSE (degrees), mIoU (%), correspondence (%): the share of tokens whose most
    similar token four views further on is the right one, within one patch.
    """
    def tokens_of(scene):
        views = [scene.view(i) for i in range(0, len(scene), 2)]
        centre = lambda m: torch.stack([getattr(v, m)[4::8, 4::8].flatten(0, 1) for v in views])
        return vit(torch.stack([v.image for v in views])).patches, centre("depth"), centre("normal"), centre("label")

    def ridge(x, y):  # (M, C), (M, D) -> (C + 1, D)
        x = F.pad(x, (0, 1), value=1.0).double()
        return torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1]), x.T @ y.double())

    def gather(scenes):
        return [torch.cat([t.flatten(0, 1) for t in column]) for column in zip(*map(tokens_of, scenes))]

    x, depth, normal, label = gather(train_scenes)
    mean, std = x.mean(0), x.std(0) + 1e-6
    heads = [ridge((x - mean) / std, y) for y in (depth[:, None].log(), normal, F.one_hot(label, len(data.CLASSES)))]
    x, depth, normal, label = gather(val_scenes)
    log_depth, normals, scores = (F.pad((x - mean) / std, (0, 1), value=1.0).double() @ head for head in heads)
    guess = log_depth[:, 0].exp()
    angle = (F.normalize(normals, dim=1) * normal).sum(1).clamp(-1, 1).acos().rad2deg()
    iou = [((scores.argmax(1) == c) & (label == c)).sum() / ((scores.argmax(1) == c) | (label == c)).sum().clamp_min(1)
           for c in range(len(data.CLASSES)) if (label == c).any()]
    return ((guess - depth).square().mean().sqrt().item(), ((guess - depth).abs() / depth).mean().item(),
            angle.square().mean().sqrt().item(), 100 * torch.stack(iou).mean().item(), 100 * matching(vit, val_scenes))


def matching(vit, scenes):
    right = total = 0
    for scene in scenes:
        for i in range(0, len(scene) - 4, 4):
            here, there = scene.view(i), scene.view(i + 4)
            points = lift.pixel_rays(here.K, *here.depth.shape) * here.depth[..., None]
            points = (points[4::8, 4::8].flatten(0, 1) @ here.c2w[:3, :3].T + here.c2w[:3, 3] - there.c2w[:3, 3]) @ there.c2w[:3, :3]
            pixel = points @ there.K.T
            xy = pixel[:, :2] / pixel[:, 2:].clamp_min(1e-6)
            H, W = there.depth.shape
            inside = (points[:, 2] > 0.05) & (xy > 0).all(1) & (xy < xy.new_tensor([W, H])).all(1)
            at = xy.long().clamp_min(0)
            seen = inside & ((there.depth[at[:, 1].clamp_max(H - 1), at[:, 0].clamp_max(W - 1)] - points[:, 2]).abs() < 0.05 * points[:, 2])
            a, b = (F.normalize(vit(v.image[None]).patches[0], dim=1) for v in (here, there))
            best = (a @ b.T).argmax(1)
            found = torch.stack([best % GRID[1], best // GRID[1]], 1) * 8 + 4  # the matched patch's centre, x y
            right += ((found - xy).abs().amax(1) <= 12)[seen].sum().item()  # the patch that is hit, or one beside it
            total += seen.sum().item()
    return right / total


# ------------------------------------------------------------------------------------------------ MVSplat


def rooms_in_memory(scenes):
    """-> images (S, V, 3, H, W) uint8, depth (S, V, H, W), K (S, V, 3, 3), c2w (S, V, 4, 4) of all views."""
    views = [[s.view(i) for i in range(len(s))] for s in tqdm(scenes, desc="rooms")]
    stack = lambda key: torch.stack([torch.stack([key(v) for v in row]) for row in views])
    return stack(lambda v: (v.image * 255).round().byte()), stack(lambda v: v.depth), stack(lambda v: v.K), stack(lambda v: v.c2w)


def candidate_loss(probability, depth, near, far):
    """Cross-entropy (V, h, w) between the candidates' probability (V, D, h, w) and the two around the true depth (V, h, w)."""
    D = probability.shape[1]
    place = ((1 / depth.clamp_min(1e-3) - 1 / far) / (1 / near - 1 / far) * (D - 1)).clamp(0, D - 1.001)
    low = place.floor().long()[:, None]
    share = place[:, None] - low
    log = probability.clamp_min(1e-6).log()
    return -((1 - share) * log.gather(1, low) + share * log.gather(1, low + 1))[:, 0]


def matching_loss(net, images, depth, K, c2w, near, far):
    """Stage 1, the quarter-resolution half alone: the true depth should stand out in the raw cost volume where both views
    see it, and in the refined one everywhere."""
    D = net.config.num_depth_candidates
    with torch.autocast("cpu", torch.bfloat16):
        _, _, volume, probability = net.match(images, K, c2w, torch.linspace(1 / far, 1 / near, D).expand(2, D))
    low = F.interpolate(depth[:, None], scale_factor=0.25, mode="nearest")[:, 0]
    seen = torch.stack([splat.covisible(low, K / K.new_tensor([4, 4, 1])[:, None], c2w, v) for v in (0, 1)])
    raw = candidate_loss(volume.softmax(1), low, near, far)[seen].mean() if seen.any() else volume.sum() * 0
    return 0.3 * raw + candidate_loss(probability.float(), low, near, far).mean()


def gaussian_loss(net, images, depth, K, c2w, near, far, photometric):
    """Stage 2: log depth of the two contexts. Stage 3: mostly the third view, splatted once with the contexts' pixel colours
    (as features are lifted) and once with the network's own, where a context sees it."""
    with torch.autocast("cpu", torch.bfloat16):
        g = net(images[:2], K[:2], c2w[:2], near, far, harmonics=True)
    H, W = images.shape[-2:]
    loss = splat.log_depth_error(g, depth[:2], c2w[:2])
    if not photometric:
        return loss
    colours = torch.cat([images[:2].permute(0, 2, 3, 1).reshape(-1, 3), 0.5 + splat.SH_C0 * g.features], 1)  # degree 0: no direction
    render = splat.rasterize(g.means, g.covariances, g.opacities, colours, torch.linalg.inv(c2w[2]), K[2], H, W)
    seen, truth, loss = splat.covisible(depth, K, c2w), images[2], 0.1 * loss
    for image in render.features.permute(2, 0, 1).split(3):
        mse, structure = splat.photometric(image, truth, seen)
        loss = loss + 5 * mse + 0.1 * structure
    return loss


def train_mvsplat(scenes, steps, batch, lr, seed, aside):
    """Stage 1 for 40 of 75 parts of the steps, stage 2 for 13, stage 3 for 22. Saved in `aside` every 500 steps; a killed run goes
    on from there."""
    torch.manual_seed(seed)
    net = lift.MVSplat(lift.MVSplatConfig.tiny)
    images, depth, K, c2w = rooms_in_memory(scenes)
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 200, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / steps)))))
    parts, begin = {"net": net, "optimiser": optimiser, "schedule": schedule}, 0
    if aside.exists():
        saved = torch.load(aside, weights_only=True)
        begin = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(range(begin, steps), desc="mvsplat", initial=begin, total=steps, mininterval=5)
    for step in bar:
        generator = torch.Generator().manual_seed(10**6 * seed + step)
        stage = 1 + (step >= steps * 40 / 75) + (step >= steps * 53 / 75)
        optimiser.zero_grad(set_to_none=True)
        for _ in range(batch):
            s = int(torch.randint(len(scenes), (1,), generator=generator))
            pick = list(data.sample_triplet(scenes[s], generator))
            shrink, stretch = torch.rand(2, generator=generator).tolist()  # other depth ranges than the exact ones, too
            near, far = scenes[s].depth_range
            near, far = near * (0.7 + 0.3 * shrink), far * (1 + 0.5 * stretch)
            poses = c2w[s, pick].clone()
            poses[:, :3, 3] /= near  # the unit is the nearest depth, as in `mvsplat_gaussians`
            sample = images[s, pick].float() / 255, depth[s, pick] / near, K[s, pick], poses
            loss = (matching_loss(net, *(x[:2] for x in sample), 1.0, far / near) if stage == 1
                    else gaussian_loss(net, *sample, 1.0, far / near, stage == 3))
            (loss / batch).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if norm.isfinite():
            optimiser.step()
        schedule.step()
        bar.set_postfix(stage=stage, loss=f"{loss.item():.3f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            buffer = io.BytesIO()
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, buffer)
            lift.write_whole(aside, buffer.getvalue())
    return net.eval()


@torch.no_grad()
def compare_geometries(net, scenes):
    """-> {geometry: means over one triplet a scene}: depth AbsRel and share of pixels within 10 % (context views, all pixels);
    PSNR of the target where a context sees it, with the contexts' pixel colours (uncovered black), share covered, PSNR there."""
    rows = {"mvsplat": [], "sweep": [], "depth": []}
    for n, scene in enumerate(scenes):
        views = [scene.view(i) for i in data.sample_triplet(scene, torch.Generator().manual_seed(n))]
        images, depth, K, c2w = (torch.stack([getattr(v, key) for v in views]) for key in ("image", "depth", "K", "c2w"))
        context, size, truth = (images[:2], K[:2], c2w[:2], *scene.depth_range), depth.shape[1:], images[2].permute(1, 2, 0)
        seen = splat.covisible(depth, K, c2w)
        for name, g in (("mvsplat", lift.mvsplat_gaussians(net, *context)), ("sweep", lift.sweep_gaussians(*context)),
                        ("depth", lift.depth_gaussians(depth[:2], K[:2], c2w[:2]))):
            error = (lift.view_depth(g, c2w[:2], *size) - depth[:2]).abs() / depth[:2]
            colours = images[:2].permute(0, 2, 3, 1).reshape(-1, 3)
            render = splat.rasterize(g.means, g.covariances, g.opacities, colours, torch.linalg.inv(c2w[2]), K[2], *size)
            covered = render.alpha >= 0.5
            image = render.features / render.alpha.clamp_min(1e-6)[..., None] * covered[..., None]
            psnr = lambda where: -10 * (image - truth)[where].square().mean().log10().item()
            rows[name].append((error.mean().item(), 100 * (error < 0.1).float().mean().item(), psnr(seen),
                               100 * (covered & seen).sum().item() / seen.sum().item(), psnr(seen & covered)))
    return {name: [sum(column) / len(column) for column in zip(*values)] for name, values in rows.items()}


def make_mvsplat(args, train_scenes, val_scenes):
    out = ROOT / "tiny" / "mvsplat.safetensors"
    if not args.probe:
        net = train_mvsplat(train_scenes, args.steps or 7500, 2, 1e-3, args.seed, Path(args.scene_dir).parent / "mvsplat.ckpt")
        lift.save_tensors(out, {key: value.half() for key, value in net.state_dict().items()})
    print("| geometry | AbsRel | within 10 % | PSNR | covered % | PSNR where covered |\n|---|---|---|---|---|---|")
    for name, values in compare_geometries(lift.load_mvsplat(out), val_scenes).items():
        print("| {} | {:.3f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(name, *values))


# ------------------------------------------------------------------------------------------------ main


def make_vit(args, train_scenes, val_scenes):
    out = ROOT / "tiny" / "vit.safetensors"
    torch.manual_seed(args.seed)
    untrained = initialise(lift.VisionTransformer(**TINY)).eval()
    if not args.probe:
        vit = standardise(train_vit(train_scenes, args.steps or 8000, 32, 1e-3, args.seed).eval(), train_scenes)
        aside = Path(args.scene_dir).parent / "vit"
        lift.save_vit(vit, aside)
        lift.save_tensors(out, {key: value.half() for key, value in lift.load_file(aside / "model.safetensors").items()})
    print("| weights | depth RMSE m | AbsRel | normal RMSE deg | mIoU % | correspondence % |\n|---|---|---|---|---|---|")
    for name, vit in (("random", untrained), ("tiny", lift.load_vit(out))):
        print("| {} | {:.2f} | {:.3f} | {:.1f} | {:.1f} | {:.1f} |".format(name, *probe(vit, train_scenes[:120], val_scenes)))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the tiny ViT or the tiny MVSplat on the training rooms, and measure it.")
    parser.add_argument("what", choices=("vit", "mvsplat"))
    parser.add_argument("--scene_dir", default="out/tiny/rooms", help="where the rooms are, or are written")
    parser.add_argument("--rooms", type=int, default=400)
    parser.add_argument("--steps", type=int, help="default: 8000 for vit, 7500 for mvsplat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe", action="store_true", help="measure the existing weights instead of making new ones")
    args = parser.parse_args(argv)
    data.make_rooms(args.scene_dir, args.rooms)
    scenes = data.load_scenes(args.scene_dir)
    make = make_vit if args.what == "vit" else make_mvsplat
    make(args, data.split(scenes, "train"), data.split(scenes, "val"))


if __name__ == "__main__":
    main()
