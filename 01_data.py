"""Posed multi-view scenes: what Splat and Distill trains on, and how a step draws two context views and a target.

Paper   Splat and Distill (SnD) Sec. 3.1: a scene is S = {(I_i, P_i)}; Sec. 4.3 E: the target lies between the contexts.
In      a folder: nerfstudio / instant-ngp `transforms*.json` (also ScanNet++ and FiT3D preprocessing), a COLMAP
        model (`sparse/0`, binary or text), an RGB-D sequence (7-Scenes), LLFF's `poses_bounds.npy`, or a folder of such
        folders; the files tell which. Optional folders beside `images/`: `masks/ depth/ normals/ labels/`.
Out     `load_scenes(path) -> [Scene]`, `Scene.view(i, size) -> View`; a report and one contact sheet per scene.
Run     python 01_data.py                        built-in rooms -> data/, 20 s on a 2-core CPU
        python 01_data.py --scene_dir my_scene   what is in a folder, before anything is trained
Copy    01_data.py (and tiny/rooms.py, if rooms are to be made)
Read    View, Frame, Scene, regions, into_picture, unproject, find_depth_range, frustum_points, overlap, LEVELS,
        context_pairs, best_pairs, sample_triplet, split, held_out_views
Try     LEVELS = ((0.9, 0.4),) in section 3, then `python 01_data.py --rooms 9 --scene_dir out/nine`: the contexts of
        room_000 come closer, from a median distance of 0.50 to 0.39 m. With LEVELS = ((0.1, 2.0),) it is 1.65 m.
        `--scene_dir out/nine --near 0.1 --far 1` stops at the first room: frusta that end at 1 m
        hardly overlap, and baselines are too wide for a typical depth of 0.18 m.
Not     fisheye cameras, images without poses, video files.
Words   V views, H W pixels, K (3, 3) intrinsics, c2w camera-to-world, w2c its inverse, target / context as in SnD. The
        paper's I_i is View.image, its projection P_i (3, 4) is K times the first three rows of w2c.

Conventions, true in all six files. Camera axes are OpenCV's: x right, y down, z forward. `K` is in pixels of the image
at hand and pixel centres sit at +0.5: the top-left pixel's centre is (0.5, 0.5). Depth is z-depth in the data set's
unit (metres for rooms and RGB-D). Images are (3, H, W) RGB in [0, 1]; maps are (H, W) or (H, W, C). Mask id 0 means
unlabelled, depth 0 not measured, label 255 ignore; normals are unit vectors of the camera frame, towards the camera.
`# Differs:` marks where we depart from a paper or from the code that its authors released ("the official code").
"""
from __future__ import annotations

import argparse
import copy
import importlib
import io
import json
import math
import os
import re
import struct
import sys
import threading
import unicodedata
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor


class DataError(Exception):
    """Bad input. The message is one line that names the file and the remedy."""

    def __str__(self):  # file names may hold line breaks
        return "".join(c if c.isprintable() else "?" for c in super().__str__())


# ------------------------------------------------------------------------ 1. Views and scenes


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


@dataclass
class Frame:
    """What a scene knows of one view before anything is decoded: where its files are, and its camera."""
    name: str
    image: Path
    K: np.ndarray  # (3, 3) in pixels of the stored image
    c2w: np.ndarray  # (4, 4)
    size: tuple | None  # (H, W) of the stored image; `load_scenes` fills it in
    distortion: tuple = ()  # of the lens: tangential p1, p2, then radial k1, k2, ...; () or zeros: none
    mask: Path | None = None
    depth: Path | None = None
    normal: Path | None = None
    label: Path | None = None
    seen: object = ...  # which rows of Scene.points this picture shows: a list of indices, or `...` for all
    # The rest is for the workshop.
    two_regions: bool = False  # the mask marks valid pixels; valid and invalid are its two regions
    upright: bool = False  # the camera is that of the picture turned as its EXIF tag says
    notes: tuple = ()  # what was changed to make the camera fit
    cache: dict = field(default_factory=dict, init=False, repr=False)  # decoded views, see `decoded_once`


class Scene:
    """Posed views of one place. It holds file names and cameras; pictures are decoded when `view` asks for them."""

    def __init__(self, name, frames, depth_scale=1e-3, points=None, notes=(), class_names=None, kinect=False):
        self.name, self.frames = name, frames  # one Frame for each view
        self.depth_scale = depth_scale  # stored depth times this is depth in the data set's unit
        self.points = points  # (M, 3) world points of a sparse reconstruction, or None
        self.notes = list(notes)  # sentences for the user: what was left out or assumed
        self.class_names = class_names  # a tuple: what the label ids mean, or None
        self.kinect = kinect  # depth is stored as the Kinect's infrared camera sees it, as in raw 7-Scenes
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
        size = tuple(size or frame.size)
        # Scale and crop act on pixels, x_view = scale * (x - left), so they multiply K from the left. (What reads files
        # and undoes the lens is in the workshop: covering_crop, undistorted_K, decoded_once, read_image, read_maps.)
        scale, (left, top, *_) = covering_crop(frame.size, size)
        to_view = np.array([[scale, 0, -scale * left], [0, scale, -scale * top], [0, 0, 1]])
        K = torch.from_numpy(to_view @ undistorted_K(frame)).float()
        image = decoded_once(("image", size), frame, lambda: read_image(frame, size))
        found = decoded_once(("maps", size), frame, lambda: read_maps(self, frame, size)) if maps else {}
        found = {kind: values.clone() for kind, values in found.items()}  # the caller may change them
        return View(frame.name, image.float() / 255, K, self.c2w[i], **found)

    @cached_property
    def depth_range(self):
        """(near, far) of what the cameras see, in the data set's unit."""
        near, far, self.range_source = find_depth_range(self)
        return near, far

    def subset(self, indices):
        """The scene with these views alone. Its depth range stays that of all views."""
        part = copy.copy(self)
        part.depth_range, part.range_source = self.depth_range, self.range_source
        part.frames, part.c2w, part.pairs = [self.frames[i] for i in indices], self.c2w[list(indices)], {}
        return part


def regions(view: View) -> Tensor:  # (H, W) int64
    """What counts as an object: the view's masks; else superpixels, patches of similar colour (workshop)."""
    return view.mask if view.mask is not None else superpixels(view.image, 64)


# ------------------------------------------------------------------------ 2. What does a view see?


def into_picture(points, frame):
    """(M, 3) world -> x, y in pixels of the frame, z-depth; z is 0 for points behind it or outside of its picture.

    Lens distortion is left out, as a few pixels do not matter here.
    """
    local = (points - frame.c2w[:3, 3]) @ frame.c2w[:3, :3]  # R^T (p - t) as rows, with c2w = (R, t)
    z = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = frame.K[0, 0] * local[:, 0] / z + frame.K[0, 2], frame.K[1, 1] * local[:, 1] / z + frame.K[1, 2]
    inside = (x > 0) & (x < frame.size[1]) & (y > 0) & (y < frame.size[0])
    return x, y, np.where((z > 0) & inside, z, 0)


def unproject(x, y, z, frame):  # pixels and z-depth -> (M, 3) world
    rays = np.stack([(x - frame.K[0, 2]) / frame.K[0, 0], (y - frame.K[1, 2]) / frame.K[1, 1], np.ones_like(x)], -1)
    return (rays * z[..., None]).reshape(-1, 3) @ frame.c2w[:3, :3].T + frame.c2w[:3, 3]


def find_depth_range(scene):  # -> near, far, where they come from
    """From measured depth; where it is missing, from sparse points; else from the poses. Eight views are looked at."""
    some = [scene.frames[i] for i in np.linspace(0, len(scene) - 1, min(8, len(scene))).astype(int)]
    measured = [read_depth(scene, frame).ravel()[::7] for frame in some if frame.depth]  # every seventh pixel
    sparse = [into_picture(scene.points[frame.seen], frame)[2] for frame in some if scene.points is not None]
    for depths, source in ((measured, "measured depth"), (sparse, "sparse points")):
        known = np.concatenate(depths) if depths else np.zeros(0)
        known = known[known > 0]
        if len(known) > 50:
            near, far = np.percentile(known, [1, 99])  # without 1 % at each end, and with a margin of a fifth
            return float(0.8 * near), float(1.2 * far), source
    return *layout_depth_range(np.stack([frame.c2w for frame in scene.frames])), "the camera layout"


def frustum_points(scene, i):
    """(M, 3) world points that fill what view i sees: a grid over its picture at three depths, uniform in 1 / depth."""
    frame, (near, far) = scene.frames[i], scene.depth_range
    height, width = frame.size
    x, y, inverse = np.meshgrid((np.arange(8) + 0.5) / 8 * width, (np.arange(6) + 0.5) / 6 * height,
                                np.linspace(1 / far, 1 / near, 5)[1:-1], indexing="ij")  # neither near nor far itself
    return unproject(x, y, 1 / inverse, frame)


def overlap(scene, i, j):
    """The share of view i's frustum that view j sees, and the other way round: the smaller of the two.

    It knows nothing of walls: two cameras with a wall between them overlap if they look the same way.
    """
    def share(a, b):
        _, _, z = into_picture(frustum_points(scene, a), scene.frames[b])
        return (z > 0).mean()
    return min(share(i, j), share(j, i))


# ------------------------------------------------------------------------ 3. Two contexts and a target


# What is asked of two contexts: (least overlap with the target, widest baseline). The baseline is the distance of the
# two cameras over the typical depth, which is the harmonic mean of near and far. If a target has no such pair, the next
# level asks for less.
LEVELS = ((0.5, 0.4), (0.5, 0.8), (0.25, 1.0), (0.1, 2.0))


