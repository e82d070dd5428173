"""The benchmarks and their answers as the hub lays them out, each with a few real texts.

English: functions of Python's own `email` package, asked for by their docstrings. Other languages:
sentences of the Universal Declaration of Human Rights, asked for by some of their words.
"""

import email
import gzip
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

from pyarrow import parquet, table

from eval import hub
from eval.collections import load
from eval.hub import HUB_SPLITS, MMARCO
from eval.stdlib import Pair, documented_functions

HEADER = "query-id\tcorpus-id\tscore"
SPLITS = {"train": range(20), "dev": range(20, 26), "test": range(26, 36)}
ARTICLES = {
    "sw": [
        ("Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.", "nani amezaliwa huru"),
        ("Wote wamejaliwa akili na dhamiri, hivyo yapasa watendeane kindugu.", "akili na dhamiri"),
        ("Kila mtu ana haki ya kuishi, haki ya kuwa huru na haki ya kulindwa.", "haki ya kuishi"),
        ("Mtu yeyote asifanywe mtumwa au mtumishi.", "nani asifanywe mtumwa"),
    ],
    "hi": [
        ("सभी मनुष्यों को गौरव और अधिकारों के मामले में समानता प्राप्त है।", "मनुष्यों का गौरव"),
        ("उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है।", "बुद्धि किसे प्राप्त है"),
        ("प्रत्येक व्यक्ति को जीवन और वैयक्तिक सुरक्षा का अधिकार है।", "जीवन और सुरक्षा"),
        ("कोई भी दासता की हालत में न रखा जाएगा।", "दासता की हालत"),
    ],
    "ja": [
        (
            "すべての人間は、生れながらにして自由であり、尊厳と権利とについて平等である。",
            "尊厳と平等",
        ),
        ("人間は、理性と良心とを授けられている。", "理性と良心は誰にあるか"),
        ("すべて人は、生命、自由及び身体の安全に対する権利を有する。", "身体の安全"),
        ("何人も、奴隷にされ、又は苦役に服することはない。", "奴隷と苦役"),
    ],
    "es": [
        ("Todos los seres humanos nacen libres e iguales en dignidad.", "¿quiénes nacen libres?"),
        ("Dotados como están de razón y conciencia, son fraternales.", "razón y conciencia"),
        ("Todo individuo tiene derecho a la vida y a la seguridad.", "derecho a la vida"),
        ("Nadie estará sometido a esclavitud ni a servidumbre.", "esclavitud y servidumbre"),
    ],
}
Files = dict[str, dict[str, bytes]]


@cache
def functions() -> list[Pair]:
    """Functions of `email` with a docstring that occurs once, and is not short."""
    pairs = list(documented_functions(Path(email.__file__).parent))
    by_query = {pair.query: pair for pair in pairs if len(pair.query) > 25}
    return list({pair.document: pair for pair in by_query.values()}.values())


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table({column: [row[column] for row in rows] for column in rows[0]}), out)
    return out.getvalue()


def _beir_rows(number: int) -> tuple[list[dict], list[dict], list[tuple[str, str]]]:
    """Six documents, three queries and who answers whom; another `number`, other functions."""
    chosen = functions()[number % 20 : number % 20 + 6]
    corpus = [{"_id": f"d{i}", "title": "", "text": p.document} for i, p in enumerate(chosen)]
    queries = [{"_id": f"q{i}", "text": pair.query} for i, pair in enumerate(chosen[:3])]
    return corpus, queries, [(f"q{i}", f"d{i}") for i in range(3)]


def beir(files: Files, name: str, number: int) -> None:
    """BeIR/<name> and BeIR/<name>-qrels, the corpus in parquet for every second number."""
    corpus, queries, judged = _beir_rows(number)
    files[f"BeIR/{name}"] = {
        "corpus.jsonl.gz": gzip.compress(jsonl(corpus)),
        "queries.jsonl.gz": gzip.compress(jsonl(queries)),
    }
    if number % 2:
        files[f"BeIR/{name}"] = {
            f"{part}/{part}-00000-of-00001.parquet": as_parquet(rows)
            for part, rows in (("corpus", corpus), ("queries", queries))
        }
    lines = [HEADER, *(f"{q}\t{d}\t1" for q, d in judged)]
    files[f"BeIR/{name}-qrels"] = {
        f"{split}.tsv": ("\n".join(lines) + "\n").encode() for split in HUB_SPLITS[name]
    }


def forum(files: Files, name: str, number: int) -> None:
    """mteb/cqadupstack-<forum>, whose grades are floats."""
    corpus, queries, judged = _beir_rows(number)
    files[f"mteb/cqadupstack-{name}"] = {
        "corpus.jsonl": jsonl(corpus),
        "queries.jsonl": jsonl(queries),
        "qrels/test.jsonl": jsonl(
            [{"query-id": q, "corpus-id": d, "score": 1.0} for q, d in judged]
        ),
    }


def bright(files: Files, domain: str, number: int) -> None:
    """xlangai/BRIGHT: the first query's own text is a document, and excluded."""
    chosen = functions()[number : number + 6]
    documents = [{"id": f"{p.id}.txt", "content": p.document} for p in chosen]
    documents.append({"id": "itself.txt", "content": chosen[0].query})
    examples = [
        {
            "query": pair.query,
            "reasoning": "none",
            "id": str(i),
            "excluded_ids": ["N/A"] if i else ["itself.txt"],
            "gold_ids_long": ["N/A"],
            "gold_ids": [f"{pair.id}.txt"],
        }
        for i, pair in enumerate(chosen[:3])
    ]
    files.setdefault("xlangai/BRIGHT", {}).update(
        {
            f"documents/{domain}-00000-of-00001.parquet": as_parquet(documents),
            f"examples/{domain}-00000-of-00001.parquet": as_parquet(examples),
        }
    )


