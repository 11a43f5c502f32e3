"""Short math word problems: the task of the demo, its three splits, and its strict scorer.

A template is an operation, a story and a question. Train, dev and test have templates of their own: no template, and no
question once names, numbers and things are masked, occurs in two splits, and neither do the things counted. The expert
is trained on train, all choices are made on dev, and test is for the tables.

    Question: Nora has 5 plums. Eli gives Nora 7 more plums. How many plums does Nora have now?
    Answer: 5 + 7 = 12
    #### 12
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["FEW_SHOT", "TEMPLATES", "Problem", "Split", "Template", "is_correct", "is_exact", "make_problems"]

Split = Literal["train", "dev", "test"]


@dataclass(frozen=True)
class Template:
    """One kind of problem; slots: ``{a}``, ``{b}`` numbers, ``{n}``, ``{m}`` names, ``{o}`` things."""

    operation: str
    story: str
    question: str


@dataclass(frozen=True)
class Problem:
    """A problem with its one right equation and answer."""

    question: str
    equation: str
    answer: int
    template: int  # index into TEMPLATES[split]

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        return f" {self.equation} = {self.answer}\n#### {self.answer}"

    def row(self, index: int) -> dict[str, str]:
        """The problem as an example of the task demo_math."""
        solution = self.completion.removeprefix(" ")
        return {"id": str(index), "question": self.question, "answer": str(self.answer), "solution": solution}


def is_correct(text: str, problem: Problem) -> bool:
    """Strict exact match: the first line that starts with ``####`` is ``#### n`` with the right n."""
    line = re.search(r"^####.*$", text, flags=re.MULTILINE)
    return line is not None and line.group().rstrip() == f"#### {problem.answer}"


def is_exact(text: str, problem: Problem) -> bool:
    """The stricter rule: the right answer in its two lines, ended by the model itself, and nothing after them."""
    return re.fullmatch(rf" ?[^\n]+ = {problem.answer}\n#### {problem.answer}\n?", text) is not None


def make_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """``count`` different problems of a split, the templates in turn, so that every one has its share."""
    rng = random.Random(f"{split} {seed}")
    templates = TEMPLATES[split]
    order: list[int] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    while len(problems) < count:
        if not order:
            order = rng.sample(range(len(templates)), len(templates))
        index = order.pop()
        template = templates[index]
        a, b, answer = _numbers(template.operation, rng)
        n, m = rng.sample(_NAMES[split].split(), 2)
        question = f"{template.story} {template.question}".format(
            a=a, b=b, n=n, m=m, o=rng.choice(_THINGS[split].split())
        )
        problem = Problem(question, f"{a} {template.operation} {b}", answer, index)
        if problem.question not in seen:
            seen.add(problem.question)
            problems.append(problem)
    return problems


def _numbers(operation: str, rng: random.Random) -> tuple[int, int, int]:
    """Two operands, in the order of the equation, and the result; small enough for a small model."""
    if operation == "+":
        a, b = rng.randint(3, 40), rng.randint(3, 40)
        return a, b, a + b
    if operation == "-":
        b, answer = rng.randint(3, 30), rng.randint(2, 30)
        return b + answer, b, answer
    a, b = rng.randint(3, 12), rng.randint(2, 9)
    if operation == "*":
        return a, b, a * b
    return a * b, b, a


def _parse(text: str) -> tuple[Template, ...]:
    """Lines ``operation | story | question``."""
    return tuple(Template(*(part.strip() for part in line.split("|"))) for line in text.strip().splitlines())


_NAMES: dict[Split, str] = {
    "train": "Nora Eli Tom Mary Sam Lucy Ben Kate Paul Jane Omar Rosa Ivan Lily Noah Emma",
    "dev": "Hugo Clara Felix Diana Amir Paula Oscar Wendy",
    "test": "Maya Leo Greta Victor Priya Simon Alice Marco Yuki Carl Tessa Jonas",
}

_THINGS: dict[Split, str] = {
    "train": (
        "plums apples stickers marbles pencils coins shells cards "
        "stamps buttons cookies books balloons eggs oranges stones"
    ),
    "dev": "peaches crayons beads magnets muffins badges candles dolls",
    "test": "pears erasers tickets postcards cherries ribbons bottles lemons keys bananas flowers toys",
}

