"""A stand-in for Fast3R: true geometry with the errors of a network, for machines without its weights.

Paper   Distill3R Sec. III-B (what a teacher gives); DUSt3R (Wang et al. 2024) Sec. 3.2 for what a confidence means.
In      posed views with measured depth, as 01_data reads them.
Out     a Pointmap (06_distill3r) for each view.
Not     a network: it looks at depth and poses, never at the pictures.
"""
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

data, lift, d3r = (importlib.import_module(name) for name in ("01_data", "02_lift", "06_distill3r"))


class GeometricTeacher:
    """The true depth and poses, disturbed as a network's are.

    A depth has three errors, all relative to it: noise, a pull towards the camera, both growing with depth, and at
    depth edges half of the way to the mean of the surroundings. Global maps have errors of their own, in a pose that is
    off too.
    The confidence is the one that DUSt3R's loss, C * error - 0.2 log C, makes best: 0.2 / the error to expect.
    """

    def __init__(self, size, strength=1.0):
        self.size, self.strength = tuple(size), strength
        self.identity = f"geometry, errors x {strength:g}"

    def view_size(self, height, width):
        return d3r.oriented(self.size, height, width)

    def __call__(self, views, generator) -> list:
        for view in views:
            if view.depth is None or view.c2w is None:
                raise data.DataError(f"{view.name}: no measured depth for the geometric teacher; give --teacher a "
                                     "network")
        world_to_first = torch.linalg.inv(views[0].c2w)
        return [self.pointmap(view, world_to_first @ view.c2w, k > 0, generator) for k, view in enumerate(views)]

    def pointmap(self, view, pose, moved, generator):  # of one view with its pose (4, 4) in the first view's frame
        known, rays = view.depth > 0, lift.pixel_rays(view.K, *view.depth.shape)
        typical = view.depth[known].median() if known.any() else torch.tensor(1.0)
        (z, error), (z_global, error_global) = (self.disturbed(view.depth, typical, generator) for _ in range(2))
        turn, shift = self.strength * moved * torch.randn(2, 3, generator=generator) * torch.tensor([[0.004], [0.008]])
        turn = torch.linalg.matrix_exp(torch.linalg.cross(torch.eye(3), turn.expand(3, 3)))  # radians about an axis
        points = (rays * z_global[..., None]) @ (pose[:3, :3] @ turn).T + pose[:3, 3] + typical * shift
        pose_error = self.strength * moved * (0.008**2 + (0.004 * z_global / typical) ** 2) ** 0.5
        conf = [torch.where(known, 0.2 / e.clamp_min(1e-4), 1).clamp_min(1 + 2**-10)  # the float16 next to 1
                for e in (torch.hypot(error_global, pose_error), error)]
        unknown_is_nan = lambda p: torch.where(known[..., None], p, torch.nan)
        return d3r.Pointmap(unknown_is_nan(points), unknown_is_nan(rays * z[..., None]), *conf)

    def disturbed(self, depth, typical, generator):  # (H, W) -> with errors, and the error to expect in typical depths
        window, far = 2 * (min(depth.shape) // 80) + 3, depth / typical
        mean = lambda x: F.avg_pool2d(x[None, None], window, 1, window // 2, count_include_pad=False)[0, 0]
        around = mean(depth) / mean((depth > 0).to(depth)).clamp_min(1e-9)
        noise, pull = 0.006 + 0.006 * far, 0.01 * far
        smear = 0.5 * (around - depth) / depth.clamp_min(1e-9)
        error = noise * smooth_noise(*depth.shape, generator) - pull + smear
        return depth * (1 + self.strength * error), self.strength * far * (noise**2 + pull**2 + smear**2).sqrt()


def smooth_noise(height, width, generator) -> Tensor:
    """(H, W) of unit variance, alike over some 4 and some 16 pixels: a network's errors are not salt and pepper."""
    fields = [F.interpolate(torch.randn(1, 1, height // cell + 2, width // cell + 2, generator=generator),
                            (height, width), mode="bicubic", align_corners=False) for cell in (4, 16)]
    total = sum(fields)[0, 0]
    return total / total.std()
