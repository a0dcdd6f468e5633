"""Real speech as one corpus: 11.4 h in 44 languages to train on, and Mboshi to test on.

    python extras/speech.py FOLDER                # clones twelve public repositories, about 4 GB
    python extras/speech.py FOLDER --from DIR     # from clones or checkouts, each DIR/OWNER+NAME

writes, everything at 16 kHz, mono:

    FOLDER/manifest.csv, audio/LANGUAGE/ID.flac   20,048 recordings
    FOLDER/alignments.csv                         a phone every 10 ms: Czech, Dutch; English where
                                                  PocketSphinx is there (pip install pocketsphinx)
    FOLDER/mboshi/eval, FOLDER/mboshi/adapt       15 and 26 minutes, other sentences of the same
                                                  three speakers; items for ABX beside eval

The audio belongs to those who published it, under the licences in the table below; none is in this
repository. Of each source one commit is used, and of each language no more than fits with the
others: what is taken was drawn once and stands in speech.txt, so that everyone has the same corpus.
The same command again goes on where the last one stopped, and tries once more the repositories that
were left out. When all is complete, FOLDER/clones and FOLDER/sources can be removed.
"""

import argparse
import base64
import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from data import SAMPLE_RATE, resampler, write_csv
from model import InputError, require, run

PHONE = SAMPLE_RATE // 100  # samples for each phone of an alignment: 10 ms


# ======== alignments: each format a function ========
# A function of a repository that returns a function of a recording, which gives its phones as
# [(start, end, phone)] in seconds, or None where there are none.


def dutch(repository):
    """JSON lines: {"id", "words": [{"phones": [{"start", "duration", "phone"}]}]}"""
    lines = map(json.loads, repository.read("nathalie_align.jsonl").decode().splitlines())
    words = {line["id"]: line["words"] for line in lines}

    def align(name, wav):
        phones = [phone for word in words.get(name, []) for phone in word["phones"]]
        return [(p["start"], p["start"] + p["duration"], p["phone"].lstrip("ˈˌ")) for p in phones]

    return align


def czech(repository):
    """Lines `end 26 phone`; a phone begins where the one before it ends."""
    def align(name, wav):
        lines = repository.read(f"lab/{name}.lab").decode("latin-1").splitlines()
        lines = [line.split() for line in lines if line.split()[1:2] == ["26"]]
        ends = [float(end) for end, _, _ in lines]
        phones = ["SIL" if phone in "#_" else phone for _, _, phone in lines]
        return list(zip([0.0, *ends], ends, phones))

    return align


def english(repository):
    """No alignments there: PocketSphinx makes them from what was said."""
    try:
        from pocketsphinx import Decoder
    except ImportError:
        print(f"{repository.name}: no alignments, as PocketSphinx is not installed")
        return lambda name, wav: None
    decoder = Decoder(samprate=SAMPLE_RATE, lm=None, loglevel="FATAL")
    said = transcripts(repository)

    def hear(wav):
        decoder.start_utt()
        decoder.process_raw((wav * 32767).astype(np.int16).tobytes(), full_utt=True)
        decoder.end_utt()

    def align(name, wav):
        words = re.sub(r"[^a-z' ]", " ", said.get(name, "").lower()).split()
        if not all(decoder.lookup_word(word) for word in words):
            return None  # a word is not in PocketSphinx's dictionary
        try:
            decoder.set_align_text(" ".join(words))
            hear(wav)  # where the words are
            decoder.set_alignment()
            hear(wav)  # where their phones are
            phones = [phone for word in decoder.get_alignment() for phone in word]
        except RuntimeError:
            return None  # the words do not fit what is heard
        return [(p.start / 100, (p.start + p.duration) / 100, p.name) for p in phones]

    return align


