"""03_splat against float64 brute force, recorded renders (fixtures/raster), plain loops, and the scenes that break rasterisers."""

import importlib
import math
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

splat = importlib.import_module("03_splat")
reference = importlib.import_module("reference_raster")

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"


def rotation(q):
    """(G, 4) quaternions (w, x, y, z) of any length -> (G, 3, 3)."""
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def covariance(quats, scales):
    R = rotation(quats)
    return R @ torch.diag_embed(scales**2) @ R.mT


def scene(G, C, seed=0, dtype=torch.float64, height=24, width=30):
    """Gaussians in front of (most), beside and behind a camera that is neither at the origin nor square on; K has a skew."""
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


def brute_force(means, cov, opacities, features, w2c, K, height, width, background=None):
    """Every pixel against every Gaussian, nearest first, one Gaussian at a time, in float64: 3DGS as its authors put it."""
    means, cov, opacities, features, w2c, K = (x.double() for x in (means, cov, opacities, features, w2c, K))
    R, t = w2c[:3, :3], w2c[:3, 3]
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    points = [R @ m + t for m in means]
    ys, xs = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    T = torch.ones(height, width).double()
    done = torch.zeros(height, width, dtype=torch.bool)
    out, alpha_sum, depth_sum = torch.zeros(height, width, features.shape[1]).double(), 0 * T, 0 * T
    for i in sorted(range(len(points)), key=lambda i: points[i][2].item()):
        x, y, z = points[i]
        if z <= 0.01:
            continue
        u = (K @ points[i] / z)[:2]
        sx = torch.clamp(x / z, -cx / fx - 0.15 * width / fx, (width - cx) / fx + 0.15 * width / fx)
        sy = torch.clamp(y / z, -cy / fy - 0.15 * height / fy, (height - cy) / fy + 0.15 * height / fy)
        zero = torch.zeros_like(z)
        J = K[:2, :2] @ torch.stack([torch.stack([1 / z, zero, -sx / z]), torch.stack([zero, 1 / z, -sy / z])])
        conic = torch.linalg.inv(J @ R @ cov[i] @ R.T @ J.T + 0.3 * torch.eye(2).double())
        d = torch.stack([xs - u[0], ys - u[1]], -1)
        alpha = opacities[i] * torch.exp(-0.5 * torch.einsum("hwi,ij,hwj->hw", d, conic, d))
        alpha = torch.where(alpha < 1 / 255, torch.zeros_like(alpha), alpha.clamp(max=0.99))
        done = done | (T * (1 - alpha) <= 1e-4)
        weight = torch.where(done, torch.zeros_like(T), T * alpha)
        T = torch.where(done, T, T * (1 - alpha))
        out, alpha_sum, depth_sum = out + weight[..., None] * features[i], alpha_sum + weight, depth_sum + weight * z
    if background is not None:
        out = out + (1 - alpha_sum)[..., None] * background
    return splat.Render(out, alpha_sum, torch.where(alpha_sum > 0, depth_sum / alpha_sum.clamp(min=1e-9), 0))


def error(a, b):
    return max((x - y).detach().abs().max().item() if x.numel() else 0.0 for x, y in zip(a, b))


def gradients(inputs, *rest, **options):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    r = splat.rasterize(*inputs, *rest, **options)
    (r.features.sum() + r.alpha.square().sum() + r.depth.sum()).backward()
    return r, [x.grad for x in inputs]


