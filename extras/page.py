"""A page to look at and to listen to, for a browser.

    python extras/page.py                                             the newest toy runs
    python extras/page.py --model M ... --audio A [--alignments P]    recordings and their units
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
from evaluate import (
    MEASURES, RATE, count_table, labelled_tracks, load_encoder, options_of, quality,
    read_phones, read_recording, spidr_encoder, units_of, write_json, write_outputs)
from extras import unit_lm
from extras.toy import TARGETS, toy, toy_encoders, toy_table
from model import SpidR, read_config, require, run

# ======== the report ========


def newest_runs():
    """{"stage: folder": folder} of each stage's newest run on the toy world that has weights."""
    newest = dict.fromkeys(("pretrain", "meta", "adapt"))
    for path in sorted(Path("runs").glob("*/last.pt"), key=lambda path: path.stat().st_mtime):
        o = options_of(path.parent)
        if o.get("toy") and not o.get("manifest") and not o.get("audio"):
            stage = "adapt" if "budget" in o else "meta" if "method" in o else "pretrain"
            newest[stage] = path.parent
    runs = {f"{stage}: {folder}": folder for stage, folder in newest.items() if folder}
    require(runs, "runs: no run on the toy world; 'python pretrain.py' makes one")
    return runs


def report():
    """The newest run of each stage on the toy world. The first time it trains a language model too,
    on the units of the first of them."""
    runs, language = newest_runs(), TARGETS[0]  # to which adapt.py adapts
    name, first = next(iter(runs.items()))
    world = toy(options_of(first)["toy"], ["eval", "lm"])
    torch.manual_seed(options_of(first)["seed"])
    fresh = SpidR(read_config(first / "config.json")).eval()
    encoders = {"untrained": spidr_encoder("untrained", fresh)} | toy_encoders(runs)
    tables = toy_table(world, encoders, every=True)
    rows = data.read_manifest(world / "eval" / f"{language}.csv")
    phones = read_phones(world / "eval" / f"{language}_alignments.csv")
    models = {name: encoder for name, encoder in encoders.items() if encoder.codebooks}
    units = {name: units_of(rows, encoder) for name, encoder in models.items()}
    measures = {name: quality(units[name], phones, encoder.codewords)
                for name, encoder in models.items()}

    where, lm = (f"runs/{kind}_{encoders[name].hash}" for kind in ("units", "lm"))
    if not Path(where).exists():
        audio = str(world / "lm" / "train.csv")
        write_outputs(evaluate.parse(["units", "--model", str(first), "--audio", audio,
                                      "--out", where]))
    unit_lm.train(["--preset", "tiny", "--units", where, "--out", lm])
    pairs = {}
    for task in "swuggy", "sblimp", "tsc":
        folder = str(world / "lm" / unit_lm.TASKS[task][0])
        pairs[task] = unit_lm.run(evaluate.parse(
            [task, "--lm", lm, "--model", str(first), "--data", folder]))
    results = dict(abx={name: table.tolist() for name, table in tables.items()},
                   language=language, quality=measures, pairs=pairs)
    write_json("runs/report.json", results)
    row = min(rows, key=lambda row: row.num_samples)
    parts = [*curves(results["abx"], runs), *tables_of(results, name),
             f"<h2>A recording of {language}, which no stage has heard</h2>",
              text("Below the spectrogram: the phones, and each model's units. In a good model "
                  "units change where phones do, and a phone has the same colours each time."),
             utterance(row, models, phones[row.fileid]),
             f"<h2>The units of each phone of {language}</h2>",
             heat_map(units[[*models][-1]], phones, [*models][-1])]
    write_page("runs/report.html", parts)
    print("\nruns/report.json, runs/report.html: open it in a browser")


