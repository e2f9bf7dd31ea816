"""A text's keys and values, kept for the next text that begins like it: in memory, or in a file."""

from .fingerprint import fingerprint
from .prompt_cache import PromptCache

__all__ = ["PromptCache", "fingerprint"]
