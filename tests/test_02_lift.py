"""02_lift.py: the ViT against Meta's numbers, Eq. 2-3 against per-pixel loops, geometry against planes and rooms."""
import importlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

lift = importlib.import_module("02_lift")
FIXTURE = Path(__file__).parent / "fixtures" / "networks" / "dinov2.safetensors"

# ------------------------------------------------------------------------------------------------ vision transformer


def recipe(key, shape):  # the weights that the fixtures were made with
    r = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    last = key.rsplit(".", 1)[-1]
    if last in ("pos_embed", "cls_token", "register_tokens", "mask_token"):
        return 0.2 * r
    if len(shape) >= 2:
        return r / torch.Size(shape[1:]).numel() ** 0.5
    return {"gamma": 0.5 + 0.1 * r, "weight": 1 + 0.1 * r}.get(last, 0.1 * r)


def recipe_image(name, height, width):  # in [-1, 1], already in the network's units
    g = torch.Generator().manual_seed(zlib.crc32(("input/" + name).encode()))
    low = torch.nn.functional.interpolate(torch.rand((1, 3, 8, 8), generator=g), size=(height, width), mode="bilinear", align_corners=True)
    return (0.8 * low + 0.2 * torch.rand((1, 3, height, width), generator=g)) * 2 - 1


@pytest.mark.parametrize("name,registers", [("s14", 0), ("s14_reg4", 4)])
@pytest.mark.parametrize("size", ["224x224", "126x182", "518x518"])
def test_vit_matches_meta(name, registers, size):
    truth = load_file(FIXTURE)
    model = lift.VisionTransformer(registers=registers).eval()
    model.load_state_dict({k: recipe(k, v.shape) for k, v in model.state_dict().items()})
    height, width = map(int, size.split("x"))
    images = recipe_image(f"dinov2/{size}", height, width)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (lift.IMAGENET_MEAN, lift.IMAGENET_STD))
    with torch.no_grad():
        tokens = model(images * std + mean)
    pick = lambda n, k: torch.arange(n) if n <= k else torch.linspace(0, n - 1, k).round().long()
    for ours, key in ((tokens.cls, "cls"), (tokens.patches[:, pick(tokens.patches.shape[1], 10)], "patch"),
                      (tokens.patches.mean(1), "patch_mean"), (tokens.registers, "reg")):
        theirs = truth.get(f"meta/{name}/{size}/{key}")
        if theirs is not None:
            assert (ours - theirs).abs().max() / theirs.abs().mean() < 3e-5, key
    assert tokens.registers.shape == (1, registers, 384)


def small_vit(registers=0):
    torch.manual_seed(0)
    model = lift.VisionTransformer(patch=8, dim=128, depth=2, heads=2, registers=registers, grid=4, mlp_ratio=2)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("registers", [0, 4])
