"""Audio in: manifests, reading, batches, masks, alignments, and the toy world.

    python data.py manifest FOLDER OUT.csv     lists a folder's audio, hours by language, what was left out and why
    python data.py toy FOLDER                  writes the toy world to listen to

A manifest is a CSV (fileid,path,num_samples[,language][,speaker]; num_frames will do), a fairseq TSV, or just a folder.
num_samples counts at 16 kHz, whatever the rate of the file. An alignment file is a CSV fileid,phones,language with a
phone every 10 ms. Order, crops and masks are pure functions of (seed, epoch, index): neither the number of workers nor
a restart changes them.
"""

import csv
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from model import InputError, num_frames, require, run

SAMPLE_RATE = 16000
PHONE = 160  # samples in a frame of an alignment: 100 Hz
AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")
UNKNOWN_PHONES = ("", "UNK", "unk", "<unk>", "SPN", "spn", "PAD", "<pad>")  # ignored in the loss
IGNORED = -100


# ======== manifests ========


class Row(NamedTuple):
    fileid: str
    path: str
    num_samples: int  # at 16 kHz
    language: str = ""
    speaker: str = ""
    where: str = ""  # "manifest:line", for messages


def read_manifest(path):
    """The rows of a CSV or a fairseq TSV, or of a folder or a file of audio."""
    path = Path(path)
    require(path.exists(), f"{path}: no such manifest, folder or file")
    if path.is_dir():
        rows, left_out = scan_folder(path)
        for name, why in left_out:
            print(f"left out: {name}: {why}", file=sys.stderr)
        return rows
    if path.suffix.lower() in AUDIO:
        samples, problem = inspect(path)
        require(not problem, f"{path}: {problem}")
        return [Row(path.stem, str(path), samples, where=str(path))]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(read_tsv(file, path) if path.suffix.lower() == ".tsv" else read_csv(file, path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no kind of audio that is read, nor a CSV or TSV manifest: {error}") from None
    require(rows, f"{path}: an empty manifest")
    return rows


def read_csv(file, path):
    lines = csv.reader(file)
    header = next(lines, [])
    length = "num_frames" if "num_frames" in header else "num_samples"
    for column in ("path", length):
        require(column in header, f"{path}:1: the header has no column {column!r}; it reads {','.join(header)!r}")
    at = [header.index(name) if name in header else None for name in ("fileid", "path", length, "language", "speaker")]
    folder, name = "" if path.parent == Path() else path.parent, str(path)
    for number, line in enumerate(lines, 2):  # a million times: checks before messages, nothing made in vain
        if len(line) != len(header):
            require(not line, f"{name}:{number}: {len(line)} columns, the header has {len(header)}")
            continue
        fileid, audio, samples, language, speaker = ("" if i is None else line[i] for i in at)
        if not samples.isdigit() or samples == "0":
            raise InputError(f"{name}:{number}: {samples!r} is not a number of samples")
        fileid = fileid or Path(audio).stem
        yield Row(fileid, os.path.join(folder, audio), int(samples), language, speaker, f"{name}:{number}")


def read_tsv(file, path):
    root, lines = file.readline().rstrip("\r\n"), []
    require("\t" not in root, f"{path}:1: the first line of a TSV manifest is the root folder, alone")
    for number, line in enumerate(file, 2):
        name, _, samples = line.rstrip("\r\n").partition("\t")
        require(samples.isdigit() or not line.strip(), f"{path}:{number}: expected 'relative path<TAB>samples'")
        if samples:
            lines.append((Path(name), int(samples), f"{path}:{number}"))
    ids = file_ids([name for name, _, _ in lines])
    return [Row(id, os.path.join(path.parent, root, name), n, where=where) for id, (name, n, where) in zip(ids, lines)]


def file_ids(names):
    """The names without folder and suffix; where that is not unique without suffix alone, or as they are."""
    shorter = [[name.stem, str(name.with_suffix("")), str(name)] for name in names]
    count = [Counter(column) for column in zip(*shorter)]
    return [next(id for i, id in enumerate(ids) if count[i][id] == 1 or i == 2) for ids in shorter]


def scan_folder(folder, minimum=2000):
    """The rows of a folder's audio (language: its first sub-folder), and (name, why) of what was left out."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    paths = [p for p in files if p.suffix.lower() in AUDIO]
    require(paths, f"{folder}: no audio in this folder ({', '.join(AUDIO)})")
    ids = file_ids([path.relative_to(folder) for path in paths])
    others = Counter(p.suffix.lower() or "no suffix" for p in files if p.suffix.lower() not in AUDIO)
    rows, left_out = [], [(f"{n} x {suffix}", "not a kind of audio that is read") for suffix, n in others.items()]
    with ThreadPoolExecutor(8) as pool:
        found = tqdm(pool.map(lambda path: inspect(path, minimum), paths), total=len(paths), desc=str(folder),
                     unit="file", leave=False, disable=None)
        for path, fileid, (samples, problem) in zip(paths, ids, found):
            name = path.relative_to(folder)
            if problem:
                left_out.append((str(name), problem))
                continue
            language = name.parts[0] if len(name.parts) > 1 else ""
            rows.append(Row(fileid, str(path), samples, language, where=str(path)))
    if not rows:
        raise InputError(f"{folder}: none of its {len(paths)} files is usable; one of them: {' '.join(left_out[-1])}")
    return rows, left_out


def inspect(path, minimum=0):
    """A file's length in samples at 16 kHz, and what is wrong with it, if anything: its end is read as well."""
    if not Path(path).exists():
        return 0, "no such file"
    try:
        with soundfile.SoundFile(path) as file:
            length = -(-file.frames * SAMPLE_RATE // file.samplerate)  # rounded up, as the resampler does
            if file.samplerate != SAMPLE_RATE:
                resampler(file.samplerate)  # if torchaudio does not load, that is said now
            if file.frames == 0:
                return 0, "an empty recording"
            tail = min(file.frames, file.samplerate)
            file.seek(file.frames - tail)
            end = file.read(tail, dtype="float32", always_2d=True)
            if len(end) < tail:
                return length, "cut short"
            if not np.isfinite(end).all():
                return length, "samples that are not numbers"
            if np.ptp(end) == 0:  # a silent end: is there anything before it?
                file.seek(0)
                if np.ptp(file.read(dtype="float32")) == 0:
                    return length, "silent throughout"
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        return 0, f"not audio that can be read, or cut short ({error})"
    return length, f"{length} samples at 16 kHz, under the minimum of {minimum}" if length < minimum else ""


def parse_seconds(text):
    for unit, seconds in (("min", 60), ("h", 3600), ("s", 1)):
        if text.endswith(unit) and text.removesuffix(unit).replace(".", "", 1).isdigit():
            return float(text.removesuffix(unit)) * seconds
    raise InputError(f"--budget {text!r}: an amount of time like 10min, 1h or 90s")


def check_audio(rows, minimum, most=2000):
    """The same rows, their files opened and measured (of a long manifest `most`, evenly): before hours are spent."""
    short = next((row for row in rows if row.num_samples < minimum), None)
    if short:
        raise InputError(f"{short.where}: {short.path}: {short.num_samples} samples, under the minimum of {minimum}: "
                         "remove the row ('data.py manifest' lists what can be used)")
    chosen = rows[:: max(1, -(-len(rows) // most))]
    with ThreadPoolExecutor(8) as pool:
        for row, (length, problem) in zip(chosen, pool.map(lambda row: inspect(row.path, minimum), chosen)):
            require(not problem, f"{row.where}: {row.path}: {problem}")
            require(length == row.num_samples, f"{row.where}: {row.path}: {row.num_samples} samples stated, the file "
                    f"has {length} at 16 kHz ('data.py manifest' counts them)")
    return rows


# ======== reading ========


def read_audio(path, start=0, samples=None):
    """Samples start .. start + samples of a file, counted at 16 kHz, mono, float32; only those are decoded."""
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            g = math.gcd(rate, SAMPLE_RATE)
            new, old = SAMPLE_RATE // g, rate // g  # `new` samples at 16 kHz are `old` of the file, exactly
            # More around the crop, for the resampling filter, and for MP3, whose frames need those before them.
            margin = 16_000 if file.format == "MP3" else 0 if rate == SAMPLE_RATE else 160
            first = max(0, start - margin) // new * new
            count = -1 if samples is None else -(-(start + samples + margin - first) // new) * old
            file.seek(min(first // new * old, file.frames))
            wav = torch.from_numpy(file.read(count, dtype="float32", always_2d=True).mean(1))
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InputError(f"{path}: {error}") from None
    if rate != SAMPLE_RATE and len(wav):
        wav = resampler(rate)(wav)
    wav = wav[start - first :][:samples]
    require(len(wav) == (samples or max(1, len(wav))), f"{path}: cut short at sample {start + len(wav)}")
    return wav


@lru_cache(maxsize=8)
def resampler(rate):
    return import_torchaudio(f"audio at {rate} Hz").transforms.Resample(rate, SAMPLE_RATE)


def import_torchaudio(what):
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise InputError(f"{what} needs torchaudio, which does not load here: {error}") from None
    return torchaudio


def standardise(wav):
    """Mean 0, variance 1: what the network expects."""
    wav = wav - wav.mean()
    std = wav.square().mean().sqrt()
    require(bool(torch.isfinite(std)), "samples that are not numbers")
    require(float(std) > 1e-7, "silence")
    return wav / std


# ======== alignments ========


def read_alignments(path):
    """{fileid: (phones, language)}, a phone every 10 ms."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such alignment file")
    csv.field_size_limit(2**31 - 1)  # an hour of phones is one field
    found = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            for column in ("fileid", "phones", "language"):
                require(column in (lines.fieldnames or []), f"{path}:1: the header has no column {column!r}")
            for line in lines:
                where = f"{path}:{lines.line_num}"
                require(line["phones"] and line["language"], f"{where}: no phones or no language")
                require(line["fileid"] not in found, f"{where}: {line['fileid']} is there twice")
                found[line["fileid"]] = (line["phones"].split(), line["language"])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV of alignments: {error}") from None
    require(found, f"{path}: no alignments in it")
    return found


def inventories(alignments):
    """{language: its phones}: SIL first, then the others by name. The place in the list is the class."""
    phones = defaultdict(set)
    for sequence, language in alignments.values():
        phones[language].update(sequence)
    return {language: ["SIL"] + sorted(found - {"SIL", *UNKNOWN_PHONES}) for language, found in sorted(phones.items())}


def phone_classes(alignments, inventory):
    """{fileid: classes as an array}; unknown phones are IGNORED. And how many of those there were."""
    index = {language: {phone: i for i, phone in enumerate(phones)} for language, phones in inventory.items()}
    classes, unknown = {}, 0
    for fileid, (phones, language) in alignments.items():
        require(language in index, f"alignments of {fileid}: language {language!r} is not one of {', '.join(index)}")
        row = np.array([index[language].get(phone, IGNORED) for phone in phones], dtype=np.int16)
        classes[fileid], unknown = row, unknown + int((row == IGNORED).sum())
    return classes, unknown


def aligned_rows(rows, alignments, path="the alignments", tolerance=5):
    """The rows that have alignments; alignments must fit the recordings (to 50 ms) and the manifest's languages."""
    by_id, seen = {row.fileid: row for row in rows}, Counter(row.fileid for row in rows)
    for fileid, (phones, language) in alignments.items():
        require(fileid in by_id, f"{path}: {fileid} is not in the manifest")
        require(seen[fileid] == 1, f"{path}: {fileid} names {seen[fileid]} recordings, {by_id[fileid].where} the last")
        row = by_id[fileid]
        require(abs(len(phones) - row.num_samples / PHONE) <= tolerance,
                f"{path}: {fileid}: {len(phones)} phones at 100 Hz, the recording has {row.num_samples / PHONE:.0f}")
        require(row.language in ("", language),
                f"{path}: {fileid}: language {language!r}, {row.where} says {row.language!r}")
    return [row._replace(language=alignments[row.fileid][1]) for row in rows if row.fileid in alignments]


def phones_of_crop(classes, start, frames):
    """Classes at 50 Hz for a crop that begins at sample `start`: every second one, from the nearest 10 ms on."""
    at = (start + PHONE // 2) // PHONE + 2 * np.arange(frames)
    return np.where(at < len(classes), classes[np.minimum(at, len(classes) - 1)], IGNORED)


# ======== masks and batches ========


def make_mask(batch, frames, rng, prob=0.8, span=10):
    """[B, T] bool: overlapping spans, about half of all frames, the same number in each row."""
    span = min(span, max(1, frames // 2))  # a recording shorter than a span still shows something
    mask = np.zeros((batch, frames), dtype=bool)
    for row in mask:
        spans = max(2, int(prob * frames / span + rng.random()))
        starts = rng.choice(frames - span + 1, min(spans, frames - span + 1), replace=False)
        row[starts[:, None] + np.arange(span)] = True
    fewest = mask.sum(1).min(initial=frames)
    for row in mask:
        masked = np.flatnonzero(row)
        row[rng.choice(masked, len(masked) - fewest, replace=False)] = False
    return mask


# Randomness for one purpose has its own number after the seed: 0 unlabelled batches, 1 labelled ones, 2 validation;
# in meta-training 4 chunks, 5 their order, 6 and 7 an episode's batches; 8 forgetting; 9 the budget of adapt.py.
class Batches:
    """Micro-batch i of a run, for any i: a map from a number to audio, masks and, with `classes`, phones.

    Utterances of like length share a bucket, a bucket is cut into batches of at most `budget` samples, and all
    utterances of a batch are cropped at random to the shortest of them, `max_samples` at most: nothing is ever padded.
    An epoch is a shuffle within the buckets and of the batches, cut into groups of `group` batches: one optimizer step
    over all ranks. With `classes` (supervision) the batches of a group share a language.
    """

    def __init__(self, rows, config, options, group=1, classes=None, stream=(0,)):
        self.rows, self.config, self.classes, self.group = rows, config, classes, group
        self.seed, self.budget, self.max_samples = (options.seed, *stream), options.batch_samples, options.max_samples
        self.mask_shape, self.multiple = (options.mask_prob, options.mask_span), options.crop_multiple
        self.lengths = np.minimum([row.num_samples for row in rows], self.max_samples)
        languages = np.array([row.language if classes is not None else "" for row in rows])
        self.buckets = {name: self.make_buckets(np.flatnonzero(languages == name)) for name in sorted(set(languages))}
        self.per_epoch = len(self.order(0))
        count = sum(-(-len(bucket) // size) for buckets in self.buckets.values() for bucket, size in buckets)
        require(self.per_epoch, f"{count} batches are too few for {group} ranks x micro-batches: fewer ranks, a "
                "smaller batch_samples, or more audio")

    def make_buckets(self, index, ratio=1.2):
        """[(utterances, how many make a batch)]: the longest of a bucket is at most `ratio` times the shortest."""
        index = index[np.argsort(self.lengths[index], kind="stable")]
        lengths, buckets, first = self.lengths[index], [], 0
        while first < len(index):
            last = int(np.searchsorted(lengths, lengths[first] * ratio, side="right"))
            buckets.append((index[first:last], max(1, self.budget // int(lengths[last - 1]))))
            first = last
        return buckets

    @lru_cache(maxsize=2)
    def order(self, epoch):
        """The batches of an epoch, arrays of utterances, each a whole number of groups."""
        rng = np.random.default_rng([*self.seed, epoch])
        groups = []
        for buckets in self.buckets.values():
            batches = []
            for bucket, size in buckets:
                bucket = rng.permutation(bucket)
                batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
            batches = [batches[i] for i in rng.permutation(len(batches))]
            if self.classes is not None and len(batches) % self.group:  # a small language is heard twice, not dropped
                batches = (batches * self.group)[: -(-len(batches) // self.group) * self.group]
            groups += [batches[i : i + self.group] for i in range(0, len(batches) - self.group + 1, self.group)]
        return [batch for i in rng.permutation(len(groups)) for batch in groups[i]]

    def __getitem__(self, i):
        epoch, at = divmod(i, self.per_epoch)
        index = self.order(epoch)[at]
        shortest = int(self.lengths[index].min())
        crop = max(shortest // self.multiple * self.multiple, min(shortest, self.multiple))
        wavs, phones, bad = [], [], []
        frames = num_frames(crop, self.config)
        for j in index:
            row = self.rows[j]
            start = int(np.random.default_rng([*self.seed, epoch, j, 1]).integers(row.num_samples - crop + 1))
            try:
                wavs.append(standardise(read_audio(row.path, start, crop)))
            except InputError as error:
                bad.append((row.path, f"{row.where}: {row.path}: {error}"))
                continue
            if self.classes is not None:
                phones.append(phones_of_crop(self.classes[row.fileid], start, frames))
        mask = make_mask(len(wavs), frames, np.random.default_rng([*self.seed, epoch, at, 2]), *self.mask_shape)
        if not wavs:  # all bad: the ranks still have to meet, so silence of which nothing is masked or labelled
            wavs, mask, phones = [torch.zeros(crop)], np.zeros((1, frames), dtype=bool), [np.full(frames, IGNORED)]
        batch = {"wav": torch.stack(wavs), "mask": torch.from_numpy(mask), "bad": bad}
        if self.classes is not None:
            batch["language"] = self.rows[index[0]].language
            batch["phones"] = torch.from_numpy(np.array(phones, dtype=np.int64))
        return batch


def outlive_signals(_):
    """A SIGTERM or Ctrl-C to the whole process group must not take the loaders before the training has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ======== the toy world ========
# Eight made-up languages: five to pretrain on, and three that are new, by phones no source has,
# another vowel space, and twice the pace. Speech is made as textbooks explain it: a source (pulses
# of the glottis, noise of a narrow passage) through a filter (the resonances of the mouth). Noise,
# speakers and sloppy articulation make it hard enough: across speakers, MFCC err on 16 of 100 ABX
# triples of the first source language, and on 17 to 27 of the new ones.

TOY_VERSION = 3
PLAIN = 1, (1, 1, 1), (2, 18), (40, 9000)
LANGUAGES = {  # phones; then slowness, warp of F1 F2 F3, signal-to-noise range in dB, band in Hz
    "baso": ("i e E a o u p t k b d g m n s z l", *PLAIN),
    "delu": ("i I E a O U p t k b m n N f v h r", *PLAIN),
    "kemi": ("i e @ a o u b d g tS m n v z S j w", *PLAIN),
    "nore": ("I e E @ O U p b t d f v s z N l r", *PLAIN),
    "tivo": ("I E @ O o u d k g tS m N S h l j w", *PLAIN),
    "goxi": ("i y e oe a u p t k b m n J s T x l", .5, (1.12, .93, 1), (2, 18), (100, 6000)),
    "juthe": ("i y ix u e E t d ts Z z s n J N r T", .55, (.9, 1.07, 1.03), (2, 18), (60, 7000)),
    "wytsa": ("e oe @ ix o O b d g ts T f x v Z m n", .5, (1.1, 1.08, .96), (2, 18), (100, 6000))}
SOURCES, TARGETS = list(LANGUAGES)[:5], list(LANGUAGES)[5:]
EVAL_SOURCES, LM_LANGUAGE = SOURCES[:2], SOURCES[0]

# Resonances F1 F2 F3 of an adult male in Hz: F1 falls as the tongue rises, F2 as it moves back.
VOWELS = {"i": (280, 2250, 3000), "I": (400, 1950, 2600), "e": (420, 2150, 2750), "E": (570, 1800, 2550),
          "a": (760, 1350, 2500), "O": (590, 920, 2450), "o": (430, 800, 2400), "u": (310, 760, 2300),
          "U": (430, 1080, 2300), "@": (500, 1450, 2500), "y": (290, 1850, 2200), "oe": (420, 1580, 2250),
          "ix": (330, 1400, 2450)}
GLIDES = {"l": (380, 1150, 2750), "r": (430, 1250, 1650), "j": (270, 2200, 3050), "w": (300, 680, 2250)}
# Where the formants point while the mouth is narrow; centre, width and strength of its noise.
PLACES = {"labial": (330, 850, 2200, 5000, 4000, .25), "dental": (340, 1350, 2600, 6400, 1500, .3),
          "alveolar": (340, 1700, 2650, 6000, 1100, .8), "velar": (320, 1700, 2100, 1900, 500, .5),
          "palatal": (290, 2150, 2850, 3400, 800, .8), "glottal": (500, 1450, 2500, 1400, 1200, .4)}
MANNERS = {"stop": "p:labial t:alveolar k:velar", "voiced stop": "b:labial d:alveolar g:velar",
           "affricate": "ts:alveolar tS:palatal", "nasal": "m:labial n:alveolar J:palatal N:velar",
           "fricative": "f:labial T:dental s:alveolar S:palatal x:velar h:glottal",
           "voiced fricative": "v:labial z:alveolar Z:palatal"}


def gestures():
    """{phone: (10 ms frames, rows)}; rows: F1 F2 F3, voice, noise, its centre, width, nasality."""
    table = {"SIL": (18, [(500, 1450, 2500, 0, 0, 2000, 2000, 0)])}
    table |= {phone: (10, [(*formants, 1, 0, 2000, 2000, 0)]) for phone, formants in VOWELS.items()}
    table |= {phone: (7, [(*formants, .5, 0, 2000, 2000, 0)]) for phone, formants in GLIDES.items()}
    for manner, members in MANNERS.items():
        for phone, place in (member.split(":") for member in members.split()):
            *locus, centre, width, noise = PLACES[place]
            voiced = "voiced" in manner
            noise *= 1 - .4 * voiced  # the voice takes breath away from the noise
            if manner == "nasal":
                table[phone] = (7, [(*locus, .6, 0, centre, width, 1)])
            elif "fricative" in manner:
                table[phone] = (9, [(*locus, .25 * voiced, noise, centre, width, 0)])
            else:  # shut: silence, or a murmur through the cheeks; then the burst
                table[phone] = (11 if manner == "affricate" else 8, [
                    (*locus, .12 * voiced, 0, centre, width, 0),
                    (*locus, .5 * voiced, noise, centre, width, 0)])
    return {phone: (frames, np.array(rows)) for phone, (frames, rows) in table.items()}


GESTURES = gestures()


def chance(*key):
    """Random numbers for one purpose, so that nothing depends on the order of the work."""
    return np.random.default_rng([zlib.crc32(str(part).encode()) for part in key])


def make_voice(rng, lang):
    """A speaker. A shorter vocal tract has higher formants, and mostly goes with a higher pitch."""
    short = rng.integers(2)
    return {"pitch": (115, 205)[short] * np.exp(rng.normal(0, .12)),
            "formants": (1, 1.15)[short] * np.exp(rng.normal(0, .05)) * np.array(lang["warp"]),
            "tilt": rng.uniform(.5, 1.1), "breath": rng.uniform(.01, .08),
            "slowness": lang["slowness"] * np.exp(rng.normal(0, .08))}


def make_room(rng, lang):
    """A recording: noise, echo and level differ each time, the channel belongs to the language."""
    return {"snr": rng.uniform(*lang["snr"]), "colour": rng.uniform(0, 1.2), "band": lang["band"],
            "echo": rng.uniform(.1, .5), "decay": rng.uniform(.01, .05), "level": rng.uniform(-32, -20)}


def pronounce(sentences, voice, rng):
    """Words -> tokens [(phone, 10 ms frames)], with a pause around each sentence."""
    phones = ["SIL"]
    for words in sentences:
        phones += [phone for word in words for phone in word] + ["SIL"]
    frames = np.array([GESTURES[phone][0] for phone in phones]) * voice["slowness"]
    frames = np.rint(frames * np.exp(rng.normal(0, .2, len(phones))))
    return list(zip(phones, np.maximum(frames, 3).astype(int).tolist()))


def smooth(track, steps):
    """Each column averaged over `steps` (odd), the middle counting most."""
    kernel = np.hanning(steps + 2)[1:-1] / np.hanning(steps + 2).sum()
    padded = np.pad(track, ((steps // 2, steps // 2), (0, 0)), mode="edge").T
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded], 1)


def articulate(tokens, voice, rng):
    """Tokens -> a row every 5 ms [T, 8]. Tongue and lips are slow: formants glide over 75 ms, so a
    phone sounds of its neighbours, and a short one never reaches its target."""
    rows, steps = [], []
    for phone, frames in tokens:
        rows.extend(GESTURES[phone][1] * rng.normal(1, .07, 8))  # nobody says it twice the same
        shut = round(2 * frames * (.5 if phone in ("ts", "tS") else .7))
        steps += [shut, 2 * frames - shut] if len(GESTURES[phone][1]) == 2 else [2 * frames]
    track = np.repeat(rows, steps, axis=0)
    formants = smooth(track[:, :3] * voice["formants"], 15)
    return np.hstack([formants, smooth(track[:, 3:], 3)]).astype(np.float32)


def speak(tokens, voice, rng):
    """Tokens -> clean speech [N], 160 samples a frame."""
    track = articulate(tokens, voice, rng)
    steps = len(track)
    f1, f2, f3, voicing, noise, centre, width, nasal = track.T[:, :, None]  # each [T, 1]
    hertz = np.arange(241, dtype=np.float32) * np.float32(16000 / 480)

    def bump(centre, width):
        return 1 / (1 + ((hertz - centre) / width) ** 2)  # [T, 241]

    mouth = bump(f1, 60) + .6 * bump(f2, 80) + .35 * bump(f3, 120)
    mouth += .2 * bump(np.float32(3500 * voice["formants"][2]), 160)
    mouth *= (1 + (hertz / 600) ** 2) ** np.float32(-voice["tilt"] / 2)  # the glottis is dull
    mouth *= 1 - .85 * nasal * bump(.9 * f2, 200)  # the shut mouth swallows what the nose lets out
    passage = noise * bump(centre, width) * np.sqrt(1000 / width)
    passage += np.float32(voice["breath"]) * voicing * mouth

    melody = np.linspace(.1, -.1, steps) + .6 * smooth(rng.normal(0, 1, (steps, 1)), 61)[:, 0]
    cycles = np.cumsum(np.repeat(voice["pitch"] * np.exp(melody), 80) / 16000)
    pulses = np.diff(np.floor(cycles), prepend=0) * np.sqrt(16000 / voice["pitch"])  # power 1
    hiss = rng.standard_normal(80 * steps, dtype=np.float32)
    # Both sources in overlapping windows of 10 ms, each given its spectrum and added up again.
    window = np.pad(np.hanning(161)[:160], 160).astype(np.float32)
    pulses, hiss = (np.fft.rfft(window * np.lib.stride_tricks.sliding_window_view(
        np.pad(wave.astype(np.float32), 200), 480)[::80][:steps]) for wave in (pulses, hiss))
    pieces = np.fft.irfft(pulses * (3 * voicing * mouth) + hiss * passage, 480)
    wave = np.zeros((steps + 5, 80), np.float32)
    for i, piece in enumerate(np.split(pieces, 6, axis=1)):
        wave[i:i + steps] += piece
    return wave.reshape(-1)[200:200 + 80 * steps]


def record(clean, room, rng):
    """Speech -> what is recorded of it: echo, coloured noise, a microphone with limits."""
    size = -(-(len(clean) + 4000) // 8000) * 8000  # with space for the echo
    echo = rng.standard_normal(4000) * np.exp(-np.arange(4000) / 16000 / room["decay"])
    echo *= room["echo"] / np.sqrt((echo ** 2).sum())
    echo[0] += 1
    spectrum = np.fft.rfft(clean, size) * np.fft.rfft(echo.astype(np.float32), size)
    hertz = np.arange(1, len(spectrum) + 1, dtype=np.float32) * np.float32(16000 / size)
    noise = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    noise /= (1 + (hertz / 500) ** 2) ** np.float32(room["colour"] / 2)
    ratio = np.sqrt((np.abs(spectrum) ** 2).mean() / (np.abs(noise) ** 2).mean())
    spectrum += noise * ratio * np.float32(10 ** (-room["snr"] / 20))
    low, high = room["band"]
    spectrum /= np.sqrt((1 + (low / hertz) ** 4) * (1 + (hertz / high) ** 4))
    wave = np.fft.irfft(spectrum, size)[:len(clean)]
    return wave * min(10 ** (room["level"] / 20) / wave.std(), .95 / np.abs(wave).max())


def write_wav(job):
    """One file; its parts have their own random numbers, so a part is the same in any company."""
    path, parts, voice, room = job
    waves = [record(speak(tokens, voice, chance(*key)), room, chance(*key, "room")) for tokens, key in parts]
    soundfile.write(path, np.concatenate(waves).astype(np.float32), 16000, subtype="PCM_16")


def make_language(seed, name):
    """Accent, words (tuples of phones) and their classes; nouns and verbs belong to 4 topics."""
    phones, *accent = LANGUAGES[name]
    rng, words = chance(seed, "language", name), set()
    vowels = [phone for phone in phones.split() if phone in VOWELS]
    consonants = [phone for phone in phones.split() if phone not in VOWELS]

    def new_word(shapes, *ending):
        shape = rng.choice(shapes)
        word = (*(str(rng.choice(vowels if c == "V" else consonants)) for c in shape), *ending)
        if word in words:
            return new_word(shapes, *ending)
        words.add(word)
        return word

    # A noun ends in the vowel of its gender, a verb in a consonant; determiners have a gender too.
    noun, verb, genders = ("CVC", "CVCVC"), ("CV", "CVCV"), vowels[1:4:2]
    return {**dict(zip(("slowness", "warp", "snr", "band"), accent)), "name": name, "words": words,
            "determiners": [[new_word(["CV"]) for _ in range(2)] for _ in genders],
            "nouns": [[[new_word(noun, end) for _ in range(3)] for end in genders] for _ in range(4)],
            "verbs": [[new_word(verb, consonants[-1]) for _ in range(3)] for _ in range(4)],
            "rare": [new_word(noun, end) for end in genders * 2]}  # in no text: out of vocabulary


PARTS = slice(5), slice(3), slice(1, 2), slice(2, 3)  # a whole sentence; without an object; a noun; a verb


def sentence(lang, rng, topic, genders=None):
    """Determiner, noun, verb, determiner, noun, all on the topic; or, where the genders are free, a part of that."""
    def zipf(words):
        weights = 1 / np.arange(2, len(words) + 2)
        return words[rng.choice(len(words), p=weights / weights.sum())]

    words = []
    for gender in rng.integers(2, size=2) if genders is None else genders:
        words += [zipf(lang["determiners"][gender]), zipf(lang["nouns"][topic][gender])]
    words.insert(2, zipf(lang["verbs"][topic]))
    part = slice(None) if genders is not None else PARTS[rng.choice(len(PARTS), p=(.6, .2, .1, .1))]
    return words[part]


def corpus(seed, lang, split, minutes, speakers, seconds):
    """Utterances, each a few sentences on a topic, in turn by each speaker, until it is enough."""
    voices = [make_voice(chance(seed, "voice", lang["name"], split, s), lang) for s in range(speakers)]
    utterances, total = [], 0
    while total < 6000 * minutes or len(utterances) < 2:
        i = len(utterances)
        fileid = f"{lang['name']}-{split}-{i % speakers}-{i:04d}"
        rng, story, frames = chance(seed, fileid), [], 0
        topic, enough = rng.integers(4), 100 * rng.uniform(*seconds)
        while frames < enough:
            story.append(sentence(lang, rng, topic))
            tokens = pronounce(story, voices[i % speakers], chance(seed, fileid, "timing"))
            frames = sum(frames for _, frames in tokens)
        utterances.append({
            "fileid": fileid, "language": lang["name"], "speaker": fileid[:-5], "num_samples": 160 * frames,
            "tokens": tokens, "story": story, "key": (seed, fileid, "audio"), "voice": voices[i % speakers],
            "room": make_room(rng, lang)})
        total += frames
    return utterances


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header.split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_corpus(root, table, split, utterances):
    """Manifest, alignments and, to evaluate, ABX items; returns the jobs for the audio."""
    jobs, items = [], ["#file onset offset #phone prev-phone next-phone speaker"]
    for row in utterances:
        path = root / "audio" / split / row["language"] / f"{row['fileid']}.wav"
        row["path"] = Path(os.path.relpath(path, table.parent)).as_posix()
        jobs.append((path, [(row["tokens"], row["key"])], row["voice"], row["room"]))
        phones = []  # one every 10 ms
        for i, (phone, frames) in enumerate(row["tokens"]):
            if phone != "SIL":
                times = f"{len(phones) / 100:.2f} {(len(phones) + frames) / 100:.2f}"
                context = f"{row['tokens'][i - 1][0]} {row['tokens'][i + 1][0]}"
                items.append(f"{row['fileid']} {times} {phone} {context} {row['speaker']}")
            phones += [phone] * frames
        row["phones"] = " ".join(phones)
    write_csv(table, "fileid path num_samples language speaker", utterances)
    write_csv(table.with_name(f"{table.stem}_alignments.csv"), "fileid phones language", utterances)
    if split == "eval":
        table.with_suffix(".item").write_text("\n".join(items) + "\n", encoding="utf-8")
    return jobs


def lexical_pairs(lang, rng, count):
    """[(word, non-word)]: two words of one shape swap two phones and both become non-words, so neither
    length nor the frequency of single phones gives the non-words away."""
    words = [word for topic in lang["nouns"] for gender in topic for word in gender] + lang["rare"]
    words += [word for topic in lang["verbs"] for word in topic]
    shape = lambda word: (["V" if phone in VOWELS else "C" for phone in word], word[-1])
    couples = [(*two, *at) for two in combinations(words, 2) if shape(two[0]) == shape(two[1])
               for at in combinations(range(len(two[0]) - 1), 2) if all(two[0][i] != two[1][i] for i in at)]
    pairs, seen = [], set(lang["words"])
    for c in rng.permutation(len(couples)):
        one, two, *at = couples[c]
        new = [tuple(other[i] if i in at else phone for i, phone in enumerate(word))
               for word, other in ((one, two), (two, one))]
        if not seen & set(new):
            seen |= set(new)
            pairs += [(one, new[0]), (two, new[1])]
    return pairs[:count]


def write_pairs(root, seed, lang, voices, count, frequency):
    """Word against non-word, and sentence against the same words out of order, by each voice."""
    rng, jobs, rows = chance(seed, "pairs"), [], {"lexical": [], "syntactic": []}
    pairs = [("lexical", [word], [new], "", "") for word, new in lexical_pairs(lang, rng, count)]
    for i in range(count):  # who goes with whom, or what follows what
        right = sentence(lang, rng, rng.integers(4), [(0, 1), (1, 0)][i // 3 % 2])
        kind, order = [(("agreement", "determiner_noun"), (3, 1, 2, 0, 4)),
                       (("order", "noun_verb"), (0, 2, 1, 3, 4)),
                       (("order", "determiner_noun"), (1, 0, 2, 3, 4))][i % 3]
        pairs.append(("syntactic", right, [right[j] for j in order], *kind))
    for i, (task, right, wrong, kind, subtype) in enumerate(pairs):
        for (v, voice), (correct, words) in product(enumerate(voices), ((1, right), (0, wrong))):
            name, key = f"{task}_{i % count:04d}_{v}_{correct}", (seed, task, i, v)
            tokens = pronounce([words], voice, chance(*key, "timing"))  # a pair shares its chance
            room = make_room(chance(*key, "room"), lang)
            jobs.append((root / task / "dev" / f"{name}.wav", [(tokens, key)], voice, room))
            phones, text = sum(words, ()), " ".join("".join(word) for word in words)
            rows[task].append({
                "id": i % count, "filename": name, "voice": f"voice{v}", "correct": correct,
                "frequency": frequency[right[0]], "word": text, "phones": " ".join(phones),
                "length": len(phones), "type": kind, "subtype": subtype, "transcription": text})
    write_csv(root / "lexical/dev/gold.csv", "id filename voice frequency word phones length correct", rows["lexical"])
    write_csv(root / "syntactic/dev/gold.csv",
              "id filename voice type subtype transcription correct", rows["syntactic"])
    return jobs


def story_pairs(root, seed, lang, voices, count):
    """Two stories that exchange their endings: only the topic says which belongs to which."""
    jobs = []
    for i in range(0, count, 2):
        rng, voice = chance(seed, "tsc", i), voices[i // 2 % len(voices)]
        room, starts, ends = make_room(rng, lang), [], []
        for topic in rng.choice(4, 2, replace=False):
            for parts, length in (starts, 3), (ends, 1):
                told = [sentence(lang, rng, topic) for _ in range(length)]
                parts.append((pronounce(told, voice, rng), (seed, "tsc", i, topic, length)))
        for story, ending in product((0, 1), (0, 1)):
            name = f"{i + story:04d}_{'correct' if story == ending else 'incorrect'}.wav"
            jobs.append((root / "tsc" / name, [starts[story], ends[ending]], voice, room))
    return jobs


def write_world(root, seed, scale, processes):
    langs = {name: make_language(seed, name) for name in LANGUAGES}
    lm, jobs = langs[LM_LANGUAGE] | {"snr": (12, 25)}, []  # read in a quiet place, as audiobooks are
    # table, split, languages, minutes a language, speakers, range of seconds to fill with sentences
    tables = [("train.csv", "train", SOURCES, 8, 6, (9, 11))]
    tables += [(f"target/{name}.csv", "target", [name], 10, 6, (9, 11)) for name in TARGETS]
    for name in TARGETS + EVAL_SOURCES:
        tables.append((f"eval/{name}.csv", "eval", [name], 4, 4, (3, 10)))
    tables.append(("lm/train.csv", "lm", [LM_LANGUAGE], 40, 6, (9, 11)))
    for table, split, names, minutes, *how in tables:
        rows = [corpus(seed, lm if split == "lm" else langs[name], split, scale * minutes, *how) for name in names]
        jobs += write_corpus(root, root / table, split, sum(rows, []))
    frequency = Counter(word for row in rows[0] for words in row["story"] for word in words)
    voices = [make_voice(chance(seed, "voice", "pairs", v), lm) for v in range(3)]
    count = max(4, 2 * round(30 * scale))
    jobs += write_pairs(root / "lm", seed, lm, voices, count, frequency)
    jobs += story_pairs(root / "lm", seed, lm, voices, count)
    for path, *_ in jobs:
        path.parent.mkdir(parents=True, exist_ok=True)
    if processes > 1 and "fork" in multiprocessing.get_all_start_methods():
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            pool.map(write_wav, jobs, chunksize=8)
    else:  # the other ways to start a process would run the caller's script again
        list(map(write_wav, jobs))


def toy(folder, seed=0, scale=1.0, processes=None):
    """Makes the toy world, `scale` times 150 minutes of audio, unless it is there already.

    train.csv  target/LANG.csv  eval/LANG.csv  lm/train.csv    manifests, each with *_alignments.csv
    eval/LANG.item  lm/{lexical,syntactic}/dev/gold.csv  lm/tsc   tests in ZeroSpeech's layout
    """
    folder = Path(folder)
    about = json.dumps({"version": TOY_VERSION, "seed": seed, "scale": scale})
    done = folder / "toy.json"
    if done.exists() and done.read_text() == about:
        return folder
    if folder.is_file() or any(folder.glob("*")):
        raise FileExistsError(f"{folder}: holds something else than this toy world; move it away")
    new = folder.with_name(f"{folder.name}.tmp{os.getpid()}")  # gets its name when it is whole
    try:
        new.mkdir(parents=True)
        write_world(new, seed, scale, processes or os.cpu_count())
        (new / "toy.json").write_text(about)
        if not done.exists():  # else another process was faster
            new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def check_toy(folder):
    """That there is a toy world, and one of this code."""
    try:
        version = json.loads(Path(folder, "toy.json").read_text())["version"]
    except (OSError, ValueError, KeyError, TypeError):
        version = None
    require(version == TOY_VERSION, f"{folder}: no toy world, or one of another version of the code: 'python data.py "
            "toy FOLDER' makes one where there is nothing yet")


# ======== the commands ========


def main():
    verb, *args = sys.argv[1:] or [""]
    if verb in ("-h", "--help"):
        return print(__doc__)
    if verb == "toy" and len(args) == 1:
        return print(f"the toy world is in {toy(*args)}")
    require(verb == "manifest" and len(args) == 2,
            "usage: python data.py manifest FOLDER OUT.csv | python data.py toy FOLDER")
    write_manifest(*args)


def write_manifest(folder, out):
    require(not Path(out).exists(), f"{out} is there already: name another file, or remove it")
    require(Path(folder).is_dir(), f"{folder}: no such folder")
    require(Path(out).parent.is_dir(), f"{out}: no such folder to write to")
    rows, left_out = scan_folder(folder)
    hours = defaultdict(float)
    for row in rows:
        hours[row.language or "(no language)"] += row.num_samples / SAMPLE_RATE / 3600
    write_csv(Path(f"{out}.tmp"), "fileid path num_samples language",
              [row._asdict() | {"path": os.path.abspath(row.path)} for row in rows])
    os.replace(f"{out}.tmp", out)
    for language, amount in sorted(hours.items()):
        print(f"{language:20} {amount:10.3f} h" if amount >= 1 else f"{language:20} {60 * amount:10.1f} min")
    for name, why in left_out:
        print(f"left out: {name}: {why}")
    long = sum(row.num_samples > 20 * SAMPLE_RATE for row in rows)
    if long:
        print(f"{long} recordings are longer than 20 s: an epoch hears one crop of each; cut them into utterances")
    print(f"{out}: {len(rows)} recordings, {sum(hours.values()):.3f} h; {len(left_out)} left out")


if __name__ == "__main__":
    run(main)
