"""The experiments behind docs/findings.md and their pictures.

    python extras/experiments.py real --seed 0     # with the corpus of extras/speech.py, as are
                                                   # curve and adaptation
    python extras/experiments.py table --seed 0    # with the toy world, as are the others:
                                                   # labels, layers, batch, grid, far, maml, follow
    python extras/experiments.py draw              # docs/results/README.md, docs/*.svg

in the repository's folder. Each result is a line of docs/results/NAME.jsonl, the runs are in
runs/experiments. Where it was killed, the same command goes on. Two of them run side by side with
OMP_NUM_THREADS=1.
"""

import argparse
import csv
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import data
import evaluate
import model as networks
import pretrain
from extras import page, speech, toy
from model import require

RUNS, RESULTS, TOY = Path("runs/experiments"), Path("docs/results"), Path("runs/toy")
LAYER = 3


def run(script, *words):
    """python script words -> what it prints. What it says on standard error goes to log.txt."""
    words = [script, *map(str, words)]
    print("$ python", *words, flush=True)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    with open(RUNS / "log.txt", "a") as log:
        log.write(done.stderr)
    require(done.returncode == 0, f"{script} failed: {done.stderr.strip()[-300:]}")
    return done.stdout


def results(name):
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def known(name, **key):
    return any(row.items() >= key.items() for row in results(name))


def record(name, key, found):
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(key | found) + "\n")


@functools.cache
def pretrained(start, seed, *more, name=""):
    """A pretrained model: with labels in every second step, or ssl, without any."""
    out = RUNS / f"{start}{seed}{name}"
    labels = ["--supervised-every", 0] if start == "ssl" else []
    run("pretrain.py", "--seed", seed, "--out", out, *labels, "--keep-every", 100, *more)
    return out


@functools.cache
def then(init, seed, method, *more, name=""):
    """What comes between pretraining and adaptation. The control has the 600 steps of all workers
    of FOBLO, 200 of them with labels, and no episodes. single has one worker, and so as many
    labelled steps in a row as the control."""
    out = RUNS / f"{init.name}-{method}{name}"
    common = "--init", init, "--seed", seed, "--out", out, *more
    if method == "control":
        run("pretrain.py", *common, "--steps", 600, "--supervised-every", 3, "--lr", 1e-3)
    elif method == "single":
        run("meta_train.py", *common, "--workers", 1, "--updates", 20)
    elif method == "maml":
        run("extras/maml.py", *common)
    else:
        run("meta_train.py", *common, "--method", method)
    return out


def last(model, *names):
    """What a run's log says last of these."""
    log = [json.loads(line) for line in open(model / "metrics.jsonl")]
    return {name: [row[name] for row in log if name in row][-1] for name in names}


def discover(name, key, model, languages=toy.TARGETS):
    """All measures of a model, language by language."""
    if all(known(name, **key, language=language) for language in languages):
        return
    out = model / "discophon"
    run("evaluate.py", "discophon", "--model", model, "--data", TOY / "discophon",
        "--out", out, "--languages", ",".join(languages), "--layer", LAYER)
    found = json.loads((out / "discophon-test.json").read_text())["results"]
    for language in languages:
        if not known(name, **key, language=language):
            record(name, key | {"language": language}, found[language])


# ======== the papers' table ========

MODELS = [start + method for start in ("sl", "ssl")
          for method in ("", "-foblo", "-reptile", "-control", "-single")]


def table(seed, minutes, models):
    """From SSL and from SSL/SL: nothing, Reptile, FOBLO and the control, each before adaptation
    and after some minutes of audio."""
    for amount, name in itertools.product(minutes, models or MODELS):
        start, _, method = name.partition("-")
        model = pretrained(start, seed)
        model = then(model, seed, method) if method else model
        key = {"seed": seed, "model": name, "minutes": amount}
        if amount == 0:
            discover("table", key, model)
            continue
        for language in toy.TARGETS:
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
    for language in toy.SOURCES:
        amount = 0
        for row in rows:
            if row["language"] == language and amount < seconds:
                amount += row["phones"].count(" ") / 100
                taken.append(row)
    out = RUNS / f"labels-{seconds}s.csv"
    data.write_csv(out, "fileid phones language", taken)
    return out


