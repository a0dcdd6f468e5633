"""A language model on units, and the pairs that it judges: sWUGGY, sBLIMP, tSC, SSC.
(SpidR, arXiv 2512.20308; ZeroSpeech 2021.)

    python evaluate.py lm      --units U.jsonl --out LM
    python evaluate.py swuggy | sblimp | tsc | ssc  --lm LM --model M --data FOLDER

`lm` trains a causal Transformer on the units that `evaluate.py units` writes. With it `swuggy` asks
which of two recordings is a word, `sblimp` which is grammatical, `tsc` and `ssc` which is the right
end of a story: the one whose units have the higher probability.
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import pretrain
from evaluate import (
    DEVICE, dedupe, load_encoder, meta_of, print_row, read_units, units_of, write_json)
from model import InputError, all_sum, load_state, option, read_checkpoint, require

# ======== the language model on units ========


class UnitLM(nn.Module):
    """A causal, pre-norm Transformer over units without repetitions. Token V is the boundary that
    stands before and after an utterance."""

    def __init__(self, codewords, layers, dim, heads, context, dropout=0.0):
        super().__init__()
        self.boundary, self.context = codewords, context
        self.embedding = nn.Embedding(codewords + 1, dim)
        self.position = nn.Embedding(context, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, F.gelu, batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(dim, codewords + 1, bias=False)
        for weight in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens):
        """[B, T + 1] tokens -> [B, T]: -log p of each token but the first, given those before it.
        Padding is -1 and gets 0. It is on the right, where causal attention does not look."""
        seen, following = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        x = self.embedding(seen) + self.position.weight[: seen.shape[1]]  # [B, T, D]
        causal = nn.Transformer.generate_square_subsequent_mask(seen.shape[1], x.device)
        logits = self.head(self.blocks(x, causal, is_causal=True)).float()  # [B, T, V + 1]
        return F.cross_entropy(logits.mT, following, ignore_index=-1, reduction="none")


@torch.no_grad()
def score_units(lm, units):
    """The score of an utterance: log p(unit | boundary, units before it), a mean over its units
    without repetitions.

    Neither boundary counts: the first is given, and for a word that stands alone the last is out
    of place. What is longer than the context goes in windows that overlap by half, so that each
    unit sees half a context or more.
    """
    tokens = np.append(lm.boundary, dedupe(units))
    tokens = torch.from_numpy(tokens).long().to(lm.head.weight.device)
    step, total = (lm.context + 1) // 2, 0.0
    for i in range(0, max(1, len(tokens) - 1 - lm.context + step), step):
        known = lm.context - step if i else 0  # the window before has scored them
        losses = lm.eval()(tokens[None, i : i + lm.context + 1])[0]
        total -= losses[known:].double().sum().item()
    return total / (len(tokens) - 1)


# ======== pairs: sWUGGY, sBLIMP, tSC ========


def pair_accuracy(voices, scores):
    """How often the right side of a pair has the higher score, ties by half. Each of its voices
    counts the same. voices [(files of the wrong side, of the right side)], scores {file: score}"""
    wins = []
    for wrong, right in voices:
        margins = [scores[one] - scores[other] for one in right for other in wrong]
        wins.append(fmean((margin > 0) + (margin == 0) / 2 for margin in margins))
    return fmean(wins)


def accuracies(pairs, scores):
    """{group: its accuracy in percent, its number of pairs}. A mean over pairs, so that a pair of
    many voices counts no more than another. pairs {pair: (groups, {voice: sides})}"""
    shares_of = defaultdict(list)
    for groups, voices in pairs.values():
        for group in groups:
            shares_of[group].append(pair_accuracy(voices.values(), scores))
    return {group: dict(accuracy=100 * fmean(shares), pairs=len(shares))
            for group, shares in sorted(shares_of.items())}


# ======== plumbing: skip at first reading ========
# ======== training the language model ========


@dataclass
class Options(pretrain.RunOptions):
    """The language model's."""

    out: str = option("runs/lm", "the run's folder")
    units: str = option("", "the file of units to learn from, as 'units' writes it")
    valid: str = option("", "another, to report the loss on, a mean over its recordings")
    layers: int = option(12, "of the Transformer")
    dim: int = option(768, "its width")
    heads: int = option(12, "of attention")
    context: int = option(2048, "units of the longest crop, and the most that a score looks back")
    dropout: float = option(0.1, "of what each block adds")
    steps: int = option(25_000, "optimizer steps")
    batch_tokens: int = option(65_536, "most tokens in a micro-batch, with padding")
    lr: float = option(6e-4, "peak learning rate")
    lr_floor: float = option(0.1, "part of the peak where warm-up starts and decay ends")
    warmup_steps: int = option(1_000, "linear warm-up")
    hold_steps: int = option(0, "at the peak")
    decay_steps: int = option(24_000, "exponential decay")
    eps: float = option(1e-8, "AdamW's")
    weight_decay: float = option(0.1, "AdamW's, on everything")
    clip: float = option(1.0, "largest norm of the gradient")
    save_every: int = option(500, "steps between checkpoints (last.pt)")
    keep_every: int = option(0, "steps between checkpoints that are kept (step_N.pt)")