def context_pairs(scene, target, least, widest):
    """Pairs of views from which stereo can reconstruct what `target` sees: [(a, b), ...].

    They are chosen among the 24 views nearest to the target. Each overlaps the target by at least `least`, and the two
    overlap each other by at least three quarters of that. Their baseline, in typical depths, is 0.02 to `widest`.
    The target lies between them, as in SnD (Sec. 4.3 E): beyond both, it would see surfaces that neither sees.
    """
    if (target, least, widest) in scene.pairs:
        return scene.pairs[target, least, widest]
    centre = np.stack([frame.c2w[:3, 3] for frame in scene.frames])  # (V, 3)
    near, far = scene.depth_range
    typical = 2 / (1 / near + 1 / far)  # half way in disparity, 1 / depth
    close = np.argsort(np.linalg.norm(centre - centre[target], axis=1))[:25]  # the target itself and 24 others
    seeing = [j for j in close if j != target and overlap(scene, target, j) >= least]
    pairs = []
    for a, b in combinations(seeing, 2):
        baseline = np.linalg.norm(centre[a] - centre[b]) / typical
        between = (centre[a] - centre[target]) @ (centre[b] - centre[target]) < 0  # seen from it, over 90 degrees apart
        if 0.02 < baseline < widest and between and overlap(scene, a, b) >= 0.75 * least:
            pairs.append((int(a), int(b)))
    scene.pairs[target, least, widest] = pairs  # the same target is asked for again and again
    return pairs


def best_pairs(scene, target):  # -> the index of the first level that has pairs, and its pairs; else None, []
    for level, (least, widest) in enumerate(LEVELS):
        if pairs := context_pairs(scene, target, least, widest):
            return level, pairs
    return None, []


def sample_triplet(scene, generator, targets=None):
    """-> (context_a, context_b, target): three distinct views (SnD Sec. 3.1), chosen by geometry.

    `targets` restricts the target (to hold views out). Raises DataError if none of (at most) 400 has contexts.
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
                    "add views in between, correct its depth range (--near, --far), or drop the scene")


# ------------------------------------------------------------------------ 4. What is held out


def split(scenes, part):
    """The `train` or `val` scenes: every eighth scene is held out, or the last one where there are fewer than eight.

    A single scene is always a training scene; then some of its views are held out instead, see `held_out_views`.
    """
    # Differs: the official code trains on every scene folder, the validation scenes included; here some are held out.
    assert part in ("train", "val"), f"split takes 'train' or 'val', not {part!r}"
    held_out = range(7, len(scenes), 8)
    if 1 < len(scenes) < 8:
        held_out = [len(scenes) - 1]
    return [s for i, s in enumerate(scenes) if (i in held_out) == (part == "val")]


def held_out_views(scene) -> list[int]:
    """Every eighth view, starting with the third, so that the first held-out view has neighbours on both sides."""
    return list(range(min(2, len(scene) - 1), len(scene), 8))


# ---- Workshop: not needed to understand the method ----


OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # flips y and z: OpenGL camera axes <-> OpenCV camera axes, its own inverse
READABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".exr", ".gif")
MAPS = dict(mask=("instance_segmentation", "masks"), depth=("depth",), normal=("normals",), label=("labels",))
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)  # of damaged pictures
CHANNELS = {"depth": (1,), "normal": (3, 4)}  # of the maps that have a fixed number; ids may be grey or colours
DEFAULT_ROOMS = dict(scenes=48, views=16, size=(96, 128), seed=0)
BUILT_IN = {  # folders that are made if missing: rooms to train on, other rooms for 05, and small rooms for 06
    "data": DEFAULT_ROOMS, "data_probe": DEFAULT_ROOMS | dict(scenes=200, views=4, seed=1),
    "data_small": DEFAULT_ROOMS | dict(scenes=200, size=(48, 64))}


# ------------------------------------------------------------------------ finding and checking scenes


def open_scenes(scene_dir, skip_bad_frames=False, near=None, far=None):
    """What every stage does first: read `scene_dir`, where the built-in rooms are made if they are missing.

    `near` and `far` replace what `find_depth_range` would find in a scene.
    """
    folder = Path(scene_dir)
    settings = rooms_made(folder)
    for name, rooms in BUILT_IN.items():
        if not settings and folder.resolve() == Path(name).resolve() and is_empty(folder):
            settings = rooms
            print(f"no data yet: writing {rooms['scenes']} built-in rooms of {rooms['views']} views to {folder}/")
    if settings:  # also completes rooms whose making was interrupted
        make_rooms(folder, **settings)
    scenes = load_scenes(folder, skip_bad_frames)
    say_whose_cameras(folder)
    for scene in scenes if (near, far) != (None, None) else ():
        found = scene.depth_range
        low, high = scene.depth_range = (found[0] if near is None else near, found[1] if far is None else far)
        scene.range_source = "--near and --far"
        if not 0 < low < high < math.inf:
            raise DataError(f"{scene.name}: {low:g} to {high:g} is no depth range; "
                            "give --near and --far with 0 < near < far")
    return scenes


def say_whose_cameras(scene_dir):
    """Repeats the verdict on cameras that 06_distill3r.py has estimated: it stands in the scene as `agreement`."""
    files = transforms_files(scene_dir)
    if agreement := files and json.loads(files[0].read_bytes()).get("agreement"):
        try:
            good, why = trust(agreement)
        except (TypeError, ValueError):
            raise DataError(f"{files[0]}: 'agreement' must be the two numbers that 06 wrote; remove it") from None
        print(f"{scene_dir}: its cameras were estimated from photos, "
              f"{'they explain the photos' if good else 'do not trust them'} ({why})")


def trust(agreement):  # of cameras that 06 has estimated -> whether to trust them, and why
    found, still = agreement  # of neighbouring photos through these cameras, and as if no camera had moved
    return found >= still + 0.02, (f"neighbouring photos agree to {100 * found:.0f} % through them, and to "
                                   f"{100 * still:.0f} % if no camera had moved")


def make_rooms(out, scenes=48, views=16, size=(96, 128), seed=0):
    """Write built-in rooms of `size` (H, W) into `out` (tiny/rooms.py); the same seed gives the same bytes."""
    try:
        rooms = importlib.import_module("tiny.rooms")
    except ModuleNotFoundError:
        raise DataError(f"{out}: no rooms can be made without tiny/rooms.py; copy it beside 01_data.py, "
                        "or give --scene_dir a scene") from None
    rooms.make_rooms(out, scenes, views, size, seed)


def rooms_made(folder):  # -> the settings `make_rooms` was called with, None where it was not
    record = Path(folder) / "rooms.json"
    try:
        return {key: json.loads(record.read_bytes())[key] for key in DEFAULT_ROOMS} if record.exists() else None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{record}: not the settings of built-in rooms; "
                        "remove the folder to have them made again") from None


def is_empty(folder):  # nothing there, or hidden files alone
    return not folder.exists() or (folder.is_dir() and all(child.name[0] == "." for child in folder.iterdir()))


def load_scenes(path, skip_bad_frames=False) -> list[Scene]:
    """All scenes at `path`: the folder itself, or every scene folder up to three levels below it, in natural order.

    Raises DataError on the first file that is bad, so that no run dies of it later. With `skip_bad_frames` such frames
    are left out and listed in `Scene.notes`, and a scene of which too little remains is left out as well.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{path}: no such folder; give --scene_dir a scene, or a folder of scenes")
    listing.cache_clear()  # folders may have changed since
    scenes, error = [], None
    for folder, reader in find_scenes(root):
        name = folder.resolve().name if folder == root else folder.relative_to(root).as_posix()
        try:
            scenes.append(checked_scene(name, folder, *reader(folder), skip_bad_frames))
        except DataError as unusable:
            error = unusable
            if not skip_bad_frames:
                raise
            print(f"left out: {error}")
    if not scenes and not error and reader_of(root.absolute().parent):
        raise DataError(f"{path}: a folder of a scene; give --scene_dir the scene itself, {root.absolute().parent}")
    if not scenes:
        raise error or DataError(f"{path}: no scene in here (looked for transforms*.json, sparse/0, frame-*.pose.txt "
                                 "and poses_bounds.npy, three levels deep); for photos without poses run COLMAP first "
                                 "and put its model in sparse/0")
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
    if colmap_models(folder):
        return read_colmap
    if next(folder.glob("frame-*.pose.txt"), None):
        return read_rgbd
    return read_llff if (folder / "poses_bounds.npy").is_file() else None


def checked_scene(name, folder, frames, extra, skip_bad_frames):
    """Everything that is wrong with a scene is said here, in one line, before anything is computed."""
    listed = Counter(frame.image for frame in frames)
    for frame in frames:
        if listed[frame.image] > 1:
            raise DataError(f"{folder}: {frame.name} is listed twice; keep one of the two frames")
    checked = [(frame, problem_of(frame, thorough=skip_bad_frames)) for frame in frames]
    frames = [frame for frame, problem in checked if not problem]
    problems = [problem for _, problem in checked if problem]
    if problems and not skip_bad_frames:
        remedy = "" if "--skip_bad_frames" in problems[0] else "; mend it or pass --skip_bad_frames"
        more = f" ({len(problems)} of {len(checked)} frames have a problem)" if len(problems) > 1 else ""
        raise DataError(problems[0] + remedy + more)
    if len(frames) < 3:
        left = f" ({len(problems)} left out, the first because {problems[0]})" if problems else ""
        raise DataError(f"{folder}: {len(frames)} usable views, but two contexts and a target make three; "
                        f"add views{left}")
    for frame in frames:
        u, _, vt = np.linalg.svd(frame.c2w[:3, :3])  # poses in text files are rounded: the nearest true rotation
        frame.c2w = np.vstack([np.hstack([u @ vt, frame.c2w[:3, 3:]]), [0, 0, 0, 1]])
    notes = [*extra.pop("notes"), *(f"left out: {problem}" for problem in problems)]
    changes = Counter(note for frame in frames for note in frame.notes)
    notes += [f"{note} ({count} views)" for note, count in changes.items()]
    for kind in MAPS:
        lacking = sum(getattr(frame, kind) is None for frame in frames)
        notes += [f"{lacking} of {len(frames)} views have no {kind}"] if 0 < lacking < len(frames) else []
    notes += folders_not_read(folder, frames)
    bounds = extra.pop("bounds", None)
    scene = Scene(name, frames, notes=notes, **extra)
    if bounds:
        scene.depth_range, scene.range_source = bounds, "poses_bounds.npy"
    if "depth_scale" not in extra:
        settle_depth_unit(scene)
    return scene


