"""Decoding with a key-value cache: transformers.generate, token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from model import bases
from model.generate import Generator, KeyValueCache, choose
from model.lora import LoRAConfig
from model.packed import pack
from model.router import RouterConfig
from model.unimoer import ModelConfig, UniMoER

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": 4, "tie_word_embeddings": False},
}
NEW = 12
PROMPTS = [[5, 9, 2, 44, 7], [3], [11, 12, 13, 14, 15, 16, 17, 18, 19], [8, 8]]


def ours(base: Path, dtype: str = "float32", **options) -> UniMoER:
    """With experts that do something, so that leaving them out matters."""
    lora = LoRAConfig(("a", "b"), (2, 3), (4.0, 6.0))
    made = UniMoER(ModelConfig(base=str(base), lora=lora, router=RouterConfig(), dtype=dtype,
                               **options))  # fmt: skip
    with torch.no_grad():
        for name, parameter in made.trained().items():
            if ".lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return made


def theirs(base: Path, ids: list[int], seed: int = 0, **options) -> list[int]:
    """One prompt at a time, so that nothing is padded; no token ends a text."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)  # only now: loading draws too
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=NEW, pad_token_id=0, **options
    )
    with torch.no_grad():
        found = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
    return found[0, len(ids) :].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, make_base: Callable[..., Path]) -> Path:
    return make_base(**FAMILIES[request.param])


def test_greedy(base: Path) -> None:
    """Texts of all lengths at once are continued as each is alone."""
    found = Generator(ours(base)).generate(PROMPTS, NEW)
    assert found == [theirs(base, prompt, do_sample=False) for prompt in PROMPTS]


@pytest.mark.parametrize("cut", [{}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.8}])
def test_sampled(base: Path, cut: dict[str, Any]) -> None:
    """The same draws from the same random state."""
    full = {"top_k": 0, "top_p": 1.0, **cut}
    model = ours(base)
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = Generator(model).generate(PROMPTS[:1], NEW, temperature=0.8, **full)
        assert found[0] == theirs(base, PROMPTS[0], seed, do_sample=True, temperature=0.8, **full)
    again = [Generator(model).generate(PROMPTS, NEW, temperature=1.0, seed=3) for _ in "ab"]
    assert again[0] == again[1]


def test_the_cache_changes_nothing(base: Path) -> None:
    """Each step's hidden state is that of the whole text without a cache, in float64."""
    model = ours(base, "float64")
    generator = Generator(model)
    new = generator.generate(PROMPTS, NEW)
    batch = pack(PROMPTS, "cpu")
    cache = KeyValueCache(generator.config, len(PROMPTS), max(batch.lengths) + NEW, generator.head)
    with torch.no_grad():
        found = generator.prefill(batch, cache)
        for step in range(NEW):
            texts = [p + row[:step] for p, row in zip(PROMPTS, new, strict=True)]
            whole, _ = model.decoder(packed := pack(texts, "cpu"), base=True)
            torch.testing.assert_close(found, whole[packed.last], rtol=1e-9, atol=1e-9)
            found = generator.decode(torch.tensor([row[step] for row in new]), cache)


def test_a_stop_token_ends_a_text_and_not_the_others(base: Path) -> None:
    model = ours(base)
    free = Generator(model).generate(PROMPTS, NEW)
    stop = free[0][3]
    found = Generator(model).generate(PROMPTS, NEW, stop={stop})
    for short, long in zip(found, free, strict=True):
        end = long.index(stop) + 1 if stop in long else NEW
        assert short == long[:end]


def test_choose_cuts_what_it_says() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)

    def drawn(**cut) -> set[int]:
        options = {"top_k": 0, "top_p": 1.0, **cut}
        return {int(choose(logits, 1.0, generator=generator, **options)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3} and drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.75) == {0, 1} and drawn(top_p=0.01) == {0}
    assert int(choose(logits, 0.0, 0, 1.0)) == 0


def test_a_model_of_the_first_layers_generates_with_the_whole_base(base: Path) -> None:
    """It holds what it was cut off, and nothing else twice; compacted too."""
    whole, cut = ours(base), ours(base, layers=2)
    expected, alone = Generator(whole), Generator(cut.compact())
    assert alone.generate(PROMPTS, NEW) == expected.generate(PROMPTS, NEW)
    count = {
        kind: sum(t.numel() for t in of.added) for kind, of in (("cut", alone), ("", expected))
    }
    frozen = sum(t.numel() for name, t in whole.decoder.named_weights().items()
                 if name.startswith(("model.layers.2.", "model.layers.3.")))  # fmt: skip
    assert count["cut"] - count[""] == frozen
    tied = expected.config.tie_word_embeddings
    assert count[""] == (0 if tied else whole.decoder.embed_tokens.weight.numel())


def test_what_cannot_generate(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="generation needs a causal base"):
        Generator(ours(tiny_base, causal=False))
    model = ours(tiny_base)
    wrong: list[dict[str, Any]] = [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}]
    for options in wrong:
        with pytest.raises(ValueError, match="expected temperature >= 0"):
            Generator(model).generate(PROMPTS, 1, **options)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        Generator(model).generate(PROMPTS, 0)
    with pytest.raises(ValueError, match="one token in each"):
        Generator(model).generate([[]], 1)


@pytest.mark.skipif(not bases.cache_folder().joinpath("bases").exists(), reason="no base at hand")
def test_the_real_base_says_what_transformers_has_it_say() -> None:
    folder = bases.resolve("smollm2-135m")
    model = UniMoER(ModelConfig(base="smollm2-135m", dtype="float32"))
    ids = model.tokenizer.fast.encode("The capital of France is").ids
    found = Generator(model).generate([ids], NEW)[0]
    assert found == theirs(folder, ids, do_sample=False)
    assert model.tokenizer.fast.decode(found).startswith(" Paris")