def labels(seed):
    """Labels of a minute and of ten seconds a language: pretraining with them, then FOBLO or the
    control with the same ones."""
    for seconds in AMOUNTS:
        audio = "--manifest", TOY / "train.csv", "--alignments", few_labels(seconds)
        init = pretrained(f"few{seconds}s", seed, *audio, "--preset", "tiny")
        for method in "", "foblo", "control":
            model = then(init, seed, method, *audio, "--preset", "tiny") if method else init
            key = {"seed": seed, "seconds": seconds, "then": method}
            discover("labels", key | last(model, "phone_accuracy"), model)


# ======== stability by layer ========


@torch.no_grad()
def teacher_labels(checkpoint):
    """The teacher's labels [K, frames] of a few recordings of the unseen languages."""
    net, labels = networks.load(checkpoint).eval(), []
    for language in toy.TARGETS:
        for row in data.read_manifest(TOY / "eval" / f"{language}.csv")[:4]:
            wav = data.standardise(data.read_audio(row.path))[None]
            everywhere = torch.ones(1, net.encode(wav)[0].shape[1], dtype=torch.bool)
            _, targets = net.masked_frames(wav, everywhere)
            labels.append(net.assign(targets))
    return torch.cat(labels, 1)


def layers(seed):
    """SpidR and DinoSR, from audio alone and with labels: the perplexity of the teacher's labels,
    how many codewords they are, and the share of frames whose label is another than a hundred steps
    before, by codebook."""
    for start, objective in itertools.product(("ssl", "sl"), ("spidr", "dinosr")):
        model = pretrained(start, seed, "--objective", objective,
                           name="-dinosr" * (objective == "dinosr"))
        before, paths = None, sorted(model.glob("step_*.pt"), key=lambda p: int(p.stem[5:]))
        for path in paths:
            found = teacher_labels(path)
            for codebook, now in enumerate(found):
                used = torch.bincount(now).double() / len(now)
                used = used[used > 0]
                key = {"seed": seed, "start": start, "objective": objective,
                       "codebook": codebook, "step": int(path.stem[5:])}
                if not known("layers", **key):
                    record("layers", key, {
                        "target_ppl": float((-(used * used.log()).sum()).exp()),
                        "active": len(used), "changed": None if before is None
                        else float((before[codebook] != now).double().mean())})
            before = found


# ======== batch and rate ========

BATCHES = (4, 8, 16), (1e-3, 2e-3, 4e-3)


def batch(seed):
    """Pretraining with batches of 4, 8 and 16 s and three rates."""
    for seconds, rate in itertools.product(*BATCHES):
        out = RUNS / f"batch-{seconds}s-{rate}-{seed}"
        run("pretrain.py", "--seed", seed, "--out", out, "--lr", rate,
            "--batch-samples", seconds * 16_000)
        key = {"seed": seed, "seconds": seconds, "lr": rate}
        found = last(out, "loss", "target_ppl", "grad_norm", "phone_accuracy")
        discover("batch", key | found, out)


# ======== the grid of FOBLO ========

GRID = (0.3, 1, 3), (10, 20, 40), (1, 0.999, 0.99)


def grid(seed):
    """Five meta-updates of FOBLO, by beta, inner steps and the teacher's decay. Seed 0 goes over
    the whole grid, others over its corners."""
    init = pretrained("sl", seed)
    discover("table", {"seed": seed, "model": "sl", "minutes": 0}, init)
    for beta, inner, decay in itertools.product(*(x if seed == 0 else x[::2] for x in GRID)):
        key = {"seed": seed, "beta": beta, "inner_steps": inner, "decay": decay}
        try:
            model = then(init, seed, "foblo", "--updates", 5, "--beta", beta, "--inner-steps",
                         inner, "--ema-start", decay, name=f"-{beta}-{inner}-{decay}")
        except networks.InputError as error:
            if "finite gradient" not in str(error):
                raise
            record("grid", key, {"diverged": True})
        else:
            discover("grid", key | last(model, "target_ppl", "relative_delta"), model)


# ======== MAML ========

INNER = 1, 2, 4, 8, 16, 32
FOLLOW = (2, 8), [  # inner steps; method, meta-updates, beta
    ("foblo", 10, 0.3), ("foblo", 10, 1), ("foblo", 20, 0.3), ("foblo", 20, 1),
    ("maml", 10, 0.3), ("maml", 10, 1), ("maml", 10, 4)]


