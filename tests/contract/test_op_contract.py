"""What every op promises, on every backend, dtype and case of its specification."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernelab._core import registry
from kernelab._core.errors import BackendUnavailable
from kernelab.ops import specs

from . import arguments as args
from .error import BACKWARD, FORWARD, check

SPECS = specs()


def grid():
    """Every (spec, backend, device, dtype, case) with the mark of the process that runs it."""
    for spec in SPECS:
        for backend, dtypes in spec.dtypes.items():
            for device in ("cpu", "cuda"):
                marks = [pytest.mark.gpu] if device == "cuda" else [pytest.mark.interp] if backend == "triton" else []
                if backend == ("cpu" if device == "cuda" else "cuda"):
                    continue
                for dtype in dtypes:
                    for case in spec.cases:
                        large = {"gpu", "bench"} & case.tags  # benchmarks check their own results before they measure
                        if device == "cpu" and (large or (backend == "triton" and "interp" not in case.tags)):
                            continue
                        name = f"{spec.function.__name__}-{backend}-{device}-{str(dtype)[6:]}-{case.name}"
                        yield pytest.param(spec, backend, device, dtype, case, marks=marks, id=name)


GRID = list(grid())
every_case = pytest.mark.parametrize(("spec", "backend", "device", "dtype", "case"), GRID)
smallest_case = pytest.mark.parametrize(
    ("spec", "backend", "device", "dtype", "case"), [p for p in GRID if "smallest" in p.values[4].tags]
)
double_precision = pytest.mark.parametrize(
    ("spec", "backend", "device", "case"),
    [
        pytest.param(*p.values[:3], p.values[4], marks=p.marks, id=p.id)
        for p in GRID
        if p.values[3] == torch.float64 and "smallest" in p.values[4].tags
    ],
)
every_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.function.__name__)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN, so that what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def run(function, arguments: dict, cotangent: torch.Tensor | None = None, **extra):
    """``(output, {name: gradient})`` for a given or a random cotangent."""
    output = function(**arguments, **extra)
    leaves = args.trainable(arguments)
    if cotangent is None or not output.requires_grad:
        return output.detach(), {}
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
    return output.detach(), dict(zip(leaves, grads, strict=True))


def random_like(output: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)


@every_case
def test_forward_and_backward_against_float64(spec, backend, device, dtype, case):
    arguments = args.build(case, device, dtype)
    cotangent = random_like(spec.function(**arguments, backend="reference").detach())
    exact, exact_grads = run(spec.reference, args.copy(arguments, torch.float64), cotangent.double())
    narrow = torch.float32 if dtype == torch.float64 else dtype
    plain, plain_grads = run(spec.reference, args.copy(arguments, narrow), cotangent.to(narrow))
    if dtype == torch.float64:
        plain = as_in_float64(plain, exact)
        plain_grads = {name: as_in_float64(grad, exact_grads[name]) for name, grad in plain_grads.items()}
    got, grads = run(spec.function, args.copy(arguments), cotangent, backend=backend)
    check("output", got, plain, exact, FORWARD)
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert (grad is None) == (exact_grads[name] is None), f"gradient of {name}: None on one side only"
        if grad is not None:
            check(f"gradient of {name}", grad, plain_grads[name], exact_grads[name], BACKWARD)


def as_in_float64(plain: torch.Tensor | None, exact: torch.Tensor) -> torch.Tensor | None:
    """What plain torch may give in float64, where it is the reference itself: its float32 result, whose error is made
    smaller as the roundings are, and doubled since the reference errs too. The cases' inputs are numbers of float32."""
    ratio = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return None if plain is None else exact + (plain.double() - exact) * ratio


@every_case
def test_two_runs_are_bitwise_equal_and_leave_the_inputs_alone(spec, backend, device, dtype, case):
    arguments = args.build(case, device, dtype)
    before = {name: (tensor._version, tensor.detach().clone()) for name, tensor in args.tensors(arguments)}
    cotangent = random_like(spec.function(**arguments, backend=backend).detach())
    first, first_grads = run(spec.function, arguments, cotangent, backend=backend)
    second, second_grads = run(spec.function, arguments, cotangent, backend=backend)
    assert torch.equal(first, second)
    for name, grad in first_grads.items():
        assert grad is second_grads[name] is None or torch.equal(grad, second_grads[name]), name
    for name, tensor in args.tensors(arguments):
        version, values = before[name]
        assert tensor._version == version, name
        assert torch.equal(tensor, values), name


