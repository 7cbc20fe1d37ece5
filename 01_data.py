"""Posed multi-view scenes: read the formats people have, or make rooms where nobody has anything.

Paper   Splat and Distill (SnD) Sec. 3.1: a scene is S = {(I_i, P_i)}; a step draws two context views and a target.
In      a folder: nerfstudio / instant-ngp `transforms*.json` (also ScanNet++ and FiT3D preprocessing), a COLMAP
        model (`sparse/0`, binary or text), an RGB-D sequence (7-Scenes), or a folder of such folders. No flag says which.
        Beside `images/`, all optional: `masks/ depth/ normals/ labels/` (PNG or .npy, named like the image).
Out     `load_scenes(path) -> [Scene]`, `Scene.view(i, size) -> View`; a report and one contact sheet a scene.
Run     python 01_data.py                        built-in rooms -> data/, 20 s on a 2-core CPU
        python 01_data.py --scene_dir my_scene   what is in a folder, before anything is trained
Copy    01_data.py alone.
Not     fisheye cameras, images without poses, video files.
Words   V views, H W pixels, K (3, 3) intrinsics, c2w camera-to-world, w2c its inverse, target / context as in SnD.

Conventions, true in all six files. Camera axes are OpenCV's: x right, y down, z forward. `K` is in pixels of the image
at hand and pixel centres sit at +0.5: the top-left pixel's centre is (0.5, 0.5). Depth is z-depth in the data set's
unit (metres for rooms and RGB-D). Images are (3, H, W) RGB in [0, 1]; maps are (H, W) or (H, W, C). Mask id 0 means
unlabelled, depth 0 not measured, label 255 ignore; normals are unit vectors of the camera frame, towards the camera.
"""
import argparse
import json
import math
import os
import re
import struct
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # flips y and z: OpenGL camera axes <-> OpenCV camera axes, its own inverse
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".JPG", ".JPEG", ".PNG")
MAPS = ("mask", "depth", "normal", "label")
CLASSES = ("floor", "ceiling", "wall", "table", "chair", "sofa", "cabinet", "lamp", "plant", "picture")
DEFAULT_ROOMS = dict(scenes=48, views=16, size=(96, 128), seed=0)
BUILT_IN = {"data": DEFAULT_ROOMS, "data_small": DEFAULT_ROOMS | dict(scenes=200, size=(48, 64))}  # the latter for 06_distill3r.py

# 7-Scenes was recorded with one Kinect whose depth is not registered to its colour: the commonly published calibration.
KINECT_DEPTH_F, KINECT_COLOUR_F = 585.0, 525.0
KINECT_DEPTH_TO_COLOUR = np.array([[0.9999148, 0.0026753, -0.0079073, -0.0255589], [-0.0027419, 0.9999173, -0.0081503, 0.0001011],
                                   [0.0078780, 0.0081711, 0.9998750, 0.0020318], [0.0, 0.0, 0.0, 1.0]])


class DataError(Exception):
    """Bad input. The message is one line that names the file and the remedy."""


def write_whole(path, content: bytes):
    """Written under a temporary name, flushed, and renamed: a killed run leaves the old file or the new, nothing between.

    The temporary name is one a process and thread, so that two threads may write the same file at the same time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # still there where the disk was full


def positive(text):  # the type of a flag that counts
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


# ------------------------------------------------------------------------------------------------ views and scenes


class View(NamedTuple):
    name: str
    image: Tensor  # (3, H, W) RGB in [0, 1]
    K: Tensor  # (3, 3) pixels of this image
    c2w: Tensor  # (4, 4) OpenCV camera to world
    mask: Tensor | None  # (H, W) int64 instance id, 0 = unlabelled; ids need not agree between views
    depth: Tensor | None  # (H, W) z-depth, 0 = not measured
    normal: Tensor | None  # (H, W, 3) unit, camera frame, 0 = unknown
    label: Tensor | None  # (H, W) int64 class, 255 = ignore


@dataclass
class Frame:
    """One line of a scene's table of contents: where the files are, nothing decoded yet."""
    name: str
    image: Path
    K: np.ndarray  # (3, 3) pixels of the stored image
    c2w: np.ndarray  # (4, 4) OpenCV
    size: tuple  # (H, W) as the data set declares it, or None
    distortion: tuple = ((), (0.0, 0.0))  # radial (k1, k2, ...), tangential (p1, p2)
    mask: Path | None = None
    depth: Path | None = None
    normal: Path | None = None
    label: Path | None = None
    two_regions: bool = False  # the mask is a validity mask: its two sides are two regions


def covering_crop(stored, size):
    """Of a picture (H, W) that is scaled to cover `size` (H, W) and cropped about its centre: -> the scale, and the box (left,
    top, right, bottom) of its pixels that stays."""
    (full_h, full_w), (height, width) = stored, size
    scale = max(height / full_h, width / full_w)
    left, top = max(0.0, (full_w - width / scale) / 2), max(0.0, (full_h - height / scale) / 2)
    return scale, (left, top, min(full_w, left + width / scale), min(full_h, top + height / scale))  # Pillow refuses 1e-15 beyond


class Scene:
    """Posed views of one place. Holds paths and cameras; pictures are decoded when `view` asks for them."""

    def __init__(self, name, frames, depth_scale=1e-3, points=None, notes=(), kinect=False):
        self.name, self.frames, self.depth_scale = name, frames, depth_scale
        self.points, self.notes, self.kinect = points, list(notes), kinect
        self.c2w = torch.from_numpy(np.stack([f.c2w for f in frames])).float()  # (V, 4, 4)
        self._pairs = {}

    def __len__(self):
        return len(self.frames)

    def subset(self, indices):
        """The scene with these views alone; its depth range stays that of all of them."""
        part = Scene(self.name, [self.frames[i] for i in indices], self.depth_scale, self.points, self.notes, self.kinect)
        part.depth_range = self.depth_range
        return part

    def view(self, i, size=None, maps=True) -> View:
        """View i, undistorted; with `size` (H, W) scaled to cover it, centre-cropped (never stretched), K to match.

        Maps are sampled at the nearest stored pixel, images with an antialiased bicubic filter; without `maps` they are not
        read. Raises DataError naming a file that cannot be decoded.
        """
        frame = self.frames[i]
        full_h, full_w = frame.size
        height, width = size or frame.size
        scale, box = covering_crop(frame.size, (height, width))
        left, top, *_ = box
        K = undistorted_K(frame)
        rows, cols = np.mgrid[0:height, 0:width] + 0.5
        x, y = distort(cols / scale + left, rows / scale + top, K, frame)  # stored pixel behind every pixel of the view
        image = decode(frame.image, colour=True)
        if any(frame.distortion[0]) or any(frame.distortion[1]):
            image = undistort_image(image, K, frame)
        image = image.resize((width, height), Image.BICUBIC, box=box)
        K = np.array([[scale, 0, -scale * left], [0, scale, -scale * top], [0, 0, 1]]) @ K
        look_up = lambda stored: torch.from_numpy(nearest(stored, x / full_w, y / full_h))
        mask = depth = normal = label = None
        if maps and frame.mask:
            ids = decode_ids(frame.mask)
            mask = look_up(1 + (ids > ids.max() / 2) if frame.two_regions else ids).long()  # stored as 0/1 or as 0/255
        if maps and frame.depth:
            depth = look_up(self._depth(frame)).float()
        if maps and frame.normal:
            is_array = frame.normal.suffix == ".npy"  # of floats; pictures hold -1 ... 1 as 0 ... 255
            normal = look_up(decode_map(frame.normal) if is_array else decode(frame.normal, colour=True)).float()
            normal = normal if is_array else normal / 127.5 - 1
            length = normal.norm(dim=-1, keepdim=True)
            normal = torch.where((length > 0.5) & (length < 1.5), normal / length, 0.0)  # black and grey mean "unknown"
        if maps and frame.label:
            label = look_up(decode_ids(frame.label)).long()
        pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255
        return View(frame.name, pixels, torch.from_numpy(K).float(), self.c2w[i], mask, depth, normal, label)

    def _depth(self, frame):  # -> (H, W) float32 z-depth in the data set's unit
        stored = decode_map(frame.depth)
        stored = stored.reshape(stored.shape[:2])  # arrays of (H, W, 1) are common
        depth = np.where(stored == 65535, 0, stored).astype(np.float32) * self.depth_scale  # 65535 = sensor saturated
        depth = np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0).clip(0)
        return register_kinect_depth(depth) if self.kinect else depth

    @cached_property
    def depth_range(self):
        """(near, far) of what the cameras see: from measured depth, else sparse points, else the camera layout."""
        # Differs: the official code takes 1 and 100 in the data set's unit, so that nothing nearer than a metre exists.
        some = np.linspace(0, len(self) - 1, min(8, len(self))).astype(int)
        depths = [self._depth(self.frames[i]).ravel()[::7] for i in some if self.frames[i].depth]
        if self.points is not None:
            w2c = np.linalg.inv(np.stack([self.frames[i].c2w for i in some]))
            depths += [self.points @ m[2, :3] + m[2, 3] for m in w2c]
        if depths:
            seen = np.concatenate(depths)
            seen = seen[seen > 0]
            if len(seen) > 50:
                near, far = np.percentile(seen, [1, 99])
                return float(0.8 * near), float(1.2 * far)
        return layout_depth_range(np.stack([f.c2w for f in self.frames]))


