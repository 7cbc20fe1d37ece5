"""From two images to 3D Gaussians that carry features: a ViT, two-view geometry, mask-aware upscaling.

Paper   Splat and Distill (SnD) Sec. 3.2 (Eq. 1, geometry) and 3.3 (Eq. 2-3, lifting), Fig. 11; DINOv2 for the ViT.
In      two posed context images; for `depth` also their measured depth; instance masks or superpixels.
Out     tokens (B, N, C), Gaussians (G = V*H*W, one a pixel), per-pixel features (H, W, C).
Run     python 02_lift.py                      held-out rooms: features and depth as pictures, Gaussians as .ply; 8 s on a CPU
        python 02_lift.py --scene_dir photos/  the same on your own scene
Copy    02_lift.py alone (the `tiny` weights are weights/tiny_vit.safetensors).
Not     MVSplat and the other public weight layouts: geometry here is plane-sweep stereo or measured depth.
Words   F_low tokens, F_high per-pixel features, w_uv upscaling weights, mu Sigma alpha the Gaussians' geometry.
"""
import argparse
import importlib
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = Path(__file__).parent / "weights"

# ------------------------------------------------------------------------------------------------ vision transformer


class Tokens(NamedTuple):
    cls: Tensor  # (B, C)
    registers: Tensor  # (B, R, C)
    patches: Tensor  # (B, N, C), N = h * w, row-major


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, N, C / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim, initial):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4, layer_scale=1.0):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads), LayerScale(dim, layer_scale)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, mlp_ratio * dim), LayerScale(dim, layer_scale)

    def forward(self, x):  # (B, N, C)
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, C)


