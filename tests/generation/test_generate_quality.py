"""What is kept of what was generated, and why the rest is not; what comes out of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from support.closed_teacher import WORDS, Closed
from support.generations import answered, kept, made, recipe, rejected
from tutelage.config import QualityConfig
from tutelage.generation.answers import Conversation
from tutelage.generation.checks import REFUSAL, filter_conversations
from tutelage.generation.diversity import diversity, verb_noun
from tutelage.generation.duplicates import NearDuplicateIndex, words

QUESTION = "How does a lighthouse keep ships away from the rocks at night?"
ANSWER = "Its lamp turns behind a lens, and the beam is seen for many miles, so that ships know where rocks are."


def item(name: str, question: str = QUESTION, answer: str = ANSWER, finish: str = "stop") -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(name, name, question, messages, [f"key-{name}"], [finish])


# Checks --------------------------------------------------------------------------------------------------------

GERMAN = "Ein Leuchtturm warnt die Schiffe nachts vor den Felsen und zeigt ihnen den sicheren Weg in den Hafen."


@pytest.mark.parametrize(
    ("reason", "broken", "quality"),
    [
        ("truncated", {"finish": "length"}, {}),
        ("length of the instruction", {"question": "Why?"}, {}),
        ("length of the answer", {"answer": "Because of it. " * 30}, {"answer_words": [1, 80]}),
        ("refusal", {"answer": "I'm sorry, but I can't help with that."}, {}),
        ("banned", {"answer": "Look it up at https://example.com, it is all there."}, {"banned": ["https?://"]}),
        ("language", {"answer": GERMAN}, {"language": "en"}),
    ],
)
def test_each_check_rejects_what_it_is_for_and_nothing_else(
    reason: str, broken: dict[str, str], quality: dict[str, Any]
) -> None:
    good = item("good")
    found, others = filter_conversations([item("bad", **broken), good], QualityConfig(**quality))
    assert [i.name for i in found] == ["good"]
    ((name, why, detail, messages, keys),) = others
    assert (name, why) == ("bad", reason)
    assert detail
    assert list(keys) == ["key-bad"]
    assert messages[-1]["content"] == broken.get("answer", ANSWER)


def test_what_is_allowed_is_kept() -> None:
    given = [
        item("cut", finish="length"),
        item("no", question="Tell me a secret of yours.", answer="I cannot answer."),
    ]
    found, _ = filter_conversations(given, QualityConfig(truncated=True, refusals=True))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I cannot help with that request.", True),
        ("I'm sorry, but as an AI I have no opinion.", True),
        ("As a large language model, I do not have feelings.", True),
        ("Unfortunately, I am unable to open links.", True),
        ("Sorry is the hardest word. Start by saying it.", False),
        ("As an example, take three eggs.", False),
        ("You cannot help but smile at a puppy.", False),
        ("I have always loved the sea, she said.", False),
    ],
)
def test_refusals_are_told_from_answers(text: str, refuses: bool) -> None:
    assert bool(REFUSAL.search(text)) is refuses


def test_texts_to_evaluate_on_do_not_get_in(tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    long = "Which of the four seasons has the longest days in the south of Chile, and why is that so?"
    rows = [{"question": long, "choices": {"text": ["Yes", "A red fox by the river"]}}]
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        item("whole", question=f"Please answer this. {long}"),
        item("short", question="Is it a red fox by the river that barks?"),
        item("clean", question="Yes or no: is the fox by the river a red one?"),
        item("answer", question="What do exams ask about the year?", answer=f"They ask: {long.upper()}"),
    ]
    found, others = filter_conversations(
        asked, QualityConfig.model_validate({"decontaminate": {"path": str(exam), "words": 8}})
    )
    assert [i.name for i in found] == ["clean"]
    assert {r.name: r.reason for r in others} == dict.fromkeys(["whole", "short", "answer"], "contaminated")


def test_duplicates_are_told_from_near_ones_and_answers_to_one_prompt_may_be_several() -> None:
    twin = item("twin", question="How does the lighthouse keep ships away from the rocks at night?")
    other = item("a/1", answer="It blinks, and each one blinks in its own way.")
    other.prompt = "a"
    same = item("a/2")
    same.prompt = "a"
    found, others = filter_conversations([item("a"), item("same"), twin, other, same], QualityConfig())
    assert [i.name for i in found] == ["a", "a/1"]
    assert [(r.name, r.reason) for r in others] == [
        ("same", "duplicate"), ("twin", "near duplicate"), ("a/2", "duplicate"),
    ]  # fmt: skip


# Near duplicates: the index against all pairs --------------------------------------------------------------------


def rouge_l(a: str, b: str) -> float:
    """F of the longest common subsequence of words, by the book."""
    x, y = words(a), words(b)
    row = [0] * (len(y) + 1)
    for left in x:
        before = 0
        for j, right in enumerate(y, 1):
            before, row[j] = row[j], before + 1 if left == right else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(x) + len(y)) if x or y else 1.0


TEXTS = st.lists(st.text("abcde ", max_size=24).map(lambda t: " ".join(t)), min_size=1, max_size=30)


@given(texts=TEXTS, threshold=st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_index_finds_what_comparing_all_with_all_finds(texts: list[str], threshold: float) -> None:
    near, plain = NearDuplicateIndex(threshold), []
    for text in texts:
        by_hand = next((i for i, other in enumerate(plain) if rouge_l(text, other) >= threshold - 1e-9), None)
        assert near.add_if_new(text) == by_hand
        if by_hand is None:
            plain.append(text)


def test_the_index_is_right_on_sentences_beyond_its_re_ranking() -> None:
    dice = random.Random(0)
    pool = ["the", "a", "of", *WORDS.split()[:14]]
    near, plain = NearDuplicateIndex(0.7), []
    for _ in range(600):
        text = " ".join(dice.choice(pool[: dice.randint(4, len(pool))]) for _ in range(dice.randint(3, 12)))
        by_hand = next((i for i, other in enumerate(plain) if rouge_l(text, other) >= 0.7), None)
        assert near.add_if_new(text) == by_hand
        if by_hand is None:
            plain.append(text)
    assert 64 < len(plain) < 600


# Diversity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("Write a short story about a fox.", ("write", "story")),
        ("Can you explain the water cycle to a child?", ("explain", "cycle")),
        ("Given these numbers, calculate their mean: 3, 4.", ("calculate", "mean")),
        ("List three cities in Peru.", ("list", "city")),
        ("Who was first?", None),
    ],
)
def test_verbs_and_nouns(text: str, pair: tuple[str, str] | None) -> None:
    assert verb_noun(text) == pair


def test_diversity_counts() -> None:
    found = diversity(["Write a poem.", "Write poems.", "Write a letter.", "Sort this list.", "Who?"])
    assert (found["instructions"], found["with_verb"], found["verbs"], found["pairs"]) == (5, 4, 2, 3)
    assert found["bits"] == 1.5
    assert found["top"][0] == {"verb": "write", "count": 3, "nouns": {"poem": 2, "letter": 1}}


# Output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_data_is_loaded_by_datasets_and_says_where_it_is_from(tmp_path: Path, form: str) -> None:
    import datasets

    (tmp_path / "p.csv").write_text("id,prompt\nsea,What is the sea to a fish?\nsky,What is the sky to a bird?\n")
    with Closed(answer=lambda prompt: "ümlaut and\u2028separator\nsecond line") as server:
        path = recipe(
            tmp_path, server, prompts=str(tmp_path / "p.csv"), system="Be kind.", format=form, samples=1,
            quality={"language": None},
        )  # fmt: skip
        made(path, tmp_path / "out")
        sent = len(server.calls)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert sent == len(loaded) == 2
    assert loaded["id"] == ["sea", "sky"]
    assert loaded[0]["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is the sea to a fish?"},
        {"role": "assistant", "content": "ümlaut and\u2028separator\nsecond line"},
    ]
    lines = {call["key"]: call for call in answered(tmp_path / "out")}
    for row in loaded:
        (key,) = row["keys"]
        assert lines[key]["request"]["messages"] == row["messages"][:2]
        assert lines[key]["response"]["choices"][0]["message"]["content"] == row["messages"][2]["content"]


def test_the_card_says_what_was_made_and_not_where(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Write a poem about rain\nWhy?\nName a river in France\n")
    with Closed() as server:
        path = recipe(
            tmp_path, server, prompts=str(tmp_path / "p.txt"), quality={"language": "en", "dedup_threshold": 0.7}
        )
        made(path, tmp_path / "out", "generate.quality.language=null")
        port = str(server.port)
    text = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["configs"][0]["data_files"][0]["path"] == "data/train.parquet"
    assert "2 conversations by the model closed" in text
    assert "| length of the instruction | 1 |" in text
    assert "| write | 1 | poem (1) |" in text
    assert port not in text
    (one,) = rejected(tmp_path / "out")
    assert one["messages"][0]["content"] == "Why?"


def test_another_template_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Write a poem about rain\n")
    versions = set()
    with Closed() as server:
        for user in ("{{ prompt }}", "{{ prompt }}!", "{{ prompt }}"):
            made(recipe(tmp_path, server, prompts=str(tmp_path / "p.txt"), user=user), tmp_path / "out")
            versions.add(kept(tmp_path / "out")[0]["templates"])
        assert len(server.calls) == len(versions) == 2


def test_prompts_that_are_held_out_are_in_no_training_data(tmp_path: Path) -> None:
    import datasets

    lines = [f"Tell me what {i} sheep said to the wolf" for i in range(40)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    tests = []
    with Closed() as server:
        for count in (40, 30):  # fewer prompts move few between the two
            (tmp_path / "p.txt").write_text("\n".join(lines[:count]))
            path = recipe(tmp_path, server, prompts=str(tmp_path / "p.txt"), samples=2, held_out=8, format="jsonl")
            found = made(path, tmp_path / "out")
            loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / f"cache{count}"))
            prompts = {split: {row["messages"][0]["content"] for row in loaded[split]} for split in loaded}
            assert len(prompts["test"]) == 8
            assert not prompts["test"] & prompts["train"]
            assert {split: len(loaded[split]) for split in loaded} == found.summary["splits"]
            tests.append(prompts["test"])
    assert {p for p in tests[0] if p in lines[:30]} <= tests[1]