def miracl(files: Files, language: str, shards: int) -> None:
    """miracl/miracl with judgments in TREC's format, the corpus dealt out to `shards` files."""
    articles = ARTICLES[language]
    folder = f"miracl-v1.0-{language}"
    topics = [f"{i}#0\t{query}" for i, (_, query) in enumerate(articles)]
    qrels = [f"{i}#0\tQ0\t{i}#1\t1" for i in range(len(articles))]
    qrels += [f"0#0\tQ0\t{i}#1\t0" for i in range(1, len(articles))]
    files.setdefault("miracl/miracl", {}).update(
        {
            f"{folder}/topics/topics.{folder}-dev.tsv": ("\n".join(topics) + "\n").encode(),
            f"{folder}/qrels/qrels.{folder}-dev.tsv": ("\n".join(qrels) + "\n").encode(),
        }
    )
    rows = [
        {"docid": f"{i}#1", "title": f"UDHR {i}", "text": text}
        for i, (text, _) in enumerate(articles)
    ]
    corpus = files.setdefault("miracl/miracl-corpus", {})
    for n in range(shards):
        packed = gzip.compress(jsonl(rows[n::shards]))
        corpus[f"miracl-corpus-v1.0-{language}/docs-{n}.jsonl.gz"] = packed


def mmarco(files: Files, language: str) -> None:
    """unicamp-dl/mmarco: two columns without a header, judgments in TREC's format."""
    name, articles = MMARCO[language], ARTICLES[language]
    texts = [f"{i}\t{text}" for i, (text, _) in enumerate(articles)]
    queries = [f"{100 + i}\t{query}" for i, (_, query) in enumerate(articles)]
    qrels = [f"{100 + i}\t0\t{i}\t1" for i in range(len(articles))]
    files.setdefault("unicamp-dl/mmarco", {}).update(
        {
            f"data/google/collections/{name}_collection.tsv": "\n".join(texts).encode(),
            f"data/google/queries/dev/{name}_queries.dev.small.tsv": "\n".join(queries).encode(),
            "data/qrels.dev.small.tsv": "\n".join(qrels).encode(),
        }
    )


def triviaqa(files: Files) -> None:
    """Tevatron/wikipedia-trivia and its corpus: two questions, one with two right passages."""
    titles = {"7": "email.utils", "8": "email.message", "9": "email.charset"}
    passages = [
        {"docid": key, "title": titles[key], "text": pair.document}
        for key, pair in zip(titles, functions(), strict=False)
    ]
    questions = [
        {
            "query_id": str(i),
            "query": functions()[i].query,
            "answers": [f"Answer {i}", f"answer {i}, the other"],
            "positive_passages": [passages[n] for n in right],
            "negative_passages": [passages[2]],
        }
        for i, right in enumerate(([0, 1], [1]))
    ]
    files["Tevatron/wikipedia-trivia"] = {"trivia-dev.jsonl.gz": gzip.compress(jsonl(questions))}
    files["Tevatron/wikipedia-trivia-corpus"] = {"corpus.jsonl.gz": gzip.compress(jsonl(passages))}


def nq_train(files: Files) -> None:
    """sentence-transformers/natural-questions: one question has two answers, one answers two."""
    chosen = functions()[:12]
    rows = [{"query": pair.query, "answer": pair.document} for pair in chosen]
    rows += [{"query": chosen[0].query, "answer": chosen[1].document}]
    name = "pair/train-00000-of-00001.parquet"
    files["sentence-transformers/natural-questions"] = {name: as_parquet(rows)}


def nq_answers(files: Files, answers: dict[str, list[str]]) -> None:
    """google-research-datasets/nq_open: questions without ids, and their answers."""
    rows = [{"question": question, "answer": gold} for question, gold in answers.items()]
    name = "nq_open/validation-00000-of-00001.parquet"
    files["google-research-datasets/nq_open"] = {name: as_parquet(rows)}


def hotpotqa_answers(files: Files, answers: dict[str, str]) -> None:
    """hotpotqa/hotpot_qa: one answer for each id."""
    rows = [
        {"id": key, "question": "which?", "answer": gold, "level": "hard"}
        for key, gold in answers.items()
    ]
    name = "distractor/validation-00000-of-00001.parquet"
    files["hotpotqa/hotpot_qa"] = {name: as_parquet(rows)}


def of_functions(folder: Path) -> Path:
    """A BEIR folder of 36 functions with `answers.json`: a function's name answers."""
    pairs = functions()[:36]
    assert len(pairs) == 36
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "text": pair.document} for i, pair in enumerate(pairs)]
    queries = [{"_id": f"q{i}", "text": pair.query} for i, pair in enumerate(pairs)]
    (folder / "corpus.jsonl").write_bytes(jsonl(corpus))
    (folder / "queries.jsonl").write_bytes(jsonl(queries))
    for split, numbers in SPLITS.items():
        rows = [HEADER, *(f"q{i}\td{i}\t1" for i in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    answers = {f"q{i}": [pair.id.split(".")[-1]] for i, pair in enumerate(pairs)}
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


def asked(name: str) -> dict[str, str]:
    """The questions of a set as it is loaded."""
    data = load(name)
    return {q: data.queries[q] for q in data.qrels[hub.own_split(name)]}
