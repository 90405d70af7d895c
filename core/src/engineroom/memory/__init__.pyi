# The names that plugins may use, each loaded when it is first used.

from .account import DeviceMemory as DeviceMemory
from .kv_cache import (
    KVLayer as KVLayer,
    kv_layers as kv_layers,
    kv_values_per_token as kv_values_per_token,
)
from .probe import (
    MachineProbe as MachineProbe,
    MemoryProbe as MemoryProbe,
    give_back_memory as give_back_memory,
)

__all__: list[str]
