"""Text to token ids and back: SentencePiece, a streaming detokenizer, the chat format."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from .errors import InputError
from .files import read_json
from .vocabulary import Vocabulary, from_sentencepiece, from_tokenizer_json

ROLES = ("user", "system", "assistant")

# The format the Instruct models were tuned with (CoreNet,
# `projects/openelm/instruction_tuning/openelm-instruct.yaml`), with BOS in front, which the
# tuning's trainer added outside of its template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


class Tokenizer:
    """Text to token ids and back, with mlx-lm's names. Made by `load_tokenizer`.

    `vocab_size` is the number of pieces: a model may have more rows, and an id from `vocab_size`
    on must never be sampled. `eos_token_ids` are the ids that end a text: `eos_token_id` and
    those that the model's configuration adds. `has_chat_template` says whether the tokenizer's
    directory came with a chat template.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        bos_token: str,
        eos_token: str,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self.chat_template = chat_template or CHAT_TEMPLATE
        self.has_chat_template = chat_template is not None
        self.vocab_size = vocabulary.size
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.bos_token_id = self._known(bos_token)
        self.eos_token_id = self._known(eos_token)
        self.eos_token_ids = {self.eos_token_id, *eos_token_ids}

    def _known(self, token: str) -> int:
        token_id = self._vocabulary.id_of(token)
        if token_id is None:
            raise InputError(f"has no piece {token!r}; OpenELM needs a BOS and an EOS token")
        return token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS in front unless `add_special_tokens` is false.

        The text is first split at what spells a control token (`<s>`, `</s>`, `<unk>`), which
        becomes that token; each part between is normalised to NFC and tokenized by itself. That
        is what transformers does with the directory's `tokenizer.json`, and the ids are the same.

        Raises:
            InputError: when the text holds half of a surrogate pair, which no UTF-8 can say.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = f"{text[error.start]!r} at character {error.start}"
            raise InputError(f"the text is not valid Unicode: {wrong} is a surrogate") from None
        bos = [self.bos_token_id] if add_special_tokens else []
        return bos + self._vocabulary.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: what a fresh `detokenizer` gives for them, all at once.

        Control tokens add nothing. Bytes that form no character become U+FFFD. Encoding puts a
        space in front of a text, so the one that follows BOS is not part of it and is dropped:
        `decode(encode(text))` is `text` in NFC. Ids without BOS continue some other text, and
        keep their space (mlx-lm drops it there too).

        Raises:
            InputError: when an id is not in the vocabulary.
        """
        detokenizer = self.detokenizer
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text

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
        space_after = self.bos_token_id if self._vocabulary.leading_space else None
        return StreamingDetokenizer(self._vocabulary, space_after)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
    ) -> list[int] | str:
        """A conversation as the model expects it: token ids, or text when `tokenize` is false.

        `messages` are mappings with `role` and `content`, both str. `add_generation_prompt` ends
        the prompt where the assistant's answer begins. The directory's own template is used where
        it has one, else the format of the OpenELM Instruct models. The text begins with BOS if
        the template says so (ours does), hence is to be encoded with `add_special_tokens=False`.

        As with transformers, content is not escaped: a `</s>` in it becomes the EOS token.

        Raises:
            InputError: when a message is not such a mapping or its role is unknown, or when the
                directory's template fails, or needs jinja2 and that isn't installed.
        """
        if not messages:
            raise InputError("the conversation has no messages; give at least one")
        for i, message in enumerate(messages):
            for key in ("role", "content"):
                if not (isinstance(message, Mapping) and isinstance(message.get(key), str)):
                    raise InputError(f"message {i} needs a {key!r} that is a string")
        if self.chat_template == CHAT_TEMPLATE:
            text = self._render(messages, add_generation_prompt)
        else:
            text = _render_jinja(
                self.chat_template,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
            )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        text = self.bos_token
        for i, message in enumerate(messages):
            if message["role"] not in ROLES:
                known = ", ".join(ROLES)
                raise InputError(
                    f"message {i} has the role {message['role']!r}, not one of {known}"
                )
            text += f"<|{message['role']}|>\n{message['content']}{self.eos_token}\n"
        return text + "<|assistant|>\n" if add_generation_prompt else text


class StreamingDetokenizer:
    """Text from tokens that arrive one at a time, never half a character; from a `Tokenizer`.

    The segments together are exactly `Tokenizer.decode` of the same ids, in time linear in their
    number.
    """

    def __init__(self, vocabulary: Vocabulary, space_after: int | None) -> None:
        self._vocabulary = vocabulary
        self._space_after = space_after
        self.reset()

    def reset(self) -> None:
        """Forget everything, for another text."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._segments: list[str] = []
        self._shown = 0
        self._drop_space = False

    def add_token(self, token: int) -> None:
        """Take the next token.

        Raises:
            InputError: when the id is not in the vocabulary.
        """
        size = self._vocabulary.size
        if not 0 <= token < size:
            raise InputError(f"token id {token} is not in the tokenizer's vocabulary of {size}")
        piece = self._vocabulary.piece(token)
        if self._drop_space:
            piece = piece.removeprefix(b" ")
        self._drop_space = token == self._space_after
        self._segments.append(self._utf8.decode(piece))

    def finalize(self) -> None:
        """Take the end of the text: a character that was never completed becomes U+FFFD."""
        self._segments.append(self._utf8.decode(b"", final=True))

    @property
    def text(self) -> str:
        """All complete characters so far."""
        return "".join(self._segments)

    @property
    def last_segment(self) -> str:
        """The part of `text` that is new since this was last read."""
        new = self._segments[self._shown :]
        self._shown = len(self._segments)
        return "".join(new)


