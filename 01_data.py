"""Posed multi-view scenes: what Splat and Distill trains on, and how it draws two context views and a target.

Paper   Splat and Distill (SnD) Sec. 3.1: a scene is S = {(I_i, P_i)}; a step draws two context views and a target.
In      a folder: nerfstudio / instant-ngp `transforms*.json` (also ScanNet++ and FiT3D preprocessing), a COLMAP
        model (`sparse/0`, binary or text), an RGB-D sequence (7-Scenes), or a folder of such folders; the files tell
        which. Optional folders beside `images/`: `masks/ depth/ normals/ labels/`.
Out     `load_scenes(path) -> [Scene]`, `Scene.view(i, size) -> View`; a report and one contact sheet a scene.
Run     python 01_data.py                        built-in rooms -> data/, 20 s on a 2-core CPU
        python 01_data.py --scene_dir my_scene   what is in a folder, before anything is trained
Copy    01_data.py (and tiny/rooms.py, if rooms are to be made)
Read    View, Scene, depth_range, frustum_points, overlap, context_pairs, sample_triplet, split, show_triplets
Try     LEVELS = ((0.9, 0.4),): context baselines in nine rooms shrink from 0.55 to 0.37 m (medians), and each picture
        of a triplet shows nearly the same; LEVELS = ((0.1, 2.0),): 1.01 m, and much is seen by one context only.
        --near 0.1 --far 1: frustums end before the furniture, and four of nine rooms have no triplet left.
Not     fisheye cameras, images without poses, video files.
Words   V views, H W pixels, K (3, 3) intrinsics, c2w camera-to-world, w2c its inverse, target / context as in SnD.

Conventions, true in all six files. Camera axes are OpenCV's: x right, y down, z forward. `K` is in pixels of the image
at hand and pixel centres sit at +0.5: the top-left pixel's centre is (0.5, 0.5). Depth is z-depth in the data set's
unit (metres for rooms and RGB-D). Images are (3, H, W) RGB in [0, 1]; maps are (H, W) or (H, W, C). Mask id 0 means
unlabelled, depth 0 not measured, label 255 ignore; normals are unit vectors of the camera frame, towards the camera.
"""
from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import re
import struct
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm


class DataError(Exception):
    """Bad input. The message is one line that names the file and the remedy."""


# ---------------------------------------------------------------------------------------------- 1. Views and scenes


class View(NamedTuple):
    """A picture with its camera, ready for a network. The four maps are None where the data set has none."""
    name: str
    image: Tensor  # (3, H, W) RGB in [0, 1]
    K: Tensor  # (3, 3) intrinsics, in pixels of this image
    c2w: Tensor  # (4, 4) OpenCV camera to world
    mask: Tensor | None = None  # (H, W) int64 instance id, 0 = unlabelled; ids need not agree between views
    depth: Tensor | None = None  # (H, W) z-depth, 0 = not measured
    normal: Tensor | None = None  # (H, W, 3) unit, camera frame, 0 = unknown
    label: Tensor | None = None  # (H, W) int64 class, 255 = ignore


class Scene:
    """Posed views of one place. It holds file names and cameras; pictures are decoded when `view` asks for them."""

    def __init__(self, name, frames, points=None, class_names=None, notes=(), depth_scale=1e-3, kinect=False):
        self.name, self.frames = name, frames  # a list of `Frame`, one for each view: files, K, c2w, lens
        self.points = points  # (M, 3) world points of a sparse reconstruction, or None
        self.class_names = class_names  # a tuple: what the label ids mean, or None
        self.notes = list(notes)  # sentences for the user: what was left out or assumed
        self.depth_scale, self.kinect = depth_scale, kinect  # how stored depth is to be read
        self.c2w = torch.from_numpy(np.stack([frame.c2w for frame in frames])).float()  # (V, 4, 4)
        self.pairs = {}  # what `context_pairs` has found so far

    def __len__(self):
        return len(self.frames)

    def view(self, i, size=None, maps=True) -> View:
        """View i as a pinhole camera sees it, scaled to cover `size` (H, W) and cropped about its centre.

        Photos come with lens distortion; it is undone here, so that K describes the picture exactly. Nothing is ever
        stretched. Maps are taken from the nearest stored pixel, and left unread with `maps=False`.
        """
        frame = self.frames[i]
        size = size or frame.size
        scale, (left, top, *_) = covering_crop(frame.size, size)
        to_view = np.array([[scale, 0, -scale * left], [0, scale, -scale * top], [0, 0, 1]])  # pixels -> pixels
        K = torch.from_numpy(to_view @ undistorted_K(frame)).float()
        found = read_maps(self, frame, size) if maps else {}
        return View(frame.name, read_image(frame, size), K, self.c2w[i], **found)

    @cached_property
    def depth_range(self):
        """(near, far) of what the cameras see, in the data set's unit."""
        *near_and_far, self.range_source = depth_range(self)
        return tuple(near_and_far)

    def subset(self, indices):
        """The scene with these views alone. Its depth range stays that of all views."""
        part = copy.copy(self)
        part.depth_range, part.range_source = self.depth_range, self.range_source
        part.frames, part.c2w, part.pairs = [self.frames[i] for i in indices], self.c2w[list(indices)], {}
        return part


# ------------------------------------------------------------------------------------- 2. How deep do the cameras see?


def depth_range(scene):  # -> near, far, where they come from
    """Measured depth tells best; then the sparse points that fall inside a picture; else the camera layout must do."""
    # Differs: the official code takes 1 and 100 in the data set's unit, so that nothing nearer than a metre exists;
    # here near and far come from the scene.
    some = [scene.frames[i] for i in np.linspace(0, len(scene) - 1, min(8, len(scene))).astype(int)]
    measured = [read_depth(scene, frame).ravel()[::7] for frame in some if frame.depth]
    sparse = [depth_in_view(scene.points, frame) for frame in some if scene.points is not None]
    for depths, source in ((measured, "measured depth"), (sparse, "sparse points")):
        seen = np.concatenate(depths) if depths else np.zeros(0)
        seen = seen[seen > 0]
        if len(seen) > 50:
            near, far = np.percentile(seen, [1, 99])
            return float(0.8 * near), float(1.2 * far), source
    return *layout_depth_range(np.stack([frame.c2w for frame in scene.frames])), "the camera layout"