PRESETS = {"opt125m": {}, "tiny": dict(
    layers=2, dim=128, heads=4, context=128, steps=2_000, batch_tokens=1_024, lr=3e-3,
    warmup_steps=200, decay_steps=1_800)}


def lm_batch(sequences, boundary, options, number):
    """Micro-batch `number`, a function of (seed, number): [B, T + 1], padded with -1. The sequences
    are sorted by length. The batch has a random one and those after it, as many as fit. Each stands
    between two boundaries. What is longer than the context is cropped at random."""
    rng, rows = np.random.default_rng([options.seed, number]), []
    for units in sequences[rng.integers(len(sequences)) :]:
        length = min(len(units) + 1, options.context)
        if rows and (len(rows) + 1) * length > options.batch_tokens:
            break
        start = rng.integers(len(units) + 2 - length)
        crop = np.append(units, boundary)[start : start + length]
        rows.append(torch.from_numpy(np.append(boundary, crop)))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def lm_step(lm, optimizer, micro_batches, lr, options, ranks):
    """One optimizer step. The loss is a mean over the tokens of all ranks and micro-batches."""
    optimizer.zero_grad()
    for group in optimizer.param_groups:
        group["lr"] = lr
    sums = torch.zeros(2, device=ranks.device)  # loss, tokens
    for tokens in micro_batches:
        with pretrain.autocast(options, ranks):
            loss = lm(tokens.to(ranks.device)).sum()
        loss.backward()
        sums += torch.stack([loss.detach(), (tokens[:, 1:] >= 0).sum().to(loss)])
    gradients = [p.grad for p in pretrain.trained(optimizer)]
    all_sum([*gradients, sums])
    loss, count = sums
    metrics = pretrain.average_and_clip(optimizer, count, options)
    optimizer.step()
    return metrics | {"loss": loss / count, "lr": torch.tensor(lr)}


def train(arguments):
    # ======== options, setup ========
    options, _ = pretrain.parse_options(Options, PRESETS, argv=arguments)
    require(options.units, "lm needs --units, a file that 'evaluate.py units' writes")
    pretrain.check_numbers(options)
    require(min(options.layers, options.dim, options.heads, options.context) > 0
            and options.dim % options.heads == 0, "sizes are positive, dim a multiple of heads")
    ranks = pretrain.setup(options)
    torch.manual_seed(options.seed)

    # ======== data, model, optimizer ========
    header, units = read_units(options.units)
    require({"hash", "layer", "codewords", "model"} <= header.keys(),
            f"{meta_of(options.units)} is missing or incomplete: it says whose units they are")
    sequences = sorted(map(dedupe, units.values()), key=len)
    valid = read_units(options.valid, like=header)[1] if options.valid else {}
    sizes = dict(codewords=header["codewords"], layers=options.layers, dim=options.dim,
                 heads=options.heads, context=options.context)
    lm = UnitLM(**sizes, dropout=options.dropout).to(ranks.device)
    optimizer = pretrain.make_optimizer(lm, options)

    # ======== resume ========
    about = header | dict(utterances=len(units), tokens=sum(map(len, sequences)))
    first, totals = pretrain.resume(
        pretrain.open_run(options, lm, ranks, about=about), lm, optimizer)
    if first >= options.steps:
        return pretrain.finished(options, ranks)
    log, stop = pretrain.Log(options, ranks, options.steps, first, totals), pretrain.Stop(ranks)

    # ======== loop ========
    for step in range(first, options.steps):
        pretrain.seed_step(options.seed, step, ranks.rank)
        done = step + 1
        micro_batches = [lm_batch(sequences, lm.boundary, options, i * ranks.world + ranks.rank)
                         for i in range(step * options.accumulate, done * options.accumulate)]
        rate = pretrain.lr_at(step, options)
        log.add(lm_step(lm.train(), optimizer, micro_batches, rate, options, ranks))
        pretrain.end_of_step(
            done, options, ranks, optimizer, log, stop, lambda: validate_lm(lm, valid),
            lambda: dict(state=lm.state_dict(), lm=sizes, units=header))
    if ranks.first:
        print(f"{options.out}: {options.steps} steps, loss {log.record['loss']:.3f}")
        print(f"next: python evaluate.py swuggy --lm {options.out} --model {header['model']} "
              "--data DIR")