# ------------------------------------------------------------------------ does a frame fit its files?


def problem_of(frame, thorough=False):
    """-> what is wrong with this frame, in words, or None. Fills in the size of the picture."""
    if not frame.image.exists():
        return f"{frame.image} does not exist, but {frame.name} has a pose"
    try:
        stored = stored_size(frame.image, thorough)
        return fit_camera(frame, stored) or problem_of_camera(frame) or problem_of_maps(frame, thorough)
    except DataError as error:
        return str(error)


def fit_camera(frame, stored):
    """Adapts a camera to its picture of size `stored` (H, W), where it was made for another size or for the picture
    turned as its EXIF tag says: changes the frame's size and K. -> what is wrong, or None"""
    declared, frame.size = frame.size, stored
    if declared == stored:
        return None
    if declared and min(declared) < 1:
        return f"{frame.image}: its camera is for {declared[1]:g}x{declared[0]:g} pixels; export it again"
    upright = upright_size(frame.image, stored)
    if declared is None:  # then the principal point tells whether it was turned
        turned = np.abs(2 * frame.K[[1, 0], 2] / upright - 1).max() < 0.08 < abs(stored[0] / stored[1] - 1)
        declared = upright if turned else stored
    for size in (stored, upright):
        ratio = np.divide(size, declared)
        zoom = math.sqrt(ratio[0] * ratio[1])  # declared sizes are often rounded to whole or even pixels
        rounding = np.abs(np.subtract(size, np.multiply(zoom, declared))).max()
        if rounding <= 2 * max(1, zoom) and abs(ratio[0] / ratio[1] - 1) < 0.01:
            break
    else:
        turned = " (EXIF turns it)" if upright != stored else ""
        return (f"{frame.image} is {stored[1]}x{stored[0]}{turned}, but its camera is for {declared[1]}x{declared[0]}, "
                "which is another shape: use the pictures that the cameras were made for")
    frame.size, frame.upright = size, size != stored
    if declared != size:
        frame.K = np.array([ratio[1], ratio[0], 1])[:, None] * frame.K
        frame.notes += (f"cameras are for pictures of {declared[1]}x{declared[0]}: "
                        f"scaled to the {size[1]}x{size[0]} of {frame.image.parent.name}/",)
    if frame.upright:
        frame.notes += ("pictures are turned upright, as EXIF says and as their cameras expect",)


def upright_size(path, stored):  # (H, W) of a picture as it is to be seen, which its EXIF tag may say
    orientation = 1
    with suppress(*PILLOW_ERRORS), Image.open(path) as image:
        orientation = image.getexif().get(0x0112, 1)
    return stored[::-1] if orientation in (5, 6, 7, 8) else stored


def problem_of_camera(frame):
    if frame.c2w.shape != (4, 4) or not (np.abs(frame.c2w) < 1e30).all():
        return f"{frame.image}: its pose is not a 4x4 matrix of finite numbers"
    rotation, last = frame.c2w[:3, :3], frame.c2w[3]
    scale = np.cbrt(np.linalg.det(rotation))
    rigid = scale > 1e-9 and np.abs(rotation @ rotation.T / scale**2 - np.eye(3)).max() <= 0.02
    if not rigid or np.abs(last - [0, 0, 0, 1]).max() > 1e-6:
        return (f"{frame.image}: its pose is not a rigid motion (determinant {scale**3:.3f}, last row {last}); "
                "its matrix mirrors, shears or squeezes, or is transposed")
    if not (np.abs(frame.K) < 1e30).all() or min(frame.K[0, 0], frame.K[1, 1]) <= 0 or (frame.K[2] != [0, 0, 1]).any():
        return f"{frame.image}: its intrinsics are singular (focal lengths {frame.K[0, 0]:g}, {frame.K[1, 1]:g})"
    (height, width), (cx, cy) = frame.size, frame.K[:2, 2]
    zooms = np.array([2 * cx / width, 2 * cy / height])
    if not (0 < cx < width and 0 < cy < height) or (abs(zooms[0] / zooms[1] - 1) < 0.02 and abs(zooms[0] - 1) > 0.12):
        return (f"{frame.image} is {width}x{height}, but its intrinsics put the centre at ({cx:g}, {cy:g}), as for a "
                f"picture of about {2 * cx:.0f}x{2 * cy:.0f}: scale them to the size of the image")
    if abs(scale - 1) > 0.02:
        frame.c2w[:3, :3] /= scale
        frame.notes += (f"the rotations of its poses were scaled by {scale:.3g}; the scale was removed",)
    if undistorted_K(frame) is None:
        return (f"{frame.image}: its distortion coefficients bend the border out of the picture; "
                "undistort the images first (colmap image_undistorter)")


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


def stored_size(path, thorough=False, channels=None):
    """(H, W) of a picture or array. Its header and its last bytes are looked at, which shows most damage; `thorough`
    decodes it to the end."""
    if not path.is_file():
        raise DataError(f"{path}: a folder or a pipe, not a file; put the picture there")
    shape = decode_map(path).shape if path.suffix == ".npy" else header(path)
    if not shape or (path.suffix != ".npy" and (thorough or not ends_well(path))):
        shape = np.array(decode(path)).shape  # raises, and says what is wrong with the file
    count = 1 if len(shape) == 2 else shape[-1]
    if len(shape) not in (2, 3) or 0 in shape or (channels and count not in channels):
        wanted = f" with C = {' or '.join(map(str, channels))}" if channels else ""
        raise DataError(f"{path}: its shape is {tuple(shape)}, not (H, W) or (H, W, C){wanted}; write it again")
    return shape[:2]


def header(path):  # -> (H, W, C) of a picture, not decoded; None where even that cannot be read
    with suppress(*PILLOW_ERRORS), Image.open(path) as image:
        return (*image.size[::-1], len(image.getbands()))


def ends_well(path):  # whether the last bytes of a PNG or JPEG are there; of other types nothing is known
    with open(path, "rb") as file:
        start = file.read(2)
        file.seek(max(0, os.path.getsize(path) - 12))
        end = file.read()
    return {b"\xff\xd8": end.endswith(b"\xff\xd9"), b"\x89P": end[4:8] == b"IEND"}.get(start, True)


# ------------------------------------------------------------------------ names of files


def inside(path, root, where):
    """`path` without `..`; files outside the scene folder are refused, as a list may come from anyone."""
    path = Path(os.path.normpath(path))
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise DataError(f"{where}: names {path}, outside the scene folder; "
                        f"move the file into {root} and use a relative path")
    return path


def find_file(root, name, where, folders=(), endings=()):
    """The file that a list calls `name`, below `root` or in one of its `folders`; the first guess if there is none.

    Lists come from other machines: backslashes, drive letters, other case or ending, images_4/ in place of images/.
    """
    name = re.sub("^[A-Za-z]:/(.*/)?", "", name.replace("\\", "/"))  # C:\me\1.png is 1.png
    first = inside(root / name, root, where)
    relative = Path(os.path.relpath(first, root))
    smaller = [Path(f"{relative.parts[0]}_{n}", *relative.parts[1:]) for n in (2, 4, 8) if len(relative.parts) > 1]
    for path in (relative, *(Path(folder) / relative for folder in folders), *smaller):
        if (root / path).is_file() and path.suffix.lower() not in UNREADABLE:
            return root / path
        stem = path.stem if path.suffix.lower() in (*endings, *UNREADABLE) else path.name
        for name in (path.name, *(stem + end for end in endings)):
            found = root
            for part in (*path.parts[:-1], name):
                found = listing(found).get(plain(part), found / part)
            if found.is_file():
                return found
    return first


def plain(name):  # the same for names that differ only in case, or in how an accent is encoded (macOS decomposes it)
    return unicodedata.normalize("NFC", name).lower()


@lru_cache
def listing(folder):  # -> {plain name: path}
    return {plain(path.name): path for path in folder.iterdir()} if folder.is_dir() else {}


def is_picture(path):
    return path.suffix.lower() in READABLE and path.name[0] != "."


def left_out(paths):  # -> sentences that count the pictures among `paths` that no stage reads
    endings = Counter(path.suffix[1:].upper() for path in paths if path.suffix.lower() in UNREADABLE)
    return [f"ignored: {count} {end} files, which are not read; save them as JPEG or PNG"
            for end, count in sorted(endings.items())]


def folders_not_read(folder, frames):  # -> sentences: their maps may be called otherwise than here
    files = [getattr(frame, kind) for frame in frames for kind in ("image", *MAPS)]
    used = {parent for file in files if file for parent in file.parents}
    homes = {frame.image.parent.parent for frame in frames} | {folder}
    spare = {d for home in homes for d in home.iterdir() if d.is_dir() and d not in used and d.name[0] != "."
             and d.name != "confidence" and not d.name.startswith("images_")}  # by 06; smaller copies of images/
    names = sorted({d.name for d in spare for file in d.iterdir() if is_picture(file) or file.suffix == ".npy"})
    return [f"ignored: {name}/ (maps are read from depth/ masks/ normals/ labels/, with the names of the images)"
            for name in names]


