import random
import re
from collections import Counter

import pytest

from modeling_yan.data import generate_stories, generate_story, read_rows
from modeling_yan.data.stories import PEOPLE, PLACES, THINGS, WORDINGS, generate_clozes, main


@pytest.fixture(scope="module")
def rows():
    return generate_stories(2_000, seed=1)


def reread(sentences):
    """Simulate a told story by its words alone; returns person -> place, thing -> place, thing -> person or None."""
    places, lying, holders = {}, {}, {}
    for sentence in sentences:
        person, verb, noun = re.fullmatch(r"(\w+) (.+) the (\w+)", sentence).groups()
        if verb in ("went to", "walked to", "moved to"):
            assert noun in PLACES
            assert places.get(person) != noun, "somebody moves to where they are"
            places[person] = noun
        elif verb in ("picked up", "took"):
            assert noun in THINGS
            assert holders.get(noun) is None, "two people hold one thing"
            assert person not in holders.values(), "somebody holds two things"
            assert lying.get(noun, places[person]) == places[person], "a thing is taken from afar"
            holders[noun] = person
        else:
            assert verb in ("dropped", "put down")
            assert holders[noun] == person, "somebody drops what they do not have"
            holders[noun], lying[noun] = None, places[person]
    where = {thing: places[person] if person else lying[thing] for thing, person in holders.items()}
    return places, where, holders


def expected_answer(question, places, where, holders):
    if found := re.fullmatch(r"Where is the (\w+)\?", question):
        return "where_thing", f"The {found[1]} is in the {where[found[1]]}."
    if found := re.fullmatch(r"Where is (\w+)\?", question):
        return "where_person", f"{found[1]} is in the {places[found[1]]}."
    if found := re.fullmatch(r"Who has the (\w+)\?", question):
        return "who_has", f"{holders[found[1]] or 'Nobody'} has the {found[1]}."
    person = re.fullmatch(r"What is (\w+) carrying\?", question)[1]
    assert person in places, "asked about somebody who never appeared"
    carried = [thing for thing, holder in holders.items() if holder == person]
    return "carrying", f"{person} is carrying {f'the {carried[0]}' if carried else 'nothing'}."


def test_every_answer_follows_from_the_text(rows):
    for row in rows:
        question, story = re.fullmatch(r"Question: (.*?\?) (.*)", row["source"]).groups()
        world = reread(story.removesuffix(".").split(". "))
        assert expected_answer(question, *world) == (row["kind"], row["target"]), row["source"]


class TestClozes:
    def test_every_hidden_word_follows_from_the_story(self):
        for row in generate_clozes(300, seed=3, max_sentences=5, max_facts=3):
            num_facts = row["source"].count("<mask>")
            sentences = row["target"].removesuffix(".").split(". ")
            facts, story = sentences[:num_facts], sentences[num_facts:]
            places, where, holders = reread(story)
            true = {f"{person} is in the {place}" for person, place in places.items()}
            true |= {f"The {thing} is in the {place}" for thing, place in where.items()}
            true |= {f"{person} is carrying the {thing}" for thing, person in holders.items() if person}
            true |= {f"{person or 'Nobody'} has the {thing}" for thing, person in holders.items()}
            assert set(facts) <= true
            assert len(set(facts)) == len(facts) == min(3, len(true))
            hidden = [re.sub(r"^\w+(?= has)|(?<! has the )\b\w+$", "<mask>", fact) for fact in facts]
            assert row["source"] == ". ".join(hidden + story) + "."

    def test_one_seed_gives_one_file(self):
        assert generate_clozes(20, seed=3) == generate_clozes(20, seed=3)
        assert generate_clozes(20, seed=3) != generate_clozes(20, seed=4)

    @pytest.mark.parametrize("bad", [{"num_rows": -1}, {"max_sentences": 1}, {"max_facts": 0}])
    def test_sizes_that_are_not_allowed(self, bad):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be"):
            generate_clozes(**{"num_rows": 1, "seed": 0, **bad})


def test_size_of_the_stories():
    rng = random.Random(0)
    stories = [generate_story(rng) for _ in range(900)]
    assert all(story.source.count(".") == story.num_sentences for story in stories)
    sizes = Counter(story.num_sentences for story in stories)
    assert sorted(sizes) == list(range(2, 11))
    assert min(sizes.values()) > 60
    assert {sum(person in story.source for person in PEOPLE) for story in stories} == {1, 2, 3, 4}


