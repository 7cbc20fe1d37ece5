"""The splat operator of 03_splat against its definition, the dense path: render everything, divide, blend, bring to the grid."""

import importlib

import pytest
import torch

lift, splat = importlib.import_module("02_lift"), importlib.import_module("03_splat")
reference = importlib.import_module("reference_raster")


def patchwork(height, width, seed, pieces=5):
    """Instance ids (H, W): Voronoi cells, of which one is unlabelled and one has a huge id, and a sprinkling of stray pixels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(pieces, 2, generator=g) * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(-1)
    stray = torch.rand(height, width, generator=g) < 0.05
    mask[stray] = torch.randint(0, 4 * pieces, (int(stray.sum()),), generator=g)
    return mask.where(mask != 1, 2**40)


def scene(height, width, grid, context=None, dtype=torch.float64, masks=True, holes=True):
    """Arguments of splat_operator: two views' Gaussians, thinned out, with a hole; `context` is the grid of their tokens."""
    *gaussians, _, w2c, K = (x.to(dtype) for x in reference.pixel_aligned(height, width, 1))
    if holes:
        g = torch.Generator().manual_seed(7)
        gaussians[2] = gaussians[2] * (torch.rand(len(gaussians[2]), generator=g) < 0.25) * (gaussians[0][:, 0] < 1)
    context = context or grid
    pairs = [lift.upscale_weights(patchwork(height, width, seed), context) for seed in (1, 2)]
    N = context[0] * context[1]
    index, weight = torch.cat([pairs[0][0], pairs[1][0] + N]), torch.cat([weight for _, weight in pairs]).to(dtype)
    mask = patchwork(height, width, 3) if masks else None
    return dict(zip(("means", "covariances", "opacities"), gaussians), index=index, weight=weight, tokens=2 * N,
                w2c=w2c, K=K, height=height, width=width, grid=grid, mask=mask)  # fmt: skip


def dense(x, means, covariances, opacities, index, weight, tokens, w2c, K, height, width, grid, mask=None, alpha=0.5, downscale="bilinear"):
    """The definition, as 04_distill.splat_features has it."""
    features = (weight[..., None] * x[index]).sum(1)  # SnD Eq. 2
    render = splat.rasterize(means, covariances, opacities, features, w2c, K, height, width)
    valid = render.alpha >= splat.COVERED
    features = render.features / render.alpha.clamp_min(1e-6)[..., None]
    if mask is not None:
        features = splat.semantic_blend(features, mask, alpha, valid)
    return splat.splat_to_tokens(features, valid, grid, downscale)


