"""Build the text on which the tiny base model is pre-trained.

    python tools/corpus.py OUT.jsonl [--heldout OUT2.jsonl]

Four Debian packages whose text may be shipped give prose; a fifth kind, `exercises`, is generated: copying, recall and
reformatting of random words, so that the base learns to copy from its context. Every line of the output is one
document, `{"text": ...}`. Needs `apt-get`, `dpkg` and `gzip`. The same packages and seed give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from itertools import groupby, pairwise
from pathlib import Path

from exercises import TARGET_BYTES, Pool, exercises

PACKAGES = ("wordnet-base", "bible-kjv-text", "jargon-text", "dict-devil")
MAX_BYTES = 1500  # longer documents are dropped (a handful)
HELDOUT_BYTES = 200_000  # of each kind, but at most a tenth of it
EXERCISE_SHARE = 0.135  # of the bytes of the whole corpus
UNWANTED = re.compile(
    r"nigg(?!ard)|\bslur\b|disparaging|obscen|offensive (term|name|word)|\b(User|Assistant):|\S@\S+\.\w"
)


def fetch(folder: Path) -> None:
    """Download the packages and unpack them under `folder`."""
    subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *PACKAGES], cwd=folder, check=True)
    for deb in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", deb, folder], check=True)


def pack(paragraphs: Iterable[str], joiner: str) -> list[str]:
    """Join consecutive whole paragraphs into documents of about `TARGET_BYTES`."""
    documents: list[str] = []
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        length = len(paragraph.encode()) + len(joiner)
        if current and size + length > TARGET_BYTES:
            documents.append(joiner.join(current))
            current, size = [], 0
        current.append(paragraph)
        size += length
    return [*documents, joiner.join(current)] if current else documents


def wordnet(root: Path) -> list[str]:
    """Each synset as `dog, domestic dog (noun): gloss; "example"`, neighbours in one document."""
    documents = []
    for part, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        entries = []
        for line in (root / f"usr/share/wordnet/data.{part}").read_text().splitlines():
            if line.startswith(" "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split()
            lemmas = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in words[4 : 4 + 2 * int(words[3], 16) : 2]]
            entry = f"{', '.join(dict.fromkeys(lemmas))} ({name}): {' '.join(gloss.split())}"
            if not UNWANTED.search(entry):
                entries.append(entry)
        documents += pack(entries, "\n")
    return documents


def bible(root: Path) -> list[str]:
    """Consecutive verses of a chapter, without their numbers.

    The file is a header of 0x54 bytes, then big-endian u32: window size, number of windows n, n + 1 offsets; each
    window is a stream of compress(1) without its three leading bytes, which gzip reads once they are put back.
    """
    data = (root / "usr/lib/bible.data").read_bytes()
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    streams = (b"\x1f\x9d\x90" + data[start:end] for start, end in pairwise(offsets))
    text = b"".join(subprocess.run(["gzip", "-dc"], input=s, capture_output=True, check=True).stdout for s in streams)
    verses = re.findall(r"^(\d?[A-Za-z]+\d+):\d+ (.+)$", text.decode("ascii"), flags=re.MULTILINE)
    chapters = groupby(verses, key=lambda verse: verse[0])
    return [document for _, chapter in chapters for document in pack((verse for _, verse in chapter), " ")]


def paragraphs_of(text: str) -> list[str]:
    """Paragraphs between blank lines, unwrapped; verse (lines that begin far apart or deep) keeps its lines."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.rstrip().splitlines()
        indents = {len(line) - len(line.lstrip()) for line in lines}
        verse = len(indents) > 1 or indents == {4}
        found.append(("\n" if verse else " ").join(" ".join(line.split()) for line in lines))
    return [re.sub(r"[{}_]", "", paragraph) for paragraph in found]


def jargon(root: Path) -> list[str]:
    """The Jargon File from its introduction on, without tables, pictures and lists of headings."""
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    text = text[text.index("\nChapter") :]
    text = re.sub(r"^( +:[^\n]+:[^\n]*)\n\n", r"\1\n", text, flags=re.MULTILINE)  # a headword stays with its entry
    art = re.compile(r"[\u2500-\u257f]|\S {3,}\S")
    blocks = [block for block in re.split(r"\n\s*\n", text) if len(block) >= 60 or block.lstrip()[:1] == ":"]
    prose = "\n\n".join(block for block in blocks if not art.search(block))
    paragraphs = [paragraph.removeprefix(":") for paragraph in paragraphs_of(prose)]
    return pack((paragraph for paragraph in paragraphs if not UNWANTED.search(paragraph)), "\n\n")


def devil(root: Path) -> list[str]:
    """The Devil's Dictionary from its first entry on."""
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode("latin-1")
    text = text[text.index("ABASEMENT, n.") : text.rindex("\n\n")]
    return pack((paragraph for paragraph in paragraphs_of(text) if not UNWANTED.search(paragraph)), "\n\n")


def write(path: Path, documents: list[str]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)


def size(documents: list[str]) -> int:
    """Bytes of UTF-8."""
    return sum(len(document.encode()) for document in documents)


def main() -> None:
    """Fetch, convert, generate, split, shuffle, write, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="training documents (JSONL)")
    parser.add_argument("--heldout", type=Path, help="documents kept out of OUT (JSONL)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        kinds = {read.__name__: read(Path(folder)) for read in (wordnet, bible, jargon, devil)}
    pool = Pool(args.seed)
    pool.learn(kinds)
    kinds["exercises"] = exercises(pool, int(sum(map(size, kinds.values())) * EXERCISE_SHARE / (1 - EXERCISE_SHARE)))
    train: list[str] = []
    heldout: list[str] = []
    print(f"{'kind':<12}{'documents':>10}{'bytes':>12}{'held-out bytes':>16}")
    for kind, documents in kinds.items():
        kept = [d for d in dict.fromkeys(documents) if len(d.encode()) <= MAX_BYTES and not UNWANTED.search(d)]
        pool.shuffle(kept)
        count = int(len(kept) * min(0.1, HELDOUT_BYTES / size(kept))) if args.heldout else 0
        heldout += kept[:count]
        train += kept[count:]
        print(f"{kind:<12}{len(kept) - count:>10}{size(kept[count:]):>12}{size(kept[:count]):>16}")
    print(f"{'total':<12}{len(train):>10}{size(train):>12}{size(heldout):>16}")
    pool.shuffle(train)
    pool.shuffle(heldout)
    write(args.out, train)
    if args.heldout:
        write(args.heldout, heldout)


if __name__ == "__main__":
    main()