def depth_in_view(points, frame):  # (M, 3) world -> z-depth (M,) in the frame's camera, 0 outside of its picture
    seen = (points - frame.c2w[:3, 3]) @ frame.c2w[:3, :3]  # world -> camera
    z = seen[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = frame.K[0, 0] * seen[:, 0] / z + frame.K[0, 2], frame.K[1, 1] * seen[:, 1] / z + frame.K[1, 2]
        return np.where((z > 0) & (x > 0) & (x < frame.size[1]) & (y > 0) & (y < frame.size[0]), z, 0)


# ---------------------------------------------------------------------------------- 3. Which views see the same place?


def frustum_points(scene, i):
    """(M, 3) world points that fill what view i sees: a grid over its picture at three depths, uniform in 1 / depth."""
    frame, (near, far) = scene.frames[i], scene.depth_range
    height, width = frame.size
    x, y, inverse = np.meshgrid((np.arange(8) + 0.5) / 8 * width, (np.arange(6) + 0.5) / 6 * height,
                                np.linspace(1 / far, 1 / near, 5)[1:-1], indexing="ij")
    rays = np.stack([(x - frame.K[0, 2]) / frame.K[0, 0], (y - frame.K[1, 2]) / frame.K[1, 1], np.ones_like(x)], -1)
    return (rays / inverse[..., None]).reshape(-1, 3) @ frame.c2w[:3, :3].T + frame.c2w[:3, 3]


def overlap(scene, i, j):
    """The share of view i's frustum that view j sees, and the other way round: the smaller of the two.

    Walls are not considered: two cameras with a wall between them overlap, too, if they look the same way.
    """
    share = lambda a, b: (depth_in_view(frustum_points(scene, a), scene.frames[b]) > 0).mean()
    return min(share(i, j), share(j, i))


# ---------------------------------------------------------------------------------------- 4. Two contexts and a target


# What is asked of two contexts: the least overlap with the target, and the widest baseline (their distance, as a part
# of the typical depth). A target for which no pair is that good is asked for less, level by level.
LEVELS = ((0.5, 0.4), (0.5, 0.8), (0.25, 1.0), (0.1, 2.0))


def context_pairs(scene, target, least, widest):
    """All pairs of views from which stereo can reconstruct what `target` sees: [(a, b), ...].

    Each of the two has an overlap of at least `least` with the target, the target lies between them, and their baseline
    is at most `widest` times the typical depth.
    """
    if (target, least, widest) in scene.pairs:
        return scene.pairs[target, least, widest]
    centre = np.stack([frame.c2w[:3, 3] for frame in scene.frames])  # (V, 3)
    near, far = scene.depth_range
    typical = 2 / (1 / near + 1 / far)  # the harmonic mean: half way in disparity
    close = np.argsort(np.linalg.norm(centre - centre[target], axis=1))[:25]
    seeing = [j for j in close if j != target and overlap(scene, target, j) >= least]
    pairs = []
    for a, b in combinations(seeing, 2):
        baseline = np.linalg.norm(centre[a] - centre[b]) / typical
        between = (centre[a] - centre[target]) @ (centre[b] - centre[target]) < 0  # it sees them in opposite directions
        if 0.02 < baseline < widest and between and overlap(scene, a, b) >= 0.75 * least:
            pairs.append((int(a), int(b)))
    return scene.pairs.setdefault((target, least, widest), pairs)


def best_pairs(scene, target):  # -> the first of LEVELS that has pairs, its pairs; None, [] where no level has any
    for level, (least, widest) in enumerate(LEVELS):
        if pairs := context_pairs(scene, target, least, widest):
            return level, pairs
    return None, []


def sample_triplet(scene, generator, targets=None):
    """-> (context_a, context_b, target): distinct views, chosen by geometry and not by frame number (SnD Sec. 3.1).

    `targets` restricts the target (to hold views out). Raises DataError where no three views overlap.
    """
    # Differs: the official sampler takes contexts eight frames apart and a target that may be one of them; here the
    # cameras decide (overlap, baseline, target in between), and the three views are always distinct.
    targets = list(range(len(scene))) if targets is None else list(targets)
    for n in torch.randperm(len(targets), generator=generator)[:400].tolist():
        _, pairs = best_pairs(scene, targets[n])
        if pairs:
            a, b = pairs[int(torch.randint(len(pairs), (1,), generator=generator))]
            return a, b, targets[n]
    raise DataError(f"{scene.name}: no three views overlap with a usable baseline; "
                    "add views in between, or drop the scene")


# ---------------------------------------------------------------------------------------------- 5. What is held out


def split(scenes, part):
    """The `train` or `val` scenes: every eighth scene is held out (the last one, where there are fewer than eight)."""
    # Differs: the official code trains on every scene folder, the validation scenes included; here every eighth scene
    # is held out, of a single scene every eighth view.
    assert part in ("train", "val"), f"split takes 'train' or 'val', not {part!r}"
    held_out = set(range(7, len(scenes), 8)) or {len(scenes) - 1} - {0}
    return [s for i, s in enumerate(scenes) if (i in held_out) == (part == "val")]


def held_out_views(scene) -> list[int]:
    """Where there is a single scene: every eighth of its views is held out, from the third on."""
    return list(range(min(2, len(scene) - 1), len(scene), 8))


# ---------------------------------------------------------------------------------------- 6. What a triplet looks like


def show_triplets(scene, triplets, path):
    """One row a triplet: the target between its two contexts, and the target's maps. Below: the cameras from above."""
    size = fit_size(scene, 200 * 150, 2)
    rows = []
    for a, b, target in triplets:
        left, middle, right = (scene.view(i, size) for i in (a, target, b))
        depth = None if middle.depth is None else colour_depth(middle.depth)
        normal = None if middle.normal is None else colour_normals(middle.normal)
        rows.append([left.image, middle.image, right.image, colour_ids(regions(middle)), depth, normal])
    masks = "its mask" if any(frame.mask for frame in scene.frames) else "its superpixels (no masks)"
    plan = lambda width: camera_plan(scene, triplets, 360, width)
    headings = ["context", "target", "context", masks, "its depth", "its normals"]
    return picture_grid(path, headings, rows, scale=1, below=plan)


# ---- Workshop: not needed to understand the method ----


OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # flips y and z: OpenGL camera axes <-> OpenCV camera axes, its own inverse
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".JPG", ".JPEG", ".PNG")
MAPS = ("mask", "depth", "normal", "label")
CHANNELS = {"depth": (1,), "normal": (3, 4)}  # of the maps that have a fixed number; ids may be grey or colours
DEFAULT_ROOMS = dict(scenes=48, views=16, size=(96, 128), seed=0)
BUILT_IN = {"data": DEFAULT_ROOMS, "data_small": DEFAULT_ROOMS | dict(scenes=200, size=(48, 64))}  # the latter for 06