def measured(model, seed, inner, outer, *more):
    """What extras/maml.py --measure prints, as dicts."""
    printed = run("extras/maml.py", "--measure", "--init", model, "--seed", seed,
                  "--inner-steps", inner, "--outer-steps", outer, *more)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def maml(seed):
    """An episode by inner steps M: seconds, memory and meta-gradient of FOBLO and of MAML."""
    init = pretrained("sl", seed)
    for steps in INNER:
        if not known("maml", seed=seed, inner_steps=steps, way="maml"):
            for found in measured(init, seed, steps, 1):
                record("maml", {"seed": seed}, found)


def follow(seed):
    """The supervised loss at theta_M on held-out audio of a source language, with phi as it was and
    after meta-updates of FOBLO and of MAML. MAML's 10 take as long as about 20 of FOBLO."""
    init = pretrained("sl", seed)
    audio = TOY / "eval" / f"{toy.EVAL_SOURCES[0]}.csv"
    held_out = "--manifest", audio, "--alignments", f"{audio.with_suffix('')}_alignments.csv", \
        "--preset", "tiny"
    for steps, (method, updates, beta) in itertools.product(*FOLLOW):
        key = {"seed": seed, "inner_steps": steps, "method": method, "updates": updates,
               "beta": beta}
        if not known("follow", **key):
            model = then(init, seed, method, "--inner-steps", steps, "--updates", updates,
                         "--beta", beta, name=f"-M{steps}-{updates}-{beta}")
            losses = {name: measured(m, seed, steps, 4, *held_out)[0]["loss"]
                      for name, m in (("before", init), ("after", model))}
            record("follow", key, losses | last(model, "seconds"))


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
    part = toy.toy(TOY, ["far_eval"]) / "far_eval"
    encoder = evaluate.load_encoder(str(model))
    layer = LAYER if encoder.codebooks else 1
    rows = data.read_manifest(part / f"{language}.csv")
    features = {file: x[layer] for file, x in evaluate.extract(rows, encoder, [layer])}
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
    init = pretrained("sl", seed)
    models = {"SSL/SL": init, "SSL/SL + FOBLO": then(init, seed, "foblo")}
    toy.toy(TOY, ["far_target"])
    for language in toy.FAR:
        for name, model in {"mfcc": "mfcc", **models}.items():
            key = {"seed": seed, "model": name, "minutes": 0, "language": language}
            if not known("far", **key):
                record("far", key, by_contrast(model, language))
            key["minutes"] = 10
            if name != "mfcc" and not known("far", **key):
                out = adapted(model, seed, TOY / "far_target" / f"{language}.csv", 10)
                record("far", key, by_contrast(out, language))


# ======== real speech ========
# The corpus of extras/speech.py in runs/speech. Settings are chosen on English, which is held out
# of the sources for that; Mboshi is the test.

CORPUS, ENGLISH = Path("runs/speech"), RUNS / "english"
MBOSHI = CORPUS / "mboshi"
TESTS = {  # items, their audio and alignments, and the audio to adapt to
    "mboshi": (MBOSHI / "eval/mboshi.item", MBOSHI / "eval/manifest.csv",
               MBOSHI / "eval/alignments.csv", MBOSHI / "adapt/manifest.csv"),
    "english": (ENGLISH / "english.item", ENGLISH / "eval.csv", CORPUS / "alignments.csv",
                ENGLISH / "adapt.csv"),
}
SPEAKERS = "within", "across"
REAL = ("--preset", "small", "--manifest", CORPUS / "manifest.csv",
        "--alignments", CORPUS / "alignments.csv")
# From audio alone English is best after 400 steps, before the rate decays.
REAL_STEPS = {"sl": [], "ssl": "--steps 400 --warmup-steps 200 --hold-steps 200".split()}
CURVE = {"sl": 400, "ssl": 100}  # steps from one point to the next
REAL_MODELS = "mfcc", "untrained", *(name for name in MODELS if "single" not in name)


