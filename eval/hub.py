"""The public benchmarks: their names, and where the Hugging Face hub keeps the files of each.

BEIR (arXiv 2104.08663), BRIGHT (arXiv 2407.12883), MIRACL (arXiv 2210.09984) and mMARCO (arXiv
2108.13897), the last two by language; TriviaQA (arXiv 1705.03551) over all of Wikipedia, and where
the answers to three sets' questions are. Every file of a repository comes from one commit, which is
recorded. Nothing is read here: eval/sources.py does that.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import huggingface_hub

from eval import mteb_data
from eval.command import FULL
from eval.sources import Sources

# The public BEIR sets (table 1) as BeIR/<name>, and the splits of their qrels.
HUB_SPLITS = (
    dict.fromkeys(("msmarco", "nfcorpus", "hotpotqa", "fiqa", "fever"), ("train", "dev", "test"))
    | {"scifact": ("train", "test"), "quora": ("dev", "test"), "dbpedia-entity": ("dev", "test")}
    | dict.fromkeys(("trec-covid", "nq", "arguana", "scidocs"), ("test",))
    | dict.fromkeys(("webis-touche2020", "climate-fever"), ("test",))
)
SLOW = 1e6  # bytes of a download that is announced
MOST_SHARDS = 32  # of a parquet file on the hub that are looked for
# Where a document with the query's own id is no answer: queries of the first two are documents of
# the corpus; of the others ids may coincide, and mteb leaves these out too (ignore_identical_ids).
OWN_DOCUMENT = ("arguana", "quora", "fiqa", "fever", "msmarco")

# Whose licence forbids passing them on, and who gives them out.
GATED = {
    "bioasq": "the BioASQ challenge (participants-area.bioasq.org)",
    "signal1m": "Signal AI (the Signal-1M Related Tweets collection)",
    "trec-news": "NIST (trec.nist.gov/data/wapost)",
    "robust04": "NIST (trec.nist.gov/data/cd45)",
}
# The forums, mteb/cqadupstack-<forum>, and the commit of each that mteb measures.
CQADUPSTACK = {
    "android": "f46a197baaae43b4f621051089b82a364682dfeb",
    "english": "ad9991cb51e31e31e430383c75ffb2885547b5f0",
    "gaming": "4885aa143210c98657558c04aaf3dc47cfb54340",
    "gis": "5003b3064772da1887988e05400cf3806fe491f2",
    "mathematica": "90fceea13679c63fe563ded68f3b6f06e50061de",
    "physics": "79531abbd1fb92d06c6d6315a0cbbbf5bb247ea4",
    "programmers": "6184bc1440d2dbc7612be22b50686b8826d22b32",
    "stats": "65ac3a16b8e91f9cee4c9828cc7c335575432a2a",
    "tex": "46989137a86843e03a6195de44b09deda022eec7",
    "unix": "6c6430d3a6d36f8d2a829195bc5dc94d7e063e53",
    "webmasters": "160c094312a0e1facb97e55eeddb698c0abe3571",
    "wordpress": "4ffe81d471b1924886b33c7567bfb200e9eec5c4",
}
# The 18 sets that BEIR averages over. MS MARCO, which its models were trained on, is none of them.
BEIR = (
    "trec-covid", "nfcorpus", "bioasq", "nq", "hotpotqa", "fiqa", "signal1m", "trec-news",
    "robust04", "arguana", "webis-touche2020", "cqadupstack", "quora", "dbpedia-entity",
    "scidocs", "fever", "climate-fever", "scifact",
)  # fmt: skip
# The domains of BRIGHT, and the instruction that its authors give with a query of each.
STACKEXCHANGE = (
    "biology", "earth_science", "economics", "psychology", "robotics", "stackoverflow",
    "sustainable_living",
)  # fmt: skip
BRIGHT = {
    domain: f"Given a {domain} post, retrieve relevant passages that help answer the post"
    for domain in STACKEXCHANGE
} | {
    "leetcode": "Given a coding problem, retrieve relevant examples that help answer the problem",
    "pony": "Given a pony question, retrieve relevant passages that help answer the question",
    "aops": "Given a Math problem, retrieve relevant examples that help answer the problem",
    "theoremqa_questions": "Given a Math problem, retrieve relevant examples that help answer the "
    "problem",
    "theoremqa_theorems": "Given a Math problem, retrieve relevant theorems that help answer the "
    "problem",
}
# The languages of MIRACL, and into how many files the corpus of each is cut.
MIRACL = {
    "ar": 5, "bn": 1, "de": 32, "en": 66, "es": 21, "fa": 5, "fi": 4, "fr": 30, "hi": 2, "id": 3,
    "ja": 14, "ko": 3, "ru": 20, "sw": 1, "te": 2, "th": 2, "yo": 1, "zh": 10,
}  # fmt: skip
# The languages of mMARCO, as its files are named.
MMARCO = {
    "ar": "arabic", "de": "german", "en": "english", "es": "spanish", "fr": "french",
    "hi": "hindi", "id": "indonesian", "it": "italian", "ja": "japanese", "nl": "dutch",
    "pt": "portuguese", "ru": "russian", "vi": "vietnamese", "zh": "chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Where the answers to a set's questions are: a file, and the columns of a question's id and of
    its answers. by_text: that column holds the question itself, the ids being others. commit: None
    takes the newest. split: the one whose questions these are."""

    repo: str
    commit: str | None
    file: str
    key: str
    answer: str
    split: str
    by_text: bool = False


