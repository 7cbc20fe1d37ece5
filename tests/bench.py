"""What a training step costs, part by part, and how fast rooms are made. Medians; ratios of the same run.

Run     OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/bench.py
        ... python tests/bench.py --preset vits --rounds 3     the same at the paper's setting; 5 minutes
        ... python tests/bench.py --section mvsplat            MVSplat, time and memory; 4 minutes
        ... python tests/bench.py --section splat              rasterize against reference_raster.py, and how it scales; 5 minutes
        ... python tests/bench.py --section tricks             what each trick of rasterize brings; 2 minutes
        ... python tests/bench.py --section splat --large      the same with 1.02M Gaussians; 15 minutes, 9 GB
        ... python tests/bench.py --section operator           the splat operator at the paper's size, against the dense path; 2 minutes
        ... python tests/bench.py --section peaks              memory of whole runs of 04 at the paper's setting, on a pretended GPU; an hour
        ... python tests/bench.py --section photos             photos of 13 megapixels with distortion against small ones; 3 minutes
"""
import argparse
import ctypes
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from PIL import Image
from safetensors.torch import load_file

GARDEN = Path(__file__).parents[2] / "shared/fixtures/raster/garden_crop_c3.safetensors"
data, lift, splat, distill = (importlib.import_module(n) for n in ("01_data", "02_lift", "03_splat", "04_distill"))


def median_ms(function, rounds, device):
    times = []
    for _ in range(rounds + 1):  # the first round warms caches up and is left out
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_splat(method, backward, height, width, C, copies, zoom, rounds):
    """Median seconds and the growth of resident memory in MB of one way to rasterise, in this process. There are `copies` times
    as many Gaussians as two views of this size have pixels, and a view of `zoom` times the height and width is rendered."""
    reference = importlib.import_module("reference_raster")
    *gaussians, w2c, K = reference.pixel_aligned(height, width, C)
    K[:2] *= zoom
    if copies < 1:
        gaussians = [x[:: round(1 / copies)].contiguous() for x in gaussians]
    elif copies > 1:
        gaussians = [x.repeat(copies, *[1] * (x.dim() - 1)) for x in gaussians]
        gaussians[2] = gaussians[2] / copies
    return measured(method, backward, gaussians, w2c, K, height * zoom, width * zoom, rounds)


def measure_garden(method, backward, rounds):
    """The same on points of a real scene, 4,629 Gaussians in 60x80 pixels."""
    f = load_file(GARDEN)
    axes = importlib.import_module("reference_raster").rotation(f["quats"].double()) * f["scales"].double()[:, None]
    gaussians = [f["means"], (axes @ axes.mT).float(), f["opacities"], f["features"]]
    return measured(method, backward, gaussians, f["viewmat"], f["K"], int(f["height"]), int(f["width"]), rounds)


def alpha_pixel_by_pixel():
    """rasterize without the polynomial: the distance to the mean, its quadratic form and exp for every pixel and Gaussian."""
    def make_step(table, band, blocks, centre, place, light, pixels, buffer, backward):
        ids = band.gaussian.index_select(0, place.flatten())
        rows = table.index_select(0, ids).view(*place.shape, -1)
        columns = rows[..., :8].permute(2, 1, 0)[..., None]
        l11, l21, l22, lo = columns[4:]
        dx, dy = (centre[:, None] - columns[:2, ..., 0] - columns[2:4, ..., 0])[..., None] - pixels[1:3, None, None] / 2
        alpha = torch.exp(lo * 0.6931472 - 0.6931472 * ((l11 * dx + l21 * dy) ** 2 + (l22 * dy) ** 2))
        alpha = torch.where((place == len(band.gaussian) - 1).T[..., None] | (alpha < splat.MIN_ALPHA), 0.0, alpha).clamp(max=splat.MAX_ALPHA)
        return splat.Step(blocks, centre, place, ids.view(place.shape), rows, columns, splat.front_to_back_in_turn(alpha, light))
    splat.make_step = make_step
    return splat.rasterize


def light_by_cumprod():
    """rasterize as on a GPU: the light of all Gaussians of a step by cumprod, instead of one after the other in place."""
    splat.front_to_back_in_turn = splat.front_to_back
    return splat.rasterize


def channels_in_passes():
    """rasterize with 32 channels a pass."""
    return lambda *x: torch.cat([splat.rasterize(*x[:3], f, *x[4:]).features for f in x[3].split(32, 1)], 2)


