"""A small world told in plain sentences, with one question about it: reasoning data that can be checked exactly.

In the manner of the bAbI tasks (arXiv 1502.05698), with a world of our own: people move between places, pick things
up, carry them along and drop them. Every answer follows from the story alone.

    python -m modeling_yan.data.stories --num_rows 20000 --seed 0 --output stories.jsonl.gz
"""

import argparse
import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .rows import Row, read_rows, write_rows
from .tasks import slot_field

PEOPLE = ("Anna", "Clara", "Henry", "John", "Lucy", "Mary", "Peter", "Simon")
PLACES = ("attic", "cellar", "garden", "kitchen", "library", "market", "office", "stable")
THINGS = ("apple", "book", "coin", "cup", "hat", "key", "lamp", "letter")

MOVE_VERBS = ("went to", "walked to", "moved to")
TAKE_VERBS = ("picked up", "took")
DROP_VERBS = ("dropped", "put down")

MIN_SENTENCES, MAX_SENTENCES = 2, 10
TAKE_CHANCE, DROP_CHANCE = 0.5, 0.3  # of somebody who can; otherwise they move on
HELD_CHANCE = 0.75  # ask mostly about what is carried, or "nothing" and "nobody" would be good guesses

# Other ways to ask the same, as people type.
WORDINGS = {
    r"Where is (.*)\?": (r"Where's \1?", r"Where is \1 now?", r"In which place is \1?", r"Do you know where \1 is?"),
    r"What is (.*) carrying\?": (r"What does \1 have?", r"What is \1 holding?", r"What does \1 carry now?"),
    r"Who has (.*)\?": (r"Who is carrying \1?", r"Who's got \1?", r"Who has \1 now?"),
}
PREFIXES = ("", "", "Question: ", "Q: ")
LAST_CHANCE, LOWER_CHANCE, LINE_CHANCE = 0.4, 0.15, 0.15  # question last, small letters, question on its own line


@dataclass(frozen=True)
class Story:
    """A story with its question (`source`) and the sentence that answers it (`target`)."""

    source: str
    target: str
    kind: str
    num_sentences: int


@dataclass
class World:
    """What the sentences told so far determine; nobody and nothing has a place before it is told."""

    place_of: dict[str, str] = field(default_factory=dict)  # person -> place
    hand_of: dict[str, str] = field(default_factory=dict)  # person -> the one thing carried
    lying_in: dict[str, str] = field(default_factory=dict)  # dropped thing -> place

    @property
    def carrier_of(self) -> dict[str, str]:
        """Carried thing -> person."""
        return {thing: person for person, thing in self.hand_of.items()}

    @property
    def place_of_thing(self) -> dict[str, str]:
        """Every thing that was mentioned -> place, its carrier's if it has one."""
        return self.lying_in | {thing: self.place_of[person] for person, thing in self.hand_of.items()}

    def within_reach(self, person: str, things: Sequence[str]) -> list[str]:
        """Those of `things` that lie where `person` is, or were never mentioned and so may be anywhere."""
        here = self.place_of[person]
        free = [thing for thing in things if thing not in self.carrier_of]
        return [thing for thing in free if self.lying_in.get(thing, here) == here]


def generate_story(rng: random.Random, max_sentences: int = MAX_SENTENCES, varied_wording: bool = False) -> Story:
    """Draw a kind of question and a number of sentences from 2 to `max_sentences`, then a story that answers it.

    The prompt is "Question: ..." and the story, or, with `varied_wording`, one of many forms that a person may type:
    question first or last, with and without a prefix, in other words, in small letters.
    """
    kind = rng.choice(list(QUESTIONS))
    num_sentences = rng.randint(MIN_SENTENCES, max_sentences)
    while True:  # two sentences are enough for every kind, so this ends soon
        world = World()
        sentences = _tell(world, num_sentences, rng)
        question_and_answer = QUESTIONS[kind](world, rng)
        if question_and_answer:
            question, answer = question_and_answer
            prompt = " ".join(["Question:", question, *sentences])
            prompt = vary_wording(question, " ".join(sentences), rng) if varied_wording else prompt
            return Story(prompt, answer, kind, num_sentences)


