"""nf4.quantize and nf4.dequantize: the byte format, bit for bit, on the reference and on the kernels."""

import copy
import hashlib
import io
import pickle

import pytest
import torch

from peft_ops import nf4
from peft_ops.nf4 import BLOCKSIZES, NF4Weight
from peft_ops.reference import nf4 as reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(37, 53), (6, 64), (7, 100), (333,), (1,), (3, 5, 7), (2, 3000)]


def formula(weight, dtype):
    """The values, element by element as the format defines them: written apart from the code under test."""
    packed = weight.packed.reshape(-1).cpu()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)[: weight.shape.numel()]
    if weight.nested:
        block = torch.arange(weight.absmax_codes.numel())
        levels = reference._MAP[weight.absmax_codes.reshape(-1).cpu().long()]
        absmax = levels * weight.nested_absmax.cpu()[block // 256] + weight.nested_offset.cpu()
    else:
        absmax = weight.absmax.reshape(-1).cpu()
    values = torch.tensor(reference.NF4_LEVELS)[codes.long()]
    return (values * absmax[torch.arange(values.numel()) // weight.blocksize]).to(dtype).view(weight.shape)


def test_golden_bytes(device):
    w = torch.zeros(64, device=device)
    w[0], w[1] = 1.0, -1.0
    weight = nf4.quantize(w)
    assert weight.packed.tolist() == [0xF0] + [0x77] * 31
    assert weight.absmax.tolist() == [1.0]


def test_dynamic_map_is_the_published_one():
    digest = hashlib.sha256(reference._MAP.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert reference._MAP[127] == 0.0


def test_kernels_hold_the_same_tables():
    tables = pytest.importorskip("peft_ops.kernels.nf4_tables")
    ours = tables.nf4_tables(torch.device("cpu"))
    assert torch.equal(ours.pairs, reference._PAIRS)
    assert torch.equal(ours.map, reference._MAP)
    assert torch.equal(ours.thresholds, reference._midpoints(reference._LEVELS))
    assert torch.equal(ours.map_thresholds, reference._midpoints(reference._MAP))


def test_every_level_and_every_tie(device):
    """A level is its own code; the midpoint of two levels goes to the lower code, the next float above to the upper."""
    levels = torch.tensor(reference.NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    above = torch.nextafter(midpoints, torch.ones(15))
    w = torch.cat((levels, midpoints, above, torch.zeros(18))).to(device)
    packed = nf4.quantize(w).packed.cpu()
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)
    assert codes.tolist() == [*range(16), *range(15), *range(1, 16), *[7] * 18]


def test_codes_are_the_nearest_levels(device):
    """Independent of thresholds: no level is nearer, in float64, than the one chosen."""
    w = torch.randn(40, 64)
    weight = nf4.quantize(w.to(device)).to("cpu")
    distance = lambda value: (w.double() / weight.absmax.double() - value).abs()
    levels = torch.tensor(reference.NF4_LEVELS, dtype=torch.float64)
    nearest = distance(levels[:, None, None]).amin(0)
    chosen = distance(nf4.dequantize(weight, torch.float64) / weight.absmax.double())
    torch.testing.assert_close(chosen, nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_block_without_an_inverse_is_code_7(device, value):
    """An all-zero block, or one so small that 1/absmax is infinite."""
    w = torch.full((2, 64), value, device=device)
    w[1] = torch.linspace(-2, 3, 64)
    weight = nf4.quantize(w)
    assert weight.packed[0].tolist() == [0x77] * 32
    assert nf4.dequantize(weight)[0].tolist() == [0.0] * 64
    assert weight.absmax.view(-1).tolist() == [torch.tensor(value).item(), 3.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_and_values(device, shape, double_quant, dtype):
    """Quantised bytes equal the reference's, values the formula's: odd counts, partial blocks, rows across blocks."""
    w = torch.randn(shape, dtype=dtype)
    blocksize = 32 if len(shape) > 1 else 64
    weight = nf4.quantize(w.to(device), blocksize, double_quant)
    packed, absmax = reference.nf4_quantize(w, blocksize)
    assert torch.equal(weight.packed.view(-1).cpu(), packed)
    if double_quant and device.type == "cpu":
        codes, nested_absmax, offset = reference.absmax_quantize(absmax)
        assert torch.equal(weight.absmax_codes.view(-1), codes)
        assert torch.equal(weight.nested_absmax, nested_absmax)
        assert torch.equal(weight.nested_offset, offset)
    elif not double_quant:
        assert torch.equal(weight.absmax.view(-1).cpu(), absmax)
    assert weight.shape == w.shape
    assert weight.dtype == dtype
    for out in (None, *FLOATS):
        values = nf4.dequantize(weight, out)
        assert torch.equal(values.cpu(), formula(weight, out or dtype))
    error = (nf4.dequantize(weight, torch.float32).cpu() - w.float()).norm() / w.float().norm()
    assert error < 0.15


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_block_sizes(device, blocksize, double_quant):
    w = torch.randn(3, 4096 + 32)
    weight = nf4.quantize(w.to(device), blocksize, double_quant)
    assert torch.equal(weight.packed.view(-1).cpu(), reference.nf4_quantize(w, blocksize)[0])
    assert torch.equal(nf4.dequantize(weight).cpu(), formula(weight, torch.float32))


def test_last_odd_element_has_pad_code_7(device):
    weight = nf4.quantize(torch.ones(65, device=device))
    assert weight.packed.tolist() == [0xFF] * 32 + [0xF7]


def test_more_than_one_chunk():
    """The reference walks chunks: whole ones, one that ends inside a block, and none at all."""
    w = torch.randn(reference._CHUNK + 4096 + 33)
    weight = nf4.quantize(w)
    for part in (slice(0, 4096), slice(reference._CHUNK - 64, None)):
        first = part.start
        packed, absmax = reference.nf4_quantize(w[part], 64)
        assert torch.equal(weight.packed[first // 2 : first // 2 + packed.numel()], packed)
        assert torch.equal(weight.absmax[first // 64 : first // 64 + absmax.numel()], absmax)
    assert torch.equal(nf4.dequantize(weight), formula(weight, torch.float32))


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(device, shape, double_quant):
    weight = nf4.quantize(torch.empty(shape, device=device), 64, double_quant)
    assert weight.packed.numel() == 0
    assert nf4.dequantize(weight, torch.float16).shape == shape


def test_strides_do_not_matter_and_w_stays(device):
    w = torch.randn(70, 96, device=device)
    for view in (w.t(), w[::2], w[:, 1:65], w[3].expand(4, 96)):
        before = view.clone()
        ours, dense = nf4.quantize(view), nf4.quantize(view.contiguous())
        assert torch.equal(ours.packed, dense.packed)
        assert torch.equal(ours.absmax, dense.absmax)
        assert torch.equal(view, before)


@pytest.mark.parametrize("shape", [(5, 64), (333,), (0, 64)])
def test_into_memory_that_is_there(device, shape):
    weight = nf4.quantize(torch.randn(shape, device=device), 32)
    out = torch.full(shape, 9.0, device=device, dtype=torch.bfloat16)
    before = out._version
    assert nf4.dequantize(weight, out=out) is out
    assert torch.equal(out, nf4.dequantize(weight, torch.bfloat16))
    assert out._version > before


def test_memory_that_does_not_fit_is_named(device):
    weight = nf4.quantize(torch.randn(8, 64, device=device))
    for out in (torch.empty(8, 32, device=device), torch.empty(64, 8, device=device).t()):
        with pytest.raises(ValueError, match="out must be"):
            nf4.dequantize(weight, out=out)
    with pytest.raises(ValueError, match="require no gradient"):
        nf4.dequantize(weight, out=torch.empty(8, 64, device=device, requires_grad=True))
    with pytest.raises(TypeError, match="out must be torch.float16"):
        nf4.dequantize(weight, torch.float16, out=torch.empty(8, 64, device=device))


def test_shapes_of_the_parts(device):
    """Rows are kept where bytes and blocks end with them, so that a shard along dim 0 is a slice of every part."""
    w = torch.randn(6, 128, device=device)
    weight, nested = nf4.quantize(w), nf4.quantize(w, double_quant=True)
    assert (weight.packed.shape, weight.absmax.shape) == ((6, 64), (6, 2))
    assert (nested.absmax, nested.absmax_codes.shape, nested.nested_offset.shape) == (None, (6, 2), ())
    shard = NF4Weight(weight.packed[2:4], weight.absmax[2:4], 64, torch.Size((2, 128)), weight.dtype)
    assert torch.equal(nf4.dequantize(shard), nf4.dequantize(weight)[2:4])
    crossing = nf4.quantize(w[:, :100])
    assert (crossing.packed.shape, crossing.absmax.shape) == ((6, 50), (10,))


def test_bits_per_weight(device):
    w = torch.randn(128, 512, device=device)
    assert nf4.quantize(w).nbytes * 8 / w.numel() <= 4.6
    assert nf4.quantize(w, double_quant=True).nbytes * 8 / w.numel() <= 4.2


@pytest.mark.parametrize("double_quant", [False, True])
def test_copies_keep_the_bytes(double_quant):
    weight = nf4.quantize(torch.randn(6, 128), 64, double_quant)
    stream = io.BytesIO()
    torch.save(weight, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(stream, weights_only=False),
        weight.to("cpu"),
    ]  # fmt: skip
    for other in copies:
        assert (other.shape, other.dtype, other.blocksize) == (weight.shape, weight.dtype, weight.blocksize)
        for name, tensor in weight._tensors().items():
            assert torch.equal(getattr(other, name), tensor), name
    assert weight.to("meta").packed.is_meta


def test_inference_mode_first(device):
    """What the first call makes under inference_mode serves autograd later."""
    with torch.inference_mode():
        weight = nf4.quantize(torch.randn(4, 64, device=device))
        values = nf4.dequantize(weight)
    assert torch.equal(nf4.dequantize(weight), values)


def test_repeats_are_equal(device):
    w = torch.randn(50, 100, device=device)
    first, second = (nf4.quantize(w, double_quant=True) for _ in range(2))
    for name, tensor in first._tensors().items():
        assert torch.equal(getattr(second, name), tensor), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_that_are_not_finite(device, bad, dtype):
    w = torch.randn(5, 64, device=device, dtype=dtype)
    w[3, 17] = bad
    with pytest.raises(ValueError, match=r"w \(5, 64\) holds NaN or infinite values"):
        nf4.quantize(w)


def test_bad_input_is_named():
    for w, given in ((torch.zeros(64, dtype=torch.int32), "torch.int32"), ([1.0], "list"),
                     (torch.zeros(64, dtype=torch.float64), "torch.float64"),
                     (torch.zeros(64, dtype=torch.complex64), "torch.complex64")):  # fmt: skip
        with pytest.raises(TypeError, match=f"w must be a float32, float16 or bfloat16 tensor, got {given}"):
            nf4.quantize(w)
    for blocksize in (0, 16, 96, 8192):
        with pytest.raises(ValueError, match=f"blocksize must be one of 32, 64, .*, got {blocksize}"):
            nf4.quantize(torch.zeros(64), blocksize)
    with pytest.raises(TypeError, match="weight must be an NF4Weight, got Tensor"):
        nf4.dequantize(torch.zeros(64))
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, got torch.int8"):
        nf4.dequantize(nf4.quantize(torch.zeros(64)), torch.int8)


@pytest.mark.parametrize("shape", [(37, 53), (6, 64), (7, 4304), (333,)])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_writes_what_bitsandbytes_writes(shape, blocksize, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, dtype=dtype)
    w.view(-1)[:64] = 0
    packed, state = functional.quantize_4bit(w, blocksize=blocksize, quant_type="nf4")
    weight = nf4.quantize(w, blocksize)
    assert torch.equal(weight.packed.view(-1), packed.view(-1))
    assert torch.equal(weight.absmax.view(-1), state.absmax.view(-1))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_reads_what_bitsandbytes_writes(double_quant, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, 640, dtype=dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    absmax = state.absmax.view(96, 10)
    nested = (absmax, state.state2.absmax, state.offset) if double_quant else ()
    weight = NF4Weight(packed.view(96, 320), None if double_quant else absmax, 64, w.shape, dtype, *nested)
    assert torch.equal(nf4.dequantize(weight), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_parts_with_strides(device, double_quant):
    """A slice of columns of the packed bytes and of their scales is not contiguous, and read as it lies."""
    weight = nf4.quantize(torch.randn(6, 256, device=device), 64, double_quant)
    scales = weight.absmax_codes if double_quant else weight.absmax
    wide = torch.cat((weight.packed, weight.packed), dim=1)[:, :128], torch.cat((scales, scales), dim=1)[:, :4]
    nested = (wide[1], weight.nested_absmax, weight.nested_offset) if double_quant else ()
    strided = NF4Weight(wide[0], None if double_quant else wide[1], 64, weight.shape, weight.dtype, *nested)
    assert not strided.packed.is_contiguous()
    assert torch.equal(nf4.dequantize(strided), nf4.dequantize(weight))