def test_largest_size_can_be_chosen():
    rows = generate_stories(200, seed=0, max_sentences=3)
    assert {row["source"].count(".") for row in rows} == {2, 3}
    with pytest.raises(ValueError, match="max_sentences is 1, but must be at least 2"):
        generate_stories(1, seed=0, max_sentences=1)


def test_kinds_are_balanced_and_guessing_is_weak(rows):
    kinds = Counter(row["kind"] for row in rows)
    assert sorted(kinds) == ["carrying", "where_person", "where_thing", "who_has"]
    assert min(kinds.values()) > 0.2 * len(rows)
    for kind, count in kinds.items():
        answers = Counter(row["target"] for row in rows if row["kind"] == kind)
        assert answers.most_common(1)[0][1] < 0.1 * count, kind
        nothing = sum(share for answer, share in answers.items() if re.search("nothing|Nobody", answer))
        assert nothing < 0.4 * count, kind
        assert nothing > 0 or kind.startswith("where")


def test_the_whole_world_appears(rows):
    text = " ".join(row["source"] for row in rows)
    assert set(PEOPLE + PLACES + THINGS) <= set(re.findall(r"\w+", text))


def test_equal_seeds_give_equal_rows(rows):
    assert generate_stories(2_000, seed=1) == rows
    assert generate_stories(100, seed=1) == rows[:100]
    assert generate_stories(100, seed=2) != rows[:100]


def test_sources_differ_and_avoid_the_excluded(rows):
    sources = {row["source"] for row in rows}
    assert len(sources) == len(rows)
    others = generate_stories(2_000, seed=1, exclude=sources)
    assert len(others) == 2_000
    assert sources.isdisjoint(row["source"] for row in others)


def test_negative_number_is_refused():
    assert generate_stories(0, seed=0) == []
    with pytest.raises(ValueError, match="num_rows"):
        generate_stories(-1, seed=0)


def test_command(tmp_path):
    first, second = str(tmp_path / "first.jsonl.gz"), str(tmp_path / "second.jsonl")
    main(["--num_rows", "50", "--seed", "3", "--output", first])
    main(["--num_rows", "50", "--seed", "3", "--output", second, "--exclude", first, "--max_sentences", "4"])
    assert read_rows(first) == generate_stories(50, seed=3)
    assert max(row["source"].count(".") for row in read_rows(second)) == 4
    assert not {row["source"] for row in read_rows(first)} & {row["source"] for row in read_rows(second)}


def plain_form(prompt: str) -> tuple[str, list[str]]:
    """Question in its first wording, and the sentences, of a prompt in any form but small letters."""
    question = re.search(r"(Question: |Q: )?([A-Z][^.?]*\?)", prompt)
    asked, sentences = question[2], prompt.replace(question[0], "")
    for pattern, others in WORDINGS.items():
        for other in others:
            escaped = re.escape(other).replace(r"\\1", "(.+)")
            if found := re.fullmatch(escaped, asked):
                asked = pattern.replace("(.*)", found[1]).replace(r"\?", "?")
    return asked, [sentence.strip() for sentence in sentences.split(".") if sentence.strip()]


def test_a_varied_wording_asks_the_same():
    rows = generate_stories(600, seed=4, max_sentences=6, varied_wording=True)
    in_small_letters = [row for row in rows if row["source"].islower()]
    assert 0.1 < len(in_small_letters) / len(rows) < 0.2
    forms = Counter()
    for row in rows:
        if row["source"].islower():
            continue
        question, sentences = plain_form(row["source"])
        assert expected_answer(question, *reread(sentences)) == (row["kind"], row["target"])
        forms["question first"] += row["source"].index("?") < row["source"].index(".")
        forms["own line"] += "\n" in row["source"]
        forms["prefix"] += "Q" in row["source"]
        forms["first wording"] += question in row["source"]
    total = len(rows) - len(in_small_letters)
    assert 0.5 < forms["question first"] / total < 0.7
    assert 0.08 < forms["own line"] / total < 0.22
    assert 0.4 < forms["prefix"] / total < 0.6
    assert 0.4 < forms["first wording"] / total < 0.6
