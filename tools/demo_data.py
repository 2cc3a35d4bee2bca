"""Write the data of the demo task: an order in everyday English becomes a JSON record.

    python tools/demo_data.py [FOLDER]

Names and items (adjective + noun) of the held-out file do not occur in the training file, so that its score shows
copying from the order and not memory. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

FILES = {"train.jsonl": 2400, "heldout.jsonl": 256}  # examples
MAX_CHARS = 60  # of an order, and of its answer
HELDOUT_SHARE = 0.12  # of the names and of the items

UP_TO_TEN = "two three four five six seven eight nine ten"
UP_TO_TWENTY = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
NUMBER_WORDS = dict(enumerate(f"{UP_TO_TEN} {UP_TO_TWENTY}".split(), start=2))
TEMPLATES = """
{to} wants {qty} {item}.
{to} would like {qty} {item}.
{to} needs {qty} {item} by Friday.
{to} ordered {qty} {item}.
Please send {qty} {item} to {to}.
Could you ship {qty} {item} to {to}?
For {to}: {qty} {item}, please.
{qty} {item} for {to}, please.
Give {to} {qty} {item}.
Pack {qty} {item}; they go to {to}.
I need {qty} {item} sent to {to}.
Can {to} have {qty} {item}?
Send {to} {qty} of the {item}.
The {item} are for {to}, {qty} of them.
""".strip().splitlines()
ADJECTIVES = """
red blue green yellow white black brown grey pink purple orange golden silver small big large tiny huge long short tall
wide narrow thick thin round square flat heavy light old new clean dusty shiny dull smooth rough soft hard warm cold dry
wet sweet salty sour bitter fresh frozen plain striped spotted wooden metal plastic paper glass cotton woollen leather
simple fancy cheap sturdy folding painted broken empty spare quiet bright dark
"""
NOUNS = """
candles apples pears plums lemons cherries onions carrots potatoes tomatoes pumpkins mushrooms cookies cakes pies rolls
biscuits pencils pens brushes notebooks books maps cards stamps envelopes posters rulers scissors boxes bags baskets
buckets bottles jars cups mugs plates bowls spoons forks knives pans kettles trays towels blankets pillows curtains rugs
chairs tables stools benches shelves lamps mirrors clocks bells hammers nails screws ropes chains hooks wheels tyres
ladders shovels gloves hats scarves socks shoes boots shirts jackets belts buttons ribbons balls kites puppets drums
flutes whistles bricks tiles pipes planks poles tents flags keys locks
"""
NAMES = """
Aaron Abdul Abena Adam Adele Adina Aditi Adrian Agnes Ahmed Aiko Aisha Akira Alan Albert Alba Alejandro Alex Ali Alice
Alina Alma Amina Amir Amit Amos Ana Anders Andrea Andrei Angela Anika Anita Anna Anton Antonio Anya Arjun Arne Arthur
Arturo Asha Astrid Ayumi Aziz Barbara Bashir Beatriz Ben Bengt Bianca Bilal Birgit Bogdan Boris Brenda Brian Bruno
Camila Carla Carlos Carmen Caroline Catalina Cecilia Celia Chen Chiara Chidi Chloe Clara Claudia Connor Cyril Dagmar
Daisuke Dalia Dana Daniel Daria David Deepak Delia Denis Devi Diana Diego Dimitri Dina Dmitri Dolores Dong Dora Doris
Dragan Edith Eduardo Edwin Eileen Elena Eli Elias Elif Elina Elisa Ella Elsa Emeka Emil Emily Emma Enrique Erik Erika
Esra Esteban Esther Ethan Eva Evelyn Fadi Farah Farid Fatima Felix Femi Fergus Fiona Flora Florian Frank Freya Frida
Gabriel Galina Ganesh George Gerda Gita Giulia Goran Greta Guido Gustav Hadi Hamid Hana Hanna Hans Harald Haruto Hassan
Hedda Heidi Helen Helga Henry Hiro Hugo Ibrahim Ida Ifeoma Ignacio Igor Ilse Imani Imran Ines Inga Ingrid Irene Irina
Isaac Isabel Ismail Ivan Ivana Jack Jacob Jamal James Jana Janet Jasmin Javier Jelena Jens Jin Joana Johan Jonas Jorge
Josef Juan Judith Julia Jun Jutta Kamal Karen Karim Karin Kasper Katya Kavita Kei Keiko Kenji Khalid Kiran Klara Klaus
Kofi Kumar Kwame Laila Lars Laszlo Laura Layla Leif Leila Lena Leo Leonor Lidia Lin Linda Linus Lisa Livia Lorenzo Louis
Lucas Lucia Luis Luisa Lukas Magda Mahmoud Maja Malik Manuel Marco Margit Maria Marie Marina Mario Marta Martin Mateo
Matilda Mei Mercedes Mia Miguel Mikael Milan Milena Mina Mira Miriam Mohamed Mona Monika Nadia Naomi Natalia Nathan
Nazim Neha Nguyen Nia Nicolas Nikita Nils Nina Noah Nora Nuria Odile Olaf Oleg Olga Oliver Omar Oscar Otto Pablo Pamela
Patrick Paula Pavel Pedro Per Petra Philip Pierre Pilar Priya Rachel Rafael Rahul Ramona Rania Raquel Rashid Ravi
Rebecca Renata Ricardo Rita Robert Rohan Roman Rosa Ruth Saeed Sakura Salma Samir Samuel Sandra Sanjay Sara Sasha Sean
Selma Sergei Shira Sigrid Silvia Simon Sofia Sonia Stefan Stella Sunita Susan Sven Svetlana Takeshi Tamara Tariq
Tatiana Teresa Thabo Thomas Tibor Tina Tobias Tomas Ursula Uwe Vadim Valeria Vera Victor Vijay Viktor Vikram Wanda Wei
William Wolfgang Xavier Yara Yasmin Yuki Yusuf Zainab Zara Zeynep Zoltan Zuzana
"""


def split(values: list[str], random: Random) -> tuple[list[str], list[str]]:
    """Shuffled values for training and, `HELDOUT_SHARE` of them, held out."""
    shuffled = random.sample(values, len(values))
    count = int(len(values) * HELDOUT_SHARE)
    return shuffled[count:], shuffled[:count]


def quantity(random: Random) -> tuple[int, str]:
    """A number from 2 to 99 and how it is written; half are below 21, and half of those are written as words."""
    number = random.randint(2, 20) if random.random() < 0.5 else random.randint(21, 99)
    return number, NUMBER_WORDS[number] if number in NUMBER_WORDS and random.random() < 0.5 else str(number)


def examples(count: int, names: list[str], items: list[str], random: Random) -> list[str]:
    """`count` distinct lines of JSON, the templates in turn, then shuffled."""
    lines: dict[str, None] = {}
    while len(lines) < count:
        number, written = quantity(random)
        item, name = random.choice(items), random.choice(names)
        order = TEMPLATES[len(lines) % len(TEMPLATES)].format(qty=written, item=item, to=name)
        order = order[0].upper() + order[1:]
        answer = json.dumps({"qty": number, "item": item, "to": name})
        if max(len(order), len(answer)) <= MAX_CHARS:
            messages = [{"role": "user", "content": order}, {"role": "assistant", "content": answer}]
            lines[json.dumps({"messages": messages})] = None
    return random.sample(list(lines), count)


def main() -> None:
    """Split names and items, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[1] / "src/rwkv_peft/assets/demo"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    random = Random(args.seed)
    items = [f"{adjective} {noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    pools = zip(split(NAMES.split(), random), split(items, random), strict=True)
    args.folder.mkdir(parents=True, exist_ok=True)
    for (file, count), (names, items) in zip(FILES.items(), pools, strict=True):
        lines = examples(count, names, items, random)
        (args.folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
