# The names that plugins may use, each loaded when it is first used.

from .gguf import GgufArray as GgufArray
from .gguf import GgufHeader as GgufHeader
from .gguf import GgufTensor as GgufTensor
from .gguf import gguf_part_paths as gguf_part_paths
from .gguf import is_gguf as is_gguf
from .gguf_header import read_gguf_header as read_gguf_header
from .gguf_header import refuse_gguf as refuse_gguf
from .json_file import read_json as read_json
from .pooling import PoolingRecipe as PoolingRecipe
from .pooling import read_pooling as read_pooling
from .safetensors import SAFETENSORS_BITS as SAFETENSORS_BITS
from .safetensors import SafetensorsHeader as SafetensorsHeader
from .safetensors import read_safetensors_header as read_safetensors_header
from .source import HubSource as HubSource
from .source import PackageSource as PackageSource
from .source import PathSource as PathSource
from .source import Source as Source
from .source import find_source as find_source
from .source import parse_source as parse_source
from .source import resolve_source as resolve_source

__all__: list[str]
