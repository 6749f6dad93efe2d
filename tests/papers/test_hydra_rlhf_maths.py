"""PPO's formulas against plain loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernelab.papers.hydra_rlhf import ppo
from kernelab.papers.hydra_rlhf.evaluate import difference, token_f1
from kernelab.papers.hydra_rlhf.sft import pair_loss

B, R, V, D = 5, 7, 11, 6


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def mask():
    lengths = torch.tensor([7, 1, 4, 6, 2])
    return torch.arange(R) < lengths[:, None]


def real(mask):
    return [(b, t) for b in range(B) for t in range(R) if mask[b, t]]


def test_advantages_are_the_discounted_sum_of_errors(draw, mask):
    rewards, values = draw(B, R), draw(B, R)
    gamma, lam = 0.9, 0.8
    advantage, returns = ppo.advantages(rewards * mask, values, mask, gamma, lam)
    for b in range(B):
        length = int(mask[b].sum())
        value = [*values[b, :length].tolist(), 0.0]
        error = [float(rewards[b, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * error[k] for k in range(t, length))
            assert advantage[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + value[t], abs=1e-12)
    assert not advantage[~mask].any()
    assert not returns[~mask].any()


def test_with_lambda_one_the_return_is_the_discounted_reward_to_come(draw, mask):
    rewards = draw(B, R) * mask
    _, returns = ppo.advantages(rewards, draw(B, R), mask, 0.9, 1.0)
    for b, t in real(mask):
        expected = sum(0.9 ** (k - t) * rewards[b, k].item() for k in range(t, R))
        assert returns[b, t].item() == pytest.approx(expected, abs=1e-12)


def test_padding_changes_nothing(draw, mask):
    rewards, values = draw(B, R) * mask, draw(B, R)
    advantage, _ = ppo.advantages(rewards, values, mask, 0.99, 0.95)
    garbage = torch.where(mask, values, torch.full_like(values, 1e6))
    assert torch.equal(ppo.advantages(rewards, garbage, mask, 0.99, 0.95)[0], advantage)


def test_policy_loss_and_its_gradient(draw, mask):
    old, advantage = draw(B, R), draw(B, R)
    logprob = (old + 0.4 * draw(B, R)).requires_grad_()
    loss, clipped = ppo.policy_loss(logprob, old, advantage, mask, 0.2)
    total, count, gradient = 0.0, 0, torch.zeros(B, R, dtype=torch.float64)
    for b, t in real(mask):
        ratio, a = math.exp((logprob[b, t] - old[b, t]).item()), float(advantage[b, t])
        total += -min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        if (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8):
            count += 1
        else:
            gradient[b, t] = -a * ratio
    n = int(mask.sum())
    assert 0 < count < n
    assert loss.item() == pytest.approx(total / n, abs=1e-12)
    assert clipped.item() == pytest.approx(count / n)
    loss.backward()
    torch.testing.assert_close(logprob.grad, gradient / n, rtol=0, atol=1e-12)


def test_value_loss_and_its_gradient(draw, mask):
    old, returns = draw(B, R), draw(B, R)
    value = (old + 0.4 * draw(B, R)).requires_grad_()
    loss = ppo.value_loss(value, old, returns, mask, 0.2)
    total, gradient, kinds = 0.0, torch.zeros(B, R, dtype=torch.float64), set()
    for b, t in real(mask):
        v, o, r = value[b, t].item(), old[b, t].item(), returns[b, t].item()
        plain, clipped = (v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2
        total += 0.5 * max(plain, clipped)
        kinds.add((plain > clipped, plain < clipped))
        if plain >= clipped:
            gradient[b, t] = v - r
    assert len(kinds) == 3
    assert loss.item() == pytest.approx(total / int(mask.sum()), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(value.grad * mask.sum(), gradient, rtol=0, atol=1e-12)


def test_whitening(draw, mask):
    x = 3 * draw(B, R) + 2
    white = ppo.whiten(x, mask)
    kept = white[mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-12)
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-7)
    assert not white[~mask].any()
    shifted = ppo.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(shifted[mask] - x[mask].mean(), kept)
    assert not shifted[~mask].any()


@pytest.mark.parametrize("value", [0.0, 0.1, 2.5, -1e4 / 3, 7.7e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_equal_numbers_gives_zeros(value, dtype, mask):
    assert not ppo.whiten(torch.full((B, R), value, dtype=dtype), mask).any()
    many = torch.ones(1009, 31, dtype=torch.bool)
    assert not ppo.whiten(torch.full(many.shape, value, dtype=dtype), many).any()
    one = torch.zeros_like(mask)
    one[2, 3] = True
    assert not ppo.whiten(torch.full((B, R), value, dtype=dtype), one).any()


def test_kl_estimates(draw, mask):
    logprob, reference = draw(B, R), draw(B, R)
    first, third = (ppo.kl_estimates(logprob, reference, estimator) for estimator in ("k1", "k3"))
    for b, t in real(mask):
        gap = float(reference[b, t] - logprob[b, t])
        assert first[b, t].item() == pytest.approx(-gap, abs=1e-12)
        assert third[b, t].item() == pytest.approx(math.exp(gap) - 1 - gap, abs=1e-12)
    assert (third >= 0).all()
    logits, other = draw(V).log_softmax(0), draw(V).log_softmax(0)
    exact = (logits.exp() * (logits - other)).sum()
    for estimator in ("k1", "k3"):  # both are right in the mean over the policy's tokens
        torch.testing.assert_close((logits.exp() * ppo.kl_estimates(logits, other, estimator)).sum(), exact)
    close = torch.tensor([1e-6]).log()
    assert ppo.kl_estimates(close, close + 1e-4, "k3").item() == pytest.approx(5e-9, rel=0.1)


def test_running_moments_are_those_of_all_numbers(draw):
    batches = [3 * draw(size) + 2 for size in (4, 1, 9)]
    moments = ppo.RunningMoments()
    for count in range(1, 4):
        seen = torch.cat(batches[:count])
        other = ppo.RunningMoments()
        other.load_state_dict(moments.state_dict())
        found = moments.normalize(batches[count - 1])
        expected = (batches[count - 1] - seen.mean()) / seen.std(unbiased=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert torch.equal(other.normalize(batches[count - 1]), found)
    assert not ppo.RunningMoments().normalize(torch.full((7,), 0.1)).any()


@pytest.mark.parametrize(("kl", "factor"), [(-3, 0.9), (4.8, 0.9), (5.4, 0.95), (6, 1), (6.9, 1.075), (99, 1.1)])
def test_the_coefficient_follows_the_kl(kl, factor):
    """Within a fifth of the target in proportion, beyond it by no more; here 50 of 100 answers, so by half of that."""
    coefficient, fixed = ppo.KLCoefficient(0.3, 6.0, 100), ppo.KLCoefficient(0.3, None, 100)
    for times in (1, 2):
        coefficient.update(kl, 50)
        fixed.update(kl, 50)
        assert coefficient.value == pytest.approx(0.3 * factor**times, rel=1e-14)
    assert fixed.value == 0.3
    other = ppo.KLCoefficient(0.3, 6.0, 100)
    other.load_state_dict(coefficient.state_dict())
    assert other.value == coefficient.value


def test_token_rewards(draw, mask):
    reward, logprob, reference = draw(B), draw(B, R), draw(B, R)
    found = ppo.token_rewards(reward, logprob - reference, mask, 0.3)
    for b in range(B):
        last = int(mask[b].sum()) - 1
        for t in range(R):
            expected = -0.3 * float(logprob[b, t] - reference[b, t]) * bool(mask[b, t]) + float(reward[b]) * (t == last)
            assert found[b, t].item() == pytest.approx(expected, abs=1e-12)


class DoublingLinear(torch.nn.Linear):
    """A head that is more than its weight, as one with an adapter is."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "factor"), [(torch.nn.Linear, 1), (DoublingLinear, 2)])
