"""Tries lm-eval, an evaluation harness, with a task of two questions in a local file. One part needs generated replies,
and the other part needs the log-probabilities of given answers."""

import json
import tempfile
from pathlib import Path

import lm_eval
from checks import MODEL, URL, check
from lm_eval.tasks import TaskManager

QUESTIONS = [
    {"question": "Which animal barks?", "choices": ["dog", "cat"], "answer": 0},
    {"question": "Which animal purrs?", "choices": ["dog", "cat"], "answer": 1},
]
GENERATE = """
task: animals_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """
task: animals_choose
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def evaluate(task, model, folder, **settings):
    arguments = {"model": MODEL, "max_retries": 1, "num_concurrent": 1, **settings}
    results = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template="chat" in model,
        bootstrap_iters=0,
    )
    assert results["n-samples"][task]["effective"] == len(QUESTIONS)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    data = folder / "animals.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "generate.yaml").write_text(GENERATE.replace("FILE", str(data)))
    (folder / "choose.yaml").write_text(CHOOSE.replace("FILE", str(data)))
    remote = {"tokenizer_backend": "remote", "base_url": f"{URL}/v1/completions"}
    chat_url = f"{URL}/v1/chat/completions"
    check("chat", lambda: evaluate("animals_generate", "local-chat-completions", folder, base_url=chat_url))
    check("completions", lambda: evaluate("animals_generate", "local-completions", folder, **remote))
    check("log-probabilities", lambda: evaluate("animals_choose", "local-completions", folder, **remote))
