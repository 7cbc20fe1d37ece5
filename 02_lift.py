"""From two images to 3D Gaussians that carry features: a ViT, two-view geometry, mask-aware upscaling.

Paper   Splat and Distill (SnD) Sec. 3.2 (Eq. 1, geometry) and 3.3 (Eq. 2-3, lifting), Fig. 11; DINOv2 and DUNE for the
        ViT; MVSplat (Chen et al. 2024) for learned geometry.
In      two posed context images; for `depth` also their measured depth; instance masks or superpixels.
Out     tokens (B, N, C), Gaussians (G = V*H*W, one a pixel), per-pixel features (H, W, C).
Run     python 02_lift.py                      held-out rooms: depth and features as pictures, Gaussians as .ply; 5 s on a CPU
        python 02_lift.py --scene_dir photos/ --model dinov2_vits14 --mvsplat re10k.ckpt      your scene, published weights
Copy    02_lift.py alone (the `tiny` weights are tiny/*.safetensors).
Not     training of MVSplat: tiny/train.py trains the tiny one.
Words   F_low tokens, F_high per-pixel features, w_uv upscaling weights, mu Sigma alpha the Gaussians' geometry; V views,
        C channels, D depth candidates.
"""
import argparse
import importlib
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS = Path(__file__).parent / "tiny"

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


