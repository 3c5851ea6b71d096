"""The static graph for CoreML: one partition, says ONNX Runtime's checker, and its report as numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnxruntime.tools.mobile_helpers import usability_checker
from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

from tinyllava_edge.errors import ExportError
from tinyllava_edge.export.mobile import coreml
from tinyllava_edge.export.vision import export_vision_fp32

from ..vision_models import TOWERS, make


@pytest.mark.parametrize("family", TOWERS)
def test_one_partition(family: str, tmp_path: Path) -> None:
    """Every family's static graph: all nodes in one MLProgram partition; NNAPI lacks GELU and layer norm."""
    path = tmp_path / "vision.onnx"
    model, spec = make(family)
    export_vision_fp32(model, spec, path, static=True)
    text, counts = coreml.usability(path)
    assert coreml.is_whole(counts) and counts[coreml.MLPROGRAM]["nodes"] > 60
    assert "1 partition," in coreml.line(counts)
    assert counts["NNAPI"]["partitions"] > 1 and counts["NNAPI"]["supported"] < counts["NNAPI"]["nodes"]
    assert "Model should perform well with CoreML MLProgram as is: YES" in text
    assert text.startswith("Checking vision.onnx for usability") and str(tmp_path) not in text


def test_counts_are_the_checkers_own(tmp_path: Path) -> None:
    """The numbers read from the report equal those that its functions return."""
    path = tmp_path / "vision.onnx"
    model, spec = make("siglip")
    export_vision_fp32(model, spec, path, static=True)
    optimize_model(path, tmp_path / "basic.onnx")
    shaped = ModelProtoWithShapeInfo(tmp_path / "basic.onnx").model_with_shape_info
    found = usability_checker.check_coreml_partitions(shaped, True, "coreml_supported_mlprogram_ops.md")
    numbers = {"partitions": found.num_partitions, "supported": found.num_supported_nodes, "nodes": found.num_nodes}
    assert coreml.usability(path)[1][coreml.MLPROGRAM] == numbers


def test_a_dynamic_graph_is_no_substitute(tmp_path: Path) -> None:
    """With any batch most nodes are lost: the count is of the graph as it is, not of one with other shapes."""
    path = tmp_path / "vision.onnx"
    model, spec = make("clip")
    export_vision_fp32(model, spec, path)
    _text, counts = coreml.usability(path)
    assert not coreml.is_whole(counts)
    assert counts[coreml.MLPROGRAM]["supported"] < counts[coreml.MLPROGRAM]["nodes"] / 2


def test_a_report_of_another_version(tmp_path: Path) -> None:
    text = "1 partitions with a total of 5/5 nodes can be handled by the NNAPI EP.\n"
    with pytest.raises(ExportError, match="says nothing of CoreML NeuralNetwork, CoreML MLProgram"):
        coreml.read_counts(tmp_path / "vision.onnx", text)
