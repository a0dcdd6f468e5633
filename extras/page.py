"""A page to look at and to listen to.

    python extras/page.py                                   the report: the newest toy runs
    python extras/page.py --model M --audio A [--alignments P]    what units some recordings become
"""

import argparse
import base64
import html
import io
import itertools
import json
import math
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import evaluate
import model as networks
from evaluate import (
    RATE, TASKS, count_table, labelled_tracks, load_encoder, options_of, quality, read_phones,
    read_recording, run_pairs, spidr_encoder, train_lm, units_of, write_json, write_outputs)
from extras.toy import LM_LANGUAGE, TARGETS, toy, toy_encoders, toy_table
from model import require

# ======== the report ========


def newest_runs():
    """{stage: folder} of each stage's newest run on the toy world that has weights."""
    found = dict.fromkeys(("pretrain", "meta", "adapt"))
    for path in sorted(Path("runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime):
        o = options_of(path.parent)
        if o.get("toy") and not o.get("manifest") and not o.get("audio"):
            stage = "adapt" if "budget" in o else "meta" if "method" in o else "pretrain"
            found[stage] = path.parent
    runs = {f"{stage}: {run}": run for stage, run in found.items() if run}
    require(runs, "runs: no run on the toy world; 'python pretrain.py' makes one")
    return runs


def report():
    """Without a verb: the newest run of each stage on the toy world, as a page. The first time it
    trains a language model too, on the units of the first of them."""
    runs, language = newest_runs(), LM_LANGUAGE
    name, run = next(iter(runs.items()))
    world = toy(options_of(run)["toy"], ["eval", "lm"])
    torch.manual_seed(options_of(run)["seed"])
    fresh = networks.SpidR(networks.read_config(run / "config.json")).eval()
    encoders = {"untrained": spidr_encoder("untrained", fresh)} | toy_encoders(runs)
    tables = toy_table(world, encoders, every=True)

    print(f"\nquality of units, {language}")
    rows = data.read_manifest(world / "eval" / f"{language}.csv")
    phones, found = read_phones(world / "eval" / f"{language}_alignments.csv"), {}
    for key, encoder in encoders.items():
        if encoder.codebooks:
            found[key] = quality(units_of(rows, encoder), phones, encoder.codewords)
            print(key, *(f"{measure} {x:.3g}" for measure, x in found[key].items()))

    units, lm = (f"runs/{kind}_{encoders[name].hash}" for kind in ("units", "lm"))
    if not Path(units).exists():
        words = "--model", str(run), "--audio", str(world / "lm" / "train.csv"), "--out", units
        write_outputs(evaluate.parse(["units", *words]))
    train_lm(["--preset", "tiny", "--units", units, "--out", lm])
    pairs = {}
    for task in "swuggy", "sblimp", "tsc":
        where = ["--model", str(run), "--data", str(world / "lm" / TASKS[task][0])]
        pairs[task] = run_pairs(evaluate.parse([task, "--lm", lm, *where]))
    results = dict(abx={name: table.tolist() for name, table in tables.items()},
                   quality=found, pairs=pairs)
    write_json("runs/report.json", results)
    write_page("runs/report.html", report_parts(runs, encoders, world, results))
    print("\nruns/report.json, runs/report.html: open it in a browser")


def report_parts(runs, encoders, world, results):
    """The report as pieces of HTML."""
    across = {name: [line[1] for line in table] for name, table in results["abx"].items()}
    untrained, deepest = across.pop("untrained"), max(map(len, across.values()))
    lines = {name: [*enumerate(np.resize(errors, deepest), 1)]  # MFCC is a level line
             for name, errors in across.items()}
    parts = ["<h1>What came of the runs</h1>", plot("ABX error across speakers, unseen languages, "
                                                    "by layer", lines)]
    for key in "loss", "target_ppl", "phone_accuracy":
        curves = {}
        for name, run in runs.items():
            records = map(json.loads, open(run / "metrics.jsonl"))
            curves[name] = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        parts.append(plot(f"{key}, by step", {name: line for name, line in curves.items() if line}))
    parts.append(f"<p>The untrained network errs on {min(untrained):.0f} to {max(untrained):.0f}% "
                 "of the triples; chance is 50%.</p><h2>An utterance of a language that was not in "
                 "the training</h2>")
    language = TARGETS[0]
    rows = data.read_manifest(world / "eval" / f"{language}.csv")
    phones = read_phones(world / "eval" / f"{language}_alignments.csv")
    shortest = min(rows, key=lambda row: row.num_samples)
    models = {name: encoder for name, encoder in encoders.items() if encoder.codebooks}
    parts.append(utterance(shortest, models, phones[shortest.fileid]))
    *_, (name, encoder) = models.items()
    parts += [f"<h2>What units the phones of {language} become</h2><p>{html.escape(name)}, layer "
              f"{encoder.layer(units=True)}; a full square: always.</p>",
              heat_map(units_of(rows, encoder), phones)]
    measures = [*next(iter(results["quality"].values()))]
    parts += [f"<h2>Quality of units, {LM_LANGUAGE}</h2>",
              html_table(["", *measures], [[name, *found.values()]
                                           for name, found in results["quality"].items()]),
              "<h2>A language model on the units: accuracy, %</h2>",
              html_table(["", "all pairs"], [[task, found["all"]["accuracy"]]
                                             for task, found in results["pairs"].items()])]
    return parts


def run_look(args):
    """A page of some recordings: to see and to hear what the units are."""
    encoder = load_encoder(args.model)
    rows = data.read_manifest(args.audio)
    phones = read_phones(args.alignments) if args.alignments else {}
    parts = [f"<h1>{html.escape(args.model)}, layer {encoder.layer(args.layer, units=True)}</h1>"]
    for row in rows[:5]:
        parts += [f"<h2>{html.escape(row.fileid)}</h2>",
                  utterance(row, {"": encoder}, phones.get(row.fileid), args.layer)]
    if phones:
        units = units_of([row for row in rows if row.fileid in phones], encoder, args.layer)
        parts += ["<h2>What units the phones become</h2>", heat_map(units, phones)]
    write_page(args.out or "look.html", parts)
    print(f"{args.out or 'look.html'}: open it in a browser")


# ======== a page to look at and to listen to ========

STYLE = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanoSpidR</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 1100px; margin: auto; padding: 1em }
svg { overflow: visible; font-size: 11px; fill: currentColor; margin: 14px }
svg path, svg polyline { fill: none; stroke: currentColor }
.wide { overflow-x: auto } audio { display: block; margin: 8px 0 }
td, th { padding: 0 1em 0 0; text-align: left; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { image { filter: invert(1) } }
</style>"""
COLOURS = "#4477dd #cc6633 #339955 #aa44aa #888888 #cc4466".split()


def png(picture):
    """A picture [H, W] of numbers from 0 (white) to 1 (black), as a data URL."""
    height, width = picture.shape
    lines = (255 * (1 - picture)).astype(np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in (b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""):
        checksum = zlib.crc32(kind + part)
        content += struct.pack(">I", len(part)) + kind + part + struct.pack(">I", checksum)
    return "data:image/png;base64," + base64.b64encode(content).decode()


def spectrogram(wav):
    """[N] -> [128, T] from 0 to 1: 60 decibels, 0 to 8 kHz, a column every 5 ms."""
    power = torch.stft(wav, 512, 80, 400, torch.hann_window(400), return_complex=True).abs()
    decibel = 20 * torch.log10(power + 1e-5)
    decibel = (decibel - decibel.max()).clamp(-60, 0).flip(0)[1:]
    return (1 + decibel.reshape(128, 2, -1).mean(1) / 60).numpy()


def sound(wav):
    file, wav = io.BytesIO(), 0.9 * wav / wav.abs().max()
    soundfile.write(file, wav.numpy(), data.SAMPLE_RATE, format="WAV")
    source = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls src="data:audio/wav;base64,{source}"></audio>'


def lane(labels, seconds, y, scale):
    """A row of boxes, one for each run of equal labels, of which each lasts `seconds`."""
    shapes, at = [], 0.0
    for label, run in itertools.groupby(labels):
        width = scale * seconds * len([*run])
        hue = zlib.crc32(str(label).encode()) % 360  # the same label, the same colour
        shapes.append(f'<rect x="{at:.1f}" y="{y}" width="{width:.1f}" height="18" stroke-width='
                      f'"0.3" stroke="currentColor" fill="hsl({hue} 60% 50% / 0.35)"/>')
        if width > 7 * len(str(label)):
            shapes.append(f'<text x="{at + width / 2:.1f}" y="{y + 13}" text-anchor="middle">'
                          f'{html.escape(str(label))}</text>')
        at += width
    return shapes


def utterance(row, encoders, phones=None, layer=None, scale=200, most=20):
    """A recording to listen to, at most 20 s of it; below its spectrogram its phones, if they are
    known, and the units that each model makes of it. A second is `scale` pixels wide."""
    wav, lanes = read_recording(row)[: most * data.SAMPLE_RATE], {}
    if phones:
        lanes["phones"] = phones[: most * 100], 0.01
    for name, encoder in encoders.items():
        number = encoder.layer(layer, units=True)
        units = encoder.units(wav)[number - encoder.layers - 1].tolist()
        lanes[f"{name} units of layer {number}".strip()] = units, 1 / RATE
    width = scale * len(wav) / data.SAMPLE_RATE
    shapes = [f'<image href="{png(spectrogram(wav))}" width="{width:.0f}" height="128" '
              'preserveAspectRatio="none"/>']
    for i, (name, (labels, seconds)) in enumerate(lanes.items()):
        shapes += [f'<text x="0" y="{154 + 42 * i}">{html.escape(name)}</text>']
        shapes += lane(labels, seconds, 158 + 42 * i, scale)
    size = f'width="{width:.0f}" height="{150 + 42 * len(lanes)}"'
    return f'{sound(wav)}<div class="wide"><svg {size}>{"".join(shapes)}</svg></div>'


def plot(title, lines):
    """Curves {name: [(x, y)]} with axes and ticks at round numbers."""
    points = np.array([point for line in lines.values() for point in line] or [(0, 0)], float)
    (x0, y0), (x1, y1) = points.min(0), np.maximum(points.max(0), points.min(0) + 1e-9)
    shapes = [f'<text y="-6">{title}</text><path d="M0 0V160H280"/>']
    for value in ticks(x0, x1):
        shapes.append(f'<text x="{280 * (value - x0) / (x1 - x0):.0f}" y="175" '
                      f'text-anchor="middle">{value:g}</text>')
    for value in ticks(y0, y1):
        shapes.append(f'<text x="-4" y="{164 - 160 * (value - y0) / (y1 - y0):.0f}" '
                      f'text-anchor="end">{value:g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        drawn = " ".join(f"{280 * (x - x0) / (x1 - x0):.1f},{160 - 160 * (y - y0) / (y1 - y0):.1f}"
                         for x, y in line)
        shapes.append(f'<polyline points="{drawn}" style="stroke:{colour};stroke-width:2"/>'
                      f'<text y="{192 + 14 * i}" style="fill:{colour}">{html.escape(name)}</text>')
    return f'<svg width="310" height="{190 + 14 * len(lines)}">{"".join(shapes)}</svg>'


def ticks(low, high):
    """Some four round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def heat_map(units, phones, size=14):
    """The share of each phone that becomes each unit; units stand in the order of their phones."""
    names, tracks = labelled_tracks(units, phones)
    table = count_table(tracks, names)
    shares = table / table.sum(1, keepdims=True).clip(1)
    used = np.flatnonzero(table.sum(0))
    order = used[np.lexsort((-shares.max(0)[used], shares.argmax(0)[used]))]
    shapes = []
    for p, phone in enumerate(map(html.escape, names)):
        shapes.append(f'<text x="-4" y="{size * p + 11}" text-anchor="end">{phone}</text>')
        for v, unit in enumerate(order):
            share = shares[p, unit]
            shapes.append(f'<rect x="{size * v}" y="{size * p}" width="{size}" height="{size}" '
                          f'fill-opacity="{share:.2f}"><title>{phone}, unit {unit}: {share:.0%}'
                          '</title></rect>' if share > 0.005 else "")
    size = f'width="{size * len(order)}" height="{size * len(names)}"'
    return (f'<div class="wide"><svg style="margin-left:40px" {size}>{"".join(shapes)}</svg></div>')


def write_page(path, parts):
    Path(path).write_text("\n".join([STYLE, *parts, ""]), encoding="utf-8")


def html_table(header, rows):
    cells = [["<th>" + html.escape(str(x)) for x in header]]
    cells += [["<td>" + html.escape(f"{x:.3g}" if isinstance(x, float) else str(x)) for x in row]
              for row in rows]
    lines = "".join("<tr>" + "".join(row) for row in cells)
    return f'<div class="wide"><table>{lines}</table></div>'


# ======== command line ========


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a run, a checkpoint, or a released model")
    parser.add_argument("--audio", help="a folder of audio, a manifest or one file")
    parser.add_argument("--alignments", help="its phones, if they are known")
    parser.add_argument("--layer", type=int, help="whose units [the second with a codebook]")
    parser.add_argument("--out", default="look.html")
    args = parser.parse_args()
    require(bool(args.model) == bool(args.audio), "--model and --audio belong together")
    run_look(args) if args.model else report()


if __name__ == "__main__":
    networks.run(main)
