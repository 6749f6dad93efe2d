"""What is recomputed in backward is bitwise what would have been saved, or it is saved."""

from __future__ import annotations

import contextlib
import gc
import threading
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernelab._core.memory import LiveBytes, saved_bytes
from kernelab.lora import LoRAConfig, inject, recompute_activations, role, streams

from .models import MODES, WIDTH, stack

D, HIDDEN, HEADS, RANK, TOKENS = 16, 40, 2, 3, 6
DTYPES = [torch.float32, torch.bfloat16]
plain = contextlib.nullcontext
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def random(*shape: int, seed: int = 1, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Gated(nn.Module):
    """A norm and a gated linear unit."""

    def __init__(self, norm: type[nn.Module] = nn.RMSNorm, activation=F.silu) -> None:
        super().__init__()
        self.norm, self.activation = norm(D), activation
        self.gate, self.up, self.down = nn.Linear(D, HIDDEN), nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        return h + self.down(self.activation(self.gate(x)) * self.up(x))


def adapted(model: nn.Module, targets: list[str], dtype: torch.dtype, **config) -> nn.Module:
    model = inject(model.to(dtype), {"actor": LoRAConfig(r=RANK, **config)}, targets)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return model


def gated(*args, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    return adapted(Gated(*args), ["gate", "up", "down"], dtype, **config)


def llama(dtype: torch.dtype):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = modeling.LlamaConfig(
        hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=HEADS, attn_implementation="sdpa"
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layer = adapted(modeling.LlamaDecoderLayer(config, 0), targets, dtype)
    positions = modeling.LlamaRotaryEmbedding(config)(random(1, dtype=dtype), torch.arange(TOKENS)[None])
    return layer, partial(layer, position_embeddings=positions)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return random(2, TOKENS, D, dtype=dtype)


def run(model: nn.Module, forward, h: Tensor, context, backward=torch.Tensor.backward) -> list[Tensor | None]:
    """The output, and the gradients of the input and the parameters."""
    model.zero_grad()
    h = h.clone().requires_grad_()
    with context():
        out = forward(h * 1)
    backward((random(*out.shape, seed=9, dtype=out.dtype) * out).sum())
    return [out.detach(), h.grad, *(parameter.grad for parameter in model.parameters())]


def assert_bitwise(got: list, want: list) -> None:
    assert any(grad is not None for grad in want[2:])
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.equal(a, b)


def kept(forward, h: Tensor, context) -> int:
    """Bytes that live after ``forward`` for its backward."""
    for _ in range(2):  # the first call may keep something for good
        with LiveBytes() as live, context():
            out = forward(h.clone().requires_grad_() * 1)
    return live.current - out.nbytes - h.nbytes  # which the graph's leaf holds


class TestMemory:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_of_a_llama_layer(self, dtype):
        _, forward = llama(dtype)
        h = inputs(dtype)
        rest = 7 * RANK * dtype.itemsize + 4 * (2 + HEADS)  # D(x) A^T; statistics of norms and attention
        # The two inputs of the norms; query, key, value and output of the attention; gate and up.
        elements = 6 * D + 2 * HIDDEN
        assert kept(forward, h, recompute_activations) == 2 * TOKENS * (dtype.itemsize * elements + rest)
        # Also the outputs of the norms, silu(gate) and its product with up; the norms' inputs are float32.
        nbytes = dtype.itemsize * (6 * D + 4 * HIDDEN) + 4 * 2 * D
        assert kept(forward, h, plain) == 2 * TOKENS * (nbytes + rest)

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    @pytest.mark.parametrize("activation", [F.silu, F.gelu, partial(F.gelu, approximate="tanh")])
    def test_of_norms_and_activations(self, norm, activation):
        forward = gated(norm, activation)
        saving = kept(forward, inputs(), plain) - kept(forward, inputs(), recompute_activations)
        assert saving == 4 * 2 * TOKENS * (D + 2 * HIDDEN)

    def test_is_free_with_the_graph(self):
        forward = gated()
        kept(forward, inputs(), recompute_activations)
        gc.collect()
        gc.disable()
        try:
            with recompute_activations(), LiveBytes() as live:
                for _ in range(2):
                    h = inputs().requires_grad_()
                    out = forward(h)
                    del h
                    assert live.current > 0
                    del out
                    assert live.current == 0
        finally:
            gc.enable()

    def test_in_a_role(self):
        model = gated()

        def playing():
            entered = contextlib.ExitStack()
            entered.enter_context(role(model, "actor"))
            entered.enter_context(recompute_activations())
            return entered

        assert kept(model, inputs(), playing) == kept(model, inputs(), recompute_activations)

    def test_after_backward_is_that_before(self):
        model = gated()
        with LiveBytes() as live:
            with recompute_activations():
                out = model(inputs().requires_grad_()).sum()
            before = live.current
            for _ in range(2):
                torch.autograd.grad(out, model.gate.lora_a["actor"], retain_graph=True)
                torch.autograd.grad(out, list(model.parameters())[-1], retain_graph=True)
                out.backward(retain_graph=True, inputs=[p for p in model.parameters() if p.requires_grad])
                model.zero_grad()
            gc.collect()
            assert live.current == before

    def test_peaks_no_higher(self):
        peaks = []
        for context in (plain, recompute_activations):
            forward = gated()
            for _ in range(2):
                with LiveBytes() as live:
                    run(forward, forward, inputs(), context)
            peaks.append(live.peak)
        assert peaks[1] < peaks[0]


class TestBitwise:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_llama_layer(self, dtype):
        args = *llama(dtype), inputs(dtype)
        assert_bitwise(run(*args, recompute_activations), run(*args, plain))

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    @pytest.mark.parametrize("activation", [F.silu, F.gelu, partial(F.gelu, approximate="tanh")])
    def test_norms_and_activations(self, norm, activation, dtype):
        model = gated(norm, activation, dtype=dtype)
        args = model, model, inputs(dtype)
        assert_bitwise(run(*args, recompute_activations), run(*args, plain))

    def test_trainable_base(self):
        model = gated().requires_grad_()
        assert_bitwise(*(run(model, model, inputs(), context) for context in (recompute_activations, plain)))

    @pytest.mark.parametrize("backward_inside", [False, True])
    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_autocast(self, norm, backward_inside):
        """Norms run in float32 there, or do not: as in the forward, wherever backward is."""
        model = gated(norm)

        def autocast(context):
            stack = contextlib.ExitStack()
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            stack.enter_context(context())
            return stack

        def backward(loss):
            with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
                loss.backward()

        for forward_context in (autocast, lambda context: context()):
            got, want = (
                run(model, model, inputs(), partial(forward_context, context), backward)
                for context in (recompute_activations, plain)
            )
            assert_bitwise(got, want)

    @pytest.mark.parametrize("enabled", [False, True])
    def test_calls_are_made_again_as_they_were(self, enabled, monkeypatch):
        def spied(x):
            if torch.overrides.has_torch_function_unary(x):
                return torch.overrides.handle_torch_function(spied, (x,), x)
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return F.silu(x)

        seen, model = [], gated(nn.LayerNorm, spied)
        monkeypatch.setattr("kernelab.lora.recompute._CHEAP", {spied})
        with recompute_activations(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(inputs().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
            torch.autograd.grad(out.sum(), model.up.lora_a["actor"], create_graph=True)
        assert seen == [(enabled, True), (enabled, False)]

    def test_dropout(self):
        model = gated(dropout=0.5)
        results = []
        for context in (recompute_activations, plain):
            torch.manual_seed(3)
            results.append(run(model, model, inputs(), context))
        assert_bitwise(*results)

    def test_retained_graph(self):
        model = gated()

        def twice(loss):
            loss.backward(retain_graph=True)
            loss.backward()

        assert_bitwise(*(run(model, model, inputs(), c, twice) for c in (recompute_activations, plain)))

    def test_backward_of_parts(self):
        """Some who share a recomputed tensor never ask for it."""
        model = gated()
        a, b = model.gate.lora_a["actor"], model.up.lora_a["actor"]
        grads = []
        for context in (recompute_activations, plain):
            with context():
                out = model(inputs().requires_grad_()).square().sum()
            grads.append([torch.autograd.grad(out, p, retain_graph=True)[0] for p in (a, b, a)])
        assert_bitwise([None, None, *grads[0]], [None, None, *grads[1]])

    def test_backward_in_threads(self):
        model = gated()
        want = run(model, model, inputs(), plain)

        def threaded(loss):
            threads = [threading.Thread(target=loss.backward, kwargs={"retain_graph": True}) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        got = run(model, model, inputs(), recompute_activations, threaded)
        for a, b in zip(got[1:], want[1:], strict=True):
            assert a is b is None or torch.equal(a, 4 * b)

    def test_forward_in_another_thread_saves_as_ever(self):
        model = gated()
        want = run(model, model, inputs(), plain)
        got = []
        with recompute_activations():
            thread = threading.Thread(target=lambda: got.extend(run(model, model, inputs(), plain)))
            thread.start()
            thread.join()
        assert_bitwise(got, want)

    def test_second_derivatives(self):
        grads = []
        for context in (recompute_activations, plain):
            model = gated(nn.LayerNorm, dtype=torch.float64)
            parameters = [p for p in model.parameters() if p.requires_grad]
            with context():
                out = model(inputs(torch.float64).requires_grad_())
            first = torch.autograd.grad((random(*out.shape) * out).sum(), parameters, create_graph=True)
            grads.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), parameters))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_compiled(self):
        torch._dynamo.reset()
        model = gated()
        compiled = torch.compile(model, backend="aot_eager")
        want = run(model, compiled, inputs(), plain)
        assert_bitwise(run(model, compiled, inputs(), recompute_activations), want)
        torch._dynamo.reset()
        assert_bitwise(run(model, compiled, inputs(), recompute_activations), want)


class TestRoles:
    @pytest.mark.parametrize("place", ["outside", "critic"])
    @pytest.mark.parametrize("order", ["role first", "recompute first"])
    @pytest.mark.parametrize("mode", MODES)
    def test_gradients_keep_their_role(self, mode, order, place):
        model = stack()
        model.mode = mode
        x = random(6, 3, WIDTH, seed=2)
        results = []
        for recompute in (recompute_activations, plain):
            contexts = [lambda: role(model, "actor"), recompute]

            def context(contexts=contexts):
                entered = contextlib.ExitStack()
                for one in contexts if order == "role first" else reversed(contexts):
                    entered.enter_context(one())
                return entered

            def backward(loss):
                with role(model, "critic") if place == "critic" else plain():
                    loss.backward()

            results.append(run(model, model, x, context, backward))
        assert_bitwise(*results)
        assert all(p.grad is None for name, p in model.named_parameters() if name.endswith("critic"))

    def test_streams(self):
        model = stack()
        x = random(6, 3, WIDTH, seed=2)

        def playing(recompute):
            entered = contextlib.ExitStack()
            entered.enter_context(streams(model, [None, "actor", "critic"]))
            entered.enter_context(recompute())
            return entered

        assert_bitwise(*(run(model, model, x, partial(playing, c)) for c in (recompute_activations, plain)))


class TestOtherHooks:
    def test_of_others_keep_their_effect(self):
        model = gated()
        want = saved_bytes(lambda: model(inputs().requires_grad_()))

        def forward():
            with recompute_activations():
                return model(inputs().requires_grad_())

        assert saved_bytes(forward) == want

        def on_cpu():
            entered = contextlib.ExitStack()
            entered.enter_context(save_on_cpu())
            entered.enter_context(recompute_activations())
            return entered

        assert_bitwise(run(model, model, inputs(), on_cpu), run(model, model, inputs(), plain))

    def test_of_itself(self):
        model = gated()

        def twice():
            entered = contextlib.ExitStack()
            entered.enter_context(recompute_activations())
            entered.enter_context(recompute_activations())
            return entered

        assert_bitwise(run(model, model, inputs(), twice), run(model, model, inputs(), plain))
        assert kept(model, inputs(), twice) == kept(model, inputs(), recompute_activations)

    def test_inside_a_transform_of_torch_func(self):
        model = gated()
        grads = []
        for context in (recompute_activations, plain):

            def loss(h, context=context):
                with context():
                    return model(h).square().sum()

            grads.append(torch.func.grad(loss)(inputs()))
        assert torch.equal(*grads)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_entered_in_a_checkpointed_function(self, reentrant):
        model = gated()

        def function(h):
            with recompute_activations():
                return model(h)

        want = run(model, model, inputs(), plain)
        checkpointed = partial(checkpoint, function, use_reentrant=reentrant)
        assert_bitwise(run(model, checkpointed, inputs(), plain), want)
        assert_bitwise(run(model, checkpointed, inputs(), recompute_activations), want)

    def test_stacks_are_left_as_they_were(self):
        with pytest.raises(RuntimeError, match="shape"), recompute_activations():
            gated()(inputs()[..., 1:])
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        assert not torch._C._is_torch_function_mode_enabled()


class Gate(nn.Module):
    """A LoRA layer of a product. ``write`` sees gate, up and product before the layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, HIDDEN)
        self.write = lambda gate, up, product: None

    def forward(self, h: Tensor) -> Tensor:
        gate, up = h * 2, h + 1
        product = F.silu(gate) * up
        self.write(gate, up, product)
        return self.linear(product)


class TestWritesInPlace:
    @pytest.mark.parametrize("write", ["gate", "up", "product"])
    @pytest.mark.parametrize("grad", [True, False])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_raise_or_change_nothing(self, write, grad, when):
        model = adapted(Gate(), ["linear"], torch.float32)
        written = {}

        def mul(**tensors):
            with torch.set_grad_enabled(grad):
                tensors[write].mul_(3)

        def remember(gate, up, product):
            written.update(gate=gate, up=up, product=product)
            if when == "before":
                mul(**written)

        def backward(loss):
            if when == "after":
                mul(**written)
            loss.backward()

        model.write = remember
        results = []
        for context in (recompute_activations, plain):
            try:
                results.append(run(model, model, inputs(), context, backward))
            except RuntimeError as error:
                results.append(str(error))
        got, want = results
        if not isinstance(want, str):
            assert_bitwise(got, want)
        elif write != "product":  # which is not needed when it is recomputed
            assert "modified by an inplace operation" in got

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_to_what_only_a_recomputed_tensor_reads(self, when):
        model = adapted(nn.Sequential(nn.Linear(D, D)), ["0"], torch.float32)

        def forward(h):
            half = h.to(torch.bfloat16)
            x = half.float()
            half.add_(1 if when == "before" else 0)
            out = model(x)
            half.add_(1 if when == "after" else 0)
            return out

        assert_bitwise(*(run(model, forward, inputs(), context) for context in (recompute_activations, plain)))

    def test_between_two_who_save_it(self):
        model = adapted(Gate(), ["linear"], torch.float32)

        def save_and_write(gate, up, product):
            F.silu(product)
            with torch.no_grad():
                product.mul_(3)

        model.write = save_and_write
        assert_bitwise(*(run(model, model, inputs(), context) for context in (recompute_activations, plain)))

    def test_to_a_recomputed_tensor_raises_for_those_who_share_it(self):
        class Scribble(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                return dy * ctx.saved_tensors[0].zero_()

        h = inputs().requires_grad_()
        with recompute_activations():
            x = F.silu(h * 2)
            outs = Scribble.apply(x), Scribble.apply(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum(outs).sum().backward()


class TestWhatIsNotRecomputed:
    def test_results_that_are_their_argument(self):
        model = adapted(nn.Sequential(nn.Linear(D, D)), ["0"], torch.float32)

        def forward(h):
            return model(F.silu(input=h.float().to(h.dtype).to(h)).to(h.dtype))

        assert_bitwise(*(run(model, forward, inputs(), context) for context in (recompute_activations, plain)))

    @pytest.mark.parametrize("step", [lambda x: x * 1.01, lambda x: F.silu(x) * x, lambda x: (x.view(-1) * 1.01)[:]])
    def test_the_whole_of_a_long_chain(self, step):
        grads = []
        for context in (recompute_activations, plain):
            h = random(4).requires_grad_()
            with context():
                x = h * 1
                for _ in range(2000):
                    x = step(x)
                x = F.silu(x) * x
            grads.append(torch.autograd.grad(x.sum(), h)[0])
        assert torch.equal(*grads)

    def test_what_would_keep_more_than_it_saves(self):
        """Nobody else keeps the float64 tensor, which is larger."""
        model = adapted(nn.Sequential(nn.Linear(D, D)), ["0"], torch.float32)

        def forward(h):
            return model((h.double() + 1).to(torch.float32))

        assert kept(forward, inputs(), recompute_activations) == kept(forward, inputs(), plain)

    def test_anything_after_the_block(self):
        with LiveBytes() as live:
            with recompute_activations():
                leaf = inputs().requires_grad_()
                out = 2 * (leaf * leaf + 1)
            assert live.current <= 2 * out.nbytes  # the leaf and the output

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
    @pytest.mark.parametrize(
        ("make", "function"),
        [
            (Tensor.to_sparse, lambda x: (x * x * 2).to_dense()),
            (Tensor.to_sparse_csr, lambda x: (x * 2).values() * (x * 2).values()),
            (lambda x: x.to("meta"), lambda x: F.silu(x) * x),
            (lambda x: x * (1 + 2j), lambda x: ((x * 2).conj() * (x * 2)).real + ((x * x).conj() * (x + 1)).imag),
            (lambda x: x * (1 + 2j), lambda x: (x * 1j).conj().imag * (x * 1j).conj().imag.exp()),
            (Tensor.clone, torch.vmap(lambda x: F.silu(x) * (x * 2))),
        ],
        ids=["sparse", "csr", "meta", "conjugate", "negative", "batched"],
    )
    def test_other_kinds_of_tensors(self, make, function):
        grads = []
        for context in (recompute_activations, plain):
            leaf = make(torch.ones(3, 3)).requires_grad_()
            with context():
                out = function(leaf)
            grads.append(torch.autograd.grad(out.sum(), leaf)[0])
        assert grads[0].shape == (3, 3)
        assert grads[0].is_meta or torch.equal(*(grad.to_dense() for grad in grads))

    def test_weights_that_fsdp_frees(self, process_group):
        from torch.distributed.fsdp import fully_shard

        results = []
        for context in (recompute_activations, plain):
            model = gated(nn.LayerNorm)
            fully_shard(model.norm)
            fully_shard(model)
            results.append(run(model, model, inputs(), context))
            results[-1][2:] = (grad if grad is None else grad.full_tensor() for grad in results[-1][2:])
        assert_bitwise(*results)


def test_a_function_mode_sees_a_lora_layer_as_one_call():
    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func.__qualname__)
            return func(*args, **(kwargs or {}))

    seen, layer = [], adapted(nn.Sequential(nn.Linear(D, D)), ["0"], torch.float32)
    with Seen(), Seen():
        out = layer(inputs_ := inputs())
    assert seen.count("LoRALayer.forward") == 2
    assert not any("flatten" in name for name in seen)
    assert torch.equal(out, layer(inputs_))
