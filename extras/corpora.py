"""Manifests and alignments of corpora, from the folders in which they are distributed.

    python extras/corpora.py librispeech FOLDER OUT.csv [--alignments TEXTGRIDS]
    python extras/corpora.py voxpopuli   FOLDER OUT.csv [--alignments TEXTGRIDS]
    python extras/corpora.py commonvoice FOLDER OUT.csv [--alignments TEXTGRIDS]
    python extras/corpora.py kaldi       FOLDER OUT.csv --language L [--alignments ali.ctm]

Each opens every file, prints what it leaves out and why, and writes OUT.csv; with --alignments also
OUT_alignments.csv, whose phones have no marks of stress (AH0) or of place in the word (AH_B). The
layouts:

    librispeech   .../SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac, and TextGrids of the same names
    voxpopuli     .../LANGUAGE/YEAR/*.ogg
    commonvoice   clips/*.mp3 and validated.tsv
    kaldi         wav.scp, utt2spk, perhaps segments, which are written to OUT/ as files; ali.ctm,
                  made by ali-to-phones --ctm-output, perhaps with phones.txt beside it
"""

import argparse
import csv
import os
import re
import sys
from collections import namedtuple
from decimal import Decimal
from itertools import groupby
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from extras import formats
from model import InputError, require, run

Recording = namedtuple("Recording", "fileid path language speaker", defaults=["", ""])


# ======== the corpora: folder -> recordings ========


def librispeech(folder, args):
    return [Recording(file.stem, file, args.language or "en", file.stem.split("-")[0])
            for file in audio_in(folder)]


def voxpopuli(folder, args):
    files = audio_in(folder)
    for file in files:
        shown = args.language or re.fullmatch(r"\d{4}", file.parent.name)
        require(shown, f"{file}: not in a folder LANGUAGE/YEAR")
    ids = data.file_ids([file.relative_to(folder) for file in files])
    return [Recording(fileid, file, args.language or file.parents[1].name)
            for fileid, file in zip(ids, files)]