def curves(abx, runs):
    """ABX by layer, and the stages' logs: a picture for each stage, with the same vertical axis."""
    across = {name: [line[1] for line in table] for name, table in abx.items()}
    untrained, deepest = across.pop("untrained"), max(map(len, across.values()))
    lines = {name: [*enumerate(np.resize(errors, deepest), 1)]  # MFCC is a level line
             for name, errors in across.items()}
    parts = ["<h1>What came of the runs</h1>", text(
        "ABX error across speakers of the three languages that are new to the model, by layer. "
        f"Lower is better; chance is 50%, the untrained network has {min(untrained):.0f} to "
        f"{max(untrained):.0f}%. A model that has learnt lies below MFCC in some layer."),
        plot("ABX error, %", lines, "layer")]
    for key, meaning in (
            ("loss", "Masked prediction: it falls within a stage. Each stage starts with other "
                     "codebooks, and a lower loss does not mean better units."),
            ("target_ppl", "Perplexity of the codewords in use. It should stay well above 1; a "
                           "fall towards 1 is a collapse."),
            ("phone_accuracy", "Share of frames whose phone the supervised steps find, half of the "
                               "frames masked. It rises; adaptation has no labels.")):
        logs = {}
        for name, folder in runs.items():
            records = map(json.loads, open(folder / "metrics.jsonl"))
            logs[name] = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        values = [y for log in logs.values() for _, y in log]
        if values:
            parts.append(text(meaning))
            parts += [plot(key, {name: log}, "step", (min(values), max(values)))
                      for name, log in logs.items() if log]
    return parts


def tables_of(results, name):
    """Quality of units and the language model's scores, as tables."""
    rows = []
    for key, (shown, factor, unit, meaning) in MEASURES.items():
        rows.append([f"{shown}, {unit}", *(factor * found[key] for found in
                                           results["quality"].values()), meaning])
    accuracy = [[task, found["all"]["accuracy"]] for task, found in results["pairs"].items()]
    return [f"<h2>Quality of units, {results['language']}</h2>",
            text("On the language to which adapt.py adapts. PNMI says most: higher is better."),
            html_table(["", *results["quality"], ""], rows),
            "<h2>A language model on the units</h2>",
            text(f"Trained on the units of {name}: how often it prefers the word, the grammatical "
                 "sentence, the right end of a story. 50% is chance; the toy tests are small, so "
                 "differences under 10 points mean nothing."),
            html_table(["", "pairs, %"], accuracy)]


def look(args):
    """Some recordings: to see and to hear what their units are, by one model or by several, such as
    before and after adaptation."""
    encoders = {name if args.model[1:] else "": load_encoder(name) for name in args.model}
    layers = {encoder.layer(args.layer, units=True) for encoder in encoders.values()}
    rows = data.read_manifest(args.audio)
    phones = read_phones(args.alignments) if args.alignments else {}
    title = f"{', '.join(args.model)}, layer {', '.join(map(str, sorted(layers)))}"
    parts = [f"<h1>{html.escape(title)}</h1>",
             text("A box is a run of one unit, and a unit has the same colour everywhere. Listen "
                  "whether it also has the same sound.")]
    for row in rows[:5]:
        parts += [f"<h2>{html.escape(row.fileid)}</h2>",
                  utterance(row, encoders, phones.get(row.fileid), args.layer)]
    for encoder in encoders.values() if phones else ():
        units = units_of([row for row in rows if row.fileid in phones], encoder, args.layer)
        parts += ["<h2>The units of each phone</h2>", heat_map(units, phones, encoder.name)]
    write_page(args.out, parts)
    print(f"{args.out}: open it in a browser")


# ======== a page to look at and to listen to ========

