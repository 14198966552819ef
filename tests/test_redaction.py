"""Secrets: recognised by name, URL or form, left out of all that is written, and read from the environment."""

from __future__ import annotations

import copy
import io
import json
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from helpers import config
from hypothesis import given
from hypothesis import strategies as st

from trl_distill import OPDTrainer
from trl_distill.redaction import from_environment, redacted
from trl_distill.teachers.spec import read_specs


SECRET = "hunter2-Zq8"


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        ({"token": SECRET}, {"token": "***"}),
        ({"use_auth_token": SECRET}, {"use_auth_token": "***"}),
        ({"headers": {"Authorization": f"Bearer {SECRET}"}}, {"headers": {"Authorization": "***"}}),
        ({"X-Api-Key": SECRET, "apiKey": SECRET}, {"X-Api-Key": "***", "apiKey": "***"}),
        ({"note": f"Bearer {SECRET}"}, {"note": "Bearer ***"}),
        ({"password": 12345}, {"password": "***"}),
        ({"auth": ["me", SECRET]}, {"auth": ["***", "***"]}),
        ([f"http://me:{SECRET}@host:8000/v1"], ["http://***@host:8000/v1"]),
        ({"proxies": {"https": f"http://me:{SECRET}@proxy"}}, {"proxies": {"https": "http://***@proxy"}}),
        (f"https://host/v1?api_key={SECRET}&n=2", "https://host/v1?api_key=***&n=2"),
        ("the key hf_abcdefghijklmnopqrst", "the key ***"),
        # no secrets
        ({"token": True, "trust_remote_code": False}, {"token": True, "trust_remote_code": False}),
        ({"eos_token": "<eos>", "max_tokens": 5}, {"eos_token": "<eos>", "max_tokens": 5}),
        ({"token": "$HF_TOKEN"}, {"token": "$HF_TOKEN"}),
        ({"keyboard": "a", "monkey": "b"}, {"keyboard": "a", "monkey": "b"}),
        ({"token": None, "password": ""}, {"token": None, "password": ""}),
    ],
)  # fmt: skip
def test_what_is_a_secret(setting, shown):
    before = copy.deepcopy(setting)
    assert redacted(setting) == shown
    assert setting == before


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_1"


@dataclass(frozen=True)
class Login:
    user: str
    api_key: str