def maps_beside(image, root):
    """The maps of an image: -> {kind: path or None}.

    The mask of scene/images/cam0/7.jpg is scene/masks/cam0/7.jpg.png, or 7.png there (or .npy, .tif). That of
    scene/dslr/images/7.jpg may also be in scene/dslr/masks/.
    """
    folders = Path(os.path.relpath(image.parent, root)).parts  # ("images", "cam0"); () for images in the scene folder
    homes = (root, image.parent.parent if folders else root)
    endings = ("png", "npy", "tif", "tiff")
    names = [Path(*folders[1:], f"{name}.{end}") for name in (image.name, image.stem) for end in endings]
    found = {}
    for kind, places in MAPS.items():
        paths = (home / place / name for place in places for home in homes for name in names)
        found[kind] = next((path for path in paths if path.exists()), None)
    return found


# ------------------------------------------------------------------------ reader: transforms.json


def transforms_files(folder):
    """All transforms files of a scene, the one to read first. Undistorted ones (ScanNet++) win over fisheye ones."""
    places = (folder, folder / "nerfstudio", folder / "dslr" / "nerfstudio")
    found = [f for place in places for f in sorted(place.glob("transforms*.json"))]
    rank = ["transforms_undistorted.json", "transforms.json", "transforms_train.json"]
    return sorted(found, key=lambda f: rank.index(f.name) if f.name in rank else len(rank))


def read_transforms(folder):
    """nerfstudio / instant-ngp: OpenGL camera-to-world, intrinsics of the whole file or of each frame."""
    file, *others = transforms_files(folder)
    try:
        meta = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({str(error).splitlines()[0]}); write it again") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("frames"), list):
        raise DataError(f"{file}: has no list 'frames'; is it a nerfstudio file?")
    root = file.parent
    if root.name == "nerfstudio" and image_folder(root.parent) and not image_folder(root):
        root = root.parent  # ScanNet++ has dslr/nerfstudio/transforms.json beside dslr/images/
    marked = lambda entry: isinstance(entry, dict) and entry.get("is_bad") in (True, "true", "True")
    frames = [transforms_frame(meta, entry, root, f"{file}: frame {n}")
              for n, entry in enumerate(meta["frames"]) if not marked(entry)]
    bad = len(meta["frames"]) - len(frames)
    unit = next((key for key in ("depth_unit_scale_factor", "integer_depth_scale") if meta.get(key) is not None), None)
    try:
        given = {"depth_scale": float(meta[unit])} if unit else {}
        assert 0 < given.get("depth_scale", 1) < 1e30
    except (AssertionError, TypeError, ValueError):
        raise DataError(f"{file}: '{unit}' must be a positive number (0.001 for millimetres)") from None
    notes = [f"ignored: {other.relative_to(folder)} ({file.relative_to(folder)} comes first)" for other in others]
    notes += [f"left out: {bad} frames that are marked is_bad"] if bad else []
    if frames and all(frame.two_regions and not frame.mask.exists() for frame in frames):
        notes.append("the masks that mask_path names do not exist; the scene is read without them")
        for frame in frames:
            frame.mask, frame.two_regions = None, False
    places = {frame.image.parent for frame in frames}
    notes += spare_pictures([path for place in places if place.is_dir() for path in place.iterdir()], frames, bad)
    names = meta.get("class_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"{file}: 'class_names' must be a list of names")
    return frames, dict(notes=notes, class_names=tuple(names) if names else None, **given)


def spare_pictures(there, frames, expected=0):  # -> sentences about pictures without a pose, and pictures of no use
    known, endings = {frame.image for frame in frames}, {frame.image.suffix for frame in frames}
    spare = sum(path.suffix in endings and is_picture(path) and path not in known for path in there) - expected
    return [f"ignored: {spare} pictures without a pose"] * (spare > 0) + left_out(there)


IMAGE_FOLDERS = ("images", "undistorted_images", "resized_undistorted_images", "images_2", "images_4", "images_8")
MASK_FOLDERS = ("undistorted_anon_masks", "resized_anon_masks", "masks")  # the first two are ScanNet++'s


def image_folder(folder):
    return next((there for name in IMAGE_FOLDERS if (there := listing(folder).get(name)) and there.is_dir()), None)


def transforms_frame(meta, entry, root, where):
    own = entry if isinstance(entry, dict) else {}
    settings = meta | {key: value for key, value in own.items() if value is not None}
    model = str(settings.get("camera_model", "")).upper()
    if settings.get("is_fisheye") or any(word in model for word in ("FISHEYE", "EQUIRECT", "ORTHO")):
        raise DataError(f"{where}: {model or 'fisheye'} cameras are not read; undistort first "
                        "(ScanNet++ ships transforms_undistorted.json)")
    for key, kind in (("file_path", str), ("transform_matrix", list)):
        if not isinstance(own.get(key), kind):
            raise DataError(f"{where} lacks '{key}'; add it or remove the frame")
    image = find_file(root, entry["file_path"], where, IMAGE_FOLDERS, READABLE)
    try:
        K, size, distortion = transforms_camera(settings, image, where)
        pose = np.array(entry["transform_matrix"], float)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise DataError(f"{where}: a value is not a number ({str(error).splitlines()[0]}); mend the frame") from None
    if pose.shape == (3, 4):
        pose = np.vstack([pose, [0, 0, 0, 1]])
    c2w = pose * OPENGL.diagonal() if pose.shape == (4, 4) else pose  # flips the y and z axes: columns 1 and 2
    return Frame(entry["file_path"], image, K, c2w, size, distortion, **transforms_maps(entry, image, root, where))


def transforms_maps(entry, image, root, where):  # -> {kind: path or None}, and whether the mask is one of two regions
    maps = maps_beside(image, root)
    keys = dict(instance_file_path="mask", depth_path="depth", depth_file_path="depth", normal_file_path="normal",
                label_file_path="label")
    maps |= {kind: find_file(root, str(entry[key]), where) for key, kind in keys.items() if entry.get(key)}
    valid = find_file(root, str(entry["mask_path"]), where, MASK_FOLDERS) if entry.get("mask_path") else None
    two_regions = valid is not None and maps["mask"] in (None, valid)  # instance masks are better where there are some
    return maps | dict(mask=valid if two_regions else maps["mask"], two_regions=two_regions)


def transforms_camera(settings, image, where):  # -> K, declared (H, W) or None, distortion
    get = lambda key, default=None: default if settings.get(key) is None else float(settings[key])
    size = (int(get("h")), int(get("w"))) if get("h") and get("w") else None
    height, width = size or (header(image) or (1, 1))[:2]  # an image that cannot be read is reported later

    def focal(axis, side):
        angle = get(f"camera_angle_{axis}")
        return get(f"fl_{axis}", None if angle is None else 0.5 * side / math.tan(0.5 * angle))
    fx = focal("x", width)
    fy = focal("y", height) or fx
    if fx is None:
        raise DataError(f"{where} has neither 'fl_x' nor 'camera_angle_x'; add the focal length")
    K = np.array([[fx, 0, get("cx", width / 2)], [0, fy, get("cy", height / 2)], [0, 0, 1]], float)
    return K, size, tuple(get(key, 0.0) for key in ("p1", "p2", "k1", "k2", "k3", "k4"))


# ------------------------------------------------------------------------ reader: COLMAP


def colmap_models(folder):  # -> the folders of all models of a scene, the largest first
    homes = [folder / "sparse", folder / "colmap" / "sparse"]
    below = [d for home in homes if home.is_dir() for d in sorted(home.iterdir(), key=natural)]
    models = [d for d in (*homes, *below, folder) if (d / "cameras.bin").is_file() or (d / "cameras.txt").is_file()]
    return sorted(models, key=lambda model: sum(f.stat().st_size for f in model.glob("images.*")), reverse=True)


def read_colmap(folder):
    """A COLMAP model: world-to-camera quaternions (w, x, y, z), OpenCV axes, pixel (0, 0) at the top-left corner."""
    model, *others = colmap_models(folder)
    try:
        cameras, poses, place = (colmap_binary if (model / "cameras.bin").is_file() else colmap_text)(model)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename} does not exist; a COLMAP model is cameras and images") from None
    except (struct.error, ValueError, IndexError, OverflowError):
        raise DataError(f"{model}: the COLMAP model is cut off or damaged; export it again") from None
    root = image_folder(folder) or folder / "images"
    if not root.is_dir():
        raise DataError(f"{root} does not exist, but {model} is a COLMAP model of images; put them there")
    points = np.array(list(place.values()), float) if place else None
    frames, row_of = [], {n: row for row, n in enumerate(place)}
    for name, camera, quaternion, translation, ids in poses:
        if camera not in cameras:
            raise DataError(f"{model}: image {name} uses camera {camera}, which the model lacks; export it again")
        image = find_file(root, name, str(model), endings=READABLE)
        K, size, distortion = colmap_camera(*cameras[camera], model)
        w2c = np.eye(4)
        w2c[:3, :3], w2c[:3, 3] = rotation_of(quaternion), translation
        c2w = np.linalg.inv(w2c) if np.isfinite(w2c).all() else w2c  # a pose that is not finite is reported later
        seen = [row_of[n] for n in ids if n in row_of]
        maps = maps_beside(image, folder)
        frames.append(Frame(name, image, K, c2w, size, distortion, **maps, seen=seen if len(seen) > 9 else ...))
    frames.sort(key=lambda frame: natural(frame.name))
    notes = [f"ignored: {other.relative_to(folder)}, another model (that of {model.relative_to(folder)} is larger)"
             for other in others]
    notes += [] if place else ["it has no points3D: near and far come from the depth or the cameras"]
    notes += spare_pictures(list(root.rglob("*")), frames)
    return frames, dict(points=points, notes=notes)


