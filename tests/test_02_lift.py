"""02_lift.py: Eq. 2-3 against loops over pixels; geometry against planes and crooked scenes; ViT and MVSplat against the
numbers of the published codes; every layout of weights; files that run code (damaged ones are in test_hostile.py).

tests/fixtures/networks and mvsplat hold what the official codes give for weights that a recipe makes. The ViT's are
written here in each source's own layout, by tables that are not those of 02_lift.py, and come back by `load_vit`.
"""
import argparse
import collections
import functools
import importlib
import json
import math
import os
import pickle
import re
import resource
import sys
import tempfile
import types
import urllib.error
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

data, lift = (importlib.import_module(name) for name in ("01_data", "02_lift"))
FIXTURES = Path(__file__).parent / "fixtures"
BOUND = 3e-5  # max |a - b| / mean |b|, what the fixtures' README demands of ViT tokens; measured: at most 3.3e-6


def refused(path, load=lift.load_vit):
    """What `load` says of a file: one line that names it, within 200 MB; None if it reads it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = None
    try:
        load(path)
    except ValueError as error:
        said = str(error)
        assert said.isprintable() and said.startswith(str(path).strip()[:40]), said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    return said


def cameras(size=(48, 64)):
    H, W = size
    K = torch.tensor([[0.9 * W, 0, 0.52 * W], [0, 1.1 * W, 0.47 * H], [0, 0, 1]]).repeat(2, 1, 1)
    K[1, :2] *= torch.tensor([[1.2], [0.8]])
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[1, 0, 3] = 0.3
    c2w[:, :3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.1, 0.2], [0.1, 0, -0.3], [-0.2, 0.3, 0]]))
    return K, c2w


def pixel_error(gaussians, K, c2w, size):
    """How far, in pixels along x or y, the means lie from the centres of their pixels, (G,); at most 0.5."""
    points = (gaussians.means.view(len(K), -1, 3) - c2w[:, None, :3, 3]) @ c2w[:, :3, :3] @ K.mT
    rows, cols = torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij")
    return (points[..., :2] / points[..., 2:] - torch.stack([cols, rows], -1).flatten(0, 1)).abs().amax(-1).flatten()


# ------------------------------------------------------------------------ upscaling, Eq. 2-3


def upscale_by_loops(tokens, mask, grid):
    """SnD Eq. 2-3 pixel by pixel, in exact-as-can-be float64, written from the paper and DESIGN alone."""
    (H, W), (h, w) = mask.shape, grid
    out = torch.zeros(H, W, tokens.shape[1], dtype=torch.float64)
    centre = lambda j, n, N: math.floor((j + 0.5) * N / n)
    for r in range(H):
        for c in range(W):
            y, x = (r + 0.5) * h / H - 0.5, (c + 0.5) * w / W - 0.5
            y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
            shared, plain = {}, {}
            for i in {math.floor(y), min(math.floor(y) + 1, h - 1)}:
                for j in {math.floor(x), min(math.floor(x) + 1, w - 1)}:
                    weight = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
                    plain[i, j] = weight
                    if mask[centre(i, h, H), centre(j, w, W)] == mask[r, c] and weight > 1e-9:
                        shared[i, j] = weight
            chosen = shared or plain
            for (i, j), weight in chosen.items():
                out[r, c] += weight / sum(chosen.values()) * tokens[i * w + j].double()
    return out


@pytest.mark.parametrize("size,grid", [((24, 32), (3, 4)), ((23, 37), (3, 5)), ((14, 14), (1, 1)), ((5, 7), (2, 3)),
                                       ((4, 3), (6, 5))])
@pytest.mark.parametrize("kind", ["random", "blocks", "pixel", "unlabelled"])
def test_upscaling_is_equation_2_and_3(size, grid, kind):
    torch.manual_seed(1)
    mask = torch.zeros(size, dtype=torch.long)
    if kind == "random":
        mask = torch.randint(0, 4, size)
    elif kind == "blocks":
        mask = torch.randint(0, 5, (3, 3)).repeat_interleave(13, 0).repeat_interleave(13, 1)[:size[0], :size[1]]
    elif kind == "pixel":
        mask[size[0] // 2, size[1] // 3] = 10**12
    tokens = torch.randn(grid[0] * grid[1], 5, dtype=torch.float64)
    index, weight = lift.upscale_weights(mask, grid)
    ours = (weight[..., None].double() * tokens[index]).sum(1).view(*size, 5)
    assert (ours - upscale_by_loops(tokens, mask, grid)).abs().max() < 1e-6
    assert index.dtype == torch.int64 and (weight.sum(1) - 1).abs().max() < 1e-6
    assert (lift.mask_aware_upscale(tokens.float(), mask, grid) - ours).abs().max() < 1e-5


def test_features_do_not_cross_mask_borders():
    mask = torch.ones(32, 32, dtype=torch.long)
    mask[:, 13:] = 2  # a border inside a patch
    tokens = torch.tensor([[0.0], [0], [1], [1]]).repeat(4, 1)  # patch centres 4 and 12 have label 1, the others 2
    up = lift.mask_aware_upscale(tokens, mask, (4, 4))[..., 0]
    assert (up[:, :13] == 0).all() and (up[:, 13:] == 1).all()
    blurred = lift.bilinear_upscale(tokens, mask, (4, 4))[:, 13:16, 0]
    assert (blurred > 0.05).all() and (blurred < 0.95).all()


# ------------------------------------------------------------------------ geometry


def plane_scene(height=48, width=64):
    """Two different cameras in front of a slanted plane: exact z-depth, K, c2w and the plane's normal."""
    K = torch.tensor([[50.0, 0, width / 2], [0, 55.0, height / 2], [0, 0, 1]]).repeat(2, 1, 1)
    K[1, :2] += torch.tensor([[15.0, 0, 2], [0, 9, -3]])
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[1, :3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, 0, -0.1], [0, 0, 0], [0.1, 0, 0]]))
    c2w[1, 0, 3] = 0.25
    normal, offset = F.normalize(torch.tensor([0.3, 0.2, -1.0]), dim=0), -2.0
    rays = [lift.pixel_rays(k, height, width) @ pose[:3, :3].T for k, pose in zip(K, c2w)]
    depth = torch.stack([(offset - pose[:3, 3] @ normal) / (ray @ normal) for ray, pose in zip(rays, c2w)])
    return depth, K, c2w, normal