class SwiGLU(nn.Module):  # in place of the Mlp in ViT-g
    def __init__(self, dim, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim, initial):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4, layer_scale=1.0, swiglu=False):
        super().__init__()
        hidden = mlp_ratio * dim
        mlp = SwiGLU(dim, (int(hidden * 2 / 3) + 7) // 8 * 8) if swiglu else Mlp(dim, hidden)
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads), LayerScale(dim, layer_scale)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), mlp, LayerScale(dim, layer_scale)

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

    Module names are those of Meta's state dict. `grid` is the side of the square patch grid that the position embedding was trained
    for. Other image sizes get it by bicubic interpolation, and `positions` says how:
    "scale" by the factor (h + 0.1) / grid (Meta without registers, DUNE), "size" to h x w (transformers >= 4.45 without registers),
    "antialiased" to h x w with antialiasing (timm; Meta and transformers with registers). With random weights "size" differs from
    "scale" by 6.5 % (rel. RMS of the tokens, ViT-S at 224x224) or 9.6 % (126x182), "antialiased" by 21 % or 22 %; trained positions,
    which are smoother, differ less.
    """

    def __init__(self, patch=14, dim=384, depth=12, heads=6, registers=0, grid=37, mlp_ratio=4, layer_scale=1.0,
                 swiglu=False, positions=None):
        super().__init__()
        self.patch, self.dim, self.heads, self.grid, self.mlp_ratio, self.swiglu = patch, dim, heads, grid, mlp_ratio, swiglu
        self.positions = positions or ("antialiased" if registers else "scale")  # Meta's
        assert self.positions in ("scale", "size", "antialiased"), f"positions cannot be interpolated by {self.positions!r}"
        self.checkpointing = False  # True: a backward pass computes each block again, which saves most of its memory
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # for pretraining alone; part of every published layout
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio, layer_scale, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def position_embedding(self, h, w):  # -> (1, 1 + h * w, C)
        if h == w == self.grid:
            return self.pos_embed
        cls, square = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = square.view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        if self.positions == "scale":  # + 0.1 guards the floor in the output size
            factor = ((h + 0.1) / self.grid, (w + 0.1) / self.grid)
            square = F.interpolate(square, scale_factor=factor, mode="bicubic")
        else:
            square = F.interpolate(square, size=(h, w), mode="bicubic", antialias=self.positions == "antialiased")
        return torch.cat([cls, square.permute(0, 2, 3, 1).reshape(1, h * w, -1)], 1)

    def embed(self, images: Tensor) -> Tensor:  # (B, 3, H, W) in [0, 1] -> (B, 1 + N, C), positions added, no registers
        B, _, H, W = images.shape
        assert H % self.patch == 0 and W % self.patch == 0, f"image {H}x{W} is no multiple of the patch size {self.patch}"
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = self.patch_embed((images - mean) / std)
        return torch.cat([self.cls_token.expand(B, -1, -1), x], 1) + self.position_embedding(H // self.patch, W // self.patch)

    def forward(self, images: Tensor) -> Tokens:
        """images (B, 3, H, W) in [0, 1], sides multiples of the patch -> tokens after the final norm."""
        x, count = self.embed(images), 0
        if self.register_tokens is not None:
            count = self.register_tokens.shape[1]
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(x)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, 1:1 + count], x[:, 1 + count:])


# How the layouts name what we name as Meta does.
META, TIMM = (), ((r"^register_tokens", "reg_token"), (r"\.w12\.", ".fc1."), (r"\.w3\.", ".fc2."))
HUGGING_FACE = (
    (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"), (r"^norm\.", "layernorm."),
    (r"\.w12\.", ".weights_in."), (r"\.w3\.", ".weights_out."))


def stored_names(key, layout):  # our name -> the layout's, or the three of query, key and value that make up a qkv
    split = layout is HUGGING_FACE and ".attn.qkv." in key
    names = [key.replace("attn.qkv", f"attention.attention.{third}") for third in ("query", "key", "value")] if split else [key]
    for ours, theirs in layout:
        names = [re.sub(ours, theirs, name) for name in names]
    return names


def save_vit(model: VisionTransformer, folder):
    """Write `folder/{config.json, model.safetensors}` in the Hugging Face DINOv2 layout, each file whole or not at all.

    transformers opens it as Dinov2Model or Dinov2WithRegistersModel, and away from the trained image size interpolates positions in
    its own way (see VisionTransformer); `load_vit` keeps to the model's, which stands in config.json.
    """
    state = {}
    for key, value in model.state_dict().items():
        names = stored_names(key, HUGGING_FACE)
        state.update({name: part.clone() for name, part in zip(names, value.chunk(len(names)))})
    registers = 0 if model.register_tokens is None else model.register_tokens.shape[1]
    kind = ("dinov2_with_registers", "Dinov2WithRegistersModel") if registers else ("dinov2", "Dinov2Model")
    config = dict(model_type=kind[0], architectures=[kind[1]], hidden_size=model.dim, num_hidden_layers=len(model.blocks),
                  num_attention_heads=model.heads, mlp_ratio=model.mlp_ratio, patch_size=model.patch,
                  image_size=model.grid * model.patch, num_channels=3, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True,
                  use_swiglu_ffn=model.swiglu, positions=model.positions, torch_dtype="float32")
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
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # still there where the disk was full


# Names of published weights and their official addresses. None of these projects publishes a checksum.
PUBLISHED = (
    (r"dinov2_vit[sblg]14", r"https://dl.fbaipublicfiles.com/dinov2/\g<0>/\g<0>_pretrain.pth"),
    (r"(dinov2_vit[sblg]14)_reg", r"https://dl.fbaipublicfiles.com/dinov2/\1/\1_reg4_pretrain.pth"),
    (r"dune_vit((small|base)14_(336|448)|base14_448_paper)", r"https://download.europe.naverlabs.com/dune/\g<0>.pth"),
    (r"dinov2_(small|base)_snd", r"https://huggingface.co/david-shavin/SnD/resolve/main/\g<0>.pth"),
    (r"facebook/dinov2(-with-registers)?-(small|base|large|giant)|timm/vit_(small|base|large|giant)_patch14(_reg4)?_dinov2\.lvd142m",
     r"https://huggingface.co/\g<0>/resolve/main/model.safetensors"))


def find_weights(name: str) -> Path:
    """The file of a path, of `tiny`, or of a published name: that is fetched once, into torch.hub's cache."""
    path = WEIGHTS / "vit.safetensors" if name == "tiny" else Path(name)
    path = path / "model.safetensors" if path.is_dir() else path
    address = next((found.expand(url) for pattern, url in PUBLISHED if (found := re.fullmatch(pattern, name))), None)
    if address and not path.exists():
        file = address.rsplit("/", 1)[1].replace("model.", name.replace("/", "_") + ".")  # the .pth files as torch.hub calls them
        path = Path(torch.hub.get_dir(), "checkpoints", file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(address, str(path))
        except (OSError, HTTPException) as error:
            raise ValueError(f"{name}: cannot be fetched ({error}); put {address} at {path}, or use the built-in weights with "
                             "--preset tiny (02 and 03: --model tiny)") from None
    if not path.exists():
        raise ValueError(f"{path}: no such weights; give 'tiny', a .pth or .safetensors file, a folder with model.safetensors, or a name "
                         "like dinov2_vits14_reg, dune_vitsmall14_448, dinov2_small_snd, facebook/dinov2-small, "
                         "timm/vit_small_patch14_dinov2.lvd142m")
    return path


# What training frameworks leave in a checkpoint beside its tensors, e.g. Lightning's OneCycleLR a `getattr`.
HARMLESS = (r"(argparse|collections|functools|lightning|lightning_fabric|numpy|omegaconf|pathlib|pytorch_lightning|torch\.optim|typing)\..+"
            r"|builtins\.(bool|dict|float|getattr|int|list|str|tuple)")


class Inert:  # in place of a foreign class or function: takes anything, keeps nothing, does nothing
    __new__ = lambda cls, *args: object.__new__(cls)
    __setstate__ = lambda self, state: None


class InertDict:  # in place of a defaultdict and the like, which are filled after they are made
    __new__ = lambda cls, *args: {}


def read_checkpoint(path, inert=()) -> dict:
    """What a .safetensors or torch file (.pth, .pt, .ckpt, .bin) holds, on the CPU. No code that the file names is ever run.

    Objects of training frameworks (`HARMLESS`) come back as empty `Inert` ones; their modules are not imported. Raises ValueError,
    one line naming the file, when it is damaged or names any other class or function. `inert` is for the recursion.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(InertDict if name.lower().endswith("dict") else Inert, name) for name in inert]):
            load = lambda mmap: torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if zipfile.is_zipfile(path):
                load(mmap=True)  # reads no tensors yet: a file of 8 GB with twenty foreign classes is read once, not twenty times
            found = load(mmap=False)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    except Exception as error:  # a damaged pickle can raise anything
        unknown = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if not unknown:
            reason = re.split(r"\. |\n", f"{type(error).__name__}: {error}")[0]
            raise ValueError(f"{path}: cannot be read as a checkpoint ({reason}); copy it again") from None
        name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
        if name in inert or not re.fullmatch(HARMLESS, name):
            raise ValueError(f"{path}: refused, for it names {name}, which tensors do not need (nothing of it was run); if it is your own "
                             "file, save its state_dict() alone") from None
        return read_checkpoint(path, (*inert, name))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    return found


WRAPPERS = r"^((module|_orig_mod|teacher|backbone|encoder(?!\.layer))\.)+"  # prefixes: DDP, torch.compile, Meta's training code, DUNE
BESIDE = r"(student|(dino|ibot)_head|(dino|ibot_patch)_loss|projectors|teacher_norms)\."  # parts of training, left out knowingly


def backbone_tensors(path):  # -> the ViT's tensors without wrappers, and whether their blocks came in chunks (blocks.0.{i})
    state, stored, chunked = read_checkpoint(path), {}, False
    for wrapper in ("model", "state_dict", "teacher"):
        state = state[wrapper] if isinstance(state.get(wrapper), dict) else state
    for full_name, value in state.items():
        name, chunks = re.subn(r"^blocks\.\d+\.(?=\d)", "blocks.", re.sub(WRAPPERS, "", str(full_name)))
        if not re.match(BESIDE, name):
            if name in stored or not isinstance(value, Tensor):
                raise ValueError(f"{path}: {full_name} is {'there twice' if name in stored else 'not a tensor'}")
            stored[name], chunked = value, chunked or bool(chunks)
    return stored, chunked


def load_strictly(model, stored, path, names=lambda key: [key]):
    """`model` with the tensors of `stored`, in evaluation mode; ValueError names one that is missing, left over or misshapen.

    names(our key) lists the stored tensors that, one after the other, make it up."""
    for key, value in model.state_dict().items():  # Differs: strict=False in SnD's README, which hides errors
        for name, part in zip(names(key), value.chunk(len(names(key)))):
            found = tuple(stored[name].shape) if name in stored else "missing"
            if found != part.shape:
                raise ValueError(f"{path}: {name} is {found}, but {tuple(part.shape)} was expected")
            part.copy_(stored.pop(name))
    if stored:
        raise ValueError(f"{path}: has a tensor that no part of the {type(model).__name__} takes: {next(iter(stored))}")
    return model.eval()


def load_vit(name_or_path) -> VisionTransformer:
    """A DINOv2 (ViT-S/B/L/g, with or without registers) or DUNE ViT with its weights, in fp32 and evaluation mode.

    From `tiny` (built in), a published name (`PUBLISHED`), or a file in the layout of Meta, timm, DUNE or transformers, or a folder of
    the latter such as `save_vit` writes. The names inside tell the layout, the tensors every size, config.json the heads (without
    it they are 64 wide, as in all published models). Positions are interpolated as the layout's own code does: see VisionTransformer.
    Raises ValueError, one line naming the file, when it is missing, damaged, or has a key too many, too few or of a wrong shape.
    """
    path = find_weights(str(name_or_path))
    stored, chunked = backbone_tensors(path)
    layout = META if {"mask_token", "register_tokens"} & stored.keys() else TIMM
    layout = HUGGING_FACE if any(name.startswith("embeddings.") for name in stored) else layout
    names = lambda key: stored_names(key, layout)
    shape = lambda key: stored[names(key)[0]].shape
    beside, w12, w3 = path.with_name("config.json"), "blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"
    try:
        C, patch = shape("cls_token")[-1], shape("patch_embed.proj.weight")[-1]
        registers = shape("register_tokens")[1] if names("register_tokens")[0] in stored else 0
        if layout is TIMM and registers:
            stored["pos_embed"] = F.pad(stored["pos_embed"], (0, 0, 1, 0))  # its cls_token has the position already
        grid = math.isqrt(shape("pos_embed")[1] - 1)
        depth = len({number[2] for name in stored if (number := re.match(r"(blocks|encoder\.layer)\.(\d+)\.", name))})
        swiglu = names(w12)[0] in stored and shape(w12)[0] == 2 * shape(w3)[1]
        ratio = 4 if swiglu else shape("blocks.0.mlp.fc1.weight")[0] // C
        config = json.loads(beside.read_text()) if layout is HUGGING_FACE and beside.exists() else {"num_attention_heads": max(1, C // 64)}
        heads, positions = config["num_attention_heads"], config.get("positions")
    except json.JSONDecodeError as error:
        raise ValueError(f"{beside}: not JSON ({error}); copy it again") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not in any layout of DINOv2 or DUNE ({type(error).__name__}: {error})") from None
    stored.setdefault(names("mask_token")[0], torch.zeros(1, C))  # takes no part in a forward pass; timm has none
    meta = chunked or path.name == "vit.safetensors"  # DUNE interpolates as Meta does without registers; `tiny` has no config.json
    # Differs: SnD trained with Meta's positions and opens its weights in timm, which has others.
    own = "scale" if meta else "antialiased" if registers or layout is TIMM else "size" if layout is HUGGING_FACE else "scale"
    model = VisionTransformer(patch, C, depth, heads, registers, grid, ratio, swiglu=swiglu, positions=positions or own)
    return load_strictly(model, stored, path, names)


# ------------------------------------------------------------------------------------------------ geometry by hand (SnD Eq. 1)


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


def view_depth(gaussians: Gaussians, c2w: Tensor, height, width) -> Tensor:
    """The z-depth (V, H, W) of one-a-pixel Gaussians in their own views."""
    means = gaussians.means.view(len(c2w), -1, 3)
    return ((means - c2w[:, None, :3, 3]) * c2w[:, None, :3, 2]).sum(-1).view(-1, height, width)


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

    Opacity is the confidence: how well the depth found from the other view agrees. Pixels that only one view sees get 0.
    """
    # Differs: SnD's geometry is MVSplat, below.
    depth, confidence = sweep_depth(images, K, c2w, near, far, candidates)
    return pixel_gaussians(depth, K, c2w, 0.95 * confidence)


# ------------------------------------------------------------------------------------------------ geometry learned: MVSplat (SnD Eq. 1)
#
# Chen et al. 2024, "MVSplat", Sec. 3, in the order of the forward pass:
#   feature extraction  a CNN sees each view (FeatureCNN); attention within and across views (MultiViewTransformer)
#   cost volume         each pixel's features against the other views' at D candidate depths (cost_volume)
#   its refinement      a U-Net over the volume; softmax and expectation turn it into a coarse depth (UNet, MVSplat.match)
#   depth refinement    a second U-Net at full resolution adds what the images show (MVSplat.refine)
#   Gaussians           the centre at that depth on the pixel's ray; shape, opacity and colours beside it (gaussian_adapter)


class MVSplatConfig(NamedTuple):
    """Sizes of an MVSplat; the defaults are the published re10k model's. `MVSplatConfig.tiny` is the built-in one's."""

    d_feature: int = 128  # channels C of the features that are matched
    num_depth_candidates: int = 128  # planes D of the sweep
    costvolume_unet_feat_dim: int = 128  # width of U-Net 1, which refines the cost volume
    depth_unet_feat_dim: int = 32  # width of U-Net 2, which refines the depth at full resolution
    sh_degree: int = 4  # of the colours
    cnn_widths: tuple = (64, 96, 128)  # fixed in the official code, as is the number of layers
    transformer_layers: int = 6


MVSplatConfig.tiny = MVSplatConfig(32, 48, 32, 16, 0, (32, 48, 64), 4)


def conv(c_in, c_out, kernel=3, stride=1, bias=True):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)


class CnnBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.conv2 = conv(c_in, c_out, 3, stride, bias=False), conv(c_out, c_out, bias=False)
        self.downsample = nn.Sequential(conv(c_in, c_out, 1, stride)) if stride > 1 or c_in != c_out else None

    def forward(self, x):
        y = F.relu(F.instance_norm(self.conv1(x)))
        y = F.relu(F.instance_norm(self.conv2(y)))
        return F.relu((x if self.downsample is None else F.instance_norm(self.downsample(x))) + y)


class FeatureCNN(nn.Module):  # (V, 3, H, W) in [0, 1] -> (V, C, H / 4, W / 4)
    def __init__(self, widths, channels):
        super().__init__()
        a, b, c = widths
        self.conv1 = conv(3, a, 7, 2, bias=False)
        self.layer1 = nn.Sequential(CnnBlock(a, a, 1), CnnBlock(a, a, 1))
        self.layer2 = nn.Sequential(CnnBlock(a, b, 2), CnnBlock(b, b, 1))
        self.layer3 = nn.Sequential(CnnBlock(b, c, 1), CnnBlock(c, c, 1))
        self.conv2 = conv(c, channels, 1)

    def forward(self, images):
        mean, std = (images.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = F.relu(F.instance_norm(self.conv1((images - mean) / std)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


def to_windows(x: Tensor, shifted) -> Tensor:  # (V, h, w, M, C) -> (V, 4, h/2 * w/2 * M, C): four quadrants, rolled by half of one
    V, h, w, M, C = x.shape
    x = x.roll((-(h // 4), -(w // 4)), (1, 2)) if shifted else x
    return x.view(V, 2, h // 2, 2, w // 2, M, C).transpose(2, 3).reshape(V, 4, -1, C)


def from_windows(x: Tensor, size, shifted) -> Tensor:  # (V, 4, h/2 * w/2, C) -> (V, h, w, C)
    h, w = size
    x = x.view(len(x), 2, 2, h // 2, w // 2, -1).transpose(2, 3).reshape(len(x), h, w, -1)
    return x.roll((h // 4, w // 4), (1, 2)) if shifted else x


def shift_mask(size, device, dtype) -> Tensor:
    """(1, 4, L, L): -100 between tokens that a rolled window brings together but that are not neighbours in the picture."""
    strips = [torch.bucketize(torch.arange(n, device=device), torch.tensor([n - n // 2, n - n // 4], device=device), right=True)
              for n in size]
    region = (3 * strips[0][:, None] + strips[1])[None, :, :, None, None]
    region = to_windows(region, False)[0, :, :, 0]
    return -100.0 * (region[None, :, :, None] != region[None, :, None]).to(dtype)


class WindowAttention(nn.Module):
    """One-head attention from the tokens of each view to the tokens of `target` in the same window."""

    def __init__(self, dim, ffn):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.merge = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1 = nn.LayerNorm(dim)
        if ffn:
            self.mlp = nn.Sequential(nn.Linear(2 * dim, 8 * dim, bias=False), nn.GELU(), nn.Linear(8 * dim, dim, bias=False))
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, x, target, mask):  # (V, h, w, C), (V, h, w, M, C), None or (1, 4, L, L) -> (V, h, w, C)
        shifted = mask is not None
        q, k, v = (to_windows(y, shifted) for y in (self.q_proj(x)[..., None, :], self.k_proj(target), self.v_proj(target)))
        # With M > 1 keys run pixel-major but the mask's columns are tiled view-major: so it is in the published model.
        message = F.scaled_dot_product_attention(q, k, v, mask.repeat(1, 1, 1, target.shape[3]) if shifted else None)
        message = self.norm1(self.merge(from_windows(message, x.shape[1:3], shifted)))
        return x + (self.norm2(self.mlp(torch.cat([x, message], -1))) if hasattr(self, "mlp") else message)


class MultiViewTransformer(nn.Module):
    """Every view looks at itself, then at the others: so a feature knows what it could be confused with."""

    def __init__(self, dim, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"self_attn": WindowAttention(dim, False), "cross_attn_ffn": WindowAttention(dim, True)})
                                    for _ in range(layers))

    def forward(self, features):  # (V, C, h, w) -> the same
        V, C, h, w = features.shape
        x = (features + window_positions(C, h, w).to(features)).permute(0, 2, 3, 1)
        mask = shift_mask((h, w), x.device, x.dtype)
        for number, layer in enumerate(self.layers):
            shifted = mask if number % 2 else None  # every second layer's windows lie across the borders of the last one's
            others = torch.stack([torch.stack([x[u] for u in range(V) if u != v], -2) for v in range(V)])
            x = layer["self_attn"](x, x[..., None, :], shifted)
            x = layer["cross_attn_ffn"](x, others, shifted)
        return x.permute(0, 3, 1, 2)


def window_positions(channels, h, w) -> Tensor:  # -> (C, h, w): sines and cosines of row and column within a quadrant
    half = channels // 2
    k = torch.arange(half)
    omega = 10000 ** (2 * (k // 2) / half)
    codes = []
    for n in (h // 2, w // 2):
        angle = 2 * math.pi * (torch.arange(1, n + 1) / (n + 1e-6))[:, None] / omega
        codes.append(torch.where(k % 2 == 0, angle.sin(), angle.cos()).T)  # (C / 2, n)
    rows, cols = codes[0][:, :, None].expand(-1, -1, w // 2), codes[1][:, None].expand(-1, h // 2, -1)
    return torch.cat([rows, cols]).tile(1, 2, 2)


def cost_volume(features: Tensor, K: Tensor, c2w: Tensor, disparities: Tensor) -> Tensor:
    """Plane sweep over features: how well each candidate depth of a pixel matches the other views (MVSplat Sec. 3.1).

    features (V, C, h, w), K (V, 3, 3) in pixels of that grid, c2w (V, 4, 4), disparities (V, D) -> (V, D, h, w).
    Every other view is warped by the plane at each candidate depth and correlated with the reference; outside it the
    correlation is 0. Candidates go in blocks, which bounds the memory at any image size.
    """
    V, C, h, w = features.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], -1).to(features)  # (h, w, 3); whole numbers, as published
    volume = []
    for r in range(V):
        total = 0
        for s in (v % V for v in range(r + 1, r + V)):
            to_other = torch.linalg.inv(c2w[s]) @ c2w[r]
            rays = pixels @ (K[r] @ to_other[:3, :3] @ torch.linalg.inv(K[r])).T  # the reference's K in both, as published
            correlations = []
            for disparity in disparities[r].split(max(1, 2**24 // features[r].numel())):
                point = rays / disparity[:, None, None, None] + K[r] @ to_other[:3, 3]  # (block, h, w, 3)
                uv = point[..., :2] / point[..., 2:].clamp_min(1e-3)
                grid = 2 * uv / uv.new_tensor([w - 1, h - 1]) - 1
                warped = F.grid_sample(features[s].expand(len(disparity), -1, -1, -1), grid, align_corners=True)
                correlations.append((warped * features[r]).sum(1) / C**0.5)
            total = total + torch.cat(correlations)
        volume.append(total / (V - 1))
    return torch.stack(volume)


def group_norm(channels, groups=8):
    return nn.GroupNorm(groups if channels % groups == 0 else 4, channels)


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.in_layers = nn.Sequential(conv(c_in, c_out), group_norm(c_out), nn.SiLU())
        self.out_layers = nn.Sequential(conv(c_out, c_out), group_norm(c_out), nn.SiLU())
        self.skip_connection = nn.Identity() if c_in == c_out else conv(c_in, c_out, 1)

    def forward(self, x):
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class CrossViewAttention(nn.Module):
    """Attention among the pixels of all views at once."""

    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.qkv, self.proj_out, self.norm = nn.Conv1d(dim, 3 * dim, 1), nn.Conv1d(dim, dim, 1), group_norm(dim)

    def forward(self, x):  # (V, m, h, w)
        V, m, h, w = x.shape
        tokens = x.flatten(2).transpose(0, 1).reshape(1, m, -1)  # (1, m, V*h*w)
        q, k, v = self.qkv(tokens).view(1, self.heads, 3, m // self.heads, -1).transpose(-1, -2).unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(1, m, -1)
        mixed = self.proj_out(mixed).view(m, V, h * w).transpose(0, 1)
        return x + self.norm(mixed).view(V, m, h, w)


class UNet(nn.Module):
    """A 2D U-Net over all views, one width at all levels, with cross-view attention at the coarsest (MVSplat Sec. 3.1)."""

    def __init__(self, width, levels):
        super().__init__()
        down = lambda: nn.Sequential(OrderedDict(op=conv(width, width, 3, 2)))
        up = lambda: nn.Sequential(OrderedDict(up=nn.Upsample(scale_factor=2), conv=conv(width, width)))
        attention = lambda level: [CrossViewAttention(width)] if level == levels - 1 else []
        self.input_blocks = nn.ModuleList([nn.Sequential(conv(width, width))])
        for level in range(levels):
            self.input_blocks.append(nn.Sequential(ResidualBlock(width, width), *attention(level)))
            if level < levels - 1:
                self.input_blocks.append(nn.Sequential(down()))
        self.middle_block = nn.Sequential(ResidualBlock(width, width), nn.Identity(), ResidualBlock(width, width))
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.output_blocks.append(nn.Sequential(ResidualBlock(2 * width, width), *attention(level)))
            self.output_blocks.append(nn.Sequential(ResidualBlock(2 * width, width), *attention(level), *([up()] if level else [])))
        self.out = nn.Sequential(conv(width, width), group_norm(width), nn.SiLU())

    def forward(self, x):
        skips = []
        for block in self.input_blocks:
            x = block(x)
            skips.append(x)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1))
        return self.out(x)


def full_precision(tensor):  # cameras and points inside a bf16 autocast: 8 bits would be half a pixel off
    return torch.autocast(tensor.device.type, enabled=False)


class MVSplat(nn.Module):
    """Two or more posed images -> one 3D Gaussian a pixel, in one pass (Chen et al. 2024; module names are the official ones).

    Features of each view -> cross-view attention -> plane-sweep cost volume -> its refinement -> coarse depth ->
    refinement at full resolution -> Gaussians. Exactly the published network, its quirks included.
    """

    def __init__(self, config=MVSplatConfig()):
        super().__init__()
        self.config = config
        C, D, m1, m2 = config[:4]
        raw = 2 + 3 + 4 + 3 * (config.sh_degree + 1) ** 2  # offset in the pixel, scales, quaternion, harmonics
        self.backbone = nn.ModuleDict({"backbone": FeatureCNN(config.cnn_widths, C),
                                       "transformer": MultiViewTransformer(C, config.transformer_layers)})
        self.depth_predictor = nn.ModuleDict({
            "corr_refine_net": nn.Sequential(conv(D + C, m1), group_norm(m1), nn.GELU(), UNet(m1, 3), conv(m1, D)),
            "regressor_residual": conv(D + C, D, 1),
            "depth_head_lowres": nn.Sequential(conv(D, 2 * D), nn.GELU(), conv(2 * D, D)),
            "upsampler": nn.Sequential(conv(2 * C, C), nn.UpsamplingBilinear2d(scale_factor=4), nn.GELU()),
            "proj_feature": conv(C, m2),
            "refine_unet": nn.Sequential(conv(m2 + 5, m2), group_norm(m2, 4), nn.GELU(), UNet(m2, 5)),
            "to_gaussians": nn.Sequential(conv(m2 + 3 + C, 2 * raw), nn.GELU(), conv(2 * raw, raw)),
            "to_disparity": nn.Sequential(conv(m2, 2 * m2), nn.GELU(), conv(2 * m2, 2))})

    def forward(
        self,
        images: Tensor,  # (V, 3, H, W) in [0, 1], V >= 2, any size
        K: Tensor,  # (V, 3, 3) pixels
        c2w: Tensor,  # (V, 4, 4)
        near,  # (V,) or float, in the scene's unit
        far,
        harmonics=False,  # also `features` (G, 3 * (degree + 1)^2): colours as spherical harmonics, see `view_colours`
    ) -> Gaussians:
        V, _, height, width = images.shape
        images = F.pad(images, (0, -width % 16, 0, -height % 16), mode="replicate")  # U-Nets halve four times; cut off below
        near, far = (torch.as_tensor(bound).to(images).expand(V) for bound in (near, far))
        sweep = torch.linspace(0, 1, self.config.num_depth_candidates).to(images)
        disparities = 1 / far[:, None] + sweep * (1 / near - 1 / far)[:, None]  # (V, D), far first
        cnn, features, _, probability = self.match(images, K, c2w, disparities)
        coarse = (probability * disparities[:, :, None, None]).sum(1, keepdim=True)  # the expected disparity (V, 1, h, w)
        certainty = probability.amax(1, keepdim=True)
        upsampled = self.depth_predictor["upsampler"](torch.cat([features, cnn], 1))
        refined, disparity = self.refine(images, upsampled, coarse, certainty)
        delta, logit = self.depth_predictor["to_disparity"](refined).chunk(2, 1)
        bounds = (1 / far).view(V, 1, 1, 1), (1 / near).view(V, 1, 1, 1)
        seen = zip(refined.split(1), images.split(1), upsampled.split(1))  # one view at a time: nothing else is as wide
        raw = torch.cat([self.raw_gaussians(torch.cat(maps, 1), harmonics) for maps in seen])
        maps = torch.cat([1 / (disparity + delta).clamp(*bounds), logit.sigmoid(), raw], 1)[:, :, :height, :width].permute(0, 2, 3, 1)
        depth, opacity, raw = maps.split([1, 1, raw.shape[1]], -1)
        with full_precision(images):
            means, scales, quaternions = gaussian_adapter(depth, raw.to(images), K, c2w)
            axes = c2w[:, None, None, :3, :3] @ rotation_matrix(quaternions) * scales[..., None, :]  # columns, world frame
            colours = rotate_harmonics(raw[..., 9:].to(images), c2w).flatten(0, 2) if harmonics else None
            return Gaussians(means.flatten(0, 2), (axes @ axes.mT).flatten(0, 2), opacity.to(images).flatten(), colours)

    def match(self, images, K, c2w, disparities):
        """The quarter-resolution half -> features (V, C, h, w) before and after the transformer, cost volume and
        probability of each candidate (V, D, h, w): feature extraction, cost volume, its refinement, depth estimation."""
        cnn = self.backbone["backbone"](images)
        features = self.backbone["transformer"](cnn)
        with full_precision(images):
            volume = cost_volume(features.to(images), K / K.new_tensor([4, 4, 1])[:, None], c2w, disparities)
        net, x = self.depth_predictor, torch.cat([volume, features], 1)
        refined = net["corr_refine_net"](x) + net["regressor_residual"](x)
        return cnn, features, volume, net["depth_head_lowres"](refined).softmax(1)

    def refine(self, images, upsampled, coarse, certainty):
        """Depth refinement at full resolution -> what it saw (V, m2, H, W), and the coarse disparity there (V, 1, H, W)."""
        coarse = F.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=True)
        certainty = F.interpolate(certainty, scale_factor=4, mode="nearest")
        x = torch.cat([images, self.depth_predictor["proj_feature"](upsampled), coarse, certainty], 1)
        return self.depth_predictor["refine_unet"](x), coarse

    def raw_gaussians(self, x, harmonics):
        first, gelu, last = self.depth_predictor["to_gaussians"]
        rows = len(last.weight) if harmonics else 9  # without colours, most of the last layer is not computed
        return F.conv2d(gelu(first(x)), last.weight[:rows], last.bias[:rows], padding=1)


def gaussian_adapter(depth: Tensor, raw: Tensor, K: Tensor, c2w: Tensor):
    """(V, H, W, 1), (V, H, W, 9+) -> means (world), scales and unit quaternions x y z w (camera frame) (MVSplat Sec. 3.2)."""
    V, H, W, _ = raw.shape
    rays = torch.stack([pixel_rays(k, H, W) for k in K])
    inverse = torch.linalg.inv(K)
    rays = rays + (raw[..., :2].sigmoid() - 0.5) @ inverse[:, None, :, :2].mT  # anywhere in the pixel
    unit = F.normalize(rays, dim=-1) @ c2w[:, None, :3, :3].mT
    means = c2w[:, None, None, :3, 3] + depth * unit  # z-depth taken as a distance along the ray, as published
    pixel = inverse[:, :2, :2].sum((1, 2)).view(V, 1, 1, 1)
    scales = (0.5 + 14.5 * raw[..., 2:5].sigmoid()) * depth * 0.1 * pixel
    quaternions = raw[..., 5:9] / (raw[..., 5:9].norm(dim=-1, keepdim=True) + 1e-8)
    return means, scales, quaternions


def rotation_matrix(quaternion: Tensor) -> Tensor:  # (..., 4) x y z w -> (..., 3, 3)
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion.square().sum(-1) + 1e-8)
    return torch.stack([1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w),
                        s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w),
                        s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def spherical_harmonics(directions: Tensor, degree) -> Tensor:
    """Real spherical harmonics about the z axis, no Condon-Shortley sign: unit (..., 3) -> (..., (degree + 1)^2)."""
    x, y, z = directions.unbind(-1)
    power, legendre = torch.complex(torch.ones_like(x), torch.zeros_like(x)), {}
    azimuth = []
    for m in range(degree + 1):  # azimuth[m] = (x + iy)^m, legendre[l, m] = P_l^m / sin^m
        azimuth.append(power)
        power = power * torch.complex(x, y)
        legendre[m, m] = torch.full_like(x, math.prod(range(1, 2 * m, 2)))
        for l in range(m + 1, degree + 1):
            legendre[l, m] = ((2 * l - 1) * z * legendre[l - 1, m] - (l + m - 1) * legendre.get((l - 2, m), 0)) / (l - m)
    norm = lambda l, m: ((2 if m else 1) * (2 * l + 1) / (4 * math.pi) * math.factorial(l - m) / math.factorial(l + m)) ** 0.5
    return torch.stack([norm(l, abs(m)) * legendre[l, abs(m)] * (azimuth[-m].imag if m < 0 else azimuth[m].real)
                        for l in range(degree + 1) for m in range(-l, l + 1)], -1)


def rotate_harmonics(raw: Tensor, c2w: Tensor) -> Tensor:
    """(V, H, W, 3 * K) from the network, camera frame -> the same, colour-major, in the world frame (basis of e3nn: about y).

    D(R) with Y(R n) = D(R) Y(n) is solved for from 64 directions, in float64. Higher degrees are damped, as published.
    """
    degree = math.isqrt(raw.shape[-1] // 3) - 1
    coefficients = raw.unflatten(-1, (3, -1))
    n = F.normalize(torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1)
    rotated = []
    for value, pose in zip(coefficients, c2w):
        before, after = (spherical_harmonics(d[:, [2, 0, 1]], degree) for d in (n, n @ pose[:3, :3].T.cpu().double()))
        parts = [value[..., :1]]
        for l in range(1, degree + 1):
            part = slice(l * l, (l + 1) ** 2)
            D = torch.linalg.lstsq(before[:, part], after[:, part]).solution  # transposed
            parts.append(0.1 * 0.25**l * value[..., part] @ D.to(value))
        rotated.append(torch.cat(parts, -1))
    return torch.stack(rotated).flatten(-2)


def view_colours(gaussians: Gaussians, camera: Tensor) -> Tensor:
    """RGB (G, 3) of an MVSplat's Gaussians seen from `camera` (3,): the harmonics as 3DGS rasterisers evaluate them.

    They know degrees 0 to 3, about the z axis with the Condon-Shortley sign; the official decoder hands its coefficients
    over as they are, and so do we.
    """
    harmonics = gaussians.features.unflatten(-1, (3, -1))
    degree = min(3, math.isqrt(harmonics.shape[-1]) - 1)
    basis = spherical_harmonics(F.normalize(gaussians.means - camera, dim=-1), degree)
    sign = [(-1) ** m for l in range(degree + 1) for m in range(-l, l + 1)]
    return (0.5 + (harmonics[..., :len(sign)] * (basis * basis.new_tensor(sign))[:, None]).sum(-1)).clamp_min(0)


MVSPLAT_PAGE = "github.com/donydchen/mvsplat"  # its README links to the folder of checkpoints


def load_mvsplat(name_or_path) -> MVSplat:
    """An MVSplat with its weights: `tiny` (built in), or the official Lightning checkpoint `re10k.ckpt` (or its tensors as
    .safetensors). Every size is read off the tensors. Raises ValueError, one line, as `load_vit` does."""
    path = WEIGHTS / "mvsplat.safetensors" if str(name_or_path) == "tiny" else Path(name_or_path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weights; give 'tiny', or put re10k.ckpt there, from the folder that {MVSPLAT_PAGE} links to")
    state = read_checkpoint(path)
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    stored = {key.removeprefix("encoder."): value for key, value in state.items()  # the rest, if any, is the decoder's
              if key.startswith(("encoder.", "backbone.", "depth_predictor.")) and isinstance(value, Tensor)}
    rows = lambda name: len(stored[name + ".weight"])
    try:
        layers = len({m[1] for key in stored if (m := re.match(r"backbone\.transformer\.layers\.(\d+)\.", key))})
        cnn, net = "backbone.backbone.", "depth_predictor."
        config = MVSplatConfig(
            rows(cnn + "conv2"), rows(net + "regressor_residual"), rows(net + "corr_refine_net.0"), rows(net + "refine_unet.0"),
            math.isqrt((rows(net + "to_gaussians.2") - 9) // 3) - 1,
            tuple(rows(cnn + name) for name in ("conv1", "layer2.0.conv1", "layer3.0.conv1")), layers)
    except KeyError as error:
        raise ValueError(f"{path}: lacks {error}; it is no MVSplat") from None
    return load_strictly(MVSplat(config), stored, path)


def mvsplat_gaussians(model: MVSplat, images: Tensor, K: Tensor, c2w: Tensor, near: float, far: float, harmonics=False) -> Gaussians:
    """Learned two-view geometry; arguments as in `sweep_gaussians`.

    The networks were trained on scenes whose nearest depth is 1, so the scene is scaled to that, and the Gaussians back.
    """
    # Differs: SnD gives the network near = 1 and far = 100 in the data set's unit.
    poses = c2w.clone()
    poses[:, :3, 3] /= near
    g = model(images, K, poses, 1.0, far / near, harmonics)
    return g._replace(means=near * g.means, covariances=near**2 * g.covariances)


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
def lifted_pair(scene, pair, vit, mvsplat, pixels, device):
    """One row of the picture, Gaussians by geometry, their colours (G, 3), and relative errors of depth by geometry (or None)."""
    data = importlib.import_module("01_data")
    views = [scene.view(i, data.fit_size(scene, pixels, vit.patch)) for i in pair]
    images, K, c2w = (torch.stack([getattr(v, key) for v in views]).to(device) for key in ("image", "K", "c2w"))
    size = images.shape[-2:]
    grid = tuple(side // vit.patch for side in size)
    geometries = {"mvsplat": mvsplat_gaussians(mvsplat, images, K, c2w, *scene.depth_range),
                  "sweep": sweep_gaussians(images, K, c2w, *scene.depth_range)}
    measured, errors = None, None
    if all(v.depth is not None for v in views):
        measured = torch.stack([v.depth for v in views])
        geometries["depth"] = depth_gaussians(measured.to(device), K, c2w)
    depths = {name: view_depth(g, c2w, *size).cpu() for name, g in geometries.items()}
    if measured is not None:
        known = measured > 0
        guesses = {"mvsplat": depths["mvsplat"], "sweep": depths["sweep"], "one plane": measured[known].median()}
        errors = {name: ((guess - measured).abs() / measured)[known].mean().item() for name, guess in guesses.items()}
    solid = {name: depths[name][0] * (g.opacities.view(2, *size)[0] >= 0.5).cpu() for name, g in geometries.items()}
    tokens, mask = vit(images).patches[0], data.regions(views[0]).to(device)
    basis = pca_basis(tokens)
    nearest = F.interpolate(tokens.T.view(1, -1, *grid), size)[0].permute(1, 2, 0)
    upscaled = [nearest, bilinear_upscale(tokens, mask, grid), mask_aware_upscale(tokens, mask, grid)]
    scale = solid["mvsplat"] if measured is None else measured[0]
    row = [*images.cpu(), *(data.colour_depth(solid[name], scale) if name in solid else None for name in ("mvsplat", "sweep", "depth")),
           data.colour_ids(mask.cpu()), *(pca_colours(f, basis) for f in upscaled)]
    return row, geometries, images.permute(0, 2, 3, 1).reshape(-1, 3), errors


def main(argv=None):
    parser = argparse.ArgumentParser(description="Lift features to 3D: geometry and upscaling of held-out pairs, as pictures.")
    parser.add_argument("--scene_dir", default="data", help="a scene or a folder of scenes; built-in rooms if data/ is missing")
    parser.add_argument("--model", default="tiny", help="ViT weights: 'tiny', a published name such as dinov2_vits14, a file or folder")
    parser.add_argument("--mvsplat", default="tiny", help="MVSplat weights: 'tiny' or the official re10k.ckpt")
    parser.add_argument("--geometry", default="mvsplat", choices=("mvsplat", "sweep", "depth"), help="whose Gaussians the .ply files hold")
    parser.add_argument("--pixels", type=int, default=96 * 128, help="pixels a view; raise it for larger models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="seed of the held-out pairs")
    parser.add_argument("--out", default="out/02_lift")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames without an image or a valid pose")
    args = parser.parse_args(argv)
    data, splat = importlib.import_module("01_data"), importlib.import_module("03_splat")
    with data.explained(args, "the same command starts again"):
        vit, mvsplat = load_vit(args.model).to(args.device), load_mvsplat(args.mvsplat).to(args.device)
        scenes = data.open_scenes(args.scene_dir, args.skip_bad_frames)
        scenes, rows, errors, files = (data.split(scenes, "val") or scenes)[:4], [], [], []
        for n in range(4):
            scene = scenes[n % len(scenes)]
            a, b, _ = data.sample_triplet(scene, torch.Generator().manual_seed(args.seed + n))
            row, geometries, colours, error = lifted_pair(scene, (a, b), vit, mvsplat, args.pixels, args.device)
            if args.geometry not in geometries:
                raise ValueError(f"{scene.name}: no measured depth for --geometry depth; use mvsplat or sweep")
            files.append(Path(args.out) / f"{scene.name.replace('/', '_')}_{a}_{b}.ply")
            splat.save_ply(files[-1], geometries[args.geometry], colours)
            rows, errors = rows + [row], errors + ([error] if error else [])
        headings = ["context", "context", "depth: mvsplat", "depth: sweep", "depth: measured",
                    "mask", "nearest (PCA)", "bilinear", "mask-aware"]
        path = data.picture_grid(Path(args.out) / "lift.png", headings, rows)
        answer = "no measured depth to compare with"
        if errors:
            answer = "mean error of depth, all pixels: " + ", ".join(
                f"{name} {100 * sum(e[name] for e in errors) / len(errors):.1f} %" for name in errors[0])
        print(f"{answer}  ->  {path}, {', '.join(map(str, files))}")


if __name__ == "__main__":
    main()
