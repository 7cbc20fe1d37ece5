"""03_splat: the fast rasteriser against its definition and recorded renders, blend and tokens against plain loops, the
operator against its definition, and the scenes that break rasterisers."""

import dataclasses
import importlib
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

data, lift, splat = (importlib.import_module(name) for name in ("01_data", "02_lift", "03_splat"))
reference = importlib.import_module("reference_raster")

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"
EYE_K = torch.tensor([[10.0, 0, 2.5], [0, 10, 2.5], [0, 0, 1]])
rotation = reference.rotation


def covariance(quats, scales):
    R = rotation(quats)
    return R @ torch.diag_embed(scales**2) @ R.mT


def scene(G, C, seed=0, dtype=torch.float64, height=24, width=30):
    """Gaussians mostly before, some beside and behind a camera that is turned and off the origin; K has a skew."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    means = rand(G, 3) * torch.tensor([1.2, 0.9, 1.5]) + torch.tensor([0.0, 0, 3.0])
    cov = covariance(rand(G, 4), 0.25 * rand(G, 3).exp().clamp(max=4))
    opacities = (rand(G) + 0.5).sigmoid()
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3, :3] = rotation(torch.tensor([[1, 0.05, -0.08, 0.03]]).double())[0]
    w2c[:3, 3] = torch.tensor([0.1, -0.2, 0.3])
    K = torch.tensor([[width * 0.8, 0.3, width * 0.48], [0, width * 0.9, height * 0.55], [0, 0, 1]]).double()
    return [x.to(dtype) for x in (means, cov, opacities, rand(G, C), w2c, K)]


def error(a, b):
    return max((x - y).detach().abs().max().item() if x.numel() else 0.0 for x, y in zip(a, b))


def gradients(render, inputs, height, width, background=None, **options):
    """A render, and the gradients of a random sum of all of it by every input that has any."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in (*inputs, background)]
    r = render(*inputs[:-1], height, width, inputs[-1], **options)
    g = torch.Generator().manual_seed(1)
    sum((torch.randn(x.shape, generator=g).to(x) * x).sum() for x in r).backward()
    return r, [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x is not None]


def assert_plain(inputs, height, width, background=None, tolerance=1e-12, gradients_of=7, **options):
    """rasterize equals its definition: values to the tolerance, gradients to that part of their length."""
    (ours, grads), (truth, expected) = (
        gradients(render, inputs, height, width, background, **more)
        for render, more in ((splat.rasterize, options), (splat.rasterize_plainly, {})))
    assert [x.shape for x in ours] == [x.shape for x in truth] and error(ours, truth) < tolerance
    for a, b in zip(grads[:gradients_of], expected):
        assert (a - b).norm() <= tolerance * max(1.0, float(b.norm()))
    return truth, expected


# ------------------------------------------------------------------- rasterize: recorded renders