# What is timed by name: rasterize, its definition, and rasterize with one of its tricks undone.
UNDONE = {"rasterize": lambda: splat.rasterize, "plainly": lambda: splat.rasterize_plainly, "alpha pixel by pixel": alpha_pixel_by_pixel,
          "light by cumprod": light_by_cumprod, "32 channels a pass": channels_in_passes}


def tricks_section(rounds):
    """One row a trick: the same render without it and with it."""
    rows = [  # the trick; without, with; backward, view, channels
        ("blocks with lists", "plainly", "textbook", False, 73, 110, 3), ("all tricks", "plainly", "rasterize", False, 73, 110, 3),
        ("log2 alpha as a polynomial", "alpha pixel by pixel", "rasterize", False, 146, 219, 3), ("light taken off in place", "light by cumprod", "rasterize", False, 146, 219, 3),
        ("weights once for all channels", "32 channels a pass", "rasterize", False, 146, 219, 384), ("walking again in the backward pass", "textbook", "rasterize", True, 146, 219, 3)]
    print("| trick | view | Gaussians | without | with | times |", "|---" * 6 + "|", sep="\n")
    for trick, *methods, backward, height, width, C in rows:
        (slow, slow_mb), (fast, fast_mb) = (apart("measure_splat", method, backward, height, width, C, 1, 1, 1 if method == "plainly" else rounds) for method in methods)
        what = f"{height}x{width}, C = {C}" + ", with gradients" * backward
        print(f"| {trick} | {what} | {2 * height * width} | {slow:.3f} s, {slow_mb:.0f} MB | {fast:.3f} s, {fast_mb:.0f} MB | {slow / fast:.1f} |", flush=True)


def measured(method, backward, gaussians, w2c, K, height, width, rounds):
    reference = importlib.import_module("reference_raster")
    function = UNDONE[method]() if method in UNDONE else getattr(reference, method)
    ctypes.CDLL(None).malloc_trim(0)  # or what making the scene has freed would hide what is allocated next; Linux
    peak, times, done, base = [0.0], [], threading.Event(), resident_mb()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_mb() - base)

    threading.Thread(target=watch, daemon=True).start()
    for _ in range(rounds + (rounds > 1)):  # of several, the first warms caches up and is left out
        inputs = [x.detach().requires_grad_(backward) for x in gaussians]
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            image = function(*inputs, w2c, K, height, width)
            image = image.features if isinstance(image, splat.Render) else image
            if backward:
                image.square().sum().backward()
        times.append(time.perf_counter() - begin)
        del image, inputs
    done.set()
    return statistics.median(times[rounds > 1 :]), peak[0]


