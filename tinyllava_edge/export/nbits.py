"""4- and 8-bit weights for a decoder, one matrix in float32 at a time.

The builder's own way holds every weight twice in float32: 9 GiB for a model of 1.1 billion parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

ACCURACY_LEVEL = 4  # MatMulNBits multiplies in int8: the fast form on CPUs


def quantize_matmuls(model: ir.Model, bits: Callable[[str], int], block: int) -> int:
    """Replace every product with a constant by MatMulNBits: symmetric, in blocks along the inner size.

    Args:
        model: graph, changed in place; its weights may be lazy.
        bits: node name → 4 or 8.
        block: weights that share one scale.

    Returns:
        Number of products replaced.
    """
    found = [
        (node, weight, weight.const_value)
        for node in model.graph
        if node.op_type == "MatMul" and (weight := node.inputs[1]) is not None and weight.const_value is not None
    ]
    for node, weight, stored in found:
        name = str(node.name)
        made = _one(name, stored.numpy(), bits(name), block)
        (product,) = made.graph.node
        constants = []
        for tensor in made.graph.initializer:
            value = ir.tensor(numpy_helper.to_array(tensor), name=f"{weight.name}_{tensor.name}")
            kind, shape = ir.TensorType(value.dtype), ir.Shape(tuple(tensor.dims))
            constants.append(ir.Value(name=value.name, type=kind, shape=shape, const_value=value))
            model.graph.register_initializer(constants[-1])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in product.attribute}
        new = ir.node("MatMulNBits", [node.inputs[0], *constants], attributes, domain=product.domain, name=f"{name}_Q")
        old, out = node.outputs[0], new.outputs[0]
        model.graph.insert_before(node, new)
        out.type, out.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        out.name = old.name
        del model.graph.initializers[str(weight.name)]
    return len(found)


def _one(name: str, weight: npt.NDArray[Any], bits: int, block: int) -> onnx.ModelProto:
    """A model of one product, quantised by ONNX Runtime."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    kind = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name=name)],
        "one",
        [onnx.helper.make_tensor_value_info("x", kind, [None, weight.shape[0]])],
        [onnx.helper.make_tensor_value_info("y", kind, [None, weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    quantizer = MatMulNBitsQuantizer(
        onnx.helper.make_model(graph, opset_imports=opsets),
        bits=bits,
        block_size=block,
        is_symmetric=True,
        accuracy_level=ACCURACY_LEVEL,
    )
    quantizer.process()
    made: onnx.ModelProto = quantizer.model.model
    return made