def context_tokens(s, C=3):
    return torch.randn(s["tokens"], C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(s["weight"].dtype)


def assert_same(s, tolerance, **more):
    x, operator = context_tokens(s), splat.splat_operator(**s, **more)
    y, valid = dense(x, **s, **{k: v for k, v in more.items() if k in ("alpha", "downscale")})
    assert torch.equal(operator.valid, valid)
    assert operator(x).dtype == y.dtype and (operator(x) - y).abs().max() <= tolerance
    return operator


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("height, width, patch", [(56, 70, 14), (61, 83, 8), (64, 48, 16), (23, 41, 14)])
@pytest.mark.parametrize("masks", [False, True])
def test_the_operator_is_the_dense_path(height, width, patch, masks, dtype, tolerance):
    s = scene(height, width, (height // patch, width // patch), dtype=dtype, masks=masks)
    operator = assert_same(s, tolerance)
    assert (len(operator.L.values()) > 0) == masks
    assert operator.valid.any() and (not operator.valid.all() or patch > 8)  # the scene has holes
    row = operator(torch.ones(s["tokens"], 1, dtype=dtype))[:, 0]
    assert torch.allclose(row, operator.valid.to(dtype), atol=2e-6)  # the weights of a valid token sum to 1


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_of_the_blend(alpha):
    assert_same(scene(48, 64, (6, 8)), 1e-10, alpha=alpha)


@pytest.mark.parametrize("height, width, grid", [(56, 70, (4, 5)), (61, 83, (7, 10)), (9, 1, (3, 1)), (6, 9, (13, 20))])
def test_tokens_can_be_means_over_their_patches(height, width, grid):
    for masks in (False, True):
        assert_same(scene(height, width, grid, masks=masks, holes=height > 9), 1e-10, downscale="area")


def test_the_mean_over_a_patch_is_average_pooling():
    features = torch.randn(24, 40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, valid = splat.splat_to_tokens(features, torch.ones(24, 40, dtype=torch.bool), (3, 5), "area")
    wanted = torch.nn.functional.avg_pool2d(features.permute(2, 0, 1)[None], 8)[0].flatten(1).T
    assert valid.all() and (y - wanted).abs().max() < 1e-12
    index, weight = splat.area_taps(10, 4)  # patches of 2.5 pixels
    assert index.tolist() == [[0, 1, 2], [2, 3, 4], [5, 6, 7], [7, 8, 9]]
    assert torch.allclose(weight * 2.5, torch.tensor([[1, 1, 0.5], [0.5, 1, 1], [1, 1, 0.5], [0.5, 1, 1]], dtype=torch.float64))


@pytest.mark.parametrize("max_elements", [1, 2000, 2**16])
def test_memory_bound_changes_nothing(max_elements):
    assert_same(scene(31, 45, (4, 6)), 1e-10, max_elements=max_elements)


@pytest.mark.parametrize(
    "height, width, grid, context",
    [(40, 56, (5, 7), (3, 9)), (17, 9, (17, 9), (4, 2)), (6, 9, (13, 20), (2, 3)), (9, 1, (3, 1), (3, 1)), (1, 1, (1, 1), (1, 1))],
    ids=["other context grid", "a token a pixel", "more tokens than pixels", "one column", "one pixel"],
)
def test_grids(height, width, grid, context):
    assert_same(scene(height, width, grid, context, holes=False), 1e-10)


def test_masks_that_are_all_one_all_different_or_unlabelled():
    s = scene(32, 40, (4, 5))
    one_a_pixel = torch.arange(-600, 680).view(32, 40)
    for mask in (torch.full((32, 40), 9), one_a_pixel, torch.zeros(32, 40, dtype=torch.int64)):
        assert_same({**s, "mask": mask}, 1e-10)


def test_dropped_pixels_have_weight_0():
    s = scene(32, 40, (4, 5))
    weight = s["weight"] * (torch.arange(len(s["weight"])) % 3 > 0)[:, None]
    assert_same({**s, "weight": weight, "opacities": s["opacities"] * weight.sum(1)}, 1e-10)
    assert_same({**s, "weight": weight}, 1e-10)  # even where they still hide what is behind them


@pytest.mark.parametrize("masks", [False, True])
def test_empty_views(masks):
    s = scene(24, 32, (3, 4), masks=masks)
    behind = s["means"] - 100 * s["w2c"][2, :3]
    none = {name: s[name][:0] for name in ("means", "covariances", "opacities", "index", "weight")}
    for empty in (dict(means=behind), dict(opacities=0 * s["opacities"]), none):
        operator = assert_same({**s, **empty}, 0.0)
        assert not operator.valid.any() and not operator(context_tokens(s)).any()


def test_gradient_of_the_tokens():
    s = scene(40, 56, (5, 7))
    x, g = context_tokens(s).requires_grad_(), torch.randn(35, 3, dtype=torch.float64)
    s["means"].requires_grad_()  # is ignored: geometry is frozen
    operator = splat.splat_operator(**s)
    (found,), (wanted,) = (torch.autograd.grad(y, x, g) for y in (operator(x), dense(x, **s)[0]))
    assert (found - wanted).abs().max() < 1e-10 and wanted.abs().max() > 0.1


def test_autocast_changes_nothing():
    s = scene(40, 56, (5, 7), dtype=torch.float32)
    x, plain = context_tokens(s), splat.splat_operator(**s)
    with torch.autocast("cpu", torch.bfloat16):
        operator = splat.splat_operator(**s)
        y = operator(x)
    assert torch.equal(y, plain(x)) and torch.equal(operator.valid, plain.valid)


def test_without_masks_only_the_taps_are_rasterised(monkeypatch):
    pixels, walk = [], splat.walk
    monkeypatch.setattr(splat, "walk", lambda t, band, lattice, m: pixels.append(band.centre.shape[1] * lattice.shape[0] * lattice.shape[1])
                        or walk(t, band, lattice, m))  # fmt: skip
    s = scene(56, 70, (4, 5), masks=False)
    splat.splat_operator(**s)
    splat.splat_operator(**{**s, "mask": torch.zeros(56, 70, dtype=torch.int64)})  # nothing labelled, nothing blended
    assert sum(pixels) == 2 * 4 * 20
    splat.splat_operator(**{**s, "mask": torch.ones(56, 70, dtype=torch.int64)})
    assert sum(pixels) >= 3 * 4 * 20 + 56 * 70


def test_files(tmp_path):
    s = scene(61, 83, (7, 10), dtype=torch.float32)
    x, operator, path = context_tokens(s, 16), splat.splat_operator(**s), tmp_path / "deep" / "operator.safetensors"
    operator.save(path, torch.float32)
    loaded = splat.SplatOperator.load(path)
    assert torch.equal(loaded(x), operator(x)) and torch.equal(loaded.valid, operator.valid)
    operator.save(path)  # over the old one, in float16
    loaded, weights = splat.SplatOperator.load(path), sum(len(matrix.values()) for matrix in operator[:3])
    assert 0 < (loaded(x) - operator(x)).norm() / operator(x).norm() < 5e-4 and torch.equal(loaded.valid, operator.valid)
    assert path.stat().st_size <= 4 * weights + 2000 and [p.name for p in path.parent.iterdir()] == [path.name]
    double = splat.splat_operator(**scene(24, 32, (3, 4)))
    double.save(path, torch.float64)
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(splat.SplatOperator.load(path), double))


def test_more_tokens_than_two_bytes_can_count(tmp_path):
    s = scene(24, 32, (3, 4))
    wide = splat.splat_operator(**{**s, "index": s["index"] + 70_000, "tokens": s["tokens"] + 70_000})
    wide.save(tmp_path / "o", torch.float64)
    x = context_tokens(s)
    assert torch.equal(splat.SplatOperator.load(tmp_path / "o")(torch.cat([x.new_zeros(70_000, 3), x])), splat.splat_operator(**s)(x))


def test_files_of_others_are_refused_and_a_failed_write_leaves_the_old(tmp_path, monkeypatch):
    path, operator = tmp_path / "operator.safetensors", splat.splat_operator(**scene(24, 32, (3, 4), dtype=torch.float32))
    operator.save(path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(splat.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            operator.save(path)
    assert path.read_bytes() == whole
    damaged = {"cut": whole[:-9], "other": splat.save({"a": torch.zeros(1)}), "older": whole.replace(b"operator 1", b"operator 0")}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: .*remove it"):
            splat.SplatOperator.load(tmp_path / name)


def test_wrong_shapes_are_named():
    s = scene(24, 32, (3, 4))
    for wrong, message in ((dict(mask=s["mask"].T), "mask must be"), (dict(weight=s["weight"][:9]), "index and weight"), (dict(weight=s["weight"].half()), "float32")):
        with pytest.raises(AssertionError, match=message):
            splat.splat_operator(**{**s, **wrong})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    s = scene(61, 83, (7, 10), dtype=torch.float32)
    x, operator = context_tokens(s), splat.splat_operator(**s)
    there = splat.splat_operator(**{name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in s.items()})
    assert (there(x.cuda()).cpu() - operator(x)).abs().max() < 1e-5 and torch.equal(there.valid.cpu(), operator.valid)
    assert (operator.to("cuda")(x.cuda()).cpu() - operator(x)).abs().max() < 1e-5
