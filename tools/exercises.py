"""Exercises of copying, recall and reformatting: the generated part of the text that `tools/corpus.py` builds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random

TARGET_BYTES = 700  # a document is closed before it grows beyond this, unless one paragraph alone is longer
ONES = "one two three four five six seven eight nine ten"
TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
NUMBER_WORDS = dict(enumerate(f"{ONES} {TEENS}".split(), start=1))
ONSETS = [*"bcdfghjklmnprstvwz", "br", "st", "tr", "ch", "sh"]

Item = Callable[[], str]  # makes one item of an exercise; all items of a document share its form


class Pool(Random):
    """A seeded source of random words, names, phrases and numbers."""

    words: list[str]
    adjectives: list[str]
    names: list[str]

    def learn(self, kinds: dict[str, list[str]]) -> None:
        """Take words from WordNet, and names from the Bible: what is capitalised within a sentence."""
        entries = "\n".join(kinds["wordnet"])
        self.words = sorted(set(re.findall(r"^([a-z]{3,9})(?:,| \()", entries, flags=re.MULTILINE)))
        self.adjectives = sorted(set(re.findall(r"^([a-z]{3,9})(?:,.*)? \(adj", entries, flags=re.MULTILINE)))
        self.names = sorted(set(re.findall(r"(?<=[a-z] )[A-Z][a-z]{2,8}\b", "\n".join(kinds["bible"]))))

    def pseudo(self) -> str:
        """A word built of syllables that no book contains."""
        syllables = (self.choice(ONSETS) + self.choice("aeiou") for _ in range(self.randint(2, 3)))
        return f"{''.join(syllables)}{self.choice(['', '', *'nrlsm'])}"

    def word(self) -> str:
        """A word in small letters, three in ten invented."""
        return self.pseudo() if self.random() < 0.3 else self.choice(self.words)

    def name(self) -> str:
        """A capitalised name, half of them invented."""
        return self.pseudo().capitalize() if self.random() < 0.5 else self.choice(self.names)

    def phrase(self) -> str:
        """An adjective and a word, or two words, or one."""
        adjective, *words = self.choice(self.adjectives), self.word(), self.word(), self.word(), self.word()
        return self.choice([f"{adjective} {words[0]}", f"{words[1]} {words[2]}", words[3]])

    def number(self) -> int:
        """A whole number, small ones more often."""
        return self.randint(1, 20) if self.random() < 0.6 else self.randint(21, self.choice([99, 99, 2000]))

    def value(self) -> str | int:
        """Anything of the above."""
        return self.maker()()

    def maker(self) -> Callable[[], str | int]:
        """One of the four kinds of value."""
        makers: list[Callable[[], str | int]] = [self.word, self.name, self.phrase, self.number]
        return self.choice(makers)

    def slots(self, spoken: bool) -> dict[str, str | int]:
        """Values for the slots of a template (see `DOMAINS`); if `spoken`, half of the small `s` are number words."""
        data: dict[str, str | int] = {}
        for i in "123":
            word, small, number = self.word(), self.randint(1, 20), self.number()
            say = spoken and number <= 20 and self.random() < 0.5
            data |= {"n" + i: self.name(), "w" + i: word, "p" + i: self.phrase(), "d" + i: number, "k" + i: small}
            data |= {"s" + i: NUMBER_WORDS[number] if say else number, "t" + i: NUMBER_WORDS[small]}
            data |= {"u" + i: word.upper(), "c" + i: word.capitalize(), "h" + i: "-".join(word), "r" + i: word[::-1]}
        return data


def repeat(p: Pool) -> Item:
    """A list again, in the same or another order, or one part of it."""
    title, part = p.choice(PARTS)
    make = p.choice([p.maker(), p.value])
    sep, label = p.choice([", ", " ", "; ", " - "]), p.choice(["List", "Given", "Read"])

    def item() -> str:
        values = [str(make()) for _ in range(p.randint(3, 7))]
        return f"{label}: {sep.join(values)}\n{title}: {sep.join(values[part])}"

    return item


def lookup(p: Pool) -> Item:
    """A table, then questions about some of its keys."""
    key, make = p.choice([p.word, p.name]), p.maker()
    row = p.choice(["{}: {}", "{} = {}", "{} -> {}", "{}\t{}"])
    ask = p.choice(["{}? {}", "get {} -> {}", "The value of {} is {}.", "{}: {}"])

    def item() -> str:
        table = [(key(), make()) for _ in range(p.randint(4, 7))]
        rows = [row.format(*pair) for pair in table]
        return "\n".join([*rows, "--", *(ask.format(*pair) for pair in p.sample(table, 3))])

    return item


def reorder(p: Pool) -> Item:
    """The parts of a line put in another order, the same throughout a document."""
    makers = [p.maker() for _ in range(p.randint(2, 4))]
    order = p.sample(range(len(makers)), len(makers))
    before, after = p.sample([" and ", ", ", " / ", " with ", " to ", " | "], 2)

    def item() -> str:
        parts = [str(make()) for make in makers]
        return f"{before.join(parts)} => {after.join(parts[i] for i in order)}"

    return item


def record(p: Pool) -> Item:
    """A small record in one notation, then in another; its keys change or stay throughout a document."""
    given, wanted = p.sample(NOTATIONS, 2)
    fixed, keys = p.random() < 0.5, p.sample(p.words, p.randint(2, 4))

    def item() -> str:
        data = {key: p.value() for key in (keys if fixed else p.sample(p.words, len(keys)))}
        return f"{given(data)}\n=> {wanted(data)}"

    return item


def told(p: Pool) -> Item:
    """A sentence about a thing and its record as JSON; in a quarter of the documents the record comes first."""
    names, *sentences = p.choice(DOMAINS).split("|")
    fields = dict(pair.split("=") for pair in names.split())
    keys = p.sample(sorted(fields), len(fields))
    back, label = p.random() < 0.25, p.choice(["", "", "JSON: ", "As data: ", "-> "])

    def item() -> str:
        values = p.slots(spoken=not back)
        sentence = p.choice(sentences).format_map(values)
        data = json.dumps({key: values[fields[key]] for key in keys})
        sentence = sentence[0].upper() + sentence[1:]
        return f"{data}\n{sentence}" if back else f"{sentence}\n{label}{data}"

    return item


def recall(p: Pool) -> Item:
    """One of the templates, filled."""
    template = p.choice(TEMPLATES).replace(r"\n", "\n")
    return lambda: template.format_map(p.slots(spoken=False))


PARTS = [("Again", slice(None)), ("Copy", slice(None)), ("Backwards", slice(None, None, -1))]
PARTS += [("Last", slice(-1, None)), ("First", slice(1)), ("Second", slice(1, 2))]
NOTATIONS: list[Callable[[dict[str, str | int]], str]] = [
    json.dumps,
    lambda d: f"{','.join(d)}\n{','.join(map(str, d.values()))}",
    lambda d: "\n".join(f"{k}={v}" for k, v in d.items()),
    lambda d: "\n".join(f"{k}: {v}" for k, v in d.items()),
    lambda d: " ".join(f"The {k} is {v}." for k, v in d.items()),
    lambda d: "; ".join(f"{k} is {v}" for k, v in d.items()),
    lambda d: " ".join(f"<{k}>{v}</{k}>" for k, v in d.items()),
]
# Slots: n a name, w a word (u in capitals, c capitalised, h hyphenated, r backwards), p a phrase, d a number (s the
# same, perhaps as a word), k a number up to 20 (t the same as a word). Fields of a record come before the first bar.
DOMAINS = """
name=n1 age=d1 town=n2|{n1} is {s1} years old and lives in {n2}.|In {n2} lives {n1}, aged {s1}.
book=p1 author=n1 pages=d1|{n1} wrote {p1} on {s1} pages.|The {s1} pages of {p1} are by {n1}.
animal=p1 seen=d1 place=n1|Near {n1} live {s1} {p1}.|{s1} {p1} were seen at {n1}.|We saw {p1} in {n1}, {s1} in all.
river=n1 miles=d1 sea=n2|The {n1} runs {s1} miles to {n2}.|{s1} miles on, the {n1} meets the sea of {n2}.
ship=p1 captain=n1 guns=d1|{n1} sailed the {p1} with {s1} guns.|{s1} guns had the {p1} of captain {n1}.
points=d1 player=n1 game=p1|{n1} scored {s1} at {p1}.|At {p1}, {s1} points went to {n1}.
room=d1 guest=n1 door=w1|Room {s1}, {w1} door: {n1}.|{n1} has the {w1} door, room {s1}.
king=n1 land=n2 years=d1|{n1} ruled {n2} for {s1} years.|For {s1} years {n2} had {n1} as king.
day=k1 month=w1 born=n1|On day {t1} of {w1} was born {n1}.|{n1} was born in {w1}, on day {k1}.
part=p1 inches=d1|The {p1} is {s1} inches long.|{s1} inches is the {p1}.|We measured the {p1}: {s1} inches.
""".strip().splitlines()
TEMPLATES = r"""
{n1} said: "{w1} {w2} {p1}." Quote: "{w1} {w2} {p1}."
{n1} wrote: "{p1} {w1} {p2}." It was {n1} who wrote "{p1} {w1} {p2}."
"{p1} and {p2}," sang {n1}. What did {n1} sing? "{p1} and {p2}."
{n1} has the {p1}. {n2} has the {p2}. {n3} has the {p3}. Who has the {p2}? {n2}.
{n1} has the {p1}. {n2} has the {p2}. {n3} has the {p3}. Who has the {p1}? {n1}.
{n1} found the {p1} and {n2} found the {p2}. What did {n2} find? The {p2}.
{n1} lost the {p1}; {n2} lost the {p2}. What did {n1} lose? The {p1}.
{n1} is {d1}, {n2} is {d2}, {n3} is {d3}. {n3}: {d3}. {n1}: {d1}. {n2}: {d2}.
The {w1} is {w2}, the {p1} is {w3}. What is the {p1}? {w3}. What is {w2}? The {w1}.
A={n1} B={p1} C={n2}\nDear {n1}, here in {n2} we saw the {p1}.
A={d1} B={p1} C={n1} D={w1}\n{n1} counted {d1} {w1} and the {p1}.
Mother of {n1}: {n2}. Mother of {n2}: {n3}. So {n3} bore {n2}, and {n2} bore {n1}.
From {n1} to {n2} by {w1}; from {n2} to {n3} by {w2}. {n2} to {n3}? By {w2}.
{w1} {w2} {w3} {n1} | {w1} {w2} {w3} {n1}
{p1} ({d1}) and {p2} ({d2})\n{d1} for {p1}, {d2} for {p2}
Put {p1} for X and {n1} for Y: X near Y. Result: {p1} near {n1}.
{t1} = {k1}; {t2} = {k2}; {t3} = {k3}
{k1} is {t1}, {k2} is {t2}, {k3} is {t3}.
{t1} {p1} -> {k1} {p1}
{t1} {p1} and {t2} {p2}: {k1} {p1}, {k2} {p2}
{p1}: {t1}. {p2}: {t2}. How many {p2}? {k2}. How many {p1}? {k1}.
{n1} took {t1}, {n2} took {t2}. {n2} {k2}, {n1} {k1}.
{w1} {u1}, {w2} {u2}, {w3} {u3}
{w1}: {c1}. {w2}: {c2}. {w3}: {c3}.
{w1} = {h1}; {w2} = {h2}
{h1} spells {w1}, and {h2} spells {w2}.
{w1} backwards: {r1}. {w2} backwards: {r2}.
""".strip().splitlines()
FORMATS = (repeat, lookup, reorder, record, record, told, told, told, recall, recall, recall, recall)


def exercises(pool: Pool, total: int) -> list[str]:
    """Documents of several items of one form each, `total` bytes in all."""
    documents: list[str] = []
    while total > 0:
        item, joiner, aim = pool.choice(FORMATS)(pool), pool.choice(["\n", "\n\n"]), pool.randint(250, TARGET_BYTES)
        items = [item()]
        while sum(map(len, items)) < aim:
            items.append(item())
        documents.append(joiner.join(items))
        total -= len(documents[-1])
    return documents
