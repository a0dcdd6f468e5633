"""The experiments behind README's "Results", and their pictures.

    python assets/experiments.py table --seed 0      # and labels, layers, batch, grid, far, maml
    python assets/experiments.py draw                # assets/*.svg and the README's tables, of all

in the repository's folder. Each result is a line of assets/results/NAME.jsonl, the runs are in
runs/experiments. Where it was killed, the same command goes on. Two of them run side by side with
OMP_NUM_THREADS=1. They show how the method works on the toy world, not how well it works on speech.
"""

import argparse
import csv
import functools
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import data
import evaluate
import model as spidr

RUNS, RESULTS, TOY = Path("runs/experiments"), Path("assets/results"), Path("runs/toy")
LAYER = 3


def run(script, *words):
    """python script words -> what it prints. What it says on standard error goes to log.txt."""
    words = [sys.executable, script, *map(str, words)]
    print("$", *words[1:], flush=True)
    with open(RUNS / "log.txt", "a") as log:
        return subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=log).stdout.decode()


def results(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def known(name, **key):
    return any(row.items() >= key.items() for row in results(name))


def record(name, key, found):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(key | found) + "\n")


@functools.cache
def pretrained(start, seed, *more):
    """A pretrained model: ssl without labels, sl with labels in every second step."""
    out = RUNS / f"{start}{seed}"
    labels = [] if start == "sl" else ["--supervised-every", 0]
    run("pretrain.py", "--seed", seed, "--out", out, *labels, "--keep-every", 100, *more)
    return out


@functools.cache
def then(start, seed, method, *more, labels=""):
    """What comes between pretraining and adaptation. The control has the 600 steps of all workers
    of FOBLO, 200 of them with labels, and no episodes. single has one worker, and so as many
    labelled steps in a row as the control."""
    init, out = pretrained(start, seed), RUNS / f"{start}-{method}{labels}{seed}"
    common = "--init", init, "--seed", seed, "--out", out, *more
    if method == "control":
        run("pretrain.py", *common, "--steps", 600, "--supervised-every", 3, "--lr", 1e-3)
    elif method == "single":
        run("meta_train.py", *common, "--workers", 1, "--updates", 20)
    else:
        run("meta_train.py", *common, "--method", method)
    return out


def last(model, name):
    """What a run's log says last of this."""
    log = [json.loads(line) for line in open(model / "metrics.jsonl")]
    return [row[name] for row in log if name in row][-1]


def discover(name, key, model, languages=data.TARGETS, world="discophon"):
    """All measures of a model, language by language."""
    if all(known(name, **key, language=language) for language in languages):
        return
    out = model / "discophon"
    run("evaluate.py", "discophon", "--model", model, "--data", TOY / world, "--out", out,
        "--languages", ",".join(languages), "--layer", LAYER)
    found = json.loads((out / "discophon-test.json").read_text())["results"]
    for language in languages:
        if not known(name, **key, language=language):
            record(name, key | {"language": language}, found[language])


# ======== the papers' table ========

MODELS = [start + then for start in ("sl", "ssl")
          for then in ("", "-foblo", "-reptile", "-control", "-single")]


def table(seed, minutes, models):
    """From SSL and from SSL/SL: nothing, Reptile, FOBLO and the control, each before adaptation
    and after some minutes of audio."""
    for amount, name in itertools.product(minutes, models or MODELS):
        start, _, method = name.partition("-")
        model = then(start, seed, method) if method else pretrained(start, seed)
        key = {"seed": seed, "model": name, "minutes": amount}
        if amount == 0:
            discover("table", key, model)
            continue
        for language in data.TARGETS:
            if not known("table", **key, language=language):
                out = adapted(model, seed, TOY / "target" / f"{language}.csv", amount)
                discover("table", key, out, [language])


def adapted(init, seed, audio, minutes):
    out = RUNS / f"adapted-{init.name}-{audio.stem}-{minutes}min"
    run("adapt.py", "--init", init, "--seed", seed, "--out", out, "--audio", audio,
        "--budget", f"{minutes}min", "--held-out", 0)
    return out