ANSWERS = {
    # NQ-open (arXiv 1906.00300) has the questions with a short answer. BEIR has other ones too.
    "nq": Answers(
        "google-research-datasets/nq_open", "5dd9790a83002ad084ddeb7c420dc716852c6f28",
        "nq_open/validation-00000-of-00001.parquet", "question", "answer", "test", by_text=True,
    ),
    "triviaqa": Answers(
        "Tevatron/wikipedia-trivia", None, "trivia-dev.jsonl.gz", "query_id", "answers", "dev"
    ),
    # BEIR's test is HotpotQA's dev, under its ids.
    "hotpotqa": Answers(
        "hotpotqa/hotpot_qa", "1908d6afbbead072334abe2965f91bd2709910ab",
        "distractor/validation-00000-of-00001.parquet", "id", "answer", "test",
    ),
}  # fmt: skip
# Questions with a passage that answers each, for training: repository, file, columns. BEIR's nq has
# no train split; these are the questions of Natural Questions' own.
PAIRS = {
    "nq-train": (
        "sentence-transformers/natural-questions", "pair/train-00000-of-00001.parquet",
        "query", "answer",
    )
}  # fmt: skip
FAMILIES = {"cqadupstack": CQADUPSTACK, "bright": BRIGHT, "miracl": MIRACL, "mmarco": MMARCO}
GROUPS = {"all": BEIR} | {
    name: tuple(f"{name}/{part}" for part in parts) for name, parts in FAMILIES.items()
}


def known(data: str) -> bool:
    """Whether the hub has it as one collection: "scifact", "bright/biology", "miracl/sw"."""
    family, _, part = data.partition("/")
    return data in (*HUB_SPLITS, *ANSWERS, *PAIRS) or part in FAMILIES.get(family, ())


def own_split(data: str) -> str:
    """The split that the benchmark's authors measure; test for whatever is not one.

    Raises:
        ValueError: mteb has no such task, or is not installed.
    """
    if data.startswith(mteb_data.PREFIX) and not Path(data).is_dir():
        return mteb_data.own_split(data)
    # Whose judgments of test are few, not public, or none.
    dev = ("msmarco", "miracl", "mmarco", "triviaqa", *PAIRS)
    return "dev" if data.partition("/")[0] in dev and known(data) else "test"


