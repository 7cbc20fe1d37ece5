"""MVSplat against the numbers of the reference implementation, its checkpoint, and the built-in weights."""
import importlib
import json
import math
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

data, lift, splat = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat"))
HERE, SHARED = Path(__file__).parent / "fixtures" / "mvsplat", Path(__file__).parents[2] / "shared" / "fixtures" / "mvsplat"
CASES = json.loads((HERE / "cases.json").read_text())
SHAPES = json.loads((HERE / "shapes.json").read_text())
VECTORS = {"out.means": 1, "out.covariances_triu": 1, "out.scales": 1, "out.rotations_xyzw": 1, "out.harmonics_sub": 2}
GAINS = {"regressor_residual.weight": 0.05, "depth_head_lowres.2.weight": 1.2, "to_gaussians.2.weight": 0.7}


def recipe_weights(shapes, salt):
    """The generated weights that the stored numbers were made with: a function of name, shape and salt."""
    def tensor(key, shape):
        u = torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))) * 2 - 1
        if len(shape) < 2:
            return 0.6 + 0.3 * u if key.endswith("weight") else 0.1 * u
        gain = math.prod([1.2, *(g for suffix, g in GAINS.items() if key.endswith(suffix))])
        w = u * (gain * math.sqrt(3.0 / math.prod(shape[1:])))
        if key.endswith("to_disparity.2.weight"):
            w[:1] *= 0.7
            w[1:] *= 3
        return w
    return {key: tensor(key, tuple(shape)) for key, shape in shapes.items()}


def recipe_model(case):
    model = lift.MVSplat(lift.MVSplatConfig(**case["config"])).eval()
    model.load_state_dict(recipe_weights(SHAPES[case["shapes"]], case["salt"]), strict=True)
    return model


def record(model, monkeypatch, images, K, c2w, near, far, index):
    """Everything that the fixtures store of one forward pass."""
    kept, net = {}, model.depth_predictor
    keep = lambda name: lambda module, given, result: kept.update({name: result})
    hooks = [net[name].register_forward_hook(keep(name)) for name in ("upsampler", "refine_unet", "corr_refine_net",
                                                                      "regressor_residual", "to_disparity")]
    match, refine, adapter = model.match, model.refine, lift.gaussian_adapter
    monkeypatch.setattr(model, "match", lambda *a: kept.setdefault("match", match(*a)))
    monkeypatch.setattr(model, "refine", lambda *a: kept.setdefault("refined", refine(*kept.setdefault("refine", a))))

    def kept_adapter(depth, raw, *rest):
        kept.update(depth=depth, raw=raw)
        return kept.setdefault("adapter", adapter(depth, raw, *rest))

    monkeypatch.setattr(lift, "gaussian_adapter", kept_adapter)
    with torch.no_grad():
        g = model(images, K, c2w, near, far, harmonics=True)
    monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    full = lambda x: x.permute(0, 2, 3, 1).flatten(0, 2)[index]
    coarse, certainty = kept["refine"][2:]
    rows, cols = torch.triu_indices(3, 3)
    return {
        "mid.cnn_features": kept["match"][0], "mid.trans_features": kept["match"][1], "mid.cost_volume_raw": kept["match"][2],
        "mid.cost_volume_refined": kept["corr_refine_net"] + kept["regressor_residual"],
        "mid.disp_coarse_low": coarse[:, 0], "mid.pdf_max_low": certainty[:, 0],
        "mid.disp_coarse_full": kept["refined"][1][:, 0],
        "mid.upsampled_features_sub": full(kept["upsampler"]), "mid.refine_out_sub": full(kept["refine_unet"]),
        "mid.delta_disparity": kept["to_disparity"][:, 0], "mid.raw_gaussians_sub": kept["raw"].flatten(0, 2)[index],
        "out.depths": kept["depth"][..., 0], "out.opacities": g.opacities, "out.means": g.means,
        "out.scales": kept["adapter"][1].flatten(0, 2), "out.rotations_xyzw": kept["adapter"][2].flatten(0, 2),
        "out.covariances_triu": g.covariances[:, rows, cols], "out.harmonics_sub": g.features.unflatten(-1, (3, -1))[index]}


def relative_error(a, b, dims):  # the fixtures' metric: |a - b| / (|b| + median |b|), as (max, mean)
    a, b = a.double(), b.double()
    difference, size = ((a - b).flatten(-dims).norm(dim=-1), b.flatten(-dims).norm(dim=-1)) if dims else ((a - b).abs(), b.abs())
    error = difference / (size + size.median())
    return error.max().item(), error.mean().item()