def validate_lm(lm, units):
    losses = [-score_units(lm, x) for x in units.values()]
    return {"valid_loss": torch.tensor(losses).mean()} if losses else {}


def load_lm(path, device=DEVICE):
    """The language model, and the header of the units that it was trained on."""
    path, checkpoint = read_checkpoint(path)
    require("lm" in checkpoint and "units" in checkpoint,
            f"{path}: not a language model; 'evaluate.py lm' trains one")
    lm = load_state(UnitLM(**checkpoint["lm"]), checkpoint["model"], path)
    return lm.eval().to(device), checkpoint["units"]


# ======== the verbs swuggy, sblimp, tsc, ssc ========

# The folder that a task has in ZeroSpeech, and the column of gold.csv that groups its pairs. A task
# without one has no gold.csv, but ID_correct.wav and ID_incorrect.wav.
TASKS = {"swuggy": ("lexical", "frequency"), "sblimp": ("syntactic", "type"),
         "tsc": ("tsc", None), "ssc": ("ssc", None)}  # of ssc the wrong endings are on the topic
# ZeroSpeech's bands of how often a word occurs in LibriSpeech, with the largest count of each.
BANDS = {"oov": 0, "1 to 5": 5, "6 to 20": 20, "21 to 100": 100, "above 100": math.inf}


def groups_of(column, row):
    """What a pair counts in: all, and its type, or the band of its word's frequency."""
    if column == "frequency":
        count = 0 if row["frequency"] == "oov" else float(row["frequency"])
        band = next(name for name, most in BANDS.items() if 0 <= count <= most)
        return ["all", f"frequency {band}"] + ["in vocabulary"] * (count > 0)
    return ["all", f"type {row['type']}"] if column else ["all"]


def read_pairs(folder, column):
    """{pair: (groups, {voice: (files of its wrong side, files of its right side)})}"""
    path, pairs = folder / "gold.csv", {}
    if column:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = list(csv.DictReader(file, restval=""))
    else:
        names = [file.stem for file in sorted(folder.glob("*_*correct.wav"))]
        rows = [dict(id=name.rpartition("_")[0], voice="", filename=name,
                     correct=str(int(name.endswith("_correct")))) for name in names]
    for number, row in enumerate(rows, 2):
        try:
            _, voices = pairs.setdefault(row["id"], (groups_of(column, row), {}))
            sides = voices.setdefault(row["voice"], ([], []))
            sides[["0", "1"].index(row["correct"])].append(row["filename"].removesuffix(".wav"))
        except (KeyError, ValueError, StopIteration) as error:
            raise InputError(f"{path}:{number}: id, filename, voice, correct (0 or 1) and "
                             f"{column} are needed: {error!r}") from None
    require(pairs, f"{folder}: no pairs")
    for pair, (_, voices) in pairs.items():
        require(all(map(all, voices.values())), f"{folder}: a side of pair {pair} is missing")
    return pairs


def units_of_files(args, header, folder, names):
    """{name: units}, made as those were that the language model learnt from."""
    if args.units:
        units = read_units(args.units, like=header)[1]
    else:
        encoder, rows = load_encoder(args.model), data.read_manifest(folder, only={*names})
        require(encoder.hash == header["hash"], f"--model {args.model}: other weights than those "
                f"of {header['model']}, on whose units --lm {args.lm} was trained")
        units = units_of(rows, encoder, header["layer"])
    missing = sorted({*names} - units.keys())
    require(not missing, f"{args.units or folder}: no units of {', '.join(missing[:9])}")
    return units


def run(args):
    require(bool(args.model) != bool(args.units),
            f"{args.verb} takes --model, or --units of the wav files")
    task, column = TASKS[args.verb]
    folder = Path(args.data, "dev") if Path(args.data, "dev").is_dir() else Path(args.data)
    (lm, header), pairs = load_lm(args.lm), read_pairs(folder, column)
    names = sorted({name for _, voices in pairs.values() for sides in voices.values()
                    for side in sides for name in side})
    units = units_of_files(args, header, folder, names)
    scores = {name: score_units(lm, units[name]) for name in names}
    results = accuracies(pairs, scores)
    print_row(f"{args.verb} by {args.lm}", "accuracy, %", "pairs")
    for group, row in results.items():
        print_row(group, row["accuracy"], row["pairs"])
    if args.out:
        path = Path(args.out, task, "dev.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} {scores[name]:.6f}\n" for name in names))
        write_json(Path(args.out, f"{args.verb}.json"), dict(lm=args.lm, **header, results=results))
    return results
