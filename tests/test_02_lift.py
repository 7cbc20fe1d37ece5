"""02_lift.py: Eq. 2-3 against per-pixel loops, geometry against planes and rooms. The ViT has a file of its own, test_02_vit.py."""
import importlib
import math

import numpy as np
import pytest
import torch

lift = importlib.import_module("02_lift")

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
