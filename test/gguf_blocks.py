# gguf_blocks.py OUT: the blocks of test/fixtures/gguf/blocks.safetensors and what they mean, by the
# Python package gguf 0.19 (pip install gguf==0.19.0). Nothing in make test needs it.
#
# Of each type that convert reads: blocks of random bytes, in which the scales take every kind of
# value that they can have (TYPE.blocks), and the numbers that gguf makes of them (TYPE.values).
import json
import sys

import gguf
import numpy

# Half floats: zeros, the smallest and largest subnormal ones, the smallest normal one, the largest.
HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x7BFF, 0xFBFF]
# Where in a block half floats are.
OFFSETS = {"F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
           "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
           "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64]}
OTHERS = ["F32", "BF16", "MXFP4"]
COUNTS = {1: 512, 32: 32, 256: 16}  # blocks, by the numbers in one


def random_half(random):
    """Of a middling size, with any sign."""
    return (random.integers(2) << 15) | (random.integers(4, 20) << 10) | random.integers(1024)


def set_halves(blocks, offsets, random):
    for block, bytes in enumerate(blocks):
        for i, offset in enumerate(offsets):
            # The second scale has another special value than the first.
            special = (block + 4 * i) % len(HALVES)
            half = HALVES[special] if block < len(HALVES) else random_half(random)
            bytes[offset:offset + 2] = half & 255, half >> 8


def set_exponents(blocks, random):
    """MXFP4's scales, and at the largest of them only numbers that are still finite."""
    special = [0, 1, 2, 3, 126, 127, 128, 129, 252, 253, 254, 255]
    allowed = {253: [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13], 254: [0, 1, 2, 3, 8, 9, 10, 11],
               255: [0, 1, 8, 9]}
    for block, bytes in enumerate(blocks):
        bytes[0] = special[block] if block < len(special) else random.integers(100, 140)
        if int(bytes[0]) in allowed:
            low, high = random.choice(allowed[int(bytes[0])], (2, 16))
            bytes[1:] = low | high << 4


def make_blocks(name, random):
    kind = gguf.GGMLQuantizationType[name]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (COUNTS[values], size), dtype=numpy.uint8)
    if name in OFFSETS:
        set_halves(blocks, OFFSETS[name], random)
    elif name == "MXFP4":
        set_exponents(blocks, random)
    else:  # F32 and BF16, whose last byte has seven bits of the exponent: not all of them set
        blocks[:, -1] = numpy.where(blocks[:, -1] & 127 == 127, 60, blocks[:, -1])
    dequantized = gguf.quants.dequantize(blocks.reshape(-1), kind).astype(numpy.float32)
    dequantized = dequantized.reshape(len(blocks), values)
    assert numpy.isfinite(dequantized).all(), name
    return blocks, dequantized


def write(path, tensors):
    header, offset = {}, 0
    for name, array in tensors.items():
        dtype = "F32" if array.dtype == numpy.float32 else "I32"
        header[name] = {"dtype": dtype, "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


def main():
    random = numpy.random.default_rng(18)
    values, blocks = {}, {}
    for name in list(OFFSETS) + OTHERS:
        packed, values[name + ".values"] = make_blocks(name, random)
        blocks[name + ".blocks"] = packed.reshape(-1).view("<i4")  # four bytes a word
    write(sys.argv[1], blocks | values)


main()