def hold_out_english():
    """Of each of the four labelled speakers three minutes to score, but half of theirs at most; the
    rest of them to adapt to; and the sources without English."""
    alignments = data.read_alignments(CORPUS / "alignments.csv")
    parts, speakers, items = defaultdict(list), defaultdict(list), []
    for row in data.read_manifest(CORPUS / "manifest.csv"):
        if row.language not in ("en", "en_zh"):
            parts["sources"].append(row)
        elif row.fileid in alignments and row.num_samples >= 24_000:
            speakers[re.match(r"ls-\d+|[a-z]+", row.fileid)[0]].append(row)
    for speaker, rows in sorted(speakers.items()):
        Random(0).shuffle(rows)
        left = min(180 * data.SAMPLE_RATE, sum(row.num_samples for row in rows) / 2)
        for row in rows:
            part = "eval" if left > 0 else "adapt"
            parts[part].append(row)
            left -= row.num_samples
            if part == "eval":
                items.append(dict(fileid=row.fileid, speaker=speaker,
                                  intervals=intervals(alignments[row.fileid][0])))
    for part, rows in parts.items():
        rows = [row._asdict() | {"path": Path(row.path).resolve()} for row in rows]
        data.write_csv(ENGLISH / f"{part}.csv", "fileid path num_samples language", rows)
    labels = [dict(fileid=fileid, phones=" ".join(phones), language=language)
              for fileid, (phones, language) in alignments.items() if language != "en"]
    data.write_csv(ENGLISH / "labels.csv", "fileid phones language", labels)
    speech.write_items(ENGLISH / "english.item", items)


def intervals(phones):
    """[(start, end, phone)] in seconds, of a phone every 10 ms."""
    end = 0
    for phone, frames in itertools.groupby(phones):
        start, end = end, end + len([*frames])
        yield start / 100, end / 100, phone


def measure(encoder, test):
    """All measures of LAYER, in percent."""
    items, audio, alignments, _ = TESTS[test]
    rows, layer = data.read_manifest(audio), min(LAYER, encoder.layers)
    features = {file: x[layer] for file, x in evaluate.extract(rows, encoder, [layer])}
    found = {f"features {speaker}": evaluate.abx(features, items, speaker) for speaker in SPEAKERS}
    if encoder.codewords:
        units = evaluate.units_of(rows, encoder, layer)
        found |= {f"units {speaker}": evaluate.abx(units, items, speaker, distance="identity")
                  for speaker in SPEAKERS}
        of_units = evaluate.quality(units, evaluate.read_phones(alignments))
        found |= {name: 100 * of_units[name] for name in ("pnmi", "per", "f1", "r_value")}
        found["active"] = of_units["active"]
    return {name: round(value, 2) for name, value in found.items()}


def real_model(name, seed):
    """A model of the table, trained if it is not there: "sl", "ssl-foblo"."""
    start, _, method = name.partition("-")
    model = pretrained(start, seed, *REAL, *REAL_STEPS[start], name="-real")
    return then(model, seed, method, *REAL) if method else model


def real(seed, minutes, models):
    """The papers' table on real speech: Mboshi, before adaptation and after 10 and 25 minutes."""
    for name, amount in itertools.product(models or REAL_MODELS, minutes):
        key = {"seed": seed, "model": name, "minutes": amount}
        if known("real", **key) or amount and name in ("mfcc", "untrained"):
            continue
        if name == "untrained":
            torch.manual_seed(seed)
            net = networks.SpidR(networks.Config(**networks.PRESETS["small"])).eval()
            encoder = evaluate.spidr_encoder(name, net)
        else:
            model = "mfcc" if name == "mfcc" else real_model(name, seed)
            if amount:
                model = adapted(model, seed, TESTS["mboshi"][3], amount)
            encoder = evaluate.load_encoder(str(model))
        record("real", key, measure(encoder, "mboshi"))


ADAPTATIONS = {  # what is changed in preset small's adaptation
    "as it is": "", "400 steps": "--steps 400", "rate 5e-4": "--lr 5e-4",
    "codebooks' decay 0.9": "--codebook-decay 0.9",
    "forgetting, codewords from noise, 5e-4":
        "--forgetting --codebook-start noise --lr 5e-4",
    "the same, 400 steps": "--forgetting --codebook-start noise --lr 5e-4 --steps 400",
    "forgetting, codewords from targets, 5e-4": "--forgetting --lr 5e-4",
    "the same, heads fitted in 200 steps": "--forgetting --lr 5e-4 --refit-steps 200",
    "moving teacher": "--ema-start 0.999", "moving teacher, 5e-4": "--ema-start 0.999 --lr 5e-4",
    "moving teacher, 1e-3": "--ema-start 0.999 --lr 1e-3",
    "moving teacher, 5e-5": "--ema-start 0.999 --lr 5e-5",
    "fast teacher": "--ema-start 0.99",
    "moving teacher, forgetting, codewords from noise":
        "--ema-start 0.999 --forgetting --codebook-start noise",
    "moving teacher, lora, 1e-3": "--ema-start 0.999 --method lora --lr 1e-3",
    "moving teacher, dama, 1e-3": "--ema-start 0.999 --method dama --lr 1e-3",
}