def rotation_of(quaternion):  # w x y z, of any length -> (3, 3)
    with np.errstate(invalid="ignore"):  # 0 0 0 0 is no rotation: nan
        w, x, y, z = np.divide(quaternion, np.linalg.norm(quaternion))
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


# name: number of its parameters, in the order of their ids; these five lenses are the OpenCV polynomial
COLMAP_MODELS = dict(SIMPLE_PINHOLE=3, PINHOLE=4, SIMPLE_RADIAL=4, RADIAL=5, OPENCV=8)


def colmap_camera(name, width, height, params, model):  # -> K, (H, W), distortion
    if len(params) != COLMAP_MODELS.get(name):
        raise DataError(f"{model}: a {name} camera of {len(params)} parameters is not read; "
                        "run colmap image_undistorter and use its output")
    two = name in ("PINHOLE", "OPENCV")  # focal lengths
    fx, fy, cx, cy, *lens = params if two else (params[0], *params)
    lens = (*lens[2:], *lens[:2]) if two else (0.0, 0.0, *lens)  # tangential before radial
    K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return K, (height, width), lens


def colmap_binary(model):
    """-> {id: (name, W, H, params)}, [(image, camera, quaternion, translation, ids of its points)], {id: (x, y, z)}"""
    cameras, poses, points = {}, [], {}
    for take in records(model / "cameras.bin"):
        identity, kind, width, height = take("iiQQ")
        if kind not in range(len(COLMAP_MODELS)):
            raise DataError(f"{model}: camera {identity} is a fisheye or another model ({kind}) that is not read; "
                            "run colmap image_undistorter and use its output")
        name, count = list(COLMAP_MODELS.items())[kind]
        cameras[identity] = (name, width, height, take(f"{count}d"))
    for take in records(model / "images.bin"):
        _, *pose, camera = take("i7di")
        name = b"".join(iter(lambda: take("c")[0], b"\0"))  # up to the 0 at its end
        count = take("Q")[0]
        in_picture = np.frombuffer(take(f"{24 * count}s")[0], "<f8, <f8, <i8")  # x, y, id of the point or -1
        poses.append((name.decode(), camera, pose[:4], pose[4:], in_picture["f2"].tolist()))
    file = model / "points3D.bin"
    for take in records(file) if file.exists() else ():
        number, *xyz, _, _, _, _, track = take("Q3d3BdQ")
        points[number] = xyz
        take(f"{8 * track}x")
    return cameras, poses, points


def records(path):
    """For each record of a binary file, whose number comes first: a function that takes numbers off it."""
    file = io.BytesIO(path.read_bytes())
    take = lambda form: struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))
    for _ in range(take("Q")[0]):
        yield take


def colmap_text(model):
    """The same from cameras.txt, images.txt and points3D.txt.

    In images.txt an image is one line, and its 2D points are the next one, which may be empty. Programs that write such
    files leave lines out or add some, so a line of 2D points is recognised by its last word, which is a number.
    """
    cameras = {int(w[0]): (w[1], round(float(w[2])), round(float(w[3])), tuple(map(float, w[4:])))
               for w in colmap_lines(model / "cameras.txt")}
    poses = []
    for w in colmap_lines(model / "images.txt", 9):  # a name may have blanks in it
        if not re.fullmatch(r"[-+.\de]+|[-+]?(nan|inf)", w[-1].split()[-1], re.I):
            pose = np.array(w[1:8], float)
            poses.append((w[9], int(w[8]), pose[:4], pose[4:], []))
        elif poses:
            poses[-1][4].extend(int(float(number)) for number in " ".join(w).split()[2::3])
    file = model / "points3D.txt"
    lines = colmap_lines(file) if file.exists() else ()
    return cameras, poses, {int(w[0]): (float(w[1]), float(w[2]), float(w[3])) for w in lines}


def colmap_lines(file, columns=-1):  # -> the words of each line; behind `columns` words the rest is one
    rows = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
    return [row.split(None, columns) for row in rows if row and row[0] != "#"]


# ------------------------------------------------------------------------ reader: RGB-D sequences

# 7-Scenes was recorded with one Kinect whose depth is not registered to its colour: the commonly published calibration.
DEPTH_TO_COLOUR = np.array([[0.9999148, 0.0026753, -0.0079073, -0.0255589],
                            [-0.0027419, 0.9999173, -0.0081503, 0.0001011],
                            [0.0078780, 0.0081711, 0.9998750, 0.0020318], [0.0, 0.0, 0.0, 1.0]])
KINECT_DEPTH, KINECT_COLOUR = (
    Frame("", None, np.array([[f, 0, 320.5], [0, f, 240.5], [0, 0, 1]]), c2w, (480, 640))
    for f, c2w in ((585.0, np.eye(4)), (525.0, np.linalg.inv(DEPTH_TO_COLOUR))))


def read_rgbd(folder):
    """An RGB-D sequence as 7-Scenes stores it: frame-XXXXXX.{color, depth, pose}. Poses are depth camera to world.

    Without intrinsics, or with those of its depth camera, it is a recording of 7-Scenes: there depth is registered into
    the colour camera. With any other intrinsics, colour and depth are taken as registered already.
    """
    stems = [file.name.removesuffix(".pose.txt") for file in sorted(folder.glob("frame-*.pose.txt"))]
    images = [find_file(folder, f"{stem}.color.png", str(folder), endings=READABLE) for stem in stems]
    K, size, file = rgbd_intrinsics(folder)
    notes = [f"intrinsics from {file}"]
    kinect = K is None or np.array_equal(K[:2], [[585, 0, 320], [0, 585, 240]])
    if kinect:
        height, width = next((shape[:2] for path in images if (shape := header(path))), KINECT_COLOUR.size)
        if K is None and (height, width) != KINECT_COLOUR.size:
            raise DataError(f"{folder}: no intrinsics for its pictures of {width}x{height}; "
                            f"write K as three rows of three into {folder / 'camera-intrinsics.txt'}")
        K, size = KINECT_COLOUR.K, KINECT_COLOUR.size
        notes = ["depth registered into the colour camera with the published Kinect calibration of 7-Scenes"]
    frames = []
    for stem, image in zip(stems, images):
        try:
            c2w = np.array((folder / f"{stem}.pose.txt").read_text(errors="replace").split(), float).reshape(4, 4)
        except ValueError:  # such as -1.#IND
            c2w = np.full((4, 4), np.nan)
        if kinect and np.isfinite(c2w).all():
            c2w = c2w @ KINECT_COLOUR.c2w
        depth = folder / f"{stem}.depth.png"
        maps = maps_beside(image, folder) | {"depth": depth if depth.exists() else None}
        frames.append(Frame(image.name, image, K, c2w, size, **maps))
    return frames, dict(kinect=kinect, notes=notes, depth_scale=1e-3)


def rgbd_intrinsics(folder):
    """-> K, (H, W) that it is for or None, the file; three times None where there is none, here or one level up."""
    names = ("camera-intrinsics.txt", "camera_intrinsics.txt", "intrinsics.txt", "intrinsic_color.txt",
             "intrinsic/intrinsic_color.txt", "info.txt", "_info.txt")
    homes = (folder, folder.absolute().parent)
    file = next((home / name for home in homes for name in names if (home / name).is_file()), None)
    if file is None:
        return None, None, None
    text, size = file.read_text(errors="replace"), None
    try:
        if "info" in file.name:  # of BundleFusion and 12-Scenes: lines "key = value"
            pairs = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
            size = int(pairs["m_colorHeight"]), int(pairs["m_colorWidth"])
            text = pairs["m_calibrationColorIntrinsic"]
        numbers = np.array(text.split(), float)
        side = {9: 3, 16: 4}[numbers.size]  # three rows of three, or four of four
        return numbers.reshape(side, side)[:3, :3], size, file
    except (ValueError, KeyError):
        raise DataError(f"{file}: not nine numbers; write K as three rows of three "
                        f"into {folder / 'camera-intrinsics.txt'}") from None


def register_kinect_depth(depth):  # (H, W) of the depth camera -> (480, 640), seen from the colour camera
    row, col = np.nonzero(depth)
    to_camera = np.divide(KINECT_DEPTH.size, depth.shape)  # depth may be stored smaller
    x, y = (col + 0.5) * to_camera[1], (row + 0.5) * to_camera[0]
    return depth_of_points(unproject(x, y, depth[row, col], KINECT_DEPTH), KINECT_COLOUR)


def depth_of_points(points, frame):  # (M, 3) world -> (H, W): the z-depth of the nearest in each pixel, 0 where none is
    x, y, z = into_picture(points, frame)
    order = np.argsort(-z, kind="stable")[:np.count_nonzero(z)]  # written far to near: the nearest stays
    depth = np.zeros(frame.size, np.float32)
    depth[y[order].astype(int), x[order].astype(int)] = z[order]
    return depth


# ------------------------------------------------------------------------ reader: LLFF


def read_llff(folder):
    """LLFF: `poses_bounds.npy` (V, 17). A row is a 3x5 matrix [R | t | (H, W, f)], whose camera axes are down, right
    and backwards, then near and far. The pictures are those of images/ (or images_4/) in the order of their names."""
    file = folder / "poses_bounds.npy"
    table = np.asarray(decode_map(file), float)
    root = image_folder(folder) or folder
    images = sorted((path for path in root.iterdir() if is_picture(path)), key=natural)
    if table.ndim != 2 or table.shape[1] != 17 or len(table) != len(images):
        raise DataError(f"{file}: of shape {table.shape}, but {root} has {len(images)} pictures; "
                        "it must be one row of 17 numbers for each picture")
    frames = []
    for image, row in zip(images, table):
        (down, right, back, at, (height, width, f)), c2w = row[:15].reshape(3, 5).T, np.eye(4)
        c2w[:3] = np.stack([right, down, -back, at], 1)
        K = np.array([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]])
        size = (int(height), int(width)) if np.isfinite(row).all() and min(height, width) >= 1 else None
        frames.append(Frame(image.name, image, K, c2w, size, **maps_beside(image, folder)))
    near, far = np.nanmin(table[:, 15]), np.nanmax(table[:, 16])
    bounds = (float(near), float(far)) if 0 < near < far < math.inf else None
    odd = [] if bounds else [f"{file.name}: its near and far are not used, because they are not 0 < near < far"]
    return frames, dict(bounds=bounds, notes=odd + left_out(root.iterdir()))


