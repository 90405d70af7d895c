# The names that plugins may use, each loaded when it is first used.

from .account import DeviceMemory as DeviceMemory
from .kv_cache import KVLayer as KVLayer
from .kv_cache import kv_layers as kv_layers
from .kv_cache import kv_values_per_token as kv_values_per_token
from .probe import MachineProbe as MachineProbe
from .probe import MemoryProbe as MemoryProbe
from .probe import give_back_memory as give_back_memory

__all__: list[str]