def transcripts(repository):
    """{name: text}: LibriSpeech's lines `ID TEXT`, or a text file beside each recording."""
    said = {}
    for path in repository.files:
        folder, _, file = path.rpartition("/")
        if file.endswith(".trans.txt") and not file.startswith("."):
            lines = repository.read(path).decode().splitlines()
            said |= dict(line.split(" ", 1) for line in lines)
        elif folder == "data" and file.endswith(".txt"):
            said[file.removesuffix(".txt")] = repository.read(path).decode()
    return said


# ======== the sources ========


class Source(NamedTuple):
    prefix: str  # of the IDs of its recordings
    repository: str  # on GitHub
    language: str  # "": the recordings' first folder is the language
    audio: str  # a pattern of the paths of its audio; the group becomes the ID, with - for /
    megabytes: int  # of the clone
    hours: float  # of the recordings that are taken
    licence: str  # as stated there
    labels: Callable | None = None


SOURCES = [
    Source("kerstin", "rhasspy/dataset-voice-kerstin", "de", r"verified/(.+)\.flac",
           326, 0.47, "CC0"),
    Source("kathleen", "rhasspy/dataset-voice-kathleen", "en", r"data/(.+)\.wav",
           452, 0.48, "CC0", english),
    Source("nathalie", "rhasspy/dataset-voice-nathalie", "nl", r"verified/(.+)\.flac",
           123, 0.70, "CC0", dutch),
    Source("flemish", "rhasspy/dataset-voice-flemishguy", "nl", r"wavs/(.+)\.wav",
           130, 0.76, "CC0"),
    Source("ls", "Walleclipse/Deep_Speaker-speaker_recognition_system", "en",
           r"audio/LibriSpeechSamples/train-clean-100/\d+/\d+/([\d-]+)\.flac",
           354, 0.36, "CC BY 4.0 (LibriSpeech)", english),
    Source("so", "jimbozhang/speechocean762", "en_zh", r"WAVE/(.+)\.WAV",
           497, 0.45, "free, for commercial use too"),
    Source("ph", "brailcom/voice-czech-ph", "cs", r"wav/(.+)\.wav",
           193, 0.75, "GPL-2", czech),
    Source("marylux", "mbarnig/Marylux-648-TTS-Corpus", "lb", r"dataset/wavs/(.+)\.wav",
           136, 0.50, "CC BY-NC-SA"),
    Source("hsk", "hugolpz/audio-cmn", "cmn", r"64k/hsk/(.+)\.mp3",
           436, 0.55, "CC BY-SA"),
    Source("chr", "CherokeeLanguage/cherokee-audio-data", "chr",
           r"((?:see-say-write|walc-1|wwacc)/mp3/.+)\.mp3",
           465, 0.50, "CC BY-NC 4.0"),
    Source("gc", "gcompris/GCompris-voices", "", r"(\w+/.+)\.(?:ogg|wav)",
           324, 5.90, "GPL or CC BY-SA by file"),
]
MBOSHI = Source("mboshi", "besacier/mboshi-french-parallel-corpus", "mboshi",
                r"full_corpus_newsplit/all/(.+)\.wav",
                403, 0.68, "none named; 'for reproducible experiments'")
MBOSHI_SECONDS = dict(eval=300, others=1200, adapt=600)  # of each speaker; adapt: of the others
LANGUAGES = {"nb": "no", "nn": "no", "pt_BR": "pt", "zh_CN": "cmn", "zh_TW": "cmn"}


def read_taken(path=Path(__file__).with_suffix(".txt")):
    """{prefix: (commit, "0110...")}: which of a source's audio files, in order of their paths, are
    in the corpus. A line of the file: prefix, commit, number of files, the bits in base 64."""
    taken = {}
    for prefix, commit, *bits in map(str.split, path.read_text().splitlines()):
        files, code = bits or ("0", "")
        taken[prefix] = commit, f"{int.from_bytes(base64.b64decode(code)):0{files}b}"
    return taken