@dataclass
class Frame:
    """What a scene knows of one view before anything is decoded: where its files are, and its camera."""
    name: str
    image: Path
    K: np.ndarray  # (3, 3) pixels of the stored image
    c2w: np.ndarray  # (4, 4) OpenCV
    size: tuple | None  # (H, W) as the data set declares it; `problem_of` fills in that of the file
    distortion: tuple = ((), (0.0, 0.0))  # radial (k1, k2, ...), tangential (p1, p2)
    mask: Path | None = None
    depth: Path | None = None
    normal: Path | None = None
    label: Path | None = None
    two_regions: bool = False  # the mask says which pixels are valid: its two sides are two regions
    problem: str | None = None  # why it cannot be used, where its reader found that out


# ----------------------------------------------------------------------------------------- finding and checking scenes


def open_scenes(scene_dir, skip_bad_frames=False, near=None, far=None):
    """What every stage does first: read `scene_dir`.

    Built-in rooms are made where data/ or data_small/ is missing or unfinished. `near` and `far` replace what
    `depth_range` would find in a scene.
    """
    folder = Path(scene_dir)
    settings = rooms_made(folder)
    built_in = next((rooms for name, rooms in BUILT_IN.items() if folder.resolve() == Path(name).resolve()), None)
    if not settings and built_in and is_empty(folder):
        settings = built_in
        print(f"no data yet: writing {settings['scenes']} built-in rooms of {settings['views']} views to {folder}/")
    if settings:
        make_rooms(folder, **settings)
    scenes = load_scenes(folder, skip_bad_frames)
    for scene in scenes if near is not None or far is not None else ():
        found = scene.depth_range if near is None or far is None else (near, far)
        scene.depth_range = (found[0] if near is None else near, found[1] if far is None else far)
        scene.range_source = "--near and --far"
        if not 0 < scene.depth_range[0] < scene.depth_range[1] < math.inf:
            raise DataError(f"{scene.name}: {scene.depth_range[0]:g} to {scene.depth_range[1]:g} is no depth range; "
                            "give --near and --far with 0 < near < far")
    return scenes


def make_rooms(out, **settings):
    """Write built-in rooms (tiny/rooms.py) into `out`."""
    try:
        rooms = importlib.import_module("tiny.rooms")
    except ModuleNotFoundError:
        raise DataError(f"{out}: no rooms can be made without tiny/rooms.py; copy it beside 01_data.py, "
                        "or give --scene_dir a scene") from None
    rooms.make_rooms(out, **settings)


def rooms_made(folder):  # -> the settings `make_rooms` was called with, None where it was not
    record = Path(folder) / "rooms.json"
    if not record.exists():
        return None
    try:
        return {key: json.loads(record.read_bytes())[key] for key in DEFAULT_ROOMS}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{record}: not the settings of built-in rooms; "
                        "remove the folder to have them made again") from None


def is_empty(folder):  # nothing there, or hidden files alone
    return not folder.exists() or (folder.is_dir() and all(child.name[0] == "." for child in folder.iterdir()))


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
        name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
        frames, extra = reader(folder)
        scenes.append(checked_scene(name, folder, frames, extra, skip_bad_frames))
    if not scenes:
        raise DataError(f"{path}: no scene in here (looked for transforms*.json, sparse/0 and frame-*.pose.txt, three "
                        "levels deep); for photos without poses run COLMAP first and put its model in sparse/0")
    return scenes


