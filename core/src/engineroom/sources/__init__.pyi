# The names that plugins may use, each loaded when it is first used.

from .gguf import (
    GgufArray as GgufArray,
    GgufHeader as GgufHeader,
    GgufTensor as GgufTensor,
    find_gguf as find_gguf,
    gguf_part_paths as gguf_part_paths,
    is_gguf as is_gguf,
)
from .gguf_header import read_gguf_header as read_gguf_header, refuse_gguf as refuse_gguf
from .json_file import read_json as read_json
from .parts import missing_parts as missing_parts, part_names as part_names
from .pooling import PoolingRecipe as PoolingRecipe, read_pooling as read_pooling
from .safetensors import (
    SAFETENSORS_BITS as SAFETENSORS_BITS,
    SafetensorsHeader as SafetensorsHeader,
    read_safetensors_header as read_safetensors_header,
)
from .source import (
    HubSource as HubSource,
    PackageSource as PackageSource,
    PathSource as PathSource,
    Source as Source,
    find_source as find_source,
    parse_source as parse_source,
    resolve_source as resolve_source,
)
from .vectors import (
    EmbeddingOptions as EmbeddingOptions,
    VectorSizes as VectorSizes,
    vector_sizes as vector_sizes,
)

__all__: list[str]