def layout_depth_range(c2w):  # (V, 4, 4) -> (near, far)
    """Cameras around something look at it: take the distance to the point nearest to all optical axes. Cameras that
    look past each other have no such point; their spread and the step to the next camera are then all there is."""
    centre, axis = c2w[:, :3, 3], c2w[:, :3, 2]
    normal_to_axis = np.eye(3) - axis[:, :, None] * axis[:, None]  # (V, 3, 3) projectors
    focus = np.linalg.lstsq(normal_to_axis.sum(0), (normal_to_axis @ centre[:, :, None]).sum(0)[:, 0], rcond=None)[0]
    distance = ((focus - centre) * axis).sum(1)
    spread = np.median(np.linalg.norm(centre - centre.mean(0), axis=1)) or 1.0
    if (distance > 0).mean() > 0.9 and 0.3 * spread < np.median(distance) < 30 * spread:
        return float(0.35 * np.median(distance)), float(4 * np.median(distance))
    apart = np.linalg.norm(centre[:, None] - centre, axis=2) + np.diag(np.full(len(centre), np.inf))
    step = np.median(apart.min(1))
    return float(max(0.4 * spread, 2.5 * step)), float(max(12 * spread, 25 * step))


def split(scenes, part):
    """The `train` or `val` scenes: every eighth scene is held out (the last one, where there are fewer than eight)."""
    # Differs: the official code trains on every scene folder, the validation scenes included.
    assert part in ("train", "val"), f"split takes 'train' or 'val', not {part!r}"
    held_out = set(range(7, len(scenes), 8)) or {len(scenes) - 1} - {0}
    return [s for i, s in enumerate(scenes) if (i in held_out) == (part == "val")]


def held_out_views(scene) -> list[int]:
    """Where there is a single scene: every eighth of its views is held out, from the third on."""
    return list(range(min(2, len(scene) - 1), len(scene), 8))


# ------------------------------------------------------------------------------------------------ pixels and lenses


def decode(path, colour=False):
    """The picture at `path`, decoded to the last byte; transparent pixels become white. Raises DataError."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be decoded ({reason}); restore the file or pass --skip_bad_frames") from None
    if colour and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if colour and image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB") if colour else image


def decode_map(path):  # -> (H, W) or (H, W, C) as stored
    if path.suffix != ".npy":
        return np.array(decode(path))
    try:
        return np.lib.format.open_memmap(path, mode="r")  # looks at the header and the length of the file, not at its data
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole .npy array ({str(error).splitlines()[0]}); restore the file") from None


def decode_ids(path):  # -> (H, W) int64; palette and grey files hold ids, colour files hold ids in base 256
    ids = decode_map(path).astype(np.int64)
    if ids.ndim == 2:
        return ids
    return ids[..., :3] @ np.array([1, 256, 65536]) if ids.shape[2] >= 3 else ids[..., 0]  # (H, W, 1) or grey and alpha


def nearest(stored, x, y):  # (Hs, Ws, ...) looked up at x, y (H, W) in [0, 1] of its width and height
    stored = np.asarray(stored)
    rows = np.clip(np.floor(y * stored.shape[0]), 0, stored.shape[0] - 1).astype(int)
    cols = np.clip(np.floor(x * stored.shape[1]), 0, stored.shape[1] - 1).astype(int)
    return stored[rows, cols]


def distort(x, y, K, frame):  # pixels of the undistorted image with intrinsics K -> pixels of the stored image
    radial, (p1, p2) = frame.distortion
    u, v = (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    r2 = u * u + v * v
    gain = 1 + sum(k * r2 ** (n + 1) for n, k in enumerate(radial))
    u, v = (u * gain + 2 * p1 * u * v + p2 * (r2 + 2 * u * u), v * gain + p1 * (r2 + 2 * v * v) + 2 * p2 * u * v)
    return frame.K[0, 0] * u + frame.K[0, 2], frame.K[1, 1] * v + frame.K[1, 2]


def undistorted_K(frame):
    """K of the undistorted image: the focal length is raised until no pixel of it falls outside the stored image, and
    none where the lens polynomial has turned round and shows the same place again."""
    height, width = frame.size
    x, y = np.meshgrid(np.linspace(0, width, 33), np.linspace(0, height, 33))
    for zoom in np.linspace(1, 2, 401):
        K = frame.K * np.array([[zoom], [zoom], [1]])
        K[:2, 2] = frame.K[:2, 2]
        xs, ys = distort(x, y, K, frame)
        inside = min(xs.min(), ys.min()) > -0.5 and xs.max() < width + 0.5 and ys.max() < height + 0.5
        if inside and np.diff(xs, axis=1).min() > 0 and np.diff(ys, axis=0).min() > 0:
            return K
    raise DataError(f"{frame.image}: its distortion coefficients bend the border out of the picture; "
                    "undistort the images first (colmap image_undistorter)")


def undistort_image(image, K, frame):
    height, width = frame.size
    rows, cols = np.mgrid[0:height, 0:width] + 0.5
    x, y = distort(cols, rows, K, frame)
    grid = torch.from_numpy(np.stack([2 * x / width - 1, 2 * y / height - 1], -1)).float()[None]
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None]
    straight = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    return Image.fromarray(straight[0].permute(1, 2, 0).round().byte().numpy())


def register_kinect_depth(depth):  # (480, 640) of the depth camera -> the same, seen from the colour camera
    height, width = depth.shape
    rows, cols = np.nonzero(depth)
    z = depth[rows, cols]
    centre = np.array([width / 2, height / 2])
    rays = (np.stack([cols, rows], 1) - centre) / KINECT_DEPTH_F  # this calibration counts pixels from (0, 0)
    points = np.concatenate([rays * z[:, None], z[:, None]], 1) @ KINECT_DEPTH_TO_COLOUR[:3, :3].T + KINECT_DEPTH_TO_COLOUR[:3, 3]
    target = np.round(points[:, :2] / points[:, 2:] * KINECT_COLOUR_F + centre).astype(int)
    inside = (target >= 0).all(1) & (target < [width, height]).all(1)
    target, z = target[inside], points[inside, 2]
    order = np.argsort(-z, kind="stable")  # written far to near: the nearest surface stays
    registered = np.zeros_like(depth)
    registered[target[order, 1], target[order, 0]] = z[order]
    return registered


# ------------------------------------------------------------------------------------------------ readers


def load_scenes(path, skip_bad_frames=False) -> list[Scene]:
    """All scenes at `path`: the folder itself, or every scene folder up to three levels below it, in natural order.

    Headers of all files are checked here, so that a run does not die of them later. Raises DataError (one line with
    the remedy) on the first bad one; with `skip_bad_frames` every file is decoded to its end, and frames with a problem
    are left out and listed in `Scene.notes`.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; give --scene_dir a scene, or a folder of scenes")
    scenes = []
    for folder, reader in find_scenes(root):
        scene_name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
        frames, extra = reader(folder)
        scenes.append(checked_scene(scene_name, folder, frames, extra, skip_bad_frames))
    if not scenes:
        raise DataError(f"{path}: no scene in here (looked for transforms*.json, sparse/0, frame-*.pose.txt, three levels "
                        "deep); for photos without poses run COLMAP first and put its model in sparse/0")
    return scenes


