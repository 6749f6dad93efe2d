"""Preferences from the standard library and from files, and their encoding."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kernelab.papers.hydra_rlhf import data
from kernelab.papers.hydra_rlhf.data import Preference, Preferences, functions, read_preferences, standard_library
from kernelab.papers.hydra_rlhf.tokens import Encoder, join, shuffled, train_tokenizer

LIBRARY = {
    "abc.py": '''
class Shelf:
    """Not a function."""

    def take_book(self, name):  # a comment
        """Take a book off.

        More about it.
        """
        def helper():
            """Help to take it."""
        return self.books.pop(name)

    @property
    async def size(self): "Number of books here."
''',
    "json/tool.py": 'def short():\n    """Too short."""\ndef undocumented(): pass\n',
    "test/support.py": 'def helper():\n    """Of no interest here."""\n',
    "site-packages/other.py": 'def other():\n    """Not the standard library."""\n',
    "_abc.py": "def broken(:",
    "io.py": 'def repeated():\n    """Same text twice."""\n    return "Same text twice."\n',
}


@pytest.fixture
def library(tmp_path):
    for name, source in LIBRARY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def test_functions_are_given_without_their_docstring(library):
    found = functions(library)
    assert [(function.module, function.summary) for function in found] == [
        ("abc", "Take a book off."),
        ("abc", "Help to take it."),
        ("abc", "Number of books here."),
    ]
    assert found[0].source.startswith("class Shelf:\ndef take_book(self, name):\n")
    assert "More about it" not in found[0].source
    assert "comment" not in found[0].source
    assert "self.books.pop(name)" in found[0].source
    assert found[2].source == "class Shelf:\n@property\nasync def size(self):\n    pass"


@pytest.fixture(scope="module")
def found():
    return functions()


@pytest.fixture
def preferences(found, monkeypatch):
    monkeypatch.setattr(data, "functions", lambda: found)
    return standard_library(0.15, 2, seed=3)


def test_no_summary_leaks_into_its_prompt(preferences):
    rows = preferences.train + preferences.held_out
    assert len(rows) > 5000
    assert not [row for row in rows if row.chosen in row.prompt]
    assert not [row for row in rows if row.chosen.casefold() == row.rejected.casefold()]


def test_modules_are_on_one_side_of_the_split(preferences):
    sides = [{row.group for row in rows} for rows in (preferences.train, preferences.held_out)]
    assert not sides[0] & sides[1]
    assert not [group for side in sides for group in side if "." in group or group.startswith("_")]
    assert 0.05 < len(preferences.held_out) / (len(preferences.held_out) + len(preferences.train) / 2) < 0.3
    rejected = {row.rejected for row in preferences.held_out}
    assert rejected <= {row.chosen for row in preferences.held_out}


def test_each_function_stands_in_as_many_rows_as_asked(preferences):
    first, second = preferences.train[:2]
    assert (first.prompt, first.chosen) == (second.prompt, second.chosen)
    assert first.rejected != second.rejected


def test_the_library_is_deterministic_in_the_seed(preferences):
    assert standard_library(0.15, 2, seed=3) == preferences
    other = standard_library(0.15, 2, seed=4)
    assert [row.prompt for row in other.train] == [row.prompt for row in preferences.train]
    assert other != preferences


# files ----------------------------------------------------------------------------------------------------------------

GOOD = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_is_read_and_split_by_prompt(tmp_path, suffix):
    path = write(tmp_path / f"data{suffix}", GOOD + GOOD)
    read = read_preferences(path, 0.3)
    assert len(read.train) + len(read.held_out) == 80
    assert not {row.prompt for row in read.train} & {row.prompt for row in read.held_out}
    assert read.train[0] == Preference("question 0", "good 0", "bad 0", group="question 0")
    assert (read.separator, read.keep) == ("", "end")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("implicit", [False, True])
def test_conversations_are_rendered(tmp_path, suffix, implicit):
    def messages(*contents):
        roles = ("user", "assistant") * 2
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]

    rows = []
    for i in range(40):
        history = ("hello", "yes?", f"question {i}")
        if implicit:
            rows.append({"chosen": messages(*history, "good"), "rejected": messages(*history, "bad")})
        else:
            answers = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
            rows.append({"prompt": messages(*history), "chosen": answers[0], "rejected": answers[1]})
    path = write(tmp_path / f"data{suffix}", rows)
    read = read_preferences(path, 0.3)
    expected = "user: hello\nassistant: yes?\nuser: question 0\nassistant:"
    assert read.train[0] == Preference(expected, "good", "bad", group=expected)
    seen = []
    read_preferences(path, 0.3, render=lambda messages: seen.append(messages) or messages[-1]["content"])
    assert seen[0] == messages("hello", "yes?", "question 0")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ('{"prompt": "a", ', ["line 41", "JSON object"]),
        ("\xff", ["line 41", "JSON"]),
        ("[" * 100_000, ["line 41", "JSON"]),
        ('{"prompt": "a", "chosen": "b\\ud800", "rejected": "c"}', ["line 41", "'chosen'", "surrogate"]),
        ("[1]", ["line 41", "JSON object", "[1]"]),
        ({"prompt": "a", "chosen": "b"}, ["line 41", "'rejected'", "prompt, chosen"]),
        ({"chosen": "b", "rejected": "c"}, ["line 41", "'prompt'"]),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, ["line 41", "'chosen'", "not empty"]),
        ({"prompt": " \n", "chosen": "b", "rejected": "c"}, ["line 41", "'prompt'", "not empty"]),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, ["line 41", "'chosen'", "3"]),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, ["line 41", "'chosen'", "None"]),
        ({"prompt": "a", "chosen": [{"role": "user"}], "rejected": []}, ["line 41", "'chosen'", "role"]),
        (
            {"chosen": [{"role": "a", "content": "b"}], "rejected": [{"role": "a", "content": "c"}]},
            ["line 41", "'prompt'"],
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, named):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(good) for good in GOOD] + [row if isinstance(row, str) else json.dumps(row)]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError, match="expected") as caught:
        read_preferences(path, 0.3)
    for part in ("data.jsonl", *named):
        assert part in str(caught.value)


def test_a_bad_parquet_row_and_column_are_named(tmp_path):
    path = write(tmp_path / "data.parquet", [*GOOD, {"prompt": "p", "chosen": None, "rejected": "c"}])
    with pytest.raises(ValueError, match=r"data\.parquet, row 40: column 'chosen'"):
        read_preferences(path, 0.3)
    path = write(tmp_path / "data.parquet", [{"prompt": "p", "chosen": "c"}])
    with pytest.raises(ValueError, match=r"row 0: column 'rejected'"):
        read_preferences(path, 0.3)
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"data\.parquet: expected a Parquet file"):
        read_preferences(path, 0.3)


def test_files_that_cannot_serve(tmp_path):
    with pytest.raises(ValueError, match="a file that exists"):
        read_preferences(tmp_path / "none.jsonl", 0.3)
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        read_preferences(tmp_path / "data.csv", 0.3)
    with pytest.raises(ValueError, match="at least 2 rows"):
        read_preferences(write(tmp_path / "empty.jsonl", [""]), 0.3)


def test_ties_and_blank_lines_are_skipped(tmp_path, caplog):
    tie = {"prompt": "tie", "chosen": "same", "rejected": "same"}
    read = read_preferences(write(tmp_path / "data.jsonl", [*GOOD, "", tie, " "]), 0.3)
    assert len(read.train) + len(read.held_out) == 40
    assert "1 rows with equal answers" in caplog.text


# tokens ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["set the # blocked domains", "def set_blocked_domains(self): # set"] * 3, 600)


def test_words_share_their_tokens_with_identifiers(tokenizer):
    words = tokenizer("set blocked domains")["input_ids"]
    assert [token for token in tokenizer("set_Blocked_domains")["input_ids"] if token in words] == words
    assert tokenizer("setBlockedDomains")["input_ids"] == words
    assert tokenizer.decode(words).strip() == "set blocked domains"


def test_no_byte_is_lost(tokenizer):
    text = "é 漢字 `x` \x01\x7f 😀 ß~"
    assert tokenizer.decode(tokenizer(text)["input_ids"]).replace(" ", "") == text.replace(" ", "")


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["text"], 257)


def test_the_tokenizer_is_the_same_in_every_process():
    """The trainer counts in hash maps whose order changes from process to process."""
    program = (
        "from kernelab.papers.hydra_rlhf.tokens import train_tokenizer;"
        "texts = ['one two three four', 'def five_six(seven):', 'eight nine ten'] * 2;"
        "print(train_tokenizer(texts, 290).backend_tokenizer.to_str())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, check=True) for _ in range(2)]
    assert len(runs[0].stdout) > 1000
    assert runs[0].stdout == runs[1].stdout


def encoder(tokenizer, keep="start", separator="#", **lengths):
    return Encoder(
        tokenizer, Preferences([], [], separator, keep), **({"prompt_length": 6, "response_length": 4} | lengths)
    )


def row(prompt):
    return Preference(prompt, "set", "domains", "group")


def test_padding_and_cutting(tokenizer):
    ids = {word: tokenizer(word)["input_ids"] for word in ("set", "the", "blocked", "domains", "#")}
    assert all(len(token) == 1 for token in ids.values())
    the, set_, blocked, domains, mark = (ids[word][0] for word in ("the", "set", "blocked", "domains", "#"))
    long = row("the set blocked domains the the blocked")
    tokens, mask = encoder(tokenizer).prompts([row("set"), long, row("set")])
    assert tokens.tolist()[:2] == [[0, 0, 0, 0, set_, mark], [the, set_, blocked, domains, the, mark]]
    assert mask.tolist()[0] == [False] * 4 + [True] * 2
    assert torch.equal(tokens[0], tokens[2])
    tokens, _ = encoder(tokenizer, keep="end").prompts([long])
    assert tokens.tolist() == [[blocked, domains, the, the, blocked, mark]]
    end = tokenizer.eos_token_id
    tokens, mask = encoder(tokenizer).answers(["set", "the the the", "the the the the the"])
    assert tokens.tolist() == [[set_, end, 0, 0], [the, the, the, end], [the, the, the, the]]
    assert mask.sum(1).tolist() == [2, 4, 4]


def test_sequences_know_their_columns(tokenizer):
    made = encoder(tokenizer)
    sequences = join(made.prompts([row("set"), row("the set")]), made.answers(["blocked", "set the domains"]))
    assert sequences.last.tolist() == [7, 9]
    assert sequences.positions[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 3, 3]
    assert made.decode(sequences) == ["blocked", "set the domains"]
    assert torch.equal(sequences[torch.tensor([1])].tokens, sequences.tokens[1:])
    assert made.decode(sequences.repeat(2)) == ["blocked", "set the domains"] * 2


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tokenizer):
    bare = train_tokenizer(["set the domains"], 600)
    bare.pad_token = None
    made = encoder(bare)
    tokens, mask = made.answers(["set"])
    assert tokens.tolist()[0][1:] == [bare.eos_token_id] * 3
    assert mask.tolist() == [[True, True, False, False]]
    bare.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        encoder(bare)


def test_what_a_tokenizer_begins_with_stays(tokenizer):
    from tokenizers.processors import TemplateProcessing

    begins = train_tokenizer(["set the domains"], 600)
    begin = begins.convert_tokens_to_ids("Ġthe")
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="Ġthe $A", special_tokens=[("Ġthe", begin)])
    tokens, _ = encoder(begins, keep="end").prompts([row("set " * 9)])
    assert tokens[0, 0] == begin
    assert (tokens[0] == begin).sum() == 1


def test_no_room_for_a_prompt(tokenizer):
    with pytest.raises(ValueError, match="prompt_length"):
        encoder(tokenizer, separator="set the domains", prompt_length=3)


def test_batches_visit_each_row_once_an_epoch():
    batches = [shuffled(step, 3, 7, seed=5) for step in range(7)]  # three epochs
    epochs = torch.cat(batches).split(7)
    assert all(epoch.sort().values.tolist() == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    assert torch.equal(shuffled(4, 3, 7, seed=5), batches[4])
