"""Prompts have the length, the domain and the shared beginnings that were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stub import ROOT
from tokenizers import Tokenizer

from expertmesh.errors import ConfigError
from loadtest.config import Workload
from loadtest.target import Request
from loadtest.texts import Texts

DEMO = ROOT / "examples" / "demo_model" / "checkpoint"


def request(seed: int = 1, prompt_tokens: int = 50, domain: str = "words", **more: Any) -> Request:
    return Request(0, more.pop("turn", 0), seed, 0.0, prompt_tokens, 8, domain=domain, **more)


def demo_texts(seed: int = 0) -> Texts:
    return Texts(Workload(prompts=DEMO / "prompts.json", tokenizer=DEMO), seed)


@pytest.mark.parametrize("domain", ["python", "prose", "chat"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 700])
def test_lengths_are_exact_with_a_tokenizer(domain: str, tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    for seed in range(5):
        text = demo_texts().prompt(request(seed, tokens, domain))
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == pytest.approx(tokens, abs=1 + tokens / 100)


def test_without_a_tokenizer_four_characters_count_as_one() -> None:
    assert len(Texts(Workload(), 0).prompt(request(prompt_tokens=300))) == 1200


def test_text_is_of_its_domain() -> None:
    pools = json.loads((DEMO / "prompts.json").read_text())
    text = demo_texts().prompt(request(prompt_tokens=400, domain="arithmetic"))
    assert any(one in text for one in pools["arithmetic"])
    assert not any(one in text for one in pools["prose"])


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    assert demo_texts().prompt(request(3, 60, "prose")) == demo_texts().prompt(request(3, 60, "prose"))
    texts = [demo_texts().prompt(request(seed, 60, "prose")) for seed in range(30)]
    assert len({text[:20] for text in texts}) > 20
    assert demo_texts().prompt(request(3, 60, "prose")) != demo_texts().prompt(request(3, 60, "prose", turn=1))


def test_a_shared_prefix_is_the_same_for_all_that_have_it() -> None:
    texts = Texts(Workload(), 0)
    with_first = [texts.prompt(request(seed, prefix=0, prefix_tokens=20)) for seed in (1, 2)]
    other = texts.prompt(request(1, prefix=1, prefix_tokens=20))
    assert with_first[0][:80] == with_first[1][:80] != other[:80]
    assert with_first[0][80:] != with_first[1][80:]
    assert len(with_first[0]) == 4 * 70
    assert Texts(Workload(), 0).prompt(request(1, prefix=0, prefix_tokens=20)) == with_first[0]
    assert Texts(Workload(), 1).prompt(request(1, prefix=0, prefix_tokens=20)) != with_first[0]


def test_equal_blocks_of_a_trace_are_equal_text() -> None:
    texts = Texts(Workload(), 0)
    first = texts.prompt(request(1, 600, blocks=(46, 47)))
    second = texts.prompt(request(2, 1200, blocks=(46, 47, 48)))
    assert second.startswith(first)
    assert (len(first), len(second)) == (2400, 4800)
    assert texts.prompt(request(3, 600, blocks=(47, 46)))[:2048] != first[:2048]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "not an object"),
        ("{}", "not an object"),
        ('{"a": []}', "a: not a list of texts"),
        ('{"a": ["x", ""]}', "a: not a list of texts"),
        ("{", "not JSON"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "prompts.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        Texts(Workload(prompts=tmp_path / "prompts.json"), 0)


def test_a_mix_of_domains_that_there_are_not() -> None:
    given = Workload.model_validate({"prompts": DEMO / "prompts.json", "domains": [{"weights": {"poetry": 1}}]})
    with pytest.raises(ConfigError, match=r"no prompts of domain 'poetry' \(there are: python, prose"):
        Texts(given, 0)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Texts(Workload(tokenizer=tmp_path), 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer"):
        Texts(Workload(tokenizer=tmp_path), 0)
