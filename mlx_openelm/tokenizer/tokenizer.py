"""Text to token ids and back, and conversations to prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from ..errors import InputError
from ..files import user_path
from .added_tokens import Declared, content, declared
from .chat import CHAT_TEMPLATE as CHAT_TEMPLATE
from .chat import choose_template, render_chat
from .chat_files import read_chat_template
from .detokenizer import StreamingDetokenizer
from .files import end_ids, first_template, read_optional
from .files import find_tokenizer as find_tokenizer
from .vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json

# Arguments of transformers' `apply_chat_template` that have no meaning for a list of ids
_NOT_FOR_IDS = (
    *("padding", "truncation", "max_length", "return_tensors", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens"),
)


class Tokenizer:
    """Text to token ids and back, with mlx-lm's names. Made by `load_tokenizer`.

    Attributes:
        vocab_size: number of ids. A model may have more rows; an id from `vocab_size` on must
            never be sampled.
        special_tokens_map: special tokens by name, as chat templates see them.
        chat_template: the model's template, a dictionary of several by name, or None.
    """

    has_thinking = False
    has_tool_calling = False

    def __init__(
        self,
        vocabulary: Vocabulary,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self.chat_template = chat_template
        self.vocab_size = vocabulary.size
        self.special_tokens_map = {**vocabulary.defaults, **(special_tokens or {})}
        self.bos_token: str = self.special_tokens_map.get("bos_token", "<s>")
        self.eos_token: str = self.special_tokens_map.get("eos_token", "</s>")
        self.unk_token = self.special_tokens_map.get("unk_token")
        self.pad_token = self.special_tokens_map.get("pad_token")
        self.bos_token_id = self._known(self.bos_token)
        self.eos_token_id = self._known(self.eos_token)
        self.unk_token_id = None if self.unk_token is None else vocabulary.id_of(self.unk_token)
        self.pad_token_id = None if self.pad_token is None else vocabulary.id_of(self.pad_token)
        self._eos_token_ids = {self.eos_token_id}

    def _known(self, token: str) -> int:
        token_id = self._vocabulary.id_of(token)
        if token_id is None:
            raise InputError(f"has no piece {token!r}; OpenELM needs a BOS and an EOS token")
        return token_id

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def eos_token_ids(self) -> set[int]:
        """The ids that end a text: the tokenizer's own, and those that the model's files add."""
        return self._eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, ids: Iterable[int] | None) -> None:
        self._eos_token_ids = set(ids or ())

    def add_eos_token(self, token: str | int) -> None:
        """Let a further token end a text.

        Raises:
            InputError: when it is neither a token nor an id.
        """
        found = self._vocabulary.id_of(token) if isinstance(token, str) else token
        if found is None and isinstance(token, str) and token.isdecimal():
            found = int(token)
        if found is None or not 0 <= found < self.vocab_size:
            raise InputError(f"{token!r} is not a token of this tokenizer")
        self._eos_token_ids.add(found)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with what the tokenizer puts around a text (BOS in front) unless
        `add_special_tokens` is false.

        The text is first split at what spells a control token (`<s>`, `</s>`, `<unk>`) or an
        added token, which becomes that token; each part between is normalised and tokenized by
        itself. The ids are those of transformers for the same directory.

        Raises:
            InputError: when the text holds half of a surrogate pair, which no UTF-8 can say.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = f"{text[error.start]!r} at character {error.start}"
            raise InputError(f"the text is not valid Unicode: {wrong} is a surrogate") from None
        found = self._vocabulary.encode(text)
        if not add_special_tokens:
            return found
        return [*self._vocabulary.prefix, *found, *self._vocabulary.suffix]

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`: what a fresh `detokenizer` gives for them, all at once.

        Special tokens add nothing, or their spelling if `skip_special_tokens` is false. Bytes
        that form no character become U+FFFD. Encoding puts a space in front of a text, so the
        one that follows BOS is not part of it and is dropped: `decode(encode(text))` is `text` in
        NFC. Ids without BOS continue some other text, and keep their space (mlx-lm drops it there
        too).

        Raises:
            InputError: when an id is not in the vocabulary.
        """
        detokenizer = self._detokenizer(skip_special_tokens)
        for token in [ids] if isinstance(ids, int) else ids:
            detokenizer.add_token(int(token))
        detokenizer.finalize()
        return detokenizer.text

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, by its spelling."""
        spelled = map(self._vocabulary.token, range(self.vocab_size))
        return {token: i for i, token in enumerate(spelled) if token is not None}

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """The id of each spelling; that of the unknown token for one that there isn't."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._vocabulary.id_of(tokens)
        return self.unk_token_id if found is None else found

    @overload
    def convert_ids_to_tokens(self, ids: int, skip_special_tokens: bool = ...) -> str | None: ...

    @overload
    def convert_ids_to_tokens(
        self, ids: Sequence[int], skip_special_tokens: bool = ...
    ) -> list[str | None]: ...

    def convert_ids_to_tokens(
        self, ids: int | Sequence[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """The spelling of each id; None for one that there isn't."""
        if isinstance(ids, int):
            return self._vocabulary.token(ids)
        skipped = self._vocabulary.special if skip_special_tokens else frozenset()
        return [self._vocabulary.token(int(i)) for i in ids if int(i) not in skipped]

    def difference(self, other: Tokenizer) -> str | None:
        """Where two tokenizers give a token different texts, in words; None: nowhere."""
        if self.vocab_size != other.vocab_size:
            return f"{other.vocab_size} pieces instead of {self.vocab_size}"
        mine, theirs = self._vocabulary.piece, other._vocabulary.piece
        for token in range(self.vocab_size):
            if mine(token) != theirs(token):
                return f"token {token} is {theirs(token)!r} instead of {mine(token)!r}"
        return None

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer, at every access."""
        return self._detokenizer(skip_special_tokens=True)

    def _detokenizer(self, skip_special_tokens: bool) -> StreamingDetokenizer:
        space_after = self.bos_token_id if self._vocabulary.leading_space else None
        return StreamingDetokenizer(self._vocabulary, space_after, skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = ...,
        tokenize: Literal[True] = ...,
        *,
        tools: Sequence[Mapping[str, Any]] | None = ...,
        documents: Sequence[Mapping[str, Any]] | None = ...,
        chat_template: str | None = ...,
        continue_final_message: bool | str = ...,
        return_dict: bool = ...,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = ...,
        *,
        tokenize: Literal[False],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        documents: Sequence[Mapping[str, Any]] | None = ...,
        chat_template: str | None = ...,
        continue_final_message: bool | str = ...,
        return_dict: bool = ...,
        **variables: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tokenize: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        return_dict: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model expects it: token ids, or text when `tokenize` is false.

        The text is what transformers renders. It begins with BOS if the template says so (that
        of the OpenELM Instruct models does), hence is to be encoded with
        `add_special_tokens=False`. Content is not escaped: a `</s>` in it becomes the EOS token.

        Args:
            messages: mappings with `role` and `content`, as the template expects them.
            add_generation_prompt: end the prompt where the assistant's answer begins. By default
                so, unless `continue_final_message`.
            tokenize: return ids.
            tools: JSON schemas of functions.
            documents: mappings with `title` and `text`.
            chat_template: a template in place of the tokenizer's, or the name of one of its
                several.
            continue_final_message: leave the last message open; a string names the field.
            return_dict: accepted, as mlx-lm does, and ignored.
            variables: what else the template sees, such as `enable_thinking`.

        Raises:
            InputError: when there is no template, a message can't be used, or the template fails
                or exceeds its limits.
        """
        for name in _NOT_FOR_IDS:
            if variables.pop(name, None):
                raise InputError(f"apply_chat_template() has no {name} here; it returns a list")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        tokens = {**self.special_tokens_map}
        template = choose_template(self.chat_template, chat_template, tools)
        if template == CHAT_TEMPLATE:
            tokens |= {"bos_token": self.bos_token, "eos_token": self.eos_token}
        text = render_chat(
            template,
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**tokens, **variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def load_tokenizer(
    directory_or_file: str | Path,
    *,
    model: Path | None = None,
    adapter: Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Read a tokenizer from a model directory, or from one file.

    In a directory that is `tokenizer.json` (Hugging Face's tokenizers), else `tokenizer.model`
    (SentencePiece), and with it what else the directory says: special and added tokens
    (`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`), chat templates, and
    the ids that end a text (`generation_config.json`, `config.json`). A file stands for itself:
    `.json` is a `tokenizer.json`, any other name a SentencePiece model.

    Args:
        directory_or_file: where it is.
        model: the model's directory, where that is another one: its configuration says which
            further ids end a text.
        adapter: the directory of the model's adapter, whose chat template and
            `generation_config.json` take the place of others. Where the tokenizer is the
            adapter's too, but has no template, the model's stays.
        tokenizer_config: entries that replace those of `tokenizer_config.json`.

    Raises:
        InputError: when there is no tokenizer, or a file can't be read or used; the message
            names it.
    """
    path = user_path(directory_or_file)
    file, settings, template = path, dict(tokenizer_config or {}), None
    special_tokens_map: dict[str, Any] = {}
    added_tokens: dict[str, Any] = {}
    where = str(path)
    if path.is_dir():
        file = find_tokenizer(path)
        where = str(path / "tokenizer_config.json")
        settings = {**read_optional(path, "tokenizer_config.json"), **settings}
        special_tokens_map = read_optional(path, "special_tokens_map.json")
        added_tokens = read_optional(path, "added_tokens.json")
        template = read_chat_template(path, settings)
        model = path if model is None else model
    if adapter is not None:
        others = [model] if model is not None and path == adapter else []
        template = first_template([adapter]) or template or first_template(others)
    if tokenizer_config and "chat_template" in tokenizer_config:
        template = tokenizer_config["chat_template"]
    found: Declared = declared(settings, where, special_tokens_map, added_tokens)
    read = from_tokenizer_json if file.suffix == ".json" else from_sentencepiece
    vocabulary = read(file, found, settings)
    named = {name: content(token) for name, token in found.named.items()}
    try:
        tokenizer = Tokenizer(
            vocabulary,
            special_tokens={name: text for name, text in named.items() if text is not None},
            chat_template=template,
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    tokenizer.eos_token_ids = end_ids(tokenizer.eos_token_id, model, adapter)
    return tokenizer