# ======== few labels ========

AMOUNTS = 60, 10


def few_labels(seconds):
    """The alignments of the first recordings of each language, `seconds` of them or a bit more."""
    with open(TOY / "train_alignments.csv", newline="") as file:
        rows, taken = list(csv.DictReader(file)), []
    for language in data.SOURCES:
        amount = 0
        for row in rows:
            if row["language"] == language and amount < seconds:
                amount += row["phones"].count(" ") / 100
                taken.append(row)
    out = RUNS / f"labels-{seconds}s.csv"
    data.write_csv(out, "fileid phones language", taken)
    return out


def labels(seed):
    """FOBLO and the control from SSL, with labels of a minute and of ten seconds a language."""
    for seconds in AMOUNTS:
        audio = "--manifest", TOY / "train.csv", "--alignments", few_labels(seconds)
        for method in "foblo", "control":
            model = then("ssl", seed, method, *audio, "--preset", "tiny", labels=f"-{seconds}s-")
            key = {"seed": seed, "seconds": seconds, "then": method}
            discover("labels", key | {"phone_accuracy": last(model, "phone_accuracy")}, model)


# ======== stability by layer ========


@torch.no_grad()
def teacher_labels(checkpoint):
    """The teacher's labels [K, frames] of a few recordings of the unseen languages."""
    net, labels = spidr.load(checkpoint).eval(), []
    for language in data.TARGETS:
        for row in data.read_manifest(TOY / "eval" / f"{language}.csv")[:4]:
            wav = data.standardise(data.read_audio(row.path))[None]
            everywhere = torch.ones(1, net.encode(wav)[0].shape[1], dtype=torch.bool)
            _, targets = net.masked_frames(wav, everywhere)
            labels.append(net.assign(targets))
    return torch.cat(labels, 1)


def layers(seed):
    """SpidR and DinoSR without labels: the perplexity of the codewords used, how many are, and the
    share of frames whose label is another than a hundred steps before, by codebook."""
    for objective in "spidr", "dinosr":
        start = "ssl" if objective == "spidr" else "dinosr"
        model = pretrained(start, seed, "--objective", objective)
        before, paths = None, sorted(model.glob("step_*.pt"), key=lambda p: int(p.stem[5:]))
        for path in paths:
            found = teacher_labels(path)
            for codebook, now in enumerate(found):
                used = torch.bincount(now).double() / len(now)
                used = used[used > 0]
                key = {"seed": seed, "objective": objective, "codebook": codebook,
                       "step": int(path.stem[5:])}
                if not known("layers", **key):
                    record("layers", key, {
                        "target_ppl": float((-(used * used.log()).sum()).exp()),
                        "active": len(used), "changed": None if before is None
                        else float((before[codebook] != now).double().mean())})
            before = found


# ======== batch and rate ========

BATCHES = (8, 16, 32), (1e-3, 2e-3, 4e-3)


def batch(seed):
    """Pretraining without labels with batches of 8, 16 and 32 s and three rates."""
    for seconds, rate in itertools.product(*BATCHES):
        out = RUNS / f"batch-{seconds}s-{rate}-{seed}"
        run("pretrain.py", "--seed", seed, "--supervised-every", 0, "--out", out, "--lr", rate,
            "--batch-samples", seconds * 16_000)
        key = {"seed": seed, "seconds": seconds, "lr": rate}
        discover("batch", key | {"target_ppl": last(out, "target_ppl")}, out)


# ======== the grid of FOBLO ========

GRID = (0.3, 1, 3), (10, 20, 40), (1, 0.999, 0.99)


def grid(seed):
    """FOBLO from SSL by beta, inner steps and the teacher's decay."""
    for beta, inner, decay in itertools.product(*GRID):
        model = then("ssl", seed, "foblo", "--beta", beta, "--inner-steps", inner,
                     "--ema-start", decay, labels=f"-{beta}-{inner}-{decay}-")
        discover("grid", {"seed": seed, "beta": beta, "inner_steps": inner, "decay": decay}, model)