@pytest.mark.parametrize("name", CASES["cases"])
def test_reference_numbers(name, monkeypatch):
    file = HERE / f"{name}.safetensors"
    file = file if file.exists() else SHARED / file.name
    if not file.exists():
        pytest.skip(f"{file} is not here: only two of the three cases are kept in the repository")
    case, stored = CASES["cases"][name], load_file(file)
    model = recipe_model(case)
    assert sum(p.numel() for p in model.parameters()) == case["params"] and len(model.state_dict()) == 471
    image, K, c2w, near, far = (stored[f"in.{key}"] for key in ("image", "intrinsics", "extrinsics", "near", "far"))
    K = K * K.new_tensor([image.shape[-1], image.shape[-2], 1])[:, None]
    found = [record(model, monkeypatch, *inputs, stored["sub.index"].long()) for inputs in zip(image, K, c2w, near, far)]
    expected = {key: value for key, value in stored.items() if key[:4] in ("mid.", "out.")}
    assert found[0].keys() == expected.keys()
    for key, value in expected.items():
        ours = torch.stack([f[key] for f in found])
        assert ours.shape == value.shape, key
        largest, mean = relative_error(ours, value, VECTORS.get(key, 0))
        assert largest <= CASES["tolerance"][key][0] and mean <= CASES["tolerance"][key][1], (key, largest, mean)


# ------------------------------------------------------------------------------------------------ what the call promises


def cameras(views=2, size=(48, 64), dtype=torch.float32):
    H, W = size
    K = torch.tensor([[0.9 * W, 0, 0.52 * W], [0, 1.1 * W, 0.47 * H], [0, 0, 1]], dtype=dtype).expand(views, 3, 3).clone()
    c2w = torch.eye(4, dtype=dtype).expand(views, 4, 4).clone()
    c2w[:, 0, 3] = 0.3 * torch.arange(views)
    c2w[:, :3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.1, 0.2], [0.1, 0, -0.3], [-0.2, 0.3, 0]], dtype=dtype))
    return K, c2w


def pixel_error(gaussians, K, c2w, size):
    """How far, in pixels, the means lie from the centres of the pixels that they belong to: (G,), at most 0.5 in x and y."""
    H, W = size
    points = (gaussians.means.view(len(K), -1, 3) - c2w[:, None, :3, 3]) @ c2w[:, :3, :3] @ K.mT
    rows, cols = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    return (points[..., :2] / points[..., 2:] - torch.stack([cols, rows], -1).flatten(0, 1)).abs().amax(-1).flatten()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return lift.MVSplat(lift.MVSplatConfig(32, 24, 32, 32, 2)).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 64), (50, 70), (33, 47), (5, 9)])
def test_any_size_and_no_gaussian_of_the_padding(small, size):
    K, c2w = cameras(size=size)
    g = small(torch.rand(2, 3, *size), K, c2w, 1.0, 10.0)
    assert len(g.means) == 2 * size[0] * size[1] and g.features is None
    assert pixel_error(g, K, c2w, size).max() <= 0.501  # row-major per view, with the intrinsics of the unpadded image
    assert ((g.opacities >= 0) & (g.opacities <= 1)).all() and torch.linalg.eigvalsh(g.covariances.double()).min() > 0


@torch.no_grad()
def test_padding_only_matters_at_the_border(small):
    """The padded columns repeat the last one; a picture that already had them gives the same Gaussians."""
    images = torch.rand(2, 3, 48, 60)
    K, c2w = cameras(size=(48, 60))
    whole = small(F.pad(images, (0, 4, 0, 0), mode="replicate"), K, c2w, 1.0, 10.0)
    ours, theirs = small(images, K, c2w, 1.0, 10.0).means, whole.means.view(2, 48, 64, 3)[:, :, :60].flatten(0, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_bounds_can_be_per_view_and_limit_the_distance(small):
    K, c2w = cameras()
    near, far = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 9.0])
    g = small(torch.rand(2, 3, 48, 64), K, c2w, near, far)
    distance = (g.means.view(2, -1, 3) - c2w[:, None, :3, 3]).norm(dim=-1)
    assert (distance >= near[:, None] - 1e-4).all() and (distance <= far[:, None] + 1e-3).all()


@torch.no_grad()
def test_autocast_keeps_cameras_exact(small):
    K, c2w = cameras()
    with torch.autocast("cpu", torch.bfloat16):
        g = small(torch.rand(2, 3, 48, 64), K, c2w, 1.0, 10.0, harmonics=True)
    assert g.means.dtype == torch.float32 and pixel_error(g, K, c2w, (48, 64)).max() <= 0.501


