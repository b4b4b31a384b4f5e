"""Writes small GGUF models of random weights with the package `gguf`, for `.ci/llama`."""

import sys
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.quants import quantize

LETTERS = 29
TOKENS = ["<unk>", "<s>", "</s>", *(chr(ord("a") + index) for index in range(LETTERS))]
VOCABULARY, WIDTH, HEADS, KEY_HEADS, INNER, LAYERS = len(TOKENS), 512, 8, 4, 4096, 4
KEYS = WIDTH // HEADS * KEY_HEADS
OUTPUT, FACTORS = "output.weight", "rope_freqs.weight"
NORM, KEY = "blk.1.ffn_norm.weight", "blk.2.attn_k.weight"


def tensors():
    """Yields the name, shape and type of each tensor.

    They total 58 MiB, so a load by examples/c/llama.c has several segments of 16 MiB.
    """
    yield "token_embd.weight", (VOCABULARY, WIDTH), Type.F16
    yield FACTORS, (WIDTH // HEADS // 2,), Type.F32
    for layer in range(LAYERS):
        for name, shape, kind in (
            ("attn_norm", (WIDTH,), Type.F32),
            ("attn_q", (WIDTH, WIDTH), Type.Q4_0),
            ("attn_k", (KEYS, WIDTH), Type.F16),
            ("attn_v", (KEYS, WIDTH), Type.Q8_0),
            ("attn_output", (WIDTH, WIDTH), Type.BF16),
            ("ffn_norm", (WIDTH,), Type.F32),
            ("ffn_gate", (INNER, WIDTH), Type.Q5_0),
            ("ffn_up", (INNER, WIDTH), Type.F16),
            ("ffn_down", (WIDTH, INNER), Type.F32),
        ):
            yield f"blk.{layer}.{name}.weight", shape, kind
    yield "output_norm.weight", (WIDTH,), Type.F32
    yield OUTPUT, (VOCABULARY, WIDTH), Type.Q8_0


def write(path: Path, without: str = "", transposed: str = "") -> None:
    random = numpy.random.default_rng(1)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types(
        [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.NORMAL] * LETTERS
    )
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape, kind in tensors():
        values = random.standard_normal(shape, dtype=numpy.float32) / 10
        if name != without:
            values = values.T.copy() if name == transposed else values
            values = abs(values) + 1 if name == FACTORS else values
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


folder = Path(sys.argv[1])
write(folder / "model.gguf", without=FACTORS)
# As in many small models, the token embeddings are also the output weights.
write(folder / "shared.gguf", without=OUTPUT)
write(folder / "incomplete.gguf", without=NORM)
write(folder / "transposed.gguf", transposed=KEY)
data = (folder / "model.gguf").read_bytes()
(folder / "truncated.gguf").write_bytes(data[:-4096])