def adaptation(seed):
    """What makes adaptation help: from SSL/SL that has not heard English to English."""
    hold_out_english()
    sources = "--manifest", ENGLISH / "sources.csv", "--alignments", ENGLISH / "labels.csv"
    init = pretrained("sl", seed, "--preset", "small", *sources, name="-no-english")
    for name, words in {"before": None, **ADAPTATIONS}.items():
        key, out = {"seed": seed, "way": name}, init
        if not known("adaptation", **key):
            if words is not None:
                out = RUNS / "-".join(["english", str(seed), *name.replace(",", "").split()])
                run("adapt.py", "--init", init, "--seed", seed, "--out", out, "--held-out", 0,
                    "--audio", ENGLISH / "adapt.csv", *words.split())
            record("adaptation", key, measure(evaluate.load_encoder(str(out)), "english"))


def curve(seed):
    """ABX of Mboshi in the course of the training."""
    for start, every in CURVE.items():
        model = real_model(start, seed)
        for path in model.glob("step_*.pt"):
            key = {"seed": seed, "model": start, "step": int(path.stem.removeprefix("step_"))}
            if key["step"] % every == 0 and not known("curve", **key):
                [row] = [row for row in map(json.loads, open(model / "metrics.jsonl"))
                         if row["step"] == key["step"]]
                key["hours"] = round(row["audio_seconds"] / 3600, 2)
                record("curve", key, measure(evaluate.load_encoder(str(path)), "mboshi"))


