"""The built-in rooms: ray-cast indoor scenes with exact depth, normals, masks and labels, for machines without data.

`python 01_data.py` calls `make_rooms` where there is no data folder. A room is a box with furniture of seven kinds in
it and a camera that walks along an arc and looks around. Everything is drawn from one seed, and the same seed gives the
same bytes. The textures are drawn without regard to the class, so that no network can learn a class from its pattern.

Read    make_room, find_place, random_walk, cast, surface_colour, render_view, write_room, make_rooms

The world is in metres, with z up and one corner of the room at the origin; cameras are OpenCV's (see 01_data.py).
Instance ids: 1 floor, 2 ceiling, 3-6 walls, 7 and more the pieces of furniture. A label is an index into CLASSES.
"""
from __future__ import annotations

import importlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

data = importlib.import_module("01_data")

CLASSES = ("floor", "ceiling", "wall", "table", "chair", "sofa", "cabinet", "lamp", "plant", "picture")
SHELL_LABELS = np.array([2, 2, 2, 2, 0, 1])  # of the walls at -x +x -y +y, the floor and the ceiling
SHELL_IDS = np.array([3, 4, 5, 6, 1, 2])
BOX, SPHERE, CYLINDER = range(3)


# ---------------------------------------------------------------------------------------- a room and what stands in it


class Primitives(NamedTuple):
    """The parts of all pieces: unit boxes, spheres, cylinders, scaled by `half`, turned by `yaw`, moved to `centre`."""
    kind: np.ndarray  # (M,) BOX, SPHERE or CYLINDER
    centre: np.ndarray  # (M, 3) world
    half: np.ndarray  # (M, 3) half extents along the part's own axes
    yaw: np.ndarray  # (M,) radians about the vertical
    instance: np.ndarray  # (M,)
    label: np.ndarray  # (M,)
    texture: np.ndarray  # (M, 20), see `random_texture`


class Walk(NamedTuple):
    """The camera's way: an arc of an ellipse around the middle of the room, with a slowly changing point to look at."""
    size: np.ndarray  # (3,) of the room
    start: float  # angle where the arc begins
    sweep: float  # its length in radians, with a sign
    radius: np.ndarray  # (2,) of the ellipse
    height: float  # of the camera
    sway: np.ndarray  # (4,) phases of the slow movements
    aim: float  # height of the point that it looks at

    def cameras(self, views):  # -> positions (V, 3), points looked at (V, 3)
        angle, sway, middle = self.start + self.sweep * np.linspace(0, 1, views), self.sway, self.size / 2
        position = np.stack([middle[0] + self.radius[0] * np.cos(angle), middle[1] + self.radius[1] * np.sin(angle),
                             self.height + 0.12 * np.sin(2 * angle + sway[0])], 1)
        look_at = np.stack([middle[0] + 0.5 * np.sin(angle + sway[1]), middle[1] + 0.5 * np.sin(angle + sway[2]),
                            self.aim + 0.15 * np.sin(2 * angle + sway[3])], 1)
        return position, look_at


class Room(NamedTuple):
    size: np.ndarray  # (3,)
    primitives: Primitives
    shell: np.ndarray  # (6, 20) textures of the walls at -x +x -y +y, the floor and the ceiling
    walk: Walk


def random_walk(size, rng):
    start, sweep, turn = rng.uniform(0, 2 * math.pi), rng.uniform(1.0, 2.0), rng.choice([-1, 1])
    radius, height = size[:2] * rng.uniform(0.28, 0.38, 2), rng.uniform(1.2, 1.7)
    sway, aim = rng.uniform(0, 2 * math.pi, 4), rng.uniform(0.7, 1.6)
    return Walk(size, start, turn * sweep, radius, height, sway, aim)


def make_room(rng) -> Room:
    """Six to nine pieces of furniture and two to four pictures, as far as there is room for them."""
    size = np.array([rng.uniform(3.6, 6.0), rng.uniform(3.6, 6.0), rng.uniform(2.4, 3.0)])
    walk = random_walk(size, rng)
    pieces = ["table", "sofa", "cabinet", "cabinet", "lamp", "plant", "table", "chair", "chair", "chair"]
    names = list(rng.permutation(pieces))[:int(rng.integers(6, 10))] + ["picture"] * int(rng.integers(2, 5))
    columns, taken, instance = [], [], 7
    for name in names:
        parts = furniture(name, rng)
        found = find_place(name, parts, size, walk, taken, rng)
        if found is None:
            continue
        place, yaw, radius = found
        if name != "picture":
            taken.append((place[:2], radius))
        for kind, (x, y, z), half in parts:
            centre = place + [math.cos(yaw) * x - math.sin(yaw) * y, math.sin(yaw) * x + math.cos(yaw) * y, z]
            columns.append((kind, centre, half, yaw, instance, CLASSES.index(name), random_texture(rng)))
        instance += 1
    shell = np.stack([random_texture(rng) for _ in range(6)])
    return Room(size, Primitives(*(np.array(column) for column in zip(*columns))), shell, walk)


