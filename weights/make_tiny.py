"""The recipe of weights/tiny_vit.safetensors: a small ViT pretrained by 2D self-supervision alone, the stand-in for DINOv2.

Paper   He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners": 75 % of the patches hidden, their normalised
        pixels predicted from the rest.
In      the training rooms (split "train" of --rooms built-in rooms, written to --scene_dir). Validation rooms are not seen.
Out     weights/tiny_vit.safetensors (Hugging Face DINOv2 layout, fp16), and the probe table of weights/README.md.
Run     python weights/make_tiny.py            makes the weights
        python weights/make_tiny.py --probe    only measures the weights that are here: 2 minutes
Not     3D: no pose, depth, mask or label is used to train; the probes alone read them.
"""
import argparse
import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
data, lift = importlib.import_module("01_data"), importlib.import_module("02_lift")

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


def train(scenes, steps, batch, lr, seed):
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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Pretrain the tiny ViT on the training rooms, and probe it.")
    parser.add_argument("--scene_dir", default="out/make_tiny/rooms", help="where the rooms are, or are written")
    parser.add_argument("--rooms", type=int, default=400)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "weights" / "tiny_vit.safetensors"))
    parser.add_argument("--probe", action="store_true", help="measure the existing weights instead of making new ones")
    args = parser.parse_args(argv)
    data.make_rooms(args.scene_dir, args.rooms)
    scenes = data.load_scenes(args.scene_dir)
    train_scenes, val_scenes = data.split(scenes, "train"), data.split(scenes, "val")
    torch.manual_seed(args.seed)
    untrained = initialise(lift.VisionTransformer(**TINY)).eval()
    if not args.probe:
        vit = standardise(train(train_scenes, args.steps, args.batch, args.lr, args.seed).eval(), train_scenes)
        aside = Path(args.scene_dir).parent / "tiny_vit"
        lift.save_vit(vit, aside)
        half = {k: v.half() for k, v in lift.load_file(aside / "model.safetensors").items()}
        lift.save_tensors(args.out, half)
    print("| weights | depth RMSE m | AbsRel | normal RMSE deg | mIoU % | correspondence % |\n|---|---|---|---|---|---|")
    for name, vit in (("random", untrained), ("tiny_vit", lift.load_vit(args.out))):
        print("| {} | {:.2f} | {:.3f} | {:.1f} | {:.1f} | {:.1f} |".format(name, *probe(vit, train_scenes[:120], val_scenes)))


if __name__ == "__main__":
    main()