# ======== MAML ========

INNER = 1, 2, 4, 8, 16, 32
BETAS = [("foblo", beta) for beta in (0.3, 1, 3)] + [("maml", beta) for beta in (0.003, 0.01, 0.03)]

def maml(seed):
    """An episode by inner steps M: seconds, memory and meta-gradient of FOBLO and of MAML."""
    init = pretrained("sl", seed)
    for steps in INNER:
        if not known("maml", seed=seed, inner_steps=steps, way="maml"):
            printed = run("meta_train.py", "--measure", "--init", init, "--seed", seed,
                          "--inner-steps", steps, "--outer-steps", 1)
            for line in printed.splitlines():
                if line.startswith("{"):
                    record("maml", {"seed": seed}, json.loads(line))


def follow(seed):
    """Phi after ten meta-updates of FOBLO and of MAML, by inner steps M and beta."""
    for steps, (method, beta) in itertools.product(INNER[::2], BETAS):
        model = then("ssl", seed, method, "--inner-steps", steps, "--beta", beta,
                     labels=f"-M{steps}-{beta}-")
        key = {"seed": seed, "method": method, "inner_steps": steps, "beta": beta}
        discover("follow", key, model)


# ======== far languages ========

KINDS = {  # of contrast: the phones that are told from one another
    "tonu": {"tone": ["a1 a2 a3 a4", "i1 i2 i3 i4", "u1 u2 u3 u4"],
             "vowel": ["a1 i1 u1", "a2 i2 u2", "a3 i3 u3", "a4 i4 u4"],
             "consonant": ["p t k m n s l"]},
    "qxan": {"click": ["| ! ||"], "ejective": ["p' t' k' ts'"], "vowel": ["i e a o u"],
             "consonant": ["t k m n s"]},
}


def by_contrast(model, language):
    """ABX across speakers, in any context, by kind of contrast: a mean over its sets of phones."""
    part = data.toy(TOY, ["far_eval"]) / "far_eval"
    encoder = evaluate.load_encoder(str(model))
    layer = LAYER if encoder.codebooks else 1
    rows = data.read_manifest(part / f"{language}.csv")
    features = {file: frames for file, (frames,) in evaluate.extract(rows, encoder, [layer])}
    head, *lines = (part / f"{language}.item").read_text().splitlines()
    found = {}
    for kind, sets in KINDS[language].items():
        errors = []
        for phones in map(str.split, sets):
            items = RUNS / f"{language}-{os.getpid()}.item"
            some = [line for line in lines if line.split()[3] in phones]
            items.write_text("\n".join([head, *some, ""]))
            errors.append(evaluate.abx(features, items, "across", "any", max_size_group=20))
        found[kind] = fmean(errors)
    return found


def far(seed):
    """Languages whose vowels differ by tone, or that have clicks and ejectives: before and after
    ten minutes of adaptation, by kind of contrast."""
    models = {"SSL/SL": pretrained("sl", seed), "SSL/SL + FOBLO": then("sl", seed, "foblo")}
    data.toy(TOY, ["far_target"])
    for language in data.FAR:
        for name, model in {"mfcc": "mfcc", **models}.items():
            key = {"seed": seed, "model": name, "minutes": 0, "language": language}
            if not known("far", **key):
                record("far", key, by_contrast(model, language))
            key["minutes"] = 10
            if name != "mfcc" and not known("far", **key):
                out = adapted(model, seed, TOY / "far_target" / f"{language}.csv", 10)
                record("far", key, by_contrast(out, language))