def vary_wording(question: str, story: str, rng: random.Random) -> str:
    """A prompt that asks the question about the story in one of many forms."""
    for pattern, others in WORDINGS.items():
        if rng.random() < 0.5 and re.fullmatch(pattern, question):
            question = re.sub(pattern, rng.choice(others), question)
            break
    question = rng.choice(PREFIXES) + question
    parts = [story, question] if rng.random() < LAST_CHANCE else [question, story]
    prompt = ("\n" if rng.random() < LINE_CHANCE else " ").join(parts)
    return prompt.lower() if rng.random() < LOWER_CHANCE else prompt


def generate_stories(
    num_rows: int,
    seed: int,
    exclude: Collection[str] = frozenset(),
    max_sentences: int = MAX_SENTENCES,
    answer_slot: str = "",
    varied_wording: bool = False,
) -> list[Row]:
    """Make `num_rows` pairs (`source`, `target`, `kind`) with sources that are all different and not in `exclude`.

    `answer_slot` begins every source, such as "<mask><mask> " for a model that fills in masks, and is a field of the
    rows then. `varied_wording` is as in `generate_story`.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}, but must be 0 or more")
    _check_max_sentences(max_sentences)
    rng, excluded = random.Random(seed), frozenset(exclude)
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        story = generate_story(rng, max_sentences, varied_wording)
        source = answer_slot + story.source
        if source not in excluded:
            row = {"source": source, "target": story.target, "kind": story.kind, **slot_field(answer_slot)}
            rows.setdefault(source, row)
    return list(rows.values())


def _check_max_sentences(max_sentences: int) -> None:
    if max_sentences < MIN_SENTENCES:
        raise ValueError(f"max_sentences is {max_sentences}, but must be at least {MIN_SENTENCES}")


def generate_clozes(
    num_rows: int, seed: int, max_sentences: int = MAX_SENTENCES, max_facts: int = 6, mask_token: str = "<mask>"
) -> list[Row]:
    """Make `num_rows` pairs of up to `max_facts` sentences that are true at the end of a story, and the story.

    The target tells them; in the source one word of each of them is `mask_token`. One such row asks as many
    questions as it has facts, so that a model learns from it to read a story far sooner than from rows with one
    question. The sources are all different.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}, but must be 0 or more")
    _check_max_sentences(max_sentences)
    if max_facts < 1:
        raise ValueError(f"max_facts is {max_facts}, but must be at least 1")
    rng = random.Random(seed)
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        world = World()
        sentences = _tell(world, rng.randint(MIN_SENTENCES, max_sentences), rng)
        facts = _facts(world)
        facts = rng.sample(facts, min(max_facts, len(facts)))
        source = " ".join([fact.replace(hidden, mask_token) for fact, hidden in facts] + sentences)
        target = " ".join([fact for fact, _ in facts] + sentences)
        rows.setdefault(source, {"source": source, "target": target, "kind": "cloze", "in_place": True})
    return list(rows.values())


def _facts(world: World) -> list[tuple[str, str]]:
    """Sentences that are true of the world, and the word of each that takes the story to know."""
    places = [(f"{person} is in the {place}.", place) for person, place in world.place_of.items()]
    places += [(f"The {thing} is in the {place}.", place) for thing, place in world.place_of_thing.items()]
    carriers = world.carrier_of
    holders = [(thing, carriers.get(thing, "Nobody")) for thing in world.place_of_thing]
    carried = [(f"{person} is carrying the {thing}.", thing) for person, thing in world.hand_of.items()]
    return places + carried + [(f"{holder} has the {thing}.", holder) for thing, holder in holders]


def _tell(world: World, num_sentences: int, rng: random.Random) -> list[str]:
    people = rng.sample(PEOPLE, rng.randint(2, 4))
    things = rng.sample(THINGS, rng.randint(1, 3))
    return [_happen(world, rng.choice(people), things, rng) for _ in range(num_sentences)]


