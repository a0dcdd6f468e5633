"""Evaluation: features and units, ABX, the quality of units, and a language model on units.
(SpidR, arXiv 2512.20308; ZeroSpeech 2021; phoneme discovery: DiscoPhon, arXiv 2603.18612.)

    python evaluate.py features --model M --audio A --out FOLDER [--layer L]
    python evaluate.py units    --model M --audio A --out U.jsonl [--layer L] [--dedupe]
    python evaluate.py units    --model M --audio A --textgrid FOLDER [--alignments P]
    python evaluate.py abx      --items X.item (--model M --audio A | --features FOLDER)
    python evaluate.py quality  --units U.jsonl --alignments P [--track one-to-one]
    python evaluate.py discophon --model M --data DISCOPHON --out FOLDER [--languages deu,swa]
    python evaluate.py lm       --units U.jsonl --out LM
    python evaluate.py swuggy | sblimp | tsc | ssc  --lm LM --model M --data FOLDER

`features` writes the output of a layer for each recording, [T, D], and `units` the codewords that
the layer's head predicts, [T], both at 50 Hz; frame i is centred at (i + 1/2) / 50 s. `abx` asks
whether a token of a phone is nearer to another token of that phone than to a token of another one:
0% is perfect, 50% is chance, good models reach 3 to 6%. `quality` compares units with phones. `lm`
trains a causal Transformer on units. With it `swuggy` asks which of two recordings is a word,
`sblimp` which is grammatical, `tsc` and `ssc` which is the right end of a story.

M is a run, a checkpoint, a released model's name, or a baseline: mfcc, wav2vec2_base, hubert_base,
wavlm_base. A is a folder of audio, a manifest, or one file. Layers count from 1. Features and units
carry a hash of their model's weights, so a language model is never fed another model's units.
docs/evaluation.md explains the measures, the benchmarks' folders and all formats.
"""

import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import pretrain
from model import (
    InputError, all_sum, entropy, load, load_state, option, read_checkpoint, require, run)

RATE = 50  # frames a second
HOP, FIELD = 320, 400  # samples from one frame to the next, and samples that a frame sees


# ======== features and units ========