def print_sources(options):
    print("prefix    language  hours   clone  phones  licence, repository")
    for source in [*SOURCES, MBOSHI]:
        phones = source.labels.__name__ if source.labels else "mboshi" * (source is MBOSHI)
        print(f"{source.prefix:9} {source.language or '40':9} {source.hours:5.2f} "
              f"{source.megabytes:4} MB  {phones:7} {source.licence}, {source.repository}")
    gigabytes = sum(source.megabytes for source in [*SOURCES, MBOSHI]) / 1000
    clones = "" if options.clones else f", with its clones {gigabytes:.1f} GB to download"
    print(f"{options.folder}: 0.9 GB and about five minutes{clones}")


# ======== reading a repository ========


class Repository:
    """The files of one commit, read from the git directory: it needs no work tree."""

    def __init__(self, name, folder, commit):
        self.name = name
        git = ["git", f"--git-dir={folder}"]
        tree = call(*git, "ls-tree", "-r", "-z", commit).decode(errors="replace")
        self.git = subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
        self.files, links = {}, []  # {path: hash}
        for line in filter(None, tree.split("\0")):
            about, path = line.split("\t", 1)
            mode, _, self.files[path] = about.split()
            if mode == "120000":
                links.append(path)
        targets = {path: normpath(join(dirname(path), self.read(path).decode())) for path in links}
        for path, target in targets.items():  # a link stands for a file, or all files of a folder
            below = [file for file in self.files if file.startswith(target + "/")]
            self.files |= {path + file[len(target):]: self.files[file] for file in below}
            self.files[path] = self.files.get(target, self.files[path])

    def read(self, path):
        require(path in self.files, f"{path}: no such file in the repository")
        self.git.stdin.write(f"{self.files[path]}\n".encode())
        self.git.stdin.flush()
        answer = self.git.stdout.readline().split()  # hash, kind, size
        require(len(answer) == 3, f"{path}: its content is missing in this clone")
        return self.git.stdout.read(int(answer[2]) + 1)[:-1]

    def match(self, pattern):
        return sorted(path for path in self.files if re.fullmatch(pattern, path))


def call(*command):
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL,
                          env=os.environ | {"GIT_TERMINAL_PROMPT": "0"})
    reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
    require(done.returncode == 0, f"git: {reason}")
    return done.stdout


def find_clone(source, commit, options):
    """The git directory of a clone that is there, or of a new one, of this commit alone."""
    name = source.repository.replace("/", "+")
    folder = (options.clones or options.folder / "clones") / name
    for place in folder / ".git", folder, folder / "repo" / ".git", folder / "repo":
        if (place / "objects").is_dir():
            return place
    require(not options.clones, f"{folder}: no clone")
    with written(folder) as part:
        call("git", "init", "--quiet", "--bare", str(part))
        call("git", f"--git-dir={part}", "-c", "http.lowSpeedLimit=1000",  # bytes a second,
             "-c", "http.lowSpeedTime=60",  # for a minute: no answer
             "fetch", "--quiet", "--depth=1", f"{options.host}/{source.repository}", commit)
    return folder


# ======== audio and tables ========


