"""Adds `export tinyllava-edge` to optimum-cli, which looks into this namespace. No __init__.py may lie beside it."""

from optimum.commands.export.base import ExportCommand

from tinyllava_edge.export.optimum_command import TinyLlavaEdgeExportCommand

REGISTER_COMMANDS = [(TinyLlavaEdgeExportCommand, ExportCommand)]
