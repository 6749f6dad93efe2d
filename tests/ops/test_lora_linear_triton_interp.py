"""What is special to the Triton kernels of ``lora_linear``; tests/contract/ has what every backend promises."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernelab._core.philox import STREAM_DROPOUT, dropout_mask, philox
from kernelab.ops.lora_linear import reference, triton_spec
from kernelab.ops.lora_linear.spec import SPECS
from tests.bench.sanitizer import sanitizer
from tests.contract import arguments as args
from tests.contract.error import BACKWARD, FORWARD, check

pytestmark = pytest.mark.interp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param(spec, case, id=f"{spec.function.__name__}-{case.name}")
    for spec in SPECS
    for case in spec.cases
    if "interp" in case.tags
]


@pytest.fixture
def triton():
    """The backend's module."""
    from kernelab.ops.lora_linear import triton_launch

    return triton_launch


@pytest.fixture(params=[True, False], ids=["fused", "accumulate"])
def fused(request, monkeypatch):
    """Both ways of the main GEMM, whatever the dtype."""
    from kernelab.ops.lora_linear import triton_tuning

    monkeypatch.setattr(triton_tuning, "FUSED_DTYPES", DTYPES if request.param else ())
    triton_tuning.configuration.cache_clear()
    yield request.param
    triton_tuning.configuration.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_launches_are_clean_and_move_the_bytes_of_the_closed_form(spec, case, dtype, fused):
    arguments = args.build(case, "cpu", dtype)
    with sanitizer() as forward:
        y = spec.function(**arguments, backend="triton")
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = args.trainable(arguments)
    with sanitizer() as backward:
        grads = torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True)
    assert all(torch.isfinite(t).all() for t in (y, *grads) if t is not None)
    counted = [report.total("bytes_loaded") + report.total("bytes_stored") for report in (forward, backward)]
    assert counted == list(triton_spec.triton_bytes(arguments))
    for launch in (*forward.launches, *backward.launches):
        assert launch.out_of_bounds == launch.races == launch.bytes_atomic == 0


