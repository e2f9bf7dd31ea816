"""Text to token ids and back."""

from .chat import CHAT_TEMPLATE
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["CHAT_TEMPLATE", "Tokenizer", "load_tokenizer"]