def find_place(name, parts, size, walk, taken, rng):
    """Tries 40 random places and returns the first free one as (place (3,), yaw, radius); None where none is free.

    From above a piece is a circle that just holds it. A place is free if this circle touches no other one (pictures
    hang above the furniture and need not care), and if the cameras pass 30 cm beside the piece or 30 cm above it.
    """
    radius = max(math.hypot(abs(centre[0]) + half[0], abs(centre[1]) + half[1]) for _, centre, half in parts)
    top = max(centre[2] + half[2] for _, centre, half in parts)
    way = walk.cameras(64)[0]
    for _ in range(40):
        place, yaw = random_place(name, radius, size, rng)
        apart = name == "picture" or all(np.hypot(*(place[:2] - other)) > radius + r for other, r in taken)
        beside = np.hypot(*(way[:, :2] - place[:2]).T).min() > radius + 0.3
        above = top + place[2] < way[:, 2].min() - 0.3
        if apart and (beside or above):
            return place, yaw, radius
    return None


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
        crown = [(SPHERE, (u(-0.1, 0.1), u(-0.1, 0.1), 2 * h + 0.15 + 0.17 * k), tuple(u(0.14, 0.3, 3)))
                 for k in range(3)]
        return [(CYLINDER, (0, 0, h), (r, r, h))] + crown
    return [(BOX, (0, 0.02, 0), (u(0.25, 0.7), 0.02, u(0.2, 0.45)))]  # picture: hangs on a wall