def test_depth_gaussians_sit_on_their_pixels():
    depth, K, c2w, _ = plane_scene()
    depth[0, 5, 7] = 0  # not measured
    g = lift.depth_gaussians(depth, K, c2w)
    known, opacity = depth.flatten() > 0, g.opacities.view(depth.shape)
    assert len(g.means) == len(g.covariances) == depth.numel()
    assert pixel_error(g, K, c2w, depth.shape[1:])[known].max() < 1e-3
    assert (lift.view_depth(g, c2w, *depth.shape[1:]) - depth).flatten()[known].abs().max() < 1e-4
    assert opacity[0, 5, 7] == 0 and (opacity > 0).sum() == depth.numel() - 1
    assert g.covariances.isfinite().all() and torch.linalg.eigvalsh(g.covariances.double()).min() > 0


@pytest.mark.parametrize("view", [0, 1])
def test_covariance_is_the_pixel_footprint_on_the_surface(view):
    depth, K, c2w, normal = plane_scene()
    g, (H, W), normal = lift.depth_gaussians(depth, K, c2w), depth.shape[1:], normal.double()
    means, cov = g.means.view(2, H, W, 3)[view].double(), g.covariances.view(2, H, W, 3, 3)[view].double()
    du, dv = (means[1:-1, 2:] - means[1:-1, :-2]) / 2, (means[2:, 1:-1] - means[:-2, 1:-1]) / 2  # a pixel, on the plane
    expected = 0.35**2 * (du[..., :, None] * du[..., None, :] + dv[..., :, None] * dv[..., None, :])
    thickness = 0.1 * depth[view].double() / K[view, 0, 0]  # a tenth of a pixel
    flat = cov[1:-1, 1:-1] - thickness[1:-1, 1:-1, None, None] ** 2 * normal[:, None] * normal
    assert (flat - expected).abs().max() / expected.abs().max() < 0.02
    assert (torch.einsum("i,hwij,j->hw", normal, cov, normal).sqrt() / thickness - 1).abs()[2:-2, 2:-2].max() < 0.02


def test_the_normals_of_a_scene_stop_at_what_is_not_known(crooked):
    for i in (3, 4, 5):
        view = crooked[0].view(i)
        off = (lift.surface_normals(view.depth, view.K) * view.normal).sum(-1)[view.depth > 0]
        assert off.median() > 0.995 and (off < 0.5).float().mean() < 0.01  # also beside the hole
    row = torch.zeros(5, 64)
    row[2] = 2.0  # alone it has no slope, and faces the camera
    facing = -F.normalize(lift.pixel_rays(view.K, 5, 64), dim=-1)[2]
    assert ((lift.surface_normals(row, view.K)[2] * facing).sum(-1) > 0.999).all()


def test_gaussians_cope_with_edges_and_holes():
    depth = torch.zeros(1, 6, 9)
    depth[0, 2, 3] = 1.5  # one lone pixel, no neighbours
    depth[0, 4, 5:8] = torch.tensor([1.0, 50.0, 1.0])
    g = lift.depth_gaussians(depth, torch.tensor([[[10.0, 0, 4.5], [0, 10, 3], [0, 0, 1]]]), torch.eye(4)[None])
    assert g.means.isfinite().all() and g.covariances.isfinite().all() and (g.opacities > 0).sum() == 4
    assert g.covariances.diagonal(dim1=1, dim2=2).sum(1).max() < 50**2  # none bridges the gap from 1 to 50


def test_two_views_of_one_surface_agree_where_both_see_it():
    depth, K, c2w, _ = plane_scene()
    a_to_b = torch.linalg.inv(c2w[1]) @ c2w[0]
    agrees = lift.cross_check(depth[0], depth[1], K[0], K[1], a_to_b)
    assert (agrees == 0).any()  # outside the other picture
    assert agrees[10:-10, 20:-20].min() > 0.9
    for wrong in (depth[1] * 1.2, torch.zeros_like(depth[1])):  # another surface; unknown
        assert lift.cross_check(depth[0], wrong, K[0], K[1], a_to_b).max() < 0.01


def test_pca_colours_are_stable_and_in_range():
    features = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))
    features = torch.cat([features, 5 * features[..., :4]], -1) + 100
    basis = lift.pca_basis(features.flatten(0, 1))
    colours = lift.pca_colours(features, basis)
    assert colours.shape == (3, 6, 8) and colours.min() == 0 and colours.max() == 1
    axes = torch.linalg.svd((features - basis[0]).flatten(0, 1).double(), full_matrices=False)[2][:3].T
    assert (axes.T @ basis[1].double()).diagonal().abs().min() > 1 - 1e-6 and (basis[1].sum(0) > 0).all()


# ------------------------------------------------------------------------ MVSplat


CASES, SHAPES = (json.loads((FIXTURES / f"mvsplat/{name}.json").read_text()) for name in ("cases", "shapes"))
VECTORS = {"out.means": 1, "out.covariances_triu": 1, "out.scales": 1, "out.rotations_xyzw": 1}
GAINS = {"regressor_residual.weight": 0.05, "depth_head_lowres.2.weight": 1.2, "to_gaussians.2.weight": 0.7}


def mvsplat_recipe(key, shape, salt):  # the weights that the stored numbers were made with
    u = torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))) * 2 - 1
    if len(shape) < 2:
        return 0.6 + 0.3 * u if key.endswith("weight") else 0.1 * u
    gain = math.prod([1.2, *(g for suffix, g in GAINS.items() if key.endswith(suffix))])
    w = u * (gain * math.sqrt(3.0 / math.prod(shape[1:])))
    if key.endswith("to_disparity.2.weight"):
        w[:1] *= 0.7
        w[1:] *= 3
    return w


