"""What the stages do on a CUDA card, in one command of at most 8 minutes: are they right, how fast, how large?

Run     python tests/gpu.py                  a Markdown table on the screen, the same as numbers in docs/gpu.json
        python tests/gpu.py --only raster    the rows of one section; --list names the sections
        python tests/gpu.py --budget 240     rows that would begin after 240 s are left out, and said to be
        python tests/gpu.py --toy            everything at the smallest size, to see that it runs
In      nothing: scenes and weights are generated; ../shared/fixtures/raster as well where it is there
Out     one row a measurement, written as soon as it is known. A row that fails says why, and the next one goes on.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from safetensors.torch import load_file, save_file

data, lift, splat, distill, probe, d3r = (importlib.import_module(name) for name in (
    "01_data", "02_lift", "03_splat", "04_distill", "05_probe", "06_distill3r"))
bench, reference = importlib.import_module("bench"), importlib.import_module("reference_raster")

SIZES = (146, 219), (292, 438), (584, 876)  # of the view; two views' pixels are 64k, 256k and 1.02M Gaussians
STANDARD_CHANNELS = 32  # the standard formulation takes 384 channels in groups of so many, as gsplat's does
TABLE_I = {  # views: student's s and GB, Fast3R's s and GB
    12: (0.13, 4.05, 0.32, 6.86), 32: (0.41, 9.97, 1.14, 12.11), 64: (1.02, 21.80, 3.26, 21.11),
    96: (1.78, 28.69, 6.35, 32.36), 128: (2.69, 31.90, 10.11, 44.36)}

# ------------------------------------------------------------------------------------------------ rows, measurements


class Report:
    """Rows of a table, each printed and written to disk when it is known. `row` runs a measurement and survives it."""

    def __init__(self, args):
        self.args, self.begin, self.rows, self.section = args, time.monotonic(), [], ""
        self.head = describe(args.device)
        print("".join(f"{key}: {value}  \n" for key, value in self.head.items()))
        print("| section | what | measured | beside it |\n|---|---|---|---|", flush=True)

    def left(self):
        return self.args.budget - (time.monotonic() - self.begin)

    def row(self, what, measure, beside="", needs=0):
        """measure() -> {name: number or text}; `beside` is a text, or a function of that dictionary that gives one.
        A row that `needs` more seconds than are left does not begin."""
        entry = dict(section=self.section, what=what, seconds=0.0)
        begin = time.monotonic()
        try:
            if self.left() <= needs:
                raise TimeoutError(f"left out, of the {self.args.budget:g} s too few are left")
            entry["measured"] = measure()
            entry["beside"] = beside(entry["measured"]) if callable(beside) else beside
        except (Exception, SystemExit) as error:  # also torch.OutOfMemoryError: the other rows are still wanted
            entry["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        entry["seconds"] = round(time.monotonic() - begin, 2)
        self.rows.append(entry)
        shown = entry.get("failed") or ", ".join(f"{k} {rounded(v)}" for k, v in entry["measured"].items())
        print(f"| {self.section} | {what} | {shown} | {entry.get('beside', '')} |", flush=True)
        self.save()
        torch.cuda.empty_cache()
        return entry.get("measured")

    def save(self):
        content = json.dumps(self.head | {"rows": self.rows}, indent=1)
        data.write_whole(self.args.out, content.encode())


def rounded(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(device) -> dict:
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    query, driver = "nvidia-smi --query-gpu=driver_version,memory.total --format=csv,noheader", "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        driver = subprocess.run(query.split(), capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    return dict(card=card, driver=driver, torch=torch.__version__, cuda=str(torch.version.cuda),
                python=platform.python_version(), date=f"{now:%Y-%m-%d %H:%M} UTC")


def timed(function, args, rounds=5) -> dict:
    """Median ms, and GB at the peak beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ms = bench.median_ms(function, 1 if args.toy else rounds, args.device)
    return dict(ms=ms, GB=(torch.cuda.max_memory_allocated() - before) / 1e9)


def in_all() -> dict:
    return {"GB in all": torch.cuda.max_memory_allocated() / 1e9}