@torch.no_grad()
def test_gaussians_move_with_the_world(small):
    """The network sees relative poses alone: another world frame turns means, covariances and colours, nothing else."""
    images, (K, c2w) = torch.rand(2, 3, 48, 64), cameras()
    world = torch.eye(4)
    world[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, 1.0, 0.5], [-1.0, 0, 0.2], [-0.5, -0.2, 0]]))
    world[:3, 3] = torch.tensor([1.0, -2.0, 0.5])
    a, b = (small(images, K, pose, 1.0, 10.0, harmonics=True) for pose in (c2w, world @ c2w))
    torch.testing.assert_close(b.means, a.means @ world[:3, :3].T + world[:3, 3], atol=2e-3, rtol=1e-3)
    camera = torch.tensor([0.1, 0.0, -0.5])
    lift_colours = lambda g, at: lift.spherical_harmonics(F.normalize(g.means - at, dim=-1)[:, [2, 0, 1]], 2)
    evaluate = lambda g, at: (g.features.unflatten(-1, (3, -1)) * lift_colours(g, at)[:, None]).sum(-1)
    torch.testing.assert_close(evaluate(b, world[:3, :3] @ camera + world[:3, 3]), evaluate(a, camera), atol=2e-3, rtol=1e-3)


def test_the_volume_is_the_correlation_along_the_epipolar_line():
    """Against a loop over pixels and candidates that samples the other view by hand, in float64."""
    torch.manual_seed(0)
    features = torch.randn(3, 4, 6, 8, dtype=torch.float64)
    K, c2w = cameras(3, (6, 8), torch.float64)
    disparities = torch.linspace(0.1, 1, 5, dtype=torch.float64).expand(3, 5)
    volume = lift.cost_volume(features, K, c2w, disparities)
    for r, k, y, x in [(0, 0, 0, 0), (0, 4, 3, 5), (1, 2, 5, 7), (2, 3, 2, 2), (1, 4, 1, 6)]:
        total = 0.0
        for s in {0, 1, 2} - {r}:
            pose = torch.linalg.inv(c2w[s]) @ c2w[r]
            ray = torch.linalg.inv(K[r]) @ torch.tensor([x, y, 1.0], dtype=torch.float64)
            u, v, z = K[r] @ (pose[:3, :3] @ ray / disparities[r, k] + pose[:3, 3])
            u, v = u / z, v / z
            for row in (math.floor(v), math.floor(v) + 1):
                for col in (math.floor(u), math.floor(u) + 1):
                    if 0 <= row < 6 and 0 <= col < 8:
                        share = (1 - abs(v - row)) * (1 - abs(u - col))
                        total += share * (features[r, :, y, x] @ features[s, :, row, col]) / 2  # sqrt(C) = 2
        assert volume[r, k, y, x].item() == pytest.approx(float(total) / 2, abs=1e-12)


def test_harmonics_rotate_as_functions_do():
    generator = torch.Generator().manual_seed(1)
    n = F.normalize(torch.randn(40, 3, generator=generator, dtype=torch.float64), dim=1)
    basis = lift.spherical_harmonics(n, 4)
    dense = F.normalize(torch.randn(200_000, 3, generator=generator, dtype=torch.float64), dim=1)
    gram = lift.spherical_harmonics(dense, 4)
    torch.testing.assert_close(4 * math.pi * gram.T @ gram / len(dense), torch.eye(25, dtype=torch.float64), atol=0.05, rtol=0)
    assert basis[:, 1].allclose(math.sqrt(3 / (4 * math.pi)) * n[:, 1])  # degree 1 is (y, z, x)
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.3, 0.9], [0.3, 0, -0.4], [-0.9, 0.4, 0]], dtype=torch.float64))
    raw = torch.randn(1, 1, 1, 75, generator=generator, dtype=torch.float64)
    damp = torch.tensor([1.0] + [0.1 * 0.25**l for l in range(1, 5) for _ in range(2 * l + 1)], dtype=torch.float64)
    world = lift.rotate_harmonics(raw, pose[None]).view(3, 25)
    about_y = lambda d: lift.spherical_harmonics(d[:, [2, 0, 1]], 4)
    torch.testing.assert_close(about_y(n @ pose[:3, :3].T) @ world.T, about_y(n) @ (damp * raw.view(3, 25)).T, atol=1e-12, rtol=0)


def test_view_colours_follow_3dgs():
    """Degree 1 of 3DGS is 0.4886 (-y, z, -x); with the constant term alone a colour does not depend on the view."""
    means = torch.tensor([[0.0, 0.0, 2.0], [1.0, 2.0, 2.0]])
    features = torch.zeros(2, 3, 4)
    features[..., 0] = 1.0
    g = lift.Gaussians(means, torch.eye(3).expand(2, 3, 3), torch.ones(2), features.flatten(1))
    torch.testing.assert_close(lift.view_colours(g, torch.zeros(3)), torch.full((2, 3), 0.5 + 0.28209479))
    features[:, 0, 1:] = torch.tensor([0.1, 0.2, 0.3])
    d = F.normalize(means, dim=1)
    red = 0.5 + 0.28209479 + 0.48860251 * (-0.1 * d[:, 1] + 0.2 * d[:, 2] - 0.3 * d[:, 0])
    torch.testing.assert_close(lift.view_colours(g._replace(features=features.flatten(1)), torch.zeros(3))[:, 0], red)