def natural(path):
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def find_scenes(folder, levels=3):
    reader = reader_of(folder)
    if reader:
        return [(folder, reader)]
    below = sorted((d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")), key=natural) if levels else []
    return [found for d in below for found in find_scenes(d, levels - 1)]


def transforms_files(folder):
    """All transforms files of a scene, the one to read first. Undistorted ones (ScanNet++) win over fisheye ones."""
    places = (folder, folder / "nerfstudio", folder / "dslr" / "nerfstudio")
    found = [f for place in places for f in sorted(place.glob("transforms*.json"))]
    rank = ["transforms_undistorted.json", "transforms.json", "transforms_train.json"]
    return sorted(found, key=lambda f: rank.index(f.name) if f.name in rank else len(rank))


def colmap_folder(folder):
    places = (folder / "sparse" / "0", folder / "sparse", folder / "colmap" / "sparse" / "0")
    return next((p for p in places for kind in ("bin", "txt") if (p / f"cameras.{kind}").exists()), None)


def reader_of(folder):
    if transforms_files(folder):
        return read_transforms
    if colmap_folder(folder):
        return read_colmap
    return read_rgbd if next(folder.glob("frame-*.pose.txt"), None) else None


def checked_scene(name, folder, frames, extra, skip_bad_frames):
    """The border: everything that is wrong with a scene is said here, in one line."""
    seen = set()
    for frame in frames:
        if frame.image in seen:
            raise DataError(f"{folder}: {frame.name} is listed twice; keep one of the two frames")
        seen.add(frame.image)
    problems = {frame.name: problem for frame in frames if (problem := problem_of(frame, thorough=skip_bad_frames))}
    first = next(iter(problems.values()), None)
    notes = list(extra.pop("notes", ()))
    if problems and not skip_bad_frames:
        remedy = "" if "--skip_bad_frames" in first else "; mend it or pass --skip_bad_frames"
        more = f" ({len(problems)} of {len(frames)} frames have a problem)" if len(problems) > 1 else ""
        raise DataError(first + remedy + more)
    notes += [f"left out: {problem}" for problem in problems.values()]
    frames = [frame for frame in frames if frame.name not in problems]
    if len(frames) < 3:
        raise DataError(f"{folder}: {len(frames)} usable views, but two contexts and a target make three; add views"
                        + (f" ({len(problems)} left out, the first because {first})" if problems else ""))
    for frame in frames:
        u, _, vt = np.linalg.svd(frame.c2w[:3, :3])  # poses in text files are rounded: the nearest true rotation
        frame.c2w = np.vstack([np.hstack([u @ vt, frame.c2w[:3, 3:]]), [0, 0, 0, 1]])
    lacking = {kind: sum(getattr(f, kind) is None for f in frames) for kind in MAPS}
    notes += [f"{n} of {len(frames)} views have no {kind}" for kind, n in lacking.items() if 0 < n < len(frames)]
    return Scene(name, frames, notes=notes, **extra)


def problem_of(frame, thorough=False):  # -> what is wrong with this frame, in words, or None
    if not frame.image.exists():
        return f"{frame.image} does not exist, but {frame.name} has a pose"
    try:
        size = whole_size(frame.image, thorough)
        if frame.size and size != frame.size:
            return (f"{frame.image} is {size[1]}x{size[0]}, but its intrinsics are for {frame.size[1]}x{frame.size[0]}: "
                    "scale fl_x, fl_y, cx, cy, w, h, or use the images they were made for")
        frame.size = size
        return problem_of_camera(frame) or problem_of_maps(frame, thorough)
    except DataError as error:
        return str(error)


def problem_of_camera(frame):
    if not np.isfinite(frame.c2w).all():
        return f"{frame.image}: its pose is not finite"
    if frame.c2w.shape != (4, 4):
        return f"{frame.image}: its pose is {frame.c2w.shape}, not a 4x4 matrix"
    rotation, last = frame.c2w[:3, :3], frame.c2w[3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.02 or np.linalg.det(rotation) < 0:
        return f"{frame.image}: its pose is not a rigid motion (determinant {np.linalg.det(rotation):.3f})"
    if np.abs(last - [0, 0, 0, 1]).max() > 1e-6:
        return f"{frame.image}: the last row of its pose is {last.tolist()}, not 0 0 0 1; is the matrix transposed?"
    if not np.isfinite(frame.K).all() or min(frame.K[0, 0], frame.K[1, 1]) <= 0 or (frame.K[2] != [0, 0, 1]).any():
        return f"{frame.image}: its intrinsics are singular (focal lengths {frame.K[0, 0]:g}, {frame.K[1, 1]:g})"
    (height, width), (cx, cy) = frame.size, frame.K[:2, 2]
    if not (0 < cx < width and 0 < cy < height):
        return (f"{frame.image} is {width}x{height}, but its intrinsics put the centre at ({cx:g}, {cy:g}): "
                "scale them to the size of the image")
    undistorted_K(frame)  # raises where the lens cannot be undone


def problem_of_maps(frame, thorough):
    height, width = frame.size
    for kind in MAPS:
        path = getattr(frame, kind)
        if path is None:
            continue
        if not path.exists():
            return f"{path} does not exist, but {frame.name} names it"
        map_h, map_w = whole_size(path, thorough, CHANNELS.get(kind))
        if kind == "depth" and abs(map_w / map_h - width / height) < 0.02 * width / height:
            continue  # sensors often measure depth at another resolution of the same field of view
        if (map_h, map_w) != (height, width):
            return (f"{path} is {map_w}x{map_h}, but {frame.image.name} is {width}x{height}: "
                    f"a {kind} must have the size of its image")


def header(path):  # -> (H, W, C) of a picture, not decoded; None where even that cannot be read
    try:
        with Image.open(path) as image:
            return (*image.size[::-1], len(image.getbands()))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


CHANNELS = {"depth": (1,), "normal": (3, 4)}  # of the maps that have a fixed number; ids may be grey or colours


def whole_size(path, thorough, channels=None):  # -> (H, W) of a file that seems whole, decoded to its end if `thorough`
    if path.suffix == ".npy":
        shape = decode_map(path).shape
    elif not (shape := header(path)) or thorough or not whole_file(path):
        shape = np.array(decode(path)).shape
    count = 1 if len(shape) == 2 else shape[-1]
    if len(shape) not in (2, 3) or 0 in shape or (channels and count not in channels):
        wanted = f" with C = {' or '.join(map(str, channels))}" if channels else ""
        raise DataError(f"{path}: its shape is {tuple(shape)}, not (H, W) or (H, W, C){wanted}; write it again")
    return shape[:2]


def whole_file(path):
    """Whether a PNG or JPEG ends as it should; a cheap look that makes truncated files known before a run starts."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 12))
        end = file.read()
    return end.endswith(b"\xff\xd9") if path.suffix.lower() in (".jpg", ".jpeg") else end[4:8] == b"IEND"


def inside(path, root, where):
    """`path` as a normal path; a file outside the scene folder is refused, whoever wrote the list."""
    path = Path(os.path.normpath(path))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: names {path}, outside the scene folder; move the file into {root} and use a relative path")
    return path


def maps_beside(image, root):
    """The maps of an image in the folders beside its own: `masks/x.png` or `masks/x.jpg.png` of `images/x.jpg`, and
    `masks/cam0/x.png` of `images/cam0/x.jpg`."""
    folders = Path(os.path.relpath(image.parent, root)).parts  # () where images lie in the root itself
    homes = (root, image.parent.parent if folders else root)
    names = [Path(*folders[1:], f"{name}.{end}") for name in (image.name, image.stem) for end in ("png", "npy")]

    def first(*kinds):
        paths = (home / kind / name for kind in kinds for home in homes for name in names)
        return next((path for path in paths if path.exists()), None)
    mask = first("instance_segmentation", "masks")
    return dict(mask=mask, depth=first("depth"), normal=first("normals"), label=first("labels"))


def read_transforms(folder):
    """nerfstudio / instant-ngp: OpenGL camera-to-world, intrinsics per file or per frame."""
    file, *others = transforms_files(folder)
    root = file.parent.parent if file.parent.name == "nerfstudio" else file.parent
    try:
        meta = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not JSON ({str(error).splitlines()[0]}); write it again") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list):
        raise DataError(f"{file}: has no list 'frames'; is it a nerfstudio file?")
    frames = [transforms_frame(meta, entry, root, f"{file}: frame {n}") for n, entry in enumerate(meta["frames"])]
    try:
        depth_scale = float(meta.get("depth_unit_scale_factor", 1e-3))
        assert 0 < depth_scale < math.inf
    except (AssertionError, TypeError, ValueError):
        raise DataError(f"{file}: 'depth_unit_scale_factor' must be a positive number (0.001 for millimetres)") from None
    notes = [f"ignored: {other.relative_to(folder)} ({file.relative_to(folder)} comes first)" for other in others]
    known = {frame.image for frame in frames}
    kinds, places = {p.suffix for p in known}, {p.parent for p in known if p.parent.is_dir()}
    spare = sum(p.suffix in kinds and p not in known for place in places for p in place.iterdir())
    notes += [f"ignored: {spare} pictures without a pose"] if spare else []
    return frames, dict(depth_scale=depth_scale, notes=notes)


def transforms_frame(meta, entry, root, where):
    for key, kind in (("file_path", str), ("transform_matrix", list)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise DataError(f"{where} lacks '{key}'; add it or remove the frame")
    get = lambda key, default=None: default if entry.get(key, meta.get(key)) is None else entry.get(key, meta.get(key))
    model = str(get("camera_model", "")).upper()
    if get("is_fisheye") or any(word in model for word in ("FISHEYE", "EQUIRECT", "ORTHO")):
        raise DataError(f"{where}: {model or 'fisheye'} cameras are not read; undistort first "
                        "(ScanNet++ ships transforms_undistorted.json)")
    image = find_image(root, entry["file_path"], where)

    def focal(axis, side):
        angle = get(f"camera_angle_{axis}")
        return get(f"fl_{axis}", None if angle is None else 0.5 * side / math.tan(0.5 * float(angle)))
    try:
        declared = (int(get("h")), int(get("w"))) if get("h") and get("w") else None
        height, width = declared or (header(image) or (1, 1))[:2]  # an image that cannot be read is named later
        fx = focal("x", width)
        fy = focal("y", height) or fx
        if fx is None:
            raise DataError(f"{where} has neither 'fl_x' nor 'camera_angle_x'; add the focal length")
        K = np.array([[fx, 0, get("cx", width / 2)], [0, fy, get("cy", height / 2)], [0, 0, 1]], float)
        pose = np.array(entry["transform_matrix"], float)
        radial, tangential = (tuple(float(get(k, 0.0)) for k in keys) for keys in (("k1", "k2", "k3", "k4"), ("p1", "p2")))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{where}: a number is not a number ({str(error).splitlines()[0]}); mend the frame") from None
    pose = np.vstack([pose, [0, 0, 0, 1]]) if pose.shape == (3, 4) else pose
    maps = maps_beside(image, root)
    named = {kind: inside(root / str(entry[key]), root, where) for kind, key in
             (("valid", "mask_path"), ("mask", "instance_file_path"), ("depth", "depth_file_path"),
              ("normal", "normal_file_path"), ("label", "label_file_path")) if entry.get(key)}
    valid = named.pop("valid", None)
    maps |= named
    two_regions = valid is not None and maps["mask"] in (None, valid)
    if two_regions:
        maps["mask"] = valid
    c2w = pose * OPENGL.diagonal() if pose.shape == (4, 4) else pose
    return Frame(entry["file_path"], image, K, c2w, declared, (radial, tangential), two_regions=two_regions, **maps)


def find_image(root, file_path, where):
    """`file_path` below the scene, as written or in the folders where converters put images; also without its ending."""
    first = inside(root / file_path, root, where)
    places = [first] + [root / d / file_path for d in ("images", "undistorted_images", "resized_undistorted_images")]
    endings = ("",) if first.suffix in IMAGE_TYPES else ("", *IMAGE_TYPES)
    candidates = [p.with_name(p.name + end) for p in places for end in endings]
    return next((p for p in candidates if p.is_file()), first)


def read_colmap(folder):
    """A COLMAP model: world-to-camera quaternions (w, x, y, z), OpenCV axes, pixel (0, 0) at the top-left corner."""
    model = colmap_folder(folder)
    try:
        cameras, poses, points = (colmap_binary if (model / "cameras.bin").exists() else colmap_text)(model)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; a COLMAP model is cameras, images and points3D") from None
    except (struct.error, ValueError, IndexError):
        raise DataError(f"{model}: the COLMAP model is cut off or damaged; export it again") from None
    root = folder / "images"
    if not root.is_dir():
        raise DataError(f"{root} does not exist, but {model} is a COLMAP model of images; put them there")
    frames = []
    for name, camera, quaternion, translation in poses:
        if camera not in cameras:
            raise DataError(f"{model}: image {name} uses camera {camera}, which the model lacks; export it again")
        image = inside(root / name, root, str(model))
        K, size, distortion = colmap_camera(*cameras[camera], model)
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = rotation_of(quaternion), translation
        c2w = np.linalg.inv(w2c) if np.isfinite(w2c).all() else w2c  # a pose that is not finite is named later
        frames.append(Frame(name, image, K, c2w, size, distortion, **maps_beside(image, folder)))
    frames.sort(key=lambda frame: natural(frame.name))
    spare = sum(p.suffix in IMAGE_TYPES for p in root.rglob("*")) - len(frames)
    return frames, dict(points=points, notes=[f"ignored: {spare} pictures without a pose"] if spare > 0 else [])


def rotation_of(quaternion):  # (w, x, y, z) -> (3, 3)
    with np.errstate(invalid="ignore"):  # 0 0 0 0 is no rotation: nan
        w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


COLMAP_MODELS = {0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
                 5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
                 9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12)}  # id -> name, number of parameters


def colmap_camera(name, width, height, params, model):
    """-> K, (H, W), distortion of the five models whose lens is the OpenCV polynomial."""
    if len(params) != dict(COLMAP_MODELS.values()).get(name, len(params)):
        raise DataError(f"{model}: a {name} camera has {len(params)} parameters; export the model again")
    if name in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        (f, cx, cy), radial, tangential = params[:3], params[3:], (0.0, 0.0)
        fx = fy = f
    elif name in ("PINHOLE", "OPENCV"):
        (fx, fy, cx, cy), radial, tangential = params[:4], params[4:6], tuple(params[6:8]) or (0.0, 0.0)
    else:
        raise DataError(f"{model}: camera model {name} is not read; run colmap image_undistorter and use its output")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), (height, width), (tuple(radial), tangential)


def colmap_binary(model):  # -> {id: (name, W, H, params)}, [(image, camera, quaternion, translation)], (M, 3)
    def reader(name):
        data, at = (model / name).read_bytes(), 0

        def take(form):
            nonlocal at
            values = struct.unpack_from("<" + form, data, at)
            at += struct.calcsize("<" + form)
            return values

        def text():
            nonlocal at
            end = data.index(b"\0", at)
            word, at = data[at:end].decode(), end + 1
            return word
        return take, text

    take, _ = reader("cameras.bin")
    cameras = {}
    for _ in range(take("Q")[0]):
        identity, kind, width, height = take("iiQQ")
        if kind not in COLMAP_MODELS:
            raise DataError(f"{model}: camera {identity} has the unknown model {kind}; run colmap image_undistorter")
        name, count = COLMAP_MODELS[kind]
        cameras[identity] = (name, width, height, take(f"{count}d"))
    take, text = reader("images.bin")
    poses = []
    for _ in range(take("Q")[0]):
        _, *pose, camera = take("i7di")
        poses.append((text(), camera, pose[:4], pose[4:]))
        take(f"{24 * take('Q')[0]}x")  # its 2D points are not needed
    take, _ = reader("points3D.bin")
    points = []
    for _ in range(take("Q")[0]):
        _, x, y, z, _, _, _, _, track = take("Q3d3BdQ")
        points.append((x, y, z))
        take(f"{8 * track}x")
    return cameras, poses, np.array(points).reshape(-1, 3)


def colmap_text(model):  # the same from cameras.txt, images.txt (every second line lists 2D points), points3D.txt
    lines = lambda name: [line.split() for line in (model / name).read_text().splitlines() if not line.startswith("#")]
    cameras = {int(w[0]): (w[1], int(w[2]), int(w[3]), tuple(map(float, w[4:]))) for w in lines("cameras.txt") if w}
    poses = [(" ".join(w[9:]), int(w[8]), tuple(map(float, w[1:5])), tuple(map(float, w[5:8])))
             for w in lines("images.txt")[::2] if w]
    points = [tuple(map(float, w[1:4])) for w in lines("points3D.txt") if w]
    return cameras, poses, np.array(points).reshape(-1, 3)


def read_rgbd(folder):
    """An RGB-D sequence as 7-Scenes stores it: frame-XXXXXX.{color, depth, pose}, pose = camera-to-world of the depth camera.

    With the Kinect's intrinsics (or none) beside it, depth is registered into the colour camera; with any other
    `camera-intrinsics.txt`, colour and depth are taken as registered already.
    """
    listed = folder / "camera-intrinsics.txt"
    try:
        K = np.array(listed.read_text().split(), float).reshape(3, 3) if listed.exists() else None
    except ValueError:
        raise DataError(f"{listed}: not nine numbers; write K as three rows of three") from None
    kinect = K is None or K[[0, 1, 0, 1], [0, 1, 2, 2]].tolist() == [KINECT_DEPTH_F, KINECT_DEPTH_F, 320, 240]
    if kinect:
        K = np.array([[KINECT_COLOUR_F, 0, 320.5], [0, KINECT_COLOUR_F, 240.5], [0, 0, 1]])  # counted from pixel centres: + 0.5
    frames = []
    for file in sorted(folder.glob("frame-*.pose.txt")):
        stem = file.name.removesuffix(".pose.txt")
        try:
            pose = np.array(file.read_text().split(), float).reshape(4, 4)
        except ValueError:
            raise DataError(f"{file}: not sixteen numbers; restore the pose or remove the frame") from None
        image = next((p for end in IMAGE_TYPES if (p := folder / f"{stem}.color{end}").exists()), folder / f"{stem}.color.png")
        depth = folder / f"{stem}.depth.png"
        c2w = pose @ np.linalg.inv(KINECT_DEPTH_TO_COLOUR) if kinect and np.isfinite(pose).all() else pose
        maps = maps_beside(image, folder) | {"depth": depth if depth.exists() else None}
        frames.append(Frame(image.name, image, K, c2w, (480, 640) if kinect else None, **maps))
    note = ["depth registered into the colour camera with the published Kinect calibration of 7-Scenes"]
    return frames, dict(kinect=kinect, notes=note if kinect else [])


# ------------------------------------------------------------------------------------------------ triplets


def frustum_points(scene, i):  # -> (M, 3) world points that fill what view i sees, uniform in inverse depth
    frame, (near, far) = scene.frames[i], scene.depth_range
    height, width = frame.size
    x, y, inverse = np.meshgrid((np.arange(8) + 0.5) / 8 * width, (np.arange(6) + 0.5) / 6 * height,
                                np.linspace(1 / far, 1 / near, 5)[1:-1], indexing="ij")
    rays = np.stack([(x - frame.K[0, 2]) / frame.K[0, 0], (y - frame.K[1, 2]) / frame.K[1, 1], np.ones_like(x)], -1)
    return (rays / inverse[..., None]).reshape(-1, 3) @ frame.c2w[:3, :3].T + frame.c2w[:3, 3]


def overlap(scene, i, j):
    """The share of view i's frustum that view j sees, and the other way round: the smaller of the two."""
    def share(points, frame):
        seen = (points - frame.c2w[:3, 3]) @ frame.c2w[:3, :3]  # world -> camera
        pixel = seen @ frame.K.T
        x, y = pixel[:, 0] / pixel[:, 2], pixel[:, 1] / pixel[:, 2]
        return ((seen[:, 2] > 0) & (x > 0) & (x < frame.size[1]) & (y > 0) & (y < frame.size[0])).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return min(share(frustum_points(scene, i), scene.frames[j]), share(frustum_points(scene, j), scene.frames[i]))


def context_pairs(scene, target, least, widest):
    """Pairs of views that see `least` of what `target` sees, with `target` between them, and whose baseline is at most
    `widest` times the typical depth: a pair that stereo can use."""
    if (target, least, widest) in scene._pairs:
        return scene._pairs[target, least, widest]
    centre = np.stack([f.c2w[:3, 3] for f in scene.frames])
    near, far = scene.depth_range
    typical = 2 / (1 / near + 1 / far)
    close = np.argsort(np.linalg.norm(centre - centre[target], axis=1))[:25]
    seeing = [j for j in close if j != target and overlap(scene, target, j) >= least]
    pairs = []
    for a, b in combinations(seeing, 2):
        baseline = np.linalg.norm(centre[a] - centre[b]) / typical
        between = (centre[a] - centre[target]) @ (centre[b] - centre[target]) < 0
        if 0.02 < baseline < widest and between and overlap(scene, a, b) >= 0.75 * least:
            pairs.append((int(a), int(b)))
    return scene._pairs.setdefault((target, least, widest), pairs)


def sample_triplet(scene, generator, targets=None):
    """-> (context_a, context_b, target): distinct views chosen by geometry, not by frame number (SnD Sec. 3.1).

    Both contexts see at least half of the target's frustum, the target lies between them, and their baseline is at most
    0.4 of the typical depth; a target without such a pair is asked for less. `targets` restricts the target (to hold
    views out). Raises DataError when no three views overlap.
    """
    # Differs: the official sampler takes frame gaps of 8, and its target may be one of the contexts.
    targets = list(range(len(scene))) if targets is None else list(targets)
    for n in torch.randperm(len(targets), generator=generator)[:400].tolist():
        for least, widest in ((0.5, 0.4), (0.5, 0.8), (0.25, 1.0), (0.1, 2.0)):
            pairs = context_pairs(scene, targets[n], least, widest)
            if pairs:
                a, b = pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
                return a, b, targets[n]
    raise DataError(f"{scene.name}: no three views overlap with a usable baseline; add views in between, or drop the scene")


# ------------------------------------------------------------------------------------------------ superpixels


def superpixels(image: Tensor, count: int) -> Tensor:
    """SLIC superpixels of `image` (3, H, W) -> (H, W) int64 ids from 1: regions where no masks exist.

    k-means over (colour, position) that compares each pixel with the nine nearest seeds only (Achanta et al. 2012),
    without the final relabelling of fragments: regions may be unconnected, which Eq. 3 and 4 of SnD do not mind.
    """
    _, height, width = image.shape
    rows = min(max(1, round(math.sqrt(count * height / width))), max(1, count), height)
    cols = min(max(1, round(count / rows)), width)
    spacing = math.sqrt(height * width / (rows * cols))
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    smooth = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    position = torch.stack([x, y], -1) * (10.0 / spacing)  # 10 = SLIC's usual compactness, in Lab units
    feature = torch.cat([lab(smooth).permute(1, 2, 0), position.to(image)], -1).reshape(-1, 5)
    row, col = (y * rows / height).long().reshape(-1), (x * cols / width).long().reshape(-1)
    around = [((row + dr).clamp(0, rows - 1) * cols + (col + dc).clamp(0, cols - 1)) for dr in (-1, 0, 1) for dc in (-1, 0, 1)]
    around = torch.stack(around).to(image.device)  # (9, H*W) seeds that a pixel may join
    nearest_seed = around[4]
    for _ in range(8):
        total = torch.zeros(rows * cols, 6, device=image.device).index_add_(0, nearest_seed, F.pad(feature, (0, 1), value=1.0))
        centre = total[:, :5] / total[:, 5:].clamp_min(1)
        distance = torch.stack([(feature - centre[seed]).square().sum(1) for seed in around])
        nearest_seed = around.gather(0, distance.argmin(0, keepdim=True))[0]
    return nearest_seed.reshape(height, width) + 1


def regions(view: View, count=64) -> Tensor:  # (H, W) int64: the view's instance masks, or superpixels where it has none
    return view.mask if view.mask is not None else superpixels(view.image, count)


def lab(rgb: Tensor) -> Tensor:  # (3, H, W) sRGB -> CIE Lab, D65: distances there are those that eyes see
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = rgb.new_tensor([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]])
    xyz = torch.einsum("ij,jhw->ihw", to_xyz, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# ------------------------------------------------------------------------------------------------ built-in rooms
# A primitive is a unit cube, sphere or cylinder that was scaled by its half-size, turned about the vertical and moved.
# A ray is taken into the unit frame by the inverse, where one short formula intersects it. World: z up, metres.

BOX, SPHERE, CYLINDER = range(3)


class Primitives(NamedTuple):
    kind: np.ndarray  # (M,)
    centre: np.ndarray  # (M, 3) world
    half: np.ndarray  # (M, 3) half extents along the object's own axes
    yaw: np.ndarray  # (M,) radians
    instance: np.ndarray  # (M,)
    label: np.ndarray  # (M,) index into CLASSES
    texture: np.ndarray  # (M, 20)


def furniture(name, rng):
    """-> parts [(kind, centre (3,), half (3,))] of one piece that stands at the origin and faces +y, in metres."""
    u = rng.uniform
    legs = lambda w, d, h, r: [(CYLINDER, (x * w, y * d, h / 2), (r, r, h / 2)) for x in (-1, 1) for y in (-1, 1)]
    if name == "table":
        w, d, h = u(0.4, 0.8), u(0.3, 0.45), u(0.65, 0.78)
        top = (BOX, (0, 0, h), (w, d, 0.03)) if u() < 0.6 else (CYLINDER, (0, 0, h), (w, w, 0.03))
        return [top] + legs(0.65 * w, 0.65 * (d if top[0] == BOX else w), h - 0.03, 0.035)
    if name == "chair":
        w, h = u(0.2, 0.26), u(0.4, 0.48)
        seat, back = (BOX, (0, 0, h), (w, w, 0.035)), (BOX, (0, -0.9 * w, h + 0.25), (w, 0.03, 0.25))
        return [seat, back] + legs(0.8 * w, 0.8 * w, h - 0.03, 0.025)
    if name == "sofa":
        w, d = u(0.6, 1.0), u(0.35, 0.45)
        arms = [(BOX, (x * (w - 0.1), 0, 0.3), (0.1, d, 0.3)) for x in (-1, 1)]
        return [(BOX, (0, 0, 0.2), (w, d, 0.2)), (BOX, (0, -d + 0.1, 0.5), (w, 0.1, 0.3))] + arms
    if name == "cabinet":
        w, d, h = u(0.3, 0.7), u(0.18, 0.3), u(0.35, 0.95)
        return [(BOX, (0, 0, h), (w, d, h)), (BOX, (0, 0, 2 * h + 0.02), (w + 0.03, d + 0.03, 0.02))]
    if name == "lamp":
        h, r = u(0.6, 0.8), u(0.14, 0.24)
        shade = (SPHERE, (0, 0, 2 * h), (r, r, r)) if u() < 0.5 else (CYLINDER, (0, 0, 2 * h), (r, r, 0.15))
        return [(CYLINDER, (0, 0, 0.02), (0.16, 0.16, 0.02)), (CYLINDER, (0, 0, h), (0.025, 0.025, h)), shade]
    if name == "plant":
        r, h = u(0.13, 0.22), u(0.15, 0.25)
        crown = [(SPHERE, (u(-0.1, 0.1), u(-0.1, 0.1), 2 * h + 0.15 + 0.17 * k), tuple(u(0.14, 0.3, 3))) for k in range(3)]
        return [(CYLINDER, (0, 0, h), (r, r, h))] + crown
    return [(BOX, (0, 0.02, 0), (u(0.25, 0.7), 0.02, u(0.2, 0.45)))]  # picture: hangs on a wall


def random_texture(rng):  # pattern, frequency, two colours, a direction, an offset, a tilt: nothing here knows the class
    colours = rng.uniform(0.08, 0.95, (2, 3))
    direction = rng.normal(size=3)
    return np.concatenate([[rng.integers(6), rng.uniform(1.5, 5.0)], colours.ravel(), direction / np.linalg.norm(direction),
                           rng.uniform(0, 10, 3), rng.normal(size=6)])


def make_room(rng):
    """-> the room's size (3,), its primitives, its camera path as (position, looked-at point) (V -> (V, 3), (V, 3))."""
    size = np.array([rng.uniform(3.6, 6.0), rng.uniform(3.6, 6.0), rng.uniform(2.4, 3.0)])
    start, sweep, turn = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 2.0), rng.choice([-1, 1])
    radius, height = size[:2] * rng.uniform(0.28, 0.38, 2), rng.uniform(1.2, 1.7)
    sway, aim = rng.uniform(0, 2 * math.pi, 4), rng.uniform(0.7, 1.6)

    def path(views):
        angle = start + turn * sweep * np.linspace(0, 1, views)
        position = np.stack([size[0] / 2 + radius[0] * np.cos(angle), size[1] / 2 + radius[1] * np.sin(angle),
                             height + 0.12 * np.sin(2 * angle + sway[0])], 1)
        look_at = np.stack([size[0] / 2 + 0.5 * np.sin(angle + sway[1]), size[1] / 2 + 0.5 * np.sin(angle + sway[2]),
                            aim + 0.15 * np.sin(2 * angle + sway[3])], 1)
        return position, look_at

    parts, taken, fine_path = [], [], path(64)[0]
    wanted = list(rng.permutation(["table", "sofa", "cabinet", "cabinet", "lamp", "plant", "table", "chair", "chair", "chair"]))
    for name in wanted[:int(rng.integers(6, 10))] + ["picture"] * int(rng.integers(2, 5)):
        piece = furniture(name, rng)
        reach = max(math.hypot(abs(c[0]) + h[0], abs(c[1]) + h[1]) for _, c, h in piece)
        top = max(c[2] + h[2] for _, c, h in piece)
        for _ in range(40):
            place, yaw = stand(name, reach, size, rng)
            apart = all(np.hypot(*(place[:2] - other)) > reach + r for other, r in taken) or name == "picture"
            path_distance = np.hypot(*(fine_path[:, :2] - place[:2]).T).min()
            clear = top + place[2] < fine_path[:, 2].min() - 0.3 or path_distance > reach + 0.3
            if apart and clear:
                taken += [] if name == "picture" else [(place[:2], reach)]
                instance = 7 + len({p[4] for p in parts})  # 1 floor, 2 ceiling, 3-6 walls
                c, s = math.cos(yaw), math.sin(yaw)
                turned = lambda x, y, z: place + np.array([c * x - s * y, s * x + c * y, z])
                parts += [(kind, turned(*centre), half, yaw, instance, CLASSES.index(name), random_texture(rng))
                          for kind, centre, half in piece]
                break
    shell = np.stack([random_texture(rng) for _ in range(6)])  # -x +x -y +y wall, floor, ceiling
    return size, Primitives(*(np.array(column) for column in zip(*parts))), shell, path


def stand(name, reach, size, rng):
    """-> place (3,), yaw: pictures hang on a wall, sofas and cabinets stand with their back to one, the rest anywhere."""
    wall = int(rng.integers(4))
    yaw = [-0.5 * math.pi, 0.5 * math.pi, 0.0, math.pi][wall]  # +y of the piece points into the room: walls -x +x -y +y
    gap = {"picture": 0.0, "sofa": 0.5, "cabinet": 0.36}.get(name)
    if gap is None:
        place = rng.uniform(reach + 0.05, np.maximum(size[:2] - reach - 0.05, reach + 0.06))
        return np.array([*place, 0.0]), rng.uniform(0, 2 * math.pi)
    length = size[1 - wall // 2]
    along = rng.uniform(reach + 0.05, length - reach - 0.05) if length > 2 * reach + 0.1 else length / 2
    away = gap if wall % 2 == 0 else size[wall // 2] - gap
    place = (away, along) if wall < 2 else (along, away)
    return np.array([*place, rng.uniform(1.3, 1.8) if name == "picture" else 0.0]), yaw


def to_unit(v, yaw, half):  # world directions (3, M or 1, P or 1) -> the primitives' unit frames (3, M, P or 1)
    c, s = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    return np.stack([(c * v[0] + s * v[1]) / half[:, :1], (c * v[1] - s * v[0]) / half[:, 1:2], v[2] / half[:, 2:]])


def hit_distance(kind, o, d):
    """Distance along rays to unit primitives: o (3, M, 1), d (3, M, P) in their frames -> t (M, P), inf for a miss."""
    if kind == BOX:
        a, b = (-1 - o) / d, (1 - o) / d
        enter, leave = np.maximum.reduce(np.minimum(a, b)), np.minimum.reduce(np.maximum(a, b))
    else:
        n = 3 if kind == SPHERE else 2
        A, B, C = np.add.reduce(d[:n] * d[:n]), np.add.reduce(o[:n] * d[:n]), np.add.reduce(o[:n] * o[:n]) - 1
        root = np.sqrt(B * B - A * C)  # nan = the ray misses, and comparisons with nan are false
        enter, leave = (-B - root) / A, (-B + root) / A
        if kind == CYLINDER:
            a, b = (-1 - o[2]) / d[2], (1 - o[2]) / d[2]
            enter, leave = np.maximum(enter, np.minimum(a, b)), np.minimum(leave, np.maximum(a, b))
    return np.where((enter < leave) & (enter > 1e-3), enter, np.float32(np.inf))


def cast(origin, rays, size, prims):
    """Nearest hit of every ray: origin (3,), rays (P, 3) -> t (P,), normal (P, 3), object point (P, 3), primitive (P,).

    Primitive >= 0 is a piece of furniture; -1 ... -6 are the shell's -x +x -y +y walls, floor and ceiling.
    """
    every = np.arange(len(rays))
    wall_t = np.where(rays > 0, size - origin, -origin) / np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    axis = wall_t.argmin(1)
    t, sign = wall_t[every, axis], np.sign(rays[every, axis])
    normal = np.zeros_like(rays)
    normal[every, axis] = -sign
    which = -1 - (2 * axis + (sign > 0))
    directions = np.ascontiguousarray(rays.T, np.float32)[:, None]  # float32 halves the time, and is good to 0.1 mm
    for kind in (BOX, SPHERE, CYLINDER):
        of_kind = np.nonzero(prims.kind == kind)[0]
        yaw, half = prims.yaw[of_kind].astype(np.float32), prims.half[of_kind].astype(np.float32)
        start = (origin - prims.centre[of_kind]).T[:, :, None].astype(np.float32)  # (3, M, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = hit_distance(kind, to_unit(start, yaw, half), to_unit(directions, yaw, half))
        if len(of_kind):
            first = distance.argmin(0)
            closer = distance[first, every] < t
            t, which = np.where(closer, distance[first, every], t), np.where(closer, of_kind[first], which)
    local = origin + rays * t[:, None]
    on = np.nonzero(which >= 0)[0]
    p = which[on]
    unit = to_unit((local[on] - prims.centre[p]).T[:, :, None], prims.yaw[p], prims.half[p])[:, :, 0].T
    local[on] = unit * prims.half[p]
    x, y, z = (unit_normal(prims.kind[p], unit) / prims.half[p]).T
    c, s = np.cos(prims.yaw[p]), np.sin(prims.yaw[p])
    normal[on] = np.stack([c * x - s * y, s * x + c * y, z], 1)
    return t, normal / np.linalg.norm(normal, axis=1, keepdims=True), local, which


def unit_normal(kind, p):  # outward normal of a unit primitive at its surface point p (P, 3)
    box = np.where(np.abs(p) >= np.abs(p).max(1, keepdims=True), np.sign(p), 0.0)
    cap = np.abs(p[:, 2:]) >= np.hypot(p[:, :1], p[:, 1:2])
    cylinder = np.where(cap, np.sign(p) * [0, 0, 1], p * [1, 1, 0])
    return np.where((kind == BOX)[:, None], box, np.where((kind == SPHERE)[:, None], p, cylinder))


def surface_colour(texture, p):  # (P, 20), (P, 3) object frame, metres -> (P, 3) albedo
    pattern, frequency, a, b, direction = texture[:, 0], texture[:, 1:2], texture[:, 2:5], texture[:, 5:8], texture[:, 8:11]
    q = p * frequency + texture[:, 11:14]
    waves = [np.sin(2.3 * q[:, k] + 1.7 * texture[:, 14 + k] * q[:, (k + 1) % 3] + texture[:, 17 + k]) for k in range(3)]
    cloud = (waves[0] + waves[1] + waves[2]) / 3  # smooth solid noise
    along = (q * direction).sum(1)
    cell = np.floor(q + 0.31 * direction)
    brick = np.stack([q[:, 0] + q[:, 1] + 0.5 * (np.floor(2 * q[:, 2]) % 2), 2 * q[:, 2]], 1)
    brick_edge = np.abs(brick - np.round(brick)).min(1)
    patterns = np.stack([0.5 + 0.5 * cloud, cell.sum(1) % 2, 0.5 + 0.5 * np.sin(2 * math.pi * along).clip(-0.5, 0.5) * 2,
                         ((q - np.round(q)) ** 2).sum(1) < 0.12, brick_edge < 0.09, 0.5 + 0.5 * np.sin(4 * along + 5 * cloud)])
    mix = patterns[pattern.astype(int), np.arange(len(p))][:, None]
    grain = np.sin(11 * q[:, :1] + 5 * cloud[:, None]) + np.sin(9 * q[:, 1:2] - 4 * cloud[:, None]) + np.sin(13 * q[:, 2:])
    return (a * (1 - mix) + b * mix) * (1 + 0.16 * cloud[:, None] + 0.05 * grain)  # finer grain would only alias


def render_room_view(room, position, look_at, focal, light, image_size):
    """-> the six files of a view: c2w, image u8, depth u16 (mm), normal u8, instance u8, label u8, all (H, W, ...)."""
    size, prims, shell, _ = room
    height, width = image_size
    z = (look_at - position) / np.linalg.norm(look_at - position)
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    c2w = np.eye(4)
    c2w[:3] = np.stack([x, np.cross(z, x), z, position], 1)
    rows, cols = np.mgrid[0:height, 0:width] + 0.5
    rays = np.stack([(cols - width / 2) / focal, (rows - height / 2) / focal, np.ones_like(cols)], -1).reshape(-1, 3)
    t, normal, local, which = cast(position, rays @ c2w[:3, :3].T, size, prims)  # rays have z = 1: t is z-depth
    texture = np.where((which < 0)[:, None], shell[np.clip(-1 - which, 0, 5)], prims.texture[np.maximum(which, 0)])
    to_light = light - (position + (rays @ c2w[:3, :3].T) * t[:, None])
    far = np.linalg.norm(to_light, axis=1)
    shade = 0.4 + 0.75 * np.clip((to_light * normal).sum(1) / far, 0, 1) / (0.7 + 0.12 * far**2)
    image = (surface_colour(texture, local) * shade[:, None]).clip(0, 1)
    shell_label, shell_id = np.array([2, 2, 2, 2, 0, 1]), np.array([3, 4, 5, 6, 1, 2])
    label = np.where(which < 0, shell_label[np.clip(-1 - which, 0, 5)], prims.label[np.maximum(which, 0)])
    instance = np.where(which < 0, shell_id[np.clip(-1 - which, 0, 5)], prims.instance[np.maximum(which, 0)])
    grid = lambda values, dtype: np.round(values).astype(dtype).reshape(height, width, *values.shape[1:])
    return (c2w, grid(image * 255, np.uint8), grid(t * 1000.0, np.uint16), grid((normal @ c2w[:3, :3] + 1) * 127.5, np.uint8),
            grid(instance, np.uint8), grid(label, np.uint8))


def write_room(folder, index, views, size, seed):
    """One room in the nerfstudio layout. Written aside and renamed: a folder that exists is a whole room."""
    rng = np.random.default_rng([seed, index])
    room = make_room(rng)
    focal = size[1] * rng.uniform(0.75, 0.95)
    light = room[0] * np.array([rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), 0.93])
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    maps = {"file_path": "images", "depth_file_path": "depth", "normal_file_path": "normals",
            "instance_file_path": "masks", "label_file_path": "labels"}
    for kind in maps.values():
        (aside / kind).mkdir(parents=True, exist_ok=True)
    frames = []
    for i, (position, look_at) in enumerate(zip(*room[3](views))):
        c2w, *pictures = render_room_view(room, position, look_at, focal, light, size)
        frame = {key: f"{kind}/{i:03d}.png" for key, kind in maps.items()}
        for file, picture in zip(frame.values(), pictures):
            Image.fromarray(picture).save(aside / file, compress_level=1)
        frames.append({**frame, "transform_matrix": (c2w @ OPENGL).tolist()})
    meta = dict(camera_model="PINHOLE", w=size[1], h=size[0], fl_x=focal, fl_y=focal, cx=size[1] / 2, cy=size[0] / 2,
                depth_unit_scale_factor=1e-3, class_names=CLASSES, frames=frames)
    (aside / "transforms.json").write_text(json.dumps(meta, indent=1))
    os.replace(aside, folder)


def make_rooms(out, scenes=48, views=16, size=(96, 128), seed=0):
    """Write `scenes` ray-cast rooms of `views` views at `size` (H, W) below `out`; the same seed gives the same bytes.

    Rooms that exist are kept, so an interrupted call goes on where it was. `out/rooms.json` records the settings;
    raises DataError when `out` holds rooms of other settings. Ten classes (`CLASSES`); textures do not depend on them.
    """
    out, wanted = Path(out), dict(scenes=scenes, views=views, size=list(size), seed=seed)
    record = out / "rooms.json"
    if scenes < 1 or views < 3 or min(size) < 1 or seed < 0:
        raise DataError(f"{out}: cannot make rooms of {wanted}; at least 1 room, 3 views, 1 pixel, and seed 0")
    existing = rooms_made(out)
    if existing and any(existing[key] != wanted[key] for key in ("views", "size", "seed")):
        raise DataError(f"{record}: rooms of other settings are here ({existing}); remove them or give another --scene_dir")
    if not existing and not is_empty(out):
        raise DataError(f"{out}: not empty and not made by this program; give another --scene_dir for the rooms")
    if existing != wanted:
        out.mkdir(parents=True, exist_ok=True)
        aside = out / ".rooms.json"
        aside.write_text(json.dumps(wanted))
        os.replace(aside, record)
    for leftover in out.glob(".room_*"):  # of a call that was interrupted
        for file in sorted(leftover.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        leftover.rmdir()
    todo = [i for i in range(scenes) if not (out / f"room_{i:03d}").exists()]
    for i in tqdm(todo, desc=f"rooms -> {out}", unit="room", disable=not todo):
        write_room(out / f"room_{i:03d}", i, views, tuple(size), seed)


def is_empty(folder):  # nothing there, or hidden files alone
    return not folder.exists() or (folder.is_dir() and all(child.name[0] == "." for child in folder.iterdir()))


def rooms_made(folder):  # -> the settings `make_rooms` was called with, None where it was not
    record = Path(folder) / "rooms.json"
    if not record.exists():
        return None
    try:
        return {key: json.loads(record.read_bytes())[key] for key in DEFAULT_ROOMS}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{record}: not the settings of built-in rooms; remove the folder to have them made again") from None


def open_scenes(scene_dir, skip_bad_frames=False):
    """What every stage does first: read `scene_dir`, making built-in rooms where data/ or data_small/ is missing or unfinished."""
    folder = Path(scene_dir)
    settings = rooms_made(folder)
    built_in = next((rooms for name, rooms in BUILT_IN.items() if folder.resolve() == Path(name).resolve()), None)
    if not settings and built_in and is_empty(folder):
        settings = built_in
        print(f"no data yet: writing {settings['scenes']} built-in rooms of {settings['views']} views to {folder}/")
    if settings:
        make_rooms(folder, **settings)
    return load_scenes(folder, skip_bad_frames)


@contextmanager
def explained(args, goes_on):
    """Around what a command does with its --device and --out: bad input, a device that is not there, a disk that cannot be
    written and Ctrl-C end it with one line. `goes_on` says how to continue."""
    try:
        torch.zeros(1, device=args.device)
        yield
    except (DataError, ValueError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror or error}; once that is mended, {goes_on}")
    except (AssertionError, RuntimeError) as error:
        if "CUDA" not in str(error) and "device" not in str(error):
            raise
        sys.exit(f"--device {args.device}: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {goes_on}")


# ------------------------------------------------------------------------------------------------ pictures


def usual_range(depth: Tensor) -> Tensor:  # -> (2,): all but the nearest and the farthest 2 % of what is known
    known = depth[depth > 0]
    known = known[::len(known) // 1_000_000 + 1]  # of so many, as quantile takes no more than 16 million
    return known.quantile(torch.tensor([0.02, 0.98])) if len(known) else torch.tensor([0.0, 1.0])


def colour_depth(depth: Tensor, like: Tensor | None = None) -> Tensor:
    """(H, W) -> (3, H, W): near is bright yellow, far is dark blue, unknown black; on the scale of `like`, if given."""
    known, (low, high) = depth > 0, usual_range(depth if like is None else like)
    level = (1 - (depth - low) / max(float(high - low), 1e-9)).clamp(0, 1).numpy()
    stops = np.array([[0.19, 0.07, 0.23], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38], [0.99, 0.91, 0.14]])
    colours = np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)])
    return torch.from_numpy(colours).float() * known


def colour_ids(ids: Tensor) -> Tensor:  # (H, W) -> (3, H, W): one fixed colour an id, unlabelled black
    hue = torch.stack([(ids * step % 97).float() / 97 for step in (37, 59, 83)])
    return (0.15 + 0.85 * hue) * (ids > 0)


def picture_grid(path, headings, rows, scale=None, below=None):
    """Save rows of (3, H, W) pictures (None: an empty panel) under one heading a column; `below` (width -> (3, h, width))
    draws a strip under them all. Returns the path."""
    height, width = next(p.shape[1:] for row in rows for p in row if p is not None)
    scale = scale or math.ceil(150 / width)  # small pictures are shown larger
    cell_h, cell_w, gap, top = height * scale, width * scale, 6, 24
    sheet_w, sheet_h = len(headings) * (cell_w + gap) + gap, len(rows) * (cell_h + gap) + gap + top
    to_image = lambda p: Image.fromarray((p.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
    strip = to_image(below(sheet_w)) if below else None
    sheet = Image.new("RGB", (sheet_w, sheet_h + (strip.height if strip else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, heading in enumerate(headings):
        while draw.textlength(heading) > cell_w:  # narrow portrait panels
            heading = heading[:-1]
        draw.text((gap + c * (cell_w + gap), 6), heading, fill="black")
        for r, row in enumerate(rows):
            corner = (gap + c * (cell_w + gap), top + r * (cell_h + gap))
            if row[c] is None:
                draw.rectangle([*corner, corner[0] + cell_w, corner[1] + cell_h], fill=(235, 235, 235))
                draw.text((corner[0] + 8, corner[1] + 8), "none", fill=(120, 120, 120))
            else:
                sheet.paste(ImageOps.pad(to_image(row[c]), (cell_w, cell_h), Image.NEAREST, color="white"), corner)
    if strip:
        sheet.paste(strip, (0, sheet_h))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def line_chart(title, curves, width=480, height=260) -> Tensor:
    """Curves {name: [(x, y), ...]} as a picture (3, height, width): axes from the least to the largest value, points joined."""
    picture = Image.new("RGB", (width, height), "white")
    colours = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189)]
    draw = ImageDraw.Draw(picture)
    points = np.array([p for curve in curves.values() for p in curve], float)
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    left, right, top, bottom = 64, width - 16, 44, height - 28
    place = lambda x, y: (left + (right - left) * (x - x0) / max(x1 - x0, 1e-12),
                          bottom - (bottom - top) * (y - y0) / max(y1 - y0, 1e-12))
    draw.text((left, 6), title, fill="black")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=(150, 150, 150))
    for value in np.linspace(y0, y1, 5):
        draw.text((6, place(x0, value)[1] - 6), f"{value:.4g}", fill=(90, 90, 90))
        draw.line([(left, place(x0, value)[1]), (right, place(x0, value)[1])], fill=(230, 230, 230))
    for value in np.linspace(x0, x1, 5):
        draw.text((place(value, y0)[0] - 12, bottom + 8), f"{value:.0f}" if x1 - x0 > 20 else f"{value:.3g}", fill=(90, 90, 90))
    start = left
    for colour, (name, curve) in zip(colours, curves.items()):
        corners = [place(*p) for p in curve]
        draw.line(corners, fill=colour, width=2)
        for x, y in corners if len(corners) < 40 else []:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        draw.text((start, 24), name, fill=colour)
        start += draw.textlength(name) + 16
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def camera_plan(scene, triplets, height, width):
    """Cameras from above with their viewing directions; each triplet in a colour, context - target - context."""
    up = -scene.c2w[:, :3, 1].mean(0)
    forward = scene.c2w[:, :3, 2].mean(0)
    across = torch.linalg.cross(forward, up)
    across = across / across.norm().clamp_min(1e-9)
    ahead = torch.linalg.cross(up, across)
    plan = torch.stack([across, ahead / ahead.norm().clamp_min(1e-9)], 1)  # (3, 2) world -> right, away
    at, facing = (scene.c2w[:, :3, 3] @ plan).numpy(), (scene.c2w[:, :3, 2] @ plan).numpy()
    middle, extent = (at.min(0) + at.max(0)) / 2, max(float((at.max(0) - at.min(0)).max()), 1e-9)
    to_pixel = lambda p: (width / 2 + (p[0] - middle[0]) / extent * 0.75 * min(width, height),
                          height / 2 - (p[1] - middle[1]) / extent * 0.75 * min(width, height))
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for p, f in zip(at, facing):
        x, y = to_pixel(p)
        draw.line([(x, y), (x + 14 * f[0], y - 14 * f[1])], fill=(170, 170, 170), width=1)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=(90, 90, 90))
    for n, (a, b, target) in enumerate(triplets):
        colour = [(214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189)][n % 4]
        draw.line([to_pixel(at[a]), to_pixel(at[target]), to_pixel(at[b])], fill=colour, width=2)
        x, y = to_pixel(at[target])
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], outline=colour, width=2)
    caption = "cameras from above; a triplet a colour: circle = target, ends of the line = contexts"
    draw.text((6, height - 18), caption, fill="black")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def fit_size(scene, pixels, multiple):
    """(H, W): about `pixels` in number, the scene's aspect ratio, both sides multiples of the patch size."""
    height, width = scene.frames[0].size
    scale = math.sqrt(pixels / (height * width))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def contact_sheet(scene, path, triplets):
    """image | mask | depth | normals of views across the scene, and the cameras from above."""
    size = fit_size(scene, 200 * 150, 2)
    rows = []
    for i in np.linspace(0, len(scene) - 1, min(5, len(scene))).astype(int):
        v = scene.view(int(i), size)
        rows.append([v.image, colour_ids(regions(v)), None if v.depth is None else colour_depth(v.depth),
                     None if v.normal is None else (v.normal * torch.tensor([1.0, -1, -1]) + 1).permute(2, 0, 1) / 2])
    mask_heading = "mask" if any(f.mask for f in scene.frames) else "superpixels (no masks)"
    plan = lambda width: camera_plan(scene, triplets, min(width, 480), width)
    return picture_grid(path, ["image", mask_heading, "depth", "normals"], rows, scale=1, below=plan)


