"""The tokenizer gives the ids that transformers' CLIPTokenizer gives, and refuses broken files in a sentence."""

import builtins
import json
import random
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from stablevsr.errors import OptionsError, ResourceError, WeightsError
from stablevsr.prompt import OPEN_CLIP_EMPTY_PROMPT, VOCABULARY_FILES, Tokenizer

FOLDER = Path(__file__).parent / "data" / "checkpoint" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"

PROMPTS = [
    "",
    " ",
    "\n\t ",
    "clean sharp high detail, 4k",  # the prompt of the golden case case_odd_size
    "Clean SHARP High\tDetail,\n\n4K",
    "the the  the   the",
    "it's we've I'm they'll don't he'd you're IT'S 's 'S ' '",
    "1234567890 3.14 ½ Ⅷ ٣٤ x2 2x 4k",
    "!!! ??? ... --- ((nested)) [a] {b} #tag @who 100% $5 a/b\\c _x_ ~`^|<>=+*&;:\"'",
    "wow! great!! !a! a!b",  # "!" is the golden checkpoint's pad token, so also a special token
    "café cafe\u0301 naïve coöperate Ångström Łódź e\u0301\u0301",
    "ΣΊΣΥΦΟΣ ß ẞ İstanbul ıI ﬁ ﬀ ǅ",
    "日本語のテキスト 中文字符 한국어 русский العربية עברית ไทย हिन्दी",
    "😀 👩‍👩‍👧 🇩🇪 👍🏽 a😀b ☃️",
    "non\u00a0breaking\u2003em\u3000wide\u200bzero\u2028line\x85next\x0bvt\x0cff\ufeffbom",
    "\x00 \x01\x1f \x7f control",
    "\U0001f468\u200d 𝔘𝔫𝔦 \U0010ffff \ufffd",
    f"{END}",
    f"a {END} b {START} c",
    f"a{END}b{START}c{END}{END}",
    "<|ENDOFTEXT|> <|StartOfText|> <|endoftext| >",
    "<|endoftext",
    "clean " * 75,
    "clean " * 76,
    "clean " * 500,
    "x" * 300,
    f"{END} " * 90,
]


def read_files(folder=FOLDER):
    return {name: (folder / name).read_text(encoding="utf-8") for name in VOCABULARY_FILES if (folder / name).exists()}


def reference_ids(tokenizer, prompt):
    return tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids


def random_prompts(count=400):
    rng = random.Random(0)
    alphabet = "aAeE sStThH 019.,!?'’-_<|>\t\n éÉßİŁσΣж中の한😀🏽\u0301\u200d\u00a0\u2028½Ⅷ"
    pieces = [*alphabet, "the ", "'ll", "'S", START, END, END.upper(), "clean", " sharp"]
    for _ in range(count):
        yield "".join(rng.choices(pieces, k=rng.randint(1, 60)))


@pytest.fixture(scope="module")
def reference():
    return CLIPTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(read_files())


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(tokenizer, reference, prompt):
    ids, truncated = tokenizer.encode(prompt)
    assert ids == reference_ids(reference, prompt)
    assert truncated == (len(reference(prompt).input_ids) > 77)


def test_ids_of_random_text_are_those_of_transformers(tokenizer, reference):
    for prompt in random_prompts():
        assert tokenizer.encode(prompt)[0] == reference_ids(reference, prompt), repr(prompt)


def test_golden_prompt_reads_as_recorded(tokenizer):
    tokens = {index: token for token, index in json.loads(read_files()["vocab.json"]).items()}
    ids, truncated = tokenizer.encode("clean sharp high detail, 4k")
    words = f"{START} clean</w> sh a r p</w> hi g h</w> de ta i l</w> ,</w> 4</w> k</w> {END}"
    assert " ".join(tokens[index] for index in ids[:17]) == words
    assert ids[17:] == [0] * 60
    assert not truncated


def test_cut_prompt_keeps_start_and_end(tokenizer):
    fits, fits_cut = tokenizer.encode("clean " * 75)
    longer, longer_cut = tokenizer.encode("clean " * 76)
    assert fits == longer
    assert (fits_cut, longer_cut) == (False, True)
    assert fits[0] == 528
    assert fits[-1] == 529