def test_token_logprobs(draw, kind, factor):
    hidden = draw(B, R, D).float().requires_grad_()
    head = kind(D, V, bias=False)
    tokens = torch.randint(V, (B, R), generator=torch.Generator().manual_seed(1))
    logprob, entropy = ppo.token_logprobs(hidden, head, tokens, temperature=0.7)
    everything = F.log_softmax(factor * hidden.double() @ head.weight.double().T / 0.7, -1)
    expected = everything.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(everything.exp() * everything).sum(-1), rtol=0, atol=1e-5)
    cotangent = draw(B, R)
    (found,) = torch.autograd.grad(logprob, hidden, cotangent.float())
    (wanted,) = torch.autograd.grad(expected, hidden, cotangent)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_pair_loss(draw):
    chosen, rejected = draw(B).requires_grad_(), draw(B)
    loss = pair_loss(chosen, rejected)
    margins = (chosen - rejected).tolist()
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / B)
    loss.backward()
    expected = [-1 / (1 + math.exp(margin)) / B for margin in margins]
    assert chosen.grad.tolist() == pytest.approx(expected)
    assert pair_loss(torch.tensor([-200.0]), torch.tensor([0.0])).item() == pytest.approx(200)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Return the path.", "return the PATH", 1.0),
        ("the the the", "the path", 2 / 5),
        ("a b c", "c d", 2 / 5),
        ("", "the path", 0.0),
        ("...", "", 1.0),
        ("set_path", "set path", 1.0),
    ],
)
def test_token_f1(answer, truth, expected):
    assert token_f1(answer, truth) == pytest.approx(expected)


def test_difference(draw):
    after, before = draw(40) + 1, draw(40)
    found = difference(after, before)
    gains = (after - before).tolist()
    mean = sum(gains) / 40
    assert found.mean == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(sum((gain - mean) ** 2 for gain in gains) / 39 / 40))
    assert found.in_errors == pytest.approx(found.mean / found.error)
    assert difference(before, before).in_errors == 0
    assert difference(before + 1, before).in_errors > 1e6
