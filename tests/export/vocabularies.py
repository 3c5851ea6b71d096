"""A GGUF that holds a tokenizer and no tensors: enough for llama.cpp to load it as a vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from tinyllava_edge.export.tokenizer import Vocabulary, read_vocabulary, write_vocabulary


def vocabulary_gguf(
    tokenizer: Any, path: Path, end_of_turn: str, rows: int, vocabulary: Vocabulary | None = None, template: str = ""
) -> Path:
    """Write the tokenizer, or another `vocabulary` in its place, and a chat template."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_file_type(0)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    write_vocabulary(writer, vocabulary or read_vocabulary(tokenizer, rows), tokenizer, end_of_turn)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
