"""Generation with a key-value cache that holds more than keys and values. Needs transformers."""

from attnrewrite.inference.assistant import as_assistant as as_assistant
from attnrewrite.inference.cache import SelectiveCache as SelectiveCache
from attnrewrite.inference.search import search_budgets as search_budgets