@pytest.mark.parametrize("render", [splat.rasterize, splat.rasterize_plainly], ids=["fast", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["random_cloud_c3", "opaque_c16", "edges_c1", "garden_crop_c3"])
def test_fixture(name, dtype, render):
    home = SHARED if name in ("garden_crop_c3", "opaque_c16") else HERE
    path = home / "fixtures" / "raster" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here: third-party data, or too large for this repository")
    f = load_file(path)
    leaf = {k: f[k].to(dtype).requires_grad_() for k in ("means", "opacities", "features")}
    leaf |= {k: f[k].double().requires_grad_() for k in ("quats", "scales")}
    cov = covariance(leaf["quats"], leaf["scales"])  # float64: rounded to float32 a needle is another needle
    size = int(f["height"]), int(f["width"])
    if render is splat.rasterize_plainly and (dtype == torch.float32 or len(f["means"]) > 1000):
        pytest.skip("the plain one is slow, and in float64 whatever it is given")
    r = render(leaf["means"], cov, leaf["opacities"], leaf["features"], f["viewmat"], f["K"], *size)
    assert r.features.dtype == r.depth.dtype == dtype
    robust = f["robust"].bool()
    # The fixtures are stored in float32.
    tight, tight_gradient = (1e-5, 2e-5) if dtype == torch.float32 else (3e-7, 2e-7)
    assert robust.float().mean() > 0.97
    for ours, theirs in zip(r, (f["out_features"], f["out_alpha"], f["out_depth"])):
        assert (ours - theirs)[robust].abs().max() < tight * max(1, theirs.abs().max())
        assert (ours - theirs).abs().max() < 2e-2
    depth_sum = r.depth * r.alpha
    outputs = {"features": r.features, "alpha": r.alpha, "depth_acc": depth_sum}
    loss = sum((f["cot_" + name] * x).sum() for name, x in outputs.items())
    loss.backward()
    for k, x in leaf.items():
        assert (x.grad - f["grad_" + k]).norm() < tight_gradient * f["grad_" + k].norm(), k


# --------------------------------------------------------------------- rasterize: its definition


SIZES = {  # Gaussians, channels, height, width
    "one pixel": (60, 1, 1, 1), "one block": (80, 3, 8, 8), "odd sizes": (150, 5, 13, 41),
    "many blocks": (300, 2, 33, 17), "many channels": (40, splat.FEW_CHANNELS + 36, 9, 10),
    "no channels": (30, 0, 5, 9), "one Gaussian": (1, 2, 9, 9), "none": (0, 2, 9, 9),
    "none, many channels": (0, splat.FEW_CHANNELS + 1, 9, 9)}


def compose_as_a_gpu_does(monkeypatch):
    """In make_step and slopes: here, what is done at once on a GPU takes the place of what a CPU does in turn."""
    monkeypatch.setattr(splat, "front_to_back_in_turn", splat.front_to_back)
    monkeypatch.setattr(splat, "slopes_in_turn", splat.slopes_at_once)


@pytest.mark.parametrize("gpu", [False, True], ids=["in turn", "at once"])
@pytest.mark.parametrize("case", SIZES)
def test_rasterize_is_its_definition(case, gpu, monkeypatch):
    if gpu:
        compose_as_a_gpu_does(monkeypatch)
    G, C, height, width = SIZES[case]
    inputs = scene(G, C, seed=G, height=height, width=width)
    truth, grads = assert_plain(inputs, height, width, torch.linspace(-1, 1, C).double())
    assert G < 2 or truth.alpha.max() > 0.3 and all(g.norm() > 0 for g in grads if g.numel())
    single = splat.rasterize(*[x.float() for x in inputs], height, width, torch.linspace(-1, 1, C))
    assert single.features.dtype == torch.float32 and error(single, truth) < 5e-4  # the inputs are rounded too


@pytest.mark.parametrize("max_elements", [1, 3000, 40_000, 10**9])
@pytest.mark.parametrize("C", [3, splat.FEW_CHANNELS + 6])
def test_memory_bound_changes_nothing(max_elements, C):
    assert_plain(scene(200, C, seed=2, height=40, width=37), 40, 37, max_elements=max_elements)


def test_holes_and_what_hides_them():
    inputs = scene(120, 2, seed=4, height=30, width=34)
    inputs[1] *= 0.05
    inputs[2][inputs[0][:, 0] > 0] = 0  # the right half is empty
    truth, _ = assert_plain(inputs, 30, 34)
    assert (truth.alpha == 0).float().mean() > 0.2 and truth.alpha.max() > 0.5
    inputs[2][:] = 1.0  # and every Gaussian is clamped at its middle
    assert_plain(inputs, 30, 34)


@pytest.mark.parametrize("scales", [(3.0, 0.004, 0.004), (1.0, 1.0, 0.004)], ids=["needles", "discs"])
def test_float32_gradients_of_what_crosses_the_view(scales):
    # Seen from a far block, the squares of the distance to the mean are 10^5 times what is left of their differences.
    means, _, opacities, features, w2c, K = scene(400, 3, seed=3, height=200, width=240)
    quats = torch.randn(400, 4, generator=torch.Generator().manual_seed(5)).double()
    gaussians = means, covariance(quats, torch.tensor(scales).double().expand(400, 3)), 0.3 * opacities
    (_, truth), (_, single) = (gradients(splat.rasterize, [*gaussians, f, w2c, K], 200, 240)
                               for f in (features, features.float()))
    for ours, expected in zip(single[:4], truth):
        assert expected.norm() > 0 and (ours - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("C", [3, splat.FEW_CHANNELS + 6])
def test_frozen_inputs_get_no_gradient(C):
    *geometry, features, w2c, K = scene(150, C, seed=9)
    features.requires_grad_()
    found, expected = (torch.autograd.grad(render(*geometry, features, w2c, K, 24, 30).features.sum(), features)[0]
                       for render in (splat.rasterize, splat.rasterize_plainly))
    assert expected.norm() > 0 and error([found], [expected]) < 1e-12 and geometry[0].grad is None


# --------------------------------------------------------------- rasterize: what must not matter


def test_autocast_changes_nothing():
    inputs, s = scene(200, 4, seed=8, dtype=torch.float32), lifted(40, 56, (5, 7), dtype=torch.float32)
    plain = gradients(splat.rasterize, inputs, 24, 30), splat.splat_operator(**s)(context_tokens(s))
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(splat.rasterize, inputs, 24, 30), splat.splat_operator(**s)(context_tokens(s))
    assert error(plain[0][0], cast[0][0]) == error(plain[0][1], cast[0][1]) == error(plain[1:], cast[1:]) == 0


def test_memory_bound_bounds_the_steps():
    *gaussians, _, w2c, K = scene(3000, 1, seed=2, height=64, width=64)
    table, z, box = splat.project_in_parts(*gaussians, w2c, K, 64, 64, torch.float64, 32_000)
    lists = splat.BlockLists(box, z, splat.whole_view(64, 64, "cpu"), 64, 64, 5000, 10**9)
    tops, bottoms = zip(*lists.bands)
    assert len(tops) > 2 and tops == (0, *bottoms[:-1]) and bottoms[-1] == 8
    assert splat.bands_of([1] * 8, 8, 10**9, 16) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for band in lists:
        steps = [s.weight.numel() for s in splat.walk(table, band, splat.BLOCK, 3 * splat.CHUNK * 64)]
        assert len(steps) > 4 and max(steps) == 3 * splat.CHUNK * 64
        assert band.lengths.sum() == len(band.gaussian) - 1 and (band.lengths.sum() <= 5000 or len(band.lengths) == 8)


def test_end_of_a_list_next_to_a_far_one():
    # What pads the list of the last block of a row comes from the other end of the view, where its polynomial is huge.
    K = torch.tensor([[100.0, 0, 1500], [0, 100, 8], [0, 0, 1]])
    means = torch.tensor([[14.9, -0.04, 1], [-14.9, 0.04, 1]])
    inputs = means, torch.zeros(2, 3, 3), torch.tensor([0.5, 0.9]), torch.eye(2), torch.eye(4), K
    assert error(splat.rasterize(*inputs, 16, 3000), splat.rasterize_plainly(*inputs, 16, 3000)) < 1e-5


def test_pixel_aligned_scene_against_float64():
    *inputs, w2c, K = reference.pixel_aligned(73, 110, 3)
    truth = splat.rasterize(*[x.double() for x in (*inputs, w2c, K)], 73, 110)
    assert error(splat.rasterize(*inputs, w2c, K, 73, 110), truth) < 1e-5
    assert truth.alpha.min() > 0.5
    torch.set_default_dtype(torch.float64)
    try:
        doubles = [x.double() for x in (*inputs, w2c, K)]
        assert error([truth.features], [reference.textbook(*doubles, 73, 110)]) < 1e-12
        assert error([truth.features], [reference.standard(*doubles, 73, 110)]) < 1e-5  # its weights are float32
    finally:
        torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------- rasterize: edge cases


def one(mean, cov, opacity=0.8, dtype=torch.float64):
    return [torch.tensor([mean], dtype=dtype), cov.to(dtype)[None], torch.tensor([opacity], dtype=dtype),
            torch.ones(1, 2, dtype=dtype)]


def needle(length):
    axis = torch.tensor([1.0, 1, 0.2]).double()
    return length**2 * axis[:, None] * axis


EDGES = {
    "none": [torch.zeros(0, 3), torch.zeros(0, 3, 3), torch.zeros(0), torch.zeros(0, 2)],
    "one": one([0, 0, 2.0], 0.01 * torch.eye(3)),
    "behind": one([0, 0, -2.0], torch.eye(3)),
    "at the camera": one([0, 0, 0.0], torch.eye(3)),
    "at the near plane": one([0.001, 0, 0.01], torch.eye(3)),
    "just past the near plane": one([0.001, 0, 0.010001], 1e-4 * torch.eye(3)),
    "near plane, far aside": one([1.5, -1, 0.0101], torch.eye(3)),
    "outside the view": one([100.0, 0, 1], 0.01 * torch.eye(3)),
    "point": one([0.01, 0, 2.0], torch.zeros(3, 3)),
    "needle": one([0, 0, 2.0], needle(0.5)),
    "long needle": one([3.0, 3, 2.0], needle(1e4)),
    "needle to the eye": one([0, 0, 2.0], torch.diag(torch.tensor([0, 0, 1e6]))),
    "huge": one([0, 0, 2.0], 1e12 * torch.eye(3)),
    "negative": one([0, 0, 2.0], torch.diag(torch.tensor([1.0, -1, 1]))),
    "indefinite": one([0, 0, 2.0], torch.tensor([[1.0, 2, 0], [2, 1, 0], [0, 0, 1]])),
    "opacity 0": one([0, 0, 2.0], torch.eye(3), 0.0),
    "opacity 1": one([0, 0, 2.0], torch.eye(3), 1.0),
    "opacity 1/256": one([0, 0, 2.0], torch.eye(3), 1 / 256),
    "equal depths": [torch.tensor([[0.0, 0, 2]] * 2), torch.eye(3).repeat(2, 1, 1), torch.tensor([0.5, 0.9]),
                     torch.eye(2)],
}


UNSEEN = {"none", "behind", "at the camera", "at the near plane", "outside the view", "opacity 0", "opacity 1/256"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, dtype):
    inputs = [x.to(dtype) for x in (*EDGES[name], torch.eye(4), EYE_K)]
    r, grads = gradients(splat.rasterize, inputs, 5, 5)
    assert all(x.isfinite().all() for x in (*r, *grads))
    if name in UNSEEN:
        assert not any(x.any() for x in (*r, *grads))
    else:
        assert r.alpha.max() > 0.003 and grads[3].abs().max() > 0
    if name == "equal depths":
        assert abs(r.features[2, 2, 0] - 0.5) < 1e-3  # they keep their order
    if name not in ("negative", "indefinite"):
        assert error(r, splat.rasterize_plainly(*inputs, 5, 5)) < (2e-5 if dtype == torch.float32 else 1e-6)


def test_gaussians_that_are_not_numbers_are_not_seen():
    means, cov, opacities, features, w2c, K = scene(40, 2)
    expected = splat.rasterize(means, cov, opacities, features, w2c, K, 24, 30)
    more = (means, math.nan), (cov, 1.0), (opacities, 0.5), (features, 1.0)
    bad = [torch.cat([x, torch.full_like(x[:3], value)]) for x, value in more]
    bad[0][-2:] = torch.tensor([0.0, 0, 3])
    bad[1][-2], bad[2][-1] = math.nan, math.nan
    assert error(splat.rasterize(*bad, w2c, K, 24, 30), expected) == 0


def test_stop_comes_before_the_gaussian_that_ends_the_light():
    # The light falls to 0.01 and 0.0002. The third layer would leave 0.00008: it and the one behind it do not count.
    means = torch.tensor([[0.0, 0, 2], [0, 0, 3], [0, 0, 4], [0, 0, 5]]).double()
    opacities = torch.tensor([1.0, 0.98, 0.6, 0.1]).double()
    gaussians = means, 1e6 * torch.eye(3).double().repeat(4, 1, 1), opacities, torch.eye(4).double()
    for render in (splat.rasterize, splat.rasterize_plainly):
        r, grads = gradients(render, [*gaussians, torch.eye(4), EYE_K], 5, 5)
        assert error([r.features[2, 2]], [torch.tensor([0.99, 0.0098, 0, 0]).double()]) < 1e-8
        assert not any(g[2:].any() for g in grads[:4])


def test_a_crowd_in_one_pixel_needs_many_chunks():
    G = 5 * splat.CHUNK + 3
    means = torch.cat([torch.zeros(G, 2), torch.linspace(2, 3, G)[:, None]], 1).double()
    inputs = [means, 1e-6 * torch.eye(3).double().repeat(G, 1, 1), torch.full((G,), 0.02).double(),
              torch.rand(G, 2).double()]
    assert_plain([*inputs, torch.eye(4).double(), EYE_K.double()], 5, 5)


# ------------------------------------------------------------------------------ blend and tokens


def blend_loop(features, mask, blend, valid):
    """SnD Eq. 4, pixel by pixel."""
    out = features.clone()
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            mates = features[(mask == mask[y, x]) & valid]
            if mask[y, x] != 0 and len(mates):
                out[y, x] = blend * features[y, x] + (1 - blend) * mates.mean(0)
    return out


MASKS = {  # a mask (9, 13) of random ids 0 to 4 -> another, by what is hard about it
    "random": lambda mask: mask, "one id": lambda mask: torch.full_like(mask, 3), "unlabelled": torch.zeros_like,
    "single pixels": lambda mask: torch.arange(1, 118).view(9, 13),
    "huge ids": lambda mask: torch.tensor([0, 2**62, -7, 1, 10**12])[mask], "one pixel": lambda mask: mask[4:5, 6:7]}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("blend", [0.5, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("share", [0.6, 0.0, 1.1])
def test_semantic_blend(case, blend, share):
    g = torch.Generator().manual_seed(0)
    mask = MASKS[case](torch.randint(0, 5, (9, 13), generator=g))
    features, valid = torch.randn(*mask.shape, 5, generator=g).double(), torch.rand(mask.shape, generator=g) < share
    blended = splat.semantic_blend(features, mask, blend, None if share > 1 else valid)
    assert error([blended], [blend_loop(features, mask, blend, valid)]) < 1e-13


def test_semantic_blend_keeps_holes_out_and_gradients_in():
    features = torch.ones(300, 300, 2)
    features[0, 0] = math.nan
    features[..., 1] *= 1.1
    features.requires_grad_()
    valid = torch.ones(300, 300, dtype=torch.bool)
    valid[0, 0] = False
    out = splat.semantic_blend(features, torch.ones(300, 300, dtype=torch.long), 0.25, valid)
    assert out[0, 0].isnan().all() and (out.flatten(0, 1)[1:] - torch.tensor([1, 1.1])).abs().max() < 2e-7
    out[5, 5].sum().backward()
    mean = 0.75 / (300 * 300 - 1)
    assert abs(float(features.grad[7, 7, 0]) - mean) < 1e-10 and abs(float(features.grad[5, 5, 0]) - 0.25 - mean) < 1e-6
    assert not features.grad[0, 0].any()


@pytest.mark.parametrize("H, W, h, w", [(16, 24, 4, 6), (15, 22, 5, 7), (58, 87, 4, 6), (3, 2, 3, 2), (1, 1, 1, 1),
                                        (3, 4, 7, 5), (14, 7, 2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
def test_splat_to_tokens(H, W, h, w, share):
    g = torch.Generator().manual_seed(H * W)
    features, valid = torch.randn(H, W, 3, generator=g).double(), torch.rand(H, W, generator=g) < share
    resize = lambda x: F.interpolate(x.permute(2, 0, 1)[None], (h, w), mode="bilinear",
                                                       align_corners=False)[0].flatten(1).T
    weight = resize(valid[..., None].double())  # of the valid ones among the 2x2 pixels of each token
    expected = resize(features * valid[..., None]) / weight
    tokens, found = splat.splat_to_tokens(features.where(valid[..., None], math.nan), valid, (h, w))
    assert torch.equal(found, weight[:, 0] >= 0.5 - 1e-9) and not tokens[~found].any()
    assert error([tokens[found]], [expected[found]]) < 1e-8


# ---------------------------------------------------------------------------------- the operator


def patchwork(height, width, seed, pieces=5):
    """Instance ids (H, W): Voronoi cells, one of them unlabelled and one with a huge id, and some stray pixels."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.rand(pieces, 2, generator=g) * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    mask = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(-1)
    stray = torch.rand(height, width, generator=g) < 0.05
    mask[stray] = torch.randint(0, 4 * pieces, (int(stray.sum()),), generator=g)
    return mask.where(mask != 1, 2**40)


def lifted(height, width, grid, context=None, dtype=torch.float64, masks=True, holes=True):
    """Arguments of splat_operator: two views' Gaussians, thinned, with a hole; `context` is the grid of tokens."""
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


def context_tokens(s, C=3):
    return torch.randn(s["tokens"], C, generator=torch.Generator().manual_seed(0),
                       dtype=torch.float64).to(s["weight"].dtype)


def assert_same(s, tolerance, **more):
    x, operator = context_tokens(s), splat.splat_operator(**s, **more)
    matrix, valid = splat.splat_operator_plainly(**s, **{k: v for k, v in more.items() if k != "max_elements"})
    y = matrix @ x
    assert torch.equal(operator.valid, valid)
    assert operator(x).dtype == y.dtype and (operator(x) - y).abs().max() <= tolerance
    return operator


OPERATORS = {  # view, grid of the target; what else
    "56x70": (56, 70, (4, 5), {}), "61x83": (61, 83, (7, 10), {}), "64x48": (64, 48, (4, 3), {}),
    "23x41": (23, 41, (1, 2), {}),
    "blend 0": (48, 64, (6, 8), dict(blend=0.0)), "blend 0.3": (48, 64, (6, 8), dict(blend=0.3)),
    "blend 1": (48, 64, (6, 8), dict(blend=1.0)),
    "least memory": (31, 45, (4, 6), dict(max_elements=1)), "little memory": (31, 45, (4, 6), dict(max_elements=2000)),
    "other context grid": (40, 56, (5, 7), dict(context=(3, 9))),
    "a token a pixel": (17, 9, (17, 9), dict(context=(4, 2))),
    "more tokens than pixels": (6, 9, (13, 20), dict(context=(2, 3))),
    "one column": (9, 1, (3, 1), {}), "one pixel": (1, 1, (1, 1), {})}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("masks", [False, True])
def test_the_operator_is_its_definition(case, masks, dtype, tolerance):
    height, width, grid, more = OPERATORS[case]
    s = lifted(height, width, grid, more.get("context"), dtype, masks, holes=height > 17)
    operator = assert_same(s, tolerance, **{name: value for name, value in more.items() if name != "context"})
    row = operator(torch.ones(s["tokens"], 1, dtype=dtype))[:, 0]
    assert torch.allclose(row, operator.valid.to(dtype), atol=2e-6)  # the weights of a valid token sum to 1
    if not more and height > 17:
        assert (len(operator.L.values()) > 0) == masks and operator.valid.any()


def test_the_operator_of_strange_masks_and_dropped_pixels():
    s = lifted(32, 40, (4, 5))
    weight = s["weight"] * (torch.arange(len(s["weight"])) % 3 > 0)[:, None]
    one_a_pixel = torch.arange(-600, 680).view(32, 40)
    for more in (dict(mask=torch.full((32, 40), 9)), dict(mask=one_a_pixel), dict(mask=0 * one_a_pixel),
                 dict(weight=weight, opacities=s["opacities"] * weight.sum(1)),
                 dict(weight=weight)):  # they still hide what is behind them
        assert_same({**s, **more}, 1e-10)


@pytest.mark.parametrize("masks", [False, True])
def test_empty_views(masks):
    s = lifted(24, 32, (3, 4), masks=masks)
    none = {name: s[name][:0] for name in ("means", "covariances", "opacities", "index", "weight")}
    for empty in (dict(means=s["means"] - 100 * s["w2c"][2, :3]), dict(opacities=0 * s["opacities"]), none):
        operator = assert_same({**s, **empty}, 0.0)
        assert not operator.valid.any() and not operator(context_tokens(s)).any()


WRONG = {  # argument -> its wrong value, and what the refusal names
    "means": (torch.zeros(4, 2), r"\(4, 3\)"), "features": (torch.zeros(5, 2), r"\(4, 2\)"),
    "background": (torch.zeros(3), r"\(2,\)"), "mask": (torch.zeros(32, 24), "mask must be"),
    "weight": (torch.zeros(1536, 4).half(), "float32"), "index": (torch.zeros(9, 4), "index and weight")}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_shapes_are_named(name):
    wrong, message = WRONG[name]
    call, arguments = splat.splat_operator, lifted(24, 32, (3, 4))
    if name not in ("mask", "weight", "index"):
        shapes = dict(means=(4, 3), covariances=(4, 3, 3), opacities=(4,), features=(4, 2), w2c=(4, 4), K=(3, 3))
        call, arguments = splat.rasterize, {key: torch.zeros(shape) for key, shape in shapes.items()}
        arguments |= dict(height=5, width=5)
    with pytest.raises(AssertionError, match=message):
        call(**{**arguments, name: wrong})


def test_gradient_of_the_tokens():
    s = lifted(40, 56, (5, 7))
    x, g = context_tokens(s).requires_grad_(), torch.randn(35, 3, dtype=torch.float64)
    s["means"].requires_grad_()  # is ignored: geometry is frozen
    operator = splat.splat_operator(**s)
    wanted, (found,) = splat.splat_operator_plainly(**s)[0].T @ g, torch.autograd.grad(operator(x), x, g)
    assert (found - wanted).abs().max() < 1e-10 and wanted.abs().max() > 0.1


def test_without_masks_only_the_taps_are_rasterised(monkeypatch):
    pixels, walk = [], splat.walk

    def counted(table, band, shape, max_elements):
        pixels.append(len(band.lengths) * shape[0] * shape[1])
        return walk(table, band, shape, max_elements)

    monkeypatch.setattr(splat, "walk", counted)
    s = lifted(56, 70, (4, 5), masks=False)
    splat.splat_operator(**s)
    splat.splat_operator(**{**s, "mask": torch.zeros(56, 70, dtype=torch.int64)})  # nothing labelled, nothing blended
    assert sum(pixels) == 2 * 4 * 20
    splat.splat_operator(**{**s, "mask": torch.ones(56, 70, dtype=torch.int64)})
    assert sum(pixels) >= 3 * 4 * 20 + 56 * 70


# ----------------------------------------------------------------------------------------- files


def test_operator_files(tmp_path):
    s = lifted(61, 83, (7, 10), dtype=torch.float32)
    x, operator, path = context_tokens(s, 16), splat.splat_operator(**s), tmp_path / "deep" / "operator.safetensors"
    splat.save_operator(operator, path, torch.float32)
    loaded = splat.load_operator(path)
    assert torch.equal(loaded(x), operator(x)) and torch.equal(loaded.valid, operator.valid)
    splat.save_operator(operator, path)  # over the old one, in float16
    loaded, weights = splat.load_operator(path), sum(len(matrix.values()) for matrix in operator[:3])
    assert 0 < (loaded(x) - operator(x)).norm() / operator(x).norm() < 5e-4
    assert torch.equal(loaded.valid, operator.valid)
    assert path.stat().st_size <= 4 * weights + 2000 and [p.name for p in path.parent.iterdir()] == [path.name]
    double = splat.splat_operator(**lifted(24, 32, (3, 4)))
    splat.save_operator(double, path, torch.float64)
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(splat.load_operator(path), double))


def test_more_tokens_than_two_bytes_can_count(tmp_path):
    s = lifted(24, 32, (3, 4))
    wide = splat.splat_operator(**{**s, "index": s["index"] + 70_000, "tokens": s["tokens"] + 70_000})
    splat.save_operator(wide, tmp_path / "o", torch.float64)
    x = context_tokens(s)
    assert torch.equal(splat.load_operator(tmp_path / "o")(torch.cat([x.new_zeros(70_000, 3), x])),
                       splat.splat_operator(**s)(x))


PLY = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()


def read_ply(path):
    """Every vertex of a .ply file of floats, as viewers read it."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    lines = head.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert [x.split()[-1] for x in lines if x.startswith("property float ")] == PLY
    count = int(lines[2].removeprefix("element vertex "))
    return torch.tensor(struct.unpack(f"<{17 * count}f", body)).view(count, 17)


def test_ply(tmp_path):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(200, 4, generator=g)
    q[:4] = torch.eye(4)  # no turn and the three half turns, where one quaternion entry rules alone
    cov = covariance(q.double(), 0.1 * torch.randn(200, 3, generator=g).double().exp())
    cov[4], cov[5] = torch.eye(3), torch.zeros(3, 3)
    means, colours = torch.randn(200, 3, generator=g), torch.rand(200, 3, generator=g)
    opacities = torch.rand(200, generator=g)
    gaussians = SimpleNamespace(means=means, covariances=cov.float(), opacities=opacities)
    splat.save_ply(tmp_path / "scene.ply", gaussians, colours)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.ply"]
    table = read_ply(tmp_path / "scene.ply")
    found = 0.28209479 * table[:, 6:9] + 0.5, table[:, 9].sigmoid()
    assert torch.equal(table[:, :3], means) and error(found, [colours, opacities]) < 2e-6
    assert (table[:, 13:].norm(dim=1) - 1).abs().max() < 1e-6
    again = covariance(table[:, 13:].double(), table[:, 10:13].double().exp())
    off = (again - cov).flatten(1).norm(dim=1) / cov.flatten(1).norm(dim=1).clamp(min=1e-9)
    assert off[torch.arange(200) != 5].max() < 1e-5
    none = SimpleNamespace(means=means[:0], covariances=cov[:0], opacities=opacities[:0])
    splat.save_ply(tmp_path / "none.ply", none, colours[:0])
    assert read_ply(tmp_path / "none.ply").shape == (0, 17)


# ------------------------------------------------------------------------------------------------ on a pretended GPU

PRETENDED = """
import importlib, sys
sys.path[:0] = sys.argv[1:]
import fake_cuda, torch
splat, t = importlib.import_module("03_splat"), importlib.import_module("test_03_splat")
installed = fake_cuda.install()
there = lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x
here = lambda x: x.inner if isinstance(x, fake_cuda.FakeCuda) or isinstance(x, fake_cuda.FakeSparse) else x

class Options(dict):  # rounds as TF32 does wherever torch is set to allow it
    __getitem__ = lambda self, name: name == "tf32" and torch.backends.cuda.matmul.fp32_precision == "tf32"

fake_cuda.OPTIONS = Options()
steps, walk = [], splat.walk
splat.walk = lambda *a, **k: (steps.append(1) or step for step in walk(*a, **k))
"""


def pretended(program):
    """Runs a program where torch believes in a GPU, and returns what it prints."""
    if not (SHARED / "tools" / "fake_cuda.py").exists():
        pytest.skip(f"{SHARED / 'tools' / 'fake_cuda.py'}, which pretends to be a GPU, is not here")
    command = [sys.executable, "-W", "ignore", "-c", PRETENDED + program,
               *map(str, (SHARED / "tools", HERE, HERE.parent))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [eval(line) for line in done.stdout.splitlines()]


def test_how_often_a_gpu_is_waited_for():
    found = pretended("""
for C, height, width in ((3, 40, 50), (100, 40, 50), (3, 24, 30)):
    inputs = t.reference.pixel_aligned(40, 50, C) if height == 40 else t.scene(2000, C, dtype=torch.float32)
    inputs = [there(x.detach()).requires_grad_() for x in inputs]
    for call in ("forward", "backward"):
        steps.clear()
        with fake_cuda.watch() as seen:
            if call == "forward":
                r = splat.rasterize(*inputs, height, width)
            else:
                (r.features.sum() + r.depth.sum()).backward()
        print((sum(seen.syncs.values()), len(steps)))
s = t.lifted(61, 83, (7, 10), dtype=torch.float32)
for mask in (s["mask"], None):
    with fake_cuda.watch() as seen:
        splat.splat_operator(**{name: there(value) for name, value in {**s, "mask": mask}.items()})
    print((sum(seen.syncs.values()), 0))
""")
    for waits, steps in found[:6]:
        assert 0 < steps and waits <= 6 + -(-steps // 8)
    assert found[6][0] <= 19 and found[7][0] <= 12


def test_a_gpu_gives_what_the_cpu_gives_whatever_is_set_for_its_products():
    found = pretended("""
inputs, s = t.scene(300, 70, seed=6, dtype=torch.float32), t.lifted(40, 56, (5, 7), dtype=torch.float32)
cpu = t.gradients(splat.rasterize, inputs, 24, 30)
operator = splat.splat_operator(**s)
for allowed in (False, True):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    leaves = [there(x).requires_grad_() for x in inputs]
    r = splat.rasterize(*leaves, 24, 30)
    g = torch.Generator().manual_seed(1)
    sum((there(torch.randn(x.shape, generator=g)) * x).sum() for x in r).backward()
    pairs = zip([*r, *(x.grad for x in leaves)], [*cpu[0], *cpu[1]])
    print(max(float((here(a) - b).norm() / b.norm()) for a, b in pairs))
    on_gpu = splat.splat_operator(**{name: there(value) for name, value in s.items()})
    print(max(float((here(a).to_dense() - b.to_dense()).abs().max()) for a, b in zip(on_gpu[:3], operator)))
    print(torch.backends.cuda.matmul.allow_tf32)
torch.backends.cuda.matmul.allow_tf32, x = True, there(torch.rand(9, 9))
print(float((here(x @ x) - here(x) @ here(x)).abs().max()))  # the pretended GPU does round
""")
    assert max(found[0], found[3]) < 2e-5 and max(found[1], found[4]) < 1e-6
    assert found[2] is False and found[5] is True and found[6] > 1e-4


def test_the_setting_of_tf32_is_put_back():
    program = """if True:
        import importlib, torch
        splat, matmul, gpu = importlib.import_module("03_splat"), torch.backends.cuda.matmul, torch.device("cuda")
        for set_it in (None, "high", "highest", "tf32", "ieee"):
            if set_it in ("high", "highest"):
                torch.set_float32_matmul_precision(set_it)
            elif set_it:
                matmul.fp32_precision = set_it
            before = matmul.fp32_precision
            with splat.full_precision(gpu), splat.full_precision(gpu):
                assert not matmul.allow_tf32 and matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == before and matmul.allow_tf32 == (before == "tf32")
            assert set_it is None or torch.get_float32_matmul_precision() == ("high" if before == "tf32" else "highest")
        """
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=HERE.parent, check=True)


# ------------------------------------------------------------------------------- two views and a third


@pytest.fixture(scope="module")
def triplet(crooked):
    return splat.load_triplet(crooked[0], (3, 5, 4), (48, 64), "cpu", "files")


def test_a_triplet_is_in_units_of_the_nearest_depth_and_is_seen_by_its_own_cameras(crooked, triplet):
    (near, far), views = crooked[0].depth_range, [crooked[0].view(i, (48, 64)) for i in (3, 5, 4)]
    assert near > 2.5 and triplet.far == far / near and "003.png + images/005.png -> images/004.png" in triplet.name
    for n, view in enumerate(views):
        assert torch.equal(triplet.K[n], view.K) and torch.equal(triplet.images[n], view.image)
        assert torch.equal(triplet.masks[n], view.mask) and torch.allclose(near * triplet.depth[n], view.depth)
        assert torch.allclose(triplet.c2w[n, :3], view.c2w[:3] / torch.tensor([1, 1, 1, near]))
    gaussians, colours = splat.reconstruct("depth", triplet)
    p = torch.linalg.inv(triplet.c2w[:2])[:, None] @ F.pad(gaussians.means, (0, 1), value=1.0).view(2, -1, 4, 1)
    pixel = (triplet.K[:2, None] @ p[:, :, :3])[..., 0]
    rows, cols = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    assert (pixel[..., :2] / pixel[..., 2:] - torch.stack([cols, rows], -1).flatten(0, 1)).abs().max() < 1e-2
    ours = splat.render_target(gaussians, colours, triplet)
    camera = torch.linalg.inv(triplet.c2w[2]), views[2].K, 48, 64
    assert error(ours, splat.rasterize(*gaussians[:3], colours, *camera)) == 0
    holes = [frame for i, frame in enumerate(crooked[0].frames) if i in (3, 4)]
    some = data.Scene("some", [*holes, dataclasses.replace(crooked[0].frames[5], depth=None)], 1e-3)
    assert splat.load_triplet(some, (0, 2, 1), (48, 64), "cpu").depth is None


def test_a_geometry_that_does_not_carry_is_named(triplet):
    t = triplet
    image, covered = splat.divide_by_alpha(splat.render_target(*splat.reconstruct("depth", t), t))
    truth = t.images[2].permute(1, 2, 0)[covered]
    of = lambda guess: -10 * (guess - truth).square().mean().log10().item()
    good = splat.geometry_carries(*splat.reconstruct("depth", t), t)
    assert 0.8 < covered.float().mean() < 1 and good == pytest.approx((of(image[covered]), of(truth.mean(0))), rel=1e-5)
    crooked = t._replace(c2w=t.c2w[[2, 1, 0]], depth=t.depth[[1, 0, 2]])
    bad = splat.geometry_carries(*splat.reconstruct("depth", crooked), crooked)
    behind = t._replace(c2w=torch.cat([t.c2w[:2], t.c2w[2:] @ torch.diag(torch.tensor([-1.0, 1, -1, 1]))]))
    unseen = splat.geometry_carries(*splat.reconstruct("depth", t), behind)
    assert good[0] > good[1] + 3 and bad[0] < bad[1] and unseen[0] < unseen[1] + 1
    assert splat.warning_of([good]) is None and "in 1 of 2 triplets" in splat.warning_of([good, bad])


@torch.no_grad()
def test_a_row_of_the_picture_by_its_definition(crooked, monkeypatch):  # a fifth of it is not covered
    vit, net, place = lift.load_vit("tiny"), lift.load_mvsplat("tiny"), (crooked[0], (3, 5, 8))
    t = splat.load_triplet(*place, (48, 64), "cpu", "files")
    drawn, colour = [], lift.pca_colours
    monkeypatch.setattr(lift, "pca_colours", lambda features, basis: drawn.append(features) or colour(features, basis))
    _, scores = splat.novel_view(*place, vit, net, SimpleNamespace(pixels=3072, device="cpu"))
    images, alphas, tokens = {}, {}, vit(t.images[:2]).patches
    features = torch.cat([lift.mask_aware_upscale(x, m, (6, 8)).flatten(0, 1) for x, m in zip(tokens, t.masks[:2])])
    for name in ("mvsplat", "depth"):
        g, colours = splat.reconstruct(name, t, net)
        r = splat.render_target(g, torch.cat([colours, features], 1), t)
        images[name], alphas[name] = r.features / r.alpha.clamp(min=1e-6)[..., None], r.alpha
    both, truth = (alphas["mvsplat"] >= 0.5) & (alphas["depth"] >= 0.5), t.images[2].permute(1, 2, 0)
    guesses = {name: image[both][:, :3] for name, image in images.items()} | {"mean colour": truth[both].mean(0)}
    expected = {name: -10 * (guess - truth[both]).square().mean().log10().item() for name, guess in guesses.items()}
    assert scores == pytest.approx(expected, rel=1e-4) and not both.all()
    seen = alphas["mvsplat"] >= 0.5
    assert error([drawn[0][seen]], [images["mvsplat"][..., 3:][seen]]) < 1e-4
    blended = blend_loop(images["mvsplat"][..., 3:].double(), t.masks[2], 0.5, seen)
    assert error([drawn[1][seen]], [blended[seen]]) < 1e-4 and not t.masks[2].all()


def test_the_command_shows_what_is_held_out(crooked_dir, tmp_path, monkeypatch, capsys):
    shown, novel_view = set(), splat.novel_view
    monkeypatch.setattr(splat, "novel_view", lambda scene, *more: shown.add(scene.name) or novel_view(scene, *more))
    splat.main(["--scene_dir", str(crooked_dir), "--out", str(tmp_path), "--pixels", "768", "--device", "cpu"])
    assert shown == {"crooked_1"} and f"->  {tmp_path / 'novel_view.png'}" in capsys.readouterr().out


def test_a_flight_takes_the_shorter_way():
    about_y = torch.tensor([[0.0, 0, 1], [0, 0, 0], [-1, 0, 0]])
    turn = lambda degrees: torch.linalg.matrix_exp(math.radians(degrees) * about_y)
    a, b = torch.eye(4), torch.eye(4)
    a[:3, :3], b[:3, :3], b[0, 3] = turn(-80), turn(-100), 2.0  # the largest entry of their quaternions differs
    poses = splat.flight_path(a, b, 4)
    assert error(poses, [a, poses[1], b, poses[1]]) < 1e-6 and error([poses[1, :3, :3]], [turn(-90)]) < 1e-6
    assert poses[1, 0, 3] == pytest.approx(1.0)