class VisionTransformer(nn.Module):
    """DINOv2's ViT: pre-norm blocks with LayerScale, a class token, optional registers, learned positions.

    Module names are those of Meta's state dict. `grid` is the side of the square patch grid that the position embedding
    was trained for; other image sizes get it by bicubic interpolation, as Meta's code does it.
    """

    def __init__(self, patch=14, dim=384, depth=12, heads=6, registers=0, grid=37, mlp_ratio=4, layer_scale=1.0):
        super().__init__()
        self.patch, self.dim, self.heads, self.grid = patch, dim, heads, grid
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # for pretraining alone; part of every published layout
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, h, w):  # -> (1, 1 + h * w, C)
        if h == w == self.grid:
            return self.pos_embed
        cls, square = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = square.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        if self.register_tokens is None:  # Meta's two recipes; + 0.1 guards the floor in the output size
            factor = ((h + 0.1) / self.grid, (w + 0.1) / self.grid)
            square = F.interpolate(square, scale_factor=factor, mode="bicubic")
        else:
            square = F.interpolate(square, size=(h, w), mode="bicubic", antialias=True)
        return torch.cat([cls, square.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)

    def embed(self, images: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> (B, 1 + N, C), positions added, no registers
        B, _, H, W = images.shape
        assert H % self.patch == 0 and W % self.patch == 0, f"image {H}x{W} is no multiple of the patch size {self.patch}"
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = self.patch_embed((images - mean) / std)
        return torch.cat([self.cls_token.expand(B, -1, -1), x], 1) + self.positions(H // self.patch, W // self.patch)

    def forward(self, images: Tensor) -> Tokens:
        """images (B, 3, H, W) in [0, 1], sides multiples of the patch -> tokens after the final norm."""
        x, count = self.embed(images), 0
        if self.register_tokens is not None:
            count = self.register_tokens.shape[1]
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1:1 + count], x[:, 1 + count:])


HUGGING_FACE_NAMES = (  # our (Meta's) module names -> those of transformers' Dinov2Model
    (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm."))


def stored_names(key):  # our name -> the stored name, or the three of query, key and value that make up a qkv
    thirds = ("query", "key", "value") if ".attn.qkv." in key else ("",)
    names = [key.replace("attn.qkv", f"attention.attention.{third}") for third in thirds]
    for ours, theirs in HUGGING_FACE_NAMES:
        names = [re.sub(ours, theirs, name) for name in names]
    return names


def save_vit(model: VisionTransformer, folder):
    """Write `folder/{config.json, model.safetensors}` in the Hugging Face DINOv2 layout, each file whole or not at all."""
    state = {}
    for key, value in model.state_dict().items():
        names = stored_names(key)
        state.update({name: part.clone() for name, part in zip(names, value.chunk(len(names)))})
    registers = 0 if model.register_tokens is None else model.register_tokens.shape[1]
    kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if registers else ("dinov2", "Dinov2Model")
    config = dict(model_type=kind[0], architectures=[kind[1]], hidden_size=model.dim, num_hidden_layers=len(model.blocks),
                  num_attention_heads=model.heads, mlp_ratio=model.blocks[0].mlp.fc1.out_features // model.dim,
                  patch_size=model.patch, image_size=model.grid * model.patch, num_channels=3, hidden_act="gelu",
                  layer_norm_eps=1e-6, qkv_bias=True, use_swiglu_ffn=False, torch_dtype="float32")
    folder = Path(folder)
    save_tensors(folder / "model.safetensors", state)
    config = {**config, **({"num_register_tokens": registers} if registers else {})}
    write_whole(folder / "config.json", json.dumps(config, indent=1).encode())


def save_tensors(path, tensors, metadata=None):
    """A safetensors file from {name: tensor on any device}; metadata is {name: text}."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_whole(path, save(tensors, {"format": "pt", **(metadata or {})}))


def write_whole(path, content: bytes):
    """Written under a temporary name, flushed, and renamed: a killed run leaves the old file or the new, nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load_vit(name_or_path) -> VisionTransformer:
    """A ViT with its weights: `tiny` (built in), or a Hugging Face DINOv2 folder or file such as `save_vit` writes.

    Every size is read off the tensors, the number of heads off config.json (without it they are 64 wide, as in all
    published models). Raises ValueError, one line naming the file, when it is missing, damaged, or has a key too many or
    too few.
    """
    path = WEIGHTS / "tiny_vit.safetensors" if str(name_or_path) == "tiny" else Path(name_or_path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise ValueError(f"{path}: no such weights; give 'tiny', or a folder with model.safetensors")
    try:
        stored = {key: value.float() for key, value in load_file(path).items()}
        C, _, patch, _ = stored["embeddings.patch_embeddings.projection.weight"].shape
        registers = stored["embeddings.register_tokens"].shape[1] if "embeddings.register_tokens" in stored else 0
        grid = math.isqrt(stored["embeddings.position_embeddings"].shape[1] - 1)
        hidden = stored["encoder.layer.0.mlp.fc1.weight"].shape[0]
        config = path.with_name("config.json")
        heads = json.loads(config.read_text())["num_attention_heads"] if config.exists() else max(1, C // 64)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{config}: not JSON ({error}); copy it again") from None
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; it is not in the Hugging Face DINOv2 layout") from None
    depth = 1 + max(int(m[1]) for key in stored if (m := re.match(r"encoder\.layer\.(\d+)\.", key)))
    model = VisionTransformer(patch, C, depth, heads, registers, grid, hidden // C)
    state = {}
    for key, value in model.state_dict().items():
        parts = stored_names(key)
        missing = [part for part in parts if part not in stored]
        if missing:
            raise ValueError(f"{path}: lacks {missing[0]}")
        state[key] = torch.cat([stored.pop(part) for part in parts])
        if state[key].shape != value.shape:
            raise ValueError(f"{path}: {key} is {tuple(state[key].shape)}, but {tuple(value.shape)} was expected")
    if stored:
        raise ValueError(f"{path}: has a tensor that no part of the ViT takes: {next(iter(stored))}")
    model.load_state_dict(state)
    return model.eval()


# ------------------------------------------------------------------------------------------------ geometry (SnD Eq. 1)


class Gaussians(NamedTuple):
    means: Tensor  # (G, 3) world; G = V * H * W, row-major per view: the pixel-to-Gaussian correspondence of Sec. 3.2
    covariances: Tensor  # (G, 3, 3) world
    opacities: Tensor  # (G,) in [0, 1]
    features: Tensor | None = None  # (G, C)


def pixel_rays(K: Tensor, height, width) -> Tensor:  # (3, 3) -> (H, W, 3) camera frame, z = 1, through pixel centres
    y, x = torch.meshgrid(torch.arange(height, device=K.device) + 0.5, torch.arange(width, device=K.device) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1).to(K) @ torch.linalg.inv(K).T


def neighbour_step(points: Tensor, known: Tensor, dim) -> Tensor:
    """(H, W, 3), (H, W) -> (H, W, 3): the difference to the next pixel along `dim`, or to the last one if that is nearer
    in depth, so that edges of objects do not mix; 0 where neither is known."""
    count = points.shape[dim]
    both = known.narrow(dim, 1, count - 1) & known.narrow(dim, 0, count - 1)
    step = torch.where(both[..., None], points.diff(dim=dim), torch.nan)
    none = torch.full_like(points.narrow(dim, 0, 1), torch.nan)
    ahead, behind = torch.cat([step, none], dim), torch.cat([none, step], dim)
    take_behind = ahead[..., 2:].isnan() | (behind[..., 2:].abs() <= ahead[..., 2:].abs())
    return torch.where(take_behind, behind, ahead).nan_to_num()


def surface_normals(depth: Tensor, K: Tensor) -> Tensor:
    """Unit normals towards the camera, (H, W, 3) camera frame, from z-depth (H, W), 0 = unknown, and K (3, 3)."""
    rays = pixel_rays(K, *depth.shape)
    down, right = (neighbour_step(rays * depth[..., None], depth > 0, dim) for dim in (0, 1))
    normal = torch.linalg.cross(down, right, dim=-1)  # points towards the camera
    length = normal.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, normal / length.clamp_min(1e-12), -F.normalize(rays, dim=-1))


def pixel_gaussians(
    depth: Tensor,  # (V, H, W) z-depth, 0 = unknown
    K: Tensor,  # (V, 3, 3) pixels
    c2w: Tensor,  # (V, 4, 4)
    opacity: Tensor,  # (V, H, W)
    spread=0.35,  # standard deviation in pixels of its own view; 0.6 costs 2 dB of a novel view in blur, 0.3 opens holes
) -> Gaussians:
    """One flat Gaussian a pixel: centred on the surface, its covariance the pixel's footprint on the tangent plane.

    Pixels of unknown depth keep their place in the row (G = V*H*W) with opacity 0.
    """
    parts = []
    for z, k, pose, alpha in zip(depth, K, c2w, opacity):
        rays = pixel_rays(k, *z.shape)
        unit_ray = F.normalize(rays, dim=-1)
        normal = surface_normals(z, k)
        cosine = -(normal * unit_ray).sum(-1, keepdim=True)
        within = normal + cosine * unit_ray  # the normal's part across the ray
        steepest = cosine.clamp(0.25, 1.0)  # beyond 75 degrees of slant a footprint says nothing of the surface
        normal = F.normalize(within, dim=-1) * (1 - steepest**2).clamp_min(0).sqrt() - steepest * unit_ray
        z = torch.where(z > 0, z, 1.0)[..., None]
        across = torch.linalg.inv(k)[:, :2].T  # (2, 3) d ray / d pixel
        slope = torch.einsum("hwc,ac->hwa", normal, across) / (normal * rays).sum(-1, keepdim=True)
        tangent = z[..., None] * (across - slope[..., None] * rays[..., None, :])  # (H, W, 2, 3) d point / d pixel
        thin = 0.1 * z / k[0, 0] * normal  # a tenth of a pixel thick
        axes = torch.cat([spread * tangent, thin[..., None, :]], -2) @ pose[:3, :3].T  # (H, W, 3 axes, 3) world
        means = (rays * z) @ pose[:3, :3].T + pose[:3, 3]
        parts.append((means.flatten(0, 1), (axes.transpose(-1, -2) @ axes).flatten(0, 1), alpha.flatten()))
    return Gaussians(*(torch.cat(column) for column in zip(*parts)))


def depth_gaussians(depth: Tensor, K: Tensor, c2w: Tensor, opacity=0.95) -> Gaussians:
    """Gaussians from measured depth (V, H, W), 0 = not measured: the upper bound of any two-view geometry."""
    return pixel_gaussians(depth, K, c2w, opacity * (depth > 0).to(depth))


def box_mean(x: Tensor, side) -> Tensor:
    """(..., H, W) -> its mean over side x side windows, cut off at the border: two products with banded matrices."""
    def band(n):
        at = torch.arange(n, device=x.device)
        inside = ((at[:, None] - at).abs() <= side // 2).to(x)
        return inside / inside.sum(1, keepdim=True)
    return band(x.shape[-2]) @ (x @ band(x.shape[-1]).T)


def plane_sweep(
    reference: Tensor,  # (3, H, W)
    other: Tensor,  # (3, H, W)
    K_ref: Tensor,  # (3, 3) pixels
    K_other: Tensor,  # (3, 3) pixels
    ref_to_other: Tensor,  # (4, 4) camera to camera
    inverse_depths: Tensor,  # (D,) the candidates
    window=5,
) -> Tensor:
    """How badly each depth explains the second view: (D, H, W), 0 is perfect.

    The plane z = 1/d in front of the reference maps its pixels to K' (R K^-1 p + t d) in the other view: a homography
    for each candidate d. Windows are compared by normalised cross-correlation, which ignores exposure, plus the
    difference of their mean colours, without which a plain red wall would match a plain blue one.
    """
    _, height, width = reference.shape
    rays = pixel_rays(K_ref, height, width)
    at_infinity = rays @ ref_to_other[:3, :3].T @ K_other.T  # (H, W, 3)
    per_inverse = ref_to_other[:3, 3] @ K_other.T  # (3,)
    mean_r, square_r = box_mean(reference, window), box_mean(reference**2, window)
    variance_r = (square_r - mean_r**2).clamp_min(0).sum(0)
    costs = []
    for block in inverse_depths.split(max(1, 2**20 // (height * width))):  # bounds the memory at any image size
        pixel = at_infinity + block[:, None, None, None] * per_inverse  # (D, H, W, 3)
        front = pixel[..., 2] > 1e-6
        xy = pixel[..., :2] / torch.where(front, pixel[..., 2], 1.0)[..., None]
        grid = 2 * xy / xy.new_tensor([width, height]) - 1
        seen = front & (grid.abs() < 1).all(-1)
        warped = F.grid_sample(other.expand(len(block), -1, -1, -1), grid, align_corners=False, padding_mode="border")
        mean_w, square_w, cross = (box_mean(x, window) for x in (warped, warped**2, warped * reference))  # (D, 3, H, W)
        variance_w = (square_w - mean_w**2).clamp_min(0).sum(1)
        correlation = (cross - mean_r * mean_w).sum(1) / (variance_r * variance_w + 1e-6).sqrt()
        cost = 1 - correlation + 2 * (mean_w - mean_r).abs().mean(1)
        costs.append(torch.where(seen, cost, 2.0))  # outside the other view: as bad as no correlation and a wrong colour
    return torch.cat(costs)


def semi_global(cost: Tensor, small=0.15, large=1.2) -> Tensor:
    """(D, H, W) matching cost -> the same, smoothed along rows and columns (semi-global matching, Hirschmueller 2008).

    Going along a line, a pixel may take its neighbour's depth for nothing, the next candidate for `small`, any other
    for `large`: plain and repetitive walls then follow the textured surface that they belong to. Mean of four directions.
    """
    total = torch.zeros_like(cost)
    for line in (1, 2):
        both = torch.stack([cost, cost.flip(line)]).movedim(line + 1, 0)  # (L, 2, D, M): forwards and backwards at once
        path = [both[0]]
        for here in both[1:]:
            before, least = path[-1], path[-1].amin(1, keepdim=True)
            best = torch.minimum(before, least + large)
            best[:, 1:] = torch.minimum(best[:, 1:], before[:, :-1] + small)
            best[:, :-1] = torch.minimum(best[:, :-1], before[:, 1:] + small)
            path.append(here + best - least)
        ahead, back = torch.stack(path).movedim(0, line + 1)
        total += ahead + back.flip(line)
    return total / 4


def best_depth(cost: Tensor, inverse_depths: Tensor) -> Tensor:  # (D, H, W), (D,) -> z-depth (H, W), refined by a parabola
    best = cost.argmin(0).clamp(1, len(cost) - 2)[None]
    before, at, after = (cost.gather(0, best + step)[0] for step in (-1, 0, 1))
    offset = (0.5 * (before - after) / (before - 2 * at + after).clamp_min(1e-6)).clamp(-0.5, 0.5)
    step = inverse_depths[1] - inverse_depths[0]
    return 1 / (inverse_depths[best[0]] + offset * step)


def cross_check(
    depth: Tensor,  # (H, W) z-depth
    other_depth: Tensor,  # (H, W) z-depth of the other view
    K_ref: Tensor,  # (3, 3) pixels
    K_other: Tensor,  # (3, 3) pixels
    ref_to_other: Tensor,  # (4, 4) camera to camera
    tolerance=0.06,
) -> Tensor:
    """(H, W) in [0, 1]: does the other view's depth, where a pixel lands in it, say the same? 0 outside the picture."""
    height, width = depth.shape
    points = (pixel_rays(K_ref, height, width) * depth[..., None]) @ ref_to_other[:3, :3].T + ref_to_other[:3, 3]
    pixel = points @ K_other.T
    grid = 2 * pixel[..., :2] / pixel[..., 2:].clamp_min(1e-6) / pixel.new_tensor([width, height]) - 1
    theirs = F.grid_sample(other_depth[None, None], grid[None], mode="nearest", align_corners=False)[0, 0]
    error = (theirs - points[..., 2]).abs() / points[..., 2].clamp_min(1e-6)
    return torch.exp(-((error / tolerance) ** 2)) * ((points[..., 2] > 0) & (theirs > 0))


@torch.no_grad()
def sweep_depth(images: Tensor, K: Tensor, c2w: Tensor, near: float, far: float, candidates=64):
    """Plane-sweep stereo between two views -> z-depth and confidence, both (2, H, W); arguments as in `sweep_gaussians`."""
    assert len(images) == 2, f"the sweep compares two views, not {len(images)}"
    inverse_depths = torch.linspace(1 / far, 1 / near, candidates).to(images)  # uniform in disparity
    to_other = [torch.linalg.inv(c2w[1 - v]) @ c2w[v] for v in (0, 1)]
    costs = (plane_sweep(images[v], images[1 - v], K[v], K[1 - v], to_other[v], inverse_depths) for v in (0, 1))
    depth = torch.stack([best_depth(semi_global(cost), inverse_depths) for cost in costs])
    return depth, torch.stack([cross_check(depth[v], depth[1 - v], K[v], K[1 - v], to_other[v]) for v in (0, 1)])


def sweep_gaussians(
    images: Tensor,  # (2, 3, H, W) in [0, 1]
    K: Tensor,  # (2, 3, 3) pixels
    c2w: Tensor,  # (2, 4, 4)
    near: float,  # in the scene's unit
    far: float,
    candidates=64,
) -> Gaussians:
    """Two-view geometry by hand, no weights: what a cost volume knows before anything is learned (MVSplat Sec. 3.1).

    Differs: SnD uses MVSplat here, with near and far fixed at 1 and 100; these bounds come from the scene.
    Opacity is the confidence: how well the depth found from the other view agrees. Pixels that only one view sees get 0.
    """
    depth, confidence = sweep_depth(images, K, c2w, near, far, candidates)
    return pixel_gaussians(depth, K, c2w, 0.95 * confidence)


# ------------------------------------------------------------------------------------------------ lifting (SnD Eq. 2-3)


def upscale_weights(mask: Tensor, grid, drop_unmatched=False):
    """Mask-aware bilinear upscaling in sparse form: index (H*W, 4) into the h*w tokens and weight (H*W, 4), row-major.

    mask (H, W) int64, where 0 is an id like any other; grid (h, w). A token sits at the centre of its patch and has
    the label of the pixel that holds that centre. Weights sum to 1 (SnD Eq. 3). Where no neighbour shares the pixel's
    label, Eq. 3 is 0/0: plain bilinear weights are kept then, or all four are 0 with `drop_unmatched`.
    """
    (H, W), (h, w), device = mask.shape, grid, mask.device
    centre_row = ((torch.arange(h, device=device, dtype=torch.float64) + 0.5) * H / h).long()
    centre_col = ((torch.arange(w, device=device, dtype=torch.float64) + 0.5) * W / w).long()
    token_label = mask[centre_row[:, None], centre_col]  # Differs: the official code reads labels at linspace(0, H-1, h)
    y = ((torch.arange(H, device=device, dtype=torch.float64) + 0.5) * h / H - 0.5).clamp(0, h - 1)
    x = ((torch.arange(W, device=device, dtype=torch.float64) + 0.5) * w / W - 0.5).clamp(0, w - 1)
    rows = torch.stack([y.floor(), (y.floor() + 1).clamp_max(h - 1)], -1).long()  # (H, 2)
    cols = torch.stack([x.floor(), (x.floor() + 1).clamp_max(w - 1)], -1).long()
    row_weight, col_weight = (torch.stack([1 - (c - c.floor()), c - c.floor()], -1) for c in (y, x))
    index = (rows[:, None, :, None] * w + cols[None, :, None, :]).reshape(H * W, 4)
    bilinear = (row_weight[:, None, :, None] * col_weight[None, :, None, :]).reshape(H * W, 4)  # w~_uv of SnD Eq. 3
    same = token_label.flatten()[index] == mask.reshape(H * W, 1)
    weight = bilinear * same
    total = weight.sum(1, keepdim=True)
    # Differs: with no neighbour of its label a pixel gets a zero feature in the official code, and is lifted all the same.
    fallback = torch.zeros_like(bilinear) if drop_unmatched else bilinear
    weight = torch.where(total > 1e-9, weight / total.clamp_min(1e-9), fallback)  # SnD Eq. 3
    return index, weight.float()


def mask_aware_upscale(tokens: Tensor, mask: Tensor, grid) -> Tensor:
    """tokens (N, C), mask (H, W) int64, grid (h, w) -> (H, W, C) features that do not cross mask borders (SnD Eq. 2)."""
    assert len(tokens) == grid[0] * grid[1], f"{len(tokens)} tokens do not fill a grid of {grid[0]}x{grid[1]}"
    index, weight = upscale_weights(mask, grid)
    return sum(weight[:, k, None].to(tokens) * tokens[index[:, k]] for k in range(4)).view(*mask.shape, -1)  # SnD Eq. 2


def bilinear_upscale(tokens: Tensor, mask: Tensor, grid) -> Tensor:
    """The same without masks (SnD Table 5 B)."""
    return mask_aware_upscale(tokens, torch.zeros_like(mask), grid)


# ------------------------------------------------------------------------------------------------ pictures


def pca_basis(features: Tensor):
    """features (M, C) -> (mean, axes (C, 3), low, high): the three directions that vary most, as red, green, blue."""
    mean = features.mean(0)
    axes = torch.linalg.svd((features - mean).double(), full_matrices=False)[2][:3].T.to(features)
    axes = axes * torch.sign(axes.sum(0) + 1e-12)  # the sign of an SVD is arbitrary; pictures should not be
    low, high = ((features - mean) @ axes).quantile(torch.tensor([0.02, 0.98]).to(features), dim=0)
    return mean, axes, low, high


def pca_colours(features: Tensor, basis) -> Tensor:  # (H, W, C) -> (3, H, W) in [0, 1]
    mean, axes, low, high = basis
    return (((features - mean) @ axes - low) / (high - low).clamp_min(1e-9)).clamp(0, 1).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------ main


@torch.no_grad()
def lifted_pair(scene, pair, vit, pixels, device):
    """One row of the picture, the Gaussians with colours (G, 3), and the median relative errors of depth (or None)."""
    data = importlib.import_module("01_data")
    views = [scene.view(i, data.fit_size(scene, pixels, vit.patch)) for i in pair]
    images, K, c2w = (torch.stack([getattr(v, key) for v in views]).to(device) for key in ("image", "K", "c2w"))
    grid = tuple(side // vit.patch for side in images.shape[-2:])
    tokens, mask = vit(images).patches[0], data.regions(views[0]).to(device)
    basis = pca_basis(tokens)
    nearest = F.interpolate(tokens.T.view(1, -1, *grid), images.shape[-2:])[0].permute(1, 2, 0)
    upscaled = [nearest, bilinear_upscale(tokens, mask, grid), mask_aware_upscale(tokens, mask, grid)]
    depth, confidence = sweep_depth(images, K, c2w, *scene.depth_range)
    swept, sure, measured = depth[0].cpu(), (confidence[0] > 0.5).cpu(), views[0].depth
    row = [views[0].image, data.colour_ids(mask.cpu()), *(pca_colours(f, basis) for f in upscaled),
           data.colour_depth(swept * sure, measured), None if measured is None else data.colour_depth(measured)]
    errors, known = None, sure if measured is None else sure & (measured > 0)
    if measured is not None and known.any():
        off = lambda guess: ((guess - measured).abs() / measured)[known].median().item()
        errors = off(swept), off(measured[known].median())
    return row, (pixel_gaussians(depth, K, c2w, 0.95 * confidence), images.permute(0, 2, 3, 1).reshape(-1, 3)), errors


def main(argv=None):
    parser = argparse.ArgumentParser(description="Lift features to 3D: upscaling and geometry of held-out pairs, as pictures.")
    parser.add_argument("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    parser.add_argument("--model", default="tiny", help="ViT weights: 'tiny' or a Hugging Face DINOv2 folder")
    parser.add_argument("--pixels", type=int, default=96 * 128, help="pixels a view; raise it for larger models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out pairs")
    parser.add_argument("--out", default="out/02_lift")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    args = parser.parse_args(argv)
    data, splat = importlib.import_module("01_data"), importlib.import_module("03_splat")
    try:
        vit = load_vit(args.model).to(args.device)
        scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
        scenes, rows, errors, files = (data.split(scenes, "val") or scenes)[:4], [], [], []
        for n in range(4):
            scene = scenes[n % len(scenes)]
            a, b, _ = data.sample_triplet(scene, torch.Generator().manual_seed(args.seed + n))
            row, (gaussians, colours), error = lifted_pair(scene, (a, b), vit, args.pixels, args.device)
            files.append(Path(args.out) / f"{scene.name.replace('/', '_')}_{a}_{b}.ply")
            splat.save_ply(files[-1], gaussians, colours)
            rows, errors = rows + [row], errors + ([error] if error else [])
        headings = ["context view", "mask", "nearest (PCA)", "bilinear", "mask-aware", "swept depth (sure)", "measured depth"]
        path = data.picture_grid(Path(args.out) / "lift.png", headings, rows)
        mean = lambda which: 100 * sum(error[which] for error in errors) / len(errors)
        answer = f"median error {mean(0):.1f} % (one plane {mean(1):.1f} %)" if errors else "no measured depth to compare with"
        print(f"swept depth, where sure: {answer}  ->  {path}, {', '.join(map(str, files))}")
    except (data.DataError, ValueError) as error:
        raise SystemExit(str(error))


if __name__ == "__main__":
    main()