# ------------------------------------------------------------------------ the unit of depth


def settle_depth_unit(scene):
    """For a data set that does not name the unit of its depth: floats are in the unit of the poses, integers are
    millimetres. If there are sparse points, depth is scaled to fit them; if not, it warns of views that disagree."""
    frames = [frame for frame in scene.frames if frame.depth]
    if not frames:
        return
    if np.issubdtype(decode_map(frames[0].depth).dtype, np.floating):
        scene.depth_scale = 1.0
    if scene.points is not None and (ratio := ratio_to_points(scene, frames)):
        if abs(math.log(ratio)) > 0.03:
            scene.depth_scale /= ratio
            scene.notes.append(f"depth was {ratio:.4g} times as far as the sparse points: scaled to them "
                               f"(as depth_unit_scale_factor {scene.depth_scale:.4g} would)")
    elif 0.03 < (error := view_disagreement(scene, frames)):  # good sensors are at 0.01
        scene.notes.append(f"warning: depth of neighbouring views differs by {100 * error:.1f} %; if its unit is not "
                           "that of the poses, set depth_unit_scale_factor in transforms.json")


def ratio_to_points(scene, frames):
    """The ratio of measured depth to the depth of the sparse points, or None if they do not agree on one.

    Something may hide a point, so this is the median of the third of the sorted ratios that lie closest together.
    """
    some = [frames[n] for n in np.linspace(0, len(frames) - 1, min(6, len(frames))).astype(int)]
    logs = np.sort(np.log(np.concatenate([depth_ratios(scene, frame, scene.points[frame.seen]) for frame in some])))
    if len(logs) < 30:
        return None
    third = len(logs) // 3
    first = int(np.argmin(logs[third:] - logs[:-third]))
    return math.exp(np.median(logs[first:first + third])) if logs[first + third] - logs[first] < 0.2 else None


