"""The figures of lm-evaluation-harness are those of its own adapter for transformers on the same directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from pretrain.data.tokenizer import train_from_texts
from pretrain.errors import ConfigError, ModelError
from pretrain.models import build

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "initializer_range": 0.4,
}
TASKS = {
    "own_choice": """output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_unconditional": """output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: texts
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "own_last_word": """output_type: loglikelihood
doc_to_text: "{{long}}"
doc_to_target: " {{last}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "own_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_answer": """output_type: generate_until
doc_to_text: "{{long}}"
doc_to_target: "{{last}}"
generation_kwargs: {until: [" the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Tasks whose rows are in a local file; some contexts are longer than the model."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, text in enumerate(tiny.TEXTS[:24]):
        words = text.split()
        rows.append(
            {
                "context": " ".join(words[:6]), "choices": ["mat", "log", "old box"], "gold": i % 3, "last": words[-1],
                "long": " ".join(tiny.TEXTS[i : i + 1 + i % 4]), "texts": tiny.TEXTS[i : i + 3],
            }
        )  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\n{body}")
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def measured(model: str, arguments: str, tasks: Path, **options: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), device="cpu", bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_figures_equal_those_of_the_adapter_for_transformers(family, tasks, tmp_path, offline):
    pytest.importorskip("lm_eval")
    import pretrain.evaluation.harness  # noqa: F401  # makes the model known

    tokenizer = train_from_texts(tiny.TEXTS, "bpe", vocab_size=320)
    build(family, None, tokenizer=tokenizer, seed=4, max_positions=32, **SIZES).save(
        tmp_path / "model"
    )
    own = measured("pretrain", f"path={tmp_path / 'model'}", tasks, batch_size=5)
    # The adapter generates with one row at a time, because it pads answers differently.
    theirs = measured("hf", f"pretrained={tmp_path / 'model'},dtype=float32", tasks, batch_size=1)
    for name in TASKS:
        for key, value in theirs["results"][name].items():
            if isinstance(value, float):
                exact = key.startswith(("acc", "exact_match"))
                assert own["results"][name][key] == pytest.approx(
                    value, rel=0 if exact else 1e-4
                ), (name, key)
        answers = zip(own["samples"][name], theirs["samples"][name], strict=True)
        for mine, wanted in answers:
            flat = [r for group in mine["resps"] for r in group]
            other = [r for group in wanted["resps"] for r in group]
            if name == "own_answer":
                assert flat == other
            elif name == "own_rolling":
                assert flat == pytest.approx(other, abs=1e-4)
            else:
                assert [r[0] for r in flat] == pytest.approx([r[0] for r in other], abs=1e-4)
                assert [r[1] for r in flat] == [r[1] for r in other]


def test_model_of_the_harness(tmp_path):
    """What its methods return for single requests, and what they refuse."""
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    from pretrain.evaluation.harness import HarnessModel

    tokenizer = train_from_texts(tiny.TEXTS, "bpe", vocab_size=320)
    model = build("gpt2", None, tokenizer=tokenizer, seed=4, max_positions=32, **SIZES)

    def asked(kind: str, *arguments: Any) -> list[Any]:
        return [Instance(kind, {}, arguments, 0)]

    lm = HarnessModel(model, batch_size="auto")
    text = tiny.TEXTS[0]
    [(total, greedy)] = lm.loglikelihood(asked("loglikelihood", "", text))
    assert total == pytest.approx(float(model.log_likelihood(text)), abs=1e-4) and not greedy
    [answer] = lm.generate_until(asked("generate_until", text, {"until": [], "max_gen_toks": 4}))
    whole = model.generate(text, max_new_tokens=4, temperature=0)
    assert whole == text + answer
    ids = lm.tok_encode(text)
    new = model.generate([ids], max_new_tokens=4, temperature=0)[0][len(ids) :]
    [(_, greedy), (_, other)] = lm._loglikelihood_tokens([(None, ids, new), (None, ids, new[::-1])])
    assert greedy and other == (new == new[::-1])
    [rolling] = HarnessModel(model, add_bos_token=False).loglikelihood_rolling(
        asked("loglikelihood_rolling", text)
    )
    assert rolling == pytest.approx(total, abs=1e-4)  # without bos as a token to predict
    with pytest.raises(ConfigError, match="leave no room for a context in 32"):
        lm.generate_until(asked("generate_until", text, {"until": []}))
    with pytest.raises(ModelError, match="has the head 'masked-lm'"):
        HarnessModel(build("bert", None, tokenizer=tiny.tokenizer(), **SIZES))
    chat = lm.apply_chat_template([{"role": "user", "content": "the cat"}])
    assert "the cat" in chat


def test_the_package_is_named_if_it_is_missing(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "pretrain.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install lm_eval"):
        import pretrain.evaluation.harness  # noqa: F401