def describe(scene, triplets):  # -> lines that say what is in a scene
    have = [f"{kind} {n}" for kind in ("mask", "depth", "normal", "label")
            if (n := sum(getattr(f, kind) is not None for f in scene.frames))]
    sizes = sorted({f.size for f in scene.frames})
    resolution = f"{sizes[0][1]}x{sizes[0][0]}" + (f" ... {sizes[-1][1]}x{sizes[-1][0]}" if len(sizes) > 1 else "")
    centre = scene.c2w[:, :3, 3]
    baselines = [float((centre[a] - centre[b]).norm()) for a, b, _ in triplets]
    near, far = scene.depth_range
    yield f"{scene.name}: {len(scene)} views, {resolution}, with {', '.join(have) or 'images only (masks: superpixels)'}"
    yield (f"  depth range {near:.3g} to {far:.3g}, context baselines {min(baselines):.3g} to {max(baselines):.3g} "
           f"(median {np.median(baselines):.3g}), in the data set's unit")
    for note in scene.notes[:5]:
        yield f"  {note}"
    if len(scene.notes) > 5:
        yield f"  ... and {len(scene.notes) - 5} more notes"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Look at posed scenes before training, or write the built-in rooms.")
    parser.add_argument("--scene_dir", default="data", help="a scene, a folder of scenes, or where rooms go (default data/)")
    parser.add_argument("--out", default="out/01_data", help="where the contact sheets go")
    parser.add_argument("--skip_bad_frames", action="store_true", help="leave out frames that have a problem, and list them")
    parser.add_argument("--rooms", type=int, help="write this many built-in rooms to --scene_dir")
    parser.add_argument("--views", type=int, default=DEFAULT_ROOMS["views"], help="views a room")
    parser.add_argument("--size", type=int, nargs=2, default=DEFAULT_ROOMS["size"], metavar=("H", "W"), help="room image size")
    parser.add_argument("--seed", type=int, default=DEFAULT_ROOMS["seed"], help="seed of the rooms and of the triplets shown")
    args = parser.parse_args(argv)
    try:
        if args.rooms is not None:
            make_rooms(args.scene_dir, args.rooms, args.views, args.size, args.seed)
        scenes = open_scenes(args.scene_dir, args.skip_bad_frames)
        root = Path(args.scene_dir)
        for child in sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".") if not reader_of(root) else []:
            if not any(scene.name.split("/")[0] == child.name for scene in scenes):
                print(f"{child}: ignored, no poses in it that are read here")
        shown = scenes if len(scenes) <= 12 else scenes[:: math.ceil(len(scenes) / 8)]
        for scene in shown:
            generator = torch.Generator().manual_seed(args.seed)
            triplets = [sample_triplet(scene, generator) for _ in range(4)]
            print("\n".join(describe(scene, triplets)))
            print(f"  ->  {contact_sheet(scene, Path(args.out) / (scene.name.replace('/', '_') + '.png'), triplets)}")
        print(f"{len(scenes)} scenes ({len(split(scenes, 'train'))} train, {len(split(scenes, 'val'))} val), "
              f"{sum(map(len, scenes))} views" + (f"; {len(shown)} of them shown" if len(shown) < len(scenes) else ""))
    except DataError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