def find(data: str, cache: Path | None) -> Sources:
    """The files of one benchmark, fetched at first use.

    Args:
        data: a name that is `known`.
        cache: of the hub's files; None: huggingface_hub's own.
    Raises:
        ValueError: no network and nothing cached, or a file is not where it was.
    """
    if data in HUB_SPLITS:
        return _beir(data, cache)
    if data == "triviaqa":
        return _triviaqa(cache)
    if data in PAIRS:
        repo, name, query, document = PAIRS[data]
        files, at = _each(repo, [name], None, cache)
        return Sources(data, files, [], {}, {repo: at}, document=document, query=query,
                       beside="train", pairs=True, published=True)  # fmt: skip
    family, _, part = data.partition("/")
    make = {"cqadupstack": _forum, "bright": _bright, "miracl": _miracl, "mmarco": _mmarco}
    return make[family](part, cache)


def _beir(name: str, cache: Path | None) -> Sources:
    """BeIR/<name> and BeIR/<name>-qrels.

    The repositories have moved from gzipped JSON lines to parquet; old commits and caches have the
    former. Judgments come first: they are small, and what fails then fails early.
    """
    qrels: dict[str, Path] = {}
    at: str | None = None
    for split in HUB_SPLITS[name]:
        names = ["dev.tsv", "validation.tsv"] if split == "dev" else [f"{split}.tsv"]
        qrels[split], at = _fetch(f"BeIR/{name}-qrels", names, at, cache)
    provenance = {f"BeIR/{name}-qrels": str(at)}
    files, at = [], None
    for part in ("queries", "corpus"):
        shards = [f"{part}/{part}-00000-of-{n:05}.parquet" for n in range(1, MOST_SHARDS + 1)]
        file, at = _fetch(f"BeIR/{name}", [f"{part}.jsonl.gz", *shards], at, cache)
        count = int(file.stem[-5:]) if file.suffix == ".parquet" else 1
        rest = [f"{part}/{part}-{number:05}-of-{count:05}.parquet" for number in range(1, count)]
        files.append([file, *_each(f"BeIR/{name}", rest, at, cache)[0]])
    provenance[f"BeIR/{name}"] = str(at)
    return Sources(
        name, files[1], files[0], qrels, provenance,
        published=True, own_document=name in OWN_DOCUMENT,
        # Its test split is TREC DL 2019, whose grade 1 is "related, but not relevant".
        relevant={"test": 2} if name == "msmarco" else {},
    )  # fmt: skip


def _forum(forum: str, cache: Path | None) -> Sources:
    """One of the twelve sets whose mean is BEIR's CQADupStack."""
    repo = f"mteb/cqadupstack-{forum}"
    qrels, at = _fetch(repo, ["qrels/test.jsonl", "qrels/test.tsv"], CQADUPSTACK[forum], cache)
    files, at = _each(repo, ["queries.jsonl", "corpus.jsonl"], at, cache)
    return Sources(
        f"cqadupstack-{forum}", files[1:], files[:1], {"test": qrels}, {repo: at}, published=True
    )


def _bright(domain: str, cache: Path | None) -> Sources:
    """xlangai/BRIGHT with its short documents; the judgments stand beside the queries."""
    repo = "xlangai/BRIGHT"
    names = [f"{part}/{domain}-00000-of-00001.parquet" for part in ("examples", "documents")]
    files, at = _each(repo, names, None, cache)
    return Sources(
        f"bright-{domain}", files[1:], files[:1], {}, {repo: at},
        key="id", document="content", query="query", beside="test", published=True,
        instruction=BRIGHT[domain],
    )  # fmt: skip


def _miracl(language: str, cache: Path | None) -> Sources:
    """miracl/miracl (the dev queries) and miracl/miracl-corpus: all of a language's Wikipedia."""
    folder = f"miracl-v1.0-{language}"
    names = [f"{folder}/{part}/{part}.{folder}-dev.tsv" for part in ("topics", "qrels")]
    (topics, qrels), at = _each("miracl/miracl", names, None, cache)
    shards = [f"miracl-corpus-v1.0-{language}/docs-{i}.jsonl.gz" for i in range(MIRACL[language])]
    corpus, of = _each("miracl/miracl-corpus", shards, None, cache)
    return Sources(
        f"miracl-{language}", corpus, [topics], {"dev": qrels},
        {"miracl/miracl": at, "miracl/miracl-corpus": of},
        key="docid", published=True, language=language,
    )  # fmt: skip