@contextmanager
def written(path):
    """A temporary name to write to: the file has its own only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    yield part
    part.rename(path)


def write_table(path, header, rows):
    with written(path) as part:
        write_csv(part, header, rows)


def write_audio(path, wav):
    if not path.exists():
        wav = (wav * 32768).round().clip(-32768, 32767).astype(np.int16)
        with written(path) as part:
            soundfile.write(part, wav, SAMPLE_RATE, format="FLAC")


def decode(data):
    """[N] float32 at 16 kHz, the mean of the channels."""
    try:
        wav, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise InputError(error.error_string) from None
    require(len(wav), "no samples")
    samples = math.ceil(len(wav) * SAMPLE_RATE / rate)
    wav = resampler(rate)(torch.from_numpy(wav).mean(1)).numpy()
    return np.pad(wav, (0, samples - len(wav)))  # torchaudio rounds: it may give one less


def phone_per_frame(intervals, samples):
    """A phone every 10 ms, SIL where there is none, as one string."""
    phones = ["SIL"] * math.ceil(samples / PHONE)
    for start, end, phone in intervals:
        for i in range(round(100 * start), min(round(100 * end), len(phones))):
            phones[i] = phone
    return " ".join(phones)


def report(source, rows, broken):
    for line in broken[:3]:
        print(f"{source.prefix}: left out: {line}", file=sys.stderr)
    require(rows, f"none of its {len(broken)} recordings can be read")
    labels = sum(bool(row["phones"]) for row in rows)
    print(f"{source.prefix}: {describe(rows)}, {labels} with phones; {len(broken)} broken files")


def describe(rows):
    hours = sum(int(row["num_samples"]) for row in rows) / SAMPLE_RATE / 3600
    return f"{len(rows)} recordings, {hours:.2f} h"


# ======== the corpus ========


def add_source(source, repository, out, taken):
    """Writes a source's audio, and at last its rows, which say that it is complete."""
    paths = repository.match(source.audio)
    require(len(paths) == len(taken), f"{len(paths)} audio files instead of {len(taken)}")
    align = source.labels(repository) if source.labels else lambda name, wav: None
    rows, broken = [], []
    paths = [path for path, bit in zip(paths, taken) if bit == "1"]
    for path in tqdm(paths, source.prefix, leave=False, disable=None):
        name, first = re.fullmatch(source.audio, path)[1].replace("/", "-"), path.split("/")[0]
        fileid, language = f"{source.prefix}-{name}", source.language or LANGUAGES.get(first, first)
        try:
            wav = decode(repository.read(path))
            phones = align(name, wav)
        except InputError as error:
            broken.append(f"{path}: {error}")
            continue
        file = f"audio/{language}/{fileid}.flac"
        write_audio(out / file, wav)
        # Five of the Dutch alignments are of longer recordings.
        fits = phones and phones[-1][1] < len(wav) / SAMPLE_RATE + 0.1
        rows.append(dict(fileid=fileid, path=file, num_samples=len(wav), language=language,
                         phones=phone_per_frame(phones, len(wav)) if fits else ""))
    report(source, rows, broken)
    write_table(out / "sources" / f"{source.prefix}.csv",
                "fileid path num_samples language phones", rows)


def add_mboshi(repository, out):
    eval, others, broken = draw_mboshi(repository)
    adapt, seconds = [], Counter()
    random.Random(3).shuffle(others)
    for row in others:
        if seconds[row["speaker"]] < MBOSHI_SECONDS["adapt"]:
            seconds[row["speaker"]] += row["num_samples"] / SAMPLE_RATE
            adapt.append(row)
    report(MBOSHI, eval + adapt, broken)
    for rows, folder in (adapt, out / "adapt"), (eval, out / "eval"):
        for row in rows:
            write_audio(folder / row["path"], row["wav"])
        write_table(folder / "alignments.csv", "fileid phones language", rows)
    write_items(out / "eval" / "mboshi.item", eval)
    write_items(out / "eval" / "mboshi-triphone.item", eval, triphones=True)
    header = "fileid path num_samples language speaker"
    write_table(out / "adapt" / "manifest.csv", header, sorted(adapt, key=itemgetter("fileid")))
    write_table(out / "eval" / "manifest.csv", header, eval)  # the last: all is complete


