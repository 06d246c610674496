"""What `save_pretrained` and `push_to_hub` do beside writing weights: a model card, and no older weights that stay."""

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, CommitInfo, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .base_yan import YanBaseMixin

FILE = "README.md"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
OWN = "<!-- Written by modeling-yan, and again at every save. Take this line out, and the card stays as it is. -->"
EMPTY = "This model card has been automatically generated."  # what transformers puts on the hub, with nothing in it
TAGS = ("yan", "flow-matching", "non-autoregressive")
# by class of the model: the hub's name of the task, and the class that loads the folder
TASKS = {
    "YanForFlowGeneration": ("text-generation", "AutoModelForCausalLM"),
    "YanForAutoencoding": ("fill-mask", "AutoModelForMaskedLM"),
    "YanModel": ("feature-extraction", "AutoModel"),
}
UNKNOWN = "Not stated."
BODY = """{own}

# {title}

A YAN model with {size:.1f} million parameters{base}. YAN generates all tokens of a text at once, in a few
flow-matching steps (arXiv 2604.15009); the package is modeling-yan.

Prompts: {prompts}

## Load it

With the package, whose code then runs:

```python
import modeling_yan  # registers the classes
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}")
{use}```

Without it, transformers runs the code that lies beside the weights. Read it first, and name the revision you read:

```python
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True, revision="COMMIT")
model = {auto_class}.from_pretrained("{name}", trust_remote_code=True, revision="COMMIT")
```

## Results

{results}

## Limits

{limits}

Prompts have at most {longest} tokens. The model generates {canvas} tokens at once, and a longer text canvas by canvas.
Options of token-by-token decoding, such as beams and `top_k`, are refused. What it generates may be wrong.
"""
SECTIONS = {  # what stands between parts of the body that are always there
    "prompts": r"\nPrompts: (.*?)\n\n## Load it\n",
    "limits": r"\n## Limits\n\n(.*?)\n\nPrompts have at most ",
}
USE = """inputs = tokenizer("your prompt", return_tensors="pt")
sequences = model.generate(**inputs, num_flow_steps={steps}, return_prompt=False)
print(tokenizer.decode(sequences[0], skip_special_tokens=True))
"""


@dataclass
class YanModelCard:
    """What the card of a model says that its config does not know: `model.model_card.license = "apache-2.0"`.

    Args:
        license: The licence by its name on the hub. language: Languages by their codes, such as "en".
        datasets: The training data by their names on the hub. metrics: Names of metrics in `results`.
        prompts: In which form the model takes prompts, best with an example and its answer.
        results: Scores by what they are scores of; numbers, or texts such as "0.98 (0.97 to 0.99)".
        limits: What the model cannot do, and must not be used for.

    Example:

        >>> from modeling_yan.cards_yan import YanModelCard
        >>> YanModelCard(license="mit", results={"exact_match": 0.9}).license
        'mit'
    """

    license: str | None = None
    language: str | list[str] | None = None
    datasets: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    prompts: str = UNKNOWN
    results: dict[str, float | str] = field(default_factory=dict)
    limits: str = UNKNOWN


class YanCardMixin(YanBaseMixin):
    """Saving and pushing with a card, and without weights of an earlier time."""

    model_card: YanModelCard

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with a model card."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True) and Path(save_directory).is_dir():
            write_card(self, save_directory)
            _remove_old_weights(Path(save_directory))

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> CommitInfo:
        write_card(self, working_dir, repo_id)  # transformers has put the hub's card there, or an empty one
        pushed = super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
        return _delete_old_weights(working_dir, repo_id, pushed, kwargs.get("revision"), kwargs.get("token"))


def _remove_old_weights(folder: Path) -> None:
    """Remove a single file that shards have replaced, or the reverse: transformers would load the single one."""
    found = [path for path in (folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME) if path.is_file()]
    times = [path.stat().st_mtime_ns for path in found]
    if len(set(times)) == 2:
        found[times.index(min(times))].unlink()


def _delete_old_weights(
    folder: str | os.PathLike[str], name: str, pushed: CommitInfo, revision: str | None, token: str | bool | None
) -> CommitInfo:
    """Delete weights on the hub that the pushed ones of a folder have replaced, and return the last commit."""
    api, revision, written = HfApi(), pushed.pr_revision or revision, set(os.listdir(folder))
    files = [file for file in api.list_repo_files(name, revision=revision, token=token) if WEIGHTS.fullmatch(file)]
    old = [CommitOperationDelete(file) for file in files if file not in written]
    if not old or not any(map(WEIGHTS.fullmatch, written)):
        return pushed
    deleted = api.create_commit(name, old, commit_message="Delete replaced weights", revision=revision, token=token)
    return pushed if pushed.pr_revision else deleted


def write_card(model: YanCardMixin, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Write the card of a model into a folder, unless a person's card lies there.

    Args:
        folder: That the weights were saved to. name: Of the repository on the hub; the folder's if None.
    """
    path = Path(folder, FILE)
    about, tags = model.model_card, list[str]()
    if path.is_file():
        before = path.read_text(encoding="utf-8")
        if OWN not in before and EMPTY not in before:
            return
        data = ModelCard(before, ignore_metadata_errors=True).data
        tags = data.get("tags") or []  # that were asked for with the push
        if OWN in before:
            about = _with_what_was_said(about, before, data)
    path.write_text(_card(model, about, name or path.resolve().parent.name, tags), encoding="utf-8")


def _with_what_was_said(about: YanModelCard, before: str, data: CardData) -> YanModelCard:
    """The card with what an earlier one says and it does not, but for scores: the weights may be others now."""
    found = {name: data.get(name) for name in ("license", "language", "datasets")}
    for name, pattern in SECTIONS.items():
        section = re.search(pattern, before, re.DOTALL)
        found[name] = section and section.group(1)
    empty = YanModelCard()
    is_unsaid = {name: getattr(about, name) == getattr(empty, name) for name in found}
    return replace(about, **{name: value for name, value in found.items() if value and is_unsaid[name]})


def _num_steps(model: YanCardMixin) -> int:
    """Of generation without further options."""
    steps = getattr(model.generation_config, "num_flow_steps", None)
    return int(model.config.num_flow_steps if steps is None else steps)


def _card(model: YanCardMixin, about: YanModelCard, name: str, tags: list[str]) -> str:
    config = model.config
    task, auto_class = TASKS.get(type(model).__name__, TASKS["YanModel"])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*TAGS, *tags])),
        base_model=config.encoder_name,
        license=about.license,
        language=about.language,
        datasets=about.datasets or None,
        metrics=about.metrics or None,
    )
    rows = "\n".join(f"| {what} | {score} |" for what, score in about.results.items())
    body = BODY.format(
        own=OWN,
        title=name.rpartition("/")[2],
        name=name,
        size=model.num_parameters() / 1e6,
        base=f", on the pretrained encoder {config.encoder_name}" if config.encoder_name else "",
        prompts=about.prompts,
        auto_class=auto_class,
        use=USE.format(steps=_num_steps(model)) if task == "text-generation" else "",
        results=f"| score | |\n|---|---|\n{rows}" if rows else UNKNOWN,
        limits=about.limits,
        longest=config.max_prompt_length,
        canvas=config.canvas_length,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
