"""Shakespeare's speakers, windows, divisions and tokens."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.data.text import shakespeare as plays
from fedcore.data.text.settings import TextSettings
from fedcore.data.text.texts import Text, by_client, divided, fingerprints, joined
from fedcore.data.text.tokens import (
    Bytes,
    Characters,
    Tokenizer,
    from_stored,
    load_tokenizer,
    printable,
)
from fedcore.data.text.vocabulary import encoded, new_tokenizer
from fedcore.data.text.windows import NO_TARGET, rows_of_texts, windows, windows_of_all
from fedcore.errors import SettingsError

SAYING = "Ne'er saw I, never felt, a calm so deep!\nThe river glideth at his own sweet "


def test_the_plays_are_whole() -> None:
    text = plays.whole_text()
    assert len(text) == 1_115_394
    assert len(set(text)) == 65
    assert len(text.split("\n\n")) == 7222


def test_every_speech_with_text_has_its_speaker() -> None:
    speeches = plays.speeches()
    assert len(speeches) == 7097  # of 7222 blocks, 125 have no text
    clients = by_client(speeches)
    sizes = {name: len(text) for name, text in clients.items()}
    assert len(clients) == 299
    assert sum(sizes.values()) == 1_027_852
    assert median(sizes.values()) == 914
    assert round(sum(sizes.values()) / 299) == 3438
    assert max(sizes, key=sizes.__getitem__) == "GLOUCESTER"
    assert sizes["GLOUCESTER"] == 37_616
    least = {161: 232, 1000: 141, 2000: 99, 10_000: 36}
    for characters, number in least.items():
        assert sum(size >= characters for size in sizes.values()) == number
    folded = Counter(name.upper() for name in clients)
    assert sum(number > 1 for number in folded.values()) == 6  # "All" and "ALL"


def test_half_of_the_text_is_the_base_and_fifty_others_take_part() -> None:
    division = divided(by_client(plays.speeches()), share=0.5, least=2000)
    assert len(joined(division.base)) == 529_303
    assert len(division.clients) == 50
    sizes = [len(text) for text in division.clients.values()]
    assert sum(sizes) == 448_740
    assert round(median(sizes)) in (7266, 7267)
    names = [*division.base, *division.clients, *division.unseen]
    assert sorted(names) == sorted(by_client(plays.speeches()))


def test_the_ten_largest_roles_speak_1111_longer_speeches() -> None:
    texts = plays.largest_roles(plays.speeches(), 10)
    assert len(texts) == 1111
    counts = Counter(text.label for text in texts)
    assert len(counts) == 10
    assert max(counts.values()) / 1111 == pytest.approx(0.156, abs=5e-4)
    assert min(len(text.content) for text in texts) == 40
    with pytest.raises(SettingsError, match=r"text\.classes = 300: there are 299"):
        plays.largest_roles(plays.speeches(), 300)


def test_a_damaged_copy_of_the_plays_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(plays.__file__).with_name(plays.FILE)
    stored = json.loads(file.read_text())
    stored["sha256"] = hashlib.sha256(b"another").hexdigest()
    (tmp_path / plays.FILE).write_text(json.dumps(stored))
    monkeypatch.setattr(plays.resources, "files", lambda _: tmp_path)
    with pytest.raises(SettingsError, match="its sha256 is another"):
        plays.whole_text.__wrapped__()


@pytest.mark.filterwarnings("ignore:GitWildMatch:DeprecationWarning")  # Flower's
def test_an_app_of_flower_carries_the_plays() -> None:
    from flwr.cli.build import build_fab_from_disk

    content = build_fab_from_disk(Path(__file__).parent.parent)
    names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    assert f"fedcore/data/text/{plays.FILE}" in names
    assert len(content) < 10e6  # Flower's limit


# Divisions


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(SIZES, st.floats(0, 0.99), st.integers(0, 9))
@settings(max_examples=50)
def test_every_client_is_in_one_part(
    sizes: list[int], share: float, least: int
) -> None:
    texts = {f"client {i}": "x" * size for i, size in enumerate(sizes)}
    try:
        division = divided(texts, share, least)
    except SettingsError:
        return
    assert {**division.base, **division.clients, **division.unseen} == texts
    numbers = [len(division.base), len(division.clients), len(division.unseen)]
    assert sum(numbers) == len(texts)
    assert all(len(text) >= least for text in division.clients.values())
    assert all(len(text) < least for text in division.unseen.values())
    taken = sum(map(len, division.base.values()))
    total = sum(map(len, texts.values()))
    assert taken >= share * total
    if division.base:  # without the last of them it would be less
        last = [*division.base.values()][-1]
        assert taken - len(last) < share * total


def test_a_division_without_clients_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"text\.least = 9: none of the 2 clients"):
        divided({"a": "1234", "b": "12"}, 0.0, 9)
    with pytest.raises(SettingsError, match=r"text\.base = 0\.9: all 1 clients"):
        divided({"a": "1234"}, 0.9, 0)


def test_fingerprints_tell_texts_apart() -> None:
    digests = fingerprints({"a": "one", "b": "two", "c": "one"})
    assert digests[0] == digests[2] != digests[1]


def test_the_texts_of_a_client_follow_each_other() -> None:
    texts = [Text("x", "b"), Text("y", "a"), Text("z", "b")]
    assert by_client(texts) == {"b": "x\nz\n", "a": "y\n"}


# Windows


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 9))
@settings(max_examples=60)
def test_windows_hold_every_token_and_its_successor_once(
    ids: list[int], length: int
) -> None:
    x, y = windows(np.array(ids, dtype=np.int64), length, pad=99)
    is_target = y != NO_TARGET
    assert x.shape == y.shape
    assert (x.flatten()[: len(ids) - 1] == ids[:-1]).all()
    assert y[is_target].tolist() == ids[1:]
    assert ((x == 99) == ~is_target).all()  # padding is where no target is
    assert all(row.any() for row in is_target)  # and no window is padding alone


def test_windows_of_several_texts_stay_apart() -> None:
    texts = [np.array([1, 2, 3, 4]), np.array([7]), np.array([5, 6])]
    (x, y), offsets = windows_of_all(texts, length=2, pad=9)
    assert offsets.tolist() == [0, 2, 2, 3]
    assert x.tolist() == [[1, 2], [3, 9], [5, 9]]
    assert y.tolist() == [[2, 3], [4, -100], [6, -100]]
    (x, _), offsets = windows_of_all([], length=2, pad=9)
    assert (x.shape, offsets.tolist()) == ((0, 2), [0])


def test_rows_are_cut_and_padded_at_the_end() -> None:
    rows = rows_of_texts([np.arange(5), np.arange(2), np.arange(0)], 3, pad=9)
    assert rows.tolist() == [[0, 1, 2], [0, 1, 9], [9, 9, 9]]


# Tokens


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    pytest.importorskip("tokenizers")
    base = plays.whole_text()[:60_000]
    return new_tokenizer(TextSettings(tokens="bpe", vocabulary=300), base)


@given(st.text())
@settings(max_examples=60)
def test_bytes_give_any_text_back(text: str) -> None:
    whole = Bytes()
    ids = whole.encode(text)
    assert whole.decode(ids) == text
    assert whole.characters[ids].sum() == len(text)
    assert ids.max(initial=0) < whole.pad < whole.size


@given(st.text(alphabet=SAYING))
@settings(max_examples=30)
def test_characters_give_a_text_of_them_back(text: str) -> None:
    tokenizer = Characters(SAYING)
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.pad]) == text


def test_a_character_that_is_not_in_the_vocabulary_is_unknown() -> None:
    tokenizer = Characters("abc")
    ids = tokenizer.encode("a\U0001f600zc")
    assert ids.tolist() == [0, 3, 3, 2]
    assert (
        tokenizer.decode(ids) == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}c"
    )
    assert tokenizer.characters.tolist() == [1, 1, 1, 1, 0]


def test_a_vocabulary_is_that_of_the_base_text_alone() -> None:
    of_base = new_tokenizer(TextSettings(), base="abc", usual="xyz")
    assert isinstance(of_base, Characters)
    assert of_base.vocabulary == "abc"
    without = new_tokenizer(TextSettings(), base="", usual="xyz")
    assert without.decode([0, 1, 2]) == "xyz"
    bare = new_tokenizer(TextSettings(), base="")
    assert bare.size == len(printable()) + 2


def test_bpe_is_the_same_twice(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcore.data.text import subwords

    monkeypatch.setattr(subwords.cache, "load", lambda key: None)
    base = plays.whole_text()[:60_000]
    again = new_tokenizer(TextSettings(tokens="bpe", vocabulary=300), base)
    assert again.to_json() == bpe.to_json()


def test_bpe_gives_any_text_back_and_counts_its_characters(bpe: Tokenizer) -> None:
    for text in (plays.whole_text()[60_000:90_000], "na\u00efve \U0001f600 \u4e2d\n\t"):
        ids = encoded(bpe, [text])[0]
        assert bpe.decode(ids) == text
        assert bpe.characters[ids].sum() == len(text)
        assert (ids != bpe.pad).all()
    assert bpe.size == 300


def test_bpe_has_fewer_tokens_than_characters(bpe: Tokenizer) -> None:
    ids = bpe.encode(plays.whole_text()[60_000:90_000])
    assert 30_000 / len(ids) > 1.3  # 1.94 with 512 entries of the whole text


def test_tokens_of_many_texts_come_from_the_cache(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["To be", "", "or not to be"]
    first = encoded(bpe, texts)
    monkeypatch.setattr(type(bpe), "encode", lambda *_: pytest.fail("not from cache"))
    for again, ids in zip(encoded(bpe, texts), first, strict=True):
        assert again.tolist() == ids.tolist()


def test_tokenizers_survive_their_file(bpe: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (Characters(SAYING), Bytes(), bpe):
        (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
        again = load_tokenizer(tmp_path, "base = x")
        assert (again.size, again.pad) == (tokenizer.size, tokenizer.pad)
        assert again.encode(SAYING).tolist() == tokenizer.encode(SAYING).tolist()
        assert (again.characters == tokenizer.characters).all()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"base = x: tokenizer\.json cannot be rea"):
        load_tokenizer(tmp_path, "base = x")
    for content in ("[]", "{", '{"kind": "runes"}', '{"kind": "characters"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(SettingsError, match="base = x"):
            load_tokenizer(tmp_path, "base = x")
    with pytest.raises(ValueError, match="runes"):
        from_stored({"kind": "runes"})


def test_bpe_without_a_base_text_is_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"trained on the base text, and there is n"
    ):
        new_tokenizer(TextSettings(tokens="bpe"), base="")
    pytest.importorskip("tokenizers")
    with pytest.raises(SettingsError, match=r"text\.vocabulary = 512: the base text"):
        new_tokenizer(TextSettings(tokens="bpe"), base="abc")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedcore.data.text import subwords

    monkeypatch.setattr(subwords.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"tokenizers, which is not installed: pip"):
        new_tokenizer(TextSettings(tokens="bpe"), base="abc")


def test_a_folder_of_hugging_face_gives_its_tokenizer(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    content = json.dumps(json.loads(bpe.to_json())["tokenizer"])
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    asked = TextSettings(tokens=str(tmp_path))
    without_pad = new_tokenizer(asked, base="")
    assert (without_pad.size, without_pad.pad) == (301, 300)  # an id of its own
    config = {"pad_token": {"content": "<pad>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with_pad = new_tokenizer(asked, base="")
    assert (with_pad.size, with_pad.pad) == (300, bpe.pad)
    assert with_pad.encode("To be").tolist() == bpe.encode("To be").tolist()
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(SettingsError, match=r"tokenizer_config\.json: found a list"):
        new_tokenizer(asked, base="")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="characters, bytes, bpe, or a folder"):
        new_tokenizer(TextSettings(tokens="caracters"), base="abc")
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SettingsError, match="it is no tokenizer"):
        new_tokenizer(TextSettings(tokens=str(tmp_path)), base="abc")
