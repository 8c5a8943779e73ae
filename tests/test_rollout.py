"""Padding, end of sequence and KV cache change nothing about what a completion is or how likely it is."""

import pytest
import torch
from tiny_models import llama

from peft_ops.nn.head import head_of
from peft_ops.rlhf.rollout import IGNORED, completion_hidden, pad, sample

PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4, 5]]
COMPLETIONS = [[1, 2, 3, 4], [9], [6, 0]]
END = 0


@pytest.fixture(scope="module")
def model():
    return llama().eval()


def log_probs(model, batch):
    return head_of(model).log_probs(completion_hidden(model, batch), batch.targets).logp


def test_padding_is_on_the_outside():
    batch = pad(PROMPTS, COMPLETIONS)
    assert batch.prompt_mask.tolist() == [[False] * 4 + [True], [True] * 5, [False] * 2 + [True] * 3]
    assert batch.mask.tolist() == [[True] * 4, [True] + [False] * 3, [True] * 2 + [False] * 2]
    assert batch.targets[1].tolist() == [9, IGNORED, IGNORED, IGNORED]
    assert batch.lists() == COMPLETIONS
    assert batch[1:].lists() == COMPLETIONS[1:]
    with pytest.raises(ValueError, match="at least one token"):
        pad([[]], [[1]])


@torch.no_grad()
def test_log_probs_do_not_depend_on_the_company(model):
    together = log_probs(model, pad(PROMPTS, COMPLETIONS))
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        alone = log_probs(model, pad([prompt], [completion]))
        torch.testing.assert_close(together[i, : len(completion)], alone[0], rtol=1e-4, atol=1e-5)
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(alone[0], expected, rtol=1e-4, atol=1e-5)
        assert together[i, len(completion) :].eq(0).all()


@torch.no_grad()
def test_the_likeliest_tokens_are_those_of_the_whole_forward(model):
    batch = pad(PROMPTS, [[]] * 3)
    found = sample(model, batch.prompts, batch.prompt_mask, 6, end=-1, temperature=0)
    for prompt, completion in zip(PROMPTS, found.lists(), strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        assert completion == tokens[len(prompt) :]


def test_a_completion_ends_with_its_end_token(model):
    batch = pad([PROMPTS[1]] * 64, [[]] * 64)
    draw = lambda seed: sample(
        model, batch.prompts, batch.prompt_mask, 100, END, 1.0, torch.Generator().manual_seed(seed)
    )
    found = draw(0)
    completions = found.lists()
    assert any(END in completion for completion in completions)
    for completion, row, mask in zip(completions, found.completions, found.mask, strict=True):
        assert END not in completion[:-1]
        assert len(completion) == 100 or completion[-1] == END or len(completion) == found.mask.shape[1]
        assert mask.tolist() == [True] * len(completion) + [False] * (len(row) - len(completion))
        assert (found.targets[0][~found.mask[0]] == IGNORED).all()
    assert len({tuple(completion) for completion in completions}) > 32
    assert torch.equal(found.completions, draw(0).completions)
    assert not torch.equal(found.completions, draw(1).completions)


@torch.no_grad()
def test_draws_follow_the_model(model):
    batch = pad([PROMPTS[1]] * 4000, [[]] * 4000)
    found = sample(model, batch.prompts, batch.prompt_mask, 1, END, 0.7, torch.Generator().manual_seed(0))
    p = (model(input_ids=torch.tensor([PROMPTS[1]])).logits[0, -1] / 0.7).softmax(-1)
    share = torch.bincount(found.completions[:, 0], minlength=len(p)) / 4000
    assert (share - p).abs().max() < 5 * (p.max() / 4000).sqrt()


@pytest.mark.parametrize(("temperature", "most"), [(-1, 4), (1.0, 0)])
def test_what_cannot_be_sampled_is_refused(model, temperature, most):
    batch = pad(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match="temperature must be"):
        sample(model, batch.prompts, batch.prompt_mask, most, END, temperature)


def test_a_completion_does_not_end_before_its_least_length(model):
    batch = pad([PROMPTS[1]] * 64, [[]] * 64)
    found = sample(
        model, batch.prompts, batch.prompt_mask, 60, END, generator=torch.Generator().manual_seed(0), min_new_tokens=9
    )
    lengths = [len(completion) for completion in found.lists()]
    assert min(lengths) >= 10  # the end token comes after them
    assert min(lengths) < 60
    assert all(END not in completion[:9] for completion in found.lists())