def commonvoice(folder, args):
    with open(folder / "validated.tsv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = {"path", "client_id", "locale"} - {*(lines[0] if lines else ())}
    require(not missing, f"{folder / 'validated.tsv'}: no column {', '.join(sorted(missing))}")
    return [Recording(Path(line["path"]).stem, folder / "clips" / line["path"],
                      args.language or line["locale"], line["client_id"]) for line in lines]


def kaldi(folder, args):
    require(args.language, "kaldi: a data folder does not name its --language")
    paths, speakers = read_pairs(folder / "wav.scp"), {}
    for recording, path in paths.items():
        require(not path.endswith("|"), f"{folder / 'wav.scp'}: {recording} is a command, not a "
                "file: write its output to a file, or run utils/data/resample_data_dir.sh")
    if (folder / "utt2spk").exists():
        speakers = read_pairs(folder / "utt2spk")
    if (folder / "segments").exists():
        paths = cut_segments(folder / "segments", paths, args.out.with_suffix(""))
    return [Recording(utterance, Path(path), args.language, speakers.get(utterance, ""))
            for utterance, path in paths.items()]


def cut_segments(segments, paths, out):
    """Writes each utterance to a file of its own: {utterance: its path}."""
    require(not out.exists(), f"{out} is there already: the utterances are written there")
    out.mkdir(parents=True)
    cut = {}
    for utterance, line in read_pairs(segments).items():
        try:
            recording, *times = line.split()[:3]
            begin, end = (round(float(time) * data.SAMPLE_RATE) for time in times)
            wav = data.read_audio(paths[recording], begin, end - begin)
        except (ValueError, KeyError) as error:
            left_out(f"{segments}: {utterance}", error)
            continue
        cut[utterance] = out / f"{data.file_name(utterance, segments)}.flac"
        cut[utterance].parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(cut[utterance], wav.numpy(), data.SAMPLE_RATE)
    return cut


def audio_in(folder):
    files = [file for file in data.files_in(folder) if file.suffix.lower() in data.AUDIO]
    require(files, f"{folder}: no audio")
    return files


def read_pairs(path):
    """{first word: the rest} of each line."""
    pairs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").strip().splitlines(), 1):
        key, *rest = line.split(maxsplit=1) or [""]
        require(rest, f"{path}:{number}: not a name and what belongs to it")
        pairs[key] = rest[0].strip()
    return pairs


CORPORA = dict(librispeech=librispeech, voxpopuli=voxpopuli, commonvoice=commonvoice, kaldi=kaldi)
MARKS = dict(librispeech=r"(?<=[A-Z])\d$", kaldi=r"(?<=.)_[BIES]$")  # AH0 and AH_B become AH


# ======== phones: yield (fileid, [a phone every 10 ms]) ========


def read_textgrids(folder, tier):
    for file in data.files_in(folder):
        if file.suffix.lower() == ".textgrid":
            try:
                yield file.stem, formats.spread(formats.phone_tier(file, tier), file)
            except InputError as error:
                left_out("alignment", error)


def read_ctm(path):
    names, phone_table = {}, path.with_name("phones.txt")
    if phone_table.exists():
        names = {number: phone for phone, number in read_pairs(phone_table).items()}
    with open(path, encoding="utf-8") as file:
        lines = filter(None, map(str.split, file))
        for fileid, lines in groupby(lines, key=lambda line: line[0]):
            try:
                intervals = [
                    (onset, str(Decimal(onset) + Decimal(duration)), names.get(phone, phone))
                    for _, _, onset, duration, phone, *_ in lines]
                yield fileid, formats.spread(intervals, f"{path}: {fileid}")
            except (ValueError, ArithmeticError) as error:
                left_out(f"alignment of {fileid}", error)


# ======== the two files ========


def left_out(what, why):
    print(f"left out: {what}: {why}", file=sys.stderr)


def write_manifest(out, recordings):
    """Returns {fileid: (recording, its length in samples)} of what is in the manifest."""
    written = {}
    for recording, samples, problem in data.inspect_all(recordings, 2000):
        if problem or recording.fileid in written:
            left_out(recording.path, problem or f"{recording.fileid} is there already")
        else:
            written[recording.fileid] = recording, samples
    require(written, "no audio that can be used")
    data.write_csv(out, "fileid path num_samples language speaker", [
        recording._asdict() | dict(path=os.path.abspath(recording.path), num_samples=samples)
        for recording, samples in written.values()])
    return written


def fitting(written, alignments, mark):
    """Yields the line of each alignment that fits a recording of the manifest."""
    for fileid, phones in alignments:
        recording, samples = written.get(fileid, (None, 0))
        if recording and abs(len(phones) - samples / data.PHONE) > data.ALIGNMENT_SLACK:
            left_out(f"alignment of {fileid}", f"it lasts {len(phones) / 100} s, the recording "
                     f"{samples / data.SAMPLE_RATE:.2f} s")
        elif recording:
            names = {phone: "_".join(re.sub(mark, "", phone).split()) for phone in {*phones}}
            names |= {phone: "SIL" for phone, name in names.items() if name.lower() == "sil"}
            phones = " ".join(names[phone] for phone in phones)
            yield dict(fileid=fileid, phones=phones, language=recording.language)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--language", help="of all of it")
    parser.add_argument("--alignments", type=Path, help="a folder of TextGrids, or Kaldi's ctm")
    parser.add_argument("--tier", help="the TextGrids' tier of phones")
    args = parser.parse_args()
    phones_out = args.out.with_name(f"{args.out.stem}_alignments.csv")
    for path in args.out, phones_out:
        require(not path.exists(), f"{path} is there already: remove it, or name another")
    for path in filter(None, (args.folder, args.alignments)):
        require(path.exists(), f"{path}: not there")
    written = write_manifest(args.out, CORPORA[args.corpus](args.folder, args))
    hours = sum(samples for _, samples in written.values()) / data.SAMPLE_RATE / 3600
    print(f"{args.out}: {len(written)} recordings, {hours:.3f} h")
    if args.alignments:
        alignments = read_textgrids(args.alignments, args.tier)
        if args.corpus == "kaldi":
            alignments = read_ctm(args.alignments)
        lines = fitting(written, alignments, MARKS.get(args.corpus, "$^"))
        data.write_csv(phones_out, "fileid phones language", lines)
        with open(phones_out, encoding="utf-8") as file:
            print(f"{phones_out}: phones of {sum(1 for _ in file) - 1} of these recordings")


if __name__ == "__main__":
    run(main)