@double_precision
def test_gradcheck(spec, backend, device, case):
    arguments = args.build(case, device, torch.float64)
    leaves = args.trainable(arguments)

    def function(*values):
        return spec.function(**args.replaced(arguments, dict(zip(leaves, values, strict=True))), backend=backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    if spec.second_order:
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


@every_op
def test_forward_mode_is_refused_not_ignored(spec):
    case = next(case for case in spec.cases if "smallest" in case.tags)
    arguments = args.build(case, "cpu", torch.float32)
    leaves = args.trainable(arguments)
    constants = args.copy(arguments)
    for _, tensor in args.tensors(constants):
        tensor.requires_grad_(False)

    def function(*values):
        return spec.function(**args.replaced(constants, dict(zip(leaves, values, strict=True))), backend="reference")

    values = tuple(leaf.detach() for leaf in leaves.values())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(function, values, values)


class RawCalls(TorchDispatchMode):
    """Records the raw kernelab ops that run inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.namespace == "kernelab":
            self.calls.append((function, tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)))
        return function(*arguments, **(kwargs or {}))


@smallest_case
def test_opcheck_of_every_raw_op(spec, backend, device, dtype, case):
    arguments = args.build(case, device, dtype)
    with RawCalls() as raw:
        run(
            spec.function, arguments, random_like(spec.function(**arguments, backend=backend).detach()), backend=backend
        )
    assert raw.calls
    for function, values in raw.calls:
        torch.library.opcheck(function, values)


@smallest_case
def test_torch_func_grad_stays_on_the_fast_path(spec, backend, device, dtype, case):
    arguments = args.build(case, device, dtype)
    cotangent = random_like(spec.function(**arguments, backend=backend).detach())
    leaves = args.trainable(arguments)

    def loss(values):
        return (spec.function(**args.replaced(arguments, values), backend=backend) * cotangent).sum()

    with RawCalls() as raw:
        grads = torch.func.grad(loss)({name: leaf.detach() for name, leaf in leaves.items()})
    with RawCalls() as expected_raw:
        _, expected = run(spec.function, arguments, cotangent, backend=backend)
    assert [function for function, _ in raw.calls] == [function for function, _ in expected_raw.calls]
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


@smallest_case
def test_compiles_to_one_graph(spec, backend, device, dtype, case):
    torch._dynamo.reset()
    arguments = args.build(case, device, dtype)
    cotangent = random_like(spec.function(**arguments, backend=backend).detach())
    compiled = torch.compile(spec.function, backend="aot_eager", fullgraph=True)
    eager, eager_grads = run(spec.function, arguments, cotangent, backend=backend)
    graph, graph_grads = run(compiled, args.copy(arguments), cotangent, backend=backend)
    torch.testing.assert_close(graph, eager)
    for name, grad in eager_grads.items():
        torch.testing.assert_close(graph_grads[name], grad)


@every_op
def test_dynamic_shapes_compile_once_and_export(spec):
    torch._dynamo.reset()
    arguments = args.build(spec.case("dynamic"), "cpu", torch.float32)
    compiled = torch.compile(spec.function, backend="aot_eager", fullgraph=True, dynamic=True)
    names = list(arguments)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return spec.function(**dict(zip(names, values, strict=True)))

    sizes = {name: torch.export.Dim(name, min=2, max=64) for dims in spec.dynamic.values() for name in dims.values()}
    dims = tuple(
        {d: sizes[size] for d, size in spec.dynamic[name].items()} if name in spec.dynamic else _static(value)
        for name, value in arguments.items()
    )
    with torch.no_grad():
        exported = torch.export.export(Module(), tuple(arguments.values()), dynamic_shapes=(dims,)).module()
        counter = torch._dynamo.testing.CompileCounter()
        counted = torch.compile(spec.function, backend=counter, fullgraph=True, dynamic=True)
        for repeats in (1, 3):
            larger = dict(arguments)
            for name, open_dims in spec.dynamic.items():
                times = [repeats if d in open_dims else 1 for d in range(arguments[name].dim())]
                larger[name] = arguments[name].repeat(times)
            eager = spec.function(**larger)
            torch.testing.assert_close(compiled(**larger), eager)
            torch.testing.assert_close(exported(*larger.values()), eager)
            torch.testing.assert_close(counted(**larger), eager)
        assert counter.frame_count == 1


def _static(value):
    return type(value)([None] * len(value)) if isinstance(value, (list, tuple)) else None


@every_op
def test_misuse_is_refused_by_name(spec):
    for misuse in spec.misuses:
        arguments = args.build(spec.case("smallest"), "cpu", torch.float32)
        with pytest.raises(misuse.error, match=misuse.words):
            spec.function(**misuse.change(arguments))


@every_op
def test_a_demanded_backend_runs_or_raises(spec, monkeypatch):
    arguments = args.build(spec.case("smallest"), "cpu", torch.float32)
    demands = (
        lambda: spec.function(**arguments, backend="nonsense"),
        lambda: _under(registry.use_backend("cuda"), lambda: spec.function(**arguments)),
    )
    for demand in demands:
        with pytest.raises(BackendUnavailable, match="reference"):
            demand()
    monkeypatch.setenv("KERNELAB_BACKEND", f"{spec.name}=nonsense")
    with pytest.raises(BackendUnavailable, match="KERNELAB_BACKEND"):
        spec.function(**arguments)
    monkeypatch.setenv("KERNELAB_BACKEND", "other_op=cuda")
    spec.function(**arguments)


def _under(context, call):
    with context:
        return call()