def draw_mboshi(repository):
    """Of each of the three speakers 5 minutes for eval and then up to 20 others, without those
    utterances that have no alignment or one that is marked ERROR."""
    names = [re.fullmatch(MBOSHI.audio, path)[1] for path in repository.match(MBOSHI.audio)]
    random.Random(0).shuffle(names)
    parts, broken, seconds = dict(eval=[], others=[]), [], Counter()
    for name in tqdm(names, "mboshi", leave=False, disable=None):
        speaker, labels = name.split("_")[0], f"ZRC_scoring/mboshi/in/{name}.phn"
        wanted = [part for part in parts if seconds[speaker, part] < MBOSHI_SECONDS[part]]
        if not wanted or labels not in repository.files:
            continue
        try:
            lines = repository.read(labels).decode().splitlines()  # start end phone
            if any("ERROR" in line for line in lines):
                continue
            wav = decode(repository.read(f"full_corpus_newsplit/all/{name}.wav"))
        except InputError as error:
            broken.append(f"{name}: {error}")
            continue
        seconds[speaker, wanted[0]] += len(wav) / SAMPLE_RATE
        phones = [(float(start), float(end), p) for start, end, p in map(str.split, lines)]
        parts[wanted[0]].append(dict(
            fileid=name, path=f"audio/{name}.flac", num_samples=len(wav), language="mboshi",
            speaker=speaker, wav=wav, intervals=phones, phones=phone_per_frame(phones, len(wav))))
    return parts["eval"], parts["others"], broken


def write_items(path, rows, triphones=False):
    """ABX items: phones of 30 to 500 ms; or, up to 1 s long, a phone with both its neighbours."""
    lines = ["#file onset offset #phone prev-phone next-phone speaker"]
    edge = 0, 0, "SIL"
    for row in rows:
        padded = [edge, *row["intervals"], edge]
        for before, (start, end, phone), after in zip(padded, padded[1:], padded[2:]):
            if phone == "SIL" or not 0.03 <= end - start <= 0.5:
                continue
            if triphones:
                start, end = before[0], after[1]
                if "SIL" in (before[2], after[2]) or end - start > 1:
                    continue
            lines.append(f"{row['fileid']} {start:.4f} {end:.4f} {phone} {before[2]} {after[2]} "
                         f"{row['speaker']}")
    with written(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def collect(out):
    """manifest.csv and alignments.csv from the sources that are complete."""
    rows = []
    for path in (out / "sources").glob("*.csv"):
        with open(path, newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    rows.sort(key=itemgetter("path"))
    write_table(out / "manifest.csv", "fileid path num_samples language", rows)
    labelled = [row for row in rows if row["phones"]]
    write_table(out / "alignments.csv", "fileid phones language", labelled)
    languages = len({row["language"] for row in rows})
    print(f"{out}/manifest.csv: {describe(rows)}, {languages} languages")


def parse_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: require(False, message)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="clones", type=Path, metavar="DIR",
                        help="holds the repositories: clones or checkouts, named OWNER+NAME")
    parser.add_argument("--host", default="https://github.com", metavar="URL",
                        help="where they are cloned from (default: %(default)s)")
    options = parser.parse_args()
    require(not options.clones or options.clones.is_dir(), f"{options.clones}: no such folder")
    return options


def main():
    options, left_out = parse_options(), []
    out = options.folder
    torch.set_num_threads(1)
    print_sources(options)
    for source in [*SOURCES, MBOSHI]:
        commit, taken = read_taken()[source.prefix]
        last = "mboshi/eval/manifest.csv" if source is MBOSHI else f"sources/{source.prefix}.csv"
        if (out / last).exists():
            print(f"{source.prefix}: complete")
            continue
        try:
            clone = find_clone(source, commit, options)
            repository = Repository(source.prefix, clone, commit)
            if source is MBOSHI:
                add_mboshi(repository, out / "mboshi")
            else:
                add_source(source, repository, out, taken)
        except InputError as error:
            left_out.append(source.prefix)
            print(f"{source.prefix}: left out: {error}", file=sys.stderr)
    require(len(left_out) <= len(SOURCES), "no repository could be read")
    collect(out)
    if left_out:
        print(f"left out: {', '.join(left_out)}; the same command tries them again")


if __name__ == "__main__":
    run(main)
