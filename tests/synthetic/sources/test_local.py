"""Teachers in this process: right stop reasons, the same completions for the same seed, whatever went before."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import EOS, make_model, make_tokenizer

from trl_distill.data.sampling import until_stop
from trl_distill.synthetic.address import Address
from trl_distill.synthetic.records import Completion, Refusal
from trl_distill.synthetic.sources.base import Sampling
from trl_distill.synthetic.sources.load import check_source
from trl_distill.synthetic.sources.local import TransformersSource, VLLMSource


PROMPTS = ["a b c", "d", "e f g h i", "j k"]


@pytest.fixture
def folder(tmp_path):
    make_model(seed=3).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_same_seed_gives_the_same_completions(folder):
    source = TransformersSource(folder, Sampling(n=3, max_tokens=12), batch_size=2)
    first = source.complete(PROMPTS, 5)
    torch.manual_seed(99)
    assert source.complete(PROMPTS, 6) != first
    assert source.complete(PROMPTS, 5) == first
    assert [len(answer) for answer in first] == [3] * 4
    assert len({completion.text for answer in first for completion in answer}) > 8


def test_greedy_is_the_models_likeliest(folder):
    source = TransformersSource(folder, Sampling(max_tokens=6, temperature=0.0), batch_size=3)
    for prompt, answer in zip(PROMPTS, source.complete(PROMPTS, 0), strict=True):
        ids = source.tokenizer(prompt)["input_ids"]
        said: list[int] = []
        while len(said) < 6 and EOS not in said:
            logits = source.model(torch.tensor([ids + said])).logits[0, -1]
            said.append(int(logits.argmax()))
        text = source.tokenizer.decode([token for token in said if token != EOS], skip_special_tokens=True)
        assert answer == [Completion(text, "stop" if EOS in said else "length")]


def test_arguments_of_the_chat_template_reach_it(folder):
    chat = [{"role": "user", "content": "a"}]
    plain, other = (
        TransformersSource(folder, Sampling(max_tokens=8, temperature=0.0), template_kwargs=kwargs)
        for kwargs in (None, {"opening": "b c d"})
    )
    plain.tokenizer.chat_template = other.tokenizer.chat_template = "{{ opening }} {{ messages[0].content }}"
    assert plain.complete([chat], 0) == plain.complete(["a"], 0)
    assert other.complete([chat], 0) == plain.complete(["b c d a"], 0) != plain.complete([chat], 0)


def test_stop_reasons_follow_the_stop_tokens(folder):
    source = TransformersSource(folder, Sampling())
    assert source._read(*until_stop([5, 6, EOS, 7], source.stops)) == Completion(
        source.tokenizer.decode([5, 6]), "stop"
    )
    assert source._read(*until_stop([EOS], source.stops)) == Completion("", "stop")
    assert source._read(*until_stop([5, 6], source.stops)).stop_reason == "length"


def test_all_stop_tokens_of_the_generation_configuration_count(tmp_path):
    model = make_model(seed=3)
    model.generation_config.eos_token_id = [EOS, 7]
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    source = TransformersSource(str(tmp_path), Sampling())
    assert source._read(*until_stop([5, 7, 6], source.stops)) == Completion(source.tokenizer.decode([5]), "stop")


def test_only_stop_and_padding_tokens_are_left_out(folder):
    """Thoughts and tool calls are special tokens of many models, and part of what a verifier looks at."""
    source = TransformersSource(folder, Sampling())
    tags = ["<think>", "</think>", "<tool_call>"]
    source.tokenizer.add_special_tokens({"additional_special_tokens": tags})
    opening, closing, call = source.tokenizer.convert_tokens_to_ids(tags)
    pad = source.tokenizer.pad_token_id
    completion = source._read(*until_stop([opening, 5, closing, 6, call, 7, EOS, pad, pad], source.stops))
    words = [source.tokenizer.decode([token]) for token in (5, 6, 7)]
    assert completion.stop_reason == "stop"
    assert completion.text.replace(" ", "") == f"<think>{words[0]}</think>{words[1]}<tool_call>{words[2]}"
    assert source._read([opening, 5], True).text.replace(" ", "") == f"<think>{words[0]}"


def test_settings_of_the_checkpoint_do_not_reach_sampling(tmp_path):
    """A checkpoint that asks for top-k 1 would answer the same each time."""
    model = make_model(seed=3)
    model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=9.0)
    model.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    make_model(seed=3).save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    sampling = Sampling(n=4, max_tokens=12)
    found = [TransformersSource(str(tmp_path / name), sampling).complete(PROMPTS, 5) for name in ("other", "plain")]
    assert found[0] == found[1]


def test_prompts_that_do_not_fit_are_refused_alone(folder):
    source = TransformersSource(folder, Sampling(max_tokens=120))
    long, short = source.complete(["a " * 9, "a " * 8], 0)
    assert isinstance(long, Refusal)
    assert long.detail == "9 tokens of prompt and up to 120 of completion exceed 128 positions"
    assert not isinstance(short, Refusal)
    assert source.complete([""], 0)[0].kind == "prompt without tokens"


def test_teachers_that_are_not_there(folder, monkeypatch):
    check_source(Address("transformers", folder))
    with pytest.raises(ValueError, match="'nowhere' could not be found"):
        check_source(Address("transformers", "nowhere"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'vllm:x' needs vLLM"):
        check_source(Address("vllm", "x"))


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in with the part of vLLM's interface that is used."""
    calls = []

    class LLM:
        refusal = ValueError

        def __init__(self, model):
            self.model = model

        def _outputs(self, kind, prompts, params, use_tqdm):
            calls.append((kind, params))
            if any("long" in str(prompt) for prompt in prompts):
                raise self.refusal("too long")
            return [
                SimpleNamespace(
                    outputs=[SimpleNamespace(text=f"{p} {s.seed + i}", finish_reason="stop") for i in range(s.n)]
                )
                for p, s in zip(prompts, params, strict=True)
            ]

        def generate(self, prompts, sampling_params, *, use_tqdm):
            return self._outputs("generate", prompts, sampling_params, use_tqdm)

        def chat(self, messages, sampling_params, *, use_tqdm, chat_template_kwargs=None):
            outputs = self._outputs("chat", messages, sampling_params, use_tqdm)
            calls[-1] += (chat_template_kwargs,)
            return outputs

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **settings: SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def test_vllm_is_asked_by_its_documented_interface(vllm):
    source = VLLMSource("m", Sampling(n=2, max_tokens=9, temperature=0.5, top_p=0.9))
    assert source.complete(["a", "b"], 3)[1] == [Completion("b 4", "stop"), Completion("b 5", "stop")]
    assert vllm[0][0] == "generate"
    how = {"n": 2, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "skip_special_tokens": False}
    assert vars(vllm[0][1][0]) == how
    source.complete([[{"role": "user", "content": "a"}]], 0)
    assert vllm[1][0] == "chat"
    VLLMSource("m", Sampling(), {"enable_thinking": False}).complete([[{"role": "user", "content": "a"}]], 0)
    assert [call[2] for call in vllm[1:]] == [None, {"enable_thinking": False}]


@pytest.mark.parametrize("own_errors", [False, True])
def test_one_prompt_that_vllm_refuses_does_not_hurt_the_others(vllm, monkeypatch, own_errors):
    """vLLM raised `ValueError` at first, and has exceptions of its own since."""
    refusal = ValueError
    if own_errors:
        refusal = type("VLLMValidationError", (Exception,), {})
        module = ModuleType("vllm.exceptions")
        module.VLLMClientError = refusal
        monkeypatch.setitem(sys.modules, "vllm.exceptions", module)
    monkeypatch.setattr(sys.modules["vllm"].LLM, "refusal", refusal)
    source = VLLMSource("m", Sampling())
    found = source.complete(["a", "long", "b"], 3)
    assert found[1] == Refusal("refused by vLLM", "too long")
    assert (found[0], found[2]) == ([Completion("a 3", "stop")], [Completion("b 5", "stop")])