# -------------------------------------------------------------------------------------------------------- recorded renders


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["random_cloud_c3", "opaque_c16", "edges_c1", "garden_crop_c3"])
def test_fixture(name, dtype):
    path = (SHARED if name in ("garden_crop_c3", "opaque_c16") else HERE) / "fixtures" / "raster" / f"{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is not here: third-party data, or too large for this repository")
    f = load_file(path)
    leaf = {k: f[k].to(dtype).requires_grad_() for k in ("means", "opacities", "features")}
    leaf |= {k: f[k].double().requires_grad_() for k in ("quats", "scales")}
    cov = covariance(leaf["quats"], leaf["scales"])  # float64: rounded to float32 a needle is another needle
    size = int(f["height"]), int(f["width"])
    r = splat.rasterize(leaf["means"], cov, leaf["opacities"], leaf["features"], f["viewmat"], f["K"], *size)
    assert r.features.dtype == r.depth.dtype == dtype
    robust = f["robust"].bool()
    tight, tight_gradient = (1e-5, 2e-5) if dtype == torch.float32 else (3e-7, 2e-7)  # the fixtures are stored in float32
    assert robust.float().mean() > 0.97
    for ours, theirs in zip(r, (f["out_features"], f["out_alpha"], f["out_depth"])):
        assert (ours - theirs)[robust].abs().max() < tight * max(1, theirs.abs().max())
        assert (ours - theirs).abs().max() < 2e-2
    depth_sum = r.depth * r.alpha
    loss = (f["cot_features"] * r.features).sum() + (f["cot_alpha"] * r.alpha).sum() + (f["cot_depth_acc"] * depth_sum).sum()
    loss.backward()
    for k, x in leaf.items():
        assert (x.grad - f["grad_" + k]).norm() < tight_gradient * f["grad_" + k].norm(), k


def test_fixture_with_float32_covariances():
    f = load_file(HERE / "fixtures" / "raster" / "edges_c1.safetensors")
    cov = covariance(f["quats"].double(), f["scales"].double()).float()
    r = splat.rasterize(f["means"], cov, f["opacities"], f["features"], f["viewmat"], f["K"], int(f["height"]), int(f["width"]))
    assert error(r, (f["out_features"], f["out_alpha"], f["out_depth"])) < 2e-4


# ------------------------------------------------------------------------------------------------------------- brute force


@pytest.mark.parametrize(
    "G, C, height, width", [(60, 1, 1, 1), (80, 3, 8, 8), (150, 5, 13, 41), (300, 2, 33, 17), (40, 768, 9, 10), (30, 0, 5, 9)]
)
def test_brute_force(G, C, height, width):
    inputs = scene(G, C, seed=G, height=height, width=width)
    background = torch.linspace(-1, 1, C).double()
    expected = brute_force(*inputs, height, width, background)
    ours = splat.rasterize(*inputs, height, width, background)
    assert [x.shape for x in ours] == [(height, width, C), (height, width), (height, width)]
    assert expected.alpha.max() > 0.3
    assert error(ours, expected) < 1e-11
    single = splat.rasterize(*[x.float() for x in inputs], height, width, background.float())
    assert single.features.dtype == torch.float32 and error(single, expected) < 5e-4  # the inputs are rounded too


def test_brute_force_gradients():
    inputs = [x.requires_grad_() for x in scene(60, 2, seed=3)]
    background = torch.tensor([0.3, -0.2]).double().requires_grad_()
    g = torch.Generator().manual_seed(1)
    cot = [torch.randn(shape, generator=g).double() for shape in ((24, 30, 2), (24, 30), (24, 30))]
    wanted = [*inputs, background]
    for_ours, for_truth = (
        torch.autograd.grad(sum((c * x).sum() for c, x in zip(cot, render(*inputs, 24, 30, background))), wanted)
        for render in (splat.rasterize, brute_force)
    )
    for ours, truth in zip(for_ours, for_truth):
        assert truth.norm() > 0 and (ours - truth).norm() < 1e-9 * truth.norm()


