"""Measure a checkpoint on held-out stories and, given a file of texts, on real English.

    python examples/evaluate_checkpoint.py --model examples/checkpoints/yan-transformer-tiny \
        --text_file validation.jsonl.gz --output metrics.json

Every score stands beside a trivial baseline, the most frequent answer or word or the source itself, and beside its
difference from it row by row; all with 95% bootstrap intervals.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_yan  # noqa: F401  registers the classes
from modeling_yan.data import build_pairs, generate_stories, read_rows
from modeling_yan.evaluation import exact_match, generate_answers, masked_words_restored, mean_with_interval, rouge_l
from modeling_yan.export import with_int8_weights

STORY_SEED = 1  # the seed of the stories that training leaves out
VARIED_SEED = 988  # of those in many wordings
ANSWER_LENGTH = 8  # tokens that an answer has room for


def most_frequent(strings):
    return Counter(strings).most_common(1)[0][0]


def score_stories(write, num_rows, max_sentences):
    """Exact match of the answers to held-out stories, in all, in many wordings, and per kind of question."""
    rows = generate_stories(num_rows, STORY_SEED, max_sentences=max_sentences)
    varied = generate_stories(num_rows, VARIED_SEED, max_sentences=max_sentences, varied_wording=True)
    results = {"stories: exact match": score_answers(write, rows)}
    results["stories in many wordings: exact match"] = score_answers(write, varied)
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [row for row in rows if row["kind"] == kind]
        results[f"stories, {kind}: exact match"] = score_answers(write, chosen)
    return results


def score_answers(write, rows):
    """Exact match of the answers, and of the most frequent one."""
    answers = write([row["source"] for row in rows], canvas_length=ANSWER_LENGTH)
    constant = most_frequent(row["target"] for row in rows)
    scores = [exact_match(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]
    return scores, [exact_match(constant, row["target"]) for row in rows]


def with_difference(scores, baseline):
    """Both lists of scores, and their difference row by row."""
    return scores, baseline, [score - trivial for score, trivial in zip(scores, baseline, strict=True)]


def count_with(tokenizer):
    """Number of tokens of a text, as `infilling` wants it."""
    return lambda text: len(tokenizer.tokenize(text))


def score_last_words(write, texts, num_rows, max_words, mask_token):
    """Exact match of the last word of a text."""
    rows = build_pairs(texts, "last_word", num_rows, 0, max_words, mask_token)
    return {"last word: exact match": score_answers(write, rows)}


def score_infilling(write, texts, num_rows, max_words, tokenizer):
    """Share of the masked words restored, and ROUGE-L of the whole text; one mask stands for one hidden token."""
    mask_token = tokenizer.mask_token
    rows = build_pairs(texts, "infilling", num_rows, 0, max_words, mask_token, count_tokens=count_with(tokenizer))
    answers = write([row["source"] for row in rows])
    constant = most_frequent(word for row in rows for span in row["masked"] for word in span.split())
    shown = [row["source"].removesuffix(" Fill in.") for row in rows]
    gap = re.compile(f"(?:{re.escape(mask_token)})+")
    without_gaps = [gap.sub("", text) for text in shown]
    filled = [gap.sub(constant, text) for text in shown]

    def restored(texts):
        return [
            masked_words_restored(text, row["source"], row["target"], row["masked"], mask_token)
            for text, row in zip(texts, rows, strict=True)
        ]

    def rouge(texts):
        return [rouge_l(text, row["target"]) for text, row in zip(texts, rows, strict=True)]

    return {
        "infilling: masked words restored": (restored(answers), restored(filled)),
        "infilling: ROUGE-L against most frequent word": (rouge(answers), rouge(filled)),
        "infilling: ROUGE-L against source": (rouge(answers), rouge(shown)),
        "infilling: ROUGE-L against source without gaps": (rouge(answers), rouge(without_gaps)),
    }


def score_gaps(model, tokenizer, texts, num_rows, max_words, num_flow_steps):
    """Share of the gaps that `fill` fills as they were, and ROUGE-L of its text; one mask stands for a whole gap."""
    mask_token = tokenizer.mask_token
    rows = build_pairs(texts, "infilling", num_rows, 0, max_words, mask_token)
    rows = [{**row, "source": row["source"].removesuffix(" Fill in.")} for row in rows]
    rows = [row for row in rows if count_with(tokenizer)(row["source"]) <= model.config.canvas_length]
    filled = [model.fill(tokenizer, row["source"], num_flow_steps=num_flow_steps) for row in rows]
    constant = most_frequent(word for row in rows for span in row["masked"] for word in span.split())

    def right(all_spans):
        pairs = zip(all_spans, rows, strict=True)
        return [sum(map(str.__eq__, spans, row["masked"])) / len(row["masked"]) for spans, row in pairs]

    trivial = [row["source"].replace(mask_token, constant) for row in rows]
    constants = [[constant] * len(row["masked"]) for row in rows]
    rouge = [
        [rouge_l(text, row["target"]) for text, row in zip(texts, rows, strict=True)]
        for texts in ([each.text for each in filled], trivial)
    ]
    return {
        "gaps: filled as they were": (right([each.spans for each in filled]), right(constants)),
        "gaps: ROUGE-L against most frequent word": tuple(rouge),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text_file", help="held-out texts, .jsonl or .jsonl.gz")
    parser.add_argument("--num_rows", type=int, default=1000)
    parser.add_argument("--num_flow_steps", type=int, nargs="+", default=[3])
    parser.add_argument("--max_sentences", type=int, default=6)
    parser.add_argument("--max_words", type=int, default=16)
    parser.add_argument("--int8", action="store_true", help="with int8 weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="a .json file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model).eval()
    model = with_int8_weights(model) if options.int8 else model
    table = {}
    for steps in options.num_flow_steps:

        def write(sources, **settings):
            return generate_answers(model, tokenizer, sources, num_flow_steps=steps, **settings)  # noqa: B023

        results = score_stories(write, options.num_rows, options.max_sentences)
        if options.text_file:
            texts = read_rows(options.text_file)
            results |= score_last_words(write, texts, options.num_rows, options.max_words, tokenizer.mask_token)
            results |= score_infilling(write, texts, options.num_rows, options.max_words, tokenizer)
            sizes = options.num_rows, options.max_words, steps
            results |= score_gaps(model, tokenizer, texts, *sizes)
        table[steps] = {
            name: [mean_with_interval(row) for row in with_difference(*pair)] for name, pair in results.items()
        }
        print(f"\n{options.model}, {steps} steps, {options.num_rows} rows a task")
        print(f"{'':48} {'YAN':>6}  {'95% interval':15} {'baseline':>8} {'difference':>10}  95% interval")
        for name, ((mean, low, high), (baseline, *_), (gain, least, most)) in table[steps].items():
            interval, gain_interval = f"{low:.3f} to {high:.3f}", f"{least:.3f} to {most:.3f}"
            print(f"{name:48} {mean:6.3f}  {interval:15} {baseline:8.3f} {gain:10.3f}  {gain_interval}")
    if options.output:
        Path(options.output).write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