class Encoder(NamedTuple):
    """A model that turns audio into frames: one of our networks, or a baseline, which has no units.
    `encode` and `units` take a waveform [N] of variance 1 and return {layer: frames}."""

    name: str
    hash: str  # of the weights
    layers: int  # L
    codebooks: int  # K, of the last K layers
    codewords: int  # V
    encode: Callable  # -> {layer: its output [T, D]}
    units: Callable = None  # -> {layer: the units [T] that its head predicts}

    def layer(self, wanted=None, units=False):
        """The layer asked for. By default the second that has a codebook, where phones are usually
        clearest (6 of 12 in base); of a baseline the middle one."""
        require(self.codebooks or not units, f"{self.name} has no codebooks, so it makes no units")
        first = self.layers - self.codebooks + 1  # that has a codebook
        usual = min(first + 1, self.layers) if self.codebooks else max(1, self.layers // 2)
        layer, lowest = wanted or usual, first if units else 1
        require(lowest <= layer <= self.layers, f"--layer {layer}: {self.name} has "
                f"{'units of ' if units else ''}layers {lowest} to {self.layers}")
        return layer


@torch.no_grad()
def frames_of(wav, make, layers, longest=60):
    """{layer: its frames} of a waveform [N], as `make`, an encoder's encode or units, gives them.
    More than `longest` seconds are encoded in windows."""
    parts = defaultdict(list)
    for begin, end, keep in windows(len(wav), longest):
        outputs = make(wav[begin:end])
        for layer in layers:
            parts[layer].append(outputs[layer][keep].cpu())
    return {layer: torch.cat(part) for layer, part in parts.items()}


def extract(rows, encoder, layers, units=False, longest=60):
    """Yields (fileid, {layer: its frames [T, D], or its units [T]}) for each recording."""
    require(len({row.fileid for row in rows}) == len(rows), "a fileid names several recordings: "
            "give the manifest a column fileid in which all are different")
    for row in tqdm(rows, "audio", unit="file", leave=False, disable=None):
        make = encoder.units if units else encoder.encode
        yield row.fileid, frames_of(read_recording(row), make, layers, longest)


def units_and_durations(encoder, wav, layer=None):
    """What a unit language model takes: the units of a waveform [N] at 16 kHz without repetitions,
    and how many frames of 20 ms each of them lasts."""
    layer = encoder.layer(layer, units=True)
    return runs(frames_of(data.standardise(wav), encoder.units, [layer])[layer].numpy())


def runs(labels):
    """An array of the labels without repetitions, and how often each is repeated."""
    labels = np.asarray(labels)
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return labels[starts], np.diff(starts, append=len(labels))


def dedupe(labels):
    return runs(labels)[0]


# ======== ABX: the distance of two tokens ========


def angular(x, y):  # of frames of length 1: their angle, in half turns
    return (x @ y.T).clamp_(-1, 1).acos_().div_(math.pi)


def euclidean(x, y):  # A product of matrices would lose the small distances.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def identity(x, y):  # of units
    return (x[:, :1] != y[:, 0]).float()


DISTANCES = {"angular": angular, "euclidean": euclidean, "identity": identity}  # -> [Fx, Fy]


def dtw(d, tx, ty):
    """Dynamic time warping of P pairs of tokens, x and y: the mean distance of their frames along
    the path with the smallest sum, [P].

    d[i, j, p] is the distance of frame i of x from frame j of y in pair p, which have tx[p] and
    ty[p] frames. What lies beyond these is padding and changes nothing.
    """
    height, width, pairs = d.shape
    # cost[k, i] is the sum along the best path to the i-th frame of x and the j-th of y, where
    # j = k - i, and length[k, i] the number of frames on this path. Both depend on k - 1 and k - 2
    # only, so a whole diagonal k is computed at once.
    cost = np.empty((height + width + 1, height + 1, pairs), np.float32)
    length = np.zeros(cost.shape, np.int16)
    border = np.arange(height + 1)
    cost[:, 0] = cost[border, border] = np.inf  # i = 0 and j = 0: no frames
    cost[0, 0] = 0
    for k in range(2, height + width + 1):
        here = slice(max(1, k - width), min(k - 1, height) + 1)
        i, above = np.arange(height + 1)[here], slice(here.start - 1, here.stop - 1)
        diagonal, left, up = (k - 2, above), (k - 1, here), (k - 1, above)
        # Of equal sums the path prefers the diagonal, then the step along y.
        straight = np.minimum(cost[left], cost[up])
        steps = choose(cost[left] <= cost[up], length[left], length[up])
        length[k, here] = 1 + choose(cost[diagonal] <= straight, length[diagonal], steps)
        cost[k, here] = d[i - 1, k - i - 1] + np.minimum(cost[diagonal], straight)
    end = tx + ty, tx, np.arange(pairs)
    return cost[end] / length[end]  # (13)


def choose(condition, a, b):  # np.where(condition, a, b), several times as fast
    return b + condition * (a - b)


# ======== ABX: triples and cells ========


def abx_pools(items, context, max_size_group, random):
    """{(context, speaker): pool}. A pool, {phone: its tokens' numbers}, has the tokens of a speaker
    in a context, from which A and B are taken."""
    pools = defaultdict(lambda: defaultdict(list))
    order = range(len(items)) if max_size_group is None else random.permutation(len(items))
    for n in order:  # As in fastabx, a token that is left out plays no role in any cell.
        item = items[n]
        group = pools[item.context if context == "within" else "", item.speaker][item.phone]
        if max_size_group is None or len(group) < max_size_group:
            group.append(n)
    return {key: dict(sorted(pool.items())) for key, pool in sorted(pools.items())}


def abx_groups(pools, speaker, max_x_across, random):
    """[(context, speaker of A and B, phone of A and X, speaker of X)]: the groups of X for which
    there are an A and a B."""
    speakers, groups = defaultdict(list), []
    for (context, who), pool in pools.items():
        for phone in pool:
            speakers[context, phone].append(who)
    for (context, who), pool in pools.items():
        for phone, tokens in pool.items() if len(pool) > 1 else ():
            if speaker == "within":
                others = [who] * (len(tokens) > 1)  # X is a token of the pool, and A another one
            else:
                others = [other for other in speakers[context, phone] if other != who]
                if max_x_across is not None:
                    others = random.permutation(others)[:max_x_across]
            groups += [(context, who, phone, other) for other in others]
    return groups


def errors(to_a, to_b):
    """From an X's distances from all A and from all B: for each B the share of A with which the
    triple is wrong. It is wrong if X is nearer to B than to A. A tie counts half."""
    to_a = to_a[:, None]
    return ((to_a > to_b).sum(0) + (to_a == to_b).sum(0) / 2) / len(to_a)  # (13)


def abx_cells(pools, groups, tokens, distance):
    """{(A, B, speaker of A and B): each cell's error}, and the number of triples. A cell is all
    triples of one A, one B, one speaker, one context and one speaker of X."""
    cells, triples = defaultdict(list), 0
    rows = distances(pools, groups, tokens, DISTANCES[distance])
    for context, who, phone, x_speaker in groups:
        pool, wrong = pools[context, who], []
        ends = np.cumsum([len(numbers) for numbers in pool.values()])
        at = {name: slice(end - len(pool[name]), end) for name, end in zip(pool, ends)}
        x_count = len(pools[context, x_speaker][phone])
        for x, to_pool in zip(range(x_count), rows):
            to_a = to_pool[at[phone]]
            if x_speaker == who:
                to_a = np.delete(to_a, x)  # X is never its own A.
            wrong.append(errors(to_a, to_pool))
        wrong = np.mean(wrong, 0)
        for phone_b in pool:
            if phone_b != phone:
                cells[phone, phone_b, who].append(wrong[at[phone_b]].mean())
        triples += x_count * len(to_a) * (len(to_pool) - len(pool[phone]))
    return cells, triples


def abx_details(features, item_file, speaker="within", context="within", distance="angular",
                max_size_group=None, max_x_across=None, seed=0):
    """The error of abx(), with the number of items, cells and triples and a note on what was left
    out, as a dict."""
    random = np.random.default_rng(seed)
    items, tokens, note = abx_tokens(features, read_items(item_file), item_file, distance)
    pools = abx_pools(items, context, max_size_group, random)
    groups = abx_groups(pools, speaker, max_x_across, random)
    cells, triples = abx_cells(pools, groups, tokens, distance)
    require(cells, f"{item_file}: no cell for ABX {speaker} speaker, {context} context: no A, B "
            f"and X among {len(items)} items, {len({item.speaker for item in items})} speaker(s)")
    # (13) First the mean over contexts and speakers of X, then over speakers of A and B, then over
    # pairs (A, B). Where any context will do, the first two are one mean.
    pairs = defaultdict(list)
    for (a, b, _), shares in cells.items():
        pairs[a, b] += [fmean(shares)] if context == "within" else shares
    error = fmean(fmean(shares) for shares in pairs.values())
    return dict(error=100 * error, speaker=speaker, context=context, distance=distance,
                items=len(items), cells=sum(map(len, cells.values())), triples=triples,
                max_size_group=max_size_group, max_x_across=max_x_across, seed=seed, note=note)


def abx(features, item_file, speaker="within", context="within", **options):
    """The ABX error in percent. features {file: [T, D] at 50 Hz}; options as of abx_details.

    All items count unless you ask for a sample: ZeroSpeech 2021 keeps max_size_group=10 tokens of a
    phone in a cell and max_x_across=5 speakers of X.
    """
    details = abx_details(features, item_file, speaker, context, **options)
    if details["note"]:
        print(f"abx: {details['note']}", file=sys.stderr)
    return details["error"]


# ======== unit quality ========


def quality(units, phones, codewords=None, track="many-to-one"):
    """How well units, {file: [unit, ...]} at 50 Hz, stand for phones, {file: [phone, ...]} at
    100 Hz. Phones of any name count, silence too. `codewords` is V, by default the number of units
    that occur."""
    names, tracks = labelled_tracks(units, phones)
    table = count_table(tracks, names)
    phone_of = PHONE_OF[track](table, codewords)
    measures = information(table)
    seconds = sum(len(track) for track, _ in tracks) / RATE
    kept = sum(len(dedupe(track)) for track, _ in tracks)
    measures["bitrate"] = math.log2(codewords or measures["active"]) * kept / seconds
    measures["per"] = phone_error_rate(tracks, phone_of)
    return measures | boundaries(tracks, phone_of)


def count_table(tracks, names):
    """How often a phone and a unit coincide, in steps of 10 ms. [phones, units]"""
    table = np.zeros((len(names), 1 + max(units.max() for units, _ in tracks)))
    for units, labels in tracks:
        both = min(2 * len(units), len(labels))
        np.add.at(table, (labels[:both], units.repeat(2)[:both]), 1)
    return table


def information(table):
    """(14) PNMI = I(phone; unit) / H(phone), and what else the counts tell."""
    joint = table / table.sum()  # p(phone, unit)
    h_phone, h_unit, h_both = (entropy(torch.from_numpy(p)).item()  # in bits
                               for p in (joint.sum(1), joint.sum(0), joint.flatten()))
    return dict(pnmi=(h_phone + h_unit - h_both) / h_phone if h_phone > 0 else 0.0,  # (14)
                phone_purity=float(joint.max(0).sum()), cluster_purity=float(joint.max(1).sum()),
                perplexity=2**h_unit, active=int((joint.sum(0) > 0).sum()))


def by_frequency(table):
    """The phones, the most frequent first; of equals, as in DiscoPhon, the one that came later."""
    return np.argsort(table.sum(1), kind="stable")[::-1]


def many_to_one(table, codewords=None):
    """The phone of each unit: the one with which it coincides most, of equals the more frequent."""
    likely = by_frequency(table)
    return likely[table[likely].argmax(0)]


def one_to_one(table, codewords=None):
    """The phone of each unit where no two units share one: the assignment with which units and
    phones coincide most. It takes as many units as the language has phones, silence included."""
    phones, used = table.shape
    size = codewords or max(phones, used)
    require(phones <= size, f"one-to-one: {phones} phones, silence included, for {size} units: "
            "it takes a model with as many units as the language has phones, plus one")
    square = np.zeros((size, size))  # the rows at the end are of phones that do not occur
    likely = by_frequency(table)
    square[:phones, :used] = table[likely]
    row_of = assignment(square)
    return np.append(likely, range(phones, size))[row_of]


PHONE_OF = {"many-to-one": many_to_one, "one-to-one": one_to_one}  # DiscoPhon's two tracks


def phone_error_rate(tracks, phone_of):
    """(14) Edits that turn the units' phones into the true ones, over the number of these."""
    heard = [dedupe(phone_of[units]) for units, _ in tracks]
    said = [dedupe(labels) for _, labels in tracks]
    return sum(map(edit_distance, heard, said)) / sum(map(len, said))  # (14)


def boundaries(tracks, phone_of, tolerance=2):
    """(14) F1 and R-value of where labels change, in steps of 10 ms. A true boundary is hit if a
    predicted one lies within 20 ms. Where the windows of two true ones overlap they are cut at the
    midpoint, which belongs to the earlier one."""
    hits = true = predicted = 0
    for units, labels in tracks:
        said = np.flatnonzero(np.diff(labels)) + 1
        heard = 2 * (np.flatnonzero(np.diff(phone_of[units])) + 1)
        middles = np.array([-math.inf, *(said[1:] + said[:-1]) / 2, math.inf])
        begin = np.maximum(np.searchsorted(heard, said - tolerance, "left"),
                           np.searchsorted(heard, middles[:-1], "right"))
        end = np.searchsorted(heard, np.minimum(said + tolerance, middles[1:]), "right")
        hits += int((end > begin).sum())  # (14)
        true += len(said)
        predicted += len(heard)
    recall, excess = hits / max(true, 1), predicted / max(true, 1) - 1
    r1, r2 = math.hypot(1 - recall, excess), abs(recall - excess - 1) / math.sqrt(2)
    return dict(f1=2 * hits / max(true + predicted, 1), r_value=1 - (r1 + r2) / 2)


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
# ======== loading encoders, reading recordings ========

BASELINES = ("mfcc", "wav2vec2_base", "hubert_base", "wavlm_base")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(name, device=DEVICE):
    if name == "mfcc":
        return Encoder(name, "", 1, 0, 0, mfcc)
    if name in BASELINES:
        return baseline(name, device)
    return spidr_encoder(str(name), load(name, device))


def spidr_encoder(name, net):
    c, device = net.config, net.mask_embedding.device

    def encode(wav):
        outputs = net.encode(wav[None].to(device))
        return {layer: x[0] for layer, x in enumerate(outputs, 1)}

    def units(wav):  # what the student's heads predict, not the labels of the teacher
        with_codebook = range(c.layers - c.codebooks + 1, c.layers + 1)
        return dict(zip(with_codebook, net.units(wav[None].to(device))[:, 0]))

    return Encoder(name, hash_weights(net), c.layers, c.codebooks, c.codewords, encode, units)


def hash_weights(net):
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def mfcc(wav):
    """13 coefficients with their first and second differences, [T, 39], of 25 ms windows that are
    centred as our frames are."""
    torchaudio, pad = data.import_torchaudio("mfcc"), (FIELD - HOP) // 2
    mel = dict(n_fft=FIELD, hop_length=HOP, n_mels=40, center=False)
    transform = torchaudio.transforms.MFCC(data.SAMPLE_RATE, 13, log_mels=True, melkwargs=mel)
    deltas = torchaudio.functional.compute_deltas
    c = transform(F.pad(wav, (pad, pad)))  # [13, T]
    return {1: torch.cat([c, deltas(c), deltas(deltas(c))]).T.contiguous()}


def baseline(name, device, pretrained=True):
    """One of torchaudio's. pretrained=False: random weights, without a download."""
    torchaudio = data.import_torchaudio(name)
    pipeline = getattr(torchaudio.pipelines, name.upper())
    make = pipeline.get_model if pretrained else getattr(torchaudio.models, name)
    net = make().eval().to(device)

    def encode(wav):
        outputs = net.extract_features(wav[None].to(device))[0]
        return {layer: x[0] for layer, x in enumerate(outputs, 1)}

    return Encoder(name, hash_weights(net), 12, 0, 0, encode)


def read_recording(row):
    try:
        wav = data.standardise(data.read_audio(row.path))
        require(len(wav) >= FIELD, f"{len(wav)} samples are too short for a frame")
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
    return wav


def windows(samples, longest):
    """[(first sample, end sample, frames to keep)]. A recording of over `longest` seconds is cut
    into overlapping windows, of which the middle two thirds are kept: attention over an hour does
    not fit in memory, and the network has never seen one."""
    if samples <= longest * data.SAMPLE_RATE:
        return [(0, samples, slice(None))]
    frames, context, cuts = (samples - FIELD) // HOP + 1, longest * RATE // 6, []
    for first in range(0, frames, 4 * context):
        begin, end = max(0, first - context), min(first + 5 * context, frames)
        keep = slice(first - begin, first - begin + 4 * context)
        cuts.append((begin * HOP, (end - 1) * HOP + FIELD, keep))
    return cuts


# ======== quality: the files that count, and best matches ========


def labelled_tracks(units, phones):
    """The phones' names, as they occur, and for each file its units and its phones' numbers."""
    files = [file for file in phones if file in units]
    require(files, "quality: no file has both units and phones")
    if units.keys() != phones.keys():
        print(f"quality: {len(files)} files count; {len(units) - len(files)} files without phones "
              f"and {len(phones) - len(files)} without units are left out", file=sys.stderr)
    names, tracks = {}, []
    for file in files:
        track, labels = units[file], [names.setdefault(phone, len(names)) for phone in phones[file]]
        # A recording is up to 3 phones longer than its units.
        require(abs(2 * len(track) - len(labels)) <= data.ALIGNMENT_SLACK + 3, f"{file}: not of "
                f"the same audio: {len(track)} units at 50 Hz, {len(labels)} phones at 100 Hz")
        tracks.append((np.array(track), np.array(labels)))
    return [*names], tracks


def edit_distance(x, y):
    """How many insertions, deletions and substitutions turn x into y."""
    steps = np.arange(len(y) + 1, dtype=np.int32)
    row = steps  # from nothing to the first j labels of y
    for label in x:
        longer = row + 1  # x's label is deleted,
        longer[1:] = np.minimum(longer[1:], row[:-1] + (y != label))  # or it is y's, or made so,
        row = np.minimum.accumulate(longer - steps) + steps  # or labels of y are inserted
    return int(row[-1])


def assignment(score):
    """The row of each column in the one-to-one assignment with the largest sum of a square matrix.

    Rows are added one by one, each along the shortest augmenting path (Crouse, 2016). Of equally
    short ones it takes that of scipy.optimize.linear_sum_assignment, and so of DiscoPhon.
    """
    size = len(score)
    row_price, column_price = np.zeros(size), np.zeros(size)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for new in range(size):
        path, came_from = np.full(size, np.inf), np.full(size, -1)
        row, shortest, columns, reached = new, 0.0, np.arange(size)[::-1].copy(), []
        while row >= 0:
            cost = shortest - score[row, columns] - row_price[row] - column_price[columns]
            better = cost < path[columns]
            path[columns[better]], came_from[columns[better]] = cost[better], row
            shortest = path[columns].min()
            equal = np.flatnonzero(path[columns] == shortest)
            free = equal[row_of[columns[equal]] < 0]
            at = free[-1] if len(free) else equal[0]
            column = columns[at]
            columns[at], columns = columns[-1], columns[:-1]
            reached.append(column)
            row = row_of[column]
        row_price[new] += shortest
        row_price[row_of[reached[:-1]]] += shortest - path[reached[:-1]]
        column_price[reached] -= shortest - path[reached]
        while row != new:  # along the path back, each row takes the column that it came to
            row = row_of[column] = came_from[column]
            column_of[row], column = column, column_of[row]
    return row_of


# ======== ABX: items and their frames ========


Item = namedtuple("Item", "file first end phone context speaker")  # frames from first to end - 1


def read_items(path):
    """The items of an item file, or of a CSV of words. Frame i belongs to one if
    onset <= (i + 1/2) / RATE <= offset.

    In decimals: an onset such as 0.29 would fall on the wrong side of a frame in floating point.
    """
    path, columns, items = Path(path), "file onset offset phone context speaker".split(), []
    for where, line in (lines_of_words if path.suffix == ".csv" else lines_of_items)(path):
        try:
            file, onset, offset, *more = map(line.__getitem__, columns)
            first = math.ceil(Decimal(onset) * RATE - Decimal("0.5"))
            end = math.floor(Decimal(offset) * RATE + Decimal("0.5"))
        except (KeyError, ArithmeticError, ValueError):
            raise InputError(f"{where}: not an item: {' '.join(line.values())[:80]!r}") from None
        items.append(Item(file, max(first, 0), end, *more))
    return items


def lines_of_items(path):
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    columns = "#file onset offset #phone prev-phone next-phone speaker".split()
    header, *lines = map(str.split, text.rstrip().split("\n"))
    require({*columns} <= {*header}, f"{path}:1: an item file begins with {' '.join(columns)}")
    for number, line in enumerate(lines, 2):
        fields = {name.strip("#"): value for name, value in zip(header, line)}
        if {"prev-phone", "next-phone"} <= fields.keys():
            fields["context"] = f"{fields['prev-phone']} {fields['next-phone']}"
        yield f"{path}:{number}", fields


def lines_of_words(path):
    """A word that was marked twice or more stands for a phone, in no context."""
    for where, line in data.read_table(path, "file", "onset", "offset", "word"):
        name = Path(line["file"])
        file = name.stem if name.suffix.lower() in data.AUDIO else line["file"]
        yield where, dict(line, file=file, phone=line["word"], context="",
                          speaker=line.get("speaker", ""))


def abx_tokens(features, items, item_file, distance):
    """-> the items that can be used, the frames [T, D] of each, and a line on the others."""
    frames, used, tokens, lost = {}, [], [], Counter()
    for file in {item.file for item in items} & features.keys():
        x = torch.as_tensor(features[file]).float().cpu()
        require(x.ndim <= 2 and x.sum().isfinite(), f"{file}: features must be finite and [T, D]")
        x = x if x.ndim == 2 else x[:, None]
        if distance == "angular":  # As in fastabx a frame of zeros points to (1, ..., 1).
            x = (x / x.norm(dim=1, keepdim=True)).nan_to_num_(1 / math.sqrt(x.shape[1]))
        frames[file] = x
    for item in items:
        token = frames.get(item.file, [])[item.first : item.end]
        if len(token):
            used.append(item)
            tokens.append(token)
            lost["cut short at the end of their features"] += len(token) < item.end - item.first
        elif item.file in frames:
            lost["left out, no frame lies within them"] += 1
        else:
            lost["left out, no features of their files"] += 1
    note = "; ".join(f"{n} of {len(items)} items {why}" for why, n in lost.items() if n)
    require(used, f"{item_file}: none of its {len(items)} items can be used: {note}")
    return used, tokens, note


# ======== ABX: many pairs at a time ========

ROWS = 32  # tokens x whose frames are compared with those of a pool in one product of matrices
CHUNK = 1 << 23  # distances of frames that a thread holds at a time


def distances(pools, groups, tokens, distance):
    """Yields for each X of these groups its distances [Y] from all tokens of its pool, A and B."""
    lengths = np.array([len(token) for token in tokens])
    chunks, size = [], CHUNK
    for (context, who), some in groupby(groups, key=lambda group: group[:2]):
        y = [n for numbers in pools[context, who].values() for n in numbers]
        x = [n for _, _, phone, x_speaker in some for n in pools[context, x_speaker][phone]]
        for rows in (x[i : i + ROWS] for i in range(0, len(x), ROWS)):
            if size >= CHUNK:
                chunks.append([])
                size = 0
            chunks[-1].append((rows, y))
            size += lengths[rows].sum() * lengths[y].sum()
    for blocks in in_threads(partial(align, tokens, distance), chunks):
        yield from chain.from_iterable(blocks)


def align(tokens, distance, chunk):
    """For each block of a chunk, the numbers of tokens x and of tokens y, their distances [X, Y].
    Pairs of like lengths, of whatever block, are padded and aligned together."""
    tables, pairs, size = [], [], 0
    for block in chunk:
        table = distance(*(torch.cat([tokens[n] for n in numbers]) for numbers in block))
        tx, ty = (np.array([len(tokens[n]) for n in numbers]) for numbers in block)
        # Frame i of an x and j of a y will be at flat[first + i * row + j].
        row = table.shape[1]
        first = size + (tx.cumsum() - tx)[:, None] * row + ty.cumsum() - ty
        pairs.append([one.ravel() for one in np.broadcast_arrays(first, row, tx[:, None], ty)])
        tables.append(table.flatten())
        size += table.numel()
    flat, (first, row, tx, ty) = torch.cat(tables).numpy(), np.concatenate(pairs, 1)
    d, kinds = np.empty(len(first), np.float32), tx // 6 * 1000 + ty // 6
    for kind in np.unique(kinds):  # pairs whose lengths are alike, in steps of 6 frames
        some = np.flatnonzero(kinds == kind)
        i, j = np.arange(tx[some].max())[:, None, None], np.arange(ty[some].max())[:, None]
        table = flat.take(first[some] + i * row[some] + j, mode="clip")
        d[some] = dtw(table, tx[some], ty[some])
    ends = np.cumsum([len(x) * len(y) for x, y in chunk])
    return [part.reshape(-1, len(y)) for part, (_, y) in zip(np.split(d, ends), chunk)]


def in_threads(work, jobs):
    """Yields work(job) for each job, in order; as many threads as torch uses are at work. Each of
    them works alone: to share out every small operation would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for i in range(0, len(jobs), 16 * threads):  # so that few results wait
                yield from pool.map(work, jobs[i : i + 16 * threads])
    finally:
        torch.set_num_threads(threads)


# ======== files of units and features ========


def write_json(path, record):
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def read_json(path):
    """What is in the file, {} if there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from None


def options_of(run):
    return read_json(Path(run, "config.json")).get("options", {})


def about(encoder, layer):
    return dict(model=encoder.name, hash=encoder.hash, layer=layer, frame_rate=RATE)


def meta_of(path):
    """X.meta.json, which says whose units those in X.jsonl are."""
    return Path(path).with_suffix(".meta.json")


def write_units(path, units, encoder, layer, deduplicated=False):
    """DiscoPhon's lines {"file", "units"}; deduplicated ones have "durations", too."""
    Path(path).unlink(missing_ok=True)
    write_json(meta_of(path), about(encoder, layer) | dict(codewords=encoder.codewords))
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as lines:
        for file, x in units:
            fields = zip(("units", "durations"), runs(x) if deduplicated else [x])
            record = dict(file=file) | {name: labels.tolist() for name, labels in fields}
            lines.write(json.dumps(record) + "\n")
    os.replace(part, path)  # only when it is whole


def read_labels(path, name):
    """{file: labels}, units or phones, of JSON lines {"file" or "name", NAME}, also in gzip.
    Deduplicated ones are repeated as often as their durations say."""
    labels = {}
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as x:
            for record in map(json.loads, x):
                file = record["file" if "file" in record else "name"]
                require(file not in labels, f"{path}: {file} is there twice")
                labels[file] = np.array(record[name])
                if "durations" in record:
                    labels[file] = labels[file].repeat(record["durations"])
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as error:
        raise InputError(f'{path}: not JSON lines {{"file", "{name}"}}: {error!r}') from None
    require(labels, f"{path}: empty")
    return labels


def read_phones(path, tier=None):
    """{file: phones, one every 10 ms}"""
    if str(path).endswith((".jsonl", ".jsonl.gz")):
        return read_labels(path, "phones")
    return {file: phones for file, (phones, _) in data.read_alignments(path, tier=tier).items()}


def read_units(path, like=None):
    """-> meta, {file: units [T]}. With `like`, the meta of other units, they must be of the same
    weights and layer; the model's name may differ, since a model may have several."""
    units, meta, like = read_labels(path, "units"), read_json(meta_of(path)), like or {}
    for key in like.keys() & {"hash", "layer", "codewords"}:
        value = meta.get(key)
        require(value == like[key], f"{path}: {key} is {value!r}, not {like[key]!r}")
    most = meta.get("codewords", 1 << 16)
    for file, x in units.items():
        fits = x.ndim == 1 and len(x) and x.dtype == int and 0 <= x.min() and x.max() < most
        require(fits, f"{path}: {file}: not a list of units from 0 to {most - 1}")
    return meta, units


def write_features(folder, features, encoder, layer):
    """FILEID.npy for each recording, and meta.json. The folder gets its name when it is whole."""
    part = Path(f"{Path(folder)}.part")
    if (part / "meta.json").exists():  # of a run that was killed, perhaps of another model
        shutil.rmtree(part)
    require(not part.exists(), f"{part} is there already: remove it")
    part.mkdir(parents=True)
    write_json(part / "meta.json", about(encoder, layer))
    for file, frames in features:
        path = part / f"{file}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, frames.numpy())
    os.replace(part, folder)


def read_features(folder, files):
    """{file: [T, D]} of those files whose .npy is in the folder, and its meta.json."""
    features = {}
    for file in files:
        path = Path(folder, data.file_name(file, folder) + ".npy")
        try:
            if path.exists():
                features[file] = torch.from_numpy(np.load(path))
        except (ValueError, TypeError, EOFError) as error:
            raise InputError(f"{path}: damaged, or no array of numbers: {error}") from None
    return features, read_json(Path(folder, "meta.json"))


# ======== the verbs features, units, abx, quality ========


def print_row(name, *cells):
    """A line of a table."""
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"{name!s:24}", *(f"{text:>14}" for text in texts), flush=True)