# ======== tables and pictures ========

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}"
font-family="-apple-system,'Segoe UI',Helvetica,Arial,sans-serif" font-size="11"><style>
svg {{ overflow: visible }} .page {{ fill: #fff }} text {{ fill: #1f2328 }}
path, polyline {{ fill: none; stroke: #59636e }}
@media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} }}
</style><rect class="page" width="{0}" height="{1}" rx="6"/>
"""


def picture(name, plots, width=930, height=260):
    """evaluate.plot's curves side by side, in assets/NAME.svg."""
    placed = [plot.replace("<svg ", f'<svg x="{45 + 310 * i}" y="25" ', 1)
              for i, plot in enumerate(plots)]
    Path("assets", f"{name}.svg").write_text(
        HEAD.format(width, height) + "\n".join([*placed, "</svg>", ""]))


def spread(values):
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.2f} ± {np.std(values):.2f}" if len(values) > 1 else (
        f"{values[0]:.2f}" if values else "")


def by_seed(rows, measure):
    """Of each seed the mean over languages."""
    seeds = defaultdict(list)
    for row in rows:
        if measure in row:
            seeds[row["seed"]].append(row[measure])
    return spread([fmean(found) for found in seeds.values()])


def where(rows, **key):
    return [row for row in rows if row.items() >= key.items()]


def markdown(title, header, lines):
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")


MEASURES = "features across", "units across", "pnmi", "per", "f1", "r_value"


def draw(_):
    rows = results("table")
    names = list(dict.fromkeys(row["model"] for row in rows))
    for measure in MEASURES:
        markdown(f"table: {measure}", ["", "0 min", "1 min", "3 min", "10 min"],
                 [[name, *(by_seed(where(rows, model=name, minutes=m), measure)
                           for m in (0, 1, 3, 10))] for name in names])
    for name, keys in (("labels", "seconds then"), ("batch", "seconds lr"),
                       ("follow", "method inner_steps beta"),
                       ("grid", "beta inner_steps decay")):
        rows, keys = results(name), keys.split()
        found = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
        more = {"labels": ["phone_accuracy"], "batch": ["target_ppl"]}.get(name, [])
        measures = [*MEASURES[:3], *more]
        markdown(name, keys + measures, [
            [*values, *(by_seed(where(rows, **dict(zip(keys, values))), m) for m in measures)]
            for values in found])
    rows = results("far")
    for language, kinds in KINDS.items():
        markdown(f"far: {language}", ["", "minutes", *kinds], [
            [name, minutes, *(by_seed(where(rows, language=language, model=name, minutes=minutes),
                                      kind) for kind in kinds)]
            for name, minutes in dict.fromkeys((r["model"], r["minutes"]) for r in rows)])
    draw_layers(results("layers"))
    draw_maml(results("maml"))


def draw_layers(rows):
    plots = []
    for measure, title in (("target_ppl", "perplexity of the codewords used"),
                           ("active", "codewords in use"),
                           ("changed", "share of labels that change in 100 steps")):
        lines = defaultdict(list)
        for (objective, codebook, step), some in grouped(rows, "objective codebook step").items():
            if some[0][measure] is not None:
                lines[f"{objective}, codebook {codebook}"].append(
                    (step, fmean(row[measure] for row in some)))
        plots.append(evaluate.plot(title, lines))
    picture("layers", plots, height=310)


def draw_maml(rows):
    plots = []
    for measure, title in (("seconds", "seconds of an episode, by inner steps M"),
                           ("peak_memory_gib", "peak memory, GiB"),
                           ("cosine", "cosine to FOBLO's meta-gradient")):
        lines = defaultdict(list)
        for (way, steps), some in grouped(rows, "way inner_steps").items():
            lines[way].append((steps, fmean(row[measure] for row in some)))
        plots.append(evaluate.plot(title, lines))
    picture("maml", plots)


def grouped(rows, keys):
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys.split())].append(row)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    experiments = table, labels, layers, batch, grid, far, maml, follow, draw
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[f.__name__ for f in experiments])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=int, nargs="+", default=[0, 10, 3, 1], help="table")
    parser.add_argument("--models", nargs="+", help="table: such as sl-foblo; unless given all")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    data.toy(TOY)
    more = (args.minutes, args.models) if args.experiment == "table" else ()
    {f.__name__: f for f in experiments}[args.experiment](args.seed, *more)