# ------------------------------------------------------------------------------------------------ checkpoints


def lightning(state, path, **more):
    torch.save({"epoch": 3, "global_step": 300_000, "state_dict": {f"encoder.{k}": v for k, v in state.items()}, **more}, path)
    return path


def test_the_official_layout_loads(tmp_path, small):
    state = small.state_dict()
    more = {"optimizer_states": [{"state": {0: torch.zeros(3)}}], "callbacks": {}, "hyper_parameters": {"lr": 2e-4}}
    loaded = lift.load_mvsplat(lightning(state, tmp_path / "re10k.ckpt", **more))
    assert loaded.config == small.config and not loaded.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    lift.save_tensors(tmp_path / "re10k.safetensors", {k: v.half() for k, v in state.items()})
    assert lift.load_mvsplat(tmp_path / "re10k.safetensors").config == small.config


def broken(state, how):
    key = "depth_predictor.to_disparity.0.bias"
    if how == "missing":
        return {k: v for k, v in state.items() if k != key}, f"{key} is missing"
    if how == "extra":
        return {**state, "depth_predictor.third_head.bias": torch.zeros(2)}, "depth_predictor.third_head.bias"
    return {**state, key: torch.zeros(7)}, rf"{key} is \(7,\)"


@pytest.mark.parametrize("how", ["missing", "extra", "shape"])
def test_a_wrong_key_is_named(tmp_path, small, how):
    state, said = broken(small.state_dict(), how)
    with pytest.raises(ValueError, match=said) as error:
        lift.load_mvsplat(lightning(state, tmp_path / "re10k.ckpt"))
    assert "re10k.ckpt" in str(error.value) and "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such weights"):
        lift.load_mvsplat(tmp_path / "re10k.ckpt")
    with pytest.raises(ValueError, match="no MVSplat"):
        lift.load_mvsplat(lightning({"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "resnet.ckpt"))
    with pytest.raises(ValueError, match="no MVSplat"):
        lift.load_mvsplat(lift.WEIGHTS / "vit.safetensors")


# ------------------------------------------------------------------------------------------------ the built-in weights


@torch.no_grad()
def test_tiny_is_better_than_the_sweep_on_rooms_it_has_not_seen(tmp_path):
    """Depth of the context views, and the target view: all pixels that a context view sees, uncovered ones black."""
    model, errors, psnr = lift.load_mvsplat("tiny"), {"mvsplat": [], "sweep": []}, {"mvsplat": [], "sweep": []}
    assert model.config == lift.MVSplatConfig.tiny
    data.make_rooms(tmp_path / "data", scenes=4, views=8, seed=1)  # the weights were trained on rooms of seed 0
    for n, scene in enumerate(data.load_scenes(tmp_path / "data")):
        views = [scene.view(i) for i in data.sample_triplet(scene, torch.Generator().manual_seed(n))]
        images, K, c2w, depth = (torch.stack([getattr(v, key) for v in views]) for key in ("image", "K", "c2w", "depth"))
        context = images[:2], K[:2], c2w[:2], *scene.depth_range
        w2c, size = torch.linalg.inv(c2w), depth.shape[1:]
        seen = sum(lift.cross_check(depth[2], depth[v], K[2], K[v], w2c[v] @ c2w[2]) for v in (0, 1)) > 0.5
        for name, g in (("mvsplat", lift.mvsplat_gaussians(model, *context)), ("sweep", lift.sweep_gaussians(*context))):
            errors[name].append(((lift.view_depth(g, c2w[:2], *size) - depth[:2]).abs() / depth[:2]).mean())
            colours = images[:2].permute(0, 2, 3, 1).reshape(-1, 3)
            render = splat.rasterize(g.means, g.covariances, g.opacities, colours, w2c[2], K[2], *size)
            image = render.features / render.alpha.clamp_min(1e-6)[..., None] * (render.alpha >= 0.5)[..., None]
            psnr[name].append(-10 * (image - images[2].permute(1, 2, 0))[seen].square().mean().log10())
    mean = lambda values: torch.stack(values).mean().item()
    assert mean(errors["mvsplat"]) < 0.6 * mean(errors["sweep"]) and mean(psnr["mvsplat"]) > mean(psnr["sweep"]) + 3