def view_disagreement(scene, frames):  # -> the median relative difference of depth between views some steps apart
    ratios, step = [], max(1, len(frames) // 5)
    for a, b in zip(frames[::step], frames[step::step]):
        depth = read_depth(scene, a)
        height, width = depth.shape
        row, col = np.mgrid[0:height:max(1, height // 36), 0:width:max(1, width // 48)]
        x, y, z = (col + 0.5) / width * a.size[1], (row + 0.5) / height * a.size[0], depth[row, col]
        ratios.extend(depth_ratios(scene, b, unproject(x[z > 0], y[z > 0], z[z > 0], a)))
    return float(np.median(np.abs(np.log(ratios)))) if len(ratios) > 50 else 0.0


def depth_ratios(scene, frame, points):  # measured depth over that of world points, where a frame shows and knows both
    depth, seen = read_depth(scene, frame), np.stack(into_picture(points, frame))
    x, y, z = seen[:, seen[2] > 0]
    row, col = (y / frame.size[0] * depth.shape[0]).astype(int), (x / frame.size[1] * depth.shape[1]).astype(int)
    measured = depth[row, col]
    return measured[measured > 0] / z[measured > 0]


# ------------------------------------------------------------------------ pictures of a view, lenses


def covering_crop(stored, size):
    """A picture (H, W) is scaled to cover `size` (H, W) and cropped about its centre: -> the scale, and the box (left,
    top, right, bottom) of its pixels that stays."""
    (full_h, full_w), (height, width) = stored, size
    scale = max(height / full_h, width / full_w)
    left, top = max(0.0, (full_w - width / scale) / 2), max(0.0, (full_h - height / scale) / 2)
    right, bottom = min(full_w, left + width / scale), min(full_h, top + height / scale)  # Pillow refuses 1e-15 beyond
    return scale, (left, top, right, bottom)


def fit_size(scene, pixels, multiple):
    """(H, W): about `pixels` in number, the scene's aspect ratio, both sides multiples of the patch size."""
    height, width = scene.frames[0].size
    scale = math.sqrt(pixels / (height * width))
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def read_image(frame, size) -> Tensor:
    """-> (3, H, W) uint8, undistorted, covering `size`. To save time, a large photo is decoded and undistorted at two
    to four times that size, which changes pixels by less than 1/255 on average."""
    scale, box = covering_crop(frame.size, size)
    more = scale * min(4, max(2, math.sqrt(2e6 / (size[0] * size[1]))))
    work = tuple(math.ceil(more * side) for side in frame.size) if more < 1 else frame.size  # (H, W) of all of it
    image = decode(frame.image, colour=True, least=work[::-1], upright=frame.upright)
    full = np.array(frame.size[::-1])
    steps = [1, 2, 4, 8]  # a JPEG is decoded at one of these fractions, its last row and column rounded up
    step = next((k for k in steps if tuple(-(-full // k)) == image.size), None)
    shrunk = np.full(2, 1 / step) if step else np.divide(image.size, full)  # image pixels = stored pixels * shrunk
    if any(frame.distortion):
        image, shrunk = undistorted(image, shrunk, frame, work), np.divide(work, frame.size)[::-1]
    corners = (np.reshape(box, (2, 2)) * shrunk).clip(0, image.size).ravel()
    image = image.resize(size[::-1], Image.BICUBIC, box=tuple(corners.tolist()))  # antialiased
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def undistorted(image, shrunk, frame, work):  # -> the whole picture at size `work` (H, W)
    width, height = np.array(frame.size[::-1]) * shrunk
    x, y = stored_position(frame, work, np.divide(work, frame.size)[::-1])
    grid = np.stack([2 * x * width / image.width - 1, 2 * y * height / image.height - 1], -1)
    if image.width > 1.5 * work[1]:  # grid_sample looks at 2x2 pixels: the picture must not be much finer than its grid
        image = image.resize(work[::-1], Image.BICUBIC, box=(0, 0, min(width, image.width), min(height, image.height)))
        grid = np.stack([2 * x - 1, 2 * y - 1], -1)
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1)[None]
    straight = F.grid_sample(pixels, torch.from_numpy(grid).float()[None], align_corners=False, padding_mode="border")
    return Image.fromarray(straight[0].permute(1, 2, 0).round().byte().numpy())


def stored_position(frame, size, scale, corner=(0, 0)):
    """Where the pixels of a view lie in the stored picture: -> x, y (H, W), each from 0 to 1. The view has `size`
    (H, W) and shows the undistorted picture enlarged by `scale` (x, y), from its point `corner` (x, y) on."""
    rows, cols = np.mgrid[0:size[0], 0:size[1]] + 0.5
    x, y = cols / scale[0] + corner[0], rows / scale[1] + corner[1]
    x, y = distort(x, y, undistorted_K(frame), frame) if any(frame.distortion) else (x, y)
    return x / frame.size[1], y / frame.size[0]


VIEWS_IN_MEMORY = {"bytes": 0, "most": 2e9}  # of all scenes together; --view_memory


def decoded_once(what, frame, make):
    """What `make()` gives, made once and kept with its frame as long as there is memory for it."""
    if what in frame.cache:
        return frame.cache[what]
    made = make()
    tensors = [made] if isinstance(made, Tensor) else made.values()
    size = sum(tensor.nbytes for tensor in tensors)
    if VIEWS_IN_MEMORY["bytes"] + size <= VIEWS_IN_MEMORY["most"]:
        VIEWS_IN_MEMORY["bytes"] += size
        frame.cache[what] = made
    return made


def distort(x, y, K, frame):
    """Pixels of the undistorted image with intrinsics K -> pixels of the stored image, by OpenCV's lens polynomial."""
    p1, p2, *radial = frame.distortion or (0.0, 0.0)
    u, v = (x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1]
    r2 = u * u + v * v
    gain = 1 + sum(k * r2 ** (n + 1) for n, k in enumerate(radial))
    u, v = (u * gain + 2 * p1 * u * v + p2 * (r2 + 2 * u * u), v * gain + p1 * (r2 + 2 * v * v) + 2 * p2 * u * v)
    return frame.K[0, 0] * u + frame.K[0, 2], frame.K[1, 1] * v + frame.K[1, 2]


def undistorted_K(frame):  # None where the lens cannot be undone, which `problem_of_camera` says
    return zoomed_K(tuple(frame.K.ravel()), frame.size, frame.distortion) if any(frame.distortion) else frame.K


@lru_cache(maxsize=4096)  # most frames share a lens
def zoomed_K(stored_K, size, distortion):
    """K of the undistorted picture, or None.

    The focal length is raised, a quarter of a percent at a time, until every pixel of the straight picture lies within
    the stored one, and the lens polynomial is monotonic there, so that no place is shown twice.
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


# ------------------------------------------------------------------------ maps of a view, and what stands in for them


def read_maps(scene, frame, size):
    """-> {kind: tensor} of the frame's maps. A pixel takes the value of the stored pixel that its centre falls into."""
    scale, corner = covering_crop(frame.size, size)
    x, y = stored_position(frame, size, (scale, scale), corner)
    found = {}
    read_label = lambda scene, frame: decode_ids(frame.label)  # (H, W) int64
    for kind, read in dict(mask=read_mask, depth=read_depth, normal=read_normal, label=read_label).items():
        if getattr(frame, kind):
            stored = read(scene, frame)
            height, width = stored.shape[:2]  # depth may be stored at another resolution
            row = np.floor(y * height).clip(0, height - 1).astype(int)
            col = np.floor(x * width).clip(0, width - 1).astype(int)
            found[kind] = torch.from_numpy(stored[row, col])
    return found


def read_mask(scene, frame):  # -> (H, W) int64
    ids = decode_ids(frame.mask)
    return 1 + (ids > ids.max() / 2) if frame.two_regions else ids  # validity is stored as 0 and 1, or as 0 and 255


def read_depth(scene, frame):  # -> (H, W) float32 z-depth in the data set's unit, 0 where it is not known
    stored = decode_map(frame.depth)
    stored = stored.reshape(stored.shape[:2])  # arrays of (H, W, 1) are common
    depth = np.where(stored == 65535, 0, stored).astype(np.float32) * scene.depth_scale  # 65535: the sensor saturated
    depth = np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0).clip(0).astype(np.float32)
    return register_kinect_depth(depth) if scene.kinect else depth


def read_normal(scene, frame):  # -> (H, W, 3) float32
    if frame.normal.suffix == ".npy":
        normal = np.asarray(decode_map(frame.normal), np.float32)[..., :3]
    else:
        normal = np.asarray(decode(frame.normal, colour=True), np.float32) / 127.5 - 1  # 0 ... 255 means -1 ... 1
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    known = (length > 0.5) & (length < 1.5)  # black and grey mean "unknown"
    return np.where(known, normal / np.where(known, length, 1), 0).astype(np.float32)


def decode(path, colour=False, least=None, upright=False):
    """The picture at `path`, decoded to the last byte; `colour`: as RGB, transparent pixels white. Raises DataError.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is not below `least` (W, H). `upright` turns it by EXIF.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of a PNG, at which decoding does not look
        with Image.open(path) as image:
            if least:
                image.draft(None, least[::-1] if upright else least)
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
    except Image.DecompressionBombError:
        raise DataError(f"{path}: has more pixels than are read ({2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million); "
                        "make the picture smaller") from None
    except PILLOW_ERRORS as error:
        if path.suffix.lower() in UNREADABLE:
            raise DataError(f"{path}: {path.suffix[1:].upper()} files are not read; save it as JPEG or PNG") from None
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
        array = np.lib.format.open_memmap(path, mode="r")  # reads the header and checks the length of the file
        if array.dtype.kind not in "buif":
            raise ValueError(f"it holds {array.dtype}, not numbers")
        return array
    except Exception as error:  # a damaged header makes NumPy raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: not a whole .npy array ({reason}); restore the file") from None


def decode_ids(path):  # -> (H, W) int64; palette and grey files hold ids, colour files hold ids in base 256
    stored = decode_map(path)
    if not (np.isfinite(stored).all() and (stored >= -1).all() and (stored < 2**31).all()):
        raise DataError(f"{path}: holds numbers that are not ids (0 or more; -1 is none); write it again")
    ids = stored.astype(np.int64)
    if ids.ndim == 2:
        return ids
    return ids[..., :3] @ np.array([1, 256, 65536]) if ids.shape[2] >= 3 else ids[..., 0]  # (H, W, 1) or grey and alpha


def layout_depth_range(c2w):  # (V, 4, 4) -> near, far
    """A guess from the cameras alone, where nothing was measured.

    Cameras that stand around something look at it. It is the point nearest to all optical axes: with P the projector
    onto the plane across an axis, it minimises the sum of |P (point - centre)|^2. Where most cameras do not have it
    before them, at a sensible distance, their own places and steps are all there is to go by.
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


def superpixels(image: Tensor, count: int) -> Tensor:
    """SLIC superpixels of `image` (3, H, W) -> (H, W) int64 ids from 1: regions where no masks exist.

    k-means over colour and position (Achanta et al. 2012), from a grid of cells; a pixel may join one of the nine
    around it. Simpler than the original: RGB instead of CIE Lab, and regions may be unconnected.
    """
    _, height, width = image.shape
    rows = min(max(1, round(math.sqrt(count * height / width))), max(1, count), height)
    cols = min(max(1, round(count / rows)), width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    smooth = F.avg_pool2d(F.pad(image[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    compactness = 0.1 / math.sqrt(height * width / (rows * cols))  # one cell's width weighs as much as 0.1 of colour
    position = compactness * torch.stack([x, y]).to(image)
    feature = torch.cat([smooth, position]).reshape(5, -1).T  # (H*W, 5)

    row, col = (y * rows / height).long().flatten(), (x * cols / width).long().flatten()  # the cell of each pixel
    around = [(row + down).clamp(0, rows - 1) * cols + (col + right).clamp(0, cols - 1)
              for down in (-1, 0, 1) for right in (-1, 0, 1)]
    around = torch.stack(around).to(image.device)  # (9, H*W) the clusters that a pixel may join
    cluster = around[4]
    for _ in range(8):
        total = feature.new_zeros(rows * cols, 6).index_add_(0, cluster, F.pad(feature, (0, 1), value=1.0))
        centre = total[:, :5] / total[:, 5:].clamp_min(1)
        distance = torch.stack([(feature - centre[k]).square().sum(1) for k in around])
        cluster = around.gather(0, distance.argmin(0, keepdim=True))[0]
    return cluster.reshape(height, width) + 1


# ------------------------------------------------------------------------ files, flags, errors of all stages


@contextmanager
def naming(path):
    """Wraps the writing of a file: an error such as a full disk's does not name the file, this does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_whole(path, content: bytes):
    """Writes a file under another name, flushes and renames it, so that a killed run never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with naming(path):
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # still there where the disk was full


def positive(text):  # the type of a flag that is a count
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def scene_flags(parser, out, view_memory=2, scenes="data"):
    """The flags that all stages have. A stage that looks at each view only once gives `view_memory` as 0."""
    add = parser.add_argument
    add("--scene_dir", type=os.path.normpath, default=scenes,
        help=f"a scene or a folder of scenes; default: {scenes}/, made if it is missing")
    add("--out", default=out, help=f"where everything is written; default: {out}/")
    add("--skip_bad_frames", action="store_true", help="leave out frames that have a problem, and list them")
    add("--near", type=float, help="nearest depth, in the scene's unit; default: from depth, sparse points or cameras")
    add("--far", type=float, help="farthest depth; python 01_data.py shows which range is used")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda where there is one")
    add("--seed", type=int, default=0, help="the seed of everything random")
    add("--view_memory", type=float, default=view_memory, metavar="GB", help="memory for decoded views")


@contextmanager
def explained(args, goes_on):
    """Wraps the body of a command. Bad input, a disk that cannot be written, Ctrl-C and a --device that does not exist
    end it with one line; `goes_on` says how to continue. Any other error is a bug and keeps its traceback."""
    try:
        torch.zeros(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        sys.exit(f"--device {args.device}: {str(error).splitlines()[0]}")
    VIEWS_IN_MEMORY["most"] = 1e9 * getattr(args, "view_memory", 0)
    try:
        yield
    except (DataError, ValueError) as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename or args.out}: {error.strerror or error}; once that is mended, {goes_on}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; {goes_on}")


# ------------------------------------------------------------------------ pictures


LINE_COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14)]


def to_image(picture: Tensor):  # (3, H, W) in 0 ... 1 -> a Pillow image
    return Image.fromarray((picture.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def from_image(image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def usual_range(depth: Tensor) -> Tensor:  # -> (2,): all but the nearest and the farthest 2 % of what is known
    known = depth[depth > 0]
    known = known[::len(known) // 1_000_000 + 1]  # a part of them: quantile takes at most 16 million values
    return known.quantile(torch.tensor([0.02, 0.98])) if len(known) else torch.tensor([0.0, 1.0])


def colour_depth(depth: Tensor, like: Tensor | None = None) -> Tensor:
    """(H, W) -> (3, H, W): near is bright yellow, far is dark blue, unknown black; on the scale of `like`, if given."""
    known, (low, high) = depth > 0, usual_range(depth if like is None else like)
    level = (1 - (depth - low) / max(float(high - low), 1e-9)).clamp(0, 1).numpy()
    stops = np.array([[0.19, 0.07, 0.23], [0.23, 0.32, 0.55], [0.13, 0.57, 0.55], [0.37, 0.79, 0.38],
                      [0.99, 0.91, 0.14]])
    colours = np.stack([np.interp(level, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)])
    return torch.from_numpy(colours).float() * known


def colour_normals(normal: Tensor) -> Tensor:  # (H, W, 3) -> (3, H, W): red right, green up, blue towards the camera
    return (normal * torch.tensor([1.0, -1, -1]) + 1).permute(2, 0, 1) / 2


def depth_legend(width: int, depth: Tensor | None = None) -> Tensor:
    """(3, 26, width): the colours of `colour_depth` and what they mean on the scale of `depth`. With None, the legend
    says that each row has its own scale."""
    low, high = (0.0, 1.0) if depth is None else usual_range(depth).tolist()
    near, far = ("near", "far, each row on its own scale") if depth is None else (f"near {low:.3g}", f"{high:.3g} far")
    ramp = colour_depth(torch.linspace(low, high, 200).clamp_min(1e-9).expand(12, 200), depth)
    picture = Image.new("RGB", (width, 26), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 7), f"depth: {near}", fill="black")
    picture.paste(to_image(ramp), (110, 7))
    draw.text((320, 7), f"{far}; black: not known", fill="black")
    return from_image(picture)


def colour_ids(ids: Tensor) -> Tensor:  # (H, W) -> (3, H, W): one fixed colour an id, unlabelled black
    hue = torch.stack([(ids * step % 97).float() / 97 for step in (37, 59, 83)])
    return (0.15 + 0.85 * hue) * (ids > 0)


def picture_grid(path, headings, rows, scale=None, below=None):
    """Save rows of (3, H, W) pictures under one heading per column, and return the path. None is an empty panel; empty
    columns are left out. `below` (width -> (3, h, width)) draws a strip under them all."""
    columns = [c for c in range(len(headings)) if any(row[c] is not None for row in rows)]
    headings, rows = [headings[c] for c in columns], [[row[c] for c in columns] for row in rows]
    height, width = next(p.shape[1:] for row in rows for p in row if p is not None)
    scale = scale or math.ceil(150 / width)  # small pictures are shown larger
    cell_h, cell_w, gap = height * scale, width * scale, 6
    font = max(10, cell_w // 20)  # the height of letters in pixels
    top = font + 14
    sheet_w, sheet_h = len(headings) * (cell_w + gap) + gap, len(rows) * (cell_h + gap) + gap + top
    strip = to_image(below(sheet_w * 10 // font)) if below else Image.new("RGB", (sheet_w, 0))
    strip = strip.resize((sheet_w, strip.height * font // 10))
    sheet = Image.new("RGB", (sheet_w, sheet_h + strip.height), "white")
    sheet.paste(strip, (0, sheet_h))
    draw = ImageDraw.Draw(sheet)
    for c, heading in enumerate(headings):
        while draw.textlength(heading, font_size=font) > cell_w:  # narrow portrait panels
            heading = heading[:-1]
        draw.text((gap + c * (cell_w + gap), 6), heading, fill="black", font_size=font)
        for r, row in enumerate(rows):
            corner = (gap + c * (cell_w + gap), top + r * (cell_h + gap))
            if row[c] is None:
                draw.rectangle([*corner, corner[0] + cell_w, corner[1] + cell_h], fill=(235, 235, 235))
                draw.text((corner[0] + 8, corner[1] + 8), "none", fill=(120, 120, 120), font_size=font)
            else:
                sheet.paste(ImageOps.pad(to_image(row[c]), (cell_w, cell_h), Image.NEAREST, color="white"), corner)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def line_chart(title, curves, width=480, height=260, even=False) -> Tensor:
    """Curves {name: [(x, y), ...]} as a picture (3, height, width). With `even` both axes have the same scale."""
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    points = np.array([p for curve in curves.values() for p in curve], float)
    columns, rows = map(round_numbers, points.min(0), points.max(0))  # where the axes are labelled
    x0, x1, y0, y1 = columns[0], columns[-1], rows[0], rows[-1]
    left, right, top, bottom = 64, width - 16, 44, height - 28
    scale = np.array([right - left, top - bottom]) / [x1 - x0, y1 - y0]
    scale = np.abs(scale).min() * np.sign(scale) if even else scale
    place = lambda x, y: tuple(([left, bottom] + scale * [x - x0, y - y0]).tolist())
    draw.text((left, 6), title, fill="black")
    for y in rows:
        draw.text((6, place(x0, y)[1] - 6), f"{y:g}", fill=(90, 90, 90))
        draw.line([place(x0, y), place(x1, y)], fill=(150, 150, 150) if y == 0 else (230, 230, 230))
    for x in columns:
        draw.text((place(x, y0)[0], bottom + 14), f"{x:g}", fill=(90, 90, 90), anchor="mm")
    draw.line([place(x0, y1), place(x0, y0), place(x1, y0)], fill=(150, 150, 150))
    start = left
    for colour, (name, curve) in zip(LINE_COLOURS, curves.items()):
        corners = [place(*p) for p in curve]
        draw.line(corners, fill=colour, width=2)
        for corner in corners if len(corners) < 40 else []:
            draw.circle(corner, 3, fill=colour)
        draw.text((start, 24), name, fill=colour)
        start += draw.textlength(name) + 16
    return from_image(picture)


def round_numbers(low, high):  # at most seven, at equal steps of 1, 2 or 5 times a power of ten, that enclose both
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span <= 5 * power * factor)
    first, last = math.floor(low / step), math.ceil(high / step)
    return np.round(np.arange(first, max(last, first + 1) + 1) * step, 12)


def camera_plan(scene, triplets, width):
    """Cameras from above: a line through all of them with their viewing directions, and the triplets."""
    centre, forward, up = scene.c2w[:, :3, 3], scene.c2w[:, :3, 2], -scene.c2w[:, :3, 1].mean(0)
    across = F.normalize(torch.linalg.cross(forward.mean(0), up), dim=0)
    plan = torch.stack([across, F.normalize(torch.linalg.cross(up, across), dim=0)], 1)  # (3, 2) world -> right, ahead
    at = centre @ plan
    tips = at + 0.06 * (at.amax(0) - at.amin(0)).max() * forward @ plan
    curves = {"cameras": torch.stack([at, tips, at], 1).flatten(0, 1).tolist()}
    for n, (a, b, target) in enumerate(triplets, 1):
        curves[f"triplet {n}"] = at[[a, target, b]].tolist()
    return line_chart("from above: context, target, context of each triplet", curves, width, 360, even=True)


# ------------------------------------------------------------------------ report and command


def held_out_triplets(scenes, seed, count=4):
    """Up to `count` triplets (scene, (a, b, target)), of held-out scenes if there are any. No contexts come twice."""
    scenes, found = (split(scenes, "val") or scenes)[:count], {}
    for n in range(4 * count):  # where there are few views, the same pair may come again
        scene = scenes[n % len(scenes)]
        a, b, target = sample_triplet(scene, torch.Generator().manual_seed(seed + n))
        found.setdefault((scene.name, *sorted((a, b))), (scene, (a, b, target)))
    return list(found.values())[:count]


def show_triplets(scene, triplets, path):
    """One row per triplet: the target between its contexts, and the target's maps. Below: the cameras from above."""
    size = fit_size(scene, 200 * 150, 2)
    views = [[scene.view(i, size) for i in (a, target, b)] for a, b, target in triplets]
    depths = torch.cat([torch.zeros(1), *(v.depth.flatten() for _, v, _ in views if v.depth is not None)])
    near, far = usual_range(depths).tolist()  # one scale for all rows
    rows = [[a.image, v.image, b.image, colour_ids(regions(v)),
             None if v.depth is None else colour_depth(v.depth, depths),
             None if v.normal is None else colour_normals(v.normal)] for a, v, b in views]
    depth = f"its depth: {near:.3g} bright, {far:.3g} dark"
    headings = ["context", "target", "context", "target's regions", depth, "its normals"]
    return picture_grid(path, headings, rows, scale=1, below=lambda width: camera_plan(scene, triplets, width))


def describe(scene, triplets):  # -> lines that say what is in a scene
    have = [f"{kind} {n}" for kind in MAPS if (n := sum(getattr(frame, kind) is not None for frame in scene.frames))]
    sizes = sorted({frame.size for frame in scene.frames})
    resolution = " ... ".join(f"{width}x{height}" for height, width in dict.fromkeys((sizes[0], sizes[-1])))
    baselines = [float((scene.c2w[a, :3, 3] - scene.c2w[b, :3, 3]).norm()) for a, b, _ in triplets]
    near, far = scene.depth_range
    maps = ", ".join(have) or "images only (masks: superpixels)"
    yield f"{scene.name}: {len(scene)} views, {resolution}, with {maps}"
    yield f"  depth range {near:.3g} to {far:.3g} from {scene.range_source}, in the data set's unit"
    yield f"  context baselines {min(baselines):.3g} to {max(baselines):.3g} (median {np.median(baselines):.3g})"
    yield f"  {describe_levels(scene)}"
    yield from (f"  {note}" for note in scene.notes[:8])
    if len(scene.notes) > 8:
        yield f"  ... and {len(scene.notes) - 8} more notes"


def describe_levels(scene) -> str:
    """A sentence: how many targets have contexts on which of LEVELS. Of many targets, fifty are looked at."""
    targets = range(0, len(scene), math.ceil(len(scene) / 50))
    levels = [best_pairs(scene, target)[0] for target in targets]
    poor = sum(level is None or level > 1 for level in levels) > len(levels) / 2
    advice = "; warning: most views are far apart, and two of them tell little: add views in between" if poor else ""
    return f"contexts of {len(targets)} targets: {in_levels(levels)}{advice}"


def in_levels(levels) -> str:  # of `best_pairs`: how many targets have contexts on which of LEVELS
    parts = [f"{levels.count(n)} at overlap {least:g} and baseline {widest:g} of the depth"
             for n, (least, widest) in enumerate(LEVELS) if n in levels]
    return ", ".join(parts + [f"{levels.count(None)} have none"] * (None in levels))


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
        root = Path(args.scene_dir)
        scenes = open_scenes(root, args.skip_bad_frames, args.near, args.far)
        known = {scene.name.split("/")[0] for scene in scenes}
        for child in sorted(root.iterdir()) if not reader_of(root) else ():
            if child.is_dir() and child.name[0] != "." and child.name not in known:
                print(f"{child}: ignored, because no poses were found in it")
        shown = scenes if len(scenes) <= 12 else scenes[:: math.ceil(len(scenes) / 8)]
        for scene in shown:
            generator = torch.Generator().manual_seed(args.seed)
            triplets = [sample_triplet(scene, generator) for _ in range(4)]
            print("\n".join(describe(scene, triplets)))
            print(f"  ->  {show_triplets(scene, triplets, Path(args.out) / (scene.name.replace('/', '_') + '.png'))}")
        held_out = f"{len(split(scenes, 'train'))} train, {len(split(scenes, 'val'))} val"
        if len(scenes) == 1:
            held_out = f"of which every eighth view is held out, {len(held_out_views(scenes[0]))} in all"
        print(f"{len(scenes)} scene{'s' * (len(scenes) > 1)} ({held_out}), {sum(map(len, scenes))} views"
              + (f"; {len(shown)} scenes of them shown" if len(shown) < len(scenes) else ""))


if __name__ == "__main__":
    sys.modules["01_data"] = sys.modules[__name__]  # what tiny/rooms.py imports is this very module, no second copy
    main()
