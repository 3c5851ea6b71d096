"""`optimum-cli export tinyllava-edge`: our export under the command that optimum's users know."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..cli_frame import emit, guarded, talk
from .options import FIELDS, add_arguments


class TinyLlavaEdgeExportCommand(BaseOptimumCLICommand):
    """Same options and same result as `tinyllava-edge export CKPT -o OUT`."""

    COMMAND = CommandInfo(
        name="tinyllava-edge",
        help="Export a TinyLLaVA checkpoint: ONNX vision graphs, quantised GGUF language model, verified.",
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the arguments; called by optimum."""
        parser.description = TinyLlavaEdgeExportCommand.COMMAND.help
        parser.add_argument("-m", "--model", required=True, type=Path, metavar="CKPT", help="Checkpoint directory.")
        add_arguments(parser)
        parser.add_argument("--json", action="store_true", help="Print one JSON document on stdout.")
        parser.add_argument("output", type=Path, metavar="OUT", help="Bundle directory to write.")

    def run(self) -> None:
        """Export, verify, leave with tinyllava-edge's exit codes: 0 good, 1 failed, 2 wrong arguments."""
        code = guarded(self._export)
        if code:
            sys.exit(code)

    def _export(self) -> int:
        from ..commands import export_checkpoint

        values = {name: getattr(self.args, name) for name in FIELDS}
        value, passed = export_checkpoint(self.args.model, self.args.output, values, tell=talk)
        if self.args.json:
            emit(value)
        else:
            talk(f"bundle: {self.args.output} ({', '.join(value['builds'])})")
        return 0 if passed else 1
