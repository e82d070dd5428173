"""The commit of the Hugging Face hub at which each known model is taken.

Of another model the newest is taken, or what the config's `revision` says; results record it.
"""

BASES = {  # of the study, beside `smollm2-135m`, which no hub is needed for
    "Qwen/Qwen3-0.6B-Base": "da87bfb608c14b7cf20ba1ce41287e8de496c0cd",
    "Qwen/Qwen3-1.7B-Base": "ea980cb0a6c2ae4b936e82123acc929f1cec04c1",
    "Qwen/Qwen3-4B-Base": "906bfd4b4dc7f14ee4320094d8b41684abff8539",
    "Qwen/Qwen3-8B-Base": "49e3418fbbbca6ecbdf9608b4d22e5a407081db4",
    "mistralai/Mistral-7B-v0.3": "caa1feb0e54d415e2df31207e5f4e273e33509b1",
}
# As MTEB records them. E2Rank is not among them.
PUBLISHED = {
    "Qwen/Qwen3-Embedding-0.6B": "b22da495047858cce924d27d76261e96be6febc0",
    "Qwen/Qwen3-Embedding-4B": "636cd9bf47d976946cdbb2b0c3ca0cb2f8eea5ff",
    "Qwen/Qwen3-Embedding-8B": "4e423935c619ae4df87b646a3ce949610c66241c",
    "Qwen/Qwen3-Reranker-0.6B": "6e9e69830b95c52b5fd889b7690dda3329508de3",
    "Qwen/Qwen3-Reranker-4B": "f16fc5d5d2b9b1d0db8280929242745d79794ef5",
    "Qwen/Qwen3-Reranker-8B": "5fa94080caafeaa45a15d11f969d7978e087a3db",
    "jinaai/jina-reranker-v3": "050e171c4f75dfec5b648ed8470a2475e5a30f30",
}
COMMITS = BASES | PUBLISHED
