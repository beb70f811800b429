"""Film-review sentiment as chat rows, from the snippets that the PyPI package vaderSentiment carries.

    python build_film_reviews.py vaderSentiment-3.3.2.tar.gz OUT_DIR

The snippets are sentences of film reviews with the mean of human scores from -4 to 4. Clear ones (beyond ±1) become rows
that ask for one word; the order is drawn with fixed seeds, so every machine writes the same three files: those of the
demo, and further rows that the safety bench measures with.
"""
import io
import json
import pathlib
import random
import sys
import tarfile

INSTRUCTION = "Is this film review positive or negative? Answer with one word."
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TRAIN, VALIDATION, FURTHER = 640, 100, 1600


def snippets(package):
    with tarfile.open(package) as outer:
        inner = outer.extractfile(ARCHIVE).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = archive.extractfile(SNIPPETS).read().decode("utf-8", errors="replace")
    for line in text.splitlines():
        _, score, snippet = line.split("\t", 2)
        yield float(score), " ".join(snippet.replace("''", '"').split())


def row(snippet, label):
    return {"messages": [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": snippet},
                         {"role": "assistant", "content": label}]}


def main(package, out):
    clear = {"positive": [], "negative": []}
    for score, snippet in snippets(package):
        if abs(score) >= 1 and 20 <= len(snippet) <= 200 and "\ufffd" not in snippet:
            clear["positive" if score > 0 else "negative"].append(snippet)
    draw = random.Random(7)
    rows = []
    for label, texts in clear.items():
        rows += [row(text, label) for text in draw.sample(sorted(set(texts)), (TRAIN + VALIDATION) // 2)]
    draw.shuffle(rows)
    taken = {r["messages"][1]["content"] for r in rows}
    draw, further = random.Random(8), []
    for label, texts in clear.items():
        further += [row(text, label) for text in draw.sample(sorted(set(texts) - taken), FURTHER // 2)]
    draw.shuffle(further)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:TRAIN]), ("validation", rows[TRAIN:]), ("further", further)):
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