def load_tokenizer(
    directory_or_file: str | Path, *, tokenizer_config: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Read a tokenizer from a model directory, or from one file.

    In a directory that is `tokenizer.model` (SentencePiece), else `tokenizer.json` (Hugging
    Face's tokenizers), and with it what else the directory says: `tokenizer_config.json` (BOS,
    EOS, chat template), `chat_template.jinja`, and further EOS ids in `generation_config.json`
    or `config.json`. A file stands for itself: `.json` is a `tokenizer.json`, any other name a
    SentencePiece model. `tokenizer_config` are values that go before those of
    `tokenizer_config.json`.

    Raises:
        InputError: when there is no tokenizer, or a file can't be read or used; the message
            names it.
    """
    path = Path(directory_or_file)
    file, settings, eos_token_ids, template = path, {}, [], None
    if path.is_dir():
        file = find_tokenizer(path)
        settings = _read_optional(path / "tokenizer_config.json")
        eos_token_ids = _read_eos_token_ids(path)
        template = _read_chat_template(path, settings)
    read = from_tokenizer_json if file.suffix == ".json" else from_sentencepiece
    vocabulary = read(file)
    settings = {**settings, **(tokenizer_config or {})}
    try:
        return Tokenizer(
            vocabulary,
            bos_token=_content(settings.get("bos_token")) or vocabulary.bos_token,
            eos_token=_content(settings.get("eos_token")) or vocabulary.eos_token,
            eos_token_ids=eos_token_ids,
            chat_template=template,
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def find_tokenizer(directory: Path) -> Path:
    """The directory's `tokenizer.model`, else its `tokenizer.json`.

    Raises:
        InputError: when it has neither.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        if (directory / name).exists():
            return directory / name
    raise InputError(
        f"{directory}: no tokenizer.model or tokenizer.json; "
        "OpenELM uses LLaMA's tokenizer: name one with --tokenizer PATH_OR_REPO"
    )


def _read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _content(token: Any) -> str | None:
    """A token in `tokenizer_config.json`: a string, or an object that has it as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _read_eos_token_ids(directory: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        found = _read_optional(directory / name).get("eos_token_id")
        if found is not None:
            return [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]
    return []


def _read_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: can't be read ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _render_jinja(template: str, **values: Any) -> str:
    """A chat template, rendered with the settings and in the sandbox that transformers uses."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError(
            "the model's chat template is not OpenELM's own, and needs jinja2: pip install jinja2"
        ) from None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(**values)
    except (TemplateError, TypeError) as error:
        raise InputError(f"the model's chat template can't be used: {error}") from None
