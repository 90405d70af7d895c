"""The deployment: its file, the models in it, and what the environment adds.

Here is whatever a deployment may say, with mistakes told by file, line and key: the schema of a
model, the file's YAML, names of variables, options of runtimes, and what differs between two
deployments. What a deployment does when it runs is in :mod:`engineroom.models`.
"""

from engineroom.config.deployment import (
    DeploymentConfig,
    deployment_path,
    load_deployment,
    parse_deployment,
)
from engineroom.config.environment import CONFIG_VARIABLE

__all__ = [
    "CONFIG_VARIABLE",
    "DeploymentConfig",
    "deployment_path",
    "load_deployment",
    "parse_deployment",
]
