"""The audio that the network trains on: batches, crops, masks and phones.

Recordings of like length make a batch, all cropped at random to the shortest: nothing is padded.
Each crop is standardised, and about half of its frames are masked (1). For a supervised step (7) a
batch is of one language and has a phone for each frame. Batch i is a function of the seed and of i
alone: neither the number of loaders nor a restart changes it.

    python data.py manifest FOLDER OUT.csv [--language L]

lists the audio of a folder, whose first sub-folders name the languages unless one is given, and
prints what is left out. Formats: docs/data.md.
"""

import csv
import math
import os
import re
import signal
import sys
from collections import Counter, defaultdict, namedtuple
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch

from model import InputError, die_with_parent, num_frames, require, run

SAMPLE_RATE = 16000
PHONE = 160  # samples for each phone of an alignment: 10 ms
IGNORED = -100  # the class of a frame that counts in no loss, as its phone is not known

# Every use of chance has a generator of its own, so that nothing depends on the order of the work.
# Its key begins with the seed and one of these numbers:
STREAM_UNLABELLED = 0  # the batches of a stage: their order, crops and masks
STREAM_LABELLED = 1
STREAM_VALID = 2
STREAM_CHUNKS = 4  # meta-training: how a language's audio is cut into tasks
STREAM_TASK_ORDER = 5
STREAM_EPISODE = 6  # the batches of an episode
STREAM_EPISODE_LABELLED = 7
STREAM_FORGET = 8  # fresh codebooks and heads
STREAM_BUDGET = 9  # adaptation: the audio that --budget takes
STREAM_HELD_OUT = 10
CROP, MASK = 1, 2  # the end of a key: one recording's crop, one batch's masks


# ======== masks ========