def apart(function, *case):
    """The function of this name, called in a process of its own, so that one's memory is not another's."""
    code = f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench; print(json.dumps(bench.{function}(*{case!r})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def mvsplat_pass(tiny, height, width, device=torch.device("cpu")):
    """A forward pass of MVSplat over two views, as a function."""
    K = torch.tensor([[0.9 * width, 0, width / 2], [0, 0.9 * width, height / 2], [0, 0, 1]]).expand(2, 3, 3)
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[1, 0, 3] = 0.3
    model = lift.MVSplat(lift.MVSplatConfig.tiny if tiny else lift.MVSplatConfig()).eval().to(device)
    inputs = [x.to(device) for x in (torch.rand(2, 3, height, width), K, c2w)]
    return torch.no_grad()(lambda: model(*inputs, 1.0, 100.0))


def measure_mvsplat(tiny, height, width, rounds):
    """Median seconds, and the peak of the whole process in MB."""
    ms = median_ms(mvsplat_pass(tiny, height, width), rounds, torch.device("cpu"))
    return ms / 1000, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mvsplat_section(rounds):
    print(f"MVSplat forward, two views, {torch.get_num_threads()} CPU threads\n\n| network | view | s | peak MB of the process |\n|---|---|---|---|")
    for name, *case in (("published", False, 256, 256, rounds), ("published", False, 576, 880, 1), ("tiny", True, 96, 128, rounds)):
        seconds, mb = apart("measure_mvsplat", *case)
        print(f"| {name} | {case[1]}x{case[2]} | {seconds:.2f} | {mb:.0f} |", flush=True)


def splat_section(rounds, large):
    sizes = [(146, 219), (292, 438)] + [(584, 876)] * large
    print("pixel-aligned Gaussians of two views, one CPU thread; seconds (times ours) and MB\n")
    print("| what | view | Gaussians | rasterize | textbook, 8x8 chunks | standard (gsplat's) |", "|---" * 6 + "|", sep="\n")
    for backward, C in ((False, 3), (True, 3), (False, 384)):
        for height, width in sizes:
            seconds, mb = apart("measure_splat", "rasterize", backward, height, width, C, 1, 1, rounds)
            row = [f"{seconds:.2f} s, {mb:.0f} MB"]
            for method in ("textbook", "standard"):
                # All 384 channels at once take 15 GB at 256k Gaussians: 32 are timed and counted twelve times, as gsplat does it.
                chunk = 12 if C == 384 and method == "standard" else 1
                if (C == 384 and height > 292) or (backward and height > 292) or (method == "textbook" and height > 292):
                    row.append("-")
                    continue
                case = method, backward, height, width, C // chunk, 1, 1, 1 if height > 146 else rounds
                other, other_mb = apart("measure_splat", *case)
                row.append(f"{other * chunk / seconds:.1f}x, {other_mb:.0f} MB" + " (12 x 32 channels)" * (chunk > 1))
            what = f"C = {C} forward" + " + backward" * backward
            print(f"| {what} | {height}x{width} | {2 * height * width} | " + " | ".join(row) + " |", flush=True)
    for backward in (False, True):
        if not GARDEN.exists():
            print(f"| garden crop | {GARDEN} is not here: third-party points | | | | |")
            break
        (seconds, mb), *others = (apart("measure_garden", method, backward, 4 * rounds) for method in ("rasterize", "textbook", "standard"))
        row = [f"{1000 * seconds:.1f} ms, {mb:.0f} MB"] + [f"{other / seconds:.1f}x, {other_mb:.0f} MB" for other, other_mb in others]
        print(f"| garden crop, C = 3 forward{' + backward' * backward} | 60x80 | 4629 | " + " | ".join(row) + " |", flush=True)
    print("\n| cost, forward | from | to | times the work | times the seconds |\n|---|---|---|---|---|")
    scaling = [
        ("Gaussians, same view", (146, 219, 3, 1 / 4, 1), (146, 219, 3, 4, 1), 16),
        ("pixels, same Gaussians", (146, 219, 3, 1, 1), (146, 219, 3, 1, 4), 16),
        ("pixels and Gaussians", (73, 110, 3, 1, 1), (292, 438, 3, 1, 1), 16),
        ("channels", (146, 219, 24, 1, 1), (146, 219, 384, 1, 1), 16),
    ]
    for name, *ends, work in scaling:
        (few, _), (many, _) = (apart("measure_splat", "rasterize", False, *end, rounds) for end in ends)
        print(f"| {name} | {few:.3f} s | {many:.3f} s | {work} | {many / few:.1f} |", flush=True)


def cells(height, width, count, seed):
    """Ids (H, W) of `count` Voronoi cells."""
    seeds = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([height, width])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return 1 + ((y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2).argmin(-1)


def two_views(height, width, patch, device):
    """What `splat_operator` takes before a mask: two views' pixel-aligned Gaussians, their taps with 25 masks each, a third camera."""
    reference, grid = importlib.import_module("reference_raster"), (height // patch, width // patch)
    *gaussians, _, w2c, K = (x.to(device) for x in reference.pixel_aligned(height, width, 1))
    pairs, N = [lift.upscale_weights(cells(height, width, 25, seed).to(device), grid) for seed in (1, 2)], grid[0] * grid[1]
    index, weight = torch.cat([pairs[0][0], pairs[1][0] + N]), torch.cat([weight for _, weight in pairs])
    return *gaussians, index, weight, 2 * N, w2c, K, height, width, grid


@torch.no_grad()
def operator_rows(rounds, device, height=574, width=868, patch=14):
    """{what: its numbers}. Errors are relative L2 of the tokens."""
    *scene, index, weight, count, w2c, K, _, _, grid = inputs = two_views(height, width, patch, device)

    def dense(x, mask):
        features = sum(weight[:, k, None] * x[index[:, k]] for k in range(4))
        rendered, valid = splat.divide_by_alpha(splat.rasterize(*scene, features, w2c, K, height, width))
        return splat.splat_to_tokens(rendered if mask is None else splat.semantic_blend(rendered, mask, 0.5, valid), valid, grid)

    x = torch.randn(count, 384, generator=torch.Generator().manual_seed(0)).to(device)
    masks = {f"{n} masks": cells(height, width, n, 3).to(device) for n in (25, 400)}
    rows = {"dense path, 25 masks": {"s": median_ms(lambda: dense(x, masks["25 masks"]), 1, device) / 1000}}
    for name, mask in {"no masks": None, **masks}.items():
        operator, (wanted, valid) = splat.splat_operator(*inputs, mask), dense(x, mask)
        error = lambda found: ((found - wanted).norm() / wanted.norm()).item()
        with tempfile.TemporaryDirectory() as folder:
            splat.save_operator(operator, file := Path(folder) / "operator")
            half, size = splat.load_operator(file).to(device), file.stat().st_size
        rows[name] = {"build, s": median_ms(lambda: splat.splat_operator(*inputs, mask), rounds, device) / 1000,
                      "apply to 384, ms": median_ms(lambda: operator(x), rounds, device), "file, kB": size / 1000,
                      "error to the dense path": error(operator(x)), "valid tokens that differ": (valid != operator.valid).sum().item(),
                      "of the float16 file": error(half(x)), "of tokens in bfloat16": error(wanted.bfloat16().float())}
    return rows


def operator_section(rounds):
    for name, numbers in operator_rows(rounds, torch.device("cpu")).items():
        print(f"| {name} | " + ", ".join(f"{what} {value:.3g}" for what, value in numbers.items()) + " |")


def published_size(preset, folder):
    """A ViT of the preset's size with random weights, as a folder: what a step costs does not depend on them."""
    dim, depth, heads = {"vits": (384, 12, 6), "vitb": (768, 12, 12), "vitl": (1024, 24, 16)}[preset]
    model = lift.VisionTransformer(dim=dim, depth=depth, heads=heads)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    lift.save_vit(model, folder / preset)
    return str(folder / preset)


def peaks_section():
    """The section `memory` of tests/gpu.py on the pretended CUDA device of shared/tools, which adds up all live tensors."""
    tool = Path(__file__).parents[2] / "shared/tools/fake_cuda.py"
    if not tool.exists():
        sys.exit(f"{tool}, the pretended CUDA device, is not here")
    root = Path(__file__).parents[1]
    command = [sys.executable, str(tool), "tests/gpu.py", "--only", "memory", "--budget", "1e6", "--out", os.devnull]
    subprocess.run(command, cwd=root, check=True, env=os.environ | {"FAKE_CUDA_PROJECT": str(root)})


def photos_section(folder, photos=50, size=(3120, 4208)):
    """Views and steps of 04 from photos as a phone takes them, and from the same ones made small before."""
    data.make_rooms(folder / "room", scenes=1, views=photos, size=(192, 256))
    room, = sorted((folder / "room").glob("room_*"))
    meta = json.loads((room / "transforms.json").read_text())
    zoom, rows = size[0] / 192, []
    lens = dict(k1=-0.08, k2=0.01, h=size[0], w=size[1], **{key: zoom * meta[key] for key in ("fl_x", "fl_y", "cx", "cy")})
    for name, settings in (("13 MP, distorted", meta | lens), ("small", meta)):
        scene = folder / name
        (scene / "images").mkdir(parents=True)
        for frame in settings["frames"]:
            with Image.open(room / frame["file_path"]) as image:
                image = image.convert("RGB").resize((settings["w"], settings["h"]), Image.BICUBIC)
            image.save((scene / frame["file_path"]).with_suffix(".jpg"), quality=90)
        frames = [dict(file_path=str(Path(frame["file_path"]).with_suffix(".jpg")), transform_matrix=frame["transform_matrix"]) for frame in meta["frames"]]
        (scene / "transforms.json").write_text(json.dumps(settings | {"frames": frames}))
        args = distill.parse(["--preset", "tiny", "--scene_dir", str(scene), "--operators", str(folder / f"operators {name}")])
        scenes, _, source = distill.prepare(args)
        begin = time.perf_counter()
        for i in range(len(scenes[0])):
            scenes[0].view(i, source.sizes[scenes[0].name])
        prepared = time.perf_counter() - begin
        _, student, teacher, _ = distill.networks_of(args)
        places = distill.draw_triplets(scenes, 20, 0)
        for place in places:
            source.operator(*place)
        turn = iter(places)
        learn = lambda: distill.learn([source.sample(*next(turn), 0)], student, teacher, args)
        rows.append((name, len(scenes[0]), prepared, median_ms(learn, 15, torch.device("cpu"))))
    print("| photos | views | prepared at training size, s | step of one triplet, ms |\n|---|---|---|---|")
    for name, count, seconds, ms in rows:
        print(f"| {name} | {count} | {seconds:.1f} | {ms:.0f} |")
    print(f"\nratio of the steps {rows[0][3] / rows[1][3]:.2f}")
    (scene,) = data.load_scenes(folder / "13 MP, distorted")
    begin = time.perf_counter()
    for i in range(len(scene)):
        scene.view(i, (574, 868))
    print(f"all {photos} at 574x868: {time.perf_counter() - begin:.1f} s")


def parts_of_step(scene, args) -> dict:
    """{what: a function that does it}: a step of 04_distill on one triplet, its parts, and what is done once a triplet."""
    before, student, teacher, optimiser = distill.networks_of(args)
    source = distill.Source([scene], args, before.patch)
    place = scene, data.sample_triplet(scene, torch.Generator().manual_seed(0))
    sample, t = source.sample(*place, 0), source.load(*place)
    autocast = lambda: torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)

    def step():
        optimiser.zero_grad(set_to_none=True)
        distill.learn([sample], student, teacher, args)
        optimiser.step()

    @torch.no_grad()
    def teach():
        with autocast():
            return teacher(sample.context)

    def look():
        with autocast():
            seen = student(sample.target)[0]
        seen.float().square().mean().backward()
    tokens, gaussians, steps = teach(), source.reconstruct(t), (source.grid(t), *source.steps)
    goal, valid = sample.carry(tokens)
    seen = student(sample.target)[0].detach()[valid]

    def judge():
        distill.objective(student, teacher, seen.requires_grad_(), goal[valid], args)[0].backward()
    return {
        "a step": step, "teacher, two views": teach, "student, forward + backward": look, "head and loss, forward + backward": judge,
        "operator on tokens": lambda: sample.carry(tokens), "Adam": optimiser.step,
        "images and operator from disk (other threads do it)": lambda: source.sample(*place, 0),
        "once a triplet: geometry by the tiny MVSplat": lambda: source.reconstruct(t),
        "once a triplet: operator": lambda: distill.triplet_operator(gaussians, t, *steps),
        "--online instead: lift, splat, blend": lambda: distill.splat_in_blocks(tokens, gaussians, t, *steps)}


def step_section(preset, rounds, folder):
    """One step of 04_distill, part by part, and the part of it that no implementation could leave out."""
    tiny, cpu = preset == "tiny", torch.device("cpu")
    data.make_rooms(folder / "data", scenes=1, views=4, size=(96, 128) if tiny else (584, 876))
    args = distill.parse(["--preset", preset, "--model", "tiny" if tiny else published_size(preset, folder), "--device", "cpu",
                          "--operators", str(folder / "operators")])
    (scene,), ms = data.load_scenes(folder / "data"), {}
    print(f"preset {preset}, {torch.get_num_threads()} CPU threads; median of {rounds}\n\n| part | ms |\n|---|---|")
    for what, part in parts_of_step(scene, args).items():
        ms[what] = median_ms(part, 1 if "once" in what and not tiny else rounds, cpu)
        print(f"| {what} | {ms[what]:.0f} |", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if what == "a step" else peak
    whole, *needed = list(ms.values())[:4]
    print(f"\nteacher, student and loss {sum(needed):.0f} ms, the step {whole / sum(needed):.2f} times that; peak {peak:.0f} MB resident")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Medians of the parts of a training step.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--section", choices=["step", "mvsplat", "splat", "tricks", "operator", "peaks", "photos"], default="step")
    parser.add_argument("--preset", choices=["tiny", "vits", "vitb"], default="tiny", help="step: whose")
    parser.add_argument("--large", action="store_true", help="splat: also 1.02M Gaussians in 584x876")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rounds = min(args.rounds, 5)
        {"step": lambda: step_section(args.preset, args.rounds, Path(folder)), "mvsplat": lambda: mvsplat_section(rounds),
         "splat": lambda: splat_section(rounds, args.large), "tricks": lambda: tricks_section(rounds), "peaks": peaks_section,
         "operator": lambda: operator_section(rounds), "photos": lambda: photos_section(Path(folder))}[args.section]()


if __name__ == "__main__":
    main()