class Pair(NamedTuple):
    user: str
    token: str


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        # names
        *[
            ({name: SECRET}, {name: "***"})
            for name in [
                *["sig", "signature", "jwt", "pat", "auth_header", "tokens", "api_key_1", "hf_token_read", "hubToken"],
                *["HF_TOKEN", "X-Amz-Security-Token", "AWS_SECRET_ACCESS_KEY", "db_password_2", "key"],
            ]
        ],
        # queries
        (f"https://a.blob/x?sv=1&sig={SECRET}", "https://a.blob/x?sv=1&sig=***"),
        (f"https://a/x?X-Amz-Signature={SECRET}&X-Amz-Date=1", "https://a/x?X-Amz-Signature=***&X-Amz-Date=1"),
        # forms
        *[
            (f"it is {key} here", "it is *** here")
            for key in [
                *["gsk_aB3dE6gH9jK2mN5pQ8", "AIzaSyA1b2C3d4E5f6G7-h8_i9", "xoxb-1234567890-abcDEF", JWT],
                *["nvapi-aB3dE6gH9jK2mN5pQ8", "glpat-aB3dE6gH9jK2mN5pQ8"],
            ]
        ],
        # texts
        (f"X-Api-Key: {SECRET}", "X-Api-Key: ***"),
        (f"a --hub_token {SECRET} --seed 3", "a --hub_token *** --seed 3"),
        (f"a --hub_token={SECRET} --seed 3", "a --hub_token=*** --seed 3"),
        (f'a --hub_token "{SECRET} b" --seed 3', 'a --hub_token "***" --seed 3'),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"authorization: token {SECRET}", "authorization: ***"),
        (f"Cookie: a={SECRET}; b={SECRET}", "Cookie: ***"),
        (f"connect(password={SECRET!r}, port=3)", "connect(password='***', port=3)"),
        (["--api_key", SECRET, "--seed", "3"], ["--api_key", "***", "--seed", "3"]),
        (("-H", f"X-Api-Key: {SECRET}"), ("-H", "X-Api-Key: ***")),
        # JSON
        (json.dumps({"api_key": SECRET, "n": 2}), '{"api_key": "***", "n": 2}'),
        (json.dumps([{"a": json.dumps({"token": SECRET})}]), json.dumps([{"a": '{"token": "***"}'}])),
        ('body {"api_key": "' + SECRET + '", "n": 2}', 'body {"api_key": "***", "n": 2}'),
        (r'body {\"api_key\": \"' + SECRET + r'\"}', r'body {\"api_key\": \"***\"}'),
        # objects
        ({"a": [Login("me", SECRET)]}, {"a": [Login("me", "***")]}),
        (Pair("me", SECRET), Pair("me", "***")),
        (frozenset([f"token={SECRET}"]), frozenset(["token=***"])),
        ({"token": SECRET.encode()}, {"token": "***"}),
    ],
)  # fmt: skip
def test_every_place_of_a_secret(setting, shown):
    before = copy.deepcopy(setting)
    assert redacted(setting) == shown
    assert setting == before
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "setting",
    [
        *[
            {name: "text"}
            for name in [
                *["max_completion_tokens", "max_tokens", "num_tokens", "max_new_tokens", "prompt_tokens", "eos_token"],
                *["pad_token", "additional_special_tokens", "pad_token_id", "stop_token_ids", "tokenizer"],
                *["tokenizer_name", "tokenizer_class", "teacher_tokenizer_name_or_path", "num_input_tokens_seen"],
                *["include_num_input_tokens_seen", "num_assistant_tokens_schedule", "tokens_per_second"],
                *["average_tokens_across_devices", "teacher_api_key_env", "num_key_value_heads", "keyboard", "author"],
                *["path", "pattern", "design", "sigma", "assigned", "signal", "pass_at_k", "compatible", "passes"],
            ]
        ],
        *["https://host:8000/v1?max_tokens=5&page=2#top", "https://huggingface.co/org/model-1.5B", "vllm:org/model"],
        *["/data/tokens/run-1/checkpoint-20", "C:\\models\\key", "http://localhost:8000/v1#model", "s3://bucket/part=a"],
        *["Key: the first token is 3.", "max_tokens: 5, eos_token=<eos>", "the token of --seed 3", "token: $HF_TOKEN"],
        *["a --hub_token --seed 3", "token=None", '{"eos_token":   "<eos>"}', "[not JSON", "{}", "[1, 2]"],
        [["--max_tokens", "5"], ["--eos_token", "<eos>"], ("--api_key", "$KEY")],
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_secret_is_shown(setting):
    assert redacted(setting) == setting


NAMES = st.sampled_from(
    ["token", "hub_token", "api_key", "openai_api_key", "password", "client_secret", "Authorization"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(NAMES, ANYTHING, st.integers(0, 3))
def test_a_secret_is_found_at_any_depth(name, beside, depth):
    setting = {name: SECRET, "beside": beside}
    for _ in range(depth):
        setting = {"a": [setting, beside]}
    assert SECRET not in repr(redacted(setting))


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("HF_KEY", f" {SECRET}\n")
    assert from_environment({"token": "$HF_KEY", "n": 3}, "x") == {"token": SECRET, "n": 3}
    assert from_environment(["http://me:${HF_KEY}@host"], "x") == [f"http://me:{SECRET}@host"]
    assert from_environment("http://me:pa$HF_KEY@host", "x") == "http://me:pa$HF_KEY@host"  # a password with a dollar
    monkeypatch.delenv("HF_KEY")
    with pytest.raises(
        ValueError, match=r"`teacher_model_init_kwargs` reads the environment variable HF_KEY, which is"
    ):
        from_environment({"token": "${HF_KEY}"}, "teacher_model_init_kwargs")


@pytest.fixture
def secretive(tmp_path):
    """A configuration with a secret in every setting that may hold one."""
    return config(
        tmp_path,
        hub_token=SECRET,
        model_init_kwargs={"token": SECRET},
        teacher_model_init_kwargs={"token": SECRET, "proxies": {"https": f"http://a:{SECRET}@proxy"}},
        teacher_model_name_or_path="served",
        teacher_server_urls=[f"http://me:{SECRET}@localhost:9"],
        vllm_server_base_url=f"http://me:{SECRET}@localhost:8",
        kl_estimator="sampled",
    )


WAYS_OUT = {
    "repr": repr,
    "str": str,
    "to_dict": lambda args: json.dumps(args.to_dict()),
    "to_json_string": lambda args: args.to_json_string(),
    "to_sanitized_dict": lambda args: repr(args.to_sanitized_dict()),
    "pickle": lambda args: pickle.dumps(args).decode("latin-1"),
    "torch.save": lambda args: (torch.save(args, memory := io.BytesIO()), memory.getvalue().decode("latin-1"))[1],
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_out_of_a_configuration_holds_a_secret(secretive, way):
    written = WAYS_OUT[way](secretive)
    assert SECRET not in written
    assert "localhost:9" in written
    assert SECRET not in WAYS_OUT[way](secretive.resolved(has_rewards=False))


def test_copies_of_a_configuration_are_whole(secretive):
    for copied in (copy.copy(secretive), copy.deepcopy(secretive), secretive.resolved(has_rewards=False)):
        assert type(copied) is type(secretive)
        assert copied.teacher_model_init_kwargs["token"] == SECRET
        assert copied.hub_token == SECRET
    deep = copy.deepcopy(secretive)
    deep.teacher_model_init_kwargs["token"] = "other"
    assert secretive.teacher_model_init_kwargs["token"] == SECRET
    read = pickle.loads(pickle.dumps(secretive))
    assert (read.beta, read.teacher_model_init_kwargs["token"]) == (secretive.beta, "***")


def test_a_configuration_reads_the_environment_when_it_is_used(tmp_path, monkeypatch):
    args = config(tmp_path, teacher_model_init_kwargs={"token": "$TEACHER_KEY"})
    assert args.to_dict()["teacher_model_init_kwargs"]["token"] == "$TEACHER_KEY"
    with pytest.raises(ValueError, match="TEACHER_KEY, which is not set"):
        args.resolved(has_rewards=False)
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    used = args.resolved(has_rewards=False)
    assert used.teacher_model_init_kwargs == {"token": SECRET}
    assert SECRET not in repr(used)
    assert args.teacher_model_init_kwargs == {"token": "$TEACHER_KEY"}


def test_no_file_of_a_run_holds_a_secret(saved, prompts, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", SECRET)
    out = saved / "out"
    trainer = OPDTrainer(
        model=str(saved / "student"),
        args=config(
            out,
            teacher_model_name_or_path=str(saved / "teacher"),
            model_init_kwargs={"token": SECRET},
            teacher_model_init_kwargs={"token": "$TEACHER_KEY"},
            hub_token=SECRET,
            save_strategy="steps",
            save_steps=1,
        ),
        train_dataset=prompts,
    )
    trainer.train()
    trainer.save_model(str(out))
    trainer.save_state()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "trainer_state.json"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_served_teachers_key_comes_from_the_environment(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "trl_distill.teachers.spec.ServedTeacher", lambda urls, **how: seen.update(urls=urls, **how) or object()
    )
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    args = config(
        tmp_path,
        teacher_model_name_or_path="judge",
        teacher_server_urls=["http://me:${JUDGE_KEY}@localhost:9"],
        teacher_api_key_env="JUDGE_KEY",
        kl_estimator="sampled",
    )
    with pytest.raises(TypeError):  # what stands in for it here is no teacher
        read_specs(None, args.resolved(has_rewards=False))
    assert seen["api_key"] == SECRET
    assert seen["urls"] == [f"http://me:{SECRET}@localhost:9"]