@torch.no_grad()
def record(net, monkeypatch, *inputs):
    """What goes through one forward pass, by the names of the fixtures."""
    kept = {}

    def keep_calls(name):
        call = getattr(lift, name)
        monkeypatch.setattr(lift, name, lambda *given: kept.setdefault(name, (given, call(*given)))[1])
    keep_calls("cost_volume")
    keep_calls("gaussian_adapter")
    g = net(*inputs)
    monkeypatch.undo()
    (features, *_), volume = kept["cost_volume"]
    (depth, *_), (_, scales, quaternions) = kept["gaussian_adapter"]
    rows, cols = torch.triu_indices(3, 3)
    return {"mid.trans_features": features, "mid.cost_volume_raw": volume, "out.depths": depth[..., 0],
            "out.means": g.means, "out.opacities": g.opacities, "out.covariances_triu": g.covariances[:, rows, cols],
            "out.scales": scales.flatten(0, 2), "out.rotations_xyzw": quaternions.flatten(0, 2)}


def relative_error(a, b, dims):  # the fixtures' metric: |a - b| / (|b| + median |b|), as (max, mean)
    length = lambda x: x.flatten(-dims).norm(dim=-1) if dims else x.abs()
    difference, size = length(a.double() - b.double()), length(b.double())
    error = difference / (size + size.median())
    return error.max().item(), error.mean().item()


@pytest.mark.parametrize("name", ["re10k_2v", "reduced_2v", "reduced_3v"])
def test_mvsplat_as_its_own_code_computes_it(name, monkeypatch):
    case, stored = CASES["cases"][name], load_file(FIXTURES / f"mvsplat/{name}.safetensors")
    model = lift.MVSplat(lift.MVSplatConfig(**case["config"])).eval()
    model.load_state_dict({key: mvsplat_recipe(key, tuple(shape), case["salt"])
                           for key, shape in SHAPES[case["shapes"]].items()}, strict=True)
    assert sum(p.numel() for p in model.parameters()) == case["params"] and len(model.state_dict()) == 471
    image, K, c2w, near, far = (stored[f"in.{key}"] for key in ("image", "intrinsics", "extrinsics", "near", "far"))
    K = K * K.new_tensor([image.shape[-1], image.shape[-2], 1])[:, None]
    found = [record(model, monkeypatch, *inputs) for inputs in zip(image, K, c2w, near, far)]
    for key in found[0]:
        ours, (largest, mean) = torch.stack([f[key] for f in found]), CASES["tolerance"][key]
        assert ours.shape == stored[key].shape, key
        error = relative_error(ours, stored[key], VECTORS.get(key, 0))
        assert error[0] <= largest and error[1] <= mean, (key, error)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return lift.MVSplat(lift.MVSplatConfig.tiny).eval()


