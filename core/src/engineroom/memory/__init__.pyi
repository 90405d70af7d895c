# The names that plugins may use, each loaded when it is first used.

from .kv_cache import KVLayer as KVLayer
from .kv_cache import kv_layers as kv_layers
from .kv_cache import kv_values_per_token as kv_values_per_token

__all__: list[str]