def make(rows=(45, 40, 45), ranks=(4, 8), in_features=80, out_features=70, dtype=torch.float32, seed=0):
    """Raw arguments: segments off, adapter 0, adapter 1, ..."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "x": random(sum(rows), in_features),
        "weight": random(out_features, in_features) / 8,
        "bias": random(out_features),
        "base": None,
        "lora_a": [random(rank, in_features) / 8 for rank in ranks],
        "lora_b": [random(out_features, rank) for rank in ranks],
        "counts": list(rows),
        "adapters": [-1, *range(len(ranks))],
        "scaling": [1.5, 0.75, 0.5][: len(ranks)],
        "keep": [True] * len(ranks),
        "dropout_p": 0.0,
        "seed": 3,
    }


def backward_arguments(call: dict, s: torch.Tensor, need: list[bool], whole: bool = True, **changes) -> dict:
    """Arguments of the raw backward after a forward that returned ``s``."""
    rest = {name: value for name, value in call.items() if name not in ("x", "bias", "base")}
    kept = [part.rows for part in reference.segments(call["counts"], call["adapters"], call["keep"]) if part.kept >= 0]
    x = call["x"] if whole else torch.cat([call["x"][rows] for rows in kept])
    dy = torch.randn(len(call["x"]), call["lora_b"][0].shape[0], generator=torch.Generator().manual_seed(7))
    return {"dy": dy.to(x.dtype), "x": x, "s": s, **rest, "need": need, **changes}


def exactly(arguments: dict) -> dict:
    """The arguments in float64."""

    def wide(value):
        if isinstance(value, list):
            return [wide(item) for item in value]
        return value.double() if isinstance(value, torch.Tensor) else value

    return {name: wide(value) for name, value in arguments.items()}


def check_gradients(got, arguments: dict) -> None:
    plain, exact = reference.backward(**arguments), reference.backward(**exactly(arguments))
    for name, ours, theirs, true in zip(("dx", "dA", "dB"), got, plain, exact, strict=True):
        triples = zip(ours, theirs, true, strict=True) if name != "dx" else [(ours, theirs, true)]
        for index, triple in enumerate(triples):
            check(f"{name}[{index}]", *triple, BACKWARD)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_segment_is_bitwise_the_same_alone_mixed_and_without_adapters(triton, dtype, fused):
    call = make((1, 170, 133), dtype=dtype, in_features=208, out_features=300)  # a single row takes another GEMM
    y, _ = triton.forward(**call)
    for rows, adapter in ((slice(0, 1), -1), (slice(1, 171), 0), (slice(171, 304), 1)):
        x = call["x"][rows]
        alone = call | {"x": x, "counts": [len(x)], "adapters": [adapter]}
        assert torch.equal(y[rows], triton.forward(**alone)[0])
        if adapter == -1:
            nothing = {"lora_a": [], "lora_b": [], "scaling": [], "keep": []}
            assert torch.equal(y[rows], triton.forward(**alone | nothing)[0])
    if not fused:
        assert torch.equal(y[:1], torch.nn.functional.linear(call["x"][:1], call["weight"], call["bias"]))


@pytest.mark.parametrize(
    ("rows", "columns", "p", "seed"), [(37, 53, 0.5, 2**40 + 17), (21, 130, 0.05, -1), (5, 3, 0.5, 1)]
)
def test_dropout_is_the_mask_of_the_definition(triton, fused, rows, columns, p, seed):
    mask = dropout_mask(seed, p, 11, rows, columns, torch.device("cpu")).float()
    call = make((11, rows), (columns,), columns, 1) | {"dropout_p": p, "seed": seed, "scaling": [1.0]}
    ones = torch.ones(11 + rows, columns)
    call |= {"x": ones, "lora_a": [torch.eye(columns)], "lora_b": [torch.ones(1, columns)]}
    _, s = triton.forward(**call)
    torch.testing.assert_close(s, mask / (1 - p), rtol=1e-6, atol=0)
    call |= {"lora_a": [torch.ones(1, columns)], "lora_b": [torch.ones(1, 1)], "weight": torch.zeros(1, columns)}
    arguments = backward_arguments(call, torch.ones(rows, 1), [True, True, False], dy=torch.ones(11 + rows, 1))
    for changes in ({}, {"weight": None}):
        dx, (da,), _ = triton.backward(**arguments | changes)
        assert not dx[:11].any()
        torch.testing.assert_close(dx[11:], mask / (1 - p), rtol=1e-6, atol=0)
        torch.testing.assert_close(da[0], mask.sum(0) / (1 - p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("word", range(4))
def test_rows_beyond_32_bits_and_a_word_on_the_threshold(triton, word):
    row, columns, seed = 2**33 + 2**31 - 3, 40, 5
    value = philox(seed, torch.tensor(6), torch.tensor(row + 2), stream=STREAM_DROPOUT)[word].item()
    p = value / 2**32  # exact: element (row + 2, 24 + word) just reaches the threshold, and is kept
    config, rows = (
        triton.configuration(columns, columns, columns, torch.float32, 90),
        triton.routing((9,), (0,), (True,)),
    )
    x, out = torch.ones(1, columns).expand(9, -1), torch.empty(9, columns)  # row stride 0: every row is the first
    eye, dropout = triton._factors([torch.eye(columns)], rows, True), triton._dropout(p, seed)
    launch = triton._shrink("", x, eye, out, rows, (0,), config, 1.0, dropout)
    launch.args["tiles_ptr"] = torch.tensor([[row, row + 9, 0, 0]])
    launch.kernel[launch.grid](**launch.args, **launch.options)
    assert torch.equal(out, dropout_mask(seed, p, row, 9, columns, x.device).float())
    assert out[2, 24 + word] == 1


@pytest.mark.parametrize("whole", [True, False])
def test_offsets_beyond_31_bits(triton, fused, whole):
    """The rows of x, dy and base lie 2^25 elements apart; memory is touched where they are."""
    call = make((20, 70, 10), in_features=32, out_features=32, dtype=torch.bfloat16)

    def spread(t):
        return torch.empty_strided(t.shape, (2**25, 1), dtype=t.dtype).copy_(t)

    for changes in ({}, {"weight": None, "bias": None, "base": call["x"]}):
        near = call | changes
        far = near | {name: spread(near[name]) for name in ("x", "base") if near[name] is not None}
        y, s = triton.forward(**near)
        assert torch.equal(triton.forward(**far)[0], y)
        arguments = backward_arguments(near, s, [True] * 5, whole)
        far = arguments | {name: spread(arguments[name]) for name in ("x", "dy")}
        flat = [t for result in (triton.backward(**arguments), triton.backward(**far)) for t in _flat(result)]
        assert all(torch.equal(a, b) for a, b in zip(flat[:5], flat[5:], strict=True))


def _flat(gradients):
    dx, da, db = gradients
    return [dx, *da, *db]


@pytest.mark.parametrize(
    "need", list(itertools.product([False, True], repeat=5)), ids=lambda n: "".join("01"[f] for f in n)
)
def test_every_need_gets_its_gradients_and_nothing_else(triton, need):
    call = make() | {"dropout_p": 0.25}
    _, s = triton.forward(**call)
    need_x, need_a, need_b = need[0], need[1:3], need[3:]
    through = tuple(need_x or needed for needed in need_a)  # adapters whose dS is wanted
    once = need_b == through and any(need_b)
    for whole in (True, False):
        arguments = backward_arguments(call, s, list(need), whole)
        with sanitizer() as report:
            got = triton.backward(**arguments)
        check_gradients(got, arguments)
        # tiles: one a segment, two in shrink
        expected = {
            "gram": [sum(each) for each in (need_b, need_a) if any(each)],
            "shrink": [2 * sum(through)] if any(through) and not once else [],
            "reduce": [1] * (sum(need_a) + sum(need_b) + once),
            "expand": [2] if need_x else [],
        }
        for name, tiles in expected.items():
            grids = [launch.grid[0] for launch in report.launches if launch.kernel == f"_lora_linear_{name}_kernel"]
            assert len(grids) == len(tiles), name
            assert name == "reduce" or grids == tiles, name


def spaced(t):
    """Unit stride, but rows further apart than they are long."""
    return torch.cat([t, t], dim=1)[:, : t.shape[1]]


def transposed(t):
    return t.mT.contiguous().mT


def repeated(t):
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [spaced, transposed, repeated])
def test_any_strides_give_the_result_of_contiguous_tensors(triton, fused, layout):
    call = make() | {"dropout_p": 0.25}
    strange = {
        "x": layout(call["x"]),
        "weight": transposed(call["weight"]),  # as in transformers' Conv1D
        "lora_a": [transposed(a) for a in call["lora_a"]],
        "lora_b": [spaced(b) for b in call["lora_b"]],
    }
    plain = call | {"x": strange["x"].contiguous()}
    y, s = triton.forward(**plain)
    arguments = backward_arguments(plain, s, [True] * 5)
    strange_y, strange_s = triton.forward(**call | strange)
    assert torch.equal(strange_y, y)
    assert torch.equal(strange_s, s)
    plain_gradients = triton.backward(**arguments | {"dy": layout(arguments["dy"]).contiguous()})
    gradients = triton.backward(**arguments | strange | {"dy": layout(arguments["dy"]), "s": transposed(s)})
    for ours, theirs in zip(_flat(gradients), _flat(plain_gradients), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
    add = call | {"weight": None, "bias": None}
    base = layout(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(
        triton.forward(**add | {"base": base})[0], triton.forward(**add | {"base": base.contiguous()})[0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rows", "ranks", "in_features", "out_features"),
    [
        ((3, 40, 20), (130, 5), 48, 40),  # more ranks than one block
        ((0, 300, 200), (16, 12), 304, 528),  # several partial sums, columns that end inside a block
        ((0, 257, 1), (1, 3), 16, 1),
    ],
)
def test_shapes_beyond_the_cases(triton, fused, dtype, rows, ranks, in_features, out_features):
    call = make(rows, ranks, in_features, out_features, dtype) | {"dropout_p": 0.25}
    y, s = triton.forward(**call)
    check("y", y, reference.forward(**call)[0], reference.forward(**exactly(call))[0], FORWARD)
    arguments = backward_arguments(call, s, [True] * 5)
    check_gradients(triton.backward(**arguments), arguments)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_adapter_works_and_keeps_nothing(triton, fused, frozen):
    call = make((20, 33, 21)) | {"keep": [frozen != 0, frozen != 1]}
    y, s = triton.forward(**call)
    assert torch.equal(y, triton.forward(**call | {"keep": [True, True]})[0])
    torch.testing.assert_close(s, reference.forward(**call)[1])
    assert s.untyped_storage().nbytes() == (33, 21)[1 - frozen] * 8 * 4
    need = [True, frozen != 0, frozen != 1, frozen != 0, frozen != 1]
    for whole in (True, False):
        arguments = backward_arguments(call, s, need, whole)
        check_gradients(triton.backward(**arguments), arguments)


def test_a_step_builds_no_table_that_a_step_before_it_built(triton):
    call = make()
    for misses in (True, False):
        before = triton.tile_table.cache_info().misses
        _, s = triton.forward(**call | {"counts": [50, 35, 45]})
        triton.backward(**backward_arguments(call | {"counts": [50, 35, 45]}, s, [True] * 5))
        assert (triton.tile_table.cache_info().misses > before) == misses