def natural(path):  # a key to sort by: room2 comes before room10
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def find_scenes(folder, levels=3):  # -> [(folder, its reader), ...]
    reader = reader_of(folder)
    if reader:
        return [(folder, reader)]
    below = [d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")] if levels else []
    return [found for d in sorted(below, key=natural) for found in find_scenes(d, levels - 1)]


def reader_of(folder):
    if transforms_files(folder):
        return read_transforms
    if colmap_folder(folder):
        return read_colmap
    return read_rgbd if next(folder.glob("frame-*.pose.txt"), None) else None


def checked_scene(name, folder, frames, extra, skip_bad_frames):
    """Everything that is wrong with a scene is said here, in one line, before anything is computed."""
    seen = set()
    for frame in frames:
        if frame.image in seen and not frame.problem:
            raise DataError(f"{folder}: {frame.name} is listed twice; keep one of the two frames")
        seen.add(frame.image)
    found = {n: problem_of(frame, thorough=skip_bad_frames) for n, frame in enumerate(frames)}
    problems = {n: problem for n, problem in found.items() if problem}
    first = next(iter(problems.values()), None)
    if problems and not skip_bad_frames:
        remedy = "" if "--skip_bad_frames" in first else "; mend it or pass --skip_bad_frames"
        more = f" ({len(problems)} of {len(frames)} frames have a problem)" if len(problems) > 1 else ""
        raise DataError(first + remedy + more)
    frames = [frame for n, frame in enumerate(frames) if n not in problems]
    if len(frames) < 3:
        raise DataError(f"{folder}: {len(frames)} usable views, but two contexts and a target make three; add views"
                        + (f" ({len(problems)} left out, the first because {first})" if problems else ""))
    for frame in frames:
        u, _, vt = np.linalg.svd(frame.c2w[:3, :3])  # poses in text files are rounded: the nearest true rotation
        frame.c2w = np.vstack([np.hstack([u @ vt, frame.c2w[:3, 3:]]), [0, 0, 0, 1]])
    notes = [*extra.pop("notes", ()), *(f"left out: {problem}" for problem in problems.values())]
    lacking = {kind: sum(getattr(f, kind) is None for f in frames) for kind in MAPS}
    notes += [f"{n} of {len(frames)} views have no {kind}" for kind, n in lacking.items() if 0 < n < len(frames)]
    return Scene(name, frames, notes=notes, **extra)


def problem_of(frame, thorough=False):
    """-> what is wrong with this frame, in words, or None. Fills in the size of the picture."""
    if frame.problem:
        return frame.problem
    if not frame.image.exists():
        return f"{frame.image} does not exist, but {frame.name} has a pose"
    try:
        size = stored_size(frame.image, thorough)
        if frame.size and size != frame.size:
            declared = f"{frame.size[1]}x{frame.size[0]}"
            return (f"{frame.image} is {size[1]}x{size[0]}, but its intrinsics are for {declared}: "
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
        map_h, map_w = stored_size(path, thorough, CHANNELS.get(kind))
        if kind == "depth" and abs(map_w / map_h - width / height) < 0.02 * width / height:
            continue  # sensors often measure depth at another resolution of the same field of view
        if (map_h, map_w) != (height, width):
            return (f"{path} is {map_w}x{map_h}, but {frame.image.name} is {width}x{height}: "
                    f"a {kind} must have the size of its image")


def stored_size(path, thorough, channels=None):
    """(H, W) of a picture or array. Its header and its last bytes are looked at, which shows most damage; `thorough`
    decodes it to the end."""
    if path.suffix == ".npy":
        shape = decode_map(path).shape
    elif not (shape := header(path)) or thorough or not ends_well(path):
        shape = np.array(decode(path)).shape  # raises, and says what is wrong with the file
    count = 1 if len(shape) == 2 else shape[-1]
    if len(shape) not in (2, 3) or 0 in shape or (channels and count not in channels):
        wanted = f" with C = {' or '.join(map(str, channels))}" if channels else ""
        raise DataError(f"{path}: its shape is {tuple(shape)}, not (H, W) or (H, W, C){wanted}; write it again")
    return shape[:2]


def header(path):  # -> (H, W, C) of a picture, not decoded; None where even that cannot be read
    try:
        with Image.open(path) as image:
            return (*image.size[::-1], len(image.getbands()))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def ends_well(path):  # whether a PNG or JPEG ends as it should
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 12))
        end = file.read()
    return end.endswith(b"\xff\xd9") if path.suffix.lower() in (".jpg", ".jpeg") else end[4:8] == b"IEND"


def inside(path, root, where):
    """`path` as a normal path; a file outside the scene folder is refused, whoever wrote the list."""
    path = Path(os.path.normpath(path))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: names {path}, outside the scene folder; "
                        f"move the file into {root} and use a relative path")
    return path


def maps_beside(image, root):
    """The maps of an image, in folders beside that of the images: -> {kind: path or None}.

    For scene/images/cam0/7.jpg a mask is looked for at scene/masks/cam0/7.jpg.png, then 7.png, 7.jpg.npy and 7.npy
    there; for an image in the scene folder itself at scene/masks/. A scene whose images lie deeper
    (scene/dslr/images/7.jpg) may also have the folders beside these (scene/dslr/masks/).
    """
    folders = Path(os.path.relpath(image.parent, root)).parts  # ("images", "cam0"); () for images in the scene folder
    homes = (root, image.parent.parent if folders else root)
    names = [Path(*folders[1:], f"{name}.{end}") for name in (image.name, image.stem) for end in ("png", "npy")]

    def first(*kinds):
        paths = (home / kind / name for kind in kinds for home in homes for name in names)
        return next((path for path in paths if path.exists()), None)
    mask = first("instance_segmentation", "masks")
    return dict(mask=mask, depth=first("depth"), normal=first("normals"), label=first("labels"))


# --------------------------------------------------------------------------------------------- reader: transforms.json


def transforms_files(folder):
    """All transforms files of a scene, the one to read first. Undistorted ones (ScanNet++) win over fisheye ones."""
    places = (folder, folder / "nerfstudio", folder / "dslr" / "nerfstudio")
    found = [f for place in places for f in sorted(place.glob("transforms*.json"))]
    rank = ["transforms_undistorted.json", "transforms.json", "transforms_train.json"]
    return sorted(found, key=lambda f: rank.index(f.name) if f.name in rank else len(rank))


def read_transforms(folder):
    """nerfstudio / instant-ngp: OpenGL camera-to-world, intrinsics of the whole file or of each frame."""
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
        raise DataError(f"{file}: 'depth_unit_scale_factor' must be a positive number "
                        "(0.001 for millimetres)") from None
    notes = [f"ignored: {other.relative_to(folder)} ({file.relative_to(folder)} comes first)" for other in others]
    known = {frame.image for frame in frames}
    kinds, places = {p.suffix for p in known}, {p.parent for p in known if p.parent.is_dir()}
    spare = sum(p.suffix in kinds and p not in known for place in places for p in place.iterdir())
    notes += [f"ignored: {spare} pictures without a pose"] if spare else []
    names = meta.get("class_names")
    return frames, dict(depth_scale=depth_scale, notes=notes, class_names=tuple(map(str, names)) if names else None)


def transforms_frame(meta, entry, root, where):
    for key, kind in (("file_path", str), ("transform_matrix", list)):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise DataError(f"{where} lacks '{key}'; add it or remove the frame")
    settings = meta | {key: value for key, value in entry.items() if value is not None}
    model = str(settings.get("camera_model", "")).upper()
    if settings.get("is_fisheye") or any(word in model for word in ("FISHEYE", "EQUIRECT", "ORTHO")):
        raise DataError(f"{where}: {model or 'fisheye'} cameras are not read; undistort first "
                        "(ScanNet++ ships transforms_undistorted.json)")
    image = find_image(root, entry["file_path"], where)
    try:
        K, size, distortion = transforms_camera(settings, image, where)
        pose = np.array(entry["transform_matrix"], float)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{where}: a number is not a number ({str(error).splitlines()[0]}); mend the frame") from None
    pose = np.vstack([pose, [0, 0, 0, 1]]) if pose.shape == (3, 4) else pose
    c2w = pose * OPENGL.diagonal() if pose.shape == (4, 4) else pose  # flips the y and z axes: columns 1 and 2
    maps = maps_beside(image, root)
    keys = dict(mask="instance_file_path", depth="depth_file_path", normal="normal_file_path", label="label_file_path")
    maps |= {kind: inside(root / str(entry[key]), root, where) for kind, key in keys.items() if entry.get(key)}
    valid = inside(root / str(entry["mask_path"]), root, where) if entry.get("mask_path") else None
    two_regions = valid is not None and maps["mask"] in (None, valid)  # instance masks are better where there are some
    maps["mask"] = valid if two_regions else maps["mask"]
    return Frame(entry["file_path"], image, K, c2w, size, distortion, two_regions=two_regions, **maps)