def write_outputs(args):
    """The verbs features and units."""
    units = args.verb == "units"
    targets = [path for path in (args.out, units and args.textgrid) if path]
    require(targets, "units takes --out, --textgrid, or both")
    for path in targets:
        require(not Path(path).exists(), f"{path} is there already: name another one, or remove it")
    rows = data.read_manifest(args.audio)
    for row in rows:
        data.file_name(row.fileid, row.where)
    encoder = load_encoder(args.model)
    layer = encoder.layer(args.layer, units)
    frames = ((file, x[layer]) for file, x in extract(rows, encoder, [layer], units, args.longest))
    if units and args.textgrid:
        phones = read_phones(args.alignments, args.tier) if args.alignments else {}
        frames = with_textgrids(frames, rows, Path(args.textgrid), phones)
    if not units:
        write_features(args.out, frames, encoder, layer)
    elif args.out:
        write_units(args.out, frames, encoder, layer, args.dedupe)
    else:
        for _ in frames:  # only the TextGrids are wanted
            pass
    print(f"{len(rows)} recordings, {args.verb} of layer {layer} of {encoder.name}, {RATE} a "
          f"second: {', '.join(targets)}")


def with_textgrids(units, rows, folder, phones):
    """Passes the units on, and writes a TextGrid for each recording."""
    for row, (file, x) in zip(rows, units):
        path, seconds = folder / f"{file}.TextGrid", row.num_samples / data.SAMPLE_RATE
        path.parent.mkdir(parents=True, exist_ok=True)
        tiers = {"units": intervals(x.tolist(), 1 / RATE, seconds)}
        if file in phones:
            tiers["phones"] = intervals(phones[file], 0.01, seconds)
        data.write_textgrid(path, seconds, tiers)
        yield file, x