# ======== tables and pictures ========

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" height="{1}"
font-family="-apple-system,'Segoe UI',Helvetica,Arial,sans-serif" font-size="11"><style>
svg {{ overflow: visible }} .page {{ fill: #fff }} text {{ fill: #1f2328 }}
path, polyline {{ fill: none; stroke: #59636e }}
@media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #e6edf3 }} }}
</style><rect class="page" width="{0}" height="{1}" rx="6"/>
"""


def picture(name, plots, height, width=960):
    """Plots side by side, in docs/NAME.svg."""
    placed = [plot.replace("<svg ", f'<svg x="{45 + 310 * i}" y="25" ', 1)
              for i, plot in enumerate(plots)]
    Path("docs", f"{name}.svg").write_text(
        HEAD.format(width, height) + "\n".join([*placed, "</svg>", ""]))


def by_seed(rows, measure):
    """Of each seed the mean over languages; of these mean ± standard deviation (seeds)."""
    seeds = defaultdict(list)
    for row in rows:
        if row.get(measure) is not None:
            seeds[row["seed"]].append(row[measure])
    most = max(map(len, seeds.values()), default=0)  # a seed with fewer languages is not done
    means = [fmean(found) for found in seeds.values() if len(found) == most]
    if not means:
        return ""
    spread = f" ± {np.std(means):.2f}" if len(means) > 1 else ""
    return f"{np.mean(means):.2f}{spread} ({len(means)})"


def where(rows, **key):
    return [row for row in rows if row.items() >= key.items()]


def table_of(title, header, lines):
    """Markdown, of lines of cells; nothing if there are none."""
    rows = [header, ["---"] * len(header), *lines] if lines else []
    return "\n".join([f"\n### {title}\n"] * bool(rows) +
                     [f"| {' | '.join(map(str, row))} |" for row in rows])


ABOUT = """# Results

Made by `python extras/experiments.py NAME --seed S`, written by `python extras/experiments.py
draw`. In percent: mean ± standard deviation over seeds (number of seeds).

## Real speech: preset small, Mboshi"""
ABOUT_TOY = """
## Toy world: preset tiny, of each seed the mean over the unseen languages"""
REAL_TABLES = {"real": ["model", "minutes"], "adaptation": ["way"], "curve": ["model", "step"]}
MEASURES = ["features across", "units across", "pnmi", "per", "f1", "r_value"]
TABLES = {  # columns that tell the rows apart, and the others
    "labels": ("seconds then", MEASURES[:3] + ["phone_accuracy"]),
    "batch": ("seconds lr", MEASURES[:3] + ["loss", "target_ppl", "grad_norm", "phone_accuracy"]),
    "grid": ("beta inner_steps decay", MEASURES[:3] + ["target_ppl"]),
    "maml": ("inner_steps way", ["seconds", "peak_memory_gib", "cosine"]),
    "layers": ("start objective codebook", ["target_ppl", "active", "changed"]),
    "follow": ("inner_steps method updates beta", ["before", "after", "seconds"]),
}


def draw(_):
    """docs/results/README.md and the pictures, of all results that are there."""
    parts, rows = [ABOUT], results("real")
    columns = [f"{kind} {one}" for kind in ("features", "units") for one in SPEAKERS]
    columns += ["pnmi", "per", "r_value", "active"]
    for name, keys in REAL_TABLES.items():
        found = dict.fromkeys(tuple(row[key] for key in keys) for row in results(name))
        parts.append(table_of(name, keys + columns, [
            [*values, *(by_seed(where(results(name), **dict(zip(keys, values))), column)
                        for column in columns)] for values in found]))
    parts, rows = [*parts, ABOUT_TOY], results("table")
    names = list(dict.fromkeys(row["model"] for row in rows))
    for measure in MEASURES:
        parts.append(table_of(
            f"table: {measure}", ["model", "0 min", "1 min", "3 min", "10 min"],
            [[name, *(by_seed(where(rows, model=name, minutes=m), measure) for m in (0, 1, 3, 10))]
             for name in names]))
    for name, (keys, measures) in TABLES.items():
        rows, keys = results(name), keys.split()
        if name == "layers":  # after the last step
            rows = where(rows, step=pretrain.PRESETS["tiny"]["steps"])
        found = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
        parts.append(table_of(name, keys + measures, [
            [*values, *(by_seed(where(rows, **dict(zip(keys, values))), m) for m in measures)]
            for values in found]))
    rows = results("far")
    for language, kinds in KINDS.items():
        parts.append(table_of(f"far: {language}", ["model", "minutes", *kinds], [
            [name, minutes, *(by_seed(where(rows, language=language, model=name, minutes=minutes),
                                      kind) for kind in kinds)]
            for name, minutes in dict.fromkeys((r["model"], r["minutes"]) for r in rows)]))
    (RESULTS / "README.md").write_text("\n".join(filter(None, parts)) + "\n")
    rows = [row for row in results("table") if row["model"].startswith("sl")]
    curves("table", rows, "minutes", "model", {
        "features across": "ABX of features, by minutes of adaptation",
        "units across": "ABX of units", "pnmi": "PNMI"})
    curves("layers", where(results("layers"), start="ssl"), "step", "objective codebook", {
        "target_ppl": "perplexity of the labels, by step",
        "active": "codewords in use (0: the lowest codebook)",
        "changed": "share of labels that change in 100 steps"})
    curves("maml", results("maml"), "inner_steps", "way", {
        "seconds": "seconds of an episode, by inner steps M", "peak_memory_gib": "peak memory, GiB",
        "cosine": "cosine to FOBLO's meta-gradient"})
    draw_grid(results("grid"), where(results("table"), model="sl", minutes=0))
    draw_curves(results("curve"))


def curves(name, rows, x, names, titles):
    """docs/NAME.svg: measures by x, means over languages and seeds, a line for each model."""
    if not rows:
        return
    plots = []
    for measure, title in titles.items():
        points = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row.get(measure) is not None:
                line = " ".join(str(row[key]) for key in names.split())
                points[line][row[x]].append(row[measure])
        lines = {line: [(x, fmean(values)) for x, values in sorted(points[line].items())]
                 for line in sorted(points)}
        if lines:
            plots.append(page.plot(title, lines, x))
    picture(name, plots, 250 + 14 * len(points))


# The authors' run at full size, lowest and highest of the eight codebooks: loss, target_ppl.
AUTHORS = {0: (5.54, 5.60, 51, 99), 5_000: (2.26, 2.49, 173, 206), 20_000: (1.57, 1.73, 181, 213),
           100_000: (1.06, 1.59, 180, 213), 400_000: (0.92, 1.40, 181, 213)}


def draw_curves(rows):
    """docs/curves.svg: ABX of a language never heard over the hours of real speech in training; and
    loss and perplexity of the authors' run, which is the one that base is to repeat."""
    if not rows:
        return
    shown = {"ssl": "SSL: audio alone", "sl": "SSL/SL: some labels"}
    points = defaultdict(lambda: defaultdict(list))
    for row in rows:
        points[shown[row["model"]]][row["step"]].append((row["hours"], row["features across"]))
    lines = {name: [tuple(map(fmean, zip(*found))) for _, found in sorted(line.items())]
             for name, line in points.items()}
    end = max(hours for line in lines.values() for hours, _ in line)
    mfcc = where(results("real"), model="mfcc")[0]["features across"]
    lines["MFCC: learns nothing"] = [(0, mfcc), (end, mfcc)]
    loss, perplexity = (
        {name: [(step / 1000, row[column + i]) for step, row in AUTHORS.items()]
         for i, name in enumerate(("the lowest of 8 codebooks", "the highest"))}
        for column in (0, 2))
    picture("curves", [
        page.plot("Mboshi, never heard: ABX error, %", lines, "hours of audio heard", (34, 46)),
        page.plot("full size, by the authors: loss", loss, "thousand steps", (0, 6)),
        page.plot("perplexity of the codewords", perplexity, "thousand steps", (0, 256))], 255)


def draw_grid(rows, before):
    """docs/grid.svg: how five meta-updates change ABX, a square for each decay of the teacher,
    beta by inner steps. What came to nothing is marked: diverged, collapsed, or less than 0.1."""
    if not rows or not before:
        return
    cells, start = defaultdict(list), {
        (row["seed"], row["language"]): row["features across"] for row in before}
    for row in rows:
        cells[row["decay"], row["beta"], row["inner_steps"]].append(row)
    change = {key: fmean(row["features across"] - start[row["seed"], row["language"]]
                         for row in found)
              for key, found in cells.items() if not any("diverged" in row for row in found)}
    plots, low, high = [], min(change.values()), max(change.values())
    for decay in GRID[2]:
        drawn = [f'<text y="-6">change of ABX, decay of the teacher {decay}</text>']
        for i, beta in enumerate(GRID[0]):
            drawn.append(f'<text x="-4" y="{50 * i + 30}" text-anchor="end">β {beta}</text>')
            for j, inner in enumerate(GRID[1]):
                key = decay, beta, inner
                words, moved = ["diverged"] * (key in cells), change.get(key, high)
                if key in change:
                    perplexity = fmean(row["target_ppl"] for row in cells[key])
                    words = [f"{moved:+.1f}", "collapsed" if perplexity < 3 else
                             "no change" if abs(moved) < 0.1 else ""]
                dark = 0.1 + 0.6 * (moved - low) / max(high - low, 1e-9)
                drawn.append(
                    f'<rect x="{80 * j}" y="{50 * i}" width="78" height="48" fill="#cc6633" '
                    f'fill-opacity="{dark:.2f}"/>')
                for k, word in enumerate(words):
                    drawn.append(f'<text x="{80 * j + 39}" y="{50 * i + 24 + 14 * k}" '
                                 f'text-anchor="middle">{word}</text>')
        for j, inner in enumerate(GRID[1]):
            drawn.append(f'<text x="{80 * j + 39}" y="{50 * len(GRID[0]) + 14}" '
                         f'text-anchor="middle">M = {inner}</text>')
        plots.append(f'<svg width="280" height="180">{"".join(drawn)}</svg>')
    picture("grid", plots, 220)


def main():
    experiments = (
        real, curve, adaptation, table, labels, layers, batch, grid, far, maml, follow, draw)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[f.__name__ for f in experiments])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=int, nargs="+", help="table, real: of adaptation")
    parser.add_argument("--models", nargs="+", help="table, real: such as sl-foblo; else all")
    args = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    more = ()
    if args.experiment in ("table", "real"):
        usual = [0, 10, 3, 1] if args.experiment == "table" else [0, 10, 25]
        more = args.minutes or usual, args.models
    if args.experiment in ("real", "curve", "adaptation"):
        require((CORPUS / "manifest.csv").exists(), f"{CORPUS}: python extras/speech.py makes it")
    elif args.experiment != "draw":
        toy.toy(TOY)
    {f.__name__: f for f in experiments}[args.experiment](args.seed, *more)


if __name__ == "__main__":
    networks.run(main)
