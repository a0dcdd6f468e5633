"""Evaluation: features and units, ABX, the quality of units, and a language model on units.
(SpidR, arXiv 2512.20308; ZeroSpeech 2021; phoneme discovery: DiscoPhon, arXiv 2603.18612.)

    python evaluate.py features --model M --audio A --out FOLDER [--layer L]
    python evaluate.py units    --model M --audio A --out U.jsonl [--layer L]
    python evaluate.py abx      --items X.item (--model M --audio A | --features FOLDER)
    python evaluate.py quality  --units U.jsonl --alignments P.csv
    python evaluate.py discophon --model M --data DISCOPHON --out FOLDER [--languages deu,swa]
    python evaluate.py lm       --units U.jsonl --out LM
    python evaluate.py swuggy | sblimp | tsc | ssc  --lm LM --model M --data FOLDER

`features` writes what a layer makes of each recording, [T, D], and `units` the codewords that its
head predicts, [T], both at 50 Hz; frame i stands at (i + 1/2) / 50 s. `abx` asks whether a token of
a phone is nearer to another token of it than to one of another phone: 0% errors are perfect, 50%
are chance, good models make 3 to 6%. `quality` tells how well units stand for phones. `lm` trains a
causal Transformer on units; with it `swuggy` asks which of two recordings is a word, `sblimp` which
one is grammatical, `tsc` which one ends a story as it began.

M is a run, a checkpoint of ours or a released one, a released model's name, or a baseline: mfcc,
wav2vec2_base, hubert_base, wavlm_base. A is a folder of audio, a manifest, or one file. Layers
count from 1. Features and units carry a hash of their model, so that they are never taken for
another one's.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import fmean
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model as spidr
import pretrain
from model import InputError, all_sum, option, require

RATE = 50  # frames a second
HOP, FIELD = 320, 400  # samples from one frame to the next, and samples that a frame sees


# ======== features and units ========


class Encoder(NamedTuple):
    """What makes frames of audio: one of our networks, or a baseline, which makes no units."""

    name: str
    hash: str  # of the weights
    layers: int  # L
    codebooks: int  # K, of the last K layers
    codewords: int  # V
    encode: Callable  # a waveform [N] -> what each of the L layers makes of it, [T, D]
    units: Callable = None  # a waveform [N] -> the units of each of the last K layers, [T]

    def layer(self, wanted=None, units=False):
        """The layer asked for; else the second that has a codebook, since phones are usually
        clearest there (6 of 12 in base), or the middle one of a baseline."""
        require(self.codebooks or not units, f"{self.name} has no codebooks, so it makes no units")
        first = self.layers - self.codebooks + 1  # that has a codebook
        usual = min(first + 1, self.layers) if self.codebooks else max(1, self.layers // 2)
        layer, lowest = wanted or usual, first if units else 1
        require(lowest <= layer <= self.layers, f"--layer {layer}: {self.name} has "
                f"{'units of ' if units else ''}layers {lowest} to {self.layers}")
        return layer


@torch.no_grad()
def extract(rows, encoder, layers, units=False, longest=60):
    """Yields (fileid, [the frames [T, D] or units [T] of each of these layers]) for each recording.
    What is longer than `longest` seconds goes in windows."""
    require(len({row.fileid for row in rows}) == len(rows), "a fileid names several recordings: "
            "give the manifest a column fileid in which all are different")
    for row in tqdm(rows, "audio", unit="file", leave=False, disable=None):
        wav, parts = read_recording(row), []
        for begin, end, keep in windows(len(wav), longest):
            found = encoder.units(wav[begin:end]) if units else encoder.encode(wav[begin:end])
            # The layers are counted from the last one, since only the last K have units.
            parts.append([found[layer - encoder.layers - 1][keep].cpu() for layer in layers])
        yield row.fileid, [torch.cat(part) for part in zip(*parts)]


# ======== ABX: the distance of two tokens ========


def angular(x, y):  # of frames of length 1: their angle, in half turns
    return (x @ y.T).clamp_(-1, 1).acos_().div_(math.pi)


def euclidean(x, y):  # A product of matrices would lose the small distances.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def identity(x, y):  # of units
    return (x[:, :1] != y[:, 0]).float()


DISTANCES = {"angular": angular, "euclidean": euclidean, "identity": identity}  # -> [Fx, Fy]


def dtw(table, tx, ty):
    """Dynamic time warping of P pairs of tokens: the mean distance of frames along the best path,
    which is the one with the least sum.

    At first table[i, j, p], with i and j from 1, is the distance of frame i of x from frame j of y
    in pair p; row 0 and column 0 are a border, with any content. The table is overwritten by the
    cost of the best path from (1, 1) to (i, j). Pair p has tx[p] and ty[p] frames. What is beyond
    them is padding and changes nothing. Returns [2, P]: d(x, y) and d(y, x). They differ only where
    several paths cost the same, because each then takes another one.
    """
    height, width, pairs = table.shape
    table[0], table[:, 0] = np.inf, np.inf
    table[0, 0] = 0
    cost = table.reshape(-1, pairs)  # Cell (i, j) is row i * width + j.
    length = np.zeros((2, *cost.shape), np.int16)  # the number of cells on that path
    # The cells with i + j = k depend on smaller k only. In `cost` they are width - 1 apart.
    for k in range(2, height + width - 1):
        first, last = max(1, k - width + 1), min(k - 1, height - 1)  # their i
        start, stop = first * width + k - first, last * width + k - last + 1
        here, diagonal, left, up = (slice(start - back, stop - back, width - 1)
                                    for back in (0, width + 1, 1, width))
        # Among equal costs the path prefers the diagonal, then the step along the second token: of
        # x from y the one to the left, of y from x the one up. A choice is a product with 0 or 1,
        # which is several times as fast as np.where.
        to_left = np.stack([cost[left] <= cost[up], cost[left] < cost[up]])
        straight = np.minimum(cost[left], cost[up])
        steps = length[:, up] + to_left * (length[:, left] - length[:, up])
        steps += (cost[diagonal] <= straight) * (length[:, diagonal] - steps)
        length[:, here] = steps + 1
        cost[here] += np.minimum(straight, cost[diagonal])
    end, pair = tx * width + ty, np.arange(pairs)
    return cost[end, pair] / length[:, end, pair]  # (13)


# ======== ABX: triples and cells ========


def abx_pools(items, context, max_size_group, random):
    """{(context, speaker): pool}. A pool, {phone: its tokens' numbers}, has the tokens of a speaker
    in a context, from which A and B are taken."""
    pools = defaultdict(lambda: defaultdict(list))
    order = range(len(items)) if max_size_group is None else random.permutation(len(items))
    for n in order:  # as in fastabx, what is left out has no role in any cell
        item = items[n]
        group = pools[item.context if context == "within" else "", item.speaker][item.phone]
        if max_size_group is None or len(group) < max_size_group:
            group.append(n)
    return {key: dict(sorted(pool.items())) for key, pool in sorted(pools.items())}


def abx_xs(pools, speaker, max_x_across, random):
    """{(context, speaker): [(phone A, speaker of X)]}: whose tokens of A are X for this pool."""
    speakers, xs = defaultdict(list), defaultdict(list)
    for (context, who), pool in pools.items():
        for phone in pool:
            speakers[context, phone].append(who)
    for (context, who), pool in pools.items():
        alone = speaker == "within" and max(map(len, pool.values())) == 1  # no A beside X
        for phone in pool if len(pool) > 1 and not alone else ():
            others = [who]
            if speaker == "across":
                others = [other for other in speakers[context, phone] if other != who]
                if max_x_across is not None:
                    others = random.permutation(others)[:max_x_across]
            if len(others):
                xs[context, who] += [(phone, other) for other in others]
    return xs


def errors(to_a, to_b):
    """From an X's distances from all A and all B: for each B the number of A for which the triple
    is wrong. It is wrong if X is nearer to B than to A. A tie counts half."""
    to_a = to_a[:, None]
    return (to_a > to_b).sum(0) + (to_a == to_b).sum(0) / 2  # (13)


def abx_cells(pools, xs, tokens, distance):
    """-> {(A, B, speaker of A and B): shares of wrong triples in each cell}, number of triples

    A cell is all triples of one A, one B, one speaker, one context and one speaker of X.
    """
    jobs = []
    for (context, who), groups in xs.items():
        y = [tokens[n] for group in pools[context, who].values() for n in group]
        x = [tokens[n] for phone, other in groups for n in pools[context, other][phone]]
        within = groups[0][1] == who  # X are the tokens of A and B, and y is all of them
        jobs.append((y if within else x, y))
    cells, triples = defaultdict(list), 0
    for ((context, who), groups), d in zip(xs.items(), distances(jobs, distance)):
        pool, rows = pools[context, who], iter(d)  # the X of the first group, then of the next
        ends = np.cumsum([len(group) for group in pool.values()])
        at = {phone: slice(end - len(pool[phone]), end) for phone, end in zip(pool, ends)}
        for phone, other in groups:
            x = list(itertools.islice(rows, len(pools[context, other][phone])))
            # Pairs of A and X. Of one speaker, X is also among the A, where it is never wrong: it
            # is -inf from itself.
            pairs = len(x) * (len(pool[phone]) - (other == who))
            wrong = sum(errors(row[at[phone]], row) for row in x)
            for phone_b, b in pool.items():
                if phone_b != phone and pairs:
                    size = pairs * len(b)
                    cells[phone, phone_b, who].append(wrong[at[phone_b]].sum() / size)
                    triples += size
    return cells, triples


def abx_details(features, item_file, speaker="within", context="within", distance="angular",
                max_size_group=None, max_x_across=None, seed=0):
    """abx() and what is worth knowing beside the error, as a dict."""
    random = np.random.default_rng(seed)
    items, tokens, note = abx_tokens(features, read_items(item_file), item_file)
    pools = abx_pools(items, context, max_size_group, random)
    xs = abx_xs(pools, speaker, max_x_across, random)
    cells, triples = abx_cells(pools, xs, tokens, distance)
    speakers, phones = ({getattr(item, name) for item in items} for name in ("speaker", "phone"))
    require(cells, f"{item_file}: no cell for ABX {speaker} speaker, {context} context: no A, B "
            f"and X among {len(items)} items of {len(speakers)} speaker(s), {len(phones)} phone(s)")
    # (13) First the mean over contexts and speakers of X, then over speakers of A and B, then over
    # pairs (A, B). If any context will do, the first two are one mean.
    pairs = defaultdict(list)
    for (a, b, _), shares in cells.items():
        pairs[a, b] += [fmean(shares)] if context == "within" else shares
    error = fmean(fmean(shares) for shares in pairs.values())
    return dict(error=100 * error, speaker=speaker, context=context, distance=distance,
                items=len(items), cells=sum(map(len, cells.values())), triples=triples,
                max_size_group=max_size_group, max_x_across=max_x_across, seed=seed, note=note)


def abx(features, item_file, speaker="within", context="within", **options):
    """The ABX error in percent. features {file: [T, D] at 50 Hz}; options as of abx_details.

    ZeroSpeech 2021 keeps max_size_group=10 tokens of a phone in a cell and max_x_across=5 speakers
    of X; here nothing is left out unless asked for.
    """
    details = abx_details(features, item_file, speaker, context, **options)
    if details["note"]:
        print(f"abx: {details['note']}", file=sys.stderr)
    return details["error"]


# ======== unit quality ========


def quality(units, phones, codewords=None):
    """How well units, {file: [unit, ...]} at 50 Hz, stand for phones, {file: [phone, ...]} at
    100 Hz. `codewords` is V; without it the bitrate takes the number of units that occur."""
    names, tracks = labelled_tracks(units, phones)
    table = count_table(tracks, names)
    likely = np.argsort(-table.sum(1), kind="stable")  # phones, the most frequent first
    phone_of = likely[table[likely].argmax(0)]  # each unit's phone; of equals the more frequent
    found = information(table)
    seconds = sum(len(track) for track, _ in tracks) / RATE
    kept = sum(len(dedupe(track)) for track, _ in tracks)
    found["bitrate"] = math.log2(codewords or found["active"]) * kept / seconds
    found["per"] = phone_error_rate(tracks, phone_of)
    return found | boundaries(tracks, phone_of)


def labelled_tracks(units, phones):
    """The phones' names, and for each file its units and the numbers of its phones."""
    files = sorted(units.keys() & phones.keys())
    require(files, "quality: no file has both units and phones")
    names = sorted({phone for file in files for phone in phones[file]})
    tracks = [(np.array(units[file]), np.searchsorted(names, phones[file])) for file in files]
    for file, (track, labels) in zip(files, tracks):
        # A recording is up to 3 phones longer than its units.
        require(abs(2 * len(track) - len(labels)) <= data.ALIGNMENT_SLACK + 3, f"{file}: not of "
                f"the same audio: {len(track)} units at 50 Hz, {len(labels)} phones at 100 Hz")
    return names, tracks


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
    h_phone, h_unit, h_both = (spidr.entropy(torch.from_numpy(p)).item()  # in bits
                               for p in (joint.sum(1), joint.sum(0), joint.flatten()))
    return dict(pnmi=(h_phone + h_unit - h_both) / h_phone if h_phone > 0 else 0.0,  # (14)
                phone_purity=float(joint.max(0).sum()), cluster_purity=float(joint.max(1).sum()),
                perplexity=2**h_unit, active=int((joint.sum(0) > 0).sum()))


def phone_error_rate(tracks, phone_of):
    """(14) Edits that turn the units' phones into the true ones, over the number of these."""
    heard = [dedupe(phone_of[units]) for units, _ in tracks]
    said = [dedupe(labels) for _, labels in tracks]
    return sum(map(edit_distance, heard, said)) / sum(map(len, said))  # (14)


def edit_distance(x, y):
    """How many insertions, deletions and substitutions make y of x."""
    steps = np.arange(len(y) + 1, dtype=np.int32)
    row = steps  # from nothing to the first j labels of y
    for label in x:
        longer = row + 1  # x's label is deleted,
        longer[1:] = np.minimum(longer[1:], row[:-1] + (y != label))  # or it is y's, or made so,
        row = np.minimum.accumulate(longer - steps) + steps  # or labels of y are inserted
    return int(row[-1])


def boundaries(tracks, phone_of, tolerance=2):
    """(14) F1 and R-value of where labels change, in steps of 10 ms. A true boundary is found if a
    predicted one lies within 20 ms of it and is not nearer to another true boundary."""
    found = true = predicted = 0
    for units, labels in tracks:
        said = np.flatnonzero(np.diff(labels)) + 1
        heard = 2 * (np.flatnonzero(np.diff(phone_of[units])) + 1)
        middles = np.array([-math.inf, *(said[1:] + said[:-1]) / 2, math.inf])
        begin = np.searchsorted(heard, np.maximum(said - tolerance, middles[:-1]), "left")
        end = np.searchsorted(heard, np.minimum(said + tolerance, middles[1:]), "right")
        found += int((end > begin).sum())  # (14)
        true += len(said)
        predicted += len(heard)
    recall, excess = found / max(true, 1), predicted / max(true, 1) - 1
    r1, r2 = math.hypot(1 - recall, excess), abs(recall - excess - 1) / math.sqrt(2)
    return dict(f1=2 * found / max(true + predicted, 1), r_value=1 - (r1 + r2) / 2)


# ======== the language model on units ========


def dedupe(labels):
    """An array of the labels without repetitions."""
    labels = np.asarray(labels)
    return labels[np.diff(labels, prepend=-1) != 0]


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
        margins = np.subtract.outer([scores[file] for file in right],
                                    [scores[file] for file in wrong])
        wins.append(np.mean((margins > 0) + (margins == 0) / 2))
    return fmean(wins)


def accuracies(pairs, scores):
    """{group: its accuracy in percent, its number of pairs}. A mean over pairs, so that a pair of
    many voices counts no more than another. pairs {pair: (groups, {voice: sides})}"""
    found = defaultdict(list)
    for groups, voices in pairs.values():
        for group in groups:
            found[group].append(pair_accuracy(voices.values(), scores))
    return {group: dict(accuracy=100 * fmean(shares), pairs=len(shares))
            for group, shares in sorted(found.items())}


# ======== plumbing: skip at first reading ========
# ======== loading encoders, reading recordings ========

BASELINES = ("mfcc", "wav2vec2_base", "hubert_base", "wavlm_base")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_encoder(name, device=DEVICE):
    if name == "mfcc":
        return Encoder(name, "", 1, 0, 0, mfcc)
    if name in BASELINES:
        return baseline(name, device)
    return spidr_encoder(str(name), spidr.load(name, device))


def spidr_encoder(name, net):
    c, device = net.config, net.mask_embedding.device

    def encode(wav):  # the layers' outputs
        return [x[0] for x in net.encode(wav[None].to(device))]

    def units(wav):  # what the student's heads predict, not the labels of the teacher
        return net.units(wav[None].to(device))[:, 0]

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
    return [torch.cat([c, deltas(c), deltas(deltas(c))]).T.contiguous()]


def baseline(name, device, pretrained=True):
    """One of torchaudio's. pretrained=False: random weights, without a download."""
    torchaudio = data.import_torchaudio(name)
    pipeline = getattr(torchaudio.pipelines, name.upper())
    make = pipeline.get_model if pretrained else getattr(torchaudio.models, name)
    net = make().eval().to(device)

    def encode(wav):
        return [x[0] for x in net.extract_features(wav[None].to(device))[0]]

    return Encoder(name, hash_weights(net), 12, 0, 0, encode)


def read_recording(row):
    try:
        wav = data.standardise(data.read_audio(row.path))
        require(len(wav) >= FIELD, f"{len(wav)} samples are too short for a frame")
    except InputError as error:
        raise InputError(f"{row.where}: {error}") from None
    return wav


def windows(samples, longest):
    """[(first sample, end sample, frames to keep)]. A recording of over `longest` seconds goes in
    windows that overlap, of which the middle two thirds are kept: attention over an hour does not
    fit, and the network has never seen one."""
    if samples <= longest * data.SAMPLE_RATE:
        return [(0, samples, slice(None))]
    frames, context, found = (samples - FIELD) // HOP + 1, longest * RATE // 6, []
    for first in range(0, frames, 4 * context):
        begin, end = max(0, first - context), min(first + 5 * context, frames)
        keep = slice(first - begin, first - begin + 4 * context)
        found.append((begin * HOP, (end - 1) * HOP + FIELD, keep))
    return found


# ======== ABX: items and their frames ========


Item = namedtuple("Item", "file first end phone context speaker")  # frames from first to end - 1


def read_items(path):
    """The items of an item file. Frame i is one's if onset <= (i + 1/2) / RATE <= offset.

    In decimals: an onset such as 0.29 would fall on the wrong side of a frame in floating point.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file") from None
    columns = "#file onset offset #phone prev-phone next-phone speaker".split()
    names, items = lines[0].split() if lines else [], []
    require(set(columns) <= set(names), f"{path}:1: an item file begins with {' '.join(columns)}")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            file, onset, offset, phone, before, after, speaker = map(
                dict(zip(names, line.split())).__getitem__, columns)
            first = math.ceil(Decimal(onset) * RATE - Decimal("0.5"))
            end = math.floor(Decimal(offset) * RATE + Decimal("0.5"))
        except (KeyError, ArithmeticError, ValueError):
            raise InputError(f"{path}:{number}: not an item: {line[:80]!r}") from None
        items.append(Item(file, max(first, 0), end, phone, f"{before} {after}", speaker))
    return items


def abx_tokens(features, items, item_file):
    """-> the items that can be used, the frames [T, D] of each, and a line on the others."""
    checked, used, tokens, lost = {}, [], [], Counter()
    for file in {item.file for item in items} & features.keys():
        x = torch.as_tensor(features[file]).float().cpu()
        require(x.ndim <= 2 and x.sum().isfinite(), f"{file}: features must be finite and [T, D]")
        checked[file] = x if x.ndim == 2 else x[:, None]
    for item in items:
        found = checked.get(item.file, [])[item.first : item.end]
        if len(found):
            used.append(item)
            tokens.append(found)
            lost["cut short at the end of their features"] += len(found) < item.end - item.first
        elif item.file in checked:
            lost["left out, no frame lies within them"] += 1
        else:
            lost["left out, no features of their files"] += 1
    note = "; ".join(f"{n} of {len(items)} items {why}" for why, n in lost.items() if n)
    require(used, f"{item_file}: none of its {len(items)} items can be used: {note}")
    return used, tokens, note


def strung(tokens, distance):
    """The frames of these tokens, one after the other [F, D], and the tokens' lengths [N]."""
    frames = torch.cat(tokens)
    if distance == "angular":  # As in fastabx a frame of zeros points to (1, ..., 1).
        frames = frames / frames.norm(dim=1, keepdim=True)
        frames.nan_to_num_(1 / math.sqrt(frames.shape[1]))
    return frames, np.array([len(token) for token in tokens])


# ======== ABX: many pairs at a time ========

ROWS = 8  # tokens x of a block
CHUNK = 1 << 24  # distances of frames that a thread holds at a time


def align(blocks, distance):
    """For each block the distances [2, P] of its pairs: X from Y, and Y from X.

    A block is (frames of some tokens x [Fx, D], the tokens' lengths [X], the same of y, pairs);
    pairs (i [P], j [P]) tells which X are compared with which Y. Pairs of like lengths, of whatever
    block, make a batch, in which they are padded to the longest.
    """
    tables, pairs, size = [], [], 0
    for x, tx, y, ty, (i, j) in blocks:
        tables.append(DISTANCES[distance](x, y).flatten())
        # Frames m of X and n of Y, from 0, will be flat[start + m * step + n] apart.
        start = size + (np.cumsum(tx) - tx)[i] * len(y) + (np.cumsum(ty) - ty)[j]
        pairs.append([start, np.full(len(i), len(y)), tx[i], ty[j]])
        size += len(tables[-1])
    flat = torch.cat(tables).numpy()
    start, step, tx, ty = np.concatenate(pairs, 1)
    found, kinds = np.empty((2, len(start)), np.float32), tx // 8 * ty.max() + ty // 8
    for kind in np.unique(kinds):
        some = np.flatnonzero(kinds == kind)
        m, n = np.arange(tx[some].max())[:, None, None], np.arange(ty[some].max())[:, None]
        table = np.empty((len(m) + 1, len(n) + 1, len(some)), np.float32)
        table[1:, 1:] = flat.take(start[some] + m * step[some] + n, mode="clip")
        found[:, some] = dtw(table, tx[some], ty[some])
    return np.split(found, np.cumsum([len(start) for start, *_ in pairs])[:-1], 1)


def distances(jobs, distance):
    """Yields for each job, two lists of tokens [T, D], the distances [X, Y] of all x from all y.
    Where x is y, every pair is aligned only once, and a token is -inf from itself."""
    found = in_threads(lambda blocks: align(blocks, distance), chunks(jobs, distance))
    found = itertools.chain.from_iterable(found)  # of each block
    for x, y in jobs:
        d = np.full((len(x), len(y)), -np.inf, np.float32)
        for first in range(0, len(x), ROWS):
            i, j = compared(x, y, first)
            there, back = next(found)
            d[first + i, j] = there
            if x is y:
                d[j, first + i] = back
        yield d


def compared(x, y, first):
    """Which of the tokens x[first : first + ROWS] are compared with which of y: [P], [P]."""
    rows = min(ROWS, len(x) - first)
    return np.triu_indices(rows, first + 1 if x is y else -rows, len(y))


def chunks(jobs, distance):
    """The blocks of all jobs, in lists of about CHUNK distances of frames, as align takes them."""
    chunk, size = [], 0
    for x, y in jobs:
        y_frames, ty = strung(y, distance)
        x_frames, tx = (y_frames, ty) if x is y else strung(x, distance)
        x_at, y_at = np.append(0, tx.cumsum()), np.append(0, ty.cumsum())
        for first in range(0, len(x), ROWS):
            end = min(first + ROWS, len(x))
            begin = first if x is y else 0  # in y: what comes before was compared before
            i, j = compared(x, y, first)
            chunk.append((x_frames[x_at[first] : x_at[end]], tx[first:end],
                          y_frames[y_at[begin] :], ty[begin:], (i, j - begin)))
            size += len(chunk[-1][0]) * len(chunk[-1][2])
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def in_threads(work, jobs):
    """Yields work(job) for each job, in order; as many threads as torch uses are at work.

    Each of them works alone: to share out every small operation would cost more than it brings.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while some := list(itertools.islice(jobs, threads)):
                yield from pool.map(work, some)
    finally:
        torch.set_num_threads(threads)


# ======== the verbs features, units, abx, quality ========


def write_json(path, record):
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


def print_row(name, *cells):
    """A line of a table."""
    texts = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells)
    print(f"{name!s:24}", *(f"{text:>14}" for text in texts), flush=True)


def write_outputs(args):
    """The verbs features and units."""
    out, units = Path(args.out), args.verb == "units"
    require(not out.exists(), f"{out} is there already: name another one, or remove it")
    rows = data.read_manifest(args.audio)
    for row in rows:
        data.file_name(row.fileid, row.where)
    encoder = load_encoder(args.model)
    layer = encoder.layer(args.layer, units)
    found = extract(rows, encoder, [layer], units, args.longest)
    write = write_units if units else write_features
    write(out, ((fileid, x) for fileid, (x,) in found), encoder, layer)
    print(f"{len(rows)} files, layer {layer} of {encoder.name}, {RATE} Hz: {out}")


def units_of(rows, encoder, layer=None):
    """{fileid: units [T]} of a layer."""
    found = extract(rows, encoder, [encoder.layer(layer, units=True)], units=True)
    return {file: units.numpy() for file, (units,) in found}


def about(encoder, layer):
    return dict(model=encoder.name, hash=encoder.hash, layer=layer, frame_rate=RATE)


def meta_of(path):
    """X.meta.json, which tells whose units those in X.jsonl are."""
    return Path(path).with_suffix(".meta.json")


def write_units(path, found, encoder, layer):
    """DiscoPhon's format. The file gets its name when it is whole."""
    write_json(meta_of(path), about(encoder, layer) | dict(codewords=encoder.codewords))
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        for fileid, units in found:
            file.write(json.dumps(dict(file=fileid, units=units.tolist())) + "\n")
    os.replace(part, path)


def write_features(folder, found, encoder, layer):
    part = Path(f"{folder}.part")
    for fileid, frames in found:
        path = part / f"{fileid}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, frames.numpy())
    write_json(part / "meta.json", about(encoder, layer))
    os.replace(part, folder)


def read_features(folder, files):
    """{file: [T, D]} of those files whose .npy is in the folder, and its meta.json."""
    path, features = Path(folder, "meta.json"), {}
    try:
        meta = json.loads(path.read_text()) if path.exists() else {}
        for file in files:
            path = Path(folder, data.file_name(file, folder) + ".npy")
            if path.exists():
                features[file] = torch.from_numpy(np.load(path))
    except (ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path}: damaged, or no array of numbers: {error}") from None
    return features, meta


def read_units(path, like=None):
    """-> meta, {file: units [T]}. The meta must be as another one is, but for the name of the
    model, since a model may have several."""
    require(meta_of(path).exists(), f"{meta_of(path)} is not there: it says whose units they are")
    meta = read_json(meta_of(path))
    try:
        records = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        units = {record["file"]: np.array(record["units"]) for record in records}
        codewords, _ = meta["codewords"], meta["model"]
        for name in ("hash", "layer", "frame_rate", "codewords"):
            wanted = (like or {"frame_rate": RATE}).get(name, meta[name])
            require(meta[name] == wanted, f"{path}: {name} is {meta[name]!r}, not {wanted!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a file that 'evaluate.py units' wrote: {error}") from None
    require(units, f"{path}: no units")
    for file, x in units.items():
        fits = x.ndim == 1 and len(x) and x.dtype == int and 0 <= x.min() and x.max() < codewords
        require(fits, f"{path}: {file}: not a list of units from 0 to {codewords - 1}")
    return meta, units


def abx_by_layer(args):
    """Yields (layer, features of the items' files)."""
    files = {item.file for item in read_items(args.items)}
    if args.features:
        features, meta = read_features(args.features, files)
        require(meta.get("frame_rate", RATE) == RATE, f"{args.features}: not at {RATE} Hz")
        yield meta.get("layer", "-"), features
        return
    rows, encoder = data.read_manifest(args.audio, only=files), load_encoder(args.model)
    require(rows, f"{args.audio}: none of the {len(files)} files of {args.items}")
    layers = [encoder.layer(args.layer)] if args.layer else range(1, encoder.layers + 1)
    # A frame is 3 kB in base. Where those of all layers would take more than 4 GB, the audio is
    # passed over several times.
    at_once = max(1, 1_300_000 * HOP // sum(row.num_samples for row in rows))
    for some in (layers[i : i + at_once] for i in range(0, len(layers), at_once)):
        found = dict(extract(rows, encoder, some, longest=args.longest))
        for n, layer in enumerate(some):
            yield layer, {file: outputs[n] for file, outputs in found.items()}


def run_abx(args):
    require(bool(args.features) != bool(args.model and args.audio),
            "abx takes --features, or --model and --audio")
    speakers = ["within", "across"] if args.speaker == "both" else [args.speaker]
    print_row("ABX error, %", "layer", *speakers)
    records = []
    for layer, features in abx_by_layer(args):
        found, problem = {}, None
        for speaker in speakers:
            try:
                found[speaker] = abx_details(
                    features, args.items, speaker, args.context, args.distance,
                    args.max_size_group, args.max_x_across, args.seed)
            except InputError as error:  # of a single speaker there is no ABX across
                problem = error
        if not found:
            raise problem
        shown = (found[one]["error"] if one in found else "-" for one in speakers)
        print_row(args.model or args.features, layer, *shown)
        records += [dict(layer=layer) | one for one in found.values()]
    print(*found.values(), sep="\n")
    if problem:
        print(problem, file=sys.stderr)
    if args.out:
        write_json(args.out, records)


def read_phones(path):
    return {file: phones for file, (phones, _) in data.read_alignments(path).items()}


def run_quality(args):
    header, units = read_units(args.units)
    found = quality(units, read_phones(args.alignments), header["codewords"])
    print(f"units of layer {header['layer']} of {header['model']}; bitrate in bit/s")
    for name, value in found.items():
        print_row(name, float(value))
    if args.out:
        write_json(args.out, header | found)


# ======== the verb discophon ========

PUBLISHED = """published, SpidR of 20 VoxPopuli languages adapted with 0, 10 min, 1 h, 10 h, mean of
the test languages: ABX of units, layer 6: 13.30 10.54 9.59 9.09; of features: 6.57 6.24 5.53 5.09;
PNMI, layer 7: 59.8 64.1 65.4 65.6"""
ABX_COLUMNS = "units within", "units across", "features within", "features across"


def run_discophon(args):
    """Phoneme discovery, language by language. What is not there is a dash."""
    root, out, encoder = Path(args.data), Path(args.out), load_encoder(args.model)
    layer = encoder.layer(args.layer, units=True)
    there = sorted(path.parent.name for path in root.glob(f"audio/*/{args.split}"))
    languages = args.languages.split(",") if args.languages else there
    missing = ", ".join(sorted({*languages} - {*there}))
    require(languages and not missing,
            f"{root}: no audio/CODE/{args.split}{' of ' * bool(missing)}{missing}")
    out.mkdir(parents=True, exist_ok=True)
    columns = "pnmi", "per", "f1", "r_value", *ABX_COLUMNS
    print_row(f"layer {layer}", *columns)
    results = {}
    for code in languages:
        results[code] = discover(root, out, encoder, layer, code, args)
        print_row(code, *(results[code].get(name, "-") for name in columns))
    results["mean"] = {name: fmean(found[name] for found in results.values()) for name in columns
                       if all(name in found for found in results.values())}
    print_row("mean", *(results["mean"].get(name, "-") for name in columns))
    write_json(out / f"discophon-{args.split}.json", about(encoder, layer) | dict(results=results))
    print(PUBLISHED)


def discover(root, out, encoder, layer, code, args):
    """The measures of one language, in percent but for the R-value."""
    name, found = f"{code}-{args.split}", {}
    rows = data.read_manifest(root / "audio" / code / args.split)
    units = units_of(rows, encoder, layer)
    write_units(out / f"units-{name}.jsonl", units.items(), encoder, layer)
    alignment, items = (root / "alignment" / f"alignment-{name}.txt",
                        root / "item" / f"triphone-{name}.item")
    if alignment.exists():
        measures = quality(units, read_phones(alignment), encoder.codewords)
        found = {key: 100 * measures[key] for key in ("pnmi", "per", "f1")}
        found["r_value"] = measures["r_value"]
    if items.exists():
        files = {item.file for item in read_items(items)}
        rows = [row for row in rows if row.fileid in files]
        frames = {file: x for file, (x,) in extract(rows, encoder, [layer])}
        if args.keep_features:
            write_features(out / f"features-{name}", frames.items(), encoder, layer)
        for kind, features, distance in (("units", units, "identity"),
                                         ("features", frames, "angular")):
            for speaker in "within", "across":
                found[f"{kind} {speaker}"] = abx(
                    features, items, speaker, distance=distance,
                    max_size_group=args.max_size_group, max_x_across=args.max_x_across)
    for path in alignment, items:
        if not path.exists():
            print(f"{path} is not there", file=sys.stderr)
    return found


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


def lm_batch(sequences, boundary, o, number):
    """Micro-batch `number`, a function of (seed, number): [B, T + 1], padded with -1. The sequences
    are sorted by length. The batch has a random one and those after it, as many as fit. Each stands
    between two boundaries. What is longer than the context is cropped at random."""
    rng, rows = np.random.default_rng([o.seed, number]), []
    for units in sequences[rng.integers(len(sequences)) :]:
        length = min(len(units) + 1, o.context)
        if rows and (len(rows) + 1) * length > o.batch_tokens:
            break
        start = rng.integers(len(units) + 2 - length)
        crop = np.append(units, boundary)[start : start + length]
        rows.append(torch.from_numpy(np.append(boundary, crop)))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def lm_step(lm, optimizer, micro_batches, lr, options, ranks):
    """One optimizer step. The loss is a mean over the tokens of all ranks and micro-batches."""
    optimizer.zero_grad()
    sums = torch.zeros(2, device=ranks.device)  # loss, tokens
    for tokens in micro_batches:
        with pretrain.autocast(options, ranks):
            loss = lm(tokens.to(ranks.device)).sum()
        loss.backward()
        sums += torch.stack([loss.detach(), (tokens[:, 1:] >= 0).sum().to(loss)])
    gradients = [p.grad for p in pretrain.trained(optimizer)]
    all_sum([*gradients, sums])
    loss, count = sums
    metrics = pretrain.average_and_clip(optimizer, count, lr, options)
    optimizer.step()
    return metrics | {"loss": loss / count}


def train_lm(arguments):
    # ======== options, setup ========
    o, _ = pretrain.parse_options(LMOptions, LM_PRESETS, argv=arguments)
    require(o.units, "lm needs --units, a file that 'evaluate.py units' writes")
    pretrain.check_numbers(o)
    require(min(o.layers, o.dim, o.heads, o.context) > 0 and o.dim % o.heads == 0
            and 0 <= o.dropout < 1, "sizes are positive, dim a multiple of heads, dropout under 1")
    place = pretrain.setup(o)
    torch.manual_seed(o.seed)

    # ======== data, model, optimizer ========
    header, units = read_units(o.units)
    sequences = sorted(map(dedupe, units.values()), key=len)
    valid = list(read_units(o.valid, like=header)[1].values()) if o.valid else []
    sizes = dict(codewords=header["codewords"], layers=o.layers, dim=o.dim, heads=o.heads,
                 context=o.context)
    lm = UnitLM(**sizes, dropout=o.dropout).to(place.device)
    optimizer = pretrain.make_optimizer(lm, o)

    # ======== resume ========
    trained = header | dict(utterances=len(units), tokens=sum(map(len, sequences)))
    first, totals = pretrain.resume(pretrain.open_run(o, lm, place, about=trained), lm, optimizer)
    if first >= o.steps:
        return pretrain.finished(o, place)
    log, stop = pretrain.Log(o, place, o.steps, first, totals), pretrain.Stop(place)

    # ======== loop ========
    for step in range(first, o.steps):
        pretrain.seed_step(o.seed, step, place.rank)
        done = step + 1
        micro_batches = [lm_batch(sequences, lm.boundary, o, i * place.world + place.rank)
                         for i in range(step * o.accumulate, done * o.accumulate)]
        log.add(lm_step(lm.train(), optimizer, micro_batches, pretrain.lr_at(step, o), o, place))
        pretrain.end_of_step(
            done, o, place, optimizer, log, stop,
            lambda: {"valid_loss": -torch.tensor([score_units(lm, x) for x in valid]).mean()}
            if valid else {},
            lambda: dict(state=lm.state_dict(), lm=sizes, units=header))
    if place.first:
        print(f"{o.out}: {o.steps} steps, loss {log.record['loss']:.3f}")
        print(f"next: python evaluate.py swuggy --lm {o.out} --model {header['model']} --data DIR")


def load_lm(path, device=DEVICE):
    """The language model, and the header of the units that it was trained on."""
    path, checkpoint = spidr.read_checkpoint(path)
    require("lm" in checkpoint and "units" in checkpoint,
            f"{path}: not a language model; 'evaluate.py lm' trains one")
    lm = spidr.load_state(UnitLM(**checkpoint["lm"]), checkpoint["model"], path)
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
    if column == "type":
        return ["all", f"type {row['type']}"]
    if column is None:
        return ["all"]
    count = 0 if row["frequency"] == "oov" else float(row["frequency"])
    band = next(name for name, most in BANDS.items() if 0 <= count <= most)
    return ["all", f"frequency {band}"] + ["in vocabulary"] * (count > 0)


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
            groups, voices = pairs.setdefault(row["id"], (groups_of(column, row), {}))
            sides = voices.setdefault(row["voice"], ([], []))
            side = sides[{"0": 0, "1": 1}[row["correct"]]]
            side.append(row["filename"].removesuffix(".wav"))
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
    for name in names:
        require(name in units, f"{args.units or folder}: no units of {name}")
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
    for group, found in results.items():
        print_row(group, found["accuracy"], found["pairs"])
    if args.out:
        path = Path(args.out, task, "dev.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} {scores[name]:.6f}\n" for name in names))
        write_json(Path(args.out, f"{args.verb}.json"), dict(lm=args.lm, **header, results=results))
    return results


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from None


def options_of(run):
    return read_json(Path(run, "config.json")).get("options", {})


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
    "--alignments": dict(help="CSV fileid,phones,language: a phone every 10 ms; or intervals"),
    "--lm": dict(help="a run's folder or a checkpoint of 'lm'"),
    "--data": dict(help="wav files and gold.csv, for tsc ID_correct.wav and ID_incorrect.wav"),
    "--layer": dict(type=positive, help="from 1 [the second with a codebook; abx: all]"),
    "--longest": dict(type=positive, default=60, help="seconds; above them in windows [60]"),
    "--speaker": dict(choices=["within", "across", "both"], default="both"),
    "--context": dict(choices=["within", "any"], default="within"),
    "--distance": dict(choices=[*DISTANCES], default="angular"),
    "--max-size-group": dict(type=positive, help="tokens of a phone, 10 in ZeroSpeech [all]"),
    "--max-x-across": dict(type=positive, help="speakers of X, 5 in ZeroSpeech [all]"),
    "--languages": dict(help="codes, separated by commas [all that are there]"),
    "--split": dict(default="test", help="of DiscoPhon's audio [test]"),
    "--keep-features": dict(action="store_true", help="write the features too"),
    "--seed": dict(type=int, default=0, help="of that choice [0]"),
    "--out": dict(help="a folder; units: JSONL, abx, quality: JSON"),
}
# Each verb's function and options; those with ! are needed.
OUTPUTS = write_outputs, "--model! --audio! --out! --layer --longest"
PAIRS = run_pairs, "--lm! --data! --model --units --out"
VERBS = {
    "features": OUTPUTS, "units": OUTPUTS,
    "abx": (run_abx, "--items! --model --audio --features --layer --longest --speaker --context "
                     "--distance --max-size-group --max-x-across --seed --out"),
    "quality": (run_quality, "--units! --alignments! --out"),
    "discophon": (run_discophon, "--model! --data! --out! --languages --split --layer "
                                 "--max-size-group --max-x-across --keep-features"),
    "lm": (None, ""),
    **dict.fromkeys(TASKS, PAIRS),
}


def parse(arguments=None):
    parser = pretrain.Parser(description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for verb, (function, options) in VERBS.items():
        command = verbs.add_parser(verb, allow_abbrev=False)
        command.set_defaults(function=function)
        for name in options.split():
            needed = {"required": True} if name.endswith("!") else {}
            command.add_argument(name.rstrip("!"), **OPTIONS[name.rstrip("!")], **needed)
    return parser.parse_args(arguments)


def main():
    if sys.argv[1:2] == ["lm"]:  # its options are a dataclass, like those of the training scripts
        return train_lm(sys.argv[2:])
    args = parse()
    if getattr(args, "out", None):  # what cannot be written is told before the work
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    spidr.run(main)