def intervals(labels, step, end):
    """[(onset, offset, label)] in seconds of each run of equal labels, one every `step` seconds.
    What lies beyond the end is cut off: an alignment may be a little longer than its recording."""
    edges = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    return [(i * step, min(j * step, end), str(labels[i]))
            for i, j in zip(edges, [*edges[1:], len(labels)]) if i * step < end]


def units_of(rows, encoder, layer=None):
    """{fileid: units [T]} of a layer."""
    layer = encoder.layer(layer, units=True)
    return {file: x[layer].numpy() for file, x in extract(rows, encoder, [layer], units=True)}


def abx_by_layer(args):
    """Yields (layer, features of the items' files)."""
    files = {item.file for item in read_items(args.items)}
    if args.features:
        features, meta = read_features(args.features, files)
        yield meta.get("layer", "-"), features
        return
    rows, encoder = data.read_manifest(args.audio, only=files), load_encoder(args.model)
    require(rows, f"{args.audio}: none of the {len(files)} files of {args.items}")
    layers = [encoder.layer(args.layer)] if args.layer else range(1, encoder.layers + 1)
    # A frame is 3 kB in base. Where those of all layers would take more than 4 GB, the audio is
    # passed over several times.
    at_once = max(1, 1_300_000 * HOP // sum(row.num_samples for row in rows))
    for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        outputs = dict(extract(rows, encoder, some, longest=args.longest))
        for layer in some:
            yield layer, {file: x[layer] for file, x in outputs.items()}


def run_abx(args):
    require(bool(args.features) != bool(args.model and args.audio),
            "abx takes --features, or --model and --audio")
    speakers = ["within", "across"] if args.speaker == "both" else [args.speaker]
    print_row("ABX error, %", "layer", *(f"{speaker} speakers" for speaker in speakers))
    records = []
    for layer, features in abx_by_layer(args):
        scored, notes = {}, set()
        for speaker in speakers:
            try:
                scored[speaker] = details = abx_details(
                    features, args.items, speaker, args.context, args.distance,
                    args.max_size_group, args.max_x_across, args.seed)
                notes.add(details["note"])
            except InputError as error:  # of a single speaker there is no ABX across
                notes.add(str(error))
        require(scored, "; ".join(notes))
        shown = (scored[one]["error"] if one in scored else "-" for one in speakers)
        print_row(args.model or args.features, layer, *shown)
        records += [dict(layer=layer) | one for one in scored.values()]
    for one in scored.values():
        print(f"{one['speaker']} speakers, {args.context} context, {args.distance} distance: "
              f"{one['items']:,} items, {one['cells']:,} cells, {one['triples']:,} triples")
    for message in sorted(notes - {""}):
        print(message, file=sys.stderr)
    if args.out:
        write_json(args.out, records)


# name: (as it is shown, its factor, unit, what it means)
MEASURES = {
    "pnmi": ("PNMI", 100, "%", "of the information in the phones that the units carry"),
    "phone_purity": ("phone purity", 100, "%", "of the time a unit stands for its usual phone"),
    "cluster_purity": ("cluster purity", 100, "%", "of the time a phone gets its usual unit"),
    "perplexity": ("perplexity", 1, "units", "in use, weighted by how often"),
    "active": ("active", 1, "units", "that occur at all"),
    "bitrate": ("bitrate", 1, "bit/s", "of the units without repetitions"),
    "per": ("phone error rate", 100, "%", "of the phones; it can exceed 100"),
    "f1": ("boundary F1", 100, "%", "of the boundaries, within 20 ms"),
    "r_value": ("R-value", 100, "%", "of the boundaries, with a penalty for too many"),
}


def run_quality(args):
    meta, units = read_units(args.units)
    phones = read_phones(args.alignments, args.tier)
    measures = quality(units, phones, meta.get("codewords"), args.track)
    if meta:
        print(f"units of layer {meta['layer']} of {meta['model']}, {args.track}")
    for name, value in measures.items():
        shown, factor, unit, meaning = MEASURES[name]
        print(f"{shown:18}{factor * value:10.2f} {unit:6} {meaning}")
    if args.out:
        write_json(args.out, meta | dict(track=args.track) | measures)


# ======== the verb discophon ========

# The benchmark's languages, six for development and six for the test, and their phones without SIL.
LANGUAGES = {"deu": 41, "swa": 29, "tam": 29, "tha": 40, "tur": 27, "ukr": 35,
             "cmn": 42, "eng": 39, "eus": 29, "fra": 34, "jpn": 42, "wol": 39}
SPLITS = "train-10min train-1h train-10h dev test".split()
PUBLISHED = """published by the benchmark's authors, means of the six test languages, in %:
SpidR, 20 VoxPopuli languages, adapted to        0   10 min   1 h   10 h
    ABX of units within triphones, layer 6   13.30    10.54   9.59   9.09
    ABX of features, layer 6                  6.57     6.24   5.53   5.09
    PNMI, layer 7                             59.8     64.1   65.4   65.6
docs/evaluation.md has the leaderboard"""
DISCOVERY = "pnmi", "per", "f1", "r_value"
ABX_COLUMNS = "units within", "units across", "features within", "features across"


def run_discophon(args):
    """Phoneme discovery, language by language. What is not there is a dash."""
    root, out, encoder = Path(args.data), Path(args.out), load_encoder(args.model)
    layer = encoder.layer(args.layer, units=True)
    there = sorted(path.parent.name for path in root.glob(f"audio/*/{args.split}"))
    languages = args.languages.split(",") if args.languages else there
    missing, others = {*languages} - {*there}, {*there} - {*LANGUAGES}
    require(there and not missing,
            f"{root}: no audio/CODE/{args.split} of {', '.join(sorted(missing)) or 'any'}")
    require(args.languages or not others, f"{root}: {', '.join(sorted(others))} is not a language "
            "of DiscoPhon; to score it all the same, name it with --languages")
    out.mkdir(parents=True, exist_ok=True)
    columns = DISCOVERY + (ABX_COLUMNS if args.track == "many-to-one" else ())
    print_row(f"layer {layer}, all in %", *(MEASURES.get(name, [name])[0] for name in columns))
    results = {}
    for code in languages:
        results[code] = discover(root, out, encoder, layer, code, args)
        print_row(code, *(results[code].get(name, "-") for name in columns))
    results["mean"] = {name: fmean(row[name] for row in results.values()) for name in columns
                       if all(name in row for row in results.values())}
    print_row("mean", *(results["mean"].get(name, "-") for name in columns))
    write_json(out / f"discophon-{args.split}.json",
               about(encoder, layer) | dict(track=args.track, results=results))
    print(PUBLISHED)


def discover(root, out, encoder, layer, code, args):
    """The measures of one language, in percent."""
    name, measures = f"{code}-{args.split}", {}
    if args.track == "one-to-one" and code in LANGUAGES:
        require(encoder.codewords == LANGUAGES[code] + 1, f"one-to-one: {code} has "
                f"{LANGUAGES[code]} phones and silence, {encoder.name} {encoder.codewords} units")
    rows = data.read_manifest(root / "audio" / code / args.split)
    units = units_of(rows, encoder, layer)
    write_units(out / f"units-{name}.jsonl", units.items(), encoder, layer)
    alignment, items = root / f"alignment/alignment-{name}.txt", root / f"item/triphone-{name}.item"
    for path in alignment, items:
        if not path.exists():
            print(f"{path} is not there", file=sys.stderr)
    if alignment.exists():
        of_units = quality(units, read_phones(alignment), encoder.codewords, args.track)
        measures = {key: 100 * of_units[key] for key in DISCOVERY}
    if items.exists() and args.track == "many-to-one":
        files = {item.file for item in read_items(items)}
        rows = [row for row in rows if row.fileid in files]
        frames = {file: x[layer] for file, x in extract(rows, encoder, [layer])}
        if args.keep_features:
            write_features(out / f"features-{name}", frames.items(), encoder, layer)
        for column in ABX_COLUMNS:
            kind, speaker = column.split()
            features, distance = (units, "identity") if kind == "units" else (frames, "angular")
            measures[column] = abx(
                features, items, speaker, distance=distance, max_size_group=args.max_size_group,
                max_x_across=args.max_x_across)
    return measures


# ======== training the language model ========


@dataclass
class LMOptions(pretrain.RunOptions):
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


LM_PRESETS = {"opt125m": {}, "tiny": dict(
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


def train_lm(arguments):
    # ======== options, setup ========
    options, _ = pretrain.parse_options(LMOptions, LM_PRESETS, argv=arguments)
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
    trained = header | dict(utterances=len(units), tokens=sum(map(len, sequences)))
    first, totals = pretrain.resume(
        pretrain.open_run(options, lm, ranks, about=trained), lm, optimizer)
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


def run_pairs(args):
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


# ======== command line ========


def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


OPTIONS = {
    "--model": dict(help=f"a run, a checkpoint, a released model, or {', '.join(BASELINES)}"),
    "--audio": dict(help="a folder of audio, a manifest or one file"),
    "--features": dict(help="a folder of .npy files [T, D], instead of model and audio"),
    "--items": dict(help="an item file"),
    "--units": dict(help="as 'units' writes them; of pairs' wav files: instead of --model"),
    "--alignments": dict(help="a folder of TextGrids, a CSV, intervals, or JSON lines"),
    "--tier": dict(help="of TextGrids, that has the phones [phones, phone, MAU, segments]"),
    "--lm": dict(help="a run's folder or a checkpoint of 'lm'"),
    "--data": dict(help="wav files and gold.csv, for tsc ID_correct.wav and ID_incorrect.wav"),
    "--layer": dict(type=positive, help="from 1 [the second with a codebook; abx: all]"),
    "--longest": dict(type=positive, default=60, help="seconds; above them in windows [60]"),
    "--dedupe": dict(action="store_true", help="units without repetitions, and their durations"),
    "--textgrid": dict(help="a folder for a TextGrid of each recording, for Praat or ELAN"),
    "--track": dict(choices=[*PHONE_OF], default="many-to-one",
                    help="whether units may share a phone"),
    "--speaker": dict(choices=["within", "across", "both"], default="both"),
    "--context": dict(choices=["within", "any"], default="within"),
    "--distance": dict(choices=[*DISTANCES], default="angular"),
    "--max-size-group": dict(type=positive, help="tokens of a phone, 10 in ZeroSpeech [all]"),
    "--max-x-across": dict(type=positive, help="speakers of X, 5 in ZeroSpeech [all]"),
    "--languages": dict(help="codes, separated by commas [all that are there]"),
    "--split": dict(choices=SPLITS, default="test", help="of DiscoPhon's audio [test]"),
    "--keep-features": dict(action="store_true", help="write the features too"),
    "--seed": dict(type=int, default=0, help="of that choice [0]"),
    "--out": dict(help="a folder; units: JSONL, abx, quality: JSON"),
}
# Each verb's function and options; those with ! are needed.
VERBS = {
    "features": (write_outputs, "--model! --audio! --out! --layer --longest"),
    "units": (write_outputs, "--model! --audio! --out --layer --longest --dedupe --textgrid "
                             "--alignments --tier"),
    "abx": (run_abx, "--items! --model --audio --features --layer --longest --speaker --context "
                     "--distance --max-size-group --max-x-across --seed --out"),
    "quality": (run_quality, "--units! --alignments! --tier --track --out"),
    "discophon": (run_discophon, "--model! --data! --out! --languages --split --layer --track "
                                 "--max-size-group --max-x-across --keep-features"),
    "lm": (None, ""),
    **dict.fromkeys(TASKS, (run_pairs, "--lm! --data! --model --units --out")),
}


def parse(arguments=None):
    parser = pretrain.Parser(description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb, (function, options) in VERBS.items():
        command = verbs.add_parser(verb, allow_abbrev=False)
        command.set_defaults(function=function)
        for name in options.split():
            flag = name.rstrip("!")
            command.add_argument(flag, required=flag != name, **OPTIONS[flag])
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["lm"]:  # its options are a dataclass, like those of the training scripts
        return train_lm(sys.argv[2:])
    args = parse()
    if getattr(args, "out", None):  # a path that cannot be written is refused before the work
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    run(main)