def _happen(world: World, person: str, things: Sequence[str], rng: random.Random) -> str:
    """Let `person` do one possible thing, change the world by it and return the sentence that tells it."""
    if person not in world.place_of:
        return _move(world, person, rng)
    if person in world.hand_of:
        return _drop(world, person, rng) if rng.random() < DROP_CHANCE else _move(world, person, rng)
    reachable = world.within_reach(person, things)
    if reachable and rng.random() < TAKE_CHANCE:
        return _take(world, person, rng.choice(reachable), rng)
    return _move(world, person, rng)


def _move(world: World, person: str, rng: random.Random) -> str:
    place = rng.choice([place for place in PLACES if place != world.place_of.get(person)])
    world.place_of[person] = place
    return f"{person} {rng.choice(MOVE_VERBS)} the {place}."


def _take(world: World, person: str, thing: str, rng: random.Random) -> str:
    world.lying_in.pop(thing, None)
    world.hand_of[person] = thing
    return f"{person} {rng.choice(TAKE_VERBS)} the {thing}."


def _drop(world: World, person: str, rng: random.Random) -> str:
    thing = world.hand_of.pop(person)
    world.lying_in[thing] = world.place_of[person]
    return f"{person} {rng.choice(DROP_VERBS)} the {thing}."


def _ask_where_person(world: World, rng: random.Random) -> tuple[str, str]:
    person = rng.choice(list(world.place_of))
    return f"Where is {person}?", f"{person} is in the {world.place_of[person]}."


def _ask_where_thing(world: World, rng: random.Random) -> tuple[str, str] | None:
    places = world.place_of_thing
    if not places:
        return None
    thing = rng.choice(list(places))
    return f"Where is the {thing}?", f"The {thing} is in the {places[thing]}."


def _ask_carrying(world: World, rng: random.Random) -> tuple[str, str] | None:
    empty_handed = [person for person in world.place_of if person not in world.hand_of]
    people = list(world.hand_of) if rng.random() < HELD_CHANCE else empty_handed
    if not people:
        return None
    person = rng.choice(people)
    carried = f"the {world.hand_of[person]}" if person in world.hand_of else "nothing"
    return f"What is {person} carrying?", f"{person} is carrying {carried}."


def _ask_who_has(world: World, rng: random.Random) -> tuple[str, str] | None:
    carriers = world.carrier_of
    things = list(carriers) if rng.random() < HELD_CHANCE else list(world.lying_in)
    if not things:
        return None
    thing = rng.choice(things)
    return f"Who has the {thing}?", f"{carriers.get(thing, 'Nobody')} has the {thing}."


QUESTIONS: dict[str, Callable[[World, random.Random], tuple[str, str] | None]] = {
    "where_person": _ask_where_person,
    "where_thing": _ask_where_thing,
    "carrying": _ask_carrying,
    "who_has": _ask_who_has,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a file of stories from the command line."""
    parser = argparse.ArgumentParser(description="Write question-answering stories as source and target pairs.")
    parser.add_argument("--num_rows", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_sentences", type=int, default=MAX_SENTENCES)
    parser.add_argument("--answer_slot", default="", help="what begins every source, such as '<mask><mask> '")
    parser.add_argument("--output", required=True, help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--exclude", nargs="*", default=[], help="files of pairs whose sources must not appear again")
    parser.add_argument(
        "--cloze", action="store_true", help="no questions: what is true, with one word of each fact hidden"
    )
    parser.add_argument("--varied_wording", action="store_true", help="prompts in many forms, as people type them")
    options = parser.parse_args(arguments)
    if options.cloze:
        write_rows(options.output, generate_clozes(options.num_rows, options.seed, options.max_sentences))
        return
    exclude = {row["source"] for path in options.exclude for row in read_rows(path)}
    forms = {"answer_slot": options.answer_slot, "varied_wording": options.varied_wording}
    rows = generate_stories(options.num_rows, options.seed, exclude, options.max_sentences, **forms)
    write_rows(options.output, rows)


if __name__ == "__main__":
    main()