def transforms_camera(settings, image, where):  # -> K, declared (H, W) or None, distortion
    get = lambda key, default=None: default if settings.get(key) is None else float(settings[key])
    size = (int(get("h")), int(get("w"))) if get("h") and get("w") else None
    height, width = size or (header(image) or (1, 1))[:2]  # an image that cannot be read is named later

    def focal(axis, side):
        angle = get(f"camera_angle_{axis}")
        return get(f"fl_{axis}", None if angle is None else 0.5 * side / math.tan(0.5 * angle))
    fx = focal("x", width)
    fy = focal("y", height) or fx
    if fx is None:
        raise DataError(f"{where} has neither 'fl_x' nor 'camera_angle_x'; add the focal length")
    K = np.array([[fx, 0, get("cx", width / 2)], [0, fy, get("cy", height / 2)], [0, 0, 1]], float)
    radial, tangential = (tuple(get(k, 0.0) for k in keys) for keys in (("k1", "k2", "k3", "k4"), ("p1", "p2")))
    return K, size, (radial, tangential)


def find_image(root, file_path, where):
    """`file_path` below the scene, as written or in the folders where converters put images; the ending may lack."""
    first = inside(root / file_path, root, where)
    places = [first] + [root / d / file_path for d in ("images", "undistorted_images", "resized_undistorted_images")]
    endings = ("",) if first.suffix in IMAGE_TYPES else ("", *IMAGE_TYPES)
    candidates = [p.with_name(p.name + end) for p in places for end in endings]
    return next((p for p in candidates if p.is_file()), first)


# ---------------------------------------------------------------------------------------------- reader: COLMAP


def colmap_folder(folder):
    places = (folder / "sparse" / "0", folder / "sparse", folder / "colmap" / "sparse" / "0")
    return next((p for p in places for kind in ("bin", "txt") if (p / f"cameras.{kind}").exists()), None)


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


def rotation_of(quaternions):  # (..., 4) w x y z, of any length -> (..., 3, 3)
    with np.errstate(invalid="ignore"):  # 0 0 0 0 is no rotation: nan
        q = np.asarray(quaternions, float)
        w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    return np.stack([np.stack(row, -1) for row in rows], -2)


COLMAP_MODELS = {  # id -> name, number of parameters
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12)}


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


class Bytes:
    """A binary file that is read from its beginning, little endian."""

    def __init__(self, path):
        self.data, self.at = path.read_bytes(), 0

    def take(self, form):
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return values

    def text(self):  # up to a zero byte
        end = self.data.index(b"\0", self.at)
        word, self.at = self.data[self.at:end].decode(), end + 1
        return word


def colmap_binary(model):  # -> {id: (name, W, H, params)}, [(image, camera, quaternion, translation)], (M, 3)
    file, cameras, poses, points = Bytes(model / "cameras.bin"), {}, [], []
    for _ in range(file.take("Q")[0]):
        identity, kind, width, height = file.take("iiQQ")
        if kind not in COLMAP_MODELS:
            raise DataError(f"{model}: camera {identity} has the unknown model {kind}; run colmap image_undistorter")
        name, count = COLMAP_MODELS[kind]
        cameras[identity] = (name, width, height, file.take(f"{count}d"))
    file = Bytes(model / "images.bin")
    for _ in range(file.take("Q")[0]):
        _, *pose, camera = file.take("i7di")
        poses.append((file.text(), camera, pose[:4], pose[4:]))
        file.take(f"{24 * file.take('Q')[0]}x")  # its 2D points are not needed
    file = Bytes(model / "points3D.bin")
    for _ in range(file.take("Q")[0]):
        _, x, y, z, _, _, _, _, track = file.take("Q3d3BdQ")
        points.append((x, y, z))
        file.take(f"{8 * track}x")
    return cameras, poses, np.array(points).reshape(-1, 3)


def colmap_text(model):  # the same from cameras.txt, images.txt (every second line lists 2D points), points3D.txt
    lines = lambda name: [line.split() for line in (model / name).read_text().splitlines() if not line.startswith("#")]
    cameras = {int(w[0]): (w[1], int(w[2]), int(w[3]), tuple(map(float, w[4:]))) for w in lines("cameras.txt") if w}
    poses = [(" ".join(w[9:]), int(w[8]), tuple(map(float, w[1:5])), tuple(map(float, w[5:8])))
             for w in lines("images.txt")[::2] if w]
    points = [tuple(map(float, w[1:4])) for w in lines("points3D.txt") if w]
    return cameras, poses, np.array(points).reshape(-1, 3)


# --------------------------------------------------------------------------------------------- reader: RGB-D sequences

# 7-Scenes was recorded with one Kinect whose depth is not registered to its colour: the commonly published calibration.
KINECT_DEPTH_F, KINECT_COLOUR_F = 585.0, 525.0
KINECT_DEPTH_TO_COLOUR = np.array([[0.9999148, 0.0026753, -0.0079073, -0.0255589],
                                   [-0.0027419, 0.9999173, -0.0081503, 0.0001011],
                                   [0.0078780, 0.0081711, 0.9998750, 0.0020318], [0.0, 0.0, 0.0, 1.0]])


