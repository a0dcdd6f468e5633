"""Phones as linguists' tools keep them: TextGrids of Praat, and text files of intervals.

data.py's own format is a CSV, with a phone every 10 ms. It reads these, too, by what is here:

    FOLDER/.../ID.TextGrid       in the long form or the short; a tier has the phones
    #file onset offset #phone    the first line of a text file of intervals, as DiscoPhon has them
"""

import re
from decimal import Decimal
from itertools import groupby, islice
from pathlib import Path

import data
from model import InputError, require

PHONE_TIERS = "phones", "phone", "mau", "segments"  # of forced aligners
SILENCES = {"", "sil", "sp", "<p:>"}


def alignments(path, tier=None):
    """Yields (where, fileid, [a phone every 10 ms], ""), as data.alignments_in does."""
    if path.is_dir():
        for file in data.files_in(path):
            if file.suffix.lower() == ".textgrid":
                yield file, file.stem, spread(phone_tier(file, tier), file), ""
        return
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = filter(None, map(str.split, islice(file, 1, None)))
            for fileid, some in groupby(lines, key=lambda line: line[0]):
                yield path, fileid, spread([line[1:] for line in some], f"{path}: {fileid}"), ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None


def spread(intervals, where):
    """[onset, offset, phone] without gaps -> a phone every 10 ms. Times are text, in seconds, and
    are rounded in decimals: 5 ms up to 10."""
    phones = []
    for interval in intervals:
        try:
            *times, phone = interval
            first, end = (int(100 * Decimal(time) + Decimal("0.5")) for time in times)
        except (ArithmeticError, ValueError):
            raise InputError(f"{where}: not 'onset offset phone': {interval}") from None
        gapless = first == len(phones) and first <= end
        require(gapless, f"{where}: a gap or an overlap at {times[0]}")
        phones += [phone] * (end - first)
    return phones


def read_textgrid(path):
    """{tier: [(onset, offset, label)]}: the interval tiers of a Praat TextGrid; times stay text."""
    tiers, content = {}, Path(path).read_bytes()
    utf16 = content[:2] in (b"\xfe\xff", b"\xff\xfe")
    try:
        # In the long form and the short, what counts are strings and numbers that stand alone.
        values = re.findall(r'(?<!\S)(?:"((?:[^"]|"")*)"|(-?\d\S*))(?!\S)',
                            content.decode("utf-16" if utf16 else "utf-8-sig"))
        values = iter([number or string.replace('""', '"') for string, number in values])
        _, _, _, _, size = islice(values, 5)  # after the type, the class, the beginning, the end
        for _ in range(int(size)):
            kind, name, _, _, size = islice(values, 5)
            fields = 3 if kind == "IntervalTier" else 2
            lines = [[*islice(values, fields)] for _ in range(int(size))]
            if fields == 3:
                tiers[name] = [(onset, offset, label) for onset, offset, label in lines]
    except ValueError as error:
        raise InputError(f"{path}: not a TextGrid in text form: {error}") from None
    return tiers


def phone_tier(path, name=None):
    """The intervals of the tier of that name; without a name, of the first of PHONE_TIERS that is
    there, or of the only tier."""
    tiers = {tier.lower(): intervals for tier, intervals in read_textgrid(path).items()}
    wanted = [name.lower()] if name else [*PHONE_TIERS, *(tiers if len(tiers) == 1 else ())]
    there = [tier for tier in wanted if tier in tiers]
    require(there, f"{path}: which tier has the phones? There are: {', '.join(tiers) or 'none'}")
    return [(onset, offset, "SIL" if label.strip().lower() in SILENCES else label.strip())
            for onset, offset, label in tiers[there[0]]]


def write_textgrid(path, seconds, tiers):
    """{tier: [(onset, offset, label)]} as a TextGrid in the long text form. Gaps become intervals
    without a label, as Praat wants no gaps."""
    seconds = max([seconds, *(offset for tier in tiers.values() for _, offset, _ in tier)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0",
             f"xmax = {seconds:.10g}", "tiers? <exists>", f"size = {len(tiers)}", "item []:"]
    for i, (name, intervals) in enumerate(tiers.items(), 1):
        whole, end = [], 0
        for onset, offset, label in [*intervals, (seconds, seconds, "")]:
            whole += [x for x in ((end, onset, ""), (onset, offset, label)) if x[1] - x[0] > 1e-6]
            end = offset
        lines += [f"    item [{i}]:", '        class = "IntervalTier"', f'        name = "{name}"',
                  "        xmin = 0", f"        xmax = {seconds:.10g}",
                  f"        intervals: size = {len(whole)}"]
        for j, (onset, offset, label) in enumerate(whole, 1):
            label = str(label).replace('"', '""')
            lines += [f"        intervals [{j}]:", f"            xmin = {onset:.10g}",
                      f"            xmax = {offset:.10g}", f'            text = "{label}"']
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def with_textgrids(units, rows, folder, phones):
    """Passes the units on, and writes a TextGrid for each recording."""
    for row, (file, x) in zip(rows, units):
        path, seconds = folder / f"{file}.TextGrid", row.num_samples / data.SAMPLE_RATE
        path.parent.mkdir(parents=True, exist_ok=True)
        tiers = {"units": intervals(x.tolist(), 0.02, seconds)}
        if file in phones:
            tiers["phones"] = intervals(phones[file], 0.01, seconds)
        write_textgrid(path, seconds, tiers)
        yield file, x


def intervals(labels, step, end):
    """[(onset, offset, label)] in seconds of each run of equal labels, one every `step` seconds.
    What lies beyond the end is cut off: an alignment may be a little longer than its recording."""
    edges = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
    return [(i * step, min(j * step, end), str(labels[i]))
            for i, j in zip(edges, [*edges[1:], len(labels)]) if i * step < end]