def _mmarco(language: str, cache: Path | None) -> Sources:
    """unicamp-dl/mmarco: MS MARCO's passages and 6,980 dev queries, by Google's translator."""
    repo, name = "unicamp-dl/mmarco", MMARCO[language]
    names = [
        "data/qrels.dev.small.tsv",
        f"data/google/queries/dev/{name}_queries.dev.small.tsv",
        f"data/google/collections/{name}_collection.tsv",
    ]
    (qrels, queries, corpus), at = _each(repo, names, None, cache)
    return Sources(
        f"mmarco-{language}", [corpus], [queries], {"dev": qrels}, {repo: at},
        published=True, language=language,
    )  # fmt: skip


def _triviaqa(cache: Path | None) -> Sources:
    """Tevatron/wikipedia-trivia and its corpus: the 21 million passages of 100 words, and the dev
    questions with the passages that hold an answer, of DPR (arXiv 2004.04906, section 4)."""
    of = ANSWERS["triviaqa"]
    queries, at = _each(of.repo, [of.file], of.commit, cache)
    corpus, place = _each(f"{of.repo}-corpus", ["corpus.jsonl.gz"], None, cache)
    return Sources(
        "triviaqa", corpus, queries, {}, {of.repo: at, f"{of.repo}-corpus": place},
        key="docid", query="query", query_key=of.key, beside=of.split, gold="positive_passages",
        excluded="", published=True,
    )  # fmt: skip


def find_answers(data: str, cache: Path | None) -> tuple[Path, str]:
    """The file of answers of one of `ANSWERS`, and the commit that it is from; raises as `find`."""
    of = ANSWERS[data]
    (file,), at = _each(of.repo, [of.file], of.commit, cache)
    return file, at


def _each(
    repo: str, names: Sequence[str], revision: str | None, cache: Path | None
) -> tuple[list[Path], str]:
    """All of `names`, from one commit, and that commit."""
    with contextlib.suppress(Exception):  # which the first file that is absent raises again
        _announce(repo, names, revision, cache)
    files, at = [], revision
    for name in names:
        file, at = _fetch(repo, [name], at, cache, announced=True)
        files.append(file)
    return files, str(at)


def _fetch(
    repo: str, names: list[str], revision: str | None, cache: Path | None, announced: bool = False
) -> tuple[Path, str]:
    """The first of `names` that the repository has, and the commit it was resolved to."""
    failures = []
    for name in names:
        try:
            if not announced:  # what the repository lacks fails here, and is not asked for twice
                _announce(repo, [name], revision, cache)
            file = huggingface_hub.hf_hub_download(
                repo, name, repo_type="dataset", revision=revision, cache_dir=cache
            )
        except Exception as error:  # the network's edge: its errors have no common class
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        commit = Path(file).as_posix().rpartition("/snapshots/")[2].partition("/")[0]
        return Path(file), commit  # .../snapshots/<commit>/<name>
    shown = failures[:2] + [f"and {len(failures) - 2} more"] * (len(failures) > 2)
    raise ValueError(
        f"{repo}: neither in the cache nor to be had from the hub ({'; '.join(shown)}). Without "
        f"a network, load it once on a machine that has one and bring {cache or 'HF_HOME'} over, "
        "or pass a BEIR folder: DATA=path"
    )


def _announce(repo: str, names: Sequence[str], revision: str | None, cache: Path | None) -> None:
    """A line on stderr before a download of `SLOW` bytes or more. Raises as the download would."""
    look = partial(huggingface_hub.hf_hub_download, repo_type="dataset", dry_run=True)
    plan = [look(repo, name, revision=revision, cache_dir=cache) for name in names]
    new = [file for file in plan if file.will_download]
    size = sum(file.file_size or 0 for file in new)
    if size >= SLOW:
        files = new[0].filename if len(new) == 1 else f"{len(new)} files"
        line = f"downloading {repo}, {files}: {size / 1e6:,.0f} MB from the Hugging Face hub"
        print(line, file=sys.stderr, flush=True)
