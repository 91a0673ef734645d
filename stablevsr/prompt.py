"""Prompts to token ids: CLIP's byte-pair encoding (Radford et al. 2021), as transformers' `CLIPTokenizer` does it.

The weights file contains the vocabulary as text. Only prompts other than the empty one need the package `tokenizers`.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stablevsr.errors import OptionsError, ResourceError, WeightsError

if TYPE_CHECKING:
    import tokenizers

VOCABULARY_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
NUM_TOKENS = 77

# The empty prompt in OpenCLIP's vocabulary, which pads with 0: for files with a text tower but no vocabulary.
OPEN_CLIP_EMPTY_PROMPT = (49406, 49407, *[0] * (NUM_TOKENS - 2))

_START, _END = "<|startoftext|>", "<|endoftext|>"
# CLIPTokenizer's own defaults, in the order in which it adds them.
_DEFAULT_TOKENS = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_OTHER_TOKENS = ("sep_token", "cls_token", "mask_token")
_MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

# Special tokens, contractions, words, single digits, runs of anything else.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

SpecialTokens = dict[str, dict[str, bool]]  # content to flags


class Tokenizer:
    """Token ids of a fixed length for a prompt.

    Args:
        files: the texts of `VOCABULARY_FILES` by name; without the last two, CLIP's default special tokens are used.
        num_tokens: the length of the result.

    Raises:
        WeightsError: for a missing or malformed file, or a special token missing from the vocabulary.
    """

    def __init__(self, files: Mapping[str, str], num_tokens: int = NUM_TOKENS) -> None:
        self.num_tokens = num_tokens
        self._vocabulary = _read_vocabulary(files)
        self._merges = _read_merges(files, self._vocabulary)
        names, self._special = _read_special_tokens(files)
        for name, token in names.items():
            if token not in self._vocabulary:
                raise WeightsError(f"the tokenizer's {name} {token!r} is not in its vocab.json")
        self._unknown = names["unk_token"]
        self._start, self._end, self._pad = (
            self._vocabulary[names[name]] for name in ("bos_token", "eos_token", "pad_token")
        )

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary."""
        return len(self._vocabulary)

    def empty(self) -> list[int]:
        """The ids of the empty prompt."""
        return self._framed([])

    def encode(self, prompt: str) -> tuple[list[int], bool]:
        """The ids of `prompt`, and whether it had to be truncated.

        Raises:
            ResourceError: when the package `tokenizers` is not installed.
            OptionsError: for text that is not valid Unicode.
        """
        if not prompt:
            return self.empty(), False
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise OptionsError(f"the prompt {prompt!r} is not valid Unicode: {error.reason}") from None
        ids = self._backend.encode(prompt, add_special_tokens=False).ids
        return self._framed(ids), len(ids) > self.num_tokens - 2

    def _framed(self, ids: list[int]) -> list[int]:
        ids = [self._start, *ids[: self.num_tokens - 2], self._end]
        return ids + [self._pad] * (self.num_tokens - len(ids))

    @cached_property
    def _backend(self) -> "tokenizers.Tokenizer":
        try:
            import tokenizers
        except ImportError:
            raise ResourceError("a prompt needs the package tokenizers: pip install stablevsr[prompt]") from None
        from tokenizers import normalizers, pre_tokenizers

        bpe = tokenizers.models.BPE(
            vocab=self._vocabulary,
            merges=self._merges,
            unk_token=self._unknown,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
        backend = tokenizers.Tokenizer(bpe)
        space = normalizers.Replace(tokenizers.Regex(r"\s+"), " ")
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
        words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        backend.add_tokens([tokenizers.AddedToken(token, **flags) for token, flags in self._special.items()])
        return backend


def _read_vocabulary(files: Mapping[str, str]) -> dict[str, int]:
    vocabulary = _read_json(files, "vocab.json")
    if not vocabulary or not all(type(index) is int and index >= 0 for index in vocabulary.values()):
        raise WeightsError("the tokenizer's vocab.json does not map tokens to numbers")
    return vocabulary


def _read_merges(files: Mapping[str, str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs in merges.txt, highest priority first."""
    merges = []
    for number, line in enumerate(_read_text(files, "merges.txt").split("\n"), 1):
        if line.startswith("#version") or not line.strip():
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise WeightsError(f"the tokenizer's merges.txt does not match its vocab.json in line {number}: {line!r}")
        merges.append(pair)
    return merges


def _read_special_tokens(files: Mapping[str, str]) -> tuple[dict[str, str], SpecialTokens]:
    """The four tokens that a CLIP tokenizer must have, by name; and all special tokens with their flags.

    Two generations of files exist. In older ones special_tokens_map.json overrides tokenizer_config.json (their pad
    tokens do differ); newer configs list the flags under "added_tokens_decoder", and the map is not read.
    """
    config = _read_json(files, "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    special: SpecialTokens = {}
    if "added_tokens_decoder" in config:
        declared = _object(config["added_tokens_decoder"])
        for index in sorted(declared, key=lambda index: (len(index), index)):  # decimal numbers, smallest first
            content, flags = _special_token(declared[index])
            special[content] = flags
    elif "special_tokens_map.json" in files:
        config |= _read_json(files, "special_tokens_map.json")
    named = {name: _special_token(config.get(name, default)) for name, default in _DEFAULT_TOKENS.items()}
    more = [config[name] for name in _OTHER_TOKENS if config.get(name) is not None]
    more += [token for name in _MORE_TOKENS for token in _listed(config.get(name))]
    for content, flags in (*named.values(), *map(_special_token, more)):
        special.setdefault(content, flags)
    return {name: content for name, (content, _) in named.items()}, special


def _listed(tokens: Any) -> list[Any]:
    """The tokens of a list, of an object of named tokens, or of None."""
    if not isinstance(tokens, list | dict | None):
        raise WeightsError(
            f"the tokenizer's files hold {str(tokens)[:40]!r} where a list of special tokens was expected"
        )
    return list(tokens.values() if isinstance(tokens, dict) else tokens or [])


def _special_token(token: Any) -> tuple[str, dict[str, bool]]:
    """Content and flags of a special token, which is a string or an object with "content"."""
    flags: dict[str, bool] = {"normalized": False}  # matched before lowercasing
    if isinstance(token, dict):
        flags |= {name: token[name] for name in _FLAGS if name in token}
        token = token.get("content")
    if not isinstance(token, str) or not token or not all(isinstance(flag, bool) for flag in flags.values()):
        raise WeightsError(
            f"the tokenizer's files hold a special token that is neither a string nor a token: {token!r}"
        )
    return token, flags


def _read_json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    try:
        return _object(json.loads(_read_text(files, name)))
    except ValueError as error:
        raise WeightsError(f"the tokenizer's {name} is not JSON: {error}") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WeightsError(f"the tokenizer's files hold {str(value)[:40]!r} where an object in braces was expected")
    return value


def _read_text(files: Mapping[str, str], name: str) -> str:
    if name not in files:
        raise WeightsError(f"the tokenizer's {name} is missing, found {', '.join(sorted(files)) or 'nothing'}")
    return files[name]