def make_mask(batch, frames, rng, prob, span):
    """[B, T] bool, for (1): overlapping spans, about half of all frames, as many in each row."""
    span = min(span, max(1, frames // 2))  # so that a short crop is rarely hidden as a whole
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


# ======== batches ========


def pieces(rows, longest):
    """Recordings in which the longest crop fits twice or more are cut into as many pieces of like
    length. A piece is a row of its own, so an epoch has a crop from each."""
    cut = []
    for row in rows:
        n = max(1, row.num_samples // longest)
        edges = [row.start + row.num_samples * i // n for i in range(n + 1)]
        cut += [row._replace(start=begin, num_samples=end - begin)
                for begin, end in pairwise(edges)]
    return cut


def make_buckets(lengths, index, budget, ratio=1.2):
    """[(recordings whose lengths differ by at most `ratio`, how many of them make a batch)]."""
    index = index[np.argsort(lengths[index], kind="stable")]
    ordered, buckets, first = lengths[index], [], 0
    while first < len(index):
        end = int(np.searchsorted(ordered, ordered[first] * ratio, side="right"))
        buckets.append((index[first:end], max(1, budget // int(ordered[end - 1]))))
        first = end
    return buckets


class Batches:
    """Batch i, for any i: audio, a mask and, given classes {fileid: phones}, a phone a frame.

    A step takes `per_step` of them, one for each rank and micro-batch. If they are labelled, these
    are of one language.
    """

    def __init__(self, rows, config, options, per_step=1, classes=None,
                 stream=(STREAM_UNLABELLED,)):
        self.rows, self.config, self.options, self.classes = rows, config, options, classes
        self.per_step, self.key = per_step, (options.seed, *stream)
        self.labelled = classes is not None
        self.lengths = np.minimum([row.num_samples for row in rows], options.max_samples)
        names = np.array([row.language if self.labelled else "" for row in rows])
        members = [np.flatnonzero(names == name) for name in np.unique(names)]
        self.buckets = [make_buckets(self.lengths, m, options.batch_samples) for m in members]
        self.per_epoch = len(self.epoch(0))
        require(self.per_epoch, f"{len(rows)} recordings: their batches are too few for {per_step} "
                "ranks x micro-batches; take fewer of these, or smaller batches")

    @lru_cache(maxsize=4)
    def epoch(self, number):
        """The batches of an epoch, in the order of the steps: [(its recordings, how often this
        batch has been there already)]."""
        rng, steps = np.random.default_rng([*self.key, number]), []
        for buckets in self.buckets:  # of a language, or of everything
            batches = []
            for bucket, size in buckets:
                bucket = rng.permutation(bucket)
                batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
            batches = [batches[i] for i in rng.permutation(len(batches))]
            # The last step may lack batches. Then it is dropped; or, with labels, it is filled up
            # from the beginning: a small language is heard twice rather than never.
            whole = math.ceil if self.labelled else math.floor
            n = whole(len(batches) / self.per_step) * self.per_step
            batches = [(batches[i % len(batches)], i // len(batches)) for i in range(n)]
            steps += [batches[i : i + self.per_step] for i in range(0, n, self.per_step)]
        return [batch for i in rng.permutation(len(steps)) for batch in steps[i]]

    def __getitem__(self, i):
        options, (epoch, number) = self.options, divmod(i, self.per_epoch)
        index, turn = self.epoch(epoch)[number]
        crop = int(self.lengths[index].min())
        if crop >= options.crop_multiple:
            crop -= crop % options.crop_multiple  # few lengths, so torch.compile rarely recompiles
        frames = num_frames(crop, self.config)
        rng = np.random.default_rng([*self.key, epoch, number, MASK])
        mask = make_mask(len(index), frames, rng, options.mask_prob, options.mask_span)  # [B, T]
        wavs, bad = torch.zeros(len(index), crop), []  # [B, N]
        phones = np.full((len(index), frames), IGNORED, dtype=np.int64)  # [B, T]
        again = [turn] if turn else []  # a batch that is there twice gets other crops
        for b, j in enumerate(index):
            row, rng = self.rows[j], np.random.default_rng([*self.key, epoch, j, CROP, *again])
            start = row.start + int(rng.integers(row.num_samples - crop + 1))
            try:
                wavs[b] = standardise(read_audio(row.path, start, crop))
                if self.labelled:
                    phones[b] = phones_of_crop(self.classes[row.fileid], start, frames)
            except InputError as error:  # It stays silence, of which nothing counts in the loss.
                bad.append((row.path, f"{row.where}: {error}"))
                mask[b] = False
        batch = {"wav": wavs, "mask": torch.from_numpy(mask), "bad": bad}
        if self.labelled:
            batch |= {"phones": torch.from_numpy(phones), "language": self.rows[index[0]].language}
        return batch


def phones_of_crop(classes, start, frames):
    """A class for each frame of a crop that begins at sample `start` of the file. Frame i begins
    at start + 320 i; it has the phone whose beginning is nearest to that."""
    at = (start + PHONE // 2) // PHONE + 2 * np.arange(frames)
    return np.where(at < len(classes), classes[np.minimum(at, len(classes) - 1)], IGNORED)


# ======== plumbing: skip at first reading ========

AUDIO = ".wav .flac .ogg .opus .mp3 .aif .aiff .au .w64 .caf".split()
UNREADABLE = soundfile.LibsndfileError, OSError, TypeError
ALIGNMENT_SLACK = 5  # phones (50 ms) by which an alignment may miss the length of its recording
# A recording, or a piece of one from sample `start` on. Samples are counted at 16 kHz, whatever the
# rate of the file. `where` is what messages call the row.
Row = namedtuple("Row", "fileid path num_samples language where start", defaults=["", "", 0])


def main():
    match sys.argv[1:]:
        case words if not words or {"-h", "--help"} & {*words}:
            print(__doc__)
        case ["manifest", folder, out]:
            write_manifest(Path(folder), Path(out))
        case ["manifest", folder, out, "--language", language]:
            write_manifest(Path(folder), Path(out), language)
        case _:
            raise InputError("data.py manifest FOLDER OUT.csv [--language L]")


def write_manifest(folder, out, language=""):
    require(not out.exists(), f"{out} is there already: remove it, or name another")
    rows = [row._replace(path=os.path.abspath(row.path), language=language or row.language)
            for row in scan(folder)]
    write_csv(out, "fileid path num_samples language", [row._asdict() for row in rows])
    hours = Counter()
    for row in rows:
        hours[row.language or "(no language)"] += row.num_samples / SAMPLE_RATE / 3600
    for language, amount in sorted(hours.items()):
        print(f"{language:20} {amount:10.3f} h")
    print(f"{out}: {len(rows)} recordings, {hours.total():.3f} h")


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header.split(), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_manifest(path, only=None, minimum=2000):
    """The rows of a CSV, a fairseq TSV, a folder or a file; with `only`, those of these fileids.
    What a folder has of fewer than `minimum` samples is left out."""
    path, rows, names = Path(path), [], []
    if path.is_dir() or path.suffix.lower() in AUDIO:
        return scan(path, only, minimum)
    of_discophon = re.fullmatch(r"manifest-([^-]+)-(.+)\.csv", path.name)  # has no paths
    for where, line in read_table(path, "fileid" if of_discophon else "path"):
        if "path" not in line:
            line["path"] = "/".join(["../audio", *of_discophon.groups(), line["fileid"] + ".wav"])
        audio = os.path.join(line["folder"], line["path"])
        length = line.get("num_samples") or line.get("num_frames", "")
        require(length.isdecimal(), f"{where}: num_samples (or num_frames) is {length!r}")
        rows.append(Row(line.get("fileid", ""), audio, int(length), line.get("language", ""),
                        f"{where}: {audio}"))
        names.append(line["path"])
    require(rows, f"{path}: an empty manifest")
    rows = [row._replace(fileid=row.fileid or id) for row, id in zip(rows, file_ids(names))]
    return [row for row in rows if only is None or row.fileid in only]


def read_table(path, *columns):
    """Yields (where, {column: field}) for each line of a CSV or of a fairseq TSV."""
    csv.field_size_limit(2**31 - 1)  # an hour of phones is one field
    tsv, folder = path.suffix.lower() == ".tsv", os.path.dirname(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, csv.excel_tab if tsv else csv.excel)
            header = next(lines, [])
            if tsv:  # Its first line is the folder of the audio.
                folder, header = os.path.join(folder, *header), ["path", "num_samples"]
            require({*columns} <= {*header}, f"{path}:1: the header needs {', '.join(columns)}")
            for line in filter(None, lines):
                where = f"{path}:{lines.line_num}"
                require(len(line) == len(header), f"{where}: {len(header)} columns are needed")
                yield where, dict(zip(header, line), folder=folder)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no audio that is read, nor a CSV or TSV: {error}") from None


def file_ids(names):
    """The paths' names without folder and suffix; those that are not unique keep more of it."""
    ids = [Path(name).stem for name in names]
    for longer in (lambda name: os.path.splitext(name)[0], str):
        count = Counter(ids)
        ids = [id if count[id] == 1 else longer(name) for id, name in zip(ids, names)]
    return ids


def file_name(fileid, where):
    """The fileid, unless it leads out of the folder in which it names a file."""
    leads_out = {"", ".", ".."} & set(re.split(r"[/\\]", fileid))
    require(not leads_out, f"{where}: the fileid {fileid!r} cannot name a file within a folder")
    return fileid


def files_in(folder):
    """All files in a folder and its sub-folders, but hidden ones. Links to folders are followed,
    and no folder is read twice: links may lead in a circle."""
    files, read = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(parent) in read:
            print(f"left out: {parent}: a link to a folder that is read already", file=sys.stderr)
            folders.clear()
        else:
            read.add(os.path.realpath(parent))
            files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def scan(path, only=None, minimum=2000):
    """As read_manifest, of a folder, whose first sub-folder is the language, or of a file. It
    prints what it leaves out, and why. With `only`, other files are not even opened."""
    files = files_in(path) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    names = [file.relative_to(folder) for file in files if file.suffix.lower() in AUDIO]
    rows = [Row(fileid, str(folder / name), 0, "".join(name.parent.parts[:1]))
            for fileid, name in zip(file_ids(names), names) if only is None or fileid in only]
    found = inspect_all(rows, minimum)
    left_out = [f"{row.path}: {problem}" for row, _, problem in found if problem]
    if only is None:
        others = Counter(file.suffix for file in files if file.suffix.lower() not in AUDIO)
        left_out += [f"{n} x {kind}: not a kind of audio we read" for kind, n in others.items()]
    for message in left_out:
        print("left out:", message, file=sys.stderr)
    rows = [row._replace(num_samples=n, where=row.path) for row, n, problem in found if not problem]
    require(rows or only is not None, f"{path}: no audio that can be used")
    return rows


def check_audio(rows, minimum, most=2000):
    """The rows that are long enough, after a look at `most` of the files: mistakes show before
    hours are spent."""
    kept = [row for row in rows if row.num_samples >= minimum]
    if len(kept) < len(rows):
        print(f"left out: {len(rows) - len(kept)} recordings of under {minimum} samples",
              file=sys.stderr)
    require(kept, f"all recordings are shorter than {minimum} samples (--min-samples)")
    for row, samples, problem in inspect_all(kept[:: math.ceil(len(kept) / most)], minimum):
        require(not problem, f"{row.where}: {problem}")
        require(samples == row.num_samples, f"{row.where}: {row.num_samples} samples stated, "
                f"the file has {samples} at 16 kHz ('data.py manifest' counts them)")
    return kept


def inspect_all(rows, minimum):
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda row: (row, *inspect(row.path, minimum)), rows))


def inspect(path, minimum):
    """A file's length in samples at 16 kHz, and what is wrong with the file, or ""."""
    samples = 0
    try:
        require(os.path.exists(path), "no such file")
        with soundfile.SoundFile(path) as file:
            rate, second = file.samplerate, min(file.frames, file.samplerate)
            samples = math.ceil(file.frames * SAMPLE_RATE / rate)
            # First the end, as files are cut short there. If it is silent, nine other places.
            for part in np.linspace(1, 0, 10):
                file.seek(round(part * (file.frames - second)))
                heard = file.read(second, dtype="float32")
                require(0 < second == len(heard), "empty or cut short")
                if not np.ptp(heard) < 1e-4:
                    break
        require(samples >= minimum, f"{samples} samples at 16 kHz, under the minimum {minimum}")
        resampler(rate)  # says now if torchaudio is needed and does not load
        standardise(torch.from_numpy(heard))
    except (InputError, *UNREADABLE) as error:
        return samples, str(error)
    return samples, ""


def parse_seconds(text):
    found = re.fullmatch(r"(\d*\.?\d+)(min|h|s)", text)
    require(found, f"--budget {text!r}: an amount of time like 10min, 1h or 90s")
    return float(found[1]) * {"min": 60, "h": 3600, "s": 1}[found[2]]


# ======== reading ========


def read_audio(path, start=0, samples=None):
    """[N]: `samples` samples of a file from `start` on, at 16 kHz, the mean of the channels. Only
    these are decoded, and a margin, as resampling and MP3 depend on what is around them."""
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            margin = 16_000 if file.format == "MP3" else 0 if rate == SAMPLE_RATE else 160
            # `new` samples at 16 kHz last exactly as long as `old` of the file, so begin where
            # samples of both coincide.
            new, old = (n // math.gcd(rate, SAMPLE_RATE) for n in (SAMPLE_RATE, rate))
            first = max(0, start - margin) // new * new
            count = -1  # to the end
            if samples is not None:
                count = math.ceil((start + samples + margin - first) / new) * old
            file.seek(min(first // new * old, file.frames))
            wav = torch.from_numpy(file.read(count, dtype="float32", always_2d=True)).mean(1)
    except UNREADABLE as error:
        raise InputError(str(error)) from None
    if len(wav):
        length = math.ceil(len(wav) * SAMPLE_RATE / rate)
        wav = resampler(rate)(wav)
        wav = torch.nn.functional.pad(wav, (0, length - len(wav)))  # torchaudio may round down
    wav = wav[start - first :][:samples]
    require(len(wav) == (samples or max(1, len(wav))), f"cut short at sample {start + len(wav)}")
    return wav


def standardise(wav):
    """Mean 0 and variance 1: what the network expects."""
    wav = wav - wav.mean()
    std = wav.square().mean().sqrt()
    require(1e-7 < float(std) < math.inf, "silence, or samples that are not numbers")
    return wav / std


@lru_cache(maxsize=8)
def resampler(rate):
    if rate == SAMPLE_RATE:
        return torch.nn.Identity()
    return import_torchaudio(f"audio at {rate} Hz").transforms.Resample(rate, SAMPLE_RATE)


def import_torchaudio(what):
    try:
        import torchaudio
    except (ImportError, OSError) as error:
        raise InputError(f"{what} needs torchaudio, which does not load here: {error}") from None
    return torchaudio


def loader_init(_):
    """Prepares a process that reads audio (worker_init_fn of a DataLoader): Ctrl-C and SIGTERM
    reach it too, but it has to live until the training has saved, and not to outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


# ======== alignments ========


class Phones(Sequence):
    """A phone every 10 ms. In memory it is a small number, the index of a name in a list that all
    recordings share."""

    def __init__(self, codes, names):
        self.codes, self.names = codes, names

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, i):
        return self.names[self.codes[i]]

    def __eq__(self, other):
        return [*self] == [*other]


def read_alignments(path, languages=None, tier=None):
    """{fileid: (phones, language)}, from a CSV, a text file of intervals or a folder of TextGrids,
    whose `tier` has the phones. Where these do not name the language, `languages` may:
    {fileid: language}."""
    languages, alignments, code_of = languages or {}, {}, {}
    for where, fileid, phones, language in alignments_in(Path(path), tier):
        require(phones, f"{where}: {fileid} has no phones")
        require(fileid not in alignments, f"{where}: {fileid} is there twice")
        codes = [code_of.setdefault(phone, len(code_of)) for phone in phones]
        codes = np.array(codes, dtype=np.min_scalar_type(len(code_of)))
        alignments[fileid] = codes, language or languages.get(fileid, "")
    require(alignments, f"{path}: no alignments in it")
    names = np.array([*code_of], dtype=object)
    return {fileid: (Phones(codes, names), language)
            for fileid, (codes, language) in alignments.items()}


def alignments_in(path, tier):
    """Yields (where, fileid, [a phone every 10 ms], language or "")."""
    if path.is_dir() or b"#file" in path.open("rb").read(20):
        from extras import formats
        yield from formats.alignments(path, tier)
        return
    for where, line in read_table(path, "fileid", "phones", "language"):
        yield where, line["fileid"], line["phones"].split(), line["language"]


def aligned_rows(rows, alignments, path="the alignments"):
    """The rows that have alignments, which must fit the recordings and the manifest's languages."""
    rows = [row for row in rows if row.fileid in alignments]
    require(rows, f"{path}: not of these recordings: none of its names is in the manifest")
    count = Counter(row.fileid for row in rows)
    if len(count) < len(alignments):
        print(f"{path}: {len(alignments) - len(count)} of {len(alignments)} recordings are not in "
              "the manifest", file=sys.stderr)
    for row in rows:
        require(count[row.fileid] == 1, f"{path}: {row.fileid} is twice in the manifest")
        phones, language = alignments[row.fileid]
        length = row.num_samples / PHONE
        require(language, f"{path}: no language of {row.fileid}: give the manifest one")
        fits = abs(len(phones) - length) <= ALIGNMENT_SLACK and row.language in ("", language)
        require(fits, f"{path}: {row.fileid}: {len(phones)} phones at 100 Hz of {language!r}, "
                f"the manifest says {length:.0f} of {row.language!r}")
    return [row._replace(language=alignments[row.fileid][1]) for row in rows]


def inventories(alignments):
    """{language: its phones}: SIL first, then the others by name. A phone's index is its class."""
    phones_of = defaultdict(set)
    for phones, language in alignments.values():
        phones_of[language].update(phones.names[np.unique(phones.codes)])
    no_others = {"SIL", "UNK", "unk", "<unk>", "SPN", "spn", "PAD", "<pad>"}
    return {language: ["SIL", *sorted(phones_of[language] - no_others)]
            for language in sorted(phones_of)}


def phone_classes(alignments, inventory):
    """{fileid: the class of each phone}, and how many phones are unknown, and therefore IGNORED."""
    classes, unknown, class_of = {}, 0, {}
    for fileid, (phones, language) in alignments.items():
        if language not in class_of:
            index = {phone: i for i, phone in enumerate(inventory[language])}
            numbers = [index.get(name, IGNORED) for name in phones.names]
            class_of[language] = np.array(numbers, dtype=np.int16)
        classes[fileid] = class_of[language][phones.codes]
        unknown += int((classes[fileid] == IGNORED).sum())
    return classes, unknown


if __name__ == "__main__":
    run(main)