def read_rgbd(folder):
    """An RGB-D sequence as 7-Scenes stores it: frame-XXXXXX.{color, depth, pose}. Poses are depth camera to world.

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
        K = np.array([[KINECT_COLOUR_F, 0, 320.5], [0, KINECT_COLOUR_F, 240.5], [0, 0, 1]])  # + 0.5: it counts centres
    frames = []
    for file in sorted(folder.glob("frame-*.pose.txt")):
        stem = file.name.removesuffix(".pose.txt")
        try:
            pose = np.array(file.read_text().split(), float).reshape(4, 4)
        except ValueError:
            raise DataError(f"{file}: not sixteen numbers; restore the pose or remove the frame") from None
        images = [folder / f"{stem}.color{end}" for end in IMAGE_TYPES]
        image = next((path for path in images if path.exists()), images[0])
        depth = folder / f"{stem}.depth.png"
        c2w = pose @ np.linalg.inv(KINECT_DEPTH_TO_COLOUR) if kinect and np.isfinite(pose).all() else pose
        maps = maps_beside(image, folder) | {"depth": depth if depth.exists() else None}
        frames.append(Frame(image.name, image, K, c2w, (480, 640) if kinect else None, **maps))
    note = ["depth registered into the colour camera with the published Kinect calibration of 7-Scenes"]
    return frames, dict(kinect=kinect, notes=note if kinect else [])


def register_kinect_depth(depth):  # (480, 640) of the depth camera -> the same, seen from the colour camera
    height, width = depth.shape
    rows, cols = np.nonzero(depth)
    z = depth[rows, cols]
    centre = np.array([width / 2, height / 2])
    rays = (np.stack([cols, rows], 1) - centre) / KINECT_DEPTH_F  # this calibration counts pixels from (0, 0)
    points = np.concatenate([rays * z[:, None], z[:, None]], 1)
    points = points @ KINECT_DEPTH_TO_COLOUR[:3, :3].T + KINECT_DEPTH_TO_COLOUR[:3, 3]
    target = np.round(points[:, :2] / points[:, 2:] * KINECT_COLOUR_F + centre).astype(int)
    visible = (target >= 0).all(1) & (target < [width, height]).all(1)
    target, z = target[visible], points[visible, 2]
    order = np.argsort(-z, kind="stable")  # written far to near: the nearest surface stays
    registered = np.zeros_like(depth)
    registered[target[order, 1], target[order, 0]] = z[order]
    return registered


# ------------------------------------------------------------------------------------------ pictures of a view, lenses


def covering_crop(stored, size):
    """A picture (H, W) is scaled to cover `size` (H, W) and cropped about its centre: -> the scale, and the box (left,
    top, right, bottom) of its pixels that stays."""
    (full_h, full_w), (height, width) = stored, size
    scale = max(height / full_h, width / full_w)
    left, top = max(0.0, (full_w - width / scale) / 2), max(0.0, (full_h - height / scale) / 2)
    right, bottom = min(full_w, left + width / scale), min(full_h, top + height / scale)  # Pillow refuses 1e-15 beyond
    return scale, (left, top, right, bottom)


def read_image(frame, size) -> Tensor:  # -> (3, H, W) in [0, 1], undistorted, covering `size`
    image = decode(frame.image, colour=True)
    if is_distorted(frame):
        image = undistorted(image, frame)
    height, width = size
    image = image.resize((width, height), Image.BICUBIC, box=covering_crop(frame.size, size)[1])  # antialiased
    return torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1) / 255


def undistorted(image, frame):
    height, width = frame.size
    x, y = stored_position(frame, frame.size)
    grid = torch.from_numpy(np.stack([2 * x - 1, 2 * y - 1], -1)).float()[None]
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None]
    straight = F.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    return Image.fromarray(straight[0].permute(1, 2, 0).round().byte().numpy())


def stored_position(frame, size):
    """-> x, y (H, W) in 0 ... 1: where in the stored picture the centre of each pixel of a view of `size` lies."""
    scale, (left, top, *_) = covering_crop(frame.size, size)
    rows, cols = np.mgrid[0:size[0], 0:size[1]] + 0.5
    x, y = distort(cols / scale + left, rows / scale + top, undistorted_K(frame), frame)
    return x / frame.size[1], y / frame.size[0]


def is_distorted(frame):
    return any(frame.distortion[0]) or any(frame.distortion[1])


def distort(x, y, K, frame):
    """Pixels of the undistorted image with intrinsics K -> pixels of the stored image, by OpenCV's lens polynomial."""
    radial, (p1, p2) = frame.distortion
    u, v = (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    r2 = u * u + v * v
    gain = 1 + sum(k * r2 ** (n + 1) for n, k in enumerate(radial))
    u, v = (u * gain + 2 * p1 * u * v + p2 * (r2 + 2 * u * u), v * gain + p1 * (r2 + 2 * v * v) + 2 * p2 * u * v)
    return frame.K[0, 0] * u + frame.K[0, 2], frame.K[1, 1] * v + frame.K[1, 2]


def undistorted_K(frame):
    if not is_distorted(frame):
        return frame.K
    K = zoomed_K(tuple(frame.K.ravel()), frame.size, frame.distortion)
    if K is None:
        raise DataError(f"{frame.image}: its distortion coefficients bend the border out of the picture; "
                        "undistort the images first (colmap image_undistorter)")
    return K


@lru_cache(maxsize=4096)  # most frames share a lens
def zoomed_K(stored_K, size, distortion):
    """K of the undistorted picture, or None.

    Straightening moves the borders of a picture. With the stored focal length, some pixels of the straight picture may
    lie outside of the stored one. So the focal length is raised, a quarter of a percent at a time, until none does. Far
    from the centre the lens polynomial may turn round and show the same place twice; such a zoom is passed over, too.
    """
    K, (height, width) = np.array(stored_K).reshape(3, 3), size
    frame = Frame("", None, K, None, size, distortion)
    x, y = np.meshgrid(np.linspace(0, width, 33), np.linspace(0, height, 33))
    for zoom in np.linspace(1, 2, 401):
        raised = K * [[zoom, 1, 1], [1, zoom, 1], [1, 1, 1]]
        xs, ys = distort(x, y, raised, frame)
        within = min(xs.min(), ys.min()) > -0.5 and xs.max() < width + 0.5 and ys.max() < height + 0.5
        if within and np.diff(xs, axis=1).min() > 0 and np.diff(ys, axis=0).min() > 0:
            return raised
    return None


# ---------------------------------------------------------------------------------------------- maps of a view


def read_maps(scene, frame, size):
    """-> {kind: tensor} of the frame's maps. A pixel takes the value of the stored pixel that its centre falls into."""
    readers = dict(mask=read_mask, depth=lambda frame: read_depth(scene, frame), normal=read_normal, label=read_label)
    x, y = stored_position(frame, size)
    found = {}
    for kind in MAPS:
        if getattr(frame, kind):
            stored = readers[kind](frame)
            height, width = stored.shape[:2]  # depth may be stored at another resolution
            row = np.floor(y * height).clip(0, height - 1).astype(int)
            col = np.floor(x * width).clip(0, width - 1).astype(int)
            found[kind] = torch.from_numpy(stored[row, col])
    return found


def read_mask(frame):  # -> (H, W) int64
    ids = decode_ids(frame.mask)
    return 1 + (ids > ids.max() / 2) if frame.two_regions else ids  # validity is stored as 0 and 1, or as 0 and 255


def read_label(frame):  # -> (H, W) int64
    return decode_ids(frame.label)


def read_depth(scene, frame):  # -> (H, W) float32 z-depth in the data set's unit, 0 where it is not known
    stored = decode_map(frame.depth)
    stored = stored.reshape(stored.shape[:2])  # arrays of (H, W, 1) are common
    depth = np.where(stored == 65535, 0, stored).astype(np.float32) * scene.depth_scale  # 65535: the sensor saturated
    depth = np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0).clip(0).astype(np.float32)
    return register_kinect_depth(depth) if scene.kinect else depth


