"""What 03_splat.rasterize is measured against: the standard PyTorch formulation, a textbook one, and their scene.

`standard` is written after gsplat's `_torch_impl.py`: find all (pixel, Gaussian) pairs tile by tile without gradient,
then gather them, a segmented product for the light, and index_add_. `textbook` is what one writes next: 8x8 tiles in
batches, chunks of 32 Gaussians, torch.where and cumprod. Both project in float32 and return (H, W, C).
"""

import math

import torch


def rotation(q):
    """(G, 4) quaternions (w, x, y, z) of any length -> (G, 3, 3)."""
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)]
    rows += [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)]
    rows += [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def pixel_aligned(height, width, C, seed=0):
    """Two views' pixel-aligned Gaussians of a furnished room (scales as in MVSplat) and a third camera between them."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    focal = 0.75 * width
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]).double()
    room = [((-3.0, -1.3, -3.0), (3.0, 1.3, 3.0)), ((-2.4, 0.2, 0.8), (-0.8, 1.3, 2.0)),
            ((0.6, 0.5, 0.4), (1.8, 1.3, 1.4)),
            ((1.9, -0.9, 2.0), (2.9, 1.3, 2.8)), ((-0.5, 0.1, 2.2), (0.4, 1.3, 2.9))]
    y, x = torch.meshgrid(torch.arange(height).double() + 0.5, torch.arange(width).double() + 0.5, indexing="ij")
    parts, poses = [], []
    for eye, at in (((-0.5, 0, -2.4), (0, 0.2, 1)), ((0.5, -0.1, -2.3), (0.1, 0.2, 1)),
                    ((0.05, -0.05, -2.35), (0.05, 0.2, 1))):
        eye, at = torch.tensor(eye).double(), torch.tensor(at).double()
        ahead = torch.nn.functional.normalize(at - eye, dim=0)
        right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0, 1.0, 0]).double(), ahead), dim=0)
        c2w = torch.eye(4).double()
        c2w[:3] = torch.stack([right, torch.linalg.cross(ahead, right), ahead, eye], 1)
        poses.append(c2w)
        ray = torch.stack([(x - K[0, 2]) / focal, (y - K[1, 2]) / focal, torch.ones_like(x)], -1) @ c2w[:3, :3].T
        depth = torch.full_like(x, math.inf)
        for i, (low, high) in enumerate(room):
            a, b = ((torch.tensor(side).double() - eye) / ray for side in (low, high))
            near, far = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
            depth = torch.minimum(depth, far if i == 0 else torch.where((near < far) & (near > 0), near, math.inf))
        coarse = rand(1, 1, height // 24 + 2, width // 24 + 2)
        noise = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0, 0]
        depth = (depth * (1 + 0.01 * noise)).flatten()
        scale = (0.5 + 14.5 * torch.sigmoid(rand(height * width, 3) - 1)) * 0.1 * depth[:, None] * 2 / focal
        frames = torch.linalg.qr(rand(4096, 3, 3))[0][torch.arange(height * width) % 4096]  # 4096 orientations will do
        root = frames * scale[:, None]
        parts.append((eye + ray.view(-1, 3) * depth[:, None], root @ root.mT,
                      torch.sigmoid(0.9 + 1.3 * rand(height * width))))
    means, cov, opacity = (torch.cat([a, b]).float() for a, b in zip(*parts[:2]))
    features = torch.rand(len(means), C, generator=g)
    return [means, cov, opacity, features, torch.linalg.inv(poses[2]).float(), K.float()]


def project(means, cov, opacity, w2c, K, height, width, tile):
    """Mean (G', 2), inverse covariance (G', 3), opacity and row of what is seen, nearest first; its box of tiles."""
    p = means @ w2c[:3, :3].T + w2c[:3, 3]
    rows = ((p[:, 2] > 0.01) & (opacity >= 1 / 255)).nonzero()[:, 0]
    rows = rows[p[rows, 2].argsort(stable=True)]
    x, y, z = (p := p[rows]).unbind(1)
    fx, fy, zero = K[0, 0], K[1, 1], torch.zeros_like(z)
    sx = (x / z).clamp(-(K[0, 2] + 0.15 * width) / fx, (1.15 * width - K[0, 2]) / fx)
    sy = (y / z).clamp(-(K[1, 2] + 0.15 * height) / fy, (1.15 * height - K[1, 2]) / fy)
    J = torch.stack([torch.stack([fx / z, zero, -fx * sx / z], -1), torch.stack([zero, fy / z, -fy * sy / z], -1)], 1)
    M = J @ w2c[:3, :3]
    S = M @ cov[rows] @ M.mT + 0.3 * torch.eye(2)
    a, b, c = S[:, 0, 0], S[:, 0, 1], S[:, 1, 1]
    det = a * c - b * b
    mean = torch.stack([fx * x / z + K[0, 2], fy * y / z + K[1, 2]], 1)
    radius = (3.33 * torch.stack([a, c], 1).sqrt()).detach().ceil()  # 3.33 sigma: opacity 1 falls to 1/255
    edge = torch.tensor([-(-width // tile), -(-height // tile)])
    ends = ((mean.detach() + side * radius) / tile for side in (-1, 1))
    low, high = (end.floor().clamp(min=0).minimum(edge - on) for on, end in enumerate(ends))
    off = ((mean + radius) < 0).any(1, keepdim=True)
    high = torch.where(off, low - 1, high)
    return mean, torch.stack([c, -b, a], 1) / det[:, None], opacity[rows], rows, low.long(), high.long()


def tile_lists(low, high, columns, count):
    """Gaussians of every tile, nearest first, tile after tile, and the first of each tile."""
    across = (high - low + 1).clamp(min=0)
    pairs = across.prod(1)
    g = torch.arange(len(pairs)).repeat_interleave(pairs)
    nth = torch.arange(len(g)) - (pairs.cumsum(0) - pairs)[g]
    tile = (low[g, 1] + nth // across[g, 0]) * columns + low[g, 0] + nth % across[g, 0]
    tile, by_tile = tile.sort(stable=True)
    return g[by_tile], torch.searchsorted(tile, torch.arange(count + 1))


def alphas(mean, conic, opacity, g, pixel):
    d = pixel - mean[g]
    sigma = 0.5 * (conic[g, 0] * d[..., 0] ** 2 + conic[g, 2] * d[..., 1] ** 2) + conic[g, 1] * d[..., 0] * d[..., 1]
    return (opacity[g] * torch.exp(-sigma)).clamp(max=0.99)


def standard(means, cov, opacity, features, w2c, K, height, width, tile=16):
    columns, rows_of_tiles = -(-width // tile), -(-height // tile)
    mean, conic, opacity, rows, low, high = project(means, cov, opacity, w2c, K, height, width, tile)
    listed, start = tile_lists(low, high, columns, columns * rows_of_tiles)
    y, x = torch.meshgrid(torch.arange(tile), torch.arange(tile), indexing="ij")
    offset = torch.stack([x, y], -1).view(-1, 1, 2)
    found = []
    with torch.no_grad():  # what gsplat's rasterize_to_indices_in_range does on a GPU
        for t, (a, b) in enumerate(zip(start[:-1].tolist(), start[1:].tolist())):
            if a == b:
                continue
            g = listed[a:b]
            at = offset + torch.tensor([t % columns, t // columns]) * tile  # (P, 1, 2)
            alpha = alphas(mean, conic, opacity, g, at + 0.5)  # (P, K)
            alpha = alpha * (alpha >= 1 / 255)
            keep = (alpha > 0) & ((1 - alpha).cumprod(1) > 1e-4) & (at[..., 0] < width) & (at[..., 1] < height)
            p, k = keep.nonzero().T
            found.append((g[k], at[p, 0, 1] * width + at[p, 0, 0]))
    g, pixel = (torch.cat(x) for x in zip(*found))
    where = torch.stack([pixel % width, pixel // width], 1) + 0.5
    alpha = alphas(mean, conic, opacity, g, where)
    # The light at each pair: an exclusive product within each pixel's pairs, as a running sum of logarithms in float64.
    logs = torch.log1p(-alpha.double())
    total = logs.cumsum(0) - logs
    first = torch.ones_like(pixel, dtype=torch.bool)
    first[1:] = pixel[1:] != pixel[:-1]
    total = total - total[first][first.cumsum(0) - 1]
    weight = alpha * total.exp().float()
    image = torch.zeros(height * width, features.shape[1])
    return image.index_add(0, pixel, weight[:, None] * features[rows[g]]).view(height, width, -1)


def textbook(means, cov, opacity, features, w2c, K, height, width, tile=8, chunk=32, batch=512):
    columns, rows_of_tiles = -(-width // tile), -(-height // tile)
    mean, conic, opacity, rows, low, high = project(means, cov, opacity, w2c, K, height, width, tile)
    listed, start = tile_lists(low, high, columns, columns * rows_of_tiles)
    y, x = torch.meshgrid(torch.arange(tile), torch.arange(tile), indexing="ij")
    offset = torch.stack([x, y], -1).view(1, -1, 1, 2) + 0.5
    out = torch.zeros(columns * rows_of_tiles, tile * tile, features.shape[1])
    for tiles in start.diff().argsort(descending=True).split(batch):
        T, at = torch.ones(len(tiles), tile * tile, 1), 0
        while len(tiles := tiles[(alive := (start[tiles + 1] - start[tiles] > at) & (T.amax((1, 2)) > 1e-4))]):
            T = T[alive]
            place = start[tiles, None] + at + torch.arange(chunk)
            g = listed[place.clamp(max=len(listed) - 1)][:, None]  # (B, 1, K)
            corner = torch.stack([tiles % columns, tiles // columns], 1)[:, None, None] * tile
            alpha = alphas(mean, conic, opacity, g, offset + corner)
            alpha = torch.where((place < start[tiles + 1, None])[:, None] & (alpha >= 1 / 255), alpha, 0.0)
            after = T * (1 - alpha).cumprod(2)
            weight = torch.where(after > 1e-4, torch.cat([T, after[..., :-1]], 2) * alpha, 0.0)
            out[tiles] += weight @ features[rows[g[:, 0]]]
            T, at = torch.where(after[..., -1:] > 1e-4, after[..., -1:], 0.0), at + chunk
    out = out.view(rows_of_tiles, columns, tile, tile, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return out[:height, :width]