def test_save_and_load_give_the_same_network(tmp_path, registers):
    model, images = small_vit(registers), torch.rand(2, 3, 24, 40)
    lift.save_vit(model, tmp_path)
    again = lift.load_vit(tmp_path)
    for a, b in zip(model(images), again(images)):
        assert torch.equal(a, b)
    config, keys = json.loads((tmp_path / "config.json").read_text()), set(load_file(tmp_path / "model.safetensors"))
    assert config["hidden_size"] == 128 and config["num_attention_heads"] == 2 and config["mlp_ratio"] == 2
    assert config["model_type"] == ("dinov2_with_registers" if registers else "dinov2")
    assert {"embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.1.attention.attention.query.weight",
            "encoder.layer.0.attention.output.dense.bias", "encoder.layer.1.layer_scale2.lambda1", "layernorm.weight"} <= keys
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("harm,says", [
    (lambda s: s.pop("layernorm.bias"), "lacks layernorm.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update({"layernorm.bias": torch.zeros(5)}), "norm.bias is (5,)"),
    (lambda s: s.pop("embeddings.patch_embeddings.projection.weight"), "not in the Hugging Face DINOv2 layout")])
def test_a_key_too_many_or_too_few_is_named(tmp_path, harm, says):
    lift.save_vit(small_vit(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    harm(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        lift.load_vit(tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_heads_come_from_the_config(tmp_path):
    torch.manual_seed(0)
    model = lift.VisionTransformer(patch=8, dim=48, depth=1, heads=4, grid=4).eval()
    lift.save_vit(model, tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(lift.load_vit(tmp_path)(images).cls, model(images).cls)


def test_a_damaged_config_is_named(tmp_path):
    lift.save_vit(small_vit(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        lift.load_vit(tmp_path)


def test_missing_and_truncated_weights(tmp_path):
    with pytest.raises(ValueError, match="no such weights"):
        lift.load_vit(tmp_path / "nothing")
    lift.save_vit(small_vit(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        lift.load_vit(tmp_path)


def test_tiny_weights_are_small_and_see():
    file = lift.WEIGHTS / "tiny_vit.safetensors"
    assert file.stat().st_size < 4e6
    model = lift.load_vit("tiny")
    tokens = model(torch.rand(1, 3, 96, 128)).patches
    assert tokens.shape == (1, 192, 192) and tokens.isfinite().all() and tokens.std(1).mean() > 0.05


# ------------------------------------------------------------------------------------------------ upscaling, Eq. 2-3


def upscale_by_loops(tokens, mask, grid, drop=False):
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
            chosen = shared or ({} if drop else plain)
            total = sum(chosen.values())
            for (i, j), weight in chosen.items():
                out[r, c] += weight / total * tokens[i * w + j].double()
    return out


@pytest.mark.parametrize("size,grid", [((24, 32), (3, 4)), ((23, 37), (3, 5)), ((14, 14), (1, 1)), ((5, 7), (2, 3)), ((21, 35), (3, 5)), ((4, 3), (6, 5))])
@pytest.mark.parametrize("kind", ["random", "blocks", "pixel", "unlabelled"])
@pytest.mark.parametrize("drop", [False, True])
def test_upscaling_is_equation_2_and_3(size, grid, kind, drop):
    torch.manual_seed(1)
    mask = {"random": torch.randint(0, 4, size), "blocks": torch.randint(0, 5, (3, 3)).repeat_interleave(8, 0).repeat_interleave(13, 1)[:size[0], :size[1]],
            "pixel": torch.zeros(size, dtype=torch.long), "unlabelled": torch.zeros(size, dtype=torch.long)}[kind].clone()
    if mask.shape != size:
        mask = torch.randint(0, 3, size)
    if kind == "pixel":
        mask[size[0] // 2, size[1] // 3] = 10**12
    tokens = torch.randn(grid[0] * grid[1], 5, dtype=torch.float64)
    index, weight = lift.upscale_weights(mask, grid, drop)
    ours = (weight[..., None].double() * tokens[index]).sum(1).view(*size, 5)
    assert (ours - upscale_by_loops(tokens, mask, grid, drop)).abs().max() < 1e-6
    assert index.dtype == torch.int64 and ((weight.sum(1) - 1).abs() < 1e-6).logical_or(weight.sum(1) == 0).all()
    if not drop:
        assert (lift.mask_aware_upscale(tokens.float(), mask, grid) - ours).abs().max() < 1e-5


def test_features_do_not_cross_mask_borders():
    mask = torch.ones(32, 32, dtype=torch.long)
    mask[:, 13:] = 2  # a border inside a patch
    tokens = torch.tensor([[0.0], [0], [1], [1]]).repeat(4, 1)  # label 1 in columns 0-1 (patch centres 4, 12), label 2 in 2-3
    up = lift.mask_aware_upscale(tokens, mask, (4, 4))[..., 0]
    assert (up[:, :13] == 0).all() and (up[:, 13:] == 1).all()
    assert ((lift.bilinear_upscale(tokens, mask, (4, 4))[:, 13:16, 0] > 0.05) & (lift.bilinear_upscale(tokens, mask, (4, 4))[:, 13:16, 0] < 0.95)).all()


# ------------------------------------------------------------------------------------------------ geometry


def plane_scene(height=48, width=64, baseline=0.25):
    """Two cameras in front of a slanted, textured plane: images, exact z-depth, K, c2w."""
    K = torch.tensor([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]).repeat(2, 1, 1)
    c2w = torch.eye(4).repeat(2, 1, 1)
    angle = -0.1
    c2w[1, :3, :3] = torch.tensor([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    c2w[1, 0, 3] = baseline
    normal, offset = torch.nn.functional.normalize(torch.tensor([0.3, 0.2, -1.0]), dim=0), -2.0
    images, depths = [], []
    for k, pose in zip(K, c2w):
        rays = lift.pixel_rays(k, height, width)
        world = rays @ pose[:3, :3].T
        depth = (offset - pose[:3, 3] @ normal) / (world @ normal)
        p = pose[:3, 3] + world * depth[..., None]
        colour = torch.stack([torch.sin(7 * p[..., 0] + 3 * p[..., 1]), torch.sin(11 * p[..., 1] - 4 * p[..., 0]), torch.sin(5 * p[..., 0] * p[..., 1])])
        images.append(0.5 + 0.4 * colour)
        depths.append(depth)
    return torch.stack(images), torch.stack(depths), K, c2w, normal


def test_depth_gaussians_sit_on_their_pixels():
    images, depth, K, c2w, normal = plane_scene()
    depth = depth.clone()
    depth[0, 5, 7] = 0  # not measured
    g = lift.depth_gaussians(depth, K, c2w)
    V, H, W = depth.shape
    assert g.means.shape == (V * H * W, 3) and g.covariances.shape == (V * H * W, 3, 3)
    for v in range(V):
        means = g.means.view(V, H, W, 3)[v]
        camera = (means - c2w[v, :3, 3]) @ c2w[v, :3, :3]
        pixel = camera @ K[v].T
        known = depth[v] > 0
        rows, cols = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
        assert (pixel[..., 0] / pixel[..., 2] - cols)[known].abs().max() < 1e-3
        assert (pixel[..., 1] / pixel[..., 2] - rows)[known].abs().max() < 1e-3
        assert (camera[..., 2] - depth[v])[known].abs().max() < 1e-4
    opacity = g.opacities.view(V, H, W)
    assert opacity[0, 5, 7] == 0 and (opacity > 0).sum() == V * H * W - 1
    assert g.covariances.isfinite().all() and torch.linalg.eigvalsh(g.covariances.double()).min() > 0


def test_covariance_is_the_pixel_footprint_on_the_surface():
    images, depth, K, c2w, normal = plane_scene()
    g = lift.depth_gaussians(depth, K, c2w)
    H, W = depth.shape[1:]
    means, cov = g.means.view(2, H, W, 3)[0].double(), g.covariances.view(2, H, W, 3, 3)[0].double()
    thin = torch.einsum("i,hwij,j->hw", normal.double(), cov, normal.double()).sqrt()
    du, dv = (means[1:-1, 2:] - means[1:-1, :-2]) / 2, (means[2:, 1:-1] - means[:-2, 1:-1]) / 2  # one pixel on the plane
    expected = 0.35**2 * (du[..., :, None] * du[..., None, :] + dv[..., :, None] * dv[..., None, :])
    inner = cov[1:-1, 1:-1] - (0.1 * depth[0, 1:-1, 1:-1].double() / 60)[..., None, None] ** 2 * normal.double()[:, None] * normal.double()
    assert (inner - expected).abs().max() / expected.abs().max() < 0.02
    assert (thin / (0.1 * depth[0].double() / 60) - 1).abs()[2:-2, 2:-2].max() < 0.02  # flat: a tenth of a pixel


def test_gaussians_cope_with_edges_and_holes():
    depth = torch.zeros(1, 6, 9)
    depth[0, 2, 3] = 1.5  # one lone pixel, no neighbours
    depth[0, 4, 5:8] = torch.tensor([1.0, 50.0, 1.0])
    g = lift.depth_gaussians(depth, torch.tensor([[[10.0, 0, 4.5], [0, 10, 3], [0, 0, 1]]]), torch.eye(4)[None])
    assert g.means.isfinite().all() and g.covariances.isfinite().all() and (g.opacities > 0).sum() == 4
    assert g.covariances.diagonal(dim1=1, dim2=2).sum(1).max() < 50**2  # no Gaussian bridges the gap from 1 to 50 metres


def test_sweep_finds_a_slanted_plane():
    images, depth, K, c2w, _ = plane_scene()
    swept, confidence = lift.sweep_depth(images, K, c2w, 1.0, 6.0)
    sure = confidence > 0.5
    error = ((swept - depth).abs() / depth)
    assert sure.float().mean() > 0.6 and error[sure].median() < 0.01 and (error[sure] < 0.05).float().mean() > 0.95
    brighter = torch.stack([images[0], (0.8 * images[1] + 0.05)])  # another exposure
    swept, confidence = lift.sweep_depth(brighter, K, c2w, 1.0, 6.0)
    error = ((swept - depth).abs() / depth)[confidence > 0.5]
    assert error.median() < 0.04 and (error < 0.1).float().mean() > 0.9  # measured 0.024 and 0.99: worse, not lost
    g = lift.sweep_gaussians(images, K, c2w, 1.0, 6.0)
    assert g.opacities.min() >= 0 and g.opacities.max() <= 1 and g.means.isfinite().all()


def test_sweep_is_not_sure_where_it_cannot_know():
    images, depth, K, c2w, _ = plane_scene()
    other = torch.rand(1, 3, *depth.shape[1:], generator=torch.Generator().manual_seed(0))
    _, confidence = lift.sweep_depth(torch.cat([images[:1], other]), K, c2w, 1.0, 6.0)  # views of different things
    _, confidence_same = lift.sweep_depth(images, K, c2w, 1.0, 6.0)
    assert confidence.mean() < 0.5 * confidence_same.mean()


def test_sweep_beats_one_plane_on_a_room(rooms):
    data = importlib.import_module("01_data")
    errors, flat = [], []
    for scene in rooms:
        a, b, _ = data.sample_triplet(scene, torch.Generator().manual_seed(0))
        views = [scene.view(a), scene.view(b)]
        images, K, c2w, depth = (torch.stack([getattr(v, key) for v in views]) for key in ("image", "K", "c2w", "depth"))
        swept, confidence = lift.sweep_depth(images, K, c2w, *scene.depth_range)
        sure = confidence > 0.5
        errors.append(((swept - depth).abs() / depth)[sure].median())
        flat.append(((depth[sure].median() - depth).abs() / depth)[sure].median())
    assert np.mean(errors) < 0.03 and np.mean(errors) < 0.3 * np.mean(flat)


def test_box_mean_and_semi_global_against_loops():
    torch.manual_seed(0)
    x = torch.rand(2, 7, 9, dtype=torch.float64)
    ours = lift.box_mean(x, 5)
    for r in range(7):
        for c in range(9):
            assert torch.allclose(ours[:, r, c], x[:, max(0, r - 2):r + 3, max(0, c - 2):c + 3].mean((1, 2)))
    cost, small, large = torch.rand(6, 3, 4, dtype=torch.float64), 0.15, 0.6
    total = torch.zeros_like(cost)
    for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        path = torch.zeros_like(cost)
        for r in (range(3) if dr >= 0 else range(2, -1, -1)):
            for c in (range(4) if dc >= 0 else range(3, -1, -1)):
                path[:, r, c] = cost[:, r, c]
                if 0 <= r - dr < 3 and 0 <= c - dc < 4:
                    before = path[:, r - dr, c - dc]
                    for d in range(6):
                        steps = [before[e] + (0 if e == d else small if abs(e - d) == 1 else large) for e in range(6)]
                        path[d, r, c] += min(steps) - before.min()
        total += path / 4
    assert torch.allclose(lift.semi_global(cost, small, large), total)


def test_pca_colours_are_stable_and_in_range():
    features = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(0))
    basis = lift.pca_basis(features.flatten(0, 1))
    colours = lift.pca_colours(features, basis)
    assert colours.shape == (3, 6, 8) and colours.min() == 0 and colours.max() == 1
