"""The training step of ours and of the released implementation, in turn, in one process.

    pip install spidr==0.2.0                 # their package, for Python 3.12; without it only ours
    python extras/speed.py tiny:16x2 tiny:4x8 tiny:4x4 base:2x5      # preset:batch x seconds
    python extras/speed.py base:12x19.8 --compile                    # on a GPU
    torchrun --nproc_per_node=16 extras/speed.py base:12x19.8 --compile        # ours, on 16

Prints a line of a table for each shape: seconds of a step, medians over rounds; the ratio,
a median too, in brackets the smallest and the largest; on a GPU also the peak of memory, and the
matrix products of our step as a share of the GPU's bfloat16 peak.
"""

import argparse
import dataclasses
import re
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import model as networks
import pretrain


def ours(preset, wav, masked, options, ranks):
    """A function of i that makes training step i."""
    torch.manual_seed(0)
    model = networks.SpidR(networks.Config(**networks.PRESETS[preset])).train()
    pretrain.to_device(model, options, ranks)
    optimizer = pretrain.make_optimizer(model, options)
    batch = {"wav": wav, "mask": masked}
    return lambda i: pretrain.train_step(model, optimizer, [batch], i, 5e-4, options, ranks)


def theirs(preset, wav, masked, options, ranks):
    from spidr.config import OptimizerConfig, SpidRConfig
    from spidr.models import SpidR
    from spidr.optimizer import build_optimizer

    known = {field.name for field in dataclasses.fields(SpidRConfig)}
    config = networks.released_config(networks.Config(**networks.PRESETS[preset]))
    model = SpidR(SpidRConfig(**{k: v for k, v in config.items() if k in known}))
    model = model.to(ranks.device).train()
    kind = "bfloat16" if ranks.device.type == "cuda" else "float32"
    optimizer, scaler, schedule = build_optimizer(model, OptimizerConfig(dtype=kind))
    indices = masked.nonzero()[:, 1].view(len(masked), -1).to(ranks.device)  # [B, M]
    if options.compile:  # without this option torch 2.11 fails on a GPU, as in pretrain.to_device
        model.compile(dynamic=True, options={"triton.coalesce_tiling_analysis": False})

    def step(i):
        with pretrain.autocast(options, ranks):
            loss, _ = model(wav, mask_indices=indices, attention_mask=None)
        scaler.scale(loss.sum() / indices.numel()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        model.update_ema(i)

    return step


def batch_of(shape, device):
    """The preset of a shape; noise; a mask of half of each recording's frames."""
    match, frames = re.fullmatch(rf"({'|'.join(networks.PRESETS)}):(\d+)x(\d+\.?\d*)", shape), 0
    if match:
        preset, size, samples = match[1], int(match[2]), round(float(match[3]) * 16_000)
        frames = networks.num_frames(samples, networks.Config(**networks.PRESETS[preset]))
    networks.require(
        frames >= 2 and size >= 1, f"{shape}: preset:batch x seconds, such as base:2x5")
    some = torch.rand(size, frames).argsort(1)[:, : frames // 2]
    mask = torch.zeros(size, frames, dtype=torch.bool).scatter_(1, some, True)
    return preset, torch.randn(size, samples, device=device), mask


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, by the data sheets


def flops(c, batch, samples):
    """Floating-point operations in the products of a training step: forward and, of what is
    trained, twice that backward; the teacher forward alone."""
    channels, T, front = 1, samples, 0
    for out, kernel, stride in c.conv_layers:
        T = (T - kernel) // stride + 1
        front, channels = front + 2 * T * kernel * channels * out, out
    front += 2 * T * channels * c.dim
    positional = 2 * T * c.pos_depth * (c.pos_kernel // c.pos_depth) * c.dim**2 // c.pos_groups
    products = 2 * T * (4 * c.dim**2 + 2 * c.dim * c.ffn) + 4 * T * T * c.dim
    transformer = positional + c.layers * products
    heads = 2 * (T // 2) * c.codebooks * c.dim * c.codewords  # at half of the frames
    return batch * (3 * (front + transformer + heads) + transformer + heads)


def compare(shape, makers, options, ranks, rounds, steps):
    preset, wav, masked = batch_of(shape, ranks.device)
    on_gpu, made, peak, times = ranks.device.type == "cuda", {}, {}, {name: [] for name in makers}

    def run(name, first, count):
        began = time.perf_counter()
        for i in range(first, first + count):
            made[name](i)
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    for name, maker in makers.items():
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        made[name] = maker(preset, wav, masked, options, ranks)
        run(name, 1, 3)  # warms up, compiles
        peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else 0
    for i in range(rounds):
        for name in made:
            times[name].append(run(name, 4 + i * steps, steps))
    name = shape.replace(":", ", ").replace("x", " x ")
    cells = [f"{name} s", *(f"{median(t):.3g}" for t in times.values())]
    if len(times) == 2:
        ratios = sorted(b / a for a, b in zip(*times.values()))
        cells.append(f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if on_gpu:
        cells.append(" and ".join(f"{gib:.1f} GiB" for gib in peak.values()))
        work = flops(networks.Config(**networks.PRESETS[preset]), *wav.shape)
        cells += [f"{name} {work / median(times['ours']) / best:.1%}"
                  for name, best in PEAK.items() if name in torch.cuda.get_device_name()]
    if ranks.first:
        print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = pretrain.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="such as base:2x5")
    parser.add_argument("--device", default="", help="unless given the best there is")
    parser.add_argument("--compile", action="store_true", help="torch.compile, both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of each in a round")
    args = parser.parse_args()
    options = pretrain.Options(device=args.device, compile=args.compile)
    ranks = pretrain.setup(options)
    makers = {"ours": ours}
    if find_spec("spidr") and ranks.world == 1:
        makers["released"] = theirs
    if ranks.first:
        device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else ranks.device
        print(f"{ranks.world} x {device}, torch {torch.__version__}{', compiled' * args.compile}: "
              f"{' and '.join(makers)}")
    for shape in args.shapes:
        compare(shape, makers, options, ranks, args.rounds, args.steps)


if __name__ == "__main__":
    networks.run(main)