def variant(name):
    """The golden files as other writers of checkpoints would have them."""
    files = read_files()
    config, tokens = json.loads(files["tokenizer_config.json"]), json.loads(files["special_tokens_map.json"])
    plain = {"bos_token": START, "eos_token": END, "unk_token": END}
    if name == "strings":
        tokens, config = {**plain, "pad_token": END}, {"model_max_length": 77}
    elif name == "map overrules config":  # as in the files of Stable Diffusion 2
        config["pad_token"] = END
    elif name == "config alone":
        tokens = None
    elif name == "decoder":  # as transformers 4.34 and later write
        flags = {"lstrip": False, "rstrip": True, "single_word": False, "special": True}
        added = {0: "!", 529: END, 528: START, 530: "<mark>"}
        config = {
            **plain,
            "pad_token": "!",
            "added_tokens_decoder": {
                str(i): {**flags, "content": token, "normalized": token != "!"} for i, token in added.items()
            },
        }
        tokens["pad_token"] = END  # not read
    elif name == "more tokens":
        tokens["additional_special_tokens"] = ["<mark>", "sharp"]
    elif name == "bare":
        tokens = config = None
    texts = {"tokenizer_config.json": config, "special_tokens_map.json": tokens}
    kept = {key: json.dumps(value) for key, value in texts.items() if value is not None}
    return {key: text for key, text in files.items() if key not in texts} | kept


@pytest.mark.parametrize("name", ["strings", "map overrules config", "config alone", "decoder", "more tokens", "bare"])
def test_all_ways_to_write_special_tokens_read_as_in_transformers(tmp_path, name):
    files = variant(name)
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    reference, tokenizer = CLIPTokenizer.from_pretrained(tmp_path), Tokenizer(files)
    assert tokenizer.empty() == reference_ids(reference, "")
    for prompt in (*PROMPTS, "a<mark>  b <MARK> sharpsharp! c", *random_prompts(50)):
        assert tokenizer.encode(prompt)[0] == reference_ids(reference, prompt), repr(prompt)


def test_pad_token_of_the_map_wins():
    assert Tokenizer(variant("map overrules config")).empty() == [528, 529, *[0] * 75]
    assert Tokenizer(variant("config alone") | {"tokenizer_config.json": "{}"}).empty() == [528, *[529] * 76]


def test_open_clip_pads_the_empty_prompt_with_zero():
    assert list(OPEN_CLIP_EMPTY_PROMPT) == [49406, 49407, *[0] * 75]


def test_empty_prompt_needs_no_package(monkeypatch):
    original = builtins.__import__

    def without_tokenizers(name, *args, **kwargs):
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    tokenizer = Tokenizer(read_files())
    assert tokenizer.empty() == tokenizer.encode("")[0] == [528, 529, *[0] * 75]
    with pytest.raises(ResourceError, match=r"pip install stablevsr\[prompt\]"):
        tokenizer.encode("sharp")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("vocab.json", None, r"vocab\.json is missing"),
        ("merges.txt", None, r"merges\.txt is missing"),
        ("vocab.json", "{", r"vocab\.json is not JSON"),
        ("vocab.json", "[1]", "expected"),
        ("vocab.json", "{}", r"vocab\.json does not map"),
        ("vocab.json", '{"a": "b"}', r"vocab\.json does not map"),
        ("vocab.json", '{"a": 0}', r"merges\.txt does not fit .* line 2"),
        ("merges.txt", "#version: 0.2\nh i\nh i g\n", "line 3: 'h i g'"),
        ("merges.txt", "#version: 0.2\nq q\n", "line 2: 'q q'"),
        ("tokenizer_config.json", "nonsense", r"tokenizer_config\.json is not JSON"),
        ("special_tokens_map.json", '{"pad_token": 7}', "neither a string nor a token"),
        ("special_tokens_map.json", '{"pad_token": {"lstrip": true}}', "neither a string nor a token"),
        ("special_tokens_map.json", '{"pad_token": null}', "neither a string nor a token"),
        ("special_tokens_map.json", '{"pad_token": "[PAD]"}', r"pad_token '\[PAD\]' is not in its vocab\.json"),
        ("special_tokens_map.json", '{"additional_special_tokens": "x"}', "list of special tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "expected"),
    ],
)
def test_broken_files_are_refused_in_a_sentence(name, text, message):
    files = read_files()
    del files[name]
    if text is not None:
        files[name] = text
    with pytest.raises(WeightsError, match=message):
        Tokenizer(files)


def test_invalid_unicode_is_refused(tokenizer):
    with pytest.raises(OptionsError, match="not valid Unicode"):
        tokenizer.encode("sharp \udcff")