def relative(found, wanted) -> float:
    return ((found.cpu().double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


# ------------------------------------------------------------------------------------------------ the card's own limits


def limits(report, args):
    """What no program can beat: bytes by a copy, arithmetic by a matrix product."""
    n = 2**16 if args.toy else 2**28
    x = torch.rand(n, device=args.device)
    copy = report.row("copy of 1 GiB", lambda: bandwidth(x, args))
    side = 64 if args.toy else 8192
    a = torch.rand(side, side, device=args.device)
    found = {}
    kinds = {"float32": (torch.float32, False), "TF32": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}
    for name, (dtype, tf32) in kinds.items():
        found[name] = report.row(f"matrix product, {name}", lambda: arithmetic(a.to(dtype), tf32, args))
    args.gb_per_s = (copy or {}).get("GB/s")
    args.tflops = (found["float32"] or {}).get("TFLOP/s")


def bandwidth(x, args):
    y = torch.empty_like(x)
    ms = bench.median_ms(lambda: y.copy_(x), 5, args.device)
    return {"GB/s": 2 * 4 * x.numel() / ms / 1e6}


def arithmetic(a, tf32, args):
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return {"TFLOP/s": 2 * len(a) ** 3 / bench.median_ms(lambda: a @ a, 5, args.device) / 1e9}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


# ------------------------------------------------------------------------------------------------ is it right?


def fixtures(report, args):
    """03_splat on the card against itself on the CPU, and against recorded float64 renders."""
    shared = ROOT.parent / "shared/fixtures/raster"
    folder = shared if shared.is_dir() else ROOT / "tests/fixtures/raster"
    for file in sorted(folder.glob("*.safetensors"))[: 1 if args.toy else None]:
        report.row(f"rasterize, {file.stem}", lambda: raster_fixture(load_file(file), args),
                   "bounds: image 5e-5 (edges 5e-3), gradients 1e-4 (edges 2e-2)")
    height, width = (48, 64) if args.toy else (140, 210)
    for name, mask in (("no masks", None), ("25 masks", bench.cells(height, width, 25, 3))):
        run = lambda: operator_fixture(height, width, mask, args)
        report.row(f"splat operator, {name}", run, "bound: 1e-5, 0 differ")


def raster_fixture(f, args):
    quats = torch.nn.functional.normalize(f["quats"].double(), dim=1)
    axes = reference.rotation(quats) * f["scales"].double()[:, None]
    inputs = f["means"], (axes @ axes.mT), f["opacities"], f["features"]
    found = {}
    for device in ("cpu", args.device):
        leaf = [x.float().detach().clone().to(device).requires_grad_() for x in inputs]
        render = splat.rasterize(*leaf, f["viewmat"].to(device), f["K"].to(device), int(f["height"]), int(f["width"]))
        (render.features * f["cot_features"].to(device)).sum().backward()
        found[str(device)] = [render.features.detach().cpu(), *(x.grad.cpu() for x in leaf)]
    (image, *grads), (cpu_image, *cpu_grads) = found[str(args.device)], found["cpu"]
    robust = f["robust"].bool()
    return {"largest error of the image": (image - f["out_features"])[robust].abs().max().item(),
            "to the CPU": (image - cpu_image).abs().max().item(),
            "gradients to the CPU": max(relative(a, b) for a, b in zip(grads, cpu_grads))}


def operator_fixture(height, width, mask, args):
    results = []
    for device in (torch.device("cpu"), args.device):
        scene = bench.two_views(height, width, 14 if height % 14 == 0 else 8, device)
        operator = splat.splat_operator(*scene, None if mask is None else mask.to(device))
        tokens = torch.randn(operator.S.shape[1], 16, generator=torch.Generator().manual_seed(0)).to(device)
        results.append((operator(tokens).cpu(), operator.valid.cpu()))
    (wanted, valid), (found, found_valid) = results
    return {"relative error to the CPU": relative(found, wanted),
            "valid tokens that differ": (valid != found_valid).sum().item()}


# ------------------------------------------------------------------------------------------------ splatting


def raster(report, args):
    """The rasteriser beside the standard PyTorch formulation and beside the card's limits."""
    sizes, channels = ([(24, 32)], [3]) if args.toy else (SIZES, (3, 64, 384))
    pairs = blended_pairs(*sizes[0])
    for height, width in sizes:
        *gaussians, _, w2c, K = (x.to(args.device) for x in reference.pixel_aligned(height, width, 1))
        for C in channels:
            scene = [*gaussians, torch.rand(len(gaussians[0]), C, device=args.device), w2c, K]
            for backward in (False, True):
                what = f"C = {C}, {len(gaussians[0]):,} Gaussians, {height}x{width}, forward" + " + backward" * backward
                run = lambda: rendered(splat.rasterize, scene, height, width, backward)
                limits = lambda found: beside_limits(found, pairs, height, width, C, backward, args)
                ours = report.row(what, lambda: timed(run, args), limits)
                if ours and (C == 3 or height < 500):  # more would take minutes
                    report.row("... standard PyTorch", lambda: standard(scene, height, width, C, backward, args),
                               lambda found: f"{found['ms'] / ours['ms']:.1f} times ours")


def rendered(function, scene, height, width, backward):
    *inputs, w2c, K = scene
    inputs = [x.detach().requires_grad_(backward) for x in inputs]
    with torch.set_grad_enabled(backward):
        image = function(*inputs, w2c, K, height, width)
        image = image.features if hasattr(image, "features") else image
        if backward:
            image.square().sum().backward()


def standard(scene, height, width, C, backward, args):
    groups = max(1, C // STANDARD_CHANNELS)
    part = [*scene[:3], scene[3][:, : C // groups].contiguous(), *scene[4:]]
    with torch.device(args.device):  # its factories name no device
        found = timed(lambda: rendered(reference.standard, part, height, width, backward), args, rounds=2)
    return dict(ms=found["ms"] * groups, GB=found["GB"])


def blended_pairs(height, width) -> float:
    """How many (pixel, Gaussian) pairs a pixel of these scenes blends. It does not depend on the size of the view."""
    *gaussians, _, w2c, K = reference.pixel_aligned(height, width, 1)
    columns, rows = -(-width // 16), -(-height // 16)
    mean, conic, opacity, _, low, high = reference.project(*gaussians, w2c, K, height, width, 16)
    listed, start = reference.tile_lists(low, high, columns, columns * rows)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    offset, count = torch.stack([x, y], -1).view(-1, 1, 2) + 0.5, 0
    for t, (a, b) in enumerate(zip(start[:-1].tolist(), start[1:].tolist())):
        pixel = offset + torch.tensor([t % columns, t // columns]) * 16
        alpha = reference.alphas(mean, conic, opacity, listed[a:b], pixel)
        alpha = alpha * (alpha >= 1 / 255)
        count += ((alpha > 0) & ((1 - alpha).cumprod(1) > 1e-4)).sum().item() if b > a else 0
    return count / (columns * rows * 256)


def beside_limits(found, pairs, height, width, C, backward, args):
    """The least time by bytes (every Gaussian and pixel once) and by arithmetic (2C + 20 operations a pair), both three
    times as much with the backward pass."""
    if not (args.gb_per_s and args.tflops):
        return "limits unknown"
    G, P, passes = 2 * height * width, height * width, 3 if backward else 1
    by_bytes = passes * 4 * (G * (3 + 9 + 1 + C) + P * (C + 2)) / args.gb_per_s / 1e6
    by_arithmetic = passes * pairs * P * (2 * C + 20) / args.tflops / 1e9
    ratio = found["ms"] / max(by_bytes, by_arithmetic)
    return f"limits {by_bytes:.2g} ms (memory), {by_arithmetic:.2g} ms (arithmetic); {ratio:.1f} times the larger"


def operator(report, args):
    """The splat operator at the paper's size, with and without masks, beside the dense path (as in tests/bench.py)."""
    size = dict(height=24, width=32, patch=8) if args.toy else {}
    for what, numbers in bench.operator_rows(1 if args.toy else 3, args.device, **size).items():
        report.row(what, lambda: numbers)


# ------------------------------------------------------------------------------------------------ networks and steps


def mvsplat(report, args):
    """MVSplat's forward pass on two views."""
    height, width = (96, 128) if args.toy else (576, 880)
    run = bench.mvsplat_pass(args.toy, height, width, args.device)
    what = f"MVSplat, two views of {height}x{width}"
    report.row(what, lambda: timed(run, args, rounds=3), "98 s, 3.0 GB on a 2-core CPU")


def step(report, args):
    """A training step of 04 at the paper's setting, part by part, and what is done once a triplet."""
    with tempfile.TemporaryDirectory() as folder:
        data.make_rooms(Path(folder, "rooms"), scenes=1, views=4, size=(48, 64) if args.toy else (584, 876))
        (scene,) = data.load_scenes(Path(folder, "rooms"))
        for preset in ("tiny",) if args.toy else ("vits", "vitb"):
            step_of(report, preset, scene, Path(folder), args)


def step_of(report, preset, scene, folder, args):
    model = "tiny" if args.toy else bench.published_size(preset, folder)
    settings = distill.parse(["--preset", preset, "--model", model, "--operators", str(folder / "operators"),
                              "--device", args.device.type, *["--pixels", "3072"] * args.toy])
    for what, part in bench.parts_of_step(scene, settings).items():
        run = lambda: timed(part, args, 3 if "once" in what else 9) | (in_all() if what == "a step" else {})
        paper = "paper: 1.30 s on an L40S, reconstruction included" if (preset, what) == ("vits", "a step") else ""
        report.row(f"{preset}: {what}", run, paper)


def table_one(report, args):
    """Table I of Distill3R by its command: a pass over N views in bfloat16; memory includes weights and pictures."""
    few = ["--counts", *map(str, [2] if args.toy else TABLE_I), *["--size", "48", "64"] * args.toy]
    with tempfile.TemporaryDirectory() as folder:
        for n, name in enumerate(["student", "teacher"][: 1 if args.toy else None]):
            asked = ["table", "--models", name, *few, "--out", folder, "--device", args.device.type]
            report.row(f"{name}, all of it", lambda: command(d3r, asked))
            for row in json.loads(Path(folder, "table.json").read_text()):
                papers = TABLE_I.get(row["views"], TABLE_I[12])[2 * n : 2 * n + 2]
                report.row(f"{name}, {row['views']} views", lambda: dict(s=row["seconds"], GB=row["gigabytes"]),
                           "paper: {} s, {} GB on an RTX 6000 Ada, all heads at once".format(*papers))


def student_step(report, args):
    """A training step of Distill3R's student on one sample, in bfloat16, without and with --grad_checkpoint."""
    views, height, width = (2, 48, 64) if args.toy else (20, 224, 518)
    student = d3r.Student(*([d3r.StudentConfig.tiny] if args.toy else [])).train().to(args.device)
    optimiser = torch.optim.AdamW(student.parameters(), 1e-4)
    points = (torch.rand(height, width, 3) + 1).to(args.device)
    conf = torch.full((height, width), 3.0).to(args.device)
    targets, masks = [d3r.Pointmap(points, points, conf, conf)] * views, [conf > 0] * views
    images = list(torch.rand(views, 3, height, width).to(args.device))

    def learn():
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(args.device.type, torch.bfloat16):
            maps = student(images, generator=torch.Generator().manual_seed(0))
        d3r.pointmap_loss(maps, targets, masks).total.backward()
        optimiser.step()
    for recompute in (False, True):
        if recompute:
            d3r.recompute(student)
        report.row(f"student, {views} views of {height}x{width}, a training step" + ", --grad_checkpoint" * recompute,
                   lambda: timed(learn, args, rounds=3) | in_all(),
                   "paper: cards of 48 GB take four such samples")


# ------------------------------------------------------------------------------------------------ whole commands

MEMORY = {  # a run of 04 at the paper's setting: which ViT, flags, the GB that it is to stay below
    "ViT-S": ("vits", [], 4), "ViT-B": ("vitb", [], 6), "ViT-B, --online": ("vitb", ["--online"], 8),
    "ViT-L, --grad_checkpoint": ("vitl", ["--grad_checkpoint"], 12)}


def memory(report, args):
    """The peak of whole runs of 04 at the paper's setting: published MVSplat, operators, measurements and pictures too."""
    toy = args.toy
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        rooms, weights = Path(folder, "rooms"), Path(folder, "mvsplat.safetensors")
        data.make_rooms(rooms, scenes=1, views=8 if toy else 12, size=(48, 64) if toy else (584, 876))
        geometry = lift.MVSplat(lift.MVSplatConfig.tiny if toy else lift.MVSplatConfig())
        save_file({name: p.contiguous() for name, p in geometry.state_dict().items()}, weights)
        few = ["--max_steps", "2", "--triplets", "1", "--heldout", "1", *["--pixels", "3072"] * toy]
        for name, (size, flags, goal) in list(MEMORY.items())[: 1 if toy else None]:
            model = "tiny" if toy else bench.published_size(size, Path(folder))
            torch.cuda.reset_peak_memory_stats()
            report.row(f"04, {name}, 2 steps", lambda: command(distill, [
                "--preset", "tiny" if toy else "vits", "--model", model, "--mvsplat", str(weights), "--scene_dir", str(rooms),
                "--device", args.device.type, "--out", str(Path(folder, name)), "--operators", str(Path(folder, "operators")),
                *few, *flags]) | in_all(), f"goal: {goal} GB")


def jobs(report, args):
    """The commands of the README on built-in rooms, start to end."""
    few = "--max_steps 2 --triplets 2 --heldout 1 --eval_every 2 --pixels 3072".split() if args.toy else []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        rooms, out, device = Path(folder, "rooms"), Path(folder, "out"), ["--device", args.device.type]
        made = data.DEFAULT_ROOMS | ({"scenes": 2, "views": 8} if args.toy else {})
        data.make_rooms(rooms, **made)
        rest = ["--scene_dir", str(rooms), *device]
        folders = ["--out", str(out / "04"), "--operators", str(out / "operators")]
        report.row("python 04_distill.py --preset tiny, rooms made before",
                   lambda: command(distill, ["--preset", "tiny", *rest, *few, *folders]), needs=0 if args.toy else 100,
                   beside="3 min 44 s on a 2-core CPU, rooms and installation included")
        student = ["snd=" + str(out / "04/student")] if (out / "04/student").is_dir() else []
        few = "--max_steps 2 --views 2 --pairs 2 --pixels 3072".split() if args.toy else []
        report.row("python 05_probe.py, the start and the student",
                   lambda: command(probe, ["--models", "tiny", *student, *rest, *few, "--out", str(out / "05")]),
                   needs=0 if args.toy else 60, beside="about 1 min a model on a 2-core CPU")


def command(stage, arguments) -> dict:
    screen, begin = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(screen):
        stage.main(arguments)
    torch.cuda.synchronize()
    seconds = time.monotonic() - begin
    told = re.findall(r"(before|after): +(matching .*)", screen.getvalue())
    return dict(s=seconds, **dict(told))


# ------------------------------------------------------------------------------------------------ the command

SECTIONS = {function.__name__: function for function in (
    limits, fixtures, raster, operator, mvsplat, step, table_one, student_step, memory, jobs)}


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to run; limits always runs")
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no row begins")
    parser.add_argument("--toy", action="store_true", help="everything at the smallest size, one round")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/gpu.json", help="the numbers")
    parser.add_argument("--list", action="store_true", help="name the sections and stop")
    args = parser.parse_args(argv)
    args.device, args.gb_per_s, args.tflops = torch.device("cuda"), None, None
    return args


def main(argv=None):
    args = parse(argv)
    if args.list:
        lines = [f"{name:14}{function.__doc__.splitlines()[0]}" for name, function in SECTIONS.items()]
        return print("\n".join(lines))
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here; this script is for the day when there is one")
    report = Report(args)
    for name, function in SECTIONS.items():
        if name == "limits" or not args.only or name in args.only:
            report.section = name
            try:
                function(report, args)
            except Exception as error:  # outside of a row: the other sections are still wanted
                report.row("the rest of this section", lambda: (_ for _ in ()).throw(error))
    failed = sum("failed" in row for row in report.rows)
    seconds = time.monotonic() - report.begin
    print(f"\n{len(report.rows)} rows, {failed} of them failed or left out, {seconds:.0f} s  ->  {args.out}")
    return report.rows


if __name__ == "__main__":
    main()
