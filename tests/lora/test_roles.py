"""Every gradient is that of the role of its forward, wherever and however backward runs."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from kernelab._core.memory import LiveBytes
from kernelab.lora import LoRAConfig, RoleError, UnknownRoleError, inject, off, role, streams

from .models import MODES, TARGETS, WIDTH, Block, dense, gradients, stack

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = random(6, 3, WIDTH, seed=2), random(6, 3, WIDTH, seed=3)
DY_ACTOR, DY_CRITIC, DY_OFF = (random(6, 3, WIDTH, seed=seed) for seed in (4, 5, 6))


def expected(model, *terms) -> dict[str, torch.Tensor]:
    """Gradients of sum <cotangent, dense model of the role at x>, role by role."""
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    loss = sum((cotangent * dense(model, name, x)).sum() for name, x, cotangent in terms)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_gradients(model, want) -> None:
    got = gradients(model)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


def anywhere(model, place: str, backward) -> None:
    """Runs ``backward`` outside, inside a role, or in another thread."""
    if place == "thread":
        errors = []

        def run():
            try:
                backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not errors, errors
        return
    context = {"off": lambda: off(model), "outside": contextlib.nullcontext}.get(place, lambda: role(model, place))
    with context():
        backward()


PLACES = ["outside", "actor", "critic", "off", "thread"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_joint_backward_is_that_of_two_dense_models(mode, place):
    model = stack()
    model.mode = mode
    with role(model, "actor"):
        logits = model(X)
    with role(model, "critic"):
        values = model(Y)
    with off(model), torch.no_grad():
        assert torch.equal(model(X), dense(model, None, X))
    loss = (DY_ACTOR * logits).sum() + (DY_CRITIC * values).sum()
    anywhere(model, place, loss.backward)
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR), ("critic", Y, DY_CRITIC)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_streams_give_each_chunk_its_adapter(mode, place):
    model = stack()
    model.mode = mode
    x, dy = torch.cat([X, X, Y]), torch.cat([DY_OFF, DY_ACTOR, DY_CRITIC])
    with streams(model, [None, "actor", "critic"]):
        out = model(x)
    torch.testing.assert_close(out[:6], dense(model, None, X), rtol=1e-12, atol=1e-12)
    anywhere(model, place, (dy * out).sum().backward)
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR), ("critic", Y, DY_CRITIC)))


def test_off_rows_of_a_mixed_forward_are_as_exact_as_the_base():
    exact = dense(stack(), None, X)
    model = stack().float()
    plain = dense(model, None, X.float())
    with streams(model, ["actor", None, "critic"]):
        mixed = model(X.float().repeat(3, 1, 1))[len(X) : 2 * len(X)]
    four_ulp = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (mixed - exact).abs().max() <= (plain - exact).abs().max() + four_ulp


@pytest.mark.parametrize("mode", MODES)
def test_off_gives_adapters_no_gradient_but_inputs_one(mode):
    model = stack()
    model.mode = mode
    x = X.clone().requires_grad_()
    with off(model):
        out = model(x)
    with role(model, "actor"):
        (DY_OFF * out).sum().backward()
    assert all(grad is None for grad in gradients(model).values())
    z = X.clone().requires_grad_()
    (want,) = torch.autograd.grad((DY_OFF * dense(model, None, z)).sum(), z)
    torch.testing.assert_close(x.grad, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", ["outside", "off", "thread"])
@pytest.mark.parametrize("mode", MODES)
def test_one_adapter_needs_no_role(mode, place):
    model = stack({"actor": LoRAConfig(r=2, alpha=3)})
    model.mode = mode
    out = model(X)
    with off(model):
        reference = model(Y)  # with gradients: its recomputation must not take the default
    loss = (DY_ACTOR * out).sum() + (DY_OFF * reference).sum()
    anywhere(model, place, loss.backward)
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR)))


@pytest.mark.parametrize("mode", MODES)
def test_two_backwards_through_one_retained_graph(mode):
    model = stack()
    model.mode = mode
    with role(model, "actor"):
        out = model(X)
    with role(model, "critic"):
        (DY_ACTOR * out).sum().backward(retain_graph=True)
    with off(model):
        (DY_CRITIC * out).sum().backward()
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR + DY_CRITIC)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode[0] != "r" and "/r" not in mode])
def test_autograd_grad(mode):
    model = stack()
    model.mode = mode
    with role(model, "actor"):
        out = model(X)
    named = {name: p for name, p in model.named_parameters() if "lora_" in name}
    with role(model, "critic"):
        got = torch.autograd.grad((DY_ACTOR * out).sum(), list(named.values()), allow_unused=True)
    for value, want in zip(got, expected(model, ("actor", X, DY_ACTOR)).values(), strict=True):
        assert (value is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", ["outside", "actor", "critic"])
@pytest.mark.parametrize("mode", ["plain", "nonreentrant", "nonreentrant/nonreentrant"])
def test_second_derivatives(mode, place):
    model = stack()
    model.mode = mode
    parameters = [p for name, p in model.named_parameters() if name.endswith("actor")]

    def product(out, context=contextlib.nullcontext):
        with context():
            grads = torch.autograd.grad((DY_ACTOR * out.square()).sum(), parameters, create_graph=True)
            return torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)

    want = product(dense(model, "actor", X))
    with role(model, "actor"):
        out = model(X)
    got = product(out, contextlib.nullcontext if place == "outside" else lambda: role(model, place))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("order", ["role first", "hooks first"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_other_hooks_keep_their_effect_and_roles_their_gradient(mode, order, adapters):
    configs = {"actor": LoRAConfig(r=2, alpha=3), "critic": LoRAConfig(r=2)}
    model = stack(dict(list(configs.items())[:adapters]))
    model.mode = mode
    seen, loss = [], 0

    def pack(tensor):
        seen.append(tensor)
        return tensor.detach().clone()

    hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
    for name, x in (("actor", X), (None, Y)):
        chosen = role(model, name) if name else off(model)
        first, second = (chosen, hooks) if order == "role first" else (hooks, chosen)
        with first, second:
            out = model(x)
        loss = loss + ((DY_ACTOR if name else DY_OFF) * out).sum()
    assert seen or mode == "keywords"  # which saves nothing outside its checkpoints
    with off(model):
        loss.backward()
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR)))


def test_save_on_cpu_inside_a_role():
    model = stack()
    with role(model, "actor"), save_on_cpu():
        out = model(X)
    (DY_ACTOR * out).sum().backward()
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("configs", [1, 2])
def test_roles_entered_inside_the_checkpointed_function(reentrant, configs):
    model = stack(dict(list({"actor": LoRAConfig(r=2, alpha=3), "critic": LoRAConfig(r=2)}.items())[:configs]))
    first, second = model.stages[0]
    x = X.clone().requires_grad_()

    def function(x):
        with role(model, "actor"):
            h = first(x)
        with off(model):
            return second(torch.tanh(h))

    with off(model):
        out = checkpoint(function, x, use_reentrant=reentrant)
    with off(model):
        (DY_ACTOR * out).sum().backward()
    got = gradients(model)
    model.zero_grad()
    (DY_ACTOR * function(X.clone().requires_grad_())).sum().backward()
    assert sum(grad is not None for grad in got.values()) == 6
    for name, want in gradients(model).items():
        assert (want is None) == (got[name] is None)
        if want is not None:
            torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_default_and_off_in_one_checkpointed_function(reentrant):
    """What an inner role saved must not decide how the rest of the function is recomputed."""
    model = stack({"actor": LoRAConfig(r=2, alpha=3)})
    first, second = model.stages[0]

    def function(x):
        h = first(x)
        with off(model):
            return second(torch.tanh(h))

    grads = []
    for run in (function, lambda x: checkpoint(function, x, use_reentrant=reentrant)):
        model.zero_grad()
        (DY_ACTOR * run(X.clone().requires_grad_())).sum().backward()
        grads.append([grad for grad in gradients(model).values() if grad is not None])
    assert len(grads[0]) == 6
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_two_models_with_their_own_roles(mode):
    inner, outer = stack(seed=0), stack(seed=7)
    inner.mode = outer.mode = mode
    with role(outer, "critic"):
        with role(inner, "actor"):
            out = outer(torch.tanh(inner(X)))
        with off(outer):
            off_out = outer(Y)
        with pytest.raises(RoleError, match="no role entered"):
            inner(X)
    loss = (DY_ACTOR * out).sum() + (DY_OFF * off_out).sum()
    with role(inner, "critic"), role(outer, "actor"):
        loss.backward()
    named = {(m, n): p for m in (inner, outer) for n, p in m.named_parameters() if "lora_" in n}
    want = (DY_ACTOR * dense(outer, "critic", torch.tanh(dense(inner, "actor", X)))).sum()
    for (m, n), value in zip(named, torch.autograd.grad(want, list(named.values()), allow_unused=True), strict=True):
        got = gradients(m)[n]
        assert (got is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_forward_threads_have_their_own_roles(mode):
    model = stack()
    model.mode = mode
    outs, barrier = {}, threading.Barrier(2)

    def run(name, x):
        with role(model, name):
            barrier.wait()
            outs[name] = model(x)
            barrier.wait()

    threads = [threading.Thread(target=run, args=pair) for pair in (("actor", X), ("critic", Y))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with off(model):
        ((DY_ACTOR * outs["actor"]).sum() + (DY_CRITIC * outs["critic"]).sum()).backward()
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR), ("critic", Y, DY_CRITIC)))


def test_without_early_stop():
    model = stack()
    model.mode = "nonreentrant/nonreentrant"
    with set_checkpoint_early_stop(False), role(model, "actor"):
        out = model(X)
    (DY_ACTOR * out).sum().backward()
    assert_gradients(model, expected(model, ("actor", X, DY_ACTOR)))


def test_a_side_branch_that_recomputes_first_raises_rather_than_guesses():
    """The only node that unpacks comes before every LoRA layer, and the checkpoint saved no argument."""
    model = stack()
    block, scale = model.stages[0][0], nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def function(x):
        side = torch.exp(x * scale)
        return side, block(x)

    with role(model, "critic"):
        side, _ = checkpoint(function, x=X, use_reentrant=False)
    with pytest.raises(RoleError, match="inside a backward"):
        side.sum().backward()


def test_a_role_inside_does_not_decide_for_the_function_around_it():
    """The checkpoint saved no argument, and the node that recomputes it was made in the inner role."""
    model = stack()
    first, second = model.stages[0]

    def function(x):
        with role(model, "critic"):
            h = first(x)
        return second(torch.tanh(h))[..., :0].sum() + torch.exp(h)

    grads = []
    for run in (function, lambda x: checkpoint(function, x=x, use_reentrant=False)):
        model.zero_grad()
        with role(model, "actor"):
            out = run(X.clone().requires_grad_())
        with off(model):
            (DY_ACTOR * out).sum().backward()
        grads.append({name: grad for name, grad in gradients(model).items() if grad is not None})
    assert len(grads[0]) == 12
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


def test_a_role_of_another_model_does_not_hide_that_the_own_one_is_unknown():
    model, other = stack({"actor": LoRAConfig(r=2)}), stack()
    block, scale = model.stages[0][0], nn.Parameter(torch.ones(WIDTH, dtype=torch.float64))

    def function(x):
        side = torch.exp(x * scale)
        with role(other, "critic"):
            return side, block(x)

    with off(model):
        side, _ = checkpoint(function, x=X.clone().requires_grad_(), use_reentrant=False)
    with pytest.raises(RoleError, match="inside a backward"):
        side.sum().backward()


def test_dropout_is_repeated_by_recomputation():
    configs = {"actor": LoRAConfig(r=2, dropout=0.5), "critic": LoRAConfig(r=2, dropout=0.25)}
    grads = []
    for mode in ("plain", "reentrant", "nonreentrant"):
        model = stack(configs)
        model.mode = mode
        torch.manual_seed(11)
        with streams(model, ["actor", "critic", None]):
            out = model(X)
        (DY_ACTOR * out).sum().backward()
        grads.append(gradients(model))
    assert grads[0].keys() == grads[1].keys() == grads[2].keys()
    for name, value in grads[0].items():
        for other in grads[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-12)
    with role(model, "actor"):
        assert not torch.equal(model(X), model(X))
        model.eval()
        assert torch.equal(model(X), model(X))


def test_in_place_changes_between_forward_and_backward_raise_as_in_torch():
    model = stack()
    for change in ("activation", "adapter"):
        x = X.clone().requires_grad_()
        with role(model, "actor"):
            h = torch.tanh(model(x))
        with torch.no_grad():
            h.mul_(2) if change == "activation" else model.stages[1][1].down.lora_a["actor"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            h.sum().backward()


@pytest.mark.parametrize("mode", ["plain", "nonreentrant"])
def test_a_role_keeps_no_more_memory_and_frees_it_at_once(mode):
    model = stack({"actor": LoRAConfig(r=2)})
    model.mode = mode
    with LiveBytes():
        model(X)  # what the first call keeps for good
    live = []
    gc.collect()
    gc.disable()
    try:
        for context in (contextlib.nullcontext(), role(model, "actor")):
            with LiveBytes() as memory, context:
                out = torch.exp(model(X))  # exp saves its own output
            live.append((memory.current, memory.peak))
            del out
            assert memory.current == 0
    finally:
        gc.enable()
    assert live[0] == live[1] > (0, 0)


def test_hooks_stack_is_left_as_it_was():
    model = stack()
    model.mode = "nonreentrant"
    top = torch._C._autograd._top_saved_tensors_default_hooks
    with pytest.raises(RuntimeError, match="shape"), role(model, "actor"), off(model):
        model(X[..., 1:])
    assert top(False) is None
    with role(model, "actor"):
        out = model(X)
    out.sum().backward()
    assert top(False) is None


class TestErrors:
    def test_no_role_and_several_adapters(self):
        with pytest.raises(RoleError, match=r"'actor', 'critic'.*role"):
            stack()(X)

    @pytest.mark.parametrize("name", ["aktor", None, 3, ["actor"]])
    def test_unknown_role(self, name):
        with pytest.raises(UnknownRoleError, match="'actor', 'critic'"):
            role(stack(), name)
        if name is not None:
            with pytest.raises(ValueError, match=r"roles\[1\].*'actor', 'critic'"):
                streams(stack(), [None, name])

    def test_streams_take_a_list(self):
        with pytest.raises(TypeError, match="'roles'"):
            streams(stack(), "actor")
        with pytest.raises(ValueError, match="'roles'"):
            streams(stack(), [])

    def test_model_without_adapters(self):
        for enter in (off, lambda model: role(model, "actor"), lambda model: streams(model, [None])):
            with pytest.raises(RoleError, match="no adapters"):
                enter(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="'model'"):
            off("model")

    def test_two_injected_models_in_one(self):
        both = nn.ModuleList([stack(), stack()])
        with pytest.raises(RoleError, match="2 injected models"):
            role(both, "actor")

    def test_a_second_injected_model_that_came_later(self):
        both = nn.ModuleList([stack(), nn.Sequential(nn.Linear(2, 2))])
        role(both, "actor")
        inject(both[1], {"actor": LoRAConfig()}, ["0"])
        with pytest.raises(RoleError, match="2 injected models"):
            role(both, "actor")

    def test_a_role_that_was_carried_to_another_thread(self):
        model = stack({"actor": LoRAConfig()})
        with off(model), ThreadPoolExecutor() as pool:
            call = pool.submit(contextvars.copy_context().run, model, X)
        with pytest.raises(RoleError, match="another thread"):
            call.result()

    def test_nothing_inside_streams(self):
        model = stack()
        with streams(model, [None, "actor"]):
            for enter in (off, lambda model: role(model, "actor"), lambda model: streams(model, [None])):
                with pytest.raises(RoleError, match="inside streams"), enter(model):
                    pass
            with off(stack()):
                pass
            model(X)

    @pytest.mark.parametrize("shape", [(5, 3, WIDTH), (WIDTH,)])
    def test_streams_that_do_not_divide(self, shape):
        model = inject(Block().double(), {"actor": LoRAConfig()}, TARGETS)
        with streams(model, [None, "actor"]), pytest.raises(RoleError, match="divide by the 2 roles"):
            model(random(*shape))


def test_inner_role_wins_and_the_outer_returns():
    model = stack()
    with role(model, "actor"):
        before = model(X)
        with role(model, "critic"):
            assert torch.allclose(model(X), dense(model, "critic", X))
            with off(model):
                assert torch.equal(model(X), dense(model, None, X))
        assert torch.equal(model(X), before)
        assert torch.allclose(before, dense(model, "actor", X))


def test_off_is_bitwise_the_base_in_every_form():
    model = stack()
    want = dense(model, None, X)
    with off(model):
        assert torch.equal(model(X), want)
    with streams(model, [None, None]):
        assert torch.equal(model(X), want)