STYLE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>nanoSpidR</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 1100px; margin: auto; padding: 1em }
p { max-width: 44em; margin: 1em 0 0 }
svg { overflow: visible; font-size: 11px; fill: currentColor; margin: 22px 14px 8px 34px }
svg path, svg polyline { fill: none; stroke: currentColor }
.wide { overflow-x: auto } .wide svg { margin-left: 0 } audio { display: block; margin: 8px 0 }
td, th { padding: 0 1em 0 0; text-align: left; font-variant-numeric: tabular-nums }
td:last-child { min-width: 9em }
@media (prefers-color-scheme: dark) { image { filter: invert(1) } }
</style>"""
COLOURS = "#4477dd #cc6633 #339955 #aa44aa #888888 #cc4466".split()


def text(words):
    return f"<p>{html.escape(words)}</p>"


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
        units = encoder.units(wav)[number].tolist()
        lanes[f"{name} units of layer {number}".strip()] = units, 1 / RATE
    width = scale * len(wav) / data.SAMPLE_RATE
    shapes = [f'<image href="{png(spectrogram(wav))}" width="{width:.0f}" height="128" '
              'preserveAspectRatio="none"/>']
    for i, (name, (labels, seconds)) in enumerate(lanes.items()):
        shapes += [f'<text x="0" y="{154 + 42 * i}">{html.escape(name)}</text>']
        shapes += lane(labels, seconds, 158 + 42 * i, scale)
    size = f'width="{width:.0f}" height="{150 + 42 * len(lanes)}"'
    return f'{sound(wav)}<div class="wide"><svg {size}>{"".join(shapes)}</svg></div>'


def plot(title, lines, x_name, y_limits=None):
    """Curves {name: [(x, y)]} with axes and ticks at round numbers."""
    points = np.array([point for line in lines.values() for point in line], float)
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    y0, y1 = y_limits or (y0, y1)
    x0 = 0 if x_name == "step" else x0
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1e-3)

    def place(x, y):
        return 270 * (x - x0) / (x1 - x0), 160 - 160 * (y - y0) / (y1 - y0)

    shapes = [f'<text x="-30" y="-10">{title}</text><path d="M0 0V160H270"/>'
              f'<text x="270" y="190" text-anchor="end">{x_name}</text>']
    for value in ticks(x0, x1):
        shapes.append(f'<text x="{place(value, y0)[0]:.0f}" y="175" text-anchor="middle">'
                      f'{value:g}</text>')
    for value in ticks(y0, y1):
        shapes.append(f'<text x="-4" y="{place(x0, value)[1] + 4:.0f}" text-anchor="end">'
                      f'{value:g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        drawn = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in line)
        x, y = place(*line[-1])
        shapes.append(f'<polyline points="{drawn}" style="stroke:{colour};stroke-width:2"/>'
                      f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>'
                      f'<text y="{192 + 14 * i}" style="fill:{colour}">{html.escape(name)}</text>')
    return f'<svg width="280" height="{190 + 14 * len(lines)}">{"".join(shapes)}</svg>'


def ticks(low, high):
    """Some four round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def heat_map(units, phones, model, size=14):
    """The share of each phone that becomes each unit; units stand in the order of their phones."""
    names, tracks = labelled_tracks(units, phones)
    rows = sorted(range(len(names)), key=names.__getitem__)
    table = count_table(tracks, names)[rows]
    shares = table / table.sum(1, keepdims=True).clip(1)
    used = np.flatnonzero(table.sum(0))
    order = used[np.lexsort((-shares.max(0)[used], shares.argmax(0)[used]))]
    shapes = []
    for p, phone in enumerate(html.escape(names[row]) for row in rows):
        shapes.append(f'<text x="36" y="{size * p + 11}" text-anchor="end">{phone}</text>')
        shapes += [f'<rect x="{40 + size * v}" y="{size * p}" width="{size}" height="{size}" '
                   f'fill-opacity="{shares[p, unit]:.2f}"><title>{phone}, unit {unit}: '
                   f'{shares[p, unit]:.0%}</title></rect>'
                   for v, unit in enumerate(order) if shares[p, unit] > 0.005]
    size = f'width="{40 + size * len(order)}" height="{size * len(names)}"'
    return (text(f"{model}: a row is a phone, a column one of the {len(order)} units in use; black "
                 "(in a dark page white) means always. A clean staircase: each unit has its phone. "
                 "Point at a square for its numbers.")
            + f'<div class="wide"><svg {size}>{"".join(shapes)}</svg></div>')


def write_page(path, parts):
    Path(path).write_text("\n".join([STYLE, *parts, ""]), encoding="utf-8")


def html_table(header, rows):
    cells = [["<th>" + html.escape(str(x)) for x in header]]
    cells += [["<td>" + html.escape(f"{x:.2f}" if isinstance(x, float) else str(x)) for x in row]
              for row in rows]
    lines = "".join("<tr>" + "".join(row) for row in cells)
    return f'<div class="wide"><table>{lines}</table></div>'


# ======== command line ========


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", help="runs, checkpoints, or released models")
    parser.add_argument("--audio", help="a folder of audio, a manifest or one file")
    parser.add_argument("--alignments", help="its phones, if they are known")
    parser.add_argument("--layer", type=int, help="whose units [the second with a codebook]")
    parser.add_argument("--out", default="look.html")
    args = parser.parse_args()
    require(bool(args.model) == bool(args.audio), "--model and --audio belong together")
    look(args) if args.model else report()


if __name__ == "__main__":
    run(main)