def test_gradcheck():
    means, cov, opacities, features, w2c, K = scene(12, 2, seed=5, height=9, width=11)
    root = torch.linalg.cholesky(cov)
    inputs = [x.requires_grad_() for x in (means, root, opacities, features, w2c)]

    def render(means, root, opacities, features, w2c):
        r = splat.rasterize(means, root @ root.mT, opacities, features, w2c, K, 9, 11)
        return r.features, r.alpha, r.depth * r.alpha

    assert torch.autograd.gradcheck(render, inputs, eps=1e-7, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scales", [(3.0, 0.004, 0.004), (1.0, 1.0, 0.004)], ids=["needles", "discs"])
def test_float32_gradients_of_what_crosses_the_view(scales):
    # Seen from a far block, the squares of the distance to the mean are 10^5 times what is left of their differences.
    means, _, opacities, features, w2c, K = scene(400, 3, seed=3, height=200, width=240)
    quats = torch.randn(400, 4, generator=torch.Generator().manual_seed(5)).double()
    gaussians = means, covariance(quats, torch.tensor(scales).double().expand(400, 3)), 0.3 * opacities
    (_, truth), (_, single) = (gradients([*gaussians, f], w2c, K, 200, 240) for f in (features, features.float()))
    for ours, expected in zip(single, truth):
        assert expected.norm() > 0 and (ours - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("C", [3, splat.FEW_CHANNELS + 6])
def test_features_alone_get_the_same_gradient(C):
    *geometry, features, w2c, K = scene(150, C, seed=9)
    expected = gradients([*geometry, features], w2c, K, 24, 30)[1][3]
    features.requires_grad_()
    splat.rasterize(*geometry, features, w2c, K, 24, 30).features.sum().backward()
    assert expected.norm() > 0 and error([features.grad], [expected]) < 1e-12


def test_frozen_inputs_get_no_gradient():
    means, cov, opacities, features, w2c, K = scene(50, 3)
    features.requires_grad_()
    splat.rasterize(means, cov, opacities, features, w2c, K, 24, 30).features.sum().backward()
    alone = features.grad
    expected = torch.autograd.grad(brute_force(means, cov, opacities, features, w2c, K, 24, 30).features.sum(), features)[0]
    assert error([alone], [expected]) < 1e-11 and means.grad is None


# -------------------------------------------------------------------------------------------------------------- invariances


def test_order_of_gaussians_is_irrelevant():
    *gaussians, w2c, K = scene(200, 4, seed=8)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    r, grads = gradients(gaussians, w2c, K, 24, 30)
    s, shuffled = gradients([x[shuffle] for x in gaussians], w2c, K, 24, 30)
    assert error(r, s) < 1e-13 and error([g[shuffle] for g in grads], shuffled) < 1e-11


def test_equal_depths_keep_their_order():
    far_first = torch.tensor([[0.0, 0, 2], [0, 0, 2]])
    features = torch.tensor([[1.0], [0.0]])
    r = splat.rasterize(far_first, torch.eye(3).repeat(2, 1, 1), torch.tensor([0.5, 0.9]), features, torch.eye(4), EYE_K, 5, 5)
    assert abs(float(r.features[2, 2, 0]) - 0.5) < 1e-3


@pytest.mark.parametrize("max_elements", [1, 3000, 40_000, 10**9])
def test_memory_bound_changes_nothing(max_elements):
    *gaussians, w2c, K = scene(300, 3, seed=2, height=40, width=37)
    r, grads = gradients(gaussians, w2c, K, 40, 37)
    s, bounded = gradients(gaussians, w2c, K, 40, 37, max_elements=max_elements)
    assert error(r, s) < 1e-13 and error(grads, bounded) < 1e-10


def test_autocast_changes_nothing():
    *gaussians, w2c, K = scene(200, 4, seed=8, dtype=torch.float32)
    r, grads = gradients(gaussians, w2c, K, 24, 30)
    with torch.autocast("cpu", torch.bfloat16):
        s, cast = gradients(gaussians, w2c, K, 24, 30)
    assert error(r, s) == 0 and error(grads, cast) == 0


def geometry(gaussians, w2c, K, height, width, lattice):
    table, z, box = splat.Project.apply(1000, height, width, torch.float64, w2c, K, *gaussians[:3])
    return table, splat.reached_blocks(box, lattice, height, width), z.view(torch.int64).argsort(stable=True)


def test_memory_bound_bounds_the_steps():
    *gaussians, w2c, K = scene(3000, 1, seed=2, height=64, width=64)
    lattice = splat.whole_view(64, 64, "cpu")
    table, boxes, order = geometry(gaussians, w2c, K, 64, 64, lattice)
    cuts = splat.row_bands(boxes, 8, 8, 5000, 10**9)
    assert len(cuts) > 2 and [c[0] for c in cuts] == [0, *(c[1] for c in cuts[:-1])] and cuts[-1][1] == 8
    assert splat.row_bands(boxes, 8, 8, 10**9, 16) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    for top, bottom in cuts:
        band = splat.block_lists(boxes, order, lattice, top, bottom)
        steps = [s.weight.numel() for s in splat.walk(table, band, lattice, 3 * splat.CHUNK * 64)]
        assert len(steps) > 4 and max(steps) == 3 * splat.CHUNK * 64
        assert len(splat.block_lists(boxes, order, lattice, top, bottom - 1).gaussian) <= 5000


def test_reached_pixels_are_the_box_of_the_ellipse():
    means, cov, opacities, _, w2c, K = scene(500, 1, seed=11)
    table, _ = splat.project(means, cov, opacities, w2c, K, 24, 30)
    box, seen = splat.reached_pixels(table, 24, 30), (means @ w2c[2, :3] + w2c[2, 3] > 0.01) & (opacities >= 1 / 255)
    assert 0 < seen.sum() < 500 and torch.equal(table[7] > -math.inf, seen)
    x, y, rest_x, rest_y, l11, l21, l22, lo = table[:, seen]
    L, tau = torch.stack([l11, l21, 0 * l11, l22], 1).view(-1, 2, 2), lo + math.log2(255 * splat.RANGE)
    radius = (tau * torch.linalg.inv(L.mT @ L).diagonal(0, 1, 2).T).sqrt()  # alpha >= 1 / 255 where |L d|^2 <= tau
    mean = torch.stack([x + rest_x, y + rest_y])
    first, last = (mean - radius - 0.5).ceil().clamp(min=0), (mean + radius - 0.5).floor().minimum(torch.tensor([[29.0], [23]]))
    none = (first > last).any(0)
    assert 0 < none.sum() < len(none) and torch.equal(box[:, seen][:, ~none], torch.cat([first, last])[:, ~none].int())
    assert (box[0] > box[2])[~seen].all() and (box[0] > box[2])[seen][none].all()


def test_any_lattice_of_pixels_has_the_weights_of_the_whole_view():
    height, width = 37, 52
    *gaussians, w2c, K = scene(400, 1, seed=4, height=height, width=width)
    def weights(lattice):  # {(y, x, Gaussian): weight}
        table, boxes, order = geometry(gaussians, w2c, K, height, width, lattice)
        band, found = splat.block_lists(boxes, order, lattice, 0, len(lattice.y)), {}
        for step in splat.walk(table, band, lattice, 2**16):
            for b, k, p in (step.weight > 0).permute(1, 0, 2).nonzero().tolist():
                row, column = divmod(int(step.blocks[b]), len(lattice.x))
                y, x = int(lattice.y[row]) + p // lattice.shape[1], int(lattice.x[column]) + p % lattice.shape[1]
                if y < height and x < width:
                    found[y, x, int(step.ids[b, k])] = float(step.weight[k, b, p])
        return found
    whole = weights(splat.whole_view(height, width, "cpu"))
    y, x = torch.tensor([2, 9, 10, 30, 36]), torch.tensor([0, 13, 26, 26, 40, 51])  # apart, overlapping, beyond the border
    some = weights(splat.Lattice(y, x, (2, 2)))
    read = {(int(j) + a, int(i) + b) for j in y for i in x for a in (0, 1) for b in (0, 1)}
    expected = {key: w for key, w in whole.items() if key[:2] in read}
    assert len(expected) > 500 and some.keys() == expected.keys()
    assert max(abs(some[key] - expected[key]) for key in some) < 1e-13


def test_end_of_a_list_next_to_a_far_one():
    # What pads the list of the last block of a row comes from the other end of the view, where its polynomial is huge.
    K = torch.tensor([[100.0, 0, 1500], [0, 100, 8], [0, 0, 1]])
    means = torch.tensor([[14.9, -0.04, 1], [-14.9, 0.04, 1]])
    gaussians = means, torch.zeros(2, 3, 3), torch.tensor([0.5, 0.9]), torch.eye(2)
    assert error(splat.rasterize(*gaussians, torch.eye(4), K, 16, 3000), brute_force(*gaussians, torch.eye(4), K, 16, 3000)) < 1e-5


def test_composite_is_a_cumulative_product():
    alpha, light = torch.rand(40, 3, 64).clamp(max=0.99) ** 2, torch.rand(3, 64)
    T = torch.cat([light[None], 1 - alpha]).cumprod(0)
    expected, after = (T[:-1] * alpha).where(T[1:] > 1e-4, 0), T[-1].where(T[-1] > 1e-4, 0)
    scaled = light * splat.RANGE
    out = splat.composite(alpha / splat.RANGE, scaled)
    assert 0 < (expected == 0).float().mean() < 0.9
    assert error([out, scaled / splat.RANGE], [expected, after]) < 2e-6


@pytest.mark.parametrize("max_elements", [1, 20_000, None])
def test_many_channels_are_the_same_as_few(max_elements):
    *gaussians, features, w2c, K = scene(300, splat.FEW_CHANNELS + 36, seed=6, height=29, width=43)
    def run(features):
        inputs = [x.detach().clone().requires_grad_() for x in (*gaussians, features)]
        r = splat.rasterize(*inputs, w2c, K, 29, 43, max_elements=max_elements)
        (r.features.square().sum() + r.depth.sum() + r.alpha.sum()).backward()
        return r, [x.grad for x in inputs]
    (r, grads), (s, few), (t, rest) = run(features), run(features[:, :40]), run(features[:, 40:])
    q, nothing = run(features[:, :0])
    assert error([r.features, r.alpha, r.depth], [torch.cat([s.features, t.features], 2), s.alpha, t.depth]) < 1e-12
    assert error([grads[3]], [torch.cat([few[3], rest[3]], 1)]) < 1e-11
    assert error(grads[:3], [a + b - c for a, b, c in zip(few, rest, nothing[:3])]) < 1e-8


# -------------------------------------------------------------------------------------------- pixel-aligned, as SnD makes them


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


# --------------------------------------------------------------------------------------------------------------- edge cases

EYE_K = torch.tensor([[10.0, 0, 2.5], [0, 10, 2.5], [0, 0, 1]])


def one(mean, cov, opacity=0.8, dtype=torch.float64):
    return [torch.tensor([mean], dtype=dtype), cov.to(dtype)[None], torch.tensor([opacity], dtype=dtype), torch.ones(1, 2, dtype=dtype)]


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
}
UNSEEN = {"none", "behind", "at the camera", "at the near plane", "outside the view", "opacity 0", "opacity 1/256"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, dtype):
    inputs = [x.to(dtype) for x in EDGES[name]]
    r, grads = gradients(inputs, torch.eye(4), EYE_K, 5, 5)
    assert all(x.isfinite().all() for x in (*r, *grads))
    if name in UNSEEN:
        assert not any(x.any() for x in (*r, *grads))
    else:
        assert r.alpha.max() > 0.003 and grads[3].abs().max() > 0
    if name not in ("negative", "indefinite"):
        assert error(r, brute_force(*inputs, torch.eye(4), EYE_K, 5, 5)) < (2e-5 if dtype == torch.float32 else 1e-6)


def test_nothing_seen_is_background():
    r = splat.rasterize(*EDGES["behind"], torch.eye(4), EYE_K, 3, 4, torch.tensor([0.25, -1]).double())
    assert (r.features == torch.tensor([0.25, -1])).all() and not r.alpha.any() and not r.depth.any()


def test_gaussians_that_are_not_numbers_are_not_seen():
    means, cov, opacities, features, w2c, K = scene(40, 2)
    expected = splat.rasterize(means, cov, opacities, features, w2c, K, 24, 30)
    bad = [torch.cat([x, torch.full_like(x[:3], v)]) for x, v in ((means, math.nan), (cov, 1.0), (opacities, 0.5), (features, 1.0))]
    bad[0][-2:] = torch.tensor([0.0, 0, 3])
    bad[1][-2], bad[2][-1] = math.nan, math.nan
    assert error(splat.rasterize(*bad, w2c, K, 24, 30), expected) == 0


def test_stop_comes_before_the_gaussian_that_ends_the_light():
    # The light falls to 0.01 and 0.0002; the third layer would leave 0.00008, so neither it nor the faint one behind it counts.
    means = torch.tensor([[0.0, 0, 2], [0, 0, 3], [0, 0, 4], [0, 0, 5]]).double()
    opacities = torch.tensor([1.0, 0.98, 0.6, 0.1]).double()
    gaussians = means, 1e6 * torch.eye(3).double().repeat(4, 1, 1), opacities, torch.eye(4).double()
    r, grads = gradients(gaussians, torch.eye(4), EYE_K, 5, 5)
    assert error([r.features[2, 2]], [torch.tensor([0.99, 0.0098, 0, 0]).double()]) < 1e-8
    assert not any(g[2:].any() for g in grads)


def test_crowd_in_one_pixel_needs_many_chunks():
    G = 5 * splat.CHUNK + 3
    means = torch.cat([torch.zeros(G, 2), torch.linspace(2, 3, G)[:, None]], 1).double()
    inputs = [means, torch.zeros(G, 3, 3).double(), torch.full((G,), 0.02).double(), torch.rand(G, 2).double()]
    assert error(splat.rasterize(*inputs, torch.eye(4), EYE_K, 5, 5), brute_force(*inputs, torch.eye(4), EYE_K, 5, 5)) < 1e-12


@pytest.mark.parametrize("which, shape", [(0, (3, 2)), (1, (4, 3)), (2, (4, 1)), (3, (4,)), (3, (5, 2)), (4, (3, 4)), (5, (4, 4))])
def test_wrong_shapes_are_named(which, shape):
    inputs = [torch.zeros(4, 3), torch.zeros(4, 3, 3), torch.zeros(4), torch.zeros(4, 2), torch.eye(4), torch.eye(3)]
    inputs[which] = torch.zeros(shape)
    with pytest.raises(AssertionError, match=r"\(.*\)"):
        splat.rasterize(*inputs, 5, 5)


# -------------------------------------------------------------------------------------------------------- blend and tokens


def blend_loop(features, mask, alpha, valid):
    """SnD Eq. 4, pixel by pixel."""
    out = features.clone()
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            mates = features[(mask == mask[y, x]) & valid]
            if mask[y, x] != 0 and len(mates):
                out[y, x] = alpha * features[y, x] + (1 - alpha) * mates.mean(0)
    return out


@pytest.mark.parametrize("case", ["random", "single pixels", "unlabelled", "nothing valid", "huge ids", "one id", "one pixel"])
@pytest.mark.parametrize("alpha", [0.5, 0.0, 1.0, 0.3])
def test_semantic_blend(case, alpha):
    g = torch.Generator().manual_seed(0)
    H, W = (1, 1) if case == "one pixel" else (9, 13)
    features = torch.randn(H, W, 5, generator=g).double()
    mask = torch.randint(0, 5, (H, W), generator=g)
    valid = torch.rand(H, W, generator=g) < 0.6
    if case == "single pixels":
        mask = torch.arange(1, H * W + 1).view(H, W)
    if case == "unlabelled":
        mask = torch.zeros_like(mask)
    if case == "nothing valid":
        valid = torch.zeros_like(valid)
    if case == "huge ids":
        mask = torch.tensor([0, 2**62, -7, 1, 10**12])[mask]
    if case == "one id":
        mask = torch.full_like(mask, 3)
    assert error([splat.semantic_blend(features, mask, alpha, valid)], [blend_loop(features, mask, alpha, valid)]) < 1e-13
    everywhere = torch.ones_like(valid)
    assert error([splat.semantic_blend(features, mask, alpha)], [blend_loop(features, mask, alpha, everywhere)]) < 1e-13


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


def token_loop(features, valid, h, w):
    """DESIGN's token: 2x2 pixels around each patch centre, bilinear, over valid taps, if they weigh at least a half."""
    H, W, C = features.shape
    tokens, token_valid = torch.zeros(h * w, C).double(), torch.zeros(h * w, dtype=torch.bool)
    for j in range(h):
        for i in range(w):
            cy, cx = (j + 0.5) * H / h, (i + 0.5) * W / w  # pixel (r, s) has its centre at (r + 0.5, s + 0.5)
            total, weights = torch.zeros(C).double(), 0.0
            for r in (math.floor(cy - 0.5), math.floor(cy - 0.5) + 1):
                for s in (math.floor(cx - 0.5), math.floor(cx - 0.5) + 1):
                    weight = (1 - abs(cy - 0.5 - r)) * (1 - abs(cx - 0.5 - s))
                    r_in, s_in = min(max(r, 0), H - 1), min(max(s, 0), W - 1)
                    if valid[r_in, s_in]:
                        total, weights = total + weight * features[r_in, s_in], weights + weight
            if weights >= 0.5 - 1e-9:
                tokens[j * w + i], token_valid[j * w + i] = total / weights, True
    return tokens, token_valid


@pytest.mark.parametrize("H, W, h, w", [(16, 24, 4, 6), (15, 22, 5, 7), (58, 87, 4, 6), (3, 2, 3, 2), (1, 1, 1, 1), (3, 4, 7, 5), (14, 7, 2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.7, 1.0])
def test_splat_to_tokens(H, W, h, w, share):
    g = torch.Generator().manual_seed(H * W)
    features = torch.randn(H, W, 3, generator=g).double()
    valid = torch.rand(H, W, generator=g) < share
    holes = features.where(valid[..., None], math.nan)
    tokens, token_valid = splat.splat_to_tokens(holes, valid, (h, w))
    expected, expected_valid = token_loop(features, valid, h, w)
    assert torch.equal(token_valid, expected_valid) and error([tokens], [expected]) < 1e-8
    if share == 1:
        assert token_valid.all()
        resized = torch.nn.functional.interpolate(features.permute(2, 0, 1)[None], (h, w), mode="bilinear", align_corners=False)
        assert error([tokens], [resized[0].flatten(1).T]) < 1e-8
    if share == 0:
        assert not token_valid.any() and not tokens.any()


def test_half_of_the_weight_is_enough():
    valid = torch.tensor([[True, False], [True, False]])
    assert splat.splat_to_tokens(torch.ones(2, 2, 1), valid, (1, 1))[1].all()
    assert not splat.splat_to_tokens(torch.ones(2, 2, 1), valid & valid.new_tensor([[True], [False]]), (1, 1))[1].any()


# --------------------------------------------------------------------------------------------------------------- .ply files


def test_ply_round_trip(tmp_path):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(200, 4, generator=g)
    q[:4] = torch.eye(4)  # no turn and the three half turns, where one quaternion entry rules alone
    cov = covariance(q.double(), 0.1 * torch.randn(200, 3, generator=g).double().exp()).float()
    cov[4], cov[5] = torch.eye(3), torch.zeros(3, 3)
    gaussians = SimpleNamespace(means=torch.randn(200, 3, generator=g), covariances=cov, opacities=torch.rand(200, generator=g))
    colours = torch.rand(200, 3, generator=g)
    path = tmp_path / "scene.ply"
    splat.save_ply(path, gaussians, colours)
    back = splat.load_ply(path)
    assert [p.name for p in tmp_path.iterdir()] == ["scene.ply"]
    assert error([back.means, back.colours], [gaussians.means, colours]) < 1e-6
    assert error([back.opacities], [gaussians.opacities]) < 2e-6
    assert error([back.covariances], [cov]) < 1e-5 * cov.abs().max()
    relative = (back.covariances - cov).flatten(1).norm(dim=1) / cov.flatten(1).norm(dim=1).clamp(min=1e-12)
    assert relative[:5].max() < 1e-5 and relative[6:].max() < 1e-5


def test_ply_layout_is_what_viewers_read(tmp_path):
    R = rotation(torch.tensor([[0.9, 0.1, -0.3, 0.2]]).double())
    cov = R @ torch.diag(torch.tensor([4.0, 9, 16]).double()) @ R.mT
    gaussians = SimpleNamespace(means=torch.tensor([[1.0, 2, 3]]), covariances=cov, opacities=torch.tensor([0.75]))
    splat.save_ply(tmp_path / "a.ply", gaussians, torch.tensor([[0.5, 1, 0]]))
    head, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    names = [line.split()[-1] for line in head.decode().splitlines() if line.startswith("property float ")]
    assert names == "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
    row = dict(zip(names, struct.unpack("<17f", body)))
    assert (row["x"], row["y"], row["z"]) == (1, 2, 3)
    assert abs(row["f_dc_1"] - 0.5 / 0.28209479) < 1e-6 and abs(row["opacity"] - math.log(3)) < 1e-6
    assert sorted(round(math.exp(row[f"scale_{i}"]), 4) for i in range(3)) == [2, 3, 4]
    q = torch.tensor([[row[f"rot_{i}"] for i in range(4)]]).double()
    assert abs(float(q.norm()) - 1) < 1e-6 and abs(float(torch.linalg.det(rotation(q)[0])) - 1) < 1e-6
    sigma = torch.tensor([math.exp(row[f"scale_{i}"]) for i in range(3)])[None].double()
    assert error([covariance(q, sigma)], [gaussians.covariances]) < 1e-4


def test_ply_without_gaussians(tmp_path):
    none = SimpleNamespace(means=torch.zeros(0, 3), covariances=torch.zeros(0, 3, 3), opacities=torch.zeros(0))
    splat.save_ply(tmp_path / "a.ply", none, torch.zeros(0, 3))
    assert [tuple(x.shape) for x in splat.load_ply(tmp_path / "a.ply")] == [(0, 3), (0, 3, 3), (0,), (0, 3)]


def test_ply_with_a_quaternion_of_length_0(tmp_path):
    gaussian = SimpleNamespace(means=torch.zeros(1, 3), covariances=torch.eye(3)[None], opacities=torch.tensor([0.5]))
    splat.save_ply(tmp_path / "a.ply", gaussian, torch.zeros(1, 3))
    (tmp_path / "a.ply").write_bytes((tmp_path / "a.ply").read_bytes()[:-16] + bytes(16))
    assert error([splat.load_ply(tmp_path / "a.ply").covariances], [torch.eye(3)]) < 1e-6


def test_ply_of_another_program(tmp_path):
    path = SHARED / "data" / "splat_ply_train1000" / "train-1000.ply"
    if not path.exists():
        pytest.skip(f"{path} is third-party data that this repository does not carry")
    real = splat.load_ply(path)
    assert real.means.shape == (1000, 3) and all(x.isfinite().all() for x in real)
    row = struct.unpack("<62f", path.read_bytes().split(b"end_header\n", 1)[1][: 62 * 4])
    assert torch.equal(real.means[0], torch.tensor(row[:3])) and abs(float(real.opacities[0]) - 1 / (1 + math.exp(-row[54]))) < 1e-6
    expected = covariance(torch.tensor([row[58:]]).double(), torch.tensor([row[55:58]]).double().exp())
    assert error([real.covariances[:1]], [expected]) < 1e-5 * expected.abs().max()
    assert (torch.tensor(row[58:]).norm() - 1).abs() > 1e-3  # this file's quaternions are not of length 1
    splat.save_ply(tmp_path / "again.ply", real, real.colours)
    again = splat.load_ply(tmp_path / "again.ply")
    assert error([again.means, again.opacities, again.colours], [real.means, real.opacities, real.colours]) < 5e-6


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:100], "not a .ply"),
        (lambda b: b"", "not a .ply"),
        (lambda b: b"end_header\n" + b, "not a .ply"),
        (lambda b: b"\x89PNG" + b, "not a .ply"),
        (lambda b: b.replace(b"binary_little_endian", b"ascii"), "binary_little_endian"),
        (lambda b: b.replace(b"element vertex 2", b"element face 2"), "vertex"),
        (lambda b: b.replace(b"element vertex 2", b"element vertex two"), "vertex"),
        (lambda b: b.replace(b"element vertex 2", b"comment"), "vertex"),
        (lambda b: b.replace(b"opacity", b"density"), "lack opacity"),
        (lambda b: b.replace(b"float opacity", b"list uchar int opacity"), "types"),
        (lambda b: b.replace(b"float opacity", b"quaternion opacity"), "types"),
        (lambda b: b.replace(b"property float nx", b"property float x"), "share a name"),
    ],
)
def test_foreign_ply_is_one_line(tmp_path, damage, message):
    path = tmp_path / "a.ply"
    two = SimpleNamespace(means=torch.zeros(2, 3), covariances=torch.eye(3).repeat(2, 1, 1), opacities=torch.full((2,), 0.5))
    splat.save_ply(path, two, torch.zeros(2, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        splat.load_ply(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