TEMPLATES: dict[Split, tuple[Template, ...]] = {
    "train": _parse(
        """
        + | {n} has {a} {o}. {m} gives {n} {b} more {o}. | How many {o} does {n} have now?
        + | {n} picked {a} {o} in the morning and {b} {o} in the afternoon. | How many {o} did {n} pick in total?
        + | There are {a} red {o} and {b} blue {o} in a box. | How many {o} are in the box?
        + | A shop sold {a} {o} on Monday and {b} {o} on Tuesday. | How many {o} did the shop sell altogether?
        + | {n} walked {a} miles on Saturday and {b} miles on Sunday. | What is the total distance {n} walked?
        + | {n} is {a} years old. | How old will {n} be in {b} years?
        + | A tank holds {a} liters of water. {n} pours in {b} liters. | How many liters are in the tank now?
        + | {n} spent ${a} on a hat and ${b} on a scarf. | How much money did {n} spend?
        - | {n} had {a} {o}. {n} gave {b} of them to {m}. | How many {o} are left?
        - | {n} has {a} {o} and {m} has {b} {o}. | How many more {o} does {n} have than {m}?
        - | There were {a} {o} on the table. {n} took away {b}. | How many {o} remain on the table?
        - | A rope is {a} meters long. {n} cuts off {b} meters. | How long is the rope now?
        - | {n} needs {a} {o}. So far {n} has found {b}. | How many more {o} does {n} need?
        - | {n} had ${a} and bought a toy for ${b}. | How much money does {n} have left?
        - | {a} people were on a bus. At the stop {b} people got off. | How many people are still on the bus?
        - | A book has {a} pages. {n} has read {b} pages. | How many pages are left to read?
        * | Each bag holds {a} {o}. {n} has {b} bags. | How many {o} does {n} have in all the bags?
        * | {n} buys {a} {o} that cost ${b} each. | How much does {n} pay?
        * | There are {a} rows with {b} chairs in each row. | How many chairs are there?
        * | {n} reads {a} pages every day. | How many pages does {n} read in {b} days?
        * | One wagon has {a} wheels. | How many wheels do {b} wagons have?
        * | {n} earns ${a} per hour and works {b} hours. | How much does {n} earn?
        * | {n} plants {a} seeds in each of {b} pots. | How many seeds does {n} plant?
        * | A machine makes {a} {o} a minute. | How many {o} does it make in {b} minutes?
        / | {n} shares {a} {o} equally among {b} friends. | How many {o} does each friend get?
        / | {n} puts {a} {o} into boxes of {b}. | How many boxes does {n} fill?
        / | {n} paid ${a} for {b} {o}. | How much does one of the {o} cost?
        / | A ribbon {a} inches long is cut into {b} equal pieces. | How long is each piece?
        / | {n} read {a} pages in {b} days, the same number each day. | How many pages did {n} read each day?
        / | {a} students form teams of {b}. | How many teams are there?
        / | {n} has {a} {o} and places {b} on each shelf. | How many shelves does {n} use?
        / | A trip of {a} miles takes {b} hours at a steady speed. | How many miles are driven each hour?
        """
    ),
    "dev": _parse(
        """
        + | {n} collected {a} {o} last week. This week {n} collected another {b}. | What is the size of the collection?
        + | A train carried {a} passengers. Then {b} passengers got on. | How many passengers does the train carry?
        + | A farmer owns {a} cows and {b} sheep. | How many animals does the farmer own?
        + | The temperature was {a} degrees at dawn and rose by {b} degrees. | What was the temperature then?
        + | {n} scored {a} points and {m} scored {b} points for the same team. | How many points did the team score?
        + | {n} saved ${a} in June. In July {n} saved ${b}. | What are the savings of both months together?
        - | {n} baked {a} {o}, but {b} of them burned. | How many good {o} does {n} have?
        - | {a} cars stood in the parking lot and {b} drove away. | How many cars stayed in the parking lot?
        - | {n} is {a} years old and {m} is {b} years old. | How many years older is {n}?
        - | A candle of {a} centimeters burned down by {b} centimeters. | How tall is the candle at the end?
        - | A class has {a} children. {b} of them are boys. | How many girls are in the class?
        - | {n} wants a bike for ${a} and owns ${b}. | How many dollars are missing?
        * | A spider catches {a} flies a day. | How many flies will the spider catch in {b} days?
        * | {n} bakes {b} trays with {a} {o} on every tray. | How many {o} does {n} bake?
        * | A ticket costs ${a}. | What do {b} tickets cost?
        * | There are {b} cages in the zoo with {a} monkeys in every cage. | How many monkeys live in the zoo?
        * | {n} runs {a} kilometers each morning. | How far does {n} run in {b} mornings?
        * | Every packet contains {a} {o}. {n} opens {b} packets. | How many {o} come out of the packets?
        / | {b} children split {a} {o} evenly. | How many {o} go to every child?
        / | A teacher divides {a} pupils into {b} groups of the same size. | How many pupils are in a group?
        / | {n} needs {a} {o}. They are sold in packs of {b}. | How many packs must {n} buy?
        / | {n} earned ${a} in {b} days, the same amount daily. | What did {n} earn per day?
        / | A baker has {a} cups of flour, and a cake takes {b} cups. | How many cakes can the baker make?
        / | {a} flowers stand in {b} vases, equally many in each. | How many flowers stand in one vase?
        """
    ),
    "test": _parse(
        """
        + | A library owned {a} novels and received {b} new novels. | How many novels does the library own today?
        + | {n} caught {a} fish, and {m} caught {b} fish. | How many fish did the two of them catch?
        + | In a pond swim {a} ducks. {b} more ducks land on the water. | How many ducks swim in the pond after that?
        + | {n} drove {a} kilometers before lunch and {b} kilometers after it. | How far did {n} drive that day?
        + | A hen house has {a} white hens and {b} brown hens. | What is the number of hens in the hen house?
        + | Lunch costs ${a} and dinner costs ${b}. | What must {n} pay for both meals?
        + | {n} wrote {a} letters in spring and {b} letters in summer. | How many letters are that over both seasons?
        + | A tree was {a} feet tall and has grown {b} feet since. | What is the height of the tree today?
        + | {n} put {a} {o} into a basket, then added {b} from the kitchen. | How many {o} does the basket contain?
        + | {a} guests came by car and {b} guests came on foot. | How many guests came to the party?
        - | {n} bought {a} {o} and ate or lost {b} of them. | How many {o} does {n} still have?
        - | A barrel contained {a} gallons of oil, and {b} gallons leaked out. | How many gallons stayed inside?
        - | {a} birds sat on a wire. {b} of the birds flew off. | How many birds are still sitting there?
        - | {n} jumped {a} inches, {m} only {b} inches. | By how many inches was the jump of {n} longer?
        - | A theater has {a} seats. {b} seats are taken. | How many seats are free?
        - | A phone cost ${a}. In the sale it became ${b} cheaper. | What is the price in the sale?
        - | {n} has to solve {a} exercises and finished {b}. | How many exercises must {n} still solve?
        - | Of {a} {o} in a crate, {b} are broken. | How many {o} are not broken?
        - | {n} weighed {a} kilograms and lost {b} kilograms. | What does {n} weigh now?
        - | {m} owns {a} {o}. {n} owns {b} fewer than {m}. | How many {o} does {n} own?
        * | A hotel has {a} floors and {b} rooms on every floor. | How many rooms does the hotel have?
        * | {n} drinks {a} glasses of water a day. | How many glasses are that in {b} days?
        * | {b} vans drive to the beach with {a} people in each van. | How many people drive to the beach?
        * | A pound of nuts costs ${a}. {n} buys {b} pounds. | What is the bill?
        * | {n} makes {b} necklaces and needs {a} pearls for each necklace. | How many pearls are needed?
        * | A clerk types {a} pages an hour. | How many pages are typed after {b} hours?
        * | A garden has {a} beds, and {b} roses grow in each bed. | How many roses grow in the garden?
        * | Every pupil brings {a} {o}. There are {b} pupils. | How many {o} are brought to school?
        * | A dog eats {a} biscuits per meal. | How many biscuits does the dog eat in {b} meals?
        * | {n} swims {a} laps each evening. | After {b} evenings, how many laps has {n} swum?
        / | {n} deals {a} cards to {b} players, the same number to each. | How many cards does a player hold?
        / | {a} tourists travel in boats that take {b} tourists each. | How many boats are necessary?
        / | {a} chairs are set up in {b} equal rows. | How many chairs make a row?
        / | {n} pours {a} liters of juice into bottles of {b} liters. | How many bottles can {n} fill?
        / | A field of {a} acres is split into {b} lots of the same size. | How many acres has a lot?
        / | {n} ties {a} {o} into bundles of {b}. | How many bundles does {n} get?
        / | Grandmother leaves ${a} to her {b} grandchildren in equal parts. | How many dollars does one grandchild get?
        / | {n} saves ${b} a week for a game that costs ${a}. | How many weeks does {n} have to save?
        / | A printer needs {b} minutes for a poster. | How many posters does it print in {a} minutes?
        / | {n} hung {a} pictures on {b} walls, equally many on each wall. | How many pictures are on one wall?
        """
    ),
}

# The four examples of the few-shot control: one of each operation, from the training templates.
FEW_SHOT: tuple[Problem, ...] = tuple(
    next(problem for problem in make_problems("train", 200, seed=1234) if f" {operation} " in problem.equation)
    for operation in "+-*/"
)