@torch.no_grad()
@pytest.mark.parametrize("size,autocast", [((48, 64), False), ((33, 47), False), ((5, 9), False), ((48, 64), True)])
def test_any_size_and_bounds_of_each_view(small, size, autocast):
    (K, c2w), near, far = cameras(size=size), torch.tensor([1.0, 2.0]), torch.tensor([3.0, 9.0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # the cameras stay exact
        g = small(torch.rand(2, 3, *size), K, c2w, near, far)
    assert len(g.means) == 2 * size[0] * size[1] and g.features is None  # none of the padding
    assert pixel_error(g, K, c2w, size).max() <= 0.501  # row-major per view, with the intrinsics of the unpadded image
    assert ((g.opacities >= 0) & (g.opacities <= 1)).all() and torch.linalg.eigvalsh(g.covariances.double()).min() > 0
    distance = (g.means.view(2, -1, 3) - c2w[:, None, :3, 3]).norm(dim=-1)
    assert g.means.dtype == torch.float32
    low, high = (0.02 * distance, 0.02 * distance) if autocast else (1e-4, 1e-3)
    assert (distance >= near[:, None] - low).all() and (distance <= far[:, None] + high).all()


@torch.no_grad()
def test_the_unit_of_a_scene_does_not_matter(crooked, small):
    views = [crooked[0].view(i, (48, 64)) for i in (3, 5)]
    images, K, c2w = (torch.stack([getattr(view, key) for view in views]) for key in ("image", "K", "c2w"))
    near, far = crooked[0].depth_range
    whole = lift.mvsplat_gaussians(small, images, K, c2w, near, far)
    c2w[:, :3, 3] /= near  # then the nearest depth is 1
    unit = small(images, K, c2w, 1.0, far / near)
    assert torch.allclose(whole.means, near * unit.means, atol=1e-4)
    assert torch.allclose(whole.covariances, near**2 * unit.covariances, rtol=1e-4)
    assert near > 2.5 and torch.equal(whole.opacities, unit.opacities)


def lightning(state, path):
    more = {"optimizer_states": [{"state": {0: torch.zeros(3)}}], "callbacks": {}, "hyper_parameters": {"lr": 2e-4}}
    torch.save({"epoch": 3, "global_step": 300_000, "state_dict": prefixed(state, "encoder."), **more}, path)
    return path


def test_the_official_layout_of_mvsplat_loads(tmp_path, small):
    state = small.state_dict()
    loaded = lift.load_mvsplat(lightning(state, tmp_path / "re10k.ckpt"))
    assert loaded.config == small.config and not loaded.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    lift.save_tensors(tmp_path / "re10k.safetensors", {k: v.half() for k, v in state.items()})
    assert lift.load_mvsplat(tmp_path / "re10k.safetensors").config == small.config


BIAS = "depth_predictor.to_disparity.0.bias"


@pytest.mark.parametrize("change,says", [
    (lambda s: {k: v for k, v in s.items() if k != BIAS}, f"{BIAS} is missing"),
    (lambda s: {**s, "depth_predictor.third_head.bias": torch.zeros(2)}, "depth_predictor.third_head.bias"),
    (lambda s: {**s, BIAS: torch.zeros(7)}, f"{BIAS} is (7,)"),
    (lambda s: {**s, "depth_predictor.to_gaussians.2.weight": torch.zeros(3, 1)}, "no MVSplat"),
    (lambda s: {"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, "no MVSplat")])
def test_a_tensor_of_mvsplat_that_does_not_fit_is_named(tmp_path, small, change, says):
    assert says in refused(lightning(change(small.state_dict()), tmp_path / "re10k.ckpt"), lift.load_mvsplat)
    assert "no such weights" in refused(tmp_path / "other.ckpt", lift.load_mvsplat)


# ------------------------------------------------------------------------ the ViT: weights and layouts


def recipe(key, shape):  # the weights that the fixtures were made with
    r = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    last = key.rsplit(".", 1)[-1]
    if last in ("pos_embed", "cls_token", "register_tokens", "mask_token"):
        return 0.2 * r
    if len(shape) >= 2:
        return r / torch.Size(shape[1:]).numel() ** 0.5
    return {"gamma": 0.5 + 0.1 * r, "weight": 1 + 0.1 * r}.get(last, 0.1 * r)


def recipe_images(name, shape):  # -> (B, 3, H, W) in [0, 1]
    g = torch.Generator().manual_seed(zlib.crc32(("input/" + name).encode()))
    low = F.interpolate(torch.rand((*shape[:2], 8, 8), generator=g), shape[2:], mode="bilinear", align_corners=True)
    return 0.8 * low + 0.2 * torch.rand(shape, generator=g)


def recipe_image(name, height, width):
    """-> an image that the network normalises to the fixture's input."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (lift.IMAGENET_MEAN, lift.IMAGENET_STD))
    return (2 * recipe_images(name, (1, 3, height, width)) - 1) * std + mean


def meta_weights(chunked=False, **sizes):
    with torch.device("meta"):
        keys = {key: value.shape for key, value in lift.VisionTransformer(**sizes).state_dict().items()}
    named = lambda key: re.sub(r"^blocks\.", "blocks.0.", key) if chunked else key
    return {key: recipe(named(key), shape) for key, shape in keys.items()}


OUTSIDE = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token",
           "pos_embed": "embeddings.position_embeddings", "register_tokens": "embeddings.register_tokens",
           "norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias",
           "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
           "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias"}
INSIDE = {"attn.proj": "attention.output.dense", "ls1.gamma": "layer_scale1.lambda1",
          "ls2.gamma": "layer_scale2.lambda1", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}


def to_hugging_face(state):
    out = {OUTSIDE[key]: value for key, value in state.items() if key in OUTSIDE}
    for key, value in state.items():
        if key in OUTSIDE:
            continue
        _, i, rest = key.split(".", 2)
        if rest.startswith("attn.qkv"):
            for third, part in zip(("query", "key", "value"), value.chunk(3)):
                out[f"encoder.layer.{i}.attention.attention.{third}.{rest.rsplit('.', 1)[1]}"] = part.clone()
        else:
            for ours, theirs in INSIDE.items():
                rest = rest.replace(ours, theirs)
            out[f"encoder.layer.{i}.{rest}"] = value
    return out


def to_timm(state):
    named = lambda key: key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2")
    state = {named(key): value for key, value in state.items() if key != "mask_token"}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state


def to_dune(state):
    """The checkpoint of naver/dune: chunked blocks, prefixes, projectors of its teachers, the training's arguments."""
    model = {"encoder." + re.sub(r"^blocks\.", "blocks.0.", key): value for key, value in state.items()}
    for teacher in ("dino2reg_vitlarge_14", "mast3r_vitlarge_16"):
        model[f"projectors.{teacher}.blocks.0.norm1.weight"] = torch.ones(384)
        model[f"teacher_norms.{teacher}.normalizers.patch.mean"] = torch.zeros(1024)
    args = argparse.Namespace(arch="vit_small", lr=1e-3, output_dir=Path("/nowhere"), teachers=["a", "b"], seed=None)
    return {"model": model, "iter": 7, "args": args}


def write(folder, layout, state, heads=6):  # -> what to give to load_vit
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "hf":
        save_file(to_hugging_face(state), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
        return folder
    if layout == "timm":
        save_file(to_timm(state), folder / "model.safetensors", {"format": "pt"})
        return folder / "model.safetensors"
    torch.save(to_dune(state) if layout == "dune" else state, folder / "weights.pth")
    return folder / "weights.pth"


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def same_weights(model, state):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------ the ViT: the official numbers


REAL = {"s14": dict(registers=0), "s14_reg4": dict(registers=4), "dune": dict(registers=4, grid=32, chunked=True)}
DINOV2, DUNE_SAYS = (load_file(FIXTURES / f"networks/{name}.safetensors") for name in ("dinov2", "dune"))


@functools.cache
def real_model(layout, name):
    with tempfile.TemporaryDirectory() as folder:
        return lift.load_vit(write(Path(folder), layout, meta_weights(**REAL[name])))


def error_to(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().mean()).item()


def pick(n, k):  # k of n, evenly
    return torch.arange(n) if n <= k else torch.linspace(0, n - 1, k).round().long()


def check_tokens(tokens, truth, prefix, count):
    some = tokens.patches[:, pick(tokens.patches.shape[1], count)]
    stored = {"cls": tokens.cls, "patch_mean": tokens.patches.mean(1), "patch": some}
    if tokens.registers.shape[1]:
        stored["reg"] = tokens.registers
    for key, ours in stored.items():
        assert error_to(ours, truth[f"{prefix}/{key}"]) < BOUND, key


@pytest.mark.parametrize("size", ["224x224", "126x182", "518x518"])
@pytest.mark.parametrize("name", ["s14", "s14_reg4"])
@pytest.mark.parametrize("layout", ["meta", "hf", "timm"])
@torch.no_grad()
def test_dinov2_as_its_own_code_computes_it(layout, name, size):
    source = layout if f"{layout}/{name}/{size}/cls" in DINOV2 else "meta"  # stored once where the codes coincide
    tokens = real_model(layout, name)(recipe_image(f"dinov2/{size}", *map(int, size.split("x"))))
    check_tokens(tokens, DINOV2, f"{source}/{name}/{size}", 10)


@pytest.mark.parametrize("size", ["448x448", "224x518", "126x182"])
@torch.no_grad()
def test_dune_as_its_own_code_computes_it(size):
    model, last = real_model("dune", "dune"), []
    hook = model.blocks[-1].register_forward_hook(lambda _, __, out: last.append(out))
    check_tokens(model(recipe_image(f"dune/{size}", *map(int, size.split("x")))), DUNE_SAYS, size, 12)
    hook.remove()
    assert error_to(last[0][:, pick(last[0].shape[1], 4)], DUNE_SAYS[f"{size}/prenorm"]) < BOUND
    assert model.positions == "scale" and sum(p.numel() for p in model.parameters()) == 21_925_632


@pytest.mark.parametrize("layout", ["meta", "hf", "timm"])
@pytest.mark.parametrize("registers", [0, 4])
@torch.no_grad()
def test_swiglu_as_meta_computes_it(tmp_path, layout, registers):
    name = "toy_swiglu_reg4" if registers else "toy_swiglu"
    state = meta_weights(dim=96, depth=2, heads=3, registers=registers, grid=5, swiglu=True)
    model = lift.load_vit(write(tmp_path, layout, state, heads=3))
    for block in model.blocks:
        block.attn.heads = 3  # only the Hugging Face layout says that these toy heads are 32 wide, not 64
    model.positions = "antialiased" if registers else "scale"  # the fixture holds Meta's numbers
    tokens = model(recipe_image("dinov2/toy", 42, 84))
    everything = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], 1)
    assert error_to(everything, DINOV2[f"meta/{name}/all"]) < BOUND


@pytest.mark.parametrize("sizes,parameters,entries", [  # of everything in the state dict
    ((384, 12, 6, 0), 22_056_576, 175), ((384, 12, 6, 4), 22_058_112, 176), ((768, 12, 12, 0), 86_580_480, 175),
    ((768, 12, 12, 4), 86_583_552, 176), ((1024, 24, 16, 0), 304_368_640, 343), ((1024, 24, 16, 4), 304_372_736, 344),
    ((1536, 40, 24, 0), 1_136_480_768, 567), ((1536, 40, 24, 4), 1_136_486_912, 568)])
def test_sizes_of_the_published_models(sizes, parameters, entries):
    with torch.device("meta"):
        model = lift.VisionTransformer(14, *sizes, swiglu=sizes[0] == 1536)
    assert sum(p.numel() for p in model.parameters()) == parameters and len(model.state_dict()) == entries


# ------------------------------------------------------------------------ layouts of weights


SMALL = dict(patch=8, dim=64, depth=2, heads=1, grid=4)
LAYOUTS = [("meta", 0), ("meta", 4), ("hf", 0), ("hf", 4), ("timm", 0), ("timm", 4), ("dune", 4)]
RECIPE = {("meta", 0): "scale", ("hf", 0): "size", ("dune", 4): "scale"}  # the others: antialiased
ZERO = torch.zeros(1)


@pytest.mark.parametrize("dtype,swiglu", [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("layout,registers", LAYOUTS)
@torch.no_grad()
def test_each_layout_loads_and_survives_saving(tmp_path, layout, registers, dtype, swiglu):
    state = {key: value.to(dtype) for key, value in meta_weights(**SMALL, registers=registers, swiglu=swiglu).items()}
    model = lift.load_vit(write(tmp_path / "theirs", layout, state, heads=1))
    way = RECIPE.get((layout, registers), "antialiased")
    assert model.positions == way and not model.training and model.cls_token.dtype == torch.float32
    straight = lift.VisionTransformer(**SMALL, registers=registers, swiglu=swiglu)
    straight.load_state_dict(state)
    for a, b in zip(model(torch.ones(1, 3, 32, 32)), straight(torch.ones(1, 3, 32, 32))):
        rounding = 0.1 if dtype == torch.bfloat16 else 1e-5  # timm adds the class token's position before it rounds
        assert (a - b).abs().max() < rounding if layout == "timm" and registers else torch.equal(a, b)
    lift.save_vit(model, tmp_path / "ours")
    again, images = lift.load_vit(tmp_path / "ours"), torch.rand(2, 3, 24, 40)
    assert all(torch.equal(a, b) for a, b in zip(model(images), again(images)))
    for again.positions in {"scale", "size", "antialiased"} - {way}:  # or it would not have had to survive
        assert (again(images).patches - model(images).patches).abs().max() > 1e-3


@pytest.mark.parametrize("registers,swiglu", [(0, False), (4, False), (0, True), (4, True)])
def test_saved_folders_are_those_of_transformers(tmp_path, registers, swiglu):
    sizes = dict(patch=8, dim=48, depth=2, heads=4, grid=4, mlp_ratio=4 if swiglu else 2, registers=registers)
    model = lift.VisionTransformer(**sizes, swiglu=swiglu)
    lift.save_vit(model, tmp_path)
    expected, found = to_hugging_face(model.state_dict()), load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert json.loads((tmp_path / "config.json").read_text()) == dict(
        model_type="dinov2_with_registers" if registers else "dinov2", hidden_size=48, num_hidden_layers=2,
        architectures=["Dinov2WithRegistersModel" if registers else "Dinov2Model"], patch_size=8, image_size=32,
        num_attention_heads=4, num_channels=3, mlp_ratio=sizes["mlp_ratio"], hidden_act="gelu", layer_norm_eps=1e-6,
        qkv_bias=True, positions="antialiased" if registers else "scale", use_swiglu_ffn=swiglu,
        torch_dtype="float32", **({"num_register_tokens": 4} if registers else {}))
    again = lift.load_vit(tmp_path)  # heads of another width, and a narrow MLP
    assert same_weights(again, model.state_dict()) and again.heads == again.blocks[0].attn.heads == 4


WRAPPED = {
    "ddp": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "module._orig_mod.backbone."),
    "state_dict": lambda s: {"state_dict": prefixed(s, "teacher.")},
    "model": lambda s: {"model": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 3},
    "heads": lambda s: {"teacher": {**prefixed(s, "backbone."), "dino_head.mlp.0.weight": ZERO, "ibot_head.v": ZERO}},
    "both networks": lambda s: {"teacher": prefixed(s, "module.backbone."), "args": argparse.Namespace(lr=1),
                                "student": prefixed({k: v + 1 for k, v in s.items()}, "module.backbone.")},
    "dinov2's own": lambda s: {"optimizer": {"state": {}}, "model": {
        **prefixed({k: v + 1 for k, v in s.items()}, "student.backbone."), **prefixed(s, "teacher.backbone."),
        "student.dino_head.x": ZERO, "teacher.dino_head.x": ZERO, "dino_loss.center": ZERO}},
    "student dict": lambda s: {"student": prefixed(s, "module.backbone."), "epoch": 1},
    "student names": lambda s: {**prefixed(s, "student.backbone."), "student.dino_head.x": ZERO},
    "classifier": lambda s: {**prefixed(to_hugging_face(s), "dinov2."), "classifier.weight": ZERO},
    "registers": lambda s: prefixed(to_hugging_face(s), "dinov2_with_registers."),
    "hugging face in ddp": lambda s: prefixed(to_hugging_face(s), "module."),
    "timm's head": lambda s: {**s, "head.weight": ZERO}}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("registers", [0, 4])
def test_wrappers_of_training_code_are_removed(tmp_path, wrap, registers):
    state = meta_weights(**SMALL, registers=registers)
    torch.save(WRAPPED[wrap](state), tmp_path / "model.pth")
    model = lift.load_vit(tmp_path / "model.pth")
    hugging_face = "embeddings" in str(list(WRAPPED[wrap](state)))
    assert same_weights(model, state)
    assert model.positions == ("antialiased" if registers else "size" if hugging_face else "scale")


def in_shards(state, folder, ending, first="model-1.safetensors"):
    """Two files and the list that tells which tensor is in which; the list names `first` as the first file."""
    names, halves = list(state), ({}, {})
    for n, name in enumerate(names):
        halves[n % 2][name] = state[name]
    save = torch.save if ending == "bin" else save_file
    for n, half in enumerate(halves):
        save(half, folder / f"model-{n + 1}.{ending}")
    files = [first.replace("safetensors", ending), f"model-2.{ending}"]
    stem = "pytorch_model.bin" if ending == "bin" else "model.safetensors"
    listed = {"weight_map": {name: files[n % 2] for n, name in enumerate(names)}}
    (folder / f"{stem}.index.json").write_text(json.dumps(listed))


def folder_in(path):
    path.mkdir(parents=True)
    return path


FOLDERS = {
    "bin": lambda s, d: torch.save(s, d / "pytorch_model.bin"),
    "cache": lambda s, d: save_file(s, folder_in(d / "snapshots/0a1b2c") / "model.safetensors"),
    "only file": lambda s, d: save_file(s, d / "student_final.safetensors"),
    "safetensors called .bin": lambda s, d: save_file(s, d / "pytorch_model.bin"),
    "run of 04": lambda s, d: (save_file(s, folder_in(d / "student") / "model.safetensors"),
                               save_file({"student.x": ZERO}, d / "checkpoint.safetensors")),
    "beside an optimiser": lambda s, d: (torch.save(s, d / "pytorch_model.bin"), torch.save({}, d / "optimizer.pt")),
    "shards": lambda s, d: in_shards(s, d, "safetensors"), "shards of .bin": lambda s, d: in_shards(s, d, "bin"),
    "shards in the cache": lambda s, d: in_shards(s, folder_in(d / "snapshots/0a1b2c"), "safetensors")}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_as_people_have_them(tmp_path, kind):
    state = meta_weights(**SMALL)
    FOLDERS[kind](to_hugging_face(state), tmp_path)
    assert same_weights(lift.load_vit(tmp_path), state)


@pytest.mark.parametrize("first,says", [
    ("model-3.safetensors", "lists model-3.safetensors, which is missing"), ("", "lists ,"),
    *[(name, f"lists {name}, which is no file of weights beside it") for name in (
        "../model-1.safetensors", "/tmp/model-1.safetensors", "model.safetensors.index.json")]])
def test_a_shard_that_is_missing_or_elsewhere_is_named(tmp_path, first, says):
    index = tmp_path / "model.safetensors.index.json"
    in_shards(to_hugging_face(meta_weights(**SMALL)), tmp_path, "safetensors", first)
    assert f"{index}: {says}" in refused(tmp_path)
    for content in ("[]", "{}", '{"weight_map": [1]}'):
        index.write_text(content)
        assert "weight_map" in refused(tmp_path)


def test_a_folder_without_weights_or_with_several_is_named(tmp_path):
    assert "model.safetensors: no such weights" in refused(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save(meta_weights(**SMALL), tmp_path / name)
    assert "several files of weights (a.pth, b.pth)" in refused(tmp_path)


def test_weights_do_not_alias_their_file(tmp_path):
    path, state = write(tmp_path, "meta", meta_weights(**SMALL)), meta_weights(**SMALL)
    model = lift.load_vit(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))  # overwritten in place, as torch.save does
    assert same_weights(model, state)


KEYS = {"meta": ("blocks.1.norm2.bias", "cls_token", "blocks.0.attn.qkv.weight"),
        "timm": ("blocks.1.norm2.bias", "cls_token", "pos_embed"),
        "hf": ("encoder.layer.1.norm2.bias", "embeddings.cls_token", "encoder.layer.0.attention.attention.key.weight"),
        "dune": ("blocks.1.norm2.bias", "cls_token", "blocks.0.attn.qkv.weight")}
HARM = {"lacks": lambda value: {}, "extra": lambda value: {"": value, ".more": ZERO},
        "shape": lambda value: {"": value[..., None].repeat_interleave(3, -1)},
        "not finite": lambda value: {"": torch.full_like(value, torch.nan)}}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("layout,registers", LAYOUTS)
def test_a_tensor_missing_left_over_or_not_fitting_is_named(tmp_path, layout, registers, harm):
    path = write(tmp_path, layout, meta_weights(**SMALL, registers=registers), heads=1)
    path = path / "model.safetensors" if layout == "hf" else path
    for name in KEYS[layout]:
        state = lift.read_checkpoint(path)
        state = state.get("model", state)
        stored = name if layout != "dune" else "encoder." + name.replace("blocks.", "blocks.0.")
        state.update(prefixed(HARM[harm](state.pop(stored)), stored))
        torch.save({"model": state}, path.with_name("spoilt.pth"))
        assert name in refused(path.with_name("spoilt.pth"))


def test_tiny_weights_are_small_and_see():
    file = lift.WEIGHTS / "vit.safetensors"
    model = lift.load_vit("tiny")
    tokens = model(torch.rand(1, 3, 96, 128)).patches
    assert tokens.shape == (1, 192, 192) and tokens.isfinite().all() and tokens.std(1).mean() > 0.05
    assert model.positions == lift.load_vit(file).positions == "scale" and file.stat().st_size < 4e6


# ------------------------------------------------------------------------ names and downloads


META, DUNE = "https://dl.fbaipublicfiles.com/dinov2/", "https://download.europe.naverlabs.com/dune/"
HF = "https://huggingface.co/"
HF_REGISTERS, TIMM = "facebook/dinov2-with-registers-giant", "timm/vit_base_patch14_reg4_dinov2.lvd142m"
ADDRESSES = {  # name: (address, file in the cache)
    "dinov2_vits14": (META + "dinov2_vits14/dinov2_vits14_pretrain.pth", "dinov2_vits14_pretrain.pth"),
    "dinov2_vitg14_reg": (META + "dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth", "dinov2_vitg14_reg4_pretrain.pth"),
    "dune_vitbase14_448_paper": (DUNE + "dune_vitbase14_448_paper.pth", "dune_vitbase14_448_paper.pth"),
    "dinov2_small_snd": (HF + "david-shavin/SnD/resolve/main/dinov2_small_snd.pth", "dinov2_small_snd.pth"),
    HF_REGISTERS: (f"{HF}{HF_REGISTERS}/resolve/main/model.safetensors",
                   "facebook_dinov2-with-registers-giant.safetensors"),
    TIMM: (f"{HF}{TIMM}/resolve/main/model.safetensors", "timm_vit_base_patch14_reg4_dinov2.lvd142m.safetensors")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("fetched"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize("name", ADDRESSES)
def test_published_weights_are_fetched_once_or_the_error_says_what_to_do(hub, monkeypatch, name):
    address, file = ADDRESSES[name]
    layout = "dune" if "dune" in name else "hf" if "/" in name else "meta"
    source, calls = lift.weights_in(write(hub.parent / "source", layout, meta_weights(**SMALL), heads=1)), []

    def no_network(url, to):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    said = refused(name)
    assert all(part in said for part in (name, "no route", address, str(hub / file), "--models tiny"))
    download = lambda url, to: calls.append(url) or Path(to).write_bytes(source.read_bytes())
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = lift.load_vit(name), lift.load_vit(name)
    assert calls == [address] and [p.name for p in hub.iterdir()] == [file]
    assert same_weights(first, second.state_dict())


def test_other_names_are_not_fetched(hub):
    for name in ("dinov2_vitx14", "dinov2_vits14_reg5", "facebook/dinov2-huge", "dune_vitsmall14_448_paper",
                 "weights/none.pth", "dinov2_vits14\n", "timm/vit_small_patch14_dinov2xlvd142m"):
        assert f"{name.strip()}" in (said := refused(name)) and "no such weights; give 'tiny', a .pth" in said
    write(Path("facebook/dinov2-small"), "hf", meta_weights(**SMALL), heads=1)
    assert lift.load_vit("facebook/dinov2-small").dim == 64  # a folder comes before the network
    os.mkfifo("pipe.pth")
    for load in (lift.load_vit, lift.load_mvsplat):
        assert "no such weights" in refused("pipe.pth", load)  # and does not wait for it


# ------------------------------------------------------------------------ hostile and damaged files


def call(module, name, argument):  # the pickle opcodes of module.name(argument), protocol 2
    length = len(argument).to_bytes(4, "little")
    return b"c%s\n%s\nX%s%s\x85R" % (module.encode(), name.encode(), length, argument.encode())


def contain(path, container, value):
    """A torch file of {"x": value}, value given as pickle opcodes, in one of two containers."""
    pickled = b"\x80\x02}X\x01\x00\x00\x00x" + value + b"s."
    if container == "zip":
        torch.save({}, path)
        rewrite(path, "data.pkl", pickled)
    else:
        about = dict(protocol_version=1001, little_endian=True, type_sizes={})
        head = b"".join(pickle.dumps(part, 2) for part in (torch.serialization.MAGIC_NUMBER, 1001, about))
        path.write_bytes(head + pickled + pickle.dumps([], 2))


def rewrite(path, entry, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as file:
        held = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, old in held.items():
            file.writestr(name, content if name.endswith(entry) else old)


def allowed():  # what a read left behind in torch's list
    return [known for known in torch.serialization.get_safe_globals() if type(known) is tuple]


HOSTILE = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("__builtin__", "eval"),
    ("builtins", "__import__"), ("subprocess", "Popen"), ("subprocess", "check_output"), ("torch.hub", "load"),
    ("torch", "load"), ("torch.serialization", "load"), ("runpy", "run_path"), ("importlib", "import_module"),
    ("shutil", "rmtree"), ("webbrowser", "open"), ("sys", "exit"), ("numpyx", "system"),  # from here on nearly harmless
    ("torch.optim_", "x"), ("builtins.getattr", "x"), ("builtins", "listen"), ("numpy os", "system"),
    ("numpy.os x", "system")]


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_files_that_name_other_code_are_refused(tmp_path, container):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    contain(path, container, b"K\x07")
    assert lift.read_checkpoint(str(path)) == {"x": 7}  # such a file is read, or the refusals would prove nothing
    for module, name in HOSTILE:
        contain(path, container, call(module, name, f"touch {marker}"))
        for load in (lift.load_vit, lift.load_mvsplat):
            said = refused(path, load)
            assert "nothing of it was run" in said and (name in said or " " in module), (module, name)
        assert not marker.exists() and not allowed()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_method_fetched_by_getattr_is_not_called(tmp_path, container):
    """getattr(pathlib.PosixPath, "touch")(pathlib.PosixPath(marker)): every name in it is a harmless one."""
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    method = b"cbuiltins\ngetattr\n(cpathlib\nPosixPath\nX\x05\x00\x00\x00touchtR"
    value = method + call("pathlib", "PosixPath", str(marker)) + b"\x85R"
    pickle.loads(b"\x80\x02" + value + b".")
    assert marker.exists()  # Python's own pickle does call it
    marker.unlink()
    contain(path, container, value)
    assert ("cannot be read" if container == "zip" else "it names getattr") in refused(path)
    assert not marker.exists() and not allowed()


def test_a_lightning_checkpoint_is_read(tmp_path, monkeypatch):
    """As MVSplat's training writes it, with what Lightning 2, OmegaConf and torch 2.1's OneCycleLR leave in a file."""
    def foreign(module, name, bases=(), **members):
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
        made = type(name, bases, {"__module__": module, **members})
        setattr(sys.modules[module], name, made)
        return made
    config = foreign("omegaconf.dictconfig", "DictConfig")()
    config.__dict__.update(_content={"lr": 1}, _metadata=collections.defaultdict(dict, a={"b": 1}), _type=dict)
    hparams = foreign("pytorch_lightning.utilities.parsing", "AttributeDict", (dict,))(lr=2e-4, root=Path("/data"))
    weights = collections.OrderedDict(("encoder." + key, value) for key, value in meta_weights(**SMALL).items())
    best = {"best_model_score": torch.tensor(1.0), "dirpath": Path("/out"), "kth": np.float64(2.5)}
    held = {"epoch": 3, "global_step": 300_000, "pytorch-lightning_version": "2.0.9", "state_dict": weights,
            "callbacks": {"ModelCheckpoint{}": best},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float32(1)}]}],
            "lr_schedulers": [{"anneal_func": torch.optim.lr_scheduler.OneCycleLR._annealing_cos}],
            "hyper_parameters": hparams, "config": config, "array": np.arange(5),
            "types": {float: functools.partial(dict, a=1)}}
    path = tmp_path / "re10k.ckpt"
    torch.save(held, path)
    monkeypatch.undo()  # those modules are gone
    read = lift.read_checkpoint(path)
    assert read.keys() == held.keys() and read["global_step"] == 300_000 and read["hyper_parameters"]["lr"] == 2e-4
    assert all(torch.equal(read["state_dict"][key], weights[key]) for key in weights)
    assert type(read["config"]) is type(read["array"]) is lift.Inert and vars(read["config"]) == {}
    assert "omegaconf" not in sys.modules and not allowed()
    assert lift.load_vit(path).dim == 64


@pytest.mark.parametrize("content, says", [
    ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "in any layout"), ([1, 2], "holds a list"),
    ({"cls_token": ZERO, "module.cls_token": ZERO}, "module.cls_token is there twice"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
    (b"\x1f\x8b\x08" + bytes(64), "unpack it if it is an archive"), (b"\n<!DOCTYPE html><html>404", "web page")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_file_of_weights_is_told_by_what_it_is(tmp_path, content, says):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert says in refused(path) and refused(path, lift.load_mvsplat)


@pytest.mark.filterwarnings("ignore")
def test_a_bomb_is_not_unpacked_and_torchscript_not_run(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(meta_weights(**SMALL), path)
    rewrite(path, "data/0", bytes(10**8), zipfile.ZIP_DEFLATED)
    assert "unpacks to more" in refused(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "save a state_dict() if it is TorchScript" in refused(path, lift.read_checkpoint)


# ------------------------------------------------------------------------ the command


def test_the_command_finds_depth_in_rooms_it_has_not_seen_and_writes_what_it_names(tmp_path, capsys):
    data.make_rooms(tmp_path / "data", scenes=4, views=8, seed=1)  # the weights were trained on rooms of seed 0
    out = tmp_path / "out"
    lift.main(["--scene_dir", str(tmp_path / "data"), "--out", str(out), "--device", "cpu"])
    answer = capsys.readouterr().out.splitlines()[-1]
    flat, found = (float(re.search(rf"{name} ([\d.]+) %", answer)[1]) for name in ("one plane", "mvsplat"))
    assert found < 0.65 * flat, answer
    written = sorted(map(str, out.iterdir()))
    assert written == sorted(answer.split("->")[1].strip().split(", ")) and str(out / "lift.png") in written


@pytest.mark.parametrize("points, says", [(False, "nothing was measured"), (True, "mvsplat (at COLMAP's points)")])
def test_without_measured_depth_points_of_colmap_judge(rooms, tmp_path, monkeypatch, capsys, points, says):
    bare = rooms[0].subset(range(len(rooms[0])))
    view = bare.view
    monkeypatch.setattr(bare, "view", lambda *given: view(*given)._replace(depth=None))
    monkeypatch.setattr(data, "open_scenes", lambda *_: [bare])
    if points:
        bare.points = (bare.c2w[:, :3, 3] + 2 * bare.c2w[:, :3, 2]).numpy()  # before each camera
    lift.main(["--out", str(tmp_path), "--pixels", "3072", "--device", "cpu"])
    assert says in capsys.readouterr().out


def test_errors_of_depth_are_those_where_it_is_known(crooked):
    views = [crooked[0].view(i, (48, 64)) for i in (3, 4)]
    depth = torch.stack([view.depth for view in views])
    found = lift.depth_errors(1.1 * depth + (depth == 0), crooked[0], views)
    plane = (depth[depth > 0].median() - depth[depth > 0]).abs() / depth[depth > 0]
    assert found == pytest.approx({"mvsplat": 0.1, "one plane": plane.mean().item()}, rel=1e-4)


def test_sparse_points_become_depth_where_they_fall_into_the_picture():
    depth, K, c2w, _ = plane_scene()
    frame = data.Frame("v", None, K[1].numpy(), c2w[1].numpy(), (48, 64))
    points = lift.depth_gaussians(depth, K, c2w).means.view(2, 48, 64, 3)[1, ::8, ::8].reshape(-1, 3)
    behind, beside = c2w[1, :3, 3] - c2w[1, :3, 2], c2w[1, :3, 3] + c2w[1, :3, 0] + 0.1 * c2w[1, :3, 2]
    farther = c2w[1, :3, 3] + 1.5 * (points[0] - c2w[1, :3, 3])  # hidden by the first point
    found = data.depth_of_points(torch.cat([points, behind[None], beside[None], farther[None]]).numpy(), frame)
    assert (found > 0).sum() == len(points)
    torch.testing.assert_close(torch.from_numpy(found[::8, ::8]), depth[1, ::8, ::8])