def read_normal(frame):  # -> (H, W, 3) float32
    if frame.normal.suffix == ".npy":
        normal = np.asarray(decode_map(frame.normal), np.float32)[..., :3]
    else:
        normal = np.asarray(decode(frame.normal, colour=True), np.float32) / 127.5 - 1  # 0 ... 255 means -1 ... 1
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    known = (length > 0.5) & (length < 1.5)  # black and grey mean "unknown"
    return np.where(known, normal / np.where(known, length, 1), 0).astype(np.float32)


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
        return np.lib.format.open_memmap(path, mode="r")  # reads the header and checks the length of the file
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a whole .npy array ({str(error).splitlines()[0]}); restore the file") from None


def decode_ids(path):  # -> (H, W) int64; palette and grey files hold ids, colour files hold ids in base 256
    ids = decode_map(path).astype(np.int64)
    if ids.ndim == 2:
        return ids
    return ids[..., :3] @ np.array([1, 256, 65536]) if ids.shape[2] >= 3 else ids[..., 0]  # (H, W, 1) or grey and alpha


# ---------------------------------------------------------------------------------------- depth from the camera layout


def layout_depth_range(c2w):  # (V, 4, 4) -> near, far
    """A guess from the cameras alone, where nothing was measured.

    Cameras that stand around something look at it. Its place is then the point nearest to all optical axes: with P the
    projector onto the plane across an axis, it minimises the sum of |P (point - centre)|^2. If nearly all cameras have
    this point before them, at a distance that fits the space they stand in, it is the middle of the depth range.
    Cameras that look past each other have no such point; the space that they stand in, and the step from one to the
    next, are then all there is to go by.
    """
    centre, axis = c2w[:, :3, 3], c2w[:, :3, 2]
    across = np.eye(3) - axis[:, :, None] * axis[:, None]  # (V, 3, 3) the projectors P
    focus = np.linalg.lstsq(across.sum(0), (across @ centre[:, :, None]).sum(0)[:, 0], rcond=None)[0]
    distance = ((focus - centre) * axis).sum(1)
    spread = np.median(np.linalg.norm(centre - centre.mean(0), axis=1)) or 1.0
    if (distance > 0).mean() > 0.9 and 0.3 * spread < np.median(distance) < 30 * spread:
        return float(0.35 * np.median(distance)), float(4 * np.median(distance))
    apart = np.linalg.norm(centre[:, None] - centre, axis=2) + np.diag(np.full(len(centre), np.inf))
    step = np.median(apart.min(1))
    return float(max(0.4 * spread, 2.5 * step)), float(max(12 * spread, 25 * step))


# ---------------------------------------------------------------------------------------------- superpixels


def regions(view: View, count=64) -> Tensor:  # (H, W) int64: the view's masks, or superpixels where it has none
    return view.mask if view.mask is not None else superpixels(view.image, count)