def random_place(name, radius, size, rng):
    """-> place (3,), yaw: pictures hang on a wall, sofas and cabinets have their back to one, the rest is anywhere."""
    wall = int(rng.integers(4))
    yaw = [-0.5 * math.pi, 0.5 * math.pi, 0.0, math.pi][wall]  # +y of the piece points into the room: walls -x +x -y +y
    gap = {"picture": 0.0, "sofa": 0.5, "cabinet": 0.36}.get(name)
    if gap is None:
        place = rng.uniform(radius + 0.05, np.maximum(size[:2] - radius - 0.05, radius + 0.06))
        return np.array([*place, 0.0]), rng.uniform(0, 2 * math.pi)
    length = size[1 - wall // 2]
    along = rng.uniform(radius + 0.05, length - radius - 0.05) if length > 2 * radius + 0.1 else length / 2
    away = gap if wall % 2 == 0 else size[wall // 2] - gap
    place = (away, along) if wall < 2 else (along, away)
    return np.array([*place, rng.uniform(1.3, 1.8) if name == "picture" else 0.0]), yaw


# ---------------------------------------------------------------------------------------------- textures
# A texture is solid: a colour for every point of space, in the part's own frame, so that no surface has to be unrolled.


def random_texture(rng):  # -> (20,), which `surface_colour` takes apart
    colours = rng.uniform(0.08, 0.95, (2, 3))
    direction = rng.normal(size=3)
    return np.concatenate([[rng.integers(6), rng.uniform(1.5, 5.0)], colours.ravel(),
                           direction / np.linalg.norm(direction), rng.uniform(0, 10, 3), rng.normal(size=6)])


def surface_colour(texture, p):  # (P, 20), (P, 3) points in the part's own frame, metres -> (P, 3) colours
    """One of six patterns mixes two colours; a smooth noise and a fine grain lie over the whole."""
    columns = np.split(texture, [1, 2, 5, 8, 11, 14, 17], axis=1)
    pattern, frequency, first, second, direction, offset, bend, phase = columns
    q = p * frequency + offset
    waves = [np.sin(2.3 * q[:, k] + 1.7 * bend[:, k] * q[:, (k + 1) % 3] + phase[:, k]) for k in range(3)]
    cloud = (waves[0] + waves[1] + waves[2]) / 3  # smooth noise in -1 ... 1
    along = (q * direction).sum(1)
    row = np.floor(2 * q[:, 2]) % 2  # every other row of bricks is shifted by half a brick
    brick = np.stack([q[:, 0] + q[:, 1] + 0.5 * row, 2 * q[:, 2]], 1)
    blotches = 0.5 + 0.5 * cloud
    checks = np.floor(q + 0.31 * direction).sum(1) % 2
    stripes = 0.5 + 0.5 * np.sin(2 * math.pi * along).clip(-0.5, 0.5) * 2
    dots = ((q - np.round(q)) ** 2).sum(1) < 0.12
    bricks = np.abs(brick - np.round(brick)).min(1) < 0.09
    marble = 0.5 + 0.5 * np.sin(4 * along + 5 * cloud)
    patterns = np.stack([blotches, checks, stripes, dots, bricks, marble])
    mix = patterns[pattern[:, 0].astype(int), np.arange(len(p))][:, None]
    cloud = cloud[:, None]
    grain = np.sin(11 * q[:, :1] + 5 * cloud) + np.sin(9 * q[:, 1:2] - 4 * cloud) + np.sin(13 * q[:, 2:])
    return (first * (1 - mix) + second * mix) * (1 + 0.16 * cloud + 0.05 * grain)  # finer grain would only alias


# ---------------------------------------------------------------------------------------------- casting rays
# A ray is taken into the frame of a part. There the part is a unit box, sphere or cylinder, and intersecting is easy.


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


def cast(origin, rays, size, primitives):
    """Nearest hit of every ray: origin (3,), rays (P, 3) -> t (P,), normal (P, 3), object point (P, 3), primitive (P,).

    Primitives 0, 1, ... are parts of furniture; -1 ... -6 are the walls at -x +x -y +y, the floor and the ceiling.
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
        of_kind = np.nonzero(primitives.kind == kind)[0]
        yaw, half = primitives.yaw[of_kind].astype(np.float32), primitives.half[of_kind].astype(np.float32)
        start = (origin - primitives.centre[of_kind]).T[:, :, None].astype(np.float32)  # (3, M, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = hit_distance(kind, to_unit(start, yaw, half), to_unit(directions, yaw, half))
        if len(of_kind):
            first = distance.argmin(0)
            closer = distance[first, every] < t
            t, which = np.where(closer, distance[first, every], t), np.where(closer, of_kind[first], which)
    local = origin + rays * t[:, None]
    on = np.nonzero(which >= 0)[0]
    p = which[on]
    unit = to_unit((local[on] - primitives.centre[p]).T[:, :, None], primitives.yaw[p], primitives.half[p])[:, :, 0].T
    local[on] = unit * primitives.half[p]
    x, y, z = (unit_normal(primitives.kind[p], unit) / primitives.half[p]).T
    c, s = np.cos(primitives.yaw[p]), np.sin(primitives.yaw[p])
    normal[on] = np.stack([c * x - s * y, s * x + c * y, z], 1)
    return t, normal / np.linalg.norm(normal, axis=1, keepdims=True), local, which


def unit_normal(kind, p):  # outward normal of a unit primitive at its surface point p (P, 3)
    box = np.where(np.abs(p) >= np.abs(p).max(1, keepdims=True), np.sign(p), 0.0)
    cap = np.abs(p[:, 2:]) >= np.hypot(p[:, :1], p[:, 1:2])
    cylinder = np.where(cap, np.sign(p) * [0, 0, 1], p * [1, 1, 0])
    return np.where((kind == BOX)[:, None], box, np.where((kind == SPHERE)[:, None], p, cylinder))


# ---------------------------------------------------------------------------------------------- pictures and files


def look_at(position, point):  # -> (4, 4) OpenCV camera to world: z towards `point`, x level
    z = (point - position) / np.linalg.norm(point - position)
    x = np.cross(z, [0, 0, 1.0])
    x /= np.linalg.norm(x)
    c2w = np.eye(4)
    c2w[:3] = np.stack([x, np.cross(z, x), z, position], 1)
    return c2w


def render_view(room, c2w, focal, light, image_size):
    """-> the five pictures of a view: image u8, depth u16 (mm), normal u8, instance u8, label u8, all (H, W, ...)."""
    height, width = image_size
    rows, cols = np.mgrid[0:height, 0:width] + 0.5
    rays = np.stack([(cols - width / 2) / focal, (rows - height / 2) / focal, np.ones_like(cols)], -1).reshape(-1, 3)
    position, rays = c2w[:3, 3], rays @ c2w[:3, :3].T  # z of a ray is 1 in the camera frame, so t is z-depth
    t, normal, local, which = cast(position, rays, room.size, room.primitives)
    side, part = np.clip(-1 - which, 0, 5), np.maximum(which, 0)
    choose = lambda of_shell, of_parts: np.where(which < 0, of_shell[side], of_parts[part])
    texture = np.where((which < 0)[:, None], room.shell[side], room.primitives.texture[part])
    to_light = light - (position + rays * t[:, None])
    far = np.linalg.norm(to_light, axis=1)
    shade = 0.4 + 0.75 * np.clip((to_light * normal).sum(1) / far, 0, 1) / (0.7 + 0.12 * far**2)
    image = (surface_colour(texture, local) * shade[:, None]).clip(0, 1)
    grid = lambda values, dtype: np.round(values).astype(dtype).reshape(height, width, *values.shape[1:])
    return (grid(image * 255, np.uint8), grid(t * 1000.0, np.uint16),
            grid((normal @ c2w[:3, :3] + 1) * 127.5, np.uint8),
            grid(choose(SHELL_IDS, room.primitives.instance), np.uint8),
            grid(choose(SHELL_LABELS, room.primitives.label), np.uint8))


def write_room(folder, index, views, size, seed):
    """One room in the nerfstudio layout. Written aside and renamed: a folder that exists is a whole room."""
    rng = np.random.default_rng([seed, index])
    room = make_room(rng)
    focal = size[1] * rng.uniform(0.75, 0.95)
    light = room.size * np.array([rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), 0.93])
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    folders = {"file_path": "images", "depth_file_path": "depth", "normal_file_path": "normals",
               "instance_file_path": "masks", "label_file_path": "labels"}
    for name in folders.values():
        (aside / name).mkdir(parents=True, exist_ok=True)
    frames = []
    for i, (position, point) in enumerate(zip(*room.walk.cameras(views))):
        c2w = look_at(position, point)
        frame = {key: f"{name}/{i:03d}.png" for key, name in folders.items()}
        for file, picture in zip(frame.values(), render_view(room, c2w, focal, light, size)):
            Image.fromarray(picture).save(aside / file, compress_level=1)
        frames.append({**frame, "transform_matrix": (c2w @ data.OPENGL).tolist()})
    meta = dict(camera_model="PINHOLE", w=size[1], h=size[0], fl_x=focal, fl_y=focal, cx=size[1] / 2, cy=size[0] / 2,
                depth_unit_scale_factor=1e-3, class_names=CLASSES, frames=frames)
    (aside / "transforms.json").write_text(json.dumps(meta, indent=1))
    os.replace(aside, folder)


def make_rooms(out, scenes=48, views=16, size=(96, 128), seed=0):
    """Write `scenes` rooms of `views` views at `size` (H, W) below `out`; the same seed gives the same bytes.

    Rooms that exist are kept, so an interrupted call goes on where it was. `out/rooms.json` records the settings;
    raises DataError when `out` holds rooms of other settings, or files that are no rooms.
    """
    out, wanted = Path(out), dict(scenes=scenes, views=views, size=list(size), seed=seed)
    existing = data.rooms_made(out)
    if scenes < 1 or views < 3 or min(size) < 1 or seed < 0:
        raise data.DataError(f"{out}: cannot make rooms of {wanted}; at least 1 room, 3 views, 1 pixel, and seed 0")
    if existing and any(existing[key] != wanted[key] for key in ("views", "size", "seed")):
        raise data.DataError(f"{out / 'rooms.json'}: rooms of other settings are here ({existing}); "
                             "remove them or give another --scene_dir")
    if not existing and not data.is_empty(out):
        raise data.DataError(f"{out}: not empty and not made by this program; give another --scene_dir for the rooms")
    if existing != wanted:
        data.write_whole(out / "rooms.json", json.dumps(wanted).encode())
    for leftover in out.glob(".room_*"):  # of a call that was interrupted
        shutil.rmtree(leftover)
    todo = [i for i in range(scenes) if not (out / f"room_{i:03d}").exists()]
    for i in tqdm(todo, desc=f"rooms -> {out}", unit="room", disable=not todo):
        with data.naming(out / f"room_{i:03d}"):
            write_room(out / f"room_{i:03d}", i, views, tuple(size), seed)
