"""One way to sample: nothing but what is asked for shapes it; prompts as their template renders them."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from helpers import EOS, PAD, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from trl_distill.data.sampling import Sampling, dataset_completion, prompt_ids, sample_ids, until_stop


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
HOW = Sampling(limit=12, stops=(EOS,), generations=2, seed=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1, "top_p": 0.1, "temperature": 0.1, "min_p": 0.9, "repetition_penalty": 9.0},
        {"suppress_tokens": list(range(3, 30))},
        {"begin_suppress_tokens": list(range(3, 30))},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"typical_p": 0.1},
        {"bad_words_ids": [[token] for token in range(3, 30)]},
        {"min_new_tokens": 12},
        {"min_length": 14},
        {"stop_strings": ["a", "b", "c"]},
        {"sequence_bias": [[[5], 99.0]]},
        {"no_repeat_ngram_size": 1},
        {"forced_eos_token_id": 5},
        {"forced_bos_token_id": 5},
        {"eos_token_id": list(range(3, 30))},
        {"max_new_tokens": 2},
        {"max_length": 5},
        {"max_time": 1e-9},
        {"guidance_scale": 9.0},
        {"epsilon_cutoff": 0.5},
        {"eta_cutoff": 0.5},
        {"top_h": 0.1},
        {"exponential_decay_length_penalty": (1, 9.0)},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 3},
        {"pad_token_id": 7},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_a_models_own_generation_settings_do_not_shape_samples(student, settings):
    plain = sample_ids(student, PROMPTS, PAD, HOW)
    for name, value in settings.items():
        setattr(student.generation_config, name, value)
    before = copy.deepcopy(student.generation_config.to_dict())
    assert sample_ids(student, PROMPTS, PAD, HOW) == plain
    assert student.generation_config.to_dict() == before


def test_what_is_asked_for_does(student):
    assert [len(found) for found in sample_ids(student, PROMPTS, PAD, HOW)] == [2, 2, 2]
    kept = {EOS, 5, 6}
    others = tuple(token for token in range(student.config.vocab_size) if token not in kept)
    few = sample_ids(student, PROMPTS, PAD, Sampling(12, (EOS,), seed=4, suppressed=others))
    assert {token for found in few for ids, _ in found for token in ids} <= kept
    narrow = Sampling(12, (EOS,), seed=4, top_p=1e-6)
    greedy = Sampling(12, (EOS,), temperature=0.0, seed=9)
    assert sample_ids(student, PROMPTS, PAD, narrow) == sample_ids(student, PROMPTS, PAD, greedy)


def test_random_numbers_go_on_as_if_nothing_was_drawn(student):
    random.seed(3)
    torch.manual_seed(3)
    expected = random.random(), torch.rand(2).tolist()
    random.seed(3)
    torch.manual_seed(3)
    sample_ids(student, PROMPTS, PAD, HOW)
    assert (random.random(), torch.rand(2).tolist()) == expected


@given(st.lists(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_a_completion_ends_with_its_first_stop(ids, stops):
    kept, truncated = until_stop(ids, tuple(stops))
    assert kept == ids[: len(kept)]
    assert not set(kept[:-1]) & stops
    assert truncated == (not set(ids) & stops)
    assert truncated or kept[-1] in stops


TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}z {% endif %}"
)
TOOLS = [{"name": "c"}, {"name": "d"}]


@pytest.mark.parametrize(
    ("tools", "expected"), [(None, "a z"), ([], "a z"), ("", "a z"), (TOOLS, "c d a z"), (json.dumps(TOOLS), "c d a z")]
)
def test_tools_of_a_row_reach_the_template(tools, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    row = {"prompt": [{"role": "user", "content": "a"}], "tools": tools}
    assert tokenizer.decode(prompt_ids(tokenizer, row["prompt"], None, row["tools"])) == expected
    row["completion"] = [{"role": "assistant", "content": "b"}]
    assert tokenizer.decode(dataset_completion(row, tokenizer, HOW).prompt).startswith(expected.removesuffix(" z"))
