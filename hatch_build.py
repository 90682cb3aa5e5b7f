"""The wheel holds one name: the folders beside fedcore/ go into it.

Not in a development install, where fedcore/__init__.py finds them beside itself.
"""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("strategies", "server", "client")
PRESETS = ("benchmarks/fashion.toml", "benchmarks/audit.toml")  # the README names them


class OneName(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            for path in (*FOLDERS, *PRESETS):
                build_data["force_include"][path] = f"fedcore/{path}"
