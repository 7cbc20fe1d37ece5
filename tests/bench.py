"""What a training step of the main job costs, part by part, and how fast rooms are made. Medians; shares of the same run.

Run     OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python tests/bench.py
"""
import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Medians of the parts of a training step.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        data.make_rooms(Path(folder) / "data", scenes=4, views=16)
        rate = 64 / (time.perf_counter() - begin)
        scene = data.load_scenes(Path(folder) / "data")[0]
        indices = data.sample_triplet(scene, torch.Generator().manual_seed(0))
        load = lambda: distill.load_triplet(scene, indices, (96, 128), device)
        t, grid = load(), (12, 16)
        preset = distill.PRESETS["tiny"]
        vit = lift.load_vit("tiny").to(device)
        student = torch.nn.ModuleDict(dict(vit=distill.add_lora(vit), head=distill.DINOHead(
            vit.dim, preset["hidden"], preset["bottleneck"], preset["prototypes"]))).to(device)
        gaussians, tokens = distill.reconstruct(t, "sweep"), vit(t.images).patches.detach()
        goal = torch.randn(len(tokens[0]), vit.dim, device=device)

        def learn():
            loss = distill.distill_loss(student["head"](student["vit"](t.image[None]).patches[0]), student["head"](goal))
            loss.backward()

        parts = {
            "load three views": load,
            "plane sweep (Eq. 1)": lambda: distill.reconstruct(t, "sweep"),
            "teacher, two views": lambda: vit(t.images),
            "lift, splat, blend (Eq. 2-4)": lambda: distill.splat_features(tokens, gaussians, t, grid),
            "student forward + backward (Eq. 5)": learn}
        times = {name: median_ms(function, args.rounds, device) for name, function in parts.items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"rooms: {rate:.0f} views/s at 96x128\n\none step of the tiny preset on {name}, median of {args.rounds}\n\n| part | ms | share |\n|---|---|---|")
    total = sum(times.values())
    for part, ms in [*times.items(), ("sum", total)]:
        print(f"| {part} | {ms:.0f} | {100 * ms / total:.0f} % |")


if __name__ == "__main__":
    main()