def superpixels(image: Tensor, count: int) -> Tensor:
    """SLIC superpixels of `image` (3, H, W) -> (H, W) int64 ids from 1: regions where no masks exist.

    k-means over colour and position (Achanta et al. 2012). The clusters start as a grid of cells, and a pixel may only
    join one of the nine cells around it. Simpler than the original: colours are compared in RGB instead of CIE Lab, and
    fragments keep their id, so that regions may be unconnected, which Eq. 3 and 4 of SnD do not mind.
    """
    _, height, width = image.shape
    rows = min(max(1, round(math.sqrt(count * height / width))), max(1, count), height)
    cols = min(max(1, round(count / rows)), width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    smooth = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    compactness = 0.1 / math.sqrt(height * width / (rows * cols))  # one cell's width weighs as much as 0.2 of colour
    position = compactness * torch.stack([x, y]).to(image)
    feature = torch.cat([smooth, position]).reshape(5, -1).T  # (H*W, 5)

    row, col = (y * rows / height).long().flatten(), (x * cols / width).long().flatten()  # the cell of each pixel
    steps = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    around = [(row + down).clamp(0, rows - 1) * cols + (col + right).clamp(0, cols - 1) for down, right in steps]
    around = torch.stack(around).to(image.device)  # (9, H*W) the clusters that a pixel may join
    cluster = around[4]
    for _ in range(8):
        total = feature.new_zeros(rows * cols, 6).index_add_(0, cluster, F.pad(feature, (0, 1), value=1.0))
        centre = total[:, :5] / total[:, 5:].clamp_min(1)
        distance = torch.stack([(feature - centre[k]).square().sum(1) for k in around])
        cluster = around.gather(0, distance.argmin(0, keepdim=True))[0]
    return cluster.reshape(height, width) + 1


# ---------------------------------------------------------------------------------- files, flags, errors of all stages


def write_whole(path, content: bytes):
    """Written under a temporary name, flushed, and renamed: a killed run leaves the old file or the new one, whole.

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


def scene_flags(parser, out):
    """The flags that all stages have."""
    add = parser.add_argument
    add("--scene_dir", default="data", help="a scene or a folder of scenes; default: data/, made if it is missing")
    add("--out", default=out, help=f"where everything is written; default: {out}/")
    add("--skip_bad_frames", action="store_true", help="leave out frames that have a problem, and list them")
    add("--near", type=float, help="nearest depth, in the scene's unit; default: from depth, sparse points or cameras")
    add("--far", type=float, help="farthest depth; python 01_data.py shows the range that is taken")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--seed", type=int, default=0, help="of everything that is drawn at random")


@contextmanager
def explained(args, goes_on):
    """Stands around the body of a command. Bad input, a disk that cannot be written, Ctrl-C and a --device that is not
    there end it with one line; `goes_on` says how to continue. Any other error is a bug and keeps its traceback."""
    try:
        torch.zeros(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"--device {args.device}: {str(error).splitlines()[0]}")
    try:
        yield
    except (DataError, ValueError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror or error}; once that is mended, {goes_on}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {goes_on}")


# ---------------------------------------------------------------------------------------------- pictures


def usual_range(depth: Tensor) -> Tensor:  # -> (2,): all but the nearest and the farthest 2 % of what is known
    known = depth[depth > 0]
    known = known[::len(known) // 1_000_000 + 1]  # of so many, as quantile takes no more than 16 million
    return known.quantile(torch.tensor([0.02, 0.98])) if len(known) else torch.tensor([0.0, 1.0])


def colour_depth(depth: Tensor, like: Tensor | None = None) -> Tensor:
    """(H, W) -> (3, H, W): near is bright yellow, far is dark blue, unknown black; on the scale of `like`, if given."""
    known, (low, high) = depth > 0, usual_range(depth if like is None else like)
    level = (1 - (depth - low) / max(float(high - low), 1e-9)).clamp(0, 1).numpy()
    stops = np.array([[0.19, 0.07, 0.23], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38],
                      [0.99, 0.91, 0.14]])
    colours = np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)])
    return torch.from_numpy(colours).float() * known


def colour_ids(ids: Tensor) -> Tensor:  # (H, W) -> (3, H, W): one fixed colour an id, unlabelled black
    hue = torch.stack([(ids * step % 97).float() / 97 for step in (37, 59, 83)])
    return (0.15 + 0.85 * hue) * (ids > 0)


def colour_normals(normal: Tensor) -> Tensor:  # (H, W, 3) -> (3, H, W): red right, green up, blue towards the camera
    return (normal * torch.tensor([1.0, -1, -1]) + 1).permute(2, 0, 1) / 2


def picture_grid(path, headings, rows, scale=None, below=None):
    """Save rows of (3, H, W) pictures (None: an empty panel) under one heading a column; `below` (width -> (3, h,
    width)) draws a strip under them all. Returns the path."""
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
    """Curves {name: [(x, y), ...]} as a picture (3, height, width); the axes go from the least to the largest value."""
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
        text = f"{value:.0f}" if x1 - x0 > 20 else f"{value:.3g}"
        draw.text((place(value, y0)[0] - 12, bottom + 8), text, fill=(90, 90, 90))
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


# ---------------------------------------------------------------------------------------------- report and command


def describe(scene, triplets):  # -> lines that say what is in a scene
    have = [f"{kind} {n}" for kind in MAPS if (n := sum(getattr(frame, kind) is not None for frame in scene.frames))]
    sizes = sorted({frame.size for frame in scene.frames})
    resolution = f"{sizes[0][1]}x{sizes[0][0]}" + (f" ... {sizes[-1][1]}x{sizes[-1][0]}" if len(sizes) > 1 else "")
    baselines = [float((scene.c2w[a, :3, 3] - scene.c2w[b, :3, 3]).norm()) for a, b, _ in triplets]
    near, far = scene.depth_range
    maps = ", ".join(have) or "images only (masks: superpixels)"
    yield f"{scene.name}: {len(scene)} views, {resolution}, with {maps}"
    yield f"  depth range {near:.3g} to {far:.3g} from {scene.range_source}, in the data set's unit"
    yield f"  context baselines {min(baselines):.3g} to {max(baselines):.3g} (median {np.median(baselines):.3g})"
    yield from (f"  {note}" for note in scene.notes[:5])
    if len(scene.notes) > 5:
        yield f"  ... and {len(scene.notes) - 5} more notes"


def report_scenes(scenes, args):
    shown = scenes if len(scenes) <= 12 else scenes[:: math.ceil(len(scenes) / 8)]
    for scene in shown:
        generator = torch.Generator().manual_seed(args.seed)
        triplets = [sample_triplet(scene, generator) for _ in range(4)]
        print("\n".join(describe(scene, triplets)))
        print(f"  ->  {show_triplets(scene, triplets, Path(args.out) / (scene.name.replace('/', '_') + '.png'))}")
    print(f"{len(scenes)} scenes ({len(split(scenes, 'train'))} train, {len(split(scenes, 'val'))} val), "
          f"{sum(map(len, scenes))} views" + (f"; {len(shown)} of them shown" if len(shown) < len(scenes) else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Look at posed scenes before training, or write the built-in rooms.")
    scene_flags(parser, "out/01_data")
    parser.add_argument("--rooms", type=positive, help="write this many built-in rooms to --scene_dir")
    parser.add_argument("--views", type=positive, default=DEFAULT_ROOMS["views"], help="views a room, at least 3")
    parser.add_argument("--size", type=positive, nargs=2, default=DEFAULT_ROOMS["size"], metavar=("H", "W"),
                        help="of the rooms' images")
    args = parser.parse_args(argv)
    with explained(args, "the same command starts again"):
        if args.rooms is not None:
            make_rooms(args.scene_dir, scenes=args.rooms, views=args.views, size=args.size, seed=args.seed)
        scenes, root = open_scenes(args.scene_dir, args.skip_bad_frames, args.near, args.far), Path(args.scene_dir)
        below = [] if reader_of(root) else sorted(d for d in root.iterdir() if d.is_dir() and d.name[0] != ".")
        for child in below:
            if not any(scene.name.split("/")[0] == child.name for scene in scenes):
                print(f"{child}: ignored, no poses in it that are read here")
        report_scenes(scenes, args)


if __name__ == "__main__":
    sys.modules["01_data"] = sys.modules[__name__]  # what tiny/rooms.py imports is this very module, no second copy
    main()
